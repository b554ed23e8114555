// Which rows and keys a thread block works on, and how they come into shared memory.
#pragma once

#include "arguments.cuh"
#include "warp_matrix.cuh"

namespace finegrain {

// The numbers that a kernel is compiled for.
template <class ElementType, int WIDTH_, int WARPS_, int ROW_BLOCKS_, int STEP_>
struct Shape {
  using Element = ElementType;
  static constexpr int WIDTH = WIDTH_;  // head dimension, with columns of zeros up to a multiple of 16
  static constexpr int WARPS = WARPS_;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int ROW_BLOCKS = ROW_BLOCKS_;  // of 16 rows that a warp owns
  static constexpr int ROWS = 16 * ROW_BLOCKS * WARPS;
  static constexpr int STEP = STEP_;  // rows of the tile that all warps walk through together
  static constexpr int PER_VECTOR = 16 / sizeof(Element);
  static constexpr int VECTORS = WIDTH / PER_VECTOR;
  // An odd number of 16-byte units from row to row: eight rows in a row lie in different banks.
  static constexpr int STRIDE = (VECTORS | 1) * PER_VECTOR;
  static constexpr int COLUMN_BLOCKS = WIDTH / 16;
  static constexpr int STEP_BLOCKS = STEP / 16;
};

// Hands out a block's shared memory: tiles first, whose rows want 16 bytes.
struct SharedMemory {
  unsigned char* next;

  FINEGRAIN_DEVICE SharedMemory() : next(shared_memory()) {}

  template <class T>
  FINEGRAIN_DEVICE T* take(int count) {
    T* result = reinterpret_cast<T*>(next);
    next += count * sizeof(T);
    return result;
  }
};

// Own tiles have ROWS rows, the others STEP; of what else there is some floats for each of STEP, and scratch.
template <class S, int OWN_TILES, int STEP_TILES, int FLOATS_PER_STEP>
struct SharedBytes {
  static constexpr int value = (OWN_TILES * S::ROWS + STEP_TILES * S::STEP) * S::STRIDE * sizeof(typename S::Element) +
                               FLOATS_PER_STEP * S::STEP * 4 + 128;
};

// The rows of one head and sequence.
template <class T>
struct RowView {
  T* data;
  long long stride;

  FINEGRAIN_DEVICE T* row(int index) const { return data + index * stride; }
  FINEGRAIN_DEVICE T& operator[](int index) const { return data[index * stride]; }  // where a row is one number
};

// A batch entry, or a packed sequence, whose bounds are kept inside the buffers whatever cu_seqlens holds.
struct Sequence {
  int batch;
  int first_query;
  int num_queries;
  int first_key;
  int num_keys;
  int shift;  // key j is visible to row i, under a causal mask, if j <= i + shift

  FINEGRAIN_DEVICE Sequence(const AttentionArguments& arguments, int batch_)
      : batch(batch_), first_query(0), num_queries(arguments.num_queries), first_key(0), num_keys(arguments.num_keys) {
    if (arguments.cu_seqlens_q) {
      bounds(arguments.cu_seqlens_q, arguments.num_queries, first_query, num_queries);
      bounds(arguments.cu_seqlens_k, arguments.num_keys, first_key, num_keys);
    }
    shift = num_keys - num_queries;
  }

  template <class T>
  FINEGRAIN_DEVICE RowView<T> queries(const Rows& rows, int head = 0) const {
    return view<T>(rows, head, first_query);
  }
  template <class T>
  FINEGRAIN_DEVICE RowView<T> keys(const Rows& rows, int head = 0) const {
    return view<T>(rows, head, first_key);
  }

 private:
  template <class T>
  FINEGRAIN_DEVICE RowView<T> view(const Rows& rows, int head, int first) const {
    return {static_cast<T*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride + first * rows.row_stride,
            rows.row_stride};
  }
  FINEGRAIN_DEVICE void bounds(const int* cu_seqlens, int total, int& first, int& count) const {
    first = min(max(cu_seqlens[batch], 0), total);
    count = min(max(cu_seqlens[batch + 1], first), total) - first;
  }
};

// Which part of the grid a thread block is: blockIdx.x = ((batch * heads + head) * num_splits + split) * blocks + block
struct Place {
  int batch;
  int head;
  int split;
  int block;

