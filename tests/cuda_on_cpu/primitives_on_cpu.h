// csrc/primitives.cuh for an ordinary C++ compiler: the same functions, which check what the machine only assumes.
#pragma once

#include "cuda_builtins.h"

#ifndef FINEGRAIN_ARCH
#error "compile with -DFINEGRAIN_ARCH=700, 750, 800 ..."
#endif

#define FINEGRAIN_DEVICE __device__ __forceinline__
#define FINEGRAIN_KERNEL(name, threads, blocks_per_processor, arguments)                                           \
  static void name(const arguments);                                                                               \
  extern "C" __attribute__((visibility("default"))) const char* launch_##name(const simulator::Launch* launch) {   \
    static_assert((threads) % 32 == 0 && (threads) <= 1024 && (blocks_per_processor) >= 1, "what a block can be"); \
    return simulator::run(simulator::kernel_of<&name>(&name, threads), *launch);                                   \
  }                                                                                                                \
  static void name(const arguments)

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
FINEGRAIN_DEVICE float to_float(half_t value) { return simulator::half_to_float(value.bits); }
FINEGRAIN_DEVICE float to_float(bfloat16_t value) { return simulator::bfloat16_to_float(value.bits); }

template <class T>
struct Convert;

template <>
struct Convert<float> {
  static FINEGRAIN_DEVICE float one(float value) { return value; }
};

template <>
struct Convert<half_t> {
  static FINEGRAIN_DEVICE half_t one(float value) { return {simulator::half_from_float(value)}; }
  static FINEGRAIN_DEVICE unsigned two(float low, float high) { return one(low).bits | (unsigned)one(high).bits << 16; }
};

template <>
struct Convert<bfloat16_t> {
#if FINEGRAIN_ARCH >= 800
  static FINEGRAIN_DEVICE bfloat16_t one(float value) { return {simulator::bfloat16_from_float(value)}; }
  static FINEGRAIN_DEVICE unsigned two(float low, float high) { return one(low).bits | (unsigned)one(high).bits << 16; }
#endif
};

FINEGRAIN_DEVICE float infinity() { return __builtin_inff(); }
FINEGRAIN_DEVICE float exp2_fast(float x) {
  const float result = exp2f(x);
  return result < __FLT_MIN__ ? 0.0f : result;  // ftz; a NaN stays one
}

FINEGRAIN_DEVICE double multiply(double a, double b) { return a * b; }

// ------------------------------------------------------------------------------------------ global and shared memory

template <class T>
FINEGRAIN_DEVICE T load_constant(const T* address) {
  return *address;
}

FINEGRAIN_DEVICE unsigned char* shared_memory() { return simulator::shared_memory(); }
FINEGRAIN_DEVICE unsigned shared_address(const void* address) { return simulator::shared_offset(address); }

template <class To, class From>
FINEGRAIN_DEVICE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <class Vector>
FINEGRAIN_DEVICE Vector load_vector(const void* address) {
  if constexpr (sizeof(Vector) == 16)
    return same_bits<Vector>(simulator::load_16_bytes(address));
  else if constexpr (sizeof(Vector) == 8)
    return same_bits<Vector>(simulator::load_8_bytes(address));
  else if constexpr (sizeof(Vector) == 4)
    return same_bits<Vector>(simulator::load_4_bytes(address));
  else
    return *reinterpret_cast<const Vector*>(address);
}
template <class Vector>
FINEGRAIN_DEVICE void store_vector(void* address, Vector value) {
  if constexpr (sizeof(Vector) == 16)
    simulator::store_16_bytes(address, same_bits<simulator::FourRegisters>(value));
  else if constexpr (sizeof(Vector) == 8)
    simulator::store_8_bytes(address, same_bits<unsigned long long>(value));
  else if constexpr (sizeof(Vector) == 4)
    simulator::store_4_bytes(address, same_bits<unsigned>(value));
  else
    *reinterpret_cast<Vector*>(address) = value;
}

