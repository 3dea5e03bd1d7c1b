# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Whole records: headers, equality with the reference, memory layouts, refusals."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import adversarial as adv
import bridge
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import reference_codec as ref
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
from kvzip.errors import CodecNotFoundError, CorruptRecordError, FormatError, FormatVersionError, LayoutError
from kvzip.record import ENTRY_DTYPE, KINDS, MODES, Reason, pack_headers, read_header, read_record
from kvzip.types import BlockLayout, BlockView

ALL_DTYPES = (*adv.NUMERIC, ref.OPAQUE)


def reseal(record: bytes | bytearray) -> bytes:
    """Compute both checksums again, where the lengths allow it."""
    data = bytearray(record)
    (header_bytes,) = struct.unpack_from("<I", data, 8)
    header_bytes = min(header_bytes, len(data))
    struct.pack_into("<I", data, 32, crc32c(bytes(data[header_bytes:])))
    data[12:16] = bytes(4)
    struct.pack_into("<I", data, 12, crc32c(bytes(data[:header_bytes])))
    return bytes(data)


@st.composite
def blocks(draw: st.DrawFn, dtypes: tuple[int, ...] = ALL_DTYPES) -> list[ref.Page]:
    """The pages of a block, with runs of equal geometry."""
    pages: list[ref.Page] = []
    for _ in range(draw(st.integers(1, 3))):
        geometry = draw(adv.geometries(dtypes=dtypes, most_tokens=20))
        for _ in range(draw(st.integers(1, 3))):
            pages.append(ref.Page(draw(adv.pages(geometry)), geometry, draw(st.integers(0, 2))))
    return pages


def view_of_pages(pages: list[ref.Page], dims: str = "") -> BlockView:
    return bridge.view_of([[p.bits for p in pages]], [p.geometry for p in pages], [p.kind for p in pages], dims)


@given(st.data())
@settings(max_examples=200)
def test_records_equal_the_reference(data: st.DataObject) -> None:
    pages = data.draw(blocks())
    kind, bound = data.draw(adv.bounds())
    mode = data.draw(st.sampled_from(MODES[1:]))
    dims = data.draw(st.sampled_from(("", "NHD", "2HND")))
    (record,) = bridge.native_records(view_of_pages(pages, dims), mode, kind, bound)
    expected = ref.encode_record(pages, mode=bridge.MODE_NUMBERS[mode], bound_kind=kind, bound=bound, dims=dims)
    assert record == expected
    decoded = ref.decode_record(record)
    assert (decoded.codec, decoded.dims) == ("cuszp", dims)
    for ours, theirs in zip(bridge.native_pages(record), decoded.pages, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    largest = sum(-(-p.geometry.raw_bytes // 16) * 16 for p in pages)
    assert len(record) <= decoded.header_bytes + largest, "larger than raw plus its header"


@given(st.data())
@settings(max_examples=50)
def test_codec_raw_equals_the_reference(data: st.DataObject) -> None:
    pages = data.draw(blocks())
    (record,) = bridge.native_records(view_of_pages(pages), "none", ref.BOUND_RELATIVE, 1e-3, codec="raw")
    assert record == ref.encode_record(pages, mode=ref.MODE_NONE, bound=1e-3, codec="raw")
    for page, decoded in zip(pages, bridge.native_pages(record), strict=True):
        np.testing.assert_array_equal(decoded, page.bits)


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=16)


@given(st.data())
@settings(max_examples=200)
def test_header_round_trip(data: st.DataObject) -> None:
    """Any header that a codec of any name may need, packed, read, and packed by the reference."""
    runs = data.draw(st.lists(st.tuples(adv.geometries(dtypes=ALL_DTYPES), st.integers(1, 5)), min_size=1, max_size=4))
    geometries = [g for g, count in runs for _ in range(count)]
    kinds = data.draw(st.lists(st.integers(0, 2), min_size=len(geometries), max_size=len(geometries)))
    pages = [ref.Page(np.zeros((1, 1), np.uint8), g, k) for g, k in zip(geometries, kinds, strict=True)]
    segments = [
        ref.Segment(
            bytes(data.draw(st.integers(1, 40))),
            data.draw(st.integers(0, 255)),
            float(np.float32(data.draw(st.floats(0, 2.0**100, width=32)))),
            data.draw(st.integers(0, 255)),
            data.draw(st.integers(0, 6)),
        )
        for _ in pages
    ]
    kind, bound = data.draw(adv.bounds())
    max_error = data.draw(st.one_of(st.none(), st.floats(0, 1e38)))
    dims = data.draw(st.text("2NHD", max_size=8))
    codec, mode, reason = data.draw(NAMES), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6))
    expected = ref.assemble(
        pages,
        segments,
        mode=mode,
        bound_kind=kind,
        bound=bound,
        codec=codec,
        reason=reason,
        max_error=math.nan if max_error is None else max_error,
        dims=dims,
    )
    header = read_header(expected)
    assert header.version == 1
    assert (header.codec, header.mode, header.dims) == (codec, MODES[mode], dims)
    assert header.bound == bridge.error_bound(kind, bound)
    assert (header.reason, header.max_error) == (Reason(reason), max_error)
    assert header.raw_bytes == sum(g.raw_bytes for g in geometries)
    assert header.record_bytes == len(expected)
    flat = [
        ref.Geometry(g.tokens, g.heads, g.head_dim, int(g.dtype), g.group_tokens)
        for g in header.geometry
        for _ in range(g.count)
    ]
    assert flat == geometries
    assert header.table["coding"].tolist() == [s.coding for s in segments]
    assert header.table["size"].tolist() == [len(s.data) for s in segments]
    assert header.table["bound"].tolist() == [s.bound for s in segments]
    assert header.table["param"].tolist() == [s.param for s in segments]
    assert [s.kind for s in header.layout().segments] == [KINDS[k] for k in kinds]

    payload = expected[header.header_bytes :]
    packed = pack_headers(
        bridge.layout_of(geometries, kinds, dims),
        np.array([header.table, header.table], ENTRY_DTYPE),
        np.array([len(payload)] * 2, np.uint64),
        np.array([crc32c(payload)] * 2, np.uint32),
        codec=codec,
        mode=MODES[mode],
        bound=header.bound,
        reason=Reason(reason),
        max_errors=None if max_error is None else np.array([max_error] * 2),
    )
    assert [bytes(p) for p in packed] == [expected[: header.header_bytes]] * 2
    assert bytes(read_record(expected)[1]) == payload


