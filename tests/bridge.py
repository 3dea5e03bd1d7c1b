# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The same page, block or record for kvzip and for the reference codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import reference_codec as ref

from kvzip.backends.base import EncodeRequest
from kvzip.backends.registry import get_codec
from kvzip.coding import encode_records
from kvzip.record import ENTRY_DTYPE, read_record
from kvzip.types import BlockLayout, BlockView, BoundKind, DType, ErrorBound, SegmentLayout

Bits = npt.NDArray[Any]

MODES = {ref.FIXED: "fixed", ref.PLAIN: "plain", ref.OUTLIER: "outlier", ref.RICE: "rice"}
MODE_NUMBERS = {
    "none": ref.MODE_NONE,
    "fixed": ref.MODE_FIXED,
    "plain": ref.MODE_PLAIN,
    "outlier": ref.MODE_OUTLIER,
    "rice": ref.MODE_RICE,
}
KINDS = ("", "k", "v")


def error_bound(kind: int, value: float, table: npt.NDArray[Any] | None = None, heads: int = 1) -> ErrorBound:
    """kvzip's bound for the numbers of the format."""
    if table is None:
        return ErrorBound(BoundKind(kind), value)
    # The format allows zeros in a table, for channels that stay exact; kvzip makes them of bounds below 2^-96.
    bounds = np.where(np.asarray(table) == 0, 2.0**-100, np.asarray(table, np.float64))
    return ErrorBound.channel_table(bounds.reshape(heads, -1))


def layout_of(geometries: Sequence[ref.Geometry], kinds: Sequence[int] | None = None, dims: str = "") -> BlockLayout:
    """A layout with a contiguous tensor [blocks, tokens, heads, head_dim] for each page."""
    return BlockLayout(
        tuple(
            SegmentLayout(
                tensor=i,
                dtype=DType(g.dtype),
                tokens=g.tokens,
                heads=g.heads,
                head_dim=g.head_dim,
                token_stride_bytes=g.channels * ref.TYPES[g.dtype].bits // 8,
                head_stride_bytes=g.head_dim * ref.TYPES[g.dtype].bits // 8,
                kind=KINDS[kinds[i]] if kinds else "",
                group_tokens=g.group_tokens,
            )
            for i, g in enumerate(geometries)
        ),
        dims,
    )


def view_of(
    blocks: Sequence[Sequence[Bits]],
    geometries: Sequence[ref.Geometry],
    kinds: Sequence[int] | None = None,
    dims: str = "",
) -> BlockView:
    """Blocks (each a list of pages, [T, C]) as kvzip's view of one contiguous tensor a page."""
    arrays = [
        np.stack([block[i].reshape(g.tokens, g.heads, g.head_dim) for block in blocks])
        for i, g in enumerate(geometries)
    ]
    return BlockView(arrays, layout_of(geometries, kinds, dims))


@dataclass(frozen=True)
class Encoded:
    """What kvzip's codec made of one page."""

    segment: ref.Segment
    payload: npt.NDArray[np.uint8]
    table: npt.NDArray[Any]


