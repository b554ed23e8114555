// One matrix instruction on fragments that the test has laid out, and the conversions of elements.
#pragma once

#include "primitives.cuh"

struct FragmentArguments {
  const unsigned* left;   // [32][4], of which an instruction takes as many as it needs
  const unsigned* right;  // [32][2]
  float* sums;            // [32][8]
};

FINEGRAIN_KERNEL(multiply, 32, 1, FragmentArguments arguments) {
  using namespace finegrain;
  const int lane = threadIdx.x;
  unsigned left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = arguments.left[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = arguments.right[2 * lane + i];
  float* sums = arguments.sums + 8 * lane;
#if INSTRUCTION == 1 || INSTRUCTION == 2
  float own[8];
  for (int i = 0; i < 8; ++i) own[i] = sums[i];
  if (INSTRUCTION == 1)
    multiply_8x8x4_by_columns(own, left[0], left[1], right[0], right[1]);
  else
    multiply_8x8x4_by_rows(own, left[0], left[1], right[0], right[1]);
  for (int i = 0; i < 8; ++i) sums[i] = own[i];
#else
  float own[4];
  for (int i = 0; i < 4; ++i) own[i] = sums[i];
  if (INSTRUCTION == 3) multiply_16x8x8(own, left[0], left[1], right[0]);
  if (INSTRUCTION == 4) multiply_16x8x16(half_t{}, own, left, right[0], right[1]);
  if (INSTRUCTION == 5) multiply_16x8x16(bfloat16_t{}, own, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) sums[i] = own[i];
#endif
}

struct MatrixArguments {
  const unsigned short* rows;  // four matrices [8][8]
  unsigned* registers;         // [32][4]
  int transposed;
  int unused;
};

FINEGRAIN_KERNEL(load, 32, 1, MatrixArguments arguments) {
  using namespace finegrain;
  const int lane = threadIdx.x;
  unsigned char* row = shared_memory() + 48 * lane;  // as tiles have it: rows lie further apart than they are long
  store_vector(row, load_vector<uint4>(arguments.rows + 8 * lane));
  __syncwarp();
  unsigned registers[4];
  if (arguments.transposed)
    load_matrices_transposed(registers, row);
  else
    load_matrices(registers, row);
  for (int i = 0; i < 4; ++i) arguments.registers[4 * lane + i] = registers[i];
}

struct ConversionArguments {
  const float* values;
  unsigned short* rounded;
  unsigned* pairs;  // of the value and its negative
  float* widened;
  float* powers;
  int count;
  int unused;
};

FINEGRAIN_KERNEL(convert, 256, 1, ConversionArguments arguments) {
  using namespace finegrain;
  for (int i = blockIdx.x * 256 + threadIdx.x; i < arguments.count; i += gridDim.x * 256) {
    const float value = arguments.values[i];
    const ELEMENT rounded = Convert<ELEMENT>::one(value);
    arguments.rounded[i] = rounded.bits;
    arguments.pairs[i] = Convert<ELEMENT>::two(value, -value);
    arguments.widened[i] = to_float(rounded);
    arguments.powers[i] = exp2_fast(value);
  }
}
