// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Encoding and decoding of one page (docs/reference/format.md). Included by one source file for each instruction set,
// which defines KVZ_ISA_NAME and KVZ_ISA_TABLE. Everything has internal linkage and nothing comes from the C++ library:
// a function that the linker could share between these files might run where its instructions do not exist.
//
// The unit of work is a tile: 16 values of 32 consecutive groups, as 16 rows of 32 lanes, so that a lane is a group.
// A page with G = 16 gives its rows as they lie in memory, token after token. Bit planes come from transposing bits
// within lanes, the order of the words from transposing words across them; both work on whole vectors and do not depend
// on the widths, which only move the output pointer.
#include <string.h>

#include "cpu_kernels.h"
#include "format.h"
#include "quant.inl"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian, and so is this code");

#define KVZ_INLINE static inline __attribute__((always_inline))
// Called once a tile or less: compiled once, not into every caller.
#define KVZ_NOINLINE static __attribute__((noinline))

namespace kvz {
namespace {

// ---- vectors ------------------------------------------------------------------------------------

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define KVZ_AVX512 1
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
#define KVZ_AVX2 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef uint16_t U16 __attribute__((vector_size(kVectorBytes)));
typedef int16_t I16 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t LongVector __attribute__((vector_size(kVectorBytes)));

constexpr int kValues = KVZ_GROUP_VALUES;
constexpr int kTile = 32;                 // groups of a tile
constexpr int kLanes = kVectorBytes / 2;  // 16-bit lanes of a vector
constexpr int kHalf = kLanes / 2;         // 32-bit lanes
constexpr int kParts = kTile / kLanes;    // vectors of a row of 16-bit lanes
constexpr int kParts32 = kTile / kHalf;   // and of 32-bit lanes

template <class V>
KVZ_INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
KVZ_INLINE void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

template <class V, class M>
KVZ_INLINE V select(M mask, V yes, V no) {
  return (yes & (V)mask) | (no & ~(V)mask);
}

KVZ_INLINE F32 to_f32(I32 v) { return __builtin_convertvector(v, F32); }

// Interleave the low or high four words of every 128-bit lane of a and b.
KVZ_INLINE U16 zip_low(U16 a, U16 b) {
#if defined(KVZ_AVX512)
  return (U16)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
#elif defined(KVZ_AVX2)
  return (U16)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U16)_mm_unpacklo_epi16((__m128i)a, (__m128i)b);
#elif defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shuffle(a, b, (U16){0, 8, 1, 9, 2, 10, 3, 11});
#endif
}

KVZ_INLINE U16 zip_high(U16 a, U16 b) {
#if defined(KVZ_AVX512)
  return (U16)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif defined(KVZ_AVX2)
  return (U16)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U16)_mm_unpackhi_epi16((__m128i)a, (__m128i)b);
#elif defined(__clang__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shuffle(a, b, (U16){4, 12, 5, 13, 6, 14, 7, 15});
#endif
}

// One vector from the 16 bytes at from[0] + offset, from[8] + offset, ...: one 128-bit lane each.
KVZ_INLINE U16 assemble(const uint8_t* const* from, int offset) {
#if defined(KVZ_AVX512)
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(from[0] + offset)));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(from[8] + offset)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(from[16] + offset)), 2);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(from[24] + offset)), 3);
  return (U16)v;
#elif defined(KVZ_AVX2)
  __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(from[0] + offset)));
  return (U16)_mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)(from[8] + offset)), 1);
#else
  return load<U16>(from[0] + offset);
#endif
}

// table[index] for 32-bit lanes with 0 <= index < 16.
KVZ_INLINE F32 lookup16(const float* table, U32 index) {
#if defined(KVZ_AVX512)
  return (F32)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif defined(KVZ_AVX2)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (F32)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)index, 28)));
#else
  uint32_t at[kHalf];
  float found[kHalf];
  store(at, index);
  for (int k = 0; k < kHalf; ++k) found[k] = table[at[k] & 15u];
  return load<F32>(found);
#endif
}

// Each 128-bit lane of a[0..7] is a column block of an 8 x 8 matrix of words; transpose all of them.
KVZ_INLINE void transpose_words(U16 (&a)[8]) {
  for (int round = 0; round < 3; ++round) {
    U16 t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = zip_low(a[i], a[i + 4]);
      t[2 * i + 1] = zip_high(a[i], a[i + 4]);
    }
    for (int i = 0; i < 8; ++i) a[i] = t[i];
  }
}

template <int SHIFT>
KVZ_INLINE void exchange_bits(U16& a, U16& b, uint16_t mask) {
  const U16 t = ((a >> SHIFT) ^ b) & mask;
  b ^= t;
  a ^= t << SHIFT;
}

// Byte by byte, bit j of a[i] <-> bit i of a[j].
KVZ_INLINE void transpose_bits(U16 (&a)[8]) {
  for (int i = 0; i < 4; ++i) exchange_bits<4>(a[i], a[i + 4], 0x0f0f);
  for (int i = 0; i < 8; i += 4) {
    exchange_bits<2>(a[i], a[i + 2], 0x3333);
    exchange_bits<2>(a[i + 1], a[i + 3], 0x3333);
  }
  for (int i = 0; i < 8; i += 2) exchange_bits<1>(a[i], a[i + 1], 0x5555);
}

// ---- dtypes as vectors --------------------------------------------------------------------------

// Two 16-bit values in a 32-bit lane: the lower one, the upper one, as float32.
template <int DTYPE>
KVZ_INLINE F32 float_even(U32 x) {
  if (DTYPE == KVZ_BF16) return (F32)(x << 16);
  const U32 magnitude = (U32)((F32)((x & 0x7fffu) << 13) * float_of(0x77800000u));
  return (F32)(magnitude | ((x & 0x8000u) << 16));
}

template <int DTYPE>
KVZ_INLINE F32 float_odd(U32 x) {
  if (DTYPE == KVZ_BF16) return (F32)(x & 0xffff0000u);
  const U32 magnitude = (U32)((F32)((x >> 3) & 0x0fffe000u) * float_of(0x77800000u));
  return (F32)(magnitude | (x & 0x80000000u));
}

// Traits<KVZ_FP16>::from_float, lane by lane: the value in the low 16 bits.
KVZ_INLINE U32 half_of(F32 x) {
  const U32 u = (U32)x;
  U32 magnitude = u & 0x7fffffffu;
  magnitude = select(magnitude > 0x477fe000u, magnitude - magnitude + 0x477fe000u, magnitude);
  const I32 is_normal = (I32)(magnitude >= 0x38800000u);
  const U32 normal = (magnitude >> 13) - (112u << 10);
  const F32 tiny = (F32)(magnitude & ~(U32)is_normal);
  const U32 subnormal = (U32) __builtin_convertvector(tiny * 16777216.0f, I32);
  return (select(is_normal, normal, subnormal) & 0x7fffu) | ((u >> 16) & 0x8000u);
}

// Even and odd results back into 16-bit lanes.
template <int DTYPE>
KVZ_INLINE U16 values_of(F32 even, F32 odd) {
  if (DTYPE == KVZ_BF16) return (U16)(((U32)even >> 16) | ((U32)odd & 0xffff0000u));
  return (U16)(half_of(even) | (half_of(odd) << 16));
}

// Keys order as the values do, over all bit patterns: negative NaNs, negative numbers, -0, +0, positive ones, NaNs.
template <int DTYPE>
struct KeyOf {
  using type = int16_t;
};
template <>
struct KeyOf<KVZ_FP32> {
  using type = int32_t;
};

template <int DTYPE>
using Key = typename KeyOf<DTYPE>::type;

template <int DTYPE>
constexpr uint32_t kMagnitude = (1u << (Traits<DTYPE>::kBits - 1)) - 1u;

template <int DTYPE>
KVZ_INLINE uint32_t pattern_of(Key<DTYPE> key) {
  const uint32_t all = 2u * kMagnitude<DTYPE> + 1u;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(key)) & all;
  return key < 0 ? bits ^ kMagnitude<DTYPE> : bits;
}

template <int DTYPE>
KVZ_INLINE Key<DTYPE> key_of(uint32_t pattern) {
  const uint32_t sign = pattern >> (Traits<DTYPE>::kBits - 1);
  return static_cast<Key<DTYPE>>(sign ? pattern ^ kMagnitude<DTYPE> : pattern);
}

template <int DTYPE>
KVZ_INLINE bool nonfinite_keys(Key<DTYPE> low, Key<DTYPE> high) {
  constexpr int32_t infinity = static_cast<int32_t>(Traits<DTYPE>::kInfinity);
  return high >= infinity || low <= -infinity - 1;
}

// ---- tiles --------------------------------------------------------------------------------------

struct Geometry {
  Page page;
  uint32_t g, a;           // tokens and channels of a group
  uint32_t channels;       // C
  uint32_t rows, columns;  // of groups
  uint32_t run;            // channels that follow each other in memory
  int64_t run_stride;      // bytes from one run to the next

  explicit Geometry(const Page& p) : page(p) {
    g = p.group_tokens;
    a = KVZ_GROUP_VALUES / g;
    channels = p.heads * p.head_dim;
    rows = (p.tokens - 1) / g + 1;
    columns = (channels - 1) / a + 1;
    const bool joined = p.heads == 1 || p.head_stride == static_cast<int64_t>(p.head_dim) * value_bytes(p.dtype);
    run = joined ? channels : p.head_dim;
    run_stride = p.head_stride;
  }

