// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
#include "format.h"
#include "kvz.h"

#if defined(KVZIP_WITH_CUDA)
#define KVZ_CUDA_STATE "on"
#else
#define KVZ_CUDA_STATE "off"
#endif

extern "C" {

uint32_t kvz_abi_version(void) { return KVZ_ABI_VERSION; }

uint32_t kvz_format_version(void) { return KVZ_FORMAT_VERSION; }

const char* kvz_build_info(void) { return "cuda=" KVZ_CUDA_STATE " cpu=" KVZIP_CPU_ISAS " compiler=" KVZIP_COMPILER; }

const char* kvz_status_string(int32_t status) {
  switch (status) {
    case KVZ_OK:
      return "success";
    case KVZ_INVALID_ARGUMENT:
      return "a pointer, size, dtype, coding or bound is outside its contract";
    case KVZ_CORRUPT:
      return "a segment contradicts the format; nothing was written";
    case KVZ_OUT_OF_SPACE:
      return "the output buffer is smaller than the worst case (kvz_max_segment_bytes)";
    case KVZ_OUT_OF_MEMORY:
      return "the host has no memory for the codec's scratch";
    case KVZ_NO_CUDA:
      return "the library was built without CUDA; rebuild with KVZIP_CUDA=on and nvcc on PATH";
    case KVZ_CUDA_ERROR:
      return "a CUDA call failed";
    case KVZ_NO_BOUNDS:
      return "a segment was coded with channel bounds, and none were given";
    default:
      return "unknown status";
  }
}
}
