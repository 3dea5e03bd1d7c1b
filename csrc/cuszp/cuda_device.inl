// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Device code that the kernels of the CUDA codec share: the same bytes as cpu_kernels.inl, for thousands of scattered
// pages in one launch.
//
// A CTA takes *tiles*, a few neighbouring pages of a block, in order from an atomic ticket, and writes their segments
// to their final positions in the arena. A position is the sum of the sizes before it, found by looking back over the
// published sizes (Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016). Sizes could
// instead be reserved by one atomic a page, or pages be written to worst-case slots and compacted afterwards: the first
// gives another order in every run, the second moves the encoded bytes three times instead of once. No CTA waits for a
// tile with a later ticket, so the wait ends whatever number of CTAs is resident.
//
// cuda_strips.inl and what follows it is the fast path, cuda_general.inl takes all other pages, cuda_rice.inl the Rice
// codings. All of it compiles for the host as well (tests/gpu/emulation), so that its logic is tested where there is no
// GPU.
#pragma once

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
template <int BYTES>
KVZ_DEV void copy_async_few(void* shared, const void* global) {
  memcpy(shared, global, BYTES);
}
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
KVZ_DEV void sync_all(uint32_t barrier) { emulation::named_barrier(barrier, blockDim.x); }
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

// The callers' results are representable, or they want to know the sign alone: no rounding.
KVZ_DEV uint32_t fma_bf16_2(uint32_t a, uint32_t b, uint32_t c) {
  const float low = float_of(a << 16) * float_of(b << 16) + float_of(c << 16);
  const float high = float_of(a & 0xffff0000u) * float_of(b & 0xffff0000u) + float_of(c & 0xffff0000u);
  return bits_of(low) >> 16 | (bits_of(high) & 0xffff0000u);
}
KVZ_DEV uint32_t scale_bf16_2(uint32_t x, float power) {
  return fma_bf16_2(x, (bits_of(power) >> 16) * 0x00010001u, 0x80008000u);
}
KVZ_DEV float fma_float(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
KVZ_DEV void load_again() {}
KVZ_DEV float about_sqrt(float x) { return __builtin_sqrtf(x); }

// Adds the product of two matrices: mma.m16n8k16.
template <int DTYPE>
KVZ_DEV void add_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const auto dot = [](uint32_t x, uint32_t y) {
    return widen<DTYPE>(x) * widen<DTYPE>(y) + widen<DTYPE>(x >> 16) * widen<DTYPE>(y >> 16);
  };
  for (uint32_t k = 0; k < 4; ++k) {
    // Lane 4 r + k holds values 2 k and 2 k + 8 of rows r and r + 8, and those behind them; lane 4 column + k those of
    // a column.
    uint32_t x[4];
    for (uint32_t i = 0; i < 4; ++i) x[i] = __shfl_sync(0xffffffffu, a[i], static_cast<int>(r * 4 + k));
    for (uint32_t n = 0; n < 2; ++n) {
      const int column = static_cast<int>((q * 2 + n) * 4 + k);
      const uint32_t y0 = __shfl_sync(0xffffffffu, b0, column), y1 = __shfl_sync(0xffffffffu, b1, column);
      sum[n] += dot(x[0], y0) + dot(x[2], y1);
      sum[n + 2] += dot(x[1], y0) + dot(x[3], y1);
    }
  }
}

#else

