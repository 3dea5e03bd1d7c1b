// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Pages of any geometry: where the values of a group lie, and what their bounds are when these differ within a page, by
// token and head or by channel.
#pragma once

#include "cuda_device.inl"

namespace kvz {
namespace gpu {

// ---- values of a group
// ---------------------------------------------------------------------------------------------------

template <int DTYPE>
KVZ_DEV uint32_t load_value(const uint8_t* from) {
  return *reinterpret_cast<const typename Traits<DTYPE>::word*>(from);
}

// Call visit(i, address, token, head, channel) for the values of a group that lie inside the page. Unrolled: i is a
// constant in each call.
template <class Visit>
KVZ_DEV void for_places(const Geometry& g, uint32_t row, uint32_t column, Visit visit) {
  const uint32_t token = row << g.log_tokens;
  uint32_t channel = column << (4 - g.log_tokens);
  uint32_t head = channel / g.head_dim, d = channel - head * g.head_dim;
  const uint32_t within = g.group_tokens - 1;
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
    if (i > 0 && (i & within) == 0) {
      ++channel;
      if (++d == g.head_dim) {
        d = 0;
        ++head;
      }
    }
    const uint32_t t = token + (i & within);
    if (t < g.tokens && channel < g.channels) {
      visit(i, g.base + t * g.token_stride + head * g.head_stride + static_cast<uint64_t>(d) * g.value_bytes, t, head,
            channel);
    }
  }
}

KVZ_DEV float reciprocal(float x) {  // as inverse_step
#if defined(KVZ_EMULATE)
  return 1.0f / x;
#else
  return __frcp_rn(x);
#endif
}

// ---- bounds of values
// ---------------------------------------------------------------------------------------------------

struct Bounds {
  uint32_t steps;
  float page;
  const float* vectors;   // of tokens x heads, in shared memory
  const float* inverses;  // of their steps of 1 to 8 significant bits, or null
  const uint8_t* scales;  // or their scale bytes
  const float* channels;
  uint32_t heads;
  float missing;  // what stands for a channel's bound that is not in the format's range: encoders take no_bound()
};

KVZ_DEV float no_bound() { return float_of(0x7fc00000u); }

KVZ_DEV float bound_at(const Bounds& b, uint32_t token, uint32_t head, uint32_t channel) {
  if (b.steps == KVZ_STEPS_PAGE) return b.page;
  if (b.steps == KVZ_STEPS_CHANNEL) {
    const float bound = b.channels[channel];
    return bound >= kLeastBound && bound <= kLargestBound ? bound : b.missing;
  }
  const uint32_t vector = token * b.heads + head;
  return b.vectors != nullptr ? b.vectors[vector] : bound_of_scale(b.scales[vector], b.page);
}

// ---- bounds of tokens
// ---------------------------------------------------------------------------------------------------

// Bound over rms of the scaled values, about.
KVZ_DEV float token_factor(double r, float scale) {
  return static_cast<float>(r * (1.0 - 1.0 / 524288.0)) * reciprocal(scale);
}

// As token_bound; most answers need no float64: the bound keeps five significant bits, of which float32 is sure when
// the error of it, less than 2^-20, does not reach the next number. `factor` is token_factor(r, scale).
KVZ_DEV float token_bound_fast(double r, float factor, float sum, uint32_t head_dim, float scale) {
#if defined(KVZ_EMULATE)
  const float about = __builtin_sqrtf(sum / static_cast<float>(head_dim)) * factor;
#else
  const float about = __fsqrt_rn(sum * __frcp_rn(static_cast<float>(head_dim))) * factor;
#endif
  constexpr float kNear = 1.0f / 524288.0f;
  const uint32_t low = bits_of(about * (1.0f - kNear)), high = bits_of(about * (1.0f + kNear));
  if (low >> KVZ_SCALE_SHIFT == high >> KVZ_SCALE_SHIFT && about > 1e-20f && about < 1e20f && sum > 1e-20f) {
    return float_of(low >> KVZ_SCALE_SHIFT << KVZ_SCALE_SHIFT);
  }
  return token_bound(r, sum, head_dim, scale);
}

// Sums of the squares of 16 tokens x 64 channels, about: by tensor cores, which add in an order of their own. A lane
// holds the chunks of 8 channels that chunk_of says of tokens lane / 4 and lane / 4 + 8; each token's values times
// themselves are the diagonals of two matrices. By one warp.
KVZ_DEV uint32_t chunk_of(uint32_t lane, uint32_t i) {  // so that the lanes' reads meet no bank twice
  return (lane & 3u) + 4 * ((lane >> 2 & 1u) ^ i);
}
template <int DTYPE>
KVZ_DEV void about_squares(const uint4 (&upper)[2], const uint4 (&lower)[2], uint32_t lane, float* sums) {
  float first[4] = {}, second[4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t front[4] = {upper[i].x, lower[i].x, upper[i].y, lower[i].y};
    add_product<DTYPE>(first, front, upper[i].x, upper[i].y);
    add_product<DTYPE>(second, front, lower[i].x, lower[i].y);
    const uint32_t back[4] = {upper[i].z, lower[i].z, upper[i].w, lower[i].w};
    add_product<DTYPE>(first, back, upper[i].z, upper[i].w);
    add_product<DTYPE>(second, back, lower[i].z, lower[i].w);
  }
  if ((lane & 3u) == lane >> 3) {
    const bool odd = (lane >> 2 & 1u) != 0;
    sums[lane >> 2] = odd ? first[1] : first[0];
    sums[(lane >> 2) + 8] = odd ? second[3] : second[2];
  }
}

// The sum of a token's squares, scaled, as the format adds them. By one warp, the same in all lanes.
template <int DTYPE>
KVZ_DEV float square_sum_64(const uint8_t* row, float scale, uint32_t lane) {
  const uint32_t x = *reinterpret_cast<const uint32_t*>(row + lane * 4);
  const float a = widen<DTYPE>(x) * scale, b = widen_high<DTYPE>(x) * scale;
  float s = fma_float(a, a, b * b);  // squares are exact: rounded as separate additions are
#pragma unroll
  for (uint32_t d = 1; d < 32; d *= 2) s = s + __shfl_xor_sync(kAllLanes, s, static_cast<int>(d));
  return s;
}

// A token's bound from a sum by tensor cores, and whether it is that of token_bound beyond doubt. `factor` is
// about_factor(r, head_dim), `scale` that of the page.
KVZ_DEV float about_factor(double r, uint32_t head_dim) {
  return static_cast<float>(r * (1.0 - 1.0 / 524288.0)) * about_sqrt(reciprocal(static_cast<float>(head_dim)));
}
KVZ_DEV bool token_bound_about(float factor, float sum, float scale, float& bound) {
  const float about = about_sqrt(sum) * factor;
  constexpr float kNear = 1.0f / 32768.0f, kLeastSum = 8.67361738e-19f;  // 2^-60: what is lost below it does not show
  const uint32_t low = bits_of(about * (1.0f - kNear)), high = bits_of(about * (1.0f + kNear));
  bound = float_of(low >> KVZ_SCALE_SHIFT << KVZ_SCALE_SHIFT);
  return low >> KVZ_SCALE_SHIFT == high >> KVZ_SCALE_SHIFT && about > 1e-20f && about < 1e20f && sum >= kLeastSum &&
         sum <= 1.0f / kLeastSum && sum * scale * scale >= kLeastSum && scale >= 9.5367431640625e-07f;
}

// Inverses of the steps of bounds of tokens, which have at most 5 significant bits. `own` is that of the mantissa that
// a lane stands for; that of a bound is the same but for its exponent. By whole warps; 0 where there is no bound.
KVZ_DEV float mantissa_inverse(uint32_t lane) { return reciprocal(float_of(0x3f800000u | (lane & 15u) << 19)); }
KVZ_DEV float token_inverse(float own, float bound, int bits) {
  const uint32_t mantissa = bits_of(bound) >> 19 & 15u & ~((1u << (5 - bits)) - 1u);
  const float inverse = __shfl_sync(kAllLanes, own, static_cast<int>(mantissa));
  return bound > 0.0f ? float_of(bits_of(inverse) - ((bits_of(bound) >> 23) - 126) * (1u << 23)) : 0.0f;
}

// Sum over a vector as the format adds it: neighbours first. By one warp, the same in all lanes.
template <int DTYPE>
KVZ_DEV float square_sum(const uint8_t* from, uint32_t dim, float scale, uint32_t lane, uint32_t& magnitudes) {
  constexpr uint32_t kBlock = 64;
  float partial[32];
  uint32_t count = 0, any = 0;
  for (uint32_t first = 0; first < dim; first += kBlock) {
    float s = 0.0f;
#pragma unroll
    for (uint32_t a = 0; a < 2; ++a) {
      const uint32_t d = first + 2 * lane + a;
      uint32_t v =
          d < dim ? load_value<DTYPE>(from + static_cast<uint64_t>(d) * sizeof(typename Traits<DTYPE>::word)) : 0;
      v = is_finite<DTYPE>(v) ? v : 0;
      any |= v & ((1u << (Traits<DTYPE>::kBits - 1)) - 1u);
      const float y = Traits<DTYPE>::to_float(v) * scale;
      s = a == 0 ? y * y : s + y * y;
    }
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) s = s + __shfl_xor_sync(kAllLanes, s, static_cast<int>(d));
    uint32_t level = 0;
    for (uint32_t n = count; (n & 1u) != 0; n >>= 1) s = partial[level++] + s;
    partial[level] = s;
    ++count;
  }
  magnitudes = __reduce_add_sync(kAllLanes, any != 0 ? 1u : 0u);
  float sum = 0.0f;
  for (uint32_t level = 0; (count >> level) != 0; ++level) {
    if ((count >> level & 1u) != 0) sum = partial[level] + sum;
  }
  return sum;
}

