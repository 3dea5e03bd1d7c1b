// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The CUDA codec's general path: any dtype, geometry and alignment, a thread per group and a CTA per page, straight
// from and to device memory. It reads a page up to three times, which the caches mostly absorb.
#pragma once

#include "cuda_bounds.inl"

namespace kvz {
namespace gpu {

// ---- groups
// -----------------------------------------------------------------------------------------------------------

// Call visit(i, address) for the values of a group that lie inside the page. Unrolled: i is a constant in each call.
template <class Visit>
KVZ_DEV void for_group(const Geometry& g, uint32_t index, Visit visit) {
  const uint32_t row = index / g.columns;
  for_places(g, row, index - row * g.columns,
             [&](uint32_t i, uint8_t* at, uint32_t, uint32_t, uint32_t) { visit(i, at); });
}

// Values outside the page are 0. Returns a mask of those inside.
template <int DTYPE>
KVZ_DEV uint32_t load_group(const Geometry& g, uint32_t index, uint32_t (&v)[16]) {
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = 0;
  for_group(g, index, [&](uint32_t i, const uint8_t* at) {
    v[i] = load_value<DTYPE>(at);
    inside |= 1u << i;
  });
  return inside;
}

struct Quantiser {
  uint32_t coding;
  uint32_t run;  // values of a chain of differences
  float bound;
  float inverse;  // of the power-of-two step
};

// q at the power-of-two step and from it the codes of `plain`; the values are those of a quantisable group.
template <int DTYPE>
KVZ_DEV void difference_codes(const uint32_t (&v)[16], uint32_t inside, const Quantiser& z, uint32_t (&code)[16],
                              int32_t& first) {
  int32_t before = 0;
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
    const int32_t q = round_code(Traits<DTYPE>::to_float(v[i]) * z.inverse);
    if (i == 0) first = q;
    if ((i & (z.run - 1)) == 0) before = 0;
    code[i] = (inside >> i) & 1u ? zigzag(q - before) : 0u;
    before = q;
  }
}

// Class of a group as a byte class: the width, bit 6 for a first value kept apart, or KVZ_BYTE_RAW.
template <int DTYPE>
KVZ_DEV uint32_t quantised_class(const uint32_t (&v)[16], uint32_t inside, const Quantiser& z) {
  using Tr = Traits<DTYPE>;
  float low = 0.0f, high = 0.0f;
  bool finite = true, any = false;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (!((inside >> i) & 1u)) continue;
    const float x = Tr::to_float(v[i]);
    finite = finite && is_finite<DTYPE>(v[i]);
    low = any ? (x < low ? x : low) : x;
    high = any ? (x > high ? x : high) : x;
    any = true;
  }
  if (!finite || !quantisable<DTYPE>(low, high, z.bound, z.inverse)) return KVZ_BYTE_RAW;
  uint32_t w;
  if (z.coding == KVZ_FIXED) {
    w = static_cast<uint32_t>(bit_length(widest_code(low, high, z.inverse)));
    if (DTYPE != KVZ_FP32 && w > 0) {
      const float finer = inverse_step(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(w) - 1, z.bound));
      if ((widest_code(low, high, finer) >> (w - 1)) == 0) --w;
    }
    return w > Tr::kMaxWidth ? KVZ_BYTE_RAW : w;
  }
  uint32_t code[16];
  int32_t first;
  difference_codes<DTYPE>(v, inside, z, code, first);
  uint32_t rest = 0;
#pragma unroll
  for (int i = 1; i < 16; ++i) rest |= code[i];
  w = static_cast<uint32_t>(bit_length(rest | code[0]));
  uint32_t apart = 0;
  if (z.coding == KVZ_OUTLIER) {
    const uint32_t without = static_cast<uint32_t>(bit_length(rest));
    if (without + Tr::kBits / 16 < w) {
      apart = KVZ_BYTE_FIRST_APART;
      w = without;
    }
  }
  return w > Tr::kMaxWidth ? KVZ_BYTE_RAW : w | apart;
}

// ---- groups whose values have bounds of their own
// ------------------------------------------------------------------------

// The values of a group and their bounds; 0 and 1 outside of the page.
struct BoundedGroup {
  float x[16], bound[16];
  uint32_t inside;
};

