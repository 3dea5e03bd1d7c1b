// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Few pages at a time, where what counts is how soon the last byte is there. Several CTAs share a page, a strip a warp.
//
// Out, one kernel does it all: a cluster of CTAs encodes a page, each its strips, and writes their words and their part
// of the checksum straight to mapped host memory. Sizes pass through distributed shared memory within a page, and
// through device memory from page to page. In, a first kernel fetches records, verifies and validates them, and a
// second one, which begins with it, decodes each block as soon as that is done. The host sees the end in words of
// mapped memory, which costs less than an event.
#pragma once

#include "cuda_decode_strips.inl"
#include "cuda_encode_strips.inl"
#include "cuda_row_crc.inl"
#include "cuda_validate.inl"

namespace kvz {
namespace gpu {

constexpr uint32_t kFewBlocks = 32;   // of a transfer
constexpr uint32_t kFewPages = 64;    // of a load
constexpr uint32_t kFewStrips = 64;   // of a page
constexpr uint32_t kFewCtas = 8;      // most of a page
constexpr uint32_t kFewSumWords = 3;  // of a block in FewStore::sums
constexpr uint32_t kLineUnits = 8;    // of host memory, as the link sees it

// ---- machine
// ----------------------------------------------------------------------------------------------------------

#if defined(KVZ_EMULATE)
KVZ_DEV uint32_t cluster_rank() { return emulation::cluster_rank(); }
KVZ_DEV uint32_t cluster_ctas() { return emulation::current->cluster_size; }
KVZ_DEV void cluster_arrive() {}
KVZ_DEV void cluster_wait() { emulation::cluster_barrier(); }
template <class T>
KVZ_DEV T* in_rank(T* shared, uint32_t rank) {
  return reinterpret_cast<T*>(emulation::in_rank(reinterpret_cast<uint8_t*>(shared), rank));
}
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
KVZ_DEV uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
KVZ_DEV uint32_t cluster_ctas() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
KVZ_DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
KVZ_DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place in the shared memory of another CTA of the cluster.
template <class T>
KVZ_DEV T* in_rank(T* shared, uint32_t rank) {
  uint64_t r;
  asm("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(r);
}
#else  // no clusters: kvz_cuda_store takes another way
KVZ_DEV uint32_t cluster_rank() { return 0; }
KVZ_DEV uint32_t cluster_ctas() { return 1; }
KVZ_DEV void cluster_arrive() {}
KVZ_DEV void cluster_wait() { __syncthreads(); }
template <class T>
KVZ_DEV T* in_rank(T* shared, uint32_t) {
  return shared;
}
#endif
KVZ_DEV void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// A checksum as the kernels sum it up: counted from the start of the payload, without what a CRC begins and ends with.
inline const RowConstants& host_rows() {
  static const RowConstants made = row_constants();
  return made;
}
inline uint32_t few_sum(uint32_t crc, uint64_t payload_bytes) {
  const RowConstants& rows = host_rows();
  return product(~crc, power_of_units(rows.back, static_cast<uint32_t>(payload_bytes / 16))) ^ 0xffffffffu;
}

// Sizes carry the number of their launch, so that nothing need be cleared.
KVZ_DEV uint64_t with_launch(uint32_t launch, uint32_t value) { return static_cast<uint64_t>(launch) << 32 | value; }

// To mapped host memory, which the host reads while the kernel runs. What it will read then is there.
KVZ_DEV void tell_host(uint32_t* to, uint32_t value) { *reinterpret_cast<volatile uint32_t*>(to) = value; }

// ---- out
// --------------------------------------------------------------------------------------------------------------

struct FewStore {
  EncodeParams general;  // what encode_any needs; table, sizes of payloads and status lie in mapped host memory
  uint8_t* host;         // where records go, one behind the other as in an arena
  uint64_t host_units;
  uint64_t* sizes;   // of each page, in units, with the launch
  uint32_t* sums;    // of each block, zero before a launch and after it: checksum, CTAs that have ended, and a factor
  uint32_t* crc32c;  // of each block, in mapped host memory
  uint32_t* ends;    // of each block, in mapped host memory: the launch that has ended
  uint32_t launch;   // not 0
  uint32_t strips;   // of a CTA
  int64_t block_ids[kFewBlocks];
};

// Start of a CTA's shared memory; the strips' inputs follow, then classes, bases and words, or what encode_any needs.
struct FewShared {
  uint32_t row[4][256];
  int32_t low[kFewStrips], high[kFewStrips];
  uint32_t words[kFewStrips];
  uint64_t record, before;  // where the record is, and the page in the payload, in units
  uint32_t crc, fits;
};
constexpr uint32_t kFewSharedBytes = (sizeof(FewShared) + 15) / 16 * 16;
KVZ_HD constexpr uint32_t few_store_bytes(uint32_t strips, uint32_t strips_of_page) {
  const uint32_t shared = strips * (kStripBytes + kStripClassBytes + kStripBytes) + 32;
  const uint32_t alone = kTileSharedBytes + fast_encode_bytes(strips_of_page);
  return kFewSharedBytes + (shared > alone ? shared : alone);
}

// Sum of the sizes of pages [0, count), once all are known. By one warp.
KVZ_DEV uint32_t sum_of_sizes(const uint64_t* sizes, uint32_t count, uint32_t launch, uint32_t lane) {
  uint32_t sum = 0;
  for (uint32_t i = lane; i < count; i += kWarp) {
    uint64_t size = load_relaxed(sizes + i);
    while (static_cast<uint32_t>(size >> 32) != launch) {
      relax();
      size = load_relaxed(sizes + i);
    }
    sum += static_cast<uint32_t>(size);
  }
  __syncwarp();
  return __reduce_add_sync(kAllLanes, sum);
}

// Where page s of block b goes: all CTAs that come before are dispatched before, so that the wait ends. Tells those
// behind, and the host, first. By the helping warp of each CTA of the cluster.
KVZ_DEV void place_few(const FewStore& p, FewShared& few, uint32_t rank, uint32_t b, uint32_t s, kvz_entry entry,
                       uint32_t lane) {
  const uint32_t pages = p.general.num_segments, units = units_of(entry.size);
  if (rank == 0 && lane == 0) store_relaxed(p.sizes + b * pages + s, with_launch(p.launch, units));
  uint64_t record = 0;
  for (uint32_t i = 0; i < b; ++i) {
    record += record_units(p.general, sum_of_sizes(p.sizes + i * pages, pages, p.launch, lane));
  }
  entry.offset = sum_of_sizes(p.sizes + b * pages, s, p.launch, lane);
  if (lane != 0) return;
  few.record = record + p.general.header_units;
  few.before = entry.offset;
  few.fits = few.record + few.before + units <= p.host_units;
  if (rank != 0) return;
  p.general.table[b * pages + s] = entry;
  if (!few.fits) *p.general.status = KVZ_OUT_OF_SPACE;
  if (s + 1 != pages) return;
  const uint32_t payload = entry.offset + units;
  p.general.payload_bytes[b] = static_cast<uint64_t>(payload) * 16;
  p.sums[b * kFewSumWords + 2] = shift_units(payload);
}

// Carry units [first, first + count) of a page to the host, rows by warp, and add them to the checksum. `load` gives
// unit i of them.
template <class Load>
KVZ_DEV void carry(const FewStore& p, FewShared& few, uint32_t first, uint32_t count, uint32_t warp, uint32_t warps,
                   uint32_t lane, Load load) {
  if (!few.fits) return;
  const uint64_t at = few.before + first;  // in the payload
  // Rows begin where lines of host memory do: parts of lines would take the link almost as long as whole ones.
  const uint32_t skew = static_cast<uint32_t>(few.record + at) % kLineUnits;
  const uint32_t rows = (skew + count + kRowUnits - 1) / kRowUnits, each = (rows + warps - 1) / warps;
  const uint32_t begin = warp * each, end = begin + each < rows ? begin + each : rows;
  if (begin >= end) return;
  uint4* const to = reinterpret_cast<uint4*>(p.host) + few.record + at;
  uint4 sum;
  sum.x = sum.y = sum.z = sum.w = 0;
  for (uint32_t r = begin; r < end; ++r) {
    const uint32_t i = r * kRowUnits + lane - skew;  // below 0 it is a large number
    uint4 v;
    v.x = v.y = v.z = v.w = 0;
    if (i < count) {
      v = load(i);
      to[i] = v;
    }
    add_row(sum, v, few.row);
  }
  const uint32_t crc = sum_of_rows(sum, lane);
  // Counted from the start of the payload, whose end other pages decide: the last CTA moves the sum there.
  const uint32_t moved = product_once(crc, shift_back_units(static_cast<uint32_t>(at) + end * kRowUnits - skew));
  if (lane == 0) atomicXor(&few.crc, moved);
}

// The end of a CTA; the last one of a block tells the host.
KVZ_DEV void end_few(const FewStore& p, FewShared& few, uint32_t b) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  uint32_t* const sums = p.sums + b * kFewSumWords;
  if (few.crc != 0) atomicXor(&sums[0], few.crc);
  __threadfence_system();
  if (atomicAdd(&sums[1], 1u) + 1 != p.general.num_segments * cluster_ctas()) return;
  __threadfence();
  const uint32_t factor = atomicExch(&sums[2], 0u), crc = atomicExch(&sums[0], 0u);
  sums[1] = 0;
  p.crc32c[b] = ~product_once(crc ^ 0xffffffffu, factor);
  __threadfence_system();
  tell_host(p.ends + b, p.launch);
}

// A page that the coders leave: by the first CTA of the cluster, as in the fast path.
template <int DTYPE>
KVZ_DEV void encode_few_any(const FewStore& p, FewShared& few, uint8_t* memory, uint32_t rank, uint32_t b, uint32_t s) {
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x), warps = blockDim.x / kWarp - 1;
  if (rank == 0) {
    TileShared& tile_shared = *reinterpret_cast<TileShared*>(memory);
    __syncthreads();  // nobody looks at the strips any more
    if (threadIdx.x == 0) {
      tile_shared.tile.block_id = p.block_ids[b];
      tile_shared.tile.segments[0] = p.general.segments[s];
    }
    __syncthreads();
    const kvz_segment& segment = tile_shared.tile.segments[0];
    const Strips strips = strips_of(segment, p.block_ids[b]);
    const uint8_t *out = nullptr, *input = nullptr;
    if (warp < warps) {
      const Team team = team_of(p.general, memory, segment, strips.count);
      fetch_strips(strips, team.input, warp, warps, lane);
      copy_async_wait();
      __syncwarp();
      encode_any<DTYPE, false>(p.general, memory);
      out = team.out;
      input = team.input;
    } else {
      meet();
    }
    __syncthreads();
    if (warp == warps) place_few(p, few, rank, b, s, tile_shared.entries[0], lane);
    __syncthreads();
    if (warp < warps) {
      const uint32_t units = units_of(tile_shared.entries[0].size);
      if (tile_shared.entries[0].coding == KVZ_RAW) {
        const uint32_t chunks = strips.channels / 8;  // of a token
        carry(p, few, 0, units, warp, warps, lane, [&](uint32_t i) {
          const uint32_t token = i / chunks, chunk = i - token * chunks;
          const uint32_t strip = token / 16 * strips.per_row + chunk / 8;
          return *reinterpret_cast<const uint4*>(input + strip * kStripBytes + token % 16 * 128 + chunk % 8 * 16);
        });
      } else {
        carry(p, few, 0, units, warp, warps, lane, [&](uint32_t i) { return reinterpret_cast<const uint4*>(out)[i]; });
      }
    }
  }
  end_few(p, few, b);
}

// This CTA's part of a page in one coding; false, in the whole cluster, when it is one for encode_any.
template <int DTYPE, Coding CODING>
KVZ_DEV bool encode_few_of(const FewStore& p, FewShared& few, uint8_t* input, const kvz_segment& segment,
                           const Strips& strips, uint32_t rank, uint32_t b, uint32_t s) {
  using Coder = std::conditional_t<CODING == kFixedByPage, FixedCoder<DTYPE>, LosslessCoder<DTYPE>>;
  constexpr bool kQuantised = CODING != kLossless;
  constexpr uint32_t kInfinity = Traits<DTYPE>::kInfinity;
  constexpr uint32_t kMask = kQuantised ? 0xffffffffu : 0x7fff7fffu;
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x), ranks = cluster_ctas();
  const uint32_t count = strips.count, each = p.strips;
  const uint32_t first = rank * each < count ? rank * each : count;
  const uint32_t mine = count - first < each ? count - first : each;  // strips of this CTA
  const uint32_t groups = count * kStripChannels, raw_bytes = groups * 32, class_bytes = Coder::class_bytes(groups);
  const uint32_t index = first + warp;  // of a warp's strip
  const uint32_t* const column = column_of(input, warp, lane);

