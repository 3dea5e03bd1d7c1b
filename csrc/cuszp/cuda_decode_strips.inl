// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The fast path's decoder: a page is decoded from shared memory straight to its place, while the bytes of the next one
// arrive.
#pragma once

#include "cuda_strips.inl"

namespace kvz {
namespace gpu {

// When decoding: segments, and behind them what may be read of words that no group has.
constexpr uint32_t kBehindRoom = 32;
constexpr uint32_t decode_room_bytes(uint32_t strips, uint32_t vectors) {
  return strips * (kStripClassBytes + kStripBytes) + vectors + 16;
}
// The last part is the steps of the vectors, tokens x heads, of a page.
constexpr uint32_t fast_decode_bytes(uint32_t strips, uint32_t vectors) {
  return kSharedBytes + decode_room_bytes(strips, vectors) + kBehindRoom + vectors * 4;
}

// Steps of vectors, which have at most 5 significant bits: the upper half of the float32, in both halves. The step of a
// width is the part of it that a mask leaves.
template <int DTYPE>
KVZ_DEV uint32_t vector_step(float bound) {
  uint32_t bits = bits_of(2.0f * bound);
  if (DTYPE == KVZ_FP16) {  // the bits that it has at width 0
    const int n = step_bits<DTYPE>(KVZ_FIXED, 0, bound);
    bits &= ~((1u << (24 - n)) - 1u);
  }
  return bits >> 16 | (bits & 0xffff0000u);
}
template <int DTYPE>
KVZ_DEV uint32_t step_mask(uint32_t coding, uint32_t width) {
  constexpr uint32_t p = Traits<DTYPE>::kSignificant + 1;
  const uint32_t n = coding != KVZ_FIXED || width >= p ? 1 : p - width;
  return n >= 8 ? 0xffffu : 0xffffu & ~((1u << (8 - n)) - 1u);
}

// Classes of a lane's two groups, a byte each, in any coding.
KVZ_DEV uint32_t load_class_pair(const uint8_t* data, uint32_t coding, uint32_t first) {
  if (coding == KVZ_OUTLIER) return *reinterpret_cast<const uint16_t*>(data + first);
  const uint32_t c = data[first / 2];
  return (c & 15u) | (c & 0xf0u) << 4;
}

// Word b of both groups. It may lie behind the groups' own words, yet not behind the memory that follows a page.
KVZ_DEV uint32_t load_pair(const uint16_t* words0, const uint16_t* words1, int b) {
  return words0[b] | static_cast<uint32_t>(words1[b]) << 16;
}

// Mask of the halves whose group has word b, from one bit a word: those of the first group below, of the second above.
KVZ_DEV uint32_t has_word(uint32_t have, int b) { return sign_fill_2(have << (15 - b)); }

// A lane's column of a strip in the page.
struct Rows {
  uint8_t* to;
  int32_t stride;
  bool inside;
  KVZ_DEV void store(int t, uint32_t x) const {
    if (inside) store_page(row_of(to, stride, t), x);
  }
};

// A strip in any coding, raw groups and all widths. Steps are those of 16 vectors, if these are given.
template <int DTYPE>
KVZ_DEV_NOINLINE void decode_strip_any(const uint8_t* data, uint32_t position, uint32_t coding, uint32_t classes,
                                       uint32_t bases, uint32_t param, float step0, float step1,
                                       const uint32_t* vectors, uint8_t* to, int32_t stride) {
  using Tr = Traits<DTYPE>;
  constexpr int kFractionBits = Tr::kFraction;
  constexpr uint32_t kExponentMask = (0x7fffu & ~((1u << Tr::kFraction) - 1u)) * 0x00010001u;
  Rows rows = {to, stride, to != nullptr};
  Pair g = {};
  if (rows.inside) g = pair_of_classes<DTYPE>(coding, classes & 255u, classes >> 8);
  const uint16_t* words0 = reinterpret_cast<const uint16_t*>(data) + position;
  const uint16_t* words1 = words0 + g.words0;
  uint32_t first = 0;
  if (g.apart & 1u) first = *words0++;
  if (g.apart >> 31) first |= static_cast<uint32_t>(*words1++) << 16;

  uint32_t a[16];
#pragma unroll
  for (int b = 0; b < 16; ++b) {
    uint32_t low = 0, high = 0;
    if (b < static_cast<int>(g.width0)) low = words0[b];
    if (b < static_cast<int>(g.width1)) high = words1[b];
    a[b] = low | high << 16;
  }
  if (coding == KVZ_LOSSLESS) {
    const uint32_t sign = a[kFractionBits];
#pragma unroll
    for (int b = kFractionBits; b < 15; ++b) a[b] = a[b + 1];
    a[15] = sign;
    transpose_16(a);
    const int32_t top0 = static_cast<int32_t>(param) - static_cast<int32_t>(bases & 15u);
    const int32_t top1 = static_cast<int32_t>(param) - static_cast<int32_t>(bases >> 4);
    const uint32_t top = (low_half(static_cast<uint32_t>(top0 > 0 ? top0 : 0) << kFractionBits,
                                   static_cast<uint32_t>(top1 > 0 ? top1 : 0) << kFractionBits) &
                          kExponentMask) |
                         0x80008000u;
#pragma unroll
    for (int t = 0; t < 16; ++t) {
      const uint32_t x = ((top - (a[t] & kExponentMask)) & kExponentMask) | (a[t] & ~kExponentMask);
      rows.store(t, choose(g.raw, sign_from_top<DTYPE>(a[t]), x));
    }
    return;
  }
  const uint32_t sign = a[0];
#pragma unroll
  for (int b = 0; b < 15; ++b) a[b] = a[b + 1] ^ sign;
  a[15] = ~sign;  // halves are q + 32768
  transpose_16(a);
  const uint32_t mask = step_mask<DTYPE>(coding, g.width0) | step_mask<DTYPE>(coding, g.width1) << 16;
  uint32_t sum0 = kCodeZero, sum1 = kCodeZero;
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    const uint32_t d0 = (a[t] & 0xffffu) - 32768u, d1 = (a[t] >> 16) - 32768u;
    if (coding == KVZ_FIXED) {
      sum0 = kCodeZero + d0;
      sum1 = kCodeZero + d1;
    } else {
      sum0 += t == 0 && (g.apart & 1u)
                  ? static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(first & 0xffffu)))
                  : d0;
      sum1 += t == 0 && (g.apart >> 31) ? static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(first >> 16)))
                                        : d1;
    }
    if (vectors != nullptr) {
      const uint32_t steps = vectors[t] & mask;
      step0 = float_of(steps << 16);
      step1 = float_of(steps & 0xffff0000u);
    }
    const uint32_t x = narrow2<DTYPE>((float_of(sum0) - 12582912.0f) * step0, (float_of(sum1) - 12582912.0f) * step1);
    rows.store(t, choose(g.raw, zigzag_2(a[t] ^ 0x80008000u), x));
  }
}

