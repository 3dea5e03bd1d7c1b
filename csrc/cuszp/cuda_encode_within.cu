// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Encoders for pages of strips, some of them with bounds that differ within them (cuda_encode_strips.inl).
#include "cuda_encode_strips.inl"
#include "cuda_kernels.h"

namespace kvz {
namespace gpu {
namespace {

extern __shared__ __align__(16) uint8_t g_shared[];

template <int DTYPE>
__global__ void __launch_bounds__((kMaxWarps + 3) * kWarp, 1)
    encode_within_kernel(const __grid_constant__ EncodeParams p) {
  encode_fast<DTYPE, true>(p, g_shared);
}

}  // namespace

const void* encode_within_function(Kernel kernel) {
  return kernel == kEncodeWithinBf16 ? reinterpret_cast<const void*>(encode_within_kernel<KVZ_BF16>)
                                     : reinterpret_cast<const void*>(encode_within_kernel<KVZ_FP16>);
}

}  // namespace gpu
}  // namespace kvz