  // Every CTA gets to know the extremes of every strip.
  uint32_t least = 0, most = 0;
  if (warp < mine) {
    column_extremes<DTYPE>(column, kMask, least, most);
    const int32_t low0 = key_16(least), low1 = key_16(least >> 16), high0 = key_16(most), high1 = key_16(most >> 16);
    const int32_t low = __reduce_min_sync(kAllLanes, low0 < low1 ? low0 : low1);
    const int32_t high = __reduce_max_sync(kAllLanes, high0 > high1 ? high0 : high1);
    if (lane < ranks) {
      FewShared* const other = in_rank(&few, lane);
      other->low[index] = low;
      other->high[index] = high;
    }
  }
  cluster_sync();
  int32_t low_key = few.low[lane < count ? lane : 0], high_key = few.high[lane < count ? lane : 0];
  if (lane + kWarp < count) {
    const int32_t low = few.low[lane + kWarp], high = few.high[lane + kWarp];
    low_key = low < low_key ? low : low_key;
    high_key = high > high_key ? high : high_key;
  }
  low_key = __reduce_min_sync(kAllLanes, low_key);
  high_key = __reduce_max_sync(kAllLanes, high_key);
  if (low_key <= key_16(kInfinity | 0x8000u) || high_key >= key_16(kInfinity) || low_key == high_key) return false;

