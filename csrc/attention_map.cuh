// The attention that every key receives: map_hj = sum over the rows i that count of exp(s_ij - lse_i).
//
// A thread block owns ROWS keys of one head and walks through the queries; tiles of queries of which no row counts are
// passed over. lse comes from attention_rows.cuh, or from an attention that the caller has computed before.
#pragma once

#include "scores_transposed.cuh"

namespace finegrain {

using MapShape = Shape<FINEGRAIN_ELEMENT, FINEGRAIN_WIDTH, FINEGRAIN_WARPS, 1, FINEGRAIN_STEP>;

}  // namespace finegrain

FINEGRAIN_KERNEL(attention_map, 32 * FINEGRAIN_WARPS, FINEGRAIN_BLOCKS, finegrain::AttentionArguments arguments) {
  using namespace finegrain;
  using S = MapShape;
  using Element = S::Element;
  static_assert(SharedBytes<S, 1, 1, 3>::value <= FINEGRAIN_SHARED_BYTES,
                "tiles.py gives less shared memory than is used");

  const Place place(arguments, arguments.heads);
  const Sequence sequence(arguments, place.batch);
  const int head = place.head, kv_head = head / (arguments.heads / arguments.kv_heads);
  const int first_key = place.block * S::ROWS, keys_left = sequence.num_keys - first_key;
  if (keys_left <= 0) return;

  SharedMemory memory;
  Element* key_tile = memory.take<Element>(S::ROWS * S::STRIDE);    // [ROWS, WIDTH]
  Element* query_tile = memory.take<Element>(S::STEP * S::STRIDE);  // [STEP, WIDTH]
  QueryColumns<S> columns(memory);

  const bool aligned = arguments.aligned;
  load_tile<S, S::ROWS>(key_tile, sequence.keys<const Element>(arguments.key, kv_head), first_key, sequence.num_keys,
                        arguments.head_dim, aligned);
  LaneKeys<S> keys(sequence, first_key);
  keys.load(KeyBias(arguments, sequence, head));
  const auto query = sequence.queries<const Element>(arguments.query, head);

  float received[2] = {0.0f, 0.0f};  // of this lane's columns
  const int tiles = !arguments.head_mask || arguments.head_mask[head] ? query_tiles<S>(sequence) : 0;
  for (int tile = first_query_tile<S>(arguments, sequence, first_key); tile < tiles; ++tile) {
    const int first_query = tile * S::STEP;
    __syncthreads();  // nobody reads the tile any more
    if (!__syncthreads_or(columns.load(arguments, sequence, head, first_query))) continue;
    load_tile<S, S::STEP>(query_tile, query, first_query, sequence.num_queries, arguments.head_dim, aligned);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (16 * warp_index() >= keys_left) continue;
    Sums probabilities[S::STEP_BLOCKS][1];  // [16 keys, STEP queries] per warp
    dot_products<S>(probabilities, key_tile + 16 * warp_index() * S::STRIDE, query_tile);
    const bool is_masked = arguments.is_causal && first_query + sequence.shift < first_key + S::ROWS - 1;
    dots_to_probabilities<S>(probabilities, keys, columns, is_masked, first_query, sequence.shift,
                             arguments.scale * LOG2_E);
#pragma unroll
    for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) received[(i >> 1) & 1] += probabilities[n][0][i];
    }
  }
  commit_copies();
  wait_for_copies<0>();  // of keys that no query was there to see

  const auto map = sequence.keys<float>(arguments.map, head);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float sum = sum_of_row<WarpMatrix<Element>>(received[s]);
    if (keys.exists(s) && WarpMatrix<Element>::first_column(lane_index()) == 0) map[keys.key(s)] = sum;
  }
}