// Steps of the tokens of a strip, of both groups.
struct SameSteps {  // the same for all tokens
  float step0, step1;
  uint32_t both;  // in bfloat16, if it holds them
  KVZ_DEV SameSteps(float s0, float s1) : step0(s0), step1(s1), both(narrow2<KVZ_BF16>(s0, s1)) {}
  KVZ_DEV uint32_t bf16(int) const { return both; }
  template <int DTYPE>
  KVZ_DEV uint32_t values(int, uint32_t u0, uint32_t u1, float zero) const {
    // u * S - zero * S: both products fit into float32, as does the difference.
    return narrow2<DTYPE>(fma_float(float_of(u0), step0, -zero * step0), fma_float(float_of(u1), step1, -zero * step1));
  }
};
struct TokenSteps {
  const uint32_t* vectors;  // of 16 tokens, a multiple of 16
  uint32_t mask;
  KVZ_DEV uint32_t bf16(int t) const { return vectors[t] & mask; }
  template <int DTYPE>
  KVZ_DEV uint32_t values(int t, uint32_t u0, uint32_t u1, float zero) const {
    const uint32_t both = vectors[t] & mask;
    return narrow2<DTYPE>((float_of(u0) - zero) * float_of(both << 16),
                          (float_of(u1) - zero) * float_of(both & 0xffff0000u));
  }
};

