// Flash attention with a bias per key (FlashAttention-2, arXiv 2307.08691; CoF, arXiv 2412.16869, Eq. 3).
//
//   s_ij = scale * q_i . k_j + g_i b_j,   o_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// A thread block owns ROWS rows of queries and walks through tiles of STEP keys; its warps own 16 * ROW_BLOCKS rows
// each, whose scores, probabilities and output never leave the registers. While the scores are computed the tile of
// values arrives, and while these are added up the next tile of keys. With few rows, the heads that share keys are
// folded into one tile, and the tiles of keys are dealt out in turn to num_splits blocks, whose results
// merge_splits.cuh adds up.
#pragma once

#include "scores.cuh"

namespace finegrain {

using ForwardShape = Shape<FINEGRAIN_ELEMENT, FINEGRAIN_WIDTH, FINEGRAIN_WARPS, FINEGRAIN_ROW_BLOCKS, FINEGRAIN_STEP>;

template <class S>
struct ForwardState {
  Sums output[S::COLUMN_BLOCKS][S::ROW_BLOCKS];  // [16 ROW_BLOCKS, WIDTH] per warp
  float maximum[S::ROW_BLOCKS][2];
  float total[S::ROW_BLOCKS][2];  // of this lane's columns

  FINEGRAIN_DEVICE ForwardState() {
#pragma unroll
    for (int r = 0; r < S::ROW_BLOCKS; ++r) {
      maximum[r][0] = maximum[r][1] = LOWEST;
      total[r][0] = total[r][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < S::COLUMN_BLOCKS; ++d) {
#pragma unroll
        for (int i = 0; i < 8; ++i) output[d][r][i] = 0.0f;
      }
    }
  }

  // Scores become probabilities relative to the new maximum; what was added up so far is brought to it.
  FINEGRAIN_DEVICE void online_softmax(Sums (&scores)[S::STEP_BLOCKS][S::ROW_BLOCKS]) {
#pragma unroll
    for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float highest = maximum[r][s];
#pragma unroll
        for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c)
            highest = fmaxf(highest, fmaxf(scores[n][r][4 * c + 2 * s], scores[n][r][4 * c + 2 * s + 1]));
        }
        highest = maximum_of_row<WarpMatrix<typename S::Element>>(highest);
        const float correction = exp2_fast(maximum[r][s] - highest);
        maximum[r][s] = highest;
        float sum = total[r][s] * correction;
#pragma unroll
        for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = scores[n][r][4 * c + 2 * s + e];
              score = exp2_fast(score - highest);
              sum += score;
            }
          }
        }
        total[r][s] = sum;
#pragma unroll
        for (int d = 0; d < S::COLUMN_BLOCKS; ++d) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            output[d][r][4 * c + 2 * s] *= correction;
            output[d][r][4 * c + 2 * s + 1] *= correction;
          }
        }
      }
    }
  }

  // output += probabilities value
  FINEGRAIN_DEVICE void add_values(const Sums (&probabilities)[S::STEP_BLOCKS][S::ROW_BLOCKS],
                                   const typename S::Element* value) {
    using Matrix = WarpMatrix<typename S::Element>;
#pragma unroll
    for (int n = 0; n < S::STEP_BLOCKS; ++n) {
      typename Matrix::Left left[S::ROW_BLOCKS];
#pragma unroll
      for (int r = 0; r < S::ROW_BLOCKS; ++r) left[r] = Matrix::to_left(probabilities[n][r]);
#pragma unroll
      for (int d = 0; d < S::COLUMN_BLOCKS; ++d)
        Matrix::add_product(output[d], left, value + 16 * n * S::STRIDE + 16 * d, S::STRIDE);
    }
  }
};

template <class S, class Output>
FINEGRAIN_DEVICE void store_rows(const ForwardState<S>& state, const float (&weight)[S::ROW_BLOCKS][2], Output* base,
                                 const LaneRows<S>& lane_rows, const QueryRows& rows, const Rows& output, int dim,
                                 bool aligned) {
#pragma unroll
  for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (lane_rows.exists(r, s))
        store_row<S>(base + rows.offset(lane_rows.row(r, s), output), state.output, r, s, weight[r][s], dim, aligned);
    }
  }
}

}  // namespace finegrain

