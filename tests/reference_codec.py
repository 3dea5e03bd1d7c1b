# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""A second implementation of docs/reference/format.md in plain NumPy, written from that page alone.

It shares no code with kvzip: constants are repeated on purpose, so that a wrong constant in either shows as a
difference.
It favours the order and the words of the page over speed (a few MB/s).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

Bits = npt.NDArray[Any]  # unsigned bit patterns
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]

BF16, FP16, FP32, OPAQUE = 0, 1, 2, 3
RAW, CONSTANT, FIXED, PLAIN, OUTLIER, LOSSLESS, RICE, LOSSLESS_RICE = range(8)
BY_PAGE, BY_TOKEN, BY_CHANNEL = 0x00, 0x10, 0x20  # steps
BOUND_LOSSLESS, BOUND_ABSOLUTE, BOUND_RELATIVE, BOUND_TOKEN_RMS, BOUND_CHANNEL_TABLE, BOUND_BY_PAGE = range(6)
MODE_NONE, MODE_FIXED, MODE_PLAIN, MODE_OUTLIER, MODE_RICE = range(5)
AS_ASKED, TOO_FINE, LOSSLESS_SMALLER, INCOMPRESSIBLE, OPAQUE_DTYPE, ENCODER_FAILED, CODEC_UNAVAILABLE = range(7)

MIN_BOUND = 2.0**-96
MAX_BOUND = 2.0**120


class Refused(ValueError):
    """The bytes contradict the format."""


@dataclass(frozen=True)
class TypeConstants:
    """One column of the table in "Codings of the codecs"."""

    bits: int
    unsigned: Any  # NumPy dtype of the bit pattern
    sign_and_mantissa: int = 0  # s
    exponent: int = 0  # x
    widest: int = 0  # W
    largest_q: int = 0
    largest_finite: float = 0.0


TYPES = {
    BF16: TypeConstants(16, np.dtype("<u2"), 8, 8, 14, 8191, (2 - 2.0**-7) * 2.0**127),
    FP16: TypeConstants(16, np.dtype("<u2"), 11, 5, 14, 8191, 65504.0),
    FP32: TypeConstants(32, np.dtype("<u4"), 24, 8, 24, 2097151, (2 - 2.0**-23) * 2.0**127),
    OPAQUE: TypeConstants(8, np.dtype("u1")),
}


