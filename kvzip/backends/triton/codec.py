# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Launches the Triton kernels: a batch of blocks to payloads in device memory, and back.

A call costs five kernel launches to encode and four to decode for each pair of dtype and group shape that the layout
has (usually one), and some small torch operations between them. It allocates its workspace from torch's caching
allocator: about 60 bytes a page, 20 bytes for every 256 groups, 2 bytes for every group of 16 values. Nothing is copied
to the host, and the host does not wait for the device, except where a docstring says "blocks the host".

With ``TRITON_INTERPRET=1`` in the environment when Triton is first imported, the kernels run on CPU tensors, slowly:
for tests.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvzip.errors import BackendUnavailableError, ConfigError, CorruptRecordError, LayoutError
from kvzip.record import ALIGNMENT, KINDS, align
from kvzip.types import BlockLayout, BlockView, BoundKind, DType, ErrorBound

if TYPE_CHECKING:
    import torch

#: Kinds of error bound that it has.
BOUND_KINDS = frozenset((BoundKind.LOSSLESS, BoundKind.ABSOLUTE, BoundKind.RELATIVE))

_TILE_GROUPS = 256  # groups of one program; a multiple of 8
_NUM_WARPS = 4
_LANES = 256  # of the programs that work on one page's tiles
_MAX_PLANS = 64

_STATUS = {
    1: "it contradicts the format",
    2: "its coding belongs to a mode that the Triton codec does not have (it has 'fixed')",
}


class EncodedBlocks(NamedTuple):
    """What `encode_blocks` returns; every tensor is on the device of the pages.

    Attributes:
        payload: uint8, flat: the payloads. Bytes that belong to no payload are unspecified.
        offsets: int64 ``[blocks]``: where the payload of each block starts, in bytes, a multiple of 16.
        payload_bytes: int64 ``[blocks]``: its size in bytes, a multiple of 16.
        table: uint8 ``[blocks, pages, 16]``: the segment tables as they stand in a record; in host memory
            ``table.numpy().view(kvzip.record.ENTRY_DTYPE)[..., 0]``.
    """

    payload: torch.Tensor
    offsets: torch.Tensor
    payload_bytes: torch.Tensor
    table: torch.Tensor


