# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Pages that are meant to break a codec, as bit patterns, and the ways to draw them with Hypothesis."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import reference_codec as ref
from hypothesis import strategies as st

Bits = npt.NDArray[Any]

NUMERIC = (ref.BF16, ref.FP16, ref.FP32)
GROUP_TOKENS = (16, 8, 4, 2, 1)


def from_float(values: npt.NDArray[Any], dtype: int) -> Bits:
    """Nearest (bfloat16: truncated) bit patterns of float values; what is too large becomes an infinity."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        if dtype == ref.FP16:
            return single.astype(np.float16).view(np.uint16)
        bits: Bits = single.view(np.uint32)
        return (bits >> 16).astype(np.uint16) if dtype == ref.BF16 else bits


def specials(dtype: int) -> Bits:
    """Zeros, least and largest subnormals and normals, infinities, NaNs of both kinds, of both signs."""
    constants = ref.TYPES[dtype]
    mantissa = constants.sign_and_mantissa - 1
    top = ((1 << constants.exponent) - 1) << mantissa
    positive = [
        0,
        1,
        2,
        (1 << mantissa) - 1,
        1 << mantissa,
        (1 << mantissa) + 1,
        top - 1,
        top - 2,
        top - (1 << mantissa),
    ]
    positive += [top, top + 1, top + (1 << (mantissa - 1)), top + (1 << mantissa) - 1]
    sign = 1 << (constants.bits - 1)
    return np.array(positive + [p | sign for p in positive], constants.unsigned)


def _any_bits(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    constants = ref.TYPES[dtype]
    bits: Bits = rng.integers(0, 1 << constants.bits, shape, dtype=np.uint64).astype(constants.unsigned)
    return bits


def _any_finite(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    bits = _any_bits(rng, dtype, shape)
    bits[~ref.is_finite(bits, dtype)] = 0
    return bits


def _normal(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    limits = {ref.BF16: (-120, 120), ref.FP16: (-22, 12), ref.FP32: (-120, 120)}[dtype]
    scale = 2.0 ** float(rng.uniform(*limits)) if rng.random() < 0.5 else 1.0
    per_channel = 2.0 ** rng.uniform(-3, 3, shape[1])
    return from_float(rng.standard_normal(shape) * per_channel * scale, dtype)


def _drifting(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    return from_float(100 + np.cumsum(rng.standard_normal(shape), axis=0) * 0.1, dtype)


def _some_specials(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    bits = _normal(rng, dtype, shape)
    where = rng.random(shape) < rng.choice([0.002, 0.03, 0.3])
    bits[where] = rng.choice(specials(dtype), int(where.sum()))
    return bits


def _only_specials(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    bits: Bits = rng.choice(specials(dtype), shape)
    return bits


def _subnormal(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    constants = ref.TYPES[dtype]
    limit = 1 << (constants.sign_and_mantissa - 1 + int(rng.integers(0, 3)))
    bits: Bits = rng.integers(0, limit, shape, dtype=np.uint64)
    sign = rng.integers(0, 2, shape, dtype=np.uint64) << np.uint64(constants.bits - 1)
    bits = (bits | sign).astype(constants.unsigned)
    return bits


def _largest(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    constants = ref.TYPES[dtype]
    mantissa = constants.sign_and_mantissa - 1
    top = ((1 << constants.exponent) - 1) << mantissa
    bits: Bits = np.uint64(top - 1) - rng.integers(0, 2 << mantissa, shape, dtype=np.uint64)
    sign = rng.integers(0, 2, shape, dtype=np.uint64) << np.uint64(constants.bits - 1)
    bits = (bits | sign).astype(constants.unsigned)
    return bits


def _lattice(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    """Halves of integers: with a power-of-two bound every second one is a tie."""
    reach = int(rng.choice([2, 40, 200, 5000]))
    unit = 2.0 ** int(rng.integers(-12, 4))
    return from_float(rng.integers(-reach, reach + 1, shape) * 0.5 * unit, dtype)


def _two_values(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    pair = rng.choice(np.concatenate([specials(dtype), _normal(rng, dtype, (4, 4)).ravel()]), 2)
    bits: Bits = np.where(rng.random(shape) < rng.choice([0.05, 0.5]), pair[0], pair[1])
    return bits.astype(ref.TYPES[dtype].unsigned)


def _constant(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    bits: Bits = np.full(shape, rng.choice(np.append(specials(dtype), _any_bits(rng, dtype, (1, 1)))))
    return bits.astype(ref.TYPES[dtype].unsigned)


def _huge_outlier(rng: np.random.Generator, dtype: int, shape: tuple[int, int]) -> Bits:
    values = rng.standard_normal(shape)
    values.flat[int(rng.integers(0, values.size))] = 2.0 ** rng.integers(4, 15 if dtype == ref.FP16 else 120)
    return from_float(values, dtype)


FLAVOURS = {
    "any_bits": _any_bits,
    "any_finite": _any_finite,
    "normal": _normal,
    "drifting": _drifting,
    "some_specials": _some_specials,
    "only_specials": _only_specials,
    "subnormal": _subnormal,
    "largest": _largest,
    "lattice": _lattice,
    "two_values": _two_values,
    "constant": _constant,
    "huge_outlier": _huge_outlier,
}


def page_bits(flavour: str, seed: int, geometry: ref.Geometry) -> Bits:
    """[T, C] bit patterns of a flavour; the same seed gives the same page."""
    rng = np.random.default_rng(seed)
    shape = (geometry.tokens, geometry.channels)
    if geometry.dtype == ref.OPAQUE:
        if flavour == "constant":
            return np.full(shape, seed & 255, np.uint8)
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return FLAVOURS[flavour](rng, geometry.dtype, shape)


@st.composite
def geometries(draw: st.DrawFn, *, dtypes: tuple[int, ...] = NUMERIC, most_tokens: int = 40) -> ref.Geometry:
    """Geometries with tails in both directions, and pages of unknown geometry."""
    dtype = draw(st.sampled_from(dtypes))
    group_tokens = draw(st.sampled_from(GROUP_TOKENS))
    if dtype == ref.OPAQUE or draw(st.integers(0, 7)) == 0:
        return ref.Geometry(1, 1, draw(st.integers(1, 400)), dtype, 1 if dtype == ref.OPAQUE else group_tokens)
    tokens = draw(st.one_of(st.just(16), st.integers(1, most_tokens)))
    heads = draw(st.integers(1, 3))
    head_dim = draw(st.one_of(st.sampled_from((8, 16, 32)), st.integers(1, 37)))
    return ref.Geometry(tokens, heads, head_dim, dtype, group_tokens)


@st.composite
def bounds(draw: st.DrawFn) -> tuple[int, float]:
    """(kind, value): all three kinds, with the ends of the range and what lies beyond them."""
    kind = draw(st.sampled_from((ref.BOUND_RELATIVE, ref.BOUND_ABSOLUTE, ref.BOUND_RELATIVE, ref.BOUND_LOSSLESS)))
    if kind == ref.BOUND_LOSSLESS:
        return kind, 0.0
    if kind == ref.BOUND_RELATIVE:
        exponent = st.floats(-7, 0)
        return kind, draw(
            st.one_of(st.sampled_from((1.0, 1e-2, 1e-3, 2.0**-10, 5e-324)), exponent.map(lambda e: 10.0**e))
        )
    ends = (
        2.0**-97,
        2.0**-96 * (1 - 2.0**-40),
        2.0**-96,
        2.0**-95,
        2.0**-24,
        2.0**-25,
        2.0**119,
        2.0**120,
        2.0**121,
        1e300,
    )
    wide = st.floats(-100, 124)
    usual = st.floats(-14, 8)
    return kind, draw(st.one_of(st.sampled_from(ends), usual.map(lambda e: 2.0**e), wide.map(lambda e: 2.0**e)))


@st.composite
def pages(draw: st.DrawFn, geometry: ref.Geometry) -> Bits:
    """A page of a geometry: a flavour, or, when small, any bit patterns that Hypothesis likes."""
    count = geometry.tokens * geometry.channels
    if count <= 64 and draw(st.booleans()):
        constants = ref.TYPES[geometry.dtype]
        if geometry.dtype == ref.OPAQUE:
            value = st.integers(0, 255)
        else:
            value = st.one_of(
                st.sampled_from(specials(geometry.dtype).tolist()), st.integers(0, (1 << constants.bits) - 1)
            )
        values = draw(st.lists(value, min_size=count, max_size=count))
        return np.array(values, constants.unsigned).reshape(geometry.tokens, geometry.channels)
    return page_bits(draw(st.sampled_from(sorted(FLAVOURS))), draw(st.integers(0, 2**32)), geometry)


@st.composite
def bounds_within(draw: st.DrawFn, geometry: ref.Geometry) -> ref.Asked:
    """Bounds by token or by channel, with the ends of the range and channels that stay exact."""
    if draw(st.booleans()):
        r = draw(st.one_of(st.sampled_from((1.0, 0.17, 2.0**-12, 1e-30)), st.floats(-4, 0).map(lambda e: 10.0**e)))
        return ref.Asked(ref.BOUND_TOKEN_RMS, r)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = draw(st.sampled_from(((-8, 2), (-2, 0), (-96, 119), (-30, 14))))
    table = (2.0 ** rng.uniform(low, high, geometry.channels)).astype(np.float32)
    table[rng.random(table.size) < draw(st.sampled_from((0.0, 0.1, 1.0)))] = 0
    return ref.Asked(ref.BOUND_CHANNEL_TABLE, 0.0, table)
