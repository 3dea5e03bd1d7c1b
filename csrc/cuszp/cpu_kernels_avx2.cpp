// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The page kernels for x86-64 with AVX2 (and BMI).
#define KVZ_ISA_NAME "avx2"
#define KVZ_ISA_TABLE kAvx2Kernels
#include "cpu_kernels.inl"
