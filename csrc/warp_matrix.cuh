// A warp's product of 16 x 16 blocks, in tensor cores where the GPU and the element type have them.
//
//   Sums    eight sums of a 16 x 16 block per lane, in the same places whatever the instruction:
//             sums[4 c + 2 s + e]  is at row first_row(lane) + s * ROW_STEP, column 8 c + first_column(lane) + e
//           so that masks, biases, softmax and stores are written once
//   Left    a 16 x 16 left operand, from shared memory or from Sums (the scores, which never leave the registers)
//   add_product             sums += left right     right[k][n] in shared memory
//   add_product_transposed  sums += left right^T   right[n][k] in shared memory
//
// Addresses in shared memory are those of element (0, 0) of a block, multiples of 16 bytes, as are the strides.
#pragma once

#include "primitives.cuh"

namespace finegrain {

using Sums = float[8];

FINEGRAIN_DEVICE int lane_index() { return threadIdx.x & 31; }
FINEGRAIN_DEVICE int warp_index() { return threadIdx.x >> 5; }

// ------------------------------------------------------------------------------ sm_75 and later: m16n8k8 and m16n8k16

template <class Element>
struct TensorCores {
  static constexpr int ROW_STEP = 8;
  static constexpr int ROW_LANES_0 = 1, ROW_LANES_1 = 2;  // lanes that differ in these bits alone hold the same rows

  struct Left {
    unsigned registers[4];
  };

  static FINEGRAIN_DEVICE int first_row(int lane) { return lane >> 2; }
  static FINEGRAIN_DEVICE int first_column(int lane) { return 2 * (lane & 3); }

  static FINEGRAIN_DEVICE Left load_left(const Element* block, int stride) {
    const int lane = lane_index();
    Left left;
    load_matrices(left.registers, block + (lane & 15) * stride + (lane >> 4) * 8);
    return left;
  }

  static FINEGRAIN_DEVICE Left to_left(const Sums& sums) {
    Left left;
#pragma unroll
    for (int i = 0; i < 4; ++i) left.registers[i] = Convert<Element>::two(sums[2 * i], sums[2 * i + 1]);
    return left;
  }

  template <int COUNT>
  static FINEGRAIN_DEVICE void add_product(Sums (&sums)[COUNT], const Left (&left)[COUNT], const Element* right,
                                           int stride) {
    const int lane = lane_index();
    unsigned registers[4];
    load_matrices_transposed(registers, right + (lane & 15) * stride + (lane >> 4) * 8);
    multiply(sums, left, registers);
  }

  template <int COUNT>
  static FINEGRAIN_DEVICE void add_product_transposed(Sums (&sums)[COUNT], const Left (&left)[COUNT],
                                                      const Element* right, int stride) {
    const int lane = lane_index();
    unsigned registers[4];
    load_matrices(registers, right + ((lane & 7) + (lane >> 4) * 8) * stride + ((lane >> 3) & 1) * 8);
    multiply(sums, left, registers);
  }

 private:
  // right: k 0-7 and 8-15 of columns 0-7, then of columns 8-15
  template <int COUNT>
  static FINEGRAIN_DEVICE void multiply(Sums (&sums)[COUNT], const Left (&left)[COUNT], const unsigned (&right)[4]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&part)[4] = reinterpret_cast<float (&)[4]>(sums[i][4 * half]);
#if FINEGRAIN_ARCH >= 800
        multiply_16x8x16(Element{}, part, left[i].registers, right[2 * half], right[2 * half + 1]);
#else
        multiply_16x8x8(part, left[i].registers[0], left[i].registers[1], right[2 * half]);
        multiply_16x8x8(part, left[i].registers[2], left[i].registers[3], right[2 * half + 1]);
#endif
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------- sm_70: m8n8k4
//
// Eight lanes at a time, a quad pair (lanes 4 q to 4 q + 3 and 16 more), multiply 8 x 8 blocks. Of the four quad pairs
// two share the rows of the block and two its columns:
//
//   rows     p + 4 (q & 1) + 8 h      p = lane & 3, h = lane >> 4: lanes of one load phase read eight rows in a row,
//   columns  p + 4 (q >> 1) + 8 h     which lie in different banks

struct VoltaTensorCores {
  static constexpr int ROW_STEP = 2;
  static constexpr int ROW_LANES_0 = 2, ROW_LANES_1 = 8;

  struct Left {
    unsigned registers[8];  // 16 elements of one row
  };

  static FINEGRAIN_DEVICE int first_row(int lane) { return (lane & 1) + (lane & 4) + 8 * (lane >> 4); }
  static FINEGRAIN_DEVICE int first_column(int lane) { return (lane & 2) + ((lane & 8) >> 1); }

  static FINEGRAIN_DEVICE Left load_left(const half_t* block, int stride) {
    const int lane = lane_index();
    Left left;
    load_row(left.registers, block + ((lane & 3) + (lane & 4) + 8 * (lane >> 4)) * stride);
    return left;
  }

  // A lane holds two rows in four pairs of columns, and needs one row in eight: two exchanges.
  static FINEGRAIN_DEVICE Left to_left(const Sums& sums) {
    const int lane = lane_index();
    const bool is_second_row = lane & 2, is_right_half = lane & 8;
    Left left;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned first = Convert<half_t>::two(sums[4 * half], sums[4 * half + 1]);
      const unsigned second = Convert<half_t>::two(sums[4 * half + 2], sums[4 * half + 3]);
      const unsigned kept = is_second_row ? second : first;
      const unsigned got = __shfl_xor_sync(~0u, is_second_row ? first : second, 2);
      const unsigned own[2] = {is_second_row ? got : kept, is_second_row ? kept : got};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const unsigned other = __shfl_xor_sync(~0u, own[pair], 8);
        left.registers[4 * half + pair] = is_right_half ? other : own[pair];
        left.registers[4 * half + 2 + pair] = is_right_half ? own[pair] : other;
      }
    }
    return left;
  }