FINEGRAIN_DEVICE void copy_16_bytes(void* shared, const void* global, bool is_valid) {
#if FINEGRAIN_ARCH >= 800
  simulator::start_copy(shared, global, is_valid);
#else
  store_vector(shared, is_valid ? load_vector<uint4>(global) : make_uint4(0, 0, 0, 0));
#endif
}
FINEGRAIN_DEVICE void commit_copies() {
#if FINEGRAIN_ARCH >= 800
  simulator::commit_copies();
#endif
}
template <int LEFT>
FINEGRAIN_DEVICE void wait_for_copies() {
#if FINEGRAIN_ARCH >= 800
  simulator::wait_for_copies(LEFT);
#endif
}

// ---------------------------------------------------------------------------------------------- matrix instructions
// On the machine these do nothing at all below the architecture that has them; here that is an error.

#define FINEGRAIN_REQUIRE_ARCH(needed) \
  if constexpr (FINEGRAIN_ARCH < needed) simulator::report_wrong_architecture(__func__, needed)

FINEGRAIN_DEVICE void load_matrices(unsigned (&registers)[4], const void* row) {
  FINEGRAIN_REQUIRE_ARCH(750);
  const simulator::FourRegisters loaded = simulator::load_matrices(row);
  for (int i = 0; i < 4; ++i) registers[i] = loaded.values[i];
}
FINEGRAIN_DEVICE void load_matrices_transposed(unsigned (&registers)[4], const void* row) {
  FINEGRAIN_REQUIRE_ARCH(750);
  const simulator::FourRegisters loaded = simulator::load_matrices_transposed(row);
  for (int i = 0; i < 4; ++i) registers[i] = loaded.values[i];
}

FINEGRAIN_DEVICE void multiply_16x8x16(half_t, float (&sums)[4], const unsigned (&left)[4], unsigned right_0,
                                       unsigned right_1) {
  FINEGRAIN_REQUIRE_ARCH(800);
  const simulator::FourSums result = simulator::multiply_16x8x16_half(sums[0], sums[1], sums[2], sums[3], left[0],
                                                                      left[1], left[2], left[3], right_0, right_1);
  for (int i = 0; i < 4; ++i) sums[i] = result.values[i];
}
FINEGRAIN_DEVICE void multiply_16x8x16(bfloat16_t, float (&sums)[4], const unsigned (&left)[4], unsigned right_0,
                                       unsigned right_1) {
  FINEGRAIN_REQUIRE_ARCH(800);
  const simulator::FourSums result = simulator::multiply_16x8x16_bfloat16(sums[0], sums[1], sums[2], sums[3], left[0],
                                                                          left[1], left[2], left[3], right_0, right_1);
  for (int i = 0; i < 4; ++i) sums[i] = result.values[i];
}

FINEGRAIN_DEVICE void multiply_16x8x8(float (&sums)[4], unsigned left_0, unsigned left_1, unsigned right) {
  FINEGRAIN_REQUIRE_ARCH(750);
  const simulator::FourSums result =
      simulator::multiply_16x8x8(sums[0], sums[1], sums[2], sums[3], left_0, left_1, right);
  for (int i = 0; i < 4; ++i) sums[i] = result.values[i];
}

FINEGRAIN_DEVICE void multiply_8x8x4_by_columns(float (&sums)[8], unsigned left_0, unsigned left_1, unsigned right_0,
                                                unsigned right_1) {
  const simulator::FourSums first = simulator::multiply_8x8x4_by_columns(
      sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7], left_0, left_1, right_0, right_1);
  const simulator::FourSums second = simulator::last_four_sums();
  for (int i = 0; i < 4; ++i) sums[i] = first.values[i], sums[4 + i] = second.values[i];
}
FINEGRAIN_DEVICE void multiply_8x8x4_by_rows(float (&sums)[8], unsigned left_0, unsigned left_1, unsigned right_0,
                                             unsigned right_1) {
  const simulator::FourSums first = simulator::multiply_8x8x4_by_rows(
      sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7], left_0, left_1, right_0, right_1);
  const simulator::FourSums second = simulator::last_four_sums();
  for (int i = 0; i < 4; ++i) sums[i] = first.values[i], sums[4 + i] = second.values[i];
}

#undef FINEGRAIN_REQUIRE_ARCH

}  // namespace finegrain