template <int DTYPE>
KVZ_DEV BoundedGroup bounded_group(const Geometry& g, const Bounds& bounds, uint32_t index) {
  BoundedGroup v;
  v.inside = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    v.x[i] = 0.0f;
    v.bound[i] = 1.0f;
  }
  const uint32_t row = index / g.columns;
  for_places(g, row, index - row * g.columns,
             [&](uint32_t i, const uint8_t* at, uint32_t token, uint32_t head, uint32_t channel) {
               v.x[i] = Traits<DTYPE>::to_float(load_value<DTYPE>(at));
               v.bound[i] = bound_at(bounds, token, head, channel);
               v.inside |= 1u << i;
             });
  return v;
}

// Codes of `fixed` at the steps of a width, or of differences of `plain` along `run` values. `first` is the first q.
template <int DTYPE>
KVZ_DEV void bounded_codes(const BoundedGroup& v, uint32_t coding, uint32_t width, uint32_t run, uint32_t (&code)[16],
                           int32_t& first) {
  int32_t before = 0;
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
    const float step = step_of<DTYPE>(static_cast<int>(coding), static_cast<int>(width), v.bound[i]);
    const int32_t q = round_code(v.x[i] * (v.bound[i] > 0.0f ? reciprocal(step) : 0.0f));
    if (i == 0) first = q;
    if (coding == KVZ_FIXED || (i & (run - 1)) == 0) before = 0;
    code[i] = (v.inside >> i) & 1u ? zigzag(q - before) : 0u;
    before = q;
  }
}

// As quantised_class.
template <int DTYPE>
KVZ_DEV_NOINLINE uint32_t bounded_class(const Geometry& g, const Bounds& bounds, uint32_t index, uint32_t coding,
                                        uint32_t run) {
  using Tr = Traits<DTYPE>;
  const float most = Tr::to_float(Tr::kMaxFinite), room = static_cast<float>(Tr::kMaxCode) + 0.5f;
  const BoundedGroup v = bounded_group<DTYPE>(g, bounds, index);
  bool bad = false;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float magnitude = float_of(bits_of(v.x[i]) & 0x7fffffffu);
    const uint32_t exponent = bits_of(v.bound[i]) & 0x7f800000u;  // 1/S at the power-of-two step is a power of two
    const float inverse = exponent == 0 ? 0.0f : float_of((253u << 23) - exponent);
    bad = bad || !(magnitude + v.bound[i] <= most) || !(magnitude * inverse < room);
  }
  if (bad) return KVZ_BYTE_RAW;
  uint32_t code[16], rest = 0;
  int32_t first;
  const auto widths = [&](uint32_t of, uint32_t width) {
    bounded_codes<DTYPE>(v, of, width, run, code, first);
    rest = 0;
#pragma unroll
    for (int i = 1; i < 16; ++i) rest |= code[i];
    return static_cast<uint32_t>(bit_length(rest | code[0]));
  };
  // A width that no step depends on gives the power-of-two step.
  uint32_t w = widths(coding == KVZ_FIXED ? KVZ_FIXED : KVZ_PLAIN, coding == KVZ_FIXED ? 31u : 0u), apart = 0;
  if (coding == KVZ_FIXED) {
    if (DTYPE != KVZ_FP32 && w > 0 && widths(KVZ_FIXED, w - 1) <= w - 1) --w;
  } else if (coding == KVZ_OUTLIER) {
    const uint32_t without = static_cast<uint32_t>(bit_length(rest));
    if (without + Tr::kBits / 16 < w) {
      apart = KVZ_BYTE_FIRST_APART;
      w = without;
    }
  }
  return w > Tr::kMaxWidth ? KVZ_BYTE_RAW : w | apart;
}

// The codes of a group whose class bounded_class has found, in place of its bit patterns.
template <int DTYPE>
KVZ_DEV_NOINLINE void bounded_group_codes(const Geometry& g, const Bounds& bounds, uint32_t index, uint32_t coding,
                                          uint32_t width, uint32_t run, uint32_t (&code)[16], int32_t& first) {
  bounded_codes<DTYPE>(bounded_group<DTYPE>(g, bounds, index), coding, width, run, code, first);
}

