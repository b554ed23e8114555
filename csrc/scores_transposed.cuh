// Scores for kernels whose thread blocks own keys and walk through tiles of queries: a row of Sums is a key, a column
// a query.
#pragma once

#include "scores.cuh"

namespace finegrain {

// Per lane two keys: what is read of them once.
template <class S>
struct LaneKeys {
  static_assert(S::ROW_BLOCKS == 1, "a warp owns 16 keys");
  using Matrix = WarpMatrix<typename S::Element>;
  int first;
  int num_keys;
  float added[2];   // for queries that the bias acts on, hidden counted in
  float hidden[2];  // for the others

  FINEGRAIN_DEVICE LaneKeys(const Sequence& sequence, int first_key)
      : first(first_key + 16 * warp_index() + Matrix::first_row(lane_index())), num_keys(sequence.num_keys) {}
  FINEGRAIN_DEVICE int key(int s) const { return first + s * Matrix::ROW_STEP; }
  FINEGRAIN_DEVICE bool exists(int s) const { return key(s) < num_keys; }
  FINEGRAIN_DEVICE void load(const KeyBias& bias) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      hidden[s] = bias.hidden(key(s));
      added[s] = hidden[s] + bias.added(key(s));
    }
  }
};

// What a tile of queries has in shared memory besides its rows.
template <class S>
struct QueryColumns {
  float* lse;    // [STEP], in base 2; infinite for rows that do not exist or do not count
  float* gate;   // [STEP], 0 where the bias does not act
  float* delta;  // [STEP]

  FINEGRAIN_DEVICE explicit QueryColumns(SharedMemory& memory)
      : lse(memory.take<float>(S::STEP)), gate(memory.take<float>(S::STEP)), delta(memory.take<float>(S::STEP)) {}

  // Returns whether this thread has seen a row that counts.
  FINEGRAIN_DEVICE bool load(const AttentionArguments& arguments, const Sequence& sequence, int head, int first_query) {
    static_assert(S::STEP <= S::THREADS, "a thread for every query of a step");
    const int i = threadIdx.x, query = first_query + i;
    if (i >= S::STEP) return false;
    bool is_row = query < sequence.num_queries;
    if (is_row && arguments.row_mask.data) is_row = sequence.queries<const unsigned char>(arguments.row_mask)[query];
    const auto row_lse = sequence.queries<const float>(arguments.lse, head);
    const auto row_delta = sequence.queries<const float>(arguments.delta, head);
    const auto row_gate = sequence.queries<const unsigned char>(arguments.gate);
    lse[i] = is_row ? lse_in_base_2(row_lse[query]) : infinity();
    gate[i] = is_row && (!arguments.gate.data || row_gate[query]) ? 1.0f : 0.0f;
    if (arguments.delta.data) delta[i] = is_row ? row_delta[query] : 0.0f;
    return is_row;
  }
};

// Turns dot products of the warp's keys with a tile of queries into probabilities, in place.
template <class S>
FINEGRAIN_DEVICE void dots_to_probabilities(Sums (&dots)[S::STEP_BLOCKS][1], const LaneKeys<S>& keys,
                                            const QueryColumns<S>& columns, bool is_causal, int first_query, int shift,
                                            float scale) {
  const int first_column = WarpMatrix<typename S::Element>::first_column(lane_index());
#pragma unroll
  for (int n = 0; n < S::STEP_BLOCKS; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 16 * n + 8 * c + first_column;
      const float2 lse = load_vector<float2>(columns.lse + column);
      const float2 gate = load_vector<float2>(columns.gate + column);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float& first = dots[n][0][4 * c + 2 * s];
        float& second = dots[n][0][4 * c + 2 * s + 1];
        first = exp2_fast(fmaf(first, scale, (gate.x != 0.0f ? keys.added[s] : keys.hidden[s]) - lse.x));
        second = exp2_fast(fmaf(second, scale, (gate.y != 0.0f ? keys.added[s] : keys.hidden[s]) - lse.y));
        if (is_causal) {
          const int visible = first_query + column + shift - keys.key(s);
          if (visible < 0) first = 0.0f;
          if (visible < -1) second = 0.0f;
        }
      }
    }
  }
}

// The tiles of queries that see any of the keys from first_key on.
template <class S>
FINEGRAIN_DEVICE int first_query_tile(const AttentionArguments& arguments, const Sequence& sequence, int first_key) {
  return arguments.is_causal ? max(first_key - sequence.shift, 0) / S::STEP : 0;
}
template <class S>
FINEGRAIN_DEVICE int query_tiles(const Sequence& sequence) {
  return (sequence.num_queries + S::STEP - 1) / S::STEP;
}

}  // namespace finegrain
