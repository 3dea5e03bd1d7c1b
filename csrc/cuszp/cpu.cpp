// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The CPU codec behind kvz.h: arguments, validation of foreign bytes, the spread of a batch over threads. The pages
// themselves are coded by cpu_kernels.inl.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "cpu_kernels.h"
#include "format.h"
#include "kvz.h"
#include "quant.inl"
#include "thread_pool.h"

#if defined(KVZIP_X86_64)
#include <immintrin.h>
#endif

namespace kvz {

Scratch::~Scratch() {
  free(low);
  free(bounds);
  free(codes);
}

bool Scratch::reserve(uint64_t groups, uint64_t vectors) {
  if (groups > groups_ || low == nullptr) {
    groups += groups / 4;
    const uint64_t lanes = (groups + kGroupSlack + 15) / 16 * 16;
    free(low);
    groups_ = 0;
    // One allocation: low, high, least (4 bytes a group each), classes, lossless, bases (2 bytes each).
    low = static_cast<int32_t*>(calloc(lanes, 3 * sizeof(uint32_t) + 3 * sizeof(uint16_t)));
    if (low == nullptr) return false;
    high = low + lanes;
    least = reinterpret_cast<uint32_t*>(high + lanes);
    classes = reinterpret_cast<uint16_t*>(least + lanes);
    lossless = classes + lanes;
    bases = lossless + lanes;
    groups_ = groups;
  }
  if (vectors > vectors_) {
    vectors = (vectors + vectors / 4 + 15) / 16 * 16;
    free(bounds);
    vectors_ = 0;
    bounds = static_cast<float*>(calloc(vectors, sizeof(float) + 1));
    if (bounds == nullptr) return false;
    scales = reinterpret_cast<uint8_t*>(bounds + vectors);
    vectors_ = vectors;
  }
  return true;
}

bool Scratch::reserve_codes(uint64_t tiles, uint64_t strips) {
  if (tiles <= tiles_ && strips <= strips_) return true;
  free(codes);
  tiles_ = strips_ = 0;
  // 16 values of 32 groups a tile; vectors read and write whole tiles, which need 64-byte alignment.
  constexpr uint64_t kTileCodes = 16 * 32 * sizeof(uint32_t);
  codes = static_cast<uint32_t*>(aligned_alloc(64, tiles * kTileCodes + (strips * sizeof(uint16_t) + 63) / 64 * 64));
  if (codes == nullptr) return false;
  lengths = reinterpret_cast<uint16_t*>(codes + tiles * kTileCodes / sizeof(uint32_t));
  tiles_ = tiles;
  strips_ = strips;
  return true;
}

namespace {

// ---- instruction sets ---------------------------------------------------------------------------

#if defined(KVZIP_X86_64)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels* best_kernels() {
#if defined(KVZIP_X86_64)
  if (has_avx512()) return &kAvx512Kernels;
  if (has_avx2()) return &kAvx2Kernels;
#endif
  return &kBaselineKernels;
}

std::atomic<const Kernels*> g_kernels{nullptr};

const Kernels* kernels() {
  const Kernels* found = g_kernels.load(std::memory_order_relaxed);
  if (found == nullptr) {
    found = best_kernels();
    g_kernels.store(found, std::memory_order_relaxed);
  }
  return found;
}

// The format needs IEEE-754 arithmetic, rounding to nearest, with subnormal numbers. A host program may have switched
// them off (torch.set_flush_denormal does), and threads inherit that.
class FloatEnvironment {
 public:
#if defined(KVZIP_X86_64)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(static_cast<uint64_t>(0)));
  }
  ~FloatEnvironment() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FloatEnvironment() {}
  ~FloatEnvironment() {}
#endif
 public:
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;
};

thread_local Scratch t_scratch;

// ---- arguments ----------------------------------------------------------------------------------

uint64_t round_up(uint64_t bytes) { return (bytes + (KVZ_ALIGNMENT - 1)) & ~static_cast<uint64_t>(KVZ_ALIGNMENT - 1); }

