# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The native codec against the reference codec, byte for byte, and its bound on large arrays."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import adversarial as adv
import bridge
import numpy as np
import numpy.typing as npt
import pytest
import reference_codec as ref
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip import _native
from kvzip.backends.base import EncodeRequest
from kvzip.backends.registry import get_codec
from kvzip.errors import CorruptRecordError
from kvzip.types import BlockView

CODINGS = (ref.FIXED, ref.PLAIN, ref.OUTLIER, ref.RICE)
ALL_DTYPES = (*adv.NUMERIC, ref.OPAQUE)


def assert_same_codec(bits: adv.Bits, geometry: ref.Geometry, coding: int, kind: int, bound: float) -> ref.Segment:
    """Both encoders write the same segment, both decoders read the same page from it."""
    (native,) = bridge.native_encode([bits], geometry, coding, kind, bound)
    expected = ref.encode_segment(bits, geometry, coding, kind, bound)
    assert native.segment == expected
    (decoded,) = bridge.native_decode([native.payload], [native.table], geometry)
    reference = ref.decode_segment(expected.data, geometry, expected.coding, expected.bound, expected.param)
    np.testing.assert_array_equal(decoded, reference)
    assert_promises(bits, decoded, geometry, expected, kind, bound)
    return expected


def assert_promises(
    before: adv.Bits, after: adv.Bits, geometry: ref.Geometry, segment: ref.Segment, kind: int, bound: float
) -> None:
    """The bound in the output dtype, every other value bit for bit, and the size."""
    assert len(segment.data) <= max(4, geometry.raw_bytes)
    if segment.coding in (ref.RAW, ref.CONSTANT, ref.LOSSLESS, ref.LOSSLESS_RICE):
        np.testing.assert_array_equal(after, before)
        return
    dtype = geometry.dtype
    finite = ref.is_finite(before, dtype)
    np.testing.assert_array_equal(after[~finite], before[~finite])
    x = ref.to_float32(before[finite], dtype).astype(np.float64)
    y = ref.to_float32(after[finite], dtype).astype(np.float64)
    limit = bound if kind == ref.BOUND_ABSOLUTE else bound * float(x.max() - x.min())
    assert segment.bound <= limit
    assert (np.abs(x - y) <= segment.bound).all()


@given(st.data())
@settings(max_examples=600)
def test_native_bytes_equal_reference(data: st.DataObject) -> None:
    geometry = data.draw(adv.geometries(dtypes=ALL_DTYPES))
    bits = data.draw(adv.pages(geometry))
    kind, bound = data.draw(adv.bounds())
    assert_same_codec(bits, geometry, data.draw(st.sampled_from(CODINGS)), kind, bound)


@pytest.mark.parametrize("flavour", sorted(adv.FLAVOURS))
@pytest.mark.parametrize("dtype", adv.NUMERIC)
def test_every_flavour_in_every_coding(dtype: int, flavour: str) -> None:
    """A grid where every cell is visited, which random draws do not promise."""
    seed = 0
    for group_tokens in adv.GROUP_TOKENS:
        for tokens, heads, head_dim in ((16, 2, 8), (13, 1, 19)):
            geometry = ref.Geometry(tokens, heads, head_dim, dtype, group_tokens)
            for coding in CODINGS:
                for kind, bound in ((ref.BOUND_RELATIVE, 1e-3), (ref.BOUND_ABSOLUTE, 0.75), (ref.BOUND_RELATIVE, 0.06)):
                    seed += 1
                    assert_same_codec(adv.page_bits(flavour, seed, geometry), geometry, coding, kind, bound)
            for coding in (ref.FIXED, ref.RICE):
                assert_same_codec(adv.page_bits(flavour, seed, geometry), geometry, coding, ref.BOUND_LOSSLESS, 0.0)


