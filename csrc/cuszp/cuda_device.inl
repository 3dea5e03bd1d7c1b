// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Device code of the CUDA codec: the same bytes as cpu_kernels.inl, for thousands of scattered pages in one launch.
//
// Encoding (docs/reference/format.md, "What the encoder does"). A CTA takes *tiles*, a few neighbouring pages of a
// block, in order from an atomic ticket. A team of warps reads a page once from device memory into shared memory,
// decides coding and size, builds the segment in place of the page, and writes it to its final position in the arena.
// That position is the sum of the sizes before it, found by looking back over the published sizes (Merrill and Garland,
// "Single-pass parallel prefix scan with decoupled look-back", 2016). One more warp, the *controller*, does that while
// the teams build the bit planes, and looks up what comes next. Sizes could instead be reserved by one atomic a page,
// or pages be written to worst-case slots and compacted afterwards: the first gives another order in every run, the
// second moves the encoded bytes three times instead of once. No CTA waits for a tile with a later ticket, so the wait
// ends whatever number of CTAs is resident.
//
// The fast path handles G = 16 with 16-bit values, T a multiple of 16 and rows of 16-byte chunks. A warp owns *strips*
// of 16 tokens x 64 channels, a lane two adjacent channels, that is two groups, in the halves of 16 registers. Extremes
// need no communication, and a 16 x 16 bit transpose of the registers gives the planes of both groups. Everything else
// takes the general path, a thread per group, which reads a page up to three times through the caches.
//
// This file compiles for the host as well (tests/gpu/emulation), so that its logic is tested where there is no GPU.
#pragma once

#include <type_traits>

#include "format.h"
#include "kvz.h"
#include "quant.inl"

#if defined(KVZ_EMULATE)
#include "emulation.h"
#define KVZ_DEV inline
#define KVZ_DEV_NOINLINE inline
#else
#define KVZ_DEV __device__ __forceinline__
#define KVZ_DEV_NOINLINE static __device__ __noinline__
#endif

namespace kvz {
namespace gpu {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kStripChannels = 64;
constexpr uint32_t kStripBytes = 16 * kStripChannels * 2;
constexpr uint32_t kStripClassBytes = 64;   // most that the classes (and bases) of a strip take in any coding
constexpr uint32_t kStripStateBytes = 128;  // encode: what a lane knows of its groups, 4 bytes
constexpr uint32_t kMaxWarps = 24;          // of a page
constexpr uint32_t kMaxTeams = 8;
constexpr uint32_t kMaxStrips = 128;
constexpr uint32_t kGeneralThreads = 256;
constexpr uint32_t kRecordUnits = 16;  // records start at multiples of 256 bytes

// ---- machine
// ----------------------------------------------------------------------------------------------------------

#if defined(KVZ_EMULATE)

KVZ_DEV void copy_async_16(void* shared, const void* global) { memcpy(shared, global, 16); }
KVZ_DEV void copy_async_wait() {}
KVZ_DEV uint64_t load_relaxed(const uint64_t* from) {
  emulation::yield();
  return *from;
}
KVZ_DEV void store_relaxed(uint64_t* to, uint64_t value) { *to = value; }
KVZ_DEV void relax() { emulation::yield(); }
KVZ_DEV uint64_t add_relaxed(uint64_t* to, uint64_t value) {
  const uint64_t before = *to;
  *to += value;
  return before;
}
KVZ_DEV void sync_threads(uint32_t barrier, uint32_t threads) { emulation::named_barrier(barrier, threads); }
KVZ_DEV void wait_for_previous_kernel() {}
KVZ_DEV void let_next_kernel_start() {}
KVZ_DEV void store_page(uint8_t* to, uint32_t value) { memcpy(to, &value, 4); }
template <class Byte>
KVZ_DEV Byte* row_of(Byte* base, int32_t stride, int32_t row) {
  return base + static_cast<int64_t>(stride) * row;
}

template <int DTYPE>
KVZ_DEV uint32_t extreme_half(uint32_t a, uint32_t b, bool largest) {
  if ((a & 0x7fff) > Traits<DTYPE>::kInfinity || (b & 0x7fff) > Traits<DTYPE>::kInfinity) return 0x7fff;
  int x = static_cast<int16_t>(a), y = static_cast<int16_t>(b);
  x ^= (x >> 15) & 0x7fff;
  y ^= (y >> 15) & 0x7fff;
  return (x > y) == largest ? a : b;
}
template <int DTYPE>
KVZ_DEV uint32_t min2(uint32_t a, uint32_t b) {
  return extreme_half<DTYPE>(a & 0xffff, b & 0xffff, false) | extreme_half<DTYPE>(a >> 16, b >> 16, false) << 16;
}
template <int DTYPE>
KVZ_DEV uint32_t max2(uint32_t a, uint32_t b) {
  return extreme_half<DTYPE>(a & 0xffff, b & 0xffff, true) | extreme_half<DTYPE>(a >> 16, b >> 16, true) << 16;
}
template <int DTYPE>
KVZ_DEV float widen(uint32_t v) {
  return Traits<DTYPE>::to_float(v & 0xffffu);
}
template <int DTYPE>
KVZ_DEV uint32_t narrow2(float low, float high) {
  return Traits<DTYPE>::from_float(low) | Traits<DTYPE>::from_float(high) << 16;
}

KVZ_DEV uint32_t sign_fill_2(uint32_t q) { return (q >> 15 & 0x00010001u) * 0xffffu; }

// The callers' results are representable: no rounding.
KVZ_DEV uint32_t fma_bf16_2(uint32_t a, uint32_t b, uint32_t c) {
  const float low = float_of(a << 16) * float_of(b << 16) + float_of(c << 16);
  const float high = float_of(a & 0xffff0000u) * float_of(b & 0xffff0000u) + float_of(c & 0xffff0000u);
  return bits_of(low) >> 16 | (bits_of(high) & 0xffff0000u);
}
KVZ_DEV float fma_float(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

#else

KVZ_DEV uint32_t fma_bf16_2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
KVZ_DEV float fma_float(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The sign of each half in all of its bits. __byte_perm would drop the bits of the selector that replicate signs.
KVZ_DEV uint32_t sign_fill_2(uint32_t q) {
  uint32_t r;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(r) : "r"(q));
  return r;
}

// 16 bytes from device memory to shared memory, in the background.
KVZ_DEV void copy_async_16(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
}
KVZ_DEV void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A published word carries its own flag, so no other memory hangs on it and relaxed order is enough.
KVZ_DEV uint64_t load_relaxed(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(__cvta_generic_to_global(from)) : "memory");
  return value;
}
KVZ_DEV void store_relaxed(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(value) : "memory");
}
KVZ_DEV void relax() { __nanosleep(32); }
KVZ_DEV uint64_t add_relaxed(uint64_t* to, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// A barrier of some warps of the CTA; barrier 0 is __syncthreads.
KVZ_DEV void sync_threads(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A kernel that is launched to overlap with the one before it starts early, and waits here until that one is done with
// all it wrote; the other one says when its successor may take room on the device. Without effect in other launches.
KVZ_DEV void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
KVZ_DEV void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// To a page, which nothing here reads again: the compiler may move it past accesses to shared memory.
KVZ_DEV void store_page(uint8_t* to, uint32_t value) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value));
}

// base + stride * row in one instruction.
template <class Byte>
KVZ_DEV Byte* row_of(Byte* base, int32_t stride, int32_t row) {
  uint64_t r;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(r) : "r"(stride), "r"(row), "l"(reinterpret_cast<uint64_t>(base)));
  return reinterpret_cast<Byte*>(r);
}

// Extremes of both halves; NaN wins, and +0 counts as above -0.
template <int DTYPE>
KVZ_DEV uint32_t min2(uint32_t a, uint32_t b) {
  uint32_t r;
  if (DTYPE == KVZ_BF16) {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
}
template <int DTYPE>
KVZ_DEV uint32_t max2(uint32_t a, uint32_t b) {
  uint32_t r;
  if (DTYPE == KVZ_BF16) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
}

// The low half as float32; exact, as Traits::to_float for finite values.
template <int DTYPE>
KVZ_DEV float widen(uint32_t v) {
  if (DTYPE == KVZ_BF16) return __uint_as_float(v << 16);
  float f;
  asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %1;\n cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v));
  return f;
}
// Both values in the dtype, toward zero as Traits::from_float.
template <int DTYPE>
KVZ_DEV uint32_t narrow2(float low, float high) {
  if (DTYPE == KVZ_BF16) return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
  uint32_t r;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;"
      : "=r"(r)
      : "f"(fminf(fmaxf(high, -65504.0f), 65504.0f)), "f"(fminf(fmaxf(low, -65504.0f), 65504.0f)));
  return r;
}

#endif

template <int DTYPE>
KVZ_DEV float widen_high(uint32_t v) {
  return DTYPE == KVZ_BF16 ? float_of(v & 0xffff0000u) : widen<DTYPE>(v >> 16);
}

KVZ_DEV uint32_t low_half(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }  // low halves of a and b

// ---- bits
// -------------------------------------------------------------------------------------------------------------

// Bits of `yes` where the mask is set, else those of `no`. One instruction, which the compiler is not to take apart: it
// sees through masks and shifts, and makes three times as many of a transpose.
KVZ_DEV uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) {
#if defined(KVZ_EMULATE)
  return (yes & mask) | (no & ~mask);
#else
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(mask), "r"(yes), "r"(no));
  return r;
#endif
}

template <int SHIFT>
KVZ_DEV void exchange(uint32_t& a, uint32_t& b, uint32_t mask) {
  const uint32_t x = choose(mask, a, b << SHIFT);
  b = choose(mask, a >> SHIFT, b);
  a = x;
}

// In both bytes of both halves of a[0..7]: bit j of a[i] <-> bit i of a[j].
KVZ_DEV void transpose_8(uint32_t* a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) exchange<4>(a[i], a[i + 4], 0x0f0f0f0fu);
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    exchange<2>(a[i], a[i + 2], 0x33333333u);
    exchange<2>(a[i + 1], a[i + 3], 0x33333333u);
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2) exchange<1>(a[i], a[i + 1], 0x55555555u);
}

// In both halves of a[0..15]: bit j of a[i] <-> bit i of a[j].
KVZ_DEV void transpose_16(uint32_t (&a)[16]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t x = __byte_perm(a[i], a[i + 8], 0x6240);
    a[i + 8] = __byte_perm(a[i], a[i + 8], 0x7351);
    a[i] = x;
  }
  transpose_8(a);
  transpose_8(a + 8);
}

