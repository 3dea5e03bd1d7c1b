// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The CUDA codec's device code against the CPU codec, on the host: payloads, tables and decoded pages must be equal bit
// for bit, for random geometries, dtypes, codings, bounds and values, and both must refuse the same foreign bytes
// without touching anything else.
//
//   codec_emulation [cases] [seed]
#include <algorithm>
#include <random>

#define KVZ_EMULATE 1
#include "cuda_decode_rice_fast.inl"
#include "cuda_decode_strips.inl"
#include "cuda_encode_rice_fast.inl"
#include "cuda_encode_strips.inl"
#include "cuda_few.inl"
#include "cuda_validate.inl"

namespace {

using namespace kvz;
using namespace kvz::gpu;

std::mt19937_64 g_random;

uint32_t below(uint32_t n) { return static_cast<uint32_t>(g_random() % n); }
template <class T>
T one_of(std::initializer_list<T> list) {
  return *(list.begin() + below(static_cast<uint32_t>(list.size())));
}
double unit() { return static_cast<double>(g_random() >> 11) * 0x1p-53; }
double normal() { return std::normal_distribution<double>()(g_random); }

uint32_t bits_of_value(double v, int dtype) {
  const float f = static_cast<float>(v);
  const uint32_t u = bits_of(f);
  if (dtype == KVZ_FP32) return u;
  if (dtype == KVZ_BF16) return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return Traits<KVZ_FP16>::from_float(f);
}

struct Case {
  std::vector<kvz_segment> segments;
  std::vector<std::vector<uint8_t>> memory;  // of each segment
  std::vector<int64_t> block_ids;
  uint32_t blocks = 0, slots = 0;
  std::vector<float> channel_bounds;
  bool fast = false, rice = false;
};

uint32_t item_bytes(int dtype) { return dtype == KVZ_FP32 ? 4 : dtype == KVZ_OPAQUE ? 1 : 2; }

void fill_page(uint8_t* base, const kvz_segment& s) {
  const int kind = static_cast<int>(below(14));
  const double scale = std::exp2(
      one_of({0.0, 0.0, 0.0, -20.0, 10.0, s.dtype == KVZ_FP16 ? -14.0 : -120.0, s.dtype == KVZ_FP16 ? 12.0 : 120.0}));
  const uint32_t constant = static_cast<uint32_t>(g_random());
  std::vector<double> channel(s.heads * s.head_dim);
  for (double& c : channel) c = normal() * (below(20) == 0 ? 20.0 : 1.0);
  for (uint32_t t = 0; t < s.tokens; ++t) {
    for (uint32_t h = 0; h < s.heads; ++h) {
      for (uint32_t d = 0; d < s.head_dim; ++d) {
        const uint32_t c = h * s.head_dim + d;
        double v = 0;
        uint32_t u = 0;
        bool bits = false;
        switch (kind) {
          case 0:  // any bit pattern
            u = static_cast<uint32_t>(g_random());
            bits = true;
            break;
          case 1:
            u = constant;
            bits = true;
            break;
          case 2:  // zeros of both signs
            u = below(2) << (8 * item_bytes(s.dtype) - 1);
            bits = true;
            break;
          case 3:
            v = normal();
            break;
          case 4:
            v = channel[c] + 0.1 * normal();
            break;
          case 5:
            v = std::exp2(unit() * 20 - 10) * (below(2) ? 1 : -1);
            break;
          case 6:
            v = below(50) == 0 ? 1000 * normal() : 0.01 * normal();
            break;
          case 7:
            v = channel[c] + 0.01 * t;
            break;
          case 8:
            v = static_cast<double>(below(3)) - 1;
            break;
          case 9:  // one channel is far from zero at its first token only
            v = (c % 3 == 0 && t % 16 == 0) ? 30 * normal() : 0.05 * normal();
            break;
          case 10:
            v = constant % 7 == c % 7 ? 5.0 : 0.0;
            break;
          default:
            v = channel[c] * (1 + 0.05 * normal());
        }
        if (!bits) u = bits_of_value(v * scale, s.dtype);
        if ((kind == 11 || kind == 3) && below(200) == 0) {  // some that are not finite
          u = s.dtype == KVZ_FP32   ? one_of({0x7f800000u, 0xff800000u, 0x7fc00001u, 0xffffffffu})
              : s.dtype == KVZ_BF16 ? one_of({0x7f80u, 0xff80u, 0x7fc1u, 0xffffu})
                                    : one_of({0x7c00u, 0xfc00u, 0x7e01u, 0xffffu});
        }
        if (kind == 12 && c % 5 == 0) u = static_cast<uint32_t>(g_random());
        memcpy(base + t * s.token_stride + h * s.head_stride + d * item_bytes(s.dtype), &u, item_bytes(s.dtype));
      }
    }
  }
  if (kind == 13 && below(2)) {  // a whole page of one NaN
    for (uint32_t t = 0; t < s.tokens; ++t) {
      for (uint32_t h = 0; h < s.heads; ++h) {
        for (uint32_t d = 0; d < s.head_dim; ++d) {
          const uint32_t u = 0x7fff7fffu;
          memcpy(base + t * s.token_stride + h * s.head_stride + d * item_bytes(s.dtype), &u, item_bytes(s.dtype));
        }
      }
    }
  }
}

// What the kernels for few pages are given: to store, whole strips in some codings; to load, parts of strips too.
enum class Few { kNone, kStored, kLoaded };

Case make_case(bool fast, bool rice, Few few = Few::kNone) {
  Case c;
  c.fast = fast && !rice;
  c.rice = rice;
  const uint32_t exact = one_of({20u, 1u << 30});  // one channel of so many
  for (int i = 0; i < 4096; ++i) {
    c.channel_bounds.push_back(below(exact) == 0 ? 0.0f : static_cast<float>(std::exp2(1 - unit() * 8)));
  }
  c.blocks = 1 + below(3);
  c.slots = c.blocks + below(3);
  for (uint32_t i = 0; i < c.slots; ++i) c.block_ids.push_back(i);
  std::shuffle(c.block_ids.begin(), c.block_ids.end(), g_random);
  c.block_ids.resize(c.blocks);
  const uint32_t count = 1 + below(4);
  const int fast_dtype = static_cast<int>(below(2));
  for (uint32_t i = 0; i < count; ++i) {
    kvz_segment s = {};
    if (fast) {
      s.dtype = static_cast<uint8_t>(fast_dtype);
      s.group_tokens = 16;
      s.tokens = one_of({16u, 16u, 16u, 32u, 48u});
      s.heads = 1 + below(4);
      s.head_dim = one_of({8u, 16u, 24u, 64u, 64u, 80u, 128u});
      if (few == Few::kStored) {
        s.heads = 1 + below(3);
        s.head_dim = 64 * (1 + below(4));
        if (below(3) == 0) {
          s.heads = 4 * (1 + below(3));
          s.head_dim = 16;
        }
      }
    } else {
      s.dtype = static_cast<uint8_t>(below(4));
      s.group_tokens = one_of<uint8_t>({16, 8, 4, 2, 1});
      s.tokens = 1 + below(40);
      s.heads = 1 + below(3);
      s.head_dim = 1 + below(50);
      if (below(5) == 0) {
        s.tokens = s.heads = 1;
        s.head_dim = 1 + below(3000);
      }
    }
    const uint32_t item = item_bytes(s.dtype);
    s.coding = one_of<uint8_t>({KVZ_RAW, KVZ_FIXED, KVZ_FIXED, KVZ_FIXED, KVZ_PLAIN, KVZ_OUTLIER, KVZ_LOSSLESS});
    s.bound_kind =
        one_of<uint8_t>({KVZ_BOUND_RELATIVE, KVZ_BOUND_RELATIVE, KVZ_BOUND_ABSOLUTE, KVZ_BOUND_LOSSLESS,
                         KVZ_BOUND_TOKEN_RMS, KVZ_BOUND_TOKEN_RMS, KVZ_BOUND_CHANNEL_TABLE, KVZ_BOUND_CHANNEL_TABLE});
    s.bound = std::exp2(-unit() * one_of({8.0, 15.0, 30.0, 140.0}));
    if (s.bound_kind == KVZ_BOUND_TOKEN_RMS && below(2)) s.bound = std::exp2(-unit() * 6);
    if (rice) {
      s.coding = one_of<uint8_t>({KVZ_RAW, KVZ_RICE, KVZ_RICE, KVZ_RICE, KVZ_RICE, KVZ_LOSSLESS_RICE});
      s.bound_kind = one_of<uint8_t>({KVZ_BOUND_RELATIVE, KVZ_BOUND_ABSOLUTE, KVZ_BOUND_LOSSLESS, KVZ_BOUND_TOKEN_RMS,
                                      KVZ_BOUND_TOKEN_RMS, KVZ_BOUND_CHANNEL_TABLE, KVZ_BOUND_CHANNEL_TABLE});
      if (below(2)) s.bound = std::exp2(-unit() * 6);
    }
    if (few != Few::kNone) {
      if (few == Few::kStored) s.coding = one_of<uint8_t>({KVZ_RAW, KVZ_FIXED, KVZ_FIXED, KVZ_FIXED, KVZ_LOSSLESS});
      s.bound_kind = one_of<uint8_t>({KVZ_BOUND_RELATIVE, KVZ_BOUND_RELATIVE, KVZ_BOUND_ABSOLUTE, KVZ_BOUND_LOSSLESS});
    }
    s.kind = static_cast<uint8_t>(below(3));
    const uint32_t pad = fast ? 8 * below(2) : below(2);  // values between rows
    if (below(2)) {                                       // tokens first
      s.head_stride = static_cast<int64_t>(s.head_dim + pad) * item;
      s.token_stride = s.head_stride * s.heads + pad * item;
    } else {
      s.token_stride = static_cast<int64_t>(s.head_dim + pad) * item;
      s.head_stride = s.token_stride * s.tokens + pad * item;
    }
    s.block_stride = std::max(s.token_stride * s.tokens, s.head_stride * s.heads) + static_cast<int64_t>(pad * item);
    c.memory.emplace_back(s.block_stride * c.slots + 16);
    for (uint8_t& b : c.memory.back()) b = static_cast<uint8_t>(g_random());
    uint8_t* base = c.memory.back().data();
    base += (16 - reinterpret_cast<uintptr_t>(base) % 16) % 16;
    s.base = reinterpret_cast<uint64_t>(base);
    for (uint32_t b = 0; b < c.slots; ++b) fill_page(base + b * s.block_stride, s);
    c.segments.push_back(s);
  }
  return c;
}

#define CHECK(condition)                                                                       \
  do {                                                                                         \
    if (!(condition)) {                                                                        \
      fprintf(stderr, "%s:%d: %s fails in case %u\n", __FILE__, __LINE__, #condition, g_case); \
      exit(1);                                                                                 \
    }                                                                                          \
  } while (0)
uint32_t g_case = 0, g_rice_fast = 0;

// CRC32C, a bit at a time.
uint32_t crc_of(const uint8_t* bytes, uint64_t size) {
  uint32_t crc = ~0u;
  for (uint64_t i = 0; i < size; ++i) {
    crc ^= bytes[i];
    for (int k = 0; k < 8; ++k) crc = (crc >> 1) ^ ((0u - (crc & 1u)) & kPolynomial);
  }
  return ~crc;
}

// Checksums of payloads of odd sizes, those of several pieces among them.
void run_checksums() {
  const uint32_t count = 1 + below(4);
  std::vector<uint64_t> offsets, sizes;
  std::vector<uint32_t> expected, found(count), scratch(2 * count);
  uint64_t total = 0, most = 0;
  for (uint32_t b = 0; b < count; ++b) {
    offsets.push_back(total + 16 * below(3));
    sizes.push_back(16 * one_of<uint64_t>({0, 1, below(40), below(1024), 1024, below(5000)}));
    total = offsets[b] + sizes[b];
    most = std::max(most, sizes[b]);
  }
  std::vector<uint4> memory(total / 16 + 2);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(memory.data());
  for (uint64_t i = 0; i < memory.size() * 16; ++i) bytes[i] = static_cast<uint8_t>(g_random());
  for (uint32_t b = 0; b < count; ++b) expected.push_back(crc_of(bytes + 16 + offsets[b], sizes[b]));
  CrcParams p = {};
  p.base = bytes;
  p.offsets = offsets.data();
  p.skip = 16;
  p.end = memory.size() * 16;
  p.payload_bytes = sizes.data();
  p.crc32c = found.data();
  p.scratch = scratch.data();
  p.count = count;
  p.most_pieces = static_cast<uint32_t>((most + kPieceBytes - 1) / kPieceBytes) + below(2);
  if (p.most_pieces == 0) p.most_pieces = 1;
  emulation::launch(1 + below(2), 64, 16, [&](uint8_t*) { checksum(p); });
  CHECK(found == expected);
  CHECK(std::count(scratch.begin(), scratch.end(), 0u) == 2 * count);
  const uint32_t wrong = below(count);
  expected[wrong] ^= 1u << below(32);
  const std::vector<uint64_t> before = sizes;
  p.expected = expected.data();
  p.clear_size = sizes.data();
  emulation::launch(1 + below(2), 64, 16, [&](uint8_t*) { checksum(p); });
  for (uint32_t b = 0; b < count; ++b) CHECK(sizes[b] == (b == wrong ? 0 : before[b]));
  CHECK(std::count(scratch.begin(), scratch.end(), 0u) == 2 * count);
}

// Assert that two entries of a table are equal.
void check_entry(const kvz_segment& g, const kvz_entry& e, const kvz_entry& f) {
  if (memcmp(&e, &f, sizeof e) != 0) {
    fprintf(stderr,
            "T %u H %u D %u dtype %u G %u coding %u kind %u bound %g: cpu {%u %u %g %u %u %u} gpu {%u %u %g %u %u "
            "%u}\n",
            g.tokens, g.heads, g.head_dim, g.dtype, g.group_tokens, g.coding, g.bound_kind, g.bound, e.offset, e.size,
            static_cast<double>(e.bound), e.coding, e.param, e.reason, f.offset, f.size, static_cast<double>(f.bound),
            f.coding, f.param, f.reason);
  }
  CHECK(memcmp(&e, &f, sizeof e) == 0);
}

using Payloads =
    std::vector<std::unique_ptr<uint4[]>>;  // each of its exact size, so that a sanitizer sees what is read beyond it

// Foreign bytes in a few places.
void spoil(const Case& c, const std::vector<kvz_entry>& table, const std::vector<uint64_t>& payload_bytes,
           Payloads& payloads, std::vector<kvz_entry>& entries) {
  const uint32_t segments = static_cast<uint32_t>(c.segments.size());
  for (uint32_t k = 0; k < 1 + below(3); ++k) {
    const uint32_t b = below(c.blocks), s = below(segments);
    kvz_entry& e = entries[b * segments + s];
    uint8_t* bytes = reinterpret_cast<uint8_t*>(payloads[b].get());
    switch (below(8)) {
      case 0:
        e.offset = static_cast<uint32_t>(g_random());
        break;
      case 1:
        e.size = one_of({e.size + 1, e.size - 1, e.size + 16, 0u, static_cast<uint32_t>(g_random())});
        break;
      case 2:
        e.coding = c.rice
                       ? one_of<uint8_t>({0, 1, 2, 5, 6, 7, 0x16, 0x26, 0x36, 0x46, 0x17, 8})
                       : one_of<uint8_t>({0, 1, 2, 3, 4, 5, 0x12, 0x13, 0x14, 0x15, 0x22, 0x24, 0x25, 0x32, 0x42, 8});
        break;
      case 3:
        e.bound = one_of({0.0f, 1e38f, -1.0f, __builtin_nanf(""), 1e-3f, 1e30f, 1e-28f});
        break;
      case 4:
        e.param = static_cast<uint8_t>(g_random());
        break;
      case 5:  // a word: still valid, mostly
        bytes[below(static_cast<uint32_t>(payload_bytes[b]))] = static_cast<uint8_t>(g_random());
        break;
      case 6: {  // two classes exchanged: the size stays what it was
        const uint32_t i = e.offset % 65536 * 16, j = 2 + below(30);
        if (i + j < payload_bytes[b]) std::swap(bytes[i], bytes[i + j]);
        break;
      }
      default:
        for (uint64_t i = table[b * segments + s].offset * 16ull + table[b * segments + s].size / 2;
             i < payload_bytes[b]; ++i) {
          bytes[i] = static_cast<uint8_t>(g_random());
        }
    }
  }
}

// The same memory with other bytes, and segments that lead there; empty where the allocator aligns it otherwise.
std::vector<Case> two_targets(const Case& c) {
  std::vector<Case> made(2, c);
  for (size_t i = 0; i < c.segments.size(); ++i) {
    for (uint8_t& byte : made[0].memory[i]) byte ^= 0x5a;
    made[1].memory[i] = made[0].memory[i];
    const uint64_t before = reinterpret_cast<uint64_t>(c.memory[i].data()), skew = c.segments[i].base - before;
    for (Case& m : made) {
      const uint64_t now = reinterpret_cast<uint64_t>(m.memory[i].data());
      m.segments[i].base = now + skew;
      if (now % 16 != before % 16) return {};
    }
  }
  return made;
}

uint32_t most_strips(const Case& c) {
  uint32_t most = 1;
  for (const kvz_segment& s : c.segments) most = std::max(most, s.tokens / 16 * ((s.heads * s.head_dim + 63) / 64));
  return most;
}

void run_case(Case c) {
  for (kvz_segment& s : c.segments) {
    s.channel_bounds = reinterpret_cast<uint64_t>(c.channel_bounds.data());
  }
  const uint32_t segments = static_cast<uint32_t>(c.segments.size()), pages = segments * c.blocks;
  uint64_t worst = 0;
  for (const kvz_segment& s : c.segments) worst += kvz_max_segment_bytes(&s);
  std::vector<std::vector<uint8_t>> expected(c.blocks, std::vector<uint8_t>(worst));
  std::vector<kvz_entry> table(pages);
  std::vector<uint64_t> payload_bytes(c.blocks);
  for (uint32_t b = 0; b < c.blocks; ++b) {
    CHECK(kvz_cpu_encode(c.segments.data(), segments, &c.block_ids[b], 1, expected[b].data(), worst,
                         &table[b * segments], &payload_bytes[b], 1) == KVZ_OK);
  }

  // Encode.
  const uint32_t header = one_of({0u, 96u, 200u});
  const uint64_t stride = below(3) == 0 ? (worst + header + 15 + 255) / 256 * 256 : 0;
  const uint64_t arena_bytes = ((worst + header + 15 + 255) / 256 * 256) * c.blocks;
  std::vector<uint4> arena(arena_bytes / 16);
  memset(arena.data(), 0xee, arena_bytes);
  std::vector<kvz_entry> found(pages);
  std::vector<uint64_t> found_bytes(c.blocks), offsets(c.blocks), block_state(c.blocks), block_sum(c.blocks),
      tile_state(pages);
  Counters counters = {};
  uint32_t status[2] = {77, 0};
  EncodeParams p = {};
  p.segments = c.segments.data();
  p.block_ids = c.block_ids.data();
  p.arena = reinterpret_cast<uint8_t*>(arena.data());
  p.table = found.data();
  p.payload_bytes = found_bytes.data();
  p.record_offsets = offsets.data();
  p.status = status;
  p.counters = &counters;
  p.block_state = block_state.data();
  p.block_sum = block_sum.data();
  p.tile_state = tile_state.data();
  p.arena_units = arena_bytes / 16;
  p.stride_units = stride / 16;
  p.header_units = (header + 15) / 16;
  p.num_segments = segments;
  p.num_blocks = c.blocks;
  p.clear_states = 1;
  const uint32_t strips = most_strips(c), warps = 1 + below(std::min(4u, strips)), ctas = 1 + below(3);
  const int dtype = c.segments[0].dtype;
  p.tiles = segments;
  uint32_t vectors = 0;
  for (const kvz_segment& s : c.segments) vectors = std::max(vectors, s.tokens * s.heads);
  bool rice_fast = c.rice, encodes_fast = c.rice;
  uint32_t token_vectors = 0;
  for (const kvz_segment& s : c.segments) {
    rice_fast = rice_fast && s.dtype == dtype && rice_is_fast(s);
    encodes_fast = encodes_fast && s.dtype == dtype && (s.coding == KVZ_RAW || rice_encodes_fast(s));
    if (s.coding == KVZ_RAW) continue;
    if (s.bound_kind == KVZ_BOUND_TOKEN_RMS) token_vectors = std::max(token_vectors, s.tokens / 16 * s.heads);
  }
  if (encodes_fast) {
    const uint32_t share = std::max(1 + below(2), strips > 16 ? 2u : 1u);
    p.team_bytes = token_vectors;
    emulation::launch(
        ctas, (strips + share - 1) / share * 32, rice_fast_bytes(token_vectors, strips), [&](uint8_t* shared) {
          if (dtype == KVZ_BF16) {
            share == 1 ? encode_rice_fast<KVZ_BF16, 1>(p, shared) : encode_rice_fast<KVZ_BF16, 2>(p, shared);
          } else {
            share == 1 ? encode_rice_fast<KVZ_FP16, 1>(p, shared) : encode_rice_fast<KVZ_FP16, 2>(p, shared);
          }
        });
    ++g_rice_fast;
  } else if (c.rice) {
    const uint32_t slots = below(2) ? 128 : 4;  // one a strip for all pages, or for small ones alone
    emulation::launch(ctas, warps * 32, rice_shared_bytes(warps, 32, vectors, slots),
                      [&](uint8_t* shared) { encode_rice(p, shared, vectors, slots); });
  } else if (c.fast) {
    p.teams = 1 + below(std::min(segments, 3u));
    p.team_warps = warps;
    p.tiles = (segments + p.teams - 1) / p.teams;
    p.team_bytes = fast_encode_bytes(strips);
    uint32_t more = 0;
    bool within = below(2);
    for (const kvz_segment& s : c.segments) {
      more =
          std::max(more, token_memory_bytes(s.tokens, s.heads, s.head_dim, static_cast<uint32_t>(strips_of_page(s))));
      within = within || s.bound_kind > KVZ_BOUND_RELATIVE;
    }
    p.team_bytes += more;
    const uint32_t threads = (p.teams * warps + 1) * 32;
    emulation::launch(ctas, threads, kTileSharedBytes + p.teams * p.team_bytes, [&](uint8_t* shared) {
      if (within) {
        dtype == KVZ_BF16 ? encode_fast<KVZ_BF16, true>(p, shared) : encode_fast<KVZ_FP16, true>(p, shared);
      } else {
        dtype == KVZ_BF16 ? encode_fast<KVZ_BF16, false>(p, shared) : encode_fast<KVZ_FP16, false>(p, shared);
      }
    });
  } else {
    emulation::launch(ctas, 64, kSharedBytes + 4 * vectors, [&](uint8_t* shared) { encode_general(p, shared); });
  }
  CHECK(status[0] == KVZ_OK && status[1] == 1);
  CHECK(counters.ticket == 0 && counters.done == 0 && counters.error == 0);
  for (uint64_t v : tile_state) CHECK(v == 0);
  for (uint64_t v : block_sum) CHECK(v == 0);
  for (uint64_t v : block_state) CHECK(v == 0);
  uint64_t at = 0;
  for (uint32_t b = 0; b < c.blocks; ++b) {
    for (uint32_t s = 0; s < segments; ++s)
      check_entry(c.segments[s], table[b * segments + s], found[b * segments + s]);
    CHECK(found_bytes[b] == payload_bytes[b]);
    if (stride) at = stride * b;
    CHECK(offsets[b] == at);
    const uint8_t* payload = reinterpret_cast<uint8_t*>(arena.data()) + at + p.header_units * 16;
    for (uint64_t i = 0; i < payload_bytes[b]; ++i) {
      if (payload[i] == expected[b][i]) continue;
      for (uint32_t s = 0; s < segments; ++s) {
        const kvz_entry& e = table[b * segments + s];
        if (i >= e.offset * 16ull && i < e.offset * 16ull + e.size) {
          const kvz_segment& g = c.segments[s];
          fprintf(stderr, "byte %llu of segment %u (size %u): T %u H %u D %u dtype %u G %u coding %u->%u\n",
                  static_cast<unsigned long long>(i - e.offset * 16ull), s, e.size, g.tokens, g.heads, g.head_dim,
                  g.dtype, g.group_tokens, g.coding, e.coding);
        }
      }
      CHECK(!"payloads differ");
    }
    at += (payload_bytes[b] + p.header_units * 16 + 255) / 256 * 256;
  }

  // Decode, as it is and with foreign bytes.
  for (int round = 0; round < 4; ++round) {
    Payloads payloads;
    std::vector<uint64_t> addresses;
    std::vector<kvz_entry> entries = table;
    for (uint32_t b = 0; b < c.blocks; ++b) {
      payloads.emplace_back(new uint4[payload_bytes[b] / 16]);
      memcpy(payloads.back().get(), expected[b].data(), payload_bytes[b]);
      addresses.push_back(reinterpret_cast<uint64_t>(payloads.back().get()));
    }
    if (round > 0) {
      spoil(c, table, payload_bytes, payloads, entries);
    }
    std::vector<Case> targets = two_targets(c);
    if (targets.empty()) return;
    Case &cpu = targets[0], &gpu = targets[1];
    std::vector<uint32_t> verdict(c.blocks), crcs(c.blocks), scratch(2 * c.blocks);
    const bool checksums = below(2);
    bool any_bad = false;
    for (uint32_t b = 0; b < c.blocks; ++b) {
      crcs[b] = crc_of(reinterpret_cast<const uint8_t*>(payloads[b].get()), payload_bytes[b]);
      if (round > 0 && below(4) == 0) crcs[b] ^= 1;
      const uint8_t* payload = reinterpret_cast<const uint8_t*>(payloads[b].get());
      verdict[b] = static_cast<uint32_t>(kvz_cpu_validate(cpu.segments.data(), segments, 1, &payload, &payload_bytes[b],
                                                          &entries[b * segments], 1, nullptr, nullptr));
      if (checksums && crcs[b] != crc_of(payload, payload_bytes[b])) verdict[b] = KVZ_CORRUPT;
      any_bad = any_bad || verdict[b] != KVZ_OK;
    }
    const bool all_or_nothing = below(2);
    for (uint32_t b = 0; b < c.blocks; ++b) {
      const uint8_t* payload = reinterpret_cast<const uint8_t*>(payloads[b].get());
      if (verdict[b] != KVZ_OK || (all_or_nothing && any_bad)) continue;
      CHECK(kvz_cpu_decode(cpu.segments.data(), segments, &c.block_ids[b], 1, &payload, &payload_bytes[b],
                           &entries[b * segments], 1, nullptr, nullptr) == KVZ_OK);
    }
    std::vector<uint32_t> bad(c.blocks), block_status(c.blocks, 99);
    DecodeParams d = {};
    d.segments = gpu.segments.data();
    d.block_ids = c.block_ids.data();
    d.payloads = addresses.data();
    d.payload_bytes = payload_bytes.data();
    d.table = entries.data();
    d.block_status = block_status.data();
    d.counters = &counters;
    d.bad = bad.data();
    d.num_segments = segments;
    d.num_blocks = c.blocks;
    d.all_or_nothing = all_or_nothing;
    d.room_bytes = decode_room_bytes(strips, (vectors + 15) / 16 * 16);
    d.validate_lanes = c.rice ? 32u : one_of({8u, 16u, 32u});
    bool within = below(2);
    for (const kvz_entry& e : entries) within = within || (e.coding & KVZ_STEPS_MASK) != 0;
    d.extended = c.rice ? KVZ_EXTENDED_RICE : within ? KVZ_EXTENDED_BOUNDS : 0;
    CrcParams k = {};
    k.offsets = addresses.data();
    k.end = ~0ull;
    k.payload_bytes = payload_bytes.data();
    k.expected = checksums ? crcs.data() : nullptr;
    k.bad = bad.data();
    k.any_bad = &counters.any_bad;
    k.scratch = scratch.data();
    k.count = c.blocks;
    k.most_pieces = static_cast<uint32_t>((worst + worst / 8) / kPieceBytes) + 1;
    emulation::launch(1 + below(2), 64, 16, [&](uint8_t*) { check(d, k); });
    if (rice_fast) {
      const uint32_t share = std::max(1 + below(4), strips > 16 ? 2u : 1u);
      d.room_bytes = strips * 2048;
      emulation::launch(ctas, (strips + share - 1) / share * 32, rice_fast_decode_bytes(strips), [&](uint8_t* shared) {
        dtype == KVZ_BF16 ? decode_rice_fast<KVZ_BF16>(d, shared) : decode_rice_fast<KVZ_FP16>(d, shared);
      });
    } else if (c.rice) {
      emulation::launch(ctas, warps * 32, rice_shared_bytes(warps, 32, 0, 0),
                        [&](uint8_t* shared) { decode_rice(d, shared); });
    } else if (c.fast) {
      emulation::launch(ctas, warps * 32, fast_decode_bytes(strips, (vectors + 15) / 16 * 16), [&](uint8_t* shared) {
        if (within) {
          dtype == KVZ_BF16 ? decode_fast<KVZ_BF16, true>(d, shared) : decode_fast<KVZ_FP16, true>(d, shared);
        } else {
          dtype == KVZ_BF16 ? decode_fast<KVZ_BF16, false>(d, shared) : decode_fast<KVZ_FP16, false>(d, shared);
        }
      });
    } else {
      emulation::launch(ctas, 64, kSharedBytes, [&](uint8_t* shared) { decode_general(d, shared); });
    }
    CHECK(counters.ticket == 0 && counters.done == 0 && counters.any_bad == 0);
    for (uint32_t b = 0; b < c.blocks; ++b) {
      CHECK(block_status[b] == verdict[b]);
      CHECK(bad[b] == 0);
    }
    for (uint32_t i = 0; i < segments; ++i) {
      if (cpu.memory[i] != gpu.memory[i]) {
        const kvz_segment& g = c.segments[i];
        uint64_t k = 0;
        while (cpu.memory[i][k] == gpu.memory[i][k]) ++k;
        fprintf(stderr, "round %d segment %u byte %llu: cpu %02x gpu %02x; T %u H %u D %u dtype %u G %u coding %u\n",
                round, i, static_cast<unsigned long long>(k), cpu.memory[i][k], gpu.memory[i][k], g.tokens, g.heads,
                g.head_dim, g.dtype, g.group_tokens, entries[i].coding);
      }
      CHECK(cpu.memory[i] == gpu.memory[i]);
    }
  }
}

// What the CPU codec makes of a case: a payload and a segment table for each block.
struct Encoded {
  std::vector<std::vector<uint8_t>> payloads;
  std::vector<kvz_entry> table;
  std::vector<uint64_t> payload_bytes;
  uint64_t worst = 0;  // bytes of a payload

  explicit Encoded(const Case& c) : payloads(c.blocks), table(c.segments.size() * c.blocks), payload_bytes(c.blocks) {
    const uint32_t segments = static_cast<uint32_t>(c.segments.size());
    for (const kvz_segment& s : c.segments) worst += kvz_max_segment_bytes(&s);
    for (uint32_t b = 0; b < c.blocks; ++b) {
      payloads[b].resize(worst);
      CHECK(kvz_cpu_encode(c.segments.data(), segments, &c.block_ids[b], 1, payloads[b].data(), worst,
                           &table[b * segments], &payload_bytes[b], 1) == KVZ_OK);
    }
  }
};

// Stores by the kernel for few pages: the same bytes, in mapped memory.
void run_few_store(const Case& c) {
  const Encoded expected(c);
  const uint32_t segments = static_cast<uint32_t>(c.segments.size()), pages = segments * c.blocks;
  std::vector<kvz_entry> found(pages);
  std::vector<uint64_t> found_bytes(c.blocks), sizes(pages);
  std::vector<uint32_t> sums(c.blocks * kFewSumWords), ends(c.blocks), crcs(c.blocks);
  uint32_t status = KVZ_OK;
  const uint32_t header = 16 * below(8), strips = most_strips(c), launch = 1 + below(1000);
  const uint32_t record_bytes = static_cast<uint32_t>((expected.worst + header + 255) / 256 * 256);
  std::vector<uint4> host(record_bytes / 16 * c.blocks);
  memset(host.data(), 0xee, host.size() * 16);
  FewStore p = {};
  p.general.segments = c.segments.data();
  p.general.table = found.data();
  p.general.payload_bytes = found_bytes.data();
  p.general.status = &status;
  p.general.header_units = header / 16;
  p.general.num_segments = segments;
  p.general.num_blocks = c.blocks;
  p.host = reinterpret_cast<uint8_t*>(host.data());
  p.host_units = host.size();
  p.sizes = sizes.data();
  p.sums = sums.data();
  p.crc32c = crcs.data();
  p.ends = ends.data();
  p.launch = launch;
  for (uint32_t b = 0; b < c.blocks; ++b) p.block_ids[b] = c.block_ids[b];
  const uint32_t ctas = strips / 16 + 1 + below(std::min(4u, strips));
  p.strips = (strips + ctas - 1) / ctas;
  p.general.team_warps = p.strips;
  p.general.team_bytes = fast_encode_bytes(strips);
  const int dtype = c.segments[0].dtype;
  const bool small = below(8) == 0;  // not enough room
  if (small) p.host_units = below(static_cast<uint32_t>((expected.payload_bytes[0] + header) / 16));
  emulation::launch(
      pages * ctas, (p.strips + 1) * 32, few_store_bytes(p.strips, strips),
      [&](uint8_t* shared) { dtype == KVZ_BF16 ? encode_few<KVZ_BF16>(p, shared) : encode_few<KVZ_FP16>(p, shared); },
      ctas);
  for (uint32_t s : sums) CHECK(s == 0);
  uint64_t at = header;
  for (uint32_t b = 0; b < c.blocks; ++b) {
    const uint64_t record = at;
    at += (expected.payload_bytes[b] + header + 255) / 256 * 256;
    for (uint32_t s = 0; s < segments; ++s)
      check_entry(c.segments[s], expected.table[b * segments + s], found[b * segments + s]);
    CHECK(ends[b] == launch && found_bytes[b] == expected.payload_bytes[b]);
    CHECK(status == (small ? KVZ_OUT_OF_SPACE : KVZ_OK));
    if (small) continue;
    CHECK(memcmp(reinterpret_cast<uint8_t*>(host.data()) + record, expected.payloads[b].data(),
                 expected.payload_bytes[b]) == 0);
    CHECK(crcs[b] == crc_of(expected.payloads[b].data(), expected.payload_bytes[b]));
  }
}

// Loads by the kernels for few pages: the same pages, and the same verdicts.
void run_few_load(const Case& c) {
  const Encoded encoded(c);
  const std::vector<kvz_entry>& table = encoded.table;
  const std::vector<uint64_t>& payload_bytes = encoded.payload_bytes;
  const uint32_t segments = static_cast<uint32_t>(c.segments.size()), pages = segments * c.blocks;
  const uint32_t strips = most_strips(c), launch = 1 + below(1000);
  const int dtype = c.segments[0].dtype;
  for (int round = 0; round < 3; ++round) {
    Payloads payloads, arena;
    std::vector<kvz_entry> entries = table;
    for (uint32_t b = 0; b < c.blocks; ++b) {
      payloads.emplace_back(new uint4[payload_bytes[b] / 16]);
      arena.emplace_back(new uint4[payload_bytes[b] / 16]);
      memcpy(payloads.back().get(), encoded.payloads[b].data(), payload_bytes[b]);
    }
    if (round > 0) spoil(c, table, payload_bytes, payloads, entries);
    std::vector<Case> targets = two_targets(c);
    if (targets.empty()) return;
    Case &cpu = targets[0], &gpu = targets[1];
    std::vector<uint32_t> bad(c.blocks), block_status(c.blocks, KVZ_OK), scratch(2 * c.blocks), ends(c.blocks);
    std::vector<uint64_t> ready(c.blocks);
    Counters counters = {};
    FewLoad d = {};
    d.general.segments = gpu.segments.data();
    d.general.counters = &counters;
    d.general.bad = bad.data();
    d.general.block_status = block_status.data();
    d.general.num_segments = segments;
    d.general.num_blocks = c.blocks;
    d.general.room_bytes = decode_room_bytes(strips, 0);
    d.general.validate_lanes = kWarp;
    d.ends = ends.data();
    d.ready = ready.data();
    d.scratch = scratch.data();
    d.launch = launch;
    d.parts = 1 + below(4);
    std::copy(entries.begin(), entries.end(), d.table);
    std::vector<uint32_t> verdict(c.blocks);
    for (uint32_t b = 0; b < c.blocks; ++b) {
      const uint8_t* const payload = reinterpret_cast<const uint8_t*>(payloads[b].get());
      uint32_t crc = crc_of(payload, payload_bytes[b]);
      verdict[b] = static_cast<uint32_t>(kvz_cpu_validate(cpu.segments.data(), segments, 1, &payload, &payload_bytes[b],
                                                          &entries[b * segments], 1, nullptr, nullptr));
      for (uint32_t s = 0; s < segments; ++s) {
        // Steps of tokens and channels are for other kernels: the engine knows which records have them.
        if ((entries[b * segments + s].coding & ~KVZ_CODING_MASK) != 0) verdict[b] = KVZ_CORRUPT;
      }
      if (round > 0 && below(4) == 0) {
        crc ^= 1u << below(32);
        verdict[b] = KVZ_CORRUPT;
      }
      if (verdict[b] == KVZ_OK) {
        CHECK(kvz_cpu_decode(cpu.segments.data(), segments, &c.block_ids[b], 1, &payload, &payload_bytes[b],
                             &entries[b * segments], 1, nullptr, nullptr) == KVZ_OK);
      }
      d.expected[b] = few_sum(crc, payload_bytes[b]);
      d.from[b] = reinterpret_cast<uint64_t>(payload);
      d.to[b] = reinterpret_cast<uint64_t>(arena[b].get());
      d.payload_bytes[b] = payload_bytes[b];
      d.block_ids[b] = c.block_ids[b];
      d.most_pieces = std::max(d.most_pieces, few_pieces(payload_bytes[b], d.from[b]));
    }
    emulation::launch(1 + below(3), 64, sizeof(FetchShared),
                      [&](uint8_t* shared) { fetch_few(d, *reinterpret_cast<FetchShared*>(shared)); });
    emulation::launch(pages * d.parts, 32 * (1 + below(4)), fast_decode_bytes(strips, 0), [&](uint8_t* shared) {
      dtype == KVZ_BF16 ? decode_few<KVZ_BF16>(d, shared) : decode_few<KVZ_FP16>(d, shared);
    });
    CHECK(counters.done == 0 && counters.any_bad == 0);
    for (uint32_t b = 0; b < c.blocks; ++b) {
      CHECK(ends[b] == launch && block_status[b] == verdict[b]);
      CHECK(bad[b] == 0 && scratch[2 * b] == 0 && scratch[2 * b + 1] == 0);
    }
    for (uint32_t i = 0; i < segments; ++i) CHECK(cpu.memory[i] == gpu.memory[i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t cases = argc > 1 ? static_cast<uint32_t>(strtoul(argv[1], nullptr, 10)) : 200;
  const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
  for (g_case = 0; g_case < cases; ++g_case) {
    g_random.seed(seed * 1000003 + g_case);
    run_case(make_case(g_case % 3 != 2, g_case % 5 >= 3));
    if (g_case % 4 == 0) run_checksums();
    const Case few = make_case(true, false, g_case % 2 == 0 ? Few::kStored : Few::kLoaded);
    if (g_case % 2 == 0) run_few_store(few);
    run_few_load(few);
  }
  CHECK(cases < 100 || g_rice_fast > 0);
  printf("%u cases equal\n", cases);
  return 0;
}