def available() -> tuple[bool, str]:
    """Whether this backend can run here, and where, or what is missing. Starts no work on a device."""
    for module in ("torch", "triton"):
        if find_spec(module) is None:
            return False, f"{module} is not installed: pip install {module}"
    try:
        import torch
        import triton

        if interpreted():
            return True, f"triton {triton.__version__}, interpreter (CPU tensors)"
        if not torch.cuda.is_available():
            return False, "torch finds no GPU: install a torch build and a driver for it"
        return True, f"triton {triton.__version__} on {torch.cuda.get_device_name()}"
    except Exception as error:  # a broken installation is a reason, not a failure of the caller
        return False, f"triton cannot be used: {type(error).__name__}: {error}"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors. Imports Triton."""
    from triton.runtime.interpreter import InterpretedFunction

    from kvzip.backends.triton import kernels

    return isinstance(kernels.scan_tiles, InterpretedFunction)


def _require(device: str) -> None:
    usable, detail = available()
    if not usable:
        raise BackendUnavailableError(f"the Triton codec cannot run: {detail}")
    if (device == "cpu") != interpreted():
        raise BackendUnavailableError(
            f"the Triton codec cannot work on tensors on {device}: here it is {detail}; "
            "move the tensors, or use the native codec"
        )


def max_payload_bytes(layout: BlockLayout) -> int:
    """Most bytes that the payload of one block can take, a multiple of 16."""
    return sum(align(max(s.nbytes, 4)) for s in layout.segments)


# ---- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Class:
    """The segments that one launch can handle: those of one dtype and group shape."""

    fp16: bool
    group_tokens: int
    split: bool  # a group may lie in two heads
    tile_map: torch.Tensor  # int32 [tiles, 2]: segment, tile within it
    tiles: int


@dataclass(frozen=True)
class _Plan:
    """What depends on the tensors and their layout alone; lives on the device."""

    desc: torch.Tensor  # int64 [segments, DESC_COLUMNS], see kernels.py
    classes: tuple[_Class, ...]
    tiles: int  # of a block, all classes
    groups: int  # of a block
    device: torch.device


_plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
_plans_lock = threading.Lock()


def _plan_of(view: BlockView, stream_key: int) -> _Plan:
    places = tuple((view.address(i), view.block_stride_bytes(i)) for i in range(len(view.tensors)))
    # The tables of a plan are uploaded on a stream, so a plan belongs to that stream.
    key = (view.layout, places, view.device, stream_key, _TILE_GROUPS)
    with _plans_lock:
        plan = _plans.get(key)
        if plan is None:
            plan = _plans[key] = _make_plan(view, places)
            while len(_plans) > _MAX_PLANS:
                _plans.popitem(last=False)
        _plans.move_to_end(key)
        return plan


def _make_plan(view: BlockView, places: Sequence[tuple[int, int]]) -> _Plan:
    import torch

    from kvzip.backends.triton import kernels

    desc = np.zeros((len(view.layout.segments), int(kernels.DESC_COLUMNS)), np.int64)
    maps: dict[tuple[bool, int], list[npt.NDArray[np.int32]]] = {}
    splits: dict[tuple[bool, int], bool] = {}
    tiles = groups = 0
    for index, s in enumerate(view.layout.segments):
        if s.dtype not in (DType.BFLOAT16, DType.FLOAT16):
            raise LayoutError(
                f"page {index} is {s.dtype.name.lower()}: the Triton codec has bfloat16 and float16; "
                "use the native codec"
            )
        address, block_stride = places[s.tensor]
        geometry = (address + s.offset_bytes, block_stride, s.token_stride_bytes, s.head_stride_bytes)
        if any(n % 2 for n in geometry):
            raise LayoutError(
                f"page {index}: address and strides {geometry} must be even for a 16-bit dtype: align the tensor"
            )
        channels, group_channels = s.heads * s.head_dim, 16 // s.group_tokens
        head_dim, head_stride = s.head_dim, s.head_stride_bytes
        if s.heads == 1 or head_stride == head_dim * 2:  # heads follow each other: one long head
            head_dim, head_stride = channels, channels * 2
        columns = -(-channels // group_channels)
        num_groups = -(-s.tokens // s.group_tokens) * columns
        num_tiles = -(-num_groups // _TILE_GROUPS)
        row = {
            kernels.BASE: geometry[0],
            kernels.BLOCK_STRIDE: block_stride // 2,
            kernels.TOKEN_STRIDE: s.token_stride_bytes // 2,
            kernels.HEAD_STRIDE: head_stride // 2,
            kernels.TOKENS: s.tokens,
            kernels.CHANNELS: channels,
            kernels.HEAD_DIM: head_dim,
            kernels.COLUMNS: columns,
            kernels.GROUPS: num_groups,
            kernels.FIRST_TILE: tiles,
            kernels.NUM_TILES: num_tiles,
            kernels.FIRST_GROUP: groups,
            kernels.IS_FP16: s.dtype is DType.FLOAT16,
            kernels.KIND: KINDS.index(s.kind),
        }
        for column, value in row.items():
            desc[index, int(column)] = int(value)
        class_key = (s.dtype is DType.FLOAT16, s.group_tokens)
        tile_map = np.empty((num_tiles, 2), np.int32)
        tile_map[:, 0], tile_map[:, 1] = index, np.arange(num_tiles)
        maps.setdefault(class_key, []).append(tile_map)
        splits[class_key] = splits.get(class_key, False) or head_dim % group_channels != 0
        tiles += num_tiles
        groups += num_groups
    device = torch.device(view.device)
    classes = []
    for (fp16, group_tokens), parts in maps.items():
        tile_map = np.concatenate(parts)
        classes.append(_Class(fp16, group_tokens, splits[fp16, group_tokens], _upload(tile_map, device), len(tile_map)))
    return _Plan(_upload(desc, device), tuple(classes), tiles, groups, device)


def _upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device, in stream order; the host does not wait."""
    import torch

    source = torch.from_numpy(np.array(array))
    return source if device.type == "cpu" else source.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def _on(view: BlockView, stream: Any) -> Iterator[int]:
    """Make a view's device and the stream current; gives a number that identifies the stream."""
    import torch

    if view.device == "cpu":
        yield 0
        return
    with torch.cuda.device(view.device), torch.cuda.stream(stream):
        yield int(torch.cuda.current_stream().cuda_stream)


