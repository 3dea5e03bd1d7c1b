// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The fast path's decoder: a page is decoded from shared memory straight to its place, while the bytes of the next one
// arrive.
#pragma once

#include "cuda_strips.inl"

namespace kvz {
namespace gpu {

// What is known of a page before its bytes: looked up in the background, two pages ahead.
struct Ahead {
  kvz_entry entry;
  uint64_t payload;
  int64_t block_id;
  kvz_segment segment;
  uint32_t refused, page;
};
static_assert(sizeof(kvz_segment) % 8 == 0 && sizeof(Ahead) % 16 == 0, "copies are of 8 and 16 bytes");
constexpr uint32_t kAheads = 3;  // this page, the next, and the one after it
constexpr uint32_t kDecodeRoom = (kSharedBytes + kAheads * static_cast<uint32_t>(sizeof(Ahead)) + 15) / 16 * 16;

// When decoding: segments, and behind them what may be read of words that no group has.
constexpr uint32_t kBehindRoom = 32;
constexpr uint32_t decode_room_bytes(uint32_t strips, uint32_t vectors) {
  return strips * (kStripClassBytes + kStripBytes) + vectors + 16;
}
// The last part is the steps of the vectors, tokens x heads, of a page.
constexpr uint32_t fast_decode_bytes(uint32_t strips, uint32_t vectors) {
  return kDecodeRoom + decode_room_bytes(strips, vectors) + kBehindRoom + vectors * 4;
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
  KVZ_DEV uint32_t bf16(int t) const {  // four loads become one: t is a constant
    const uint4 four = reinterpret_cast<const uint4*>(vectors)[t / 4];
    return (t % 4 == 0 ? four.x : t % 4 == 1 ? four.y : t % 4 == 2 ? four.z : four.w) & mask;
  }
  template <int DTYPE>
  KVZ_DEV uint32_t values(int t, uint32_t u0, uint32_t u1, float zero) const {
    const uint32_t both = bf16(t);
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

// Most pages have one row of whole strips, and the strips of a warp lie as far apart as strip_step says: what would
// have to be divided elsewhere is known there. Their classes are nibbles.
KVZ_DEV bool is_usual(const Strips& strips, uint32_t warps, uint32_t coding) {
  return coding != KVZ_OUTLIER && (strips.head_dim & (strips.head_dim - 1)) == 0 && strip_step(strips, warps) != 0;
}

// A page in shared memory to its place; `STEPS`, KVZ_STEPS_PAGE or another, says what its steps depend on. `vectors` is
// room for those by token, `USUAL` says that the page is as above. By the whole CTA.
template <int DTYPE, int STEPS, bool USUAL>
KVZ_DEV void decode_strips(Shared& shared, uint32_t* vectors, const kvz_segment& segment, const Strips& strips,
                           const kvz_entry& entry, const uint8_t* data, uint32_t part = 0, uint32_t parts = 1) {
  constexpr bool kByToken = STEPS == KVZ_STEPS_TOKEN;
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x), warps = blockDim.x / kWarp;
  const uint32_t coding = entry.coding & KVZ_CODING_MASK;
  const uint32_t count = strips.count;
  const uint32_t groups = USUAL ? strips.channels : segment.tokens / 16 * strips.channels;
  const uint32_t class_bytes = coding == KVZ_OUTLIER || coding == KVZ_LOSSLESS ? groups : groups / 2;
  const uint32_t scales = kByToken ? segment.tokens * segment.heads : 0;
  if (scales + class_bytes > entry.size) return;
  // Steps of 16 tokens and a head stand together.
  if constexpr (kByToken) {
    for (uint32_t v = threadIdx.x; v < scales; v += blockDim.x) {
      const uint32_t block = v / 16, row = USUAL ? 0 : block / segment.heads, head = block - row * segment.heads;
      const uint8_t scale = data[(row * 16 + v % 16) * segment.heads + head];
      vectors[v] = vector_step<DTYPE>(bound_of_scale(scale, entry.bound));
    }
  }
  data += scales;

  const uint32_t fixed_words = coding == KVZ_LOSSLESS ? Traits<DTYPE>::kFraction + 1 : 0;
  const auto place_of = [&](uint32_t index) {
    if (!USUAL) return groups_at(strips, index, lane);
    Groups at;
    at.first = index * kStripChannels + lane * 2;
    at.inside = true;
    return at;
  };
  // Classes of a lane's groups of a strip, and the widths that they stand for; 0 where there is no group.
  struct Widths {
    uint32_t classes, width0, width1, apart0, apart1;
  };
  const auto widths_at = [&](uint32_t index) {
    Widths w = {};
    if (index >= count) return w;
    const Groups at = place_of(index);
    if (!at.inside) return w;
    w.classes = load_class_pair(data, USUAL ? KVZ_FIXED : coding, at.first);
    uint32_t c0 = w.classes & 255u, c1 = w.classes >> 8;
    if (!USUAL && coding == KVZ_OUTLIER) {
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

  for (uint32_t index = warp; index < count; index += 2 * warps) {
    const uint32_t second = index + warps;
    const uint32_t both = __reduce_add_sync(kAllLanes, words_of(widths_at(index)) | words_of(widths_at(second)) << 16);
    if (lane == 0) {
      shared.words[index] = both & 0xffffu;
      if (second < count) shared.words[second] = both >> 16;
    }
  }
  __syncthreads();

  const Prefix prefix = prefix_of(shared.words, count, lane);
  if (scales + class_bytes + 2 * prefix.total != entry.size) return;
  float step = 1.0f;  // lane w: S for width w
  if (coding != KVZ_LOSSLESS) {
    step = step_of<DTYPE>(static_cast<int>(coding), static_cast<int>(lane & 15u), entry.bound);
  }
  const uint32_t step_warps = parts * warps, own = part * warps + warp;  // as if all parts' warps were of one CTA
  const int64_t strip_bytes = strip_step(strips, step_warps);
  uint8_t* page_to = value_address(strips, 0, own * kStripChannels + lane * 2);
  for (uint32_t pair = own; pair < count; pair += 2 * step_warps) {
    Widths w[2];
    float bounds[2][2];
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      const uint32_t index = pair + j * step_warps;
      w[j] = widths_at(index);
      if (STEPS != KVZ_STEPS_CHANNEL || index >= count) continue;
      const Groups at = place_of(index);
      const uint32_t channel = USUAL ? at.first : strip_at(strips, index).channel + (at.inside ? lane * 2 : 0);
      const float* const from = reinterpret_cast<const float*>(segment.channel_bounds) + channel;
      bounds[j][0] = from[0];
      bounds[j][1] = from[1];
    }
    const uint32_t both = words_of(w[0]) | words_of(w[1]) << 16, before = inclusive_sum(both, lane) - both;
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      const uint32_t index = pair + j * step_warps;
      if (index >= count) break;
      const uint32_t position = class_bytes / 2 + words_before(prefix, index, lane) + ((before >> (16 * j)) & 0xffffu);
      const uint16_t* const words0 = reinterpret_cast<const uint16_t*>(data) + position;
      const uint16_t* const words1 = words0 + w[j].width0;
      const uint32_t have = ((1u << w[j].width0) - 1u) | ((1u << w[j].width1) - 1u) << 16;
      const Groups at = place_of(index);
      if (!USUAL && strip_bytes == 0) {
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
      if constexpr (STEPS == KVZ_STEPS_PAGE) {
        step0 = __shfl_sync(kAllLanes, step, static_cast<int>(w[j].width0 & 15u));
        step1 = __shfl_sync(kAllLanes, step, static_cast<int>(w[j].width1 & 15u));
        medium = medium && 2.0f * entry.bound <= kLargestMediumStep;
      } else if constexpr (kByToken) {
        if (USUAL) {
          tokens = vectors + (at.first >> (31 - __clz(static_cast<int>(strips.head_dim)))) * 16;
        } else {
          const Strip strip = strip_at(strips, index);
          const uint32_t channel = strip.channel + (at.inside ? lane * 2 : 0);
          tokens = vectors + (strip.row * segment.heads + channel / segment.head_dim) * 16;
        }
      } else {
        step0 = channel_step<DTYPE>(coding, w[j].width0, bounds[j][0]);
        step1 = channel_step<DTYPE>(coding, w[j].width1, bounds[j][1]);
        const bool fits = step0 > 0.0f && step1 > 0.0f && step0 <= kLargestMediumStep && step1 <= kLargestMediumStep;
        medium = __all_sync(kAllLanes, fits) && medium;
      }
      const auto decode_with = [&](const auto& steps) {
        if (narrow) {
          decode_strip_narrow(words0, words1, have, steps, rows);
        } else {
          decode_strip_medium<DTYPE>(words0, words1, have, steps, rows);
        }
      };
      if (medium) {
        if constexpr (kByToken) {
          const uint32_t mask0 = step_mask<DTYPE>(KVZ_FIXED, w[j].width0);
          decode_with(TokenSteps{tokens, mask0 | step_mask<DTYPE>(KVZ_FIXED, w[j].width1) << 16});
        } else {
          decode_with(SameSteps(step0, step1));
        }
      } else if (STEPS == KVZ_STEPS_PAGE && coding == KVZ_LOSSLESS &&
                 !__any_sync(kAllLanes,
                             (w[j].classes & 255u) == KVZ_NIBBLE_RAW || w[j].classes >> 8 == KVZ_NIBBLE_RAW)) {
        decode_strip_lossless<DTYPE>(words0, words1, have, bases, entry.param, rows);
      } else {
        decode_strip_any<DTYPE>(data, position, coding, w[j].classes, bases, entry.param, step0, step1, tokens, rows.to,
                                rows.stride);
      }
    }
  }
}

// Out of line, so that the registers of the others stay what they are; what is passed by reference would leave them.
template <int DTYPE, int STEPS, bool USUAL>
KVZ_DEV_NOINLINE void decode_strips_apart(const DecodeParams& p, uint8_t* memory, uint32_t slot, const uint8_t* data) {
  const Ahead& page = reinterpret_cast<const Ahead*>(memory + kSharedBytes)[slot];
  uint32_t* const vectors = reinterpret_cast<uint32_t*>(memory + kDecodeRoom + p.room_bytes + kBehindRoom);
  decode_strips<DTYPE, STEPS, USUAL>(*reinterpret_cast<Shared*>(memory), vectors, page.segment,
                                     strips_of(page.segment, page.block_id), page.entry, data);
}

// `WITHIN`: steps may differ within pages.
template <int DTYPE, bool WITHIN>
KVZ_DEV void decode_fast(const DecodeParams& p, uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Ahead* const aheads = reinterpret_cast<Ahead*>(memory + kSharedBytes);
  uint8_t* const room = memory + kDecodeRoom;
  const uint32_t thread = threadIdx.x;
  const uint32_t pages = p.num_blocks * p.num_segments, step = gridDim.x;

  // A page is decoded while the bytes of the next one arrive, if there is room for both: one begins where shared memory
  // does, the other ends where it ends. What is known of the page after that arrives meanwhile.
  const auto look_up = [&](uint32_t page, uint32_t slot) {
    if (thread >= kWarp) return;
    Ahead& to = aheads[slot];
    if (thread == 0) to.page = page;
    if (page >= pages) return;
    const uint32_t block = page / p.num_segments, segment = page - block * p.num_segments;
    constexpr uint32_t kPieces = sizeof(kvz_segment) / 8;
    if (thread < kPieces) {
      copy_async_few<8>(reinterpret_cast<uint8_t*>(&to.segment) + thread * 8,
                        reinterpret_cast<const uint8_t*>(p.segments + segment) + thread * 8);
    } else if (thread == kPieces) {
      copy_async_16(&to.entry, p.table + page);
    } else if (thread == kPieces + 1) {
      copy_async_few<8>(&to.payload, p.payloads + block);
    } else if (thread == kPieces + 2) {
      copy_async_few<8>(&to.block_id, p.block_ids + block);
    } else if (thread == kPieces + 3) {
      copy_async_few<4>(&to.refused, p.all_or_nothing ? &p.counters->any_bad : p.bad + block);
    }
  };
  // The sizes were validated, and never exceed the room; a table that changes in between must not either.
  const auto words_of = [&](const Ahead& a) {  // bytes to fetch
    if (a.page >= pages) return 0u;
    const uint32_t bytes = units_of(a.entry.size) * 16;
    return a.refused == 0 && a.entry.coding >= KVZ_FIXED && bytes <= p.room_bytes ? bytes : 0u;
  };
  const auto start_of = [](const Ahead& a) {
    return reinterpret_cast<const uint8_t*>(a.payload) + static_cast<uint64_t>(a.entry.offset) * 16;
  };
  const auto fetch = [&](const Ahead& a, uint32_t bytes, uint32_t to) {
    const uint8_t* const from = start_of(a);
    for (uint32_t i = thread * 16; i < bytes; i += blockDim.x * 16) copy_async_16(room + to + i, from + i);
  };

  const auto decode_page = [&](uint32_t slot, const uint8_t* data) {
    const Ahead& page = aheads[slot];
    const uint32_t coding = page.entry.coding;
    if (coding < KVZ_FIXED) {
      const Geometry g = geometry_of(page.segment, page.block_id);
      if (coding == KVZ_RAW) {
        copy_page<true>(g, const_cast<uint8_t*>(start_of(page)));
      } else {
        fill_page(g, *reinterpret_cast<const uint32_t*>(start_of(page)));
      }
      return;
    }
    const Strips strips = strips_of(page.segment, page.block_id);
    const bool usual = is_usual(strips, blockDim.x / kWarp, coding & KVZ_CODING_MASK);
    const uint32_t steps = coding & KVZ_STEPS_MASK;
    if (!WITHIN || steps == KVZ_STEPS_PAGE) {
      if (usual) {
        decode_strips<DTYPE, KVZ_STEPS_PAGE, true>(shared, nullptr, page.segment, strips, page.entry, data);
      } else {
        decode_strips_apart<DTYPE, KVZ_STEPS_PAGE, false>(p, memory, slot, data);
      }
    } else if constexpr (WITHIN) {
      if (steps == KVZ_STEPS_TOKEN) {
        if (usual) {
          decode_strips_apart<DTYPE, KVZ_STEPS_TOKEN, true>(p, memory, slot, data);
        } else {
          decode_strips_apart<DTYPE, KVZ_STEPS_TOKEN, false>(p, memory, slot, data);
        }
      } else if (usual) {
        decode_strips_apart<DTYPE, KVZ_STEPS_CHANNEL, true>(p, memory, slot, data);
      } else {
        decode_strips_apart<DTYPE, KVZ_STEPS_CHANNEL, false>(p, memory, slot, data);
      }
    }
  };

  // The first two pages of a CTA are its own, those behind them go to whoever is free: pages differ in what they take,
  // and multiprocessors in how quickly memory serves them. A ticket is taken while a page is decoded, for the next
  // look.
  uint32_t slot = 0, at = 0, ticket = 0;
  look_up(blockIdx.x, 0);
  look_up(blockIdx.x + step, 1);
  if (thread == 0) ticket = atomicAdd(&p.counters->ticket, 1u);
  copy_async_wait();
  __syncthreads();
  fetch(aheads[0], words_of(aheads[0]), at);
  while (true) {
    const uint32_t next_slot = slot == kAheads - 1 ? 0 : slot + 1;
    copy_async_wait();
    __syncthreads();
    const Ahead &now = aheads[slot], &next = aheads[next_slot];
    if (now.page >= pages) break;
    if (thread < kWarp) {
      look_up(2 * step + __shfl_sync(kAllLanes, ticket, 0), next_slot == kAheads - 1 ? 0 : next_slot + 1);
      if (thread == 0) ticket = atomicAdd(&p.counters->ticket, 1u);
    }
    const uint32_t here = words_of(now), follows = words_of(next);
    // What is read of words behind this page is masked; yet the next one is not being written there meanwhile.
    const bool together = here + kBehindRoom + follows <= p.room_bytes;
    const uint32_t next_at = together && at == 0 ? p.room_bytes - follows : 0;
    if (together) fetch(next, follows, next_at);
    if (here != 0 || (now.refused == 0 && now.entry.coding < KVZ_FIXED)) decode_page(slot, room + at);
    __syncthreads();
    if (!together) fetch(next, follows, next_at);
    slot = next_slot;
    at = next_at;
  }
  finish_decode(p, shared);
}

}  // namespace gpu
}  // namespace kvz