# ---- the memory layout is not part of a record -----------------------------------------------------------------------


def page_numbers(view: BlockView) -> list[bytes]:
    return [view.page(0, s).tobytes() for s in range(len(view.layout.segments))]


@pytest.mark.parametrize("dtype", adv.NUMERIC)
@pytest.mark.parametrize("mode", MODES[1:])
def test_memory_layout_does_not_change_the_payload(dtype: int, mode: str) -> None:
    rng = np.random.default_rng(dtype)
    shape = (5, 2, 18, 3, 10)  # blocks, K and V, tokens, heads, head_dim
    values = rng.standard_normal(shape) * 3
    kv = adv.from_float(values, dtype)
    kv[1, 0, 3, 2, 5] = adv.specials(dtype)[9]
    name = ("bfloat16", "float16", "float32")[dtype]
    if dtype == ref.FP32:
        kv = kv.view(np.float32)
    axes = {"2": 1, "N": 2, "H": 3, "D": 4}
    payloads = []
    for dims in ("2NHD", "2HND", "N2HD", "HN2D", "NH2D", "H2ND"):
        tensor = np.ascontiguousarray(kv.transpose(0, *(axes[d] for d in dims)))
        view = BlockView([tensor], BlockLayout.from_tensors([tensor], dims, dtype=name))
        records = bridge.native_records(view, mode, ref.BOUND_RELATIVE, 1e-3)
        payloads.append([r[read_header(r).header_bytes :] for r in records])
        assert all(read_header(r).dims == dims for r in records)
    assert all(p == payloads[0] for p in payloads)

    # K and V in tensors of their own
    k, v = np.ascontiguousarray(kv[:, 0]), np.ascontiguousarray(kv[:, 1].swapaxes(1, 2)).swapaxes(1, 2)
    apart = BlockView([k, v], BlockLayout.from_tensors([k, v], "NHD", dtype=name, kinds="kv"))
    records = bridge.native_records(apart, mode, ref.BOUND_RELATIVE, 1e-3)
    assert [r[read_header(r).header_bytes :] for r in records] == payloads[0]

    # a wider tensor around the pages
    wide = np.zeros((5, 2, 18, 4, 10), kv.dtype)
    wide[:, :, :, :3] = kv
    part = wide[:, :, :, :3]
    view = BlockView([part], BlockLayout.from_tensors([part], "2NHD", dtype=name))
    records = bridge.native_records(view, mode, ref.BOUND_RELATIVE, 1e-3)
    assert [r[read_header(r).header_bytes :] for r in records] == payloads[0]


