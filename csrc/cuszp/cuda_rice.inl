// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The CUDA codec's Rice codings, and bounds that differ within a page: the same bytes as cpu_rice.inl. A CTA takes a
// page, a warp its strips of 64 groups, a lane two neighbouring groups of a strip. The encoder makes the codes of a
// page once and keeps them in shared memory; where a page is too large for that, every pass makes them again.
//
// A lane finds the start of its quotients in a strip's stream by the number of ones before them: popcounts of the
// words, their prefix sum over the warp, a binary search, and a select in one word. From there it reads 32 quotients in
// order.
#pragma once

#include "cuda_general.inl"

namespace kvz {
namespace gpu {

constexpr uint32_t kRiceWarps = 8;        // most of a CTA: several CTAs overlap the phases of their pages
constexpr uint32_t kRiceInverses = 1024;  // most of them for which the inverses of all steps are kept
constexpr uint32_t kRiceVectors = 4096;   // most tokens x heads of a page with a bound for each
constexpr uint32_t kRiceDelta = 64, kRiceRaw = 128, kRiceNumber = 31;  // bits of a class, as in cpu_rice.inl

struct RiceShared {
  uint32_t histogram[32];
  uint32_t any_raw, highest;
  uint32_t words[kRiceWarps], stream[kRiceWarps];  // of the strips of a round
  RicePage page;
};

// A slot keeps the codes of a strip, a column a lane, with the two classes in the last row. Codes of 16-bit values are
// in the halves of a word.
KVZ_HD constexpr uint32_t rice_slot_rows(uint32_t value_bits) { return (value_bits == 16 ? 16 : 32) + 1; }
KVZ_HD constexpr uint32_t rice_slot_bytes(uint32_t value_bits) { return rice_slot_rows(value_bits) * kWarp * 4; }

// Shared memory: Shared, RiceShared, the bounds of the vectors of the largest page and the inverses of their steps, a
// stream a warp, slots.
constexpr uint32_t kRiceSharedBytes = kSharedBytes + 512;
static_assert(sizeof(RiceShared) <= 512, "the bounds follow RiceShared");
KVZ_HD constexpr uint32_t rice_stream_words(uint32_t value_bits) { return KVZ_STRIP_GROUPS * value_bits / 2; }
KVZ_HD constexpr uint32_t rice_vector_bytes(uint32_t vectors) {
  return (vectors * (vectors <= kRiceInverses ? 9 : 1) * 4 + 15) / 16 * 16;
}
constexpr uint32_t rice_shared_bytes(uint32_t warps, uint32_t value_bits, uint32_t vectors, uint32_t slots) {
  return kRiceSharedBytes + rice_vector_bytes(vectors) + warps * rice_stream_words(value_bits) * 4 +
         slots * rice_slot_bytes(value_bits);
}

// ---- places
// ---------------------------------------------------------------------------------------------------------

// The strips of a page.
struct RiceStrips {
  uint32_t per_row, count;
};
KVZ_DEV RiceStrips rice_strips_of(const Geometry& g) {
  RiceStrips s;
  s.per_row = (g.columns + KVZ_STRIP_GROUPS - 1) / KVZ_STRIP_GROUPS;
  s.count = g.groups / g.columns * s.per_row;
  return s;
}

// A lane's groups of a strip.
struct RiceLane {
  uint32_t row, column, index;  // of the first group
  bool exists[2];
};
KVZ_DEV RiceLane rice_lane(const Geometry& g, const RiceStrips& s, uint32_t strip, uint32_t lane) {
  RiceLane l;
  l.row = strip / s.per_row;
  l.column = (strip - l.row * s.per_row) * KVZ_STRIP_GROUPS + 2 * lane;
  l.index = l.row * g.columns + l.column;
  const bool inside = strip < s.count;
  l.exists[0] = inside && l.column < g.columns;
  l.exists[1] = inside && l.column + 1 < g.columns;
  return l;
}

// ---- codes
// ----------------------------------------------------------------------------------------------------------

// Codes of a group for `rice`; returns its class. Values that stay raw are left in z.
template <int DTYPE>
KVZ_DEV uint32_t rice_group(const Geometry& g, const Bounds& bounds, uint32_t row, uint32_t column, uint32_t (&z)[16]) {
  using Tr = Traits<DTYPE>;
  const float most = Tr::to_float(Tr::kMaxFinite), room = static_cast<float>(Tr::kMaxCode) + 0.5f;
  const bool alike = bounds.steps != KVZ_STEPS_TOKEN && g.group_tokens == 16;  // one bound for the group
  float x[16], b[16];
  uint32_t inside = 0;
  bool bad = false;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    x[i] = 0.0f;
    b[i] = 1.0f;
  }
  for_places(g, row, column, [&](uint32_t i, const uint8_t* at, uint32_t token, uint32_t head, uint32_t channel) {
    const uint32_t v = load_value<DTYPE>(at);
    x[i] = Tr::to_float(v);
    z[i] = v;
    b[i] = alike && i > 0 ? b[0] : bound_at(bounds, token, head, channel);
    const float magnitude = float_of(bits_of(x[i]) & 0x7fffffffu);
    const uint32_t exponent = bits_of(b[i]) & 0x7f800000u;
    const float inverse = exponent == 0 ? 0.0f : float_of((253u << 23) - exponent);
    bad = bad || !(magnitude + b[i] <= most) || !(magnitude * inverse < room);
    inside |= 1u << i;
  });
  if (bad) return kRiceRaw;
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t exponent = bits_of(b[i]) & 0x7f800000u;
    z[i] = zigzag(round_code(x[i] * (exponent == 0 ? 0.0f : float_of((253u << 23) - exponent))));
    any |= z[i];
  }
  if (DTYPE != KVZ_FP32) {
    for (int w = bit_length(any);;) {
      any = 0;
      float inverse = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (i == 0 || !alike) inverse = b[i] > 0.0f ? reciprocal(step_of<DTYPE>(KVZ_FIXED, w, b[i])) : 0.0f;
        z[i] = zigzag(round_code(x[i] * inverse));
        any |= z[i];
      }
      const int found = bit_length(any);
      if (found == w) break;
      w = found;
    }
  }
  const uint32_t run = g.group_tokens == 1 ? 16 : g.group_tokens;
  uint32_t plain_sum = 0, delta_sum = 0;
  int32_t before = 0;
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
    const int32_t q = unzigzag(z[i]);
    if ((i & (run - 1)) == 0) before = 0;
    plain_sum += z[i];
    delta_sum += (inside >> i) & 1u ? zigzag(q - before) : 0u;
    before = q;
  }
  const bool delta = delta_sum < plain_sum;
  if (delta) {
    before = 0;
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
      const int32_t q = unzigzag(z[i]);
      if ((i & (run - 1)) == 0) before = 0;
      z[i] = (inside >> i) & 1u ? zigzag(q - before) : 0u;
      before = q;
    }
  }
  const int best = rice_parameter(delta ? delta_sum : plain_sum);
  return static_cast<uint32_t>(best < Tr::kMaxWidth ? best : Tr::kMaxWidth) | (delta ? kRiceDelta : 0u);
}

// Exponent fields of a group, those outside of the page as the first one; returns their sum.
template <int DTYPE>
KVZ_DEV uint32_t exponents_of(const Geometry& g, uint32_t row, uint32_t column, uint32_t (&e)[16], uint32_t& inside) {
  inside = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) e[i] = 0;
  for_places(g, row, column, [&](uint32_t i, const uint8_t* at, uint32_t, uint32_t, uint32_t) {
    e[i] = exponent_of<DTYPE>(load_value<DTYPE>(at));
    inside |= 1u << i;
  });
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    e[i] = (inside >> i) & 1u ? e[i] : e[0];
    sum += e[i];
  }
  return sum;
}

// Codes of a group for `lossless_rice`; returns its number below the page's base.
template <int DTYPE>
KVZ_DEV uint32_t lossless_rice_group(const Geometry& g, const RicePage& page, uint32_t row, uint32_t column,
                                     uint32_t (&z)[16]) {
  uint32_t inside;
  const uint32_t own = rice_base<DTYPE>(exponents_of<DTYPE>(g, row, column, z, inside));
  const uint32_t below = page.base > own ? page.base - own : 0, most = (1u << page.planes) - 1u;
  const uint32_t number = below < most ? below : most;
  const uint32_t base = page.base > number ? page.base - number : 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) z[i] = (inside >> i) & 1u ? rice_exponent_code(base, z[i]) : 0u;
  return number;
}

// ---- codes of pairs
// -------------------------------------------------------------------------------------------------

