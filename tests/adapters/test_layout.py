# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Pages lie where vLLM's attention backends put K and V, in each of the layouts; what is not known is kept as bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the adapter's layouts are those of torch tensors")

from kvzip import ErrorBound, SwapEngine  # noqa: E402
from kvzip.adapters.shard import Shard  # noqa: E402
from kvzip.adapters.vllm.bounds import group_bounds  # noqa: E402
from kvzip.adapters.vllm.layout import LayerCache, group_view, layer_number, layers_of  # noqa: E402
from kvzip.types import DType  # noqa: E402

BLOCKS, TOKENS, HEADS, DIM = 5, 16, 3, 8


def attention(**more: Any) -> Any:
    given = {"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": DIM, "dtype": torch.bfloat16, **more}
    return SimpleNamespace(**given)


def keys_and_values(tokens: int = TOKENS, blocks: int = BLOCKS) -> tuple[Any, Any]:
    """K and V by block, token, head, channel."""
    made = torch.randn((2, blocks, tokens, HEADS, DIM), generator=torch.Generator().manual_seed(0)).bfloat16()
    return made[0], made[1]


def apart(k: Any, v: Any, order: str) -> Any:
    """``[blocks, 2, N, H, D]``, in memory as NHD or HND."""
    if order == "NHD":
        return torch.stack((k, v), 1).contiguous()
    return torch.stack((k, v), 1).transpose(2, 3).contiguous().transpose(2, 3)


def side_by_side(k: Any, v: Any, order: str) -> Any:
    """``[blocks, H, N, 2D]``, in memory as NHD or HND."""
    joined = torch.cat((k, v), -1)
    return joined.contiguous().transpose(1, 2) if order == "NHD" else joined.transpose(1, 2).contiguous()


def heads_apart(k: Any, v: Any, order: str) -> Any:
    """``[blocks, 2H, N, D]``, in memory as NHD or HND."""
    joined = torch.cat((k, v), 2)
    return joined.contiguous().transpose(1, 2) if order == "NHD" else joined.transpose(1, 2).contiguous()


def raw_of(tensor: Any, blocks: int = BLOCKS) -> list[tuple[Any, int]]:
    """The same memory as vLLM's canonical tensor."""
    nbytes = tensor.numel() // blocks * tensor.element_size()
    flat = torch.empty(0, dtype=torch.int8).set_(tensor.untyped_storage(), 0, (blocks, nbytes), (nbytes, 1))
    return [(flat, nbytes)]


def pretend_gpu(tensor: Any) -> Any:
    """A tensor in host memory that says that it lies on a GPU: the CPU's attention has a layout of its own."""

    class OnGpu(torch.Tensor):
        @property
        def device(self) -> Any:  # type: ignore[override]
            return SimpleNamespace(type="cuda", index=0)

    made: Any = tensor.as_subclass(OnGpu)
    return made