  float bound = 0.0f;
  uint32_t param = 0;
  if constexpr (kQuantised) {
    const float low = widen<DTYPE>(value_of_key_16(low_key)), high = widen<DTYPE>(value_of_key_16(high_key));
    bound = page_bound(segment.bound_kind, segment.bound, low, high);
    if (!(bound > 0.0f)) return false;
    const float inverse = inverse_step(step_of<DTYPE>(KVZ_PLAIN, 0, bound));
    if (!quantisable<DTYPE>(low, high, bound, inverse)) return false;
  } else {
    param = exponent_of<DTYPE>(static_cast<uint32_t>(high_key));
  }
  Coder coder = [&] {
    if constexpr (kQuantised) {
      return FixedCoder<DTYPE>(bound, lane);
    } else {
      return LosslessCoder<DTYPE>(param);
    }
  }();

  // And how many words each has.
  uint8_t* const classes = input + each * kStripBytes;
  uint8_t* const words_at = classes + each * kStripClassBytes;
  uint32_t c = 0, words = 0;
  if (warp < mine) {
    bool bad = false;
    c = coder.classes(index, column, least, most, bad);
    store_classes<Coder>(classes, each * kStripChannels, warp * kStripChannels + lane * 2, c);
    words = coder.begin(c);
    const uint32_t all = __reduce_add_sync(kAllLanes, words);
    if (lane < ranks) in_rank(&few, lane)->words[index] = all;
  }
  cluster_sync();
  const Prefix prefix = prefix_of(few.words, count, lane);
  const uint32_t size = class_bytes + 2 * prefix.total;
  if (kQuantised ? static_cast<uint64_t>(size) * 8 > static_cast<uint64_t>(raw_bytes) * 5 : size >= raw_bytes) {
    return false;
  }

