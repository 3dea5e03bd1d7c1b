// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The decoder of all codings for the batches of cuda_rice_fast.inl. A strip's lanes find the start of their quotients
// as in cuda_rice.inl, and read those of a group from a window of 64 bits; groups that need more, or have large codes,
// go to a function that takes anything.
#pragma once

#include "cuda_rice_fast.inl"

namespace kvz {
namespace gpu {

// Shared memory: Shared, RiceFastShared, the bounds of the vectors of a page, the segment and a word of zeros or two.
constexpr uint32_t kRiceFastVectors = kRiceFastStrips * 16;
constexpr uint32_t kRiceDecodeBytes = kRiceFastBytes + kRiceFastVectors * 4;
constexpr uint32_t rice_fast_decode_bytes(uint32_t strips) { return kRiceDecodeBytes + strips * 2048 + 32; }

// A page of a launch. Functions that are called find it again, so that no caller has to keep it in memory for them.
struct DecodePage {
  kvz_entry entry;
  kvz_segment segment;
  Geometry geometry;
  const uint8_t* from;

  KVZ_DEV DecodePage(const DecodeParams& p, uint32_t page) {
    const uint32_t b = page / p.num_segments, s = page - b * p.num_segments;
    entry = p.table[page];
    segment = p.segments[s];
    geometry = geometry_of(segment, p.block_ids[b]);
    from = reinterpret_cast<const uint8_t*>(p.payloads[b]) + static_cast<uint64_t>(entry.offset) * 16;
  }
  KVZ_DEV Bounds bounds(const uint32_t* stage) const {
    return bounds_of(segment, entry, reinterpret_cast<const uint8_t*>(stage));
  }
};

// What a lane knows of its groups of a strip.
struct RiceClasses {
  RiceLane at;
  uint32_t numbers;  // in the halves: of the planes
  uint32_t flags;    // raw in bits 0 and 16, differences in bits 1 and 17
  uint32_t before;   // words << 16 | values coded in the stream, up to and including this lane
};

template <int DTYPE, int CODING>
KVZ_DEV uint32_t words_of_group(const RiceClasses& c, const RicePage& page, uint32_t a, uint32_t& parameter) {
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  parameter = page.least + (lossless ? 0 : c.numbers >> (16 * a) & 0xffffu);
  if (!c.at.exists[a]) return 0;
  return (c.flags >> (16 * a) & 1u) != 0 ? 16 : (lossless ? Traits<DTYPE>::kFraction + 1 : 0) + parameter;
}

template <int DTYPE, int CODING>
KVZ_DEV void read_classes(const Geometry& g, const RicePage& page, const uint32_t* first, RiceClasses& c,
                          uint32_t lane) {
  c.numbers = c.flags = 0;
  if (c.at.exists[0]) {
    const uint32_t plane_words = (g.groups + 31) / 32, shift = c.at.index % 32;
    const uint32_t* plane = first + c.at.index / 32;
    const auto next = [&]() {  // the bits of the two groups, in bits 0 and 16
      const uint32_t bits = *plane >> shift & 3u;
      plane += plane_words;
      return (bits | bits << 15) & kBothHalves;
    };
    if (page.any_raw) c.flags = next();
    if (CODING == KVZ_RICE) c.flags |= next() << 1;
    for (uint32_t b = 0; b < page.planes; ++b) c.numbers |= next() << b;
  }
  uint32_t parameter;
  const uint32_t words =
      words_of_group<DTYPE, CODING>(c, page, 0, parameter) + words_of_group<DTYPE, CODING>(c, page, 1, parameter);
  const uint32_t raw = (c.flags & 1u) + (c.flags >> 16 & 1u);
  c.before = inclusive_sum(words << 16 | (c.at.exists[0] ? 32 - 16 * raw : 0u), lane);
}

// Bit behind the `ones`-th one that follows bit `start` of the segment, for each lane; those after bit `end` do not
// count. By one warp.
KVZ_DEV uint32_t bit_behind_2(const uint32_t* segment, uint32_t start, uint32_t end, uint32_t ones, uint32_t lane) {
  const uint32_t first = start / 32, words = (end + 31) / 32 - first, share = (words + kWarp - 1) / kWarp;
  const auto word = [&](uint32_t i) {
    uint32_t w = segment[first + i];
    if (i == 0) w &= ~0u << (start & 31u);
    return w;
  };
  uint32_t own = 0;
  for (uint32_t i = lane * share; i < words && i < (lane + 1) * share; ++i) {
    own += static_cast<uint32_t>(__popc(word(i)));
  }
  const uint32_t before = inclusive_sum(own, lane) - own;
  uint32_t at = 0;  // the last lane with fewer than `ones` before its words
#pragma unroll
  for (uint32_t d = 16; d > 0; d /= 2) {
    const uint32_t there = __shfl_sync(kAllLanes, before, static_cast<int>(at + d));
    if (there < ones) at += d;
  }
  uint32_t seen = __shfl_sync(kAllLanes, before, static_cast<int>(at));
  if (ones == 0) return start;
  for (uint32_t index = at * share; index < words; ++index) {
    const uint32_t w = word(index), count = static_cast<uint32_t>(__popc(w));
    if (seen + count >= ones) return (first + index) * 32 + select_bit(w, ones - seen) + 1;
    seen += count;
  }
  return end;
}

// N quotients of a group that begin at bit `position`, each at q[i] << shift; `position` moves behind them. False where
// that takes more than 64 bits, or one more than 31: then they stay 0.
template <int FIRST, int N>
KVZ_DEV bool take_quotients(const uint32_t* segment, uint32_t& position, uint32_t shift, uint32_t (&q)[16]) {
  const uint32_t* const from = segment + position / 32;
  const uint32_t by = position & 31u;
  const uint32_t w0 = from[0], w1 = from[1], w2 = from[2];
  const uint32_t low = funnel_right(w0, w1, by), high = funnel_right(w1, w2, by);
  if (__popc(low) + __popc(high) >= N) {
    uint64_t bits = reverse_64(static_cast<uint64_t>(high) << 32 | low);
    uint32_t any = 0, used = N, z[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t n = leading_zeros(static_cast<uint32_t>(bits >> 32));
      any |= n;
      used += n;
      bits <<= n + 1;
      z[i] = n << shift;
    }
    if (any < 32) {
      position += used;
#pragma unroll
      for (int i = 0; i < N; ++i) q[FIRST + i] |= z[i];
      return true;
    }
  }
  uint32_t index = position / 32, rest = w0 & ~0u << by;
  for (uint32_t i = 0; i < N; ++i) {
    while (rest == 0) rest = segment[++index];  // validated: there are as many ones as values
    position = index * 32 + static_cast<uint32_t>(__ffs(static_cast<int>(rest)));
    rest &= rest - 1;
  }
  return false;
}

// Those of a whole group: exponents may have longer ones.
template <int CODING>
KVZ_DEV bool take_group(const uint32_t* segment, uint32_t& position, uint32_t shift, uint32_t (&q)[16]) {
  if (CODING == KVZ_RICE) return take_quotients<0, 16>(segment, position, shift, q);
  const bool first = take_quotients<0, 8>(segment, position, shift, q);
  return take_quotients<8, 8>(segment, position, shift, q) && first;
}

// A group whose codes may be large: all in 32 bits. `position` is where its quotients begin.
template <int DTYPE, int CODING>
KVZ_DEV_NOINLINE void decode_large_group(const DecodeParams& p, uint32_t page, uint32_t row, uint32_t column,
                                         const uint32_t* segment, uint32_t position, const uint16_t* plane,
                                         uint32_t parameter, bool delta, uint32_t base) {
  using Tr = Traits<DTYPE>;
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  constexpr uint32_t s_bits = lossless ? Tr::kFraction + 1 : 0;
  uint32_t v[16];
#pragma unroll
  for (uint32_t j = 0; j < 16; ++j) v[j] = j < s_bits + parameter ? plane[j] : 0u;
  transpose_16(v);
  uint32_t index = position / 32, rest = segment[index] & ~0u << (position & 31u), before = 0, any = 0;
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
    while (rest == 0) rest = segment[++index];
    const uint32_t one = index * 32 + static_cast<uint32_t>(__ffs(static_cast<int>(rest)) - 1);
    rest &= rest - 1;
    const uint32_t z = (one - position) << parameter | v[i] >> s_bits;
    position = one + 1;
    if (lossless) {
      const uint32_t e = rice_exponent(base, z) & ((1u << Tr::kExponentBits) - 1u);
      v[i] = (v[i] >> Tr::kFraction & 1u) << 15 | e << Tr::kFraction | (v[i] & ((1u << Tr::kFraction) - 1u));
    } else {
      uint32_t q = static_cast<uint32_t>(unzigzag(z));
      if (delta) q += before;
      before = q;
      any |= zigzag(static_cast<int32_t>(q));
      v[i] = q;
    }
  }
  const int w = bit_length(any);
  const DecodePage at(p, page);
  const Bounds bounds = at.bounds(segment);
  for_places(at.geometry, row, column, [&](uint32_t i, uint8_t* to, uint32_t token, uint32_t head, uint32_t channel) {
    uint32_t x = v[i];
    if (!lossless) {
      const float step = step_of<DTYPE>(KVZ_FIXED, w, bound_at(bounds, token, head, channel));
      x = Tr::from_float(static_cast<float>(static_cast<int32_t>(x)) * step);
    }
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(x);
  });
}

// Words `first` .. first + N - 1 of both groups, in the halves.
template <int N>
KVZ_DEV void take_words(const uint16_t* from, uint32_t n0, uint32_t n1, uint32_t first, uint32_t* v) {
#pragma unroll
  for (uint32_t j = 0; j < N; ++j) {
    uint32_t low = 0, high = 0;
    if (first + j < n0) low = from[first + j];
    if (first + j < n1) high = from[n0 + first + j];
    v[j] = low | high << 16;
  }
}

template <int DTYPE, int CODING>
KVZ_DEV void decode_strip(const DecodeParams& p, uint32_t index, const Geometry& g, const Bounds& bounds,
                          const float* doubled, const RiceClasses& c, const RicePage& page, const uint32_t* segment,
                          uint32_t words, uint32_t stream, uint32_t length, uint32_t lane) {
  using Tr = Traits<DTYPE>;
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  uint32_t parameter[2], count[2];
  count[0] = words_of_group<DTYPE, CODING>(c, page, 0, parameter[0]);
  count[1] = words_of_group<DTYPE, CODING>(c, page, 1, parameter[1]);
  const bool raw[2] = {(c.flags & 1u) != 0, (c.flags >> 16 & 1u) != 0};
  const uint32_t raw_mask = (raw[0] ? 0xffffu : 0u) | (raw[1] ? 0xffff0000u : 0u);
  const bool exists = c.at.exists[0];
  const uint32_t coded = (exists && !raw[0] ? 16u : 0u) + (exists && !raw[1] ? 16u : 0u);
  uint32_t position = bit_behind_2(segment, stream * 16, (stream + length) * 16, (c.before & 0xffffu) - coded, lane);
  const uint32_t position0 = position;

  // Quotients.
  uint32_t x[16], large = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = 0;
  if (exists && !raw[0] && !take_group<CODING>(segment, position, parameter[0], x)) large = 1;
  const uint32_t position1 = position;
  if (exists && !raw[1] && !take_group<CODING>(segment, position, 16 + parameter[1], x)) large |= 2;
  if (!lossless) large |= (parameter[0] > 9 && !raw[0] ? 1u : 0u) | (parameter[1] > 9 && !raw[1] ? 2u : 0u);

  // Low bits, and fractions.
  const uint16_t* const from =
      reinterpret_cast<const uint16_t*>(segment) + words + (c.before >> 16) - count[0] - count[1];
  const uint32_t widest = static_cast<uint32_t>(
      __reduce_max_sync(kAllLanes, static_cast<int32_t>(count[0] > count[1] ? count[0] : count[1])));
  uint32_t v[16];
  if (lossless && DTYPE == KVZ_BF16 && widest < 16) {
    uint32_t b[8];
    if (page.least > 0) {
      take_words<8>(from, count[0], count[1], 8, b);
      transpose_8(b);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i] |= b[i] & 0x00ff00ffu;
        x[i + 8] |= b[i] >> 8 & 0x00ff00ffu;
      }
    }
    take_words<8>(from, count[0], count[1], 0, b);
    transpose_8(b);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = b[i] & 0x00ff00ffu;
      v[i + 8] = b[i] >> 8 & 0x00ff00ffu;
    }
  } else if (!lossless && widest <= 8) {
    uint32_t b[8];
    if (widest <= 4) {
      take_words<4>(from, count[0], count[1], 0, b);
      transpose_from_low_4(b);
    } else {
      take_words<8>(from, count[0], count[1], 0, b);
      transpose_8(b);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] |= b[i] & 0x00ff00ffu;
      x[i + 8] |= b[i] >> 8 & 0x00ff00ffu;
    }
  } else {
    take_words<16>(from, count[0], count[1], 0, v);
    transpose_16(v);
    constexpr uint32_t shift = lossless ? Tr::kFraction + 1 : 0;
    constexpr uint32_t low = (0xffffu >> shift) * kBothHalves;
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] |= v[i] >> shift & low & ~raw_mask;
  }

  // Values.
  uint32_t head;
  uint8_t* const to = pair_address(g, c.at.row, exists ? c.at.column : 0, head);
  const int32_t stride = static_cast<int32_t>(g.token_stride);
  if (lossless) {
    uint32_t bases = 0;
#pragma unroll
    for (uint32_t a = 0; a < 2; ++a) {
      const uint32_t number = c.numbers >> (16 * a) & 0xffffu;
      bases |= (page.base > number ? page.base - number : 0) << (16 * a);
    }
    constexpr uint32_t fraction = ((1u << Tr::kFraction) - 1u) * kBothHalves;
    constexpr uint32_t exponents = (((1u << Tr::kExponentBits) - 1u) << Tr::kFraction) * kBothHalves;
    constexpr uint32_t sign = (1u << Tr::kFraction) * kBothHalves;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      // base + block + 1 where the rest is 3, else base - (code - block), modulo the exponents.
      const uint32_t block = x[i] >> 2 & 0x3fff3fffu, three = (x[i] & x[i] >> 1 & kBothHalves) * 0xffffu;
      const uint32_t e = bases + block + choose(three, kBothHalves, 0x80008000u - x[i]);
      const uint32_t coded_value =
          (e << Tr::kFraction & exponents) | (v[i] & sign) << (15 - Tr::kFraction) | (v[i] & fraction);
      x[i] = raw_mask == 0 ? coded_value : choose(raw_mask, v[i], coded_value);
    }
  } else {
    uint32_t least_code = 0x80008000u, most_code = 0x80008000u, before = 0x80008000u;
    const uint32_t differences = (c.flags >> 1 & kBothHalves) * 0xffffu;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      // The code with a bias of 2^15 in each half; then the sum of the differences.
      const uint32_t u = (x[i] >> 1 & 0x7fff7fffu) ^ (0x80008000u - (x[i] & kBothHalves));
      x[i] = i == 0 ? u : u + choose(differences, x[i - 1], before) - 0x80008000u;
      least_code = min_2(least_code, x[i]);
      most_code = max_2(most_code, x[i]);
    }
    const int width[2] = {static_cast<int>(bits_of_biased(least_code & 0xffffu, most_code & 0xffffu)),
                          static_cast<int>(bits_of_biased(least_code >> 16, most_code >> 16))};
    const bool by_token = bounds.steps == KVZ_STEPS_TOKEN;
    float step[2] = {0.0f, 0.0f};
    uint32_t mask[2];
