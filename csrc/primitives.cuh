// Everything the kernels ask of the machine: element types, shared memory, asynchronous copies, matrix instructions.
//
// No header of the CUDA toolkit is included anywhere in this folder, so that NVRTC can compile it where no toolkit is
// installed. tests/cuda_on_cpu/primitives_on_cpu.h implements the same functions for an ordinary C++ compiler, with
// which the kernels are tested without a GPU: what is not in this file, the kernels may not use.
#pragma once

#ifdef FINEGRAIN_ON_CPU
#include "primitives_on_cpu.h"
#else

#ifndef FINEGRAIN_ARCH
#ifdef __CUDA_ARCH__
#define FINEGRAIN_ARCH __CUDA_ARCH__  // 700, 750, 800 ...
#else
#define FINEGRAIN_ARCH 800  // nvcc's pass over the host code, which holds none
#endif
#endif

#define FINEGRAIN_DEVICE __device__ __forceinline__
// A kernel takes one struct of arguments; what it is launched with (threads, bytes of shared memory) is chosen by
// finegrain_ops/backends/cuda/tiles.py, which compiles those numbers in.
#define FINEGRAIN_KERNEL(name, threads, blocks_per_processor, arguments) \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_processor) name(const arguments)

namespace finegrain {

// ---------------------------------------------------------------------------------------------------- element types

struct half_t {
  unsigned short bits;
};
struct bfloat16_t {
  unsigned short bits;
};
using byte_t = unsigned char;

FINEGRAIN_DEVICE float to_float(float value) { return value; }
FINEGRAIN_DEVICE float to_float(half_t value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
FINEGRAIN_DEVICE float to_float(bfloat16_t value) { return __uint_as_float((unsigned)value.bits << 16); }

template <class T>
struct Convert;  // from float, rounding to nearest even; of two values into one register, the first in the low half

template <>
struct Convert<float> {
  static FINEGRAIN_DEVICE float one(float value) { return value; }
};

template <>
struct Convert<half_t> {
  static FINEGRAIN_DEVICE half_t one(float value) {
    half_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
  }
  static FINEGRAIN_DEVICE unsigned two(float low, float high) {
    unsigned result;
#if FINEGRAIN_ARCH >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
    asm("mov.b32 %0, {%1, %2};" : "=r"(result) : "h"(one(low).bits), "h"(one(high).bits));
#endif
    return result;
  }
};

template <>
struct Convert<bfloat16_t> {
#if FINEGRAIN_ARCH >= 800
  static FINEGRAIN_DEVICE bfloat16_t one(float value) {
    bfloat16_t result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
  }
  static FINEGRAIN_DEVICE unsigned two(float low, float high) {
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
  }
#endif
};

FINEGRAIN_DEVICE float infinity() { return __int_as_float(0x7f800000); }
FINEGRAIN_DEVICE float exp2_fast(float x) {  // 2 units in the last place; 0 for -inf
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Rounded on its own: no compiler may make a multiply-add of it and a sum.
FINEGRAIN_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }

// ------------------------------------------------------------------------------------------ global and shared memory

// What nobody writes while the kernel runs.
template <class T>
FINEGRAIN_DEVICE T load_constant(const T* address) {
  return __ldg(address);
}
FINEGRAIN_DEVICE half_t load_constant(const half_t* address) {
  return {__ldg(reinterpret_cast<const unsigned short*>(address))};
}
FINEGRAIN_DEVICE bfloat16_t load_constant(const bfloat16_t* address) {
  return {__ldg(reinterpret_cast<const unsigned short*>(address))};
}

FINEGRAIN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// Reads and writes of several elements at once; the address must be a multiple of their size.
template <class Vector>
FINEGRAIN_DEVICE Vector load_vector(const void* address) {
  return *reinterpret_cast<const Vector*>(address);
}
template <class Vector>
FINEGRAIN_DEVICE void store_vector(void* address, Vector value) {
  *reinterpret_cast<Vector*>(address) = value;
}

FINEGRAIN_DEVICE unsigned shared_address(const void* address) { return (unsigned)__cvta_generic_to_shared(address); }

// sm_80 and later: 16 bytes from global to shared memory, or 16 bytes of zeros; both addresses must be multiples of 16.
// They arrive once wait_for_copies<N>() has returned, with at most N groups committed since, and are visible to other
// threads after a barrier.
FINEGRAIN_DEVICE void copy_16_bytes(void* shared, const void* global, bool is_valid) {
#if FINEGRAIN_ARCH >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(is_valid ? 16 : 0)
               : "memory");
#endif
}
FINEGRAIN_DEVICE void commit_copies() {
#if FINEGRAIN_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT>
FINEGRAIN_DEVICE void wait_for_copies() {
#if FINEGRAIN_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------- matrix instructions
// All lanes of the warp take part. Where a lane holds which element: PTX ISA, "Matrix multiply-accumulate operation
// using mma instruction".

// Four 8 x 8 matrices of 2-byte elements; lane 8 i + r gives the address of row r of matrix i.
FINEGRAIN_DEVICE void load_matrices(unsigned (&registers)[4], const void* row) {
#if FINEGRAIN_ARCH >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
FINEGRAIN_DEVICE void load_matrices_transposed(unsigned (&registers)[4], const void* row) {
#if FINEGRAIN_ARCH >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// sm_80 and later: sums[16, 8] += left[16, 16] right[16, 8]
FINEGRAIN_DEVICE void multiply_16x8x16(half_t, float (&sums)[4], const unsigned (&left)[4], unsigned right_0,
                                       unsigned right_1) {
#if FINEGRAIN_ARCH >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
#endif
}
FINEGRAIN_DEVICE void multiply_16x8x16(bfloat16_t, float (&sums)[4], const unsigned (&left)[4], unsigned right_0,
                                       unsigned right_1) {
#if FINEGRAIN_ARCH >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
#endif
}

// sm_75 and later: sums[16, 8] += left[16, 8] right[8, 8]
FINEGRAIN_DEVICE void multiply_16x8x8(float (&sums)[4], unsigned left_0, unsigned left_1, unsigned right) {
#if FINEGRAIN_ARCH >= 750
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(left_0), "r"(left_1), "r"(right));
#endif
}

// sm_70: in each of four groups of eight lanes sums[8, 8] += left[8, 4] right[4, 8]; left holds rows, right columns
FINEGRAIN_DEVICE void multiply_8x8x4_by_columns(float (&sums)[8], unsigned left_0, unsigned left_1, unsigned right_0,
                                                unsigned right_1) {
  asm volatile(
      "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, "
      "{%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]), "+f"(sums[6]),
        "+f"(sums[7])
      : "r"(left_0), "r"(left_1), "r"(right_0), "r"(right_1));
}
// the same with right held as rows
FINEGRAIN_DEVICE void multiply_8x8x4_by_rows(float (&sums)[8], unsigned left_0, unsigned left_1, unsigned right_0,
                                             unsigned right_1) {
  asm volatile(
      "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, "
      "{%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]), "+f"(sums[6]),
        "+f"(sums[7])
      : "r"(left_0), "r"(left_1), "r"(right_0), "r"(right_1));
}

}  // namespace finegrain

#endif  // FINEGRAIN_ON_CPU