// A strip in the coding `fixed` whose groups are at most 7 bits wide: bfloat16 holds their codes, and the products.
template <class Steps>
KVZ_DEV void decode_strip_narrow(const uint16_t* words0, const uint16_t* words1, uint32_t have, const Steps& steps,
                                 const Rows& rows) {
  uint32_t a[8];
  const uint32_t sign = load_pair(words0, words1, 0) & has_word(have, 0);
#pragma unroll
  for (int b = 1; b < 7; ++b) a[b - 1] = (load_pair(words0, words1, b) & has_word(have, b)) ^ sign;
  a[6] = ~sign;
  a[7] = 0;
  transpose_8(a);  // bytes are q + 64
  // From a shuffle, so that it stays in a register: the compiler would rather load the selectors below each time.
  const uint32_t exponent = __shfl_sync(kAllLanes, 0x43434343u, 0);
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    const uint32_t number = __byte_perm(a[t & 7], exponent, t < 8 ? 0x4240 : 0x4341);  // 128 + (q + 64)
    const uint32_t q = fma_bf16_2(number, 0x3f803f80u, 0xc340c340u);
    rows.store(t, fma_bf16_2(q, steps.bf16(t), 0x80008000u));
  }
}

// A strip in the coding `fixed` whose groups are at most 12 bits wide.
template <int DTYPE, class Steps>
KVZ_DEV void decode_strip_medium(const uint16_t* words0, const uint16_t* words1, uint32_t have, const Steps& steps,
                                 const Rows& rows) {
  uint32_t a[8], h[8];
  const uint32_t sign = load_pair(words0, words1, 0) & has_word(have, 0);
#pragma unroll
  for (int b = 1; b < 9; ++b) a[b - 1] = (load_pair(words0, words1, b) & has_word(have, b)) ^ sign;
#pragma unroll
  for (int b = 9; b < 12; ++b) h[b - 9] = (load_pair(words0, words1, b) & has_word(have, b)) ^ sign;
  h[3] = ~sign;
  transpose_8(a);
  transpose_from_low_4(h);  // bytes of q + 2048
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    const uint32_t both = __byte_perm(a[t & 7], h[t & 7], t < 8 ? 0x6240 : 0x7351);
    const uint32_t u0 = __byte_perm(both, 0x4b000000u, 0x7410), u1 = __byte_perm(both, 0x4b000000u, 0x7432);
    rows.store(t, steps.template values<DTYPE>(t, u0, u1, 8390656.0f));  // 2^23 + 2048
  }
}

// A lossless strip without raw groups.
template <int DTYPE>
KVZ_DEV void decode_strip_lossless(const uint16_t* words0, const uint16_t* words1, uint32_t have, uint32_t bases,
                                   uint32_t param, const Rows& rows) {
  constexpr int kFractionBits = Traits<DTYPE>::kFraction;
  constexpr uint32_t kExponentMask = (0x7fffu & ~((1u << kFractionBits) - 1u)) * 0x00010001u;
  uint32_t a[16];
#pragma unroll
  for (int b = 0; b <= kFractionBits; ++b) a[b < kFractionBits ? b : 15] = load_pair(words0, words1, b);
#pragma unroll
  for (int b = kFractionBits + 1; b < 16; ++b) a[b - 1] = load_pair(words0, words1, b) & has_word(have, b);
  transpose_16(a);
  const int32_t top0 = static_cast<int32_t>(param) - static_cast<int32_t>(bases & 15u);
  const int32_t top1 = static_cast<int32_t>(param) - static_cast<int32_t>(bases >> 4);
  const uint32_t top = (low_half(static_cast<uint32_t>(top0 > 0 ? top0 : 0) << kFractionBits,
                                 static_cast<uint32_t>(top1 > 0 ? top1 : 0) << kFractionBits) &
                        kExponentMask) |
                       0x80008000u;
#pragma unroll
  for (int t = 0; t < 16; ++t) rows.store(t, choose(kExponentMask, top - (a[t] & kExponentMask), a[t]));
}

constexpr float kLargestMediumStep = 2.5353012e30f;  // 2^101: no product of decode_strip_medium overflows

// Step of a width in a channel; 0 where the table has no bound.
template <int DTYPE>
KVZ_DEV float channel_step(uint32_t coding, uint32_t width, float bound) {
  const bool usable = bound >= kLeastBound && bound <= kLargestBound;
  return step_of<DTYPE>(static_cast<int>(coding), static_cast<int>(width), usable ? bound : 0.0f);
}

