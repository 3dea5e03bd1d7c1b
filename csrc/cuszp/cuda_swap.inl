// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Transfers that are queued whole by one call: encode, then a kernel of few CTAs that carries the records from the
// arena to mapped host memory and takes their CRC32C on the way; or that kernel in the other direction, then decode.
// The host is not asked in between. What the link takes for a large transfer is left to the copy engine
// (kvzip/transport.py): kernel stores near the link's limit slow every other kernel. Included by cuda.cu.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <chrono>

#include "cuda_few.h"
#include "cuda_row_crc.inl"
#include "cuda_transport.inl"
#include "kvz.h"

namespace kvz {
namespace gpu {
namespace {

constexpr uint32_t kMoveThreads = 256;
constexpr uint32_t kMoveWarps = kMoveThreads / 32;
constexpr uint32_t kMoveRows = 8;  // of one piece: all in flight at once
constexpr uint32_t kMostRuns = 512;
constexpr uint32_t kMostCtas = 32;    // as many as keep the link busy
constexpr uint64_t kFewSpinUs = 100;  // that a wait looks at host memory, before it looks at the event

// Programmatic launches begin before the kernel in front of them has ended; from here on its results are there.
__device__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

__device__ void copy_words(uint4* to, const uint4* from, uint32_t count, uint32_t first, uint32_t step) {
  for (uint32_t i = first; i < count; i += step) to[i] = from[i];
}

// Where position `at` of the records, laid out as in the arena, lies in host memory.
__device__ uint8_t* host_place(const kvz_run* runs, uint32_t count, uint64_t at) {
  uint32_t r = 0, past = count;  // the last run that begins at or before `at`
  while (past - r > 1) {
    const uint32_t middle = (r + past) / 2;
    if (runs[middle].start <= at) {
      r = middle;
    } else {
      past = middle;
    }
  }
  return reinterpret_cast<uint8_t*>(runs[r].address + (at - runs[r].start));
}

template <bool OUT>
__global__ void __launch_bounds__(kMoveThreads) move_kernel(const __grid_constant__ kvz_cuda_move_args a) {
  __shared__ uint32_t row[4][256];
  __shared__ kvz_run runs[kMostRuns];
  load_row_tables(row);
  if (a.num_runs == 1) {
    if (threadIdx.x == 0) runs[0] = a.run;
  } else {
    for (uint32_t i = threadIdx.x; i < a.num_runs; i += kMoveThreads) runs[i] = a.runs[i];
  }
  const uint32_t lane = threadIdx.x & 31;
  wait_for_kernel_before();
  __syncthreads();
  // What goes along with the records: tables and sizes.
  if (blockIdx.x == gridDim.x - 1) {
    copy_words(static_cast<uint4*>(a.beside_to), static_cast<const uint4*>(a.beside_from), a.beside_bytes / 16,
               threadIdx.x, kMoveThreads);
  }
  const uint32_t warps = gridDim.x * kMoveWarps;
  const uint64_t work = static_cast<uint64_t>(a.num_blocks) * a.most_pieces;
  for (uint64_t id = blockIdx.x * kMoveWarps + (threadIdx.x >> 5); id < work; id += warps) {
    const uint32_t b = static_cast<uint32_t>(id / a.most_pieces);
    const uint32_t piece = static_cast<uint32_t>(id % a.most_pieces);
    const uint64_t bytes = a.payload_bytes[b];
    const uint64_t begin = a.record_offsets[b];
    const int64_t total = static_cast<int64_t>(a.header_bytes + bytes);
    const uint32_t rows = static_cast<uint32_t>((total + kRowBytes - 1) / kRowBytes);
    const uint32_t pieces = (rows + kMoveRows - 1) / kMoveRows;
    if (piece >= pieces) continue;
    const uint32_t first = piece * kMoveRows;
    const uint32_t last = first + kMoveRows < rows ? first + kMoveRows : rows;
    uint4 v[kMoveRows];
#pragma unroll
    for (uint32_t i = 0; i < kMoveRows; ++i) {
      const int64_t at = static_cast<int64_t>(first + i) * kRowBytes + lane * 16;
      v[i] = make_uint4(0, 0, 0, 0);
      if (at >= a.header_bytes && at < total) {
        const uint8_t* from = OUT ? a.arena + begin + at : host_place(runs, a.num_runs, begin + at);
        v[i] = *reinterpret_cast<const uint4*>(from);
      }
    }
    uint4 sum = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (uint32_t i = 0; i < kMoveRows; ++i) {
      const int64_t at = static_cast<int64_t>(first + i) * kRowBytes + lane * 16;
      if (at >= a.header_bytes && at < total) {
        uint8_t* to = OUT ? host_place(runs, a.num_runs, begin + at) : a.arena + begin + at;
        *reinterpret_cast<uint4*>(to) = v[i];
      }
      if (first + i < last) {
        add_row(sum, v[i], row);
      }
    }
    uint32_t crc = sum_of_rows(sum, lane);
    if (lane != 0) continue;
    const int32_t left = static_cast<int32_t>((total - static_cast<int64_t>(last) * kRowBytes) / 16);  // -31 or more
    crc = product_once(crc, left < 0 ? kRows.back[0][-left] : shift_units(static_cast<uint32_t>(left)));
    if (piece == 0) crc ^= product_once(0xffffffffu, shift_units(static_cast<uint32_t>(bytes / 16)));
    atomicXor(&a.scratch[2 * b], crc);
    __threadfence();
    if (atomicAdd(&a.scratch[2 * b + 1], 1u) + 1 == pieces) {
      crc = ~atomicExch(&a.scratch[2 * b], 0u);
      a.scratch[2 * b + 1] = 0;
      if (OUT) {
        a.crc32c[b] = crc;
      } else {
        a.checked_bytes[b] = crc == a.crc32c[b] ? bytes : 0;  // the decoder's validation refuses an empty payload
      }
    }
  }
}

__global__ void __launch_bounds__(kMoveThreads) mapped_copy_kernel(uint4* to, const uint4* from, uint32_t count) {
  copy_words(to, from, count, threadIdx.x + blockIdx.x * kMoveThreads, kMoveThreads * gridDim.x);
}

int32_t check_move(const kvz_cuda_move_args& a) {
  const bool missing = a.arena == nullptr || a.record_offsets == nullptr || a.payload_bytes == nullptr ||
                       a.crc32c == nullptr || a.scratch == nullptr || a.num_runs == 0 ||
                       (a.num_runs > 1 && a.runs == nullptr);
  const bool odd = a.header_bytes % 16 != 0 || a.beside_bytes % 16 != 0 || a.num_runs > kMostRuns ||
                   a.max_payload_bytes > (1u << 28) || a.num_blocks == 0;
  return missing || odd ? KVZ_INVALID_ARGUMENT : KVZ_OK;
}

template <bool OUT>
cudaError_t launch_move(kvz_cuda_move_args a, cudaStream_t stream) {
  const uint64_t rows = (a.header_bytes + a.max_payload_bytes + kRowBytes - 1) / kRowBytes;
  a.most_pieces = static_cast<uint32_t>((rows + kMoveRows - 1) / kMoveRows);
  const uint64_t needed = (static_cast<uint64_t>(a.num_blocks) * a.most_pieces + kMoveWarps - 1) / kMoveWarps;
  uint64_t ctas = needed < kMostCtas ? needed : kMostCtas;
  if (a.max_ctas != 0 && a.max_ctas < ctas) ctas = a.max_ctas;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(ctas));
  config.blockDim = dim3(kMoveThreads);
  config.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (OUT) {  // the way in waits for the caller's stream, not for a kernel
    config.attrs = &early;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, move_kernel<OUT>, a);
}

// The thread's current device, for the time of a call.
class OnDevice {
 public:
  explicit OnDevice(int32_t device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
    changed_ = error == cudaSuccess && before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t error = cudaSuccess;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Work of `stream` from here on comes behind what is queued on `after` now. To ask whether anything is there takes
// longer.
cudaError_t order_behind(void* stream, void* after, void* event) {
  cudaError_t error = cudaEventRecord(event_of(event), stream_of(after));
  if (error == cudaSuccess) error = cudaStreamWaitEvent(stream_of(stream), event_of(event), 0);
  return error;
}

// As kvz_cuda_event_wait; kernels for few pages say earlier that they have ended.
int32_t wait_for_swap(const kvz_cuda_few& few, uint32_t num_blocks, void* event, uint64_t spin_us, uint64_t timeout_us,
                      int32_t* done) {
  using Clock = std::chrono::steady_clock;
  if (few.launch == 0) return kvz_cuda_event_wait(event, spin_us, timeout_us, done);
  const Clock::time_point begin = Clock::now();
  *done = 0;
  for (uint32_t looks = 1; timeout_us != 0; ++looks) {
    *done = few_has_ended(few, num_blocks);
    if (*done) return KVZ_OK;
    if (looks % 16 != 0) continue;
    const uint64_t waited =
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin).count());
    if (waited >= timeout_us) return KVZ_OK;
    if (waited >= kFewSpinUs || waited >= spin_us) {  // it takes longer, or has failed, which the event tells
      return kvz_cuda_event_wait(event, spin_us > waited ? spin_us - waited : 0, timeout_us - waited, done);
    }
  }
  *done = few_has_ended(few, num_blocks);
  return *done ? KVZ_OK : kvz_cuda_event_wait(event, 0, 0, done);
}

// What an encoder wrote into the table that a chunk's results are copied from, in host memory.
template <typename T>
const T& result_of(const kvz_cuda_encode_chunk_args& chunk, const T* on_device, uint64_t index) {
  const uint8_t* at = reinterpret_cast<const uint8_t*>(on_device + index);
  const uint8_t* host = static_cast<const uint8_t*>(chunk.results_to);
  return *reinterpret_cast<const T*>(host + (at - static_cast<const uint8_t*>(chunk.results_from)));
}

// Bytes of the arena that an encoder's records take; 0 where its table cannot be.
uint64_t encoded_bytes(const kvz_cuda_encode_chunk_args& chunk) {
  const kvz_cuda_encode_args& a = chunk.encode;
  const uint64_t offset = result_of(chunk, a.record_offsets, a.num_blocks - 1);
  const uint64_t payload = result_of(chunk, a.payload_bytes, a.num_blocks - 1);
  constexpr uint64_t kMost = UINT64_C(1) << 48;  // no sum below runs over
  constexpr uint64_t kUnit = kRecordUnits * 16;
  if (offset > kMost || payload > kMost) return 0;
  return (offset + a.header_bytes + payload + kUnit - 1) / kUnit * kUnit;
}

// Launch encoders up to that of chunk `last`, if there is one.
int32_t launch_outgoing(kvz_cuda_outgoing_args& args, uint64_t last) {
  while (args.launched < args.count && args.launched <= last) {
    const int32_t status = kvz_cuda_encode_chunk(args.chunks[args.launched]->encode, args.kernels);
    if (status != KVZ_OK) return status;
    ++args.launched;
  }
  return KVZ_OK;
}

cudaError_t copy_records(const kvz_cuda_outgoing& chunk, uint64_t to, uint64_t bytes) {
  const cudaStream_t stream = stream_of(chunk.stream);
  cudaError_t error = chunk.begins == nullptr ? cudaSuccess : cudaEventRecord(event_of(chunk.begins), stream);
  if (error == cudaSuccess) {
    const void* arena = chunk.encode->encode.arena;
    error = cudaMemcpyAsync(reinterpret_cast<void*>(to), arena, bytes, cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess && chunk.ends != nullptr) error = cudaEventRecord(event_of(chunk.ends), stream);
  return error == cudaSuccess ? cudaEventRecord(event_of(chunk.copied), stream) : error;
}

}  // namespace
}  // namespace gpu
}  // namespace kvz

