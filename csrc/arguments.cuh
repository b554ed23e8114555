// What a kernel is given: plain structs, passed by value. finegrain_ops/backends/cuda/arguments.py mirrors them field
// by field; fields of 8 bytes come first, so that neither side has any padding to agree on.
#pragma once

#include "primitives.cuh"

namespace finegrain {

// A tensor (batch, heads, rows, columns) with unit stride of its columns, which are not counted here. Strides are in
// elements. Packed sequences have no batch: its stride is 0.
struct Rows {
  void* data;
  long long batch_stride;
  long long head_stride;
  long long row_stride;
};

// softmax over j of scale * q_i . k_j + g_i b_j, over visible keys. Pointers of what a call does not have are null.
struct AttentionArguments {
  Rows query;  // (B, H, Nq, D)
  Rows key;    // (B, Hkv, Nk, D)
  Rows value;  // (B, Hkv, Nk, Dv)
  Rows bias;  // (B, 1 or H, Nk, 1) float32, natural-log units: the row stride is that of the keys, the head stride 0 if
              // shared
  Rows padding;             // (B, 1, Nk, 1) bytes, 0 = hidden
  Rows gate;                // (B, 1, Nq, 1) bytes, 0 = the bias does not act on this row
  const int* cu_seqlens_q;  // packed sequences: where each begins, (num_seqs + 1,)
  const int* cu_seqlens_k;

  // Written by the forward kernel, read by the backward kernels.
  Rows output;  // (B, H, Nq, Dv); with several splits float32, one after another
  Rows lse;     // (B, H, Nq, 1) float32, natural-log units; with several splits one after another
  long long output_split_stride;
  long long lse_split_stride;

  // Of the backward kernels.
  Rows grad_output;  // (B, H, Nq, Dv)
  Rows delta;        // (B, H, Nq, 1) float32: sum_d grad_output * output - grad_lse
  Rows grad_query;
  Rows grad_key;
  Rows grad_value;
  Rows grad_bias;  // (B, H, Nk, 1) float32, for each head on its own

  // Of the attention maps.
  Rows row_mask;                   // (B, 1, Nq, 1) bytes, 0 = the row does not count
  const unsigned char* head_mask;  // (H,), 0 = the head does not count
  Rows map;  // (B, H, Nk, 1) float32: written by attention_map, and the gradient of that in the backward kernels

  int batch;  // entries, or packed sequences
  int heads;
  int kv_heads;
  int num_queries;  // of a batch entry; of all packed sequences together
  int num_keys;
  int head_dim;
  int value_dim;
  int is_causal;   // key j is visible to row i if j <= i + Nk - Nq
  int fold_heads;  // 1: the query heads of a KV head are rows of one tile, r = head * Nq + i
  int num_splits;  // into how many parts the keys of a head are dealt
  int blocks;      // thread blocks per head and split: grid = blocks * num_splits * heads * batch, in this order
  int aligned;     // 1: every row that is read or written begins and ends at a multiple of 16 bytes
  float scale;
  int reserved;  // keeps the size a multiple of 8
};

// out = sum_s e^(lse_s - lse) out_s over the splits s, lse = log sum_s e^lse_s
struct MergeArguments {
  const float* partial_output;  // (num_splits, B, H, Nq, Dv), contiguous
  const float* partial_lse;     // (num_splits, B, H, Nq)
  Rows output;                  // (B, H, Nq, Dv)
  float* lse;                   // (B, H, Nq) or null
  int batch;
  int heads;
  int num_queries;
  int value_dim;
  int num_splits;
  int reserved;  // keeps the size a multiple of 8
};

}  // namespace finegrain