@dataclass(frozen=True)
class Geometry:
    """What a record knows of a page."""

    tokens: int
    heads: int
    head_dim: int
    dtype: int
    group_tokens: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def raw_bytes(self) -> int:
        return self.tokens * self.channels * TYPES[self.dtype].bits // 8

    @property
    def groups(self) -> int:
        group_channels = 16 // self.group_tokens
        return -(-self.tokens // self.group_tokens) * -(-self.channels // group_channels)


@dataclass(frozen=True)
class Segment:
    """A segment's bytes (without padding) and its table entry (without offset and kind)."""

    data: bytes
    coding: int
    bound: float = 0.0
    param: int = 0
    reason: int = AS_ASKED


# ---- values, groups, words -------------------------------------------------------------------------------------------


def to_float32(bits: Bits, dtype: int) -> Floats:
    """The values of bit patterns; every value of the three dtypes is a float32."""
    if dtype == BF16:
        values: Floats = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif dtype == FP16:
        values = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    else:
        values = bits.astype(np.uint32).view(np.float32)
    return values


def exponent_field(bits: Bits, dtype: int) -> Ints:
    """The exponent fields of bit patterns."""
    constants = TYPES[dtype]
    mantissa_bits = constants.sign_and_mantissa - 1
    return (bits.astype(np.int64) >> mantissa_bits) & ((1 << constants.exponent) - 1)


def is_finite(bits: Bits, dtype: int) -> Mask:
    """True where the exponent field is not all ones."""
    finite: Mask = np.not_equal(exponent_field(bits, dtype), (1 << TYPES[dtype].exponent) - 1)
    return finite


def to_groups(page: npt.NDArray[Any], group_tokens: int) -> npt.NDArray[Any]:
    """[T, C] -> [groups, 16]; places outside the page become 0."""
    tokens, channels = page.shape
    group_channels = 16 // group_tokens
    rows, columns = -(-tokens // group_tokens), -(-channels // group_channels)
    padded = np.zeros((rows * group_tokens, columns * group_channels), page.dtype)
    padded[:tokens, :channels] = page
    # value i of a group is token i mod G, channel floor(i / G)
    grid = padded.reshape(rows, group_tokens, columns, group_channels).transpose(0, 2, 3, 1)
    groups: npt.NDArray[Any] = grid.reshape(rows * columns, 16)
    return groups


def from_groups(groups: npt.NDArray[Any], tokens: int, channels: int, group_tokens: int) -> npt.NDArray[Any]:
    """[groups, 16] -> [T, C]; what stands outside the page is dropped."""
    group_channels = 16 // group_tokens
    rows, columns = -(-tokens // group_tokens), -(-channels // group_channels)
    grid = groups.reshape(rows, columns, group_channels, group_tokens).transpose(0, 3, 1, 2)
    page = grid.reshape(rows * group_tokens, columns * group_channels)[:tokens, :channels]
    return np.ascontiguousarray(page)


def inside(geometry: Geometry) -> Mask:
    """[groups, 16]: which places are values of the page."""
    return to_groups(np.ones((geometry.tokens, geometry.channels), np.bool_), geometry.group_tokens)


def bit_planes(codes: Ints, count: int) -> Words:
    """[groups, 16] codes -> [groups, count] words: bit i of word b is bit b of code i."""
    planes = np.zeros((codes.shape[0], count), np.int64)
    for b in range(count):
        planes[:, b] = ((codes >> b) & 1) @ (1 << np.arange(16))
    return planes.astype(np.uint16)


def from_bit_planes(planes: npt.NDArray[Any]) -> Ints:
    """[groups, count] words -> [groups, 16] codes."""
    words = planes.astype(np.int64)
    codes = np.zeros((words.shape[0], 16), np.int64)
    for b in range(words.shape[1]):
        codes |= ((words[:, b : b + 1] >> np.arange(16)) & 1) << b
    return codes


def zigzag(q: Ints) -> Ints:
    return np.where(q >= 0, 2 * q, -2 * q - 1)


def from_zigzag(z: Ints) -> Ints:
    return np.where(z & 1 == 0, z >> 1, -(z >> 1) - 1)


def wrap32(q: Ints) -> Ints:
    """Wrap modulo 2^32 into the signed range."""
    return ((q + 2**31) & 0xFFFFFFFF) - 2**31


def width_of(codes: Ints) -> Ints:
    """Smallest width that holds all codes of a group: [groups, n] -> [groups]."""
    largest = codes.max(axis=1)
    width = np.zeros(largest.shape, np.int64)
    for b in range(34):
        width += largest >= (1 << b)
    return width


def nibbles(classes: Ints) -> bytes:
    """Two classes a byte, the first in the low half, zero-padded to a multiple of 4 bytes."""
    even = np.zeros((classes.size + 1) // 2 * 2, np.uint8)
    even[: classes.size] = classes
    return padded((even[0::2] | (even[1::2] << 4)).astype(np.uint8).tobytes(), 4)


def padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


# ---- steps -----------------------------------------------------------------------------------------------------------


def truncate_significand(bound: np.float32, n: int) -> np.float32:
    """trunc_n(B): keep the n most significant bits of the significand, the leading one included."""
    keep = (0xFFFFFFFF << (24 - n)) & 0xFFFFFFFF
    bits = int(np.array(bound, np.float32).view(np.uint32)) & keep
    truncated: np.float32 = np.array([bits], np.uint32).view(np.float32)[0]
    return truncated


def floor_log2(bound: np.float32) -> int:
    return math.frexp(float(bound))[1] - 1


def step_bits(bound: np.float32, dtype: int, coding: int, width: int) -> int:
    """n of trunc_n for a group of this width."""
    if coding == FIXED and dtype == BF16:
        return min(max(9 - width, 1), 8)
    if coding == FIXED and dtype == FP16:
        return min(max(min(12 - width, floor_log2(bound) + 26), 1), 8)
    return 1


def step(bound: np.float32, dtype: int, coding: int, width: int) -> np.float32:
    """S of a group of this width; 0 for the bound of a vector of zeros."""
    if bound == 0:
        return np.float32(0)
    size: np.float32 = np.float32(2) * truncate_significand(bound, step_bits(bound, dtype, coding, width))
    return size


def step_of_each(bounds: Floats, dtype: int, coding: int, width: Ints | int) -> Floats:
    """S of every value: bounds [groups, 16] (NaN: no usable one, anything is returned), width [groups] or a number."""
    widths = np.broadcast_to(np.asarray(width).reshape(-1, 1), bounds.shape)
    sizes = np.ones(bounds.shape, np.float32)
    for w in np.unique(widths):
        for b in np.unique(bounds[(widths == w) & ~np.isnan(bounds)]):
            sizes[(widths == w) & (bounds == b)] = step(b, dtype, coding, int(w))
    return sizes


def quantise(x: Floats, size: np.float32 | Floats) -> Floats:
    """q = round-half-to-even(fl(x * fl(1 / S))), still as float32 (it may be beyond an integer's range)."""
    if not np.all(size):  # a vector of zeros
        return np.where(size == 0, np.float32(0), quantise(x, np.where(size == 0, np.float32(1), size)))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        q: Floats = np.rint(x * (np.float32(1) / size))
    return q


# ---- the encoder -----------------------------------------------------------------------------------------------------


def round_toward_zero(value: float) -> np.float32:
    """float64 to float32, rounded toward zero."""
    with np.errstate(over="ignore", under="ignore"):
        nearest: np.float32 = np.float32(value)
    if abs(float(nearest)) > abs(value):
        nearest = np.nextafter(nearest, np.float32(0))
    return nearest


def applied_bound(bits: Bits, dtype: int, bound_kind: int, bound: float) -> np.float32 | None:
    """B of rule 2, or None when there is no quantised candidate."""
    finite = to_float32(bits[is_finite(bits, dtype)], dtype).astype(np.float64)
    if finite.size == 0:
        return None
    wanted = bound if bound_kind == BOUND_ABSOLUTE else bound * float(finite.max() - finite.min())
    applied = round_toward_zero(min(wanted, MAX_BOUND))
    return None if float(applied) < MIN_BOUND else applied


@dataclass(frozen=True)
class Bounds:
    """The bounds of a page: what the table keeps, what the segment begins with, and B of every value, [T, C].

    NaN stands for a bound that is not usable.
    """

    steps: int
    largest: float
    prefix: bytes
    each: Floats


def tree_sum(leaves: Floats) -> Floats:
    """Sum over the last axis by a binary tree, padded with zeros, neighbours first, in float32."""
    size = 1
    while size < leaves.shape[-1]:
        size *= 2
    level = np.zeros((*leaves.shape[:-1], size), np.float32)
    level[..., : leaves.shape[-1]] = leaves
    while level.shape[-1] > 1:
        level = level[..., 0::2] + level[..., 1::2]
    return level[..., 0]


def sixteenths(bound: np.float32) -> int:
    """The bits of a float32 above its low 19."""
    return int(np.array(bound, np.float32).view(np.uint32)) >> 19


def bounds_by_token(bits: Bits, geometry: Geometry, r: float) -> Bounds | None:
    """Bounds relative to the rms of each token and head, or None when none is usable."""
    dtype, constants = geometry.dtype, TYPES[geometry.dtype]
    finite = is_finite(bits, dtype)
    if not finite.any():
        return None
    bias = (1 << (constants.exponent - 1)) - 1
    u = int(exponent_field(bits, dtype)[finite].max()) - bias
    f = np.float32(2.0 ** max(-u, -126))
    x = np.where(finite, to_float32(bits, dtype), np.float32(0))
    x = x.reshape(geometry.tokens, geometry.heads, geometry.head_dim)
    with np.errstate(under="ignore"):
        scaled = x * f
        sums = tree_sum(scaled * scaled)
    each = np.zeros(sums.shape, np.float32)
    for at in np.ndindex(*sums.shape):
        wanted = math.sqrt(float(sums[at]) / geometry.head_dim) * (1 - 2.0**-19) * r / float(f)
        bound = truncate_significand(round_toward_zero(min(wanted, MAX_BOUND)), 5)
        each[at] = bound if bound >= MIN_BOUND else np.nan
    if np.isnan(each).all():
        return None
    largest = np.float32(np.nanmax(each))
    scales = np.zeros(sums.shape, np.uint8)
    for at in np.ndindex(*sums.shape):
        if not x[at].any():
            scales[at], each[at] = 255, 0
        elif not np.isnan(each[at]):
            scale = sixteenths(largest) - sixteenths(each[at])
            if scale > 254:
                each[at] = np.nan
            else:
                scales[at] = scale
    values = np.repeat(each, geometry.head_dim, axis=1)
    return Bounds(BY_TOKEN, float(largest), padded(scales.tobytes(), 4), values)


def bounds_of_scales(data: bytes, geometry: Geometry, largest: np.float32) -> Bounds:
    """The bounds that a segment with steps by token begins with."""
    count = geometry.tokens * geometry.heads
    size = -(-count // 4) * 4
    refuse_if(len(data) < size, "the segment ends within its scales")
    refuse_if(any(data[count:size]), "padding of the scales is not zero")
    top = int(np.array(largest, np.float32).view(np.uint32))
    refuse_if(top & ((1 << 19) - 1) != 0, "a bound with more than 5 significant bits")
    scales = np.frombuffer(data[:count], np.uint8).astype(np.int64)
    bits = np.where(scales == 255, 0, top - (scales << 19))
    each = np.maximum(bits, 0).astype(np.uint32).view(np.float32)
    refuse_if(bool(((scales != 255) & ((bits < 0) | (each < MIN_BOUND))).any()), "a token's bound")
    values = np.repeat(each.reshape(geometry.tokens, geometry.heads), geometry.head_dim, axis=1)
    return Bounds(BY_TOKEN, float(largest), data[:size], values)


def bounds_by_channel(table: npt.NDArray[Any] | None, geometry: Geometry) -> Bounds | None:
    """Bounds from a channel table, or None when none is usable."""
    refuse_if(table is None, "a channel table is needed")
    row = np.asarray(table, np.float32).reshape(1, geometry.channels)
    largest = float(row.max())
    each = np.broadcast_to(np.where(row == 0, np.float32(np.nan), row), (geometry.tokens, geometry.channels))
    return Bounds(BY_CHANNEL, largest, b"", each) if largest > 0 else None


def bounds_by_page(bits: Bits, geometry: Geometry, bound_kind: int, bound: float) -> Bounds | None:
    """One bound for the page, or None when it is not usable."""
    applied = applied_bound(bits, geometry.dtype, bound_kind, bound)
    if applied is None:
        return None
    each = np.full((geometry.tokens, geometry.channels), applied, np.float32)
    return Bounds(BY_PAGE, float(applied), b"", each)


def grouped_bounds(bounds: Bounds, geometry: Geometry) -> Floats:
    """B of every place of every group, [groups, 16]; outside of the page 1."""
    each = to_groups(bounds.each, geometry.group_tokens)
    return np.where(inside(geometry), each, np.float32(1))


def deltas(q: Ints, group_tokens: int) -> Ints:
    """q_i - q_{i-1} along runs of L values, the value before a run taken as 0."""
    run = 16 if group_tokens == 1 else group_tokens
    runs = q.reshape(-1, run)
    return np.diff(runs, axis=1, prepend=0).reshape(q.shape)


def quantised_candidate(bits: Bits, geometry: Geometry, coding: int, bounds: Bounds) -> bytes:
    """Rule 3: the segment in coding `fixed`, `plain` or `outlier`."""
    dtype, constants = geometry.dtype, TYPES[geometry.dtype]
    bound = grouped_bounds(bounds, geometry)
    groups = to_groups(bits, geometry.group_tokens)
    place = inside(geometry)
    x = to_float32(groups, dtype)

    raw: Mask = np.any(~is_finite(groups, dtype) & place, axis=1)
    raw |= np.isnan(bound).any(axis=1)
    x = np.where(raw[:, None], np.float32(0), x)
    with np.errstate(over="ignore"):
        raw |= (np.abs(x) + bound > np.float32(constants.largest_finite)).any(axis=1)
    coarse = quantise(x, step_of_each(bound, dtype, PLAIN, 0))
    raw |= (np.abs(coarse) > constants.largest_q).any(axis=1)
    x = np.where(raw[:, None], np.float32(0), x)
    q = np.where(raw[:, None], np.float32(0), coarse).astype(np.int64)

    first_words = np.zeros((len(groups), 2), np.uint16)
    apart = np.zeros(len(groups), np.bool_)
    if coding == FIXED:
        widest_of_group = width_of(zigzag(q))
        width = widest_of_group.copy()
        for w1 in range(1, constants.widest + 1):  # one bit less, if the step of that width allows it
            at = widest_of_group == w1
            finer = zigzag(quantise(x[at], step_of_each(bound[at], dtype, coding, w1 - 1)).astype(np.int64))
            width[at] = np.where(width_of(finer) <= w1 - 1, w1 - 1, w1)
        codes = zigzag(quantise(x, step_of_each(bound, dtype, coding, width)).astype(np.int64))
        assert (width_of(codes) <= width).all(), "a code does not fit into the width that the rules choose"
    else:
        codes = np.where(place, zigzag(deltas(q, geometry.group_tokens)), 0)
        width = width_of(codes)
        if coding == OUTLIER:
            rest = codes.copy()
            rest[:, 0] = 0
            rest_width = width_of(rest)
            first_count = constants.bits // 16
            apart = (first_count + rest_width < width) & ~raw
            first = q[:, 0] & 0xFFFFFFFF
            first_words[:, 0] = first & 0xFFFF
            first_words[:, 1] = first >> 16
            codes = np.where(apart[:, None], rest, codes)
            width = np.where(apart, rest_width, width)
    raw |= width > constants.widest
    apart &= ~raw

    planes = bit_planes(np.where(raw[:, None], groups.astype(np.int64), codes), constants.bits)
    count = np.where(raw, constants.bits, width)
    words = np.concatenate([first_words, planes], axis=1)
    keep = np.concatenate(
        [apart[:, None], apart[:, None] & (constants.bits == 32), columns_below(count, planes)], axis=1
    )
    if coding == OUTLIER or dtype == FP32:
        classes = padded((np.where(raw, 63, width) | (apart.astype(np.int64) << 6)).astype(np.uint8).tobytes(), 4)
    else:
        classes = nibbles(np.where(raw, 15, width))
    return bytes(bounds.prefix + classes + words[keep].astype("<u2").tobytes())


def columns_below(count: Ints, planes: npt.NDArray[Any]) -> Mask:
    """[groups, columns]: which of the words are written; in row order they are the words of the segment."""
    return np.arange(planes.shape[1]) < count[:, None]


# ---- Rice codings ----------------------------------------------------------------------------------------------------


def planes_of(flags: Ints, count: int) -> bytes:
    """`count` planes, the lowest bit of a number a group first."""
    padding = -flags.size % 32
    out = b""
    for bit in range(count):
        bits = np.concatenate([(flags >> bit) & 1, np.zeros(padding, np.int64)]).astype(np.uint8)
        out += np.packbits(bits, bitorder="little").tobytes()
    return out


def strips_of(geometry: Geometry) -> list[range]:
    """The groups of each strip."""
    group_channels = 16 // geometry.group_tokens
    columns = -(-geometry.channels // group_channels)
    rows = geometry.groups // columns
    return [
        range(r * columns + c, r * columns + min(c + 64, columns)) for r in range(rows) for c in range(0, columns, 64)
    ]


def bits_of_number(n: int) -> int:
    """R before the shift: the number of bits of n."""
    return n.bit_length()


def rice_parameter(total: int) -> int:
    """R(s)."""
    return bits_of_number(9 * total // 256)


def unary(quotients: Sequence[int]) -> bytes:
    """A stream: so many zero bits and a one for each quotient, in words."""
    bits: list[int] = []
    for quotient in quotients:
        bits += [0] * int(quotient) + [1]
    bits += [0] * (-len(bits) % 16)
    return np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()


def assemble_rice(
    groups: Bits, geometry: Geometry, codes: Ints, parameters: Ints, raw: Mask, low: Ints, widths: Ints
) -> tuple[bytes, bytes]:
    """Lengths, words and quotients: of codes with parameters, words of `widths` bits with the codes `low`."""
    bits = TYPES[geometry.dtype].bits
    planes = bit_planes(np.where(raw[:, None], groups.astype(np.int64), low), bits)
    words = planes[columns_below(np.where(raw, bits, widths), planes)].astype("<u2").tobytes()
    lengths, streams = b"", b""
    for strip in strips_of(geometry):
        stream = unary([z >> parameters[g] for g in strip if not raw[g] for z in codes[g].tolist()])
        lengths += struct.pack("<H", len(stream) // 2)
        streams += stream
    return lengths, words + streams


def rice_window(best: Ints, widest: int) -> tuple[int, int]:
    """(p, k0) for the best parameters of the groups that are not raw."""
    histogram = np.bincount(best, minlength=widest + 1).tolist()
    found: tuple[int, int, int] | None = None
    for p in range(4):
        for k0 in range(widest - 2**p + 2):
            cost = p * int(best.size)
            for k, count in enumerate(histogram):
                above, below = k0 - k, k - k0 - 2**p + 1
                if above > 0:
                    cost += count * max(5, 16 * above - 15)
                elif below > 0:
                    cost += count * (20 * 2**below - 16 * below - 18)
            if found is None or cost < found[0]:
                found = (cost, p, k0)
    assert found is not None
    return found[1], found[2]


def too_long(codes: Ints, parameters: Ints, extra: int, bits: int) -> Mask:
    """Groups that would take more than their bit patterns."""
    unary_bits = (codes >> parameters[:, None]).sum(axis=1)
    long: Mask = 16 * (extra + parameters + 1) + unary_bits > 16 * bits
    return long


def rice_candidate(bits: Bits, geometry: Geometry, bounds: Bounds) -> tuple[bytes, int]:
    """Rule 5: the segment in coding `rice`, and its param."""
    dtype, constants = geometry.dtype, TYPES[geometry.dtype]
    bound = grouped_bounds(bounds, geometry)
    groups = to_groups(bits, geometry.group_tokens)
    place = inside(geometry)
    x = to_float32(groups, dtype)
    raw: Mask = np.any(~is_finite(groups, dtype) & place, axis=1)
    raw |= np.isnan(bound).any(axis=1)
    x = np.where(raw[:, None], np.float32(0), x)
    with np.errstate(over="ignore"):
        raw |= (np.abs(x) + bound > np.float32(constants.largest_finite)).any(axis=1)
    coarse = quantise(x, step_of_each(bound, dtype, PLAIN, 0))
    raw |= (np.abs(coarse) > constants.largest_q).any(axis=1)
    x = np.where(raw[:, None], np.float32(0), x)
    width = width_of(zigzag(np.where(raw[:, None], np.float32(0), coarse).astype(np.int64)))
    while True:
        q = quantise(x, step_of_each(bound, dtype, FIXED, width)).astype(np.int64)
        again = width_of(zigzag(q))
        assert (again <= width).all(), "the widths must not grow"
        if (again == width).all():
            break
        width = again
    plain = zigzag(q)
    differences = np.where(place, zigzag(deltas(q, geometry.group_tokens)), 0)
    use = (differences.sum(axis=1) < plain.sum(axis=1)) & ~raw
    codes = np.where(use[:, None], differences, plain)
    best = np.array([min(rice_parameter(int(s)), constants.widest) for s in codes.sum(axis=1)], np.int64)
    p, k0 = rice_window(best[~raw], constants.widest)
    parameters = np.clip(best, k0, k0 + 2**p - 1)
    raw |= too_long(codes, parameters, 0, constants.bits)
    use &= ~raw
    numbers = np.where(raw, 0, parameters - k0)
    planes = planes_of(raw.astype(np.int64), int(raw.any())) + planes_of(use.astype(np.int64), 1)
    planes += planes_of(numbers, p)
    lengths, rest = assemble_rice(groups, geometry, codes, parameters, raw, codes, parameters)
    return bounds.prefix + planes + lengths + rest, k0 | p << 5 | int(raw.any()) << 7


def exponent_codes(base: Ints, e: Ints) -> Ints:
    """z of exponents around their bases."""
    below = base - e
    return np.where(below >= 0, 4 * (below // 3) + below % 3, -4 * below - 1)


def lossless_rice_candidate(bits: Bits, geometry: Geometry) -> tuple[bytes, int]:
    """Rule 5: the segment in coding `lossless_rice`, and its param m."""
    dtype, constants = geometry.dtype, TYPES[geometry.dtype]
    groups = to_groups(bits, geometry.group_tokens)
    place = inside(geometry)
    e = np.where(place, exponent_field(groups, dtype), exponent_field(groups[:, :1], dtype))
    own = np.minimum((e.sum(axis=1) + 20) // 16, (1 << constants.exponent) - 1)
    highest = int(own.max())
    below = np.minimum(highest - own, 31)
    found: tuple[int, int, int] | None = None
    for p in range(5):
        for y in range(min(7, highest) + 1):
            cost = p * own.size
            cost += 32 * int(np.maximum(y - below, 0).sum()) + 11 * int(np.maximum(below - y - 2**p + 1, 0).sum())
            if found is None or cost < found[0]:
                found = (cost, p, y)
    assert found is not None
    p, m = found[1], highest - found[2]
    numbers = np.minimum(np.maximum(m - own, 0), 2**p - 1)
    base = np.maximum(m - numbers, 0)
    codes = np.where(place, exponent_codes(base[:, None], e), 0)
    k = min(rice_parameter(int(codes.sum()) // own.size), 5)
    parameters = np.full(own.size, k)
    s = constants.sign_and_mantissa
    raw = too_long(codes, parameters, s, constants.bits)
    numbers = np.where(raw, 0, numbers)
    pattern = groups.astype(np.int64)
    low = ((codes & ((1 << k) - 1)) << s) + ((pattern >> (constants.bits - 1)) << (s - 1))
    low = np.where(place, low + (pattern & ((1 << (s - 1)) - 1)), 0)
    lengths, rest = assemble_rice(groups, geometry, codes, parameters, raw, low, parameters + s)
    planes = planes_of(raw.astype(np.int64), int(raw.any())) + planes_of(numbers, p)
    return bytes([k, p, int(raw.any()), 0]) + planes + lengths + rest, m


def read_planes(data: bytes, count: int, groups: int) -> Ints:
    """The numbers in `count` planes."""
    size = -(-groups // 32) * 4
    refuse_if(len(data) < size * count, "the segment ends within its planes")
    numbers = np.zeros(groups, np.int64)
    for bit in range(count):
        flags = np.unpackbits(np.frombuffer(data[bit * size : (bit + 1) * size], np.uint8), bitorder="little")
        refuse_if(bool(flags[groups:].any()), "padding of a plane is not zero")
        numbers |= flags[:groups].astype(np.int64) << bit
    return numbers


@dataclass(frozen=True)
class RiceParts:
    """What a Rice segment holds: codes z [groups, 16] (0 in raw groups), words, and what each group says."""

    codes: Ints
    words: Ints
    raw: Mask
    delta: Mask
    numbers: Ints


def read_rice(data: bytes, geometry: Geometry, coding: int, param: int) -> RiceParts:
    """Take a segment of coding `rice` or `lossless_rice` apart (without its scales)."""
    constants, groups = TYPES[geometry.dtype], geometry.groups
    extra, at = 0, 0
    if coding == RICE:
        k0, p, has_raw = param & 31, param >> 5 & 3, param >> 7
        refuse_if(k0 + 2**p - 1 > constants.widest, "a Rice parameter beyond the largest")
    else:
        refuse_if(len(data) < 4, "the segment ends within its head")
        k0, p, has_raw, zero = data[:4]
        extra, at = constants.sign_and_mantissa, 4
        refuse_if(k0 > 5 or p > 4 or has_raw > 1 or zero != 0, "the head")
    size = -(-groups // 32) * 4
    raw = read_planes(data[at:], has_raw, groups) != 0
    at += size * has_raw
    delta = np.zeros(groups, np.bool_)
    if coding == RICE:
        delta = read_planes(data[at:], 1, groups) != 0
        at += size
    numbers = read_planes(data[at:], p, groups)
    at += size * p
    parameters = np.full(groups, k0) + (numbers if coding == RICE else 0)
    strips = strips_of(geometry)
    refuse_if(len(data) < at + 2 * len(strips), "the segment ends within its lengths")
    lengths = np.frombuffer(data[at : at + 2 * len(strips)], "<u2").astype(np.int64)
    refuse_if(bool((lengths > 64 * constants.bits).any()), "a strip is too long")
    at += 2 * len(strips)
    count = np.where(raw, constants.bits, extra + parameters)
    word_bytes = 2 * int(count.sum())
    refuse_if(len(data) != at + word_bytes + 2 * int(lengths.sum()), "segment size is not what its planes imply")
    keep = np.arange(constants.bits) < count[:, None]
    words = np.zeros(keep.shape, np.uint16)
    words[keep] = np.frombuffer(data[at : at + word_bytes], "<u2")
    low = from_bit_planes(words)
    at += word_bytes
    codes = np.zeros((groups, 16), np.int64)
    for strip, length in zip(strips, lengths.tolist(), strict=True):
        stream = np.unpackbits(np.frombuffer(data[at : at + 2 * length], np.uint8), bitorder="little")
        at += 2 * length
        ones = np.flatnonzero(stream)
        coded = [g for g in strip if not raw[g]]
        refuse_if(ones.size != 16 * len(coded), "ones of a stream")
        refuse_if(length > 0 and not stream[-16:].any(), "the last word of a stream")
        quotients = np.diff(ones, prepend=-1) - 1
        for g, own in zip(coded, quotients.reshape(-1, 16), strict=True):
            codes[g] = (own << parameters[g]) | (low[g] >> extra)
    return RiceParts(codes, low, raw, delta, numbers)


def lossless_candidate(bits: Bits, geometry: Geometry) -> tuple[bytes, int]:
    """Rule 4: the segment in coding `lossless`, and its param m."""
    dtype, constants = geometry.dtype, TYPES[geometry.dtype]
    groups = to_groups(bits, geometry.group_tokens)
    place = inside(geometry)
    finite = is_finite(groups, dtype)
    e = exponent_field(groups, dtype)
    m = int(e[finite & place].max(initial=0))
    raw: Mask = np.any(~finite & place, axis=1)
    largest = np.where(place & ~raw[:, None], e, 0).max(axis=1)
    base = np.minimum(m - largest, 15)
    base[raw] = 0
    top = np.maximum(m - base, 0)
    difference = np.where(place & ~raw[:, None], top[:, None] - e, 0)
    width = width_of(difference)
    s = constants.sign_and_mantissa
    pattern = groups.astype(np.int64)
    sign = pattern >> (constants.bits - 1)
    mantissa = pattern & ((1 << (s - 1)) - 1)
    codes = np.where(place, (difference << s) + (sign << (s - 1)) + mantissa, 0)
    planes = bit_planes(np.where(raw[:, None], pattern, codes), constants.bits)
    count = np.where(raw, constants.bits, s + width)
    words = planes[columns_below(count, planes)]
    return nibbles(np.where(raw, 15, width)) + nibbles(base) + words.astype("<u2").tobytes(), m


def encode_segment(
    bits: Bits,
    geometry: Geometry,
    coding: int,
    bound_kind: int,
    bound: float,
    table: npt.NDArray[Any] | None = None,
) -> Segment:
    """Encode a page, [T, C] bit patterns, as the codec `cuszp` does.

    Args:
        bits: the page's bit patterns.
        geometry: its geometry.
        coding: `FIXED`, `PLAIN`, `OUTLIER` or `RICE`: the quantised coding that is wanted; for a lossless bound `RICE`
            means `LOSSLESS_RICE`, any other `LOSSLESS`.
        bound_kind: `BOUND_LOSSLESS`, `BOUND_ABSOLUTE`, `BOUND_RELATIVE`, `BOUND_TOKEN_RMS` or `BOUND_CHANNEL_TABLE`.
        bound: the bound, a float64.
        table: the channel table, float32, H x D values.
    """
    constants = TYPES[geometry.dtype]
    raw = np.ascontiguousarray(bits).astype(constants.unsigned).tobytes()
    first = bits.flat[0]
    if (bits == first).all():
        return Segment(padded(raw[: constants.bits // 8], 4), CONSTANT)
    if geometry.dtype == OPAQUE:
        return Segment(raw, RAW, reason=OPAQUE_DTYPE)

    quantised: bytes | None = None
    param = 0
    applied: Bounds | None = None
    if bound_kind != BOUND_LOSSLESS and is_finite(bits, geometry.dtype).any():
        if bound_kind == BOUND_TOKEN_RMS:
            applied = bounds_by_token(bits, geometry, bound)
        elif bound_kind == BOUND_CHANNEL_TABLE:
            applied = bounds_by_channel(table, geometry)
        else:
            applied = bounds_by_page(bits, geometry, bound_kind, bound)
        if applied is not None and coding == RICE:
            quantised, param = rice_candidate(bits, geometry, applied)
        elif applied is not None:
            quantised = quantised_candidate(bits, geometry, coding, applied)
    best: Segment | None = None
    if quantised is not None and applied is not None:
        best = Segment(quantised, coding | applied.steps, bound=applied.largest, param=param)
    if quantised is None or len(quantised) * 8 > len(raw) * 5:
        exact_coding = LOSSLESS_RICE if coding == RICE else LOSSLESS
        exact, m = (lossless_rice_candidate if coding == RICE else lossless_candidate)(bits, geometry)
        if best is None:
            reason = AS_ASKED if bound_kind == BOUND_LOSSLESS else TOO_FINE
            best = Segment(exact, exact_coding, param=m, reason=reason)
        elif len(exact) < len(best.data):
            best = Segment(exact, exact_coding, param=m, reason=LOSSLESS_SMALLER)
    assert best is not None
    if len(best.data) >= len(raw):
        return Segment(raw, RAW, reason=INCOMPRESSIBLE)
    return best


# ---- the decoder -----------------------------------------------------------------------------------------------------


def refuse_if(condition: bool, message: str) -> None:
    if condition:
        raise Refused(message)


def round_product(q: Ints, size: Floats, dtype: int) -> Bits:
    """q * S in the dtype; what is not representable is rounded as the page says (only forged records reach that)."""
    with np.errstate(over="ignore"):
        product: Floats = q.astype(np.float32) * size
    single: Bits = product.view(np.uint32)
    if dtype == BF16:
        return (single >> np.uint32(16)).astype(np.uint16)
    if dtype == FP32:
        return single
    with np.errstate(over="ignore", under="ignore"):
        nearest = product.astype(np.float16)
    half: Bits = nearest.view(np.uint16)
    too_large = (np.abs(nearest.astype(np.float64)) > np.abs(product.astype(np.float64))) | np.isinf(nearest)
    toward_zero: Bits = np.where(too_large, half - np.uint16(1), half)
    return toward_zero


def read_nibbles(data: bytes, count: int) -> tuple[Ints, int]:
    """Classes or bases, and the bytes that they take."""
    size = -(-((count + 1) // 2) // 4) * 4
    refuse_if(len(data) < size, "the segment ends within its classes")
    packed = np.frombuffer(data[:size], np.uint8).astype(np.int64)
    both = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    refuse_if(bool(both[count:].any()), "padding of the classes is not zero")
    return both[:count], size


def read_bytes(data: bytes, count: int) -> tuple[Ints, int]:
    size = -(-count // 4) * 4
    refuse_if(len(data) < size, "the segment ends within its classes")
    classes = np.frombuffer(data[:size], np.uint8).astype(np.int64)
    refuse_if(bool(classes[count:].any()), "padding of the classes is not zero")
    return classes[:count], size


def decode_segment(
    data: bytes,
    geometry: Geometry,
    coding: int,
    bound: float = 0.0,
    param: int = 0,
    table: npt.NDArray[Any] | None = None,
) -> Bits:
    """The page of a segment, [T, C] bit patterns.

    Raises:
        Refused: the bytes contradict the format.
    """
    constants = TYPES[geometry.dtype]
    shape = (geometry.tokens, geometry.channels)
    if coding == RAW:
        refuse_if(len(data) != geometry.raw_bytes, "raw segment of the wrong size")
        page: Bits = np.frombuffer(data, constants.unsigned).reshape(shape).copy()
        return page
    if coding == CONSTANT:
        refuse_if(len(data) != 4, "constant segment of the wrong size")
        value_bytes = constants.bits // 8
        refuse_if(any(data[value_bytes:]), "padding of the constant is not zero")
        return np.full(shape, np.frombuffer(data[:value_bytes], constants.unsigned)[0], constants.unsigned)
    refuse_if(coding >= 0x40, f"unknown coding {coding}")
    coding, steps = coding & 0x0F, coding & 0x30
    refuse_if(coding > LOSSLESS_RICE or coding < FIXED, f"unknown coding {coding}")
    exact = coding in (LOSSLESS, LOSSLESS_RICE)
    refuse_if(steps == 0x30 or (steps != BY_PAGE and exact), f"steps {steps} of coding {coding}")
    refuse_if(geometry.dtype == OPAQUE, "opaque bytes in a numeric coding")

    bounds: Bounds | None = None
    if not exact:
        refuse_if(not MIN_BOUND <= bound <= MAX_BOUND, f"bound {bound}")
        if steps == BY_TOKEN:
            bounds = bounds_of_scales(data, geometry, np.float32(bound))
        elif steps == BY_CHANNEL:
            bounds = bounds_by_channel(table, geometry)
            refuse_if(bounds is None, "a channel table of zeros")
        else:
            bounds = Bounds(BY_PAGE, bound, b"", np.full(shape, bound, np.float32))
        assert bounds is not None
        data = data[len(bounds.prefix) :]

    if coding in (RICE, LOSSLESS_RICE):
        return rice_page(read_rice(data, geometry, coding, param), geometry, coding, param, bounds)
    groups = geometry.groups
    base = np.zeros(groups, np.int64)
    apart = np.zeros(groups, np.bool_)
    if coding == LOSSLESS:
        classes, used = read_nibbles(data, groups)
        base, more = read_nibbles(data[used:], groups)
        used += more
        raw, widest = classes == 15, constants.exponent
    elif coding == OUTLIER or geometry.dtype == FP32:
        classes, used = read_bytes(data, groups)
        refuse_if(bool((classes & 0x80).any()), "bit 7 of a class")
        apart = (classes & 0x40) != 0
        classes = classes & 0x3F
        raw, widest = classes == 63, constants.widest
        refuse_if(bool((apart & raw).any()), "a raw group that keeps its first value apart")
        refuse_if(coding != OUTLIER and bool(apart.any()), "a first value kept apart outside of `outlier`")
    else:
        classes, used = read_nibbles(data, groups)
        raw, widest = classes == 15, constants.widest
    refuse_if(bool((classes[~raw] > widest).any()), "a width beyond the widest")

    s = constants.sign_and_mantissa
    width = np.where(raw, 0, classes)
    count = np.where(raw, constants.bits, classes + (s if coding == LOSSLESS else 0))
    first_count = apart.astype(np.int64) * (constants.bits // 16)
    refuse_if(
        len(data) != used + 2 * int(count.sum() + first_count.sum()), "segment size is not what its classes imply"
    )
    keep = np.concatenate([np.arange(2) < first_count[:, None], np.arange(constants.bits) < count[:, None]], axis=1)
    words = np.zeros(keep.shape, np.uint16)
    words[keep] = np.frombuffer(data[used:], "<u2")
    codes = from_bit_planes(words[:, 2:])

    if coding == LOSSLESS:
        top = np.maximum(param - base, 0)[:, None]
        e = (top - (codes >> s)) & ((1 << constants.exponent) - 1)
        sign = (codes >> (s - 1)) & 1
        mantissa = codes & ((1 << (s - 1)) - 1)
        coded: Ints = (sign << (constants.bits - 1)) | (e << (s - 1)) | mantissa
    else:
        assert bounds is not None
        size = step_of_each(grouped_bounds(bounds, geometry), geometry.dtype, coding, width)
        q = from_zigzag(codes)
        if coding != FIXED:
            first = words[:, 0].astype(np.int64) | (words[:, 1].astype(np.int64) << 16)
            if constants.bits == 16:
                first = (first ^ 0x8000) - 0x8000
            q[:, 0] = np.where(apart, first, q[:, 0])
            run = 16 if geometry.group_tokens == 1 else geometry.group_tokens
            q = np.cumsum(q.reshape(-1, run), axis=1).reshape(q.shape)
        coded = round_product(wrap32(q), size, geometry.dtype).astype(np.int64)
    values = np.where(raw[:, None], codes, coded).astype(constants.unsigned)
    page = from_groups(values, geometry.tokens, geometry.channels, geometry.group_tokens)
    return page


def rice_page(parts: RiceParts, geometry: Geometry, coding: int, param: int, bounds: Bounds | None) -> Bits:
    """The page of a Rice segment, [T, C] bit patterns."""
    constants = TYPES[geometry.dtype]
    s = constants.sign_and_mantissa
    if coding == RICE:
        assert bounds is not None
        q = wrap32(from_zigzag(parts.codes & 0xFFFFFFFF))
        run = 16 if geometry.group_tokens == 1 else geometry.group_tokens
        chained = wrap32(np.cumsum(q.reshape(-1, run), axis=1).reshape(q.shape))
        q = np.where(parts.delta[:, None], chained, q)
        width = width_of(zigzag(q))
        size = step_of_each(grouped_bounds(bounds, geometry), geometry.dtype, FIXED, width)
        coded = round_product(q, size, geometry.dtype).astype(np.int64)
    else:
        base = np.maximum(param - parts.numbers, 0)[:, None]
        block, rest = parts.codes >> 2, parts.codes & 3
        e = np.where(rest == 3, base + block + 1, base - 3 * block - rest) & ((1 << constants.exponent) - 1)
        sign, mantissa = (parts.words >> (s - 1)) & 1, parts.words & ((1 << (s - 1)) - 1)
        coded = (sign << (constants.bits - 1)) | (e << (s - 1)) | mantissa
    values = np.where(parts.raw[:, None], parts.words, coded).astype(constants.unsigned)
    return from_groups(values, geometry.tokens, geometry.channels, geometry.group_tokens)


# ---- records ---------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<4sHHIIQQIIHBBB3sdd16s8sQ")
RUN = struct.Struct("<IIIIBB6s")
ENTRY = struct.Struct("<IIfBBBB")


@dataclass(frozen=True)
class Page:
    """A page on its way into a record: [T, C] bit patterns and what the table says of it."""

    bits: Bits
    geometry: Geometry
    kind: int = 0


@dataclass(frozen=True)
class Asked:
    """The bound that a page is encoded with."""

    kind: int
    bound: float = 0.0
    table: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class Entry:
    """One entry of the segment table."""

    offset: int
    size: int
    bound: float
    coding: int
    kind: int
    param: int
    reason: int


@dataclass(frozen=True)
class Record:
    """A decoded record."""

    mode: int
    bound_kind: int
    bound: float
    max_error: float
    reason: int
    codec: str
    dims: str
    raw_bytes: int
    header_bytes: int
    geometries: tuple[Geometry, ...]  # one a segment
    entries: tuple[Entry, ...]
    pages: tuple[Bits, ...] = field(repr=False)


def encode_record(
    pages: Sequence[Page],
    *,
    mode: int = MODE_FIXED,
    bound_kind: int = BOUND_RELATIVE,
    bound: float = 1e-3,
    codec: str = "cuszp",
    reason: int = 0,
    max_error: float = math.nan,
    dims: str = "",
    asked: Sequence[Asked] | None = None,
) -> bytes:
    """The record of a block's pages; `asked` gives each page a bound of its own (`bound_kind` 5)."""
    each = asked if asked is not None else [Asked(bound_kind, bound)] * len(pages)
    if codec == "raw":
        segments = [Segment(p.bits.astype(TYPES[p.geometry.dtype].unsigned).tobytes(), RAW) for p in pages]
    else:
        coding = {MODE_NONE: FIXED, MODE_FIXED: FIXED, MODE_PLAIN: PLAIN, MODE_OUTLIER: OUTLIER, MODE_RICE: RICE}[mode]
        segments = [
            encode_segment(p.bits, p.geometry, coding, a.kind, a.bound, a.table)
            for p, a in zip(pages, each, strict=True)
        ]
    return assemble(
        pages,
        segments,
        mode=mode,
        bound_kind=bound_kind,
        bound=bound,
        codec=codec,
        reason=reason,
        max_error=max_error,
        dims=dims,
        table_id=table_id(each),
    )


def table_id(asked: Sequence[Asked]) -> int:
    """The name of the channel tables among the bounds of a record's pages."""
    parts = [struct.pack("<I", i) + a.table.astype("<f4").tobytes() for i, a in enumerate(asked) if a.table is not None]
    if not parts:
        return 0
    name: int = struct.unpack("<Q", hashlib.sha256(b"".join(parts)).digest()[:8])[0]
    return name or 1


def assemble(
    pages: Sequence[Page],
    segments: Sequence[Segment],
    *,
    mode: int,
    bound_kind: int,
    bound: float,
    codec: str,
    reason: int,
    max_error: float,
    dims: str,
    table_id: int = 0,
) -> bytes:
    """Header and payload around segments."""
    runs: list[tuple[Geometry, int]] = []
    for page in pages:
        if runs and runs[-1][0] == page.geometry:
            runs[-1] = (page.geometry, runs[-1][1] + 1)
        else:
            runs.append((page.geometry, 1))
    payload = b""
    table = b""
    for page, segment in zip(pages, segments, strict=True):
        table += ENTRY.pack(
            len(payload) // 16,
            len(segment.data),
            segment.bound,
            segment.coding,
            page.kind,
            segment.param,
            segment.reason,
        )
        payload += padded(segment.data, 16)
    geometry = b"".join(
        RUN.pack(count, g.tokens, g.heads, g.head_dim, g.dtype, g.group_tokens, bytes(6)) for g, count in runs
    )
    header_bytes = -(-(HEADER.size + len(geometry) + len(table)) // 16) * 16
    raw_bytes = sum(p.geometry.raw_bytes for p in pages)

    def fixed_part(header_crc: int) -> bytes:
        return HEADER.pack(
            b"KVZP", 1, 0, header_bytes, header_crc, len(payload), raw_bytes, crc32c(payload), len(pages), len(runs),
            mode, bound_kind, reason, bytes(3), bound, max_error, codec.encode(), dims.encode(), table_id,
        )  # fmt: skip

    rest = padded(geometry + table, 16)
    header_crc = crc32c(fixed_part(0) + rest)
    return fixed_part(header_crc) + rest + payload


def text(field: bytes) -> str:
    """Printable ASCII, padded with NUL."""
    name = field.rstrip(b"\0")
    refuse_if(any(not 32 <= c < 127 for c in name), "a name that is not printable ASCII")
    return name.decode("ascii")


def decode_record(data: bytes, asked: Sequence[Asked] = ()) -> Record:
    """Read a record; `asked` has the channel tables that it names.

    Raises:
        Refused: the bytes contradict the format.
    """
    refuse_if(len(data) < HEADER.size, "shorter than the fixed part of a header")
    (
        magic, version, flags, header_bytes, header_crc, payload_bytes, raw_bytes, payload_crc, segments, geometries,
        mode, bound_kind, reason, reserved_a, bound, max_error, codec, dims, named,
    ) = HEADER.unpack_from(data)  # fmt: skip
    refuse_if(magic != b"KVZP", "magic")
    refuse_if(version != 1, "format version")
    refuse_if(flags != 0, "flags")
    refuse_if(not 1 <= segments <= 65536, "segments")
    refuse_if(not 1 <= geometries <= segments, "geometries")
    refuse_if(
        header_bytes != -(-(HEADER.size + RUN.size * geometries + ENTRY.size * segments) // 16) * 16, "header_bytes"
    )
    refuse_if(len(data) != header_bytes + payload_bytes, "length of the record")
    header = bytearray(data[:header_bytes])
    header[12:16] = bytes(4)
    refuse_if(crc32c(bytes(header)) != header_crc, "header_crc32c")
    payload = data[header_bytes:]
    refuse_if(crc32c(payload) != payload_crc, "payload_crc32c")
    refuse_if(any(reserved_a), "reserved bytes")
    refuse_if(named != 0 and bound_kind not in (BOUND_CHANNEL_TABLE, BOUND_BY_PAGE), "table_id")
    refuse_if(named != 0 and named != table_id(asked), "other channel tables than the record's")
    refuse_if(mode > 4 or bound_kind > 5 or reason > 8, "mode, bound_kind or reason")
    without = (BOUND_LOSSLESS, BOUND_CHANNEL_TABLE, BOUND_BY_PAGE)
    usable = bound == 0 if bound_kind in without else math.isfinite(bound) and bound > 0
    refuse_if(not usable, "bound")
    refuse_if(not (math.isnan(max_error) or 0 <= max_error < math.inf), "max_error")

    at = HEADER.size
    geometry: list[Geometry] = []
    for _ in range(geometries):
        count, tokens, heads, head_dim, dtype, group_tokens, reserved = RUN.unpack_from(data, at)
        at += RUN.size
        refuse_if(any(reserved), "reserved bytes of a geometry run")
        refuse_if(not 1 <= count <= segments - len(geometry), "counts of the geometry runs")
        refuse_if(min(tokens, heads, head_dim) < 1 or tokens * heads * head_dim >= 2**31, "geometry")
        refuse_if(dtype > OPAQUE or group_tokens not in (16, 8, 4, 2, 1), "dtype or group_tokens")
        geometry += [Geometry(tokens, heads, head_dim, dtype, group_tokens)] * count
    refuse_if(len(geometry) != segments, "counts of the geometry runs")
    refuse_if(sum(g.raw_bytes for g in geometry) != raw_bytes, "raw_bytes")
    entries = [Entry(*ENTRY.unpack_from(data, at + ENTRY.size * i)) for i in range(segments)]
    at += ENTRY.size * segments
    refuse_if(any(data[at:header_bytes]), "padding of the header")

    end = 0
    pages = []
    for entry, g in zip(entries, geometry, strict=True):
        refuse_if(entry.offset * 16 != end or entry.size < 1, "segments out of order")
        stop = end + entry.size
        refuse_if(stop > payload_bytes, "segment beyond the payload")
        end = -(-stop // 16) * 16
        refuse_if(any(payload[stop:end]), "padding of a segment")
        refuse_if(entry.kind > 2 or entry.reason > 8, "kind or reason of a segment")
        by_channel = text(codec) == "cuszp" and entry.coding & 0x30 == BY_CHANNEL
        refuse_if(by_channel and named == 0, "steps by channel without a table")
        segment, table = payload[entry.offset * 16 : stop], asked[len(pages)].table if named else None
        pages.append(decode_segment(segment, g, entry.coding, entry.bound, entry.param, table))
    refuse_if(end != payload_bytes, "payload_bytes")
    return Record(
        mode=mode,
        bound_kind=bound_kind,
        bound=bound,
        max_error=max_error,
        reason=reason,
        codec=text(codec),
        dims=text(dims),
        raw_bytes=raw_bytes,
        header_bytes=header_bytes,
        geometries=tuple(geometry),
        entries=tuple(entries),
        pages=tuple(pages),
    )
