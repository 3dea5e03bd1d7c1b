// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// A race that is none, for compute-sanitizer's racecheck, which takes every barrier that a warp passes for one of all
// warps.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -lineinfo -o racecheck_barrier racecheck_barrier.cu
//   compute-sanitizer --tool racecheck ./racecheck_barrier 0
//   compute-sanitizer --tool racecheck ./racecheck_barrier 2
//
// Four warps write a word each, meet at __syncthreads, and read their neighbours' words. The first two of them have met
// at barrier 1, which is theirs alone, as often as the argument says. With 0 the tool finds nothing; with 2 it reports
// races between the lines marked A and B, between which every thread has met (seen with CUDA 13.0 on an H100). The
// teams of the encoder have barriers of their own as well (`sync_team` in cuda_device.inl).
#include <cstdio>
#include <cstdlib>

template <int TIMES>
__global__ void run(int* out) {
  __shared__ int words[4];
  const int warp = threadIdx.x / 32;
  int sum = 0;
  for (int i = 0; i < 5; ++i) {
#pragma unroll
    for (int time = 0; time < TIMES; ++time) {
      if (warp < 2) asm volatile("bar.sync 1, 64;" ::: "memory");
    }
    if (threadIdx.x % 32 == 0) words[warp] = warp + i;  // A
    __syncthreads();
    sum += words[(warp + 1) % 4];  // B
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

int main(int count, char** arguments) {
  const int times = count > 1 ? std::atoi(arguments[1]) : 2;
  int* out = nullptr;
  cudaMalloc(&out, 128 * sizeof(int));
  if (times == 0) {
    run<0><<<1, 128>>>(out);
  } else {
    run<2><<<1, 128>>>(out);
  }
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
