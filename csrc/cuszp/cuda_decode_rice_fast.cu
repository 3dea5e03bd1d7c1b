// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Decoders of all codings, the Rice codings among them, for pages of words of 16-bit values
// (cuda_decode_rice_fast.inl).
#include "cuda_decode_rice_fast.inl"
#include "cuda_kernels.h"

namespace kvz {
namespace gpu {
namespace {

extern __shared__ __align__(16) uint8_t g_shared[];

// Leaves the most warps on a multiprocessor. With 112 for two strips a warp, decoding was slower although less spills.
constexpr int kRegisters = 80;

template <int DTYPE, int S>
__global__ void __maxnreg__(kRegisters) decode_rice_fast_kernel(const __grid_constant__ DecodeParams p) {
  wait_for_previous_kernel();
  decode_rice_fast<DTYPE, S>(p, g_shared);
}

}  // namespace

const void* decode_rice_fast_function(Kernel kernel) {
  switch (kernel) {
    case kDecodeRiceBf16:
      return reinterpret_cast<const void*>(decode_rice_fast_kernel<KVZ_BF16, 1>);
    case kDecodeRiceBf16Two:
      return reinterpret_cast<const void*>(decode_rice_fast_kernel<KVZ_BF16, 2>);
    case kDecodeRiceFp16:
      return reinterpret_cast<const void*>(decode_rice_fast_kernel<KVZ_FP16, 1>);
    default:
      return reinterpret_cast<const void*>(decode_rice_fast_kernel<KVZ_FP16, 2>);
  }
}

}  // namespace gpu
}  // namespace kvz