# ---- encode ----------------------------------------------------------------------------------------------------------


def encode_blocks(
    view: BlockView,
    bounds: ErrorBound | Sequence[ErrorBound],
    coding: str = "fixed",
    out: torch.Tensor | None = None,
    *,
    stream: torch.cuda.Stream | None = None,
) -> EncodedBlocks:
    """Encode every block of a view. Enqueues work; does not block the host.

    Args:
        view: bfloat16 or float16 pages on a GPU (on the CPU with Triton's interpreter).
        bounds: the error bound, one for all pages or one for each page of a block; a lossless one selects the lossless
            coding.
        coding: ``"fixed"``, the one quantised coding that this implementation has.
        out: where the payloads go: None = a new tensor; uint8 ``[nbytes]``, contiguous: payloads follow each other;
            uint8 ``[len(view), stride]``, rows contiguous: payload i starts at row i. Room for `max_payload_bytes` a
            block is required, because sizes are known on the device only; address and stride are multiples of 16.
        stream: the stream to work on; by default torch's current stream of the device.

    Returns:
        Payloads, their offsets and sizes, and the segment tables, on the device: see `EncodedBlocks`. To learn the
        sizes on the host, copy `payload_bytes` there, which is what waits for the encoder.

    Raises:
        BackendUnavailableError: Triton or a GPU is missing.
        ConfigError: `coding`, `bounds` or `out` do not fit.
        LayoutError: a page is neither bfloat16 nor float16, or not aligned to 2 bytes.
    """
    if coding != "fixed":
        raise ConfigError(
            f"coding {coding!r}: the Triton codec has 'fixed' (and lossless bounds); use the native codec"
        )
    segments, blocks = len(view.layout.segments), len(view)
    each = [bounds] * segments if isinstance(bounds, ErrorBound) else list(bounds)
    if len(each) != segments:
        raise ConfigError(f"{len(each)} bounds for {segments} pages: give one for all pages or one for each")
    for bound in each:
        if bound.kind not in BOUND_KINDS:
            raise ConfigError(f"bound {bound}: the Triton codec has bounds of a page alone; use the native codec")
    _require(view.device)
    import torch

    from kvzip.backends.triton import kernels

    with _on(view, stream) as stream_key:
        plan = _plan_of(view, stream_key)
        device = plan.device
        most = max_payload_bytes(view.layout)
        out, stride = _output(out, blocks, most, device)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        table = empty(blocks, segments, 4)
        if blocks == 0:
            nothing = empty(0, dtype=torch.int64)
            return EncodedBlocks(out.reshape(-1), nothing, nothing, table.view(torch.uint8))
        # Numbers of the blocks, kinds of bounds, bounds: one upload.
        request = np.empty(blocks + 2 * segments, np.int64)
        request[:blocks] = view.block_ids
        request[blocks : blocks + segments] = [int(b.kind) for b in each]
        request[blocks + segments :] = np.array([b.value for b in each], np.float64).view(np.int64)
        on_device = _upload(request, device)
        ids, kinds = on_device[:blocks], on_device[blocks : blocks + segments]
        values = on_device[blocks + segments :].view(torch.float64)

        low, high, differs = (empty(blocks * plan.tiles) for _ in range(3))
        fixed_words, lossless_words = low, high  # the extremes are no longer needed then
        first_words = empty(blocks * plan.tiles, dtype=torch.int64)
        meta = empty(blocks * segments, int(kernels.META_COLUMNS))
        classes = empty(blocks * plan.groups, dtype=torch.int16)
        units = empty(blocks, segments, dtype=torch.int64)

        for c in plan.classes:
            kernels.scan_tiles[(blocks * c.tiles,)](
                plan.desc, ids, c.tile_map, c.tiles, plan.tiles, low, high, differs,
                G=c.group_tokens, SPLIT=c.split, FP16=c.fp16, TILE=_TILE_GROUPS, **_OPTIONS,
            )  # fmt: skip
        kernels.bound_pages[(blocks * segments,)](
            plan.desc, kinds, values, segments, plan.tiles, low, high, differs, meta, LANES=_LANES, **_OPTIONS
        )
        for c in plan.classes:
            kernels.classify_tiles[(blocks * c.tiles,)](
                plan.desc, ids, c.tile_map, c.tiles, plan.tiles, plan.groups, segments, meta, classes,
                fixed_words, lossless_words,
                G=c.group_tokens, SPLIT=c.split, FP16=c.fp16, TILE=_TILE_GROUPS, **_OPTIONS,
            )  # fmt: skip
        kernels.plan_pages[(blocks * segments,)](
            plan.desc, segments, plan.tiles, meta, kinds, fixed_words, lossless_words, first_words, table, units,
            LANES=_LANES, **_OPTIONS,
        )  # fmt: skip
        ends = torch.cumsum(units, 1)
        table[:, :, 0] = ends - units
        payload_bytes = ends[:, -1] * ALIGNMENT
        if stride is None:
            offsets = torch.cumsum(payload_bytes, 0) - payload_bytes
        else:
            offsets = torch.arange(blocks, dtype=torch.int64, device=device) * stride
        for c in plan.classes:
            kernels.write_tiles[(blocks * c.tiles,)](
                plan.desc, ids, c.tile_map, c.tiles, plan.tiles, plan.groups, segments, classes, first_words, table,
                offsets, out,
                G=c.group_tokens, SPLIT=c.split, FP16=c.fp16, TILE=_TILE_GROUPS, **_OPTIONS,
            )  # fmt: skip
        flat = out if out.dim() == 1 else torch.as_strided(out, ((blocks - 1) * out.stride(0) + out.shape[1],), (1,))
        return EncodedBlocks(flat, offsets, payload_bytes, table.view(torch.uint8))