// May a lane read and write its two groups as words: 16 tokens of two neighbouring channels of a head?
template <int DTYPE>
KVZ_DEV bool pairs_of(const Geometry& g) {
  if (DTYPE == KVZ_FP32) return false;
  uint64_t all = reinterpret_cast<uint64_t>(g.base) | static_cast<uint64_t>(g.token_stride) | g.head_dim * 2;
  if (g.channels > g.head_dim) all |= static_cast<uint64_t>(g.head_stride);
  return g.group_tokens == 16 && g.tokens % 16 == 0 && all % 4 == 0;
}

KVZ_DEV uint8_t* pair_address(const Geometry& g, uint32_t row, uint32_t column, uint32_t& head) {
  head = column / g.head_dim;
  return g.base + static_cast<int64_t>(row) * 16 * g.token_stride + head * g.head_stride +
         static_cast<uint64_t>(column - head * g.head_dim) * 2;
}

KVZ_DEV void load_pair(const Geometry& g, const uint8_t* from, uint32_t (&v)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = *reinterpret_cast<const uint32_t*>(from + i * g.token_stride);
}

// As page_extremes, a word of two values at a time.
template <int DTYPE>
KVZ_DEV bool pair_extremes(const Geometry& g, const RiceStrips& strips, Shared& shared, uint32_t first_value,
                           float& page_low, float& page_high) {
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int32_t low = key_32(float_of(0x7f800000u)), high = key_32(float_of(0xff800000u));
  uint32_t differs = 0;
  for (uint32_t strip = warp; strip < strips.count; strip += warps) {
    const RiceLane at = rice_lane(g, strips, strip, lane);
    if (!at.exists[0]) continue;
    uint32_t head, v[16], nonfinite = 0;
    load_pair(g, pair_address(g, at.row, at.column, head), v);
    uint32_t least_2 = v[0], most_2 = v[0];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      differs |= v[i] ^ (first_value | first_value << 16);
      nonfinite |= nonfinite_2<DTYPE>(v[i], v[i]);
      least_2 = min2<DTYPE>(least_2, v[i]);
      most_2 = max2<DTYPE>(most_2, v[i]);
    }
    const auto see = [&](float least_value, float most_value) {
      const int32_t a = key_32(least_value), b = key_32(most_value);
      low = a < low ? a : low;
      high = b > high ? b : high;
    };
    if (nonfinite == 0) {
      see(widen<DTYPE>(least_2), widen<DTYPE>(most_2));
      see(widen<DTYPE>(least_2 >> 16), widen<DTYPE>(most_2 >> 16));
      continue;
    }
#pragma unroll 1
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t x = *reinterpret_cast<const uint16_t*>(pair_address(g, at.row, at.column, head) +
                                                            (i / 2) * g.token_stride + i % 2 * 2);
      if (is_finite<DTYPE>(x)) see(widen<DTYPE>(x), widen<DTYPE>(x));
    }
  }
  return reduce_extremes(shared, low, high, differs != 0, page_low, page_high);
}

// As rice_group, for both groups of a lane; codes in the halves of z, classes in the halves of the result.
template <int DTYPE>
KVZ_DEV uint32_t rice_pair(const Geometry& g, const Bounds& bounds, uint32_t row, uint32_t column, uint32_t (&z)[16]) {
  using Tr = Traits<DTYPE>;
  const float most = Tr::to_float(Tr::kMaxFinite), room = static_cast<float>(Tr::kMaxCode) + 0.5f;
  uint32_t head, v[16], classes = 0;
  load_pair(g, pair_address(g, row, column, head), v);
  const bool by_token = bounds.steps == KVZ_STEPS_TOKEN;
  const uint32_t vector = row * 16 * bounds.heads + head;  // of the first token
#pragma unroll
  for (int i = 0; i < 16; ++i) z[i] = 0;
#pragma unroll 1
  for (uint32_t a = 0; a < 2; ++a) {
    const uint32_t shift = 16 * a;
    float bound = by_token ? 0.0f : bound_at(bounds, 0, 0, column + a);
    uint32_t code[16], any = 0;
    bool bad = false;
    float inverse = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
      if (by_token) bound = bounds.vectors[vector + i * bounds.heads];
      if (i == 0 || by_token) {
        const uint32_t exponent = bits_of(bound) & 0x7f800000u;
        inverse = exponent == 0 ? 0.0f : float_of((253u << 23) - exponent);
      }
      const float x = widen<DTYPE>(v[i] >> shift), magnitude = float_of(bits_of(x) & 0x7fffffffu);
      bad = bad || !(magnitude + bound <= most) || !(magnitude * inverse < room);
      code[i] = zigzag(round_code(x * inverse));
      any |= code[i];
    }
    if (bad) {
      classes |= kRiceRaw << shift;
      continue;
    }
    for (int w = bit_length(any);;) {
      any = 0;
      if (!by_token) inverse = reciprocal(step_of<DTYPE>(KVZ_FIXED, w, bound));
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i) {
        if (by_token) {
          const uint32_t at = vector + i * bounds.heads;
          if (bounds.inverses != nullptr) {
            const float b = DTYPE == KVZ_FP16 ? bounds.vectors[at] : 1.0f;
            inverse = bounds.inverses[at * 8 + static_cast<uint32_t>(step_bits<DTYPE>(KVZ_FIXED, w, b)) - 1];
          } else {
            const float b = bounds.vectors[at];
            inverse = b > 0.0f ? reciprocal(step_of<DTYPE>(KVZ_FIXED, w, b)) : 0.0f;
          }
        }
        code[i] = zigzag(round_code(widen<DTYPE>(v[i] >> shift) * inverse));
        any |= code[i];
      }
      const int found = bit_length(any);
      if (found == w) break;
      w = found;
    }
    uint32_t plain_sum = 0, delta_sum = 0;
    int32_t before = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int32_t q = unzigzag(code[i]);
      plain_sum += code[i];
      delta_sum += zigzag(q - before);
      before = q;
    }
    const bool delta = delta_sum < plain_sum;
    before = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int32_t q = unzigzag(code[i]);
      z[i] |= (delta ? zigzag(q - before) : code[i]) << shift;
      before = q;
    }
    const int best = rice_parameter(delta ? delta_sum : plain_sum);
    classes |= (static_cast<uint32_t>(best < Tr::kMaxWidth ? best : Tr::kMaxWidth) | (delta ? kRiceDelta : 0u))
               << shift;
  }
  return classes;
}

// As lossless_rice_group, for both groups of a lane.
template <int DTYPE>
KVZ_DEV uint32_t lossless_rice_pair(const Geometry& g, const RicePage& page, uint32_t row, uint32_t column,
                                    uint32_t (&z)[16]) {
  uint32_t head, v[16], classes = 0;
  load_pair(g, pair_address(g, row, column, head), v);
  const uint32_t most = (1u << page.planes) - 1u;
#pragma unroll
  for (int i = 0; i < 16; ++i) z[i] = 0;
#pragma unroll 1
  for (uint32_t a = 0; a < 2; ++a) {
    const uint32_t shift = 16 * a;
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += exponent_of<DTYPE>(v[i] >> shift);
    const uint32_t own = rice_base<DTYPE>(sum), below = page.base > own ? page.base - own : 0;
    const uint32_t number = below < most ? below : most, base = page.base > number ? page.base - number : 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) z[i] |= rice_exponent_code(base, exponent_of<DTYPE>(v[i] >> shift)) << shift;
    classes |= number << shift;
  }
  return classes;
}

// Own bases of a lane's groups, in the halves of the result.
template <int DTYPE>
KVZ_DEV_NOINLINE uint32_t own_bases(const Geometry& g, const RiceLane& at, bool pairs) {
  uint32_t bases = 0, v[16];
  if (pairs) {
    if (!at.exists[0]) return 0;
    uint32_t head, low = 0, high = 0;
    load_pair(g, pair_address(g, at.row, at.column, head), v);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      low += exponent_of<DTYPE>(v[i] & 0xffffu);
      high += exponent_of<DTYPE>(v[i] >> 16);
    }
    return rice_base<DTYPE>(low) | rice_base<DTYPE>(high) << 16;
  }
#pragma unroll 1
  for (uint32_t a = 0; a < 2; ++a) {
    uint32_t inside;
    if (at.exists[a]) bases |= rice_base<DTYPE>(exponents_of<DTYPE>(g, at.row, at.column + a, v, inside)) << (16 * a);
  }
  return bases;
}

// ---- slots
// ----------------------------------------------------------------------------------------------------------

template <int DTYPE>
KVZ_DEV uint32_t code_at(const uint32_t* slot, uint32_t lane, uint32_t a, uint32_t i) {
  if (Traits<DTYPE>::kBits == 16) return slot[i * kWarp + lane] >> (16 * a) & 0xffffu;
  return slot[(16 * a + i) * kWarp + lane];
}
template <int DTYPE>
KVZ_DEV uint32_t class_at(const uint32_t* slot, uint32_t lane, uint32_t a) {
  return slot[(rice_slot_rows(Traits<DTYPE>::kBits) - 1) * kWarp + lane] >> (16 * a) & 0xffffu;
}