// The low four bits of the bytes of a[0..7]: bit j of a[i] -> bit i of a[j], for j < 4.
KVZ_DEV void transpose_low_4(uint32_t* a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = choose(0x0f0f0f0fu, a[i], a[i + 4] << 4);
  exchange<2>(a[0], a[2], 0x33333333u);
  exchange<2>(a[1], a[3], 0x33333333u);
  exchange<1>(a[0], a[1], 0x55555555u);
  exchange<1>(a[2], a[3], 0x55555555u);
}
// And back, which leaves 0 in the high four bits.
KVZ_DEV void transpose_from_low_4(uint32_t* a) {
  exchange<1>(a[0], a[1], 0x55555555u);
  exchange<1>(a[2], a[3], 0x55555555u);
  exchange<2>(a[0], a[2], 0x33333333u);
  exchange<2>(a[1], a[3], 0x33333333u);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i + 4] = (a[i] >> 4) & 0x0f0f0f0fu;
    a[i] &= 0x0f0f0f0fu;
  }
}

// Zigzag and its inverse in both halves.
KVZ_DEV uint32_t zigzag_2(uint32_t q) { return ((q << 1) & 0xfffefffeu) ^ sign_fill_2(q); }
KVZ_DEV uint32_t unzigzag_2(uint32_t z) { return ((z >> 1) & 0x7fff7fffu) ^ ((z & 0x00010001u) * 0xffffu); }

// The order of words in a lossless group is fraction, sign, exponent: patterns of raw groups go through the same
// stores, with bits FRACTION .. 15 turned left by one, and back.
template <int DTYPE>
KVZ_DEV uint32_t sign_to_top(uint32_t x) {
  constexpr uint32_t f = Traits<DTYPE>::kFraction;
  constexpr uint32_t fraction = ((1u << f) - 1u) * 0x00010001u, exponent = (0x7fffu & ~((1u << f) - 1u)) * 0x00010001u;
  constexpr uint32_t lowest = (1u << f) * 0x00010001u;
  return (x & fraction) | ((x >> 1) & exponent) | ((x & lowest) << (15 - f));
}
template <int DTYPE>
KVZ_DEV uint32_t sign_from_top(uint32_t z) {
  constexpr uint32_t f = Traits<DTYPE>::kFraction;
  constexpr uint32_t fraction = ((1u << f) - 1u) * 0x00010001u, exponent = (0x7fffu & ~((1u << f) - 1u)) * 0x00010001u;
  constexpr uint32_t lowest = (1u << f) * 0x00010001u;
  return (z & fraction) | ((z & exponent) << 1) | ((z >> (15 - f)) & lowest);
}

// Number of the highest bit that is set; -1 for 0.
KVZ_DEV int32_t top_bit(uint32_t v) {
#if defined(KVZ_EMULATE)
  return bit_length(v) - 1;
#else
  int32_t r;
  asm("bfind.u32 %0, %1;" : "=r"(r) : "r"(v));
  return r;
#endif
}

// Keys order as the values do.
KVZ_DEV int32_t key_16(uint32_t v) {
  const int32_t s = static_cast<int16_t>(static_cast<uint16_t>(v));
  return s ^ ((s >> 15) & 0x7fff);
}
KVZ_DEV uint32_t value_of_key_16(int32_t key) { return static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fff)) & 0xffffu; }
KVZ_DEV int32_t key_32(float x) {
  const int32_t s = static_cast<int32_t>(bits_of(x));
  return s ^ ((s >> 31) & 0x7fffffff);
}
KVZ_DEV float value_of_key_32(int32_t key) { return float_of(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff))); }

KVZ_DEV uint32_t lane_of(uint32_t thread) { return thread & 31u; }
// The same in all lanes, and the compiler knows it.
KVZ_DEV uint32_t warp_of(uint32_t thread) { return __shfl_sync(kAllLanes, thread / kWarp, 0); }

KVZ_DEV uint32_t inclusive_sum(uint32_t v, uint32_t lane) {
#if !defined(KVZ_EMULATE)
  // The shuffle itself says whether there was a lane to read from.
#define KVZ_STEP(d)                                                            \
  asm volatile("{.reg .u32 u;\n .reg .pred p;\n shfl.sync.up.b32 u|p, %0, " #d \
               ", 0, 0xffffffff;\n @p add.u32 %0, %0, u;}"                     \
               : "+r"(v))
  KVZ_STEP(1);
  KVZ_STEP(2);
  KVZ_STEP(4);
  KVZ_STEP(8);
  KVZ_STEP(16);
#undef KVZ_STEP
#else
#pragma unroll
  for (uint32_t d = 1; d < 32; d *= 2) {
    const uint32_t u = __shfl_up_sync(kAllLanes, v, d);
    if (lane >= d) v += u;
  }
#endif
  return v;
}

// Zigzag of the code of a group's widest value, at step 1 / inverse: extreme_code of quant.inl with fewer instructions.
KVZ_DEV uint32_t widest_code(float low, float high, float inverse) {
  const int32_t a = 2 * round_code(high * inverse), b = -2 * round_code(low * inverse) - 1;
  return static_cast<uint32_t>(a > b ? a : b);
}

// ---- parameters
// -------------------------------------------------------------------------------------------------------

// Counters that every launch leaves as it found them: zero.
struct Counters {
  uint32_t ticket;
  uint32_t done;   // CTAs that have finished
  uint32_t error;  // kvz_status
  uint32_t any_bad;
};

struct EncodeParams {
  const kvz_segment* segments;
  const int64_t* block_ids;
  uint8_t* arena;
  kvz_entry* table;
  uint64_t* payload_bytes;
  uint64_t* record_offsets;
  uint32_t* status;
  Counters* counters;
  uint64_t* block_state;  // of num_blocks
  uint64_t* block_sum;    // of num_blocks: tiles that have published << 32 | units
  uint64_t* tile_state;   // of num_blocks * tiles
  uint64_t arena_units;   // units are 16 bytes
  uint64_t stride_units;  // from one record to the next; 0: packed
  uint32_t header_units;
  uint32_t num_segments;
  uint32_t num_blocks;
  uint32_t tiles;         // of a block
  uint32_t teams;         // pages of a tile
  uint32_t team_warps;    // of a page; the general path has one page a tile, for all warps
  uint32_t team_bytes;    // of shared memory
  uint32_t clear_states;  // the last CTA clears the states (a large batch leaves it to a memset)
};

struct DecodeParams {
  const kvz_segment* segments;
  const int64_t* block_ids;
  const uint64_t* payloads;
  const uint64_t* payload_bytes;
  const kvz_entry* table;
  uint32_t* block_status;
  Counters* counters;
  uint32_t* bad;  // of num_blocks
  uint32_t num_segments;
  uint32_t num_blocks;
  uint32_t all_or_nothing;
  uint32_t room_bytes;      // of shared memory for segments, where they are decoded from
  uint32_t validate_lanes;  // of a warp for a page: 8, 16 or 32
  uint32_t extended;        // Rice codings are known; validate_lanes is 32
};

// Start of a CTA's shared memory in the general path and when decoding. The warps' partial results of a page.
struct Shared {
  uint32_t page, last;
  uint64_t destination;  // of the segment in the arena, in units
  int32_t low[kMaxWarps], high[kMaxWarps];
  uint64_t sums[kMaxWarps];
  uint32_t words[kMaxStrips];  // of each strip
};
static_assert(sizeof(Shared) <= 1024, "Shared is followed by the page at byte 1,024");
constexpr uint32_t kSharedBytes = 1024;

// Start of a CTA's shared memory when encoding in the fast path.
struct Tile {
  uint32_t index, block, within, pages;  // within: of the block. No pages: the end
  int64_t block_id;
  kvz_segment segments[kMaxTeams];
};
struct TileShared {
  Tile tile;
  kvz_entry entries[kMaxTeams];
  uint64_t destinations[kMaxTeams];  // in units; ~0: no room
  uint32_t last;
};
static_assert(sizeof(TileShared) <= 1536, "TileShared is followed by the teams' memory at byte 1,536");
constexpr uint32_t kTileSharedBytes = 1536;

// Start of a team's shared memory: its warps' partial results.
struct TeamShared {
  int32_t low[kMaxWarps], high[kMaxWarps];
  uint32_t equal[kMaxWarps];
};

// The warps that work on a page, as one of them sees them.
struct Team {
  uint32_t index, warp, warps, lane, thread, threads;
  TeamShared* shared;
  uint32_t* words;           // of each strip in the quantised candidate
  uint32_t* lossless_words;  // and in the lossless one
  uint32_t* states;          // a word for each lane of each strip
  uint8_t* out;              // the segment
  uint8_t* input;            // the strips
};

KVZ_DEV void sync_team(const Team& team) {
  if (team.warps == 1) {
    __syncwarp();
  } else {
    sync_threads(1 + team.index, team.threads);
  }
}

constexpr uint32_t kDiffers = 0x80000000u;  // in TeamShared::equal: the warp saw two bit patterns

// ---- look-back
// --------------------------------------------------------------------------------------------------------

constexpr uint64_t kSizeKnown = 1ull << 62;    // the value is the page's (or record's) own size, in units
constexpr uint64_t kPrefixKnown = 2ull << 62;  // the value is the sum up to and including it
constexpr uint64_t kStateValue = (1ull << 62) - 1;

// Sum of the sizes of states[0 .. index), by one warp. The states before `index` will be published without our help.
KVZ_DEV uint64_t look_back(const uint64_t* states, uint32_t index, uint32_t lane) {
  uint64_t sum = 0;
  while (index > 0) {
    const bool exists = lane < index;
    uint64_t state = exists ? load_relaxed(states + (index - 1 - lane)) : kPrefixKnown;
    uint32_t stop;  // first lane, going back, that knows its prefix; 32 = none
    while (true) {
      const uint32_t known = __ballot_sync(kAllLanes, (state >> 62) == 2);
      const uint32_t missing = __ballot_sync(kAllLanes, (state >> 62) == 0);
      stop = known ? static_cast<uint32_t>(__ffs(static_cast<int>(known)) - 1) : 32u;
      const uint32_t needed = stop == 32u ? kAllLanes : (1u << stop) - 1u;
      if ((missing & needed) == 0) break;
      relax();
      if (exists && (state >> 62) != 2) state = load_relaxed(states + (index - 1 - lane));
    }
    uint64_t value = lane <= stop ? state & kStateValue : 0;
#pragma unroll
    for (uint32_t d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kAllLanes, value, d);
    sum += value;
    if (stop != 32u) break;
    index -= 32;
  }
  return sum;
}

// Units of a record whose payload has so many.
KVZ_DEV uint64_t record_units(const EncodeParams& p, uint64_t payload) {
  return (payload + p.header_units + kRecordUnits - 1) / kRecordUnits * kRecordUnits;
}

