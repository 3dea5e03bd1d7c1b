// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// CRC32C of bytes that a warp carries anyway, row by row: 16 bytes a lane, moved past the next row by tables in shared
// memory. For few bytes; cuda_crc.inl has what is quicker for many, and the arithmetic.
#pragma once

#include "cuda_crc.inl"

namespace kvz {
namespace gpu {

constexpr uint32_t kRowBytes = 512;
constexpr uint32_t kRowUnits = kRowBytes / 16;

// As CrcConstants, for rows and four words a lane.
struct alignas(16) RowConstants {
  uint32_t row[4][256];   // row[k][b]: byte b at place k, shifted past one row
  uint32_t word[128];     // shifts word i of a row to the end of the row, and by the 32 bits of the CRC
  uint32_t past[3][256];  // x^(128 i), x^(128 * 256 i), x^(128 * 65536 i): past 16 i bytes, and so on
  uint32_t back[3][256];  // the same back: x^(-128 i), ...
};

constexpr RowConstants row_constants() {
  RowConstants c = {};
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
  // x has the order 2^31 - 1 (the polynomial is x + 1 times a primitive one), so x^(-128) is x^(2^31 - 129).
  uint32_t step = product(product(x32, x32), product(x32, x32)), step_back = one, square = x;
  const uint32_t exponent = 0x7fffffffu - 128u;
  for (int i = 0; i < 32; ++i) {
    if ((exponent >> i) & 1u) step_back = product(step_back, square);
    square = product(square, square);
  }
  for (int t = 0; t < 3; ++t) {
    c.past[t][0] = c.back[t][0] = one;
    for (int i = 1; i < 256; ++i) {
      c.past[t][i] = product(c.past[t][i - 1], step);
      c.back[t][i] = product(c.back[t][i - 1], step_back);
    }
    step = product(c.past[t][255], step);
    step_back = product(c.back[t][255], step_back);
  }
  return c;
}

KVZ_TABLE RowConstants kRows = row_constants();

// Out of line: few instructions to fetch for a kernel that runs for microseconds.
#if defined(KVZ_EMULATE)
inline uint32_t product_once(uint32_t a, uint32_t b) { return product(a, b); }
#else
static __host__ __device__ __noinline__ uint32_t product_once(uint32_t a, uint32_t b) { return product(a, b); }
#endif

// x^(128 units), or x^(-128 units).
KVZ_HOST_DEV inline uint32_t power_of_units(const uint32_t (&table)[3][256], uint32_t units) {
  uint32_t factor = table[0][units & 255];
  if (units > 255) factor = product_once(factor, table[1][(units >> 8) & 255]);
  if (units > 65535) factor = product_once(factor, table[2][(units >> 16) & 255]);
  return factor;
}
KVZ_DEV uint32_t shift_units(uint32_t units) { return power_of_units(kRows.past, units); }
KVZ_DEV uint32_t shift_back_units(uint32_t units) { return power_of_units(kRows.back, units); }

// The tables of a step from row to row, into shared memory; a barrier follows.
KVZ_DEV void load_row_tables(uint32_t (&row)[4][256]) {
  const uint4* const from = reinterpret_cast<const uint4*>(kRows.row);
  for (uint32_t i = threadIdx.x; i < sizeof row / 16; i += blockDim.x) reinterpret_cast<uint4*>(row)[i] = from[i];
}

// A lane's sum past one more row, whose bytes of the lane are `v`.
KVZ_DEV void add_row(uint4& sum, const uint4& v, const uint32_t (&row)[4][256]) {
#define KVZ_STEP(w) \
  sum.w = row[0][sum.w & 255] ^ row[1][(sum.w >> 8) & 255] ^ row[2][(sum.w >> 16) & 255] ^ row[3][sum.w >> 24] ^ v.w
  KVZ_STEP(x);
  KVZ_STEP(y);
  KVZ_STEP(z);
  KVZ_STEP(w);
#undef KVZ_STEP
}

// Contribution of the rows of a warp to a CRC that ends where the last of them does. The same in all lanes.
KVZ_DEV uint32_t sum_of_rows(const uint4& sum, uint32_t lane) {
  uint4 w = reinterpret_cast<const uint4*>(kRows.word)[lane];
  uint32_t crc = 0;
#pragma unroll 4
  for (int i = 31; i >= 0; --i) {
    crc ^= ((0u - ((sum.x >> i) & 1u)) & w.x) ^ ((0u - ((sum.y >> i) & 1u)) & w.y) ^
           ((0u - ((sum.z >> i) & 1u)) & w.z) ^ ((0u - ((sum.w >> i) & 1u)) & w.w);
    w.x = (w.x >> 1) ^ ((0u - (w.x & 1u)) & kPolynomial);
    w.y = (w.y >> 1) ^ ((0u - (w.y & 1u)) & kPolynomial);
    w.z = (w.z >> 1) ^ ((0u - (w.z & 1u)) & kPolynomial);
    w.w = (w.w >> 1) ^ ((0u - (w.w & 1u)) & kPolynomial);
  }
  return __reduce_xor_sync(kAllLanes, crc);
}

}  // namespace gpu
}  // namespace kvz
