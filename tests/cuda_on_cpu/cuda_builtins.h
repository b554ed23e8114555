// What a CUDA compiler knows without any header, for an ordinary C++ compiler: only what the kernels use.
#pragma once

#include "machine.h"

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// ------------------------------------------------------------------------------------------------------------- vectors

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

__forceinline__ int2 make_int2(int x, int y) { return {x, y}; }
__forceinline__ int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
__forceinline__ uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
__forceinline__ uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
__forceinline__ float2 make_float2(float x, float y) { return {x, y}; }
__forceinline__ float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// -------------------------------------------------------------------------------------------------------- where one is

#define threadIdx (simulator::thread_index())
#define blockIdx (simulator::block_index())
#define blockDim (simulator::block_size())
#define gridDim (simulator::grid_size())

// ------------------------------------------------------------------------------------------ collectives of warp, block

__forceinline__ void __syncthreads() { simulator::sync_threads(); }
__forceinline__ int __syncthreads_or(int predicate) { return simulator::sync_threads_or(predicate); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) { simulator::sync_warp(mask); }

namespace simulator {
template <class T>
__forceinline__ T shuffle_value(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) == 4, "shuffles of 32-bit values only");
  unsigned bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = shuffle(mask, bits, source_lane);
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
}  // namespace simulator

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane) {
  return simulator::shuffle_value(mask, value, lane & 31);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return simulator::shuffle_value(mask, value, (int)((threadIdx.x & 31) ^ (lane_mask & 31)));
}

// ------------------------------------------------------------------------------------------------------------- numbers

__forceinline__ unsigned __float_as_uint(float value) { return simulator::bits_of(value); }
__forceinline__ float __uint_as_float(unsigned bits) { return simulator::float_of(bits); }
__forceinline__ int __float_as_int(float value) { return (int)simulator::bits_of(value); }
__forceinline__ float __int_as_float(int bits) { return simulator::float_of((unsigned)bits); }

// The overloads of a CUDA compiler and no template, so that what is ambiguous there is ambiguous here.
#define FINEGRAIN_MIN_MAX(Left, Right, Result)                                                          \
  __forceinline__ Result min(Left a, Right b) { return (Result)a < (Result)b ? (Result)a : (Result)b; } \
  __forceinline__ Result max(Left a, Right b) { return (Result)a > (Result)b ? (Result)a : (Result)b; }
FINEGRAIN_MIN_MAX(int, int, int)
FINEGRAIN_MIN_MAX(unsigned, unsigned, unsigned)
FINEGRAIN_MIN_MAX(int, unsigned, unsigned)
FINEGRAIN_MIN_MAX(unsigned, int, unsigned)
FINEGRAIN_MIN_MAX(long, long, long)
FINEGRAIN_MIN_MAX(unsigned long, unsigned long, unsigned long)
FINEGRAIN_MIN_MAX(long long, long long, long long)
FINEGRAIN_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef FINEGRAIN_MIN_MAX

// A NaN loses against a number.
__forceinline__ float fmaxf(float a, float b) { return a > b || b != b ? a : b; }
__forceinline__ float fminf(float a, float b) { return a < b || b != b ? a : b; }
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
// The product is exact in double precision; rounding the sum twice instead of once is seen by nobody here.
__forceinline__ float fmaf(float a, float b, float c) { return (float)((double)a * b + c); }
__forceinline__ float fabsf(float x) { return __builtin_fabsf(x); }
__forceinline__ float sqrtf(float x) { return __builtin_sqrtf(x); }
__forceinline__ float expf(float x) { return __builtin_expf(x); }
__forceinline__ float exp2f(float x) { return __builtin_exp2f(x); }
__forceinline__ float logf(float x) { return __builtin_logf(x); }
__forceinline__ float log2f(float x) { return __builtin_log2f(x); }
__forceinline__ double fabs(double x) { return __builtin_fabs(x); }
__forceinline__ double floor(double x) { return __builtin_floor(x); }
__forceinline__ double ceil(double x) { return __builtin_ceil(x); }
