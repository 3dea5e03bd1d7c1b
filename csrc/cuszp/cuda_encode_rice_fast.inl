// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The Rice codings' encoder for the batches of cuda_rice_fast.inl. The codes of a page stay in registers from the first
// pass to the last; the quotients' bits are set where they belong in the segment, which goes out in vectors.
#pragma once

#include "cuda_rice_fast.inl"

namespace kvz {
namespace gpu {

// Shared memory: Shared, RiceFastShared, the tables of the vectors, the segment. Vectors of 16 tokens of a head have 16
// bounds, and five rows of inverses of the steps of 1 to 5 significant bits: more a token's bound has not. The rows are
// padded, so that those of different widths lie in different banks.
constexpr uint32_t kRiceTokenRows = 5, kRiceTokenRow = 20;
KVZ_HD constexpr uint32_t rice_fast_table_bytes(uint32_t vectors) {
  return vectors * (16 + kRiceTokenRows * kRiceTokenRow) * 4;
}
constexpr uint32_t rice_fast_bytes(uint32_t vectors, uint32_t strips) {
  return kRiceFastBytes + rice_fast_table_bytes(vectors) + strips * 2048 + 16;
}

// ---- a lane's strip
// ---------------------------------------------------------------------------------------------------------

struct RiceStrip {
  RiceLane at;
  uint32_t x[16];      // values, then codes
  uint32_t low, high;  // extremes of the values
  uint32_t classes;    // as those of rice_pair, in the halves; then with the parameter that is used
  uint32_t sums;       // of the codes, modulo 2^16
  uint32_t unary;      // bits of the stream, in the halves
  uint32_t before;     // words << 16 | bits of the stream of the strip up to and including this lane
};

constexpr uint32_t kRiceWide = 256;  // in a class: `sums` may have overflowed

KVZ_DEV void load_strip(const Geometry& g, const RiceLane& at, uint32_t (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = 0;
  if (!at.exists[0]) return;
  uint32_t head;
  const uint8_t* const from = pair_address(g, at.row, at.column, head);
  const int32_t stride = static_cast<int32_t>(g.token_stride);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = *reinterpret_cast<const uint32_t*>(row_of(from, stride, i));
}

// Extremes of the finite values of a lane's groups, and whether one has not the page's first bit pattern.
template <int DTYPE>
KVZ_DEV void strip_extremes(RiceStrip& s, uint32_t first_2, int32_t& low, int32_t& high, uint32_t& differs) {
  s.low = s.high = s.x[0];
#pragma unroll
  for (int i = 1; i < 16; ++i) {
    s.low = min2<DTYPE>(s.low, s.x[i]);
    s.high = max2<DTYPE>(s.high, s.x[i]);
  }
  if (!s.at.exists[0]) return;
  const auto see = [&](float least_value, float most_value) {
    const int32_t a = key_32(least_value), b = key_32(most_value);
    low = a < low ? a : low;
    high = b > high ? b : high;
  };
  if (nonfinite_2<DTYPE>(s.low, s.high) == 0) {
    see(widen<DTYPE>(s.low), widen<DTYPE>(s.high));
    see(widen_high<DTYPE>(s.low), widen_high<DTYPE>(s.high));
    differs |= (s.low ^ s.high) | (s.low ^ first_2);  // min and max tell the zeros apart
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    differs |= s.x[i] ^ first_2;
    const uint32_t bad = nonfinite_2<DTYPE>(s.x[i], s.x[i]);
    if ((bad & 0x8000u) == 0) see(widen<DTYPE>(s.x[i]), widen<DTYPE>(s.x[i]));
    if ((bad & 0x80000000u) == 0) see(widen_high<DTYPE>(s.x[i]), widen_high<DTYPE>(s.x[i]));
  }
}

// A strip into shared memory, for the sums of its tokens' squares, without what is not finite; and these, about.
template <int DTYPE>
KVZ_DEV void strip_squares(const RiceStrip& strip, uint8_t* to, uint32_t lane, float* sums) {
  uint32_t* const column = reinterpret_cast<uint32_t*>(to) + lane;
#pragma unroll
  for (int i = 0; i < 16; ++i) column[i * 32] = strip.x[i];
  if (nonfinite_2<DTYPE>(strip.low, strip.high) != 0) {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) column[i * 32] &= ~sign_fill_2(nonfinite_2<DTYPE>(column[i * 32], column[i * 32]));
  }
  __syncwarp();
  const uint8_t* const rows = to + (lane >> 2) * 128;
  uint4 upper[2], lower[2];
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    upper[i] = *reinterpret_cast<const uint4*>(rows + chunk_of(lane, i) * 16);
    lower[i] = *reinterpret_cast<const uint4*>(rows + chunk_of(lane, i) * 16 + 8 * 128);
  }
  about_squares<DTYPE>(upper, lower, lane, sums);
}

// ---- bounds of tokens
// ---------------------------------------------------------------------------------------------------------

struct TokenTables {
  uint32_t* bounds;  // [vector][16]: bound_word
  float* inverses;   // [vector][kRiceTokenRows][kRiceTokenRow]
  bool any_unusable;
};

// Is one of a token's values not zero? By one thread; only for sums that are zero.
template <int DTYPE>
KVZ_DEV bool any_magnitude(const Geometry& g, uint32_t token, uint32_t head) {
  const uint8_t* const from = g.base + token * g.token_stride + head * g.head_stride;
  uint32_t any = 0;
  for (uint32_t d = 0; d < g.head_dim; ++d) {
    const uint32_t v = load_value<DTYPE>(from + d * 2);
    any |= is_finite<DTYPE>(v) ? v & 0x7fffu : 0u;
  }
  return any != 0;
}

// Bounds of all vectors, from the sums of the strips, which are those of strip_squares, and the inverses of their
// steps. Returns the largest bound. By the whole CTA.
template <int DTYPE>
KVZ_DEV float fast_token_bounds(const Geometry& g, double r, float scale, TokenTables& tables, RiceFastShared& fast,
                                const uint8_t* values) {
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const uint32_t heads = g.channels / g.head_dim, count = g.tokens * heads, blocks = g.head_dim / KVZ_STRIP_GROUPS;
  const float factor = about_factor(r, g.head_dim), own = mantissa_inverse(lane);
  uint32_t largest = 0, unusable = 0;  // bits of non-negative numbers order like them
#pragma unroll 1
  for (uint32_t first = warp * kWarp; first < count; first += blockDim.x) {
    const uint32_t v = first + lane, vector = v < count ? v / 16 : 0, t = v % 16;
    const bool exists = v < count;
    float (*const sums)[16] = fast.sums + vector * blocks;
    const auto add_up = [&]() {
      float sum = sums[0][t];
      if (blocks >= 2) sum = sum + sums[1][t];
      if (blocks == 4) sum = sum + (sums[2][t] + sums[3][t]);
      return sum;
    };
    const auto any = [&]() { return any_magnitude<DTYPE>(g, vector / heads * 16 + t, vector % heads); };
    float bound, sum = exists ? add_up() : 0.0f;  // another warp may be writing sums of the first vector
    const bool sure = token_bound_about(factor, sum, scale, bound) || !exists;
    const bool zero = exists && sum == 0.0f && !any();
    // Rare: a bound near the next one.
#pragma unroll 1
    for (uint32_t doubts = __ballot_sync(kAllLanes, !sure && !zero); doubts != 0; doubts &= doubts - 1) {
      const uint32_t source = static_cast<uint32_t>(__ffs(static_cast<int>(doubts)) - 1), u = first + source;
      for (uint32_t i = 0; i < blocks; ++i) {
        const float s = square_sum_64<DTYPE>(values + (u / 16 * blocks + i) * kStripBytes + u % 16 * 128, scale, lane);
        if (lane == source) sums[i][t] = s;
      }
    }
    if (!exists) continue;
    if (zero) bound = 0.0f;
    if (!sure && !zero) {
      sum = add_up();
      bound = token_bound_fast(r, token_factor(r, scale), sum, g.head_dim, scale);
    }
    largest = bits_of(bound) > largest ? bits_of(bound) : largest;
    if (bound == 0.0f && !zero && (sum > 0.0f || any())) {
      bound = no_bound();
      unusable = 1;
    }
    tables.bounds[v] = bound_word(bound);
  }
  largest = static_cast<uint32_t>(__reduce_max_sync(kAllLanes, static_cast<int32_t>(largest)));
  if (lane == 0) fast.totals[warp] = largest;
  __syncthreads();
  largest =
      static_cast<uint32_t>(__reduce_max_sync(kAllLanes, static_cast<int32_t>(lane < warps ? fast.totals[lane] : 0u)));
  const float page = float_of(largest);
#pragma unroll 1
  for (uint32_t first = warp * kWarp; first < count; first += blockDim.x) {
    const uint32_t v = first + lane;
    const bool exists = v < count;
    float b = exists ? bound_of_word(tables.bounds[v]) : 0.0f;
    if (b > 0.0f && scale_of(b, page) > KVZ_SCALE_LARGEST) {
      b = no_bound();
      unusable = 1;
      tables.bounds[v] = kNoBound;
    }
    float* const rows = tables.inverses + v / 16 * (kRiceTokenRows * kRiceTokenRow) + v % 16;
#pragma unroll
    for (uint32_t n = 1; n <= kRiceTokenRows; ++n) {
      const float inverse = token_inverse(own, b, static_cast<int>(n));
      if (exists) rows[(n - 1) * kRiceTokenRow] = inverse;
    }
  }
  unusable = __any_sync(kAllLanes, unusable != 0) ? 1u : 0u;
  if (lane == 0) fast.flags[warp] = unusable;
  __syncthreads();
  tables.any_unusable = __any_sync(kAllLanes, lane < warps && fast.flags[lane] != 0);
  return page;
}

// ---- codes
// ---------------------------------------------------------------------------------------------------------

// Codes of both groups with a bias: 2^15 + q in the halves. Adding 1.5 x 2^23 + 2^15 rounds as round_code.
KVZ_DEV uint32_t biased_codes(float low, float high) {
  constexpr float kMagic = 12582912.0f + 32768.0f;
  return low_half(bits_of(low + kMagic), bits_of(high + kMagic));
}

// Zigzag of both halves, of codes with the bias.
KVZ_DEV uint32_t zigzag_biased_2(uint32_t u) { return ((u << 1) & 0xfffefffeu) ^ ~sign_fill_2(u); }

// Codes at a bound for each group: the extremes of a group tell its width. Returns which halves stay raw.
template <int DTYPE>
KVZ_DEV uint32_t codes_of_groups(const RiceStrip& s, const Bounds& bounds, uint32_t (&u)[16], bool& wide) {
  float inverse[2];
  uint32_t raw = 0;
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    const float bound = bound_at(bounds, 0, 0, s.at.column + a);
    const float low = a == 0 ? widen<DTYPE>(s.low) : widen_high<DTYPE>(s.low);
    const float high = a == 0 ? widen<DTYPE>(s.high) : widen_high<DTYPE>(s.high);
    const uint32_t exponent = bits_of(bound) & 0x7f800000u;
    inverse[a] = exponent == 0 ? 0.0f : float_of((253u << 23) - exponent);
    if (!quantisable<DTYPE>(low, high, bound, inverse[a])) {
      raw |= 0xffffu << (16 * a);
      inverse[a] = 0.0f;
      continue;
    }
    for (int w = bit_length(widest_code(low, high, inverse[a]));;) {
      inverse[a] = reciprocal(step_of<DTYPE>(KVZ_FIXED, w, bound));
      const int found = bit_length(widest_code(low, high, inverse[a]));
      wide = wide || w > 11;
      if (found == w) break;
      w = found;
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t x = raw == 0 ? s.x[i] : s.x[i] & ~raw;
    u[i] = biased_codes(widen<DTYPE>(x) * inverse[0], widen_high<DTYPE>(x) * inverse[1]);
  }
  return raw;
}

// Row of the inverses for a width, and the entry itself.
template <int DTYPE>
KVZ_DEV uint32_t token_row(int w) {
  const int n = Traits<DTYPE>::kSignificant + 1 - w;
  return static_cast<uint32_t>(n < 1 ? 0 : n > static_cast<int>(kRiceTokenRows) ? kRiceTokenRows - 1 : n - 1);
}

// Codes at a bound for each token. Returns which halves stay raw.
template <int DTYPE>
KVZ_DEV uint32_t codes_of_tokens(const RiceStrip& s, const TokenTables& tables, uint32_t vector, float largest,
                                 uint32_t (&u)[16], bool& wide) {
  using Tr = Traits<DTYPE>;
  const float most = Tr::to_float(Tr::kMaxFinite), room = static_cast<float>(Tr::kMaxCode) + 0.5f;
  const uint32_t* const bounds = tables.bounds + vector * 16;
  const float* const inverses = tables.inverses + vector * (kRiceTokenRows * kRiceTokenRow);
  // At the power-of-two steps, where the products are exact.
  float low[2], high[2];
  if (DTYPE == KVZ_BF16) {
    extremes_of_powers(s.x, bounds, low, high);
  } else {
    low[0] = low[1] = float_of(0x7f800000u);
    high[0] = high[1] = float_of(0xff800000u);
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
      const float t[2] = {widen<DTYPE>(s.x[i]) * inverses[i], widen_high<DTYPE>(s.x[i]) * inverses[i]};
#pragma unroll
      for (uint32_t a = 0; a < 2; ++a) {
        low[a] = t[a] < low[a] ? t[a] : low[a];
        high[a] = t[a] > high[a] ? t[a] : high[a];
      }
    }
  }
  // The largest magnitude with the largest bound says that no value has to stay raw; else each is looked at.
  uint32_t raw = 0;
  int width[2];
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    const float least_value = a == 0 ? widen<DTYPE>(s.low) : widen_high<DTYPE>(s.low);
    const float most_value = a == 0 ? widen<DTYPE>(s.high) : widen_high<DTYPE>(s.high);
    const float magnitude = -least_value > most_value ? -least_value : most_value;
    const bool fits = -low[a] < room && high[a] < room;
    if (tables.any_unusable || !(magnitude + largest <= most) || !fits) {
      bool bad = !fits;
#pragma unroll 1
      for (uint32_t i = 0; i < 16; ++i) {
        uint32_t v = 0;
#pragma unroll
        for (uint32_t j = 0; j < 16; ++j) v = j == i ? s.x[j] : v;
        const float x = a == 0 ? widen<DTYPE>(v) : widen_high<DTYPE>(v);
        bad = bad || !(float_of(bits_of(x) & 0x7fffffffu) + bound_of_word(bounds[i]) <= most);
      }
      if (bad) raw |= 0xffffu << (16 * a);
    }
    width[a] = bit_length(widest_code(low[a], high[a], 1.0f));
    if ((raw >> (16 * a) & 1u) != 0) width[a] = 0;
  }
  if constexpr (DTYPE == KVZ_BF16) {
    wide = wide || width[0] > 11 || width[1] > 11;
    // Codes at a coarser step are no wider: width by width, as far as the step of one has narrower codes still. From 8
    // bits on, and up to 4, all widths have the same step.
    while (true) {
      const bool open0 = width[0] >= 5 && width[0] <= 8, open1 = width[1] >= 5 && width[1] <= 8;
      if (!__any_sync(kAllLanes, open0 || open1)) break;
      const uint32_t own0 = open0 ? static_cast<uint32_t>(width[0]) : 5u;
      const uint32_t own1 = open1 ? static_cast<uint32_t>(width[1]) : 5u;
      const uint32_t more = codes_exceed(s.x, bounds, 9 - own0, 9 - own1, own0 - 1, own1 - 1);
      const bool less0 = open0 && (more & 0x8000u) == 0, less1 = open1 && (more & 0x80000000u) == 0;
      width[0] -= less0 ? 1 : 0;
      width[1] -= less1 ? 1 : 0;
      if (!__any_sync(kAllLanes, less0 || less1)) break;
    }
    const float* const row[2] = {inverses + token_row<DTYPE>(width[0]) * kRiceTokenRow,
                                 inverses + token_row<DTYPE>(width[1]) * kRiceTokenRow};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 four0 = reinterpret_cast<const float4*>(row[0])[q],
                   four1 = reinterpret_cast<const float4*>(row[1])[q];
      const float inverse0[4] = {four0.x, four0.y, four0.z, four0.w},
                  inverse1[4] = {four1.x, four1.y, four1.z, four1.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t x = raw == 0 ? s.x[q * 4 + j] : s.x[q * 4 + j] & ~raw;
        u[q * 4 + j] = biased_codes(widen<DTYPE>(x) * inverse0[j], widen_high<DTYPE>(x) * inverse1[j]);
      }
    }
  } else {
    while (true) {
      wide = wide || width[0] > 11 || width[1] > 11;
      uint32_t least_code = 0, most_code = 0;
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i) {
        const uint32_t x = raw == 0 ? s.x[i] : s.x[i] & ~raw;
        float inverse[2];
#pragma unroll
        for (uint32_t a = 0; a < 2; ++a) {
          const uint32_t bits = static_cast<uint32_t>(step_bits<DTYPE>(KVZ_FIXED, width[a], bound_of_word(bounds[i])));
          inverse[a] = inverses[((bits < kRiceTokenRows ? bits : kRiceTokenRows) - 1) * kRiceTokenRow + i];
        }
        u[i] = biased_codes(widen<DTYPE>(x) * inverse[0], widen_high<DTYPE>(x) * inverse[1]);
        least_code = i == 0 ? u[i] : min_2(least_code, u[i]);
        most_code = i == 0 ? u[i] : max_2(most_code, u[i]);
      }
      const int found[2] = {static_cast<int>(bits_of_biased(least_code & 0xffffu, most_code & 0xffffu)),
                            static_cast<int>(bits_of_biased(least_code >> 16, most_code >> 16))};
      if (found[0] == width[0] && found[1] == width[1]) break;  // the same steps, the same codes
      width[0] = found[0];
      width[1] = found[1];
    }
  }
  return raw;
}

