// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Fuzz target of the CPU decoder, behind the C ABI, for a build with sanitizers (CMake: KVZIP_FUZZ and KVZIP_SANITIZE).
// With Clang it is a libFuzzer program: `kvzip_fuzz -max_total_time=60`. Other compilers get a driver that damages
// valid payloads at random and knows `-runs=N`, `-seed=N` and `-first=N`, the number of the first case.
//
// A case is one block: shapes of 1 to 3 pages, their table entries as they stand in a record, and the payload. Shapes
// (and whether there is a table of channel bounds) are what a reader has checked; entries and payload are hostile. What
// must hold: no access outside of the payload and the pages (the sanitizers watch both), validate and decode agree, a
// refused payload changes nothing, an accepted one writes every value, the same every time and with every instruction
// set.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "format.h"
#include "kvz.h"

namespace {

constexpr size_t kShapeBytes = 5;
constexpr uint8_t kGroups[] = {16, 8, 4, 2, 1};
constexpr uint32_t kItemBytes[] = {2, 2, 4, 1};

struct Case {
  std::vector<kvz_segment> segments;
  std::vector<std::vector<float>> channel_bounds;  // of each page; empty where there is none
  std::vector<kvz_entry> table;
  std::vector<uint8_t> payload;  // exactly as long as it is: a read past its end is seen

  const uint8_t* Payload() const {  // never NULL, which the decoder refuses as an argument
    static const uint8_t kNothing = 0;
    return payload.empty() ? &kNothing : payload.data();
  }
};

size_t PageBytes(const kvz_segment& s) {
  return static_cast<size_t>(s.tokens) * s.heads * s.head_dim * kItemBytes[s.dtype];
}

kvz_segment SegmentOf(const uint8_t* shape) {
  kvz_segment s;
  memset(&s, 0, sizeof(s));
  s.tokens = 1 + shape[0] % 40;
  s.heads = 1 + shape[1] % 3;
  s.head_dim = 1 + shape[2] % 40;
  s.dtype = shape[3] % 4;
  s.group_tokens = kGroups[shape[4] % 5];
  s.head_stride = static_cast<int64_t>(s.head_dim) * kItemBytes[s.dtype];
  s.token_stride = s.head_stride * s.heads;
  s.block_stride = s.token_stride * s.tokens;
  return s;
}

// Bounds of the channels of a page, exact ones among them; the shape's fourth byte says whether there are any.
std::vector<float> ChannelBoundsOf(const uint8_t* shape, const kvz_segment& s) {
  std::vector<float> bounds;
  if (shape[3] < 128) return bounds;
  for (uint32_t c = 0; c < s.heads * s.head_dim; ++c) {
    bounds.push_back(c % 7 == 3 ? 0.0f : 1.0f / static_cast<float>(4u << (c % 12)));
  }
  return bounds;
}

bool Parse(const uint8_t* data, size_t size, Case* out) {
  if (size < 1) return false;
  const size_t pages = 1 + data[0] % 3, head = 1 + pages * (kShapeBytes + sizeof(kvz_entry));
  if (size < head) return false;
  for (size_t i = 0; i < pages; ++i) {
    const uint8_t* at = data + 1 + i * (kShapeBytes + sizeof(kvz_entry));
    out->segments.push_back(SegmentOf(at));
    out->channel_bounds.push_back(ChannelBoundsOf(at, out->segments.back()));
    kvz_entry entry;
    memcpy(&entry, at + kShapeBytes, sizeof(entry));
    out->table.push_back(entry);
  }
  out->payload.assign(data + head, data + size);
  for (size_t i = 0; i < pages; ++i) {
    if (out->channel_bounds[i].empty()) continue;
    out->segments[i].channel_bounds = reinterpret_cast<uint64_t>(out->channel_bounds[i].data());
  }
  return true;
}

unsigned long long g_case = 0;  // of the driver

void Require(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "kvzip_fuzz: case %llu: %s\n", g_case, what);
  abort();
}

using Pages = std::vector<std::vector<uint8_t>>;

