# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Where the pages of a KV cache group lie in vLLM's tensors, for each version and attention backend.

What vLLM calls a layer's cache is one tensor with a leading axis of (kernel) blocks. Its shape says how a block is
built; its strides say where that lies in memory, whatever the layout is called:

==============================  ==================================================================================
shape behind the block axis     meaning
==============================  ==================================================================================
``2, N, H, D``                  K and V apart (vLLM 0.25; Triton and FlashAttention)
``H, N, 2D``                    K and V of each token and head side by side (from 0.26 on)
``2H, N, D``                    the heads of K, then those of V (FlashInfer with packed heads)
``H, N, 2D`` on the CPU         the shape only: in memory, each head has its K, then its V, and K lies as D x N
==============================  ==================================================================================

with N tokens, H KV heads, D values a head. Everything else comes back bit for bit: latent caches as values of unknown
kind, and quantised caches, state-space layers and packed blocks as bytes of unknown meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvzip._log import log_once
from kvzip.types import BlockLayout, BlockView, DType, SegmentLayout

_FLOATS = ("torch.bfloat16", "torch.float16", "torch.float32")


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache, as the attention backend sees it.

    Attributes:
        tensor: the layer's tensor, blocks first.
        spec: vLLM's ``KVCacheSpec`` of the layer.
        cpu_isa: on the CPU, the instruction set whose layout its attention kernels use, such as ``"vec"``.
        number: of the layer in the model.
    """

    tensor: Any
    spec: Any
    cpu_isa: str = ""
    number: int = 0


@dataclass(frozen=True)
class Page:
    """What a page of a block is in the model.

    Attributes:
        layer: number of its layer; -1 = not known.
        heads: the KV heads of this worker that it holds, the first and the one behind the last.
    """

    layer: int = -1
    heads: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Group:
    """The blocks of one KV cache group.

    Attributes:
        view: all of them.
        pages: what each page of the view's layout is.
        heads: KV heads of this worker; 0 = not known.
    """

    view: BlockView
    pages: tuple[Page, ...]
    heads: int = 0


def group_view(
    name: str,
    layers: Sequence[LayerCache] | None,
    raw: Sequence[tuple[Any, int]],
) -> Group:
    """The blocks of one KV cache group.

    Args:
        name: of the group, for messages.
        layers: its layers' caches; None when they are not known.
        raw: the same memory as vLLM's canonical tensors: int8, shape ``[num_blocks, page_bytes]``, each with the bytes
            of a page that count.

    Returns:
        All blocks: by geometry if all of it is understood, else as bytes.
    """
    num_blocks = int(raw[0][0].shape[0])
    if layers:
        segments: list[SegmentLayout] = []
        pages: list[Page] = []
        for index, layer in enumerate(layers):
            found = _layer_segments(layer, index, num_blocks)
            if found is None:
                log_once(
                    f"vLLM KV cache group {name}: the page layout is not known, its blocks are kept bit for bit",
                    f"{type(layer.spec).__name__}, {tuple(getattr(layer.tensor, 'shape', ()))}, "
                    f"{getattr(layer.tensor, 'dtype', None)}",
                )
                break
            segments += [segment for segment, _ in found]
            pages += [Page(layer.number, heads) for _, heads in found]
        else:
            tensors = [_by_manager_block(layer.tensor, num_blocks) for layer in layers]
            heads = max(getattr(layer.spec, "num_kv_heads", 0) for layer in layers)
            return Group(BlockView(tensors, BlockLayout(tuple(segments))), tuple(pages), heads)
    tensors = [tensor[:, :nbytes] for tensor, nbytes in raw]
    view = BlockView(tensors, BlockLayout.opaque(tensors, dtype="opaque"))
    return Group(view, (Page(),) * len(view.layout.segments))


def _by_manager_block(tensor: Any, num_blocks: int) -> Any:
    """The tensor with the scheduler's blocks as its first axis; each may hold several of the kernels' blocks."""
    if tensor.shape[0] == num_blocks:
        return tensor
    return tensor.unflatten(0, (num_blocks, -1))


_Pages = list[tuple[SegmentLayout, tuple[int, int]]]  # pages with the heads that they hold


def _layer_segments(layer: LayerCache, index: int, num_blocks: int) -> _Pages | None:
    """Pages of a layer within a block, K before V; None when its layout is not known."""
    tensor, spec = layer.tensor, layer.spec
    heads, dim = getattr(spec, "num_kv_heads", 0), getattr(spec, "head_size", 0)
    plain = (
        heads
        and dim
        and not isinstance(tensor, (list, tuple))
        and str(tensor.dtype) in _FLOATS
        and getattr(spec, "dtype", tensor.dtype) == tensor.dtype
        and not getattr(getattr(spec, "kv_quant_mode", None), "value", 0)
        and tensor.shape[0] % num_blocks == 0
    )
    if not plain:
        return None
    split = tensor.shape[0] // num_blocks
    if spec.block_size % split:
        return None
    tokens = spec.block_size // split
    dim_v = getattr(spec, "head_size_v", None) or dim
    itemsize = tensor.element_size()
    shape = tuple(tensor.shape[1:])
    stride = [s * itemsize for s in tensor.stride()]
    if tensor.stride(-1) != 1:
        return None
    dtype = DType.parse(str(tensor.dtype))

    def page(kind: str, values: int, offset: int, token_stride: int, head_stride: int) -> SegmentLayout:
        return SegmentLayout(index, dtype, tokens, heads, values, offset, token_stride, head_stride, kind)

    pages: list[SegmentLayout]
    if "MLA" in type(spec).__name__:  # keys and values in one vector a token, of unknown sensitivity
        if shape not in ((tokens, shape[-1]), (1, tokens, shape[-1])):
            return None
        pages = [SegmentLayout(index, dtype, tokens, 1, shape[-1], 0, stride[-2], stride[-2])]
    elif shape == (2, tokens, heads, dim) and dim_v == dim:
        pages = [page("k", dim, 0, stride[2], stride[3]), page("v", dim, stride[1], stride[2], stride[3])]
    elif shape == (heads, tokens, dim + dim_v):
        if tensor.device.type == "cpu":
            return _cpu_segments(layer, index, tokens, split)
        pages = [page("k", dim, 0, stride[2], stride[1]), page("v", dim_v, dim * itemsize, stride[2], stride[1])]
    elif shape == (2 * heads, tokens, dim) and dim_v == dim:
        pages = [page("k", dim, 0, stride[2], stride[1]), page("v", dim, heads * stride[1], stride[2], stride[1])]
    else:
        return None
    return _repeat([(p, (0, heads)) for p in pages], split, stride[0])


def _cpu_segments(layer: LayerCache, index: int, tokens: int, split: int) -> _Pages | None:
    """Pages of vLLM's CPU attention: for each head ``2 x N x D`` values, K transposed to ``D x N``.

    Tokens are next to each other in K, so each head is a page of its own whose "heads" are the D channels. Other
    instruction sets tile K: then its values are taken in memory order.
    """
    tensor, spec = layer.tensor, layer.spec
    heads, dim = spec.num_kv_heads, spec.head_size
    item = tensor.element_size()
    if (getattr(spec, "head_size_v", None) or dim) != dim or not tensor[0].is_contiguous():
        return None
    dtype = DType.parse(str(tensor.dtype))
    half = tokens * dim * item
    pages: _Pages = []
    values: _Pages = []
    for head in range(heads):
        at = (2 * head * half, (2 * head + 1) * half)
        if layer.cpu_isa in ("vec", "vec16"):
            key = SegmentLayout(index, dtype, tokens, dim, 1, at[0], item, tokens * item, "k")
        else:
            key = SegmentLayout(index, dtype, 1, 1, tokens * dim, at[0], kind="k")
            values.append((SegmentLayout(index, dtype, 1, 1, tokens * dim, at[1], kind="v"), (head, head + 1)))
        pages.append((key, (head, head + 1)))
    if not values:
        values = [(SegmentLayout(index, dtype, tokens, heads, dim, half, dim * item, 2 * half, "v"), (0, heads))]
    return _repeat(pages + values, split, tensor.stride(0) * item)


def _repeat(pages: _Pages, split: int, stride_bytes: int) -> _Pages:
    """The pages of every kernel block in a block, those of one shape side by side."""
    return [
        (replace(p, offset_bytes=p.offset_bytes + i * stride_bytes), heads) for p, heads in pages for i in range(split)
    ]


def layers_of(
    layer_names: Sequence[str], kv_caches: Mapping[str, Any], spec: Any, isa_of: Mapping[str, str]
) -> list[LayerCache] | None:
    """The caches of a group's layers; layers that share the cache of another one are left out.

    Args:
        layer_names: in vLLM's order.
        kv_caches: what vLLM registered, by layer.
        spec: the group's ``KVCacheSpec``; one for all layers, or vLLM's ``UniformTypeKVCacheSpecs``.
        isa_of: instruction sets of the CPU's attention layers.
    """
    if any(name not in kv_caches for name in layer_names):
        return None
    own = getattr(spec, "kv_cache_specs", {})
    names = {_memory_of(kv_caches[name]): name for name in reversed(layer_names)}  # of several the first
    return [
        LayerCache(kv_caches[name], own.get(name, spec), isa_of.get(name, ""), layer_number(name))
        for name in layer_names
        if names[_memory_of(kv_caches[name])] == name
    ]


def _memory_of(cache: Any) -> Any:
    """What tells caches in other memory, or of another shape, apart."""
    if isinstance(cache, (list, tuple)):
        return id(cache)
    return int(cache.data_ptr()), tuple(cache.shape), tuple(cache.stride())


def layer_number(name: str) -> int:
    """Number of a layer in its model, as in ``model.layers.12.self_attn.attn``; -1 where the name has none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