// Sizes are u32 in the segment table.
constexpr uint64_t kMaxRawBytes = 0xfffffff0u;

bool valid_geometry(const kvz_segment& s) {
  if (s.tokens == 0 || s.heads == 0 || s.head_dim == 0 || s.dtype > KVZ_OPAQUE || s.kind > 2) return false;
  const uint8_t g = s.group_tokens;
  if (g != 16 && g != 8 && g != 4 && g != 2 && g != 1) return false;
  constexpr uint64_t limit = 1ull << 31;
  const uint64_t rows = static_cast<uint64_t>(s.tokens) * s.heads;
  if (rows >= limit || rows * s.head_dim >= limit) return false;
  return rows * s.head_dim * value_bytes(s.dtype) <= kMaxRawBytes;
}

bool valid_for_encode(const kvz_segment& s) {
  if (!valid_geometry(s) || s.base == 0) return false;
  if (s.coding > KVZ_LOSSLESS_RICE || s.coding == KVZ_CONSTANT || s.bound_kind > KVZ_BOUND_CHANNEL_TABLE) return false;
  if (s.coding == KVZ_RAW || s.coding == KVZ_LOSSLESS || s.coding == KVZ_LOSSLESS_RICE) return true;
  if (s.bound_kind == KVZ_BOUND_LOSSLESS) return true;
  if (s.bound_kind == KVZ_BOUND_CHANNEL_TABLE) return s.channel_bounds != 0;
  return s.bound > 0.0 && s.bound <= 1.7976931348623157e308;
}

Page page_of(const kvz_segment& s, int64_t block) {
  Page page;
  page.base = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(s.base)) + block * s.block_stride;
  page.token_stride = s.token_stride;
  page.head_stride = s.head_stride;
  page.tokens = s.tokens;
  page.heads = s.heads;
  page.head_dim = s.head_dim;
  page.dtype = s.dtype;
  page.group_tokens = s.group_tokens;
  page.channel_bounds = reinterpret_cast<const float*>(static_cast<uintptr_t>(s.channel_bounds));
  return page;
}

uint64_t raw_bytes_of(const kvz_segment& s) {
  return static_cast<uint64_t>(s.tokens) * s.heads * s.head_dim * value_bytes(s.dtype);
}

uint64_t slot_bytes(const kvz_segment& s) { return round_up(raw_bytes_of(s)); }

uint64_t groups_of(const kvz_segment& s) { return page_groups(page_of(s, 0)); }

uint64_t vectors_of(const kvz_segment& s) { return page_vectors(page_of(s, 0)); }

// ---- validation of foreign segments -------------------------------------------------------------

bool zeros(const uint8_t* from, uint64_t bytes) {
  uint32_t any = 0;
  for (uint64_t i = 0; i < bytes; ++i) any |= from[i];
  return any == 0;
}

struct ClassRules {
  uint32_t widest;     // largest width
  uint32_t raw_words;  // words of a raw group
  uint32_t extra;      // words of a group beside its width
};

// Words of a nibble-class segment; false when a class is out of range.
bool count_nibbles(const uint8_t* classes, uint64_t groups, const ClassRules& rules, uint64_t* words) {
  const uint8_t widest = static_cast<uint8_t>(rules.widest);
  uint64_t widths = 0, raws = 0;  // sum of the nibbles, raw groups among them
  uint32_t bad = 0;
  const uint64_t pairs = groups / 2;
  for (uint64_t i = 0; i < pairs;) {
    const uint64_t end = pairs - i < 1024 ? pairs : i + 1024;  // as many as 16-bit sums hold
    uint16_t width_sum = 0, raw_sum = 0;
    uint8_t any_bad = 0;
    for (; i < end; ++i) {
      const uint8_t low = classes[i] & 15, high = classes[i] >> 4;
      const uint8_t low_raw = low == KVZ_NIBBLE_RAW, high_raw = high == KVZ_NIBBLE_RAW;
      width_sum = static_cast<uint16_t>(width_sum + low + high);
      raw_sum = static_cast<uint16_t>(raw_sum + low_raw + high_raw);
      any_bad |= static_cast<uint8_t>(((low > widest) & (low_raw ^ 1)) | ((high > widest) & (high_raw ^ 1)));
    }
    widths += width_sum;
    raws += raw_sum;
    bad |= any_bad;
  }
  if (groups % 2 != 0) {
    const uint8_t last = classes[pairs] & 15;
    widths += last;
    raws += last == KVZ_NIBBLE_RAW;
    bad |= last > widest && last != KVZ_NIBBLE_RAW;
  }
  *words = widths - raws * KVZ_NIBBLE_RAW + raws * rules.raw_words + (groups - raws) * rules.extra;
  return bad == 0;
}

