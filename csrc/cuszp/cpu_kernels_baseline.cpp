// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The page kernels for every machine of the architecture.
#define KVZ_ISA_NAME "baseline"
#define KVZ_ISA_TABLE kBaselineKernels
#include "cpu_kernels.inl"