KVZ_DEV uint32_t fma_bf16_2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// Both values times a power of two, which is exact where the products are normal numbers.
KVZ_DEV uint32_t scale_bf16_2(uint32_t x, float power) {
  uint32_t r;
  asm("{.reg .b16 l, h;\n .reg .b32 both;\n mov.b32 {l, h}, %2;\n mov.b32 both, {h, h};\n"
      " fma.rn.bf16x2 %0, %1, both, %3;}"
      : "=r"(r)
      : "r"(x), "f"(power), "r"(0x80008000u));
  return r;
}
KVZ_DEV float fma_float(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// To some 20 bits.
KVZ_DEV float about_sqrt(float x) {
  float r;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// What comes from memory is loaded again behind this, rather than kept in registers.
KVZ_DEV void load_again() { asm volatile("" ::: "memory"); }

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
// 4 or 8 bytes.
template <int BYTES>
KVZ_DEV void copy_async_few(void* shared, const void* global) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "n"(BYTES)
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

#if defined(KVZ_RACECHECK)
// A barrier of some threads of the CTA as an mbarrier in shared memory, which one of them makes before any meet there.
// compute-sanitizer's racecheck takes every numbered barrier that a warp passes for one of all warps
// (bench/racecheck_barrier.cu), but understands these; they cost more.
KVZ_DEV void make_barrier(uint64_t* barrier, uint32_t threads) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "r"(threads)
      : "memory");
}
KVZ_DEV void sync_at(uint64_t* barrier) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint64_t state;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(address) : "memory");
  uint32_t met = 0;
  while (met == 0) {
    asm volatile("{.reg .pred p;\n mbarrier.test_wait.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                 : "=r"(met)
                 : "r"(address), "l"(state)
                 : "memory");
  }
}
#endif
// A barrier of some warps of the CTA; barrier 0 is __syncthreads.
KVZ_DEV void sync_threads(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// The barrier of that number for all threads of the CTA, at different places of the program.
KVZ_DEV void sync_all(uint32_t barrier) { asm volatile("bar.sync %0;" ::"r"(barrier) : "memory"); }

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

// Adds the product of two matrices: mma.m16n8k16.
template <int DTYPE>
KVZ_DEV void add_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define KVZ_MMA(type)                                            \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type     \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, " \
      "%1, %2, %3};"                                             \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if (DTYPE == KVZ_BF16) {
    KVZ_MMA("bf16");
  } else {
    KVZ_MMA("f16");
  }
#undef KVZ_MMA
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

// ~a, which the compiler is not to take out of what it goes into.
KVZ_DEV uint32_t turned_over(uint32_t a) {
#if defined(KVZ_EMULATE)
  return ~a;
#else
  uint32_t r;
  asm("not.b32 %0, %1;" : "=r"(r) : "r"(a));
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

template <int DTYPE>
KVZ_DEV uint32_t nonfinite_2(uint32_t a, uint32_t b) {  // bit 15 of a half: a or b is not finite there
  constexpr uint32_t room = (0x8000u - Traits<DTYPE>::kInfinity) * 0x00010001u;
  return (((a & 0x7fff7fffu) + room) | ((b & 0x7fff7fffu) + room)) & 0x80008000u;
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
  uint32_t extended;        // kvz_extended; with Rice codings validate_lanes is 32
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
#if defined(KVZ_RACECHECK)
  uint64_t barrier;  // of the team's threads
#endif
  int32_t low[kMaxWarps], high[kMaxWarps];
  uint32_t equal[kMaxWarps];
  uint32_t least[kMaxWarps], most[kMaxWarps];  // bits of bounds, which order as the bounds do
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
  // Of pages with bounds by token:
  uint32_t vectors;      // tokens x heads
  uint32_t scale_bytes;  // before the classes of the quantised candidate
  uint32_t* bounds;      // of each vector, those of 16 tokens of a head beside each other: bound_word
  float* inverses;       // of their steps, a row for each number of significant bits
  float* sums;           // of the squares of a vector's parts
};

KVZ_DEV void sync_team(const Team& team) {
  if (team.warps == 1) {
    __syncwarp();
  } else {
#if defined(KVZ_RACECHECK)
    sync_at(&team.shared->barrier);
#else
    sync_threads(1 + team.index, team.threads);
#endif
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
  if (p.block_status != nullptr) {  // each CTA some of them
    for (uint32_t b = blockIdx.x * blockDim.x + threadIdx.x; b < p.num_blocks; b += gridDim.x * blockDim.x) {
      p.block_status[b] = p.bad[b] != 0 ? KVZ_CORRUPT : KVZ_OK;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = atomicAdd(&p.counters->done, 1u) + 1u == gridDim.x;
  }
  __syncthreads();
  if (!shared.last) return;
  for (uint32_t b = threadIdx.x; b < p.num_blocks; b += blockDim.x) p.bad[b] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    p.counters->ticket = 0;
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

}  // namespace gpu
}  // namespace kvz