// Bounds of all tokens and heads into shared memory; returns the largest one. By the whole CTA.
template <int DTYPE>
KVZ_DEV float token_bounds(const Geometry& g, double r, uint32_t page_exponent, uint32_t heads, float* vectors,
                           Shared& shared) {
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const float scale = square_scale<DTYPE>(page_exponent);
  const uint32_t count = g.tokens * heads;
  uint32_t largest = 0;  // bits of non-negative numbers order like them
  for (uint32_t v = warp; v < count; v += warps) {
    const uint32_t token = v / heads, head = v - token * heads;
    uint32_t magnitudes;
    const float sum =
        square_sum<DTYPE>(g.base + token * g.token_stride + head * g.head_stride, g.head_dim, scale, lane, magnitudes);
    const float bound = token_bound(r, sum, g.head_dim, scale);
    largest = bits_of(bound) > largest ? bits_of(bound) : largest;
    if (lane == 0) vectors[v] = magnitudes == 0 ? 0.0f : bound == 0.0f ? no_bound() : bound;
  }
  if (lane == 0) shared.words[warp] = largest;
  __syncthreads();
  for (uint32_t i = 0; i < warps; ++i) largest = shared.words[i] > largest ? shared.words[i] : largest;
  const float page = float_of(largest);
  for (uint32_t v = threadIdx.x; v < count; v += blockDim.x) {
    const float b = vectors[v];
    if (b > 0.0f && scale_of(b, page) > KVZ_SCALE_LARGEST) vectors[v] = no_bound();
  }
  __syncthreads();
  return page;
}