// Codes of `rice` in place of the values of a strip, and its classes.
template <int DTYPE>
KVZ_DEV void rice_codes(RiceStrip& s, const Geometry& g, const Bounds& bounds, const TokenTables& tables) {
  uint32_t u[16], z[16];
  bool wide = false;
  uint32_t raw;
  if (bounds.steps == KVZ_STEPS_TOKEN) {
    const uint32_t vector = s.at.exists[0] ? s.at.row * bounds.heads + s.at.column / g.head_dim : 0;
    raw = codes_of_tokens<DTYPE>(s, tables, vector, bounds.page, u, wide);
  } else {
    raw = s.at.exists[0] ? codes_of_groups<DTYPE>(s, bounds, u, wide) : ~0u;
  }
  if (!s.at.exists[0]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) u[i] = 0x80008000u;
    raw = 0;
    wide = false;
  }
  uint32_t plain = 0, delta = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    s.x[i] = zigzag_biased_2(u[i]);
    z[i] = i == 0 ? s.x[i] : zigzag_biased_2(u[i] - u[i - 1] + 0x80008000u);
    plain += s.x[i];
    delta += z[i];
  }
  uint32_t sum[2][2] = {{plain & 0xffffu, plain >> 16}, {delta & 0xffffu, delta >> 16}};
  if (wide) {
    sum[0][0] = sum[0][1] = sum[1][0] = sum[1][1] = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
      for (uint32_t a = 0; a < 2; ++a) {
        sum[0][a] += s.x[i] >> (16 * a) & 0xffffu;
        sum[1][a] += z[i] >> (16 * a) & 0xffffu;
      }
    }
  }
  const uint32_t mask = (sum[1][0] < sum[0][0] ? 0xffffu : 0u) | (sum[1][1] < sum[0][1] ? 0xffff0000u : 0u);
