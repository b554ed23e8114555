// Adds up what attention_forward.cuh left for each split of the keys:
//
//   lse = log sum_s e^lse_s,   out = sum_s e^(lse_s - lse) out_s
//
// One warp per row, whose lanes own columns.
#pragma once

#include "scores.cuh"

FINEGRAIN_KERNEL(merge_splits, 32 * FINEGRAIN_WARPS, FINEGRAIN_BLOCKS, finegrain::MergeArguments arguments) {
  using namespace finegrain;
  using Element = FINEGRAIN_ELEMENT;
  const long long num_rows = (long long)arguments.batch * arguments.heads * arguments.num_queries;
  const long long row = (long long)blockIdx.x * FINEGRAIN_WARPS + warp_index();
  if (row >= num_rows) return;

  float maximum = -infinity();
  for (int split = 0; split < arguments.num_splits; ++split)
    maximum = fmaxf(maximum, arguments.partial_lse[split * num_rows + row]);
  if (maximum == -infinity()) maximum = 0.0f;  // a row that saw no key
  float total = 0.0f;
  for (int split = 0; split < arguments.num_splits; ++split)
    total += exp2_fast((arguments.partial_lse[split * num_rows + row] - maximum) * LOG2_E);
  const float weight = total == 0.0f ? 0.0f : 1.0f / total;

  const int query = row % arguments.num_queries, head = row / arguments.num_queries % arguments.heads;
  const int batch = row / arguments.num_queries / arguments.heads;
  Element* output = static_cast<Element*>(arguments.output.data) + batch * arguments.output.batch_stride +
                    head * arguments.output.head_stride + query * arguments.output.row_stride;
  for (int column = lane_index(); column < arguments.value_dim; column += 32) {
    float sum = 0.0f;
    for (int split = 0; split < arguments.num_splits; ++split) {
      const long long partial_row = split * num_rows + row;
      sum += exp2_fast((arguments.partial_lse[partial_row] - maximum) * LOG2_E) *
             arguments.partial_output[partial_row * arguments.value_dim + column];
    }
    output[column] = Convert<Element>::one(sum * weight);
  }
  if (arguments.lse && lane_index() == 0)
    arguments.lse[row] = total == 0.0f ? -infinity() : maximum + log2f(total) * LN_2;
}