int32_t Decode(const Case& c, uint8_t fill, Pages* pages) {
  std::vector<kvz_segment> segments = c.segments;
  pages->clear();
  for (const kvz_segment& s : segments) pages->emplace_back(PageBytes(s), fill);
  for (size_t i = 0; i < segments.size(); ++i) segments[i].base = reinterpret_cast<uint64_t>((*pages)[i].data());
  const int64_t block = 0;
  const uint8_t* payload = c.Payload();
  const uint64_t nbytes = c.payload.size();
  return kvz_cpu_decode(segments.data(), static_cast<uint32_t>(segments.size()), &block, 1, &payload, &nbytes,
                        c.table.data(), 1, nullptr, nullptr);
}

int32_t Validate(const Case& c) {
  const uint8_t* payload = c.Payload();
  const uint64_t nbytes = c.payload.size();
  return kvz_cpu_validate(c.segments.data(), static_cast<uint32_t>(c.segments.size()), 1, &payload, &nbytes,
                          c.table.data(), 1, nullptr, nullptr);
}

bool Check(const Case& c) {
  Pages first, second;
  const int32_t status = Decode(c, 0xA5, &first);
  Require(status == KVZ_OK || status == KVZ_CORRUPT || status == KVZ_NO_BOUNDS,
          "decode returned another status than OK, CORRUPT and NO_BOUNDS");
  // Validation does not need the bounds that decoding does.
  Require(Validate(c) == (status == KVZ_NO_BOUNDS ? KVZ_OK : status), "validate and decode disagree");
  Require(Decode(c, 0x5A, &second) == status, "decode is not deterministic");
  if (status == KVZ_OK) {
    Require(first == second, "a value was not written, or depends on what was there");
    if (kvz_cpu_set_isa("baseline") == KVZ_OK) {
      Require(Decode(c, 0xA5, &second) == KVZ_OK && first == second, "instruction sets disagree");
      kvz_cpu_set_isa("auto");
    }
    return true;
  }
  for (const auto& page : first) {
    Require(std::all_of(page.begin(), page.end(), [](uint8_t b) { return b == 0xA5; }),
            "a refused payload changed a page");
  }
  return false;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Case c;
  if (Parse(data, size, &c)) Check(c);
  return 0;
}

// Valid cases to start from, as bytes of the target's input.
static std::vector<uint8_t> MakeValid(std::mt19937_64& random) {
  const size_t pages = 1 + random() % 3;
  std::vector<uint8_t> shapes(pages * kShapeBytes);
  for (uint8_t& byte : shapes) byte = static_cast<uint8_t>(random());
  std::vector<kvz_segment> segments;
  std::vector<std::vector<float>> channel_bounds;
  Pages values;
  uint64_t room = 0;
  for (size_t i = 0; i < pages; ++i) {
    kvz_segment s = SegmentOf(&shapes[i * kShapeBytes]);
    if (s.dtype != KVZ_OPAQUE) s.coding = static_cast<uint8_t>(KVZ_FIXED + random() % 6);
    channel_bounds.push_back(ChannelBoundsOf(&shapes[i * kShapeBytes], s));
    if (s.coding == KVZ_LOSSLESS || s.coding == KVZ_LOSSLESS_RICE || s.dtype == KVZ_OPAQUE) {
      s.bound_kind = KVZ_BOUND_LOSSLESS;
    } else if (!channel_bounds.back().empty()) {
      s.bound_kind = KVZ_BOUND_CHANNEL_TABLE;
      s.channel_bounds = reinterpret_cast<uint64_t>(channel_bounds.back().data());
    } else {
      s.bound_kind = random() % 2 ? KVZ_BOUND_RELATIVE : KVZ_BOUND_TOKEN_RMS;
      s.bound = 1.0 / static_cast<double>(1u << (1 + random() % 12));
    }
    values.emplace_back(PageBytes(s));
    // Values near each other: a sign and an exponent of few kinds, and any mantissa.
    const uint8_t exponent = static_cast<uint8_t>(0x3E + random() % 3);
    for (size_t b = 0; b < values.back().size(); ++b) {
      const bool high = b % kItemBytes[s.dtype] == kItemBytes[s.dtype] - 1;
      values.back()[b] = static_cast<uint8_t>(high ? exponent | (random() & 0x80) : random());
    }
    if (random() % 8 == 0) std::fill(values.back().begin(), values.back().end(), values.back()[0]);
    room += kvz_max_segment_bytes(&s);
    segments.push_back(s);
  }
  for (size_t i = 0; i < pages; ++i) segments[i].base = reinterpret_cast<uint64_t>(values[i].data());
  std::vector<uint8_t> payload(room);
  std::vector<kvz_entry> table(pages);
  uint64_t nbytes = 0;
  const int64_t block = 0;
  Require(kvz_cpu_encode(segments.data(), static_cast<uint32_t>(pages), &block, 1, payload.data(), room, table.data(),
                         &nbytes, 1) == KVZ_OK,
          "a valid page was not encoded");
  std::vector<uint8_t> input(1, static_cast<uint8_t>(pages - 1));
  for (size_t i = 0; i < pages; ++i) {
    const uint8_t* entry = reinterpret_cast<const uint8_t*>(&table[i]);
    input.insert(input.end(), &shapes[i * kShapeBytes], &shapes[i * kShapeBytes] + kShapeBytes);
    input.insert(input.end(), entry, entry + sizeof(kvz_entry));
  }
  input.insert(input.end(), payload.begin(), payload.begin() + static_cast<int64_t>(nbytes));
  return input;
}