extern "C" {

int32_t kvz_cuda_store(kvz_cuda_store_args* args, void* stream) {
  using namespace kvz::gpu;
  if (args == nullptr) return KVZ_INVALID_ARGUMENT;
  int32_t status = check_move(args->move);
  if (status != KVZ_OK) return status;
  const OnDevice device(args->device);
  if (device.error != cudaSuccess) return status_of(device.error);
  cudaError_t error = order_behind(stream, args->after, args->order);
  if (error == cudaSuccess) error = launch_few_store(*args, stream_of(stream));
  if (error != cudaSuccess) return status_of(error);
  if (args->few.launch == 0) {
    status = kvz_cuda_encode(&args->encode, stream);
    if (status != KVZ_OK) return status;
    error = launch_move<true>(args->move, stream_of(stream));
  }
  if (error == cudaSuccess) error = cudaEventRecord(event_of(args->done), stream_of(stream));
  return status_of(error);
}

int32_t kvz_cuda_load(kvz_cuda_load_args* args, void* stream) {
  using namespace kvz::gpu;
  if (args == nullptr || args->move.checked_bytes == nullptr) return KVZ_INVALID_ARGUMENT;
  int32_t status = check_move(args->move);
  if (status != KVZ_OK) return status;
  const OnDevice device(args->device);
  if (device.error != cudaSuccess) return status_of(device.error);
  cudaError_t error = order_behind(stream, args->after, args->order);
  if (error == cudaSuccess) error = launch_few_load(*args, stream_of(stream));
  if (error != cudaSuccess) return status_of(error);
  if (args->few.launch == 0) {
    error = launch_move<false>(args->move, stream_of(stream));
    if (error != cudaSuccess) return status_of(error);
    status = kvz_cuda_decode(&args->decode, stream);
    if (status != KVZ_OK) return status;
  }
  return status_of(cudaEventRecord(event_of(args->done), stream_of(stream)));
}

int32_t kvz_cuda_store_wait(const kvz_cuda_store_args* args, uint64_t spin_us, uint64_t timeout_us, int32_t* done) {
  using namespace kvz::gpu;
  if (args == nullptr || done == nullptr) return KVZ_INVALID_ARGUMENT;
  return wait_for_swap(args->few, args->encode.num_blocks, args->done, spin_us, timeout_us, done);
}

int32_t kvz_cuda_load_wait(const kvz_cuda_load_args* args, uint64_t spin_us, uint64_t timeout_us, int32_t* done) {
  using namespace kvz::gpu;
  if (args == nullptr || done == nullptr) return KVZ_INVALID_ARGUMENT;
  return wait_for_swap(args->few, args->decode.num_blocks, args->done, spin_us, timeout_us, done);
}

int32_t kvz_cuda_encode_chunk(const kvz_cuda_encode_chunk_args* args, void* stream) {
  if (args == nullptr) return KVZ_INVALID_ARGUMENT;
  int32_t status = kvz_cuda_mapped_copy(args->inputs_to, args->inputs_from, args->inputs_bytes, stream);
  if (status == KVZ_OK) status = kvz_cuda_encode(&args->encode, stream);
  if (status == KVZ_OK)
    status = kvz_cuda_mapped_copy(args->results_to, args->results_from, args->results_bytes, stream);
  return status == KVZ_OK ? kvz_cuda_event_record(args->done, stream) : status;
}

int32_t kvz_cuda_encode_and_copy(kvz_cuda_outgoing_args* args, uint64_t spin_us, uint64_t timeout_us, int32_t* done) {
  using namespace kvz::gpu;
  if (args == nullptr || args->chunks == nullptr || args->bytes == nullptr || done == nullptr) {
    return KVZ_INVALID_ARGUMENT;
  }
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  const auto left_of = [begin](uint64_t us) {
    const auto waited = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin).count();
    return us - std::min(us, static_cast<uint64_t>(waited));
  };
  *done = 0;
  uint64_t at = 0;
  for (uint64_t i = 0; i < args->count; at += args->bytes[i++]) {
    if (args->bytes[i] != 0) continue;
    const kvz_cuda_encode_chunk_args& chunk = *args->chunks[i]->encode;
    int32_t status = launch_outgoing(*args, i);
    int32_t encoded = 0;
    if (status == KVZ_OK) status = kvz_cuda_event_query(chunk.done, &encoded);
    if (status == KVZ_OK && !encoded) {  // there is time for the next one's launch
      status = launch_outgoing(*args, i + 1);
      if (status == KVZ_OK) status = kvz_cuda_event_wait(chunk.done, spin_us, left_of(timeout_us), &encoded);
    }
    if (status != KVZ_OK || !encoded) return status;
    const bool failed = result_of(chunk, chunk.encode.status, 0) != KVZ_OK;
    const uint64_t bytes = failed ? 0 : encoded_bytes(chunk);
    if (bytes == 0 || bytes > chunk.encode.arena_bytes || bytes > args->room_bytes - at) break;
    const cudaError_t error = copy_records(*args->chunks[i], args->to + at, bytes);
    if (error != cudaSuccess) return status_of(error);
    args->bytes[i] = bytes;
  }
  *done = 1;
  return KVZ_OK;
}

