// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Encoder of the Rice codings (cuda_rice.inl).
#include "cuda_kernels.h"
#include "cuda_rice.inl"

namespace kvz {
namespace gpu {
namespace {

extern __shared__ __align__(16) uint8_t g_shared[];

__global__ void __launch_bounds__(kRiceWarps* kWarp, 2) encode_rice_kernel(const __grid_constant__ EncodeParams p) {
  encode_rice(p, g_shared, p.team_bytes / 4, p.teams);
}

}  // namespace

const void* encode_rice_function() { return reinterpret_cast<const void*>(encode_rice_kernel); }

}  // namespace gpu
}  // namespace kvz