// Nibble class and, in bits 4 and up, base of a group in the lossless coding.
template <int DTYPE>
KVZ_DEV uint32_t lossless_class(const uint32_t (&v)[16], uint32_t inside, uint32_t largest) {
  uint32_t top = 0, bottom = 0xffffffffu;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (!((inside >> i) & 1u)) continue;
    finite = finite && is_finite<DTYPE>(v[i]);
    const uint32_t e = exponent_of<DTYPE>(v[i]);
    top = e > top ? e : top;
    bottom = e < bottom ? e : bottom;
  }
  if (!finite) return KVZ_NIBBLE_RAW;
  const uint32_t gap = largest - top, base = gap < 15 ? gap : 15;
  return static_cast<uint32_t>(bit_length(largest - base - bottom)) | base << 4;
}

// ---- a page
// -----------------------------------------------------------------------------------------------------------

KVZ_DEV uint64_t sum_over_cta(uint64_t v, Shared& shared) {
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (uint32_t d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  __syncthreads();
  if (lane == 0) shared.sums[warp] = v;
  __syncthreads();
  uint64_t sum = 0;
  for (uint32_t i = 0; i < warps; ++i) sum += shared.sums[i];
  return sum;
}

// Exclusive sum over the CTA's threads; `total` is the sum of all.
KVZ_DEV uint32_t scan_cta(uint32_t v, Shared& shared, uint32_t& total) {
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const uint32_t inclusive = inclusive_sum(v, lane);
  __syncthreads();
  if (lane == 31) shared.words[warp] = inclusive;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
  for (uint32_t i = 0; i < warps; ++i) {
    if (i < warp) before += shared.words[i];
    total += shared.words[i];
  }
  return before + inclusive - v;
}

// A class to its place: a byte a group, or a nibble a group, of which the even threads write two.
KVZ_DEV void store_class(uint8_t* to, uint32_t index, uint32_t groups, uint32_t c, bool bytes) {
  const uint32_t next = __shfl_down_sync(kAllLanes, c, 1);
  if (index >= groups || to == nullptr) return;
  if (bytes) {
    to[index] = static_cast<uint8_t>(c);
  } else if (index % 2 == 0) {
    to[index / 2] = static_cast<uint8_t>(index + 1 < groups ? c | next << 4 : c);
  }
}

KVZ_DEV void clear_bytes(uint8_t* data, uint64_t from, uint64_t to) {
  for (uint64_t i = from + threadIdx.x; i < to; i += blockDim.x) data[i] = 0;
}

// Where the page is equal all over there is only its first value to store.
KVZ_DEV bool opaque_is_constant(const Geometry& g, Shared& shared) {
  const uint32_t first = g.base[0], heads = g.channels / g.head_dim;
  const uint64_t run = g.head_dim, total = static_cast<uint64_t>(g.tokens) * heads * run;
  const bool wide = alignment_of(g) % 4 == 0;
  uint64_t differs = 0;
  if (wide) {
    const uint64_t pieces = run / 4;
    for (uint64_t i = threadIdx.x; i < total / 4; i += blockDim.x) {
      const uint32_t at = static_cast<uint32_t>(i / pieces), head = at % heads, token = at / heads;
      differs |= reinterpret_cast<const uint32_t*>(g.base + token * g.token_stride + head * g.head_stride)[i % pieces] ^
                 first * 0x01010101u;
    }
  } else {
    for (uint64_t i = threadIdx.x; i < total; i += blockDim.x) {
      const uint32_t at = static_cast<uint32_t>(i / run), head = at % heads, token = at / heads;
      differs |= g.base[token * g.token_stride + head * g.head_stride + static_cast<int64_t>(i % run)] ^ first;
    }
  }
  return sum_over_cta(differs != 0, shared) == 0;
}

// What follows the decision: tell the others the size, find the place. Returns where the segment begins, or null.
KVZ_DEV uint8_t* claim_place(const EncodeParams& p, Shared& shared, uint32_t page, uint32_t b, uint32_t s,
                             const kvz_entry& entry) {
  const uint32_t units = units_of(entry.size);
  if (threadIdx.x == 0) publish_size(p, page, b, s, units);
  if (threadIdx.x < kWarp) {
    const Place at = place(p, page, b, s, units, threadIdx.x);
    if (threadIdx.x == 0) shared.destination = place_page(p, at, 0, page, entry);
  }
  __syncthreads();
  return shared.destination == ~0ull ? nullptr : p.arena + shared.destination * 16;
}

// The extremes of all threads' keys; whether no thread saw a difference. By the whole CTA.
KVZ_DEV bool reduce_extremes(Shared& shared, int32_t low, int32_t high, bool differs, float& page_low,
                             float& page_high) {
  const uint32_t lane = lane_of(threadIdx.x), warp = threadIdx.x / kWarp;
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (lane == 0) {
    shared.low[warp] = low;
    shared.high[warp] = high;
  }
  const bool constant = sum_over_cta(differs ? 1 : 0, shared) == 0;
  for (uint32_t i = 0; i < blockDim.x / kWarp; ++i) {
    low = shared.low[i] < low ? shared.low[i] : low;
    high = shared.high[i] > high ? shared.high[i] : high;
  }
  page_low = value_of_key_32(low);
  page_high = value_of_key_32(high);
  return constant;
}

// Least and largest finite value of a page (+inf and -inf if there is none), and whether all its bit patterns are the
// same. By the whole CTA.
template <int DTYPE>
KVZ_DEV bool page_extremes(const Geometry& g, Shared& shared, uint32_t first_value, float& page_low, float& page_high) {
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  int32_t low = key_32(float_of(0x7f800000u)), high = key_32(float_of(0xff800000u));
  uint32_t differs = 0;
  for (uint32_t i = thread; i < g.groups; i += threads) {
    for_group(g, i, [&](uint32_t, const uint8_t* at) {
      const uint32_t v = load_value<DTYPE>(at);
      differs |= v ^ first_value;
      if (is_finite<DTYPE>(v)) {
        const int32_t key = key_32(Traits<DTYPE>::to_float(v));
        low = key < low ? key : low;
        high = key > high ? key : high;
      }
    });
    if (g.groups - i <= threads) break;
  }
  return reduce_extremes(shared, low, high, differs != 0, page_low, page_high);
}

// The largest exponent field of a page's finite values, from its extremes.
template <int DTYPE>
KVZ_DEV uint32_t largest_exponent(float low, float high) {
  const uint32_t a = (bits_of(low) >> 23) & 255u, c = (bits_of(high) >> 23) & 255u, largest = a > c ? a : c;
  if (DTYPE != KVZ_FP16) return largest;
  return largest > 112 ? largest - 112 : 0;  // float16 numbers as float32: the same exponent field + 112
}

// `vectors`: room for the bounds of tokens x heads.
template <int DTYPE>
KVZ_DEV void encode_page(const EncodeParams& p, Shared& shared, float* vectors, uint32_t page, uint32_t b, uint32_t s,
                         const kvz_segment& segment, const Geometry& g) {
  using Tr = Traits<DTYPE>;
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  const uint64_t raw_bytes = static_cast<uint64_t>(g.tokens) * g.channels * g.value_bytes;
  const uint32_t first_value = load_value<DTYPE>(g.base);
  float page_low, page_high;
  const bool constant = page_extremes<DTYPE>(g, shared, first_value, page_low, page_high);
  const bool any_finite = page_low <= page_high;

  Quantiser z;
  z.coding = segment.coding;
  z.run = g.group_tokens == 1 ? 16 : g.group_tokens;
  z.bound = 0.0f;
  const bool lossy = segment.coding != KVZ_LOSSLESS && segment.bound_kind != KVZ_BOUND_LOSSLESS;
  uint32_t largest = 0;  // exponent field
  if (any_finite) largest = largest_exponent<DTYPE>(page_low, page_high);
  Bounds bounds = {};
  if (lossy && any_finite && !constant) {
    bounds = page_bounds<DTYPE>(segment, g, page_low, page_high, largest, vectors, shared);
    z.bound = bounds.page;
  }
  const bool alike = bounds.steps == KVZ_STEPS_PAGE;
  const uint64_t prefix = scale_bytes(bounds.steps, g, segment.heads);
  z.inverse = inverse_step(step_of<DTYPE>(KVZ_PLAIN, 0, z.bound > 0.0f ? z.bound : 1.0f));

  uint32_t v[16];
  uint8_t coding = KVZ_RAW, reason = KVZ_INCOMPRESSIBLE;
  uint64_t size = raw_bytes;
  if (constant) {
    coding = KVZ_CONSTANT;
    reason = KVZ_AS_ASKED;
    size = KVZ_CONSTANT_BYTES;
  } else {
    bool settled = false;
    if (z.bound > 0.0f) {
      uint64_t words = 0;
      for (uint32_t i = thread; i < g.groups; i += threads) {
        uint32_t c;
        if (alike) {
          const uint32_t inside = load_group<DTYPE>(g, i, v);
          c = quantised_class<DTYPE>(v, inside, z);
        } else {
          c = bounded_class<DTYPE>(g, bounds, i, z.coding, z.run);
        }
        words += words_of_class(c, true, false, Tr::kBits, Tr::kMaxWidth, 0, true);
        if (g.groups - i <= threads) break;
      }
      const uint64_t quantised =
          prefix + class_array_bytes(DTYPE, z.coding, g.groups) + 2 * sum_over_cta(words, shared);
      if (quantised < size) {
        size = quantised;
        coding = static_cast<uint8_t>(z.coding | bounds.steps);
        reason = KVZ_AS_ASKED;
      }
      settled = quantised * 8 <= raw_bytes * 5;
    }
    if (!settled) {
      uint64_t words = 0;
      for (uint32_t i = thread; i < g.groups; i += threads) {
        const uint32_t inside = load_group<DTYPE>(g, i, v);
        const uint32_t w = lossless_class<DTYPE>(v, inside, largest) & 15u;
        words += w == KVZ_NIBBLE_RAW ? Tr::kBits : Tr::kFraction + 1 + w;
        if (g.groups - i <= threads) break;
      }
      const uint64_t lossless = 2 * class_array_bytes(DTYPE, KVZ_LOSSLESS, g.groups) + 2 * sum_over_cta(words, shared);
      if (lossless < size) {
        reason = !lossy ? KVZ_AS_ASKED : z.bound > 0.0f ? KVZ_LOSSLESS_SMALLER : KVZ_BOUND_TOO_FINE;
        size = lossless;
        coding = KVZ_LOSSLESS;
      }
    }
  }
  const bool lossless = coding == KVZ_LOSSLESS;
  const kvz_entry entry = make_entry(segment, size, coding, coding >= KVZ_FIXED && !lossless ? z.bound : 0.0f,
                                     lossless ? largest : 0, reason);
  uint8_t* out = claim_place(p, shared, page, b, s, entry);
  const uint64_t padded = static_cast<uint64_t>(units_of(size)) * 16;
  if (out != nullptr) clear_bytes(out, size, padded);
  if (coding == KVZ_RAW) {
    if (out != nullptr) copy_page<false>(g, out);
    return;
  }
  if (coding == KVZ_CONSTANT) {
    if (out != nullptr && thread == 0) *reinterpret_cast<uint32_t*>(out) = first_value;
    return;
  }

  if (!lossless && out != nullptr) {
    put_scales(vectors, g.tokens * segment.heads, prefix, bounds.page, out);
    out += prefix;
  }
  const bool bytes = byte_classes(DTYPE, lossless ? coding : z.coding);
  const uint64_t class_bytes = class_array_bytes(DTYPE, lossless ? coding : z.coding, g.groups),
                 class_end = bytes ? g.groups : (static_cast<uint64_t>(g.groups) + 1) / 2;
  if (out != nullptr) {
    clear_bytes(out, class_end, class_bytes);
    if (lossless) clear_bytes(out + class_bytes, class_end, class_bytes);
  }
  uint16_t* words = reinterpret_cast<uint16_t*>(out + (lossless ? 2 * class_bytes : class_bytes));
  for (uint32_t start = 0; start < g.groups; start += threads) {
    const uint32_t i = start + thread;
    uint32_t code[16];
    uint32_t c = 0, count = 0, apart = 0;
    int32_t first = 0;
    bool raw = false;
    if (i < g.groups) {
      const uint32_t inside = load_group<DTYPE>(g, i, v);
      if (lossless) {
        c = lossless_class<DTYPE>(v, inside, largest);
        raw = (c & 15u) == KVZ_NIBBLE_RAW;
        count = raw ? Tr::kBits : Tr::kFraction + 1 + (c & 15u);
        const uint32_t top = largest - (c >> 4);
#pragma unroll
        for (int j = 0; j < 16; ++j) code[j] = raw ? v[j] : (inside >> j) & 1u ? lossless_code<DTYPE>(v[j], top) : 0u;
      } else {
        c = alike ? quantised_class<DTYPE>(v, inside, z) : bounded_class<DTYPE>(g, bounds, i, z.coding, z.run);
        raw = c == KVZ_BYTE_RAW;
        apart = !raw && (c & KVZ_BYTE_FIRST_APART) ? Tr::kBits / 16 : 0;
        const uint32_t w = c & 63u;
        count = raw ? Tr::kBits : w;
        if (raw) {
#pragma unroll
          for (int j = 0; j < 16; ++j) code[j] = v[j];
        } else if (!alike) {
          bounded_group_codes<DTYPE>(g, bounds, i, z.coding, w, z.run, code, first);
          if (apart) code[0] = 0;
        } else if (z.coding == KVZ_FIXED) {
          const float inverse = inverse_step(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(w), z.bound));
#pragma unroll
          for (int j = 0; j < 16; ++j) code[j] = zigzag(round_code(Tr::to_float(v[j]) * inverse));
        } else {
          difference_codes<DTYPE>(v, inside, z, code, first);
          if (apart) code[0] = 0;
        }
        if (!bytes && raw) c = KVZ_NIBBLE_RAW;
      }
    }
    uint32_t total;
    const uint32_t position = scan_cta(count + apart, shared, total);
    store_class(out, i, g.groups, lossless ? c & 15u : c, bytes);
    if (lossless) store_class(out + class_bytes, i, g.groups, c >> 4, false);
    if (i < g.groups && out != nullptr) {
      uint16_t* to = words + position;
      if (apart) *to++ = static_cast<uint16_t>(first);
      if (apart == 2) *to++ = static_cast<uint16_t>(static_cast<uint32_t>(first) >> 16);
      transpose_16(code);
#pragma unroll
      for (uint32_t j = 0; j < 16; ++j) {
        if (j < count) to[j] = static_cast<uint16_t>(code[j]);
        if (j + 16 < count) to[j + 16] = static_cast<uint16_t>(code[j] >> 16);
      }
    }
    words += total;
    if (g.groups - start <= threads) break;
  }
}

