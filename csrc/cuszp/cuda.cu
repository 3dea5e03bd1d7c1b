// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The CUDA codec behind kvz.h: the choice between kernels, and their launch. The kernels themselves are in cuda_*.cu,
// which compile side by side; what they share, and the code that runs on the device, is in headers and *.inl.
#include <atomic>

#include "cuda_decode_rice_fast.inl"
#include "cuda_decode_strips.inl"
#include "cuda_encode_rice_fast.inl"
#include "cuda_encode_strips.inl"
#include "cuda_kernels.h"
#include "cuda_swap.inl"
#include "cuda_transport.inl"
#include "cuda_validate.inl"

namespace kvz {
namespace gpu {
namespace {

constexpr uint32_t kCheckThreads = 256;

__global__ void __launch_bounds__(kCheckThreads, 3)
    check_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ CrcParams c) {
  let_next_kernel_start();
  check(p, c);
}
__global__ void __launch_bounds__(kCheckThreads) crc_kernel(const __grid_constant__ CrcParams c) {
  wait_for_previous_kernel();
  checksum(c);
}

// ---- the device
// -------------------------------------------------------------------------------------------------------

constexpr int kMaxDevices = 64;

const void* function_of(Kernel kernel) {
  switch (kernel) {
    case kEncodeBf16:
    case kEncodeFp16:
      return encode_fast_function(kernel);
    case kEncodeWithinBf16:
    case kEncodeWithinFp16:
      return encode_within_function(kernel);
    case kDecodeBf16:
    case kDecodeFp16:
      return decode_fast_function(kernel);
    case kDecodeWithinBf16:
    case kDecodeWithinFp16:
      return decode_within_function(kernel);
    case kEncodeRice:
      return encode_rice_function();
    case kEncodeRiceBf16:
    case kEncodeRiceBf16Two:
    case kEncodeRiceFp16:
    case kEncodeRiceFp16Two:
      return encode_rice_fast_function(kernel);
    case kDecodeRice:
      return decode_rice_function();
    case kDecodeRiceBf16:
    case kDecodeRiceFp16:
      return decode_rice_fast_function(kernel);
    default:
      return general_function(kernel);
  }
}

// What is asked of a device once. Two threads may ask at a time; both get the same answers.
struct Device {
  std::atomic<int> multiprocessors{0};
  std::atomic<int> shared_bytes{0};
  std::atomic<bool> overlaps{false};  // a kernel may start while the one before it ends
  std::atomic<bool> prepared[kKernels];
  // CTAs of a kernel that fit on a multiprocessor, of the launch shape asked for last: threads << 40 | shared bytes <<
  // 8 | CTAs.
  std::atomic<uint64_t> resident[kKernels];
};
Device g_devices[kMaxDevices];

cudaError_t current_device(Device*& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index < 0 || index >= kMaxDevices) return cudaErrorInvalidDevice;
  device = &g_devices[index];
  if (device->multiprocessors.load(std::memory_order_acquire) != 0) return cudaSuccess;
  int multiprocessors = 0, shared_bytes = 0, major = 0;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error != cudaSuccess) return error;
  device->shared_bytes.store(shared_bytes, std::memory_order_relaxed);
  device->overlaps.store(major >= 9, std::memory_order_relaxed);
  device->multiprocessors.store(multiprocessors, std::memory_order_release);
  return cudaSuccess;
}

