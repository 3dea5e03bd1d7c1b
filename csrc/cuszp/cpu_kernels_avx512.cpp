// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The page kernels for x86-64 with AVX-512 F, BW, CD, DQ and VL.
#define KVZ_ISA_NAME "avx512"
#define KVZ_ISA_TABLE kAvx512Kernels
#include "cpu_kernels.inl"