  // Bytes of a page that the words of a CTA's strips take, from `start` on. A unit that two CTAs have words of is the
  // first one's; shared memory begins with the unit that `start` is in.
  const auto start_of = [&](uint32_t r) {
    const uint32_t strip = r * each < count ? r * each : count;
    return class_bytes + 2 * words_before(prefix, strip, lane);
  };
  const uint32_t start = start_of(rank), end = start_of(rank + 1), unit = start / 16;
  if (warp == each) {
    if (end > start && end == size && lane < 8) {  // zeros behind the last word
      const uint32_t at = size + lane * 2;
      if (at < (size + 15) / 16 * 16) *reinterpret_cast<uint16_t*>(words_at + (at - unit * 16)) = 0;
    }
    place_few(p, few, rank, b, s,
              make_entry(segment, size, static_cast<uint8_t>(Coder::kCoding), bound, param, KVZ_AS_ASKED), lane);
  } else if (warp < mine) {
    const uint32_t before = words_before(prefix, index, lane) + inclusive_sum(words, lane) - words;
    uint32_t a[16];
    coder.planes(index, c, column, a);
    coder.store(reinterpret_cast<uint16_t*>(words_at + (class_bytes + 2 * before - unit * 16)), a);
  }
  __syncthreads();
  if (warp == 0 && start % 16 != 0 && end > start) {
    uint32_t owner = rank, owner_start = start;
    do {
      owner_start = start_of(--owner);
    } while (owner_start > unit * 16);
    const uint32_t at = start + lane * 2;
    if (at < unit * 16 + 16 && (at < end || end == size)) {
      *reinterpret_cast<uint16_t*>(in_rank(words_at, owner) + (at - owner_start / 16 * 16)) =
          at < end ? *reinterpret_cast<const uint16_t*>(words_at + (at - unit * 16)) : static_cast<uint16_t>(0);
    }
  }
  cluster_sync();
  if (warp < each) {
    const uint32_t own = (start + 15) / 16, units = (end + 15) / 16 - own;
    carry(p, few, own, units, warp, each, lane,
          [&](uint32_t i) { return reinterpret_cast<const uint4*>(words_at)[own - unit + i]; });
  } else {
    const uint32_t units = mine * (kStripChannels / 2 / 16);
    for (uint32_t part = 0; part < class_bytes / (groups / 2); ++part) {
      carry(p, few, part * (groups / 2 / 16) + first * (kStripChannels / 2 / 16), units, 0, 1, lane,
            [&](uint32_t i) { return reinterpret_cast<const uint4*>(classes + part * each * kStripChannels / 2)[i]; });
    }
  }
  end_few(p, few, b);
  return true;
}

