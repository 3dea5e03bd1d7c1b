// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// CRC32C of payloads in device memory. The CRC of a message is linear in its words: sum of word i times x^(32 (N - i))
// modulo the polynomial, so lanes, warps and thread blocks work on parts and shift their results into place (see M.
// Adler, crc32_combine in zlib, for the arithmetic). Numbers are bit-reflected, as CRC32C is: x^0 is the highest bit.
// Included by cuda.cu.
#include <stdint.h>

#include "cuda_transport.inl"
#include "kvz.h"

namespace kvz {
namespace gpu {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u;
constexpr uint32_t kPieceBytes = 16384;  // of one warp
constexpr uint32_t kRowBytes = 128;      // of one step of a warp: a word a lane
constexpr uint32_t kCrcThreads = 256;

// a times b modulo the polynomial.
__host__ __device__ constexpr uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (int i = 31; i >= 0; --i) {
    sum ^= (0u - ((a >> i) & 1u)) & b;
    b = (b >> 1) ^ ((0u - (b & 1u)) & kPolynomial);
  }
  return sum;
}

struct CrcConstants {
  uint32_t row[4][256];  // row[k][b]: byte b at place k, shifted past one row
  uint32_t lane[32];     // shifts lane l's word to the end of its row, and by the 32 bits of the CRC
  uint32_t unit[32];     // unit[i]: x^(128 * 2^i), the shift past 16 * 2^i bytes
};

constexpr CrcConstants crc_constants() {
  CrcConstants c = {};
  uint32_t x32 = 0x80000000u;
  for (int i = 0; i < 32; ++i) x32 = product(x32, 0x40000000u);
  uint32_t power = x32;
  for (int lane = 31; lane >= 0; --lane) {
    c.lane[lane] = power;
    power = product(power, x32);
  }
  const uint32_t x1024 = c.lane[0];
  for (int k = 0; k < 4; ++k) {
    for (uint32_t b = 0; b < 256; ++b) c.row[k][b] = product(b << (8 * k), x1024);
  }
  power = product(product(x32, x32), product(x32, x32));
  for (int i = 0; i < 32; ++i) {
    c.unit[i] = power;
    power = product(power, power);
  }
  return c;
}

__device__ const CrcConstants kCrc = crc_constants();

// x^(128 * units) for a whole warp.
__device__ uint32_t shift_past(uint32_t units, uint32_t lane) {
  uint32_t factor = (units >> lane) & 1u ? kCrc.unit[lane] : 0x80000000u;
  for (int step = 16; step > 0; step >>= 1) factor = product(factor, __shfl_xor_sync(0xffffffffu, factor, step));
  return factor;
}

// What a launch of checksums works on.
struct CrcParams {
  const uint8_t* base;  // payload b begins at base + offsets[b] + skip
  const uint64_t* offsets;
  uint64_t skip;
  uint64_t end;  // of the memory at `base`: a payload that ends behind it is not read
  const uint64_t* payload_bytes;
  uint32_t* crc32c;  // out, unless `expected` is given
  const uint32_t* expected;
  uint64_t* clear_size;  // of num_blocks: set to 0 where the checksum differs; or
  uint32_t* bad;         // set to 1 there, and
  uint32_t* any_bad;     // 1 too
  uint32_t* scratch;
  uint32_t count;
  uint32_t most_pieces;  // of a payload; a longer one differs from what is expected
};

__device__ void refuse(const CrcParams& a, uint32_t b) {
  if (a.clear_size != nullptr) a.clear_size[b] = 0;
  if (a.bad != nullptr) {
    a.bad[b] = 1;
    *a.any_bad = 1;
  }
}

__global__ void __launch_bounds__(kCrcThreads) crc_kernel(const __grid_constant__ CrcParams a) {
  __shared__ uint32_t row[4][256];
  for (uint32_t i = threadIdx.x; i < 1024; i += kCrcThreads) row[i >> 8][i & 255] = kCrc.row[i >> 8][i & 255];
  __syncthreads();
  const uint32_t lane = threadIdx.x & 31;
  const uint64_t warps = static_cast<uint64_t>(gridDim.x) * (kCrcThreads / 32);
  const uint64_t work = static_cast<uint64_t>(a.count) * a.most_pieces;
  for (uint64_t id = blockIdx.x * (kCrcThreads / 32) + (threadIdx.x >> 5); id < work; id += warps) {
    const uint32_t b = static_cast<uint32_t>(id / a.most_pieces);
    const uint32_t piece = static_cast<uint32_t>(id % a.most_pieces);  // counted from the end of the payload
    const uint64_t size = a.payload_bytes[b], begin = a.offsets[b] + a.skip;
    if (size > static_cast<uint64_t>(a.most_pieces) * kPieceBytes || size > a.end || begin > a.end - size) {
      if (a.expected != nullptr && piece == 0 && lane == 0) refuse(a, b);
      continue;
    }
    const int64_t bytes = static_cast<int64_t>(size);
    const uint32_t pieces = bytes == 0 ? 1 : static_cast<uint32_t>((bytes + kPieceBytes - 1) / kPieceBytes);
    if (piece >= pieces) continue;
    const int64_t after = static_cast<int64_t>(piece) * kPieceBytes;
    const int64_t end = bytes - after;
    const int64_t start = end > kPieceBytes ? end - kPieceBytes : 0;
    const int rows = static_cast<int>((end - start + kRowBytes - 1) / kRowBytes);
    const uint8_t* const payload = a.base + begin;
    // Rows end where the piece ends; words before its start are zero, which leaves the CRC alone.
    int64_t at = end - static_cast<int64_t>(rows) * kRowBytes + lane * 4;
    uint32_t sum = 0;
    for (int r = 0; r < rows; r += 8) {
      uint32_t word[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t where = at + i * static_cast<int64_t>(kRowBytes);
        word[i] = r + i < rows && where >= start ? *reinterpret_cast<const uint32_t*>(payload + where) : 0u;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (r + i < rows) {
          sum = row[0][sum & 255] ^ row[1][(sum >> 8) & 255] ^ row[2][(sum >> 16) & 255] ^ row[3][sum >> 24] ^ word[i];
        }
      }
      at += 8 * kRowBytes;
    }
    sum = product(sum, kCrc.lane[lane]);
    for (int step = 16; step > 0; step >>= 1) sum ^= __shfl_xor_sync(0xffffffffu, sum, step);
    sum = product(sum, shift_past(static_cast<uint32_t>(after / 16), lane));
    if (piece == pieces - 1) sum ^= product(0xffffffffu, shift_past(static_cast<uint32_t>(bytes / 16), lane));
    if (lane == 0) {
      atomicXor(&a.scratch[2 * b], sum);
      __threadfence();
      if (atomicAdd(&a.scratch[2 * b + 1], 1u) + 1 == pieces) {
        const uint32_t crc = ~atomicExch(&a.scratch[2 * b], 0u);
        a.scratch[2 * b + 1] = 0;
        if (a.expected == nullptr) {
          a.crc32c[b] = crc;
        } else if (crc != a.expected[b]) {
          refuse(a, b);
        }
      }
    }
  }
}

// `max_payload_bytes` sets how many pieces a payload may have.
cudaError_t launch_crc(CrcParams p, uint64_t max_payload_bytes, uint32_t max_ctas, cudaStream_t stream) {
  const uint64_t pieces = (max_payload_bytes + kPieceBytes - 1) / kPieceBytes;
  p.most_pieces = pieces == 0 ? 1 : static_cast<uint32_t>(pieces);
  const uint64_t needed = (static_cast<uint64_t>(p.count) * p.most_pieces + kCrcThreads / 32 - 1) / (kCrcThreads / 32);
  const uint64_t limit = max_ctas != 0 ? max_ctas : 4096;
  crc_kernel<<<static_cast<uint32_t>(needed < limit ? needed : limit), kCrcThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace gpu
}  // namespace kvz

extern "C" {

int32_t kvz_cuda_crc32c(const kvz_cuda_crc_args* args, void* stream) {
  using namespace kvz::gpu;
  if (args == nullptr || args->offsets == nullptr || args->payload_bytes == nullptr || args->crc32c == nullptr ||
      args->scratch == nullptr || args->check > 1) {
    return KVZ_INVALID_ARGUMENT;
  }
  if (args->count == 0) return KVZ_OK;
  CrcParams p = {};
  p.base = args->base;
  p.offsets = args->offsets;
  p.skip = args->skip;
  p.end = ~0ull;
  p.payload_bytes = args->payload_bytes;
  p.scratch = args->scratch;
  p.count = args->count;
  if (args->check != 0) {
    p.expected = args->crc32c;
    p.clear_size = args->payload_bytes;  // the decoder's validation refuses an empty payload
  } else {
    p.crc32c = args->crc32c;
  }
  return status_of(launch_crc(p, args->max_payload_bytes, args->max_ctas, stream_of(stream)));
}

}  // extern "C"