@given(st.data())
@settings(max_examples=60)
def test_load_into_another_layout_and_other_blocks(data: st.DataObject) -> None:
    """Records of NHD blocks, in any order, into HND blocks of any number: nothing else changes."""
    dtype = data.draw(st.sampled_from(adv.NUMERIC))
    tokens, heads, head_dim = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    geometry = ref.Geometry(tokens, heads, head_dim, dtype, 16)
    count = data.draw(st.integers(1, 5))
    pages = [data.draw(adv.pages(geometry)) for _ in range(count)]
    source = np.stack([p.reshape(tokens, heads, head_dim) for p in pages])
    name = ("bfloat16", "float16", "float32")[dtype]
    source = source.view(np.float32) if dtype == ref.FP32 else source
    view = BlockView([source], BlockLayout.from_tensors([source], "NHD", dtype=name))
    records = bridge.native_records(view, "fixed", ref.BOUND_RELATIVE, 1e-3)
    assert records == [bridge.native_records(view[[i]], "fixed", ref.BOUND_RELATIVE, 1e-3)[0] for i in range(count)]
    assert records[::-1] == bridge.native_records(view[range(count - 1, -1, -1)], "fixed", ref.BOUND_RELATIVE, 1e-3)

    room = np.full((count + 2, heads, tokens, head_dim), 0x3F, source.dtype)
    before = room.copy()
    target = BlockView([room], BlockLayout.from_tensors([room], "HND", dtype=name))
    places = data.draw(st.permutations(range(count + 2)))[:count]
    parsed = [read_record(r) for r in records]
    codec = kvzip.get_codec("cuszp")
    layout = replace_groups(target, parsed[0][0].geometry[0].group_tokens)
    codec.decode_blocks(
        BlockView([room], layout, places),
        [np.frombuffer(p, np.uint8) for _, p in parsed],
        [h.table for h, _ in parsed],
    )
    for record, place in zip(records, places, strict=True):
        (expected,) = ref.decode_record(record).pages
        got = room[place].swapaxes(0, 1).reshape(tokens, -1)
        np.testing.assert_array_equal(np.ascontiguousarray(got).view(expected.dtype), expected)
    for place in set(range(count + 2)) - set(places):
        assert room[place].tobytes() == before[place].tobytes()


def replace_groups(view: BlockView, group_tokens: int) -> BlockLayout:
    return replace(view.layout, segments=tuple(replace(s, group_tokens=group_tokens) for s in view.layout.segments))


# ---- encode and decode on bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [kvzip.ErrorBound.relative(1e-3), kvzip.ErrorBound.lossless()], ids=str)
@pytest.mark.parametrize("mode", MODES[1:])
def test_encode_and_decode_arrays(bound: Any, mode: str) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 16, 3, 8)).astype(np.float32)
    for array in (x, x.astype(np.float16), x.astype(ml_dtypes.bfloat16)):
        for layout in ("2NHD", None):
            record = kvzip.encode(array, bound=bound, mode=mode, layout=layout)
            header = kvzip.read_header(record)
            assert (header.mode, header.bound) == (mode, bound)
            out = np.full_like(array, 7)
            assert kvzip.decode(record, out=out) is out
            made = kvzip.decode(record)
            assert made.tobytes() == out.tobytes()
            limit = (
                0.0
                if header.bound.value == 0
                else 1e-3 * float(array.astype(np.float64).max() - array.astype(np.float64).min())
            )
            assert np.abs(out.astype(np.float64) - array.astype(np.float64)).max() <= limit
            assert len(record) <= header.header_bytes + array.nbytes + 32


