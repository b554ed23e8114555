// Scores in base 2: x_ij = log2(e) (scale q_i . k_j + g_i b_j), -inf where key j is hidden from row i.
#pragma once

#include "tiles.cuh"
#include "warp_matrix.cuh"

namespace finegrain {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// Where a running maximum starts: below every score and yet finite, so that no row needs a test for "nothing seen yet".
constexpr float LOWEST = -1e38f;

// In natural-log units; finegrain_ops/backends/interface.py says why.
constexpr float LARGEST_BIAS = 131072.0f;

// A finite bias is kept where float32 still tells scores apart; infinities and NaN stay.
FINEGRAIN_DEVICE float bias_in_base_2(float bias) {
  if (bias < -LARGEST_BIAS && bias != -infinity()) bias = -LARGEST_BIAS;
  if (bias > LARGEST_BIAS && bias != infinity()) bias = LARGEST_BIAS;
  return bias * LOG2_E;
}

// For the backward kernels: a row that saw no key, or does not count, gives probabilities of 0.
FINEGRAIN_DEVICE float lse_in_base_2(float lse) { return lse == -infinity() ? infinity() : lse * LOG2_E; }

// What the keys of one head and sequence add to the scores.
struct KeyBias {
  RowView<const float> bias;
  RowView<const unsigned char> padding;
  bool has_bias;
  bool has_padding;
  int num_keys;

  FINEGRAIN_DEVICE KeyBias(const AttentionArguments& arguments, const Sequence& sequence, int head)
      : bias(sequence.keys<const float>(arguments.bias, head)),
        padding(sequence.keys<const unsigned char>(arguments.padding)),
        has_bias(arguments.bias.data),
        has_padding(arguments.padding.data),
        num_keys(sequence.num_keys) {}

  // 0 or -inf, for every row
  FINEGRAIN_DEVICE float hidden(int key) const {
    return key < num_keys && (!has_padding || padding[key]) ? 0.0f : -infinity();
  }
  // for rows that the bias acts on; 0 for keys that do not exist
  FINEGRAIN_DEVICE float added(int key) const { return has_bias && key < num_keys ? bias_in_base_2(bias[key]) : 0.0f; }
};

// The biases of a tile of keys in shared memory, for kernels that walk through the keys; TURNS tiles in turn, so that
// the next can be written while one is read. Every thread fetches that of one key, and puts it where all can see it.
template <class S, int TURNS>
struct BiasTiles {
  static_assert(S::STEP <= S::THREADS, "a thread for every key of a step");
  float* added;   // [TURNS][STEP], with hidden counted in
  float* hidden;  // [TURNS][STEP], written only where a row gate tells rows apart
  float fetched_added;
  float fetched_hidden;

  FINEGRAIN_DEVICE explicit BiasTiles(SharedMemory& memory)
      : added(memory.take<float>(TURNS * S::STEP)), hidden(memory.take<float>(TURNS * S::STEP)) {}

  FINEGRAIN_DEVICE void fetch(const KeyBias& bias, int first_key) {
    if (threadIdx.x >= S::STEP) return;
    fetched_hidden = bias.hidden(first_key + threadIdx.x);
    fetched_added = fetched_hidden + bias.added(first_key + threadIdx.x);
  }
  FINEGRAIN_DEVICE void put(int turn, bool has_gate) {
    if (threadIdx.x >= S::STEP) return;
    added[turn * S::STEP + threadIdx.x] = fetched_added;
    if (has_gate) hidden[turn * S::STEP + threadIdx.x] = fetched_hidden;
  }
};

// First and last + 1 of this split's tiles of keys (tile = split + own * num_splits) that hold a key visible to some
// row, and the last + 1 of these keys, so that neither the unfilled part of a static cache nor left padding is read.
// All threads must call it.
template <class S>
FINEGRAIN_DEVICE void visible_tiles(const KeyBias& bias, bool bias_hides, int split, int num_splits, int& first,
                                    int& last, int& end, int* scratch) {
  const int lane = lane_index();
  int lowest = last, highest = 0;  // tile, key
  for (int i = threadIdx.x; i < last * S::STEP; i += S::THREADS) {
    const int own = i / S::STEP, key = (split + own * num_splits) * S::STEP + i % S::STEP;
    float added = bias.hidden(key);
    if (bias_hides) added += bias.added(key);
    if (added != -infinity()) {
      lowest = min(lowest, own);
      highest = max(highest, key + 1);
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
  first = scratch[0], end = scratch[1];
#pragma unroll
  for (int warp = 1; warp < S::WARPS; ++warp) {
    first = min(first, scratch[2 * warp]);
    end = max(end, scratch[2 * warp + 1]);
  }
  last = end > 0 ? ((end - 1) / S::STEP - split) / num_splits + 1 : 0;
}

// The keys that a block of query rows walks through, a tile at a time.
template <class S>
struct KeyTiles {
  int first;  // own tiles
  int last;
  int end;  // no row sees a key from here on: an unfilled cache may hold NaN there, which must not meet a weight of 0
  int split;
  int num_splits;

  FINEGRAIN_DEVICE KeyTiles(const AttentionArguments& arguments, const Sequence& sequence, const KeyBias& bias,
                            int last_query, int split_, int* scratch)
      : first(0), split(split_), num_splits(arguments.num_splits) {
    end = sequence.num_keys;
    if (arguments.is_causal) end = min(end, last_query + sequence.shift + 1);
    const int tiles = (max(end, 0) + S::STEP - 1) / S::STEP;
    last = max(tiles - split + num_splits - 1, 0) / num_splits;
    const bool bias_hides = bias.has_bias && !arguments.gate.data;
    if (bias_hides || bias.has_padding)
      visible_tiles<S>(bias, bias_hides, split, num_splits, first, last, end, scratch);
  }
  FINEGRAIN_DEVICE int first_key(int own) const { return (split + own * num_splits) * S::STEP; }
};

// Per lane two rows of each of its blocks of 16.
template <class S>
struct LaneRows {
  using Matrix = WarpMatrix<typename S::Element>;
  QueryRows rows;
  int first;                     // of the warp
  bool gated[S::ROW_BLOCKS][2];  // the bias acts on the row

  FINEGRAIN_DEVICE LaneRows(const AttentionArguments& arguments, const Sequence& sequence, const QueryRows& rows_,
                            int first_row)
      : rows(rows_), first(first_row + warp_index() * 16 * S::ROW_BLOCKS) {
    const auto gate = sequence.queries<const unsigned char>(arguments.gate);
#pragma unroll
    for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
      for (int s = 0; s < 2; ++s) gated[r][s] = !arguments.gate.data || (exists(r, s) && gate[query(r, s)]);
    }
  }
  FINEGRAIN_DEVICE int row(int r, int s) const {
    return first + 16 * r + Matrix::first_row(lane_index()) + s * Matrix::ROW_STEP;
  }
  FINEGRAIN_DEVICE bool exists(int r, int s) const { return row(r, s) < rows.count; }
  FINEGRAIN_DEVICE int query(int r, int s) const { return rows.query(row(r, s)); }
};

// Whether a row is there, and one that an attention map counts.
template <class S>
FINEGRAIN_DEVICE bool row_counts(const AttentionArguments& arguments, const Sequence& sequence, const LaneRows<S>& rows,
                                 int s) {
  if (!rows.exists(0, s)) return false;
  return !arguments.row_mask.data || sequence.queries<const unsigned char>(arguments.row_mask)[rows.query(0, s)];
}

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
    for (int r = 0; r < S::ROW_BLOCKS; ++r) left[r] = Matrix::load_left(own + 16 * r * S::STRIDE + 16 * d, S::STRIDE);
#pragma unroll
    for (int n = 0; n < S::STEP_BLOCKS; ++n)
      Matrix::add_product_transposed(dots[n], left, step + 16 * n * S::STRIDE + 16 * d, S::STRIDE);
  }
}

