# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Run the Triton codec beside the native CPU codec on the same blocks, and compare every byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be there before Triton is imported
pytest.importorskip("triton")

from kvzip import _native  # noqa: E402
from kvzip.backends import triton as codec  # noqa: E402
from kvzip.errors import BackendUnavailableError, CorruptRecordError  # noqa: E402
from kvzip.record import ENTRY_DTYPE, Coding  # noqa: E402
from kvzip.types import BlockLayout, BlockView, BoundKind, ErrorBound  # noqa: E402

Bits = npt.NDArray[Any]
Select = Callable[[Any], Any]

POISON = 0x5A5A


def device() -> str:
    """Where the Triton kernels run here: on the CPU with the interpreter, else on the GPU."""
    usable, detail = codec.available()
    if not usable:
        pytest.skip(detail)
    return "cpu" if "interpreter" in detail else "cuda:0"


def shorten_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter prepare ``triton.language`` once a launch, not at every call between functions of a kernel.

    It makes the tests twice as fast and changes nothing else; without a Triton that looks like this they are slow.
    """
    from triton.runtime.interpreter import InterpretedFunction

    from kvzip.backends.triton import kernels

    original = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.fn, "__module__", "") == kernels.__name__:
            return self.rewrite()(*args, **kwargs)
        return original(self, *args, **kwargs)

    if hasattr(InterpretedFunction, "rewrite"):
        monkeypatch.setattr(InterpretedFunction, "__call__", call)


def on_device(bits: Bits) -> Any:
    """A tensor of the bit patterns, int16, contiguous."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16).copy()).to(device())


def host(tensor: Any) -> Bits:
    """The bit patterns of a tensor of `on_device`."""
    return np.asarray(tensor.cpu().numpy()).view(np.uint16)


def native_encode(view: BlockView, bounds: Sequence[ErrorBound]) -> tuple[list[Bits], Bits]:
    """Payloads and segment tables of the native CPU codec."""
    codings = [Coding.LOSSLESS if b.kind is BoundKind.LOSSLESS else Coding.FIXED for b in bounds]
    out = np.empty((len(view), codec.max_payload_bytes(view.layout)), np.uint8)
    segments = _native.segments_array(view, bounds, codings)
    table, sizes = _native.cpu_encode(segments, view.block_ids, out)
    return [out[i, : int(n)].copy() for i, n in enumerate(sizes)], table


def fetch(encoded: codec.EncodedBlocks) -> tuple[list[Bits], Bits]:
    """Payloads and segment tables of `encode_blocks` in host memory."""
    payload = encoded.payload.cpu().numpy()
    offsets, sizes = encoded.offsets.cpu().numpy(), encoded.payload_bytes.cpu().numpy()
    table = encoded.table.cpu().numpy().view(ENTRY_DTYPE)[..., 0]
    return [payload[o : o + n] for o, n in zip(offsets, sizes, strict=True)], table


def send(payloads: Sequence[Bits], table: Bits) -> codec.EncodedBlocks:
    """The reverse of `fetch`."""
    sizes = np.array([p.size for p in payloads], np.int64)
    offsets = np.cumsum(sizes) - sizes
    entries = np.ascontiguousarray(table).view(np.uint8).reshape(*table.shape, 16)
    parts = (np.concatenate(payloads) if len(payloads) else np.empty(0, np.uint8), offsets, sizes, entries)
    return codec.EncodedBlocks(*(torch.from_numpy(a.copy()).to(device()) for a in parts))


def check_batch(
    bases: Sequence[Bits],
    layout: BlockLayout | str,
    bounds: ErrorBound | Sequence[ErrorBound],
    block_ids: Sequence[int] | None = None,
    *,
    dtype: str = "bfloat16",
    select: Select = lambda a: a,
) -> Bits:
    """Encode and decode blocks with both codecs; all bytes have to be equal. Returns the segment tables.

    Args:
        bases: bit patterns, uint16, blocks first.
        layout: a layout of the tensors, or the order of their axes.
        bounds: one error bound, or one a page.
        block_ids: blocks to encode, by default all.
        dtype: element type, when `layout` is not a layout.
        select: picks from a base the tensor that holds the blocks, the same for NumPy and torch.
    """
    arrays = [select(b) for b in bases]
    if isinstance(layout, str):
        layout = BlockLayout.from_tensors(arrays, layout, dtype=dtype, kinds="kv")
    each = [bounds] * len(layout.segments) if isinstance(bounds, ErrorBound) else list(bounds)
    expected, expected_table = native_encode(BlockView(arrays, layout, block_ids), each)

    moved = [on_device(b) for b in bases]
    encoded = codec.encode_blocks(BlockView([select(t) for t in moved], layout, block_ids), each)
    payloads, table = fetch(encoded)
    assert table.tolist() == expected_table.tolist()
    for i, (got, want) in enumerate(zip(payloads, expected, strict=True)):
        assert np.array_equal(got, want), f"block {i}: first difference at {np.flatnonzero(got != want)[:1]}"
    for base, tensor in zip(bases, moved, strict=True):
        assert np.array_equal(host(tensor), base), "encoding changed the pages"

    fresh = [np.full(b.shape, POISON, np.uint16) for b in bases]
    to_fill = [on_device(b) for b in fresh]
    status = codec.decode_blocks(BlockView([select(t) for t in to_fill], layout, block_ids), *encoded)
    codec.check_status(status)
    view = BlockView([select(b) for b in fresh], layout, block_ids)
    _native.cpu_decode(_native.segments_array(view), view.block_ids, expected, expected_table)
    for base, tensor in zip(fresh, to_fill, strict=True):
        assert np.array_equal(host(tensor), base), "the decoders differ, or one wrote beside its pages"
    return table


def check_hostile(layout: BlockLayout, payloads: Sequence[Bits], table: Bits) -> bool:
    """Decode bytes that may be damaged with both codecs: both refuse them and write nothing, or both give the same.

    Returns:
        Whether they were good.
    """
    blocks = len(payloads)
    assert layout.num_tensors == len(layout.segments), "a layout with one tensor a page is needed"
    fresh = [np.full((blocks, s.tokens, s.heads, s.head_dim), POISON, np.uint16) for s in layout.segments]
    to_fill = [on_device(b) for b in fresh]
    status = codec.decode_blocks(BlockView(to_fill, layout), *send(payloads, table))
    view = BlockView(fresh, layout)
    try:
        _native.cpu_decode(_native.segments_array(view), view.block_ids, payloads, table)
        good = True
    except CorruptRecordError:
        good = False
    if good:
        codec.check_status(status)
    else:
        with pytest.raises((CorruptRecordError, BackendUnavailableError)):
            codec.check_status(status)
    for base, tensor in zip(fresh, to_fill, strict=True):
        assert np.array_equal(host(tensor), base)
    return good