  uint8_t* address(uint32_t token, uint32_t channel, uint32_t bytes) const {
    return page.base + static_cast<int64_t>(token) * page.token_stride +
           static_cast<int64_t>(channel / run) * run_stride + static_cast<int64_t>(channel % run) * bytes;
  }
};

// Copy `count` channels of one token, from `channel` on, between the page and contiguous memory.
template <bool TO_PAGE>
KVZ_INLINE void copy_channels(const Geometry& geo, uint32_t token, uint32_t channel, uint32_t count, uint8_t* linear,
                              uint32_t bytes) {
  while (count > 0) {
    const uint32_t left = geo.run - channel % geo.run;
    const uint32_t n = count < left ? count : left;
    uint8_t* in_page = geo.address(token, channel, bytes);
    memcpy(TO_PAGE ? in_page : linear, TO_PAGE ? linear : in_page, static_cast<size_t>(n) * bytes);
    linear += static_cast<size_t>(n) * bytes;
    channel += n;
    count -= n;
  }
}

template <class Word>
struct Tile {
  uint8_t* base;                    // row i, of 32 values, is at base + i * stride: in the page, or in `buffer`
  int64_t stride;                   // bytes
  uint32_t count;                   // groups of the tile, 1 to 32
  bool whole;                       // no place of the first `count` lanes is outside of the page
  uint8_t valid[KVZ_GROUP_VALUES];  // otherwise: lanes of the row that lie inside of it
  alignas(64) Word buffer[KVZ_GROUP_VALUES][kTile];

  uint8_t* row(int i) const { return base + i * stride; }
  void use_buffer() {
    base = reinterpret_cast<uint8_t*>(buffer);
    stride = sizeof buffer[0];
  }
};

// Is the tile at (r, j) 16 whole tokens of 32 contiguous channels, so that its rows can stay in the page?
template <class Word>
KVZ_INLINE bool direct_rows(const Geometry& geo, uint32_t r, uint32_t j, Tile<Word>& tile) {
  tile.count = geo.columns - j < kTile ? geo.columns - j : kTile;
  if (geo.g != KVZ_GROUP_VALUES || tile.count != kTile || geo.page.tokens - r * kValues < kValues) return false;
  uint8_t* from = geo.page.base + static_cast<int64_t>(r) * kValues * geo.page.token_stride;
  if (geo.run == geo.channels) {
    from += static_cast<int64_t>(j) * static_cast<int64_t>(sizeof(Word));
  } else {
    const uint32_t run = j / geo.run, at = j - run * geo.run;
    if (at + kTile > geo.run) return false;
    from += static_cast<int64_t>(run) * geo.run_stride + static_cast<int64_t>(at) * static_cast<int64_t>(sizeof(Word));
  }
  tile.base = from;
  tile.stride = geo.page.token_stride;
  tile.whole = true;
  return true;
}

KVZ_INLINE uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Lanes of row a * G + t, for any token t inside of the page, whose channel is inside of it.
KVZ_INLINE uint32_t lanes_inside(uint32_t channels, uint32_t a, uint32_t step) {
  return channels > a ? (channels - a - 1) / step + 1 : 0;
}

// Read a tile. Places outside of the page repeat the first value of their group, lanes past `count` that of the first
// group, so that extremes over the tile need no mask.
template <class Word>
KVZ_NOINLINE void gather_tile(const Geometry& geo, uint32_t r, uint32_t j, Tile<Word>& tile) {
  tile.use_buffer();
  const uint32_t first_channel = j * geo.a;
  const uint32_t channels = least(tile.count * geo.a, geo.channels - first_channel);
  const uint32_t tokens = least(geo.g, geo.page.tokens - r * geo.g);
  tile.whole = tokens == geo.g && channels == tile.count * geo.a;
  Word linear[kTile * KVZ_GROUP_VALUES];
  for (uint32_t t = 0; t < geo.g; ++t) {
    if (t < tokens) {
      copy_channels<false>(geo, r * geo.g + t, first_channel, channels, reinterpret_cast<uint8_t*>(linear),
                           sizeof(Word));
      for (uint32_t c = channels; c < kTile * geo.a; ++c) linear[c] = linear[0];
    }
    for (uint32_t a = 0; a < geo.a; ++a) {
      const uint32_t i = a * geo.g + t;
      const uint32_t inside = t < tokens ? lanes_inside(channels, a, geo.a) : 0;
      Word* row = tile.buffer[i];
      tile.valid[i] = static_cast<uint8_t>(inside);
      if (inside > 0) {
        for (uint32_t k = 0; k < kTile; ++k) row[k] = linear[k * geo.a + a];
      }
      for (uint32_t k = inside; k < kTile; ++k) row[k] = tile.buffer[0][k];
    }
  }
}

template <class Word>
KVZ_INLINE void read_tile(const Geometry& geo, uint32_t r, uint32_t j, Tile<Word>& tile) {
  if (!direct_rows(geo, r, j, tile)) gather_tile(geo, r, j, tile);
}

// Prepare a tile for decoding: rows in the page, or in the buffer for write_tile to copy.
template <class Word>
KVZ_INLINE bool place_tile(const Geometry& geo, uint32_t r, uint32_t j, Tile<Word>& tile) {
  if (direct_rows(geo, r, j, tile)) return true;
  tile.use_buffer();
  return false;
}

template <class Word>
KVZ_NOINLINE void write_tile(const Geometry& geo, uint32_t r, uint32_t j, Tile<Word>& tile) {
  const uint32_t first_channel = j * geo.a;
  const uint32_t channels = least(tile.count * geo.a, geo.channels - first_channel);
  const uint32_t tokens = least(geo.g, geo.page.tokens - r * geo.g);
  Word linear[kTile * KVZ_GROUP_VALUES];
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint32_t a = 0; a < geo.a; ++a) {
      const Word* row = tile.buffer[a * geo.g + t];
      for (uint32_t k = 0; k < kTile; ++k) linear[k * geo.a + a] = row[k];
    }
    copy_channels<true>(geo, r * geo.g + t, first_channel, channels, reinterpret_cast<uint8_t*>(linear), sizeof(Word));
  }
}

// The encoder's first pass and the decoder's writes meet a page in slow memory, 16 rows at a time, which defeats the
// hardware's prefetching: ask for tiles some way ahead.
constexpr uint32_t kTilesAhead = 8;

template <class Word>
KVZ_INLINE void prefetch_tile(const Geometry& geo, uint32_t r, uint32_t j) {
  Tile<Word> tile;
  if (!direct_rows(geo, r, j, tile)) return;
  for (int i = 0; i < kValues; ++i) {
    for (size_t at = 0; at < kTile * sizeof(Word); at += 64) __builtin_prefetch(tile.row(i) + at);
  }
}

template <class Word>
KVZ_INLINE void prefetch_ahead(const Geometry& geo, uint32_t r, uint32_t j) {
  j += kTilesAhead * kTile;
  if (j >= geo.columns) {
    j -= (geo.columns + kTile - 1) / kTile * kTile;
    ++r;
  }
  if (r < geo.rows && j < geo.columns) prefetch_tile<Word>(geo, r, j);
}

// The first tiles of a page, which prefetch_ahead comes too late for.
template <class Word>
KVZ_INLINE void prefetch_first(const Geometry& geo) {
  for (uint32_t j = 0; j < geo.columns && j < kTilesAhead * kTile; j += kTile) prefetch_tile<Word>(geo, 0, j);
}

// ---- extremes -----------------------------------------------------------------------------------

struct Arrays16 {
  using U = U16;
  using I = I16;
};
struct Arrays32 {
  using U = U32;
  using I = I32;
};

// Vectors whose lanes are as wide as the dtype.
template <int DTYPE>
struct Lanes : Arrays16 {};
template <>
struct Lanes<KVZ_FP32> : Arrays32 {};

template <int DTYPE>
KVZ_INLINE void tile_extremes(const Tile<typename Traits<DTYPE>::word>& tile, Key<DTYPE>* low, Key<DTYPE>* high) {
  using U = typename Lanes<DTYPE>::U;
  using I = typename Lanes<DTYPE>::I;
  constexpr int parts = kTile * static_cast<int>(sizeof(typename Traits<DTYPE>::word)) / kVectorBytes;
  constexpr auto magnitude = static_cast<typename Traits<DTYPE>::word>(kMagnitude<DTYPE>);
  for (int p = 0; p < parts; ++p) {
    I least_key{}, greatest_key{};
    for (int i = 0; i < kValues; ++i) {
      const U v = load<U>(tile.row(i) + p * kVectorBytes);
      const I key = (I)(v ^ ((U)((I)v >> (Traits<DTYPE>::kBits - 1)) & magnitude));
      least_key = i == 0 ? key : (key < least_key ? key : least_key);
      greatest_key = i == 0 ? key : (key > greatest_key ? key : greatest_key);
    }
    store(reinterpret_cast<uint8_t*>(low) + p * kVectorBytes, least_key);
    store(reinterpret_cast<uint8_t*>(high) + p * kVectorBytes, greatest_key);
  }
}