FINEGRAIN_KERNEL(attention_forward, 32 * FINEGRAIN_WARPS, FINEGRAIN_BLOCKS, finegrain::AttentionArguments arguments) {
  using namespace finegrain;
  using S = ForwardShape;
  using Element = S::Element;
  static_assert(SharedBytes<S, 1, 2, 4>::value <= FINEGRAIN_SHARED_BYTES,
                "tiles.py gives less shared memory than is used");

  const int group_size = arguments.heads / arguments.kv_heads;
  const Place place(arguments, arguments.fold_heads ? arguments.kv_heads : arguments.heads);
  const Sequence sequence(arguments, place.batch);
  const QueryRows rows(arguments, sequence);
  const int head = arguments.fold_heads ? place.head * group_size : place.head, kv_head = head / group_size;
  // Under a causal mask the last rows have the most to do: they come first.
  const int first_row = (arguments.blocks - 1 - place.block) * S::ROWS;
  if (first_row >= rows.count) return;

  SharedMemory memory;
  Element* query_tile = memory.take<Element>(S::ROWS * S::STRIDE);  // [ROWS, WIDTH]
  Element* key_tile = memory.take<Element>(S::STEP * S::STRIDE);    // [STEP, WIDTH]
  Element* value_tile = memory.take<Element>(S::STEP * S::STRIDE);  // [STEP, WIDTH]
  BiasTiles<S, 2> bias_tiles(memory);
  int* scratch = memory.take<int>(2 * S::WARPS);

  const auto query = sequence.queries<const Element>(arguments.query, head);
  const auto key = sequence.keys<const Element>(arguments.key, kv_head);
  const auto value = sequence.keys<const Element>(arguments.value, kv_head);
  const KeyBias bias(arguments, sequence, head);
  const bool has_gate = arguments.gate.data, aligned = arguments.aligned;
  const LaneRows<S> lane_rows(arguments, sequence, rows, first_row);
  const bool is_busy = lane_rows.first < rows.count;  // or the warp only helps to load

  const int last_query = rows.folded ? rows.num_queries - 1 : min(first_row + S::ROWS, rows.count) - 1;
  const int first_query = rows.folded ? 0 : first_row;
  const KeyTiles<S> tiles(arguments, sequence, bias, last_query, place.split, scratch);

  TileCopy<S, S::STEP> key_copy, value_copy;
  auto begin_keys = [&](int first_key) {
    key_copy.begin(key_tile, key, first_key, tiles.end, arguments.head_dim, aligned);
    commit_copies();
  };

  ForwardState<S> state;
  if (tiles.first < tiles.last) {
    const int first_key = tiles.first_key(tiles.first);
    gather_tile<S, S::ROWS>(
        query_tile, query.data, [&](int row) { return rows.offset(first_row + row, arguments.query); },
        rows.count - first_row, arguments.head_dim, aligned);
    begin_keys(first_key);
    bias_tiles.fetch(bias, first_key);
    bias_tiles.put(0, has_gate);
    key_copy.finish(key_tile, aligned);
  }
  for (int own = tiles.first, turn = 0; own < tiles.last; ++own, turn ^= 1) {
    const int first_key = tiles.first_key(own), next_key = tiles.first_key(own + 1);
    const bool is_last = own + 1 == tiles.last;
    wait_for_copies<0>();
    __syncthreads();  // the keys are here, and nobody reads the values of the tile before any more
    value_copy.begin(value_tile, value, first_key, tiles.end, arguments.value_dim, aligned);
    commit_copies();
    if (!is_last) bias_tiles.fetch(bias, next_key);
    Sums scores[S::STEP_BLOCKS][S::ROW_BLOCKS];  // [16 ROW_BLOCKS, STEP] per warp
    if (is_busy) dot_products<S>(scores, query_tile + warp_index() * 16 * S::ROW_BLOCKS * S::STRIDE, key_tile);
    value_copy.finish(value_tile, aligned);
    wait_for_copies<0>();
    __syncthreads();  // the values are here, and nobody reads the keys any more
    if (!is_last) begin_keys(next_key);
    if (is_busy) {
      const bool is_masked = arguments.is_causal && first_key + S::STEP - 1 > first_query + sequence.shift;
      dots_to_scores<S>(scores, lane_rows, bias_tiles, turn, has_gate, is_masked, first_key, sequence.shift,
                        arguments.scale * LOG2_E, NoOrigin{});
      state.online_softmax(scores);
      state.add_values(scores, value_tile);
    }
    if (!is_last) {
      key_copy.finish(key_tile, aligned);
      bias_tiles.put(turn ^ 1, has_gate);
    }
  }
  if (!is_busy) return;

  float weight[S::ROW_BLOCKS][2];
  float* lse = sequence.queries<float>(arguments.lse, head).data + place.split * arguments.lse_split_stride;
#pragma unroll
  for (int r = 0; r < S::ROW_BLOCKS; ++r) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float total = sum_of_row<WarpMatrix<Element>>(state.total[r][s]);
      weight[r][s] = total == 0.0f ? 0.0f : 1.0f / total;  // a row that saw no key: 0
      if (arguments.lse.data && lane_rows.exists(r, s) && WarpMatrix<Element>::first_column(lane_index()) == 0)
        lse[rows.offset(lane_rows.row(r, s), arguments.lse)] =
            total == 0.0f ? -infinity() : (state.maximum[r][s] + log2f(total)) * LN_2;
    }
  }
  if (arguments.num_splits > 1) {
    float* output = sequence.queries<float>(arguments.output, head).data + place.split * arguments.output_split_stride;
    store_rows<S>(state, weight, output, lane_rows, rows, arguments.output, arguments.value_dim, aligned);
  } else {
    Element* output = sequence.queries<Element>(arguments.output, head).data;
    store_rows<S>(state, weight, output, lane_rows, rows, arguments.output, arguments.value_dim, aligned);
  }
}