#ifdef KVZIP_FUZZ_DRIVER

static void Damage(std::mt19937_64& random, std::vector<uint8_t>* input, const std::vector<uint8_t>& other) {
  constexpr uint8_t kBytes[] = {0, 1, 15, 16, 63, 64, 127, 128, 240, 255};
  const size_t pages = 1 + (*input)[0] % 3, head = 1 + pages * (kShapeBytes + sizeof(kvz_entry));
  const size_t rounds = 1 + random() % 3;
  for (size_t i = 0; i < rounds; ++i) {
    const uint64_t kind = random() % 8;
    // Mostly where it matters: the table, and the start of a page's segment, where its classes are.
    const size_t at = kind < 3 ? random() % std::min(head, input->size()) : random() % input->size();
    if (kind == 7 && input->size() > head) {
      input->resize(head + random() % (input->size() - head));
    } else if (kind == 6 && input->size() > head && other.size() > head) {
      input->resize(head + random() % (input->size() - head));
      input->insert(input->end(), other.begin() + static_cast<int64_t>(head + random() % (other.size() - head)),
                    other.end());
    } else if (kind % 2) {
      (*input)[at] ^= static_cast<uint8_t>(1u << random() % 8);
    } else {
      (*input)[at] = kBytes[random() % sizeof(kBytes)];
    }
  }
}

int main(int argc, char** argv) {
  uint64_t cases = 100000, seed = 1, first = 0;
  for (int i = 1; i < argc; ++i) {
    if (strncmp(argv[i], "-runs=", 6) == 0) cases = strtoull(argv[i] + 6, nullptr, 10);
    if (strncmp(argv[i], "-seed=", 6) == 0) seed = strtoull(argv[i] + 6, nullptr, 10);
    if (strncmp(argv[i], "-first=", 7) == 0) first = strtoull(argv[i] + 7, nullptr, 10);
  }
  uint64_t good = 0, refused = 0;
  for (uint64_t i = first; i < first + cases; ++i) {
    g_case = i;
    std::mt19937_64 random(seed * 1000003 + i);
    std::vector<uint8_t> input = MakeValid(random);
    if (i % 16) {
      Damage(random, &input, MakeValid(random));
    }
    Case c;
    if (!Parse(input.data(), input.size(), &c)) continue;
    const bool accepted = Check(c);
    Require(accepted || i % 16, "a valid payload was refused");
    ++(accepted ? good : refused);
  }
  printf("kvzip_fuzz: %llu cases of seed %llu, %llu decoded, %llu refused, no fault\n",
         static_cast<unsigned long long>(cases), static_cast<unsigned long long>(seed),
         static_cast<unsigned long long>(good), static_cast<unsigned long long>(refused));
  return 0;
}

#else

// libFuzzer starts from valid payloads where it has no corpus.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  if (seed % 64 == 0 || size < 8) {
    std::mt19937_64 random(seed);
    const std::vector<uint8_t> fresh = MakeValid(random);
    if (fresh.size() <= max_size) {
      memcpy(data, fresh.data(), fresh.size());
      return fresh.size();
    }
  }
  return LLVMFuzzerMutate(data, size, max_size);
}

#endif