template <int DTYPE>
KVZ_DEV void encode_few(const FewStore& p, uint8_t* memory) {
  FewShared& few = *reinterpret_cast<FewShared*>(memory);
  uint8_t* const input = memory + kFewSharedBytes;
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x), rank = cluster_rank();
  const uint32_t page = blockIdx.x / cluster_ctas(), b = page / p.general.num_segments;
  const uint32_t s = page - b * p.general.num_segments;
  const kvz_segment segment = p.general.segments[s];
  const Strips strips = strips_of(segment, p.block_ids[b]);
  const uint32_t index = rank * p.strips + warp;
  if (warp < p.strips && index < strips.count) {
    fetch_strips(strips, input - rank * p.strips * kStripBytes, index, kFewStrips, lane);
  }
  load_row_tables(few.row);
  if (threadIdx.x == 0) few.crc = 0;
  cluster_arrive();
  copy_async_wait();
  cluster_wait();  // all CTAs have started: their shared memory can be written to
  const bool lossy = segment.coding != KVZ_LOSSLESS && segment.bound_kind != KVZ_BOUND_LOSSLESS;
  bool encoded = false;
  if (segment.coding == KVZ_FIXED && lossy) {
    encoded = encode_few_of<DTYPE, kFixedByPage>(p, few, input, segment, strips, rank, b, s);
  } else if (segment.coding != KVZ_RAW && !lossy) {
    encoded = encode_few_of<DTYPE, kLossless>(p, few, input, segment, strips, rank, b, s);
  }
  if (!encoded) encode_few_any<DTYPE>(p, few, input, rank, b, s);
}

// ---- in
// ---------------------------------------------------------------------------------------------------------------

struct FewLoad {
  DecodeParams general;                // without what follows: table, numbers of blocks, payloads and their sizes
  uint32_t* ends;                      // of each block, in mapped host memory: the launch that has ended
  uint64_t* ready;                     // of each block: the launch that may decode it, or knows that it is bad
  uint32_t* scratch;                   // two words a block, zero before a launch and after it: checksum, parts done
  uint32_t launch;                     // not 0
  uint32_t parts;                      // CTAs that decode a page
  uint32_t most_pieces;                // of a payload
  uint32_t expected[kFewBlocks];       // checksums, counted from the start of the payload
  uint64_t from[kFewBlocks];           // payloads in mapped host memory
  uint64_t to[kFewBlocks];             // and in the arena
  uint64_t payload_bytes[kFewBlocks];  // multiples of 16
  int64_t block_ids[kFewBlocks];
  kvz_entry table[kFewPages];
};
constexpr uint32_t kFetchThreads = 128;
constexpr uint32_t kFewPieceRows = 4;  // of a warp, all in flight at once
constexpr uint32_t kFewPieceUnits = kFewPieceRows * kRowUnits;
// Units of a payload's first line that are before it: rows begin where lines do, as in `carry`.
KVZ_HD constexpr uint32_t few_skew(uint64_t from) { return static_cast<uint32_t>(from / 16 % kLineUnits); }
KVZ_HD constexpr uint32_t few_pieces(uint64_t payload_bytes, uint64_t from) {
  return static_cast<uint32_t>((few_skew(from) + payload_bytes / 16 + kFewPieceUnits - 1) / kFewPieceUnits);
}