// Where the scores of a row are counted from: 0, or a known lse, subtracted before their sum is rounded.
struct NoOrigin {
  FINEGRAIN_DEVICE float subtracted_from(float added, int, int) const { return added; }
};
template <class S>
struct RowOrigin {
  const float (&rows)[S::ROW_BLOCKS][2];
  FINEGRAIN_DEVICE float subtracted_from(float added, int r, int s) const { return added - rows[r][s]; }
};

// scores = scale * dots + bias, in place
template <class S, bool HAS_GATE, int TURNS, class Origin>
FINEGRAIN_DEVICE void add_bias(Sums (&scores)[S::STEP_BLOCKS][S::ROW_BLOCKS], const LaneRows<S>& rows,
                               const BiasTiles<S, TURNS>& bias, int turn, float scale, Origin origin) {
  const int first_column = WarpMatrix<typename S::Element>::first_column(lane_index());
#pragma unroll
  for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = turn * S::STEP + 16 * n + 8 * c + first_column;
      const float2 added = load_vector<float2>(bias.added + column);
      const float2 hidden = HAS_GATE ? load_vector<float2>(bias.hidden + column) : added;
#pragma unroll
      for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const bool is_gated = !HAS_GATE || rows.gated[r][s];
          float& first = scores[n][r][4 * c + 2 * s];
          float& second = scores[n][r][4 * c + 2 * s + 1];
          first = fmaf(first, scale, origin.subtracted_from(is_gated ? added.x : hidden.x, r, s));
          second = fmaf(second, scale, origin.subtracted_from(is_gated ? added.y : hidden.y, r, s));
        }
      }
    }
  }
}

// -inf for keys after the last that a row may see, under a causal mask
template <class S>
FINEGRAIN_DEVICE void hide_later_keys(Sums (&scores)[S::STEP_BLOCKS][S::ROW_BLOCKS], const LaneRows<S>& rows,
                                      int first_key, int shift) {
  const int first_column = WarpMatrix<typename S::Element>::first_column(lane_index());
#pragma unroll
  for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int last_column = rows.query(r, s) + shift - first_key - first_column;
#pragma unroll
      for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (16 * n + 8 * c + e > last_column) scores[n][r][4 * c + 2 * s + e] = -infinity();
          }
        }
      }
    }
  }
}

// Turns dot products of the warp's rows with a tile of keys into scores, in place.
template <class S, int TURNS, class Origin>
FINEGRAIN_DEVICE void dots_to_scores(Sums (&scores)[S::STEP_BLOCKS][S::ROW_BLOCKS], const LaneRows<S>& rows,
                                     const BiasTiles<S, TURNS>& bias, int turn, bool has_gate, bool is_masked,
                                     int first_key, int shift, float scale, Origin origin) {
  if (has_gate) {
    add_bias<S, true>(scores, rows, bias, turn, scale, origin);
  } else {
    add_bias<S, false>(scores, rows, bias, turn, scale, origin);
  }
  if (is_masked) hide_later_keys<S>(scores, rows, first_key, shift);
}

}  // namespace finegrain
