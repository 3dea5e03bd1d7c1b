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

#define KVZ_ABI_VERSION 4

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
  KVZ_NO_BOUNDS = 7,         // a segment was coded with channel bounds, and none were given
} kvz_status;

// One page of every block of a batch: where it lies and how it is coded. 72 bytes.
typedef struct kvz_segment {
  uint64_t base;         // address of the first value of block 0 (host or device memory)
  int64_t block_stride;  // bytes from one block to the next
  int64_t token_stride;  // bytes from one token to the next
  int64_t head_stride;   // bytes from one head to the next; the values of a head are contiguous
  uint32_t tokens;       // T >= 1
  uint32_t heads;        // H >= 1
  uint32_t head_dim;     // D >= 1; T * H * D < 2^31, and at most 2^32 - 16 bytes
  uint8_t dtype;         // kvz_dtype
  uint8_t group_tokens;  // G: 16, 8, 4, 2 or 1
  uint8_t coding;        // encode: kvz_coding wanted; ignored by decode (the table says it)
  uint8_t bound_kind;    // encode: kvz_bound_kind
  double bound;          // encode: finite, > 0 unless lossless or by channel
  uint8_t kind;          // 0 unknown, 1 K, 2 V: copied into the table
  uint8_t reserved[7];   // 0
  // Address of H * D floats, the absolute bound of each channel, 0 where it is exact, else 2^-96 to 2^120; in the
  // memory that the values are in. Encode: with KVZ_BOUND_CHANNEL_TABLE. Decode: where an entry was coded with one;
  // else 0.
  uint64_t channel_bounds;
} kvz_segment;

