// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// CRC32C of payloads in device memory. The CRC of a message is linear in its bits, over the numbers modulo 2: a product
// of a matrix of bits with the message. Tensor cores multiply matrices of bits; they count ones, and the lowest bit of
// a count is the sum modulo 2. The matrix of a bit at a distance from the end is that of the last bits times a power of
// x modulo the polynomial, so that one matrix for 8 KiB serves all of a payload, whose parts are shifted into place
// (see M. Adler, crc32_combine in zlib, for the arithmetic). Numbers are bit-reflected, as CRC32C is: x^0 is the
// highest bit.
#pragma once

#include "cuda_device.inl"
#include "kvz.h"

#if defined(KVZ_EMULATE)
#define KVZ_TABLE static const
#define KVZ_HOST_DEV
#else
#define KVZ_TABLE __device__ const
#define KVZ_HOST_DEV __host__ __device__
#endif

namespace kvz {
namespace gpu {

constexpr uint32_t kPolynomial = 0x82f63b78u;
constexpr uint32_t kStepBytes = 512;                       // that a warp takes at a time: 16 bytes a lane
constexpr uint32_t kSteps = 16;                            // of a stream
constexpr uint32_t kPieceBytes = 2 * kSteps * kStepBytes;  // of a warp: two streams that share the matrix
constexpr uint32_t kPowers = 256;

// a times b modulo the polynomial.
KVZ_HOST_DEV constexpr uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (int i = 31; i >= 0; --i) {
    sum ^= (0u - ((a >> i) & 1u)) & b;
    b = (b >> 1) ^ ((0u - (b & 1u)) & kPolynomial);
  }
  return sum;
}

// x^n.
constexpr uint32_t power_of_x(uint64_t n) {
  uint32_t r = 0x80000000u, square = 0x40000000u;
  for (; n != 0; n >>= 1) {
    if (n & 1u) r = product(r, square);
    square = product(square, square);
  }
  return r;
}

struct alignas(16) CrcConstants {
  // matrix[step][lane]: the fragment of the second operand of mma.m16n8k256 for eight columns of the CRC at a time. A
  // lane holds 16 bytes of a step, words 0 and 2 in row lane / 4 of the first operand, words 1 and 3 in row lane / 4 +
  // 8; the matrix is right for the latter.
  uint32_t matrix[kSteps][32][8];
  uint32_t row[32];         // row[lane]: what the row that ends up in a lane is multiplied with
  uint32_t piece[kPowers];  // x^(8 * kPieceBytes * i)
  uint32_t unit[32];        // x^(128 * 2^i), the shift past 16 * 2^i bytes
};

constexpr CrcConstants crc_constants() {
  CrcConstants c = {};
  for (uint32_t step = 0; step < kSteps; ++step) {
    for (uint32_t quad = 0; quad < 4; ++quad) {
      for (uint32_t half = 0; half < 2; ++half) {
        // Bit i of a word with n words behind it stands for x^(31 - i + 32 n), and the CRC begins with x^32 times that.
        const uint32_t words = 14 - 4 * quad - 2 * half + kStepBytes / 4 * (kSteps - 1 - step);
        uint32_t bit = power_of_x(32ull * (words + 1));
        for (int i = 31; i >= 0; --i) {
          for (uint32_t column = 0; column < 32; ++column) {
            c.matrix[step][column % 8 * 4 + quad][column / 8 * 2 + half] |= ((bit >> column) & 1u) << i;
          }
          bit = (bit >> 1) ^ ((0u - (bit & 1u)) & kPolynomial);
        }
      }
    }
  }
  // Lane 4 r + q ends up with: q = 0, row r of the first stream, q = 1, row r + 8 of it, q = 2 and 3, the same of the
  // second.
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t r = lane / 4, q = lane % 4;
    c.row[lane] = power_of_x(512ull * (7 - r) + (q % 2 == 0 ? 32 : 0) + (q < 2 ? 8ull * kSteps * kStepBytes : 0));
  }
  const uint32_t x = power_of_x(8ull * kPieceBytes);
  c.piece[0] = 0x80000000u;
  for (uint32_t i = 1; i < kPowers; ++i) c.piece[i] = product(c.piece[i - 1], x);
  c.unit[0] = power_of_x(128);
  for (int i = 1; i < 32; ++i) c.unit[i] = product(c.unit[i - 1], c.unit[i - 1]);
  return c;
}

KVZ_TABLE CrcConstants kCrc = crc_constants();

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
  uint32_t* scratch;     // two words a payload: sum of the pieces, how many there are in it
  uint32_t count;
  uint32_t most_pieces;  // of a payload; a longer one differs from what is expected
};