// CTAs of this shape that the whole device holds at a time.
cudaError_t resident_ctas(Device& device, Kernel kernel, uint32_t threads, uint32_t shared_bytes, uint32_t& ctas) {
  const void* function = function_of(kernel);
  if (!device.prepared[kernel].load(std::memory_order_acquire)) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, function);
    if (error != cudaSuccess) return error;
    const int most = device.shared_bytes.load(std::memory_order_relaxed) - static_cast<int>(attributes.sharedSizeBytes);
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
    device.prepared[kernel].store(true, std::memory_order_release);
  }
  const uint64_t shape = static_cast<uint64_t>(threads) << 40 | static_cast<uint64_t>(shared_bytes) << 8;
  uint64_t known = device.resident[kernel].load(std::memory_order_relaxed);
  if ((known & ~255ull) != shape) {
    int fit = 0;
    const cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, function, static_cast<int>(threads), shared_bytes);
    if (error != cudaSuccess) return error;
    if (fit < 1) return cudaErrorInvalidConfiguration;
    known = shape | static_cast<uint64_t>(fit);
    device.resident[kernel].store(known, std::memory_order_relaxed);
  }
  ctas = static_cast<uint32_t>(known & 255u) *
         static_cast<uint32_t>(device.multiprocessors.load(std::memory_order_relaxed));
  return cudaSuccess;
}

// Launch a kernel; with `overlap` it may start before the kernel before it has ended, and waits for that one itself.
cudaError_t launch(const Device& device, const void* function, uint32_t ctas, uint32_t threads, uint32_t shared_bytes,
                   void** parameters, cudaStream_t stream, bool overlap) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (overlap && device.overlaps.load(std::memory_order_relaxed)) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelExC(&config, function, parameters);
}

// CTAs for so many warps' worth of checksums and validation.
uint32_t check_ctas(const Device& device, uint64_t warps, uint32_t max_ctas) {
  const uint64_t most = max_ctas != 0 ? max_ctas : device.multiprocessors.load(std::memory_order_relaxed) * 8ull;
  const uint64_t needed = (warps + kCheckThreads / kWarp - 1) / (kCheckThreads / kWarp);
  return static_cast<uint32_t>(needed < most ? needed : most);
}

// Pieces of a payload of so many bytes, at least 1.
uint32_t pieces_of(uint64_t payload_bytes) {
  return payload_bytes == 0 ? 1 : static_cast<uint32_t>((payload_bytes + kPieceBytes - 1) / kPieceBytes);
}

cudaError_t launch_crc(const Device& device, CrcParams p, uint32_t max_ctas, cudaStream_t stream, bool overlap) {
  void* parameters[] = {&p};
  return launch(device, reinterpret_cast<const void*>(crc_kernel),
                check_ctas(device, static_cast<uint64_t>(p.count) * p.most_pieces, max_ctas), kCheckThreads, 0,
                parameters, stream, overlap);
}

// ---- arguments
// --------------------------------------------------------------------------------------------------------

constexpr uint32_t kTeamWarps = 8;           // of the teams of a CTA, where one page does not need more
constexpr uint32_t kClearedInKernel = 8192;  // pages; more states are cleared by a memset behind the kernel
constexpr uint64_t kMaxPages = 1u << 30;
constexpr uint32_t kMostVectors = 16384;  // tokens x heads of a page with a bound for each

uint32_t least(uint64_t a, uint64_t b) { return static_cast<uint32_t>(a < b ? a : b); }

uint64_t round_up(uint64_t v, uint64_t to) { return (v + to - 1) / to * to; }

