// Scores in base 2: x_ij = log2(e) (scale q_i . k_j + g_i b_j), -inf where key j is hidden from row i.
#pragma once

#include "tiles.cuh"
#include "warp_matrix.cuh"

namespace finegrain {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// Where a running maximum starts: finite, so that no row needs a test for "nothing seen yet", and below every score
// that a finite bias leaves finite.
constexpr float LOWEST = -1e38f;

FINEGRAIN_DEVICE float bias_in_base_2(float bias) {
  const float scaled = bias * LOG2_E;
  // A finite bias stays finite, since only -inf removes a key; NaN stays NaN.
  return scaled < 0.5f * LOWEST && bias != -infinity() ? 0.5f * LOWEST : scaled;
}

// For the backward kernels: a row that saw no key, or does not count, gives probabilities of 0.
FINEGRAIN_DEVICE float lse_in_base_2(float lse) { return lse == -infinity() ? infinity() : lse * LOG2_E; }

// What the keys of one head and sequence add to the scores.
struct KeyBias {
  const float* bias;
  const unsigned char* padding;
  long long bias_stride;
  long long padding_stride;

  FINEGRAIN_DEVICE KeyBias(const AttentionArguments& arguments, const Sequence& sequence, int head)
      : bias(arguments.bias.data ? sequence.of_keys<const float>(arguments.bias, head) : nullptr),
        padding(arguments.padding.data ? sequence.of_keys<const unsigned char>(arguments.padding, 0) : nullptr),
        bias_stride(arguments.bias.row_stride),
        padding_stride(arguments.padding.row_stride) {}

  // 0 or -inf, for every row
  FINEGRAIN_DEVICE float hidden(int key, int num_keys) const {
    return key < num_keys && (!padding || padding[key * padding_stride]) ? 0.0f : -infinity();
  }
  // for rows that the bias acts on; 0 for keys that do not exist
  FINEGRAIN_DEVICE float added(int key, int num_keys) const {
    return bias && key < num_keys ? bias_in_base_2(bias[key * bias_stride]) : 0.0f;
  }
};

// The biases of a tile of keys in shared memory, for kernels that walk through the keys. Two tiles in turn: the next is
// written while this one is read.
template <class S>
struct BiasTiles {
  float* added;   // [2][STEP], with hidden counted in
  float* hidden;  // [2][STEP], written only where a row gate tells rows apart

  FINEGRAIN_DEVICE explicit BiasTiles(SharedMemory& memory)
      : added(memory.take<float>(2 * S::STEP)), hidden(memory.take<float>(2 * S::STEP)) {}

  FINEGRAIN_DEVICE void load(int turn, const KeyBias& bias, int first_key, int num_keys, bool has_gate) {
    for (int i = threadIdx.x; i < S::STEP; i += S::THREADS) {
      const float hidden_key = bias.hidden(first_key + i, num_keys);
      added[turn * S::STEP + i] = hidden_key + bias.added(first_key + i, num_keys);
      if (has_gate) hidden[turn * S::STEP + i] = hidden_key;
    }
  }
};

// First and last + 1 of this split's tiles of keys (tile = split + own * num_splits) that hold a key visible to some
// row, so that neither the unfilled part of a static cache nor left padding is read. All threads must call it.
template <class S>
FINEGRAIN_DEVICE void visible_tiles(const KeyBias& bias, bool bias_hides, int num_keys, int split, int num_splits,
                                    int& first, int& last, int* scratch) {
  const int lane = lane_index();
  int lowest = last, highest = 0;
  for (int i = threadIdx.x; i < last * S::STEP; i += S::THREADS) {
    const int own = i / S::STEP, key = (split + own * num_splits) * S::STEP + i % S::STEP;
    float added = bias.hidden(key, num_keys);
    if (bias_hides) added += bias.added(key, num_keys);
    if (added != -infinity()) {
      lowest = min(lowest, own);
      highest = max(highest, own + 1);
    }
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    lowest = min(lowest, __shfl_xor_sync(~0u, lowest, bit));
    highest = max(highest, __shfl_xor_sync(~0u, highest, bit));
  }
  if (lane == 0) {
    scratch[2 * warp_index()] = lowest;
    scratch[2 * warp_index() + 1] = highest;
  }
  __syncthreads();
  first = scratch[0], last = scratch[1];
#pragma unroll
  for (int warp = 1; warp < S::WARPS; ++warp) {
    first = min(first, scratch[2 * warp]);
    last = max(last, scratch[2 * warp + 1]);
  }
}

// The keys that a block of query rows walks through, a tile at a time.
template <class S>
struct KeyTiles {
  int first;  // own tiles
  int last;
  int split;
  int num_splits;

