// What an attention map needs of every row that counts, without an output:
//
//   lse_i = log sum_j exp(s_ij)                  (the map itself)
//   delta_i = sum_j P_ij G_j / sum_j P_ij,  P_ij = exp(s_ij - lse_i)
//                                                (its backward pass, with FINEGRAIN_OF_MAP; what lse was rounded by
//                                                cancels out)
//
// A thread block owns ROWS queries and walks through the keys, as in attention_forward.cuh; blocks of which no row
// counts have nothing to do, and write nothing.
#pragma once

#include "scores.cuh"

namespace finegrain {

using RowsShape = Shape<FINEGRAIN_ELEMENT, FINEGRAIN_WIDTH, FINEGRAIN_WARPS, 1, FINEGRAIN_STEP>;

}  // namespace finegrain

FINEGRAIN_KERNEL(attention_rows, 32 * FINEGRAIN_WARPS, FINEGRAIN_BLOCKS, finegrain::AttentionArguments arguments) {
  using namespace finegrain;
  using S = RowsShape;
  using Element = S::Element;
  using Matrix = WarpMatrix<Element>;
  constexpr bool OF_MAP = FINEGRAIN_OF_MAP;
  static_assert(SharedBytes<S, 1, 1, 3>::value <= FINEGRAIN_SHARED_BYTES,
                "tiles.py gives less shared memory than is used");

  const Place place(arguments, arguments.heads);
  const Sequence sequence(arguments, place.batch);
  const QueryRows rows(arguments, sequence);
  const int head = place.head, kv_head = head / (arguments.heads / arguments.kv_heads);
  const int first_row = (arguments.blocks - 1 - place.block) * S::ROWS;
  if (first_row >= rows.count || (arguments.head_mask && !arguments.head_mask[head])) return;

  const LaneRows<S> lane_rows(arguments, sequence, rows, first_row);
  bool counts[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) counts[s] = row_counts(arguments, sequence, lane_rows, s);
  if (!__syncthreads_or(counts[0] || counts[1])) return;

  SharedMemory memory;
  Element* query_tile = memory.take<Element>(S::ROWS * S::STRIDE);  // [ROWS, WIDTH]
  Element* key_tile = memory.take<Element>(S::STEP * S::STRIDE);    // [STEP, WIDTH]
  BiasTiles<S, 1> bias_tiles(memory);
  float* grad_map = memory.take<float>(S::STEP);
  int* scratch = memory.take<int>(2 * S::WARPS);

  const auto key = sequence.keys<const Element>(arguments.key, kv_head);
  const KeyBias bias(arguments, sequence, head);
  const bool has_gate = arguments.gate.data, aligned = arguments.aligned;
  const int last_query = min(first_row + S::ROWS, rows.count) - 1;
  const KeyTiles<S> tiles(arguments, sequence, bias, last_query, 0, scratch);

  if (tiles.first < tiles.last)
    load_tile<S, S::ROWS>(query_tile, sequence.queries<const Element>(arguments.query, head), first_row, rows.count,
                          arguments.head_dim, aligned);
  float maximum[2] = {LOWEST, LOWEST}, total[2] = {0.0f, 0.0f}, expected[2] = {0.0f, 0.0f}, lse[1][2];
  const auto row_lse = sequence.queries<float>(arguments.lse, head);
  if (OF_MAP) {
#pragma unroll
    for (int s = 0; s < 2; ++s) lse[0][s] = counts[s] ? lse_in_base_2(row_lse[lane_rows.query(0, s)]) : infinity();
  }
  for (int own = tiles.first; own < tiles.last; ++own) {
    const int first_key = tiles.first_key(own), key_of_thread = first_key + threadIdx.x;
    load_tile<S, S::STEP>(key_tile, key, first_key, tiles.end, arguments.head_dim, aligned);
    bias_tiles.fetch(bias, first_key);
    bias_tiles.put(0, has_gate);
    if (OF_MAP && threadIdx.x < S::STEP)
      grad_map[threadIdx.x] =
          key_of_thread < sequence.num_keys ? sequence.keys<const float>(arguments.map, head)[key_of_thread] : 0.0f;
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (lane_rows.first < rows.count) {
      Sums scores[S::STEP_BLOCKS][1];  // [16, STEP] per warp
      dot_products<S>(scores, query_tile + warp_index() * 16 * S::STRIDE, key_tile);
      const bool is_masked = arguments.is_causal && first_key + S::STEP - 1 > first_row + sequence.shift;
      const float scale = arguments.scale * LOG2_E;
      if (OF_MAP) {
        dots_to_scores<S>(scores, lane_rows, bias_tiles, 0, has_gate, is_masked, first_key, sequence.shift, scale,
                          RowOrigin<S>{lse});
      } else {
        dots_to_scores<S>(scores, lane_rows, bias_tiles, 0, has_gate, is_masked, first_key, sequence.shift, scale,
                          NoOrigin{});
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          float highest = maximum[s];
#pragma unroll
          for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c)
              highest = fmaxf(highest, fmaxf(scores[n][0][4 * c + 2 * s], scores[n][0][4 * c + 2 * s + 1]));
          }
          highest = maximum_of_row<Matrix>(highest);
          total[s] *= exp2_fast(maximum[s] - highest);
          maximum[s] = highest;
        }
      }
#pragma unroll
      for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int s = (i >> 1) & 1, column = 16 * n + 8 * (i >> 2) + Matrix::first_column(lane_index()) + (i & 1);
          const float probability = exp2_fast(OF_MAP ? scores[n][0][i] : scores[n][0][i] - maximum[s]);
          total[s] += probability;
          if (OF_MAP) expected[s] = fmaf(probability, grad_map[column], expected[s]);
        }
      }
    }
    __syncthreads();  // nobody reads the tiles any more
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float sum = sum_of_row<Matrix>(total[s]), expectation = OF_MAP ? sum_of_row<Matrix>(expected[s]) : 0.0f;
    if (!lane_rows.exists(0, s) || Matrix::first_column(lane_index()) != 0) continue;
    const int query = lane_rows.query(0, s);
    if (OF_MAP)
      sequence.queries<float>(arguments.delta, head)[query] = sum == 0.0f ? 0.0f : expectation / sum;
    else
      row_lse[query] = sum == 0.0f ? -infinity() : (maximum[s] + log2f(sum)) * LN_2;
  }
}