// The least magnitude of each group.
template <int DTYPE>
KVZ_INLINE void tile_least(const Tile<typename Traits<DTYPE>::word>& tile, typename Traits<DTYPE>::word* least_bits) {
  using U = typename Lanes<DTYPE>::U;
  using I = typename Lanes<DTYPE>::I;
  constexpr int parts = kTile * static_cast<int>(sizeof(typename Traits<DTYPE>::word)) / kVectorBytes;
  constexpr auto magnitude = static_cast<typename Traits<DTYPE>::word>(kMagnitude<DTYPE>);
  for (int p = 0; p < parts; ++p) {
    I least_key{};
    for (int i = 0; i < kValues; ++i) {
      const I key = (I)(load<U>(tile.row(i) + p * kVectorBytes) & magnitude);
      least_key = i == 0 ? key : (key < least_key ? key : least_key);
    }
    store(reinterpret_cast<uint8_t*>(least_bits) + p * kVectorBytes, least_key);
  }
}

struct PageExtremes {
  bool equal;  // all bit patterns are the same
  bool any_finite;
  float low, high;    // of the finite values
  uint32_t exponent;  // largest exponent field of the finite values
};

template <int DTYPE>
KVZ_NOINLINE PageExtremes page_extremes(const Geometry& geo, Scratch& scratch) {
  using Word = typename Traits<DTYPE>::word;
  using K = Key<DTYPE>;
  K* low = reinterpret_cast<K*>(scratch.low);
  K* high = reinterpret_cast<K*>(scratch.high);
  Tile<Word> tile;
  uint64_t group = 0;
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile) {
      prefetch_ahead<Word>(geo, r, j);
      read_tile(geo, r, j, tile);
      tile_extremes<DTYPE>(tile, low + group, high + group);
      group += tile.count;
    }
  }
  K page_low = low[0], page_high = high[0];
  for (uint64_t i = 0; i < group; ++i) {
    page_low = low[i] < page_low ? low[i] : page_low;
    page_high = high[i] > page_high ? high[i] : page_high;
  }
  PageExtremes page;
  page.equal = page_low == page_high;
  page.any_finite = true;
  if (nonfinite_keys<DTYPE>(page_low, page_high)) {  // rare: look at every value
    page.any_finite = false;
    for (uint32_t r = 0; r < geo.rows; ++r) {
      for (uint32_t j = 0; j < geo.columns; j += kTile) {
        read_tile(geo, r, j, tile);
        for (int i = 0; i < kValues; ++i) {
          for (uint32_t k = 0; k < tile.count; ++k) {
            Word v;
            memcpy(&v, tile.row(i) + k * sizeof v, sizeof v);
            if (!is_finite<DTYPE>(v)) continue;
            const K key = key_of<DTYPE>(v);
            page_low = !page.any_finite || key < page_low ? key : page_low;
            page_high = !page.any_finite || key > page_high ? key : page_high;
            page.any_finite = true;
          }
        }
      }
    }
  }
  page.low = page.high = 0.0f;
  page.exponent = 0;
  if (page.any_finite) {
    const uint32_t a = pattern_of<DTYPE>(page_low), b = pattern_of<DTYPE>(page_high);
    page.low = Traits<DTYPE>::to_float(a);
    page.high = Traits<DTYPE>::to_float(b);
    const uint32_t x = exponent_of<DTYPE>(a), y = exponent_of<DTYPE>(b);
    page.exponent = x > y ? x : y;
  }
  return page;
}

// ---- codes --------------------------------------------------------------------------------------

// Codes of a tile as 16-bit halves, value by value: half[h][i][lane].
struct Codes {
  alignas(64) uint16_t half[2][KVZ_GROUP_VALUES][kTile];
};

// One factor a lane, in the order in which the arithmetic meets the values.
template <int DTYPE>
struct Factors {
  F32 even[kParts], odd[kParts];

  void set(const float* table, const uint16_t* index) {  // index < 16
    for (int p = 0; p < kParts; ++p) {
      const U32 at = load<U32>(index + p * kLanes);
      even[p] = lookup16(table, at & 15u);
      odd[p] = lookup16(table, (at >> 16) & 15u);
    }
  }
  void set(float value) {
    for (int p = 0; p < kParts; ++p) even[p] = odd[p] = F32{} + value;
  }
};

template <>
struct Factors<KVZ_FP32> {
  F32 lane[kParts32];

  void set(const float*, const uint16_t*) {}  // float32 has one step for every width
  void set(float value) {
    for (int p = 0; p < kParts32; ++p) lane[p] = F32{} + value;
  }
};

constexpr float kRounding = 12582912.0f;  // as in round_code

template <class U, class I, int BITS>
KVZ_INLINE U zigzag_lanes(U q) {
  return (q << 1) ^ (U)((I)q >> (BITS - 1));
}

KVZ_INLINE void split_row(const uint32_t* row, Codes& codes, int i) {
  for (int k = 0; k < kTile; ++k) codes.half[0][i][k] = static_cast<uint16_t>(row[k]);
  for (int k = 0; k < kTile; ++k) codes.half[1][i][k] = static_cast<uint16_t>(row[k] >> 16);
}

// Codes of codings `fixed` (delta = 0) and `plain` / `outlier` (delta = L). Lanes of raw groups hold garbage.
template <int DTYPE, bool DELTA>
KVZ_INLINE void quantise_tile(const Tile<typename Traits<DTYPE>::word>& tile, const Factors<DTYPE>& inverse,
                              uint32_t length, Codes& codes) {
  if constexpr (DTYPE == KVZ_FP32) {
    U32 before[kParts32] = {};
    for (int i = 0; i < kValues; ++i) {
      alignas(64) uint32_t row[kTile];
      for (int p = 0; p < kParts32; ++p) {
        const F32 t = load<F32>(tile.row(i) + p * kVectorBytes) * inverse.lane[p] + kRounding;
        U32 q = (U32)t - bits_of(kRounding);
        if (DELTA) {
          const U32 now = q;
          if (i % length != 0) q -= before[p];
          before[p] = now;
        }
        store(row + p * kHalf, zigzag_lanes<U32, I32, 32>(q));
      }
      split_row(row, codes, i);
    }
  } else {
    for (int p = 0; p < kParts; ++p) {
      U16 before{};
      for (int i = 0; i < kValues; ++i) {
        const U32 x = load<U32>(tile.row(i) + p * kVectorBytes);
        // The low 16 bits of 1.5 x 2^23 are 0, so those of the sum are q.
        const U32 even = (U32)(float_even<DTYPE>(x) * inverse.even[p] + kRounding);
        const U32 odd = (U32)(float_odd<DTYPE>(x) * inverse.odd[p] + kRounding);
        U16 q = (U16)((even & 0xffffu) | (odd << 16));
        if (DELTA) {
          const U16 now = q;
          if (i % length != 0) q -= before;
          before = now;
        }
        store(codes.half[0][i] + p * kLanes, zigzag_lanes<U16, I16, 16>(q));
      }
    }
  }
}

template <int DTYPE>
KVZ_INLINE void lossless_tile(const Tile<typename Traits<DTYPE>::word>& tile, const uint16_t* base, Codes& codes) {
  using Tr = Traits<DTYPE>;
  constexpr int s = Tr::kFraction + 1;
  if constexpr (DTYPE == KVZ_FP32) {
    for (int i = 0; i < kValues; ++i) {
      alignas(64) uint32_t row[kTile];
      memcpy(row, tile.row(i), sizeof row);
      for (int k = 0; k < kTile; ++k) row[k] = lossless_code<DTYPE>(row[k], base[k]);
      split_row(row, codes, i);
    }
  } else {
    for (int p = 0; p < kParts; ++p) {
      const U16 largest = load<U16>(base + p * kLanes);
      for (int i = 0; i < kValues; ++i) {
        const U16 v = load<U16>(tile.row(i) + p * kVectorBytes);
        const U16 exponent = (v >> Tr::kFraction) & static_cast<uint16_t>((1u << Tr::kExponentBits) - 1u);
        const U16 sign = (v >> 15) << Tr::kFraction;
        const U16 fraction = v & static_cast<uint16_t>((1u << Tr::kFraction) - 1u);
        store(codes.half[0][i] + p * kLanes, ((largest - exponent) << s) | sign | fraction);
      }
    }
  }
}

// Replace the codes of raw groups by bit patterns.
template <class Word>
KVZ_NOINLINE void patch_raw(const Tile<Word>& tile, const uint16_t* classes, uint16_t raw, Codes& codes) {
  for (uint32_t k = 0; k < tile.count; ++k) {
    if (classes[k] != raw) continue;
    for (int i = 0; i < kValues; ++i) {
      Word v;
      memcpy(&v, tile.row(i) + k * sizeof v, sizeof v);
      codes.half[0][i][k] = static_cast<uint16_t>(v);
      if (sizeof v == 4) codes.half[1][i][k] = static_cast<uint16_t>(static_cast<uint32_t>(v) >> 16);
    }
  }
}

// The codes of places outside of the page are 0.
template <class Word>
KVZ_NOINLINE void clear_outside(const Tile<Word>& tile, Codes& codes) {
  for (int i = 0; i < kValues; ++i) {
    for (int k = tile.valid[i]; k < kTile; ++k) {
      codes.half[0][i][k] = 0;
      codes.half[1][i][k] = 0;
    }
  }
}

// ---- classes ------------------------------------------------------------------------------------

// n of a group in 16-bit words, without the number that `outlier` keeps apart.
template <int DTYPE>
KVZ_INLINE uint32_t words_of(uint32_t group_class, uint32_t raw, uint32_t extra) {
  return group_class == raw ? Traits<DTYPE>::kBits : (group_class & 63u) + extra;
}

