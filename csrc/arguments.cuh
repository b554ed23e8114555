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
  Rows delta;        // (B, H, Nq, 1) float32: sum_d grad_output * output - grad_lse; see attention_backward_query.cuh
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

// What crop_weights leaves for crop_resize of one box: where the pixels of its hull lie, the smallest integer rectangle
// around what is sampled. Its own rows and columns are counted from its first; beyond row_begin..row_end and
// column_begin..column_end, its pixels in the image, it is `fill`.
struct CropRecord {
  const void* image;
  long long offset;  // of the hull's first pixel, which need not exist; in elements, as strides are
  long long channel_stride;
  long long row_stride;
  long long column_stride;
  int exists;  // 0: the result is `fill`
  int vertical_first;
  int row_begin;
  int row_end;
  int column_begin;
  int column_end;
};

// When the vertical pass comes first (finegrain_ops/backends/crops/interface.py); 0: never.
enum PassOrder { VERTICAL_FIRST_IF_TALL = 1, VERTICAL_FIRST_IF_SHRUNK = 2 };

// (level * multiplier + offset) of resized crops, of boxes one after another from first_box on. A place is a row of the
// result, or a column; they are counted together, the rows first.
struct CropArguments {
  const double* boxes;           // (K, 4), x0, y0, x1, y1
  const long long* image_index;  // (K,), or null: box k lies in image k, or in the only one
  const long long*
      image_table;     // (num_images, 6): address, strides of channels, rows, columns, height, width; or null:
  const void* images;  // (num_images, C, image_height, image_width)
  long long image_stride;
  long long channel_stride;
  long long row_stride;
  long long column_stride;
  void* records;  // CropRecord of each box
  int* taps;      // (boxes, height + width, 2): of the hull's pixels, the first that weighs in a place, and how many do
  void* weights;  // for each box (row_taps, height) and (column_taps, width): int32, 2^22 for 1, or float32
  void* result;   // (K, C, height, width), contiguous
  int num_images;  // sizes of the tensor and of the result
  int image_height;
  int image_width;
  int channels;
  int height;
  int width;
  int row_taps;  // that a place has at most
  int column_taps;
  int first_box;
  int radius;         // of the filter: 1 is bilinear, 2 bicubic
  int antialias;      // 0: the filter does not widen as crops shrink
  int is_padded;      // 1: with `fill` around it, the crop is a square
  int shortest_edge;  // to which the shorter side is resized, or 0: each side to that of the result
  int pass_order;     // a PassOrder
  int is_rounded;     // 1: to levels after each pass, since the images are uint8
  int result_type;    // 0: float32, 1: float16, 2: bfloat16
  float fill[3];
  float multiplier[3];
  float offset[3];
  int reserved;  // keeps the size a multiple of 8
};

}  // namespace finegrain