#pragma unroll
    for (uint32_t a = 0; a < 2; ++a) {
      if (!by_token && exists) step[a] = step_of<DTYPE>(KVZ_FIXED, width[a], bound_at(bounds, 0, 0, c.at.column + a));
      mask[a] = ~((1u << (24 - step_bits<KVZ_BF16>(KVZ_FIXED, width[a], 1.0f))) - 1u);
    }
    const float* const own = doubled + (exists ? c.at.row * 16 * bounds.heads + head : 0);
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
      if (by_token) {
        const float b = own[i * bounds.heads];
        if (DTYPE == KVZ_BF16) {
          step[0] = float_of(bits_of(b) & mask[0]);
          step[1] = float_of(bits_of(b) & mask[1]);
        } else {
          step[0] = step_of<DTYPE>(KVZ_FIXED, width[0], 0.5f * b);
          step[1] = step_of<DTYPE>(KVZ_FIXED, width[1], 0.5f * b);
        }
      }
      constexpr float kBias = 8388608.0f + 32768.0f;
      const float low = float_of(__byte_perm(x[i], 0x4b000000u, 0x7610)) - kBias;
      const float high = float_of(__byte_perm(x[i], 0x4b000000u, 0x7632)) - kBias;
      const uint32_t coded_value = narrow2<DTYPE>(low * step[0], high * step[1]);
      x[i] = raw_mask == 0 ? coded_value : choose(raw_mask, v[i], coded_value);
    }
  }
  if (!exists) return;