KVZ_DEV DecodeParams decode_params(const FewLoad& p, const uint64_t* payloads) {
  DecodeParams q = p.general;
  q.payloads = payloads;
  q.payload_bytes = p.payload_bytes;
  q.block_ids = p.block_ids;
  q.table = p.table;
  return q;
}

// A part of a block's work is done, a piece or a page; the last one lets it be decoded. By one warp.
KVZ_DEV void end_part(const FewLoad& p, uint32_t b, uint32_t crc, uint32_t lane) {
  __syncwarp();
  if (lane != 0) return;
  uint32_t* const scratch = p.scratch + 2 * b;
  if (crc != 0) atomicXor(&scratch[0], crc);
  __threadfence();
  const uint32_t parts = few_pieces(p.payload_bytes[b], p.from[b]) + p.general.num_segments;
  if (atomicAdd(&scratch[1], 1u) + 1 != parts) return;
  __threadfence();
  scratch[1] = 0;
  if (atomicExch(&scratch[0], 0u) != p.expected[b]) p.general.bad[b] = 1;
  __threadfence();
  store_relaxed(p.ready + b, p.launch);
}

// A piece of a payload from the host to the arena. By one warp.
KVZ_DEV void fetch_piece(const FewLoad& p, uint32_t b, uint32_t piece, const uint32_t (&row)[4][256], uint32_t lane) {
  if (piece >= few_pieces(p.payload_bytes[b], p.from[b])) return;
  const uint32_t units = static_cast<uint32_t>(p.payload_bytes[b] / 16);
  const uint32_t first = piece * kFewPieceUnits - few_skew(p.from[b]);  // below 0 it is a large number
  const uint4* const from = reinterpret_cast<const uint4*>(p.from[b]);
  uint4* const to = reinterpret_cast<uint4*>(p.to[b]);
  uint4 v[kFewPieceRows];
#pragma unroll
  for (uint32_t r = 0; r < kFewPieceRows; ++r) {
    const uint32_t i = first + r * kRowUnits + lane;
    v[r].x = v[r].y = v[r].z = v[r].w = 0;
    if (i < units) v[r] = from[i];
  }
  uint4 sum;
  sum.x = sum.y = sum.z = sum.w = 0;
#pragma unroll
  for (uint32_t r = 0; r < kFewPieceRows; ++r) {
    const uint32_t i = first + r * kRowUnits + lane;
    if (i < units) to[i] = v[r];
    add_row(sum, v[r], row);
  }
  end_part(p, b, product_once(sum_of_rows(sum, lane), shift_back_units(first + kFewPieceUnits)), lane);
}

// Classes and bases of a page from the host, all at once: validation reads them one after the other. By one warp.
KVZ_DEV Copies copy_head(const FewLoad& p, uint32_t page, uint4* to, uint32_t lane) {
  const uint32_t b = page / p.general.num_segments;
  const kvz_entry entry = p.table[page];
  const kvz_segment& segment = p.general.segments[page - b * p.general.num_segments];
  const uint32_t units = units_of(entry.size),
                 classes = (segment.tokens / 16 * segment.heads * segment.head_dim + 15) / 16;
  if (units == 0 || entry.offset + static_cast<uint64_t>(units) > p.payload_bytes[b] / 16) return {nullptr, nullptr};
  const uint32_t head = units < classes ? units : classes;  // a class or a base takes no more than a byte a group
  const uint4* const from = reinterpret_cast<const uint4*>(p.from[b]) + entry.offset;
  for (uint32_t first = 0; first <= head; first += 4 * kWarp) {
    uint4 v[4];
#pragma unroll
    for (uint32_t r = 0; r < 4; ++r) {
      const uint32_t i = first + r * kWarp + lane;
      if (i <= head) v[r] = from[i < head ? i : units - 1];
    }
#pragma unroll
    for (uint32_t r = 0; r < 4; ++r) {
      const uint32_t i = first + r * kWarp + lane;
      if (i <= head) to[i] = v[r];
    }
  }
  __syncwarp();
  return {reinterpret_cast<const uint8_t*>(to), reinterpret_cast<const uint8_t*>(to + head)};
}