KVZ_INLINE uint32_t raw_class(bool bytes) { return bytes ? KVZ_BYTE_RAW : KVZ_NIBBLE_RAW; }

template <int DTYPE>
struct Steps {
  float step[16];  // S for width w; for float32 and delta codings all the same
  float inverse[16];

  Steps(int coding, float bound) {
    for (int w = 0; w < 16; ++w) {
      step[w] = step_of<DTYPE>(coding, w, bound);
      inverse[w] = inverse_step(step[w]);
    }
  }
};

#define KVZ_POWER_OF_TWO KVZ_PLAIN  // a coding whose step is a power of two

// Bit length of small non-negative integers (below 2^24, where float32 is exact).
KVZ_INLINE I32 bit_length_lanes(U32 z) {
  const I32 n = (I32)((U32)to_f32((I32)z) >> 23) - 126;
  return n > 0 ? n : I32{};
}

KVZ_INLINE U32 extreme_code_lanes(F32 low, F32 high, F32 inverse) {
  const U32 a = zigzag_lanes<U32, I32, 32>((U32)(low * inverse + kRounding) - bits_of(kRounding));
  const U32 b = zigzag_lanes<U32, I32, 32>((U32)(high * inverse + kRounding) - bits_of(kRounding));
  return a > b ? a : b;
}

// quantisable() and fixed_width() on 32-bit lanes, for the 16-bit dtypes: KVZ_NIBBLE_RAW or the width.
template <int DTYPE>
KVZ_INLINE U32 fixed_class_lanes(F32 low, F32 high, U32 nonfinite, float bound, float inverse, const float* finer) {
  using Tr = Traits<DTYPE>;
  const F32 largest = -low > high ? -low : high;
  const I32 fits = (largest + bound <= Tr::to_float(Tr::kMaxFinite)) &
                   (largest * inverse < static_cast<float>(Tr::kMaxCode) + 0.5f) & ~(I32)nonfinite;
  // Lanes that do not fit may hold anything: keep their table index in range.
  const U32 code = extreme_code_lanes(low, high, F32{} + inverse) & (U32)fits;
  const I32 wide = bit_length_lanes(code);
  const I32 narrow = wide > 0 ? wide - 1 : I32{};
  const U32 finer_code = extreme_code_lanes(low, high, lookup16(finer, (U32)narrow)) & (U32)fits;
  const I32 width = bit_length_lanes(finer_code) <= narrow ? narrow : wide;
  return select(fits, (U32)width, U32{} + static_cast<uint32_t>(KVZ_NIBBLE_RAW));
}

// Classes of coding `fixed` from the extremes of the groups.
template <int DTYPE>
KVZ_INLINE void fixed_classes(uint64_t groups, float bound, Scratch& scratch) {
  const Key<DTYPE>* low = reinterpret_cast<const Key<DTYPE>*>(scratch.low);
  const Key<DTYPE>* high = reinterpret_cast<const Key<DTYPE>*>(scratch.high);
  const float inverse = inverse_step(step_of<DTYPE>(KVZ_POWER_OF_TWO, 0, bound));
  const Steps<DTYPE> finer(KVZ_FIXED, bound);
  if constexpr (DTYPE == KVZ_FP32) {
    for (uint64_t i = 0; i < groups; ++i) {
      const float a = Traits<DTYPE>::to_float(pattern_of<DTYPE>(low[i]));
      const float b = Traits<DTYPE>::to_float(pattern_of<DTYPE>(high[i]));
      const bool fits = !nonfinite_keys<DTYPE>(low[i], high[i]) && quantisable<DTYPE>(a, b, bound, inverse);
      scratch.classes[i] = static_cast<uint16_t>(fits ? fixed_width<DTYPE>(a, b, inverse, finer.inverse)
                                                      : static_cast<int>(KVZ_BYTE_RAW));
    }
  } else {
    constexpr int16_t infinity = static_cast<int16_t>(Traits<DTYPE>::kInfinity);
    for (uint64_t i = 0; i < groups; i += kLanes) {
      const I16 a = load<I16>(low + i), b = load<I16>(high + i);
      const U32 nonfinite = (U32)((b >= infinity) | (a <= static_cast<int16_t>(-infinity - 1)));
      const U32 x = (U32)((U16)a ^ ((U16)(a >> 15) & 0x7fff)), y = (U32)((U16)b ^ ((U16)(b >> 15) & 0x7fff));
      const U32 even = fixed_class_lanes<DTYPE>(float_even<DTYPE>(x), float_even<DTYPE>(y),
                                                (U32)((I32)(nonfinite << 16) >> 16), bound, inverse, finer.inverse);
      const U32 odd = fixed_class_lanes<DTYPE>(float_odd<DTYPE>(x), float_odd<DTYPE>(y), (U32)((I32)nonfinite >> 16),
                                               bound, inverse, finer.inverse);
      store(scratch.classes + i, (U16)(even | odd << 16));
    }
  }
}

// Classes of `plain` and `outlier`, from the codes.
template <int DTYPE>
KVZ_INLINE void delta_classes(const Geometry& geo, uint8_t coding, float bound, Scratch& scratch) {
  using Tr = Traits<DTYPE>;
  const Key<DTYPE>* low = reinterpret_cast<const Key<DTYPE>*>(scratch.low);
  const Key<DTYPE>* high = reinterpret_cast<const Key<DTYPE>*>(scratch.high);
  const float inverse = inverse_step(step_of<DTYPE>(coding, 0, bound));
  const uint32_t raw = raw_class(byte_classes(DTYPE, coding));
  const uint32_t length = geo.g == 1 ? KVZ_GROUP_VALUES : geo.g;
  Factors<DTYPE> factors;
  factors.set(inverse);
  Tile<typename Tr::word> tile;
  Codes codes;
  memset(&codes, 0, sizeof codes);
  uint64_t group = 0;
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile) {
      read_tile(geo, r, j, tile);
      quantise_tile<DTYPE, true>(tile, factors, length, codes);
      if (!tile.whole) clear_outside(tile, codes);
      alignas(64) uint32_t rest[kTile] = {};  // all codes but the first, ORed: as wide as the widest
      for (int i = 1; i < kValues; ++i) {
        for (int k = 0; k < kTile; ++k) {
          rest[k] |= codes.half[0][i][k] | static_cast<uint32_t>(codes.half[1][i][k]) << 16;
        }
      }
      for (uint32_t k = 0; k < tile.count; ++k) {
        const Key<DTYPE> a = low[group + k], b = high[group + k];
        uint32_t found = raw;
        if (!nonfinite_keys<DTYPE>(a, b) && quantisable<DTYPE>(Tr::to_float(pattern_of<DTYPE>(a)),
                                                               Tr::to_float(pattern_of<DTYPE>(b)), bound, inverse)) {
          const uint32_t first = codes.half[0][0][k] | static_cast<uint32_t>(codes.half[1][0][k]) << 16;
          const int all_width = bit_length(rest[k] | first), rest_width = bit_length(rest[k]);
          const bool apart = coding == KVZ_OUTLIER && rest_width + Tr::kBits / 16 < all_width;
          const int width = apart ? rest_width : all_width;
          if (width <= Tr::kMaxWidth) found = static_cast<uint32_t>(width) | (apart ? KVZ_BYTE_FIRST_APART : 0u);
        }
        scratch.classes[group + k] = static_cast<uint16_t>(found);
      }
      group += tile.count;
    }
  }
}

template <int DTYPE>
KVZ_INLINE void lossless_classes(const Geometry& geo, uint32_t page_exponent, Scratch& scratch) {
  using Word = typename Traits<DTYPE>::word;
  const Key<DTYPE>* low = reinterpret_cast<const Key<DTYPE>*>(scratch.low);
  const Key<DTYPE>* high = reinterpret_cast<const Key<DTYPE>*>(scratch.high);
  Word* least_bits = reinterpret_cast<Word*>(scratch.least);
  Tile<Word> tile;
  uint64_t group = 0;
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile) {
      read_tile(geo, r, j, tile);
      tile_least<DTYPE>(tile, least_bits + group);
      group += tile.count;
    }
  }
  for (uint64_t i = 0; i < group; ++i) {
    const uint32_t x = exponent_of<DTYPE>(pattern_of<DTYPE>(low[i]));
    const uint32_t y = exponent_of<DTYPE>(pattern_of<DTYPE>(high[i]));
    const bool finite = !nonfinite_keys<DTYPE>(low[i], high[i]);
    const uint32_t base = finite ? least(page_exponent - (x > y ? x : y), 15) : 0;
    const uint32_t spread = page_exponent - base - exponent_of<DTYPE>(least_bits[i]);
    scratch.bases[i] = static_cast<uint16_t>(base);
    scratch.lossless[i] = static_cast<uint16_t>(finite ? bit_length(spread) : static_cast<int>(KVZ_NIBBLE_RAW));
  }
}