  FINEGRAIN_DEVICE Place(const AttentionArguments& arguments, int heads) {
    unsigned rest = blockIdx.x;
    block = rest % arguments.blocks;
    rest /= arguments.blocks;
    split = rest % arguments.num_splits;
    rest /= arguments.num_splits;
    head = rest % heads;
    batch = rest / heads;
  }
};

// Where the rows of a tile of queries are: row r is query r, or query r % num_queries of head r / num_queries where
// the heads that share keys are folded into one tile.
struct QueryRows {
  int num_queries;
  int count;
  bool folded;

  FINEGRAIN_DEVICE QueryRows(const AttentionArguments& arguments, const Sequence& sequence)
      : num_queries(sequence.num_queries), count(sequence.num_queries), folded(arguments.fold_heads) {
    if (folded) count *= arguments.heads / arguments.kv_heads;
  }
  FINEGRAIN_DEVICE int head(int row) const { return folded ? row / num_queries : 0; }
  FINEGRAIN_DEVICE int query(int row) const { return folded ? row % num_queries : row; }
  FINEGRAIN_DEVICE long long offset(int row, const Rows& rows) const {
    return head(row) * rows.head_stride + query(row) * rows.row_stride;
  }
};

// Which vectors of a tile a thread copies: one column of them, every PER_PASS-th row. So it keeps one address, and adds
// to it; where VECTORS does not divide THREADS, the last threads copy nothing.
template <class S, int ROWS>
struct CopyPlan {
  static constexpr int PER_PASS = S::THREADS / S::VECTORS;
  static constexpr int PASSES = (ROWS + PER_PASS - 1) / PER_PASS;
  int first_row;
  int column;

  FINEGRAIN_DEVICE CopyPlan() : first_row(threadIdx.x / S::VECTORS), column(threadIdx.x % S::VECTORS * S::PER_VECTOR) {}
  FINEGRAIN_DEVICE bool copies(int pass) const {
    return first_row < PER_PASS && (ROWS % PER_PASS == 0 || first_row + pass * PER_PASS < ROWS);
  }
};

// Rare, and so not to cost the others registers: rows that do not begin and end at multiples of 16 bytes.
template <class S, int ROWS, class OffsetOf>
FINEGRAIN_DEVICE void copy_unaligned(typename S::Element* tile, const typename S::Element* base, OffsetOf offset_of,
                                     int count, int dim) {
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * S::WIDTH; i += S::THREADS) {
    const int row = i / S::WIDTH, column = i % S::WIDTH;
    tile[row * S::STRIDE + column] =
        row < count && column < dim ? base[offset_of(row) + column] : Convert<typename S::Element>::one(0.0f);
  }
}

// Copies ROWS rows, from `first` on, into a tile of STRIDE; zeros for rows from `end` on and beyond the dim columns
// there are. Between begin and finish the data is on its way: by itself into shared memory (then commit and wait), or,
// before sm_80, into registers. The tile must be free from begin on.
template <class S, int ROWS>
struct TileCopy {
  using Element = typename S::Element;
  using Plan = CopyPlan<S, ROWS>;
#if FINEGRAIN_ARCH < 800
  uint4 vectors[Plan::PASSES];
#endif

  FINEGRAIN_DEVICE void begin(Element* tile, RowView<const Element> rows, int first, int end, int dim, bool aligned) {
    int count = end - first;
    if (!aligned)
      return copy_unaligned<S, ROWS>(tile, rows.row(first), [&](int row) { return row * rows.stride; }, count, dim);
    const Plan plan;
    const Element* source = rows.row(first) + plan.first_row * rows.stride + plan.column;
    if (plan.column >= dim) count = 0;
#pragma unroll
    for (int pass = 0; pass < Plan::PASSES; ++pass) {
      const bool is_valid = plan.first_row + pass * Plan::PER_PASS < count;
#if FINEGRAIN_ARCH >= 800
      Element* target = tile + (plan.first_row + pass * Plan::PER_PASS) * S::STRIDE + plan.column;
      if (plan.copies(pass)) copy_16_bytes(target, source, is_valid);
#else
      vectors[pass] = plan.copies(pass) && is_valid ? load_vector<uint4>(source) : make_uint4(0, 0, 0, 0);
#endif
      source += Plan::PER_PASS * rows.stride;
    }
  }

