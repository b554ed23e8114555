// Sums by trees in shared memory, whose barriers the tests remove.
#pragma once

#include "primitives.cuh"

struct ReductionArguments {
  const float* values;  // [gridDim.x][128]
  float* sums;          // of warps [gridDim.x][4], or of blocks
};

FINEGRAIN_KERNEL(sum_by_warp, 128, 1, ReductionArguments arguments) {
  float* own = reinterpret_cast<float*>(finegrain::shared_memory()) + (threadIdx.x & ~31u);
  const int lane = threadIdx.x & 31;
  own[lane] = arguments.values[blockIdx.x * 128 + threadIdx.x];
  __syncwarp();
  for (int step = 16; step > 0; step /= 2) {
    if (lane < step) own[lane] += own[lane + step];
    __syncwarp();  // of the tree
  }
  if (lane == 0) arguments.sums[blockIdx.x * 4 + threadIdx.x / 32] = own[0];
}

FINEGRAIN_KERNEL(sum_by_block, 128, 1, ReductionArguments arguments) {
  float* own = reinterpret_cast<float*>(finegrain::shared_memory());
  const int thread = threadIdx.x;
  own[thread] = arguments.values[blockIdx.x * 128 + thread];
  __syncthreads();
  for (int step = 64; step > 0; step /= 2) {
    if (thread < step) own[thread] += own[thread + step];
    __syncthreads();  // of the tree
  }
  if (thread == 0) arguments.sums[blockIdx.x] = own[0];
}