// A page as it is, or the one byte that it consists of.
KVZ_DEV void encode_bytes(const EncodeParams& p, Shared& shared, uint32_t page, uint32_t b, uint32_t s,
                          const kvz_segment& segment, const Geometry& g, bool constant, bool asked) {
  const uint64_t size = constant ? static_cast<uint64_t>(KVZ_CONSTANT_BYTES)
                                 : static_cast<uint64_t>(g.tokens) * g.channels * g.value_bytes;
  const kvz_entry entry = make_entry(segment, size, constant ? KVZ_CONSTANT : KVZ_RAW, 0.0f, 0,
                                     constant || asked ? KVZ_AS_ASKED : KVZ_OPAQUE_DTYPE);
  uint8_t* const out = claim_place(p, shared, page, b, s, entry);
  if (out == nullptr) return;
  clear_bytes(out, constant ? 1 : size, static_cast<uint64_t>(units_of(size)) * 16);
  if (!constant) {
    copy_page<false>(g, out);
  } else if (threadIdx.x == 0) {
    out[0] = g.base[0];
  }
}

KVZ_DEV void encode_general(const EncodeParams& p, uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  float* const vectors = reinterpret_cast<float*>(memory + kSharedBytes);
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
      encode_page<KVZ_BF16>(p, shared, vectors, page, b, s, segment, g);
    } else if (segment.dtype == KVZ_FP16) {
      encode_page<KVZ_FP16>(p, shared, vectors, page, b, s, segment, g);
    } else {
      encode_page<KVZ_FP32>(p, shared, vectors, page, b, s, segment, g);
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.page = atomicAdd(&p.counters->ticket, 1u);
    __syncthreads();
  }
  finish_encode(p, shared.last);
}

