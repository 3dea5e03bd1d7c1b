// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Encoders of the Rice codings for pages of words of 16-bit values (cuda_encode_rice_fast.inl).
#include "cuda_encode_rice_fast.inl"
#include "cuda_kernels.h"

namespace kvz {
namespace gpu {
namespace {

extern __shared__ __align__(16) uint8_t g_shared[];

// Registers that leave the most warps on a multiprocessor without much spilling (measured).
constexpr int registers_of(int strips) { return strips == 1 ? 80 : 112; }

template <int DTYPE, int S>
__global__ void __maxnreg__(registers_of(S)) encode_rice_fast_kernel(const __grid_constant__ EncodeParams p) {
  encode_rice_fast<DTYPE, S>(p, g_shared);
}

}  // namespace

const void* encode_rice_fast_function(Kernel kernel) {
  switch (kernel) {
    case kEncodeRiceBf16:
      return reinterpret_cast<const void*>(encode_rice_fast_kernel<KVZ_BF16, 1>);
    case kEncodeRiceBf16Two:
      return reinterpret_cast<const void*>(encode_rice_fast_kernel<KVZ_BF16, 2>);
    case kEncodeRiceFp16:
      return reinterpret_cast<const void*>(encode_rice_fast_kernel<KVZ_FP16, 1>);
    default:
      return reinterpret_cast<const void*>(encode_rice_fast_kernel<KVZ_FP16, 2>);
  }
}

}  // namespace gpu
}  // namespace kvz