  template <int COUNT>
  static FINEGRAIN_DEVICE void add_product(Sums (&sums)[COUNT], const Left (&left)[COUNT], const half_t* right,
                                           int stride) {
    const int lane = lane_index();
    const half_t* corner = right + (lane & 3) * stride + ((lane & 8) >> 1) + 8 * (lane >> 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint2 row = load_vector<uint2>(corner + 4 * k * stride);
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        multiply_8x8x4_by_rows(sums[i], left[i].registers[2 * k], left[i].registers[2 * k + 1], row.x, row.y);
    }
  }

  template <int COUNT>
  static FINEGRAIN_DEVICE void add_product_transposed(Sums (&sums)[COUNT], const Left (&left)[COUNT],
                                                      const half_t* right, int stride) {
    const int lane = lane_index();
    unsigned column[8];
    load_row(column, right + ((lane & 3) + ((lane & 8) >> 1) + 8 * (lane >> 4)) * stride);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        multiply_8x8x4_by_columns(sums[i], left[i].registers[2 * k], left[i].registers[2 * k + 1], column[2 * k],
                                  column[2 * k + 1]);
    }
  }

 private:
  static FINEGRAIN_DEVICE void load_row(unsigned (&registers)[8], const half_t* row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 part = load_vector<uint4>(row + 8 * i);
      registers[4 * i] = part.x;
      registers[4 * i + 1] = part.y;
      registers[4 * i + 2] = part.z;
      registers[4 * i + 3] = part.w;
    }
  }
};

// --------------------------------------------------------------------------------- float32: no tensor cores, no TF32

struct Float32 {
  static constexpr int ROW_STEP = 8;
  static constexpr int ROW_LANES_0 = 1, ROW_LANES_1 = 2;

  struct Left {
    float rows[2][16];
  };

  static FINEGRAIN_DEVICE int first_row(int lane) { return lane >> 2; }
  static FINEGRAIN_DEVICE int first_column(int lane) { return 2 * (lane & 3); }

  static FINEGRAIN_DEVICE Left load_left(const float* block, int stride) {
    const float* corner = block + first_row(lane_index()) * stride;
    Left left;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int k = 0; k < 16; k += 4) {
        const float4 part = load_vector<float4>(corner + s * ROW_STEP * stride + k);
        left.rows[s][k] = part.x;
        left.rows[s][k + 1] = part.y;
        left.rows[s][k + 2] = part.z;
        left.rows[s][k + 3] = part.w;
      }
    }
    return left;
  }

  static FINEGRAIN_DEVICE Left to_left(const Sums& sums) {
    const int first = lane_index() & ~3;
    Left left;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int k = 0; k < 16; ++k)
        left.rows[s][k] = __shfl_sync(~0u, sums[4 * (k >> 3) + 2 * s + (k & 1)], first | ((k & 7) >> 1));
    }
    return left;
  }

  template <int COUNT>
  static FINEGRAIN_DEVICE void add_product(Sums (&sums)[COUNT], const Left (&left)[COUNT], const float* right,
                                           int stride) {
    const float* corner = right + first_column(lane_index());
#pragma unroll
    for (int k = 0; k < 16; ++k) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float2 pair = load_vector<float2>(corner + k * stride + 8 * c);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            sums[i][4 * c + 2 * s] = fmaf(left[i].rows[s][k], pair.x, sums[i][4 * c + 2 * s]);
            sums[i][4 * c + 2 * s + 1] = fmaf(left[i].rows[s][k], pair.y, sums[i][4 * c + 2 * s + 1]);
          }
        }
      }
    }
  }

  template <int COUNT>
  static FINEGRAIN_DEVICE void add_product_transposed(Sums (&sums)[COUNT], const Left (&left)[COUNT],
                                                      const float* right, int stride) {
    const float* corner = right + first_column(lane_index()) * stride;
#pragma unroll
    for (int k = 0; k < 16; k += 4) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 column = load_vector<float4>(corner + (8 * c + e) * stride + k);
#pragma unroll
          for (int i = 0; i < COUNT; ++i) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
              const float (&row)[16] = left[i].rows[s];
              float& sum = sums[i][4 * c + 2 * s + e];
              sum = fmaf(row[k], column.x, sum);
              sum = fmaf(row[k + 1], column.y, sum);
              sum = fmaf(row[k + 2], column.z, sum);
              sum = fmaf(row[k + 3], column.w, sum);
            }
          }
        }
      }
    }
  }
};

// ----------------------------------------------------------------------------------------------------------- choice

template <class Element>
struct MatrixOf {
#if FINEGRAIN_ARCH >= 750
  using type = TensorCores<Element>;
#else
  using type = VoltaTensorCores;
#endif
};
template <>
struct MatrixOf<float> {
  using type = Float32;
};
template <class Element>
using WarpMatrix = typename MatrixOf<Element>::type;

// ------------------------------------------------------------------------------------------------------- row
// reductions

template <class Matrix>
FINEGRAIN_DEVICE float sum_of_row(float value) {
  value += __shfl_xor_sync(~0u, value, Matrix::ROW_LANES_0);
  return value + __shfl_xor_sync(~0u, value, Matrix::ROW_LANES_1);
}
template <class Matrix>
FINEGRAIN_DEVICE float maximum_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, Matrix::ROW_LANES_0));
  return fmaxf(value, __shfl_xor_sync(~0u, value, Matrix::ROW_LANES_1));
}

}  // namespace finegrain