// Bytes of a segment from its classes.
template <int DTYPE>
KVZ_NOINLINE uint64_t segment_bytes(uint8_t coding, uint64_t groups, const uint16_t* classes) {
  const uint32_t raw = raw_class(byte_classes(DTYPE, coding));
  const uint32_t extra = coding == KVZ_LOSSLESS ? Traits<DTYPE>::kFraction + 1 : 0;
  uint64_t words = 0;
  for (uint64_t i = 0; i < groups;) {
    const uint64_t end = groups - i < 65536 ? groups : i + 65536;
    uint32_t sum = 0;
    for (; i < end; ++i) {
      sum += words_of<DTYPE>(classes[i], raw, extra);
      // Only byte classes have bit 6: the number that `outlier` keeps apart.
      if (coding == KVZ_OUTLIER) sum += (classes[i] >> 6) * (Traits<DTYPE>::kBits / 16);
    }
    words += sum;
  }
  const uint64_t classes_bytes = class_bytes(DTYPE, coding, groups);
  return classes_bytes * (coding == KVZ_LOSSLESS ? 2 : 1) + 2 * words;
}

KVZ_NOINLINE uint8_t* put_nibbles(const uint16_t* values, uint64_t groups, uint8_t* out) {
  const uint64_t pairs = groups / 2;
  for (uint64_t i = 0; i < pairs; ++i) out[i] = static_cast<uint8_t>(values[2 * i] | values[2 * i + 1] << 4);
  uint64_t at = pairs;
  if (groups % 2 != 0) out[at++] = static_cast<uint8_t>(values[groups - 1]);
  while (at % 4 != 0) out[at++] = 0;
  return out + at;
}

KVZ_NOINLINE uint8_t* put_bytes(const uint16_t* values, uint64_t groups, uint8_t* out) {
  uint64_t at = 0;
  for (; at < groups; ++at) out[at] = static_cast<uint8_t>(values[at]);
  while (at % 4 != 0) out[at++] = 0;
  return out + at;
}

KVZ_NOINLINE const uint8_t* take_nibbles(const uint8_t* in, uint64_t groups, uint16_t* values) {
  const uint64_t pairs = groups / 2;
  for (uint64_t i = 0; i < pairs; ++i) {
    values[2 * i] = in[i] & 15u;
    values[2 * i + 1] = in[i] >> 4;
  }
  if (groups % 2 != 0) values[groups - 1] = in[pairs] & 15u;
  return in + ((groups + 1) / 2 + 3) / 4 * 4;
}

KVZ_NOINLINE const uint8_t* take_bytes(const uint8_t* in, uint64_t groups, uint16_t* values) {
  for (uint64_t i = 0; i < groups; ++i) values[i] = in[i];
  return in + (groups + 3) / 4 * 4;
}

// ---- words --------------------------------------------------------------------------------------

// What the words of a tile depend on, lane by lane.
struct Widths {
  alignas(64) uint16_t words[kTile];  // n
  uint8_t apart[kTile];               // bytes of the number kept apart before them
  uint32_t widest;                    // largest n
  uint32_t bytes;                     // of all words of the tile
  bool any_raw, any_apart;
};

template <int DTYPE>
KVZ_INLINE void tile_widths(const uint16_t* classes, uint32_t count, uint8_t coding, Widths& widths) {
  const uint16_t raw = static_cast<uint16_t>(raw_class(byte_classes(DTYPE, coding)));
  const uint16_t extra = coding == KVZ_LOSSLESS ? Traits<DTYPE>::kFraction + 1 : 0;
  alignas(64) static constexpr uint16_t kNumbers[kTile] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                           11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                           22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  U16 raws{};
  for (int p = 0; p < kParts; ++p) {
    const U16 c = load<U16>(classes + p * kLanes);
    const U16 inside = (U16)(load<U16>(kNumbers + p * kLanes) < static_cast<uint16_t>(count));
    const U16 is_raw = (U16)(c == raw);
    raws |= is_raw & inside;
    store(widths.words + p * kLanes,
          select(is_raw, U16{} + static_cast<uint16_t>(Traits<DTYPE>::kBits), (c & 63) + extra) & inside);
  }
  uint32_t sum = 0;
  uint16_t widest = 0;
  for (int k = 0; k < kTile; ++k) sum += widths.words[k];
  for (int k = 0; k < kTile; ++k) widest = widths.words[k] > widest ? widths.words[k] : widest;
  uint64_t any_raw = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) any_raw |= ((LongVector)raws)[i];
  widths.any_apart = false;
  if (coding == KVZ_OUTLIER) {
    uint32_t any = 0;
    for (uint32_t k = 0; k < kTile; ++k) {
      const uint32_t apart = k < count ? (classes[k] >> 6) * (Traits<DTYPE>::kBits / 16) : 0;
      widths.apart[k] = static_cast<uint8_t>(2 * apart);
      sum += apart;
      any |= apart;
    }
    widths.any_apart = any != 0;
  }
  widths.widest = widest;
  widths.bytes = 2 * sum;
  widths.any_raw = any_raw != 0;
}

// Bytes past the end that put_words may write and take_words may read.
constexpr uint32_t kOverrun = 64;
// The most that the words of a tile take: 32 words and a number kept apart for each group.
constexpr uint32_t kTileBytes = kTile * (64 + 4);

template <int OCTETS, bool APART>
KVZ_NOINLINE void put_words(const Codes& codes, const Widths& widths, const int32_t* first, uint8_t* out) {
  for (int p = 0; p < kParts; ++p) {
    alignas(64) uint16_t staged[OCTETS][8][kLanes];
    for (int o = 0; o < OCTETS; ++o) {
      U16 a[8];
      for (int i = 0; i < 8; ++i) {
        const U16 x = load<U16>(codes.half[o / 2][i] + p * kLanes);
        const U16 y = load<U16>(codes.half[o / 2][i + 8] + p * kLanes);
        a[i] = o % 2 == 0 ? (x & 0x00ff) | (y << 8) : (x >> 8) | (y & 0xff00);
      }
      transpose_bits(a);
      transpose_words(a);
      for (int i = 0; i < 8; ++i) store(staged[o][i], a[i]);
    }
    for (int block = 0; block < kLanes / 8; ++block) {
      for (int i = 0; i < 8; ++i) {
        const int lane = p * kLanes + block * 8 + i;
        if (APART) {
          memcpy(out, first + lane, 4);
          out += widths.apart[lane];
        }
        for (int o = 0; o < OCTETS; ++o) memcpy(out + 16 * o, &staged[o][i][block * 8], 16);
        out += 2 * widths.words[lane];
      }
    }
  }
}

template <bool APART>
KVZ_NOINLINE void put_tile(const Codes& codes, const Widths& widths, const int32_t* first, uint8_t* out) {
  switch ((widths.widest + 7) / 8) {
    case 0:
    case 1:
      return put_words<1, APART>(codes, widths, first, out);
    case 2:
      return put_words<2, APART>(codes, widths, first, out);
    case 3:
      return put_words<3, APART>(codes, widths, first, out);
    default:
      return put_words<4, APART>(codes, widths, first, out);
  }
}

template <int OCTETS>
KVZ_NOINLINE void take_words(const uint8_t* const* from, const Widths& widths, Codes& codes) {
  for (int p = 0; p < kParts; ++p) {
    const U16 n = load<U16>(widths.words + p * kLanes);
    for (int h = 0; h < (OCTETS + 1) / 2; ++h) {
      U16 low[8], high[8];  // planes 0 to 7 and 8 to 15 of this half
      for (int o = 0; o < 2; ++o) {
        U16(&a)[8] = o == 0 ? low : high;
        const int octet = 2 * h + o;
        if (octet >= OCTETS) break;
        for (int i = 0; i < 8; ++i) a[i] = assemble(from + p * kLanes + i, 16 * octet);
        transpose_words(a);
        for (int b = 0; b < 8; ++b) a[b] &= (U16)(n > static_cast<uint16_t>(8 * octet + b));
        transpose_bits(a);
      }
      const bool both = 2 * h + 1 < OCTETS;
      for (int i = 0; i < 8; ++i) {
        store(codes.half[h][i] + p * kLanes, both ? (low[i] & 0x00ff) | (high[i] << 8) : low[i] & 0x00ff);
        store(codes.half[h][i + 8] + p * kLanes, both ? (low[i] >> 8) | (high[i] & 0xff00) : low[i] >> 8);
      }
    }
  }
}

// Fetch the codes of a tile whose words begin at `in`; at least kOverrun bytes past them are readable.
template <int DTYPE, bool APART>
KVZ_NOINLINE void take_tile(const uint8_t* in, const Widths& widths, int32_t* first, Codes& codes) {
  const uint8_t* from[kTile];
  for (int k = 0; k < kTile; ++k) {
    if (APART) {
      if (DTYPE == KVZ_FP32) {
        memcpy(first + k, in, 4);
      } else {
        int16_t q;
        memcpy(&q, in, 2);
        first[k] = q;
      }
      in += widths.apart[k];
    }
    from[k] = in;
    in += 2 * widths.words[k];
  }
  switch ((widths.widest + 7) / 8) {
    case 0:
    case 1:
      take_words<1>(from, widths, codes);
      break;
    case 2:
      take_words<2>(from, widths, codes);
      break;
    case 3:
      take_words<3>(from, widths, codes);
      break;
    default:
      take_words<4>(from, widths, codes);
      break;
  }
  if (DTYPE == KVZ_FP32 && widths.widest <= 16) memset(codes.half[1], 0, sizeof codes.half[1]);
}

#include "cpu_steps.inl"

