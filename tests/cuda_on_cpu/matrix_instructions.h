// Which lane holds which element, as the PTX ISA documents it for mma and ldmatrix, and the arithmetic.
#pragma once

#include <cstring>

#include "element_conversions.h"

namespace simulator {

// What a lane brings to a collective instruction, and takes from it.
struct Operands {
  float sums[8];
  unsigned left[4];
  unsigned right[2];
  const void* row;
  unsigned site;
  int source_lane;
  unsigned registers[4];
};
using WarpOperands = Operands[32];

struct Half {
  static float to_float(unsigned short bits) { return half_to_float(bits); }
};
struct Bfloat16 {
  static float to_float(unsigned short bits) { return bfloat16_to_float(bits); }
};

// Loops of their own, without branches, for the sake of vector instructions.
template <class Element, int COUNT>
inline void convert(const unsigned short (&from)[COUNT], float (&to)[COUNT]) {
  for (int i = 0; i < COUNT; ++i) to[i] = Element::to_float(from[i]);
}

template <int M, int N, int K>
inline void multiply_add(float (&sums)[M][N], const float (&left)[M * K], const float (&right)[N * K]) {
  float rows[K][N];
  for (int n = 0; n < N; ++n) {
    for (int k = 0; k < K; ++k) rows[k][n] = right[n * K + k];
  }
  for (int m = 0; m < M; ++m) {
    for (int k = 0; k < K; ++k) {
      const float factor = left[m * K + k];
      for (int n = 0; n < N; ++n) sums[m][n] += factor * rows[k][n];
    }
  }
}

// m16n8k8 (K = 8) and m16n8k16: in groups of four lanes, each holding pairs of neighbours.
template <class Element, int K>
inline void multiply_16x8(WarpOperands& lanes) {
  constexpr int PAIRS = K / 8;
  unsigned short left_bits[16 * K], right_bits[8 * K];  // right by columns, as the lanes hold it
  float left[16 * K], right[8 * K], sums[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 2 * PAIRS; ++i)
      memcpy(&left_bits[(group + i % 2 * 8) * K + pair + i / 2 * 8], &lanes[lane].left[i], 4);
    for (int i = 0; i < PAIRS; ++i) memcpy(&right_bits[group * K + pair + 8 * i], &lanes[lane].right[i], 4);
    for (int i = 0; i < 2; ++i) memcpy(&sums[group + 8 * i][pair], &lanes[lane].sums[2 * i], 8);
  }
  convert<Element>(left_bits, left);
  convert<Element>(right_bits, right);
  multiply_add<16, 8, K>(sums, left, right);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2; ++i) memcpy(&lanes[lane].sums[2 * i], &sums[lane / 4 + 8 * i][2 * (lane % 4)], 8);
  }
}

// m8n8k4: four products, each by four lanes of the lower half of the warp and the same four of the upper half.
template <bool RIGHT_IS_HELD_BY_ROWS>
inline void multiply_8x8x4(WarpOperands& lanes) {
  for (int quad = 0; quad < 4; ++quad) {
    unsigned short left_bits[8 * 4], held_bits[8 * 4], right_bits[8 * 4];
    float left[8 * 4], right[8 * 4], sums[8][8];
    for (int half = 0; half < 2; ++half) {
      for (int own = 0; own < 4; ++own) {
        const Operands& lane = lanes[16 * half + 4 * quad + own];
        memcpy(&left_bits[(own + 4 * half) * 4], lane.left, 8);
        memcpy(&held_bits[(own + 4 * half) * 4], lane.right, 8);
        for (int i = 0; i < 8; ++i) sums[(own & 1) + (i & 2) + 4 * half][(i & 4) + (own & 2) + (i & 1)] = lane.sums[i];
      }
    }
    if (RIGHT_IS_HELD_BY_ROWS) {  // a lane has columns 0-3 or, in the upper half, 4-7 of a row
      for (int k = 0; k < 4; ++k) {
        for (int n = 0; n < 8; ++n) right_bits[n * 4 + k] = held_bits[(k + n / 4 * 4) * 4 + n % 4];
      }
    } else {
      memcpy(right_bits, held_bits, sizeof right_bits);
    }
    convert<Half>(left_bits, left);
    convert<Half>(right_bits, right);
    multiply_add<8, 8, 4>(sums, left, right);
    for (int half = 0; half < 2; ++half) {
      for (int own = 0; own < 4; ++own) {
        float (&to)[8] = lanes[16 * half + 4 * quad + own].sums;
        for (int i = 0; i < 8; ++i) to[i] = sums[(own & 1) + (i & 2) + 4 * half][(i & 4) + (own & 2) + (i & 1)];
      }
    }
  }
}

// ldmatrix.x4: lane 8 i + r names row r of matrix i; lane l gets elements 2 (l % 4) and the next of row l / 4 of each,
// or of its column l / 4 if transposed.
inline void load_four_matrices(WarpOperands& lanes, bool is_transposed) {
  for (int i = 0; i < 4; ++i) {
    unsigned short rows[8][8], columns[8][8];
    for (int r = 0; r < 8; ++r) memcpy(rows[r], lanes[8 * i + r].row, 16);
    if (is_transposed) {
      for (int r = 0; r < 8; ++r) {
        for (int c = 0; c < 8; ++c) columns[c][r] = rows[r][c];
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      memcpy(&lanes[lane].registers[i], &(is_transposed ? columns : rows)[lane / 4][2 * (lane % 4)], 4);
  }
}

}  // namespace simulator
