"""Gradients of attention with a bias per key, from the log-sum-exp that the forward pass returned (FlashAttention-2,
arXiv 2307.08691, Algorithm 2).

    P_ij = exp(s_ij - lse_i),   dP_ij = dO_i . v_j,   dS_ij = P_ij (dP_ij - delta_i),   delta_i = dO_i . o_i - dlse_i
    dq_i = scale sum_j dS_ij k_j,   dk_j = scale sum_i dS_ij q_i,   dv_j = sum_i P_ij dO_i,   db_j = sum_i g_i dS_ij

Three kernels, one after another: this file's makes delta and lse of all rows, attention_backward_query.py walks over
the keys for a tile of rows (dq, and a better delta if db is wanted), attention_backward_keys.py over the rows for a
tile of keys (dk, dv, db). Each result is summed in one
program, in one order, without atomics: two runs agree to the bit.

An attention map, map_j = sum of P_ij over chosen rows i, has the same gradients with dP_ij = dmap_j, delta_i =
sum_j P_ij dmap_j, and rows that are not chosen left out (OF_MAP): attention_map.py calls the same two kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import AttentionInputs, parts, strides_of
from .attention_backward_keys import attention_backward_keys
from .attention_backward_query import attention_backward_query
from .tuning import EXACT


@triton.jit(do_not_specialize=["num_queries"])
def row_statistics_kernel(
    grad_output_ptr,
    output_ptr,
    lse_ptr,  # (B, H, Nq) or (H, Tq) float32, contiguous; so are the next three
    grad_lse_ptr,  # read only with HAS_GRAD_LSE
    row_lse_ptr,
    delta_ptr,
    grad_output_stride_b,
    grad_output_stride_h,
    grad_output_stride_n,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    num_heads,
    num_queries,
    HAS_GRAD_LSE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program per BLOCK_M rows of a head: delta, and lse in base 2 with +inf for rows that saw no key, so that
    2^(s - lse) is 0 there.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    batch_head = tl.program_id(0) // num_tiles
    batch, head = (batch_head // num_heads).to(tl.int64), (batch_head % num_heads).to(tl.int64)
    rows = (tl.program_id(0) % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    dims = tl.arange(0, BLOCK_DV)
    rows_64, is_row = rows.to(tl.int64), rows < num_queries
    inside = is_row[:, None] & (dims[None, :] < VALUE_DIM)
    grad_output_base = grad_output_ptr + batch * grad_output_stride_b + head * grad_output_stride_h
    output_base = output_ptr + batch * output_stride_b + head * output_stride_h
    grad_output = tl.load(grad_output_base + rows_64[:, None] * grad_output_stride_n + dims, mask=inside, other=0.0)
    output = tl.load(output_base + rows_64[:, None] * output_stride_n + dims, mask=inside, other=0.0)
    delta = tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1)
    at = (batch * num_heads + head) * num_queries + rows_64
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=is_row, other=0.0)
    lse = tl.load(lse_ptr + at, mask=is_row, other=0.0)
    tl.store(row_lse_ptr + at, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), mask=is_row)
    tl.store(delta_ptr + at, delta, mask=is_row)


def attention_backward(
    inputs: AttentionInputs,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    bias_needs_grad: bool,
) -> Tensor | None:
    """Writes grad_query, grad_key and grad_value; returns the gradient of the bias per head of query, (B, H, Nk) or
    packed (H, Tk) float32, if wanted.
    """
    row_lse, delta = torch.empty_like(lse), torch.empty_like(lse)
    block_dv = max(16, triton.next_power_of_2(value.shape[-1]))
    block_m = max(16, 4096 // block_dv)
    grid = (lse.numel() // inputs.rows_in_memory * triton.cdiv(inputs.rows_in_memory, block_m),)
    row_statistics_kernel[grid](
        grad_output,
        output,
        lse,
        lse if grad_lse is None else grad_lse,
        row_lse,
        delta,
        *strides_of(grad_output),
        *strides_of(output),
        inputs.heads,
        inputs.rows_in_memory,
        HAS_GRAD_LSE=grad_lse is not None,
        VALUE_DIM=value.shape[-1],
        BLOCK_M=block_m,
        BLOCK_DV=block_dv,
        **EXACT,
    )
    values = {"value": value, "grad_output": grad_output}
    constants = parts("VALUE_DIM", "DV", value.shape[-1])
    attention_backward_query(inputs, values, constants, None, row_lse, delta, grad_query, bias_needs_grad)
    if bias_needs_grad and grad_lse is not None:
        delta -= grad_lse  # see attention_backward_query.py
    return attention_backward_keys(
        inputs, values, constants, None, row_lse, delta, grad_key, grad_value, bias_needs_grad
    )
