// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Transfers that are queued whole by one call: encode, then a kernel of few CTAs that carries the records from the
// arena to mapped host memory and takes their CRC32C on the way; or that kernel in the other direction, then decode.
// The host is not asked in between. What the link takes for a large transfer is left to the copy engine
// (kvzip/transport.py): kernel stores near the link's limit slow every other kernel. Included by cuda.cu.
#pragma once

#include <stdint.h>

#include "cuda_crc.inl"
#include "cuda_transport.inl"
#include "kvz.h"

namespace kvz {
namespace gpu {
namespace {

constexpr uint32_t kMoveThreads = 256;
constexpr uint32_t kMoveWarps = kMoveThreads / 32;
constexpr uint32_t kMoveRowBytes = 512;  // of one step of a warp: 16 bytes a lane
constexpr uint32_t kMoveRows = 8;        // of one piece: all in flight at once
constexpr uint32_t kMostRuns = 512;
constexpr uint32_t kMostCtas = 32;  // as many as keep the link busy

// As CrcConstants, for rows of 512 bytes and four words a lane.
struct MoveConstants {
  uint32_t row[4][256];  // row[k][b]: byte b at place k, shifted past one row
  uint32_t word[128];    // shifts word i of a row to the end of the row, and by the 32 bits of the CRC
  uint32_t low[256];     // x^(128 i): past 16 i bytes
  uint32_t middle[256];  // x^(128 * 256 i)
  uint32_t high[256];    // x^(128 * 65536 i)
  uint32_t back[32];     // x^(-128 i)
};

constexpr MoveConstants move_constants() {
  MoveConstants c = {};
  const uint32_t one = 0x80000000u, x = 0x40000000u;
  uint32_t x32 = one;
  for (int i = 0; i < 32; ++i) x32 = product(x32, x);
  uint32_t power = x32;
  for (int i = 127; i >= 0; --i) {
    c.word[i] = power;
    power = product(power, x32);
  }
  const uint32_t row = c.word[0];
  for (int k = 0; k < 4; ++k) {
    // Linear in the byte: eight products are enough.
    uint32_t bit[8] = {};
    for (int i = 0; i < 8; ++i) bit[i] = product(1u << (8 * k + i), row);
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t sum = 0;
      for (int i = 0; i < 8; ++i) sum ^= (b >> i) & 1u ? bit[i] : 0u;
      c.row[k][b] = sum;
    }
  }
  const uint32_t unit = product(product(x32, x32), product(x32, x32));
  uint32_t step = unit;
  uint32_t* const tables[3] = {c.low, c.middle, c.high};
  for (int t = 0; t < 3; ++t) {
    tables[t][0] = one;
    for (int i = 1; i < 256; ++i) tables[t][i] = product(tables[t][i - 1], step);
    step = product(tables[t][255], step);
  }
  // x has the order 2^31 - 1 (the polynomial is x + 1 times a primitive one), so x^(-128) is x^(2^31 - 129).
  uint32_t inverse = one, square = x;
  const uint32_t exponent = 0x7fffffffu - 128u;
  for (int i = 0; i < 32; ++i) {
    if ((exponent >> i) & 1u) inverse = product(inverse, square);
    square = product(square, square);
  }
  c.back[0] = one;
  for (int i = 1; i < 32; ++i) c.back[i] = product(c.back[i - 1], inverse);
  return c;
}

__device__ const MoveConstants kMove = move_constants();

// Out of line: few instructions to fetch for a kernel that runs for microseconds.
__device__ __noinline__ uint32_t product_once(uint32_t a, uint32_t b) { return product(a, b); }

// x^(128 units); units may be negative down to -31.
__device__ uint32_t shift_units(int32_t units) {
  if (units < 0) return kMove.back[-units];
  uint32_t factor = kMove.low[units & 255];
  if (units > 255) factor = product_once(factor, kMove.middle[(units >> 8) & 255]);
  if (units > 65535) factor = product_once(factor, kMove.high[(units >> 16) & 255]);
  return factor;
}

// Each word of a times its weight, summed.
__device__ uint32_t weighted_sum(uint4 a, uint4 b) {
  uint32_t sum = 0;
#pragma unroll 4
  for (int i = 31; i >= 0; --i) {
    sum ^= ((0u - ((a.x >> i) & 1u)) & b.x) ^ ((0u - ((a.y >> i) & 1u)) & b.y) ^ ((0u - ((a.z >> i) & 1u)) & b.z) ^
           ((0u - ((a.w >> i) & 1u)) & b.w);
    b.x = (b.x >> 1) ^ ((0u - (b.x & 1u)) & kPolynomial);
    b.y = (b.y >> 1) ^ ((0u - (b.y & 1u)) & kPolynomial);
    b.z = (b.z >> 1) ^ ((0u - (b.z & 1u)) & kPolynomial);
    b.w = (b.w >> 1) ^ ((0u - (b.w & 1u)) & kPolynomial);
  }
  return sum;
}

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
  for (uint32_t i = threadIdx.x; i < 1024; i += kMoveThreads) row[i >> 8][i & 255] = kMove.row[i >> 8][i & 255];
  if (a.num_runs == 1) {
    if (threadIdx.x == 0) runs[0] = a.run;
  } else {
    for (uint32_t i = threadIdx.x; i < a.num_runs; i += kMoveThreads) runs[i] = a.runs[i];
  }
  const uint32_t lane = threadIdx.x & 31;
  const uint4 weight = reinterpret_cast<const uint4*>(kMove.word)[lane];
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
    const uint32_t rows = static_cast<uint32_t>((total + kMoveRowBytes - 1) / kMoveRowBytes);
    const uint32_t pieces = (rows + kMoveRows - 1) / kMoveRows;
    if (piece >= pieces) continue;
    const uint32_t first = piece * kMoveRows;
    const uint32_t last = first + kMoveRows < rows ? first + kMoveRows : rows;
    uint4 v[kMoveRows];
#pragma unroll
    for (uint32_t i = 0; i < kMoveRows; ++i) {
      const int64_t at = static_cast<int64_t>(first + i) * kMoveRowBytes + lane * 16;
      v[i] = make_uint4(0, 0, 0, 0);
      if (at >= a.header_bytes && at < total) {
        const uint8_t* from = OUT ? a.arena + begin + at : host_place(runs, a.num_runs, begin + at);
        v[i] = *reinterpret_cast<const uint4*>(from);
      }
    }
    uint4 sum = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (uint32_t i = 0; i < kMoveRows; ++i) {
      const int64_t at = static_cast<int64_t>(first + i) * kMoveRowBytes + lane * 16;
      if (at >= a.header_bytes && at < total) {
        uint8_t* to = OUT ? host_place(runs, a.num_runs, begin + at) : a.arena + begin + at;
        *reinterpret_cast<uint4*>(to) = v[i];
      }
      if (first + i < last) {
#define KVZ_STEP(w) \
  sum.w = row[0][sum.w & 255] ^ row[1][(sum.w >> 8) & 255] ^ row[2][(sum.w >> 16) & 255] ^ row[3][sum.w >> 24] ^ v[i].w
        KVZ_STEP(x);
        KVZ_STEP(y);
        KVZ_STEP(z);
        KVZ_STEP(w);
#undef KVZ_STEP
      }
    }
    uint32_t crc = weighted_sum(sum, weight);
    for (int step = 16; step > 0; step >>= 1) crc ^= __shfl_xor_sync(0xffffffffu, crc, step);
    if (lane != 0) continue;
    crc =
        product_once(crc, shift_units(static_cast<int32_t>((total - static_cast<int64_t>(last) * kMoveRowBytes) / 16)));
    if (piece == 0) crc ^= product_once(0xffffffffu, shift_units(static_cast<int32_t>(bytes / 16)));
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
  const uint64_t rows = (a.header_bytes + a.max_payload_bytes + kMoveRowBytes - 1) / kMoveRowBytes;
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

// Work of `stream` from here on comes behind what is queued on `after` now.
cudaError_t order_behind(void* stream, void* after, void* event) {
  cudaError_t error = cudaEventRecord(event_of(event), stream_of(after));
  if (error == cudaSuccess) error = cudaStreamWaitEvent(stream_of(stream), event_of(event), 0);
  return error;
}

}  // namespace
}  // namespace gpu
}  // namespace kvz

