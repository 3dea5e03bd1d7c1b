// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// What cpu.cpp calls for one page. cpu_kernels.inl implements it, compiled once for each instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kvz.h"

namespace kvz {

// One page in memory. The values of a head are contiguous; addresses need no alignment.
struct Page {
  uint8_t* base;
  int64_t token_stride;  // bytes
  int64_t head_stride;   // bytes
  uint32_t tokens, heads, head_dim;
  uint8_t dtype;
  uint8_t group_tokens;
  const float* channel_bounds;  // heads * head_dim, or nullptr
};

inline uint32_t value_bytes(uint8_t dtype) { return dtype == 2 ? 4 : dtype == 3 ? 1 : 2; }

inline uint64_t page_values(const Page& page) {
  return static_cast<uint64_t>(page.tokens) * page.heads * page.head_dim;
}

inline uint64_t page_vectors(const Page& page) { return static_cast<uint64_t>(page.tokens) * page.heads; }

// Rows and columns of groups.
inline uint64_t group_rows(const Page& page) { return (page.tokens - 1u) / page.group_tokens + 1u; }
inline uint64_t group_columns(const Page& page) {
  const uint64_t channels = static_cast<uint64_t>(page.heads) * page.head_dim;
  const uint64_t a = 16 / page.group_tokens;
  return (channels - 1) / a + 1;
}

inline uint64_t page_groups(const Page& page) { return group_rows(page) * group_columns(page); }

// Bytes before the classes of a quantised segment: the scale bytes of its tokens and heads, padded.
inline uint64_t prefix_bytes(const Page& page, uint8_t coding) {
  return (coding & 0x30) == 0x10 ? (page_vectors(page) + 3) / 4 * 4 : 0;
}

// Per group; vectors are stored past the last group, hence the slack.
constexpr uint64_t kGroupSlack = 64;

// Arrays that a thread keeps from page to page; `reserve` returns false when the host has no memory.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  bool reserve(uint64_t groups, uint64_t vectors);
  bool reserve_codes(uint64_t tiles, uint64_t strips);

  int32_t* low = nullptr;        // least and largest value of a group, as keys that order like the values
  int32_t* high = nullptr;       // (16-bit dtypes use half of each array)
  uint32_t* least = nullptr;     // least magnitude of a group, lossless coding only
  uint16_t* classes = nullptr;   // of the quantised candidate, or of the segment being decoded
  uint16_t* lossless = nullptr;  // classes of the lossless candidate
  uint16_t* bases = nullptr;     // base nibbles of the lossless candidate
  float* bounds = nullptr;       // bound of each token and head; NaN where there is no usable one
  uint8_t* scales = nullptr;     // scale byte of each token and head, and room to pad
  uint32_t* codes = nullptr;     // codes of all tiles, for the encoder of Rice codes
  uint16_t* lengths = nullptr;   // words of the quotients of each strip

 private:
  uint64_t groups_ = 0, vectors_ = 0, tiles_ = 0, strips_ = 0;
};

struct Kernels {
  const char* name;

  // Encode a page into out[0 .. capacity), capacity >= kvz_max_segment_bytes. Fills all of `entry` but the offset.
  // Bytes between entry->size and capacity are unspecified.
  void (*encode)(const Page& page, uint8_t coding, uint8_t bound_kind, double bound, Scratch& scratch, uint8_t* out,
                 uint64_t capacity, kvz_entry* entry);

  // Decode a validated segment into a page.
  void (*decode)(const Page& page, const uint8_t* segment, const kvz_entry& entry, Scratch& scratch);

  // One page of kvz_cpu_compare.
  void (*compare)(const Page& a, const Page& b, double limit, double* max_error, uint64_t* violations);

  // Hint that a page comes next.
  void (*prefetch)(const Page& page);
};

// Bytes of the class array, with its padding, and of the base array of a lossless segment.
inline bool byte_classes(uint8_t dtype, uint8_t coding) { return coding == 4 || (dtype == 2 && coding != 5); }
inline bool rice_coding(uint8_t coding) { return coding == 6 || coding == 7; }
inline uint64_t class_bytes(uint8_t dtype, uint8_t coding, uint64_t groups) {
  const uint64_t bytes = byte_classes(dtype, coding) ? groups : (groups + 1) / 2;
  return (bytes + 3) / 4 * 4;
}

extern const Kernels kBaselineKernels;
#if defined(KVZIP_X86_64)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace kvz
