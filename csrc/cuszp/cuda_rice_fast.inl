// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Batches of pages that the Rice codings' fast kernels take: words of two 16-bit values, 16 tokens a group. A CTA takes
// a page, a warp a few of its strips of 64 groups, a lane two neighbouring groups of each, in the halves of 16
// registers; most arithmetic is done on both halves at a time. The segment is in shared memory while it is put together
// or taken apart. The bytes are those of cuda_rice.inl, which takes the other batches.
#pragma once

#include "cuda_rice.inl"

namespace kvz {
namespace gpu {

constexpr uint32_t kRiceFastWarps = 16, kRiceFastStrips = 32;  // most of a CTA, of a page
constexpr uint32_t kBothHalves = 0x00010001u;

// Follows Shared in a CTA's shared memory.
struct RiceFastShared {
  RicePage page;
  uint32_t histogram[32];
  uint32_t bases[256];
  uint32_t strips[kRiceFastStrips];  // words << 16 | bits of the stream, the top bit: there is a raw group
  uint32_t flags[kRiceFastWarps], totals[kRiceFastWarps];
  float sums[kRiceFastStrips][16];  // of the squares of the channels of a strip
};
constexpr uint32_t kRiceFastBytes = kSharedBytes + 3840;
static_assert(sizeof(RiceFastShared) <= kRiceFastBytes - kSharedBytes, "what follows begins behind RiceFastShared");

// May the pages of this segment go this way? Words of two values, strips that fit.
inline bool rice_is_fast(const kvz_segment& s) {
  uint64_t all = s.base | static_cast<uint64_t>(s.block_stride) | static_cast<uint64_t>(s.token_stride) |
                 static_cast<uint64_t>(s.head_dim) * 2;
  if (s.heads > 1) all |= static_cast<uint64_t>(s.head_stride);
  const uint64_t strips =
      s.tokens / 16 * ((static_cast<uint64_t>(s.heads) * s.head_dim + KVZ_STRIP_GROUPS - 1) / KVZ_STRIP_GROUPS);
  return s.dtype <= KVZ_FP16 && s.group_tokens == 16 && s.tokens % 16 == 0 && all % 4 == 0 &&
         strips <= kRiceFastStrips && s.token_stride == static_cast<int32_t>(s.token_stride);
}

// And the values, to the encoder? Bounds of tokens need heads of whole strips.
inline bool rice_encodes_fast(const kvz_segment& s) {
  return rice_is_fast(s) &&
         (s.bound_kind != KVZ_BOUND_TOKEN_RMS || s.head_dim == 64 || s.head_dim == 128 || s.head_dim == 256);
}

// ---- machine
// ---------------------------------------------------------------------------------------------------------

template <uint32_t N>
struct Constant {
  static constexpr uint32_t value = N;
};

#if defined(KVZ_EMULATE)

// Extremes of both halves, without signs.
KVZ_DEV uint32_t min_2(uint32_t a, uint32_t b) {
  const uint32_t low = (a & 0xffffu) < (b & 0xffffu) ? a : b, high = a >> 16 < b >> 16 ? a : b;
  return (low & 0xffffu) | (high & 0xffff0000u);
}
KVZ_DEV uint32_t max_2(uint32_t a, uint32_t b) { return ~min_2(~a, ~b); }
KVZ_DEV uint64_t reverse_64(uint64_t v) {
  uint64_t r = 0;
  for (int i = 0; i < 64; ++i) r |= (v >> i & 1u) << (63 - i);
  return r;
}
// The upper word of high:low << (by % 32).
KVZ_DEV uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (by & 31u) >> 32);
}
// The lower word of high:low >> (by % 32).
KVZ_DEV uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31u));
}
KVZ_DEV uint32_t leading_zeros(uint32_t v) { return v == 0 ? ~0u : static_cast<uint32_t>(__builtin_clz(v)); }

#else

KVZ_DEV uint32_t min_2(uint32_t a, uint32_t b) { return __vminu2(a, b); }
KVZ_DEV uint32_t max_2(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
KVZ_DEV uint64_t reverse_64(uint64_t v) { return __brevll(v); }
KVZ_DEV uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by) { return __funnelshift_l(low, high, by); }
KVZ_DEV uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) { return __funnelshift_r(low, high, by); }
// All ones for 0. One instruction, unlike __clz.
KVZ_DEV uint32_t leading_zeros(uint32_t v) {
  uint32_t r;
  asm("bfind.shiftamt.u32 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

#endif

// ---- codes with a bias
// ---------------------------------------------------------------------------------------------------------
//
// Both halves of a word hold 2^15 + q. They order as the codes do, and no half borrows from the other.

// Bits of the widest zigzag code between two codes.
KVZ_DEV uint32_t bits_of_biased(uint32_t least_code, uint32_t most_code) {
  const int32_t a = 2 * (static_cast<int32_t>(most_code) - 32768),
                b = -2 * (static_cast<int32_t>(least_code) - 32768) - 1;
  return static_cast<uint32_t>(bit_length(static_cast<uint32_t>(a > b ? a : b)));
}

}  // namespace gpu
}  // namespace kvz