#: The format forbids a fused multiply-add (kernels.py).
_OPTIONS: dict[str, Any] = {"num_warps": _NUM_WARPS, "enable_fp_fusion": False}


def _output(out: torch.Tensor | None, blocks: int, most: int, device: torch.device) -> tuple[torch.Tensor, int | None]:
    """The output tensor, and its stride in bytes when every block has a row of its own."""
    import torch

    if out is None:
        return torch.empty(blocks * most, dtype=torch.uint8, device=device), None
    if out.dtype != torch.uint8 or out.device != device or out.dim() not in (1, 2) or out.stride(-1) != 1:
        raise ConfigError(
            f"out is {out.dtype}, {out.dim()} axes, on {out.device}: "
            f"give a contiguous uint8 tensor on {device} with 1 or 2 axes"
        )
    if out.data_ptr() % ALIGNMENT or (out.dim() == 2 and out.stride(0) % ALIGNMENT):
        raise ConfigError(
            f"out starts at {out.data_ptr():#x}: its address and its rows must be multiples of {ALIGNMENT}"
        )
    if out.dim() == 1:
        if out.numel() < blocks * most:
            raise ConfigError(f"out has {out.numel()} bytes, {blocks} blocks can take {blocks * most}: give that much")
        return out, None
    if out.shape[0] < blocks or out.shape[1] < most:
        raise ConfigError(f"out has shape {tuple(out.shape)}: {blocks} rows of at least {most} bytes are needed")
    return out, int(out.stride(0))


# ---- decode ----------------------------------------------------------------------------------------------------------


