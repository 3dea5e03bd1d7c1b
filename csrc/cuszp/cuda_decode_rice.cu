// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Decoder of all codings, the Rice codings among them (cuda_rice.inl).
#include "cuda_kernels.h"
#include "cuda_rice.inl"

namespace kvz {
namespace gpu {
namespace {

extern __shared__ __align__(16) uint8_t g_shared[];

__global__ void __launch_bounds__(kRiceWarps* kWarp, 2) decode_rice_kernel(const __grid_constant__ DecodeParams p) {
  wait_for_previous_kernel();
  decode_rice(p, g_shared);
}

}  // namespace

const void* decode_rice_function() { return reinterpret_cast<const void*>(decode_rice_kernel); }

}  // namespace gpu
}  // namespace kvz