bool aligned(const void* p, uint64_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

// What the segments of a batch need.
struct Shape {
  bool fast = true;
  uint8_t dtype = KVZ_BF16;
  bool within = false;       // bounds differ within pages
  uint32_t strips = 0;       // of the largest page
  uint32_t vectors = 0;      // most tokens x heads of a page
  uint32_t token_bytes = 0;  // most that a page with bounds by token needs beside its strips
};

uint64_t item_bytes(uint8_t dtype) { return dtype == KVZ_FP32 ? 4 : dtype == KVZ_OPAQUE ? 1 : 2; }

bool valid_for_device(const kvz_segment& s) {
  if (kvz_max_segment_bytes(&s) == 0 || s.base == 0) return false;
  const uint64_t item = item_bytes(s.dtype);
  uint64_t all = s.base | static_cast<uint64_t>(s.block_stride);
  if (s.tokens > 1) all |= static_cast<uint64_t>(s.token_stride);
  if (s.heads > 1) all |= static_cast<uint64_t>(s.head_stride);
  return all % item == 0;
}

bool needs_rice(const kvz_segment& s) { return s.coding == KVZ_RICE || s.coding == KVZ_LOSSLESS_RICE; }

// Tokens x heads of a page with a bound for each, else 0.
uint64_t vectors_of(const kvz_segment& s) {
  return s.bound_kind == KVZ_BOUND_TOKEN_RMS ? static_cast<uint64_t>(s.tokens) * s.heads : 0;
}

bool valid_for_encode(const kvz_segment& s) {
  if (s.coding > KVZ_LOSSLESS_RICE || s.coding == KVZ_CONSTANT || s.bound_kind > KVZ_BOUND_CHANNEL_TABLE) return false;
  if (s.coding == KVZ_RAW || s.coding == KVZ_LOSSLESS || s.coding == KVZ_LOSSLESS_RICE) return true;
  if (s.bound_kind == KVZ_BOUND_LOSSLESS) return true;
  if (s.bound_kind == KVZ_BOUND_CHANNEL_TABLE) return s.channel_bounds != 0;
  if (vectors_of(s) > (s.coding == KVZ_RICE ? kRiceVectors : kMostVectors)) return false;
  return s.bound > 0.0 && s.bound <= 1.7976931348623157e308;
}

Shape shape_of(const kvz_segment* segments, uint32_t count, uint32_t most_strips) {
  Shape shape;
  shape.dtype = segments[0].dtype;
  for (uint32_t i = 0; i < count && shape.fast; ++i) {
    const kvz_segment& s = segments[i];
    const uint64_t strips = strips_of_page(s);
    shape.fast = s.dtype == shape.dtype && strips != 0 && strips <= most_strips;
    if (!shape.fast) break;
    shape.within = shape.within || s.bound_kind > KVZ_BOUND_RELATIVE;
    const uint32_t bytes =
        vectors_of(s) != 0 ? token_memory_bytes(s.tokens, s.heads, s.head_dim, static_cast<uint32_t>(strips)) : 0;
    if (strips > shape.strips) shape.strips = static_cast<uint32_t>(strips);
    if (s.tokens * s.heads > shape.vectors) shape.vectors = s.tokens * s.heads;
    if (bytes > shape.token_bytes) shape.token_bytes = bytes;
  }
  return shape;
}

// What the segments of a batch need of the Rice kernels.
struct RiceShape {
  bool any = false, all = true;  // segments of the Rice codings; raw ones go with them
  uint32_t warps = 1, value_bits = 16, vectors = 0;
  uint64_t strips = 1;         // of the largest page
  bool decodes_fast = true;    // all are as the fast decoder wants them
  bool encodes_fast = true;    // all but the raw ones are as the fast encoder wants them
  uint8_t dtype = KVZ_OPAQUE;  // theirs
  uint32_t coded_strips = 1;   // of the largest of them
  uint32_t token_vectors = 0;  // and in 16 tokens of a head each

  RiceShape(const kvz_segment* segments, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
      const kvz_segment& s = segments[i];
      const uint64_t across = 16u / s.group_tokens, channels = static_cast<uint64_t>(s.heads) * s.head_dim;
      const uint64_t rows = (s.tokens + s.group_tokens - 1ull) / s.group_tokens;
      const uint64_t own = rice_strips(rows, (channels + across - 1) / across);
      any = any || needs_rice(s);
      all = all && (needs_rice(s) || s.coding == KVZ_RAW);
      if (own > strips) strips = own;
      if (s.dtype == KVZ_FP32) value_bits = 32;
      const uint64_t needed = vectors_of(s);
      if (needed > vectors && needed <= kRiceVectors) vectors = static_cast<uint32_t>(needed);
      decodes_fast = decodes_fast && s.dtype == segments[0].dtype && rice_is_fast(s);
      if (s.coding == KVZ_RAW) continue;
      if (dtype == KVZ_OPAQUE) dtype = s.dtype;
      encodes_fast = encodes_fast && s.dtype == dtype && rice_encodes_fast(s);
      if (own > coded_strips) coded_strips = static_cast<uint32_t>(least(own, kRiceFastStrips));
      if (encodes_fast && needed > 16 * token_vectors) token_vectors = static_cast<uint32_t>(needed / 16);
    }
    warps = static_cast<uint32_t>(strips < kRiceWarps ? strips : kRiceWarps);
  }
};