// ---- parameters of a page
// -------------------------------------------------------------------------------------------

// The first of the cheapest choices, by one warp: cost_of(number) of `count` choices.
template <class Cost>
KVZ_DEV uint32_t cheapest(uint32_t count, uint32_t lane, Cost cost_of) {
  uint64_t best = ~0ull;
  for (uint32_t n = lane; n < count; n += kWarp) {
    const uint64_t key = cost_of(n) << 8 | n;
    best = key < best ? key : best;
  }
#pragma unroll
  for (uint32_t d = 16; d > 0; d /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, best, d);
    best = other < best ? other : best;
  }
  return static_cast<uint32_t>(best & 255u);
}

// rice_window of quant.inl, by one warp. Few numbers of the histogram are not 0.
KVZ_DEV RicePage rice_window_warp(const uint32_t* histogram, uint32_t most, uint32_t lane) {
  const uint32_t own = lane <= most ? histogram[lane] : 0;
  const uint32_t bins = __ballot_sync(kAllLanes, own != 0), groups = __reduce_add_sync(kAllLanes, own);
  const auto choice = [&](uint32_t n) {
    RicePage page;
    while (n >= most + 2 - (1u << page.planes)) {
      n -= most + 2 - (1u << page.planes);
      ++page.planes;
    }
    page.least = n;
    return page;
  };
  const uint32_t count = 4 * (most + 2) - 15;
  const uint32_t found = cheapest(count, lane, [&](uint32_t n) {
    const RicePage page = choice(n);
    uint64_t sum = static_cast<uint64_t>(page.planes) * groups;
    const uint32_t top = page.least + (1u << page.planes) - 1;
    for (uint32_t left = bins; left != 0; left &= left - 1) {
      const uint32_t k = static_cast<uint32_t>(__ffs(static_cast<int>(left)) - 1);
      const uint32_t cost = k > top ? rice_below(k - top) : k < page.least ? rice_above(page.least - k) : 0;
      sum += static_cast<uint64_t>(histogram[k]) * cost;
    }
    return sum;
  });
  return choice(found);
}

// rice_bases of quant.inl, by one warp.
KVZ_DEV RicePage rice_bases_warp(const uint32_t* histogram, uint64_t groups, uint32_t highest, uint32_t lane) {
  const uint32_t bins = __ballot_sync(kAllLanes, histogram[lane] != 0);  // as many as lanes
  const uint32_t lowers = highest < 7 ? highest + 1 : 8;
  const uint32_t found = cheapest((KVZ_RICE_BASE_PLANES + 1) * lowers, lane, [&](uint32_t n) {
    const uint32_t planes = n / lowers, lower = n - planes * lowers, last = lower + (1u << planes) - 1;
    uint64_t sum = planes * groups;
    for (uint32_t left = bins; left != 0; left &= left - 1) {
      const uint32_t i = static_cast<uint32_t>(__ffs(static_cast<int>(left)) - 1);
      const uint32_t cost = i < lower ? 32 * (lower - i) : i > last ? 11 * (i - last) : 0;
      sum += static_cast<uint64_t>(histogram[i]) * cost;
    }
    return sum;
  });
  RicePage page;
  page.planes = found / lowers;
  page.base = highest - (found - page.planes * lowers);
  return page;
}
static_assert(kRiceBases == kWarp, "a lane a number");

// ---- encode
// ---------------------------------------------------------------------------------------------------------

// Sums over the warps of a round: what comes before this warp, and all together.
KVZ_DEV void scan_round(uint32_t words, uint32_t stream, RiceShared& rice, uint32_t warp, uint32_t warps, uint32_t lane,
                        uint32_t& words_before, uint32_t& stream_before, uint32_t& words_all, uint32_t& stream_all) {
  __syncthreads();
  if (lane == 0) {
    rice.words[warp] = words;
    rice.stream[warp] = stream;
  }
  __syncthreads();
  words_before = stream_before = words_all = stream_all = 0;
  for (uint32_t i = 0; i < warps; ++i) {
    if (i < warp) {
      words_before += rice.words[i];
      stream_before += rice.stream[i];
    }
    words_all += rice.words[i];
    stream_all += rice.stream[i];
  }
}

// Bits of 16 lanes spread to the even places of a word.
KVZ_DEV uint32_t spread_16(uint32_t v) {
  v &= 0xffffu;
  v = (v | v << 8) & 0x00ff00ffu;
  v = (v | v << 4) & 0x0f0f0f0fu;
  v = (v | v << 2) & 0x33333333u;
  return (v | v << 1) & 0x55555555u;
}

// A bit of each group of a strip into a plane, by one warp.
KVZ_DEV void put_plane_bits(uint32_t* plane, uint32_t first, bool aligned, bool bit0, bool bit1, uint32_t lane) {
  const uint32_t even = __ballot_sync(kAllLanes, bit0), odd = __ballot_sync(kAllLanes, bit1);
  if (plane == nullptr || lane > 1) return;
  const uint32_t word = spread_16(even >> (16 * lane)) | spread_16(odd >> (16 * lane)) << 1;
  const uint32_t at = first + 32 * lane;
  if (aligned) {
    plane[at / 32] = word;
  } else if (word != 0) {
    atomicOr(plane + at / 32, word << (at & 31u));
    if ((at & 31u) != 0 && word >> (32 - (at & 31u)) != 0) atomicOr(plane + at / 32 + 1, word >> (32 - (at & 31u)));
  }
}

// The slots of a page.
struct RiceSlots {
  uint32_t* first;
  bool stored;  // each strip has one; else each warp has one
  bool pairs;
};

// Codes of a strip into its slot, by one warp.
template <int DTYPE, int CODING>
KVZ_DEV_NOINLINE void make_codes(const Geometry& g, const Bounds& bounds, const RicePage& page, const RiceLane& at,
                                 bool pairs, uint32_t* slot, uint32_t lane) {
  constexpr bool halves = Traits<DTYPE>::kBits == 16;
  uint32_t z[16], classes = 0;
  if (DTYPE != KVZ_FP32 && pairs) {
#pragma unroll
    for (int i = 0; i < 16; ++i) z[i] = 0;
    if (at.exists[0]) {
      classes = CODING == KVZ_RICE ? rice_pair<DTYPE>(g, bounds, at.row, at.column, z)
                                   : lossless_rice_pair<DTYPE>(g, page, at.row, at.column, z);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) slot[i * kWarp + lane] = z[i];
  } else {
#pragma unroll 1
    for (uint32_t a = 0; a < 2; ++a) {
#pragma unroll
      for (int i = 0; i < 16; ++i) z[i] = 0;
      uint32_t c = 0;
      if (at.exists[a]) {
        c = CODING == KVZ_RICE ? rice_group<DTYPE>(g, bounds, at.row, at.column + a, z)
                               : lossless_rice_group<DTYPE>(g, page, at.row, at.column + a, z);
      }
      classes |= c << (16 * a);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (halves) {
          uint32_t& word = slot[i * kWarp + static_cast<int>(lane)];
          word = a == 0 ? z[i] & 0xffffu : word | z[i] << 16;
        } else {
          slot[(16 * static_cast<int>(a) + i) * static_cast<int>(kWarp) + static_cast<int>(lane)] = z[i];
        }
      }
    }
  }
  slot[(rice_slot_rows(Traits<DTYPE>::kBits) - 1) * kWarp + lane] = classes;
}

// Parameters, raw groups, words and bits of the stream of a lane's groups.
struct RiceSizes {
  uint32_t parameter[2], words[2], unary[2];
  bool raw[2];
};
template <int DTYPE, int CODING>
KVZ_DEV RiceSizes sizes_of(const RicePage& page, const RiceLane& at, const uint32_t* slot, uint32_t lane) {
  constexpr uint32_t bits = Traits<DTYPE>::kBits;
  constexpr uint32_t extra = CODING == KVZ_LOSSLESS_RICE ? Traits<DTYPE>::kFraction + 1 : 0;
  RiceSizes s;
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    uint32_t p = page.least;
    const uint32_t c = class_at<DTYPE>(slot, lane, a);
    if (CODING == KVZ_RICE) {
      const uint32_t best = c & kRiceNumber, most = page.least + (1u << page.planes) - 1u;
      p = best < page.least ? page.least : best > most ? most : best;
    }
    s.parameter[a] = p;
    s.words[a] = 0;
    s.raw[a] = at.exists[a] && CODING == KVZ_RICE && (c & kRiceRaw) != 0;
    s.unary[a] = at.exists[a] && !s.raw[a] ? 16 : 0;
  }
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
#pragma unroll
    for (uint32_t a = 0; a < 2; ++a) {
      if (s.unary[a] != 0) s.unary[a] += code_at<DTYPE>(slot, lane, a, i) >> s.parameter[a];
    }
  }
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    if (!at.exists[a]) continue;
    s.raw[a] = s.raw[a] || 16 * (extra + s.parameter[a]) + s.unary[a] > 16 * bits;
    s.words[a] = s.raw[a] ? bits : extra + s.parameter[a];
    if (s.raw[a]) s.unary[a] = 0;
  }
  return s;
}