// Tile `tile`, `within` its block b, takes `units`: let those after it know, and those of later blocks when it is the
// last of its block to say so. By one thread, as early as possible.
KVZ_DEV void publish_size(const EncodeParams& p, uint32_t tile, uint32_t b, uint32_t within, uint32_t units) {
  store_relaxed(p.tile_state + tile, (within == 0 ? kPrefixKnown : kSizeKnown) | units);
  if (p.stride_units != 0) return;
  const uint64_t before = add_relaxed(p.block_sum + b, 1ull << 32 | units);
  if ((before >> 32) + 1 == p.tiles) {
    const uint64_t size = record_units(p, (before & 0xffffffffu) + units);
    store_relaxed(p.block_state + b, (b == 0 ? kPrefixKnown : kSizeKnown) | size);
  }
}

// Where a tile goes, in units: its block's record in the arena, and the tile in the record's payload. By one warp, the
// answer is the same in all lanes.
struct Place {
  uint64_t record, before;
};
KVZ_DEV Place place(const EncodeParams& p, uint32_t tile, uint32_t b, uint32_t within, uint32_t units, uint32_t lane) {
  Place at;
  at.before = look_back(p.tile_state + (tile - within), within, lane);
  if (within != 0 && lane == 0) store_relaxed(p.tile_state + tile, kPrefixKnown | (at.before + units));
  const bool last = within + 1 == p.tiles;
  at.record = p.stride_units * b;
  if (p.stride_units == 0) {
    at.record = look_back(p.block_state, b, lane);
    if (last && b != 0 && lane == 0) {
      store_relaxed(p.block_state + b, kPrefixKnown | (at.record + record_units(p, at.before + units)));
    }
  }
  if (last && lane == 0) {
    p.payload_bytes[b] = (at.before + units) * 16;
    p.record_offsets[b] = at.record * 16;
  }
  return at;
}

// Where a page of a tile goes whose table entry this is, units after the tile's start, or ~0 when the arena has no room
// for it. Writes the entry, whose offset is not set yet. By one thread.
KVZ_DEV uint64_t place_page(const EncodeParams& p, const Place& at, uint64_t after, uint32_t page, kvz_entry entry) {
  const uint64_t offset = at.before + after, destination = at.record + p.header_units + offset;
  const uint64_t limit =
      p.stride_units == 0 || at.record + p.stride_units > p.arena_units ? p.arena_units : at.record + p.stride_units;
  entry.offset = static_cast<uint32_t>(offset);
  p.table[page] = entry;
  if (destination + (static_cast<uint64_t>(entry.size) + 15) / 16 <= limit) return destination;
  atomicMax(&p.counters->error, static_cast<uint32_t>(KVZ_OUT_OF_SPACE));
  return ~0ull;
}

// Called by every thread of a CTA that has no page left. The last CTA clears what the launch has used and reports.
KVZ_DEV void finish_encode(const EncodeParams& p, uint32_t& last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    last = atomicAdd(&p.counters->done, 1u) + 1u == gridDim.x;
  }
  __syncthreads();
  if (!last) return;
  const uint32_t tiles = p.num_blocks * p.tiles;
  if (p.clear_states) {
    for (uint32_t i = threadIdx.x; i < tiles; i += blockDim.x) p.tile_state[i] = 0;
    for (uint32_t i = threadIdx.x; i < p.num_blocks; i += blockDim.x) p.block_state[i] = p.block_sum[i] = 0;
  }
  if (threadIdx.x == 0) {
    const uint32_t error = atomicAdd(&p.counters->error, 0u);
    p.counters->ticket = 0;
    p.counters->done = 0;
    p.counters->error = 0;
    if (p.status != nullptr) {
      p.status[0] = error;
      __threadfence_system();
      reinterpret_cast<volatile uint32_t*>(p.status)[1] = 1;
    }
  }
}

KVZ_DEV uint32_t units_of(uint64_t bytes) { return static_cast<uint32_t>((bytes + 15) / 16); }

KVZ_DEV kvz_entry make_entry(const kvz_segment& segment, uint64_t size, uint8_t coding, float bound, uint32_t param,
                             uint8_t reason) {
  kvz_entry e;
  e.offset = 0;
  e.size = static_cast<uint32_t>(size);
  e.bound = bound;
  e.coding = coding;
  e.kind = segment.kind;
  e.param = static_cast<uint8_t>(param);
  e.reason = reason;
  return e;
}

// ---- fast path: a page as strips
// --------------------------------------------------------------------------------------

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
  if (!s.whole || s.count != s.per_row || (s.head_dim & within) != 0 || (channels & within) != 0) return 0;
  return (channels >> (31 - __clz(static_cast<int>(s.head_dim)))) * s.head_stride;
}

template <int DTYPE>
KVZ_DEV uint32_t nonfinite_2(uint32_t a, uint32_t b) {  // bit 15 of a half: a or b is not finite there
  constexpr uint32_t room = (0x8000u - Traits<DTYPE>::kInfinity) * 0x00010001u;
  return (((a & 0x7fff7fffu) + room) | ((b & 0x7fff7fffu) + room)) & 0x80008000u;
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

// ---- fast path: encode
// ------------------------------------------------------------------------------------------------

// Shared memory of a page of n strips: partial results, states, then the segment, whose words follow the classes while
// the strips that they replace lie a little further on: a segment that is worth writing never overtakes the strips.
KVZ_HD constexpr uint32_t team_head_bytes(uint32_t strips) {
  return (static_cast<uint32_t>(sizeof(TeamShared)) + strips * 8 + 15) / 16 * 16;
}
KVZ_HD constexpr uint32_t fast_encode_bytes(uint32_t strips) {
  return team_head_bytes(strips) + strips * (kStripStateBytes + kStripClassBytes + kStripBytes);
}
KVZ_DEV Team team_of(const EncodeParams& p, uint8_t* memory, uint32_t strips) {
  Team t;
  const uint32_t warp = warp_of(threadIdx.x);
  t.index = warp / p.team_warps;
  t.warp = warp - t.index * p.team_warps;
  t.warps = p.team_warps;
  t.lane = lane_of(threadIdx.x);
  t.thread = t.warp * kWarp + t.lane;
  t.threads = t.warps * kWarp;
  uint8_t* const start = memory + kTileSharedBytes + t.index * p.team_bytes;
  t.shared = reinterpret_cast<TeamShared*>(start);
  t.words = reinterpret_cast<uint32_t*>(t.shared + 1);
  t.lossless_words = t.words + strips;
  t.states = reinterpret_cast<uint32_t*>(start + team_head_bytes(strips));
  t.out = start + team_head_bytes(strips) + strips * kStripStateBytes;
  t.input = t.out + strips * kStripClassBytes;
  return t;
}

// When decoding: segments, and behind them what may be read of words that no group has.
constexpr uint32_t kBehindRoom = 32;
constexpr uint32_t decode_room_bytes(uint32_t strips) { return strips * (kStripClassBytes + kStripBytes) + 16; }
constexpr uint32_t fast_decode_bytes(uint32_t strips) { return kSharedBytes + decode_room_bytes(strips) + kBehindRoom; }

// Word b of both groups to its place. A mask of bits is faster to test than a width to compare with: predicates come
// seven at a time.
KVZ_DEV void store_pair(uint16_t* to0, uint16_t* to1, uint32_t have0, uint32_t have1, int b, uint32_t word) {
  if (have0 & (1u << b)) to0[b] = static_cast<uint16_t>(word);
  if (have1 & (1u << b)) to1[b] = static_cast<uint16_t>(word >> 16);
}

template <int DTYPE>
KVZ_DEV void store_words(uint16_t* to, const uint32_t (&a)[16], uint32_t coding, const Pair& g, bool narrow,
                         uint32_t first) {
  uint16_t* to0 = to;
  uint16_t* to1 = to + g.words0;
  const uint32_t have0 = (1u << g.width0) - 1u, have1 = (1u << g.width1) - 1u;
  if (coding == KVZ_LOSSLESS) {
    constexpr int f = Traits<DTYPE>::kFraction;
#pragma unroll
    for (int b = 0; b < 16; ++b) store_pair(to0, to1, have0, have1, b, b < f ? a[b] : a[b == f ? 15 : b - 1]);
    return;
  }
  if (coding == KVZ_OUTLIER) {
    if (g.apart & 1u) *to0++ = static_cast<uint16_t>(first);
    if (g.apart >> 31) *to1++ = static_cast<uint16_t>(first >> 16);
  }
  // Zigzag on planes: bit 0 of the code is the sign of q, bit b + 1 is bit b of q, turned over when q is negative.
  const uint32_t sign = narrow ? a[7] : a[15];
#pragma unroll
  for (int b = 0; b < 8; ++b) store_pair(to0, to1, have0, have1, b, b == 0 ? sign : a[b - 1] ^ sign);
  if (narrow) return;
#pragma unroll
  for (int b = 8; b < 16; ++b) store_pair(to0, to1, have0, have1, b, a[b - 1] ^ sign);
}

// Strips of a warp are index = k * warps + warp for k = 0, 1, ...; this one is read by its own warp alone until it is
// packed. Fetches them in the background.
KVZ_DEV void fetch_strips(const Strips& strips, uint8_t* input, uint32_t warp, uint32_t warps, uint32_t lane) {
  const uint32_t row = lane >> 3, chunk = lane & 7u;
  const int32_t stride = static_cast<int32_t>(strips.token_stride);
  const int64_t step = strip_step(strips, warps);
  const uint8_t* from = value_address(strips, row, warp * kStripChannels + chunk * 8);
  uint8_t* to = input + warp * kStripBytes + row * 128 + chunk * 16;
#pragma unroll 1
  for (uint32_t index = warp; index < strips.count; index += warps) {
    bool inside = true;
    if (step == 0) {
      const Strip at = strip_at(strips, index);
      inside = at.channel + chunk * 8 < strips.channels;
      from = value_address(strips, at.row * 16 + row, at.channel + chunk * 8);
    }
    if (inside) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async_16(to + i * 512, row_of(from, stride, i * 4));
    }
    from += step;
    to += warps * kStripBytes;
  }
}

// A lane's column of a strip: two channels, a token every 32 words.
KVZ_DEV const uint32_t* column_of(const uint8_t* input, uint32_t index, uint32_t lane) {
  return reinterpret_cast<const uint32_t*>(input + index * kStripBytes) + lane;
}