bool count_bytes(const uint8_t* classes, uint64_t groups, const ClassRules& rules, bool outlier, uint64_t* words) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < groups; ++i) {
    const uint32_t c = classes[i];
    if (c == KVZ_BYTE_RAW) {
      sum += rules.raw_words;
      continue;
    }
    const uint32_t width = c & 63u, apart = c >> 6;
    if (width > rules.widest || apart > (outlier ? 1u : 0u)) return false;
    sum += width + apart * (rules.raw_words / 16);
  }
  *words = sum;
  return true;
}

bool zero_class_padding(const uint8_t* classes, uint64_t groups, bool bytes) {
  const uint64_t used = bytes ? groups : (groups + 1) / 2;
  if (!bytes && groups % 2 != 0 && classes[groups / 2] >> 4 != 0) return false;
  return zeros(classes + used, (used + 3) / 4 * 4 - used);
}

// Scale bytes that give bounds in the format's range, zero padding behind them.
bool valid_scales(const uint8_t* scales, uint64_t vectors, float page_bound) {
  if (bits_of(page_bound) << (32 - KVZ_SCALE_SHIFT) != 0) return false;
  const uint32_t most = scale_of(kLeastBound, page_bound);
  uint32_t bad = 0;
  for (uint64_t i = 0; i < vectors; ++i) bad |= (scales[i] > most) & (scales[i] != KVZ_SCALE_ZERO);
  return bad == 0 && zeros(scales + vectors, (vectors + 3) / 4 * 4 - vectors);
}

