// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// What the transport layer needs of CUDA, behind kvz.h: memory, copies, streams, events, devices. Thin on purpose: one
// C call for a batch, no state but the last error of each thread. Included by cuda.cu.
#pragma once

#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include <chrono>
#include <thread>

#include "kvz.h"

namespace kvz {
namespace gpu {
namespace {

constexpr uint64_t kLookAgainUs = 20;  // between looks at an event that takes longer

thread_local cudaError_t t_last_error = cudaSuccess;

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

// Keep the error for kvz_cuda_last_error and return the status for it.
int32_t status_of(cudaError_t error) {
  if (error == cudaSuccess) return KVZ_OK;
  t_last_error = error;
  cudaGetLastError();  // do not leave it to be found by a later, unrelated call
  return KVZ_CUDA_ERROR;
}

}  // namespace
}  // namespace gpu
}  // namespace kvz

using namespace kvz::gpu;

extern "C" {

int32_t kvz_cuda_last_error(char* text, uint64_t text_bytes) {
  if (text != nullptr && text_bytes > 0) {
    snprintf(text, text_bytes, "%s: %s", cudaGetErrorName(t_last_error), cudaGetErrorString(t_last_error));
  }
  return static_cast<int32_t>(t_last_error);
}

int32_t kvz_cuda_available(int32_t* devices) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) error = cudaErrorNoDevice;
  if (devices != nullptr) *devices = error == cudaSuccess ? count : 0;
  return status_of(error);
}

int32_t kvz_cuda_device_info(int32_t device, kvz_cuda_device* info) {
  if (info == nullptr) return KVZ_INVALID_ARGUMENT;
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return status_of(error);
  memset(info, 0, sizeof *info);
  snprintf(info->name, sizeof info->name, "%s", properties.name);
  info->memory_bytes = properties.totalGlobalMem;
  info->capability_major = properties.major;
  info->capability_minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->l2_bytes = properties.l2CacheSize;
  info->shared_bytes = static_cast<int32_t>(properties.sharedMemPerBlockOptin);
  info->copy_engines = properties.asyncEngineCount;
  info->pci_domain = properties.pciDomainID;
  info->pci_bus = properties.pciBusID;
  info->pci_device = properties.pciDeviceID;
  info->host_native_atomics = properties.hostNativeAtomicSupported;
  return KVZ_OK;
}

int32_t kvz_cuda_versions(int32_t* driver, int32_t* runtime) {
  int d = 0, r = 0;
  cudaError_t error = cudaDriverGetVersion(&d);
  if (error == cudaSuccess) error = cudaRuntimeGetVersion(&r);
  if (driver != nullptr) *driver = d;
  if (runtime != nullptr) *runtime = r;
  return status_of(error);
}

int32_t kvz_cuda_get_device(int32_t* device) {
  if (device == nullptr) return KVZ_INVALID_ARGUMENT;
  int current = 0;
  const cudaError_t error = cudaGetDevice(&current);
  *device = current;
  return status_of(error);
}

int32_t kvz_cuda_set_device(int32_t device) { return status_of(cudaSetDevice(device)); }

int32_t kvz_cuda_memory(uint64_t* free_bytes, uint64_t* total_bytes) {
  size_t available = 0, total = 0;
  const cudaError_t error = cudaMemGetInfo(&available, &total);
  if (free_bytes != nullptr) *free_bytes = available;
  if (total_bytes != nullptr) *total_bytes = total;
  return status_of(error);
}

int32_t kvz_cuda_malloc(uint64_t bytes, void** address) {
  if (address == nullptr) return KVZ_INVALID_ARGUMENT;
  return status_of(cudaMalloc(address, bytes));
}

int32_t kvz_cuda_free(void* address) { return status_of(cudaFree(address)); }

int32_t kvz_cuda_host_register(void* address, uint64_t bytes) {
  return status_of(cudaHostRegister(address, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped));
}

int32_t kvz_cuda_host_unregister(void* address) { return status_of(cudaHostUnregister(address)); }

int32_t kvz_cuda_memset(void* address, int32_t byte, uint64_t bytes, void* stream) {
  return status_of(cudaMemsetAsync(address, byte, bytes, stream_of(stream)));
}

int32_t kvz_cuda_copy(void* to, const void* from, uint64_t bytes, void* stream) {
  return status_of(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(stream)));
}