def decode_blocks(
    view: BlockView,
    payload: torch.Tensor,
    offsets: torch.Tensor,
    payload_bytes: torch.Tensor,
    table: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """Decode payloads into the blocks of a view. Enqueues work; does not block the host.

    The bytes may be hostile: the device checks them before the first value is written, and writes nothing at all if a
    segment of the batch is bad. Otherwise it writes every value of every page.

    Args:
        view: where the values go.
        payload: uint8, flat and contiguous, on the view's device, its address a multiple of 2.
        offsets: int64 ``[len(view)]``: where the payload of each block starts, in bytes, a multiple of 16.
        payload_bytes: int64 ``[len(view)]``: its size in bytes.
        table: uint8 ``[len(view), pages, 16]``: the segment tables.
        stream: the stream to work on; by default torch's current stream of the device.

    Returns:
        int32 ``[len(view), pages]`` on the device: 0 = good; give it to `check_status` to raise.

    Raises:
        BackendUnavailableError: Triton or a GPU is missing.
        ConfigError: a tensor has the wrong dtype, shape or device.
        LayoutError: a page is neither bfloat16 nor float16, or not aligned to 2 bytes.
    """
    _require(view.device)
    import torch

    from kvzip.backends.triton import kernels

    segments, blocks = len(view.layout.segments), len(view)
    device = torch.device(view.device)
    for name, tensor, dtype, shape in (
        ("payload", payload, torch.uint8, (payload.numel(),)),
        ("offsets", offsets, torch.int64, (blocks,)),
        ("payload_bytes", payload_bytes, torch.int64, (blocks,)),
        ("table", table, torch.uint8, (blocks, segments, 16)),
    ):
        if (
            tensor.dtype != dtype
            or tuple(tensor.shape) != shape
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            raise ConfigError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: "
                f"a contiguous tensor of {dtype} {shape} on {device} is needed"
            )
    if payload.data_ptr() % 2:
        raise ConfigError(f"payload starts at {payload.data_ptr():#x}: its address must be even")
    with _on(view, stream) as stream_key:
        plan = _plan_of(view, stream_key)
        status = torch.empty((blocks, segments), dtype=torch.int32, device=device)
        if blocks == 0:
            return status
        entries = table.view(torch.int32)
        ids = _upload(view.block_ids, device)
        sizes = entries[:, :, 1].to(torch.int64) & 0xFFFFFFFF
        ends = torch.cumsum((sizes + (ALIGNMENT - 1)) // ALIGNMENT, 1)
        words = torch.empty(blocks * plan.tiles, dtype=torch.int32, device=device)
        first_words = torch.empty(blocks * plan.tiles, dtype=torch.int64, device=device)

        kernels.check_pages[(blocks * segments,)](
            plan.desc, segments, payload.numel(), payload, offsets, payload_bytes, entries, ends, status, **_OPTIONS
        )
        for c in plan.classes:
            kernels.measure_tiles[(blocks * c.tiles,)](
                plan.desc, c.tile_map, c.tiles, plan.tiles, segments, payload, offsets, entries, status, words,
                FP16=c.fp16, TILE=_TILE_GROUPS, **_OPTIONS,
            )  # fmt: skip
        kernels.place_pages[(blocks * segments,)](
            plan.desc, segments, plan.tiles, entries, status, words, first_words, LANES=_LANES, **_OPTIONS
        )
        worst = status.amax()
        for c in plan.classes:
            kernels.read_tiles[(blocks * c.tiles,)](
                plan.desc, ids, c.tile_map, c.tiles, plan.tiles, segments, payload, offsets, entries, first_words,
                worst,
                G=c.group_tokens, SPLIT=c.split, FP16=c.fp16, TILE=_TILE_GROUPS, **_OPTIONS,
            )  # fmt: skip
        return status


def check_status(status: torch.Tensor) -> None:
    """Raise for what `decode_blocks` found. Blocks the host until the decoder is done.

    Args:
        status: what `decode_blocks` returned.

    Raises:
        CorruptRecordError: a segment contradicts the format; no page of the batch was written.
        BackendUnavailableError: a segment has a coding of other modes; no page of the batch was written.
    """
    found = status.cpu().numpy()
    bad = np.argwhere(found != 0)
    if not len(bad):
        return
    block, page = (int(n) for n in bad[0])
    code = int(found[block, page])
    message = (
        f"block {block} of the batch, page {page}: {_STATUS[code]} ({len(bad)} of {found.size} pages are bad); "
        "nothing was written"
    )
    if (found == 1).any():
        raise CorruptRecordError(message)
    raise BackendUnavailableError(f"{message}; use the native codec")