#pragma unroll
  for (int i = 0; i < 16; ++i) s.x[i] = choose(mask, z[i], s.x[i]);
  s.sums = choose(mask, delta, plain);
  s.classes = 0;
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    const bool differences = sum[1][a] < sum[0][a];
    const uint32_t best = static_cast<uint32_t>(rice_parameter(differences ? sum[1][a] : sum[0][a]));
    const uint32_t most = Traits<DTYPE>::kMaxWidth;
    uint32_t c = (best < most ? best : most) | (differences ? kRiceDelta : 0u) | (wide ? kRiceWide : 0u);
    if ((raw >> (16 * a) & 1u) != 0) c = kRiceRaw;
    s.classes |= c << (16 * a);
  }
}

// Codes of `lossless_rice` in place of the values of a strip, whose own bases are in the halves of `own`.
template <int DTYPE>
KVZ_DEV void lossless_rice_codes(RiceStrip& s, uint32_t own, const RicePage& page) {
  const uint32_t most = (1u << page.planes) - 1u;
  uint32_t bases = 0;
  s.classes = 0;
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    const uint32_t base = own >> (16 * a) & 0xffffu, below = page.base > base ? page.base - base : 0;
    const uint32_t number = below < most ? below : most;
    s.classes |= number << (16 * a);
    bases |= (page.base > number ? page.base - number : 0) << (16 * a);
  }
  constexpr uint32_t exponents = ((1u << Traits<DTYPE>::kExponentBits) - 1u) * kBothHalves;
  s.sums = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    // below + below / 3, or -4 below - 1 where the exponent is above the base; both halves, with the sign at the top.
    const uint32_t u = bases + 0x80008000u - (s.x[i] >> Traits<DTYPE>::kFraction & exponents);
    const uint32_t below = u & 0x00ff00ffu, third = (below * 171u) >> 9 & 0x007f007fu;
    s.x[i] = choose(sign_fill_2(u), below + third, ~(u << 2) | kBothHalves * 3u);
    s.sums += s.x[i];
  }
  if (!s.at.exists[0]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) s.x[i] = 0;
    s.sums = 0;
  }
}

