// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The CUDA part of kvz.h in a library that was built without CUDA: every function says so.
#include <stddef.h>

#include "kvz.h"

extern "C" {

uint64_t kvz_cuda_workspace_bytes(uint32_t, uint32_t) { return 0; }
uint64_t kvz_cuda_arena_bytes(const kvz_segment*, uint32_t, uint32_t, uint32_t) { return 0; }
int32_t kvz_cuda_encode(const kvz_cuda_encode_args*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_decode(const kvz_cuda_decode_args*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_crc32c(const kvz_cuda_crc_args*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_store(kvz_cuda_store_args*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_load(kvz_cuda_load_args*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_store_wait(const kvz_cuda_store_args*, uint64_t, uint64_t, int32_t*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_load_wait(const kvz_cuda_load_args*, uint64_t, uint64_t, int32_t*) { return KVZ_NO_CUDA; }
uint64_t kvz_cuda_few_bytes(void) { return 0; }
int32_t kvz_cuda_encode_chunk(const kvz_cuda_encode_chunk_args*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_encode_and_copy(kvz_cuda_outgoing_args*, uint64_t, uint64_t, int32_t*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_decode_chunk(const kvz_cuda_decode_chunk_args*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_copy_between(const uint64_t*, const uint64_t*, const uint64_t*, uint64_t, void*, void*, void*) {
  return KVZ_NO_CUDA;
}
int32_t kvz_cuda_mapped_copy(void*, const void*, uint64_t, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_last_error(char* text, uint64_t text_bytes) {
  static const char kText[] = "the library was built without CUDA";
  if (text != NULL && text_bytes > 0) {
    uint64_t i = 0;
    for (; i + 1 < text_bytes && kText[i] != '\0'; ++i) text[i] = kText[i];
    text[i] = '\0';
  }
  return 0;
}
int32_t kvz_cuda_available(int32_t* devices) {
  if (devices != NULL) *devices = 0;
  return KVZ_NO_CUDA;
}
int32_t kvz_cuda_device_info(int32_t, kvz_cuda_device*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_versions(int32_t*, int32_t*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_get_device(int32_t*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_set_device(int32_t) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_memory(uint64_t*, uint64_t*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_malloc(uint64_t, void**) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_free(void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_host_register(void*, uint64_t) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_host_unregister(void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_memset(void*, int32_t, uint64_t, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_copy(void*, const void*, uint64_t, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_copy_batch(const uint64_t*, const uint64_t*, const uint64_t*, uint64_t, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_stream_create(int32_t, void**) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_stream_destroy(void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_stream_wait_event(void*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_stream_synchronize(void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_event_create(int32_t, void**) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_event_destroy(void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_event_record(void*, void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_event_query(void*, int32_t*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_event_synchronize(void*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_event_wait(void*, uint64_t, uint64_t, int32_t*) { return KVZ_NO_CUDA; }
int32_t kvz_cuda_event_elapsed(void*, void*, float*) { return KVZ_NO_CUDA; }

}  // extern "C"