// Least and largest of a column under a mask, halves apart; NaN wins in both.
template <int DTYPE>
KVZ_DEV void column_extremes(const uint32_t* column, uint32_t mask, uint32_t& low, uint32_t& high) {
  low = high = column[0] & mask;
#pragma unroll
  for (int t = 1; t < 16; ++t) {
    const uint32_t x = column[t * 32] & mask;
    low = min2<DTYPE>(low, x);
    high = max2<DTYPE>(high, x);
  }
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

// Controller and teams meet, each at a place of its own in the program, which the numbered barrier says plainly.
KVZ_DEV void meet() { sync_threads(15, blockDim.x); }

// What a team has decided, for the controller. Every thread of a team passes here once a tile.
KVZ_DEV void announce(TileShared& shared, const Team& team, const kvz_entry& entry) {
  if (team.thread == 0) shared.entries[team.index] = entry;
  meet();
}

// A page whose strips are in shared memory, in any coding and with any values; what fits no coding
// stays where it is. By every thread of the team.
template <int DTYPE>
KVZ_DEV_NOINLINE void encode_any(const EncodeParams& p, uint8_t* memory) {
  using Tr = Traits<DTYPE>;
  constexpr uint32_t kInfinity2 = Tr::kInfinity * 0x00010001u;
  constexpr uint32_t kFractionBits = Tr::kFraction;
  constexpr uint32_t kExponentMask = (0x7fffu & ~((1u << Tr::kFraction) - 1u)) * 0x00010001u;
  TileShared& tile_shared = *reinterpret_cast<TileShared*>(memory);
  const Tile& tile = tile_shared.tile;
  const kvz_segment segment = tile.segments[warp_of(threadIdx.x) / p.team_warps];
  const Strips strips = strips_of(segment, tile.block_id);
  const uint32_t count = strips.count;
  const Team team = team_of(p, memory, count);
  const uint32_t thread = team.thread, lane = team.lane, warp = team.warp, warps = team.warps;
  const uint32_t rounds = (count + warps - 1) / warps;
  const uint32_t groups = segment.tokens / 16 * strips.channels;
  const uint32_t raw_bytes = groups * 32;
  TeamShared& shared = *team.shared;
  // Of each strip and lane: the state of its groups in the quantised candidate, and, shifted by 16, their classes and
  // bases in the lossless one.
  uint32_t* const states = team.states;
  uint8_t* const out = team.out;
  const uint8_t* const input = team.input;

  uint32_t page_low = kInfinity2, page_high = kInfinity2 | 0x80008000u, nonfinite = 0;
  for (uint32_t k = 0; k < rounds; ++k) {
    const uint32_t index = k * warps + warp;
    if (index >= count) break;
    const uint32_t* const column = column_of(input, index, lane);
    uint32_t low, high;
    column_extremes<DTYPE>(column, 0xffffffffu, low, high);
    const bool inside = groups_at(strips, index, lane).inside;
    if (!inside) {
      low = kInfinity2;
      high = kInfinity2 | 0x80008000u;
    }
    const uint32_t bad = inside ? nonfinite_2<DTYPE>(low, high) : 0u;
    if (__any_sync(kAllLanes, bad != 0)) {
      nonfinite = 1;
#pragma unroll 1
      for (uint32_t shift = 0; shift < 32; shift += 16) {
        if (((bad >> shift) & 0x8000u) == 0) continue;
        const uint32_t half = 0xffffu << shift;
        const uint2 finite = finite_extremes<DTYPE>(column, shift);
        low = (low & ~half) | finite.x;
        high = (high & ~half) | finite.y;
      }
    }
    page_low = min2<DTYPE>(page_low, low);
    page_high = max2<DTYPE>(page_high, high);
  }
  {
    const int32_t low0 = key_16(page_low), low1 = key_16(page_low >> 16);
    const int32_t high0 = key_16(page_high), high1 = key_16(page_high >> 16);
    const int32_t low = __reduce_min_sync(kAllLanes, low0 < low1 ? low0 : low1);
    const int32_t high = __reduce_max_sync(kAllLanes, high0 > high1 ? high0 : high1);
    uint32_t equal = low == high ? value_of_key_16(low) : kDiffers;
    if (nonfinite) {  // the extremes do not tell: compare every value of the warp's strips with the first
      const uint32_t first = *reinterpret_cast<const uint16_t*>(input + warp * kStripBytes) * 0x00010001u;
      uint32_t differs = 0;
#pragma unroll 1
      for (uint32_t index = warp; index < count; index += warps) {
        if (!groups_at(strips, index, lane).inside) continue;
        const uint32_t* const column = column_of(input, index, lane);
#pragma unroll 1
        for (int t = 0; t < 16; ++t) differs |= column[t * 32] ^ first;
      }
      equal = __any_sync(kAllLanes, differs != 0) ? kDiffers : first & 0xffffu;
    }
    if (lane == 0) {
      shared.low[warp] = low;
      shared.high[warp] = high;
      shared.equal[warp] = equal;
    }
  }
  sync_team(team);

  const uint32_t busy = warps < count ? warps : count;  // warps that have a strip
  const uint32_t slot = lane < busy ? lane : 0;
  const int32_t low_key = __reduce_min_sync(kAllLanes, shared.low[slot]);
  const int32_t high_key = __reduce_max_sync(kAllLanes, shared.high[slot]);
  const uint32_t equal = shared.equal[0];
  const bool constant = equal != kDiffers && __all_sync(kAllLanes, shared.equal[slot] == equal);
  const uint32_t low_bits = value_of_key_16(low_key), high_bits = value_of_key_16(high_key);
  const uint32_t lossy_coding = segment.coding;  // or raw, or lossless

  const bool lossy = lossy_coding != KVZ_LOSSLESS && segment.bound_kind != KVZ_BOUND_LOSSLESS;

  float bound = 0.0f;
  if (lossy && low_key <= high_key) {
    bound = page_bound(segment.bound_kind, segment.bound, widen<DTYPE>(low_bits), widen<DTYPE>(high_bits));
  }
  uint8_t coding = KVZ_RAW, reason = KVZ_INCOMPRESSIBLE;
  uint32_t size = raw_bytes, param = 0;
  const float inverse = inverse_step(step_of<DTYPE>(KVZ_PLAIN, 0, bound > 0.0f ? bound : 1.0f));
  float finer = 0.0f;    // lane w: 1 / S for width w
  bool settled = false;  // the quantised candidate is small enough: there is no lossless one

  if (lossy_coding == KVZ_RAW) {
    reason = KVZ_AS_ASKED;
  } else if (constant) {
    coding = KVZ_CONSTANT;
    reason = KVZ_AS_ASKED;
    size = KVZ_CONSTANT_BYTES;
  } else {
    // Widths of the quantised candidate.
    if (bound > 0.0f) {
      finer = inverse_step(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(lane & 15u), bound));
      for (uint32_t k = 0; k < rounds; ++k) {
        const uint32_t index = k * warps + warp;
        if (index >= count) break;
        const Groups at = groups_at(strips, index, lane);
        const uint32_t* const column = column_of(input, index, lane);
        uint32_t low, high;
        column_extremes<DTYPE>(column, 0xffffffffu, low, high);
        const float low0 = widen<DTYPE>(low), low1 = widen_high<DTYPE>(low);
        const float high0 = widen<DTYPE>(high), high1 = widen_high<DTYPE>(high);
        const bool fits0 = quantisable<DTYPE>(low0, high0, bound, inverse);
        const bool fits1 = quantisable<DTYPE>(low1, high1, bound, inverse);
        uint32_t w0, w1;
        if (lossy_coding == KVZ_FIXED) {
          const int32_t top0 = top_bit(widest_code(low0, high0, inverse)),
                        top1 = top_bit(widest_code(low1, high1, inverse));
          const uint32_t less0 = static_cast<uint32_t>(top0 > 0 ? top0 : 0),
                         less1 = static_cast<uint32_t>(top1 > 0 ? top1 : 0);
          // Lanes past 15 repeat those below, so that the shuffle may have any width of a group that does not fit.
          const float finer0 = __shfl_sync(kAllLanes, finer, static_cast<int>(less0));
          const float finer1 = __shfl_sync(kAllLanes, finer, static_cast<int>(less1));
          w0 = (widest_code(low0, high0, finer0) >> less0) == 0 ? less0 : static_cast<uint32_t>(top0 + 1);
          w1 = (widest_code(low1, high1, finer1) >> less1) == 0 ? less1 : static_cast<uint32_t>(top1 + 1);
          w0 = fits0 ? w0 : 16u | kStateRaw;
          w1 = fits1 ? w1 : 16u | kStateRaw;
        } else {
          uint32_t before0 = kCodeZero, before1 = kCodeZero, rest = 0, first = 0;
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            uint32_t u0, u1;
            quantise_2<DTYPE>(column[t * 32], inverse, inverse, u0, u1);
            const uint32_t code = zigzag_2(low_half(u0 - before0, u1 - before1));
            if (t == 0) {
              first = code;
            } else {
              rest |= code;
            }
            before0 = u0;
            before1 = u1;
          }
          const uint32_t all = rest | first;
          w0 = static_cast<uint32_t>(bit_length(all & 0xffffu));
          w1 = static_cast<uint32_t>(bit_length(all >> 16));
          uint32_t apart0 = 0, apart1 = 0;
          if (lossy_coding == KVZ_OUTLIER) {
            const uint32_t rest0 = static_cast<uint32_t>(bit_length(rest & 0xffffu));
            const uint32_t rest1 = static_cast<uint32_t>(bit_length(rest >> 16));
            apart0 = rest0 + 1 < w0 ? kStateApart : 0u;
            apart1 = rest1 + 1 < w1 ? kStateApart : 0u;
            w0 = apart0 ? rest0 : w0;
            w1 = apart1 ? rest1 : w1;
          }
          w0 = fits0 && w0 <= Tr::kMaxWidth ? w0 | apart0 : 16u | kStateRaw;
          w1 = fits1 && w1 <= Tr::kMaxWidth ? w1 | apart1 : 16u | kStateRaw;
        }
        const uint32_t state = at.inside ? make_state(w0, w1) : 0u;
        states[index * kWarp + lane] = state;
        if (at.inside) {
          if (lossy_coding == KVZ_OUTLIER) {
            const uint32_t class0 = w0 & kStateRaw ? KVZ_BYTE_RAW : w0 + (w0 & kStateApart);  // bit 5 moves to bit 6
            const uint32_t class1 = w1 & kStateRaw ? KVZ_BYTE_RAW : w1 + (w1 & kStateApart);
            *reinterpret_cast<uint16_t*>(out + at.first) = static_cast<uint16_t>(class0 | class1 << 8);
          } else {
            out[at.first / 2] = static_cast<uint8_t>((w0 < 15u ? w0 : 15u) | (w1 < 15u ? w1 : 15u) << 4);
          }
        }
        const uint32_t words = __reduce_add_sync(kAllLanes, state_words(state));
        if (lane == 0) team.words[index] = words;
      }
      sync_team(team);
      const uint32_t quantised =
          (lossy_coding == KVZ_OUTLIER ? groups : groups / 2) + 2 * sum_words(team.words, count, lane);
      if (quantised < size) {
        size = quantised;
        coding = static_cast<uint8_t>(lossy_coding);
        reason = KVZ_AS_ASKED;
      }
      settled = static_cast<uint64_t>(quantised) * 8 <= static_cast<uint64_t>(raw_bytes) * 5;
    }

    // Widths of the lossless candidate.
    if (!settled) {
      const uint32_t low_exponent = exponent_of<DTYPE>(low_bits), high_exponent = exponent_of<DTYPE>(high_bits);
      const uint32_t largest = low_key > high_key ? 0u : low_exponent > high_exponent ? low_exponent : high_exponent;
      for (uint32_t k = 0; k < rounds; ++k) {
        const uint32_t index = k * warps + warp;
        if (index >= count) break;
        uint32_t least, most;
        column_extremes<DTYPE>(column_of(input, index, lane), 0x7fff7fffu, least, most);
        uint32_t known = 0, words = 0;
#pragma unroll
        for (uint32_t h = 0; h < 2; ++h) {
          const uint32_t top = exponent_of<DTYPE>(most >> (16 * h)), bottom = exponent_of<DTYPE>(least >> (16 * h));
          const bool raw = !is_finite<DTYPE>(most >> (16 * h));
          const uint32_t gap = largest - top, base = gap < 15 ? gap : 15;
          const uint32_t w = static_cast<uint32_t>(bit_length(largest - base - bottom));
          known |= raw ? static_cast<uint32_t>(KVZ_NIBBLE_RAW) << (4 * h) : w << (4 * h) | base << (8 + 4 * h);
          words += raw ? 16u : kFractionBits + 1 + w;
        }
        uint32_t& state = states[index * kWarp + lane];
        state = (bound > 0.0f ? state : 0u) | known << 16;
        words = __reduce_add_sync(kAllLanes, groups_at(strips, index, lane).inside ? words : 0u);
        if (lane == 0) team.lossless_words[index] = words;
      }
      sync_team(team);
      const uint32_t lossless = groups + 2 * sum_words(team.lossless_words, count, lane);
      if (lossless < size) {
        reason = !lossy ? KVZ_AS_ASKED : bound > 0.0f ? KVZ_LOSSLESS_SMALLER : KVZ_BOUND_TOO_FINE;
        size = lossless;
        coding = KVZ_LOSSLESS;
        param = largest;
      }
    }
  }
  const uint32_t units = units_of(size);
  announce(
      tile_shared, team,
      make_entry(segment, size, coding, coding >= KVZ_FIXED && coding <= KVZ_OUTLIER ? bound : 0.0f, param, reason));

  if (coding >= KVZ_FIXED) {
    // Words, round after round: all warps hold the planes of their strips in registers before one of them overwrites
    // strips.
    const uint32_t* const strip_words = coding == KVZ_LOSSLESS ? team.lossless_words : team.words;
    const uint32_t class_bytes = coding == KVZ_OUTLIER || coding == KVZ_LOSSLESS ? groups : groups / 2;
    const bool few = count <= kWarp;
    const uint32_t held = few && lane < count ? strip_words[lane] : 0u;
    for (uint32_t k = 0; k < rounds; ++k) {
      const uint32_t index = k * warps + warp;
      const bool busy_warp = index < count;
      uint32_t a[16];
      uint32_t first = 0, position = 0;
      Pair g = {};
      bool narrow = false;
      if (busy_warp) {
        const uint32_t* const column = column_of(input, index, lane);
        const Groups at = groups_at(strips, index, lane);
        const uint32_t state = states[index * kWarp + lane], known = state >> 16;
        if (coding != KVZ_LOSSLESS) {
          g = pair_of_state(state);
        } else if (at.inside) {
          g = pair_of_classes<DTYPE>(KVZ_LOSSLESS, known & 15u, (known >> 4) & 15u);
        }
        const uint32_t mine = g.words0 + g.words1;
        const uint32_t before =
            few ? __reduce_add_sync(kAllLanes, lane < index ? held : 0u) : sum_words(strip_words, index, lane);
        position = class_bytes / 2 + before + inclusive_sum(mine, lane) - mine;
        narrow = coding != KVZ_LOSSLESS && !__any_sync(kAllLanes, g.width0 > 8 || g.width1 > 8);

        if (coding == KVZ_FIXED) {
          const float inverse0 = __shfl_sync(kAllLanes, finer, static_cast<int>(g.width0 & 15u));
          const float inverse1 = __shfl_sync(kAllLanes, finer, static_cast<int>(g.width1 & 15u));
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            uint32_t u0, u1;
            quantise_2<DTYPE>(column[t * 32], inverse0, inverse1, u0, u1);
            a[t] = low_half(u0, u1);
          }
        } else if (coding == KVZ_LOSSLESS) {
          if (at.inside) {
            out[at.first / 2] = static_cast<uint8_t>(known);
            out[groups / 2 + at.first / 2] = static_cast<uint8_t>(known >> 8);
          }
          const uint32_t top0 = (param - ((known >> 8) & 15u)) << kFractionBits;
          const uint32_t top1 = (param - ((known >> 12) & 15u)) << kFractionBits;
          const uint32_t top = low_half(top0, top1);
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            const uint32_t x = column[t * 32];
            // No borrow passes between the halves: no exponent is above its group's top, and raw halves are replaced
            // below.
            a[t] = (((top | 0x80008000u) - (x & kExponentMask)) & kExponentMask) | (x & ~kExponentMask);
          }
        } else {
          uint32_t before0 = kCodeZero, before1 = kCodeZero;
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            uint32_t u0, u1;
            quantise_2<DTYPE>(column[t * 32], inverse, inverse, u0, u1);
            a[t] = low_half(u0 - before0, u1 - before1);
            before0 = u0;
            before1 = u1;
          }
          first = a[0];
          a[0] &= ~g.apart;
        }
        if (__any_sync(kAllLanes, g.raw != 0)) {
          // A raw group is one whose codes, after zigzag or in the order of lossless words, are the values' bits.
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            const uint32_t x = column[t * 32];
            const uint32_t y = coding == KVZ_LOSSLESS ? sign_to_top<DTYPE>(x) : unzigzag_2(x);
            a[t] = (a[t] & ~g.raw) | (y & g.raw);
          }
        }
        if (narrow) {
#pragma unroll
          for (int i = 0; i < 8; ++i) a[i] = __byte_perm(a[i], a[i + 8], 0x6240);
          transpose_8(a);
        } else {
          transpose_16(a);
        }
      }
      sync_team(team);
      if (busy_warp) store_words<DTYPE>(reinterpret_cast<uint16_t*>(out) + position, a, coding, g, narrow, first);
    }
    if (thread < units * 16 - size) out[size + thread] = 0;
  } else if (coding == KVZ_CONSTANT && thread < 4) {
    reinterpret_cast<uint32_t*>(out)[thread] = thread == 0 ? equal : 0u;
  }
}