  FINEGRAIN_DEVICE KeyTiles(const AttentionArguments& arguments, const Sequence& sequence, const KeyBias& bias,
                            int last_query, int split_, int* scratch)
      : first(0), split(split_), num_splits(arguments.num_splits) {
    int end = sequence.num_keys;
    if (arguments.is_causal) end = min(end, last_query + sequence.shift + 1);
    const int tiles = (max(end, 0) + S::STEP - 1) / S::STEP;
    last = max(tiles - split + num_splits - 1, 0) / num_splits;
    const bool bias_hides = bias.bias && !arguments.gate.data;
    if (bias_hides || bias.padding)
      visible_tiles<S>(bias, bias_hides, sequence.num_keys, split, num_splits, first, last, scratch);
  }
  FINEGRAIN_DEVICE int first_key(int own) const { return (split + own * num_splits) * S::STEP; }
};

// Per lane two rows of each of its blocks of 16: what is read of them once.
template <class S>
struct LaneRows {
  using Matrix = WarpMatrix<typename S::Element>;
  int first;  // row within the tile's sequence of rows, of the warp's first block
  int query[S::ROW_BLOCKS][2];
  bool exists[S::ROW_BLOCKS][2];
  bool gated[S::ROW_BLOCKS][2];  // the bias acts on the row

  FINEGRAIN_DEVICE LaneRows(const AttentionArguments& arguments, const Sequence& sequence, const QueryRows& rows,
                            int first_row) {
    first = first_row + warp_index() * 16 * S::ROW_BLOCKS;
    const unsigned char* gate =
        arguments.gate.data ? sequence.of_queries<const unsigned char>(arguments.gate, 0) : nullptr;
#pragma unroll
    for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        exists[r][s] = row(r, s) < rows.count;
        query[r][s] = rows.query(exists[r][s] ? row(r, s) : 0);
        gated[r][s] = !gate || gate[query[r][s] * arguments.gate.row_stride];
      }
    }
  }
  FINEGRAIN_DEVICE int row(int r, int s) const {
    return first + 16 * r + Matrix::first_row(lane_index()) + s * Matrix::ROW_STEP;
  }
};

// dots = own step^T: the warp's own rows of a tile, and all rows of the tile that is walked through
template <class S>
FINEGRAIN_DEVICE void dot_products(Sums (&dots)[S::STEP_BLOCKS][S::ROW_BLOCKS], const typename S::Element* own,
                                   const typename S::Element* step) {
  using Matrix = WarpMatrix<typename S::Element>;
#pragma unroll
  for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
    for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) dots[n][r][i] = 0.0f;
    }
  }
#pragma unroll
  for (int d = 0; d < S::COLUMN_BLOCKS; ++d) {
    typename Matrix::Left left[S::ROW_BLOCKS];
#pragma unroll
    for (int r = 0; r < S::ROW_BLOCKS; ++r)
      left[r] = Matrix::load_left(own + 16 * r * S::STRIDE + 16 * d, S::STRIDE);
#pragma unroll
    for (int n = 0; n < S::STEP_BLOCKS; ++n)
      Matrix::add_product_transposed(dots[n], left, step + 16 * n * S::STRIDE + 16 * d, S::STRIDE);
  }
}

// Turns dot products of the warp's rows with a tile of keys into scores, in place; relative to those of an origin where
// one is known (lse), which is subtracted before the sum is rounded.
struct NoOrigin {
  FINEGRAIN_DEVICE float subtracted_from(float added, int, int) const { return added; }
};
template <class S>
struct RowOrigin {
  const float (&rows)[S::ROW_BLOCKS][2];
  FINEGRAIN_DEVICE float subtracted_from(float added, int r, int s) const { return added - rows[r][s]; }
};

template <class S, class Origin>
FINEGRAIN_DEVICE void dots_to_scores(Sums (&scores)[S::STEP_BLOCKS][S::ROW_BLOCKS], const LaneRows<S>& rows,
                                     const BiasTiles<S>& bias, int turn, bool has_gate, bool is_causal, int first_key,
                                     int shift, float scale, Origin origin) {
  const int first_column = WarpMatrix<typename S::Element>::first_column(lane_index());
#pragma unroll
  for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 16 * n + 8 * c + first_column;
      const float2 added = load_vector<float2>(bias.added + turn * S::STEP + column);
      const float2 hidden = has_gate ? load_vector<float2>(bias.hidden + turn * S::STEP + column) : added;
#pragma unroll
      for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          float& first = scores[n][r][4 * c + 2 * s];
          float& second = scores[n][r][4 * c + 2 * s + 1];
          first = fmaf(first, scale, origin.subtracted_from(rows.gated[r][s] ? added.x : hidden.x, r, s));
          second = fmaf(second, scale, origin.subtracted_from(rows.gated[r][s] ? added.y : hidden.y, r, s));
          if (is_causal) {
            const int visible = rows.query[r][s] + shift - (first_key + column);
            if (visible < 0) first = -infinity();
            if (visible < 1) second = -infinity();
          }
        }
      }
    }
  }
}

}  // namespace finegrain