// Two strips a warp where a page has many: several CTAs fit on a multiprocessor.
bool two_strips(uint64_t strips, uint32_t asked) {
  return strips > kRiceFastWarps || (asked == 0 ? strips > kRiceFastWarps / 2 : asked > 1);
}

// Warps of a page in the decoder of the Rice codings. With many pages there are three CTAs on a multiprocessor, so that
// one loads while others decode; with few, all warps that it holds share one.
uint32_t rice_decode_warps(uint32_t strips, uint32_t strips_per_warp, bool many) {
  const uint32_t most = many ? kRiceFastWarps / 2 : kRiceFastWarps;
  const uint32_t rounds = strips_per_warp != 0 ? strips_per_warp : (strips + most - 1) / most;
  const uint32_t warps = (strips + rounds - 1) / rounds;
  return warps < kRiceFastWarps ? warps : kRiceFastWarps;
}

// Strips of the largest page that fits into so much shared memory when encoding.
uint32_t most_strips_for(uint32_t room) {
  uint32_t strips = 0;
  while (strips < kMaxStrips && kTileSharedBytes + fast_encode_bytes(strips + 1) <= room) ++strips;
  return strips;
}

// Four strips a warp share what a warp does once a page, and leave several CTAs on a multiprocessor; large pages take
// more.
uint32_t warps_for(uint32_t strips, uint32_t strips_per_warp) {
  if (strips_per_warp == 0) strips_per_warp = kBatch;
  const uint32_t warps = (strips + strips_per_warp - 1) / strips_per_warp;
  return warps < kMaxWarps ? warps : kMaxWarps;
}

// Warps of an encoder's page that has a CTA to itself: where shared memory holds few of these, as many as registers
// hold, in even rounds.
uint32_t encoder_warps(uint32_t warps, uint32_t strips, uint32_t shared_bytes, uint32_t room) {
  constexpr uint32_t kReserved = 1024, kResident = kMaxWarps + 3;  // of shared memory, for each CTA; its launch bounds
  const uint32_t ctas = (room + kReserved) / (shared_bytes + kReserved);
  if (ctas == 0 || kResident / ctas <= warps + 1) return warps;
  const uint32_t most = least(kResident / ctas - 1, kMaxWarps), rounds = (strips + most - 1) / most;
  return (strips + rounds - 1) / rounds;
}

// Workspace: counters, then block states and sums, then tile states, then two words a block for checksums.
uint64_t counters_bytes() { return round_up(sizeof(Counters), 64); }
uint64_t crc_bytes(uint64_t num_blocks) { return round_up(num_blocks * 2 * sizeof(uint32_t), 64); }
uint64_t states_bytes(uint64_t num_segments, uint64_t num_blocks) {
  return round_up(2 * num_blocks * sizeof(uint64_t), 64) + round_up(num_segments * num_blocks * sizeof(uint64_t), 64);
}

// No valid payload is larger: every group raw, with a class, a base and scales that an encoder would not spend on it.
uint64_t largest_payload(const kvz_segment* segments, uint32_t num_segments) {
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < num_segments; ++i) {
    const kvz_segment& s = segments[i];
    const uint64_t rows = (static_cast<uint64_t>(s.tokens) + s.group_tokens - 1) / s.group_tokens;
    const uint64_t columns = (static_cast<uint64_t>(s.heads) * s.head_dim * s.group_tokens + 15) / 16;
    bytes += rows * columns * (16 * item_bytes(s.dtype) + 2) + static_cast<uint64_t>(s.tokens) * s.heads + 32;
  }
  return bytes;
}