// Ones that two matrices of bits have in common, added to `sum`: mma.m16n8k256.
KVZ_DEV void count_ones(int32_t (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
#if defined(KVZ_EMULATE)
  const uint32_t lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  for (uint32_t k = 0; k < 4; ++k) {
    // Lane 4 r + k holds words k and k + 4 of rows r and r + 8; lane 4 column + k holds those of a column.
    const uint32_t from = r * 4 + k;
    const uint32_t x[4] = {__shfl_sync(kAllLanes, a.x, from), __shfl_sync(kAllLanes, a.y, from),
                           __shfl_sync(kAllLanes, a.z, from), __shfl_sync(kAllLanes, a.w, from)};
    for (uint32_t n = 0; n < 2; ++n) {
      const uint32_t column = (q * 2 + n) * 4 + k;
      const uint32_t y0 = __shfl_sync(kAllLanes, b0, column), y1 = __shfl_sync(kAllLanes, b1, column);
      sum[n] += __popc(x[0] & y0) + __popc(x[2] & y1);
      sum[n + 2] += __popc(x[1] & y0) + __popc(x[3] & y1);
    }
  }
#else
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#endif
}

// x^(128 * units) for a whole warp.
KVZ_DEV uint32_t shift_past(uint32_t units, uint32_t lane) {
  uint32_t factor = (units >> lane) & 1u ? kCrc.unit[lane] : 0x80000000u;
  for (int step = 16; step > 0; step >>= 1) factor = product(factor, __shfl_xor_sync(kAllLanes, factor, step));
  return factor;
}

// Contribution of the last `bytes` (a multiple of 16, at most kPieceBytes) before `end` to a CRC that ends there. The
// same in all lanes.
KVZ_DEV uint32_t crc_of_piece(const uint8_t* end, uint32_t bytes, uint32_t lane) {
  int32_t sum[2][4][4] = {};
  const uint4* const matrix = reinterpret_cast<const uint4*>(kCrc.matrix);
  const uint32_t half = kSteps * kStepBytes;
  // Steps count from the end of each stream; zeros in front of a message leave its CRC alone.
  const uint32_t steps = bytes >= half ? kSteps : (bytes + kStepBytes - 1) / kStepBytes;
  const uint32_t mine = (31 - lane) * 16 + 16;  // bytes from a lane's 16 to the end of the step
#pragma unroll 1
  for (uint32_t s = 0; s < steps; s += 4) {
    uint4 v[4][2];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
#pragma unroll
      for (uint32_t stream = 0; stream < 2; ++stream) {
        const uint32_t back = (stream == 1 ? 0u : half) + (s + i) * kStepBytes + mine;
        v[i][stream].x = v[i][stream].y = v[i][stream].z = v[i][stream].w = 0;
        if (back <= bytes) v[i][stream] = *reinterpret_cast<const uint4*>(end - back);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint4* const fragment = matrix + ((kSteps - 1 - (s + i)) * 32 + lane) * 2;
      const uint4 b0 = fragment[0], b1 = fragment[1];
#pragma unroll
      for (uint32_t stream = 0; stream < 2; ++stream) {
        count_ones(sum[stream][0], v[i][stream], b0.x, b0.y);
        count_ones(sum[stream][1], v[i][stream], b0.z, b0.w);
        count_ones(sum[stream][2], v[i][stream], b1.x, b1.y);
        count_ones(sum[stream][3], v[i][stream], b1.z, b1.w);
      }
    }
  }
  // A lane holds two neighbouring columns of rows lane / 4 and lane / 4 + 8, eight columns apart. The four lanes of a
  // row put them together, and each goes on with another of the four sums.
  const uint32_t q = lane & 3u;
  uint32_t row[4];
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t tile = 0; tile < 4; ++tile) {
      const int32_t* const c = sum[j / 2][tile] + j % 2 * 2;
      bits |= ((static_cast<uint32_t>(c[0]) & 1u) | (static_cast<uint32_t>(c[1]) & 1u) << 1) << (8 * tile);
    }
    bits <<= 2 * q;
    bits |= __shfl_xor_sync(kAllLanes, bits, 1);
    row[j] = bits | __shfl_xor_sync(kAllLanes, bits, 2);
  }
  const uint32_t low = q & 1u ? row[1] : row[0], high = q & 1u ? row[3] : row[2];
  return __reduce_xor_sync(kAllLanes, product(q & 2u ? high : low, kCrc.row[lane]));
}

KVZ_DEV void refuse(const CrcParams& a, uint32_t b) {
  if (a.clear_size != nullptr) a.clear_size[b] = 0;
  if (a.bad != nullptr) {
    a.bad[b] = 1;
    *a.any_bad = 1;
  }
}

// Piece `id` of all payloads, by one warp.
KVZ_DEV void checksum_piece(const CrcParams& a, uint64_t id, uint32_t lane) {
  // The last pieces of all payloads first: what does not exist comes at the end, where it delays nobody.
  const uint32_t piece = static_cast<uint32_t>(id / a.count);  // counted from the end of the payload
  const uint32_t b = static_cast<uint32_t>(id - static_cast<uint64_t>(piece) * a.count);
  const uint64_t size = a.payload_bytes[b], begin = a.offsets[b] + a.skip;
  // Payloads are padded to 16 bytes; one that is not, or leads out of memory, is no payload, and is not touched.
  if (size % 16 != 0 || size > static_cast<uint64_t>(a.most_pieces) * kPieceBytes || size > a.end ||
      begin > a.end - size) {
    if (a.expected != nullptr && piece == 0 && lane == 0) refuse(a, b);
    return;
  }
  const uint32_t pieces = size == 0 ? 1 : static_cast<uint32_t>((size + kPieceBytes - 1) / kPieceBytes);
  if (piece >= pieces) return;
  const uint64_t after = static_cast<uint64_t>(piece) * kPieceBytes, left = size - after;
  const uint8_t* const end = a.base + begin + left;
  uint32_t sum = crc_of_piece(end, left < kPieceBytes ? static_cast<uint32_t>(left) : kPieceBytes, lane);
  if (piece != 0) {
    sum = product(sum, piece < kPowers ? kCrc.piece[piece] : shift_past(static_cast<uint32_t>(after / 16), lane));
  }
  if (piece == pieces - 1) sum ^= product(0xffffffffu, shift_past(static_cast<uint32_t>(size / 16), lane));
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

KVZ_DEV void checksum(const CrcParams& a) {
  const uint32_t lane = lane_of(threadIdx.x), warps = blockDim.x / kWarp;
  const uint64_t work = static_cast<uint64_t>(a.count) * a.most_pieces, step = static_cast<uint64_t>(gridDim.x) * warps;
  for (uint64_t id = blockIdx.x * warps + warp_of(threadIdx.x); id < work; id += step) checksum_piece(a, id, lane);
}

}  // namespace gpu
}  // namespace kvz
