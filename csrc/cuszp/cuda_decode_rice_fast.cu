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

// Leaves 24 warps on a multiprocessor. With 112, decoding was slower although less spills.
constexpr int kRegisters = 80;

template <int DTYPE>
__global__ void __maxnreg__(kRegisters) decode_rice_fast_kernel(const __grid_constant__ DecodeParams p) {
  wait_for_previous_kernel();
  decode_rice_fast<DTYPE>(p, g_shared);
}

}  // namespace

const void* decode_rice_fast_function(Kernel kernel) {
  return kernel == kDecodeRiceBf16 ? reinterpret_cast<const void*>(decode_rice_fast_kernel<KVZ_BF16>)
                                   : reinterpret_cast<const void*>(decode_rice_fast_kernel<KVZ_FP16>);
}

}  // namespace gpu
}  // namespace kvz