int32_t check_batch(const kvz_segment* segments, const kvz_segment* device_segments, uint32_t num_segments,
                    uint32_t num_blocks, const void* workspace, uint64_t workspace_bytes) {
  if (segments == nullptr || device_segments == nullptr || num_segments == 0 || num_segments > 65536)
    return KVZ_INVALID_ARGUMENT;
  if (static_cast<uint64_t>(num_segments) * num_blocks > kMaxPages) return KVZ_INVALID_ARGUMENT;
  if (workspace == nullptr || !aligned(workspace, 16)) return KVZ_INVALID_ARGUMENT;
  if (workspace_bytes < kvz_cuda_workspace_bytes(num_segments, num_blocks)) return KVZ_OUT_OF_SPACE;
  for (uint32_t i = 0; i < num_segments; ++i) {
    if (!valid_for_device(segments[i])) return KVZ_INVALID_ARGUMENT;
  }
  return KVZ_OK;
}

}  // namespace
}  // namespace gpu
}  // namespace kvz

using namespace kvz;
using namespace kvz::gpu;

extern "C" {

uint64_t kvz_cuda_workspace_bytes(uint32_t num_segments, uint32_t num_blocks) {
  return counters_bytes() + states_bytes(num_segments, num_blocks) + crc_bytes(num_blocks);
}

uint64_t kvz_cuda_arena_bytes(const kvz_segment* segments, uint32_t num_segments, uint32_t num_blocks,
                              uint32_t header_bytes) {
  if (segments == nullptr) return 0;
  uint64_t payload = 0;
  for (uint32_t i = 0; i < num_segments; ++i) {
    const uint64_t bytes = kvz_max_segment_bytes(segments + i);
    if (bytes == 0) return 0;
    payload += bytes;
  }
  return round_up(round_up(header_bytes, 16) + payload, kRecordUnits * 16) * num_blocks;
}

int32_t kvz_cuda_encode(const kvz_cuda_encode_args* args, void* stream) {
  if (args == nullptr || args->reserved != 0) return KVZ_INVALID_ARGUMENT;
  const kvz_cuda_encode_args& a = *args;
  const int32_t status =
      check_batch(a.segments, a.device_segments, a.num_segments, a.num_blocks, a.workspace, a.workspace_bytes);
  if (status != KVZ_OK) return status;
  uint64_t worst = 0;
  for (uint32_t i = 0; i < a.num_segments; ++i) {
    if (!valid_for_encode(a.segments[i])) return KVZ_INVALID_ARGUMENT;
    worst += kvz_max_segment_bytes(a.segments + i);
  }
  if (worst / KVZ_ALIGNMENT > 0xffffffffu) return KVZ_INVALID_ARGUMENT;
  if (a.num_blocks == 0) return KVZ_OK;
  if (a.block_ids == nullptr || a.arena == nullptr || a.table == nullptr || a.payload_bytes == nullptr ||
      a.record_offsets == nullptr) {
    return KVZ_INVALID_ARGUMENT;
  }
  if (!aligned(a.arena, 16) || !aligned(a.table, 16) || a.record_stride % (kRecordUnits * 16) != 0)
    return KVZ_INVALID_ARGUMENT;

  Device* device = nullptr;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return status_of(error);
  const uint32_t room = static_cast<uint32_t>(device->shared_bytes.load(std::memory_order_relaxed));
  const uint32_t most_strips = most_strips_for(room);
  Shape shape = shape_of(a.segments, a.num_segments, most_strips);
  shape.fast = shape.fast && kTileSharedBytes + fast_encode_bytes(shape.strips) + shape.token_bytes <= room;
  const uint32_t pages = a.num_segments * a.num_blocks;

  EncodeParams p = {};
  p.segments = a.device_segments;
  p.block_ids = a.block_ids;
  p.arena = a.arena;
  p.table = a.table;
  p.payload_bytes = a.payload_bytes;
  p.record_offsets = a.record_offsets;
  p.status = a.status;
  uint8_t* const workspace = static_cast<uint8_t*>(a.workspace);
  p.counters = reinterpret_cast<Counters*>(workspace);
  p.block_state = reinterpret_cast<uint64_t*>(workspace + counters_bytes());
  p.block_sum = p.block_state + a.num_blocks;
  p.tile_state = reinterpret_cast<uint64_t*>(workspace + counters_bytes() + round_up(a.num_blocks * 16ull, 64));
  p.arena_units = a.arena_bytes / 16;
  p.stride_units = a.record_stride / 16;
  p.header_units = static_cast<uint32_t>((static_cast<uint64_t>(a.header_bytes) + 15) / 16);
  p.num_segments = a.num_segments;
  p.num_blocks = a.num_blocks;
  p.clear_states = pages <= kClearedInKernel;

  const RiceShape rice(a.segments, a.num_segments);
  if (rice.any && !rice.all) return KVZ_INVALID_ARGUMENT;
  const bool rice_fast = rice.any && rice.encodes_fast, two = two_strips(rice.coded_strips, a.strips_per_warp);
  const Kernel kernel = rice_fast                 ? (rice.dtype == KVZ_BF16 ? two ? kEncodeRiceBf16Two : kEncodeRiceBf16
                                                     : two                  ? kEncodeRiceFp16Two
                                                                            : kEncodeRiceFp16)
                        : rice.any                ? kEncodeRice
                        : !shape.fast             ? kEncodeGeneral
                        : shape.within            ? (shape.dtype == KVZ_BF16 ? kEncodeWithinBf16 : kEncodeWithinFp16)
                        : shape.dtype == KVZ_BF16 ? kEncodeBf16
                                                  : kEncodeFp16;
  p.tiles = a.num_segments;
  uint32_t threads = kGeneralThreads, shared_bytes = kSharedBytes;
  if (rice_fast) {
    p.team_bytes = rice.token_vectors;
    threads = (two ? (rice.coded_strips + 1) / 2 : rice.coded_strips) * kWarp;
    shared_bytes = rice_fast_bytes(rice.token_vectors, rice.coded_strips);
  } else if (rice.any) {
    p.team_bytes = rice.vectors * 4;
    p.teams = rice.warps;  // slots for codes: one a strip where they fit
    if (rice.strips <= kMaxStrips &&
        rice_shared_bytes(rice.warps, rice.value_bits, rice.vectors, static_cast<uint32_t>(rice.strips)) <= room) {
      p.teams = static_cast<uint32_t>(rice.strips);
    }
    threads = rice.warps * kWarp;
    shared_bytes = rice_shared_bytes(rice.warps, rice.value_bits, rice.vectors, p.teams);
  } else if (shape.fast) {
    // Small pages share a CTA, unless there are so few that they should rather have one each.
    const uint32_t multiprocessors = static_cast<uint32_t>(device->multiprocessors.load(std::memory_order_relaxed));
    p.team_warps = warps_for(shape.strips, a.strips_per_warp);
    p.teams = least(least(kMaxTeams, kTeamWarps / least(p.team_warps, kTeamWarps)),
                    least(a.num_segments, pages / (2 * multiprocessors) + 1));
    p.team_bytes = fast_encode_bytes(shape.strips) + shape.token_bytes;
    while (p.teams > 1 && kTileSharedBytes + p.teams * p.team_bytes > room / 3) --p.teams;
    p.tiles = (a.num_segments + p.teams - 1) / p.teams;
    shared_bytes = kTileSharedBytes + p.teams * p.team_bytes;
    if (p.teams == 1 && a.strips_per_warp == 0) {
      p.team_warps = encoder_warps(p.team_warps, shape.strips, shared_bytes, room);
    }
    threads = (p.teams * p.team_warps + 1) * kWarp;
  } else {
    uint64_t vectors = 0;
    for (uint32_t i = 0; i < a.num_segments; ++i) {
      const uint64_t own = a.segments[i].coding != KVZ_RAW ? vectors_of(a.segments[i]) : 0;
      if (own > vectors && own <= kMostVectors) vectors = own;
    }
    shared_bytes += static_cast<uint32_t>(vectors) * 4;
  }
  uint32_t ctas = 0;
  error = resident_ctas(*device, kernel, threads, shared_bytes, ctas);
  if (error != cudaSuccess) return status_of(error);
  ctas = least(ctas, p.tiles * a.num_blocks);
  if (a.max_ctas != 0) ctas = least(ctas, a.max_ctas);
  void* parameters[] = {&p};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  error = launch(*device, function_of(kernel), ctas, threads, shared_bytes, parameters, s, false);
  if (error == cudaSuccess && !p.clear_states) {
    error = cudaMemsetAsync(p.block_state, 0, states_bytes(a.num_segments, a.num_blocks), s);
  }
  if (error == cudaSuccess && a.crc32c != nullptr) {
    CrcParams c = {};
    c.base = a.arena;
    c.offsets = a.record_offsets;
    c.skip = p.header_units * 16ull;
    c.end = a.arena_bytes;
    c.payload_bytes = a.payload_bytes;
    c.crc32c = a.crc32c;
    c.scratch = reinterpret_cast<uint32_t*>(workspace + counters_bytes() + states_bytes(a.num_segments, a.num_blocks));
    c.count = a.num_blocks;
    c.most_pieces = pieces_of(worst);
    error = launch_crc(*device, c, a.max_ctas, s, p.clear_states != 0);
  }
  return status_of(error);
}

int32_t kvz_cuda_decode(const kvz_cuda_decode_args* args, void* stream) {
  if (args == nullptr || args->extended > (KVZ_EXTENDED_RICE | KVZ_EXTENDED_BOUNDS)) return KVZ_INVALID_ARGUMENT;
  const kvz_cuda_decode_args& a = *args;
  const int32_t status =
      check_batch(a.segments, a.device_segments, a.num_segments, a.num_blocks, a.workspace, a.workspace_bytes);
  if (status != KVZ_OK) return status;
  if (a.num_blocks == 0) return KVZ_OK;
  if (a.block_ids == nullptr || a.payloads == nullptr || a.payload_bytes == nullptr || a.table == nullptr)
    return KVZ_INVALID_ARGUMENT;
  if (!aligned(a.table, 16)) return KVZ_INVALID_ARGUMENT;

  Device* device = nullptr;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return status_of(error);
  const uint32_t room = static_cast<uint32_t>(device->shared_bytes.load(std::memory_order_relaxed));
  Shape shape = shape_of(a.segments, a.num_segments, kMaxStrips);
  shape.fast = shape.fast && fast_decode_bytes(shape.strips, shape.vectors) <= room;
  const uint32_t pages = a.num_segments * a.num_blocks;

  const uint32_t multiprocessors = static_cast<uint32_t>(device->multiprocessors.load(std::memory_order_relaxed));

  DecodeParams p = {};
  p.segments = a.device_segments;
  p.block_ids = a.block_ids;
  p.payloads = a.payloads;
  p.payload_bytes = a.payload_bytes;
  p.table = a.table;
  p.block_status = a.block_status;
  uint8_t* const workspace = static_cast<uint8_t*>(a.workspace);
  p.counters = reinterpret_cast<Counters*>(workspace);
  p.bad = reinterpret_cast<uint32_t*>(workspace + counters_bytes());
  p.num_segments = a.num_segments;
  p.num_blocks = a.num_blocks;
  p.all_or_nothing = a.all_or_nothing;
  p.room_bytes = decode_room_bytes(shape.strips, shape.vectors);
  p.validate_lanes = shape.fast && shape.strips <= 4 ? 8 : shape.fast && shape.strips <= 8 ? 16 : kWarp;

  p.extended = a.extended;
  Kernel kernel = !shape.fast ? kDecodeGeneral
                  : (a.extended & KVZ_EXTENDED_BOUNDS)
                      ? (shape.dtype == KVZ_BF16 ? kDecodeWithinBf16 : kDecodeWithinFp16)
                  : shape.dtype == KVZ_BF16 ? kDecodeBf16
                                            : kDecodeFp16;
  uint32_t threads = shape.fast ? warps_for(shape.strips, a.strips_per_warp) * kWarp : kGeneralThreads;
  uint32_t shared_bytes = shape.fast ? fast_decode_bytes(shape.strips, shape.vectors) : kSharedBytes;
  if (a.extended & KVZ_EXTENDED_RICE) {
    const RiceShape rice(a.segments, a.num_segments);
    if (rice.decodes_fast) {
      const uint32_t strips = static_cast<uint32_t>(rice.strips);
      kernel = shape.dtype == KVZ_BF16 ? kDecodeRiceBf16 : kDecodeRiceFp16;
      threads = rice_decode_warps(strips, a.strips_per_warp, pages > multiprocessors) * kWarp;
      shared_bytes = rice_fast_decode_bytes(strips);
      p.room_bytes = strips * 2048;
    } else {
      kernel = kDecodeRice;
      threads = rice.warps * kWarp;
      shared_bytes = rice_shared_bytes(rice.warps, rice.value_bits, 0, 0);
    }
    p.validate_lanes = kWarp;
  }
  uint32_t ctas = 0;
  error = resident_ctas(*device, kernel, threads, shared_bytes, ctas);
  if (error != cudaSuccess) return status_of(error);
  ctas = least(ctas, pages);
  if (a.max_ctas != 0) ctas = least(ctas, a.max_ctas);
  CrcParams c = {};
  c.offsets = a.payloads;
  c.end = ~0ull;
  c.payload_bytes = a.payload_bytes;
  c.expected = a.crc32c;
  c.bad = p.bad;
  c.any_bad = &p.counters->any_bad;
  c.scratch = reinterpret_cast<uint32_t*>(workspace + counters_bytes() + states_bytes(a.num_segments, a.num_blocks));
  c.count = a.num_blocks;
  c.most_pieces = pieces_of(largest_payload(a.segments, a.num_segments));
  const uint64_t pieces = a.crc32c == nullptr ? 0 : static_cast<uint64_t>(c.count) * c.most_pieces;
  void* check_parameters[] = {&p, &c};
  void* parameters[] = {&p};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  error = launch(*device, reinterpret_cast<const void*>(check_kernel),
                 check_ctas(*device, pieces + pages / (kWarp / p.validate_lanes) + 1, a.max_ctas), kCheckThreads, 0,
                 check_parameters, s, false);
  if (error == cudaSuccess) {
    error = launch(*device, function_of(kernel), ctas, threads, shared_bytes, parameters, s, true);
  }
  return status_of(error);
}

int32_t kvz_cuda_crc32c(const kvz_cuda_crc_args* args, void* stream) {
  if (args == nullptr || args->offsets == nullptr || args->payload_bytes == nullptr || args->crc32c == nullptr ||
      args->scratch == nullptr || args->check > 1) {
    return KVZ_INVALID_ARGUMENT;
  }
  if (args->count == 0) return KVZ_OK;
  Device* device = nullptr;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return status_of(error);
  CrcParams p = {};
  p.base = args->base;
  p.offsets = args->offsets;
  p.skip = args->skip;
  p.end = ~0ull;
  p.payload_bytes = args->payload_bytes;
  p.scratch = args->scratch;
  p.count = args->count;
  p.most_pieces = pieces_of(args->max_payload_bytes);
  if (args->check != 0) {
    p.expected = args->crc32c;
    p.clear_size = args->payload_bytes;  // the decoder's validation refuses an empty payload
  } else {
    p.crc32c = args->crc32c;
  }
  return status_of(launch_crc(*device, p, args->max_ctas, static_cast<cudaStream_t>(stream), false));
}

}  // extern "C"
