// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The fast path: pages with G = 16, 16-bit values, T a multiple of 16 and rows of 16-byte chunks. A warp owns *strips*
// of 16 tokens x 64 channels, a lane two adjacent channels, that is two groups, in the halves of 16 registers. Extremes
// need no communication, and a 16 x 16 bit transpose of the registers gives the planes of both groups.
#pragma once

#include "cuda_bounds.inl"

namespace kvz {
namespace gpu {

// Strips of a page, for the host: 0 where it is none for the fast path.
inline uint64_t strips_of_page(const kvz_segment& s) {
  uint64_t all = s.base | static_cast<uint64_t>(s.block_stride) | static_cast<uint64_t>(s.token_stride) |
                 static_cast<uint64_t>(s.head_dim) * 2;
  if (s.heads > 1) all |= static_cast<uint64_t>(s.head_stride);
  const bool fast = s.dtype <= KVZ_FP16 && s.group_tokens == 16 && s.tokens % 16 == 0 && all % 16 == 0 &&
                    s.token_stride == static_cast<int32_t>(s.token_stride);
  const uint64_t channels = static_cast<uint64_t>(s.heads) * s.head_dim;
  return fast ? s.tokens / 16 * ((channels + kStripChannels - 1) / kStripChannels) : 0;
}

struct Strips {
  uint8_t* base;  // of the page
  int64_t token_stride, head_stride;
  uint32_t channels, head_dim, per_row, count;
  bool whole;  // every strip has all its channels
};

KVZ_DEV Strips strips_of(const kvz_segment& segment, int64_t block_id) {
  Strips s;
  s.base = reinterpret_cast<uint8_t*>(segment.base) + block_id * segment.block_stride;
  s.token_stride = segment.token_stride;
  s.head_stride = segment.head_stride;
  s.head_dim = segment.head_dim;
  s.channels = segment.heads * segment.head_dim;
  s.per_row = (s.channels + kStripChannels - 1) / kStripChannels;
  s.count = segment.tokens / 16 * s.per_row;
  s.whole = s.channels % kStripChannels == 0;
  return s;
}

// Where a strip begins: its row of groups and its first channel.
struct Strip {
  uint32_t row, channel;
};
KVZ_DEV Strip strip_at(const Strips& s, uint32_t index) {
  Strip at;
  at.row = index < s.per_row ? 0 : index / s.per_row;
  at.channel = (index - at.row * s.per_row) * kStripChannels;
  return at;
}

// A lane's two groups of a strip: number of the first, and whether they exist.
struct Groups {
  uint32_t first;
  bool inside;
};
KVZ_DEV Groups groups_at(const Strips& s, uint32_t index, uint32_t lane) {
  Groups g;
  g.first = index * kStripChannels + lane * 2;
  g.inside = true;
  if (!s.whole) {
    const Strip at = strip_at(s, index);
    g.first = at.row * s.channels + at.channel + lane * 2;
    g.inside = at.channel + lane * 2 < s.channels;
  }
  return g;
}

// Address of a value; head_dim is usually a power of two.
KVZ_DEV uint8_t* value_address(const Strips& s, uint32_t token, uint32_t channel) {
  const uint32_t head = (s.head_dim & (s.head_dim - 1)) == 0 ? channel >> (31 - __clz(static_cast<int>(s.head_dim)))
                                                             : channel / s.head_dim;
  return s.base + token * s.token_stride + head * s.head_stride + (channel - head * s.head_dim) * 2;
}

// Bytes from a place in a strip to the same place in the strip that is `warps` further on, where that is the same for
// all strips of a page, which is the usual case; else 0.
KVZ_DEV int64_t strip_step(const Strips& s, uint32_t warps) {
  const uint32_t channels = warps * kStripChannels, within = s.head_dim - 1;
  if (!s.whole || s.count != s.per_row) return 0;
  if (s.head_stride == s.head_dim * 2) return channels * 2;
  if ((s.head_dim & within) != 0 || (channels & within) != 0) return 0;
  return (channels >> (31 - __clz(static_cast<int>(s.head_dim)))) * s.head_stride;
}

// Least and largest finite value of one half of a strip's column, for the columns that also hold others.
template <int DTYPE>
KVZ_DEV_NOINLINE uint2 finite_extremes(const uint32_t* column, uint32_t shift) {
  int32_t low = key_16(Traits<DTYPE>::kInfinity), high = key_16(Traits<DTYPE>::kInfinity | 0x8000u);
#pragma unroll 1
  for (int t = 0; t < 16; ++t) {
    const uint32_t v = (column[t * 32] >> shift) & 0xffffu;
    if (!is_finite<DTYPE>(v)) continue;
    const int32_t key = key_16(v);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  uint2 r;
  r.x = value_of_key_16(low) << shift;
  r.y = value_of_key_16(high) << shift;
  return r;
}

// Codes at one step, in float32 that ends in the number (round_code without the last subtraction): both halves of x.
template <int DTYPE>
KVZ_DEV void quantise_2(uint32_t x, float inverse_low, float inverse_high, uint32_t& low, uint32_t& high) {
  low = bits_of(widen<DTYPE>(x) * inverse_low + 12582912.0f);
  high = bits_of(widen_high<DTYPE>(x) * inverse_high + 12582912.0f);
}
constexpr uint32_t kCodeZero = 0x4b400000u;  // bits of 12582912.0f, whose low half is 0

// What a lane knows of its two groups of a strip.
struct Pair {
  uint32_t width0, width1;  // planes: 16 in a raw group
  uint32_t words0, words1;  // with the first values that are kept apart
  uint32_t raw;             // mask of the raw halves
  uint32_t apart;           // mask of the halves whose first value is kept apart
};

// The same in a word, kept from pass to pass. The bases are those of the lossless coding.
constexpr uint32_t kStateApart = 0x20u, kStateRaw = 0x40u;
KVZ_DEV uint32_t make_state(uint32_t width0, uint32_t width1) { return width0 | width1 << 8; }
KVZ_DEV uint32_t state_words(uint32_t state) {
  return (state & 31u) + ((state >> 8) & 31u) + ((state >> 5) & 1u) + ((state >> 13) & 1u);
}
KVZ_DEV Pair pair_of_state(uint32_t state) {
  Pair p;
  p.width0 = state & 31u;
  p.width1 = (state >> 8) & 31u;
  p.words0 = p.width0 + ((state >> 5) & 1u);
  p.words1 = p.width1 + ((state >> 13) & 1u);
  p.raw = ((state >> 6) & 1u) * 0xffffu + ((state >> 14) & 1u) * 0xffff0000u;
  p.apart = ((state >> 5) & 1u) * 0xffffu + ((state >> 13) & 1u) * 0xffff0000u;
  return p;
}

template <int DTYPE>
KVZ_DEV Pair pair_of_classes(uint32_t coding, uint32_t class0, uint32_t class1) {
  Pair p;
  p.apart = 0;
  if (coding == KVZ_LOSSLESS) {
    constexpr uint32_t s = Traits<DTYPE>::kFraction + 1;
    p.raw = (class0 == KVZ_NIBBLE_RAW ? 0xffffu : 0u) | (class1 == KVZ_NIBBLE_RAW ? 0xffff0000u : 0u);
    p.width0 = class0 == KVZ_NIBBLE_RAW ? 16u : s + class0;
    p.width1 = class1 == KVZ_NIBBLE_RAW ? 16u : s + class1;
  } else {
    if (coding == KVZ_OUTLIER) {
      p.apart = ((class0 & KVZ_BYTE_FIRST_APART) ? 0xffffu : 0u) | ((class1 & KVZ_BYTE_FIRST_APART) ? 0xffff0000u : 0u);
      class0 = (class0 & 63u) == KVZ_BYTE_RAW ? KVZ_NIBBLE_RAW : class0 & 63u;
      class1 = (class1 & 63u) == KVZ_BYTE_RAW ? KVZ_NIBBLE_RAW : class1 & 63u;
    }
    p.raw = (class0 == KVZ_NIBBLE_RAW ? 0xffffu : 0u) | (class1 == KVZ_NIBBLE_RAW ? 0xffff0000u : 0u);
    p.width0 = class0 == KVZ_NIBBLE_RAW ? 16u : class0;
    p.width1 = class1 == KVZ_NIBBLE_RAW ? 16u : class1;
  }
  p.words0 = p.width0 + (p.apart & 1u);
  p.words1 = p.width1 + (p.apart >> 31);
  return p;
}

// Sum over strips, and over those before `strip`. By every warp.
KVZ_DEV uint32_t sum_words(const uint32_t* words, uint32_t count, uint32_t lane) {
  uint32_t v = lane < count ? words[lane] : 0u;
#pragma unroll 1
  for (uint32_t i = lane + kWarp; i < count; i += kWarp) v += words[i];
  return __reduce_add_sync(kAllLanes, v);
}

// Where strips' words begin, from the number of words of each. The same in every warp.
struct Prefix {
  const uint32_t* words;
  uint32_t count, before;  // of strip `lane`, where there are few
  uint32_t total;
};
KVZ_DEV Prefix prefix_of(const uint32_t* words, uint32_t count, uint32_t lane) {
  Prefix p;
  p.words = words;
  p.count = count;
  p.before = 0;
  if (count <= kWarp) {
    const uint32_t mine = lane < count ? words[lane] : 0u, sum = inclusive_sum(mine, lane);
    p.before = sum - mine;
    p.total = __shfl_sync(kAllLanes, sum, 31);
  } else {
    p.total = sum_words(words, count, lane);
  }
  return p;
}
KVZ_DEV uint32_t words_before(const Prefix& p, uint32_t index, uint32_t lane) {
  if (index >= p.count) return p.total;
  return p.count <= kWarp ? __shfl_sync(kAllLanes, p.before, static_cast<int>(index)) : sum_words(p.words, index, lane);
}

}  // namespace gpu
}  // namespace kvz