@pytest.mark.parametrize("dtype", [ref.BF16, ref.FP16])
@pytest.mark.parametrize("group_tokens", adv.GROUP_TOKENS)
def test_every_bit_pattern(dtype: int, group_tokens: int) -> None:
    """All 65,536 patterns in one page: mixed, and each in a group of equals."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    mixed = np.random.default_rng(1).permutation(patterns).reshape(256, 256)
    geometry = ref.Geometry(256, 4, 64, dtype, group_tokens)
    exponents = range(-96, 121, 24) if dtype == ref.BF16 else range(-30, 17, 4)
    for i, exponent in enumerate(exponents):
        bound = 1.37 * 2.0**exponent
        assert_same_codec(mixed, geometry, CODINGS[i % 4], ref.BOUND_ABSOLUTE, bound)
        columns = ref.Geometry(group_tokens, 1, 65536 // group_tokens, dtype, group_tokens)
        ordered = np.ascontiguousarray(patterns.reshape(-1, group_tokens).T)
        assert_same_codec(ordered, columns, CODINGS[i % 4], ref.BOUND_ABSOLUTE, bound)
    for coding in (ref.FIXED, ref.RICE):
        segment = assert_same_codec(mixed, geometry, coding, ref.BOUND_LOSSLESS, 0.0)
        assert segment.coding == ref.RAW  # noise
        for first in range(0, 65536, 16384):  # a quarter of the exponents: worth coding
            part = ref.Geometry(256, 1, 64, dtype, group_tokens)
            quarter = np.random.default_rng(first).permutation(patterns[first : first + 16384]).reshape(256, 64)
            segment = assert_same_codec(quarter, part, coding, ref.BOUND_LOSSLESS, 0.0)


@pytest.mark.parametrize(
    "kind_bound", [(ref.BOUND_RELATIVE, 1e-3), (ref.BOUND_RELATIVE, 1e-2), (ref.BOUND_LOSSLESS, 0.0)]
)
def test_real_pages(kv_cache: npt.NDArray[np.uint16], kind_bound: tuple[int, float]) -> None:
    layers, _, tokens, heads, head_dim = kv_cache.shape
    geometry = ref.Geometry(16, heads, head_dim, ref.BF16, 16)
    codings = CODINGS if kind_bound[0] != ref.BOUND_LOSSLESS else (ref.FIXED, ref.RICE)
    for layer in range(0, layers, max(1, layers // 3)):
        for kv in range(2):
            for first in range(0, tokens - 15, max(16, tokens // 2)):
                page = kv_cache[layer, kv, first : first + 16].reshape(16, -1)
                for coding in codings:
                    assert_same_codec(page, geometry, coding, *kind_bound)


@pytest.mark.parametrize("dtype", adv.NUMERIC)
@pytest.mark.parametrize("coding", CODINGS)
def test_bound_on_large_arrays(dtype: int, coding: int) -> None:
    """The bound of the native codec itself, on a few million values of every flavour."""
    rng = np.random.default_rng(coding)
    geometry = ref.Geometry(64, 8, 64, dtype, 16)
    for flavour in sorted(adv.FLAVOURS):
        blocks = [adv.page_bits(flavour, int(rng.integers(2**32)), geometry) for _ in range(4)]
        for kind, bound in (
            (ref.BOUND_RELATIVE, 10.0 ** rng.uniform(-5, -1)),
            (ref.BOUND_ABSOLUTE, 2.0 ** rng.uniform(-30, 10)),
        ):
            encoded = bridge.native_encode(blocks, geometry, coding, kind, bound, threads=2)
            decoded = bridge.native_decode([e.payload for e in encoded], [e.table for e in encoded], geometry)
            for before, after, made in zip(blocks, decoded, encoded, strict=True):
                assert_promises(before, after, geometry, made.segment, kind, bound)


@given(st.data())
@settings(max_examples=60)
def test_batches_and_threads_do_not_change_the_bytes(data: st.DataObject) -> None:
    geometry = data.draw(adv.geometries())
    count = data.draw(st.integers(1, 7))
    blocks = [data.draw(adv.pages(geometry)) for _ in range(count)]
    kind, bound = data.draw(adv.bounds())
    coding = data.draw(st.sampled_from(CODINGS))
    together = bridge.native_encode(
        blocks, geometry, coding, kind, bound, threads=data.draw(st.sampled_from((0, 1, 2, 5)))
    )
    alone = [bridge.native_encode([b], geometry, coding, kind, bound)[0] for b in blocks]
    assert [e.segment for e in together] == [e.segment for e in alone]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, restored to the best one afterwards."""
    if request.param not in _native.cpu_isas():
        pytest.skip(f"this machine does not run {request.param}")
    _native.set_cpu_isa(request.param)
    yield request.param
    _native.set_cpu_isa("auto")


@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_writes_the_same_bytes() -> None:
    rng = np.random.default_rng(11)
    for dtype in adv.NUMERIC:
        for number, flavour in enumerate(sorted(adv.FLAVOURS)):
            group_tokens = adv.GROUP_TOKENS[number % 5]
            geometry = ref.Geometry(21, 3, 17, dtype, group_tokens)
            bits = adv.page_bits(flavour, int(rng.integers(2**32)), geometry)
            for coding in CODINGS:
                assert_same_codec(bits, geometry, coding, ref.BOUND_RELATIVE, 10.0 ** rng.uniform(-4, -1))
            for coding in (ref.FIXED, ref.RICE):
                assert_same_codec(bits, geometry, coding, ref.BOUND_LOSSLESS, 0.0)


