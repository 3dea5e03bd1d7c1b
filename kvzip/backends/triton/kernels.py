# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
# mypy: ignore-errors
# (Triton compiles these functions from their source: their arguments have no Python types.)
"""Triton kernels of the record format for 16-bit dtypes: codings ``fixed``, ``lossless``, ``raw`` and ``constant``.

Importing this module imports Triton. `kvzip.backends.triton.codec` launches the kernels; docs/reference/format.md is
normative.

A page is cut into *tiles* of TILE groups, one program each. Encoding takes five launches: `scan_tiles` (extremes),
`bound_pages`, `classify_tiles` (widths, for `fixed` and `lossless` at once), `plan_pages` (choice of the coding, place
of every tile), `write_tiles`. Decoding takes four: `check_pages`, `measure_tiles`, `place_pages`, `read_tiles`.

Arithmetic. The bytes must be those of every other device, so every kernel has to be launched with
``enable_fp_fusion=False``: the format forbids a fused multiply-add where x / S is rounded. Reciprocals use `div_rn`,
the only IEEE division that Triton has. Extremes are compared as integers. No float32 here is subnormal where that
matters: steps lie between 2^-95 and 2^121, and what is below 2^-31 of a step rounds to 0.
"""

import triton
import triton.language as tl

# Columns of a segment's row in `desc`, int64. Addresses in bytes, strides in elements of 2 bytes.
BASE = tl.constexpr(0)
BLOCK_STRIDE = tl.constexpr(1)
TOKEN_STRIDE = tl.constexpr(2)
HEAD_STRIDE = tl.constexpr(3)
TOKENS = tl.constexpr(4)
CHANNELS = tl.constexpr(5)
HEAD_DIM = tl.constexpr(6)
COLUMNS = tl.constexpr(7)  # groups beside each other, ceil(C / A)
GROUPS = tl.constexpr(8)
FIRST_TILE = tl.constexpr(9)  # of this segment, among the tiles of a block
NUM_TILES = tl.constexpr(10)
FIRST_GROUP = tl.constexpr(11)  # of this segment, among the groups of a block
IS_FP16 = tl.constexpr(12)
KIND = tl.constexpr(13)
DESC_COLUMNS = tl.constexpr(16)

# Columns of a page's row in `meta`, int32.
META_BOUND = tl.constexpr(0)  # bits of B; 0 = no quantised candidate
META_EXPONENT = tl.constexpr(1)  # m, the largest exponent field
META_DIFFERS = tl.constexpr(2)  # 0 if all bit patterns of the page are equal
META_COLUMNS = tl.constexpr(4)

RAW = tl.constexpr(0)
CONSTANT = tl.constexpr(1)
FIXED = tl.constexpr(2)
LOSSLESS = tl.constexpr(5)
RAW_GROUP = tl.constexpr(15)
BOUND_TOO_FINE = tl.constexpr(1)
LOSSLESS_SMALLER = tl.constexpr(2)
INCOMPRESSIBLE = tl.constexpr(3)
BOUND_LOSSLESS = tl.constexpr(0)
BOUND_RELATIVE = tl.constexpr(2)

LEAST_BOUND = tl.constexpr(2.0**-96)
LARGEST_BOUND = tl.constexpr(2.0**120)
LEAST_BOUND_BITS = tl.constexpr(31 << 23)
LARGEST_BOUND_BITS = tl.constexpr(247 << 23)
MAGIC = tl.constexpr(12582912.0)  # 1.5 x 2^23: adding it rounds to an integer, ties to even
MAGIC_BITS = tl.constexpr(0x4B400000)
NO_VALUE = tl.constexpr(1 << 20)  # beyond every key

STATUS_OK = tl.constexpr(0)
STATUS_CORRUPT = tl.constexpr(1)
STATUS_UNSUPPORTED = tl.constexpr(2)


# ---- values ----------------------------------------------------------------------------------------------------------


@triton.jit
def _key(v):
    """Bit pattern -> an integer that sorts as the values do."""
    signed = (v ^ 0x8000) - 0x8000
    return signed ^ ((signed >> 31) & 0x7FFF)


@triton.jit
def _pattern(key):
    """The reverse of `_key`."""
    return (key ^ ((key >> 31) & 0x7FFF)) & 0xFFFF


@triton.jit
def _to_float(v, FP16: tl.constexpr):
    if FP16:
        return v.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (v << 16).to(tl.float32, bitcast=True)


@triton.jit
def _from_float(x, FP16: tl.constexpr):
    """Float32 -> bit pattern, toward zero; exact but for forged records."""
    u = x.to(tl.int32, bitcast=True)
    if FP16:
        magnitude = tl.minimum(u & 0x7FFFFFFF, 0x477FE000)
        normal = magnitude >= 0x38800000
        small = tl.where(normal, 0, magnitude).to(tl.float32, bitcast=True)
        subnormal = (small * 16777216.0).to(tl.int32)  # multiples of 2^-24
        return tl.where(normal, (magnitude >> 13) - (112 << 10), subnormal) | ((u >> 16) & 0x8000)
    else:
        return (u >> 16) & 0xFFFF


@triton.jit
def _bit_length(z):
    """Of 0 <= z < 2^24: the exponent of z as a float32 has it."""
    bits = z.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.maximum((bits >> 23) - 126, 0)


