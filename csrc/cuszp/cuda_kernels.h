// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The kernels of the CUDA codec, each family in a file of its own, as the addresses that cudaLaunchKernelExC takes.
#pragma once

namespace kvz {
namespace gpu {

enum Kernel {
  kEncodeBf16,
  kEncodeFp16,
  kEncodeWithinBf16,  // bounds may differ within pages
  kEncodeWithinFp16,
  kEncodeGeneral,
  kEncodeRice,
  kEncodeRiceBf16,  // one strip a warp
  kEncodeRiceBf16Two,
  kEncodeRiceFp16,
  kEncodeRiceFp16Two,
  kDecodeBf16,
  kDecodeFp16,
  kDecodeWithinBf16,
  kDecodeWithinFp16,
  kDecodeGeneral,
  kDecodeRice,
  kDecodeRiceBf16,
  kDecodeRiceFp16,
  kKernels
};

const void* encode_fast_function(Kernel kernel);       // cuda_encode_fast.cu
const void* encode_within_function(Kernel kernel);     // cuda_encode_within.cu
const void* decode_fast_function(Kernel kernel);       // cuda_decode_fast.cu
const void* decode_within_function(Kernel kernel);     // cuda_decode_within.cu
const void* general_function(Kernel kernel);           // cuda_general.cu
const void* encode_rice_function();                    // cuda_encode_rice.cu
const void* decode_rice_function();                    // cuda_decode_rice.cu
const void* encode_rice_fast_function(Kernel kernel);  // cuda_encode_rice_fast.cu
const void* decode_rice_fast_function(Kernel kernel);  // cuda_decode_rice_fast.cu

}  // namespace gpu
}  // namespace kvz