extern "C" {

int32_t kvz_cuda_store(const kvz_cuda_store_args* args, void* stream) {
  using namespace kvz::gpu;
  if (args == nullptr) return KVZ_INVALID_ARGUMENT;
  int32_t status = check_move(args->move);
  if (status != KVZ_OK) return status;
  const OnDevice device(args->device);
  if (device.error != cudaSuccess) return status_of(device.error);
  cudaError_t error = order_behind(stream, args->after, args->order);
  if (error != cudaSuccess) return status_of(error);
  status = kvz_cuda_encode(&args->encode, stream);
  if (status != KVZ_OK) return status;
  error = launch_move<true>(args->move, stream_of(stream));
  if (error == cudaSuccess) error = cudaEventRecord(event_of(args->done), stream_of(stream));
  return status_of(error);
}

int32_t kvz_cuda_load(const kvz_cuda_load_args* args, void* stream) {
  using namespace kvz::gpu;
  if (args == nullptr || args->move.checked_bytes == nullptr) return KVZ_INVALID_ARGUMENT;
  int32_t status = check_move(args->move);
  if (status != KVZ_OK) return status;
  const OnDevice device(args->device);
  if (device.error != cudaSuccess) return status_of(device.error);
  cudaError_t error = order_behind(stream, args->after, args->order);
  if (error == cudaSuccess) error = launch_move<false>(args->move, stream_of(stream));
  if (error != cudaSuccess) return status_of(error);
  status = kvz_cuda_decode(&args->decode, stream);
  if (status != KVZ_OK) return status;
  return status_of(cudaEventRecord(event_of(args->done), stream_of(stream)));
}

int32_t kvz_cuda_encode_chunk(const kvz_cuda_encode_chunk_args* args, void* stream) {
  if (args == nullptr) return KVZ_INVALID_ARGUMENT;
  int32_t status = kvz_cuda_mapped_copy(args->inputs_to, args->inputs_from, args->inputs_bytes, stream);
  if (status == KVZ_OK) status = kvz_cuda_encode(&args->encode, stream);
  if (status == KVZ_OK)
    status = kvz_cuda_mapped_copy(args->results_to, args->results_from, args->results_bytes, stream);
  return status == KVZ_OK ? kvz_cuda_event_record(args->done, stream) : status;
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