// Bytes of the candidate without its prefix. By the whole CTA.
template <int DTYPE, int CODING>
KVZ_DEV_NOINLINE uint64_t rice_candidate(const Geometry& g, const RiceStrips& strips, const Bounds& bounds,
                                         Shared& shared, RiceShared& rice, const RiceSlots& slots) {
  constexpr uint32_t slot_words = rice_slot_bytes(Traits<DTYPE>::kBits) / 4;
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto slot_of = [&](uint32_t strip) { return slots.first + (slots.stored ? strip : warp) * slot_words; };
  if (threadIdx.x < 32) rice.histogram[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    rice.any_raw = 0;
    rice.highest = 0;
  }
  __syncthreads();
  RicePage page;
  if (CODING == KVZ_RICE) {
    for (uint32_t strip = warp; strip < strips.count; strip += warps) {
      const RiceLane at = rice_lane(g, strips, strip, lane);
      uint32_t* slot = slot_of(strip);
      make_codes<DTYPE, CODING>(g, bounds, page, at, slots.pairs, slot, lane);
#pragma unroll
      for (uint32_t a = 0; a < 2; ++a) {
        const uint32_t c = class_at<DTYPE>(slot, lane, a);
        if (at.exists[a] && (c & kRiceRaw) == 0) atomicAdd(&rice.histogram[c & kRiceNumber], 1u);
      }
    }
    __syncthreads();
    page = rice_window_warp(rice.histogram, Traits<DTYPE>::kMaxWidth, lane);
  } else {
    constexpr uint32_t row = (rice_slot_rows(Traits<DTYPE>::kBits) - 1) * kWarp;
    uint32_t highest = 0;
    for (uint32_t strip = warp; strip < strips.count; strip += warps) {
      const RiceLane at = rice_lane(g, strips, strip, lane);
      const uint32_t bases = own_bases<DTYPE>(g, at, slots.pairs);
      slot_of(strip)[row + lane] = bases;
      highest = (bases & 0xffffu) > highest ? bases & 0xffffu : highest;
      highest = bases >> 16 > highest ? bases >> 16 : highest;
    }
    atomicMax(&rice.highest, highest);
    __syncthreads();
    highest = rice.highest;
    for (uint32_t strip = warp; strip < strips.count; strip += warps) {
      const RiceLane at = rice_lane(g, strips, strip, lane);
      const uint32_t bases = slots.stored ? slot_of(strip)[row + lane] : own_bases<DTYPE>(g, at, slots.pairs);
#pragma unroll
      for (uint32_t a = 0; a < 2; ++a) {
        const uint32_t below = highest - (bases >> (16 * a) & 0xffffu);
        if (at.exists[a]) atomicAdd(&rice.histogram[below < kRiceBases ? below : kRiceBases - 1], 1u);
      }
    }
    __syncthreads();
    page = rice_bases_warp(rice.histogram, g.groups, highest, lane);
    uint64_t total = 0;
    for (uint32_t strip = warp; strip < strips.count; strip += warps) {
      const RiceLane at = rice_lane(g, strips, strip, lane);
      uint32_t* slot = slot_of(strip);
      make_codes<DTYPE, CODING>(g, bounds, page, at, slots.pairs, slot, lane);
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i) {
        total += code_at<DTYPE>(slot, lane, 0, i) + code_at<DTYPE>(slot, lane, 1, i);  // 0 where there is no group
      }
    }
    const int k = rice_parameter(static_cast<uint32_t>(sum_over_cta(total, shared) / g.groups));
    page.least = static_cast<uint32_t>(k) < KVZ_RICE_MOST_EXPONENT ? static_cast<uint32_t>(k) : KVZ_RICE_MOST_EXPONENT;
  }
  uint64_t words = 0;
  bool any_raw = false;
  for (uint32_t strip = warp; strip < strips.count; strip += warps) {
    const RiceLane at = rice_lane(g, strips, strip, lane);
    uint32_t* slot = slot_of(strip);
    if (!slots.stored) make_codes<DTYPE, CODING>(g, bounds, page, at, slots.pairs, slot, lane);
    const RiceSizes s = sizes_of<DTYPE, CODING>(page, at, slot, lane);
    any_raw = any_raw || s.raw[0] || s.raw[1];
    words += s.words[0] + s.words[1];
    const uint32_t stream = __reduce_add_sync(kAllLanes, s.unary[0] + s.unary[1]);
    if (lane == 0) words += (stream + 15) / 16;
  }
  if (any_raw) atomicMax(&rice.any_raw, 1u);
  words = sum_over_cta(words, shared);
  page.any_raw = rice.any_raw != 0;
  if (threadIdx.x == 0) rice.page = page;
  __syncthreads();
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  return rice_head_bytes(lossless) + rice_plane_bytes(g.groups) * page.total_planes(lossless) +
         2 * (strips.count + words);
}

// The streams of a strip: into the warp's buffer, then out.
template <int DTYPE>
KVZ_DEV void put_stream(const uint32_t* slot, const RiceSizes& s, uint32_t total, uint32_t* buffer, uint16_t* to,
                        uint32_t lane) {
  for (uint32_t i = lane; i < (total + 31) / 32; i += kWarp) buffer[i] = 0;
  __syncwarp();
  uint32_t at = inclusive_sum(s.unary[0] + s.unary[1], lane) - s.unary[0] - s.unary[1];
  uint32_t index = at / 32, word = 0;
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    if (s.unary[a] == 0) continue;
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
      at += code_at<DTYPE>(slot, lane, a, i) >> s.parameter[a];
      if (at / 32 != index) {
        atomicOr(buffer + index, word);
        word = 0;
        index = at / 32;
      }
      word |= 1u << (at & 31u);
      ++at;
    }
  }
  if (word != 0) atomicOr(buffer + index, word);
  __syncwarp();
  const uint32_t length = (total + 15) / 16;
  if (to != nullptr) {
    for (uint32_t i = lane; i < length; i += kWarp) to[i] = static_cast<uint16_t>(buffer[i / 2] >> (i % 2 * 16));
  }
  __syncwarp();
}

// The words of a group whose codes are v, at `to`.
KVZ_DEV_NOINLINE void put_group(uint32_t (&v)[16], uint32_t count, uint16_t* to) {
  transpose_16(v);
#pragma unroll
  for (uint32_t j = 0; j < 16; ++j) {
    if (j < count) to[j] = static_cast<uint16_t>(v[j]);
    if (j + 16 < count) to[j + 16] = static_cast<uint16_t>(v[j] >> 16);
  }
}

