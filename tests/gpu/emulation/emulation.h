// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Runs the CUDA codec's device code on the host: every thread of every CTA is a fibre, warp operations and barriers are
// meeting points, and a warp operation that its 32 lanes do not all reach is an error. Slow and exact: it shows what
// the code does, not how fast.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};

namespace emulation {

struct Index {
  uint32_t x;
};

struct Meeting {  // of the lanes of a warp, or of the threads of a CTA
  uint64_t value[2][32] = {};
  uint32_t operation[2][32] = {};
  uint32_t arrived = 0;
  uint32_t generation = 0;
};

struct Fibre {
  Index thread{}, block{}, block_size{}, grid_size{};
  Meeting* warp = nullptr;
  Meeting* cta = nullptr;
  Meeting* named = nullptr;  // of the CTA, 16
  Meeting* cluster = nullptr;
  uint32_t cluster_size = 1;
  uint8_t* shared = nullptr;
  const std::unique_ptr<uint4[]>* cluster_shared = nullptr;  // of the CTAs of the cluster
  void* stack_pointer = nullptr;
  bool done = false;
};

inline Fibre* current = nullptr;
inline void* scheduler_stack = nullptr;
inline const std::function<void(uint8_t*)>* kernel = nullptr;

extern "C" void kvz_emulation_switch(void** save, void* load);
#if defined(__x86_64__)
__asm__(
    ".text\n.globl kvz_emulation_switch\n.type kvz_emulation_switch,@function\nkvz_emulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#else
#error "the emulation needs x86-64"
#endif

inline void yield() { kvz_emulation_switch(&current->stack_pointer, scheduler_stack); }

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s (CTA %u, thread %u)\n", what, current->block.x, current->thread.x);
  abort();
}

inline void entry() {
  (*kernel)(current->shared);
  current->done = true;
  yield();
  fail("a finished thread ran again");
}

// All 32 lanes give a value and see those of all.
inline const uint64_t* exchange(uint32_t operation, uint64_t value) {
  Meeting& m = *current->warp;
  const uint32_t lane = current->thread.x % 32, generation = m.generation;
  m.value[generation & 1][lane] = value;
  m.operation[generation & 1][lane] = operation;
  if (++m.arrived == 32) {
    for (int i = 0; i < 32; ++i) {
      if (m.operation[generation & 1][i] != operation) fail("lanes of a warp are at different operations");
    }
    m.arrived = 0;
    ++m.generation;
  } else {
    while (m.generation == generation) yield();
  }
  return m.value[generation & 1];
}

inline void meet(Meeting& m, uint32_t threads) {
  const uint32_t generation = m.generation;
  if (++m.arrived == threads) {
    m.arrived = 0;
    ++m.generation;
  } else {
    while (m.generation == generation) yield();
  }
}

inline void barrier() { meet(*current->cta, current->block_size.x); }
inline void named_barrier(uint32_t name, uint32_t threads) {
  if (name == 0 || name > 15 || threads % 32 != 0) fail("there is no such barrier");
  meet(current->named[name], threads);
}

inline uint32_t cluster_rank() { return current->block.x % current->cluster_size; }
inline void cluster_barrier() { meet(*current->cluster, current->block_size.x * current->cluster_size); }
inline uint8_t* in_rank(uint8_t* shared, uint32_t rank) {
  if (rank >= current->cluster_size) fail("there is no such CTA in the cluster");
  return reinterpret_cast<uint8_t*>(current->cluster_shared[rank].get()) + (shared - current->shared);
}

// Run `body` as a grid. All CTAs are resident and take turns.
inline void launch(uint32_t ctas, uint32_t threads, uint32_t shared_bytes, const std::function<void(uint8_t*)>& body,
                   uint32_t cluster_size = 1) {
  constexpr size_t kStack = 96 * 1024;
  static std::vector<std::unique_ptr<uint8_t[]>> stacks;
  const size_t total = static_cast<size_t>(ctas) * threads;
  while (stacks.size() < total) stacks.emplace_back(new uint8_t[kStack]);
  std::vector<Fibre> fibres(total);
  std::vector<Meeting> warps(total / 32), barriers(ctas), named(ctas * 16), clusters(ctas / cluster_size);
  std::vector<std::unique_ptr<uint4[]>> shared;
  kernel = &body;
  shared.reserve(ctas);
  for (uint32_t c = 0; c < ctas; ++c) {
    shared.emplace_back(new uint4[(shared_bytes + 15) / 16]);
    memset(shared.back().get(), 0xa5, (shared_bytes + 15) / 16 * 16);
    for (uint32_t t = 0; t < threads; ++t) {
      const size_t i = static_cast<size_t>(c) * threads + t;
      Fibre& f = fibres[i];
      f.thread.x = t;
      f.block.x = c;
      f.block_size.x = threads;
      f.grid_size.x = ctas;
      f.warp = &warps[i / 32];
      f.cta = &barriers[c];
      f.named = &named[c * 16];
      f.cluster = &clusters[c / cluster_size];
      f.cluster_size = cluster_size;
      f.cluster_shared = &shared.data()[c / cluster_size * cluster_size];
      f.shared = reinterpret_cast<uint8_t*>(shared.back().get());
      uintptr_t top = reinterpret_cast<uintptr_t>(stacks[i].get() + kStack) & ~static_cast<uintptr_t>(15);
      void** frame =
          reinterpret_cast<void**>(top) - 8;  // six registers, the return address, and alignment as after a call
      memset(frame, 0, 64);
      frame[6] = reinterpret_cast<void*>(&entry);
      f.stack_pointer = frame;
    }
  }
  size_t left = total, idle = 0;
  while (left > 0) {
    for (Fibre& f : fibres) {
      if (f.done) continue;
      current = &f;
      kvz_emulation_switch(&scheduler_stack, f.stack_pointer);
      if (f.done) --left;
    }
    if (++idle > 50u * 1000 * 1000) {
      fprintf(stderr, "emulation: no end in sight\n");
      abort();
    }
  }
}

inline int32_t as_signed(uint64_t v) { return static_cast<int32_t>(static_cast<uint32_t>(v)); }

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block)
#define blockDim (emulation::current->block_size)
#define gridDim (emulation::current->grid_size)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp() { emulation::exchange(1, 0); }
inline void __threadfence() {}
inline void __threadfence_system() {}
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t all = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = (selector >> (4 * i)) & 15u;
    uint32_t byte = static_cast<uint32_t>(all >> (8 * (s & 7u))) & 255u;
    if (s & 8u) byte = byte & 128u ? 255u : 0u;
    r |= byte << (8 * i);
  }
  return r;
}