// A page in shared memory to its place, or one of several parts of it. `WITHIN`: its steps differ within it; `vectors`
// is room for those by token. By the whole CTA.
template <int DTYPE, bool WITHIN>
KVZ_DEV void decode_strips(Shared& shared, uint32_t* vectors, const kvz_segment& segment, int64_t block_id,
                           const kvz_entry& entry, const uint8_t* data, uint32_t part = 0, uint32_t parts = 1) {
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x), warps = blockDim.x / kWarp;
  const uint32_t coding = entry.coding & KVZ_CODING_MASK;
  const Strips strips = strips_of(segment, block_id);
  const uint32_t count = strips.count, rounds = (count + warps - 1) / warps;
  const uint32_t groups = segment.tokens / 16 * strips.channels;
  const uint32_t class_bytes = coding == KVZ_OUTLIER || coding == KVZ_LOSSLESS ? groups : groups / 2;
  const bool by_token = WITHIN && (entry.coding & KVZ_STEPS_MASK) == KVZ_STEPS_TOKEN;
  const uint32_t scales = by_token ? segment.tokens * segment.heads : 0;
  if (scales + class_bytes > entry.size) return;
  // Steps of 16 tokens and a head stand together.
  for (uint32_t v = threadIdx.x; v < scales; v += blockDim.x) {
    const uint32_t token = v / segment.heads, head = v - token * segment.heads;
    vectors[(token / 16 * segment.heads + head) * 16 + token % 16] =
        vector_step<DTYPE>(bound_of_scale(data[v], entry.bound));
  }
  data += scales;

  const uint32_t fixed_words = coding == KVZ_LOSSLESS ? Traits<DTYPE>::kFraction + 1 : 0;
  // Classes of a lane's groups of a strip, and the widths that they stand for; 0 where there is no group.
  struct Widths {
    uint32_t classes, width0, width1, apart0, apart1;
  };
  const auto widths_at = [&](uint32_t index) {
    Widths w = {};
    if (index >= count) return w;
    const Groups at = groups_at(strips, index, lane);
    if (!at.inside) return w;
    w.classes = load_class_pair(data, coding, at.first);
    uint32_t c0 = w.classes & 255u, c1 = w.classes >> 8;
    if (coding == KVZ_OUTLIER) {
      w.apart0 = c0 >> 6;
      w.apart1 = c1 >> 6;
      c0 = (c0 & 63u) == KVZ_BYTE_RAW ? KVZ_NIBBLE_RAW : c0 & 63u;
      c1 = (c1 & 63u) == KVZ_BYTE_RAW ? KVZ_NIBBLE_RAW : c1 & 63u;
    }
    w.width0 = c0 == KVZ_NIBBLE_RAW ? 16u : fixed_words + c0;
    w.width1 = c1 == KVZ_NIBBLE_RAW ? 16u : fixed_words + c1;
    return w;
  };
  const auto words_of = [](const Widths& w) { return w.width0 + w.width1 + w.apart0 + w.apart1; };

  for (uint32_t k = 0; k < rounds; k += 2) {
    const uint32_t index = k * warps + warp, second = index + warps;
    const uint32_t both = __reduce_add_sync(kAllLanes, words_of(widths_at(index)) | words_of(widths_at(second)) << 16);
    if (lane == 0 && index < count) shared.words[index] = both & 0xffffu;
    if (lane == 0 && second < count) shared.words[second] = both >> 16;
  }
  __syncthreads();

  const Prefix prefix = prefix_of(shared.words, count, lane);
  if (scales + class_bytes + 2 * prefix.total == entry.size) {
    float step = 1.0f;  // lane w: S for width w
    if (coding != KVZ_LOSSLESS) {
      step = step_of<DTYPE>(static_cast<int>(coding), static_cast<int>(lane & 15u), entry.bound);
    }
    const uint32_t step_warps = parts * warps, own = part * warps + warp;  // as if all parts' warps were of one CTA
    const int64_t strip_bytes = strip_step(strips, step_warps);
    uint8_t* page_to = value_address(strips, 0, own * kStripChannels + lane * 2);
    for (uint32_t k = 0; k * step_warps < count; k += 2) {
      Widths w[2];
#pragma unroll
      for (uint32_t j = 0; j < 2; ++j) w[j] = widths_at((k + j) * step_warps + own);
      const uint32_t both = words_of(w[0]) | words_of(w[1]) << 16, before = inclusive_sum(both, lane) - both;
#pragma unroll
      for (uint32_t j = 0; j < 2; ++j) {
        const uint32_t index = (k + j) * step_warps + own;
        if (index >= count) break;
        const uint32_t position =
            class_bytes / 2 + words_before(prefix, index, lane) + ((before >> (16 * j)) & 0xffffu);
        const uint16_t* const words0 = reinterpret_cast<const uint16_t*>(data) + position;
        const uint16_t* const words1 = words0 + w[j].width0;
        const uint32_t have = ((1u << w[j].width0) - 1u) | ((1u << w[j].width1) - 1u) << 16;
        const Groups at = groups_at(strips, index, lane);
        if (strip_bytes == 0) {
          const Strip strip = strip_at(strips, index);
          page_to = at.inside ? value_address(strips, strip.row * 16, strip.channel + lane * 2) : nullptr;
        }
        Rows rows;
        rows.inside = at.inside;
        rows.to = page_to;
        page_to += strip_bytes;
        rows.stride = static_cast<int32_t>(strips.token_stride);
        const uint32_t widest = w[j].width0 > w[j].width1 ? w[j].width0 : w[j].width1;
        const uint32_t bases = coding == KVZ_LOSSLESS && at.inside ? data[groups / 2 + at.first / 2] : 0u;
        bool medium = coding == KVZ_FIXED && !__any_sync(kAllLanes, widest > 12);
        const bool narrow = DTYPE == KVZ_BF16 && !__any_sync(kAllLanes, widest > 7);
        float step0 = 1.0f, step1 = 1.0f;
        const uint32_t* tokens = nullptr;
        if (!WITHIN) {
          step0 = __shfl_sync(kAllLanes, step, static_cast<int>(w[j].width0 & 15u));
          step1 = __shfl_sync(kAllLanes, step, static_cast<int>(w[j].width1 & 15u));
          medium = medium && 2.0f * entry.bound <= kLargestMediumStep;
        } else {
          const Strip strip = strip_at(strips, index);
          const uint32_t channel = strip.channel + (at.inside ? lane * 2 : 0);
          if (by_token) {
            tokens = vectors + (strip.row * segment.heads + channel / segment.head_dim) * 16;
          } else {
            const float* const bounds = reinterpret_cast<const float*>(segment.channel_bounds) + channel;
            step0 = channel_step<DTYPE>(coding, w[j].width0, bounds[0]);
            step1 = channel_step<DTYPE>(coding, w[j].width1, bounds[1]);
            const bool fits =
                step0 > 0.0f && step1 > 0.0f && step0 <= kLargestMediumStep && step1 <= kLargestMediumStep;
            medium = __all_sync(kAllLanes, fits) && medium;
          }
        }
        if (medium && tokens != nullptr) {
          const uint32_t mask = step_mask<DTYPE>(KVZ_FIXED, w[j].width0) | step_mask<DTYPE>(KVZ_FIXED, w[j].width1)
                                                                               << 16;
          if (narrow) {
            decode_strip_narrow(words0, words1, have, TokenSteps{tokens, mask}, rows);
          } else {
            decode_strip_medium<DTYPE>(words0, words1, have, TokenSteps{tokens, mask}, rows);
          }
        } else if (medium) {
          if (narrow) {
            decode_strip_narrow(words0, words1, have, SameSteps(step0, step1), rows);
          } else {
            decode_strip_medium<DTYPE>(words0, words1, have, SameSteps(step0, step1), rows);
          }
        } else if (coding == KVZ_LOSSLESS && !__any_sync(kAllLanes, (w[j].classes & 255u) == KVZ_NIBBLE_RAW ||
                                                                        w[j].classes >> 8 == KVZ_NIBBLE_RAW)) {
          decode_strip_lossless<DTYPE>(words0, words1, have, bases, entry.param, rows);
        } else {
          decode_strip_any<DTYPE>(data, position, coding, w[j].classes, bases, entry.param, step0, step1, tokens,
                                  rows.to, rows.stride);
        }
      }
    }
  }
}

