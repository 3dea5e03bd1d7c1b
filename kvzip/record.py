# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The record format, version 1: pack, parse and verify headers and segment tables.

``docs/reference/format.md`` is normative. Everything here treats bytes as hostile: lengths are checked before use.
"""

from __future__ import annotations

import enum
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import crc32c as _crc32c
import numpy as np
import numpy.typing as npt

from kvzip.bounds import PageBounds, summary, table_id
from kvzip.errors import ConfigError, CorruptRecordError, FormatError, FormatVersionError
from kvzip.types import BlockLayout, BoundKind, DType, ErrorBound, SegmentLayout

FORMAT_VERSION = 1
MAGIC = b"KVZP"
ALIGNMENT = 16
MAX_SEGMENTS = 65_536
MAX_GEOMETRIES = 65_535

Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

_FIXED = struct.Struct("<4sHHIIQQIIHBBB3xdd16s8sQ")
_GEOMETRY = struct.Struct("<IIIIBB6x")
_CRC_AT = 12

#: One entry of the segment table, as it stands in a record.
ENTRY_DTYPE = np.dtype(
    [
        ("offset", "<u4"),
        ("size", "<u4"),
        ("bound", "<f4"),
        ("coding", "u1"),
        ("kind", "u1"),
        ("param", "u1"),
        ("reason", "u1"),
    ]
)

MODES = ("none", "fixed", "plain", "outlier", "rice")
KINDS = ("", "k", "v")
_WITHOUT_VALUE = (BoundKind.LOSSLESS, BoundKind.CHANNEL_TABLE, BoundKind.BY_PAGE)


class Coding(enum.IntEnum):
    """How the codec `cuszp` (and, for `RAW`, `raw`) wrote a segment."""

    RAW = 0
    CONSTANT = 1
    FIXED = 2
    PLAIN = 3
    OUTLIER = 4
    LOSSLESS = 5
    RICE = 6
    LOSSLESS_RICE = 7


class Steps(enum.IntEnum):
    """What the bound of a quantised segment depends on: bits 4 and 5 of its coding."""

    PAGE = 0x00
    TOKEN = 0x10
    CHANNEL = 0x20


def split_coding(coding: int) -> tuple[Coding, Steps]:
    """A segment's coding, and what its bound depends on.

    Raises:
        ValueError: the format has no such coding.
    """
    return Coding(coding & 0x0F), Steps(coding & 0xF0)


class Reason(enum.IntEnum):
    """Why a segment, or a whole record, is not coded as asked."""

    AS_ASKED = 0
    BOUND_TOO_FINE = 1
    LOSSLESS_SMALLER = 2
    INCOMPRESSIBLE = 3
    OPAQUE_DTYPE = 4
    ENCODER_FAILED = 5
    CODEC_UNAVAILABLE = 6
    BREAK_EVEN = 7
    BOUND_PRESSURE = 8


#: Bytes of one run of pages of one shape, in a record's header.
GEOMETRY_BYTES = _GEOMETRY.size

#: No header is longer.
MAX_HEADER_BYTES = _FIXED.size + MAX_GEOMETRIES * GEOMETRY_BYTES + MAX_SEGMENTS * ENTRY_DTYPE.itemsize + ALIGNMENT

assert (_FIXED.size, _GEOMETRY.size, ENTRY_DTYPE.itemsize) == (96, 24, 16)


_FEW_PAGES = 256  # of a transfer whose counts of reasons are kept


@dataclass(frozen=True)
class Geometry:
    """Logical shape of the pages of a run of segments."""

    count: int
    tokens: int
    heads: int
    head_dim: int
    dtype: DType
    group_tokens: int

    @property
    def values(self) -> int:
        """Values of one page."""
        return self.tokens * self.heads * self.head_dim

    @property
    def nbytes(self) -> int:
        """Raw bytes of one page."""
        return self.values * self.dtype.itemsize


@dataclass(frozen=True)
class RecordHeader:
    """What a record says about itself.

    Attributes:
        version: format version.
        codec: name of the codec that wrote the payload.
        mode: encoding mode that was asked for.
        bound: error bound that was asked for; ``table["bound"]`` has the largest absolute bound applied to each
            segment. Of the kind ``BoundKind.BY_PAGE`` when the pages had different ones.
        reason: why the whole record fell back, or `Reason.AS_ASKED`.
        max_error: largest absolute error reached, or None when it was not measured.
        dims: order of the axes of the source tensors, or ``""``.
        table_id: name of the channel tables that the record was encoded with; 0 when there were none.
        raw_bytes: bytes of the values before encoding.
        header_bytes: bytes of header, geometry and segment table.
        payload_bytes: bytes of the payload.
        payload_crc32c: checksum of the payload.
        geometry: shapes of the pages, run-length coded.
        table: one entry a segment, dtype `ENTRY_DTYPE`.
    """

    version: int
    codec: str
    mode: str
    bound: ErrorBound
    reason: Reason
    max_error: float | None
    dims: str
    table_id: int
    raw_bytes: int
    header_bytes: int
    payload_bytes: int
    payload_crc32c: int
    geometry: tuple[Geometry, ...]
    table: npt.NDArray[Any]

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record."""
        return self.header_bytes + self.payload_bytes

    @property
    def ratio(self) -> float:
        """Raw bytes over record bytes."""
        return self.raw_bytes / self.record_bytes

    @property
    def num_segments(self) -> int:
        """Number of pages in the record."""
        return len(self.table)

    def layout(self) -> BlockLayout:
        """Layout of one block, each page contiguous in a tensor of its own: ``[blocks, tokens, heads, head_dim]``."""
        return _contiguous_layout(self.geometry, self.table["kind"].tobytes())