// ---- decode
// -----------------------------------------------------------------------------------------------------------

template <int DTYPE>
KVZ_DEV void decode_page(Shared& shared, const kvz_segment& segment, const kvz_entry& entry, const Geometry& g,
                         const uint8_t* from) {
  using Tr = Traits<DTYPE>;
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  const uint32_t coding = entry.coding & KVZ_CODING_MASK;
  const Bounds bounds = bounds_of(segment, entry, from);
  const bool alike = bounds.steps == KVZ_STEPS_PAGE;
  const uint64_t scales = scale_bytes(bounds.steps, g, segment.heads);
  from += scales;
  const bool lossless = coding == KVZ_LOSSLESS, bytes = byte_classes(DTYPE, coding);
  const uint64_t class_bytes = class_array_bytes(DTYPE, coding, g.groups);
  const uint64_t prefix = lossless ? 2 * class_bytes : class_bytes;
  const uint32_t run = g.group_tokens == 1 ? 16 : g.group_tokens;
  const uint16_t* words = reinterpret_cast<const uint16_t*>(from + prefix);
  uint64_t left = (entry.size - scales - prefix) / 2;  // words; validated, yet never passed by
  for (uint32_t start = 0; start < g.groups; start += threads) {
    const uint32_t i = start + thread;
    uint32_t c = 0, count = 0, apart = 0;
    bool raw = false;
    if (i < g.groups) {
      c = bytes ? from[i] : (from[i / 2] >> (i % 2 * 4)) & 15u;
      raw = bytes ? (c & 63u) == KVZ_BYTE_RAW : c == KVZ_NIBBLE_RAW;
      if (bytes && (c & KVZ_BYTE_FIRST_APART)) apart = Tr::kBits / 16;
      c &= 63u;
      count = raw ? Tr::kBits : lossless ? Tr::kFraction + 1 + c : c;
    }
    uint32_t total;
    const uint32_t position = scan_cta(count + apart, shared, total);
    if (total > left) return;
    if (i < g.groups) {
      const uint16_t* at = words + position;
      uint32_t first = 0;
      if (apart == 1) first = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(at[0])));
      if (apart == 2) first = at[0] | static_cast<uint32_t>(at[1]) << 16;
      at += apart;
      uint32_t code[16];
#pragma unroll
      for (uint32_t j = 0; j < 16; ++j) {
        uint32_t plane = 0;
        if (j < count) plane = at[j];
        if (j + 16 < count) plane |= static_cast<uint32_t>(at[j + 16]) << 16;
        code[j] = plane;
      }
      transpose_16(code);
      if (!raw) {
        if (lossless) {
          const int32_t top = static_cast<int32_t>(entry.param) -
                              static_cast<int32_t>((from[class_bytes + i / 2] >> (i % 2 * 4)) & 15u);
#pragma unroll
          for (int j = 0; j < 16; ++j)
            code[j] = lossless_value<DTYPE>(code[j], static_cast<uint32_t>(top > 0 ? top : 0));
        } else {
          uint32_t q = 0;
#pragma unroll
          for (uint32_t j = 0; j < 16; ++j) {
            const uint32_t d = static_cast<uint32_t>(unzigzag(code[j]));
            q = coding == KVZ_FIXED || (j & (run - 1)) == 0 ? d : q + d;
            if (j == 0 && apart) q = first;
            code[j] = q;
          }
          const auto value = [&](uint32_t j, float bound) {
            const float step = step_of<DTYPE>(static_cast<int>(coding), static_cast<int>(c), bound);
            code[j] = Tr::from_float(static_cast<float>(static_cast<int32_t>(code[j])) * step);
          };
          if (alike) {
#pragma unroll
            for (uint32_t j = 0; j < 16; ++j) value(j, entry.bound);
          } else {
            const uint32_t row = i / g.columns;
            for_places(g, row, i - row * g.columns,
                       [&](uint32_t j, const uint8_t*, uint32_t token, uint32_t head, uint32_t channel) {
                         value(j, bound_at(bounds, token, head, channel));
                       });
          }
        }
      }
      for_group(g, i, [&](uint32_t j, uint8_t* to) {
        *reinterpret_cast<typename Tr::word*>(to) = static_cast<typename Tr::word>(code[j]);
      });
    }
    words += total;
    left -= total;
    if (g.groups - start <= threads) break;
  }
}

KVZ_DEV void decode_general(const DecodeParams& p, uint8_t* memory) {
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
        decode_page<KVZ_BF16>(shared, segment, entry, g, from);
      } else if (segment.dtype == KVZ_FP16) {
        decode_page<KVZ_FP16>(shared, segment, entry, g, from);
      } else {
        decode_page<KVZ_FP32>(shared, segment, entry, g, from);
      }
      __syncthreads();
    }
    if (pages - page <= gridDim.x) break;
  }
  finish_decode(p, shared);
}

}  // namespace gpu
}  // namespace kvz