int32_t kvz_cuda_copy_batch(const uint64_t* to, const uint64_t* from, const uint64_t* bytes, uint64_t count,
                            void* stream) {
  if (count == 0) return KVZ_OK;
  if (to == nullptr || from == nullptr || bytes == nullptr) return KVZ_INVALID_ARGUMENT;
  static_assert(sizeof(void*) == sizeof(uint64_t) && sizeof(size_t) == sizeof(uint64_t),
                "arrays of addresses are passed on as they are");
  cudaStream_t s = stream_of(stream);
#if CUDART_VERSION >= 13000
  // The driver takes no batches into the legacy default stream or into a capture.
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (count > 1 && s != nullptr && s != cudaStreamLegacy && cudaStreamIsCapturing(s, &capture) == cudaSuccess &&
      capture == cudaStreamCaptureStatusNone) {
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
    const cudaError_t error =
        cudaMemcpyBatchAsync(reinterpret_cast<void* const*>(to), reinterpret_cast<const void* const*>(from),
                             reinterpret_cast<const size_t*>(bytes), count, &attributes, &first, 1, s);
    if (error != cudaErrorNotSupported && error != cudaErrorCallRequiresNewerDriver) return status_of(error);
    cudaGetLastError();
  }
#endif
  for (uint64_t i = 0; i < count; ++i) {
    const cudaError_t error = cudaMemcpyAsync(reinterpret_cast<void*>(to[i]), reinterpret_cast<const void*>(from[i]),
                                              bytes[i], cudaMemcpyDefault, s);
    if (error != cudaSuccess) return status_of(error);
  }
  return KVZ_OK;
}

int32_t kvz_cuda_stream_create(int32_t priority, void** stream) {
  if (stream == nullptr) return KVZ_INVALID_ARGUMENT;
  cudaStream_t created = nullptr;
  const cudaError_t error = cudaStreamCreateWithPriority(&created, cudaStreamNonBlocking, priority);
  *stream = created;
  return status_of(error);
}

int32_t kvz_cuda_stream_destroy(void* stream) { return status_of(cudaStreamDestroy(stream_of(stream))); }

int32_t kvz_cuda_stream_wait_event(void* stream, void* event) {
  return status_of(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0));
}

int32_t kvz_cuda_stream_synchronize(void* stream) { return status_of(cudaStreamSynchronize(stream_of(stream))); }

int32_t kvz_cuda_event_create(int32_t timing, void** event) {
  if (event == nullptr) return KVZ_INVALID_ARGUMENT;
  cudaEvent_t created = nullptr;
  const unsigned flags = cudaEventBlockingSync | (timing ? 0u : static_cast<unsigned>(cudaEventDisableTiming));
  const cudaError_t error = cudaEventCreateWithFlags(&created, flags);
  *event = created;
  return status_of(error);
}

int32_t kvz_cuda_event_destroy(void* event) { return status_of(cudaEventDestroy(event_of(event))); }

int32_t kvz_cuda_event_record(void* event, void* stream) {
  return status_of(cudaEventRecord(event_of(event), stream_of(stream)));
}

int32_t kvz_cuda_event_query(void* event, int32_t* done) {
  if (done == nullptr) return KVZ_INVALID_ARGUMENT;
  const cudaError_t error = cudaEventQuery(event_of(event));
  *done = error == cudaSuccess;
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return KVZ_OK;
  }
  return status_of(error);
}

int32_t kvz_cuda_event_synchronize(void* event) { return status_of(cudaEventSynchronize(event_of(event))); }

int32_t kvz_cuda_event_wait(void* event, uint64_t spin_us, uint64_t timeout_us, int32_t* done) {
  if (done == nullptr) return KVZ_INVALID_ARGUMENT;
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  *done = 0;
  for (;;) {
    const cudaError_t error = cudaEventQuery(event_of(event));
    if (error == cudaSuccess) {
      *done = 1;
      return KVZ_OK;
    }
    if (error != cudaErrorNotReady) return status_of(error);
    cudaGetLastError();
    const uint64_t waited =
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin).count());
    if (waited >= timeout_us) return KVZ_OK;
    if (waited >= spin_us) {
      const uint64_t left = timeout_us - waited;
      std::this_thread::sleep_for(std::chrono::microseconds(left < kLookAgainUs ? left : kLookAgainUs));
    }
  }
}

int32_t kvz_cuda_event_elapsed(void* start, void* stop, float* milliseconds) {
  if (milliseconds == nullptr) return KVZ_INVALID_ARGUMENT;
  return status_of(cudaEventElapsedTime(milliseconds, event_of(start), event_of(stop)));
}

}  // extern "C"