#pragma unroll
  for (int i = 0; i < 16; ++i) store_page(row_of(to, stride, i), x[i]);
  if (large != 0) {
    for (uint32_t a = 0; a < 2; ++a) {
      if ((large >> a & 1u) == 0) continue;
      const uint32_t number = c.numbers >> (16 * a) & 0xffffu;
      decode_large_group<DTYPE, CODING>(p, index, c.at.row, c.at.column + a, segment, a == 0 ? position0 : position1,
                                        a == 0 ? from : from + count[0], a == 0 ? parameter[0] : parameter[1],
                                        (c.flags >> (16 * a) & 2u) != 0, page.base > number ? page.base - number : 0);
    }
  }
}

template <int DTYPE, int CODING>
KVZ_DEV void decode_rice_fast_page(const DecodeParams& p, uint8_t* memory, uint32_t index, const DecodePage& at) {
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  const kvz_entry& entry = at.entry;
  const Geometry& g = at.geometry;
  RiceFastShared& fast = *reinterpret_cast<RiceFastShared*>(memory + kSharedBytes);
  float* const doubled = reinterpret_cast<float*>(memory + kRiceFastBytes);
  uint32_t* const stage = reinterpret_cast<uint32_t*>(memory + kRiceDecodeBytes);
  const uint32_t thread = threadIdx.x, lane = lane_of(thread), warp = thread / kWarp, warps = blockDim.x / kWarp;
  for (uint32_t i = thread; i < entry.size / 16; i += blockDim.x) copy_async_16(stage + 4 * i, at.from + 16 * i);
  for (uint32_t i = entry.size / 16 * 16 + thread; i < entry.size; i += blockDim.x) {
    reinterpret_cast<uint8_t*>(stage)[i] = at.from[i];
  }
  const Bounds bounds = at.bounds(stage);
  const uint32_t vectors = g.tokens * bounds.heads,
                 prefix = bounds.steps == KVZ_STEPS_TOKEN ? (vectors + 3) / 4 * 4 : 0;
  copy_async_wait();
  __syncthreads();
  if (bounds.steps == KVZ_STEPS_TOKEN) {
    for (uint32_t v = thread; v < vectors; v += blockDim.x) {
      doubled[v] = 2.0f * bound_of_scale(bounds.scales[v], entry.bound);
    }
  }
  RicePage page = rice_of_param(entry.param);
  if (lossless) page = {stage[0] & 255u, stage[0] >> 8 & 255u, entry.param, (stage[0] >> 16 & 255u) != 0};
  const uint32_t head = lossless ? 4 : prefix, plane_words = (g.groups + 31) / 32;
  const RiceStrips strips = rice_strips_of(g);
  // Classes are read twice, rather than kept: a warp may have any number of strips.
  const auto classes_of = [&](uint32_t strip) {
    RiceClasses c;
    c.at = rice_lane(g, strips, strip, lane);
    read_classes<DTYPE, CODING>(g, page, stage + head / 4, c, lane);
    return c;
  };
#pragma unroll 1
  for (uint32_t strip = warp; strip < strips.count; strip += warps) {
    const RiceClasses c = classes_of(strip);
    if (lane == 31) fast.strips[strip] = c.before >> 16;
  }
  __syncthreads();
  const uint32_t lengths = head / 2 + 2 * page.total_planes(lossless) * plane_words;
  const uint32_t own_words = lane < strips.count ? fast.strips[lane] : 0;
  const uint32_t own_length = lane < strips.count ? reinterpret_cast<const uint16_t*>(stage)[lengths + lane] : 0;
  const uint32_t words_until = inclusive_sum(own_words, lane), streams_until = inclusive_sum(own_length, lane);
  const uint32_t words = lengths + strips.count, streams = words + __shfl_sync(kAllLanes, words_until, 31);
#pragma unroll 1  // the code of one strip fits into the instruction cache
  for (uint32_t strip = warp; strip < strips.count; strip += warps) {
    const uint32_t words_at = __shfl_sync(kAllLanes, words + words_until - own_words, static_cast<int>(strip));
    const uint32_t stream = __shfl_sync(kAllLanes, streams + streams_until - own_length, static_cast<int>(strip));
    const uint32_t length = __shfl_sync(kAllLanes, own_length, static_cast<int>(strip));
    decode_strip<DTYPE, CODING>(p, index, g, bounds, doubled, classes_of(strip), page, stage, words_at, stream, length,
                                lane);
  }
}

