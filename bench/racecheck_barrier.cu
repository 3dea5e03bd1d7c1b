// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// A race that is none, for compute-sanitizer's racecheck: the barriers of the encoder without its work.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -lineinfo -o racecheck_barrier racecheck_barrier.cu
//   compute-sanitizer --tool racecheck ./racecheck_barrier
//
// Two teams of two warps have barriers of their own; they and a fifth warp, the controller, meet at barrier 15, which
// all 160 threads pass the same number of times: once, then three times a tile. What a team writes before a meeting the
// controller reads behind it. Seen with compute-sanitizer of CUDA 13.0 on an H100: "Race reported between Write access"
// in the line marked A "and Read access" in the line marked B, between which every thread has met. Programs that differ
// in an operand of a barrier are reported or are not, in no pattern that was found. The tool says the same of the
// encoder (`announce` and `control_encode` in cuda_encode_strips.inl).
#include <cstdio>

struct Shared {
  int a[8], b[8], tile, last, team[8];
};
extern __shared__ unsigned char g_memory[];

__device__ __forceinline__ void barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__global__ void run(int* out, int tiles) {
  Shared& s = *reinterpret_cast<Shared*>(g_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32 - 1, team = warp / 2;
  auto meet = [&] { barrier(15, blockDim.x); };
  auto sync_team = [&] { barrier(1 + team, 64); };
  int sum = 0;
  if (warp == warps) {  // the controller
    if (lane == 0) s.tile = 0;
    meet();
    while (s.tile < tiles) {
      meet();
      int v = lane < warps ? s.a[lane] : 0;  // B
      const int t = s.tile;
      if (lane < warps) s.b[lane] = v * 2 + t;
      meet();
      if (lane == 0) s.tile = t + 1;
      meet();
    }
  } else {
    meet();
    while (s.tile < tiles) {
      if (lane == 0) s.team[warp] = warp + s.tile;
      sync_team();
      const int other = s.team[warp ^ 1];
      sync_team();
      if (lane == 0) s.a[warp] = other + s.tile;  // A
      meet();
      meet();
      sum += s.b[warp];
      meet();
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) s.last = sum;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s.last + sum;
}

int main() {
  int* out = nullptr;
  cudaMalloc(&out, 2 * 160 * sizeof(int));
  run<<<2, 160, 1024>>>(out, 5);
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