// The values of raw groups are their codes.
template <class Word>
KVZ_NOINLINE void restore_raw(const Codes& codes, const uint16_t* classes, uint16_t raw, Tile<Word>& tile) {
  for (uint32_t k = 0; k < tile.count; ++k) {
    if (classes[k] != raw) continue;
    for (int i = 0; i < kValues; ++i) {
      uint32_t v = codes.half[0][i][k];
      if (sizeof(Word) == 4) v |= static_cast<uint32_t>(codes.half[1][i][k]) << 16;
      const Word word = static_cast<Word>(v);
      memcpy(tile.row(i) + k * sizeof word, &word, sizeof word);
    }
  }
}

// ---- encode -------------------------------------------------------------------------------------

template <int DTYPE, int CODING>
static void encode_words(const Geometry& geo, const uint16_t* classes, const uint16_t* bases, uint32_t page_exponent,
                         const BoundSource& source, uint8_t* out, const uint8_t* end) {
  using Word = typename Traits<DTYPE>::word;
  constexpr bool apart = CODING == KVZ_OUTLIER;
  constexpr bool fine = CODING == KVZ_FIXED && DTYPE != KVZ_FP32;
  const uint16_t raw = static_cast<uint16_t>(raw_class(byte_classes(DTYPE, CODING)));
  const uint32_t length = geo.g == 1 ? KVZ_GROUP_VALUES : geo.g;
  const Steps<DTYPE> steps(CODING, source.page > 0.0f ? source.page : 1.0f);
  Factors<DTYPE> factors;
  factors.set(steps.inverse[0]);
  Tile<Word> tile;
  Codes codes;
  memset(&codes, 0, sizeof codes);
  Widths widths;
  alignas(64) int32_t first[kTile];
  alignas(64) uint16_t largest[kTile];
  uint8_t spill[kTileBytes + kOverrun];
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile) {
      read_tile(geo, r, j, tile);
      tile_widths<DTYPE>(classes, tile.count, CODING, widths);
      if (CODING == KVZ_LOSSLESS) {
        for (int k = 0; k < kTile; ++k) {
          largest[k] = static_cast<uint16_t>(page_exponent > bases[k] ? page_exponent - bases[k] : 0);
        }
        lossless_tile<DTYPE>(tile, largest, codes);
      } else if (source.steps != KVZ_STEPS_PAGE) {
        value_codes<DTYPE, CODING>(geo, source, r, j, tile, classes, length, codes);
      } else {
        if (fine) factors.set(steps.inverse, classes);
        quantise_tile<DTYPE, CODING != KVZ_FIXED>(tile, factors, length, codes);
      }
      if (apart && widths.any_apart) {
        for (int k = 0; k < kTile; ++k) {
          if (widths.apart[k] == 0) continue;
          first[k] = unzigzag(codes.half[0][0][k] | static_cast<uint32_t>(codes.half[1][0][k]) << 16);
          codes.half[0][0][k] = codes.half[1][0][k] = 0;
        }
      }
      if (widths.any_raw) patch_raw(tile, classes, raw, codes);
      if (!tile.whole) clear_outside(tile, codes);
      const bool room = static_cast<uint64_t>(end - out) >= kTileBytes + kOverrun;
      uint8_t* to = room ? out : spill;
      if (apart && widths.any_apart) {
        put_tile<true>(codes, widths, first, to);
      } else {
        put_tile<false>(codes, widths, first, to);
      }
      if (!room) memcpy(out, spill, widths.bytes);
      out += widths.bytes;
      classes += tile.count;
      bases += tile.count;
    }
  }
}

static void copy_page(const Geometry& geo, uint8_t* linear, bool to_page) {
  const uint32_t bytes = value_bytes(geo.page.dtype);
  const size_t row = static_cast<size_t>(geo.channels) * bytes;
  for (uint32_t t = 0; t < geo.page.tokens; ++t, linear += row) {
    if (to_page) {
      copy_channels<true>(geo, t, 0, geo.channels, linear, bytes);
    } else {
      copy_channels<false>(geo, t, 0, geo.channels, linear, bytes);
    }
  }
}

#include "cpu_rice.inl"

static void write_constant(const Geometry& geo, const uint8_t* value, uint8_t* out, kvz_entry* entry) {
  memset(out, 0, KVZ_CONSTANT_BYTES);
  memcpy(out, value, value_bytes(geo.page.dtype));
  entry->coding = KVZ_CONSTANT;
  entry->size = KVZ_CONSTANT_BYTES;
}

static void write_raw(const Geometry& geo, uint8_t reason, uint8_t* out, kvz_entry* entry) {
  copy_page(geo, out, false);
  entry->coding = KVZ_RAW;
  entry->size = static_cast<uint32_t>(page_values(geo.page) * value_bytes(geo.page.dtype));
  entry->reason = reason;
}

// Write the smaller of the Rice-coded candidates; false if neither is smaller than raw values.
template <int DTYPE>
static bool encode_rice(const Geometry& geo, const BoundSource& source, bool lossy, uint64_t raw_bytes,
                        Scratch& scratch, uint8_t* out, uint64_t capacity, kvz_entry* entry) {
  const uint64_t groups = static_cast<uint64_t>(geo.rows) * geo.columns;
  const uint64_t prefix = prefix_bytes(geo.page, source.steps);
  uint64_t quantised_bytes = ~0ull, lossless_bytes = ~0ull;
  RicePage quantised_page, lossless_page;
  const auto quantise = [&] {
    rice_codes<DTYPE>(geo, source, scratch);
    quantised_page = rice_page(groups, Traits<DTYPE>::kMaxWidth, scratch.classes);
    quantised_bytes = prefix + rice_size<DTYPE, KVZ_RICE>(geo, scratch, quantised_page);
  };
  if (source.page > 0.0f) quantise();
  if (source.page == 0.0f || quantised_bytes * 8 > raw_bytes * 5) {
    lossless_page = lossless_rice_codes<DTYPE>(geo, scratch);
    lossless_bytes = rice_size<DTYPE, KVZ_LOSSLESS_RICE>(geo, scratch, lossless_page);
    if (quantised_bytes <= lossless_bytes) quantise();  // its codes gave way to the other ones
  }
  const bool quantised = quantised_bytes <= lossless_bytes;
  const uint64_t size = quantised ? quantised_bytes : lossless_bytes;
  if (size >= raw_bytes) return false;
  const uint8_t* end = out + capacity;
  entry->size = static_cast<uint32_t>(size);
  if (quantised) {
    entry->coding = static_cast<uint8_t>(KVZ_RICE | source.steps);
    entry->bound = source.page;
    entry->param = static_cast<uint8_t>(rice_param(quantised_page));
    write_rice<DTYPE, KVZ_RICE>(geo, quantised_page, scratch, put_scales(geo, prefix, scratch, out), end);
  } else {
    entry->coding = KVZ_LOSSLESS_RICE;
    entry->param = static_cast<uint8_t>(lossless_page.base);
    entry->reason = !lossy ? KVZ_AS_ASKED : source.page == 0.0f ? KVZ_BOUND_TOO_FINE : KVZ_LOSSLESS_SMALLER;
    write_rice<DTYPE, KVZ_LOSSLESS_RICE>(geo, lossless_page, scratch, out, end);
  }
  return true;
}