// One entry of a record's segment table, as it stands in the record. 16 bytes.
typedef struct kvz_entry {
  uint32_t offset;  // in units of 16 bytes from the start of the payload
  uint32_t size;    // bytes, without padding
  float bound;      // largest absolute bound that was applied; 0 where the segment is exact
  uint8_t coding;   // kvz_coding, and kvz_steps
  uint8_t kind;     // as in kvz_segment
  uint8_t param;    // `lossless`, `lossless_rice`: exponent base of the page; `rice`: its parameters
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
// and everything past it is unspecified. table[b * num_segments + s] describes segment s of b, payload_bytes[b] the
// whole. Blocks the host. Uses up to `threads` threads (0 = all cores that the process may use).
KVZ_API int32_t kvz_cpu_encode(const kvz_segment* segments, uint32_t num_segments, const int64_t* block_ids,
                               uint32_t num_blocks, uint8_t* output, uint64_t output_stride, kvz_entry* table,
                               uint64_t* payload_bytes, uint32_t threads);

// Check every segment of num_blocks payloads against the format: coding, size, classes, padding. Reads only
// payloads[b] .. payloads[b] + payload_bytes[b]. Returns KVZ_CORRUPT and sets *bad_block and *bad_segment (either may
// be NULL) to the first that fails; hostile bytes are expected here.
KVZ_API int32_t kvz_cpu_validate(const kvz_segment* segments, uint32_t num_segments, uint32_t num_blocks,
                                 const uint8_t* const* payloads, const uint64_t* payload_bytes, const kvz_entry* table,
                                 uint32_t threads, uint32_t* bad_block, uint32_t* bad_segment);

// Decode payloads[b] into block block_ids[b] of the segments. Validates as kvz_cpu_validate does before it writes the
// first value: on KVZ_CORRUPT nothing was written. Every value of every page is written.
KVZ_API int32_t kvz_cpu_decode(const kvz_segment* segments, uint32_t num_segments, const int64_t* block_ids,
                               uint32_t num_blocks, const uint8_t* const* payloads, const uint64_t* payload_bytes,
                               const kvz_entry* table, uint32_t threads, uint32_t* bad_block, uint32_t* bad_segment);

// Largest |a - b| over the finite values of a page (in float64), and the number of values that break `limit`: |a - b| >
// limit, or a non-finite value of a whose bits differ in b. limits[b * num_segments + s] goes with segment s of block
// b. a and b describe the same geometry in different memory. Blocks the host.
KVZ_API int32_t kvz_cpu_compare(const kvz_segment* a, const int64_t* a_blocks, const kvz_segment* b,
                                const int64_t* b_blocks, uint32_t num_segments, uint32_t num_blocks,
                                const double* limits, double* max_errors, uint64_t* violations, uint32_t threads);

// ---- CUDA
// -------------------------------------------------------------------------------------------------------------
//
// The same bytes on the GPU. The functions below never allocate device memory, never synchronise and never print,
// except where they say so. `stream` is a cudaStream_t (NULL: the legacy default stream) of the current device. "Device
// memory" means memory that the device can address: cudaMalloc, or mapped pinned host memory, which is right for what
// the host wants to read as soon as an event after the call has passed (table, sizes, statuses) and slow for anything
// else. A library without CUDA has all these functions; they return KVZ_NO_CUDA.

// Scratch that encode and decode share, in device memory. It must be zero before the first call; every call leaves it
// zero, so that calls in one stream can share it. Calls that may overlap need one each.
KVZ_API uint64_t kvz_cuda_workspace_bytes(uint32_t num_segments, uint32_t num_blocks);

// Worst case of the arena: every record with `header_bytes` in front of its payload, at a multiple of 256 bytes. 0 for
// invalid segments.
KVZ_API uint64_t kvz_cuda_arena_bytes(const kvz_segment* segments, uint32_t num_segments, uint32_t num_blocks,
                                      uint32_t header_bytes);

typedef struct kvz_cuda_encode_args {
  const kvz_segment* segments;         // host memory, read during the call; bases are device memory
  const kvz_segment* device_segments;  // the same in device memory, to stay until the work is done
  const int64_t* block_ids;            // device memory, num_blocks
  uint8_t* arena;                      // device memory, a multiple of 16 (better 256)
  uint64_t arena_bytes;
  uint64_t record_stride;    // bytes from one record to the next, a multiple of 256; 0: packed
  kvz_entry* table;          // device memory, out: num_blocks * num_segments, 16-byte aligned
  uint64_t* payload_bytes;   // device memory, out: num_blocks
  uint64_t* record_offsets;  // device memory, out: num_blocks; bytes from the arena's start to a record's start
  uint32_t* status;          // device memory, out: [0] a kvz_status, then [1] = 1; may be NULL
  void* workspace;           // kvz_cuda_workspace_bytes
  uint64_t workspace_bytes;
  uint32_t num_segments;
  uint32_t num_blocks;
  uint32_t header_bytes;     // left free before each payload; rounded up to 16
  uint32_t max_ctas;         // most thread blocks to run at a time; 0: as many as fit
  uint32_t strips_per_warp;  // tuning; 0: automatic
  uint32_t reserved;         // 0
  uint32_t* crc32c;          // device memory, out: num_blocks; CRC32C of the payloads, as headers hold it; may be NULL
} kvz_cuda_encode_args;

// Encode block block_ids[b] for b < num_blocks, in stream order. Record b begins at arena + record_offsets[b], its
// payload header_bytes (rounded up to 16) later; payload and table are those of kvz_cpu_encode. When the arena is too
// small, status[0] is KVZ_OUT_OF_SPACE, what did not fit was not written, and the table is complete. Capturable in a
// CUDA graph.
KVZ_API int32_t kvz_cuda_encode(const kvz_cuda_encode_args* args, void* stream);

// Where these are not asked for, entries that have them are refused.
typedef enum kvz_extended {
  KVZ_EXTENDED_RICE = 1,    // the Rice codings
  KVZ_EXTENDED_BOUNDS = 2,  // bounds that differ within pages; those of channels are in the segments
} kvz_extended;

typedef struct kvz_cuda_decode_args {
  const kvz_segment* segments;         // host memory, read during the call; bases are device memory
  const kvz_segment* device_segments;  // the same in device memory, to stay until the work is done
  const int64_t* block_ids;            // device memory, num_blocks
  const uint64_t* payloads;       // device memory, num_blocks addresses of payloads in device memory, multiples of 16
  const uint64_t* payload_bytes;  // device memory, num_blocks; one that is no multiple of 16 is corrupt
  const kvz_entry* table;         // device memory, num_blocks * num_segments, 16-byte aligned
  uint32_t* block_status;         // device memory, out: KVZ_OK or KVZ_CORRUPT, num_blocks; may be NULL
  void* workspace;                // kvz_cuda_workspace_bytes
  uint64_t workspace_bytes;
  uint32_t num_segments;
  uint32_t num_blocks;
  uint32_t all_or_nothing;   // 1: one corrupt block keeps every block of the batch from being written
  uint32_t max_ctas;         // most thread blocks to run at a time; 0: as many as fit
  uint32_t strips_per_warp;  // tuning; 0: automatic
  uint32_t extended;         // what entries may have beside the other codings with one bound a page: kvz_extended
  const uint32_t* crc32c;    // device memory, num_blocks: what the CRC32C of the payloads must be; NULL: not checked
} kvz_cuda_decode_args;

// Validate the payloads as kvz_cpu_validate does, and against their checksums, then decode into block block_ids[b] of
// the segments. A block that is corrupt is not written at all. Block ids must be distinct. Capturable in a CUDA graph.
KVZ_API int32_t kvz_cuda_decode(const kvz_cuda_decode_args* args, void* stream);

typedef struct kvz_cuda_crc_args {
  const uint8_t* base;      // payload b begins at base + offsets[b] + skip, a multiple of 4, in device memory
  const uint64_t* offsets;  // device memory, count
  uint64_t skip;
  uint64_t* payload_bytes;     // device memory, count; multiples of 16
  uint32_t* crc32c;            // device memory, count; out, or with `check` what is expected
  uint32_t* scratch;           // device memory, 2 * count; zero before the call and after it
  uint64_t max_payload_bytes;  // no payload is larger
  uint32_t count;
  uint32_t check;     // 1: set payload_bytes[b] to 0 where the checksum differs, so that decoding refuses b
  uint32_t max_ctas;  // most thread blocks; 0: as many as fit
  uint32_t reserved;  // 0
} kvz_cuda_crc_args;

// CRC32C of payloads, as record headers hold it, or a check against it, in stream order.
KVZ_API int32_t kvz_cuda_crc32c(const kvz_cuda_crc_args* args, void* stream);

// A run of host memory that holds bytes start .. start + bytes - 1 of a batch of records, laid out as in the arena.
typedef struct kvz_run {
  uint64_t start;    // a multiple of 16, as is `bytes`
  uint64_t address;  // of mapped pinned memory, a multiple of 16
  uint64_t bytes;
} kvz_run;

// Carrying records between an arena and mapped host memory by a kernel of few thread blocks, headers left out.
typedef struct kvz_cuda_move_args {
  uint8_t* arena;                  // device memory
  const uint64_t* record_offsets;  // device memory, num_blocks: where a record begins in the arena, multiples of 16
  const uint64_t* payload_bytes;   // device memory, num_blocks; multiples of 16
  uint64_t* checked_bytes;         // loads: device memory, out: payload_bytes, or 0 where the checksum differs
  uint32_t* crc32c;                // device memory, num_blocks: out of a store, expected by a load
  uint32_t* scratch;               // device memory, 2 * num_blocks; zero before the call and after it
  const kvz_run* runs;             // device memory, num_runs, in the order of `start`; not read when there is one
  kvz_run run;                     // the run, when there is one
  void* beside_to;                 // copied along: tables and sizes
  const void* beside_from;
  uint64_t max_payload_bytes;  // no payload is larger; at most 2^28
  uint32_t beside_bytes;       // a multiple of 16
  uint32_t num_runs;           // 1 to 512
  uint32_t num_blocks;
  uint32_t header_bytes;  // before each payload, a multiple of 16
  uint32_t max_ctas;      // most thread blocks; 0: as many as the link needs
  uint32_t most_pieces;   // set by the call
} kvz_cuda_move_args;

// Small transfers of few pages may go by kernels of their own, which need devices with thread block clusters and write
// to mapped host memory themselves: the host sees their end there, before an event tells it.
typedef struct kvz_cuda_few {
  uint8_t* memory;   // device memory of the stream, kvz_cuda_few_bytes(), zero before its first use, multiple of
                     // 16; NULL: other kernels do it
  uint32_t* ends;    // mapped host memory, num_blocks
  kvz_entry* table;  // mapped host memory, num_blocks * num_segments: of a store out, of a load in
  const int64_t* block_ids;  // host memory, num_blocks
  uint64_t* payload_bytes;   // stores: out, num_blocks
  uint32_t* status;          // stores: out, a kvz_status
  uint32_t launch;           // set by the call; 0: other kernels do it
  uint32_t reserved;
} kvz_cuda_few;

KVZ_API uint64_t kvz_cuda_few_bytes(void);

typedef struct kvz_cuda_store_args {
  kvz_cuda_encode_args encode;
  kvz_cuda_move_args move;
  kvz_cuda_few few;
  void* after;     // stream that makes the pages: they are read behind what is queued there now
  void* order;     // event for that; may be used again after the call
  void* done;      // event that is recorded behind everything
  int32_t device;  // whose streams these are; the thread's current device is the same after the call
  int32_t reserved;
} kvz_cuda_store_args;

typedef struct kvz_cuda_load_args {
  kvz_cuda_decode_args decode;
  kvz_cuda_move_args move;
  kvz_cuda_few few;
  void* after;  // stream whose queued work may still use the pages
  void* order;
  void* done;
  int32_t device;
  int32_t reserved;
} kvz_cuda_load_args;

// A whole transfer in one call: encode and carry the records to the host, or carry them to the arena, verify and
// decode. For small transfers; the kernel that carries them slows others while it runs.
KVZ_API int32_t kvz_cuda_store(kvz_cuda_store_args* args, void* stream);
KVZ_API int32_t kvz_cuda_load(kvz_cuda_load_args* args, void* stream);

// Wait for its end as kvz_cuda_event_wait does; its results are there when `done` says so.
KVZ_API int32_t kvz_cuda_store_wait(const kvz_cuda_store_args* args, uint64_t spin_us, uint64_t timeout_us,
                                    int32_t* done);
KVZ_API int32_t kvz_cuda_load_wait(const kvz_cuda_load_args* args, uint64_t spin_us, uint64_t timeout_us,
                                   int32_t* done);

// A chunk of a large store: inputs come from mapped host memory, results go there, by kernels; what they say decides
// where the records are copied to (kvz_cuda_copy_between).
typedef struct kvz_cuda_encode_chunk_args {
  kvz_cuda_encode_args encode;
  void* inputs_to;  // addresses and bytes are multiples of 16
  const void* inputs_from;
  uint64_t inputs_bytes;
  void* results_to;
  const void* results_from;
  uint64_t results_bytes;
  void* done;  // event that is recorded behind everything
} kvz_cuda_encode_chunk_args;
KVZ_API int32_t kvz_cuda_encode_chunk(const kvz_cuda_encode_chunk_args* args, void* stream);

// A chunk, and how it is copied.
typedef struct kvz_cuda_outgoing {
  const kvz_cuda_encode_chunk_args* encode;
  void* stream;  // of the copy
  void* copied;  // event that is recorded behind the copy
  void* begins;  // events before and behind the copy for who measures, or null
  void* ends;
} kvz_cuda_outgoing;

// Encodes chunks, and copies the records of each to `to` as soon as their size is known, one chunk right behind the
// other. An encoder is launched before the one in front of it is waited for, as kvz_cuda_event_wait does.
typedef struct kvz_cuda_outgoing_args {
  const kvz_cuda_outgoing* const* chunks;
  uint64_t count;
  uint64_t launched;  // chunks whose encoder was launched; counted on
  uint64_t to;        // host address
  uint64_t room_bytes;
  uint64_t* bytes;  // [count]: becomes the size of each copy, a multiple of 256; 0 = not queued yet
  void* kernels;    // stream of the encoders
} kvz_cuda_outgoing_args;

// *done: all copies are queued, or an encoder failed or what it said cannot be: then the sizes from its own on are 0.
// If not *done, call it again.
KVZ_API int32_t kvz_cuda_encode_and_copy(kvz_cuda_outgoing_args* args, uint64_t spin_us, uint64_t timeout_us,
                                         int32_t* done);

// A chunk of a large load whose records are copied in another stream (kvz_cuda_copy_between): inputs come by a kernel,
// and behind the copies all is decoded.
typedef struct kvz_cuda_decode_chunk_args {
  kvz_cuda_decode_args decode;
  void* inputs_to;
  const void* inputs_from;
  uint64_t inputs_bytes;
  void* copied;  // event behind the copies
  void* done;    // event behind everything
} kvz_cuda_decode_chunk_args;
KVZ_API int32_t kvz_cuda_decode_chunk(const kvz_cuda_decode_chunk_args* args, void* stream);

// kvz_cuda_copy_batch behind one event, if any; another is recorded behind it.
KVZ_API int32_t kvz_cuda_copy_between(const uint64_t* to, const uint64_t* from, const uint64_t* bytes, uint64_t count,
                                      void* after, void* done, void* stream);

// A copy by a small kernel: between device memory and mapped host memory without a turn of the copy engine. Addresses
// and `bytes` are multiples of 16.
KVZ_API int32_t kvz_cuda_mapped_copy(void* to, const void* from, uint64_t bytes, void* stream);

// What the last failing CUDA call of this thread said, such as "cudaErrorInvalidValue: invalid argument"; returns its
// code, 0 when none has failed. `text` may be NULL.
KVZ_API int32_t kvz_cuda_last_error(char* text, uint64_t text_bytes);

// KVZ_OK when there is at least one device; else kvz_cuda_last_error tells why. `devices` may be NULL.
KVZ_API int32_t kvz_cuda_available(int32_t* devices);

typedef struct kvz_cuda_device {
  char name[256];
  uint64_t memory_bytes;
  int32_t capability_major, capability_minor;
  int32_t multiprocessors;
  int32_t l2_bytes;
  int32_t shared_bytes;  // most shared memory of a thread block
  int32_t copy_engines;
  int32_t pci_domain, pci_bus, pci_device;
  int32_t host_native_atomics;
} kvz_cuda_device;

KVZ_API int32_t kvz_cuda_device_info(int32_t device, kvz_cuda_device* info);
KVZ_API int32_t kvz_cuda_versions(int32_t* driver, int32_t* runtime);  // 13000 is 13.0
KVZ_API int32_t kvz_cuda_get_device(int32_t* device);
KVZ_API int32_t kvz_cuda_set_device(int32_t device);
KVZ_API int32_t kvz_cuda_memory(uint64_t* free_bytes, uint64_t* total_bytes);

// Memory. Registering pins host memory and maps it for every device; both ends must be multiples of the page size.
KVZ_API int32_t kvz_cuda_malloc(uint64_t bytes, void** address);  // may synchronise
KVZ_API int32_t kvz_cuda_free(void* address);                     // may synchronise
KVZ_API int32_t kvz_cuda_host_register(void* address, uint64_t bytes);
KVZ_API int32_t kvz_cuda_host_unregister(void* address);
KVZ_API int32_t kvz_cuda_memset(void* address, int32_t byte, uint64_t bytes, void* stream);

// Copies, in any direction, in stream order. A batch is one call: as one batch of the driver where it has that (CUDA
// 13), else one by one. Host memory must be pinned for the call not to wait.
KVZ_API int32_t kvz_cuda_copy(void* to, const void* from, uint64_t bytes, void* stream);
KVZ_API int32_t kvz_cuda_copy_batch(const uint64_t* to, const uint64_t* from, const uint64_t* bytes, uint64_t count,
                                    void* stream);

// Streams and events of the current device. A higher `priority` is served first: 0 is the default, -1 above it.
KVZ_API int32_t kvz_cuda_stream_create(int32_t priority, void** stream);
KVZ_API int32_t kvz_cuda_stream_destroy(void* stream);
KVZ_API int32_t kvz_cuda_stream_wait_event(void* stream, void* event);
KVZ_API int32_t kvz_cuda_stream_synchronize(void* stream);  // blocks the host
KVZ_API int32_t kvz_cuda_event_create(int32_t timing, void** event);
KVZ_API int32_t kvz_cuda_event_destroy(void* event);
KVZ_API int32_t kvz_cuda_event_record(void* event, void* stream);
KVZ_API int32_t kvz_cuda_event_query(void* event, int32_t* done);
KVZ_API int32_t kvz_cuda_event_synchronize(void* event);  // blocks the host, without spinning
// Wait for an event, at most `timeout_us`: spin for `spin_us`, then look every few tens of microseconds. `done` says
// whether the work has ended.
KVZ_API int32_t kvz_cuda_event_wait(void* event, uint64_t spin_us, uint64_t timeout_us, int32_t* done);
KVZ_API int32_t kvz_cuda_event_elapsed(void* start, void* stop, float* milliseconds);

#ifdef __cplusplus
}
#endif
