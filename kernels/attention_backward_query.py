"""dq of attention, or of an attention map (OF_MAP): see attention_backward.py for the equations.

Where the bias wants a gradient, it also makes delta anew, since db_j = sum_i dS_ij must not keep what rounding the
output did to delta: a bias that is the same for all keys that a row sees has a gradient of 0, in which that error would
be all there is, and d(weight) divides it by weight.

    sum_j dS_ij = dlse_i   holds for the delta_i to which   sum_j dS_ij - dlse_i   is added
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arguments import AttentionInputs
from .head_dim import add_weighted_rows, dot_rows, load_rows, scale_rows, store_rows, zero_rows
from .key_bias import packed_bias_row, sequence_bounds
from .scores import key_ranges, masked_scores
from .softmax import exponentials


@triton.jit
def _add_query_gradient(
    grad_query,  # parts of [BLOCK_M, HEAD_DIM] float32
    residual,  # [BLOCK_M] float32: sum of dS, with REFINES_DELTA
    query,  # parts of [BLOCK_M, HEAD_DIM]
    grad_output,  # parts of [BLOCK_M, VALUE_DIM]; unread with OF_MAP
    row_lse,  # [BLOCK_M] float32, base 2
    delta,  # [BLOCK_M] float32
    key_base,
    value_base,
    grad_map_base,
    bias_base,
    padding_base,
    gate,  # [BLOCK_M] int1
    last_key,  # [BLOCK_M] int32
    start,
    end,
    num_keys,
    key_stride_n,
    value_stride_n,
    padding_stride_n,
    score_multiplier,
    factor,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    OF_MAP: tl.constexpr,
    REFINES_DELTA: tl.constexpr,
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
    BLOCK_N: tl.constexpr,
):
    block = tl.arange(0, BLOCK_N)
    first = tl.cast(start, tl.int64) if WIDE_OFFSETS else start  # as in attention_forward.py
    key_offset, value_offset, bias_block = first * key_stride_n, first * value_stride_n, bias_base + start
    for first_key in tl.range(start, end, BLOCK_N):
        inside = first_key + block < num_keys  # [BLOCK_N]
        key = load_rows(key_base + key_offset, block, key_stride_n, inside, HEAD_DIM, D0, D1, D2, MASKED)
        bias_address = tl.multiple_of(bias_block, 16) + block
        # fmt: off
        scores = masked_scores(
            query, key, bias_address, padding_base, gate, last_key, first_key, block, inside, padding_stride_n,
            score_multiplier, BIASED, MASKED, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED)
        # fmt: on
        probabilities = exponentials(scores, factor, row_lse[:, None])  # [BLOCK_M, BLOCK_N]
        if OF_MAP:
            grad_map = tl.load(grad_map_base + first_key + block, mask=inside, other=0.0)
            grad_probabilities = grad_map[None, :]
        else:
            value = load_rows(
                value_base + value_offset, block, value_stride_n, inside, VALUE_DIM, DV0, DV1, DV2, MASKED
            )
            grad_probabilities = dot_rows(grad_output, value)
        grad_scores = probabilities * (grad_probabilities - delta[:, None])
        if REFINES_DELTA:
            residual += tl.sum(grad_scores, 1)
        grad_query = add_weighted_rows(grad_query, grad_scores, key)
        key_offset += BLOCK_N * key_stride_n
        value_offset += BLOCK_N * value_stride_n
        bias_block += BLOCK_N
    return grad_query, residual


@triton.jit(do_not_specialize=["num_queries", "num_keys", "longest_query"])
def attention_backward_query_kernel(
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
    delta_ptr,  # with REFINES_DELTA written too: sum_j dS_ij is added
    grad_query_ptr,
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
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_n,
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
    num_heads,
    group_size,
    num_queries,
    num_keys,
    longest_query,
    scale,
    score_multiplier,
    factor,
    OF_MAP: tl.constexpr,
    REFINES_DELTA: tl.constexpr,
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
    """One program per (sequence, head, tile of BLOCK_M rows), as in the forward kernel."""
    num_tiles = tl.cdiv(longest_query, BLOCK_M)
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    sequence_head = tl.program_id(0) // num_tiles
    sequence = (sequence_head // num_heads).to(tl.int64)
    head = (sequence_head % num_heads).to(tl.int64)
    kv_head = head // group_size
    first_row = tile * BLOCK_M

    query_base = query_ptr + (sequence * query_stride_b + head * query_stride_h) * STRIDE_UNIT
    key_base = key_ptr + (sequence * key_stride_b + kv_head * key_stride_h) * STRIDE_UNIT
    value_base = value_ptr + (sequence * value_stride_b + kv_head * value_stride_h) * STRIDE_UNIT
    grad_output_base = grad_output_ptr + (sequence * grad_output_stride_b + head * grad_output_stride_h) * STRIDE_UNIT
    grad_query_base = grad_query_ptr + (sequence * grad_query_stride_b + head * grad_query_stride_h) * STRIDE_UNIT
    query_stride_n, key_stride_n = query_stride_n * STRIDE_UNIT, key_stride_n * STRIDE_UNIT
    value_stride_n, grad_output_stride_n = value_stride_n * STRIDE_UNIT, grad_output_stride_n * STRIDE_UNIT
    grad_query_stride_n = grad_query_stride_n * STRIDE_UNIT
    lse_offset = sequence * lse_stride_b + head * lse_stride_h
    bias_base = bias_ptr + sequence * bias_stride_b + head * bias_stride_h
    grad_map_base = grad_map_ptr + (sequence * num_heads + head) * num_keys
    padding_base = padding_ptr + sequence * padding_stride_b
    gate_base = gate_ptr + sequence * gate_stride_b
    if PACKED:
        query_start, num_queries = sequence_bounds(cu_seqlens_q_ptr, sequence, num_queries)
        key_start, num_keys = sequence_bounds(cu_seqlens_k_ptr, sequence, num_keys)
        if first_row >= num_queries:
            return
        query_start_64, key_start_64 = tl.cast(query_start, tl.int64), tl.cast(key_start, tl.int64)
        query_base += query_start_64 * query_stride_n
        key_base += key_start_64 * key_stride_n
        value_base += key_start_64 * value_stride_n
        grad_output_base += query_start_64 * grad_output_stride_n
        grad_query_base += query_start_64 * grad_query_stride_n
        lse_offset += query_start
        gate_base += query_start_64 * gate_stride_n
        bias_base += packed_bias_row(key_start, sequence)

    offset = num_keys - num_queries  # row i sees keys up to i + offset: bottom-right
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows_64 = rows.to(tl.int64)
    is_row = rows < num_queries
    query = load_rows(query_base, rows_64, query_stride_n, is_row, HEAD_DIM, D0, D1, D2, True)
    grad_output = query
    if not OF_MAP:
        grad_output = load_rows(grad_output_base, rows_64, grad_output_stride_n, is_row, VALUE_DIM, DV0, DV1, DV2, True)
    gate = is_row
    if HAS_GATE:
        gate = tl.load(gate_base + rows_64 * gate_stride_n, mask=is_row, other=0) != 0
    row_lse = tl.load(row_lse_ptr + lse_offset + rows, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + lse_offset + rows, mask=is_row, other=0.0)

    key_range = range_ptr + sequence * range_stride_b + head * range_stride_h
    start, bias_start, bias_end, full_end, end = key_ranges(
        key_range, first_row, offset, num_keys, HAS_BIAS, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    if OF_MAP and tl.min(row_lse, 0) == float("inf"):  # none of these rows was chosen
        start, bias_start, bias_end, full_end, end = 0, 0, 0, 0, 0

    grad_query = zero_rows(BLOCK_M, D0, D1, D2)
    residual = tl.zeros([BLOCK_M], tl.float32)
    # fmt: off
    if HAS_BIAS:
        grad_query, residual = _add_query_gradient(
            grad_query, residual, query, grad_output, row_lse, delta, key_base, value_base, grad_map_base,
            bias_base, padding_base, gate, rows + offset, start, bias_start, num_keys, key_stride_n, value_stride_n,
            padding_stride_n, score_multiplier, factor, False, False, OF_MAP, REFINES_DELTA, IS_CAUSAL, HAS_GATE,
            HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_N)
        grad_query, residual = _add_query_gradient(
            grad_query, residual, query, grad_output, row_lse, delta, key_base, value_base, grad_map_base,
            bias_base, padding_base, gate, rows + offset, bias_start, bias_end, num_keys, key_stride_n, value_stride_n,
            padding_stride_n, score_multiplier, factor, True, False, OF_MAP, REFINES_DELTA, IS_CAUSAL, HAS_GATE,
            HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_N)
    grad_query, residual = _add_query_gradient(
        grad_query, residual, query, grad_output, row_lse, delta, key_base, value_base, grad_map_base, bias_base,
        padding_base, gate, rows + offset, bias_end, full_end, num_keys, key_stride_n, value_stride_n,
        padding_stride_n, score_multiplier, factor, False, False, OF_MAP, REFINES_DELTA, IS_CAUSAL, HAS_GATE,
        HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_N)
    grad_query, residual = _add_query_gradient(
        grad_query, residual, query, grad_output, row_lse, delta, key_base, value_base, grad_map_base, bias_base,
        padding_base, gate, rows + offset, full_end, end, num_keys, key_stride_n, value_stride_n, padding_stride_n,
        score_multiplier, factor, HAS_BIAS, True, OF_MAP, REFINES_DELTA, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED,
        WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_N)
    # fmt: on
    if REFINES_DELTA:
        tl.store(delta_ptr + lse_offset + rows, delta + residual, mask=is_row)
    grad_query = scale_rows(grad_query, tl.zeros([BLOCK_M], tl.float32) + scale)
    store_rows(grad_query_base, rows_64, grad_query_stride_n, is_row, grad_query, HEAD_DIM, D0, D1, D2)


def attention_backward_query(
    inputs: AttentionInputs,
    values: dict[str, Tensor],
    value_constants: dict[str, int],
    grad_map: Tensor | None,
    row_lse: Tensor,
    delta: Tensor,
    grad_query: Tensor,
    refines_delta: bool = False,
) -> None:
    """Writes grad_query, and adds sum_j dS_ij to delta if asked to. `values` are value and grad_output;
    with a grad_map they are not read.
    """
    kernel = "backward_query" if grad_map is None else "map_backward_query"
    tile = inputs.tile(kernel, value_constants["VALUE_DIM"])
    grid = (inputs.num_sequences * inputs.heads * triton.cdiv(inputs.longest_query, tile.BLOCK_M),)
    attention_backward_query_kernel[grid](
        **inputs.kernel_arguments(**values, grad_query=grad_query),
        longest_query=inputs.longest_query,
        grad_map_ptr=row_lse if grad_map is None else grad_map,
        row_lse_ptr=row_lse,
        delta_ptr=delta,
        **inputs.lse_strides(),
        scale=inputs.scale,
        OF_MAP=grad_map is not None,
        REFINES_DELTA=refines_delta,
        **value_constants,
        **tile.launch_arguments(),
    )
