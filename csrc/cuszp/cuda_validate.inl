// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// What the CUDA codec does before it decodes: segments against the format, whatever their bytes are, and payloads
// against their checksums. Verdicts are those of kvz_cpu_validate.
#pragma once

#include "cuda_crc.inl"
#include "cuda_rice.inl"

namespace kvz {
namespace gpu {

// What a lane has seen of a segment that several look at.
struct Look {
  bool bad;        // it does not keep to the format
  uint64_t size;   // the rest of its size, after the words that the classes imply: in the first lane
  uint64_t words;  // of the lane's classes
};

// Copies of a segment's first bytes, all that its classes and bases may take, and of its last 16.
struct Copies {
  const uint8_t *head, *tail;
};

// Does segment s of block b keep to the format? One of `width` lanes, a power of two, at least 8. Reads nothing outside
// the payload, whatever its bytes are; or copies, where there are some.
KVZ_DEV Look look_at_segment(const DecodeParams& p, uint32_t page, uint32_t b, uint32_t s, uint32_t lane,
                             uint32_t width, Copies copies) {
  const Look wrong = {true, 0, 0};
  const kvz_entry entry = p.table[page];
  const kvz_segment segment = p.segments[s];
  const uint64_t payload_bytes = p.payload_bytes[b];
  uint64_t expected = 0;
  if (s > 0) {
    const kvz_entry before = p.table[page - 1];
    expected = static_cast<uint64_t>(before.offset) + (static_cast<uint64_t>(before.size) + 15) / 16;
  }
  const uint64_t start = static_cast<uint64_t>(entry.offset) * 16;
  const uint64_t end = start + (static_cast<uint64_t>(entry.size) + 15) / 16 * 16;
  if (entry.offset != expected || entry.size == 0 || end > payload_bytes) return wrong;
  if (s + 1 == p.num_segments && end != payload_bytes) return wrong;
  const Geometry g = geometry_of(segment, 0);
  const uint8_t* data = reinterpret_cast<const uint8_t*>(p.payloads[b]) + start;
  const uint8_t* const last = copies.tail != nullptr ? copies.tail : data + (end - start - 16);
  if (copies.head != nullptr) data = copies.head;
  const uint32_t dtype = segment.dtype, coding = entry.coding & KVZ_CODING_MASK;
  const uint32_t steps = entry.coding & KVZ_STEPS_MASK;
  uint64_t size = entry.size;

  Look found = {};
  bool& bad = found.bad;
  for (uint64_t i = (size + 15) % 16 + 1 + lane; i < 16; i += width) bad = bad || last[i] != 0;  // padding
  if (entry.coding == KVZ_RAW) {
    bad = bad || size != static_cast<uint64_t>(g.tokens) * g.channels * g.value_bytes;
  } else if (entry.coding == KVZ_CONSTANT) {
    if (size != KVZ_CONSTANT_BYTES) return wrong;
    if (lane >= g.value_bytes && lane < KVZ_CONSTANT_BYTES) bad = bad || data[lane] != 0;
  } else {
    if ((p.extended & KVZ_EXTENDED_RICE) &&
        (coding == KVZ_RICE || coding == KVZ_LOSSLESS_RICE)) {  // then a warp looks at one segment
      return rice_is_valid(segment, entry, g, data, size, lane) ? found : wrong;
    }
    if (entry.coding >= 0x40 || coding < KVZ_FIXED || coding > KVZ_LOSSLESS || dtype == KVZ_OPAQUE) return wrong;
    if (steps != KVZ_STEPS_PAGE && p.extended == 0) return wrong;
    if (steps == KVZ_STEPS_MASK || (coding == KVZ_LOSSLESS && steps != KVZ_STEPS_PAGE)) return wrong;
    if (steps == KVZ_STEPS_CHANNEL && segment.channel_bounds == 0) return wrong;
    if (coding != KVZ_LOSSLESS && !(entry.bound >= kLeastBound && entry.bound <= kLargestBound)) return wrong;
    const uint64_t scales = scale_bytes(steps, g, segment.heads);
    if (scales > size) return wrong;
    if (scales != 0) bad = bad || !scales_are_valid(data, g.tokens * segment.heads, scales, entry.bound, lane, width);
    data += scales;
    size -= scales;
    const bool bytes = byte_classes(dtype, coding), lossless = coding == KVZ_LOSSLESS;
    const uint32_t bits = dtype == KVZ_FP32 ? 32 : 16;
    const uint32_t mantissa = (dtype == KVZ_BF16   ? Traits<KVZ_BF16>::kFraction
                               : dtype == KVZ_FP16 ? Traits<KVZ_FP16>::kFraction
                                                   : Traits<KVZ_FP32>::kFraction) +
                              1;
    const uint32_t widest = lossless ? (dtype == KVZ_FP16 ? 5u : 8u) : dtype == KVZ_FP32 ? 24u : 14u;
    const uint64_t class_bytes = class_array_bytes(dtype, coding, g.groups);
    const uint64_t prefix = lossless ? 2 * class_bytes : class_bytes;
    if (prefix > size) return wrong;
    const uint32_t per_word = bytes ? 4 : 8, class_bits = 32 / per_word;
    const uint32_t* classes = reinterpret_cast<const uint32_t*>(data);
    uint64_t& words = found.words;
    const uint64_t whole = g.groups / per_word;  // words of classes without padding
    if (!bytes && !lossless) {
      // Every nibble is a class, 15 stands for 16 words: the usual case, 16 bytes at a time.
      const uint4* vectors = reinterpret_cast<const uint4*>(data);
      const uint64_t quads = scales % 16 == 0 ? whole / 4 : 0, done = quads * 4;
      for (uint64_t i = lane; i < quads; i += width) {
        const uint4 v = vectors[i];
        uint32_t sum = 0;
        const uint32_t part[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t x = part[j], pairs = (x & 0x0f0f0f0fu) + ((x >> 4) & 0x0f0f0f0fu);
          sum += (pairs * 0x01010101u) >> 24;
          sum += static_cast<uint32_t>(__popc(x & (x >> 1) & (x >> 2) & (x >> 3) & 0x11111111u));
        }
        words += sum;
      }
      for (uint64_t i = done + lane; i < whole; i += width) {
        const uint32_t x = classes[i];
        for (uint32_t j = 0; j < 8; ++j) {
          const uint32_t c = (x >> (4 * j)) & 15u;
          words += c == 15u ? 16u : c;
        }
      }
    } else {
      for (uint64_t i = lane; i < whole; i += width) {
        const uint32_t x = classes[i];
        for (uint32_t j = 0; j < per_word; ++j) {
          const uint32_t n = words_of_class((x >> (class_bits * j)) & ((1u << class_bits) - 1u), bytes, lossless, bits,
                                            widest, mantissa, coding == KVZ_OUTLIER);
          bad = bad || n == ~0u;
          words += n;
        }
      }
    }
    if (lane == 0 && g.groups % per_word != 0) {
      const uint32_t rest = g.groups % per_word, x = classes[whole];
      for (uint32_t j = 0; j < per_word; ++j) {
        const uint32_t c = (x >> (class_bits * j)) & ((1u << class_bits) - 1u);
        if (j >= rest) {
          bad = bad || c != 0;
        } else {
          const uint32_t n = words_of_class(c, bytes, lossless, bits, widest, mantissa, coding == KVZ_OUTLIER);
          bad = bad || n == ~0u;
          words += n;
        }
      }
      if (lossless) bad = bad || (classes[class_bytes / 4 + whole] >> (4 * rest)) != 0;
    }
    if (lane == 0) found.size = size - prefix;
  }
  return found;
}

// Pages of this many lanes each are validated by a warp at a time: few lanes for small pages.
KVZ_DEV void validate_pages(const DecodeParams& p, uint32_t first, uint32_t lane, Copies copies = {nullptr, nullptr}) {
  const uint32_t width = p.validate_lanes, part = lane & ~(width - 1), page = first + lane / width;
  const bool exists = page < p.num_blocks * p.num_segments;
  const uint32_t b = exists ? page / p.num_segments : 0, s = exists ? page - b * p.num_segments : 0;
  Look found = {};
  if (exists) found = look_at_segment(p, page, b, s, lane - part, width, copies);
  for (uint32_t d = width / 2; d > 0; d /= 2) {
    found.words += __shfl_xor_sync(kAllLanes, found.words, static_cast<int>(d));
  }
  const bool bad = found.bad || (lane == part && 2 * found.words != found.size);
  const uint32_t all = __ballot_sync(kAllLanes, bad) >> part;
  if (exists && lane == part && (width == kWarp ? all : all & ((1u << width) - 1u)) != 0) {
    p.bad[b] = 1;
    p.counters->any_bad = 1;
  }
}

// What comes before decoding: checksums, where they are asked for, a piece a warp, and validation.
KVZ_DEV void check(const DecodeParams& p, const CrcParams& c) {
  const uint32_t lane = lane_of(threadIdx.x), warps = blockDim.x / kWarp;
  const uint32_t pages = p.num_blocks * p.num_segments, together = kWarp / p.validate_lanes;
  const uint64_t pieces = c.expected == nullptr ? 0 : static_cast<uint64_t>(c.count) * c.most_pieces;
  const uint64_t work = pieces + (pages + together - 1) / together, step = static_cast<uint64_t>(gridDim.x) * warps;
  for (uint64_t id = blockIdx.x * warps + warp_of(threadIdx.x); id < work; id += step) {
    if (id < pieces) {
      checksum_piece(c, id, lane);
    } else {
      validate_pages(p, static_cast<uint32_t>(id - pieces) * together, lane);
    }
  }
}

}  // namespace gpu
}  // namespace kvz