int32_t kvz_cuda_decode_chunk(const kvz_cuda_decode_chunk_args* args, void* stream) {
  if (args == nullptr) return KVZ_INVALID_ARGUMENT;
  int32_t status = kvz_cuda_mapped_copy(args->inputs_to, args->inputs_from, args->inputs_bytes, stream);
  if (status == KVZ_OK) status = kvz_cuda_stream_wait_event(stream, args->copied);
  if (status == KVZ_OK) status = kvz_cuda_decode(&args->decode, stream);
  return status == KVZ_OK ? kvz_cuda_event_record(args->done, stream) : status;
}

int32_t kvz_cuda_copy_between(const uint64_t* to, const uint64_t* from, const uint64_t* bytes, uint64_t count,
                              void* after, void* done, void* stream) {
  int32_t status = after == nullptr ? KVZ_OK : kvz_cuda_stream_wait_event(stream, after);
  if (status == KVZ_OK) status = kvz_cuda_copy_batch(to, from, bytes, count, stream);
  return status == KVZ_OK ? kvz_cuda_event_record(done, stream) : status;
}

int32_t kvz_cuda_mapped_copy(void* to, const void* from, uint64_t bytes, void* stream) {
  using namespace kvz::gpu;
  if (to == nullptr || from == nullptr || bytes % 16 != 0 || bytes > (1u << 30)) return KVZ_INVALID_ARGUMENT;
  if (bytes == 0) return KVZ_OK;
  const uint32_t count = static_cast<uint32_t>(bytes / 16);
  const uint32_t needed = (count + kMoveThreads * 4 - 1) / (kMoveThreads * 4);
  const uint32_t ctas = needed < 8 ? needed : 8;
  mapped_copy_kernel<<<ctas, kMoveThreads, 0, stream_of(stream)>>>(static_cast<uint4*>(to),
                                                                   static_cast<const uint4*>(from), count);
  return status_of(cudaGetLastError());
}

}  // extern "C"