// ---- fast path: coders
//
// A coder knows one coding of a page of strips: how wide the groups of a strip are, what planes they have, and how
// planes become words. What is common to codings, where words go and when they may go there, is in pack_page. Coders
// leave pages with values that are not finite, and other rare ones, to encode_any.

// Codes of `fixed` at the finest step that each group's width allows.
template <int DTYPE>
struct FixedCoder {
  float bound, inverse;
  float finer;  // lane w: 1 / S for width w
  static constexpr uint32_t kCoding = KVZ_FIXED;

  KVZ_DEV FixedCoder(float page_bound, float power_of_two, uint32_t lane) : bound(page_bound), inverse(power_of_two) {
    finer = inverse_step(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(lane & 15u), bound));
  }

  KVZ_DEV static uint32_t class_bytes(uint32_t groups) { return groups / 2; }

  // Width of a group between two extremes, all quantisable.
  KVZ_DEV uint32_t width(float low, float high) const {
    const int32_t top = top_bit(widest_code(low, high, inverse));
    const uint32_t less = static_cast<uint32_t>(top > 0 ? top : 0);
    const float step = __shfl_sync(kAllLanes, finer, static_cast<int>(less));
    return (widest_code(low, high, step) >> less) == 0 ? less : static_cast<uint32_t>(top + 1);
  }

  // Classes of a lane's two groups.
  KVZ_DEV uint32_t classes(uint32_t low, uint32_t high) const {
    const uint32_t w0 = width(widen<DTYPE>(low), widen<DTYPE>(high));
    const uint32_t w1 = width(widen_high<DTYPE>(low), widen_high<DTYPE>(high));
    return w0 | w1 << 4;
  }

  // One pass of packing: planes of a strip in a[], then words[].
  uint32_t width0, width1, level;  // level: planes that any group of the strip has, rounded up to 8, 12 or 16
  KVZ_DEV uint32_t begin(uint32_t c) {
    width0 = c & 15u;
    width1 = c >> 4;
    return width0 + width1;
  }
  KVZ_DEV void planes(uint32_t c, const uint32_t* column, uint32_t (&a)[16]) {
    begin(c);
    const float inverse0 = __shfl_sync(kAllLanes, finer, static_cast<int>(width0));
    const float inverse1 = __shfl_sync(kAllLanes, finer, static_cast<int>(width1));
    const uint32_t widest = width0 > width1 ? width0 : width1;
    level = !__any_sync(kAllLanes, widest > 8) ? 8 : !__any_sync(kAllLanes, widest > 12) ? 12 : 16;
    // Numbers are rounded by adding 2^23 and an even bias that makes codes positive: integers are then in the low bits
    // of the sums, which multiplication and addition of integers put beside each other.
    if (level == 8) {
      constexpr float kBias = 8388608.0f + 65536.0f + 128.0f;  // 65,536: no sum is below 2^23
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const uint32_t x = column[t * 32], y = column[(t + 8) * 32];
        const uint32_t u0 = bits_of(widen<DTYPE>(x) * inverse0 + kBias);
        const uint32_t v0 = bits_of(widen<DTYPE>(y) * inverse0 + kBias);
        const uint32_t u1 = bits_of(widen_high<DTYPE>(x) * inverse1 + kBias);
        const uint32_t v1 = bits_of(widen_high<DTYPE>(y) * inverse1 + kBias);
        a[t] = low_half(v0 * 256u + u0, v1 * 256u + u1);
      }
      transpose_8(a);
    } else {
      // The exponent of the lower code, 0x4b00, runs into the higher one, whose bias makes up for it: both are q +
      // 0x8000 in the end.
      constexpr float kLow = 8388608.0f + 32768.0f, kHigh = 8388608.0f + 32768.0f - 19200.0f;
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const uint32_t x = column[t * 32], y = column[(t + 8) * 32];
        const uint32_t u0 = bits_of(widen<DTYPE>(x) * inverse0 + kLow);
        const uint32_t v0 = bits_of(widen<DTYPE>(y) * inverse0 + kHigh);
        const uint32_t u1 = bits_of(widen_high<DTYPE>(x) * inverse1 + kLow);
        const uint32_t v1 = bits_of(widen_high<DTYPE>(y) * inverse1 + kHigh);
        const uint32_t both0 = v0 * 65536u + u0, both1 = v1 * 65536u + u1;
        a[t] = __byte_perm(both0, both1, 0x6420);
        a[t + 8] = __byte_perm(both0, both1, 0x7531);
      }
      transpose_8(a);
      if (level == 12) {
        transpose_low_4(a + 8);
      } else {
        transpose_8(a + 8);
      }
    }
  }
  // Zigzag on planes: bit 0 of the code is the sign of q, bit b + 1 is bit b of q, turned over when q is negative.
  template <int LEVEL>
  KVZ_DEV void store_level(uint16_t* to, const uint32_t (&a)[16]) const {
    uint16_t* const to1 = to + width0;
    const uint32_t have0 = (1u << width0) - 1u, have1 = (1u << width1) - 1u;
    const uint32_t positive = LEVEL == 12 ? ~a[11] : a[LEVEL - 1];
#pragma unroll
    for (int b = 0; b < (LEVEL == 16 ? 14 : LEVEL); ++b) {
      store_pair(to, to1, have0, have1, b, b == 0 ? ~positive : ~(a[b - 1] ^ positive));
    }
  }
  KVZ_DEV void store(uint16_t* to, const uint32_t (&a)[16]) const {
    if (level == 8) {
      store_level<8>(to, a);
    } else if (level == 12) {
      store_level<12>(to, a);
    } else {
      store_level<16>(to, a);
    }
  }
};

