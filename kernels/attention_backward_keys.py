"""dk, dv and the gradient of the bias, of attention or of an attention map (OF_MAP): see attention_backward.py for the
equations.

A program keeps a tile of keys and walks over the rows of one head, so that the sums over rows stay in registers, in one
order. Everything is held transposed, keys by rows, so that P^T and dS^T enter the next matrix product as they are. The
gradients of the heads of a KV group are summed afterwards.

    rows   start ........ full_start ............ full_end ...... end
           causal         plain, or biased        rows that may not exist
                          if a key of the tile
                          carries a bias
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import AttentionInputs
from .head_dim import add_weighted_rows, dot_rows, load_rows, scale_rows, store_rows, zero_rows
from .key_bias import packed_bias_row, sequence_bounds
from .scores import masked_scores_transposed
from .softmax import exponentials


@triton.jit
def _add_key_gradients(
    grad_key,  # parts of [BLOCK_N, HEAD_DIM] float32
    grad_value,  # parts of [BLOCK_N, VALUE_DIM] float32; unread with OF_MAP
    grad_bias,  # [BLOCK_N] float32
    key,  # parts of [BLOCK_N, HEAD_DIM]
    value,  # parts of [BLOCK_N, VALUE_DIM]; unread with OF_MAP
    grad_map,  # [BLOCK_N] float32; read only with OF_MAP
    bias,  # [BLOCK_N] float32; read only with BIASED
    attend,  # [BLOCK_N] int1; read only with HAS_PADDING
    keys,  # [BLOCK_N] int32
    query_base,
    grad_output_base,
    row_lse_base,
    delta_base,
    gate_base,
    start,
    end,
    second_start,  # with MASKED, a second range of rows follows the first
    second_end,
    num_queries,
    offset,
    query_stride_n,
    grad_output_stride_n,
    gate_stride_n,
    score_multiplier,
    factor,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    OF_MAP: tl.constexpr,
    NEEDS_GRAD_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    DV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    block = tl.arange(0, BLOCK_M)
    first = tl.cast(start, tl.int64) if WIDE_OFFSETS else start  # as in attention_forward.py
    query_offset, grad_output_offset = first * query_stride_n, first * grad_output_stride_n
    num_blocks = tl.cdiv(end - start, BLOCK_M)
    if MASKED:
        jump = second_start - (start + num_blocks * BLOCK_M)
        end = start + (num_blocks + tl.cdiv(second_end - second_start, BLOCK_M)) * BLOCK_M
    for step in tl.range(start, end, BLOCK_M):
        first_row = step  # Triton 3.3 to 3.5 undo what a loop does to its own variable
        if MASKED:
            first_row += tl.where(first_row >= start + num_blocks * BLOCK_M, jump, 0)
            first = tl.cast(first_row, tl.int64) if WIDE_OFFSETS else first_row
            query_offset, grad_output_offset = first * query_stride_n, first * grad_output_stride_n
        rows = first_row + block  # [BLOCK_M]
        is_row = rows < num_queries
        query = load_rows(query_base + query_offset, block, query_stride_n, is_row, HEAD_DIM, D0, D1, D2, MASKED)
        if MASKED:
            row_lse = tl.load(row_lse_base + rows, mask=is_row, other=float("inf"))
            delta = tl.load(delta_base + rows, mask=is_row, other=0.0)
        else:
            row_lse = tl.load(row_lse_base + rows)
            delta = tl.load(delta_base + rows)
        gate = is_row
        if HAS_GATE and (BIASED or NEEDS_GRAD_BIAS):
            gate = tl.load(gate_base + rows.to(tl.int64) * gate_stride_n, mask=is_row, other=0) != 0
        # fmt: off
        scores = masked_scores_transposed(
            key, query, bias, attend, gate, keys, rows + offset, score_multiplier,
            BIASED, MASKED, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED)
        # fmt: on
        probabilities = exponentials(scores, factor, row_lse[None, :])  # [BLOCK_N, BLOCK_M]
        if OF_MAP:
            grad_scores = probabilities * (grad_map[:, None] - delta[None, :])
        else:
            grad_output = load_rows(
                grad_output_base + grad_output_offset,
                block,
                grad_output_stride_n,
                is_row,
                VALUE_DIM,
                DV0,
                DV1,
                DV2,
                MASKED,
            )
            grad_value = add_weighted_rows(grad_value, probabilities, grad_output)
            grad_scores = probabilities * (dot_rows(value, grad_output) - delta[None, :])
        if NEEDS_GRAD_BIAS:
            grad_bias += tl.sum(tl.where(gate[None, :], grad_scores, 0.0) if HAS_GATE else grad_scores, 1)
        grad_key = add_weighted_rows(grad_key, grad_scores, query)
        if not MASKED:
            query_offset += BLOCK_M * query_stride_n
            grad_output_offset += BLOCK_M * grad_output_stride_n
    return grad_key, grad_value, grad_bias


@triton.jit(do_not_specialize=["num_queries", "num_keys", "longest_key"])
def attention_backward_keys_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_output_ptr,
    grad_map_ptr,  # (B, H, Nk) float32 contiguous, read only with OF_MAP
    bias_ptr,  # float32, prepared (key_bias.py)
    range_ptr,  # (sequences, 1 or H, 4) int32 (key_bias.py)
    padding_ptr,  # (B, Nk) uint8, read only with HAS_PADDING
    gate_ptr,  # (B, Nq) or (Tq,) uint8, read only with HAS_GATE
    cu_seqlens_q_ptr,  # (sequences + 1,) int32, read only with PACKED
    cu_seqlens_k_ptr,
    row_lse_ptr,  # (B, H, Nq) or (H, Tq) float32, base 2
    delta_ptr,
    grad_key_ptr,  # per head of query
    grad_value_ptr,
    grad_bias_ptr,  # (B, H, Nk) or (H, Tk) float32, written only with NEEDS_GRAD_BIAS
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    grad_output_stride_b,
    grad_output_stride_h,
    grad_output_stride_n,
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    bias_stride_b,
    bias_stride_h,
    range_stride_b,
    range_stride_h,
    padding_stride_b,
    padding_stride_n,
    gate_stride_b,
    gate_stride_n,
    lse_stride_b,
    lse_stride_h,
    grad_bias_stride_b,
    grad_bias_stride_h,
    num_heads,
    group_size,
    num_queries,
    num_keys,
    longest_key,
    scale,
    score_multiplier,
    factor,
    OF_MAP: tl.constexpr,
    NEEDS_GRAD_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    DV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (sequence, head of query, tile of BLOCK_N keys); under a causal mask the first tiles are the
    longest.
    """
    num_tiles = tl.cdiv(longest_key, BLOCK_N)
    first_key = tl.program_id(0) % num_tiles * BLOCK_N
    sequence_head = tl.program_id(0) // num_tiles
    sequence = (sequence_head // num_heads).to(tl.int64)
    head = (sequence_head % num_heads).to(tl.int64)
    kv_head = head // group_size

    query_base = query_ptr + (sequence * query_stride_b + head * query_stride_h) * STRIDE_UNIT
    grad_output_base = grad_output_ptr + (sequence * grad_output_stride_b + head * grad_output_stride_h) * STRIDE_UNIT
    key_base = key_ptr + (sequence * key_stride_b + kv_head * key_stride_h) * STRIDE_UNIT
    value_base = value_ptr + (sequence * value_stride_b + kv_head * value_stride_h) * STRIDE_UNIT
    grad_key_base = grad_key_ptr + (sequence * grad_key_stride_b + head * grad_key_stride_h) * STRIDE_UNIT
    grad_value_base = grad_value_ptr + (sequence * grad_value_stride_b + head * grad_value_stride_h) * STRIDE_UNIT
    query_stride_n, key_stride_n = query_stride_n * STRIDE_UNIT, key_stride_n * STRIDE_UNIT
    value_stride_n, grad_output_stride_n = value_stride_n * STRIDE_UNIT, grad_output_stride_n * STRIDE_UNIT
    grad_key_stride_n, grad_value_stride_n = grad_key_stride_n * STRIDE_UNIT, grad_value_stride_n * STRIDE_UNIT
    lse_offset = sequence * lse_stride_b + head * lse_stride_h
    bias_base = bias_ptr + sequence * bias_stride_b + head * bias_stride_h
    padding_base = padding_ptr + sequence * padding_stride_b
    gate_base = gate_ptr + sequence * gate_stride_b
    key_start = 0
    if PACKED:
        query_start, num_queries = sequence_bounds(cu_seqlens_q_ptr, sequence, num_queries)
        key_start, num_keys = sequence_bounds(cu_seqlens_k_ptr, sequence, num_keys)
        if first_key >= num_keys:
            return
        query_start_64, key_start_64 = tl.cast(query_start, tl.int64), tl.cast(key_start, tl.int64)
        query_base += query_start_64 * query_stride_n
        grad_output_base += query_start_64 * grad_output_stride_n
        key_base += key_start_64 * key_stride_n
        value_base += key_start_64 * value_stride_n
        grad_key_base += key_start_64 * grad_key_stride_n
        grad_value_base += key_start_64 * grad_value_stride_n
        lse_offset += query_start
        gate_base += query_start_64 * gate_stride_n
        bias_base += packed_bias_row(key_start, sequence)

    offset = num_keys - num_queries  # row i sees keys up to i + offset: bottom-right
    keys = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys_64 = keys.to(tl.int64)
    inside = keys < num_keys
    key = load_rows(key_base, keys_64, key_stride_n, inside, HEAD_DIM, D0, D1, D2, True)
    value = key
    if not OF_MAP:
        value = load_rows(value_base, keys_64, value_stride_n, inside, VALUE_DIM, DV0, DV1, DV2, True)
    attend = inside
    if HAS_PADDING:
        attend = tl.load(padding_base + keys_64 * padding_stride_n, mask=inside, other=0) != 0

    start, full_start = 0, 0
    if IS_CAUSAL:
        start = tl.maximum(first_key - offset, 0) // BLOCK_M * BLOCK_M  # the first row that sees the first key
        full_start = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    end, full_end = num_queries, num_queries // BLOCK_M * BLOCK_M
    start, full_start = tl.minimum(start, end), tl.minimum(full_start, full_end)
    full_end = tl.maximum(full_end, full_start)

    bias = tl.zeros([BLOCK_N], tl.float32)
    plain_end = full_end
    if HAS_BIAS:
        bias = tl.load(bias_base + keys)
        key_range = range_ptr + sequence * range_stride_b + head * range_stride_h
        is_biased = (tl.load(key_range) < first_key + BLOCK_N) & (tl.load(key_range + 1) > first_key)
        is_visible = (tl.load(key_range + 2) < first_key + BLOCK_N) & (tl.load(key_range + 3) > first_key)
        start, full_start = tl.where(is_visible, start, 0), tl.where(is_visible, full_start, 0)
        end, full_end = tl.where(is_visible, end, 0), tl.where(is_visible, full_end, 0)
        plain_end = tl.where(is_biased, full_start, full_end)
    grad_map = bias
    if OF_MAP:
        grad_map_row = grad_map_ptr + (sequence * num_heads + head) * num_keys
        grad_map = tl.load(grad_map_row + keys, mask=inside, other=0.0)

    grad_key = zero_rows(BLOCK_N, D0, D1, D2)
    grad_value = zero_rows(BLOCK_N, 16, 0, 0) if OF_MAP else zero_rows(BLOCK_N, DV0, DV1, DV2)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    row_lse_base, delta_base = row_lse_ptr + lse_offset, delta_ptr + lse_offset
    # fmt: off
    grad_key, grad_value, grad_bias = _add_key_gradients(
        grad_key, grad_value, grad_bias, key, value, grad_map, bias, attend, keys, query_base, grad_output_base,
        row_lse_base, delta_base, gate_base, full_start, plain_end, 0, 0, num_queries, offset, query_stride_n,
        grad_output_stride_n, gate_stride_n, score_multiplier, factor, False, False, OF_MAP, NEEDS_GRAD_BIAS,
        IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_M)
    if HAS_BIAS:  # either this loop is empty or the one before
        grad_key, grad_value, grad_bias = _add_key_gradients(
            grad_key, grad_value, grad_bias, key, value, grad_map, bias, attend, keys, query_base, grad_output_base,
            row_lse_base, delta_base, gate_base, plain_end, full_end, 0, 0, num_queries, offset, query_stride_n,
            grad_output_stride_n, gate_stride_n, score_multiplier, factor, True, False, OF_MAP, NEEDS_GRAD_BIAS,
            IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2,
            BLOCK_M)
    grad_key, grad_value, grad_bias = _add_key_gradients(
        grad_key, grad_value, grad_bias, key, value, grad_map, bias, attend, keys, query_base, grad_output_base,
        row_lse_base, delta_base, gate_base, start, full_start, full_end, end, num_queries, offset, query_stride_n,
        grad_output_stride_n, gate_stride_n, score_multiplier, factor, HAS_BIAS, True, OF_MAP, NEEDS_GRAD_BIAS,
        IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_M)
    # fmt: on
    if NEEDS_GRAD_BIAS:
        grad_bias_row = grad_bias_ptr + sequence * grad_bias_stride_b + head * grad_bias_stride_h
        tl.store(grad_bias_row + key_start + keys, grad_bias, mask=inside)
    grad_key = scale_rows(grad_key, tl.zeros([BLOCK_N], tl.float32) + scale)
    store_rows(grad_key_base, keys_64, grad_key_stride_n, inside, grad_key, HEAD_DIM, D0, D1, D2)
    if not OF_MAP:
        store_rows(grad_value_base, keys_64, grad_value_stride_n, inside, grad_value, VALUE_DIM, DV0, DV1, DV2)


def attention_backward_keys(
    inputs: AttentionInputs,
    values: dict[str, Tensor],
    value_constants: dict[str, int],
    grad_map: Tensor | None,
    row_lse: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    bias_needs_grad: bool,
) -> Tensor | None:
    """Writes grad_key and grad_value; returns the gradient of the bias per head of query. With a grad_map, `values`
    (value and grad_output) are not read and grad_value is not written.
    """
    group_size, packed = inputs.heads // inputs.kv_heads, inputs.packing is not None
    per_head = [grad_key] if grad_map is not None else [grad_key, grad_value]
    if group_size > 1:  # the gradients of each head in float32, summed afterwards: more programs, and no atomics
        per_head = [_repeated(t, group_size, packed) for t in per_head]
    tile = inputs.tile("backward_keys", value_constants["VALUE_DIM"])
    grad_bias = row_lse
    if bias_needs_grad:  # keys that belong to no packed sequence are not written
        shape = (inputs.heads, inputs.keys_in_memory)
        grad_bias = row_lse.new_zeros(shape) if packed else row_lse.new_empty(inputs.num_sequences, *shape)
    grid = (inputs.num_sequences * inputs.heads * triton.cdiv(inputs.longest_key, tile.BLOCK_N),)
    attention_backward_keys_kernel[grid](
        **inputs.kernel_arguments(**values, grad_key=per_head[0], grad_value=per_head[-1]),
        grad_map_ptr=row_lse if grad_map is None else grad_map,
        row_lse_ptr=row_lse,
        delta_ptr=delta,
        grad_bias_ptr=grad_bias,
        **inputs.lse_strides(),
        grad_bias_stride_b=0 if packed else inputs.heads * inputs.keys_in_memory,
        grad_bias_stride_h=inputs.keys_in_memory,
        longest_key=inputs.longest_key,
        scale=inputs.scale,
        OF_MAP=grad_map is not None,
        NEEDS_GRAD_BIAS=bias_needs_grad,
        **value_constants,
        **tile.launch_arguments(),
    )
    if group_size > 1:
        for gradient, of_heads in zip((grad_key, grad_value), per_head):
            torch.sum(of_heads.unflatten(1, (inputs.kv_heads, group_size)), dim=2, out=gradient)
    return grad_bias if bias_needs_grad else None


def _repeated(gradient: Tensor, group_size: int, packed: bool) -> Tensor:
    """Memory for a gradient of every head of query: (B, H, Nk, D), or packed (Tk, H, D), float32."""
    shape = (gradient.shape[0], gradient.shape[1] * group_size, *gradient.shape[2:])
    return gradient.new_zeros(shape, dtype=torch.float32) if packed else gradient.new_empty(shape, dtype=torch.float32)