@given(st.data())
@settings(max_examples=400)
def test_decoders_agree_on_hostile_segments(data: st.DataObject) -> None:
    """What one decoder refuses the other refuses; what they accept decodes to the same bits."""
    geometry = data.draw(adv.geometries(most_tokens=20))
    bits = data.draw(adv.pages(geometry))
    kind, bound = data.draw(adv.bounds())
    segment = ref.encode_segment(bits, geometry, data.draw(st.sampled_from(CODINGS)), kind, bound)
    body = bytearray(segment.data)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, len(body) - 1), st.integers(0, min(len(body), 40) - 1)))
        body[at] = data.draw(st.integers(0, 255))
    wanted = data.draw(st.one_of(st.none(), st.integers(0, 7)))
    hostile = ref.Segment(
        bytes(body),
        segment.coding if wanted is None else wanted,
        data.draw(
            st.sampled_from(
                (segment.bound, 0.0, -1.0, float("nan"), float("inf"), 2.0**-97, 2.0**-96, 2.0**120, 2.0**121)
            )
        ),
        data.draw(st.sampled_from((segment.param, 0, 31, 255))),
    )
    assert_decoders_agree(hostile, geometry)


@given(st.data())
@settings(max_examples=400)
def test_decoders_agree_on_made_up_segments(data: st.DataObject) -> None:
    """Segments with valid classes of any kind and random words: wrapping sums, inexact products, every width."""
    geometry = data.draw(adv.geometries(most_tokens=20))
    coding = data.draw(st.sampled_from((ref.FIXED, ref.PLAIN, ref.OUTLIER, ref.LOSSLESS)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    constants, groups = ref.TYPES[geometry.dtype], geometry.groups
    byte_classes = coding == ref.OUTLIER or (coding != ref.LOSSLESS and geometry.dtype == ref.FP32)
    widest = constants.exponent if coding == ref.LOSSLESS else constants.widest
    width = rng.integers(0, widest + 1, groups)
    raw = rng.random(groups) < 0.1
    apart = (rng.random(groups) < 0.5) & ~raw & (coding == ref.OUTLIER)
    classes = np.where(raw, 63 if byte_classes else 15, width)
    if byte_classes:
        body = ref.padded((classes | (apart.astype(np.int64) << 6)).astype(np.uint8).tobytes(), 4)
    else:
        body = ref.nibbles(classes)
    if coding == ref.LOSSLESS:
        body += ref.nibbles(rng.integers(0, 16, groups))
        width = width + constants.sign_and_mantissa
    words = int(np.where(raw, constants.bits, width).sum() + apart.sum() * (constants.bits // 16))
    body += rng.integers(0, 1 << 16, words, dtype=np.uint16).tobytes()
    bound = data.draw(st.one_of(st.sampled_from((2.0**-96, 2.0**120, 1.0)), st.floats(-96, 119).map(lambda e: 2.0**e)))
    hostile = ref.Segment(body, coding, float(np.float32(bound)), data.draw(st.integers(0, 255)))
    if body:
        assert_decoders_agree(hostile, geometry)


@given(st.data())
@settings(max_examples=400)
def test_decoders_agree_on_made_up_rice_segments(data: st.DataObject) -> None:
    """Segments with valid planes of any kind, random words and quotients up to the limit."""
    geometry = data.draw(adv.geometries(most_tokens=20))
    coding = data.draw(st.sampled_from((ref.RICE, ref.LOSSLESS_RICE)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    constants, groups = ref.TYPES[geometry.dtype], geometry.groups
    widest, extra = (constants.widest, 0) if coding == ref.RICE else (5, constants.sign_and_mantissa)
    p = int(rng.integers(0, 4 if coding == ref.RICE else 5))
    k0 = int(rng.integers(0, widest - (2**p - 1 if coding == ref.RICE else 0) + 1))
    raw = rng.random(groups) < data.draw(st.sampled_from((0.0, 0.1, 1.0)))
    numbers = rng.integers(0, 2**p, groups)
    body = b"" if coding == ref.RICE else bytes([k0, p, int(raw.any()), 0])
    body += ref.planes_of(raw.astype(np.int64), int(raw.any()))
    body += ref.planes_of(rng.integers(0, 2, groups), int(coding == ref.RICE)) + ref.planes_of(numbers, p)
    most = data.draw(st.sampled_from((1, 3, 40, 16 * constants.bits - 1)))
    lengths = streams = b""
    for strip in ref.strips_of(geometry):
        count = 16 * sum(not raw[g] for g in strip)
        quotients = rng.integers(0, most + 1, count)
        if quotients.sum() + count > 64 * 16 * constants.bits:
            quotients = np.minimum(quotients, 2)
        stream = ref.unary(quotients.tolist())
        lengths += (len(stream) // 2).to_bytes(2, "little")
        streams += stream
    parameters = k0 + (numbers if coding == ref.RICE else 0)
    words = int(np.where(raw, constants.bits, extra + parameters).sum())
    body += lengths + rng.integers(0, 1 << 16, words, dtype=np.uint16).tobytes() + streams
    bound = data.draw(st.one_of(st.sampled_from((2.0**-96, 2.0**120, 1.0)), st.floats(-96, 119).map(lambda e: 2.0**e)))
    param = k0 | p << 5 | int(raw.any()) << 7 if coding == ref.RICE else data.draw(st.integers(0, 255))
    made_up = ref.Segment(body, coding, float(np.float32(bound)), param)
    ref.decode_segment(made_up.data, geometry, coding, made_up.bound, param)  # it is valid
    assert_decoders_agree(made_up, geometry)


def assert_decoders_agree(segment: ref.Segment, geometry: ref.Geometry) -> None:
    try:
        expected = ref.decode_segment(segment.data, geometry, segment.coding, segment.bound, segment.param)
    except ref.Refused:
        expected = None
    payload = np.frombuffer(ref.padded(segment.data, 16), np.uint8)
    try:
        (decoded,) = bridge.native_decode([payload], [bridge.table_of(segment)], geometry)
    except CorruptRecordError:
        assert expected is None, "kvzip refuses a segment that the document allows"
        return
    assert expected is not None, "kvzip accepts a segment that the document forbids"
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", adv.NUMERIC)
def test_any_alignment_of_pages_and_payloads(dtype: int, shift: int) -> None:
    """Neither the address of a page nor that of a payload need be a multiple of anything."""
    geometry = ref.Geometry(17, 2, 9, dtype, 16)
    codec = get_codec("cuszp")
    unsigned = ref.TYPES[dtype].unsigned
    nbytes = geometry.raw_bytes
    for number, coding in enumerate((*CODINGS, ref.LOSSLESS)):
        bits = adv.page_bits("some_specials", number, geometry)
        kind, bound = (ref.BOUND_LOSSLESS, 0.0) if coding == ref.LOSSLESS else (ref.BOUND_RELATIVE, 1e-2)
        wanted = ref.FIXED if coding == ref.LOSSLESS else coding
        memory = np.zeros(nbytes + 16, np.uint8)
        start = (shift - memory.ctypes.data) % 16
        memory[start : start + nbytes] = np.frombuffer(bits.tobytes(), np.uint8)
        page = memory[start : start + nbytes].view(unsigned).reshape(1, 17, 2, 9)
        assert page.ctypes.data % 16 == shift
        layout = bridge.layout_of([geometry])
        out = np.zeros(codec.max_payload_bytes(layout) + 16, np.uint8)[shift:][None]
        request = EncodeRequest(bridge.error_bound(kind, bound), bridge.MODES[wanted], 1)
        tables, sizes = codec.encode_blocks(BlockView([page], layout), request, out)
        payload = out[0, : int(sizes[0])]
        expected = ref.encode_segment(bits, geometry, wanted, kind, bound)
        assert payload.tobytes() == ref.padded(expected.data, 16)
        memory[:] = 0x77
        codec.decode_blocks(BlockView([page], layout), [payload], list(tables))
        decoded = ref.decode_segment(expected.data, geometry, expected.coding, expected.bound, expected.param)
        assert memory[start : start + nbytes].tobytes() == decoded.tobytes()
        assert (np.delete(memory, np.s_[start : start + nbytes]) == 0x77).all()


def test_one_codec_in_many_threads() -> None:
    """Calls at the same time do not disturb each other."""
    geometry = ref.Geometry(32, 2, 16, ref.BF16, 16)
    inputs = [adv.page_bits(flavour, 1, geometry) for flavour in sorted(adv.FLAVOURS)]
    expected = [ref.encode_segment(bits, geometry, ref.FIXED, ref.BOUND_RELATIVE, 1e-3) for bits in inputs]

    def work(number: int) -> None:
        for i in range(number, number + 60):
            bits, segment = inputs[i % len(inputs)], expected[i % len(inputs)]
            threads = number % 3
            made = bridge.native_encode([bits] * 3, geometry, ref.FIXED, ref.BOUND_RELATIVE, 1e-3, threads=threads)
            assert all(e.segment == segment for e in made)
            decoded = bridge.native_decode([e.payload for e in made], [e.table for e in made], geometry)
            reference = ref.decode_segment(segment.data, geometry, segment.coding, segment.bound, segment.param)
            assert all((d == reference).all() for d in decoded)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, i) for i in range(12)]:
            done.result()
