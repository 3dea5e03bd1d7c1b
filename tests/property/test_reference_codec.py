# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The reference codec keeps the promises of docs/reference/format.md; its proof of the bound holds by exhaustion."""

from __future__ import annotations

import adversarial as adv
import numpy as np
import pytest
import reference_codec as ref
from hypothesis import given, settings
from hypothesis import strategies as st


def assert_bound(before: adv.Bits, after: adv.Bits, dtype: int, bound: float) -> None:
    """|after - before| <= bound for finite values, the same bits for the others."""
    finite = ref.is_finite(before, dtype)
    np.testing.assert_array_equal(after[~finite], before[~finite])
    x = ref.to_float32(before[finite], dtype).astype(np.float64)
    y = ref.to_float32(after[finite], dtype).astype(np.float64)
    assert np.isfinite(y).all()
    assert (np.abs(y - x) <= bound).all()


@given(st.data())
@settings(max_examples=300)
def test_bound_sizes_and_bits(data: st.DataObject) -> None:
    geometry = data.draw(adv.geometries(dtypes=(ref.BF16, ref.FP16, ref.FP32, ref.OPAQUE)))
    bits = data.draw(adv.pages(geometry))
    kind, bound = data.draw(adv.bounds())
    coding = data.draw(st.sampled_from((ref.FIXED, ref.PLAIN, ref.OUTLIER)))
    segment = ref.encode_segment(bits, geometry, coding, kind, bound)
    assert len(segment.data) <= max(4, geometry.raw_bytes)
    decoded = ref.decode_segment(segment.data, geometry, segment.coding, segment.bound, segment.param)
    if segment.coding in (ref.RAW, ref.CONSTANT, ref.LOSSLESS):
        np.testing.assert_array_equal(decoded, bits)
        assert segment.bound == 0
        return
    x = ref.to_float32(bits[ref.is_finite(bits, geometry.dtype)], geometry.dtype).astype(np.float64)
    limit = bound if kind == ref.BOUND_ABSOLUTE else bound * float(x.max() - x.min())
    assert segment.bound <= limit
    assert_bound(bits, decoded, geometry.dtype, segment.bound)


@pytest.mark.parametrize("dtype", [ref.BF16, ref.FP16])
def test_every_value_at_every_width(dtype: int) -> None:
    """`Why the bound is exact`: all finite values, all widths that hold their code, many bounds."""
    constants = ref.TYPES[dtype]
    patterns = np.arange(1 << 16, dtype=np.uint16)
    patterns = patterns[ref.is_finite(patterns, dtype)]
    values = ref.to_float32(patterns, dtype)
    significands = (1.0, 1 + 2.0**-23, 1 + 1 / 128, 1.25, 1.5, 1.9921875, 2 - 2.0**-23)
    exponents = (-96, -60, -1, 0, 50, 119) if dtype == ref.BF16 else (-40, -27, -26, -25, -24, -20, -16, -1, 0, 9, 14)
    for bound in [np.float32(s * 2.0**e) for e in exponents for s in significands]:
        with np.errstate(over="ignore"):
            coded = np.abs(values) + bound <= np.float32(constants.largest_finite)
        coded &= np.abs(ref.quantise(values, ref.step(bound, dtype, ref.PLAIN, 0))) <= constants.largest_q
        for width in range(constants.widest + 1):
            size = ref.step(bound, dtype, ref.FIXED, width)
            q = ref.quantise(values[coded], size).astype(np.int64)
            fits = ref.zigzag(q) < (1 << width)
            exact = q[fits] * np.float64(size)
            assert (q[fits].astype(np.float32) * size == exact).all(), (bound, width)
            decoded = ref.to_float32(ref.round_product(q[fits], np.array(size), dtype), dtype)
            assert (decoded == exact).all(), (bound, width)
            assert (np.abs(exact - values[coded][fits]) <= float(bound)).all(), (bound, width)


def test_float32_values_at_ties() -> None:
    rng = np.random.default_rng(3)
    for exponent in (-96, -50, 0, 50, 98):
        size = 2.0 ** (exponent + 1)
        ties = ((rng.integers(-(2**21), 2**21, 20_000) + 0.5) * size).astype(np.float32).view(np.uint32)
        near = (ties.astype(np.int64) + rng.integers(-3, 4, ties.size)).astype(np.uint32).reshape(-1, 16)
        geometry = ref.Geometry(16, 1, near.shape[0], ref.FP32, 16)
        bits = np.ascontiguousarray(near.T)
        for coding in (ref.FIXED, ref.PLAIN, ref.OUTLIER):
            bounds = ref.bounds_by_page(bits, geometry, ref.BOUND_ABSOLUTE, 2.0**exponent)
            assert bounds is not None
            segment = ref.quantised_candidate(bits, geometry, coding, bounds)
            decoded = ref.decode_segment(segment, geometry, coding, 2.0**exponent)
            assert_bound(bits, decoded, ref.FP32, 2.0**exponent)