template <int DTYPE>
KVZ_DEV uint32_t own_bases_2(const RiceStrip& s) {
  constexpr uint32_t exponents = ((1u << Traits<DTYPE>::kExponentBits) - 1u) * kBothHalves;
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum += s.x[i] >> Traits<DTYPE>::kFraction & exponents;
  return rice_base<DTYPE>(sum & 0xffffu) | rice_base<DTYPE>(sum >> 16) << 16;
}

// ---- sizes
// ---------------------------------------------------------------------------------------------------------

// Parameters, raw groups and sizes of a strip; returns words << 16 | bits of the stream, the top bit: a group is raw.
template <int DTYPE, int CODING>
KVZ_DEV uint32_t strip_sizes(RiceStrip& s, const RicePage& page, uint32_t lane) {
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  constexpr uint32_t extra = lossless ? Traits<DTYPE>::kFraction + 1 : 0;
  const uint32_t most = page.least + (1u << page.planes) - 1u;
  uint32_t parameter[2] = {page.least, page.least};
  if (!lossless) {
#pragma unroll
    for (uint32_t a = 0; a < 2; ++a) {
      const uint32_t best = s.classes >> (16 * a) & kRiceNumber;
      parameter[a] = best < page.least ? page.least : best > most ? most : best;
    }
  }
  uint32_t quotients[2] = {0, 0};
  if (!lossless && (s.classes & kRiceWide * kBothHalves) != 0) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      quotients[0] += (s.x[i] & 0xffffu) >> parameter[0];
      quotients[1] += s.x[i] >> 16 >> parameter[1];
    }
  } else {
    const uint32_t mask = ((1u << parameter[0]) - 1u) | ((1u << parameter[1]) - 1u) << 16;
    uint32_t rest = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) rest += s.x[i] & mask;
    const uint32_t whole = s.sums - rest;  // no half is less than its rest
    quotients[0] = (whole & 0xffffu) >> parameter[0];
    quotients[1] = whole >> 16 >> parameter[1];
  }
  uint32_t words = 0, unary = 0;
  bool any_raw = false;
  s.unary = 0;
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    const uint32_t c = s.classes >> (16 * a);
    const uint32_t bits = 16 + quotients[a];
    const bool raw = (!lossless && (c & kRiceRaw) != 0) || 16 * (extra + parameter[a]) + bits > 256;
    if (!s.at.exists[a]) continue;
    if (raw) {
      s.classes = (s.classes & ~(0xffffu << (16 * a))) | kRiceRaw << (16 * a);
      words += 16;
      any_raw = true;
    } else {
      if (!lossless) s.classes = (s.classes & ~(kRiceNumber << (16 * a))) | parameter[a] << (16 * a);
      words += extra + parameter[a];
      unary += bits;
      s.unary |= bits << (16 * a);
    }
  }
  s.before = inclusive_sum(words << 16 | unary, lane);
  return __shfl_sync(kAllLanes, s.before, 31) | (__any_sync(kAllLanes, any_raw) ? 0x80000000u : 0u);
}

