// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Kernels for few pages (cuda_few.inl), and their launch.
#include <atomic>

#include "cuda_few.h"
#include "cuda_few.inl"

namespace kvz {
namespace gpu {
namespace {

constexpr uint32_t kMostFetchCtas = 64;  // as many as keep the link busy
constexpr uint32_t kFewStorePages = 128;
constexpr uint32_t kSizesBytes = kFewStorePages * sizeof(uint64_t);
constexpr uint32_t kBadBytes = kFewBlocks * sizeof(uint32_t);
static_assert(kBadBytes + kFewBlocks * sizeof(uint64_t) <= kSizesBytes, "loads need no more than stores");
constexpr int kMaxDevices = 64;

extern __shared__ __align__(16) uint8_t g_shared[];

template <int DTYPE>
__global__ void __launch_bounds__((kFewStrips / kFewCtas + 1) * kWarp)
    encode_few_kernel(const __grid_constant__ FewStore p) {
  encode_few<DTYPE>(p, g_shared);
}
__global__ void __launch_bounds__(kFetchThreads) fetch_few_kernel(const __grid_constant__ FewLoad p) {
  __shared__ FetchShared shared;
  let_next_kernel_start();
  fetch_few(p, shared);
}
template <int DTYPE>
__global__ void __launch_bounds__(256) decode_few_kernel(const __grid_constant__ FewLoad p) {
  decode_few<DTYPE>(p, g_shared);
}

const void* encode_function(uint8_t dtype) {
  return dtype == KVZ_BF16 ? reinterpret_cast<const void*>(encode_few_kernel<KVZ_BF16>)
                           : reinterpret_cast<const void*>(encode_few_kernel<KVZ_FP16>);
}
const void* decode_function(uint8_t dtype) {
  return dtype == KVZ_BF16 ? reinterpret_cast<const void*>(decode_few_kernel<KVZ_BF16>)
                           : reinterpret_cast<const void*>(decode_few_kernel<KVZ_FP16>);
}

// What is asked of a device once; two threads that ask at a time get the same answers.
struct FewDevice {
  std::atomic<int> multiprocessors{0};
  std::atomic<uint32_t> shared_bytes{0};  // most of a CTA; 0 where there are no clusters
};
FewDevice g_few_devices[kMaxDevices];

cudaError_t prepare(int index, FewDevice*& device) {
  if (index < 0 || index >= kMaxDevices) return cudaErrorInvalidDevice;
  device = &g_few_devices[index];
  if (device->multiprocessors.load(std::memory_order_acquire) != 0) return cudaSuccess;
  int multiprocessors = 0, shared_bytes = 0, major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  for (uint8_t dtype : {KVZ_BF16, KVZ_FP16}) {
    for (const void* function : {encode_function(dtype), decode_function(dtype)}) {
      if (error == cudaSuccess && major >= 9)
        error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
  }
  if (error != cudaSuccess) return error;
  device->shared_bytes.store(major >= 9 ? static_cast<uint32_t>(shared_bytes) : 0, std::memory_order_relaxed);
  device->multiprocessors.store(multiprocessors, std::memory_order_release);
  return cudaSuccess;
}

uint32_t next_launch() {
  static std::atomic<uint32_t> last{0};
  uint32_t launch = 0;
  while (launch == 0) launch = last.fetch_add(1, std::memory_order_relaxed) + 1;
  return launch;
}

// Strips of the largest page; 0 where a page is not one for these kernels.
uint32_t strips_of_pages(const kvz_segment* segments, uint32_t count, bool encode) {
  uint64_t most = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const kvz_segment& s = segments[i];
    const uint64_t strips = strips_of_page(s);
    if (s.dtype != segments[0].dtype || strips == 0 || strips > kFewStrips || s.base == 0 ||
        kvz_max_segment_bytes(&s) == 0) {
      return 0;
    }
    if (encode) {
      const bool exact = s.coding == KVZ_RAW || s.coding == KVZ_LOSSLESS || s.bound_kind == KVZ_BOUND_LOSSLESS;
      const bool bounded = s.bound_kind <= KVZ_BOUND_RELATIVE && s.bound > 0.0 && s.bound <= 1.7976931348623157e308;
      if (s.coding != KVZ_RAW && s.coding != KVZ_FIXED && s.coding != KVZ_LOSSLESS) return 0;
      if (!(exact || bounded) || s.heads * s.head_dim % kStripChannels != 0) return 0;
    }
    if (strips > most) most = strips;
  }
  return static_cast<uint32_t>(most);
}

cudaError_t launch(const void* function, uint32_t ctas, uint32_t threads, uint32_t shared_bytes, void* parameters,
                   cudaStream_t stream, const cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute own = {};
  if (attribute != nullptr) {
    own = *attribute;
    config.attrs = &own;
    config.numAttrs = 1;
  }
  void* all[] = {parameters};
  return cudaLaunchKernelExC(&config, function, all);
}

uint32_t divided(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

}  // namespace

cudaError_t launch_few_store(kvz_cuda_store_args& args, cudaStream_t stream) {
  const kvz_cuda_encode_args& e = args.encode;
  args.few.launch = 0;
  const uint64_t pages = static_cast<uint64_t>(e.num_segments) * e.num_blocks;
  if (args.few.memory == nullptr || args.move.num_runs != 1 || e.num_blocks > kFewBlocks || pages > kFewStorePages ||
      pages == 0 || e.record_stride != 0 || e.header_bytes % 16 != 0 || e.segments == nullptr) {
    return cudaSuccess;
  }
  const uint32_t strips = strips_of_pages(e.segments, e.num_segments, true);
  FewDevice* device = nullptr;
  const cudaError_t error = prepare(args.device, device);
  if (strips == 0 || error != cudaSuccess) return error;
  // Four strips a CTA. Where not all CTAs are on the device at a time, the first ones write while the next ones encode.
  uint32_t ctas = 1;
  while (ctas < kFewCtas && ctas * 4 < strips) ctas *= 2;
  const uint32_t grid = static_cast<uint32_t>(pages) * ctas;
  const uint32_t own = divided(strips, ctas), shared_bytes = few_store_bytes(own, strips);
  if (shared_bytes > device->shared_bytes.load(std::memory_order_relaxed)) return cudaSuccess;
  if (e.max_ctas != 0 && grid > e.max_ctas) return cudaSuccess;

  FewStore p = {};
  p.general.segments = e.device_segments;
  p.general.table = args.few.table;
  p.general.payload_bytes = args.few.payload_bytes;
  p.general.status = args.few.status;
  p.general.header_units = e.header_bytes / 16;
  p.general.num_segments = e.num_segments;
  p.general.num_blocks = e.num_blocks;
  p.general.teams = 1;
  p.general.team_warps = own;
  p.general.team_bytes = fast_encode_bytes(strips);
  p.host = reinterpret_cast<uint8_t*>(args.move.run.address);
  p.host_units = args.move.run.bytes / 16;
  p.sizes = reinterpret_cast<uint64_t*>(args.few.memory);
  p.sums = reinterpret_cast<uint32_t*>(args.few.memory + kSizesBytes);
  p.crc32c = args.move.crc32c;
  p.ends = args.few.ends;
  p.launch = next_launch();
  p.strips = own;
  for (uint32_t b = 0; b < e.num_blocks; ++b) {
    p.block_ids[b] = args.few.block_ids[b];
    p.ends[b] = 0;  // whatever was here may look like the launch
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = ctas;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  *args.few.status = KVZ_OK;
  args.few.launch = p.launch;
  return launch(encode_function(e.segments[0].dtype), grid, (own + 1) * kWarp, shared_bytes, &p, stream, &cluster);
}

cudaError_t launch_few_load(kvz_cuda_load_args& args, cudaStream_t stream) {
  const kvz_cuda_decode_args& d = args.decode;
  const kvz_cuda_move_args& m = args.move;
  args.few.launch = 0;
  const uint64_t pages = static_cast<uint64_t>(d.num_segments) * d.num_blocks;
  if (args.few.memory == nullptr || d.num_blocks > kFewBlocks || pages > kFewPages || pages == 0 || d.extended != 0 ||
      d.max_ctas != 0 || d.segments == nullptr) {
    return cudaSuccess;
  }
  const uint32_t strips = strips_of_pages(d.segments, d.num_segments, false);
  FewDevice* device = nullptr;
  cudaError_t error = prepare(args.device, device);
  if (strips == 0 || error != cudaSuccess) return error;

  FewLoad p = {};
  const kvz_run* run = m.num_runs == 1 ? &m.run : m.runs;
  const kvz_run* const last = run + (m.num_runs - 1);
  for (uint32_t b = 0; b < d.num_blocks; ++b) {
    const uint64_t begin = m.record_offsets[b] + m.header_bytes, bytes = m.payload_bytes[b];
    while (run != last && run[1].start <= begin) ++run;
    if (bytes % 16 != 0 || bytes == 0 || bytes > m.max_payload_bytes || begin < run->start ||
        begin + bytes > run->start + run->bytes) {
      return cudaSuccess;  // a record in pieces
    }
    p.from[b] = run->address + (begin - run->start);
    p.to[b] = reinterpret_cast<uint64_t>(m.arena) + begin;
    p.payload_bytes[b] = bytes;
    p.expected[b] = few_sum(m.crc32c[b], bytes);
    p.block_ids[b] = args.few.block_ids[b];
    d.block_status[b] = KVZ_OK;
    args.few.ends[b] = 0;  // whatever was here may look like the launch
    const uint32_t pieces = few_pieces(bytes, p.from[b]);
    if (pieces > p.most_pieces) p.most_pieces = pieces;
  }
  uint32_t room = 16;
  for (uint32_t i = 0; i < pages; ++i) {
    const kvz_entry entry = p.table[i] = args.few.table[i];
    if (entry.coding >= KVZ_FIXED && entry.size > room) room = entry.size;
  }
  const uint32_t most = decode_room_bytes(strips, 0);
  p.general.segments = d.device_segments;
  p.general.counters = static_cast<Counters*>(d.workspace);
  p.general.bad = reinterpret_cast<uint32_t*>(args.few.memory);
  p.ready = reinterpret_cast<uint64_t*>(args.few.memory + kBadBytes);
  p.general.block_status = d.block_status;
  p.general.num_segments = d.num_segments;
  p.general.num_blocks = d.num_blocks;
  p.general.room_bytes = room < most ? (room + 15) / 16 * 16 : most;  // what is larger is not valid
  p.general.validate_lanes = kWarp;
  p.ends = args.few.ends;
  p.scratch = m.scratch;
  p.launch = next_launch();
  const uint32_t all_ctas = 2 * static_cast<uint32_t>(device->multiprocessors.load(std::memory_order_relaxed));
  const uint32_t warps = pages * divided(strips, 4) <= all_ctas ? 4 : 8;
  p.parts = divided(strips, warps);
  const uint32_t grid = static_cast<uint32_t>(pages) * p.parts;
  const uint32_t shared_bytes = kSharedBytes + p.general.room_bytes + kBehindRoom;
  if (shared_bytes > device->shared_bytes.load(std::memory_order_relaxed)) return cudaSuccess;
  const uint32_t work = d.num_blocks * p.most_pieces + static_cast<uint32_t>(pages);
  const uint32_t needed = divided(work, kFetchThreads / kWarp);
  error = launch(reinterpret_cast<const void*>(fetch_few_kernel), needed < kMostFetchCtas ? needed : kMostFetchCtas,
                 kFetchThreads, 0, &p, stream, nullptr);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  args.few.launch = p.launch;
  return launch(decode_function(d.segments[0].dtype), grid, warps * kWarp, shared_bytes, &p, stream, &early);
}

bool few_has_ended(const kvz_cuda_few& few, uint32_t num_blocks) {
  for (uint32_t b = 0; b < num_blocks; ++b) {
    if (__atomic_load_n(few.ends + b, __ATOMIC_ACQUIRE) != few.launch) return false;
  }
  return true;
}

}  // namespace gpu
}  // namespace kvz

extern "C" uint64_t kvz_cuda_few_bytes(void) {
  using namespace kvz::gpu;
  return kSizesBytes + kFewBlocks * kFewSumWords * sizeof(uint32_t);
}
