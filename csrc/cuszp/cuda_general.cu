// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Encoder and decoder for any page (cuda_general.inl).
#include "cuda_general.inl"
#include "cuda_kernels.h"

namespace kvz {
namespace gpu {
namespace {

extern __shared__ __align__(16) uint8_t g_shared[];

__global__ void __launch_bounds__(kGeneralThreads, 2) encode_general_kernel(const __grid_constant__ EncodeParams p) {
  encode_general(p, g_shared);
}
__global__ void __launch_bounds__(kGeneralThreads, 2) decode_general_kernel(const __grid_constant__ DecodeParams p) {
  wait_for_previous_kernel();
  decode_general(p, g_shared);
}

}  // namespace

const void* general_function(Kernel kernel) {
  return kernel == kEncodeGeneral ? reinterpret_cast<const void*>(encode_general_kernel)
                                  : reinterpret_cast<const void*>(decode_general_kernel);
}

}  // namespace gpu
}  // namespace kvz