def native_encode(
    blocks: Sequence[Bits],
    geometry: ref.Geometry,
    coding: int,
    kind: int,
    bound: float,
    *,
    table: npt.NDArray[Any] | None = None,
    threads: int = 1,
) -> list[Encoded]:
    """Encode blocks of one page each with kvzip's codec `cuszp`."""
    codec = get_codec("cuszp")
    view = view_of([[b] for b in blocks], [geometry])
    stride = codec.max_payload_bytes(view.layout)
    guard = 64
    out = np.full((len(blocks), stride + guard), 0xA5, np.uint8)
    asked = error_bound(kind, bound, table, geometry.heads)
    tables, sizes = codec.encode_blocks(view, EncodeRequest(asked, MODES[coding], threads), out[:, :stride])
    assert (out[:, stride:] == 0xA5).all(), "the encoder wrote beyond its worst case"
    made = []
    for i in range(len(blocks)):
        entry = tables[i, 0]
        size = int(entry["size"])
        payload = out[i, : int(sizes[i])]
        assert int(entry["offset"]) == 0
        assert payload.size == -(-size // 16) * 16
        assert not payload[size:].any()
        segment = ref.Segment(
            payload[:size].tobytes(),
            int(entry["coding"]),
            float(entry["bound"]),
            int(entry["param"]),
            int(entry["reason"]),
        )
        made.append(Encoded(segment, payload.copy(), tables[i]))
    return made


def native_decode(
    payloads: Sequence[Bits],
    tables: Sequence[Bits],
    geometry: ref.Geometry,
    table: npt.NDArray[Any] | None = None,
) -> list[Bits]:
    """Decode payloads of one page each with kvzip's codec `cuszp`, with guard bytes around every page."""
    codec = get_codec("cuszp")
    constants = ref.TYPES[geometry.dtype]
    guard = 32  # values
    values = geometry.tokens * geometry.channels
    memory = np.full((len(payloads), guard + values + guard), 0x5A, constants.unsigned)
    inner = memory[:, guard : guard + values].reshape(len(payloads), geometry.tokens, geometry.heads, geometry.head_dim)
    assert np.shares_memory(inner, memory)
    view = BlockView([inner], layout_of([geometry]))
    if table is not None:
        view = view.with_bounds(error_bound(ref.BOUND_CHANNEL_TABLE, 0.0, table, geometry.heads))
    try:
        codec.decode_blocks(view, payloads, tables)
    except Exception:
        assert (memory == 0x5A).all(), "a refused payload changed memory"
        raise
    assert (memory[:, :guard] == 0x5A).all(), "the decoder wrote before the page"
    assert (memory[:, guard + values :] == 0x5A).all(), "the decoder wrote after the page"
    return list(inner.reshape(len(payloads), geometry.tokens, geometry.channels))


def table_of(segment: ref.Segment, *, size: int | None = None) -> npt.NDArray[Any]:
    """kvzip's segment table for a lone segment."""
    return np.array(
        [
            (
                0,
                len(segment.data) if size is None else size,
                segment.bound,
                segment.coding,
                0,
                segment.param,
                segment.reason,
            )
        ],
        ENTRY_DTYPE,
    )


def native_records(
    view: BlockView,
    mode: str,
    kind: int,
    bound: float,
    *,
    codec: str = "cuszp",
    measure_error: bool = False,
    asked: Sequence[ref.Asked] | None = None,
) -> list[bytes]:
    """Records of the blocks of a view, made by kvzip; `asked` gives each page a bound of its own."""
    request = EncodeRequest(error_bound(kind, bound) if asked is None else bounds_of(view.layout, asked), mode, 1)
    batch = encode_records(view, get_codec(codec), request, measure_error=measure_error)
    return [bytes(r.header) + bytes(r.payload) for r in batch.records]


def bounds_of(layout: BlockLayout, asked: Sequence[ref.Asked]) -> tuple[ErrorBound, ...]:
    """kvzip's bounds of the pages of a block."""
    return tuple(error_bound(a.kind, a.bound, a.table, s.heads) for a, s in zip(asked, layout.segments, strict=True))


def native_pages(record: bytes, asked: Sequence[ref.Asked] | None = None) -> list[Bits]:
    """The pages of a record, [T, C] bit patterns, decoded by kvzip into memory that held other bits."""
    header, payload = read_record(record)
    layout = header.layout()
    arrays = [np.full((1, s.tokens, s.heads, s.head_dim), 0x5A, s.dtype.numpy_bits) for s in layout.segments]
    view = BlockView(arrays, layout)
    if asked is not None:
        view = view.with_bounds(bounds_of(layout, asked))
    get_codec(header.codec).decode_blocks(view, [np.frombuffer(payload, np.uint8)], [header.table])
    return [a.reshape(a.shape[1], -1) for a in arrays]
