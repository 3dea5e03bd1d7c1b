// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Transfers of few pages by kernels of their own (cuda_few.inl), for kvz_cuda_store and kvz_cuda_load.
#pragma once

#include <cuda_runtime.h>

#include "kvz.h"

namespace kvz {
namespace gpu {

// Queue it, and set `few.launch`; leaves that 0 where other kernels must do it, and nothing is queued then.
cudaError_t launch_few_store(kvz_cuda_store_args& args, cudaStream_t stream);
cudaError_t launch_few_load(kvz_cuda_load_args& args, cudaStream_t stream);

// Whether a launch has ended: all its blocks say so.
bool few_has_ended(const kvz_cuda_few& few, uint32_t num_blocks);

}  // namespace gpu
}  // namespace kvz