template <int DTYPE>
static void encode_typed(const Geometry& geo, uint8_t coding, uint8_t bound_kind, double bound, Scratch& scratch,
                         uint8_t* out, uint64_t capacity, kvz_entry* entry) {
  const uint64_t raw_bytes = page_values(geo.page) * value_bytes(DTYPE);
  const uint64_t groups = static_cast<uint64_t>(geo.rows) * geo.columns;
  const PageExtremes page = page_extremes<DTYPE>(geo, scratch);
  if (page.equal) return write_constant(geo, geo.page.base, out, entry);

  const bool lossy = coding != KVZ_LOSSLESS && coding != KVZ_LOSSLESS_RICE && bound_kind != KVZ_BOUND_LOSSLESS;
  BoundSource source = {KVZ_STEPS_PAGE, 0.0f, scratch.bounds, geo.page.channel_bounds, kNoBound};
  if (lossy && page.any_finite) {
    if (bound_kind == KVZ_BOUND_TOKEN_RMS) {
      source.steps = KVZ_STEPS_TOKEN;
      source.page = token_bounds<DTYPE>(geo, bound, page.exponent, scratch);
    } else if (bound_kind == KVZ_BOUND_CHANNEL_TABLE) {
      source.steps = KVZ_STEPS_CHANNEL;
      source.page = largest_channel_bound(geo);
    } else {
      source.page = page_bound(bound_kind, bound, page.low, page.high);
    }
  }
  if (rice_coding(coding)) {
    if (encode_rice<DTYPE>(geo, source, lossy, raw_bytes, scratch, out, capacity, entry)) return;
    return write_raw(geo, KVZ_INCOMPRESSIBLE, out, entry);
  }
  uint64_t quantised_bytes = ~0ull, lossless_bytes = ~0ull;
  const uint64_t prefix = prefix_bytes(geo.page, source.steps);
  if (source.page > 0.0f) {
    if (source.steps == KVZ_STEPS_PAGE && coding == KVZ_FIXED) {
      fixed_classes<DTYPE>(groups, source.page, scratch);
    } else if (source.steps == KVZ_STEPS_PAGE) {
      delta_classes<DTYPE>(geo, coding, source.page, scratch);
    } else if (coding == KVZ_FIXED) {
      value_classes<DTYPE, KVZ_FIXED>(geo, source, scratch.classes);
    } else if (coding == KVZ_PLAIN) {
      value_classes<DTYPE, KVZ_PLAIN>(geo, source, scratch.classes);
    } else {
      value_classes<DTYPE, KVZ_OUTLIER>(geo, source, scratch.classes);
    }
    quantised_bytes = prefix + segment_bytes<DTYPE>(coding, groups, scratch.classes);
  }
  if (source.page == 0.0f || quantised_bytes * 8 > raw_bytes * 5) {
    lossless_classes<DTYPE>(geo, page.exponent, scratch);
    lossless_bytes = segment_bytes<DTYPE>(KVZ_LOSSLESS, groups, scratch.lossless);
  }
  const bool quantised = quantised_bytes <= lossless_bytes;
  const uint64_t size = quantised ? quantised_bytes : lossless_bytes;
  if (size >= raw_bytes) return write_raw(geo, KVZ_INCOMPRESSIBLE, out, entry);

  entry->size = static_cast<uint32_t>(size);
  const uint8_t* end = out + capacity;
  if (!quantised) {
    entry->coding = KVZ_LOSSLESS;
    entry->param = static_cast<uint8_t>(page.exponent);
    entry->reason = !lossy ? KVZ_AS_ASKED : source.page == 0.0f ? KVZ_BOUND_TOO_FINE : KVZ_LOSSLESS_SMALLER;
    out = put_nibbles(scratch.lossless, groups, out);
    out = put_nibbles(scratch.bases, groups, out);
    source.page = 0.0f;
    return encode_words<DTYPE, KVZ_LOSSLESS>(geo, scratch.lossless, scratch.bases, page.exponent, source, out, end);
  }
  entry->coding = static_cast<uint8_t>(coding | source.steps);
  entry->bound = source.page;
  out = put_scales(geo, prefix, scratch, out);
  const uint16_t* classes = scratch.classes;
  out = byte_classes(DTYPE, coding) ? put_bytes(classes, groups, out) : put_nibbles(classes, groups, out);
  switch (coding) {
    case KVZ_FIXED:
      return encode_words<DTYPE, KVZ_FIXED>(geo, classes, classes, 0, source, out, end);
    case KVZ_PLAIN:
      return encode_words<DTYPE, KVZ_PLAIN>(geo, classes, classes, 0, source, out, end);
    default:
      return encode_words<DTYPE, KVZ_OUTLIER>(geo, classes, classes, 0, source, out, end);
  }
}

static bool all_bytes_equal(const Geometry& geo) {
  const uint8_t value = *geo.page.base;
  for (uint32_t t = 0; t < geo.page.tokens; ++t) {
    for (uint32_t c = 0; c < geo.channels; c += geo.run) {
      const uint8_t* run = geo.address(t, c, 1);
      const uint32_t n = least(geo.run, geo.channels - c);
      if (run[0] != value || memcmp(run, run + 1, n - 1) != 0) return false;
    }
  }
  return true;
}

static void encode_page(const Page& page, uint8_t coding, uint8_t bound_kind, double bound, Scratch& scratch,
                        uint8_t* out, uint64_t capacity, kvz_entry* entry) {
  const Geometry geo(page);
  entry->size = 0;
  entry->bound = 0.0f;
  entry->param = 0;
  entry->reason = KVZ_AS_ASKED;
  if (coding == KVZ_RAW) return write_raw(geo, KVZ_AS_ASKED, out, entry);
  switch (page.dtype) {
    case KVZ_BF16:
      return encode_typed<KVZ_BF16>(geo, coding, bound_kind, bound, scratch, out, capacity, entry);
    case KVZ_FP16:
      return encode_typed<KVZ_FP16>(geo, coding, bound_kind, bound, scratch, out, capacity, entry);
    case KVZ_FP32:
      return encode_typed<KVZ_FP32>(geo, coding, bound_kind, bound, scratch, out, capacity, entry);
    default:
      if (all_bytes_equal(geo)) return write_constant(geo, page.base, out, entry);
      return write_raw(geo, KVZ_OPAQUE_DTYPE, out, entry);
  }
}

// ---- decode -------------------------------------------------------------------------------------

// Values of a tile from its codes; lanes of raw groups are mended afterwards.
template <int DTYPE, bool DELTA>
KVZ_INLINE void reconstruct_tile(const Codes& codes, const Factors<DTYPE>& step, uint32_t length, const Widths& widths,
                                 const int32_t* first, bool apart, Tile<typename Traits<DTYPE>::word>& tile) {
  if constexpr (DTYPE == KVZ_FP32) {
    U32 before[kParts32] = {};
    for (int i = 0; i < kValues; ++i) {
      alignas(64) uint32_t row[kTile];
      for (int k = 0; k < kTile; ++k) {
        row[k] = codes.half[0][i][k] | static_cast<uint32_t>(codes.half[1][i][k]) << 16;
      }
      for (int k = 0; k < kTile; ++k) row[k] = static_cast<uint32_t>(unzigzag(row[k]));
      if (DELTA && i == 0 && apart) {
        for (int k = 0; k < kTile; ++k) {
          if (widths.apart[k] != 0) row[k] = static_cast<uint32_t>(first[k]);
        }
      }
      for (int p = 0; p < kParts32; ++p) {
        U32 q = load<U32>(row + p * kHalf);
        if (DELTA) {
          if (i % length != 0) q += before[p];
          before[p] = q;
        }
        store(tile.row(i) + p * kVectorBytes, to_f32((I32)q) * step.lane[p]);
      }
    }
  } else {
    for (int p = 0; p < kParts; ++p) {
      U32 even_before{}, odd_before{};
      for (int i = 0; i < kValues; ++i) {
        const U16 z = load<U16>(codes.half[0][i] + p * kLanes);
        const U32 q = (U32)((z >> 1) ^ (U16{} - (z & 1)));
        U32 even = (U32)((I32)(q << 16) >> 16), odd = (U32)((I32)q >> 16);
        if (DELTA) {
          if (i == 0 && apart) {
            alignas(64) uint32_t lanes[2][kHalf];
            store(lanes[0], even);
            store(lanes[1], odd);
            for (int k = 0; k < kLanes; ++k) {
              if (widths.apart[p * kLanes + k] != 0) lanes[k % 2][k / 2] = static_cast<uint32_t>(first[p * kLanes + k]);
            }
            even = load<U32>(lanes[0]);
            odd = load<U32>(lanes[1]);
          }
          if (i % length != 0) {
            even += even_before;
            odd += odd_before;
          }
          even_before = even;
          odd_before = odd;
        }
        store(tile.row(i) + p * kVectorBytes,
              values_of<DTYPE>(to_f32((I32)even) * step.even[p], to_f32((I32)odd) * step.odd[p]));
      }
    }
  }
}

template <int DTYPE>
KVZ_INLINE void restore_tile(const Codes& codes, const uint16_t* base, Tile<typename Traits<DTYPE>::word>& tile) {
  using Tr = Traits<DTYPE>;
  constexpr int s = Tr::kFraction + 1;
  if constexpr (DTYPE == KVZ_FP32) {
    for (int i = 0; i < kValues; ++i) {
      alignas(64) uint32_t row[kTile];
      for (int k = 0; k < kTile; ++k) {
        const uint32_t code = codes.half[0][i][k] | static_cast<uint32_t>(codes.half[1][i][k]) << 16;
        row[k] = lossless_value<DTYPE>(code, base[k]);
      }
      memcpy(tile.row(i), row, sizeof row);
    }
  } else {
    for (int p = 0; p < kParts; ++p) {
      const U16 largest = load<U16>(base + p * kLanes);
      for (int i = 0; i < kValues; ++i) {
        const U16 code = load<U16>(codes.half[0][i] + p * kLanes);
        const U16 exponent = (largest - (code >> s)) & static_cast<uint16_t>((1u << Tr::kExponentBits) - 1u);
        const U16 sign = ((code >> Tr::kFraction) & 1) << 15;
        const U16 fraction = code & static_cast<uint16_t>((1u << Tr::kFraction) - 1u);
        store(tile.row(i) + p * kVectorBytes, sign | (exponent << Tr::kFraction) | fraction);
      }
    }
  }
}