// ---- the segment
// ---------------------------------------------------------------------------------------------------------

// A bit of each group of a strip into a plane. By one warp.
KVZ_DEV void put_plane_2(uint32_t* plane, uint32_t first, bool aligned, uint32_t bits, uint32_t lane) {
  bits <<= 2 * (lane & 15u);
  const uint32_t low = __reduce_or_sync(kAllLanes, lane < 16 ? bits : 0u);
  const uint32_t high = __reduce_or_sync(kAllLanes, lane < 16 ? 0u : bits);
  const uint32_t word = lane == 0 ? low : high, at = first + 32 * lane;
  if (lane > 1) return;
  if (aligned) {
    plane[at / 32] = word;
  } else if (word != 0) {
    atomicOr(plane + at / 32, word << (at & 31u));
    if ((at & 31u) != 0 && word >> (32 - (at & 31u)) != 0) atomicOr(plane + at / 32 + 1, word >> (32 - (at & 31u)));
  }
}

// N quotients of a group from its codes x, one half of them, at bit `at` of the segment; the bits are `length`.
template <int FIRST, int N>
KVZ_DEV void put_quotients(uint32_t* segment, uint32_t at, uint32_t length, const uint32_t (&x)[16], uint32_t a,
                           uint32_t parameter) {
  if (length > 64) {
    for (uint32_t i = 0; i < N; ++i) {
      uint32_t v = 0;
#pragma unroll
      for (uint32_t j = 0; j < N; ++j) v = j == i ? x[FIRST + j] : v;
      at += (v >> (16 * a) & 0xffffu) >> parameter;
      atomicOr(segment + at / 32, 1u << (at & 31u));
      ++at;
    }
    return;
  }
  uint64_t bits = 0;  // the last one at bit 0
  const uint32_t one = 1u << (16 * a + parameter), shift = 16 * a + parameter;
#pragma unroll
  for (int i = FIRST; i < FIRST + N; ++i) {
    const uint32_t v = a == 0 ? x[i] & 0xffffu : x[i];
    bits = bits << ((v + one) >> shift) | 1u;
  }
  bits = reverse_64(bits) >> (64 - length);
  const uint32_t low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32), by = at & 31u;
  uint32_t* const to = segment + at / 32;
  atomicOr(to, low << by);
  const uint32_t second = funnel_left(low, high, by), third = funnel_left(high, 0, by);
  if (second != 0) atomicOr(to + 1, second);
  if (third != 0) atomicOr(to + 2, third);
}

// The quotients of a strip, from bit 16 x `stream` of the segment on.
template <int CODING>
KVZ_DEV void put_stream_2(const RiceStrip& s, const RicePage& page, uint32_t* segment, uint32_t stream) {
  uint32_t at = stream * 16 + (s.before & 0xffffu) - (s.unary & 0xffffu) - (s.unary >> 16);
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    const uint32_t length = s.unary >> (16 * a) & 0xffffu;  // 0 where there is no group, or a raw one
    if (length == 0) continue;
    if (CODING == KVZ_LOSSLESS_RICE) {
      uint32_t sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += (s.x[i] >> (16 * a) & 0xffffu) >> page.least;
      put_quotients<0, 8>(segment, at, 8 + sum, s.x, a, page.least);
      put_quotients<8, 8>(segment, at + 8 + sum, length - 8 - sum, s.x, a, page.least);
    } else {
      put_quotients<0, 16>(segment, at, length, s.x, a, s.classes >> (16 * a) & kRiceNumber);
    }
    at += length;
  }
}