// A bound in shared memory: as bfloat16, which holds it, in both halves. That of zeros, which is 0, is one that no
// other has, and that can be multiplied with.
constexpr uint32_t kZeroBound = 0x00800080u, kNoBound = 0x7fc07fc0u;
KVZ_DEV uint32_t bound_word(float bound) {
  const uint32_t bits = bits_of(bound);
  return bound == 0.0f ? kZeroBound : bits >> 16 | (bits & 0xffff0000u);
}
KVZ_DEV float bound_of_word(uint32_t word) { return word == kZeroBound ? 0.0f : float_of(word & 0xffff0000u); }

// Least and largest of 16 bfloat16 values of two groups over their power-of-two steps, which are exact.
KVZ_DEV void extremes_of_powers(const uint32_t (&x)[16], const uint32_t* words, float (&low)[2], float (&high)[2]) {
  uint32_t low_2 = 0, high_2 = 0;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const uint4 four = reinterpret_cast<const uint4*>(words)[q];
    const uint32_t bound[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // 2^-(k - 1) of 2^k: the exponents add up to 255. That is four times the step's inverse.
      const uint32_t v = fma_bf16_2(x[q * 4 + j], ~bound[j] & 0x7f807f80u, 0x80008000u);
      low_2 = q + j == 0 ? v : min2<KVZ_BF16>(low_2, v);
      high_2 = q + j == 0 ? v : max2<KVZ_BF16>(high_2, v);
    }
  }
  low[0] = widen<KVZ_BF16>(low_2) * 0.25f;
  high[0] = widen<KVZ_BF16>(high_2) * 0.25f;
  low[1] = widen_high<KVZ_BF16>(low_2) * 0.25f;
  high[1] = widen_high<KVZ_BF16>(high_2) * 0.25f;
}