// Out of line, so that the registers of the others stay what they are; what is passed by reference would leave them.
template <int DTYPE>
KVZ_DEV_NOINLINE void decode_strips_within(const DecodeParams& p, uint8_t* memory, uint32_t segment_index,
                                           int64_t block_id, uint32_t coding, uint32_t size, float bound,
                                           const uint8_t* data) {
  const kvz_segment segment = p.segments[segment_index];
  kvz_entry entry = {};
  entry.coding = static_cast<uint8_t>(coding);
  entry.size = size;
  entry.bound = bound;
  uint32_t* const vectors = reinterpret_cast<uint32_t*>(memory + kSharedBytes + p.room_bytes + kBehindRoom);
  decode_strips<DTYPE, true>(*reinterpret_cast<Shared*>(memory), vectors, segment, block_id, entry, data);
}

// `WITHIN`: steps may differ within pages.
template <int DTYPE, bool WITHIN>
KVZ_DEV void decode_fast(const DecodeParams& p, uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* const room = memory + kSharedBytes;
  const uint32_t thread = threadIdx.x;
  const uint32_t pages = p.num_blocks * p.num_segments;

  // A page is decoded while the bytes of the next one arrive, if there is room for both: one begins where shared memory
  // does, the other ends where it ends. What is known of the page after that is loaded meanwhile.
  struct Next {
    kvz_entry entry;
    uint64_t payload;
    int64_t block_id;
    uint32_t segment_index;
    bool refused;
  };
  const auto look_up = [&](uint32_t page) {
    Next n = {};
    n.refused = page >= pages;
    if (n.refused) return n;
    const uint32_t block = page / p.num_segments;
    n.segment_index = page - block * p.num_segments;
    n.refused = block_is_refused(p, block);
    n.entry = p.table[page];
    n.payload = p.payloads[block];
    n.block_id = p.block_ids[block];
    return n;
  };
  const auto bytes_of = [](const Next& n) { return units_of(n.entry.size) * 16; };
  // The sizes were validated, and never exceed the room; a table that changes in between must not either.
  const auto has_words = [&](const Next& n) {
    return !n.refused && n.entry.coding >= KVZ_FIXED && bytes_of(n) <= p.room_bytes;
  };
  const auto start_of = [](const Next& n) {
    return reinterpret_cast<const uint8_t*>(n.payload) + static_cast<uint64_t>(n.entry.offset) * 16;
  };
  const auto fetch = [&](const Next& n, uint32_t to) {
    const uint8_t* const from = start_of(n);
    for (uint32_t i = thread * 16; i < bytes_of(n); i += blockDim.x * 16) copy_async_16(room + to + i, from + i);
  };

  const auto decode_page = [&](const Next& now, const uint8_t* data) {
    const kvz_entry entry = now.entry;
    const kvz_segment segment = p.segments[now.segment_index];
    if (entry.coding < KVZ_FIXED) {
      const Geometry g = geometry_of(segment, now.block_id);
      if (entry.coding == KVZ_RAW) {
        copy_page<true>(g, const_cast<uint8_t*>(start_of(now)));
      } else {
        fill_page(g, *reinterpret_cast<const uint32_t*>(start_of(now)));
      }
      return;
    }
    if (!WITHIN || (entry.coding & KVZ_STEPS_MASK) == KVZ_STEPS_PAGE) {
      decode_strips<DTYPE, false>(shared, nullptr, segment, now.block_id, entry, data);
    } else {
      decode_strips_within<DTYPE>(p, memory, now.segment_index, now.block_id, entry.coding, entry.size, entry.bound,
                                  data);
    }
  };

  const uint32_t step = gridDim.x;
  Next now = look_up(blockIdx.x), next = look_up(blockIdx.x + step);
  uint32_t at = 0;
  if (has_words(now)) fetch(now, at);
  for (uint32_t page = blockIdx.x; page < pages; page += step) {
    const Next after = look_up(page + 2 * step);
    const bool here = has_words(now), follows = has_words(next);
    const bool together = follows && (here ? bytes_of(now) : 0) + bytes_of(next) <= p.room_bytes;
    const uint32_t next_at = together && at == 0 ? p.room_bytes - bytes_of(next) : 0;
    if (here) {
      copy_async_wait();
      __syncthreads();
    }
    if (together) fetch(next, next_at);
    if (here || (!now.refused && now.entry.coding < KVZ_FIXED)) decode_page(now, room + at);
    __syncthreads();
    if (follows && !together) fetch(next, next_at);
    now = next;
    next = after;
    at = next_at;
  }
  finish_decode(p, shared);
}

}  // namespace gpu
}  // namespace kvz
