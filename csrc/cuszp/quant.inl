// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The arithmetic of the format, shared by the C++ and the CUDA codec so that both write the same bytes:
// quantisation to an absolute bound (after cuSZp: Huang et al., SC'23), zigzag codes, the width of a group, the
// exponent transform of the lossless coding. Scalar, branch-light, no state. Both compilers must keep IEEE-754
// semantics: no contraction of multiply and add, no flush to zero. docs/reference/format.md says why the bound is
// exact.
#pragma once

#include <stdint.h>
#include <string.h>

#include "format.h"

#if defined(__CUDACC__)
#define KVZ_HD __host__ __device__ __forceinline__
#else
#define KVZ_HD inline __attribute__((always_inline))
#endif

namespace kvz {

KVZ_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

KVZ_HD float float_of(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

// Number of bits of z: 0 for 0, 32 for 2^31 and above.
KVZ_HD int bit_length(uint32_t z) {
#if defined(__CUDA_ARCH__)
  return 32 - __clz(static_cast<int>(z));
#else
  return z == 0 ? 0 : 32 - __builtin_clz(z);
#endif
}

// ---- dtypes
// -----------------------------------------------------------------------------------------------------------

template <int DTYPE>
struct Traits;

template <>
struct Traits<KVZ_BF16> {
  using word = uint16_t;
  static constexpr int kBits = 16, kFraction = 7, kExponentBits = 8;
  static constexpr int kSignificant = 8, kLeastExponent = -133;  // spacing of the subnormals: 2^kLeastExponent
  static constexpr int kMaxWidth = 14, kMaxCode = 8191;
  static constexpr uint32_t kInfinity = 0x7f80u, kMaxFinite = 0x7f7fu;
  KVZ_HD static float to_float(uint32_t v) { return float_of(v << 16); }
  KVZ_HD static uint32_t from_float(float x) { return bits_of(x) >> 16; }  // toward zero
};

template <>
struct Traits<KVZ_FP16> {
  using word = uint16_t;
  static constexpr int kBits = 16, kFraction = 10, kExponentBits = 5;
  static constexpr int kSignificant = 11, kLeastExponent = -24;
  static constexpr int kMaxWidth = 14, kMaxCode = 8191;
  static constexpr uint32_t kInfinity = 0x7c00u, kMaxFinite = 0x7bffu;
  // Exact for finite values: the fraction is placed under a float32 exponent that is 112 too small, then scaled up.
  KVZ_HD static float to_float(uint32_t v) {
    return float_of(float_bits(float_of((v & 0x7fffu) << 13) * float_of(0x77800000u)) | ((v & 0x8000u) << 16));
  }
  // Toward zero; what exceeds the largest finite value becomes it (only forged records reach that).
  KVZ_HD static uint32_t from_float(float x) {
    uint32_t u = bits_of(x);
    uint32_t magnitude = u & 0x7fffffffu;
    magnitude = magnitude > 0x477fe000u ? 0x477fe000u : magnitude;
    return (toward_zero(float_of(magnitude)) & 0x7fffu) | ((u >> 16) & 0x8000u);
  }

 private:
  KVZ_HD static uint32_t float_bits(float x) { return bits_of(x); }
  // Bits of a float16 below a non-negative x: the spacing of float16 at x is at least 2^-24, so subtracting what lies
  // below it before the exact scaling keeps the scaling exact.
  KVZ_HD static uint32_t toward_zero(float x) {
    uint32_t u = bits_of(x);
    if (u >= 0x38800000u) return (u >> 13) - (112u << 10);  // normal in float16
    return static_cast<uint32_t>(x * 16777216.0f);          // subnormal: multiples of 2^-24, truncated
  }
};

template <>
struct Traits<KVZ_FP32> {
  using word = uint32_t;
  static constexpr int kBits = 32, kFraction = 23, kExponentBits = 8;
  static constexpr int kSignificant = 24, kLeastExponent = -149;
  static constexpr int kMaxWidth = 24, kMaxCode = 2097151;
  static constexpr uint32_t kInfinity = 0x7f800000u, kMaxFinite = 0x7f7fffffu;
  KVZ_HD static float to_float(uint32_t v) { return float_of(v); }
  KVZ_HD static uint32_t from_float(float x) { return bits_of(x); }
};

template <int DTYPE>
KVZ_HD uint32_t exponent_of(uint32_t v) {
  using Tr = Traits<DTYPE>;
  return (v >> Tr::kFraction) & ((1u << Tr::kExponentBits) - 1u);
}

template <int DTYPE>
KVZ_HD bool is_finite(uint32_t v) {
  return (v & Traits<DTYPE>::kInfinity) != Traits<DTYPE>::kInfinity;
}

// ---- bound and steps
// ----------------------------------------------------------------------------------------------------

constexpr float kLeastBound = 1.262177448353618889e-29f;    // 2^-96
constexpr float kLargestBound = 1.329227995784915873e+36f;  // 2^120

// The bound of a page as the format applies it: float64 -> float32 toward zero, at most 2^120. 0 when it is too fine
// to quantise with (below 2^-96).
KVZ_HD float applied_bound(double bound) {
  if (!(bound >= static_cast<double>(kLeastBound))) return 0.0f;
  if (bound >= static_cast<double>(kLargestBound)) return kLargestBound;
#if defined(__CUDA_ARCH__)
  return __double2float_rz(bound);
#else
  float nearest = static_cast<float>(bound);
  return static_cast<double>(nearest) > bound ? float_of(bits_of(nearest) - 1u) : nearest;
#endif
}

KVZ_HD float page_bound(uint8_t kind, double bound, float page_min, float page_max) {
  if (kind == KVZ_BOUND_RELATIVE) {
    bound *= static_cast<double>(page_max) - static_cast<double>(page_min);
  }
  return applied_bound(bound);
}

// Significant bits that the step of width w keeps of the bound. `coding` decides: only `fixed` has fine steps.
template <int DTYPE>
KVZ_HD int step_bits(int coding, int w, float bound) {
  if (coding != KVZ_FIXED || DTYPE == KVZ_FP32) return 1;
  int n = Traits<DTYPE>::kSignificant + 1 - w;
  if (DTYPE == KVZ_FP16) {
    int k = static_cast<int>(bits_of(bound) >> 23) - 127;
    int representable = k + 2 - Traits<DTYPE>::kLeastExponent;
    n = n < representable ? n : representable;
  }
  return n < 1 ? 1 : (n > 8 ? 8 : n);
}

// S = 2 trunc_n(B).
template <int DTYPE>
KVZ_HD float step_of(int coding, int w, float bound) {
  int n = step_bits<DTYPE>(coding, w, bound);
  return 2.0f * float_of(bits_of(bound) & ~((1u << (24 - n)) - 1u));
}

KVZ_HD float inverse_step(float step) { return 1.0f / step; }

// ---- bounds that differ within a page
// -----------------------------------------------------------------------------------

// Bound of the token vector whose scaled squares (each value times `scale`, a power of two) add up to `sum`: r x rms,
// rounded down. The factor covers the rounding of the sum. 0 when it is too fine.
KVZ_HD float token_bound(double r, float sum, uint32_t head_dim, float scale) {
#if defined(__CUDA_ARCH__)
  const double rms = __dsqrt_rn(static_cast<double>(sum) / static_cast<double>(head_dim));
#else
  const double rms = __builtin_sqrt(static_cast<double>(sum) / static_cast<double>(head_dim));
#endif
  const float bound = applied_bound(rms * (1.0 - 1.0 / 524288.0) * r / static_cast<double>(scale));
  return float_of(bits_of(bound) >> KVZ_SCALE_SHIFT << KVZ_SCALE_SHIFT);
}

// The power of two that brings the values of a page, whose largest exponent field is given, near 1.
template <int DTYPE>
KVZ_HD float square_scale(uint32_t page_exponent) {
  constexpr int bias = (1 << (Traits<DTYPE>::kExponentBits - 1)) - 1;
  const int f = bias - static_cast<int>(page_exponent);
  return float_of(static_cast<uint32_t>((f < -126 ? -126 : f) + 127) << 23);
}

// Scale byte of a token's bound below the page's largest one, and back. Only for bounds above 0.
KVZ_HD uint32_t scale_of(float bound, float page_bound) {
  return (bits_of(page_bound) >> KVZ_SCALE_SHIFT) - (bits_of(bound) >> KVZ_SCALE_SHIFT);
}
KVZ_HD float bound_of_scale(uint32_t scale, float page_bound) {
  return scale == KVZ_SCALE_ZERO ? 0.0f
                                 : float_of(((bits_of(page_bound) >> KVZ_SCALE_SHIFT) - scale) << KVZ_SCALE_SHIFT);
}

// ---- codes
// --------------------------------------------------------------------------------------------------------------

// Round to nearest, ties to even, for |t| <= 2^22: the float32 spacing at 1.5 x 2^23 is 1.
KVZ_HD int32_t round_code(float t) {
  const float magic = 12582912.0f;
  return static_cast<int32_t>(bits_of(t + magic)) - static_cast<int32_t>(bits_of(magic));
}

KVZ_HD uint32_t zigzag(int32_t q) { return (static_cast<uint32_t>(q) << 1) ^ static_cast<uint32_t>(q >> 31); }

KVZ_HD int32_t unzigzag(uint32_t z) { return static_cast<int32_t>((z >> 1) ^ (0u - (z & 1u))); }

// The widest zigzag code of a group lies at its least or its largest value.
KVZ_HD uint32_t extreme_code(float low, float high, float inverse) {
  uint32_t a = zigzag(round_code(low * inverse)), b = zigzag(round_code(high * inverse));
  return a > b ? a : b;
}

// Can the group be quantised at all? low and high are its extremes; `inverse` that of the power-of-two step.
template <int DTYPE>
KVZ_HD bool quantisable(float low, float high, float bound, float inverse) {
  using Tr = Traits<DTYPE>;
  float largest = -low > high ? -low : high;
  float t = largest * inverse;
  // Half a code of room: t < kMaxCode + 0.5 rounds to kMaxCode at most, and is false for NaN.
  return (largest + bound <= Tr::to_float(Tr::kMaxFinite)) && t < static_cast<float>(Tr::kMaxCode) + 0.5f;
}

// Width of a quantisable group in coding `fixed`. `inverse` and `finer` are 1/S for the power-of-two step and, in
// `finer[w]`, for every width.
template <int DTYPE>
KVZ_HD int fixed_width(float low, float high, float inverse, const float* finer) {
  int w = bit_length(extreme_code(low, high, inverse));
  if (DTYPE != KVZ_FP32 && w > 0) {
    if ((extreme_code(low, high, finer[w - 1]) >> (w - 1)) == 0) return w - 1;
  }
  return w;
}

// ---- lossless
// -----------------------------------------------------------------------------------------------------------

// v = (E - e) x 2^s + sign x 2^(s-1) + fraction, for e <= E.
template <int DTYPE>
KVZ_HD uint32_t lossless_code(uint32_t v, uint32_t base) {
  using Tr = Traits<DTYPE>;
  constexpr int s = Tr::kFraction + 1;
  uint32_t sign = (v >> (Tr::kBits - 1)) & 1u;
  uint32_t fraction = v & ((1u << Tr::kFraction) - 1u);
  return ((base - exponent_of<DTYPE>(v)) << s) | (sign << Tr::kFraction) | fraction;
}

template <int DTYPE>
KVZ_HD uint32_t lossless_value(uint32_t code, uint32_t base) {
  using Tr = Traits<DTYPE>;
  constexpr int s = Tr::kFraction + 1;
  uint32_t exponent = (base - (code >> s)) & ((1u << Tr::kExponentBits) - 1u);
  uint32_t sign = (code >> Tr::kFraction) & 1u;
  uint32_t fraction = code & ((1u << Tr::kFraction) - 1u);
  return (sign << (Tr::kBits - 1)) | (exponent << Tr::kFraction) | fraction;
}

// ---- Rice codes
// ---------------------------------------------------------------------------------------------------------
//
// R. F. Rice: "Some Practical Universal Noiseless Coding Techniques", JPL 79-22, 1979. A code z is z >> k in unary and
// the low k bits as they are.

// What the groups of a page share.
struct RicePage {
  uint32_t least = 0;   // `rice`: the least parameter of a group; `lossless_rice`: the parameter of all
  uint32_t planes = 0;  // bits a group: of its parameter above the least one; of its base below `base`
  uint32_t base = 0;    // `lossless_rice`: the largest exponent base
  bool any_raw = false;

  // Planes of `rice`; `lossless_rice` lacks that of the differences.
  KVZ_HD uint32_t total_planes(bool lossless) const { return planes + (any_raw ? 1u : 0u) + (lossless ? 0u : 1u); }
};

KVZ_HD uint64_t rice_plane_bytes(uint64_t groups) { return (groups + 31) / 32 * 4; }
KVZ_HD uint64_t rice_strips(uint64_t rows, uint64_t columns) {
  return rows * ((columns + KVZ_STRIP_GROUPS - 1) / KVZ_STRIP_GROUPS);
}

// Bytes before the planes: `rice` has its parameters in the segment table, `lossless_rice` its base alone.
KVZ_HD uint64_t rice_head_bytes(bool lossless) { return lossless ? 4 : 0; }

// The table's `param` of a `rice` segment.
KVZ_HD uint32_t rice_param(const RicePage& page) { return page.least | page.planes << 5 | (page.any_raw ? 128u : 0u); }
KVZ_HD RicePage rice_of_param(uint32_t param) {
  RicePage page;
  page.least = param & 31u;
  page.planes = param >> 5 & 3u;
  page.any_raw = param >> 7 != 0;
  return page;
}

// The parameter for 16 codes of this sum.
KVZ_HD int rice_parameter(uint32_t sum) { return bit_length((9u * sum) >> 8); }

constexpr uint32_t kRiceParameters = 32, kRiceBases = 32;

// About how many bits a group takes more when its parameter lies `far` above or below the best one (measured).
KVZ_HD uint32_t rice_above(uint32_t far) { return far == 1 ? 5 : 16 * far - 15; }
KVZ_HD uint32_t rice_below(uint32_t far) { return (20u << far) - 16 * far - 18; }

// The window of parameters, `least` to least + 2^planes - 1, that suits a page: histogram[k] of `groups` groups have
// the best parameter k <= most.
KVZ_HD RicePage rice_window(const uint32_t* histogram, uint64_t groups, uint32_t most) {
  RicePage best;
  uint64_t cost = ~0ull;
  for (uint32_t planes = 0; planes <= KVZ_RICE_PLANES; ++planes) {
    const uint32_t size = 1u << planes;
    for (uint32_t least = 0; least + size - 1 <= most; ++least) {
      uint64_t sum = planes * groups;
      for (uint32_t k = 0; k <= most; ++k) {
        const uint32_t top = least + size - 1;
        sum += static_cast<uint64_t>(histogram[k]) * (k > top     ? rice_below(k - top)
                                                      : k < least ? rice_above(least - k)
                                                                  : 0);
      }
      if (sum < cost) {
        cost = sum;
        best.least = least;
        best.planes = planes;
      }
    }
  }
  return best;
}

// The exponent base of a group from the sum of its 16 exponent fields.
template <int DTYPE>
KVZ_HD uint32_t rice_base(uint32_t sum) {
  const uint32_t base = (sum + 20u) >> 4, most = (1u << Traits<DTYPE>::kExponentBits) - 1u;
  return base < most ? base : most;
}

// The window of bases, `base` down to base - 2^planes + 1, that suits a page: histogram[i] of `groups` groups have a
// base i below `highest` (the last: or more).
KVZ_HD RicePage rice_bases(const uint32_t* histogram, uint64_t groups, uint32_t highest) {
  RicePage best;
  uint64_t cost = ~0ull;
  for (uint32_t planes = 0; planes <= KVZ_RICE_BASE_PLANES; ++planes) {
    const uint32_t size = 1u << planes;
    for (uint32_t lower = 0; lower < 8 && lower <= highest; ++lower) {
      uint64_t sum = planes * groups;
      for (uint32_t i = 0; i < kRiceBases; ++i) {
        const uint32_t last = lower + size - 1;
        sum += static_cast<uint64_t>(histogram[i]) * (i < lower ? 32 * (lower - i) : i > last ? 11 * (i - last) : 0);
      }
      if (sum < cost) {
        cost = sum;
        best.base = highest - lower;
        best.planes = planes;
      }
    }
  }
  return best;
}

// Exponents around a base: three of four codes are for those at the base or below, the fourth for those above.
KVZ_HD uint32_t rice_exponent_code(uint32_t base, uint32_t exponent) {
  const uint32_t below = base - exponent, above = exponent - base;
  return exponent <= base ? below / 3 * 4 + below % 3 : 4 * above - 1;
}
KVZ_HD uint32_t rice_exponent(uint32_t base, uint32_t code) {
  const uint32_t block = code >> 2, rest = code & 3u;
  return rest == 3 ? base + block + 1 : base - 3 * block - rest;
}

}  // namespace kvz
