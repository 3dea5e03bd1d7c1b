# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Bounds by token and by channel: native against reference codec, and every value against its own bound."""

from __future__ import annotations

from fractions import Fraction

import adversarial as adv
import bridge
import numpy as np
import numpy.typing as npt
import pytest
import reference_codec as ref
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.calibration import CalibrationTable
from kvzip.errors import CorruptRecordError

CODINGS = (ref.FIXED, ref.PLAIN, ref.OUTLIER, ref.RICE)


def assert_same_codec(bits: adv.Bits, geometry: ref.Geometry, coding: int, asked: ref.Asked) -> ref.Segment:
    """Both encoders write the same segment, both decoders read the same page from it."""
    (native,) = bridge.native_encode([bits], geometry, coding, asked.kind, asked.bound, table=asked.table)
    expected = ref.encode_segment(bits, geometry, coding, asked.kind, asked.bound, asked.table)
    assert native.segment == expected
    (decoded,) = bridge.native_decode([native.payload], [native.table], geometry, asked.table)
    reference = ref.decode_segment(
        expected.data, geometry, expected.coding, expected.bound, expected.param, asked.table
    )
    np.testing.assert_array_equal(decoded, reference)
    assert len(expected.data) <= max(4, geometry.raw_bytes)
    if expected.coding in (ref.RAW, ref.CONSTANT, ref.LOSSLESS, ref.LOSSLESS_RICE):
        np.testing.assert_array_equal(decoded, bits)
    else:
        assert_bound(bits, decoded, geometry, asked)
    return expected


def assert_bound(before: adv.Bits, after: adv.Bits, geometry: ref.Geometry, asked: ref.Asked) -> None:
    """The error of every finite value against the bound of its token or channel; every other value bit for bit."""
    dtype = geometry.dtype
    finite = ref.is_finite(before, dtype)
    np.testing.assert_array_equal(after[~finite], before[~finite])
    x = np.where(finite, ref.to_float32(before, dtype), 0).astype(np.float64)
    y = np.where(finite, ref.to_float32(after, dtype), 0).astype(np.float64)
    assert np.isfinite(y).all()
    error = np.abs(y - x)
    if asked.table is not None:
        assert (error <= asked.table).all()
        return
    rows = zip(x.reshape(-1, geometry.head_dim), error.reshape(-1, geometry.head_dim), strict=True)
    for values, errors in rows:
        # error <= r x rms, squared and without a rounding
        squares = sum((Fraction(float(v)) ** 2 for v in values), Fraction(0))
        assert Fraction(float(errors.max())) ** 2 * geometry.head_dim <= Fraction(asked.bound) ** 2 * squares


@given(st.data())
@settings(max_examples=400)
def test_native_bytes_equal_reference(data: st.DataObject) -> None:
    geometry = data.draw(adv.geometries())
    bits = data.draw(adv.pages(geometry))
    assert_same_codec(bits, geometry, data.draw(st.sampled_from(CODINGS)), data.draw(adv.bounds_within(geometry)))


@pytest.mark.parametrize("flavour", sorted(adv.FLAVOURS))
@pytest.mark.parametrize("dtype", adv.NUMERIC)
def test_every_flavour_in_every_coding(dtype: int, flavour: str) -> None:
    seed = 0
    for group_tokens in adv.GROUP_TOKENS:
        geometry = ref.Geometry(18, 2, 20, dtype, group_tokens)
        table = np.geomspace(1e-3, 0.5, geometry.channels).astype(np.float32)
        for coding in CODINGS:
            for asked in (ref.Asked(ref.BOUND_TOKEN_RMS, 0.1), ref.Asked(ref.BOUND_CHANNEL_TABLE, 0.0, table)):
                seed += 1
                assert_same_codec(adv.page_bits(flavour, seed, geometry), geometry, coding, asked)


def test_tokens_of_very_different_size_and_of_zeros() -> None:
    rng = np.random.default_rng(1)
    geometry = ref.Geometry(32, 2, 64, ref.BF16, 16)
    scale = np.repeat(2.0 ** -np.arange(32.0), 128).reshape(32, 128)
    values = rng.standard_normal((32, 128)) * scale
    values[5] = 0
    values[20, :64] = 0
    bits = adv.from_float(values, ref.BF16)
    segment = assert_same_codec(bits, geometry, ref.FIXED, ref.Asked(ref.BOUND_TOKEN_RMS, 0.1))
    assert segment.coding == ref.FIXED | ref.BY_TOKEN
    scales = np.frombuffer(segment.data[:64], np.uint8).reshape(32, 2)
    assert (scales[5] == 255).all()
    assert scales[20].tolist().count(255) == 1


@pytest.mark.parametrize(("t", "r"), [(0.2, 0.08), (0.4, 0.17)])
def test_real_pages(kv_cache: npt.NDArray[np.uint16], t: float, r: float) -> None:
    layers, _, tokens, heads, head_dim = kv_cache.shape
    geometry = ref.Geometry(16, heads, head_dim, ref.BF16, 16)
    moments = np.random.default_rng(2).lognormal(0, 2, (layers, heads, head_dim))
    bounds = CalibrationTable(moments).key_bounds(t).reshape(layers, -1).astype(np.float32)
    for layer in range(0, layers, max(1, layers // 3)):
        for first in range(0, tokens - 15, max(16, tokens // 2)):
            pages = kv_cache[layer, :, first : first + 16].reshape(2, 16, -1)
            key = assert_same_codec(
                pages[0], geometry, ref.FIXED, ref.Asked(ref.BOUND_CHANNEL_TABLE, 0.0, bounds[layer])
            )
            value = assert_same_codec(pages[1], geometry, ref.FIXED, ref.Asked(ref.BOUND_TOKEN_RMS, r))
            assert key.coding == ref.FIXED | ref.BY_CHANNEL
            assert value.coding == ref.FIXED | ref.BY_TOKEN


@given(st.data())
@settings(max_examples=300)
def test_decoders_agree_on_hostile_segments(data: st.DataObject) -> None:
    geometry = data.draw(adv.geometries())
    bits = data.draw(adv.pages(geometry))
    asked = data.draw(adv.bounds_within(geometry))
    coding = data.draw(st.sampled_from(CODINGS))
    segment = ref.encode_segment(bits, geometry, coding, asked.kind, asked.bound, asked.table)
    damaged = bytearray(segment.data)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, min(len(damaged) - 1, 80)))
        damaged[at] = data.draw(st.integers(0, 255))
    bound = data.draw(st.sampled_from((segment.bound, 2.0**-96, 2.0**-90, 1.5, 1.0625 + 2.0**-10, 2.0**120)))
    steps = data.draw(st.sampled_from((segment.coding, segment.coding ^ 0x10, segment.coding | 0x40)))
    forged = ref.Segment(bytes(damaged), steps, bound, segment.param, segment.reason)
    entry = bridge.table_of(forged)
    payload = np.frombuffer(ref.padded(forged.data, 16), np.uint8)
    try:
        expected = ref.decode_segment(forged.data, geometry, forged.coding, bound, forged.param, asked.table)
    except ref.Refused:
        with pytest.raises(CorruptRecordError):
            bridge.native_decode([payload], [entry], geometry, asked.table)
        return
    (decoded,) = bridge.native_decode([payload], [entry], geometry, asked.table)
    np.testing.assert_array_equal(decoded, expected)