@triton.jit
def _zigzag_code(x, inverse):
    q = (x * inverse + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    return (q << 1) ^ (q >> 31)


@triton.jit
def _step(bound_bits, width, FP16: tl.constexpr):
    """S of `fixed`: 2 trunc_n(B)."""
    n = tl.minimum(12 - width, (bound_bits >> 23) - 127 + 26) if FP16 else 9 - width
    n = tl.minimum(tl.maximum(n, 1), 8)
    return (bound_bits & -(1 << (24 - n))).to(tl.float32, bitcast=True) * 2.0


@triton.jit
def _transpose(x0, x1, x2, x3, x4, x5, x6, x7):
    """Transpose a 16 x 16 bit matrix: row k is the low half of x_k, row k + 8 the high half. Its own inverse."""
    x0, x1, x2, x3 = _swap_halves(x0), _swap_halves(x1), _swap_halves(x2), _swap_halves(x3)
    x4, x5, x6, x7 = _swap_halves(x4), _swap_halves(x5), _swap_halves(x6), _swap_halves(x7)
    x0, x4 = _swap(x0, x4, 4, 0x0F0F0F0F)
    x1, x5 = _swap(x1, x5, 4, 0x0F0F0F0F)
    x2, x6 = _swap(x2, x6, 4, 0x0F0F0F0F)
    x3, x7 = _swap(x3, x7, 4, 0x0F0F0F0F)
    x0, x2 = _swap(x0, x2, 2, 0x33333333)
    x1, x3 = _swap(x1, x3, 2, 0x33333333)
    x4, x6 = _swap(x4, x6, 2, 0x33333333)
    x5, x7 = _swap(x5, x7, 2, 0x33333333)
    x0, x1 = _swap(x0, x1, 1, 0x55555555)
    x2, x3 = _swap(x2, x3, 1, 0x55555555)
    x4, x5 = _swap(x4, x5, 1, 0x55555555)
    x6, x7 = _swap(x6, x7, 1, 0x55555555)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _swap_halves(x):
    t = (x ^ (x >> 8)) & 0xFF00
    return x ^ t ^ (t << 8)


@triton.jit
def _swap(a, b, SHIFT: tl.constexpr, MASK: tl.constexpr):
    t = ((a >> SHIFT) ^ b) & MASK
    return a ^ (t << SHIFT), b ^ t


# ---- where things lie ------------------------------------------------------------------------------------------------


@triton.jit
def _tile_of(tile_map, tiles):
    """Block, segment and tile number of this program."""
    program = tl.program_id(0).to(tl.int64)
    slot = program % tiles
    return program // tiles, tl.load(tile_map + 2 * slot).to(tl.int64), tl.load(tile_map + 2 * slot + 1).to(tl.int64)


@triton.jit
def _page(row, block_ids, block):
    """Pointer to the first value of a page."""
    address = tl.load(row + BASE).to(tl.pointer_type(tl.uint16))
    return address + tl.load(block_ids + block) * tl.load(row + BLOCK_STRIDE)


@triton.jit
def _place(row, page, tile, G: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """Where the groups of a tile lie: what `_inside` and `_at` need. SPLIT: a group may lie in two heads."""
    g = tile * TILE + tl.arange(0, TILE)
    columns = tl.load(row + COLUMNS)
    r = g // columns
    t0 = r * G
    c0 = (g - r * columns) * (16 // G)
    tokens_left = tl.minimum(tl.load(row + TOKENS) - t0, 16).to(tl.int32)  # none for g beyond the page
    channels_left = tl.minimum(tl.load(row + CHANNELS) - c0, 16).to(tl.int32)
    head_dim = tl.load(row + HEAD_DIM)
    head_stride = tl.load(row + HEAD_STRIDE)
    token_stride = tl.load(row + TOKEN_STRIDE)
    start = page + t0 * token_stride
    if not SPLIT:
        head = c0 // head_dim
        start += head * head_stride + (c0 - head * head_dim)
    return start, c0, tokens_left, channels_left, token_stride, head_stride, head_dim


@triton.jit
def _inside(place, i: tl.constexpr, G: tl.constexpr):
    """Whether value i of each group is in the page."""
    tokens_left, channels_left = place[2], place[3]
    return (tokens_left > i % G) & (channels_left > i // G)


@triton.jit
def _at(place, i: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr):
    """Pointers to value i of each group."""
    start, c0, token_stride = place[0], place[1], place[4]
    if SPLIT:
        head_stride, head_dim = place[5], place[6]
        c = c0 + i // G
        head = c // head_dim
        return start + (i % G) * token_stride + head * head_stride + (c - head * head_dim)
    else:
        return start + ((i % G) * token_stride + i // G)


@triton.jit
def _pair(place, i: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr):
    """Value i in the low half, value i + 8 in the high half, uint32; 0 outside the page."""
    low = tl.load(_at(place, i, G, SPLIT), mask=_inside(place, i, G), other=0).to(tl.uint32)
    high = tl.load(_at(place, i + 8, G, SPLIT), mask=_inside(place, i + 8, G), other=0).to(tl.uint32)
    return low | (high << 16)


@triton.jit
def _class_bytes(row):
    """Bytes of a nibble array with an entry a group, padded to 4."""
    return (tl.load(row + GROUPS) + 7) // 8 * 4


# ---- encoding --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles", "all_tiles"])
def scan_tiles(
    desc, block_ids, tile_map, tiles, all_tiles, low_out, high_out, differs_out,
    G: tl.constexpr, SPLIT: tl.constexpr, FP16: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Extremes of the finite values of a tile, as keys, and whether its bit patterns differ from the page's first."""
    block, segment, tile = _tile_of(tile_map, tiles)
    row = desc + segment * DESC_COLUMNS
    page = _page(row, block_ids, block)
    place = _place(row, page, tile, G, SPLIT, TILE)
    infinity: tl.constexpr = 0x7C00 if FP16 else 0x7F80
    first = tl.load(page).to(tl.int32)
    low = tl.full((TILE,), NO_VALUE, tl.int32)
    high = tl.full((TILE,), -NO_VALUE, tl.int32)
    differs = tl.zeros((TILE,), tl.int32)
    for i in tl.static_range(16):
        inside = _inside(place, i, G)
        v = tl.load(_at(place, i, G, SPLIT), mask=inside, other=0).to(tl.int32)
        finite = inside & ((v & infinity) != infinity)
        key = _key(v)
        low = tl.where(finite, tl.minimum(low, key), low)
        high = tl.where(finite, tl.maximum(high, key), high)
        differs = tl.where(inside, differs | (v ^ first), differs)
    at = block * all_tiles + tl.load(row + FIRST_TILE) + tile
    tl.store(low_out + at, tl.min(low, axis=0))
    tl.store(high_out + at, tl.max(high, axis=0))
    tl.store(differs_out + at, tl.max(differs, axis=0))


@triton.jit(do_not_specialize=["segments", "all_tiles"])
def bound_pages(
    desc, bound_kinds, bounds, segments, all_tiles, low_in, high_in, differs_in, meta, LANES: tl.constexpr
):  # fmt: skip
    """One program a page: the applied bound, the largest exponent field, whether the page is constant."""
    program = tl.program_id(0).to(tl.int64)
    block = program // segments
    segment = program % segments
    row = desc + segment * DESC_COLUMNS
    at = block * all_tiles + tl.load(row + FIRST_TILE)
    num_tiles = tl.load(row + NUM_TILES)
    low_lanes = tl.full((LANES,), NO_VALUE, tl.int32)
    high_lanes = tl.full((LANES,), -NO_VALUE, tl.int32)
    differs_lanes = tl.zeros((LANES,), tl.int32)
    for start in range(0, num_tiles, LANES):
        lane = start + tl.arange(0, LANES)
        low_lanes = tl.minimum(low_lanes, tl.load(low_in + at + lane, mask=lane < num_tiles, other=NO_VALUE))
        high_lanes = tl.maximum(high_lanes, tl.load(high_in + at + lane, mask=lane < num_tiles, other=-NO_VALUE))
        differs_lanes = tl.maximum(differs_lanes, tl.load(differs_in + at + lane, mask=lane < num_tiles, other=0))
    any_finite = tl.min(low_lanes, axis=0) != NO_VALUE
    low = _pattern(tl.where(any_finite, tl.min(low_lanes, axis=0), 0))
    high = _pattern(tl.where(any_finite, tl.max(high_lanes, axis=0), 0))

    fp16 = tl.load(row + IS_FP16) != 0
    least = tl.where(fp16, _to_float(low, True), _to_float(low, False)).to(tl.float64)
    largest = tl.where(fp16, _to_float(high, True), _to_float(high, False)).to(tl.float64)
    kind = tl.load(bound_kinds + segment)
    wanted = tl.load(bounds + segment)
    wanted = tl.where(kind == BOUND_RELATIVE, wanted * (largest - least), wanted)
    usable = any_finite & (kind != BOUND_LOSSLESS) & (wanted >= LEAST_BOUND)
    wanted = tl.where(usable, tl.where(wanted > LARGEST_BOUND, LARGEST_BOUND, wanted), 1.0)
    nearest = wanted.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    bits = tl.where(nearest.to(tl.float64) > wanted, bits - 1, bits)

    magnitude = tl.maximum(low & 0x7FFF, high & 0x7FFF)
    meta_row = meta + program * META_COLUMNS
    tl.store(meta_row + META_BOUND, tl.where(usable, bits, 0))
    tl.store(meta_row + META_EXPONENT, magnitude >> tl.where(fp16, 10, 7))
    tl.store(meta_row + META_DIFFERS, tl.max(differs_lanes, axis=0))


@triton.jit(do_not_specialize=["tiles", "all_tiles", "all_groups", "segments"])
def classify_tiles(
    desc, block_ids, tile_map, tiles, all_tiles, all_groups, segments, meta, classes_out, fixed_words, lossless_words,
    G: tl.constexpr, SPLIT: tl.constexpr, FP16: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Classes of both candidates, and the words of the tile.

    Bits 0..3 of a class are that of `fixed`, 4..7 that of `lossless`, 8..11 its base.
    """
    block, segment, tile = _tile_of(tile_map, tiles)
    row = desc + segment * DESC_COLUMNS
    page = _page(row, block_ids, block)
    place = _place(row, page, tile, G, SPLIT, TILE)
    fraction: tl.constexpr = 10 if FP16 else 7
    all_ones: tl.constexpr = 31 if FP16 else 255
    low_key = tl.full((TILE,), NO_VALUE, tl.int32)
    high_key = tl.full((TILE,), -NO_VALUE, tl.int32)
    least = tl.full((TILE,), all_ones, tl.int32)
    largest = tl.zeros((TILE,), tl.int32)
    for i in tl.static_range(16):
        inside = _inside(place, i, G)
        v = tl.load(_at(place, i, G, SPLIT), mask=inside, other=0).to(tl.int32)
        e = (v >> fraction) & all_ones
        key = _key(v)
        low_key = tl.where(inside, tl.minimum(low_key, key), low_key)
        high_key = tl.where(inside, tl.maximum(high_key, key), high_key)
        least = tl.where(inside, tl.minimum(least, e), least)
        largest = tl.where(inside, tl.maximum(largest, e), largest)
    g = tile * TILE + tl.arange(0, TILE)
    valid = g < tl.load(row + GROUPS)
    has_special = (largest == all_ones) | (valid == 0)

    # fixed
    meta_row = meta + (block * segments + segment) * META_COLUMNS
    bits = tl.load(meta_row + META_BOUND)
    bits = tl.where(bits == 0, 127 << 23, bits)  # no candidate: any bound, what comes of it is not used
    bound = bits.to(tl.float32, bitcast=True)
    low = _to_float(_pattern(tl.where(has_special, 0, low_key)), FP16)
    high = _to_float(_pattern(tl.where(has_special, 0, high_key)), FP16)
    inverse = tl.div_rn(1.0, _step(bits, 14, FP16))  # of the power-of-two step
    largest_finite = _to_float(tl.full((TILE,), 0x7BFF if FP16 else 0x7F7F, tl.int32), FP16)
    magnitude = tl.maximum(-low, high)
    raw = has_special | (magnitude + bound > largest_finite) | (magnitude * inverse >= 8191.5)
    low = tl.where(raw, 0.0, low)
    high = tl.where(raw, 0.0, high)
    width = _bit_length(tl.maximum(_zigzag_code(low, inverse), _zigzag_code(high, inverse)))
    narrower = tl.maximum(width - 1, 0)
    finer = tl.div_rn(tl.full((TILE,), 1.0, tl.float32), _step(bits, narrower, FP16))
    code = tl.maximum(_zigzag_code(low, finer), _zigzag_code(high, finer))
    width = tl.where((code >> narrower) == 0, narrower, width)
    fixed_class = tl.where(raw, RAW_GROUP, width)

    # lossless
    m = tl.load(meta_row + META_EXPONENT)
    base = tl.where(has_special, 0, tl.minimum(m - largest, 15))
    exponent_width = _bit_length(tl.where(has_special, 0, tl.maximum(m - base, 0) - least))
    lossless_class = tl.where(has_special, RAW_GROUP, exponent_width)

    at = classes_out + block * all_groups + tl.load(row + FIRST_GROUP) + g
    tl.store(at, (fixed_class | (lossless_class << 4) | (base << 8)).to(tl.int16), mask=valid)
    at_tile = block * all_tiles + tl.load(row + FIRST_TILE) + tile
    fixed_count = tl.where(raw, 16, width)
    lossless_count = tl.where(has_special, 16, fraction + 1 + exponent_width)
    tl.store(fixed_words + at_tile, tl.sum(tl.where(valid, fixed_count, 0), axis=0))
    tl.store(lossless_words + at_tile, tl.sum(tl.where(valid, lossless_count, 0), axis=0))


@triton.jit(do_not_specialize=["segments", "all_tiles"])
def plan_pages(
    desc, segments, all_tiles, meta, bound_kinds, fixed_words, lossless_words, first_words, table, units,
    LANES: tl.constexpr,
):  # fmt: skip
    """One program a page: choose its coding; write its table entry (no offset), and the first word of each tile.

    `units` receives its size in units of 16 bytes.
    """
    program = tl.program_id(0).to(tl.int64)
    segment = program % segments
    row = desc + segment * DESC_COLUMNS
    at = program // segments * all_tiles + tl.load(row + FIRST_TILE)
    num_tiles = tl.load(row + NUM_TILES)
    fixed_lanes = tl.zeros((LANES,), tl.int64)
    lossless_lanes = tl.zeros((LANES,), tl.int64)
    for start in range(0, num_tiles, LANES):
        lane = start + tl.arange(0, LANES)
        fixed_lanes += tl.load(fixed_words + at + lane, mask=lane < num_tiles, other=0)
        lossless_lanes += tl.load(lossless_words + at + lane, mask=lane < num_tiles, other=0)
    class_bytes = _class_bytes(row)
    fixed_size = class_bytes + 2 * tl.sum(fixed_lanes, axis=0)
    lossless_size = 2 * class_bytes + 2 * tl.sum(lossless_lanes, axis=0)
    raw_size = 2 * tl.load(row + TOKENS) * tl.load(row + CHANNELS)

    meta_row = meta + program * META_COLUMNS
    bound = tl.load(meta_row + META_BOUND)
    quantised = bound != 0
    exact = (quantised == 0) | ((fixed_size * 8 > raw_size * 5) & (lossless_size < fixed_size))
    coding = tl.where(exact, LOSSLESS, FIXED)
    asked = tl.load(bound_kinds + segment) == BOUND_LOSSLESS
    reason = tl.where(exact, tl.where(quantised, LOSSLESS_SMALLER, tl.where(asked, 0, BOUND_TOO_FINE)), 0)
    size = tl.where(exact, lossless_size, fixed_size)
    incompressible = size >= raw_size
    constant = tl.load(meta_row + META_DIFFERS) == 0
    coding = tl.where(constant, CONSTANT, tl.where(incompressible, RAW, coding))
    reason = tl.where(constant, 0, tl.where(incompressible, INCOMPRESSIBLE, reason))
    size = tl.where(constant, 4, tl.where(incompressible, raw_size, size))
    param = tl.where(coding == LOSSLESS, tl.load(meta_row + META_EXPONENT), 0)
    kind = tl.load(row + KIND).to(tl.int32)

    entry = table + program * 4
    tl.store(entry + 1, size.to(tl.int32))
    tl.store(entry + 2, tl.where(coding == FIXED, bound, 0))
    tl.store(entry + 3, coding | (kind << 8) | (param << 16) | (reason << 24))
    tl.store(units + program, (size + 15) // 16)

    carry = tl.zeros((), tl.int64)
    for start in range(0, num_tiles, LANES):
        lane = start + tl.arange(0, LANES)
        fixed_count = tl.load(fixed_words + at + lane, mask=lane < num_tiles, other=0)
        lossless_count = tl.load(lossless_words + at + lane, mask=lane < num_tiles, other=0)
        count = tl.where(coding == FIXED, fixed_count, lossless_count).to(tl.int64)
        tl.store(first_words + at + lane, carry + tl.cumsum(count, axis=0) - count, mask=lane < num_tiles)
        carry += tl.sum(count, axis=0)


@triton.jit
def _fixed_pair(x, raw, inverse, FP16: tl.constexpr):
    low = _zigzag_code(_to_float((x & 0xFFFF).to(tl.int32), FP16), inverse).to(tl.uint32)
    high = _zigzag_code(_to_float((x >> 16).to(tl.int32), FP16), inverse).to(tl.uint32)
    return tl.where(raw, x, (low & 0xFFFF) | (high << 16))


@triton.jit
def _lossless_code(v, top, inside, FP16: tl.constexpr):
    """Of a uint32 pattern: the exponent becomes its distance from the group's, the sign goes below it."""
    fraction: tl.constexpr = 10 if FP16 else 7
    all_ones: tl.constexpr = 31 if FP16 else 255
    distance = top - ((v >> fraction) & all_ones).to(tl.int32)
    mantissa = v & ((1 << fraction) - 1)
    code = (distance.to(tl.uint32) << (fraction + 1)) | ((v >> 15) << fraction) | mantissa
    return tl.where(inside, code & 0xFFFF, 0)


@triton.jit
def _lossless_pair(x, raw, top, inside_low, inside_high, FP16: tl.constexpr):
    low = _lossless_code(x & 0xFFFF, top, inside_low, FP16)
    high = _lossless_code(x >> 16, top, inside_high, FP16)
    return tl.where(raw, x, low | (high << 16))


@triton.jit
def _store_pair(words, count, x, i: tl.constexpr):
    """Word i from the low half, word i + 8 from the high half."""
    tl.store(words + i, (x & 0xFFFF).to(tl.uint16), mask=i < count)
    tl.store(words + (i + 8), (x >> 16).to(tl.uint16), mask=i + 8 < count)


@triton.jit
def _store_planes(words, count, x0, x1, x2, x3, x4, x5, x6, x7):
    x0, x1, x2, x3, x4, x5, x6, x7 = _transpose(x0, x1, x2, x3, x4, x5, x6, x7)
    _store_pair(words, count, x0, 0)
    _store_pair(words, count, x1, 1)
    _store_pair(words, count, x2, 2)
    _store_pair(words, count, x3, 3)
    _store_pair(words, count, x4, 4)
    _store_pair(words, count, x5, 5)
    _store_pair(words, count, x6, 6)
    _store_pair(words, count, x7, 7)


@triton.jit
def _store_nibbles(out, classes, groups, class_bytes, tile, SHIFT: tl.constexpr, TILE: tl.constexpr):
    byte = tile * (TILE // 2) + tl.arange(0, TILE // 2)
    even = tl.load(classes + 2 * byte, mask=2 * byte < groups, other=0).to(tl.int32)
    odd = tl.load(classes + 2 * byte + 1, mask=2 * byte + 1 < groups, other=0).to(tl.int32)
    packed = ((even >> SHIFT) & 15) | (((odd >> SHIFT) & 15) << 4)
    tl.store(out + byte, packed.to(tl.uint8), mask=byte < class_bytes)


@triton.jit
def _raw_place(row, start, tile, G: tl.constexpr, TILE: tl.constexpr):
    """As `_place`, in a raw segment: token-major, without gaps."""
    channels = tl.load(row + CHANNELS)
    g = tile * TILE + tl.arange(0, TILE)
    columns = tl.load(row + COLUMNS)
    r = g // columns
    return start + (r * G * channels + (g - r * columns) * (16 // G)), channels


@triton.jit
def _store_raw(raw_place, place, x, i: tl.constexpr, G: tl.constexpr):
    start, channels = raw_place
    j: tl.constexpr = i + 8
    tl.store(start + ((i % G) * channels + i // G), (x & 0xFFFF).to(tl.uint16), mask=_inside(place, i, G))
    tl.store(start + ((j % G) * channels + j // G), (x >> 16).to(tl.uint16), mask=_inside(place, j, G))


@triton.jit(do_not_specialize=["tiles", "all_tiles", "all_groups", "segments"])
def write_tiles(
    desc, block_ids, tile_map, tiles, all_tiles, all_groups, segments, classes_in, first_words, table, offsets, out,
    G: tl.constexpr, SPLIT: tl.constexpr, FP16: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write what a tile contributes to its segment."""
    block, segment, tile = _tile_of(tile_map, tiles)
    row = desc + segment * DESC_COLUMNS
    page = _page(row, block_ids, block)
    place = _place(row, page, tile, G, SPLIT, TILE)
    entry = table + (block * segments + segment) * 4
    size = tl.load(entry + 1).to(tl.int64) & 0xFFFFFFFF
    coding = tl.load(entry + 3) & 0xFF
    start = out + tl.load(offsets + block) + (tl.load(entry).to(tl.int64) & 0xFFFFFFFF) * 16
    values = start.to(tl.pointer_type(tl.uint16))

    if coding == CONSTANT:
        if tile == 0:
            tl.store(values, tl.load(page))
            tl.store(values + 1, tl.zeros((), tl.uint16))
    else:
        x0 = _pair(place, 0, G, SPLIT)
        x1 = _pair(place, 1, G, SPLIT)
        x2 = _pair(place, 2, G, SPLIT)
        x3 = _pair(place, 3, G, SPLIT)
        x4 = _pair(place, 4, G, SPLIT)
        x5 = _pair(place, 5, G, SPLIT)
        x6 = _pair(place, 6, G, SPLIT)
        x7 = _pair(place, 7, G, SPLIT)
        if coding == RAW:
            raw_place = _raw_place(row, values, tile, G, TILE)
            _store_raw(raw_place, place, x0, 0, G)
            _store_raw(raw_place, place, x1, 1, G)
            _store_raw(raw_place, place, x2, 2, G)
            _store_raw(raw_place, place, x3, 3, G)
            _store_raw(raw_place, place, x4, 4, G)
            _store_raw(raw_place, place, x5, 5, G)
            _store_raw(raw_place, place, x6, 6, G)
            _store_raw(raw_place, place, x7, 7, G)
        else:
            groups = tl.load(row + GROUPS)
            valid = tile * TILE + tl.arange(0, TILE) < groups
            class_bytes = _class_bytes(row)
            classes = classes_in + block * all_groups + tl.load(row + FIRST_GROUP)
            packed = tl.load(classes + tile * TILE + tl.arange(0, TILE), mask=valid, other=0).to(tl.int32)
            first = tl.load(first_words + block * all_tiles + tl.load(row + FIRST_TILE) + tile)
            if coding == FIXED:
                width = packed & 15
                raw = width == RAW_GROUP
                count = tl.where(valid, tl.where(raw, 16, width), 0)
                bits = tl.load(entry + 2)
                one = tl.full((TILE,), 1.0, tl.float32)
                inverse = tl.div_rn(one, _step(bits, width, FP16))
                x0 = _fixed_pair(x0, raw, inverse, FP16)
                x1 = _fixed_pair(x1, raw, inverse, FP16)
                x2 = _fixed_pair(x2, raw, inverse, FP16)
                x3 = _fixed_pair(x3, raw, inverse, FP16)
                x4 = _fixed_pair(x4, raw, inverse, FP16)
                x5 = _fixed_pair(x5, raw, inverse, FP16)
                x6 = _fixed_pair(x6, raw, inverse, FP16)
                x7 = _fixed_pair(x7, raw, inverse, FP16)
                _store_nibbles(start, classes, groups, class_bytes, tile, 0, TILE)
                words = (start + class_bytes).to(tl.pointer_type(tl.uint16))
                words += first + tl.cumsum(count, axis=0) - count
                _store_planes(words, count, x0, x1, x2, x3, x4, x5, x6, x7)
            else:
                width = (packed >> 4) & 15
                raw = width == RAW_GROUP
                significant: tl.constexpr = 11 if FP16 else 8
                count = tl.where(valid, tl.where(raw, 16, significant + width), 0)
                m = (tl.load(entry + 3) >> 16) & 0xFF
                top = tl.maximum(m - ((packed >> 8) & 15), 0)
                i0 = _inside(place, 0, G)
                x0 = _lossless_pair(x0, raw, top, i0, _inside(place, 8, G), FP16)
                i1 = _inside(place, 1, G)
                x1 = _lossless_pair(x1, raw, top, i1, _inside(place, 9, G), FP16)
                i2 = _inside(place, 2, G)
                x2 = _lossless_pair(x2, raw, top, i2, _inside(place, 10, G), FP16)
                i3 = _inside(place, 3, G)
                x3 = _lossless_pair(x3, raw, top, i3, _inside(place, 11, G), FP16)
                i4 = _inside(place, 4, G)
                x4 = _lossless_pair(x4, raw, top, i4, _inside(place, 12, G), FP16)
                i5 = _inside(place, 5, G)
                x5 = _lossless_pair(x5, raw, top, i5, _inside(place, 13, G), FP16)
                i6 = _inside(place, 6, G)
                x6 = _lossless_pair(x6, raw, top, i6, _inside(place, 14, G), FP16)
                i7 = _inside(place, 7, G)
                x7 = _lossless_pair(x7, raw, top, i7, _inside(place, 15, G), FP16)
                _store_nibbles(start, classes, groups, class_bytes, tile, 4, TILE)
                _store_nibbles(start + class_bytes, classes, groups, class_bytes, tile, 8, TILE)
                words = (start + 2 * class_bytes).to(tl.pointer_type(tl.uint16))
                words += first + tl.cumsum(count, axis=0) - count
                _store_planes(words, count, x0, x1, x2, x3, x4, x5, x6, x7)

    if tile == tl.load(row + NUM_TILES) - 1:
        pad = size + tl.arange(0, 16)
        tl.store(start + pad, tl.zeros((16,), tl.uint8), mask=pad < (size + 15) // 16 * 16)


# ---- decoding --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["segments", "capacity"])
def check_pages(desc, segments, capacity, payload, offsets, payload_bytes, table, ends, status):
    """One program a page: everything about a table entry that can be known without its classes.

    Afterwards the bytes of a segment with status 0 lie in the payload, and are enough for its class arrays.
    """
    program = tl.program_id(0).to(tl.int64)
    block = program // segments
    segment = program % segments
    row = desc + segment * DESC_COLUMNS
    entry = table + program * 4
    offset = (tl.load(entry).to(tl.int64) & 0xFFFFFFFF) * 16
    size = tl.load(entry + 1).to(tl.int64) & 0xFFFFFFFF
    padded = (size + 15) // 16 * 16
    bound = tl.load(entry + 2)
    coding = tl.load(entry + 3) & 0xFF

    total = tl.load(payload_bytes + block)
    record = tl.load(offsets + block)
    end = tl.load(ends + program) * 16  # where this segment has to end
    last = tl.load(ends + block * segments + segments - 1) * 16
    good = (size > 0) & (offset + padded == end) & (last == total)
    good &= (record >= 0) & ((record & 15) == 0) & (total >= 0) & (total <= capacity) & (record <= capacity - total)

    class_bytes = _class_bytes(row)
    raw_size = 2 * tl.load(row + TOKENS) * tl.load(row + CHANNELS)
    bound_good = (bound >= LEAST_BOUND_BITS) & (bound <= LARGEST_BOUND_BITS)
    good &= (coding != RAW) | (size == raw_size)
    good &= (coding != CONSTANT) | (size == 4)
    good &= (coding != FIXED) | (bound_good & (size >= class_bytes))
    good &= (coding != LOSSLESS) | (size >= 2 * class_bytes)
    known = coding <= LOSSLESS
    supported = (coding <= FIXED) | (coding == LOSSLESS)

    start = payload + record + offset
    pad = size + tl.arange(0, 16)
    padding = tl.load(start + pad, mask=pad < tl.where(good, padded, 0), other=0).to(tl.int32)
    value = tl.arange(0, 4)
    beyond = tl.load(start + value, mask=value < tl.where(good & (coding == CONSTANT), 4, 0), other=0).to(tl.int32)
    beyond = tl.where(value < 2, 0, beyond)  # a constant is 2 bytes and 2 bytes of padding
    good &= (tl.max(padding, axis=0) == 0) & (tl.max(beyond, axis=0) == 0)
    tl.store(
        status + program, tl.where(good & known, tl.where(supported, STATUS_OK, STATUS_UNSUPPORTED), STATUS_CORRUPT)
    )


@triton.jit
def _load_nibbles(classes, g, mask):
    return (tl.load(classes + g // 2, mask=mask, other=0).to(tl.int32) >> ((g & 1) * 4).to(tl.int32)) & 15


@triton.jit(do_not_specialize=["tiles", "all_tiles", "segments"])
def measure_tiles(
    desc, tile_map, tiles, all_tiles, segments, payload, offsets, table, status, words_out,
    FP16: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Words of a tile by its classes; -1 if a class or the padding of the class arrays is none that the format has."""
    block, segment, tile = _tile_of(tile_map, tiles)
    row = desc + segment * DESC_COLUMNS
    program = block * segments + segment
    entry = table + program * 4
    coding = tl.load(entry + 3) & 0xFF
    coded = (tl.load(status + program) == STATUS_OK) & (coding >= FIXED)
    groups = tl.load(row + GROUPS)
    class_bytes = _class_bytes(row)
    start = payload + tl.load(offsets + block) + (tl.load(entry).to(tl.int64) & 0xFFFFFFFF) * 16

    g = tile * TILE + tl.arange(0, TILE)
    stored = g < tl.where(coded, 2 * class_bytes, 0)
    width = _load_nibbles(start, g, stored)
    base = _load_nibbles(start + class_bytes, g, g < tl.where(coded & (coding == LOSSLESS), 2 * class_bytes, 0))
    valid = g < tl.where(coded, groups, 0)
    exponent_bits: tl.constexpr = 5 if FP16 else 8
    significant: tl.constexpr = 11 if FP16 else 8
    widest = tl.where(coding == LOSSLESS, exponent_bits, 14)
    raw = width == RAW_GROUP
    bad = (valid & (raw == 0) & (width > widest)) | (stored & (g >= groups) & ((width | base) != 0))
    count = tl.where(raw, 16, width + tl.where(coding == LOSSLESS, significant, 0))
    words = tl.sum(tl.where(valid, count, 0), axis=0)
    words = tl.where(tl.max(bad.to(tl.int32), axis=0) != 0, -1, words)
    tl.store(words_out + block * all_tiles + tl.load(row + FIRST_TILE) + tile, words)


@triton.jit(do_not_specialize=["segments", "all_tiles"])
def place_pages(desc, segments, all_tiles, table, status, words_in, first_words, LANES: tl.constexpr):
    """One program a page: the first word of each tile, and whether the segment's size is what its classes imply."""
    program = tl.program_id(0).to(tl.int64)
    row = desc + program % segments * DESC_COLUMNS
    at = program // segments * all_tiles + tl.load(row + FIRST_TILE)
    num_tiles = tl.load(row + NUM_TILES)
    entry = table + program * 4
    size = tl.load(entry + 1).to(tl.int64) & 0xFFFFFFFF
    coding = tl.load(entry + 3) & 0xFF

    carry = tl.zeros((), tl.int64)
    least = tl.zeros((LANES,), tl.int32)
    for start in range(0, num_tiles, LANES):
        lane = start + tl.arange(0, LANES)
        count = tl.load(words_in + at + lane, mask=lane < num_tiles, other=0)
        least = tl.minimum(least, count)
        count = count.to(tl.int64)
        tl.store(first_words + at + lane, carry + tl.cumsum(count, axis=0) - count, mask=lane < num_tiles)
        carry += tl.sum(count, axis=0)
    implied = _class_bytes(row) * tl.where(coding == LOSSLESS, 2, 1) + 2 * carry
    bad = (coding >= FIXED) & ((tl.min(least, axis=0) < 0) | (implied != size))
    before = tl.load(status + program)
    tl.store(status + program, tl.where((before == STATUS_OK) & bad, STATUS_CORRUPT, before))


@triton.jit
def _load_pair(words, count, i: tl.constexpr):
    low = tl.load(words + i, mask=i < count, other=0).to(tl.uint32)
    high = tl.load(words + (i + 8), mask=i + 8 < count, other=0).to(tl.uint32)
    return low | (high << 16)


@triton.jit
def _decoded(v, raw, exact, step, top, FP16: tl.constexpr):
    """Code (uint32) -> bit pattern."""
    fraction: tl.constexpr = 10 if FP16 else 7
    all_ones: tl.constexpr = 31 if FP16 else 255
    code = v.to(tl.int32)
    q = (code >> 1) ^ -(code & 1)
    quantised = _from_float(q.to(tl.float32) * step, FP16)
    e = (top - (code >> (fraction + 1))) & all_ones
    sign = (code >> fraction) & 1
    lossless = (sign << 15) | (e << fraction) | (code & ((1 << fraction) - 1))
    return tl.where(raw, code, tl.where(exact, lossless, quantised)).to(tl.uint16)


@triton.jit
def _store_values(
    place, x, raw, exact, step, top, i: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, FP16: tl.constexpr
):  # fmt: skip
    low = _decoded(x & 0xFFFF, raw, exact, step, top, FP16)
    tl.store(_at(place, i, G, SPLIT), low, mask=_inside(place, i, G))
    high = _decoded(x >> 16, raw, exact, step, top, FP16)
    tl.store(_at(place, i + 8, G, SPLIT), high, mask=_inside(place, i + 8, G))


@triton.jit(do_not_specialize=["tiles", "all_tiles", "segments"])
def read_tiles(
    desc, block_ids, tile_map, tiles, all_tiles, segments, payload, offsets, table, first_words, worst_status,
    G: tl.constexpr, SPLIT: tl.constexpr, FP16: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Decode a tile into its page, unless a segment of the batch is bad."""
    block, segment, tile = _tile_of(tile_map, tiles)
    row = desc + segment * DESC_COLUMNS
    page = _page(row, block_ids, block)
    place = _place(row, page, tile, G, SPLIT, TILE)
    entry = table + (block * segments + segment) * 4
    coding = tl.load(entry + 3) & 0xFF
    start = payload + tl.load(offsets + block) + (tl.load(entry).to(tl.int64) & 0xFFFFFFFF) * 16
    if tl.load(worst_status) == STATUS_OK:
        if coding <= CONSTANT:
            coding_lanes = tl.full((TILE,), 0, tl.int32) + coding
            raw_start, channels = _raw_place(row, start.to(tl.pointer_type(tl.uint16)), tile, G, TILE)
            first = tl.load(start.to(tl.pointer_type(tl.uint16)))
            for i in tl.static_range(16):
                inside = _inside(place, i, G)
                inside_raw = inside & (coding_lanes == RAW)
                v = tl.load(raw_start + ((i % G) * channels + i // G), mask=inside_raw, other=0)
                tl.store(_at(place, i, G, SPLIT), tl.where(coding_lanes == RAW, v, first), mask=inside)
        else:
            significant: tl.constexpr = 11 if FP16 else 8
            exact = coding == LOSSLESS
            class_bytes = _class_bytes(row)
            g = tile * TILE + tl.arange(0, TILE)
            in_page = g < tl.load(row + GROUPS)
            width = _load_nibbles(start, g, in_page)
            base = _load_nibbles(start + class_bytes, g, g < tl.where(exact, tl.load(row + GROUPS), 0))
            raw = width == RAW_GROUP
            count = tl.where(raw, 16, width + tl.where(exact, significant, 0))
            count = tl.where(in_page, count, 0)
            step = _step(tl.load(entry + 2), width, FP16)
            top = tl.maximum(((tl.load(entry + 3) >> 16) & 0xFF) - base, 0)
            words = (start + class_bytes * tl.where(exact, 2, 1)).to(tl.pointer_type(tl.uint16))
            words += tl.load(first_words + block * all_tiles + tl.load(row + FIRST_TILE) + tile)
            words += tl.cumsum(count, axis=0) - count
            x0 = _load_pair(words, count, 0)
            x1 = _load_pair(words, count, 1)
            x2 = _load_pair(words, count, 2)
            x3 = _load_pair(words, count, 3)
            x4 = _load_pair(words, count, 4)
            x5 = _load_pair(words, count, 5)
            x6 = _load_pair(words, count, 6)
            x7 = _load_pair(words, count, 7)
            x0, x1, x2, x3, x4, x5, x6, x7 = _transpose(x0, x1, x2, x3, x4, x5, x6, x7)
            _store_values(place, x0, raw, exact, step, top, 0, G, SPLIT, FP16)
            _store_values(place, x1, raw, exact, step, top, 1, G, SPLIT, FP16)
            _store_values(place, x2, raw, exact, step, top, 2, G, SPLIT, FP16)
            _store_values(place, x3, raw, exact, step, top, 3, G, SPLIT, FP16)
            _store_values(place, x4, raw, exact, step, top, 4, G, SPLIT, FP16)
            _store_values(place, x5, raw, exact, step, top, 5, G, SPLIT, FP16)
            _store_values(place, x6, raw, exact, step, top, 6, G, SPLIT, FP16)
            _store_values(place, x7, raw, exact, step, top, 7, G, SPLIT, FP16)