def bits(tensor: Any) -> Any:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("build", [apart, side_by_side, heads_apart])
def test_keys_and_values_of_gpu_backends(build: Any, order: str) -> None:
    k, v = keys_and_values()
    cache = build(k, v, order)
    segments = group_view("0", [LayerCache(pretend_gpu(cache), attention())], raw_of(cache)).view.layout.segments
    assert [(s.kind, s.tokens, s.heads, s.head_dim) for s in segments] == [
        ("k", TOKENS, HEADS, DIM),
        ("v", TOKENS, HEADS, DIM),
    ]
    words = bits(torch.empty(0, dtype=torch.bfloat16).set_(cache.untyped_storage(), 0, (cache.numel(),), (1,)))
    for segment, wanted in zip(segments, (k, v), strict=True):
        strides = (cache.stride(0) * 2, segment.token_stride_bytes, segment.head_stride_bytes, 2)
        shape = (BLOCKS, TOKENS, HEADS, DIM)
        found = np.ndarray(shape, np.uint16, words[segment.offset_bytes // 2 :], 0, strides)
        np.testing.assert_array_equal(found, bits(wanted))


def test_values_may_be_of_another_size() -> None:
    cache = torch.zeros((BLOCKS, HEADS, TOKENS, DIM + 4), dtype=torch.bfloat16)
    layer = LayerCache(pretend_gpu(cache), attention(head_size_v=4))
    segments = group_view("0", [layer], raw_of(cache)).view.layout.segments
    assert [(s.kind, s.head_dim, s.offset_bytes) for s in segments] == [("k", DIM, 0), ("v", 4, 2 * DIM)]


@pytest.mark.parametrize("split", [1, 2])
def test_the_cpu_backend_keeps_keys_transposed(split: int) -> None:
    k, v = keys_and_values(TOKENS // split, BLOCKS * split)
    # For each head: K as D x N, then V as N x D.
    cache = torch.stack((k.permute(0, 2, 3, 1).flatten(2), v.permute(0, 2, 1, 3).flatten(2)), 2)
    cache = cache.contiguous().view(BLOCKS * split, HEADS, TOKENS // split, 2 * DIM)
    view = group_view("0", [LayerCache(cache, attention(), "vec")], raw_of(cache)).view
    pages = [s for s in range(len(view.layout.segments)) if view.layout.segments[s].kind == "k"]
    assert len(pages) == HEADS * split
    for block in range(BLOCKS):
        for number, page in enumerate(pages):
            head, part = divmod(number, split)
            wanted = bits(k[block * split + part, :, head])
            np.testing.assert_array_equal(view.page(block, page)[:, :, 0], wanted)
        for part in range(split):
            found = view.page(block, len(pages) + part)
            np.testing.assert_array_equal(found, bits(v[block * split + part]))


def test_other_instruction_sets_are_coded_in_memory_order() -> None:
    cache = torch.zeros((BLOCKS, HEADS, TOKENS, 2 * DIM), dtype=torch.bfloat16)
    view = group_view("0", [LayerCache(cache, attention(), "amx")], raw_of(cache)).view
    assert {(s.tokens, s.heads, s.head_dim) for s in view.layout.segments} == {(1, 1, TOKENS * DIM)}
    assert [s.kind for s in view.layout.segments] == ["k"] * HEADS + ["v"] * HEADS
    assert view.layout.nbytes == raw_of(cache)[0][1]


def test_kernel_blocks_within_a_block() -> None:
    k, v = keys_and_values(8, 2 * BLOCKS)  # the scheduler's blocks are two of the kernel's
    cache = side_by_side(k, v, "HND")
    segments = group_view("0", [LayerCache(pretend_gpu(cache), attention())], raw_of(cache)).view.layout.segments
    half = 2 * 8 * HEADS * DIM * 2
    assert [(s.kind, s.tokens, s.offset_bytes) for s in segments] == [
        ("k", 8, 0),
        ("k", 8, half),
        ("v", 8, 2 * DIM),
        ("v", 8, half + 2 * DIM),
    ]


@pytest.mark.parametrize(
    ("cache", "spec"),
    [
        (torch.zeros((BLOCKS, HEADS, TOKENS, 2 * DIM), dtype=torch.uint8), attention(dtype=torch.uint8)),
        (torch.zeros((BLOCKS, HEADS, TOKENS, 2 * DIM + 3), dtype=torch.bfloat16), attention()),
        (torch.zeros((BLOCKS, 64), dtype=torch.float32), SimpleNamespace(block_size=TOKENS)),
    ],
    ids=["fp8", "unknown shape", "state space"],
)
def test_what_is_not_known_comes_back_bit_for_bit(cache: Any, spec: Any) -> None:
    storage = cache.view(torch.int8)
    storage.copy_(torch.randint(-128, 128, storage.shape, dtype=torch.int8))
    view = group_view("0", [LayerCache(cache, spec)], raw_of(cache)).view
    assert {s.dtype for s in view.layout.segments} == {DType.OPAQUE}
    before = storage.clone()
    with SwapEngine(1 << 20, bound=ErrorBound.relative(1e-2)) as engine:
        engine.store([b"%d" % i for i in range(BLOCKS)], view)
        storage.zero_()
        engine.load([b"%d" % i for i in range(BLOCKS)], view)
    assert torch.equal(storage, before)


class MLAAttentionSpec(SimpleNamespace):
    """Named as vLLM's class for latent caches."""


@pytest.mark.parametrize("heads", [(), (1,)])
def test_latent_caches_are_exact_and_coded_along_tokens(heads: tuple[int, ...]) -> None:
    cache = torch.randn((BLOCKS, *heads, TOKENS, 40), generator=torch.Generator().manual_seed(3)).bfloat16()
    spec = MLAAttentionSpec(**vars(attention(num_kv_heads=1, head_size=40)))
    group = group_view("0", [LayerCache(cache, spec)], raw_of(cache))
    (segment,) = group.view.layout.segments
    assert (segment.kind, segment.tokens, segment.heads, segment.head_dim) == ("", TOKENS, 1, 40)
    policy = group_bounds(ErrorBound.relative(1e-1), group, Shard())
    before = cache.clone()
    with SwapEngine(1 << 20) as engine:
        engine.store([b"x", b"y"], group.view[[1, 2]], bound=policy)
        engine.load([b"x", b"y"], group.view[[2, 1]])
        assert engine.stats().ratio > 1.1
    assert torch.equal(cache[[2, 1]], before[[1, 2]])


def test_padding_at_the_end_of_a_page_is_left_alone() -> None:
    cache = torch.full((BLOCKS, 64), 7, dtype=torch.int8)
    view = group_view("0", None, [(cache, 48)]).view
    assert view.layout.nbytes == 48
    with SwapEngine(1 << 20) as engine:
        engine.store([b"x"], view[[1]])
        cache.zero_()
        engine.load([b"x"], view[[2]])
    assert cache[2].tolist() == [7] * 48 + [0] * 16


def test_layers_of_a_group() -> None:
    caches = {name: torch.zeros((2, 4)) for name in "ab"}
    own = SimpleNamespace(kv_cache_specs={"a": 1, "b": 2})
    found = layers_of(["b", "a"], caches, own, {"a": "vec"})
    assert found is not None
    assert [(layer.spec, layer.cpu_isa, layer.number) for layer in found] == [(2, "", -1), (1, "vec", -1)]
    assert layer_number("model.layers.12.self_attn.attn") == 12
    assert layers_of(["a", "c"], caches, own, {}) is None


def test_layers_that_share_a_cache_are_one() -> None:
    """Some models let later layers read the cache of an earlier one; vLLM then names both."""
    k, v = keys_and_values()
    first, other = apart(k, v, "NHD"), apart(v, k, "NHD")
    caches = {"layers.0": first, "layers.1": other, "layers.2": first, "layers.3": first[:]}
    found = layers_of(list(caches), caches, attention(), {})
    assert found is not None
    assert [layer.number for layer in found] == [0, 1]
    raw = [(t.view(torch.int8).reshape(BLOCKS, -1), t[0].nbytes) for t in (first, other)]
    group = group_view("0", found, raw)
    assert group.view.writable
    assert len(group.pages) == 4