@lru_cache(maxsize=64)
def _contiguous_layout(geometry: tuple[Geometry, ...], kinds: bytes) -> BlockLayout:
    segments: list[SegmentLayout] = []
    for g in geometry:
        for _ in range(g.count):
            size = g.dtype.itemsize
            segments.append(
                SegmentLayout(
                    tensor=len(segments),
                    dtype=g.dtype,
                    tokens=g.tokens,
                    heads=g.heads,
                    head_dim=g.head_dim,
                    token_stride_bytes=g.heads * g.head_dim * size,
                    head_stride_bytes=g.head_dim * size,
                    kind=KINDS[kinds[len(segments)]],
                    group_tokens=g.group_tokens,
                )
            )
    return BlockLayout(tuple(segments), "")


def crc32c(data: Buffer, value: int = 0) -> int:
    """CRC32C (Castagnoli) of bytes, continued from `value`."""
    untyped: Any = data  # Python 3.10 has no type for the buffer protocol
    return int(_crc32c.crc32c(untyped, value))


def _bytes_of(data: Buffer) -> memoryview:
    untyped: Any = data
    return memoryview(untyped).cast("B")


def align(nbytes: int) -> int:
    """Round up to the alignment of segments, 16 bytes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@lru_cache(maxsize=256)
def geometry_of(layout: BlockLayout) -> tuple[Geometry, ...]:
    """Geometry runs of a layout, as its records have them."""
    runs: list[list[int]] = []
    for segment in layout.segments:
        if runs and tuple(runs[-1][1:]) == segment.geometry:
            runs[-1][0] += 1
        else:
            runs.append([1, *segment.geometry])
    return tuple(Geometry(n, t, h, d, DType(dtype), g) for n, t, h, d, dtype, g in runs)


@lru_cache(maxsize=256)
def _geometry_runs(layout: BlockLayout) -> tuple[int, bytes]:
    """Number of geometry runs of a layout, and their bytes."""
    runs = geometry_of(layout)
    packed = [_GEOMETRY.pack(g.count, g.tokens, g.heads, g.head_dim, int(g.dtype), g.group_tokens) for g in runs]
    return len(runs), b"".join(packed)


@lru_cache(maxsize=256)
def header_nbytes(layout: BlockLayout) -> int:
    """Bytes of the header of a record of this layout.

    Raises:
        FormatError: the layout has more pages than a record can hold.
    """
    if len(layout.segments) > MAX_SEGMENTS:
        raise FormatError(
            f"{len(layout.segments)} pages in a block: a record holds at most {MAX_SEGMENTS}; split the block"
        )
    if _geometry_runs(layout)[0] > MAX_GEOMETRIES:
        raise FormatError(
            f"{_geometry_runs(layout)[0]} runs of pages of one geometry: a record holds at most {MAX_GEOMETRIES}; "
            "put pages of one shape side by side"
        )
    return align(_FIXED.size + len(_geometry_runs(layout)[1]) + ENTRY_DTYPE.itemsize * len(layout.segments))


def pack_headers(
    layout: BlockLayout,
    tables: npt.NDArray[Any],
    payload_bytes: npt.NDArray[np.uint64],
    payload_crc32c: npt.NDArray[np.uint32],
    *,
    codec: str,
    mode: str,
    bound: PageBounds,
    reason: Reason = Reason.AS_ASKED,
    max_errors: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.uint8]:
    """Make the headers of a batch of records.

    Args:
        layout: layout of the blocks.
        tables: segment tables, shape ``[records, pages]``, dtype `ENTRY_DTYPE`.
        payload_bytes: sizes of the payloads, shape ``[records]``.
        payload_crc32c: their checksums, shape ``[records]``.
        codec: name of the codec, at most 16 ASCII characters.
        mode: one of `MODES`.
        bound: error bound that was asked for, or a tuple of one a page.
        reason: why the records fell back as a whole.
        max_errors: largest errors reached, shape ``[records]``, if they were measured; an infinite one is written as
            the largest number there is.

    Returns:
        Shape ``[records, header_nbytes(layout)]``.
    """
    template, table_at = _header_template(layout, codec, mode, bound, reason)
    headers = np.tile(template, (len(tables), 1))
    if len(tables) == 0:
        return headers
    _column(headers, 16, payload_bytes, "<u8")
    _column(headers, 32, payload_crc32c, "<u4")
    if max_errors is not None:
        _column(headers, 56, np.minimum(max_errors, np.finfo(np.float64).max), "<f8")
    entries = np.ascontiguousarray(tables, ENTRY_DTYPE).view(np.uint8).reshape(len(tables), -1)
    headers[:, table_at : table_at + entries.shape[1]] = entries
    rows, size = memoryview(headers.tobytes()), headers.shape[1]
    crcs = [_crc32c.crc32c(rows[at : at + size]) for at in range(0, len(rows), size)]
    _column(headers, _CRC_AT, np.array(crcs, np.uint32), "<u4")
    return headers


def _column(rows: npt.NDArray[np.uint8], at: int, values: npt.NDArray[Any], dtype: str) -> None:
    """Set one field in every row."""
    field = np.ascontiguousarray(values, dtype).view(np.uint8).reshape(len(rows), -1)
    rows[:, at : at + field.shape[1]] = field


@lru_cache(maxsize=256)
def _header_template(
    layout: BlockLayout, codec: str, mode: str, bound: PageBounds, reason: Reason
) -> tuple[npt.NDArray[np.uint8], int]:
    """What the headers of a batch have in common, and where their segment tables begin."""
    if not (codec.isascii() and codec.isprintable() and 1 <= len(codec) <= 16):
        raise ConfigError(f"codec name {codec!r}: a record keeps 1 to 16 printable ASCII characters")
    runs, geometry = _geometry_runs(layout)
    size = header_nbytes(layout)
    fixed = _FIXED.pack(
        MAGIC,
        FORMAT_VERSION,
        0,
        size,
        0,
        0,
        layout.nbytes,
        0,
        len(layout.segments),
        runs,
        MODES.index(mode),
        int(summary(bound).kind),
        int(reason),
        summary(bound).value,
        math.nan,
        codec.encode("ascii"),
        layout.dims.encode("ascii"),
        table_id(bound, len(layout.segments)),
    )
    template = np.zeros(size, np.uint8)
    table_at = len(fixed) + len(geometry)
    template[:table_at] = np.frombuffer(fixed + geometry, np.uint8)
    template.flags.writeable = False
    return template, table_at


def header_is_intact(header: Buffer) -> bool:
    """Whether the bytes of a whole header agree with the checksum in it; nothing else is looked at."""
    data = _bytes_of(header)
    blank = crc32c(bytes(4), crc32c(data[:_CRC_AT]))
    return crc32c(data[_CRC_AT + 4 :], blank) == int.from_bytes(data[_CRC_AT : _CRC_AT + 4], "little")


def read_header(record: Buffer) -> RecordHeader:
    """Parse and check the header of a record; the payload is not looked at, and need not be there.

    Args:
        record: bytes that begin with a record.

    Raises:
        FormatVersionError: the format version is not known here.
        CorruptRecordError: the bytes contradict the format.
    """
    data = _bytes_of(record)
    if len(data) < _FIXED.size:
        raise CorruptRecordError(f"{len(data)} bytes are no record: its fixed part alone has {_FIXED.size}")
    if bytes(data[:4]) != MAGIC:
        raise CorruptRecordError(f"magic {bytes(data[:4])!r} is not {MAGIC!r}: these bytes are no kvzip record")
    version = int.from_bytes(data[4:6], "little")
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"record of format version {version}: this kvzip reads version {FORMAT_VERSION}; upgrade it"
        )
    (
        _,
        _,
        flags,
        header_bytes,
        _,
        payload_bytes,
        raw_bytes,
        payload_crc,
        num_segments,
        num_runs,
        mode,
        bound_kind,
        reason,
        bound,
        max_error,
        codec,
        dims,
        channel_tables,
    ) = _FIXED.unpack_from(data)
    if not 1 <= num_segments <= MAX_SEGMENTS or not 1 <= num_runs <= num_segments:
        raise CorruptRecordError(
            f"{num_segments} segments in {num_runs} geometry runs: at most {MAX_SEGMENTS} and as many runs"
        )
    expected = align(_FIXED.size + _GEOMETRY.size * num_runs + ENTRY_DTYPE.itemsize * num_segments)
    if header_bytes != expected or len(data) < expected:
        raise CorruptRecordError(
            f"header of {header_bytes} bytes in {len(data)}: {num_segments} segments need {expected}"
        )
    if not header_is_intact(data[:header_bytes]):
        raise CorruptRecordError("the header's checksum does not match: the record is damaged")
    # What follows is only reached by intact or deliberately forged headers.
    _require(flags == 0 and not any(data[45:48]), "reserved bits are set")
    _require(mode < len(MODES), f"mode {mode} is unknown")
    _require(bound_kind in BoundKind._value2member_map_, f"bound kind {bound_kind} is unknown")
    _require(reason in Reason._value2member_map_, f"reason {reason} is unknown")
    kind = BoundKind(bound_kind)
    _require(
        bound == 0 if kind in _WITHOUT_VALUE else math.isfinite(bound) and bound > 0,
        f"bound {bound} is out of range",
    )
    _require(
        channel_tables == 0 or kind in (BoundKind.CHANNEL_TABLE, BoundKind.BY_PAGE),
        f"channel tables {channel_tables:016x} for bounds without one",
    )
    _require(
        math.isnan(max_error) or (max_error >= 0 and math.isfinite(max_error)), f"max_error {max_error} is out of range"
    )
    geometry = _parse_geometry(data[_FIXED.size :], num_runs, num_segments)
    _require(
        raw_bytes == sum(g.count * g.nbytes for g in geometry), f"raw_bytes {raw_bytes} is not what the geometry says"
    )
    at = _FIXED.size + _GEOMETRY.size * num_runs
    table = np.frombuffer(data, ENTRY_DTYPE, num_segments, at).copy()
    table.flags.writeable = False
    _require(not any(data[at + ENTRY_DTYPE.itemsize * num_segments : header_bytes]), "the header's padding is not zero")
    _check_table(table, payload_bytes)
    if codec.startswith(b"cuszp\0") and channel_tables == 0:
        _require(not (table["coding"] & Steps.CHANNEL).any(), "a segment by channel without a channel table")
    return RecordHeader(
        version=version,
        codec=_text(codec, "codec"),
        mode=MODES[mode],
        bound=ErrorBound(kind, bound),
        reason=Reason(reason),
        max_error=None if math.isnan(max_error) else max_error,
        dims=_text(dims, "dims"),
        table_id=channel_tables,
        raw_bytes=raw_bytes,
        header_bytes=header_bytes,
        payload_bytes=payload_bytes,
        payload_crc32c=payload_crc,
        geometry=geometry,
        table=table,
    )


def read_record(record: Buffer) -> tuple[RecordHeader, memoryview]:
    """Parse and check a whole record: header, lengths and the payload's checksum.

    Returns:
        The header, and the payload as a view of `record`.

    Raises:
        FormatVersionError: the format version is not known here.
        CorruptRecordError: the bytes are damaged, or longer or shorter than the record.
    """
    header = read_header(record)
    data = _bytes_of(record)
    if len(data) != header.record_bytes:
        raise CorruptRecordError(
            f"{len(data)} bytes, but the record has {header.record_bytes}: it is cut or has a tail"
        )
    payload = data[header.header_bytes :]
    if crc32c(payload) != header.payload_crc32c:
        raise CorruptRecordError("the payload's checksum does not match: the record is damaged")
    return header, payload


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise CorruptRecordError(f"{what}: the record is damaged or was written by a newer kvzip")


def _text(raw: bytes, field: str) -> str:
    text = raw.rstrip(b"\0")
    _require(
        text.isascii() and b"\0" not in text and text.decode("ascii", "replace").isprintable(),
        f"{field} {raw!r} is no name",
    )
    return text.decode("ascii")


def _parse_geometry(data: memoryview, runs: int, segments: int) -> tuple[Geometry, ...]:
    geometry = []
    for i in range(runs):
        count, tokens, heads, head_dim, dtype, group = _GEOMETRY.unpack_from(data, i * _GEOMETRY.size)
        _require(not any(data[i * _GEOMETRY.size + 18 : (i + 1) * _GEOMETRY.size]), "reserved bits are set")
        _require(min(count, tokens, heads, head_dim) >= 1, "a geometry run is empty")
        _require(tokens * heads * head_dim < 2**31, f"a page of {tokens} x {heads} x {head_dim} values is too large")
        _require(dtype <= 3, f"dtype {dtype} is unknown")
        nbytes = tokens * heads * head_dim * DType(dtype).itemsize
        _require(nbytes <= 2**32 - 16, f"a page of {nbytes} bytes is too large")
        _require(group in (1, 2, 4, 8, 16), f"group_tokens {group} is unknown")
        geometry.append(Geometry(count, tokens, heads, head_dim, DType(dtype), group))
    _require(sum(g.count for g in geometry) == segments, "the geometry runs do not cover the segments")
    return tuple(geometry)


def _check_table(table: npt.NDArray[Any], payload_bytes: int) -> None:
    sizes = table["size"].astype(np.int64)
    _require(int(sizes.min()) >= 1, "a segment is empty")
    units = -(-sizes // ALIGNMENT)
    ends = np.cumsum(units)
    _require(np.array_equal(ends - units, table["offset"]), "the segments do not follow one another")
    _require(int(ends[-1]) * ALIGNMENT == payload_bytes, f"payload_bytes {payload_bytes} is not what the segments say")
    _require(int(table["kind"].max()) < len(KINDS), "a page kind is unknown")
    _require(int(table["reason"].max()) <= max(Reason), "a segment's reason is unknown")


def fallback_reasons(
    tables: Sequence[npt.NDArray[Any]] | npt.NDArray[Any] | bytes, whole: Reason = Reason.AS_ASKED
) -> dict[str, int]:
    """Count the pages that were not coded as asked, by the name of their reason in lower case.

    Args:
        tables: segment tables, or the bytes of them all.
        whole: reason of the records; it is that of pages without a reason of their own.
    """
    if not isinstance(tables, bytes):
        tables = tables.tobytes() if isinstance(tables, np.ndarray) else b"".join(table.tobytes() for table in tables)
    reasons = tables[ENTRY_DTYPE.itemsize - 1 :: ENTRY_DTYPE.itemsize]  # the last byte of each
    if len(reasons) <= _FEW_PAGES:
        return dict(_count_few_reasons(reasons, whole))  # small transfers ask for the same again and again
    return _count_reasons(reasons, whole)


def _count_reasons(reasons: bytes, whole: Reason) -> dict[str, int]:
    if not reasons.strip(b"\0"):  # as a rule
        return {whole.name.lower(): len(reasons)} if whole and reasons else {}
    counts = Counter(reasons)
    counts[whole] += counts.pop(Reason.AS_ASKED, 0)
    return {r.name.lower(): counts[r] for r in Reason if r and counts[r]}


_count_few_reasons = lru_cache(maxsize=256)(_count_reasons)