// The lossless coding. A class holds the widths of both groups and their bases.
template <int DTYPE>
struct LosslessCoder {
  uint32_t largest;  // exponent of the page
  static constexpr uint32_t kCoding = KVZ_LOSSLESS;
  static constexpr int kFraction = Traits<DTYPE>::kFraction;

  KVZ_DEV explicit LosslessCoder(uint32_t exponent) : largest(exponent) {}

  KVZ_DEV static uint32_t class_bytes(uint32_t groups) { return groups; }

  // From the extremes of the magnitudes.
  KVZ_DEV uint32_t classes(uint32_t least, uint32_t most) const {
    uint32_t c = 0;
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
      const uint32_t top = exponent_of<DTYPE>(most >> (16 * h)), bottom = exponent_of<DTYPE>(least >> (16 * h));
      const uint32_t gap = largest - top, base = gap < 15 ? gap : 15;
      c |= static_cast<uint32_t>(bit_length(largest - base - bottom)) << (4 * h) | base << (8 + 4 * h);
    }
    return c;
  }

  uint32_t width0, width1;
  KVZ_DEV uint32_t begin(uint32_t c) {
    width0 = kFraction + 1 + (c & 15u);
    width1 = kFraction + 1 + ((c >> 4) & 15u);
    return width0 + width1;
  }
  KVZ_DEV void planes(uint32_t c, const uint32_t* column, uint32_t (&a)[16]) {
    begin(c);
    const uint32_t top =
        low_half((largest - ((c >> 8) & 15u)) << kFraction, (largest - ((c >> 12) & 15u)) << kFraction);
    // Exponents are subtracted, sign and fraction come out turned over, and nothing is borrowed: no exponent is above
    // its group's top.
    const uint32_t all = top | 0x80008000u | ((1u << kFraction) - 1u) * 0x00010001u;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const uint32_t x = all - column[t * 32], y = all - column[(t + 8) * 32];
      a[t] = __byte_perm(x, y, 0x6240);
      a[t + 8] = __byte_perm(x, y, 0x7351);
    }
    transpose_8(a);
    transpose_8(a + 8);
  }
  KVZ_DEV void store(uint16_t* to, const uint32_t (&a)[16]) const {
    uint16_t* const to1 = to + width0;
    const uint32_t have0 = (1u << width0) - 1u, have1 = (1u << width1) - 1u;
    if (width0 != 0) {
#pragma unroll
      for (int b = 0; b <= kFraction; ++b) {
        const uint32_t word = ~(b < kFraction ? a[b] : a[15]);
        to[b] = static_cast<uint16_t>(word);
        to1[b] = static_cast<uint16_t>(word >> 16);
      }
    }
#pragma unroll
    for (int b = kFraction + 1; b < 16; ++b) store_pair(to, to1, have0, have1, b, a[b - 1]);
  }
};

// Classes of a strip in shared memory.
template <class Coder>
KVZ_DEV void store_classes(uint8_t* out, uint32_t groups, uint32_t first, uint32_t c) {
  out[first / 2] = static_cast<uint8_t>(c);
  if (Coder::kCoding == KVZ_LOSSLESS) out[groups / 2 + first / 2] = static_cast<uint8_t>(c >> 8);
}
template <class Coder>
KVZ_DEV uint32_t load_classes(const uint8_t* out, uint32_t groups, uint32_t first) {
  uint32_t c = out[first / 2];
  if (Coder::kCoding == KVZ_LOSSLESS) c |= static_cast<uint32_t>(out[groups / 2 + first / 2]) << 8;
  return c;
}

// Words of a page whose classes are in place, in place of the strips. Words follow the classes and reach only strips
// that were packed before, or at the same time: those are in registers, once all warps have met.
template <class Coder>
KVZ_DEV void pack_page(Coder& coder, const Team& team, const Strips& strips, const Prefix& prefix, uint32_t groups) {
  uint8_t* const out = team.out;
  const uint8_t* const input = team.input;
  const uint32_t warp = team.warp, warps = team.warps, lane = team.lane;
  const uint32_t count = strips.count, rounds = (count + warps - 1) / warps;
  const uint32_t class_bytes = Coder::class_bytes(groups);
  const uint32_t strips_at = static_cast<uint32_t>(input - out);
  uint32_t read_until = strips_at;  // all warps have read the strips before
  for (uint32_t k = 0; k < rounds; k += 2) {
    uint32_t c[2], words[2];
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      const uint32_t index = (k + j) * warps + warp;
      const Groups at = groups_at(strips, index, lane);
      const bool inside = index < count && at.inside;
      c[j] = inside ? load_classes<Coder>(out, groups, at.first) : 0u;
      words[j] = inside ? coder.begin(c[j]) : 0u;
    }
    const uint32_t both = words[0] | words[1] << 16, before = inclusive_sum(both, lane) - both;
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      if (k + j >= rounds) break;
      const uint32_t index = (k + j) * warps + warp, next = (k + j + 1) * warps;
      const bool busy = index < count;
      const uint32_t start = words_before(prefix, index, lane) + ((before >> (16 * j)) & 0xffffu);
      uint32_t a[16];
      if (busy) coder.planes(c[j], column_of(input, index, lane), a);
      const uint32_t end = (class_bytes + 2 * words_before(prefix, next, lane) + 15) & ~15u;
      if (end > read_until) {
        sync_team(team);
        read_until = strips_at + next * kStripBytes;
      }
      if (busy) {
        if (words[j] == 0) coder.width0 = coder.width1 = 0;
        coder.store(reinterpret_cast<uint16_t*>(out + class_bytes) + start, a);
      }
    }
  }
}

constexpr uint32_t kBatch = 4;  // strips of a warp whose extremes stay in registers

// A page in the coding of a coder, or nothing, and false, when it is one for encode_any, which finds the page as it
// was. `Quantised`: FixedCoder, else LosslessCoder.
template <int DTYPE, bool QUANTISED>
KVZ_DEV bool encode_page_of(TileShared& tile_shared, const Team& team, const kvz_segment& segment,
                            const Strips& strips) {
  using Coder = std::conditional_t<QUANTISED, FixedCoder<DTYPE>, LosslessCoder<DTYPE>>;
  constexpr uint32_t kInfinity = Traits<DTYPE>::kInfinity, kInfinity2 = kInfinity * 0x00010001u;
  constexpr uint32_t kMask = QUANTISED ? 0xffffffffu : 0x7fff7fffu;
  TeamShared& shared = *team.shared;
  const uint32_t thread = team.thread, lane = team.lane, warp = team.warp, warps = team.warps;
  const uint32_t count = strips.count;
  const uint32_t groups = segment.tokens / 16 * strips.channels, raw_bytes = groups * 32;
  uint8_t* const out = team.out;
  const uint8_t* const input = team.input;

  // The least values of a warp's first strips stay in registers, the largest in team.states: there are not registers
  // for both. Larger pages are looked at twice.
  uint32_t low[kBatch] = {};
  uint32_t page_low = kInfinity2, page_high = kInfinity2 | 0x80008000u;
  const auto look_at = [&](uint32_t index, uint32_t& least, uint32_t& most) {
    column_extremes<DTYPE>(column_of(input, index, lane), kMask, least, most);
    if (!groups_at(strips, index, lane).inside) return;
    page_low = min2<DTYPE>(page_low, least);
    page_high = max2<DTYPE>(page_high, most);
  };
#pragma unroll
  for (uint32_t j = 0; j < kBatch; ++j) {
    const uint32_t index = j * warps + warp;
    if (index >= count) break;
    uint32_t most;
    look_at(index, low[j], most);
    team.states[index * kWarp + lane] = most;
  }
#pragma unroll 1
  for (uint32_t index = kBatch * warps + warp; index < count; index += warps) {
    uint32_t least, most;
    look_at(index, least, most);
  }
  {
    const int32_t low0 = key_16(page_low), low1 = key_16(page_low >> 16);
    const int32_t high0 = key_16(page_high), high1 = key_16(page_high >> 16);
    const int32_t least = __reduce_min_sync(kAllLanes, low0 < low1 ? low0 : low1);
    const int32_t most = __reduce_max_sync(kAllLanes, high0 > high1 ? high0 : high1);
    if (lane == 0) {
      shared.low[warp] = least;
      shared.high[warp] = most;
    }
  }
  sync_team(team);
  const uint32_t slot = lane < warps && lane < count ? lane : 0;
  const int32_t low_key = __reduce_min_sync(kAllLanes, shared.low[slot]);
  const int32_t high_key = __reduce_max_sync(kAllLanes, shared.high[slot]);
  if (low_key <= key_16(kInfinity | 0x8000u) || high_key >= key_16(kInfinity) || low_key == high_key) return false;

  float bound = 0.0f, inverse = 0.0f;
  uint32_t param = 0;
  if (QUANTISED) {
    const float page_least = widen<DTYPE>(value_of_key_16(low_key)),
                page_most = widen<DTYPE>(value_of_key_16(high_key));
    bound = page_bound(segment.bound_kind, segment.bound, page_least, page_most);
    if (!(bound > 0.0f)) return false;
    inverse = inverse_step(step_of<DTYPE>(KVZ_PLAIN, 0, bound));
    if (!quantisable<DTYPE>(page_least, page_most, bound, inverse)) return false;
  } else {
    param = exponent_of<DTYPE>(static_cast<uint32_t>(high_key));
  }
  Coder coder = [&] {
    if constexpr (QUANTISED) {
      return FixedCoder<DTYPE>(bound, inverse, lane);
    } else {
      return LosslessCoder<DTYPE>(param);
    }
  }();

  const auto classify = [&](uint32_t index, uint32_t least, uint32_t most) {
    const Groups at = groups_at(strips, index, lane);
    const uint32_t c = coder.classes(least, most);
    uint32_t words = 0;
    if (at.inside) {
      store_classes<Coder>(out, groups, at.first, c);
      words = coder.begin(c);
    }
    words = __reduce_add_sync(kAllLanes, words);
    if (lane == 0) team.words[index] = words;
  };
#pragma unroll
  for (uint32_t j = 0; j < kBatch; ++j) {
    const uint32_t index = j * warps + warp;
    if (index >= count) break;
    classify(index, low[j], team.states[index * kWarp + lane]);
  }
#pragma unroll 1
  for (uint32_t index = kBatch * warps + warp; index < count; index += warps) {
    uint32_t least, most;
    column_extremes<DTYPE>(column_of(input, index, lane), kMask, least, most);
    classify(index, least, most);
  }
  sync_team(team);
  const Prefix prefix = prefix_of(team.words, count, lane);
  const uint32_t size = Coder::class_bytes(groups) + 2 * prefix.total;
  // A quantised candidate that is not small enough has a lossless one beside it.
  if (QUANTISED ? static_cast<uint64_t>(size) * 8 > static_cast<uint64_t>(raw_bytes) * 5 : size >= raw_bytes) {
    return false;
  }
  announce(tile_shared, team,
           make_entry(segment, size, static_cast<uint8_t>(Coder::kCoding), bound, param, KVZ_AS_ASKED));
  pack_page(coder, team, strips, prefix, groups);
  if (thread < units_of(size) * 16 - size) out[size + thread] = 0;
  return true;
}