// The words of a strip, from half `words` of a word of the segment on.
template <int DTYPE, int CODING>
KVZ_DEV void put_words_2(const Geometry& g, const RiceStrip& s, const RicePage& page, uint32_t* segment,
                         uint32_t words) {
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  constexpr uint32_t extra = lossless ? Traits<DTYPE>::kFraction + 1 : 0;
  const bool raw[2] = {(s.classes & kRiceRaw) != 0, (s.classes >> 16 & kRiceRaw) != 0};
  uint32_t count[2], own = 0;
#pragma unroll
  for (uint32_t a = 0; a < 2; ++a) {
    const uint32_t parameter = lossless ? page.least : s.classes >> (16 * a) & kRiceNumber;
    count[a] = !s.at.exists[a] ? 0 : raw[a] ? 16 : extra + parameter;
    own += count[a];
  }
  uint16_t* const to = reinterpret_cast<uint16_t*>(segment) + words + (s.before >> 16 & 0x7fffu) - own;
  const uint32_t coded[2] = {raw[0] ? 0 : count[0], raw[1] ? 0 : count[1]};
  const uint32_t any_raw = __any_sync(kAllLanes, raw[0] || raw[1]) ? 1u : 0u;
  uint32_t v[16];
  if (lossless || any_raw) load_strip(g, s.at, v);
  if (any_raw && (raw[0] || raw[1])) {
    uint32_t r[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) r[i] = v[i];
    transpose_16(r);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (raw[0]) to[j] = static_cast<uint16_t>(r[j]);
      if (raw[1]) to[count[0] + static_cast<uint32_t>(j)] = static_cast<uint16_t>(r[j] >> 16);
    }
  }
  const auto put = [&](uint32_t first, const uint32_t* from, auto n) {
#pragma unroll
    for (uint32_t j = 0; j < decltype(n)::value; ++j) {
      if (first + j < coded[0]) to[first + j] = static_cast<uint16_t>(from[j]);
      if (first + j < coded[1]) to[count[0] + first + j] = static_cast<uint16_t>(from[j] >> 16);
    }
  };
  if (lossless && DTYPE == KVZ_BF16) {
    uint32_t b[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // sign and fraction: the low bytes of the halves
      const uint32_t low = choose(0x007f007fu, v[i], v[i] >> 8), high = choose(0x007f007fu, v[i + 8], v[i + 8] >> 8);
      b[i] = __byte_perm(low, high, 0x6240);
    }
    transpose_8(b);
    put(0, b, Constant<8>{});
    if (page.least == 0) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i] = __byte_perm(s.x[i], s.x[i + 8], 0x6240);
    if (page.least <= 4) {
      transpose_low_4(b);
      put(8, b, Constant<4>{});
    } else {
      transpose_8(b);
      put(8, b, Constant<5>{});
    }
    return;
  }
  if (lossless) {
    constexpr uint32_t fraction = ((1u << Traits<DTYPE>::kFraction) - 1u) * kBothHalves;
    constexpr uint32_t sign = (1u << Traits<DTYPE>::kFraction) * kBothHalves;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      v[i] = (s.x[i] << (Traits<DTYPE>::kFraction + 1) & ~(2 * sign - kBothHalves)) |
             (v[i] >> (15 - Traits<DTYPE>::kFraction) & sign) | (v[i] & fraction);
    }
    transpose_16(v);
    put(0, v, Constant<16>{});
    return;
  }
  const uint32_t widest = static_cast<uint32_t>(
      __reduce_max_sync(kAllLanes, static_cast<int32_t>(coded[0] > coded[1] ? coded[0] : coded[1])));
  if (widest == 0) return;
  if (widest <= 8) {
    uint32_t b[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i] = __byte_perm(s.x[i], s.x[i + 8], 0x6240);
    if (widest <= 4) {
      transpose_low_4(b);
      put(0, b, Constant<4>{});
    } else {
      transpose_8(b);
      put(0, b, Constant<8>{});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = s.x[i];
  transpose_16(v);
  put(0, v, Constant<16>{});
}

// ---- a page
// ---------------------------------------------------------------------------------------------------------

template <int DTYPE, int S>
KVZ_DEV void encode_rice_fast_page(const EncodeParams& p, uint8_t* memory, uint32_t page_index, uint32_t b,
                                   uint32_t index, const kvz_segment& segment, const Geometry& g, uint32_t vectors) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  RiceFastShared& fast = *reinterpret_cast<RiceFastShared*>(memory + kSharedBytes);
  TokenTables tables;
  tables.bounds = reinterpret_cast<uint32_t*>(memory + kRiceFastBytes);
  tables.inverses = reinterpret_cast<float*>(tables.bounds + vectors * 16);
  tables.any_unusable = false;
  uint32_t* const stage = reinterpret_cast<uint32_t*>(memory + kRiceFastBytes + rice_fast_table_bytes(vectors));
  const uint32_t thread = threadIdx.x, lane = lane_of(thread), warp = thread / kWarp, warps = blockDim.x / kWarp;
  const uint32_t raw_bytes = g.tokens * g.channels * 2;
  const uint32_t first_value = load_value<DTYPE>(g.base);
  const RiceStrips strips = rice_strips_of(g);
  RiceStrip s[S];
  for (uint32_t i = thread; i < 256; i += blockDim.x) fast.bases[i] = 0;
  if (thread < 32) fast.histogram[thread] = 0;
#pragma unroll
  for (uint32_t k = 0; k < S; ++k) {
    s[k].at = rice_lane(g, strips, warp + k * warps, lane);
    load_strip(g, s[k].at, s[k].x);
  }

  // Extremes.
  const bool lossy = segment.coding == KVZ_RICE && segment.bound_kind != KVZ_BOUND_LOSSLESS;
  const bool by_token = segment.bound_kind == KVZ_BOUND_TOKEN_RMS;
  int32_t low_key = key_32(float_of(0x7f800000u)), high_key = key_32(float_of(0xff800000u));
  uint32_t differs = 0;
#pragma unroll
  for (uint32_t k = 0; k < S; ++k) {
    if (lossy) {
      strip_extremes<DTYPE>(s[k], first_value * kBothHalves, low_key, high_key, differs);
    } else if (s[k].at.exists[0]) {
#pragma unroll
      for (int i = 0; i < 16; ++i) differs |= s[k].x[i] ^ first_value * kBothHalves;
    }
  }
  if (lossy && by_token) {
#pragma unroll
    for (uint32_t k = 0; k < S; ++k) {
      const uint32_t strip = warp + k * warps;
      if (strip >= strips.count) break;
      strip_squares<DTYPE>(s[k], reinterpret_cast<uint8_t*>(stage) + strip * kStripBytes, lane, fast.sums[strip]);
    }
  }
  low_key = __reduce_min_sync(kAllLanes, low_key);
  high_key = __reduce_max_sync(kAllLanes, high_key);
  differs = __any_sync(kAllLanes, differs != 0) ? 1u : 0u;
  if (lane == 0) {
    shared.low[warp] = low_key;
    shared.high[warp] = high_key;
    fast.flags[warp] = differs;
  }
  __syncthreads();
  const uint32_t one = lane < warps ? lane : 0;
  const float low = value_of_key_32(__reduce_min_sync(kAllLanes, shared.low[one]));
  const float high = value_of_key_32(__reduce_max_sync(kAllLanes, shared.high[one]));
  const bool constant = !__any_sync(kAllLanes, fast.flags[one] != 0);

  // Bounds.
  Bounds bounds = {};
  bounds.heads = segment.heads;
  bounds.missing = no_bound();
  if (lossy && low <= high && !constant) {
    if (by_token) {
      bounds.steps = KVZ_STEPS_TOKEN;
      const float scale = square_scale<DTYPE>(largest_exponent<DTYPE>(low, high));
      bounds.page = fast_token_bounds<DTYPE>(g, segment.bound, scale, tables, fast, reinterpret_cast<uint8_t*>(stage));
    } else if (segment.bound_kind == KVZ_BOUND_CHANNEL_TABLE) {
      bounds.steps = KVZ_STEPS_CHANNEL;
      bounds.channels = reinterpret_cast<const float*>(segment.channel_bounds);
      bounds.page = largest_channel_bound(bounds, g.channels, shared);
    } else {
      bounds.page = page_bound(segment.bound_kind, segment.bound, low, high);
    }
  }

  // Candidates: the codes of the second one take the place of the first one's, which are made again if they win.
  const uint32_t prefix = bounds.steps == KVZ_STEPS_TOKEN ? (g.tokens * segment.heads + 3) / 4 * 4 : 0;
  const uint32_t plane_bytes = static_cast<uint32_t>(rice_plane_bytes(g.groups));
  const bool usable = bounds.page > 0.0f;
  uint64_t quantised = ~0ull, other = ~0ull;
  RicePage page;
  bool lossless = !usable, again = false;
  while (!constant) {
    if (again) {
#pragma unroll
      for (uint32_t k = 0; k < S; ++k) load_strip(g, s[k].at, s[k].x);
    }
    if (lossless) {
      uint32_t own[S];
#pragma unroll
      for (uint32_t k = 0; k < S; ++k) {
        own[k] = own_bases_2<DTYPE>(s[k]);
        if (s[k].at.exists[0]) {
          atomicAdd(&fast.bases[own[k] & 0xffffu], 1u);
          atomicAdd(&fast.bases[own[k] >> 16], 1u);
        }
      }
      __syncthreads();
      if (warp == 0) {
        int32_t highest = 0;
        for (uint32_t i = lane; i < 256; i += kWarp) highest = fast.bases[i] != 0 ? static_cast<int32_t>(i) : highest;
        highest = __reduce_max_sync(kAllLanes, highest);
        const int32_t mine = highest - static_cast<int32_t>(lane);
        uint32_t bin = mine >= 0 && lane < kRiceBases - 1 ? fast.bases[mine] : 0;
        const uint32_t inside = __reduce_add_sync(kAllLanes, bin);
        if (lane == kRiceBases - 1) bin = g.groups - inside;
        fast.histogram[lane] = bin;
        __syncwarp();
        const RicePage found = rice_bases_warp(fast.histogram, g.groups, static_cast<uint32_t>(highest), lane);
        __syncwarp();
        fast.histogram[lane] = 0;
        if (lane == 0) fast.page = found;
      }
      __syncthreads();
      page = fast.page;
      uint32_t total = 0;
#pragma unroll
      for (uint32_t k = 0; k < S; ++k) {
        lossless_rice_codes<DTYPE>(s[k], own[k], page);
        total += (s[k].sums & 0xffffu) + (s[k].sums >> 16);
      }
      total = __reduce_add_sync(kAllLanes, total);
      if (lane == 0) fast.totals[warp] = total;
      __syncthreads();
      total = __reduce_add_sync(kAllLanes, lane < warps ? fast.totals[one] : 0u);
      const uint32_t k = static_cast<uint32_t>(rice_parameter(total / g.groups));
      page.least = k < KVZ_RICE_MOST_EXPONENT ? k : KVZ_RICE_MOST_EXPONENT;
    } else {
#pragma unroll
      for (uint32_t k = 0; k < S; ++k) {
        rice_codes<DTYPE>(s[k], g, bounds, tables);
#pragma unroll
        for (uint32_t a = 0; a < 2; ++a) {
          const uint32_t c = s[k].classes >> (16 * a);
          if (s[k].at.exists[a] && (c & kRiceRaw) == 0) atomicAdd(&fast.histogram[c & kRiceNumber], 1u);
        }
      }
      __syncthreads();
      if (warp == 0) {
        const RicePage found = rice_window_warp(fast.histogram, Traits<DTYPE>::kMaxWidth, lane);
        __syncwarp();
        fast.histogram[lane] = 0;
        if (lane == 0) fast.page = found;
      }
      __syncthreads();
      page = fast.page;
    }
#pragma unroll
    for (uint32_t k = 0; k < S; ++k) {
      const uint32_t strip = warp + k * warps;
      const uint32_t all = lossless ? strip_sizes<DTYPE, KVZ_LOSSLESS_RICE>(s[k], page, lane)
                                    : strip_sizes<DTYPE, KVZ_RICE>(s[k], page, lane);
      if (lane == 0 && strip < strips.count) fast.strips[strip] = all;
    }
    __syncthreads();
    const uint32_t mine = lane < strips.count ? fast.strips[lane] : 0;
    page.any_raw = __any_sync(kAllLanes, mine >> 31 != 0);
    const uint32_t halves = __reduce_add_sync(kAllLanes, (mine >> 16 & 0x7fffu) + ((mine & 0xffffu) + 15) / 16);
    const uint64_t size =
        (lossless ? 4u : prefix) + plane_bytes * page.total_planes(lossless) + 2 * (strips.count + halves);
    if (lossless) {
      other = size;
      if (!(quantised <= other && quantised < raw_bytes)) break;
    } else {
      if (again) break;
      quantised = size;
      if (quantised * 8 <= static_cast<uint64_t>(raw_bytes) * 5) break;
    }
    again = true;
    lossless = !lossless;
    __syncthreads();
  }

  uint8_t coding = KVZ_RAW, reason = KVZ_INCOMPRESSIBLE;
  uint64_t size = raw_bytes;
  uint32_t param = 0;
  if (constant) {
    coding = KVZ_CONSTANT;
    reason = KVZ_AS_ASKED;
    size = KVZ_CONSTANT_BYTES;
  } else if ((lossless ? other : quantised) < raw_bytes) {
    size = lossless ? other : quantised;
    coding = static_cast<uint8_t>(lossless ? KVZ_LOSSLESS_RICE : KVZ_RICE | bounds.steps);
    param = lossless ? page.base : rice_param(page);
    reason = !lossless || !lossy ? KVZ_AS_ASKED : usable ? KVZ_LOSSLESS_SMALLER : KVZ_BOUND_TOO_FINE;
  }
  const kvz_entry entry =
      make_entry(segment, size, coding, coding != KVZ_RAW && coding != KVZ_CONSTANT && !lossless ? bounds.page : 0.0f,
                 param, reason);
  if (coding == KVZ_RAW || coding == KVZ_CONSTANT) {
    uint8_t* const out = claim_place(p, shared, page_index, b, index, entry);
    if (out == nullptr) return;
    clear_bytes(out, size, static_cast<uint64_t>(units_of(size)) * 16);
    if (coding == KVZ_RAW) {
      copy_page<false>(g, out);
    } else if (thread == 0) {
      *reinterpret_cast<uint32_t*>(out) = first_value;
    }
    return;
  }

  // Put the segment together.
  const uint32_t units = units_of(size);
  if (thread == 0) publish_size(p, page_index, b, index, units);
  uint4 zero;
  zero.x = zero.y = zero.z = zero.w = 0;
  for (uint32_t i = thread; i < units; i += blockDim.x) reinterpret_cast<uint4*>(stage)[i] = zero;
  const uint32_t mine = lane < strips.count ? fast.strips[lane] : 0;
  const uint32_t own_words = mine >> 16 & 0x7fffu, own_length = ((mine & 0xffffu) + 15) / 16;
  const uint32_t words_before = inclusive_sum(own_words, lane), stream_before = inclusive_sum(own_length, lane);
  const uint32_t head = lossless ? 4 : prefix, planes = page.total_planes(lossless);
  const uint32_t lengths = (head + planes * plane_bytes) / 2, words = lengths + strips.count;
  const uint32_t streams = words + __shfl_sync(kAllLanes, words_before, 31);
  const uint32_t words_at = words + words_before - own_words, stream_at = streams + stream_before - own_length;
  __syncthreads();
  if (lossless) {
    if (thread == 0) stage[0] = page.least | page.planes << 8 | (page.any_raw ? 1u : 0u) << 16;
  } else {
    const uint32_t count = g.tokens * segment.heads;
    for (uint32_t v = thread; v < prefix && v < count; v += blockDim.x) {
      const uint32_t token = v / segment.heads, in_row = v - token * segment.heads;
      const float bound = bound_of_word(tables.bounds[(token / 16 * segment.heads + in_row) * 16 + token % 16]);
      reinterpret_cast<uint8_t*>(stage)[v] =
          static_cast<uint8_t>(bound > 0.0f    ? scale_of(bound, bounds.page)
                               : bound == 0.0f ? static_cast<uint32_t>(KVZ_SCALE_ZERO)
                                               : 0u);
    }
  }
  const bool aligned = g.columns % KVZ_STRIP_GROUPS == 0;
#pragma unroll
  for (uint32_t k = 0; k < S; ++k) {
    const uint32_t strip = warp + k * warps;
    const uint32_t from = __shfl_sync(kAllLanes, words_at, static_cast<int>(strip & 31u));
    const uint32_t length = __shfl_sync(kAllLanes, own_length, static_cast<int>(strip & 31u));
    if (strip >= strips.count) continue;
    if (lane == 0) reinterpret_cast<uint16_t*>(stage)[lengths + strip] = static_cast<uint16_t>(length);
    uint32_t* plane = stage + head / 4;
    const uint32_t first = s[k].at.index - 2 * lane;
    const uint32_t raw = s[k].classes >> 7 & kBothHalves;
    const auto put_plane = [&](uint32_t bits) {  // bits 0 and 16
      put_plane_2(plane, first, aligned, (bits & 1u) | (bits >> 15 & 2u), lane);
      plane += plane_bytes / 4;
    };
    if (page.any_raw) put_plane(raw);
    if (!lossless) put_plane(s[k].classes >> 6 & ~raw);
    uint32_t numbers = s[k].classes & kRiceNumber * kBothHalves;
    if (!lossless) numbers = choose(raw * 0xffffu, page.least * kBothHalves, numbers) - page.least * kBothHalves;
    for (uint32_t i = 0; i < page.planes; ++i) put_plane(s[k].at.exists[0] ? numbers >> i : 0u);
    if (lossless) {
      put_words_2<DTYPE, KVZ_LOSSLESS_RICE>(g, s[k], page, stage, from);
    } else {
      put_words_2<DTYPE, KVZ_RICE>(g, s[k], page, stage, from);
    }
  }
  __syncthreads();  // a word may hold the end of these and the beginning of the streams
#pragma unroll
  for (uint32_t k = 0; k < S; ++k) {
    const uint32_t strip = warp + k * warps;
    const uint32_t stream = __shfl_sync(kAllLanes, stream_at, static_cast<int>(strip & 31u));
    if (strip >= strips.count) continue;
    if (lossless) {
      put_stream_2<KVZ_LOSSLESS_RICE>(s[k], page, stage, stream);
    } else {
      put_stream_2<KVZ_RICE>(s[k], page, stage, stream);
    }
  }
  if (warp == 0) {
    const Place at = place(p, page_index, b, index, units, lane);
    if (lane == 0) shared.destination = place_page(p, at, 0, page_index, entry);
  }
  __syncthreads();
  if (shared.destination == ~0ull) return;
  uint4* const out = reinterpret_cast<uint4*>(p.arena + shared.destination * 16);
  for (uint32_t i = thread; i < units; i += blockDim.x) out[i] = reinterpret_cast<const uint4*>(stage)[i];
}

// Batches whose segments are raw, or of the Rice codings and all as rice_is_fast says, of one dtype. A warp has S
// strips of the largest page.
template <int DTYPE, int S>
KVZ_DEV void encode_rice_fast(const EncodeParams& p, uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const uint32_t pages = p.num_blocks * p.num_segments;
  if (threadIdx.x == 0) shared.page = atomicAdd(&p.counters->ticket, 1u);
  __syncthreads();
  while (shared.page < pages) {
    const uint32_t page = shared.page, b = page / p.num_segments, s = page - b * p.num_segments;
    const kvz_segment segment = p.segments[s];
    const Geometry g = geometry_of(segment, p.block_ids[b]);
    if (segment.coding == KVZ_RAW) {
      encode_bytes(p, shared, page, b, s, segment, g, false, true);
    } else {
      encode_rice_fast_page<DTYPE, S>(p, memory, page, b, s, segment, g, p.team_bytes);
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.page = atomicAdd(&p.counters->ticket, 1u);
    __syncthreads();
  }
  finish_encode(p, shared.last);
}

}  // namespace gpu
}  // namespace kvz