  FINEGRAIN_DEVICE void finish(Element* tile, bool aligned) {
#if FINEGRAIN_ARCH < 800
    if (!aligned) return;
    const Plan plan;
#pragma unroll
    for (int pass = 0; pass < Plan::PASSES; ++pass) {
      if (plan.copies(pass))
        store_vector(tile + (plan.first_row + pass * Plan::PER_PASS) * S::STRIDE + plan.column, vectors[pass]);
    }
#endif
  }
};

// Begins and finishes at once; float32, whose sums want all registers, a vector at a time.
template <class S, int ROWS>
FINEGRAIN_DEVICE void load_tile(typename S::Element* tile, RowView<const typename S::Element> rows, int first, int end,
                                int dim, bool aligned) {
#if FINEGRAIN_ARCH < 800
  if (sizeof(typename S::Element) == 4 && aligned) {
    const CopyPlan<S, ROWS> plan;
#pragma unroll 1
    for (int pass = 0; pass < plan.PASSES; ++pass) {
      const int row = plan.first_row + pass * plan.PER_PASS;
      const bool is_valid = first + row < end && plan.column < dim;
      if (plan.copies(pass))
        store_vector(tile + row * S::STRIDE + plan.column,
                     is_valid ? load_vector<uint4>(rows.row(first + row) + plan.column) : make_uint4(0, 0, 0, 0));
    }
    return;
  }
#endif
  TileCopy<S, ROWS> copy;
  copy.begin(tile, rows, first, end, dim, aligned);
  copy.finish(tile, aligned);
}

// The same for `count` rows given by offset_of(row) from base.
template <class S, int ROWS, class OffsetOf>
FINEGRAIN_DEVICE void gather_tile(typename S::Element* tile, const typename S::Element* base, OffsetOf offset_of,
                                  int count, int dim, bool aligned) {
  if (!aligned) return copy_unaligned<S, ROWS>(tile, base, offset_of, count, dim);
  const CopyPlan<S, ROWS> plan;
#pragma unroll 4
  for (int pass = 0; pass < plan.PASSES; ++pass) {
    const int row = plan.first_row + pass * plan.PER_PASS;
    if (!plan.copies(pass)) continue;
    const bool is_valid = row < count && plan.column < dim;
    const typename S::Element* source = base + (is_valid ? offset_of(row) + plan.column : 0);
    typename S::Element* target = tile + row * S::STRIDE + plan.column;
#if FINEGRAIN_ARCH >= 800
    copy_16_bytes(target, source, is_valid);
#else
    store_vector(target, is_valid ? load_vector<uint4>(source) : make_uint4(0, 0, 0, 0));
#endif
  }
}

// Two neighbouring columns of a result.
template <class Element>
FINEGRAIN_DEVICE void store_pair(Element* row, int column, float first, float second, int dim, bool aligned) {
  if (aligned) {
    if (column < dim) store_vector(row + column, Convert<Element>::two(first, second));
  } else {
    if (column < dim) row[column] = Convert<Element>::one(first);
    if (column + 1 < dim) row[column + 1] = Convert<Element>::one(second);
  }
}
template <>
FINEGRAIN_DEVICE void store_pair<float>(float* row, int column, float first, float second, int dim, bool aligned) {
  if (aligned) {
    if (column < dim) store_vector(row + column, make_float2(first, second));
  } else {
    if (column < dim) row[column] = first;
    if (column + 1 < dim) row[column + 1] = second;
  }
}

// This lane's columns of row s of its block r of 16 rows, times weight.
template <class S, class Output>
FINEGRAIN_DEVICE void store_row(Output* row, const Sums (&sums)[S::COLUMN_BLOCKS][S::ROW_BLOCKS], int r, int s,
                                float weight, int dim, bool aligned) {
  const int first_column = WarpMatrix<typename S::Element>::first_column(lane_index());
#pragma unroll
  for (int d = 0; d < S::COLUMN_BLOCKS; ++d) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
      store_pair(row, 16 * d + 8 * c + first_column, sums[d][r][4 * c + 2 * s] * weight,
                 sums[d][r][4 * c + 2 * s + 1] * weight, dim, aligned);
  }
}

}  // namespace finegrain