// The next tile of this CTA. By one warp; the others see it after a barrier.
KVZ_DEV void take_tile(const EncodeParams& p, Tile& tile, uint32_t lane) {
  uint32_t index = 0;
  if (lane == 0) index = atomicAdd(&p.counters->ticket, 1u);
  index = __shfl_sync(kAllLanes, index, 0);
  if (index >= p.num_blocks * p.tiles) {
    if (lane == 0) tile.pages = 0;
    return;
  }
  const uint32_t block = index / p.tiles, within = index - block * p.tiles, first = within * p.teams;
  const uint32_t left = p.num_segments - first, pages = left < p.teams ? left : p.teams;
  const uint64_t* const from = reinterpret_cast<const uint64_t*>(p.segments + first);
  for (uint32_t i = lane; i < pages * (sizeof(kvz_segment) / 8); i += kWarp) {
    reinterpret_cast<uint64_t*>(tile.segments)[i] = from[i];
  }
  if (lane == 0) {
    tile.index = index;
    tile.block = block;
    tile.within = within;
    tile.pages = pages;
    tile.block_id = p.block_ids[block];
  }
}

// What one warp does for the teams of a CTA.
KVZ_DEV void control_encode(const EncodeParams& p, TileShared& shared, uint32_t lane) {
  const Tile& tile = shared.tile;
  take_tile(p, shared.tile, lane);
  meet();
  while (tile.pages != 0) {
    meet();  // all teams have announced
    const uint32_t pages = tile.pages, index = tile.index, block = tile.block, within = tile.within;
    kvz_entry entry = {};
    if (lane < pages) entry = shared.entries[lane];
    const uint32_t units = units_of(entry.size), sum = inclusive_sum(units, lane);
    const uint32_t total = __shfl_sync(kAllLanes, sum, 31);
    if (lane == 0) publish_size(p, index, block, within, total);
    const Place at = place(p, index, block, within, total, lane);
    if (lane < pages) {
      const uint32_t page = block * p.num_segments + within * p.teams + lane;
      shared.destinations[lane] = place_page(p, at, sum - units, page, entry);
    }
    meet();
    // Not before the teams are ready for it: whoever has a later tile waits until this one has been looked at.
    take_tile(p, shared.tile, lane);
    meet();
  }
}

// What a team does, tile after tile.
template <int DTYPE>
KVZ_DEV void encode_tiles(const EncodeParams& p, uint8_t* memory) {
  TileShared& shared = *reinterpret_cast<TileShared*>(memory);
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x);
  const Tile& tile = shared.tile;
  meet();
  while (tile.pages != 0) {
    const uint32_t index = warp / p.team_warps;
    if (index >= tile.pages) {
      for (int meeting = 0; meeting < 3; ++meeting) meet();
      continue;
    }
    const kvz_segment segment = tile.segments[index];
    const Strips strips = strips_of(segment, tile.block_id);
    const Team team = team_of(p, memory, strips.count);
    fetch_strips(strips, team.input, team.warp, team.warps, lane);
    copy_async_wait();
    __syncwarp();

    bool encoded = false;
    const bool lossy = segment.coding != KVZ_LOSSLESS && segment.bound_kind != KVZ_BOUND_LOSSLESS;
    if (segment.coding == KVZ_FIXED && lossy) {
      encoded = encode_page_of<DTYPE, true>(shared, team, segment, strips);
    } else if (segment.coding != KVZ_RAW && !lossy) {
      encoded = encode_page_of<DTYPE, false>(shared, team, segment, strips);
    }
    if (!encoded) {
      sync_team(team);  // some may still look at what the others left in shared memory
      encode_any<DTYPE>(p, memory);
    }
    meet();  // the controller knows where to

    const uint64_t destination = shared.destinations[index];
    if (destination != ~0ull) {
      const uint32_t units = units_of(shared.entries[index].size);
      uint4* const to = reinterpret_cast<uint4*>(p.arena) + destination;
      if (shared.entries[index].coding == KVZ_RAW) {
        const uint32_t chunks = strips.channels / 8;  // of a token
        for (uint32_t i = team.thread; i < units; i += team.threads) {
          const uint32_t token = i / chunks, chunk = i - token * chunks;
          const uint32_t strip = token / 16 * strips.per_row + chunk / 8;
          to[i] = *reinterpret_cast<const uint4*>(team.input + strip * kStripBytes + token % 16 * 128 + chunk % 8 * 16);
        }
      } else {
        for (uint32_t i = team.thread; i < units; i += team.threads) {
          to[i] = reinterpret_cast<const uint4*>(team.out)[i];
        }
      }
    }
    meet();  // the controller has the next tile
  }
}

template <int DTYPE>
KVZ_DEV void encode_fast(const EncodeParams& p, uint8_t* memory) {
  TileShared& shared = *reinterpret_cast<TileShared*>(memory);
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x);
  if (warp == p.teams * p.team_warps) {
    control_encode(p, shared, lane);
  } else {
    encode_tiles<DTYPE>(p, memory);
  }
  finish_encode(p, shared.last);
}

// ---- pages of any geometry
// -----------------------------------------------------------------------------------------------

struct Geometry {
  uint8_t* base;
  int64_t token_stride, head_stride;
  uint32_t tokens, channels, head_dim;
  uint32_t group_tokens, log_tokens;  // G
  uint32_t columns, groups;
  uint32_t value_bytes;
};

KVZ_DEV Geometry geometry_of(const kvz_segment& s, int64_t block_id) {
  Geometry g;
  g.base = reinterpret_cast<uint8_t*>(s.base) + block_id * s.block_stride;
  g.token_stride = s.token_stride;
  g.head_stride = s.head_stride;
  g.tokens = s.tokens;
  g.head_dim = s.head_dim;
  g.channels = s.heads * s.head_dim;
  g.group_tokens = s.group_tokens;
  g.log_tokens = static_cast<uint32_t>(bit_length(s.group_tokens) - 1);
  const uint32_t across = 16u / s.group_tokens;
  g.columns = (g.channels + across - 1) / across;
  g.groups = (g.tokens + s.group_tokens - 1) / s.group_tokens * g.columns;
  g.value_bytes = s.dtype == KVZ_FP32 ? 4 : s.dtype == KVZ_OPAQUE ? 1 : 2;
  return g;
}

KVZ_DEV bool byte_classes(uint32_t dtype, uint32_t coding) {
  return coding == KVZ_OUTLIER || (dtype == KVZ_FP32 && coding != KVZ_LOSSLESS);
}
KVZ_DEV uint64_t class_array_bytes(uint32_t dtype, uint32_t coding, uint32_t groups) {
  const uint64_t bytes = byte_classes(dtype, coding) ? groups : (static_cast<uint64_t>(groups) + 1) / 2;
  return (bytes + 3) / 4 * 4;
}

// Words of a group of class `c`, or ~0 when there is no such class.
KVZ_DEV uint32_t words_of_class(uint32_t c, bool bytes, bool lossless, uint32_t bits, uint32_t widest,
                                uint32_t sign_mantissa, bool apart) {
  if (bytes) {
    const uint32_t w = c & 63u;
    if (w == KVZ_BYTE_RAW) return (c & 0xc0u) == 0 ? bits : ~0u;
    if (w > widest || (c & 0x80u) || ((c & KVZ_BYTE_FIRST_APART) && !apart)) return ~0u;
    return w + ((c & KVZ_BYTE_FIRST_APART) ? bits / 16 : 0);
  }
  if (c == KVZ_NIBBLE_RAW) return bits;
  if (c > widest) return ~0u;
  return lossless ? sign_mantissa + c : c;
}

// Called by every thread of a CTA that has no page left. The last CTA reports and clears what the launch has used.
KVZ_DEV void finish_decode(const DecodeParams& p, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = atomicAdd(&p.counters->done, 1u) + 1u == gridDim.x;
  }
  __syncthreads();
  if (!shared.last) return;
  for (uint32_t b = threadIdx.x; b < p.num_blocks; b += blockDim.x) {
    const bool bad = p.bad[b] != 0;
    p.bad[b] = 0;
    if (p.block_status != nullptr) p.block_status[b] = bad ? KVZ_CORRUPT : KVZ_OK;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p.counters->done = 0;
    p.counters->any_bad = 0;
  }
}

KVZ_DEV bool block_is_refused(const DecodeParams& p, uint32_t b) {
  return p.all_or_nothing ? p.counters->any_bad != 0 : p.bad[b] != 0;
}

// ---- copies
// -----------------------------------------------------------------------------------------------------------

// The page's values to or from token-major order, in pieces of `Piece`; every CTA thread takes part.
template <class Piece, bool TO_PAGE>
KVZ_DEV void copy_pieces(const Geometry& g, uint8_t* linear) {
  const uint32_t head_pieces = g.head_dim * g.value_bytes / sizeof(Piece), heads = g.channels / g.head_dim;
  const uint64_t total = static_cast<uint64_t>(g.tokens) * heads * head_pieces;
  for (uint64_t i = threadIdx.x; i < total; i += blockDim.x) {
    const uint32_t at = static_cast<uint32_t>(i % head_pieces);
    const uint32_t run = static_cast<uint32_t>(i / head_pieces), head = run % heads, token = run / heads;
    Piece* page = reinterpret_cast<Piece*>(g.base + token * g.token_stride + head * g.head_stride) + at;
    Piece* other = reinterpret_cast<Piece*>(linear) + i;
    if (TO_PAGE) {
      *page = *other;
    } else {
      *other = *page;
    }
  }
}

