# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Records from blocks and back: the codec's payloads with their headers, and the fallback when a codec fails.

The engine and the top-level `encode` and `decode` share these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvzip._log import log_once
from kvzip.backends.base import Bytes, Codec, EncodeRequest
from kvzip.backends.portable import codec_for, device_codec
from kvzip.backends.registry import get_codec
from kvzip.bounds import BoundPolicy, PageBounds, bound_of_page, resolve, table_id
from kvzip.cuda_codec import CudaCodec
from kvzip.errors import BackendUnavailableError, ConfigError, LayoutError
from kvzip.interop.torch import to_host
from kvzip.record import (
    KINDS,
    MODES,
    Buffer,
    Geometry,
    Reason,
    RecordHeader,
    crc32c,
    fallback_reasons,
    header_nbytes,
    pack_headers,
    read_record,
)
from kvzip.types import BlockLayout, BlockView, BoundKind, DType, ErrorBound, SegmentLayout, TensorMemory, empty_view


@dataclass(frozen=True)
class EncodedRecord:
    """One encoded block: header and payload, to be written one after the other.

    Attributes:
        codec: name of the codec that made it, which may not be the one that was asked.
        header: the record's header, uint8.
        payload_crc32c: its checksum.
        table: its segment table, shape ``[pages]``.
        payload: a view of the scratch that the batch was encoded into.
        max_error: largest absolute error, or None when it was not measured.
        violations: values that break the bound; 0 unless the codec has a fault, None when not measured.
    """

    codec: str
    header: Bytes
    payload: Bytes
    payload_crc32c: int
    table: npt.NDArray[Any]
    max_error: float | None = None
    violations: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the record."""
        return self.header.size + self.payload.size


class Part(NamedTuple):
    """Blocks of a store that are coded alike.

    Attributes:
        keys: their names.
        blocks: the blocks, in the same order.
        request: how they are coded.
    """

    keys: Sequence[bytes]
    blocks: BlockView
    request: EncodeRequest


@dataclass(frozen=True)
class EncodedBatch:
    """The records of a batch, and why pages of it fell back (name of the reason -> number of pages)."""

    records: list[EncodedRecord]
    fallbacks: dict[str, int]


def max_record_bytes(codec: Codec, layout: BlockLayout) -> int:
    """Most bytes that the record of one block can take, whatever happens to the codec."""
    return header_nbytes(layout) + max(codec.max_payload_bytes(layout), get_codec("raw").max_payload_bytes(layout))


def encode_records(
    blocks: BlockView,
    codec: Codec,
    request: EncodeRequest,
    *,
    measure_error: bool = False,
    out: Bytes | None = None,
) -> EncodedBatch:
    """Encode every block of a view into a record. Blocks the host.

    A codec that fails is replaced by ``raw`` for this batch; the records say so.

    Args:
        blocks: what to encode, where the codec works.
        codec: the codec to use.
        request: bound, mode, threads.
        measure_error: also decode, and compare with what went in.
        out: where the payloads go, shape ``[len(blocks), at least the most bytes of a payload]``, rows contiguous; what
            follows a payload is unspecified. By default new memory.
    """
    layout = blocks.layout
    check_device(codec, blocks)
    reason = request.reason
    if out is None:
        out = np.empty((len(blocks), max_record_bytes(codec, layout)), np.uint8)
    try:
        tables, sizes = codec.encode_blocks(blocks, request, out)
    except (ConfigError, LayoutError):
        raise  # the caller's mistake, which raw would not mend
    except Exception as error:  # whatever a codec, perhaps a third party's, fails with
        unavailable = isinstance(error, BackendUnavailableError)
        reason = Reason.CODEC_UNAVAILABLE if unavailable else Reason.ENCODER_FAILED
        log_once(f"codec {codec.name!r} failed, blocks are stored raw", str(error))
        codec, blocks = get_codec("raw"), on_host(blocks)
        tables, sizes = codec.encode_blocks(blocks, request, out)
    payloads = [out[i, : int(n)] for i, n in enumerate(sizes)]
    errors = measure_errors(on_host(blocks), codec, request.bound, payloads, list(tables)) if measure_error else None
    crcs = [crc32c(payload) for payload in payloads]
    headers = pack_headers(
        layout,
        tables,
        sizes,
        np.array(crcs, np.uint32),
        codec=codec.name,
        mode=request.mode if request.mode in codec.modes and request.mode in MODES else "none",
        bound=request.bound,
        reason=reason,
        max_errors=np.array([error for error, _ in errors]) if errors else None,
    )
    records = [
        EncodedRecord(codec.name, headers[i], payload, crcs[i], tables[i], *(errors[i] if errors else ()))
        for i, payload in enumerate(payloads)
    ]
    return EncodedBatch(records, fallback_reasons(tables, reason))


def on_host(blocks: BlockView) -> BlockView:
    """The blocks themselves where they lie in host memory, else a copy there. Blocks the host."""
    return blocks if blocks.device == "cpu" else to_host(blocks)


def check_device(codec: Codec, blocks: BlockView) -> None:
    """Check that a codec works where the blocks lie.

    Raises:
        LayoutError: it does not; by address, it would read or write memory that is not there.
    """
    if blocks.device.partition(":")[0] not in codec.devices:
        raise LayoutError(
            f"the blocks lie on {blocks.device}, codec {codec.name!r} works on {', '.join(codec.devices)}: "
            "copy them there, or use a codec for that device"
        )


def measure_errors(
    blocks: BlockView, codec: Codec, bound: PageBounds, payloads: Sequence[Bytes], tables: Sequence[npt.NDArray[Any]]
) -> list[tuple[float, int]]:
    """Decode payloads and compare with the blocks that they were made of, in host memory.

    Returns:
        For every block the largest absolute error, and the number of values that break the bound.
    """
    layout = blocks.layout
    decoded = empty_view(layout, len(blocks)).with_bounds(bound)
    codec.decode_blocks(decoded, payloads, tables)
    results = []
    for b in range(len(blocks)):
        pages = [
            compare_pages(blocks.page(b, s), decoded.page(b, s), segment.dtype, bound_of_page(bound, s))
            for s, segment in enumerate(layout.segments)
        ]
        results.append((max(p.max_error for p in pages), sum(p.violations for p in pages)))
    return results


@dataclass(frozen=True)
class PageError:
    """How far a page, or the worst of several, is from what was stored.

    Attributes:
        max_error: largest absolute error over the finite values, formed in float64.
        over_bound: largest error over the bound of its value; infinite where an exact value changed.
        violations: values that break their bound (also: a non-finite value whose bits changed).
    """

    max_error: float
    over_bound: float
    violations: int


def compare_pages(before: npt.NDArray[Any], after: npt.NDArray[Any], dtype: DType, bound: ErrorBound) -> PageError:
    """Compare the bit patterns of a page before and after.

    Args:
        before: bit patterns of the page that was stored, unsigned, shape ``[tokens, heads, head_dim]``.
        after: what was loaded, the same shape.
        dtype: what the patterns mean.
        bound: the bound to check against; `before` gives the page's range and its tokens' rms.
    """
    if dtype is DType.OPAQUE:
        bad = int(np.count_nonzero(before != after))
        return PageError(0.0, math.inf if bad else 0.0, bad)
    x, y = to_float64(before, dtype), to_float64(after, dtype)
    finite = np.isfinite(x)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(np.where(finite, y - x, 0.0))
    limit = value_bounds(x, bound)
    inexact = bound.kind is not BoundKind.LOSSLESS
    wrong = np.where(finite & inexact, ~(error <= limit), before != after)
    largest = float(error.max()) if error.size else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(error > 0, error / limit, 0.0)
    over = float(part.max()) if part.size else 0.0
    return PageError(
        math.inf if math.isnan(largest) else largest,
        math.inf if math.isnan(over) else over,
        int(np.count_nonzero(wrong)),
    )


def compare_blocks(
    before: BlockView,
    after: BlockView,
    bound: ErrorBound | BoundPolicy,
    progress: Callable[[int], None] = lambda done: None,
) -> PageError:
    """Compare blocks in host memory with what came back of them.

    Args:
        before: the blocks that were stored.
        after: as many blocks of the same layout.
        bound: what they were stored with; none of them as the first of a sequence.
        progress: called with the blocks done.

    Returns:
        The worst of all pages, and the violations of all.
    """
    bounds = resolve(bound, before.layout)
    worst = PageError(0.0, 0.0, 0)
    for block in range(len(before)):
        for number, segment in enumerate(before.layout.segments):
            pages = before.page(block, number), after.page(block, number)
            found = compare_pages(*pages, segment.dtype, bound_of_page(bounds, number))
            worst = PageError(
                max(worst.max_error, found.max_error),
                max(worst.over_bound, found.over_bound),
                worst.violations + found.violations,
            )
        progress(block + 1)
    return worst


def value_bounds(x: npt.NDArray[np.float64], bound: ErrorBound) -> npt.NDArray[np.float64]:
    """The absolute bound of each value of a page.

    Args:
        x: the page's values, shape ``[tokens, heads, head_dim]``.
        bound: the bound that was asked for.

    Returns:
        Something that broadcasts to the shape of x.
    """
    finite = np.isfinite(x)
    if bound.kind is BoundKind.TOKEN_RMS:
        known = np.where(finite, x, 0.0)
        largest = np.abs(known).max(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(largest > 0, known / largest, 0.0)  # squares of what is very large or small
        rms: npt.NDArray[np.float64] = bound.value * largest * np.sqrt(np.mean(part**2, axis=-1, keepdims=True))
        return rms
    if bound.channels is not None:
        return bound.channels.values.astype(np.float64)[None]
    limit = bound.value if bound.kind is BoundKind.ABSOLUTE else 0.0
    if bound.kind is BoundKind.RELATIVE and finite.any():
        limit = bound.value * float(x[finite].max() - x[finite].min())
    return np.array(limit)


def to_float64(bits: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.float64]:
    """Values of bit patterns, exactly.

    Args:
        bits: unsigned bit patterns.
        dtype: what they mean; not `DType.OPAQUE`.
    """
    if dtype is DType.BFLOAT16:
        values: npt.NDArray[Any] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = np.ascontiguousarray(bits).view(np.float16 if dtype is DType.FLOAT16 else np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return np.asarray(values, np.float64)


@lru_cache(maxsize=256)
def check_geometry(geometry: tuple[Geometry, ...], layout: BlockLayout) -> BlockLayout:
    """Check that a record of this geometry fits the blocks it is to be loaded into.

    Returns:
        The layout, with the groups that the record was coded in.

    Raises:
        LayoutError: number of pages, shapes or dtypes differ.
    """
    pages = sum(g.count for g in geometry)
    if pages != len(layout.segments):
        raise LayoutError(
            f"the record has {pages} pages, the blocks to load into have {len(layout.segments)}: "
            "load into blocks of the layout that was stored"
        )
    segments: list[SegmentLayout] = []
    changed = False
    for g in geometry:
        for s in layout.segments[len(segments) : len(segments) + g.count]:
            if (g.tokens, g.heads, g.head_dim, g.dtype) != (s.tokens, s.heads, s.head_dim, s.dtype):
                raise LayoutError(
                    f"page {len(segments)} of the record is {_shape(g)}, the page to load into is {_shape(s)}: "
                    "load into blocks of the layout that was stored"
                )
            changed = changed or g.group_tokens != s.group_tokens
            segments.append(s if g.group_tokens == s.group_tokens else replace(s, group_tokens=g.group_tokens))
    return BlockLayout(tuple(segments), layout.dims) if changed else layout


def _shape(page: Geometry | SegmentLayout) -> str:
    return f"{page.tokens} tokens x {page.heads} heads x {page.head_dim} {page.dtype.name.lower()}"


def encode(
    x: Any,
    *,
    bound: ErrorBound | BoundPolicy,
    codec: str | Codec = "cuszp",
    mode: str | None = None,
    layout: str | BlockLayout | None = None,
    dtype: str | DType | None = None,
    measure_error: bool = False,
) -> bytes:
    """Encode one tensor into a record. Blocks the host.

    Args:
        x: NumPy array, or torch tensor in host memory or on a GPU; bfloat16 in NumPy as uint16 with
            ``dtype="bfloat16"``, or as ml_dtypes.
        bound: how far a decoded value may be from the given one; a policy by page.
        codec: name of a codec, or a codec.
        mode: encoding mode; by default `Codec.default_mode` of the bound.
        layout: order of the axes of x, such as ``"NHD"`` or ``"2HND"`` (see `BlockLayout.from_tensors`), or a
            `BlockLayout` for ``x[None]``. Without it x is coded in memory order.
        dtype: element type, when x does not say it.
        measure_error: decode and compare as well; the record's header then has `max_error`.

    Returns:
        The record.

    Raises:
        LayoutError: shape, dtype and layout do not fit.
        CodecNotFoundError: no such codec.
        ConfigError: the codec does not know the mode.
        BackendUnavailableError: x lies on a GPU, and nothing here reaches it.
    """
    chosen = get_codec(codec)
    if not isinstance(bound, (ErrorBound, BoundPolicy)):
        raise ConfigError(f"bound {bound!r} is no ErrorBound: use ErrorBound.relative(1e-3) or another kind")
    chosen.check_bound(bound)
    TensorMemory.of(x, dtype)  # says what is wrong with x
    tensor = x[None]
    if layout is None:
        layout = BlockLayout.opaque([tensor], dtype=dtype)
    elif isinstance(layout, str):
        layout = BlockLayout.from_tensors([tensor], layout, dtype=dtype)
    mode = chosen.default_mode(bound) if mode is None else chosen.check_mode(mode)
    view = BlockView([tensor], layout)
    chosen = _codec_on(chosen, view.device)
    request = EncodeRequest(resolve(bound, layout), mode)
    batch = encode_records(view, chosen, request, measure_error=measure_error)
    record = batch.records[0]
    return record.header.tobytes() + record.payload.tobytes()


def decode(
    record: Buffer,
    *,
    out: Any = None,
    bound: ErrorBound | BoundPolicy | None = None,
    max_raw_bytes: int = 1 << 30,
) -> Any:
    """Decode a record. Blocks the host.

    Args:
        record: exactly one record, in host memory.
        out: a NumPy array or torch tensor (in host memory or on a GPU) to fill, in the shape and order of axes that was
            encoded (any shape when the record was coded in memory order), or a list of them for a record of several
            tensors.
        bound: what it was encoded with; needed when that was a channel table, which a record only names.
        max_raw_bytes: refuse to allocate more than this when `out` is not given; a forged record can claim any size.

    Returns:
        `out`, or a new NumPy array (a list of them for a record of several tensors): bfloat16 comes as uint16 bit
        patterns, opaque bytes as uint8.

    Raises:
        CorruptRecordError: the record is damaged; `out` is as it was.
        FormatVersionError: a newer kvzip wrote it.
        CodecNotFoundError: its codec is not installed here.
        LayoutError: `out` does not fit.
        ConfigError: the record claims more than `max_raw_bytes`, or needs a channel table that `bound` is not.
    """
    header, payload = read_record(record)
    codec = get_codec(header.codec)
    made = out is None
    if made:
        if header.raw_bytes > max_raw_bytes:
            raise ConfigError(
                f"the record decodes to {header.raw_bytes} bytes, the limit is {max_raw_bytes}: "
                "pass out=, or a larger max_raw_bytes"
            )
        out = _allocate(header)
    tensors = list(out) if isinstance(out, (list, tuple)) else [out]
    view = _decode_view(header, tensors)
    if not view.writable:
        raise LayoutError("out is read-only: pass a writable array")
    codec = _codec_on(codec, view.device)
    check_device(codec, view)
    if header.table_id != 0:
        view = view.with_bounds(_table_of(header, bound, view.layout))
    codec.decode_blocks(view, [np.frombuffer(payload, np.uint8)], [header.table])
    return tensors[0] if made and len(tensors) == 1 else out


def _codec_on(codec: Codec, device: str) -> Codec:
    """The codec for tensors on a device: by the native kernels where there are some, else as `codec_for` says."""
    if device.startswith("cuda") and codec.name in ("cuszp", "raw") and device_codec().name == "cuda":
        return CudaCodec(codec)
    return codec_for(codec, device)


def _table_of(header: RecordHeader, bound: ErrorBound | BoundPolicy | None, layout: BlockLayout) -> PageBounds:
    """The bounds whose channel tables a record names."""
    kinds = header.table["kind"].tolist()
    named = BlockLayout(tuple(replace(s, kind=KINDS[k]) for s, k in zip(layout.segments, kinds, strict=True)))
    for sink in (False, True):
        if bound is not None:
            bounds = resolve(bound, named, sink)
            if table_id(bounds, header.num_segments) == header.table_id:
                return bounds
    given = "none was given" if bound is None else f"{bound} is another one"
    raise ConfigError(
        f"the record was encoded with channel table {header.table_id:016x}, {given}: pass the bound= that it was "
        "encoded with"
    )


def _tensors_of(header: RecordHeader) -> tuple[str, list[tuple[int, ...]]]:
    """Order of axes and shapes of the tensors that a record came from."""
    flat = [g for g in header.geometry for _ in range(g.count)]
    dims = header.dims
    if set(dims) <= {"2", "N", "H", "D"} and {"N", "D"} <= set(dims) and len(dims) == len(set(dims)):
        step = 2 if "2" in dims else 1
        pages = flat[::step]
        whole = len(flat) % step == 0 and all(flat[i] == flat[i - i % step] for i in range(len(flat)))
        if whole and ("H" in dims or all(g.heads == 1 for g in pages)):
            shapes = [tuple({"2": 2, "N": g.tokens, "H": g.heads, "D": g.head_dim}[d] for d in dims) for g in pages]
            return dims, shapes
    if all(g.tokens == g.heads == 1 for g in flat):
        return "", [(g.head_dim,) for g in flat]
    return "", [(g.tokens, g.heads, g.head_dim) for g in flat]


def _allocate(header: RecordHeader) -> list[npt.NDArray[Any]]:
    dtypes = [g.dtype for g in header.geometry for _ in range(g.count)]
    shapes = _tensors_of(header)[1]
    step = len(dtypes) // len(shapes)
    return [np.empty(shape, _numpy_type(dtypes[i * step])) for i, shape in enumerate(shapes)]


def _numpy_type(dtype: DType) -> np.dtype[Any]:
    """NumPy's own type of a dtype; the bit pattern for bfloat16, which it lacks."""
    own: dict[DType, type[Any]] = {DType.FLOAT16: np.float16, DType.FLOAT32: np.float32}
    return np.dtype(own[dtype]) if dtype in own else dtype.numpy_bits


def _decode_view(header: RecordHeader, tensors: list[Any]) -> BlockView:
    dims, shapes = _tensors_of(header)
    if len(tensors) != len(shapes):
        raise LayoutError(f"the record came from {len(shapes)} tensors, out has {len(tensors)}: give as many")
    dtypes = {g.dtype for g in header.geometry}
    if len(dtypes) > 1:
        raise LayoutError("the record mixes dtypes: load it through a SwapEngine")
    dtype = dtypes.pop()
    batched = [t[None] for t in tensors]
    if dims:
        layout = BlockLayout.from_tensors(batched, dims, dtype=dtype)
    elif all(len(shape) == 1 for shape in shapes):
        layout = BlockLayout.opaque(batched, dtype=dtype)
    else:
        layout = BlockLayout.from_tensors(batched, "NHD", dtype=dtype)
    return BlockView(batched, check_geometry(header.geometry, layout))
