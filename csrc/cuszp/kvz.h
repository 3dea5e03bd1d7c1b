// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// C ABI of kvzip's native codec. One call handles a batch: `num_segments` pages of each of
// `num_blocks` blocks. Every function returns a status and never prints, throws or aborts.
// The bytes are those of docs/reference/format.md, whatever device writes them.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define KVZ_API __declspec(dllexport)
#else
#define KVZ_API __attribute__((visibility("default")))
#endif

#define KVZ_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kvz_status {
  KVZ_OK = 0,
  KVZ_INVALID_ARGUMENT = 1,  // a pointer, size, dtype, coding or bound outside its contract
  KVZ_CORRUPT = 2,           // a segment contradicts the format; nothing was written
  KVZ_OUT_OF_SPACE = 3,      // an output buffer is smaller than the worst case
  KVZ_OUT_OF_MEMORY = 4,     // the host has no memory for the codec's own scratch
  KVZ_NO_CUDA = 5,           // the library was built without CUDA
  KVZ_CUDA_ERROR = 6,        // a CUDA call failed; kvz_cuda_last_error says which
} kvz_status;

// One page of every block of a batch: where it lies and how it is coded. 64 bytes.
typedef struct kvz_segment {
  uint64_t base;          // address of the first value of block 0 (host or device memory)
  int64_t block_stride;   // bytes from one block to the next
  int64_t token_stride;   // bytes from one token to the next
  int64_t head_stride;    // bytes from one head to the next; the values of a head are contiguous
  uint32_t tokens;        // T >= 1
  uint32_t heads;         // H >= 1
  uint32_t head_dim;      // D >= 1; T * H * D < 2^31
  uint8_t dtype;          // kvz_dtype
  uint8_t group_tokens;   // G: 16, 8, 4, 2 or 1
  uint8_t coding;         // encode: kvz_coding wanted; ignored by decode (the table says it)
  uint8_t bound_kind;     // encode: kvz_bound_kind
  double bound;           // encode: finite, > 0 unless lossless
  uint8_t kind;           // 0 unknown, 1 K, 2 V: copied into the table
  uint8_t reserved[7];    // 0
} kvz_segment;

// One entry of a record's segment table, as it stands in the record. 16 bytes.
typedef struct kvz_entry {
  uint32_t offset;  // in units of 16 bytes from the start of the payload
  uint32_t size;    // bytes, without padding
  float bound;      // absolute bound that was applied; 0 where the segment is exact
  uint8_t coding;   // kvz_coding
  uint8_t kind;     // as in kvz_segment
  uint8_t param;    // `lossless`: exponent base of the page
  uint8_t reason;   // kvz_reason
} kvz_entry;

KVZ_API uint32_t kvz_abi_version(void);
KVZ_API uint32_t kvz_format_version(void);

// A static string such as "cuda=on cpu=avx2,avx512 compiler=GNU 12.2.0".
KVZ_API const char* kvz_build_info(void);

// A static English sentence for a status.
KVZ_API const char* kvz_status_string(int32_t status);

// Name of the instruction set that the CPU codec uses on this machine: "avx512", "avx2" or "baseline".
// kvz_cpu_set_isa(name) selects another one that the machine has ("auto" = best); for tests and reports.
KVZ_API const char* kvz_cpu_isa(void);
KVZ_API int32_t kvz_cpu_set_isa(const char* name);

// Largest number of bytes that one page of `segment` can take in a payload, padding to 16 included.
// 0 for an invalid segment.
KVZ_API uint64_t kvz_max_segment_bytes(const kvz_segment* segment);

// Encode block block_ids[b] for b < num_blocks. The payload of b goes to output + b * output_stride, which must
// hold the sum of kvz_max_segment_bytes over the segments; it is compact, 16-byte aligned, zero-padded to 16,
// and everything past it is unspecified. table[b * num_segments + s] describes segment s of b, payload_bytes[b] the whole.
// Blocks the host. Uses up to `threads` threads (0 = all cores that the process may use).
KVZ_API int32_t kvz_cpu_encode(const kvz_segment* segments, uint32_t num_segments, const int64_t* block_ids,
                               uint32_t num_blocks, uint8_t* output, uint64_t output_stride, kvz_entry* table,
                               uint64_t* payload_bytes, uint32_t threads);

// Check every segment of num_blocks payloads against the format: coding, size, classes, padding. Reads only
// payloads[b] .. payloads[b] + payload_bytes[b]. Returns KVZ_CORRUPT and sets *bad_block and *bad_segment (either may be
// NULL) to the first that fails; hostile bytes are expected here.
KVZ_API int32_t kvz_cpu_validate(const kvz_segment* segments, uint32_t num_segments, uint32_t num_blocks,
                                 const uint8_t* const* payloads, const uint64_t* payload_bytes,
                                 const kvz_entry* table, uint32_t threads, uint32_t* bad_block,
                                 uint32_t* bad_segment);

// Decode payloads[b] into block block_ids[b] of the segments. Validates as kvz_cpu_validate does before it writes the first
// value: on KVZ_CORRUPT nothing was written. Every value of every page is written.
KVZ_API int32_t kvz_cpu_decode(const kvz_segment* segments, uint32_t num_segments, const int64_t* block_ids,
                               uint32_t num_blocks, const uint8_t* const* payloads, const uint64_t* payload_bytes,
                               const kvz_entry* table, uint32_t threads, uint32_t* bad_block,
                               uint32_t* bad_segment);

// Largest |a - b| over the finite values of a page (in float64), and the number of values that break `limit`: |a - b| > limit,
// or a non-finite value of a whose bits differ in b. limits[b * num_segments + s] goes with segment s of block b.
// a and b describe the same geometry in different memory. Blocks the host.
KVZ_API int32_t kvz_cpu_compare(const kvz_segment* a, const int64_t* a_blocks, const kvz_segment* b,
                                const int64_t* b_blocks, uint32_t num_segments, uint32_t num_blocks,
                                const double* limits, double* max_errors, uint64_t* violations, uint32_t threads);

#ifdef __cplusplus
}
#endif