template <class T>
inline T __shfl_sync(uint32_t, T v, int lane) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  const uint64_t found = emulation::exchange(2, bits)[lane & 31];
  memcpy(&v, &found, sizeof v);
  return v;
}
template <class T>
inline T __shfl_xor_sync(uint32_t, T v, int mask) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  const uint64_t found = emulation::exchange(3, bits)[(threadIdx.x % 32) ^ static_cast<uint32_t>(mask)];
  memcpy(&v, &found, sizeof v);
  return v;
}
inline uint32_t __shfl_up_sync(uint32_t, uint32_t v, uint32_t d) {
  const uint64_t* all = emulation::exchange(4, v);
  const uint32_t lane = threadIdx.x % 32;
  return static_cast<uint32_t>(all[lane >= d ? lane - d : lane]);
}
inline uint32_t __shfl_down_sync(uint32_t, uint32_t v, uint32_t d) {
  const uint64_t* all = emulation::exchange(5, v);
  const uint32_t lane = threadIdx.x % 32;
  return static_cast<uint32_t>(all[lane + d < 32 ? lane + d : lane]);
}
inline uint32_t __ballot_sync(uint32_t, bool v) {
  const uint64_t* all = emulation::exchange(6, v);
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= static_cast<uint32_t>(all[i]) << i;
  return r;
}
inline bool __any_sync(uint32_t mask, bool v) { return __ballot_sync(mask, v) != 0; }
inline bool __all_sync(uint32_t mask, bool v) { return __ballot_sync(mask, v) == 0xffffffffu; }
inline uint32_t __reduce_add_sync(uint32_t, uint32_t v) {
  const uint64_t* all = emulation::exchange(7, v);
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r += static_cast<uint32_t>(all[i]);
  return r;
}
inline uint32_t __reduce_xor_sync(uint32_t, uint32_t v) {
  const uint64_t* all = emulation::exchange(10, v);
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r ^= static_cast<uint32_t>(all[i]);
  return r;
}
inline uint32_t __reduce_or_sync(uint32_t, uint32_t v) {
  const uint64_t* all = emulation::exchange(11, v);
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= static_cast<uint32_t>(all[i]);
  return r;
}
template <class T>  // 32 bits, of either sign
inline T __reduce_min_sync(uint32_t, T v) {
  const uint64_t* all = emulation::exchange(8, static_cast<uint32_t>(v));
  for (int i = 0; i < 32; ++i) v = static_cast<T>(all[i]) < v ? static_cast<T>(all[i]) : v;
  return v;
}
template <class T>
inline T __reduce_max_sync(uint32_t, T v) {
  const uint64_t* all = emulation::exchange(9, static_cast<uint32_t>(v));
  for (int i = 0; i < 32; ++i) v = static_cast<T>(all[i]) > v ? static_cast<T>(all[i]) : v;
  return v;
}
inline uint32_t atomicAdd(uint32_t* to, uint32_t v) {
  const uint32_t before = *to;
  *to += v;
  return before;
}
inline uint32_t atomicOr(uint32_t* to, uint32_t v) {
  const uint32_t before = *to;
  *to |= v;
  return before;
}
inline uint32_t atomicXor(uint32_t* to, uint32_t v) {
  const uint32_t before = *to;
  *to ^= v;
  return before;
}
inline uint32_t atomicExch(uint32_t* to, uint32_t v) {
  const uint32_t before = *to;
  *to = v;
  return before;
}
inline uint32_t atomicMax(uint32_t* to, uint32_t v) {
  const uint32_t before = *to;
  *to = before > v ? before : v;
  return before;
}