// Signs of the halves in which some code needs more than a width, from 2 to 7, at the steps that keep so many
// significant bits of the bounds. With C = 2^(width - 1), the code of x at the step S lies within -C and C - 1 when
// -(C + 1/2) S <= x < (C - 1/2) S: S / 2 is the bound without the bits that the step lacks, and a fused multiplication
// and addition has the sign of the exact difference.
//
// Codes are roundings of x times 1 / S rounded, which makes a difference where x lies at a limit exactly and 1 / S is
// not exact. Tried out for all x and S: none where bits and width add up to 8 or 9, with one exception, the width 2 and
// a bound of 30 / 16: -2.5 S has the code -3.
KVZ_DEV uint32_t codes_exceed(const uint32_t (&x)[16], const uint32_t* words, uint32_t bits0, uint32_t bits1,
                              uint32_t width0, uint32_t width1) {
  const float c0 = static_cast<float>(1u << width0), c1 = static_cast<float>(1u << width1);
  const uint32_t most = narrow2<KVZ_BF16>(1.0f - c0, 1.0f - c1), least = narrow2<KVZ_BF16>(c0 + 1.0f, c1 + 1.0f);
  const uint32_t mask =
      (0x7f80u | (0x7fu & ~((1u << (8 - bits0)) - 1u))) | (0x7f80u | (0x7fu & ~((1u << (8 - bits1)) - 1u))) << 16;
  uint32_t more = 0;
  load_again();
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const uint4 four = reinterpret_cast<const uint4*>(words)[q];
    const uint32_t bound[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t b = bound[j] & mask, v = x[q * 4 + j];
      more = more | fma_bf16_2(b, least, v) | ~fma_bf16_2(b, most, v);
    }
  }
  return more;
}

// ---- bounds of channels
// ---------------------------------------------------------------------------------------------------