KVZ_DEV uint64_t alignment_of(const Geometry& g) {
  uint64_t all = reinterpret_cast<uint64_t>(g.base) | g.head_dim * g.value_bytes;
  if (g.tokens > 1) all |= static_cast<uint64_t>(g.token_stride);
  if (g.channels > g.head_dim) all |= static_cast<uint64_t>(g.head_stride);
  return all;
}

template <bool TO_PAGE>
KVZ_DEV void copy_page(const Geometry& g, uint8_t* linear) {
  const uint64_t a = alignment_of(g);
  if (a % 16 == 0) {
    copy_pieces<uint4, TO_PAGE>(g, linear);
  } else if (g.tokens == 1 && g.channels == g.head_dim && reinterpret_cast<uint64_t>(g.base) % 16 == 0) {
    // One run of a length that no vector divides.
    const uint64_t bytes = static_cast<uint64_t>(g.channels) * g.value_bytes, whole = bytes / 16;
    for (uint64_t i = threadIdx.x; i < whole; i += blockDim.x) {
      if (TO_PAGE) {
        reinterpret_cast<uint4*>(g.base)[i] = reinterpret_cast<const uint4*>(linear)[i];
      } else {
        reinterpret_cast<uint4*>(linear)[i] = reinterpret_cast<const uint4*>(g.base)[i];
      }
    }
    for (uint64_t i = whole * 16 + threadIdx.x; i < bytes; i += blockDim.x) {
      if (TO_PAGE) {
        g.base[i] = linear[i];
      } else {
        linear[i] = g.base[i];
      }
    }
  } else if (a % 4 == 0) {
    copy_pieces<uint32_t, TO_PAGE>(g, linear);
  } else if (a % 2 == 0) {
    copy_pieces<uint16_t, TO_PAGE>(g, linear);
  } else {
    copy_pieces<uint8_t, TO_PAGE>(g, linear);
  }
}

// Every value of the page = `value`.
template <class Piece>
KVZ_DEV void fill_pieces(const Geometry& g, Piece piece) {
  const uint32_t head_pieces = g.head_dim * g.value_bytes / sizeof(Piece), heads = g.channels / g.head_dim;
  const uint64_t total = static_cast<uint64_t>(g.tokens) * heads * head_pieces;
  for (uint64_t i = threadIdx.x; i < total; i += blockDim.x) {
    const uint32_t at = static_cast<uint32_t>(i % head_pieces);
    const uint32_t run = static_cast<uint32_t>(i / head_pieces), head = run % heads, token = run / heads;
    reinterpret_cast<Piece*>(g.base + token * g.token_stride + head * g.head_stride)[at] = piece;
  }
}

KVZ_DEV void fill_page(const Geometry& g, uint32_t value) {
  if (g.value_bytes == 1) value = (value & 0xffu) * 0x0101u;
  if (g.value_bytes <= 2) value = (value & 0xffffu) * 0x00010001u;
  const uint64_t a = alignment_of(g);
  if (a % 16 == 0) {
    uint4 v;
    v.x = v.y = v.z = v.w = value;
    fill_pieces<uint4>(g, v);
  } else if (a % 4 == 0) {
    fill_pieces<uint32_t>(g, value);
  } else if (a % 2 == 0) {
    fill_pieces<uint16_t>(g, static_cast<uint16_t>(value));
  } else {
    fill_pieces<uint8_t>(g, static_cast<uint8_t>(value));
  }
}

// ---- fast path: decode
// ------------------------------------------------------------------------------------------------

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

// A strip in any coding, raw groups and all widths.
template <int DTYPE>
KVZ_DEV_NOINLINE void decode_strip_any(const uint8_t* data, uint32_t position, uint32_t coding, uint32_t classes,
                                       uint32_t bases, uint32_t param, float step, uint8_t* to, int32_t stride) {
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
  const float step0 = __shfl_sync(kAllLanes, step, static_cast<int>(g.width0 & 15u));
  const float step1 = __shfl_sync(kAllLanes, step, static_cast<int>(g.width1 & 15u));
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
    const uint32_t x = narrow2<DTYPE>((float_of(sum0) - 12582912.0f) * step0, (float_of(sum1) - 12582912.0f) * step1);
    rows.store(t, choose(g.raw, zigzag_2(a[t] ^ 0x80008000u), x));
  }
}

// A strip in the coding `fixed` whose groups are at most 7 bits wide: bfloat16 holds their codes, and the products.
KVZ_DEV void decode_strip_narrow(const uint16_t* words0, const uint16_t* words1, uint32_t have, float step0,
                                 float step1, const Rows& rows) {
  uint32_t a[8];
  const uint32_t sign = load_pair(words0, words1, 0) & has_word(have, 0);
#pragma unroll
  for (int b = 1; b < 7; ++b) a[b - 1] = (load_pair(words0, words1, b) & has_word(have, b)) ^ sign;
  a[6] = ~sign;
  a[7] = 0;
  transpose_8(a);  // bytes are q + 64
  const uint32_t steps = narrow2<KVZ_BF16>(step0, step1);
  // From a shuffle, so that it stays in a register: the compiler would rather load the selectors below each time.
  const uint32_t exponent = __shfl_sync(kAllLanes, 0x43434343u, 0);
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    const uint32_t number = __byte_perm(a[t & 7], exponent, t < 8 ? 0x4240 : 0x4341);  // 128 + (q + 64)
    const uint32_t q = fma_bf16_2(number, 0x3f803f80u, 0xc340c340u);
    rows.store(t, fma_bf16_2(q, steps, 0x80008000u));
  }
}

// A strip in the coding `fixed` whose groups are at most 12 bits wide.
template <int DTYPE>
KVZ_DEV void decode_strip_medium(const uint16_t* words0, const uint16_t* words1, uint32_t have, float step0,
                                 float step1, const Rows& rows) {
  uint32_t a[8], h[8];
  const uint32_t sign = load_pair(words0, words1, 0) & has_word(have, 0);
#pragma unroll
  for (int b = 1; b < 9; ++b) a[b - 1] = (load_pair(words0, words1, b) & has_word(have, b)) ^ sign;
#pragma unroll
  for (int b = 9; b < 12; ++b) h[b - 9] = (load_pair(words0, words1, b) & has_word(have, b)) ^ sign;
  h[3] = ~sign;
  transpose_8(a);
  transpose_from_low_4(h);  // bytes of q + 2048
  // (2^23 + q + 2048) * step - (2^23 + 2048) * step: both products fit into float32, as does the difference.
  const float zero0 = -8390656.0f * step0, zero1 = -8390656.0f * step1;
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    const uint32_t both = __byte_perm(a[t & 7], h[t & 7], t < 8 ? 0x6240 : 0x7351);
    const uint32_t u0 = __byte_perm(both, 0x4b000000u, 0x7410), u1 = __byte_perm(both, 0x4b000000u, 0x7432);
    rows.store(t, narrow2<DTYPE>(fma_float(float_of(u0), step0, zero0), fma_float(float_of(u1), step1, zero1)));
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

constexpr float kLargestMediumBound = 1.2676506e30f;  // 2^100: no product of decode_strip_medium overflows

template <int DTYPE>
KVZ_DEV void decode_fast(const DecodeParams& p, uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* const room = memory + kSharedBytes;
  const uint32_t thread = threadIdx.x, lane = lane_of(thread), warp = warp_of(thread), warps = blockDim.x / kWarp;
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
    const uint32_t coding = entry.coding;
    if (coding < KVZ_FIXED) {
      const Geometry g = geometry_of(segment, now.block_id);
      if (coding == KVZ_RAW) {
        copy_page<true>(g, const_cast<uint8_t*>(start_of(now)));
      } else {
        fill_page(g, *reinterpret_cast<const uint32_t*>(start_of(now)));
      }
      return;
    }
    const Strips strips = strips_of(segment, now.block_id);
    const uint32_t count = strips.count, rounds = (count + warps - 1) / warps;
    const uint32_t groups = segment.tokens / 16 * strips.channels;
    const uint32_t class_bytes = coding == KVZ_OUTLIER || coding == KVZ_LOSSLESS ? groups : groups / 2;
    if (class_bytes > bytes_of(now)) return;

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
      const uint32_t both =
          __reduce_add_sync(kAllLanes, words_of(widths_at(index)) | words_of(widths_at(second)) << 16);
      if (lane == 0 && index < count) shared.words[index] = both & 0xffffu;
      if (lane == 0 && second < count) shared.words[second] = both >> 16;
    }
    __syncthreads();

    const Prefix prefix = prefix_of(shared.words, count, lane);
    if (class_bytes + 2 * prefix.total == entry.size) {
      float step = 1.0f;  // lane w: S for width w
      if (coding != KVZ_LOSSLESS) {
        step = step_of<DTYPE>(static_cast<int>(coding), static_cast<int>(lane & 15u), entry.bound);
      }
      const int64_t strip_bytes = strip_step(strips, warps);
      uint8_t* page_to = value_address(strips, 0, warp * kStripChannels + lane * 2);
      for (uint32_t k = 0; k < rounds; k += 2) {
        Widths w[2];
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) w[j] = widths_at((k + j) * warps + warp);
        const uint32_t both = words_of(w[0]) | words_of(w[1]) << 16, before = inclusive_sum(both, lane) - both;
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) {
          const uint32_t index = (k + j) * warps + warp;
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
          if (coding == KVZ_FIXED && entry.bound <= kLargestMediumBound && !__any_sync(kAllLanes, widest > 12)) {
            const float step0 = __shfl_sync(kAllLanes, step, static_cast<int>(w[j].width0));
            const float step1 = __shfl_sync(kAllLanes, step, static_cast<int>(w[j].width1));
            if (DTYPE == KVZ_BF16 && !__any_sync(kAllLanes, widest > 7)) {
              decode_strip_narrow(words0, words1, have, step0, step1, rows);
            } else {
              decode_strip_medium<DTYPE>(words0, words1, have, step0, step1, rows);
            }
          } else if (coding == KVZ_LOSSLESS && !__any_sync(kAllLanes, (w[j].classes & 255u) == KVZ_NIBBLE_RAW ||
                                                                          w[j].classes >> 8 == KVZ_NIBBLE_RAW)) {
            decode_strip_lossless<DTYPE>(words0, words1, have, bases, entry.param, rows);
          } else {
            decode_strip_any<DTYPE>(data, position, coding, w[j].classes, bases, entry.param, step, rows.to,
                                    rows.stride);
          }
        }
      }
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
