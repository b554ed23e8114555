// Gradients of the keys, the values and the bias, of attention or of an attention map; see attention_backward_query.cuh
// for the equations.
//
//   dk_j = scale * sum_i dS_ij q_i,   dv_j = sum_i P_ij dO_i,   db_j = sum_i g_i dS_ij
//
// A thread block owns ROWS keys of a KV head and walks through the queries of every head that shares them, so that
// these gradients too are written once, without atomics. That of the bias is written for every head.
#pragma once

#include "scores_transposed.cuh"

namespace finegrain {

using BackwardKeysShape = Shape<FINEGRAIN_ELEMENT, FINEGRAIN_WIDTH, FINEGRAIN_WARPS, 1, FINEGRAIN_STEP>;

}  // namespace finegrain

FINEGRAIN_KERNEL(attention_backward_keys, 32 * FINEGRAIN_WARPS, FINEGRAIN_BLOCKS,
                 finegrain::AttentionArguments arguments) {
  using namespace finegrain;
  using S = BackwardKeysShape;
  using Element = S::Element;
  using Matrix = WarpMatrix<Element>;
  constexpr bool OF_MAP = FINEGRAIN_OF_MAP;
  constexpr int TILES = OF_MAP ? 1 : 2;
  static_assert(SharedBytes<S, TILES, TILES, 3>::value <= FINEGRAIN_SHARED_BYTES,
                "tiles.py gives less shared memory than is used");

  const Place place(arguments, arguments.kv_heads);
  const Sequence sequence(arguments, place.batch);
  const int kv_head = place.head, group_size = arguments.heads / arguments.kv_heads;
  const int first_key = place.block * S::ROWS, keys_left = sequence.num_keys - first_key;
  if (keys_left <= 0) return;

  SharedMemory memory;
  Element* key_tile = memory.take<Element>(S::ROWS * S::STRIDE);                 // [ROWS, WIDTH]
  Element* value_tile = memory.take<Element>(OF_MAP ? 0 : S::ROWS * S::STRIDE);  // [ROWS, WIDTH]
  Element* query_tile = memory.take<Element>(S::STEP * S::STRIDE);               // [STEP, WIDTH]
  Element* grad_tile = memory.take<Element>(OF_MAP ? 0 : S::STEP * S::STRIDE);   // [STEP, WIDTH]
  QueryColumns<S> columns(memory);

  const bool aligned = arguments.aligned;
  load_tile<S, S::ROWS>(key_tile, sequence.keys<const Element>(arguments.key, kv_head), first_key, sequence.num_keys,
                        arguments.head_dim, aligned);
  if (!OF_MAP)
    load_tile<S, S::ROWS>(value_tile, sequence.keys<const Element>(arguments.value, kv_head), first_key,
                          sequence.num_keys, arguments.value_dim, aligned);

  LaneKeys<S> keys(sequence, first_key);
  const bool is_busy = 16 * warp_index() < keys_left;  // or the warp only helps to load
  const int own_rows = 16 * warp_index() * S::STRIDE;
  Sums grad_key[S::COLUMN_BLOCKS][1], grad_value[S::COLUMN_BLOCKS][1];  // [16, WIDTH] per warp
#pragma unroll
  for (int d = 0; d < S::COLUMN_BLOCKS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) grad_key[d][0][i] = grad_value[d][0][i] = 0.0f;
  }

  for (int member = 0; member < group_size; ++member) {
    const int head = kv_head * group_size + member;
    const bool counts = !OF_MAP || !arguments.head_mask || arguments.head_mask[head];
    keys.load(KeyBias(arguments, sequence, head));
    float grad_map[2] = {0.0f, 0.0f};
    if (OF_MAP) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (keys.exists(s)) grad_map[s] = sequence.keys<const float>(arguments.map, head)[keys.key(s)];
      }
    }
    float grad_bias[2] = {0.0f, 0.0f};
    const int tiles = counts ? query_tiles<S>(sequence) : 0;
    for (int tile = first_query_tile<S>(arguments, sequence, first_key); tile < tiles; ++tile) {
      const int first_query = tile * S::STEP;
      __syncthreads();  // nobody reads the tiles any more
      const bool some = columns.load(arguments, sequence, head, first_query);
      if (OF_MAP && !__syncthreads_or(some)) continue;
      load_tile<S, S::STEP>(query_tile, sequence.queries<const Element>(arguments.query, head), first_query,
                            sequence.num_queries, arguments.head_dim, aligned);
      if (!OF_MAP)
        load_tile<S, S::STEP>(grad_tile, sequence.queries<const Element>(arguments.grad_output, head), first_query,
                              sequence.num_queries, arguments.value_dim, aligned);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      if (!is_busy) continue;

      Sums probabilities[S::STEP_BLOCKS][1];  // [16 keys, STEP queries] per warp
      dot_products<S>(probabilities, key_tile + own_rows, query_tile);
      const bool is_masked = arguments.is_causal && first_query + sequence.shift < first_key + S::ROWS - 1;
      dots_to_probabilities<S>(probabilities, keys, columns, is_masked, first_query, sequence.shift,
                               arguments.scale * LOG2_E);
      Sums grad_scores[S::STEP_BLOCKS][1];  // [16 keys, STEP queries] per warp
      if (!OF_MAP) dot_products<S>(grad_scores, value_tile + own_rows, grad_tile);
#pragma unroll
      for (int n = 0; n < S::STEP_BLOCKS; ++n) {
        if (!OF_MAP) {
          typename Matrix::Left left[1] = {Matrix::to_left(probabilities[n][0])};
#pragma unroll
          for (int d = 0; d < S::COLUMN_BLOCKS; ++d)
            Matrix::add_product(grad_value[d], left, grad_tile + 16 * n * S::STRIDE + 16 * d, S::STRIDE);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 16 * n + 8 * c + Matrix::first_column(lane_index());
          const float2 delta = load_vector<float2>(columns.delta + column);
          const float2 gate = load_vector<float2>(columns.gate + column);
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            float& first = grad_scores[n][0][4 * c + 2 * s];
            float& second = grad_scores[n][0][4 * c + 2 * s + 1];
            first = probabilities[n][0][4 * c + 2 * s] * ((OF_MAP ? grad_map[s] : first) - delta.x);
            second = probabilities[n][0][4 * c + 2 * s + 1] * ((OF_MAP ? grad_map[s] : second) - delta.y);
            grad_bias[s] += gate.x * first + gate.y * second;
          }
        }
        typename Matrix::Left left[1] = {Matrix::to_left(grad_scores[n][0])};
#pragma unroll
        for (int d = 0; d < S::COLUMN_BLOCKS; ++d)
          Matrix::add_product(grad_key[d], left, query_tile + 16 * n * S::STRIDE + 16 * d, S::STRIDE);
      }
    }
    if (arguments.grad_bias.data) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float sum = sum_of_row<Matrix>(grad_bias[s]);
        if (keys.exists(s) && Matrix::first_column(lane_index()) == 0)
          sequence.keys<float>(arguments.grad_bias, head)[keys.key(s)] = sum;
      }
    }
  }
  commit_copies();
  wait_for_copies<0>();  // of keys that no query was there to see

#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (!keys.exists(s)) continue;
    store_row<S>(sequence.keys<Element>(arguments.grad_key, kv_head).row(keys.key(s)), grad_key, 0, s, arguments.scale,
                 arguments.head_dim, aligned);
    if (!OF_MAP)
      store_row<S>(sequence.keys<Element>(arguments.grad_value, kv_head).row(keys.key(s)), grad_value, 0, s, 1.0f,
                   arguments.value_dim, aligned);
  }
}