// The words of both groups of a lane, for 16-bit values: one transpose for the halves.
template <int DTYPE, int CODING>
KVZ_DEV void put_pair(const Geometry& g, const RiceLane& at, const RiceSizes& s, bool pairs, const uint32_t* slot,
                      uint16_t* to, uint32_t lane) {
  using Tr = Traits<DTYPE>;
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  constexpr uint32_t low_fraction = ((1u << Tr::kFraction) - 1u) * 0x00010001u,
                     sign = (1u << Tr::kFraction) * 0x00010001u;
  const uint32_t raw = (s.raw[0] ? 0xffffu : 0u) | (s.raw[1] ? 0xffff0000u : 0u);
  uint32_t x[16], v[16];
  if (lossless || raw != 0) {
    if (pairs) {
      uint32_t head;
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = 0;
      if (at.exists[0]) load_pair(g, pair_address(g, at.row, at.column, head), x);
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = 0;
      for (uint32_t a = 0; a < 2; ++a) {
        if (!at.exists[a]) continue;
        for_places(g, at.row, at.column + a, [&](uint32_t i, const uint8_t* from, uint32_t, uint32_t, uint32_t) {
          x[i] |= load_value<DTYPE>(from) << (16 * a);
        });
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    v[i] = slot[i * static_cast<int>(kWarp) + static_cast<int>(lane)];
    if (lossless) {
      // Shifted within the halves; then sign and fraction.
      v[i] = (v[i] << (Tr::kFraction + 1)) & ~((2 * sign - 0x00010001u) & 0xffffffffu);
      v[i] |= (x[i] >> (15 - Tr::kFraction) & sign) | (x[i] & low_fraction);
    }
    if (raw != 0) v[i] = choose(raw, x[i], v[i]);
  }
  transpose_16(v);
#pragma unroll
  for (uint32_t j = 0; j < 16; ++j) {
    if (j < s.words[0]) to[j] = static_cast<uint16_t>(v[j]);
    if (j < s.words[1]) to[s.words[0] + j] = static_cast<uint16_t>(v[j] >> 16);
  }
}

template <int DTYPE, int CODING>
KVZ_DEV_NOINLINE void write_rice(const Geometry& g, const RiceStrips& strips, const Bounds& bounds, RiceShared& rice,
                                 const RiceSlots& slots, uint32_t* buffer, uint8_t* out) {
  using Tr = Traits<DTYPE>;
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  constexpr uint32_t s_bits = lossless ? Tr::kFraction + 1 : 0;
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const RicePage page = rice.page;
  const uint64_t plane_bytes = rice_plane_bytes(g.groups);
  const uint32_t planes = page.total_planes(lossless), plane_words = static_cast<uint32_t>(plane_bytes / 4);
  const bool aligned = g.columns % KVZ_STRIP_GROUPS == 0;
  constexpr uint32_t slot_words = rice_slot_bytes(Tr::kBits) / 4;
  const auto slot_of = [&](uint32_t strip) { return slots.first + (slots.stored ? strip : warp) * slot_words; };
  if (lossless && out != nullptr && threadIdx.x == 0) {
    *reinterpret_cast<uint32_t*>(out) = page.least | page.planes << 8 | (page.any_raw ? 1u : 0u) << 16;
  }
  uint32_t* first_plane = out == nullptr ? nullptr : reinterpret_cast<uint32_t*>(out + rice_head_bytes(lossless));
  if (!aligned && out != nullptr) {
    for (uint32_t i = threadIdx.x; i < planes * plane_words; i += blockDim.x) first_plane[i] = 0;
    __threadfence();
  }
  uint16_t* lengths = out == nullptr ? nullptr : reinterpret_cast<uint16_t*>(first_plane + planes * plane_words);
  // All words come before the first stream: count them.
  uint64_t low_words = 0;
  if (strips.count > warps) {
    for (uint32_t strip = warp; strip < strips.count; strip += warps) {
      const RiceLane at = rice_lane(g, strips, strip, lane);
      uint32_t* slot = slot_of(strip);
      if (!slots.stored) make_codes<DTYPE, CODING>(g, bounds, page, at, slots.pairs, slot, lane);
      const RiceSizes s = sizes_of<DTYPE, CODING>(page, at, slot, lane);
      low_words += s.words[0] + s.words[1];
    }
    // Strips differ in number from warp to warp: meet outside of the loop.
#pragma unroll
    for (uint32_t d = 16; d > 0; d /= 2) low_words += __shfl_xor_sync(kAllLanes, low_words, d);
    __syncthreads();
    if (lane == 0) rice.words[warp] = static_cast<uint32_t>(low_words);
    __syncthreads();
    low_words = 0;
    for (uint32_t i = 0; i < warps; ++i) low_words += rice.words[i];
  }
  uint64_t words_done = 0, stream_done = 0;
  for (uint32_t start = 0; start < strips.count; start += warps) {
    const uint32_t strip = start + warp;
    const RiceLane at = rice_lane(g, strips, strip, lane);
    uint32_t* slot = slot_of(strip < strips.count ? strip : 0);
    if (!slots.stored) make_codes<DTYPE, CODING>(g, bounds, page, at, slots.pairs, slot, lane);
    const RiceSizes s = sizes_of<DTYPE, CODING>(page, at, slot, lane);
    const uint32_t unary = __reduce_add_sync(kAllLanes, s.unary[0] + s.unary[1]);
    const uint32_t inclusive = inclusive_sum(s.words[0] + s.words[1], lane);
    const uint32_t own_words = __shfl_sync(kAllLanes, inclusive, 31), length = (unary + 15) / 16;
    uint32_t words_before, stream_before, words_all, stream_all;
    scan_round(own_words, length, rice, warp, warps, lane, words_before, stream_before, words_all, stream_all);
    if (strips.count <= warps) low_words = words_all;
    if (strip < strips.count) {
      uint32_t* plane = first_plane;
      const uint32_t class0 = class_at<DTYPE>(slot, lane, 0), class1 = class_at<DTYPE>(slot, lane, 1);
      const uint32_t first = at.index - 2 * lane;
      if (page.any_raw) {
        put_plane_bits(plane, first, aligned, s.raw[0], s.raw[1], lane);
        if (plane != nullptr) plane += plane_words;
      }
      if (!lossless) {
        put_plane_bits(plane, first, aligned, !s.raw[0] && (class0 & kRiceDelta) != 0,
                       !s.raw[1] && (class1 & kRiceDelta) != 0, lane);
        if (plane != nullptr) plane += plane_words;
      }
      const uint32_t n0 = s.raw[0] || !at.exists[0] ? 0 : lossless ? class0 : s.parameter[0] - page.least;
      const uint32_t n1 = s.raw[1] || !at.exists[1] ? 0 : lossless ? class1 : s.parameter[1] - page.least;
      for (uint32_t b = 0; b < page.planes; ++b) {
        put_plane_bits(plane, first, aligned, (n0 >> b & 1u) != 0, (n1 >> b & 1u) != 0, lane);
        if (plane != nullptr) plane += plane_words;
      }
      uint16_t* const words = lengths + strips.count;
      if (out != nullptr && lane == 0) lengths[strip] = static_cast<uint16_t>(length);
      put_stream<DTYPE>(slot, s, unary, buffer,
                        out == nullptr ? nullptr : words + low_words + stream_done + stream_before, lane);
      if (out != nullptr) {
        uint16_t* to = words + words_done + words_before + inclusive - s.words[0] - s.words[1];
        if constexpr (Tr::kBits == 16) {
          put_pair<DTYPE, CODING>(g, at, s, slots.pairs, slot, to, lane);
        } else {
#pragma unroll
          for (uint32_t a = 0; a < 2; ++a) {
            if (!at.exists[a]) continue;
            uint32_t v[16];
#pragma unroll
            for (int i = 0; i < 16; ++i)
              v[i] = s.raw[a] ? 0 : code_at<DTYPE>(slot, lane, a, static_cast<uint32_t>(i)) << s_bits;
            if (lossless || s.raw[a]) {
              for_places(g, at.row, at.column + a, [&](uint32_t i, const uint8_t* from, uint32_t, uint32_t, uint32_t) {
                const uint32_t x = load_value<DTYPE>(from);
                const uint32_t sign = x >> (Tr::kBits - 1), fraction = x & ((1u << Tr::kFraction) - 1u);
                v[i] = s.raw[a] ? x : v[i] | sign << Tr::kFraction | fraction;
              });
            }
            put_group(v, s.words[a], to);
            to += s.words[a];
          }
        }
      }
    }
    words_done += words_all;
    stream_done += stream_all;
    if (strips.count - start <= warps) break;
  }
}

template <int DTYPE>
KVZ_DEV void encode_rice_page(const EncodeParams& p, uint8_t* memory, uint32_t page, uint32_t b, uint32_t s,
                              const kvz_segment& segment, const Geometry& g, uint32_t vectors_room,
                              uint32_t slot_count) {
  using Tr = Traits<DTYPE>;
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  RiceShared& rice = *reinterpret_cast<RiceShared*>(memory + kSharedBytes);
  float* vectors = reinterpret_cast<float*>(memory + kRiceSharedBytes);
  const uint32_t thread = threadIdx.x, warp = thread / kWarp, warps = blockDim.x / kWarp;
  uint32_t* streams = reinterpret_cast<uint32_t*>(memory + kRiceSharedBytes + rice_vector_bytes(vectors_room));
  uint32_t* buffer = streams + warp * rice_stream_words(Tr::kBits);
  const uint64_t raw_bytes = static_cast<uint64_t>(g.tokens) * g.channels * g.value_bytes;
  const uint32_t first_value = load_value<DTYPE>(g.base);
  float low, high;
  const RiceStrips strips = rice_strips_of(g);
  bool constant = false;
  if constexpr (DTYPE == KVZ_FP32) {
    constant = page_extremes<DTYPE>(g, shared, first_value, low, high);
  } else {
    constant = pairs_of<DTYPE>(g) ? pair_extremes<DTYPE>(g, strips, shared, first_value, low, high)
                                  : page_extremes<DTYPE>(g, shared, first_value, low, high);
  }
  const bool any_finite = low <= high;
  RiceSlots slots;
  slots.first = streams + warps * rice_stream_words(Tr::kBits);
  slots.stored = strips.count <= slot_count;
  slots.pairs = pairs_of<DTYPE>(g);
  uint32_t largest = 0;  // exponent field
  if (any_finite) largest = largest_exponent<DTYPE>(low, high);

  const bool lossy = segment.coding == KVZ_RICE && segment.bound_kind != KVZ_BOUND_LOSSLESS;
  Bounds bounds = {};
  bounds.heads = segment.heads;
  bounds.missing = no_bound();
  if (lossy && any_finite && !constant) {
    if (segment.bound_kind == KVZ_BOUND_TOKEN_RMS) {
      bounds.page = token_bounds<DTYPE>(g, segment.bound, largest, segment.heads, vectors, shared);
      bounds.steps = KVZ_STEPS_TOKEN;
      bounds.vectors = vectors;
      if (vectors_room <= kRiceInverses && DTYPE != KVZ_FP32) {
        float* inverses = vectors + vectors_room;
        for (uint32_t i = thread; i < g.tokens * segment.heads * 8; i += blockDim.x) {
          const uint32_t bits = bits_of(vectors[i / 8]) & ~((1u << (23 - i % 8)) - 1u);  // 1 to 8 significant ones
          inverses[i] = vectors[i / 8] > 0.0f ? reciprocal(2.0f * float_of(bits)) : 0.0f;
        }
        __syncthreads();
        bounds.inverses = inverses;
      }
    } else if (segment.bound_kind == KVZ_BOUND_CHANNEL_TABLE) {
      bounds.steps = KVZ_STEPS_CHANNEL;
      bounds.channels = reinterpret_cast<const float*>(segment.channel_bounds);
      bounds.page = largest_channel_bound(bounds, g.channels, shared);
    } else {
      bounds.page = page_bound(segment.bound_kind, segment.bound, low, high);
    }
  }

  const uint64_t prefix =
      bounds.steps == KVZ_STEPS_TOKEN ? (static_cast<uint64_t>(g.tokens) * segment.heads + 3) / 4 * 4 : 0;
  uint8_t coding = KVZ_RAW, reason = KVZ_INCOMPRESSIBLE;
  uint64_t size = raw_bytes;
  uint32_t param = 0;
  if (constant) {
    coding = KVZ_CONSTANT;
    reason = KVZ_AS_ASKED;
    size = KVZ_CONSTANT_BYTES;
  } else {
    uint64_t quantised = ~0ull;
    if (bounds.page > 0.0f) {
      quantised = prefix + rice_candidate<DTYPE, KVZ_RICE>(g, strips, bounds, shared, rice, slots);
    }
    uint64_t lossless = ~0ull;
    if (!(bounds.page > 0.0f) || quantised * 8 > raw_bytes * 5) {
      lossless = rice_candidate<DTYPE, KVZ_LOSSLESS_RICE>(g, strips, bounds, shared, rice, slots);
      if (quantised <= lossless && quantised < raw_bytes) {  // its codes gave way to the other ones
        rice_candidate<DTYPE, KVZ_RICE>(g, strips, bounds, shared, rice, slots);
      }
    }
    const bool chosen = quantised <= lossless;
    if ((chosen ? quantised : lossless) < raw_bytes) {
      size = chosen ? quantised : lossless;
      coding = static_cast<uint8_t>(chosen ? KVZ_RICE | bounds.steps : KVZ_LOSSLESS_RICE);
      param = chosen ? rice_param(rice.page) : rice.page.base;
      reason = chosen || !lossy ? KVZ_AS_ASKED : bounds.page > 0.0f ? KVZ_LOSSLESS_SMALLER : KVZ_BOUND_TOO_FINE;
    }
  }
  const bool quantised = (coding & KVZ_CODING_MASK) == KVZ_RICE;
  const kvz_entry entry = make_entry(segment, size, coding, quantised ? bounds.page : 0.0f, param, reason);
  uint8_t* const out = claim_place(p, shared, page, b, s, entry);
  if (out != nullptr) clear_bytes(out, size, static_cast<uint64_t>(units_of(size)) * 16);
  if (coding == KVZ_RAW) {
    if (out != nullptr) copy_page<false>(g, out);
  } else if (coding == KVZ_CONSTANT) {
    if (out != nullptr && thread == 0) *reinterpret_cast<uint32_t*>(out) = first_value;
  } else if (quantised) {
    if (out != nullptr) {
      const uint32_t count = g.tokens * segment.heads;
      for (uint64_t v = thread; v < prefix; v += blockDim.x) {
        const float bound = v < count ? vectors[v] : no_bound();
        out[v] = static_cast<uint8_t>(bound > 0.0f    ? scale_of(bound, bounds.page)
                                      : bound == 0.0f ? static_cast<uint32_t>(KVZ_SCALE_ZERO)
                                                      : 0u);
      }
    }
    write_rice<DTYPE, KVZ_RICE>(g, strips, bounds, rice, slots, buffer, out == nullptr ? nullptr : out + prefix);
  } else {
    write_rice<DTYPE, KVZ_LOSSLESS_RICE>(g, strips, bounds, rice, slots, buffer, out);
  }
}

// Batches whose segments are all raw, opaque, or of the Rice codings.
KVZ_DEV void encode_rice(const EncodeParams& p, uint8_t* memory, uint32_t vectors_room, uint32_t slot_count) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const uint32_t pages = p.num_blocks * p.num_segments;
  if (threadIdx.x == 0) shared.page = atomicAdd(&p.counters->ticket, 1u);
  __syncthreads();
  while (shared.page < pages) {
    const uint32_t page = shared.page, b = page / p.num_segments, s = page - b * p.num_segments;
    const kvz_segment segment = p.segments[s];
    const Geometry g = geometry_of(segment, p.block_ids[b]);
    const bool asked = segment.coding == KVZ_RAW;
    if (asked || segment.dtype == KVZ_OPAQUE) {
      const bool constant = !asked && opaque_is_constant(g, shared);
      encode_bytes(p, shared, page, b, s, segment, g, constant, asked);
    } else if (segment.dtype == KVZ_BF16) {
      encode_rice_page<KVZ_BF16>(p, memory, page, b, s, segment, g, vectors_room, slot_count);
    } else if (segment.dtype == KVZ_FP16) {
      encode_rice_page<KVZ_FP16>(p, memory, page, b, s, segment, g, vectors_room, slot_count);
    } else {
      encode_rice_page<KVZ_FP32>(p, memory, page, b, s, segment, g, vectors_room, slot_count);
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.page = atomicAdd(&p.counters->ticket, 1u);
    __syncthreads();
  }
  finish_encode(p, shared.last);
}

// ---- validation
// -----------------------------------------------------------------------------------------------------

KVZ_DEV_NOINLINE bool rice_is_valid(const kvz_segment& segment, const kvz_entry& entry, const Geometry& g,
                                    const uint8_t* data, uint64_t size, uint32_t lane) {
  const uint32_t coding = entry.coding & KVZ_CODING_MASK, steps = entry.coding & KVZ_STEPS_MASK;
  const bool lossless = coding == KVZ_LOSSLESS_RICE;
  if (entry.coding >= 0x40 || steps == KVZ_STEPS_MASK || segment.dtype == KVZ_OPAQUE) return false;
  if (lossless && steps != KVZ_STEPS_PAGE) return false;
  if (!lossless && !(entry.bound >= kLeastBound && entry.bound <= kLargestBound)) return false;
  if (steps == KVZ_STEPS_CHANNEL && segment.channel_bounds == 0) return false;
  const uint32_t bits = segment.dtype == KVZ_FP32 ? 32 : 16;
  const uint32_t extra = !lossless                   ? 0
                         : segment.dtype == KVZ_BF16 ? Traits<KVZ_BF16>::kFraction + 1
                         : segment.dtype == KVZ_FP16 ? Traits<KVZ_FP16>::kFraction + 1
                                                     : Traits<KVZ_FP32>::kFraction + 1;
  bool bad = false;
  if (steps == KVZ_STEPS_TOKEN) {
    const uint64_t vectors = static_cast<uint64_t>(g.tokens) * segment.heads, prefix = (vectors + 3) / 4 * 4;
    if (size < prefix || bits_of(entry.bound) << (32 - KVZ_SCALE_SHIFT) != 0) return false;
    const uint32_t most = scale_of(kLeastBound, entry.bound);
    for (uint64_t i = lane; i < prefix; i += kWarp) {
      const uint32_t c = data[i];
      bad = (i < vectors ? c > most && c != KVZ_SCALE_ZERO : c != 0) || bad;
    }
    data += prefix;
    size -= prefix;
  }
  const uint64_t start = rice_head_bytes(lossless);
  if (size < start) return false;
  RicePage page = rice_of_param(entry.param);
  if (lossless) {
    if (data[2] > 1 || data[3] != 0) return false;
    page = {data[0], data[1], entry.param, data[2] != 0};
  }
  const uint32_t most = lossless                    ? static_cast<uint32_t>(KVZ_RICE_MOST_EXPONENT)
                        : segment.dtype == KVZ_FP32 ? 24u
                                                    : 14u;
  if (page.planes > (lossless ? KVZ_RICE_BASE_PLANES : KVZ_RICE_PLANES)) return false;
  if (page.least + (lossless ? 0 : (1u << page.planes) - 1u) > most) return false;
  const uint32_t planes = page.total_planes(lossless), plane_words = (g.groups + 31) / 32;
  const RiceStrips strips = rice_strips_of(g);
  const uint64_t head = start + static_cast<uint64_t>(planes) * plane_words * 4 + 2ull * strips.count;
  if (size < head || (size - head) % 2 != 0) return false;
  const uint32_t* first = reinterpret_cast<const uint32_t*>(data + start);
  const uint32_t* numbers = first + (planes - page.planes) * plane_words;
  const uint16_t* lengths = reinterpret_cast<const uint16_t*>(first + planes * plane_words);
  if (g.groups % 32 != 0 && lane < planes) {
    bad = bad || first[(lane + 1) * plane_words - 1] >> (g.groups % 32) != 0;
  }
  uint64_t words = 0;
  for (uint32_t w = lane; w < plane_words; w += kWarp) {
    const uint32_t inside = g.groups - 32 * w < 32 ? (1u << g.groups % 32) - 1u : ~0u;
    const uint32_t raw = page.any_raw ? first[w] : 0, coded = inside & ~raw;
    words += static_cast<uint64_t>(bits * static_cast<uint32_t>(__popc(raw)) +
                                   (extra + page.least) * static_cast<uint32_t>(__popc(coded)));
    if (lossless) continue;
    for (uint32_t b = 0; b < page.planes; ++b) {
      words += static_cast<uint64_t>(static_cast<uint32_t>(__popc(numbers[b * plane_words + w] & coded))) << b;
    }
  }
  uint64_t quotients = 0;
  for (uint32_t i = lane; i < strips.count; i += kWarp) {
    const uint32_t length = lengths[i];
    bad = bad || length > KVZ_STRIP_GROUPS * bits;
    quotients += length;
  }
#pragma unroll
  for (uint32_t d = 16; d > 0; d /= 2) {
    words += __shfl_xor_sync(kAllLanes, words, d);
    quotients += __shfl_xor_sync(kAllLanes, quotients, d);
  }
  bad = bad || size != head + 2 * (words + quotients);
  if (__any_sync(kAllLanes, bad)) return false;

  // Ones of each strip's stream: 16 for each group that is not raw. As many lanes look at a strip as there are for it,
  // so that few loads wait for others.
  uint32_t log_lanes = 5;
  while (log_lanes > 0 && strips.count << log_lanes > kWarp) --log_lanes;
  const uint32_t lanes = 1u << log_lanes, part = lane & (lanes - 1);
  const uint16_t* const streams = lengths + strips.count + words;
  uint32_t before = 0;
  for (uint32_t base = 0; base < strips.count; base += kWarp >> log_lanes) {
    const uint32_t i = base + (lane >> log_lanes);
    const bool exists = i < strips.count;
    const uint32_t length = exists ? lengths[i] : 0;
    const uint32_t until = before + inclusive_sum(part == 0 ? length : 0u, lane);
    before = __shfl_sync(kAllLanes, until, 31);
    const uint64_t from = reinterpret_cast<uint64_t>(streams + (until - length));
    // Pairs of its words: the segment is padded to 16 bytes.
    const uint32_t* const pairs = reinterpret_cast<const uint32_t*>(from & ~3ull);
    const uint32_t skipped = from >> 1 & 1u, halves = length == 0 ? 0 : length + skipped, count = (halves + 1) / 2;
    uint32_t balance = 0;
#pragma unroll 4
    for (uint32_t k = part; k < count; k += lanes) {
      uint32_t pair = pairs[k];
      if (k == 0 && skipped != 0) pair &= 0xffff0000u;
      if (k + 1 == count && halves % 2 != 0) pair &= 0xffffu;
      if (k + 1 == count) bad = bad || (halves % 2 != 0 ? pair : pair >> 16) == 0;
      balance += static_cast<uint32_t>(__popc(pair));
    }
    if (exists && part == 0) {
      const uint32_t row = i / strips.per_row, column = (i - row * strips.per_row) * KVZ_STRIP_GROUPS;
      const uint32_t here = g.columns - column < KVZ_STRIP_GROUPS ? g.columns - column : KVZ_STRIP_GROUPS;
      balance -= 16 * here;
      if (page.any_raw) {
        for (uint32_t group = row * g.columns + column, k = 0; k < here; ++k, ++group) {
          balance += 16 * (first[group / 32] >> (group % 32) & 1u);
        }
      }
    }
    for (uint32_t d = lanes / 2; d > 0; d /= 2) balance += __shfl_xor_sync(kAllLanes, balance, static_cast<int>(d));
    bad = bad || balance != 0;
  }
  return !__any_sync(kAllLanes, bad);
}

// ---- decode
// ---------------------------------------------------------------------------------------------------------

// Position of the n-th one of a word, n from 1.
KVZ_DEV uint32_t select_bit(uint32_t word, uint32_t n) {
  uint32_t at = 0;
#pragma unroll
  for (uint32_t half = 16; half > 0; half /= 2) {
    const uint32_t below = static_cast<uint32_t>(__popc(word & ((1u << half) - 1u)));
    if (n > below) {
      n -= below;
      word >>= half;
      at += half;
    } else {
      word &= (1u << half) - 1u;
    }
  }
  return at;
}

// Bit after the `ones`-th one of a strip's stream, for each lane. By one warp.
KVZ_DEV uint32_t bit_behind(const uint32_t* stream, uint32_t length, uint32_t ones, uint32_t lane) {
  const uint32_t words = (length + 1) / 2, share = (words + kWarp - 1) / kWarp;
  uint32_t own = 0;
  for (uint32_t i = lane * share; i < words && i < (lane + 1) * share; ++i) {
    own += static_cast<uint32_t>(__popc(stream[i]));
  }
  const uint32_t before = inclusive_sum(own, lane) - own;
  uint32_t at = 0;  // the last lane with fewer than `ones` before its words
#pragma unroll
  for (uint32_t d = 16; d > 0; d /= 2) {
    const uint32_t there = __shfl_sync(kAllLanes, before, static_cast<int>(at + d));
    if (there < ones) at += d;
  }
  uint32_t seen = __shfl_sync(kAllLanes, before, static_cast<int>(at));
  if (ones == 0) return 0;
  uint32_t index = at * share;
  while (index < words) {
    const uint32_t count = static_cast<uint32_t>(__popc(stream[index]));
    if (seen + count >= ones) break;
    seen += count;
    ++index;
  }
  return index < words ? index * 32 + select_bit(stream[index], ones - seen) + 1 : words * 32;
}

template <int DTYPE, int CODING>
KVZ_DEV_NOINLINE void decode_rice_page(uint8_t* memory, const kvz_segment& segment, const kvz_entry& entry,
                                       const Geometry& g, const uint8_t* from) {
  using Tr = Traits<DTYPE>;
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  constexpr uint32_t bits = Tr::kBits, s_bits = lossless ? Tr::kFraction + 1 : 0;
  RiceShared& rice = *reinterpret_cast<RiceShared*>(memory + kSharedBytes);
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  uint32_t* buffer = reinterpret_cast<uint32_t*>(memory + kRiceSharedBytes) + warp * rice_stream_words(bits);
  Bounds bounds = {};
  bounds.steps = entry.coding & KVZ_STEPS_MASK;
  bounds.page = entry.bound;
  bounds.heads = segment.heads;
  bounds.scales = from;
  bounds.channels = reinterpret_cast<const float*>(segment.channel_bounds);
  const uint8_t* const end = from + entry.size;
  if (bounds.steps == KVZ_STEPS_TOKEN) from += (static_cast<uint64_t>(g.tokens) * segment.heads + 3) / 4 * 4;
  RicePage page = rice_of_param(entry.param);
  if (lossless) page = {from[0], from[1], entry.param, from[2] != 0};
  const RiceStrips strips = rice_strips_of(g);
  const uint32_t planes = page.total_planes(lossless), plane_words = (g.groups + 31) / 32;
  const uint32_t* first = reinterpret_cast<const uint32_t*>(from + rice_head_bytes(lossless));
  const uint16_t* lengths = reinterpret_cast<const uint16_t*>(first + planes * plane_words);
  const uint16_t* words = lengths + strips.count;
  // The streams end where the segment does.
  uint32_t all = 0;
  for (uint32_t i = lane; i < strips.count; i += kWarp) all += lengths[i];
  const uint16_t* streams = reinterpret_cast<const uint16_t*>(end) - __reduce_add_sync(kAllLanes, all);
  const uint32_t run = g.group_tokens == 1 ? 16 : g.group_tokens;
  const bool alike = bounds.steps != KVZ_STEPS_TOKEN && g.group_tokens == 16;
  const bool pairs = pairs_of<DTYPE>(g);

  for (uint32_t start = 0; start < strips.count; start += warps) {
    const uint32_t strip = start + warp;
    const RiceLane at = rice_lane(g, strips, strip, lane);
    uint32_t number[2] = {0, 0}, count[2] = {0, 0}, parameter[2] = {0, 0};
    bool raw[2] = {false, false}, delta[2] = {false, false};
#pragma unroll
    for (uint32_t a = 0; a < 2; ++a) {
      if (!at.exists[a]) continue;
      const uint32_t group = at.index + a, shift = group % 32;
      const uint32_t* plane = first + group / 32;
      if (page.any_raw) {
        raw[a] = (*plane >> shift & 1u) != 0;
        plane += plane_words;
      }
      if (!lossless) {
        delta[a] = (*plane >> shift & 1u) != 0;
        plane += plane_words;
      }
      for (uint32_t b = 0; b < page.planes; ++b) {
        number[a] |= (*plane >> shift & 1u) << b;
        plane += plane_words;
      }
      parameter[a] = page.least + (lossless ? 0 : number[a]);
      count[a] = raw[a] ? bits : s_bits + parameter[a];
    }
    const uint32_t inclusive = inclusive_sum(count[0] + count[1], lane);
    const uint32_t own_words = __shfl_sync(kAllLanes, inclusive, 31);
    const uint32_t length = strip < strips.count ? lengths[strip] : 0;
    uint32_t words_before, stream_before, words_all, stream_all;
    scan_round(own_words, length, rice, warp, warps, lane, words_before, stream_before, words_all, stream_all);
    if (strip < strips.count) {
      const uint16_t* stream = streams + stream_before;
      for (uint32_t i = lane; i < (length + 1) / 2; i += kWarp) {
        buffer[i] = stream[2 * i] | (2 * i + 1 < length ? static_cast<uint32_t>(stream[2 * i + 1]) << 16 : 0u);
      }
      __syncwarp();
      const uint32_t coded = (at.exists[0] && !raw[0] ? 16u : 0u) + (at.exists[1] && !raw[1] ? 16u : 0u);
      uint32_t position = bit_behind(buffer, length, inclusive_sum(coded, lane) - coded, lane);
      uint32_t index = position / 32;
      uint32_t rest = coded != 0 ? buffer[index] & ~((1u << position % 32) - 1u) : 0;
      uint32_t head = 0, both[16];
      uint8_t* const pair = pairs ? pair_address(g, at.row, at.exists[0] ? at.column : 0, head) : nullptr;
      const uint16_t* plane = words + words_before + inclusive - count[0] - count[1];
      uint32_t halves[16];
      if (bits == 16) {
#pragma unroll
        for (uint32_t j = 0; j < 16; ++j) {
          uint32_t x = 0;
          if (j < count[0]) x = plane[j];
          if (j < count[1]) x |= static_cast<uint32_t>(plane[count[0] + j]) << 16;
          halves[j] = x;
        }
        transpose_16(halves);
      }
#pragma unroll
      for (uint32_t a = 0; a < 2; ++a) {
        if (!at.exists[a]) continue;
        uint32_t v[16];
        if (bits == 16) {
#pragma unroll
          for (int i = 0; i < 16; ++i) v[i] = halves[i] >> (16 * a) & 0xffffu;
        } else {
#pragma unroll
          for (uint32_t j = 0; j < 16; ++j) {
            uint32_t x = 0;
            if (j < count[a]) x = plane[j];
            if (j + 16 < count[a]) x |= static_cast<uint32_t>(plane[j + 16]) << 16;
            v[j] = x;
          }
          plane += count[a];
          transpose_16(v);
        }
        if (!raw[a]) {
          uint32_t before = 0, any = 0;
          const uint32_t base = page.base > number[a] ? page.base - number[a] : 0;
#pragma unroll
          for (uint32_t i = 0; i < 16; ++i) {
            while (rest == 0) rest = buffer[++index];  // validated: there are as many ones as values
            const uint32_t one = index * 32 + static_cast<uint32_t>(__ffs(static_cast<int>(rest)) - 1);
            rest &= rest - 1;
            const uint32_t z = (one - position) << parameter[a] | v[i] >> s_bits;
            position = one + 1;
            if (lossless) {
              const uint32_t e = rice_exponent(base, z) & ((1u << Tr::kExponentBits) - 1u);
              const uint32_t sign = v[i] >> Tr::kFraction & 1u, fraction = v[i] & ((1u << Tr::kFraction) - 1u);
              v[i] = sign << (bits - 1) | e << Tr::kFraction | fraction;
            } else {
              uint32_t q = static_cast<uint32_t>(unzigzag(z));
              if (delta[a] && (i & (run - 1)) != 0) q += before;
              before = q;
              any |= zigzag(static_cast<int32_t>(q));
              v[i] = q;
            }
          }
          if (!lossless && pairs) {
            const int w = bit_length(any);
            float step = 0.0f;
#pragma unroll
            for (uint32_t i = 0; i < 16; ++i) {
              if (i == 0 || !alike) {
                step = step_of<DTYPE>(KVZ_FIXED, w, bound_at(bounds, at.row * 16 + i, head, at.column + a));
              }
              v[i] = Tr::from_float(static_cast<float>(static_cast<int32_t>(v[i])) * step);
            }
          } else if (!lossless) {
            const int w = bit_length(any);
            float step = 0.0f;
            for_places(g, at.row, at.column + a,
                       [&](uint32_t i, uint8_t*, uint32_t token, uint32_t in_head, uint32_t channel) {
                         if (i == 0 || !alike) {
                           step = step_of<DTYPE>(KVZ_FIXED, w, bound_at(bounds, token, in_head, channel));
                         }
                         v[i] = Tr::from_float(static_cast<float>(static_cast<int32_t>(v[i])) * step);
                       });
          }
        }
        if (pairs) {
#pragma unroll
          for (int i = 0; i < 16; ++i) both[i] = a == 0 ? v[i] : both[i] | v[i] << 16;
        } else {
          for_places(g, at.row, at.column + a, [&](uint32_t i, uint8_t* to, uint32_t, uint32_t, uint32_t) {
            *reinterpret_cast<typename Tr::word*>(to) = static_cast<typename Tr::word>(v[i]);
          });
        }
      }
      if (pairs && at.exists[0]) {
#pragma unroll
        for (int i = 0; i < 16; ++i) store_page(pair + i * g.token_stride, both[i]);
      }
      __syncwarp();
    }
    words += words_all;
    streams += stream_all;
    if (strips.count - start <= warps) break;
  }
}

template <int DTYPE>
KVZ_DEV void decode_any_page(uint8_t* memory, const kvz_segment& segment, const kvz_entry& entry, const Geometry& g,
                             const uint8_t* from) {
  if ((entry.coding & KVZ_CODING_MASK) == KVZ_RICE) {
    decode_rice_page<DTYPE, KVZ_RICE>(memory, segment, entry, g, from);
  } else if (entry.coding == KVZ_LOSSLESS_RICE) {
    decode_rice_page<DTYPE, KVZ_LOSSLESS_RICE>(memory, segment, entry, g, from);
  } else {
    decode_page<DTYPE>(*reinterpret_cast<Shared*>(memory), segment, entry, g, from);
  }
}

// Pages of all codings.
KVZ_DEV void decode_rice(const DecodeParams& p, uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const uint32_t pages = p.num_blocks * p.num_segments;
  for (uint32_t page = blockIdx.x; page < pages; page += gridDim.x) {
    const uint32_t b = page / p.num_segments, s = page - b * p.num_segments;
    if (!block_is_refused(p, b)) {
      const kvz_entry entry = p.table[page];
      const kvz_segment segment = p.segments[s];
      const Geometry g = geometry_of(segment, p.block_ids[b]);
      const uint8_t* from = reinterpret_cast<const uint8_t*>(p.payloads[b]) + static_cast<uint64_t>(entry.offset) * 16;
      if (entry.coding == KVZ_RAW) {
        copy_page<true>(g, const_cast<uint8_t*>(from));
      } else if (entry.coding == KVZ_CONSTANT) {
        fill_page(g, *reinterpret_cast<const uint32_t*>(from));
      } else if (segment.dtype == KVZ_BF16) {
        decode_any_page<KVZ_BF16>(memory, segment, entry, g, from);
      } else if (segment.dtype == KVZ_FP16) {
        decode_any_page<KVZ_FP16>(memory, segment, entry, g, from);
      } else {
        decode_any_page<KVZ_FP32>(memory, segment, entry, g, from);
      }
      __syncthreads();
    }
    if (pages - page <= gridDim.x) break;
  }
  finish_decode(p, shared);
}

}  // namespace gpu
}  // namespace kvz