// The largest usable bound of a page's channels, 0 if there is none. By the whole CTA.
KVZ_DEV float largest_channel_bound(const Bounds& bounds, uint32_t channels, Shared& shared) {
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int32_t most = 0;  // bits of non-negative numbers order like them
  for (uint32_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const float bound = bound_at(bounds, 0, 0, c);
    if (bound > 0.0f && static_cast<int32_t>(bits_of(bound)) > most) most = static_cast<int32_t>(bits_of(bound));
  }
  most = __reduce_max_sync(kAllLanes, most);
  __syncthreads();
  if (lane == 0) shared.words[warp] = static_cast<uint32_t>(most);
  __syncthreads();
  for (uint32_t i = 0; i < warps; ++i) {
    most = static_cast<int32_t>(shared.words[i]) > most ? static_cast<int32_t>(shared.words[i]) : most;
  }
  return float_of(static_cast<uint32_t>(most));
}

// ---- bounds of a page
// ---------------------------------------------------------------------------------------------------

// Bytes of the scales that a segment begins with.
KVZ_DEV uint64_t scale_bytes(uint32_t steps, const Geometry& g, uint32_t heads) {
  return steps == KVZ_STEPS_TOKEN ? (static_cast<uint64_t>(g.tokens) * heads + 3) / 4 * 4 : 0;
}

KVZ_DEV uint32_t scale_byte(float bound, float page) {
  return bound > 0.0f ? scale_of(bound, page) : bound == 0.0f ? static_cast<uint32_t>(KVZ_SCALE_ZERO) : 0u;
}

// The scale bytes of all vectors, zero-padded. By the whole CTA.
KVZ_DEV void put_scales(const float* vectors, uint32_t count, uint64_t padded, float page, uint8_t* out) {
  for (uint64_t v = threadIdx.x; v < padded; v += blockDim.x) {
    out[v] = static_cast<uint8_t>(v < count ? scale_byte(vectors[v], page) : 0u);
  }
}

// Do scale bytes give bounds in the format's range, zeros behind them? One of `width` lanes looks at its share.
KVZ_DEV_NOINLINE bool scales_are_valid(const uint8_t* scales, uint32_t count, uint64_t padded, float page,
                                       uint32_t lane, uint32_t width) {
  if (bits_of(page) << (32 - KVZ_SCALE_SHIFT) != 0) return false;
  const uint32_t most = scale_of(kLeastBound, page);
  bool bad = false;
  for (uint64_t i = lane; i < padded; i += width) {
    const uint32_t c = scales[i];
    bad = (i < count ? c > most && c != KVZ_SCALE_ZERO : c != 0) || bad;
  }
  return !bad;
}

// What a page is to be quantised with; `page` is 0 where it cannot be. Its extremes are finite, `exponent` is its
// largest exponent field. `vectors` is room in shared memory. By the whole CTA.
template <int DTYPE>
KVZ_DEV Bounds page_bounds(const kvz_segment& segment, const Geometry& g, float low, float high, uint32_t exponent,
                           float* vectors, Shared& shared) {
  Bounds b = {};
  b.heads = segment.heads;
  b.missing = no_bound();
  if (segment.bound_kind == KVZ_BOUND_TOKEN_RMS) {
    b.steps = KVZ_STEPS_TOKEN;
    b.vectors = vectors;
    b.page = token_bounds<DTYPE>(g, segment.bound, exponent, segment.heads, vectors, shared);
  } else if (segment.bound_kind == KVZ_BOUND_CHANNEL_TABLE) {
    b.steps = KVZ_STEPS_CHANNEL;
    b.channels = reinterpret_cast<const float*>(segment.channel_bounds);
    b.page = largest_channel_bound(b, g.channels, shared);
  } else {
    b.page = page_bound(segment.bound_kind, segment.bound, low, high);
  }
  return b;
}

// What a segment was quantised with.
KVZ_DEV Bounds bounds_of(const kvz_segment& segment, const kvz_entry& entry, const uint8_t* from) {
  Bounds b = {};
  b.steps = entry.coding & KVZ_STEPS_MASK;
  b.page = entry.bound;
  b.heads = segment.heads;
  b.scales = from;
  b.channels = reinterpret_cast<const float*>(segment.channel_bounds);
  return b;
}

}  // namespace gpu
}  // namespace kvz