uint32_t load32(const uint8_t* from) {
  uint32_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

uint32_t load16(const uint8_t* from) {
  uint16_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

// Is the stream a quotient for each of `values` codes, and zero bits to the end of its last word?
bool valid_stream(const uint8_t* stream, uint32_t words, uint64_t values) {
  uint64_t ones = 0;
  for (uint32_t i = 0; i < words; i += 4) {
    uint64_t part = 0;
    memcpy(&part, stream + 2 * i, words - i < 4 ? 2 * (words - i) : 8);
    part -= part >> 1 & 0x5555555555555555u;  // a sum in every 2, 4, 8 bits; the machine may lack an instruction for it
    part = (part & 0x3333333333333333u) + (part >> 2 & 0x3333333333333333u);
    part = (part + (part >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    ones += part * 0x0101010101010101u >> 56;
  }
  return ones == values && (words == 0 || load16(stream + 2 * (words - 1)) != 0);
}

// Does a segment of coding `rice` or `lossless_rice` keep to the format? Its scale bytes are checked already.
bool valid_rice(const kvz_segment& s, uint8_t coding, uint8_t param, const uint8_t* segment, uint64_t size) {
  const bool lossless = coding == KVZ_LOSSLESS_RICE;
  const Page page = page_of(s, 0);
  const uint64_t rows = group_rows(page), columns = group_columns(page), groups = rows * columns;
  const uint32_t bits = 8 * value_bytes(s.dtype);
  const uint32_t extra = !lossless ? 0 : s.dtype == KVZ_BF16 ? 8 : s.dtype == KVZ_FP16 ? 11 : 24;
  const uint32_t most = lossless ? uint32_t{KVZ_RICE_MOST_EXPONENT} : s.dtype == KVZ_FP32 ? 24 : 14;
  const uint64_t start = rice_head_bytes(lossless);
  if (size < start) return false;
  RicePage rice = rice_of_param(param);
  if (lossless) {
    if (segment[2] > 1 || segment[3] != 0) return false;
    rice = {segment[0], segment[1], param, segment[2] != 0};
  }
  if (rice.planes > (lossless ? KVZ_RICE_BASE_PLANES : KVZ_RICE_PLANES)) return false;
  if (rice.least + (lossless ? 0 : (1u << rice.planes) - 1u) > most) return false;
  const uint64_t plane = rice_plane_bytes(groups), planes = rice.total_planes(lossless);
  const uint64_t strips = rice_strips(rows, columns);
  const uint64_t head = start + planes * plane + 2 * strips;
  if (size < head || (size - head) % 2 != 0) return false;
  const uint8_t* first = segment + start;
  for (uint64_t p = 0; p < planes && groups % 32 != 0; ++p) {
    if (load32(first + (p + 1) * plane - 4) >> groups % 32 != 0) return false;
  }
  const uint8_t* raws = rice.any_raw ? first : nullptr;
  const uint8_t* numbers = first + (planes - rice.planes) * plane;
  const uint8_t* lengths = first + planes * plane;
  uint64_t words = 0;
  for (uint64_t w = 0; w < plane / 4; ++w) {
    const uint32_t inside = groups - 32 * w < 32 ? (1u << groups % 32) - 1u : ~0u;
    const uint32_t raw = raws != nullptr ? load32(raws + 4 * w) : 0, coded = inside & ~raw;
    words += static_cast<uint64_t>(bits) * static_cast<uint64_t>(__builtin_popcount(raw));
    words += static_cast<uint64_t>(extra + rice.least) * static_cast<uint64_t>(__builtin_popcount(coded));
    for (uint32_t p = 0; p < rice.planes && !lossless; ++p) {
      words += static_cast<uint64_t>(__builtin_popcount(load32(numbers + p * plane + 4 * w) & coded)) << p;
    }
  }
  uint64_t quotients = 0;
  for (uint64_t i = 0; i < strips; ++i) {
    const uint32_t length = load16(lengths + 2 * i);
    if (length > KVZ_STRIP_GROUPS * bits) return false;
    quotients += length;
  }
  if (size != head + 2 * (words + quotients)) return false;

  const uint8_t* stream = segment + head + 2 * words;
  const uint64_t per_row = (columns + KVZ_STRIP_GROUPS - 1) / KVZ_STRIP_GROUPS;
  for (uint64_t i = 0; i < strips; ++i) {
    const uint64_t g = i / per_row * columns + i % per_row * KVZ_STRIP_GROUPS;
    const uint64_t left = columns - i % per_row * KVZ_STRIP_GROUPS;
    const uint64_t count = left < KVZ_STRIP_GROUPS ? left : uint64_t{KVZ_STRIP_GROUPS};
    uint64_t coded = count;
    for (uint64_t k = 0; k < count && raws != nullptr; ++k) coded -= raws[(g + k) / 8] >> (g + k) % 8 & 1u;
    const uint32_t length = load16(lengths + 2 * i);
    if (!valid_stream(stream, length, KVZ_GROUP_VALUES * coded)) return false;
    stream += 2 * length;
  }
  return true;
}

// Does the segment keep to the format? `size` bytes at `segment` are readable.
bool valid_segment(const kvz_segment& s, const kvz_entry& entry, const uint8_t* segment) {
  const uint64_t raw_bytes = raw_bytes_of(s), groups = groups_of(s);
  uint64_t size = entry.size;
  const uint32_t item = value_bytes(s.dtype);
  if (entry.coding == KVZ_RAW) return size == raw_bytes;
  if (entry.coding == KVZ_CONSTANT) {
    return size == KVZ_CONSTANT_BYTES && zeros(segment + item, KVZ_CONSTANT_BYTES - item);
  }
  const uint8_t coding = entry.coding & KVZ_CODING_MASK, steps = entry.coding & KVZ_STEPS_MASK;
  if (s.dtype == KVZ_OPAQUE || entry.coding >= 0x40 || steps == KVZ_STEPS_MASK) return false;
  if (coding < KVZ_FIXED || coding > KVZ_LOSSLESS_RICE) return false;
  const bool lossless = coding == KVZ_LOSSLESS || coding == KVZ_LOSSLESS_RICE;
  if (lossless && steps != KVZ_STEPS_PAGE) return false;
  if (!lossless && !(entry.bound >= kLeastBound && entry.bound <= kLargestBound)) return false;
  if (steps == KVZ_STEPS_TOKEN) {
    const uint64_t prefix = prefix_bytes(page_of(s, 0), entry.coding);
    if (size < prefix || !valid_scales(segment, vectors_of(s), entry.bound)) return false;
    segment += prefix;
    size -= prefix;
  }

  if (rice_coding(coding)) return valid_rice(s, coding, entry.param, segment, size);

  const uint32_t bits = 8 * item;
  const uint32_t exponent_bits = s.dtype == KVZ_FP16 ? 5 : 8;
  ClassRules rules;
  rules.raw_words = bits;
  rules.widest = lossless ? exponent_bits : (s.dtype == KVZ_FP32 ? 24 : 14);
  rules.extra = lossless ? bits - exponent_bits : 0;
  const bool bytes = byte_classes(s.dtype, coding);
  const uint64_t array = class_bytes(s.dtype, coding, groups);
  const uint64_t head = lossless ? 2 * array : array;
  if (size < head || !zero_class_padding(segment, groups, bytes)) return false;
  if (lossless && !zero_class_padding(segment + array, groups, false)) return false;
  uint64_t words = 0;
  const bool in_range = bytes ? count_bytes(segment, groups, rules, coding == KVZ_OUTLIER, &words)
                              : count_nibbles(segment, groups, rules, &words);
  return in_range && size == head + 2 * words;
}

// Segments of one payload in order, without gaps, within its bytes; returns the first that is not, or num_segments.
uint32_t first_bad_segment(const kvz_segment* segments, uint32_t num_segments, const uint8_t* payload,
                           uint64_t payload_bytes, const kvz_entry* table) {
  uint64_t at = 0;
  for (uint32_t s = 0; s < num_segments; ++s) {
    const kvz_entry& entry = table[s];
    if (entry.size == 0 || static_cast<uint64_t>(entry.offset) * KVZ_ALIGNMENT != at) return s;
    const uint64_t end = at + round_up(entry.size);
    if (end > payload_bytes || (s + 1 == num_segments && end != payload_bytes)) return s;
    if (!valid_segment(segments[s], entry, payload + at)) return s;
    if (!zeros(payload + at + entry.size, end - at - entry.size)) return s;
    at = end;
  }
  return num_segments;
}

void lower(std::atomic<uint64_t>& lowest, uint64_t value) {
  uint64_t seen = lowest.load();
  while (value < seen && !lowest.compare_exchange_weak(seen, value)) {
  }
}

int32_t check_batch(const kvz_segment* segments, uint32_t num_segments, uint32_t num_blocks) {
  if (num_segments == 0 || (segments == nullptr)) return KVZ_INVALID_ARGUMENT;
  if (static_cast<uint64_t>(num_segments) * num_blocks > (1ull << 40)) return KVZ_INVALID_ARGUMENT;
  for (uint32_t s = 0; s < num_segments; ++s) {
    if (!valid_geometry(segments[s])) return KVZ_INVALID_ARGUMENT;
  }
  return KVZ_OK;
}

int32_t validate(const kvz_segment* segments, uint32_t num_segments, uint32_t num_blocks,
                 const uint8_t* const* payloads, const uint64_t* payload_bytes, const kvz_entry* table,
                 uint32_t threads, uint32_t* bad_block, uint32_t* bad_segment) {
  const int32_t status = check_batch(segments, num_segments, num_blocks);
  if (status != KVZ_OK || num_blocks == 0) return status;
  if (payloads == nullptr || payload_bytes == nullptr || table == nullptr) return KVZ_INVALID_ARGUMENT;
  for (uint32_t b = 0; b < num_blocks; ++b) {
    if (payloads[b] == nullptr) return KVZ_INVALID_ARGUMENT;
  }
  std::atomic<uint64_t> lowest{~0ull};
  // Validation reads a few per cent of the payload: not worth waking a thread for a handful of blocks.
  if (static_cast<uint64_t>(num_blocks) * num_segments < 256) threads = 1;
  parallel_for(num_blocks, threads, [&](uint64_t b) {
    const uint32_t bad =
        first_bad_segment(segments, num_segments, payloads[b], payload_bytes[b], table + b * num_segments);
    if (bad < num_segments) lower(lowest, b * num_segments + bad);
  });
  const uint64_t found = lowest.load();
  if (found == ~0ull) return KVZ_OK;
  if (bad_block != nullptr) *bad_block = static_cast<uint32_t>(found / num_segments);
  if (bad_segment != nullptr) *bad_segment = static_cast<uint32_t>(found % num_segments);
  return KVZ_CORRUPT;
}

// What the largest page of a batch needs of the scratch.
class Need {
 public:
  Need(const kvz_segment* segments, uint32_t num_segments) {
    for (uint32_t s = 0; s < num_segments; ++s) {
      const uint64_t groups = groups_of(segments[s]), vectors = vectors_of(segments[s]);
      groups_ = groups > groups_ ? groups : groups_;
      vectors_ = vectors > vectors_ ? vectors : vectors_;
      if (!rice_coding(segments[s].coding)) continue;
      const Page page = page_of(segments[s], 0);
      const uint64_t tiles = group_rows(page) * ((group_columns(page) + 31) / 32);
      const uint64_t strips = rice_strips(group_rows(page), group_columns(page));
      tiles_ = tiles > tiles_ ? tiles : tiles_;
      strips_ = strips > strips_ ? strips : strips_;
    }
  }
  bool reserve(Scratch& scratch) const {
    return scratch.reserve(groups_, vectors_) && (tiles_ == 0 || scratch.reserve_codes(tiles_, strips_));
  }

 private:
  uint64_t groups_ = 0, vectors_ = 0, tiles_ = 0, strips_ = 0;
};

}  // namespace
}  // namespace kvz

using namespace kvz;

extern "C" {

const char* kvz_cpu_isa(void) { return kernels()->name; }

int32_t kvz_cpu_set_isa(const char* name) {
  if (name == nullptr) return KVZ_INVALID_ARGUMENT;
  const Kernels* wanted = nullptr;
  if (strcmp(name, "auto") == 0) wanted = best_kernels();
  if (strcmp(name, "baseline") == 0) wanted = &kBaselineKernels;
#if defined(KVZIP_X86_64)
  if (strcmp(name, "avx2") == 0 && has_avx2()) wanted = &kAvx2Kernels;
  if (strcmp(name, "avx512") == 0 && has_avx512()) wanted = &kAvx512Kernels;
#endif
  if (wanted == nullptr) return KVZ_INVALID_ARGUMENT;
  g_kernels.store(wanted);
  return KVZ_OK;
}

uint64_t kvz_max_segment_bytes(const kvz_segment* segment) {
  return segment != nullptr && valid_geometry(*segment) ? slot_bytes(*segment) : 0;
}

int32_t kvz_cpu_encode(const kvz_segment* segments, uint32_t num_segments, const int64_t* block_ids,
                       uint32_t num_blocks, uint8_t* output, uint64_t output_stride, kvz_entry* table,
                       uint64_t* payload_bytes, uint32_t threads) {
  const int32_t status = check_batch(segments, num_segments, num_blocks);
  if (status != KVZ_OK) return status;
  uint64_t worst = 0;
  for (uint32_t s = 0; s < num_segments; ++s) {
    if (!valid_for_encode(segments[s])) return KVZ_INVALID_ARGUMENT;
    worst += slot_bytes(segments[s]);
  }
  if (num_blocks == 0) return KVZ_OK;
  if (block_ids == nullptr || output == nullptr || table == nullptr || payload_bytes == nullptr) {
    return KVZ_INVALID_ARGUMENT;
  }
  if (worst / KVZ_ALIGNMENT > 0xffffffffu) return KVZ_INVALID_ARGUMENT;
  if (output_stride < worst) return KVZ_OUT_OF_SPACE;

  const Kernels& codec = *kernels();
  const Need need(segments, num_segments);
  std::atomic<int32_t> failure{KVZ_OK};

  // Encode page s of block b at `out`; the room up to the page's worst case is its own.
  const auto encode = [&](uint64_t b, uint32_t s, uint8_t* out) {
    const kvz_segment& segment = segments[s];
    kvz_entry& entry = table[b * num_segments + s];
    entry.kind = segment.kind;
    codec.encode(page_of(segment, block_ids[b]), segment.coding, segment.bound_kind, segment.bound, t_scratch, out,
                 slot_bytes(segment), &entry);
    memset(out + entry.size, 0, round_up(entry.size) - entry.size);
  };
  const auto ready = [&] {
    if (need.reserve(t_scratch)) return true;
    failure.store(KVZ_OUT_OF_MEMORY);
    return false;
  };

  if (threads == 0) threads = num_blocks * static_cast<uint64_t>(num_segments) > 1 ? usable_cores() : 1;
  if (num_segments == 1 || num_blocks >= 2 * static_cast<uint64_t>(threads) || threads == 1) {
    // A block a time: each page goes straight behind the one before it.
    parallel_for(num_blocks, threads, [&](uint64_t b) {
      const FloatEnvironment environment;
      if (!ready()) return;
      uint64_t at = 0;
      for (uint32_t s = 0; s < num_segments; ++s) {
        if (s + 1 < num_segments) codec.prefetch(page_of(segments[s + 1], block_ids[b]));
        encode(b, s, output + b * output_stride + at);
        kvz_entry& entry = table[b * num_segments + s];
        entry.offset = static_cast<uint32_t>(at / KVZ_ALIGNMENT);
        at += round_up(entry.size);
      }
      payload_bytes[b] = at;
    });
    return failure.load();
  }

  // A page a time, each into its worst-case slot; then the pages of a block move together. The bytes are the same.
  const auto slot_offset = [&](uint32_t s) {
    uint64_t at = 0;
    for (uint32_t i = 0; i < s; ++i) at += slot_bytes(segments[i]);
    return at;
  };
  parallel_for(static_cast<uint64_t>(num_blocks) * num_segments, threads, [&](uint64_t item) {
    const FloatEnvironment environment;
    if (!ready()) return;
    const uint64_t b = item / num_segments;
    const uint32_t s = static_cast<uint32_t>(item % num_segments);
    encode(b, s, output + b * output_stride + slot_offset(s));
  });
  if (failure.load() != KVZ_OK) return failure.load();
  parallel_for(num_blocks, threads, [&](uint64_t b) {
    uint8_t* payload = output + b * output_stride;
    uint64_t at = 0, from = 0;
    for (uint32_t s = 0; s < num_segments; ++s) {
      kvz_entry& entry = table[b * num_segments + s];
      const uint64_t bytes = round_up(entry.size);
      if (at != from) memmove(payload + at, payload + from, bytes);
      entry.offset = static_cast<uint32_t>(at / KVZ_ALIGNMENT);
      at += bytes;
      from += slot_bytes(segments[s]);
    }
    payload_bytes[b] = at;
  });
  return KVZ_OK;
}

int32_t kvz_cpu_validate(const kvz_segment* segments, uint32_t num_segments, uint32_t num_blocks,
                         const uint8_t* const* payloads, const uint64_t* payload_bytes, const kvz_entry* table,
                         uint32_t threads, uint32_t* bad_block, uint32_t* bad_segment) {
  return validate(segments, num_segments, num_blocks, payloads, payload_bytes, table, threads, bad_block, bad_segment);
}

int32_t kvz_cpu_decode(const kvz_segment* segments, uint32_t num_segments, const int64_t* block_ids,
                       uint32_t num_blocks, const uint8_t* const* payloads, const uint64_t* payload_bytes,
                       const kvz_entry* table, uint32_t threads, uint32_t* bad_block, uint32_t* bad_segment) {
  const int32_t status =
      validate(segments, num_segments, num_blocks, payloads, payload_bytes, table, threads, bad_block, bad_segment);
  if (status != KVZ_OK || num_blocks == 0) return status;
  if (block_ids == nullptr) return KVZ_INVALID_ARGUMENT;
  for (uint32_t s = 0; s < num_segments; ++s) {
    if (segments[s].base == 0) return KVZ_INVALID_ARGUMENT;
    if (segments[s].channel_bounds != 0) continue;
    for (uint32_t b = 0; b < num_blocks; ++b) {
      if ((table[b * static_cast<uint64_t>(num_segments) + s].coding & KVZ_STEPS_MASK) == KVZ_STEPS_CHANNEL)
        return KVZ_NO_BOUNDS;
    }
  }
  const Kernels& codec = *kernels();
  const Need need(segments, num_segments);
  std::atomic<int32_t> failure{KVZ_OK};
  // Pages s to `end` of block b.
  const auto decode = [&](uint64_t b, uint32_t s, uint32_t end) {
    const FloatEnvironment environment;
    if (!need.reserve(t_scratch)) return failure.store(KVZ_OUT_OF_MEMORY);
    for (; s < end; ++s) {
      if (s + 1 < end) codec.prefetch(page_of(segments[s + 1], block_ids[b]));
      const kvz_entry& entry = table[b * num_segments + s];
      codec.decode(page_of(segments[s], block_ids[b]),
                   payloads[b] + static_cast<uint64_t>(entry.offset) * KVZ_ALIGNMENT, entry, t_scratch);
    }
  };
  if (threads == 0) threads = num_blocks * static_cast<uint64_t>(num_segments) > 1 ? usable_cores() : 1;
  if (num_blocks >= 2 * static_cast<uint64_t>(threads) || threads == 1) {
    parallel_for(num_blocks, threads, [&](uint64_t b) { decode(b, 0, num_segments); });
  } else {
    parallel_for(static_cast<uint64_t>(num_blocks) * num_segments, threads, [&](uint64_t item) {
      const uint32_t s = static_cast<uint32_t>(item % num_segments);
      decode(item / num_segments, s, s + 1);
    });
  }
  return failure.load();
}

int32_t kvz_cpu_compare(const kvz_segment* a, const int64_t* a_blocks, const kvz_segment* b, const int64_t* b_blocks,
                        uint32_t num_segments, uint32_t num_blocks, const double* limits, double* max_errors,
                        uint64_t* violations, uint32_t threads) {
  int32_t status = check_batch(a, num_segments, num_blocks);
  if (status == KVZ_OK) status = check_batch(b, num_segments, num_blocks);
  if (status != KVZ_OK || num_blocks == 0) return status;
  if (a_blocks == nullptr || b_blocks == nullptr || limits == nullptr || max_errors == nullptr ||
      violations == nullptr) {
    return KVZ_INVALID_ARGUMENT;
  }
  for (uint32_t s = 0; s < num_segments; ++s) {
    if (a[s].tokens != b[s].tokens || a[s].heads != b[s].heads || a[s].head_dim != b[s].head_dim ||
        a[s].dtype != b[s].dtype || a[s].base == 0 || b[s].base == 0) {
      return KVZ_INVALID_ARGUMENT;
    }
  }
  const Kernels& codec = *kernels();
  parallel_for(static_cast<uint64_t>(num_blocks) * num_segments, threads, [&](uint64_t item) {
    const FloatEnvironment environment;
    const uint64_t block = item / num_segments, s = item % num_segments;
    codec.compare(page_of(a[s], a_blocks[block]), page_of(b[s], b_blocks[block]), limits[item], max_errors + item,
                  violations + item);
  });
  return KVZ_OK;
}
}
