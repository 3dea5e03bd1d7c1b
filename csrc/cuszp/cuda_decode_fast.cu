// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Decoders for pages of strips (cuda_decode_strips.inl).
#include "cuda_decode_strips.inl"
#include "cuda_kernels.h"

namespace kvz {
namespace gpu {
namespace {

extern __shared__ __align__(16) uint8_t g_shared[];

template <int DTYPE>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) decode_fast_kernel(const __grid_constant__ DecodeParams p) {
  wait_for_previous_kernel();
  decode_fast<DTYPE, false>(p, g_shared);
}

}  // namespace

const void* decode_fast_function(Kernel kernel) {
  return kernel == kDecodeBf16 ? reinterpret_cast<const void*>(decode_fast_kernel<KVZ_BF16>)
                               : reinterpret_cast<const void*>(decode_fast_kernel<KVZ_FP16>);
}

}  // namespace gpu
}  // namespace kvz