def test_decode_refuses_what_does_not_fit() -> None:
    x = np.ones((16, 2, 8), np.float32)
    x[0] = 3
    record = kvzip.encode(x, bound=kvzip.ErrorBound.relative(1e-2), layout="NHD")
    for out in (np.ones((16, 2, 9), np.float32), np.ones((16, 2, 8), np.float16), [x, x]):
        with pytest.raises(LayoutError):
            kvzip.decode(record, out=out)
    frozen = x.copy()
    frozen.flags.writeable = False
    with pytest.raises(LayoutError):
        kvzip.decode(record, out=frozen)


# ---- refusals --------------------------------------------------------------------------------------------------------


def sample_record() -> bytes:
    geometry = ref.Geometry(16, 2, 5, ref.BF16, 16)
    other = ref.Geometry(3, 1, 5, ref.BF16, 1)
    pages = [ref.Page(adv.page_bits("normal", i, geometry), geometry, i) for i in range(2)]
    pages.append(ref.Page(adv.page_bits("normal", 9, other), other))
    return ref.encode_record(pages, bound=1e-2)


RECORD = sample_record()
HEADER_BYTES = struct.unpack_from("<I", RECORD, 8)[0]
RUNS_AT, TABLE_AT = 96, 96 + 2 * 24


@pytest.mark.parametrize(
    ("at", "layout", "value"),
    [
        (6, "<H", 1),
        (6, "<H", 0x8000),
        (8, "<I", HEADER_BYTES + 16),
        (8, "<I", HEADER_BYTES - 16),
        (8, "<I", 0),
        (16, "<Q", 0),
        (16, "<Q", 2**63),
        (16, "<Q", len(RECORD) - HEADER_BYTES + 16),
        (24, "<Q", 0),
        (24, "<Q", 2**64 - 1),
        (36, "<I", 0),
        (36, "<I", 4),
        (36, "<I", 65537),
        (36, "<I", 2**32 - 1),
        (40, "<H", 0),
        (40, "<H", 3),
        (40, "<H", 65535),
        (42, "B", 5),
        (43, "B", 0),  # a bound that is not 0
        (43, "B", 6),
        (44, "B", 9),
        (45, "B", 1),
        (47, "B", 128),
        (48, "<d", math.nan),
        (48, "<d", math.inf),
        (48, "<d", -1.0),
        (48, "<d", 0.0),
        (56, "<d", -1.0),
        (56, "<d", math.inf),
        (64, "B", 255),
        (80, "B", 200),
        (88, "B", 1),
        (95, "B", 1),
        (RUNS_AT, "<I", 0),
        (RUNS_AT, "<I", 3),
        (RUNS_AT, "<I", 2**32 - 1),
        (RUNS_AT + 4, "<I", 0),
        (RUNS_AT + 4, "<I", 17),
        (RUNS_AT + 4, "<I", 2**32 - 1),
        (RUNS_AT + 8, "<I", 0),
        (RUNS_AT + 12, "<I", 2**31),
        (RUNS_AT + 16, "B", 4),
        (RUNS_AT + 16, "B", 2),
        (RUNS_AT + 17, "B", 0),
        (RUNS_AT + 17, "B", 3),
        (RUNS_AT + 17, "B", 32),
        (RUNS_AT + 18, "B", 1),
        (RUNS_AT + 23, "B", 1),
        (TABLE_AT, "<I", 1),
        (TABLE_AT + 4, "<I", 0),
        (TABLE_AT + 4, "<I", 2**32 - 1),
        (TABLE_AT + 8, "<f", math.nan),
        (TABLE_AT + 8, "<f", 2.0**-97),
        (TABLE_AT + 8, "<f", -1.0),
        (TABLE_AT + 8, "<f", math.inf),
        (TABLE_AT + 12, "B", 6),
        (TABLE_AT + 12, "B", 255),
        (TABLE_AT + 13, "B", 3),
        (TABLE_AT + 15, "B", 9),
        (TABLE_AT + 16, "<I", 0),
    ],
)
def test_a_forged_field_is_refused(at: int, layout: str, value: float) -> None:
    forged = bytearray(RECORD)
    struct.pack_into(layout, forged, at, value)
    for record in (bytes(forged), reseal(forged)):
        with pytest.raises(ref.Refused):
            ref.decode_record(record)
        with pytest.raises(CorruptRecordError):
            kvzip.decode(record)