template <int DTYPE>
KVZ_DEV_NOINLINE void decode_other_page(const DecodeParams& p, uint8_t* memory, uint32_t page) {
  const DecodePage at(p, page);
  if (at.entry.coding == KVZ_RAW) {
    copy_page<true>(at.geometry, const_cast<uint8_t*>(at.from));
  } else if (at.entry.coding == KVZ_CONSTANT) {
    fill_page(at.geometry, *reinterpret_cast<const uint32_t*>(at.from));
  } else {
    decode_any_page<DTYPE>(memory, at.segment, at.entry, at.geometry, at.from);
  }
}

// Pages of all codings, of batches whose segments are all as rice_is_fast says, of one dtype. `room` is that for a
// segment; forged ones may be larger.
template <int DTYPE>
KVZ_DEV void decode_rice_fast(const DecodeParams& p, uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const uint32_t pages = p.num_blocks * p.num_segments;
  uint32_t page = blockIdx.x, next = 0;
  while (page < pages) {
    // Pages differ in what they take: who is done with one takes the next.
    if (threadIdx.x == 0) next = gridDim.x + atomicAdd(&p.counters->ticket, 1u);
    if (!block_is_refused(p, page / p.num_segments)) {
      const DecodePage at(p, page);
      const uint32_t coding = at.entry.coding & KVZ_CODING_MASK;
      const bool fits = at.entry.size <= p.room_bytes;
      if (coding == KVZ_RICE && fits && at.geometry.tokens * at.segment.heads <= kRiceFastVectors) {
        decode_rice_fast_page<DTYPE, KVZ_RICE>(p, memory, page, at);
      } else if (coding == KVZ_LOSSLESS_RICE && fits) {
        decode_rice_fast_page<DTYPE, KVZ_LOSSLESS_RICE>(p, memory, page, at);
      } else {
        decode_other_page<DTYPE>(p, memory, page);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.page = next;
    __syncthreads();
    page = shared.page;
  }
  finish_decode(p, shared);
}

}  // namespace gpu
}  // namespace kvz