// Everything that comes before decoding. What takes the link's latency several times comes first.
struct FetchShared {
  uint32_t row[4][256];
  uint4 head[kFetchThreads / kWarp][kFewStrips * kStripChannels / 16 + 1];
};
KVZ_DEV void fetch_few(const FewLoad& p, FetchShared& shared) {
  load_row_tables(shared.row);
  __syncthreads();
  const uint32_t lane = lane_of(threadIdx.x), warps = blockDim.x / kWarp;
  const uint32_t pages = p.general.num_blocks * p.general.num_segments;
  const uint32_t work = pages + p.general.num_blocks * p.most_pieces;
  const DecodeParams q = decode_params(p, p.from);
  for (uint32_t id = blockIdx.x * warps + warp_of(threadIdx.x); id < work; id += gridDim.x * warps) {
    if (id < pages) {
      uint4* const head = shared.head[warp_of(threadIdx.x)];
      validate_pages(q, id, lane, copy_head(p, id, head, lane));
      end_part(p, id / p.general.num_segments, 0, lane);
    } else {
      fetch_piece(p, (id - pages) / p.most_pieces, (id - pages) % p.most_pieces, shared.row, lane);
    }
  }
}

// A CTA's part of a page.
template <int DTYPE>
KVZ_DEV void decode_few(const FewLoad& p, uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* const room = memory + kSharedBytes;
  const uint32_t page = blockIdx.x / p.parts, part = blockIdx.x - page * p.parts, b = page / p.general.num_segments;
  const kvz_segment segment = p.general.segments[page - b * p.general.num_segments];
  const kvz_entry entry = p.table[page];
  const uint32_t bytes = units_of(entry.size) * 16;
  uint8_t* const from = reinterpret_cast<uint8_t*>(p.to[b]) + static_cast<uint64_t>(entry.offset) * 16;
  // The kernel before has begun, in all its CTAs, so that this ends; its own end would come a microsecond later.
  if (threadIdx.x == 0) {
    while (load_relaxed(p.ready + b) != p.launch) relax();
    __threadfence();
  }
  __syncthreads();
  if (p.general.bad[b] == 0) {
    if (entry.coding >= KVZ_FIXED && bytes <= p.general.room_bytes) {
      for (uint32_t i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) copy_async_16(room + i, from + i);
      copy_async_wait();
      __syncthreads();
      decode_strips<DTYPE, KVZ_STEPS_PAGE, false>(shared, nullptr, segment, strips_of(segment, p.block_ids[b]), entry,
                                                  room, part, p.parts);
    } else if (entry.coding < KVZ_FIXED && part == 0) {
      const Geometry g = geometry_of(segment, p.block_ids[b]);
      if (entry.coding == KVZ_RAW) {
        copy_page<true>(g, from);
      } else {
        fill_page(g, *reinterpret_cast<const uint32_t*>(from));
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = atomicAdd(&p.general.counters->done, 1u) + 1u == gridDim.x;
  }
  __syncthreads();
  if (!shared.last) return;
  for (uint32_t i = threadIdx.x; i < p.general.num_blocks; i += blockDim.x) {
    if (atomicExch(&p.general.bad[i], 0u) != 0) {
      p.general.block_status[i] = KVZ_CORRUPT;  // else it is KVZ_OK since before the launch
      __threadfence_system();
    }
    tell_host(p.ends + i, p.launch);
  }
  if (threadIdx.x == 0) p.general.counters->done = p.general.counters->any_bad = 0;
  wait_for_previous_kernel();  // whoever comes behind this kernel comes behind both
}

}  // namespace gpu
}  // namespace kvz