def test_lengths_checksums_version_and_codec() -> None:
    assert len(kvzip.decode(RECORD)) == 3
    for cut in range(len(RECORD)):
        with pytest.raises(CorruptRecordError):
            kvzip.decode(RECORD[:cut])
    for tail in (b"\0", bytes(16), RECORD):
        with pytest.raises(CorruptRecordError):
            kvzip.decode(RECORD + tail)
    for bit in range(8 * len(RECORD)):
        damaged = bytearray(RECORD)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            kvzip.decode(bytes(damaged))
    newer = bytearray(RECORD)
    newer[4] = 2
    for record in (bytes(newer), reseal(newer)):
        with pytest.raises(FormatVersionError):
            kvzip.read_header(record)
    other = bytearray(RECORD)
    other[64:69] = b"other"
    with pytest.raises(CodecNotFoundError, match="other"):
        kvzip.decode(reseal(other))
    assert kvzip.read_header(reseal(other)).codec == "other"


def test_padding_must_be_zero() -> None:
    decoded = ref.decode_record(RECORD)
    checked = 0
    for entry in decoded.entries:
        start = decoded.header_bytes + entry.offset * 16 + entry.size
        for at in range(start, start + (-entry.size % 16)):
            forged = bytearray(RECORD)
            forged[at] = 1
            with pytest.raises(CorruptRecordError):
                bridge.native_pages(reseal(forged))
            checked += 1
    assert checked
    raw = ref.encode_record(
        [ref.Page(np.arange(5, dtype=np.uint8).reshape(1, 5), ref.Geometry(1, 1, 5, ref.OPAQUE, 1))],
        codec="raw",
        mode=0,
    )
    forged = bytearray(raw)
    forged[-1] = 1
    with pytest.raises(CorruptRecordError):
        bridge.native_pages(reseal(forged))
    odd = bytearray(raw)  # one run and one entry: 8 bytes of padding end its header
    header_bytes = struct.unpack_from("<I", raw, 8)[0]
    odd[header_bytes - 1] = 1
    with pytest.raises(CorruptRecordError):
        kvzip.read_header(reseal(odd))


@given(st.data())
@settings(max_examples=500)
def test_both_readers_refuse_the_same_records(data: st.DataObject) -> None:
    """Random damage behind valid checksums: kvzip refuses exactly what the reference refuses."""
    record = bytearray(data.draw(st.sampled_from((RECORD, *OTHERS))))
    (header_bytes,) = struct.unpack_from("<I", record, 8)
    for _ in range(data.draw(st.integers(1, 3))):
        anywhere = st.integers(0, len(record) - 1)
        at = data.draw(st.one_of(anywhere, st.integers(96, header_bytes - 1), st.integers(36, 47)))
        record[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from((0, 1, 255, record[at] ^ 1))))
    if record[64:80] not in (b"cuszp".ljust(16, b"\0"), b"raw".ljust(16, b"\0")):
        return
    sealed = reseal(record)
    try:
        expected: tuple[npt.NDArray[Any], ...] | None = ref.decode_record(sealed).pages
    except ref.Refused:
        expected = None
    try:
        pages = bridge.native_pages(sealed)
    except FormatError:
        assert expected is None, "kvzip refuses a record that the document allows"
        return
    assert expected is not None, "kvzip reads a record that the document forbids"
    for ours, theirs in zip(pages, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def other_records() -> tuple[bytes, ...]:
    made = []
    for i, (dtype, mode, flavour) in enumerate(
        (
            (ref.FP16, ref.MODE_PLAIN, "drifting"),
            (ref.FP32, ref.MODE_OUTLIER, "normal"),
            (ref.BF16, ref.MODE_FIXED, "constant"),
        )
    ):
        geometry = ref.Geometry(9, 1, 7, dtype, adv.GROUP_TOKENS[i])
        made.append(ref.encode_record([ref.Page(adv.page_bits(flavour, i, geometry), geometry)], mode=mode, bound=2e-2))
    geometry = ref.Geometry(9, 1, 7, ref.BF16, 8)
    page = ref.Page(adv.page_bits("normal", 4, geometry), geometry, 1)
    made.append(ref.encode_record([page, page], bound_kind=ref.BOUND_LOSSLESS, bound=0.0))
    made.append(ref.encode_record([page], codec="raw", mode=ref.MODE_NONE))
    return tuple(made)


OTHERS = other_records()
