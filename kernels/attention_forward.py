"""Flash attention forward with a bias per key (FlashAttention-2, arXiv 2307.08691; CoF, arXiv 2412.16869, Eq. 3).

    s_ij = scale * q_i . k_j + g_i b_j,   o_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)

Ranges of keys with a bias and without have loops of their own: see scores.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from .arguments import AttentionInputs, parts
from .head_dim import add_weighted_rows, load_rows, scale_rows, store_rows, zero_rows
from .key_bias import packed_bias_row, sequence_bounds
from .scores import key_ranges, masked_scores
from .softmax import LOWEST, natural_lse, online_softmax_step


@triton.jit
def _attend_range(
    accumulator,  # parts of [BLOCK_M, VALUE_DIM] float32
    shift,  # [BLOCK_M] float32, base 2 (see softmax.py)
    total,  # [BLOCK_M] float32
    query,  # parts of [BLOCK_M, HEAD_DIM]
    key_base,
    value_base,
    bias_base,
    padding_base,
    gate,  # [BLOCK_M] int1, read only with HAS_GATE
    last_key,  # [BLOCK_M] int32: the last key that a row may see, under a causal mask
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
    # Offsets are carried from block to block, in 32 bits where these suffice: the shortest code for an address.
    first = tl.cast(start, tl.int64) if WIDE_OFFSETS else start
    key_offset, value_offset, bias_block = first * key_stride_n, first * value_stride_n, bias_base + start
    for first_key in tl.range(start, end, BLOCK_N):
        inside = first_key + block < num_keys  # [BLOCK_N]
        key = load_rows(key_base + key_offset, block, key_stride_n, inside, HEAD_DIM, D0, D1, D2, MASKED)
        value = load_rows(value_base + value_offset, block, value_stride_n, inside, VALUE_DIM, DV0, DV1, DV2, MASKED)
        # Rows of prepared bias begin at multiples of 128 elements, blocks at multiples of BLOCK_N: vector loads.
        bias_address = tl.multiple_of(bias_block, 16) + block
        # fmt: off
        scores = masked_scores(
            query, key, bias_address, padding_base, gate, last_key, first_key, block, inside, padding_stride_n,
            score_multiplier, BIASED, MASKED, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED)
        # fmt: on
        probabilities, correction, shift, total = online_softmax_step(scores, shift, total, factor)
        accumulator = add_weighted_rows(scale_rows(accumulator, correction), probabilities, value)
        key_offset += BLOCK_N * key_stride_n
        value_offset += BLOCK_N * value_stride_n
        bias_block += BLOCK_N
    return accumulator, shift, total


# Lengths change at every step of a decode; specialising on them would compile the kernel again and again.
@triton.jit(do_not_specialize=["num_queries", "num_keys", "longest_query"])
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,  # float32, prepared (key_bias.py)
    range_ptr,  # (sequences, 1 or H, 4) int32 (key_bias.py)
    padding_ptr,  # (B, Nk) uint8, read only with HAS_PADDING
    gate_ptr,  # (B, Nq) or (Tq,) uint8, read only with HAS_GATE
    cu_seqlens_q_ptr,  # (sequences + 1,) int32, read only with PACKED
    cu_seqlens_k_ptr,
    output_ptr,
    lse_ptr,  # float32, read only with RETURN_LSE
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    bias_stride_b,
    bias_stride_h,
    range_stride_b,
    range_stride_h,
    padding_stride_b,
    padding_stride_n,
    gate_stride_b,
    gate_stride_n,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    lse_stride_b,
    lse_stride_h,
    num_heads,
    group_size,
    num_queries,  # with PACKED those of all sequences together, and so num_keys
    num_keys,
    longest_query,
    score_multiplier,
    factor,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    RETURN_LSE: tl.constexpr,
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
    """One program per (sequence, head, tile of BLOCK_M rows); the tiles of a head are neighbours, the longest causal
    ones first.
    """
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
    output_base = output_ptr + (sequence * output_stride_b + head * output_stride_h) * STRIDE_UNIT
    query_stride_n, key_stride_n = query_stride_n * STRIDE_UNIT, key_stride_n * STRIDE_UNIT
    value_stride_n, output_stride_n = value_stride_n * STRIDE_UNIT, output_stride_n * STRIDE_UNIT
    lse_base = lse_ptr + sequence * lse_stride_b + head * lse_stride_h
    bias_base = bias_ptr + sequence * bias_stride_b + head * bias_stride_h
    padding_base = padding_ptr + sequence * padding_stride_b
    gate_base = gate_ptr + sequence * gate_stride_b
    if PACKED:
        query_start, num_queries = sequence_bounds(cu_seqlens_q_ptr, sequence, num_queries)
        key_start, num_keys = sequence_bounds(cu_seqlens_k_ptr, sequence, num_keys)
        if first_row >= num_queries:
            return
        query_base += tl.cast(query_start, tl.int64) * query_stride_n
        key_base += tl.cast(key_start, tl.int64) * key_stride_n
        value_base += tl.cast(key_start, tl.int64) * value_stride_n
        output_base += tl.cast(query_start, tl.int64) * output_stride_n
        lse_base += query_start
        gate_base += tl.cast(query_start, tl.int64) * gate_stride_n
        bias_base += packed_bias_row(key_start, sequence)

    offset = num_keys - num_queries  # row i sees keys up to i + offset: bottom-right
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows_64 = rows.to(tl.int64)
    is_row = rows < num_queries
    query = load_rows(query_base, rows_64, query_stride_n, is_row, HEAD_DIM, D0, D1, D2, True)
    gate = is_row
    if HAS_GATE:
        gate = tl.load(gate_base + rows_64 * gate_stride_n, mask=is_row, other=0) != 0

    key_range = range_ptr + sequence * range_stride_b + head * range_stride_h
    start, bias_start, bias_end, full_end, end = key_ranges(
        key_range, first_row, offset, num_keys, HAS_BIAS, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    shift = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = zero_rows(BLOCK_M, DV0, DV1, DV2)
    # fmt: off
    if HAS_BIAS:
        accumulator, shift, total = _attend_range(
            accumulator, shift, total, query, key_base, value_base, bias_base, padding_base, gate, rows + offset,
            start, bias_start, num_keys, key_stride_n, value_stride_n, padding_stride_n, score_multiplier, factor,
            False, False, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS,
            HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_N)
        accumulator, shift, total = _attend_range(
            accumulator, shift, total, query, key_base, value_base, bias_base, padding_base, gate, rows + offset,
            bias_start, bias_end, num_keys, key_stride_n, value_stride_n, padding_stride_n, score_multiplier, factor,
            True, False, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS,
            HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_N)
    accumulator, shift, total = _attend_range(
        accumulator, shift, total, query, key_base, value_base, bias_base, padding_base, gate, rows + offset,
        bias_end, full_end, num_keys, key_stride_n, value_stride_n, padding_stride_n, score_multiplier, factor,
        False, False, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS,
        HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_N)
    accumulator, shift, total = _attend_range(
        accumulator, shift, total, query, key_base, value_base, bias_base, padding_base, gate, rows + offset,
        full_end, end, num_keys, key_stride_n, value_stride_n, padding_stride_n, score_multiplier, factor,
        HAS_BIAS, True, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS,
        HEAD_DIM, D0, D1, D2, VALUE_DIM, DV0, DV1, DV2, BLOCK_N)
    # fmt: on

    output = scale_rows(accumulator, 1.0 / tl.where(total == 0.0, 1.0, total))  # a row that saw no key: 0
    store_rows(output_base, rows_64, output_stride_n, is_row, output, VALUE_DIM, DV0, DV1, DV2)
    if RETURN_LSE:
        tl.store(lse_base + rows, natural_lse(shift, total), mask=is_row)


def attention_forward(inputs: AttentionInputs, value: Tensor, output: Tensor, lse: Tensor | None) -> None:
    """Launches the kernel, which writes output, of query's shape with value's last dimension, and lse (B, H, Nq) or
    packed (H, Tq) float32 contiguous if given.
    """
    tile = inputs.tile("forward", value.shape[-1])
    grid = (inputs.num_sequences * inputs.heads * triton.cdiv(inputs.longest_query, tile.BLOCK_M),)
    attention_forward_kernel[grid](
        **inputs.kernel_arguments(value=value, output=output),
        longest_query=inputs.longest_query,
        lse_ptr=inputs.query if lse is None else lse,
        **inputs.lse_strides(),
        **parts("VALUE_DIM", "DV", value.shape[-1]),
        RETURN_LSE=lse is not None,
        **tile.launch_arguments(),
    )
