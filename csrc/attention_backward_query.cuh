// Gradient of the queries, of attention or of an attention map.
//
//   P_ij = exp(s_ij - lse_i),   dS_ij = P_ij (dP_ij - delta_i),   dq_i = scale * sum_j dS_ij k_j
//
//   attention       dP = dO V^T,   delta_i = dO_i . o_i - dlse_i
//   attention map   dP_ij = G_j,   delta_i = sum_j P_ij G_j,   dS = 0 in rows and heads that do not count
//
// Where the bias wants a gradient, sum_j dS_ij is added to delta_i for the kernel that comes after: the sum should be
// dlse_i, and what rounding the output did to delta would be all there is of the gradient of a bias that is the same
// for all keys.
//
// A thread block owns ROWS queries and walks through the keys, as in attention_forward.cuh. Each gradient is written by
// one thread block, without atomics: two runs give the same bits.
#pragma once

#include "scores.cuh"

namespace finegrain {

using BackwardQueryShape = Shape<FINEGRAIN_ELEMENT, FINEGRAIN_WIDTH, FINEGRAIN_WARPS, 1, FINEGRAIN_STEP>;

}  // namespace finegrain

FINEGRAIN_KERNEL(attention_backward_query, 32 * FINEGRAIN_WARPS, FINEGRAIN_BLOCKS,
                 finegrain::AttentionArguments arguments) {
  using namespace finegrain;
  using S = BackwardQueryShape;
  using Element = S::Element;
  using Matrix = WarpMatrix<Element>;
  constexpr bool OF_MAP = FINEGRAIN_OF_MAP;
  constexpr int TILES = OF_MAP ? 1 : 2;
  static_assert(SharedBytes<S, TILES, TILES, 3>::value <= FINEGRAIN_SHARED_BYTES,
                "tiles.py gives less shared memory than is used");

  const Place place(arguments, arguments.heads);
  const Sequence sequence(arguments, place.batch);
  const QueryRows rows(arguments, sequence);
  const int head = place.head, kv_head = head / (arguments.heads / arguments.kv_heads);
  const int first_row = (arguments.blocks - 1 - place.block) * S::ROWS;
  if (first_row >= rows.count) return;

  SharedMemory memory;
  Element* query_tile = memory.take<Element>(S::ROWS * S::STRIDE);               // [ROWS, WIDTH]
  Element* grad_tile = memory.take<Element>(OF_MAP ? 0 : S::ROWS * S::STRIDE);   // [ROWS, WIDTH]
  Element* key_tile = memory.take<Element>(S::STEP * S::STRIDE);                 // [STEP, WIDTH]
  Element* value_tile = memory.take<Element>(OF_MAP ? 0 : S::STEP * S::STRIDE);  // [STEP, WIDTH]
  BiasTiles<S, 1> bias_tiles(memory);
  float* grad_map = memory.take<float>(S::STEP);
  int* scratch = memory.take<int>(2 * S::WARPS);

  const auto key = sequence.keys<const Element>(arguments.key, kv_head);
  const auto value = sequence.keys<const Element>(arguments.value, kv_head);
  const KeyBias bias(arguments, sequence, head);
  const bool has_gate = arguments.gate.data, aligned = arguments.aligned;
  const LaneRows<S> lane_rows(arguments, sequence, rows, first_row);
  const int last_query = min(first_row + S::ROWS, rows.count) - 1;
  KeyTiles<S> tiles(arguments, sequence, bias, last_query, 0, scratch);
  if (OF_MAP && arguments.head_mask && !arguments.head_mask[head]) tiles.last = 0;

  const auto row_lse = sequence.queries<const float>(arguments.lse, head);
  const auto row_delta = sequence.queries<const float>(arguments.delta, head);
  float lse[1][2], delta[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const bool counts = row_counts(arguments, sequence, lane_rows, s);
    lse[0][s] = counts ? lse_in_base_2(row_lse[lane_rows.query(0, s)]) : infinity();
    delta[s] = counts ? row_delta[lane_rows.query(0, s)] : 0.0f;
  }

  if (tiles.first < tiles.last) {
    load_tile<S, S::ROWS>(query_tile, sequence.queries<const Element>(arguments.query, head), first_row, rows.count,
                          arguments.head_dim, aligned);
    if (!OF_MAP)
      load_tile<S, S::ROWS>(grad_tile, sequence.queries<const Element>(arguments.grad_output, head), first_row,
                            rows.count, arguments.value_dim, aligned);
  }
  Sums grad_query[S::COLUMN_BLOCKS][1];  // [16, WIDTH] per warp
#pragma unroll
  for (int d = 0; d < S::COLUMN_BLOCKS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) grad_query[d][0][i] = 0.0f;
  }
  float residual[2] = {0.0f, 0.0f};  // sums of dS over this lane's columns
  for (int own = tiles.first; own < tiles.last; ++own) {
    const int first_key = tiles.first_key(own), key_of_thread = first_key + threadIdx.x;
    load_tile<S, S::STEP>(key_tile, key, first_key, tiles.end, arguments.head_dim, aligned);
    if (!OF_MAP) load_tile<S, S::STEP>(value_tile, value, first_key, tiles.end, arguments.value_dim, aligned);
    bias_tiles.fetch(bias, first_key);
    bias_tiles.put(0, has_gate);
    if (OF_MAP && threadIdx.x < S::STEP)
      grad_map[threadIdx.x] =
          key_of_thread < sequence.num_keys ? sequence.keys<const float>(arguments.map, head)[key_of_thread] : 0.0f;
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (lane_rows.first < rows.count) {
      const int own_rows = warp_index() * 16 * S::STRIDE;
      Sums scores[S::STEP_BLOCKS][1];  // [16, STEP] per warp
      dot_products<S>(scores, query_tile + own_rows, key_tile);
      const bool is_masked = arguments.is_causal && first_key + S::STEP - 1 > first_row + sequence.shift;
      dots_to_scores<S>(scores, lane_rows, bias_tiles, 0, has_gate, is_masked, first_key, sequence.shift,
                        arguments.scale * LOG2_E, RowOrigin<S>{lse});
      Sums grad_scores[S::STEP_BLOCKS][1];  // [16, STEP] per warp
      if (!OF_MAP) dot_products<S>(grad_scores, grad_tile + own_rows, value_tile);
#pragma unroll
      for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int s = (i >> 1) & 1;
          const float grad = OF_MAP ? grad_map[16 * n + 8 * (i >> 2) + Matrix::first_column(lane_index()) + (i & 1)]
                                    : grad_scores[n][0][i];
          grad_scores[n][0][i] = exp2_fast(scores[n][0][i]) * (grad - delta[s]);
          if (!OF_MAP) residual[s] += grad_scores[n][0][i];
        }
        typename Matrix::Left left[1] = {Matrix::to_left(grad_scores[n][0])};
#pragma unroll
        for (int d = 0; d < S::COLUMN_BLOCKS; ++d)
          Matrix::add_product(grad_query[d], left, key_tile + 16 * n * S::STRIDE + 16 * d, S::STRIDE);
      }
    }
    __syncthreads();  // nobody reads the tiles any more
  }

  if (!OF_MAP && arguments.grad_bias.data) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float sum = sum_of_row<Matrix>(residual[s]);
      if (lane_rows.exists(0, s) && Matrix::first_column(lane_index()) == 0)
        sequence.queries<float>(arguments.delta, head)[lane_rows.query(0, s)] = delta[s] + sum;
    }
  }

  const auto result = sequence.queries<Element>(arguments.grad_query, head);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (lane_rows.exists(0, s))
      store_row<S>(result.row(lane_rows.query(0, s)), grad_query, 0, s, arguments.scale, arguments.head_dim, aligned);
  }
}
