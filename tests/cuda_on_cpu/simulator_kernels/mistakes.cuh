// One mistake per mode, and in mode 0 none.
#pragma once

#include "primitives.cuh"

struct MistakeArguments {
  const float* input;  // [64]
  float* output;       // [64]
  int mode;
  int number;
};

FINEGRAIN_KERNEL(access_memory, 64, 1, MistakeArguments arguments) {
  using namespace finegrain;
  const int thread = threadIdx.x;
  float* shared = reinterpret_cast<float*>(shared_memory());  // [64]
  float value = arguments.input[thread];
  switch (arguments.mode) {
    case 1:
      value += arguments.input[64 + arguments.number];
      break;
    case 2:
      arguments.output[64 + arguments.number] = value;
      break;
    case 3:
      const_cast<float*>(arguments.input)[thread] = value + 1;
      break;
    case 4:
      shared[thread + arguments.number] = value;
      break;
    case 5:
      value += load_vector<float4>(arguments.input + arguments.number).x;
      break;
    case 6:
      store_vector(shared + arguments.number, make_float2(value, value));
      break;
    case 7: {
      float locals[64];  // on the thread's own stack
      for (int i = 0; i < 64; ++i) locals[i] = value + i;
      value = locals[(thread + arguments.number) & 63] - ((thread + arguments.number) & 63);
      break;
    }
    case 8:
      value += *reinterpret_cast<const float*>(reinterpret_cast<const char*>(arguments.input) + arguments.number);
      break;
    case 9: {
      unsigned registers[4];
      load_matrices(registers, shared + arguments.number);
      break;
    }
    case 10:
      value += *static_cast<const volatile float*>(nullptr);
      break;
    case 11:
      value += shared[thread];  // nobody has written it
      break;
    case 12: {
      float locals[8];
      for (int i = 0; i < 8; ++i) locals[i] = value + i;
      value = locals[arguments.number];
      break;
    }
    case 13:  // a plain copy of a struct, which only the compiler's calls report
      *reinterpret_cast<uint4*>(arguments.output) = *reinterpret_cast<const uint4*>(arguments.input + arguments.number);
      break;
    case 14:
      *reinterpret_cast<uint4*>(arguments.output + arguments.number) = *reinterpret_cast<const uint4*>(arguments.input);
      break;
  }
  arguments.output[thread] = value;
}

FINEGRAIN_KERNEL(diverge, 64, 1, MistakeArguments arguments) {
  const int thread = threadIdx.x, warp = thread / 32, number = arguments.number;
  float value = arguments.input[thread];
  switch (arguments.mode) {
    case 0:
      if (warp == 0) __syncwarp();
      __syncthreads();
      value += __syncthreads_or(thread == number);
      break;
    case 1:
      if (thread < number) __syncthreads();
      break;
    case 2:
      if (thread < number)
        __syncthreads();
      else
        __syncthreads_or(1);
      break;
    case 3:
      if (thread < number)
        __syncwarp();
      else
        value += __shfl_xor_sync(~0u, value, 1);
      break;
    case 4:
      if (thread < number) return;
      value += __shfl_sync(~0u, value, 0);
      break;
    case 5:
      if (thread < number) __syncwarp(0xffu);
      break;
    case 6:
      value += __shfl_xor_sync(~0u, value, number) + 1000 * __shfl_sync(~0u, value, number + 1);
      break;
  }
  arguments.output[thread] = value;
}

// A thread copies four numbers for the next one, in two groups of 256 bytes each.
FINEGRAIN_KERNEL(copy_asynchronously, 64, 1, MistakeArguments arguments) {
  using namespace finegrain;
  const int thread = threadIdx.x, mode = arguments.mode, number = arguments.number;
  float* shared = reinterpret_cast<float*>(shared_memory());  // [2][64]
  const int lane = thread & 15;
  if (thread < 16) {
    copy_16_bytes(shared + 4 * lane, arguments.input + 4 * lane, true);
    commit_copies();
    copy_16_bytes(shared + 64 + 4 * lane, mode == 7 ? arguments.input + number : nullptr, mode == 7);
    if (mode != 8) commit_copies();
    if (mode == 1) arguments.output[lane] = shared[4 * lane];  // its own copy, before the wait
    if (mode == 2)
      wait_for_copies<1>();
    else if (mode != 3)
      wait_for_copies<0>();
  }
  if (mode != 4) __syncthreads();
  float value = shared[thread];
  if (mode == 0 || mode == 2) value += 10 * shared[64 + thread];
  if (mode == 5) {  // written again while others still read
    if (thread < 16) copy_16_bytes(shared + 4 * lane, arguments.input + 4 * lane, true);
    if (thread < 16) commit_copies();
    wait_for_copies<0>();
  }
  if (mode == 6) {  // all threads to one place
    copy_16_bytes(shared + number, arguments.input, true);
    commit_copies();
    wait_for_copies<0>();
  }
  arguments.output[thread] = value;
}
