"""Where the rows that an attention map counts begin and end, so that the others cost nothing."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_queries"])
def row_range_kernel(rows_ptr, range_ptr, rows_stride_b, rows_stride_n, num_queries, BLOCK: tl.constexpr):
    """One program per batch entry: first and last + 1 of the chosen rows, (B, 2) int32; rows (B, Nq) uint8."""
    batch = tl.program_id(0).to(tl.int64)
    first, last = num_queries, 0
    for start in range(0, num_queries, BLOCK):
        rows = start + tl.arange(0, BLOCK)  # [BLOCK]
        address = rows_ptr + batch * rows_stride_b + rows.to(tl.int64) * rows_stride_n
        chosen = tl.load(address, mask=rows < num_queries, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(chosen, rows, num_queries), 0))
        last = tl.maximum(last, tl.max(tl.where(chosen, rows + 1, 0), 0))
    tl.store(range_ptr + 2 * batch, first)
    tl.store(range_ptr + 2 * batch + 1, last)