template <int DTYPE, int CODING>
static void decode_words(const Geometry& geo, const uint8_t* in, const kvz_entry& entry, Scratch& scratch) {
  using Word = typename Traits<DTYPE>::word;
  constexpr bool apart = CODING == KVZ_OUTLIER;
  constexpr bool fine = CODING == KVZ_FIXED && DTYPE != KVZ_FP32;
  const uint16_t raw = static_cast<uint16_t>(raw_class(byte_classes(DTYPE, CODING)));
  const uint64_t groups = static_cast<uint64_t>(geo.rows) * geo.columns;
  const uint8_t* end = in + entry.size;
  const BoundSource source =
      bound_source(geo, entry.coding & KVZ_STEPS_MASK, CODING == KVZ_LOSSLESS ? 1.0f : entry.bound, in, scratch);
  in += prefix_bytes(geo.page, entry.coding);
  const uint16_t* classes = scratch.classes;
  const uint16_t* bases = scratch.bases;
  in =
      byte_classes(DTYPE, CODING) ? take_bytes(in, groups, scratch.classes) : take_nibbles(in, groups, scratch.classes);
  if (CODING == KVZ_LOSSLESS) in = take_nibbles(in, groups, scratch.bases);
  const uint32_t length = geo.g == 1 ? KVZ_GROUP_VALUES : geo.g;
  const Steps<DTYPE> steps(CODING, source.page);
  Factors<DTYPE> factors;
  factors.set(steps.step[0]);
  Tile<Word> tile;
  Codes codes;
  memset(&codes, 0, sizeof codes);
  Widths widths;
  alignas(64) int32_t first[kTile];
  alignas(64) uint16_t largest[kTile];
  uint8_t spill[kTileBytes + kOverrun];
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile) {
      prefetch_ahead<Word>(geo, r, j);
      const bool direct = place_tile(geo, r, j, tile);
      tile_widths<DTYPE>(classes, tile.count, CODING, widths);
      const uint8_t* from = in;
      if (static_cast<uint64_t>(end - in) < static_cast<uint64_t>(widths.bytes) + kOverrun) {
        memcpy(spill, in, widths.bytes);
        memset(spill + widths.bytes, 0, kOverrun);
        from = spill;
      }
      if (apart && widths.any_apart) {
        take_tile<DTYPE, true>(from, widths, first, codes);
      } else {
        take_tile<DTYPE, false>(from, widths, first, codes);
      }
      if (CODING == KVZ_LOSSLESS) {
        for (int k = 0; k < kTile; ++k) {
          largest[k] = static_cast<uint16_t>(entry.param > bases[k] ? entry.param - bases[k] : 0);
        }
        restore_tile<DTYPE>(codes, largest, tile);
      } else if (source.steps != KVZ_STEPS_PAGE) {
        value_tile<DTYPE, CODING>(geo, source, r, j, classes, codes, length, widths, first, apart && widths.any_apart,
                                  tile);
      } else {
        if (fine) factors.set(steps.step, classes);
        reconstruct_tile<DTYPE, CODING != KVZ_FIXED>(codes, factors, length, widths, first, apart && widths.any_apart,
                                                     tile);
      }
      if (widths.any_raw) restore_raw(codes, classes, raw, tile);
      if (!direct) write_tile(geo, r, j, tile);
      in += widths.bytes;
      classes += tile.count;
      bases += tile.count;
    }
  }
}

template <int DTYPE>
static void decode_typed(const Geometry& geo, const uint8_t* segment, const kvz_entry& entry, Scratch& scratch) {
  switch (entry.coding & KVZ_CODING_MASK) {
    case KVZ_FIXED:
      return decode_words<DTYPE, KVZ_FIXED>(geo, segment, entry, scratch);
    case KVZ_PLAIN:
      return decode_words<DTYPE, KVZ_PLAIN>(geo, segment, entry, scratch);
    case KVZ_OUTLIER:
      return decode_words<DTYPE, KVZ_OUTLIER>(geo, segment, entry, scratch);
    case KVZ_RICE:
      return read_rice<DTYPE, KVZ_RICE>(geo, segment, entry, scratch);
    case KVZ_LOSSLESS_RICE:
      return read_rice<DTYPE, KVZ_LOSSLESS_RICE>(geo, segment, entry, scratch);
    default:
      return decode_words<DTYPE, KVZ_LOSSLESS>(geo, segment, entry, scratch);
  }
}

template <class Word>
static void fill_page(const Geometry& geo, const uint8_t* value) {
  Word v;
  memcpy(&v, value, sizeof v);
  for (uint32_t t = 0; t < geo.page.tokens; ++t) {
    for (uint32_t c = 0; c < geo.channels; c += geo.run) {
      uint8_t* run = geo.address(t, c, sizeof v);
      const uint32_t n = least(geo.run, geo.channels - c);
      for (uint32_t k = 0; k < n; ++k) memcpy(run + k * sizeof v, &v, sizeof v);
    }
  }
}

static void decode_page(const Page& page, const uint8_t* segment, const kvz_entry& entry, Scratch& scratch) {
  const Geometry geo(page);
  if (entry.coding == KVZ_RAW) return copy_page(geo, const_cast<uint8_t*>(segment), true);
  if (entry.coding == KVZ_CONSTANT) {
    switch (value_bytes(page.dtype)) {
      case 1:
        return fill_page<uint8_t>(geo, segment);
      case 2:
        return fill_page<uint16_t>(geo, segment);
      default:
        return fill_page<uint32_t>(geo, segment);
    }
  }
  switch (page.dtype) {
    case KVZ_BF16:
      return decode_typed<KVZ_BF16>(geo, segment, entry, scratch);
    case KVZ_FP16:
      return decode_typed<KVZ_FP16>(geo, segment, entry, scratch);
    default:
      return decode_typed<KVZ_FP32>(geo, segment, entry, scratch);
  }
}

// ---- compare ------------------------------------------------------------------------------------

constexpr int kCompared = 256;  // values at a time

struct Difference {
  double largest = 0.0;
  uint64_t violations = 0;
};

// Values among which there are NaNs or infinities.
template <class Word, class IsFinite, class ToFloat>
KVZ_INLINE void compare_carefully(const Word* x, const Word* y, uint32_t n, double limit, IsFinite finite,
                                  ToFloat value, Difference& found) {
  for (uint32_t k = 0; k < n; ++k) {
    if (x[k] == y[k]) continue;
    const bool both = finite(x[k]) && finite(y[k]);
    const double error =
        both ? __builtin_fabs(static_cast<double>(value(x[k])) - static_cast<double>(value(y[k]))) : __builtin_inf();
    if (finite(x[k]) && error > found.largest) found.largest = error;
    found.violations += !both || error > limit;
  }
}

template <int DTYPE>
KVZ_INLINE void compare_values(const typename Traits<DTYPE>::word* x, const typename Traits<DTYPE>::word* y, uint32_t n,
                               double limit, Difference& found) {
  double errors[kCompared];
  for (uint32_t k = 0; k < n; ++k) {
    errors[k] = __builtin_fabs(static_cast<double>(Traits<DTYPE>::to_float(x[k])) -
                               static_cast<double>(Traits<DTYPE>::to_float(y[k])));
  }
  int64_t largest = 0;  // the bits of non-negative numbers order like them; NaN is above all
  uint64_t violations = 0;
  uint32_t nonfinite = 0;
  for (uint32_t k = 0; k < n; ++k) nonfinite |= !is_finite<DTYPE>(x[k]) || !is_finite<DTYPE>(y[k]);
  if (nonfinite != 0) {
    const auto finite = [](uint32_t v) { return is_finite<DTYPE>(v); };
    const auto value = [](uint32_t v) { return Traits<DTYPE>::to_float(v); };
    return compare_carefully(x, y, n, limit, finite, value, found);
  }
  for (uint32_t k = 0; k < n; ++k) {
    int64_t bits;
    memcpy(&bits, errors + k, sizeof bits);
    largest = bits > largest ? bits : largest;
    violations += errors[k] > limit ? 1 : 0;
  }
  double error;
  memcpy(&error, &largest, sizeof error);
  found.largest = error > found.largest ? error : found.largest;
  found.violations += violations;
}

// Bytes count as unsigned integers.
KVZ_INLINE void compare_bytes(const uint8_t* x, const uint8_t* y, uint32_t n, double limit, Difference& found) {
  for (uint32_t k = 0; k < n; ++k) {
    const int difference = static_cast<int>(x[k]) - static_cast<int>(y[k]);
    const double error = difference < 0 ? -difference : difference;
    found.largest = error > found.largest ? error : found.largest;
    found.violations += error > limit;
  }
}

template <int DTYPE, class Word>
static void compare_typed(const Geometry& a, const Geometry& b, double limit, Difference& found) {
  alignas(64) Word x[kCompared], y[kCompared];
  for (uint32_t t = 0; t < a.page.tokens; ++t) {
    for (uint32_t c = 0; c < a.channels; c += kCompared) {
      const uint32_t n = least(kCompared, a.channels - c);
      copy_channels<false>(a, t, c, n, reinterpret_cast<uint8_t*>(x), sizeof(Word));
      copy_channels<false>(b, t, c, n, reinterpret_cast<uint8_t*>(y), sizeof(Word));
      if constexpr (DTYPE == KVZ_OPAQUE) {
        compare_bytes(x, y, n, limit, found);
      } else {
        compare_values<DTYPE>(x, y, n, limit, found);
      }
    }
  }
}

static void compare_page(const Page& a, const Page& b, double limit, double* max_error, uint64_t* violations) {
  const Geometry x(a), y(b);
  Difference found;
  switch (a.dtype) {
    case KVZ_BF16:
      compare_typed<KVZ_BF16, uint16_t>(x, y, limit, found);
      break;
    case KVZ_FP16:
      compare_typed<KVZ_FP16, uint16_t>(x, y, limit, found);
      break;
    case KVZ_FP32:
      compare_typed<KVZ_FP32, uint32_t>(x, y, limit, found);
      break;
    default:
      compare_typed<KVZ_OPAQUE, uint8_t>(x, y, limit, found);
      break;
  }
  *max_error = found.largest;
  *violations = found.violations;
}

static void prefetch_page(const Page& page) {
  const Geometry geo(page);
  if (page.dtype == KVZ_FP32) {
    prefetch_first<uint32_t>(geo);
  } else if (page.dtype != KVZ_OPAQUE) {
    prefetch_first<uint16_t>(geo);
  }
}

}  // namespace

const Kernels KVZ_ISA_TABLE = {KVZ_ISA_NAME, encode_page, decode_page, compare_page, prefetch_page};

}  // namespace kvz
