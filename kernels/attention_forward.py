"""Flash attention forward with a bias per key (FlashAttention-2, arXiv 2307.08691; CoF, arXiv 2412.16869, Eq. 3).

    s_ij = scale * q_i . k_j + g_i b_j,   o_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)

The bias costs nothing where it is 0: the keys of a row of blocks fall into ranges, each with a loop of its own.

    keys   0 ........ bias_start ........ bias_end ........ full_end .... end
           plain      biased              plain             masked (and biased)

[0, full_end) are blocks that every row of the tile sees whole; the last few blocks hold the causal diagonal or the end
of the keys.

With scale > 0 the scores are kept as dot products: the accumulator of q . k starts at b / scale, which the tensor
core adds for nothing, and the scale is folded into the exponent's fused multiply-add (FOLDED). Other scales are
multiplied onto the scores first.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .key_bias import prepare_key_bias
from .softmax import finite_maximum, online_softmax_step
from .tuning import forward_tile

LOG2_E = math.log2(math.e)


@triton.jit
def _attend_range(
    accumulator,  # [BLOCK_M, BLOCK_DV] float32
    maximum,  # [BLOCK_M] float32, in units (see softmax.py)
    total,  # [BLOCK_M] float32
    query,  # [BLOCK_M, BLOCK_D]
    key_base,
    value_base,
    bias_base,
    padding_base,
    gate,  # [BLOCK_M] int1, read only with HAS_GATE
    rows,  # [BLOCK_M] int32: the last key that a row may see, under a causal mask
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
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    block_keys = tl.arange(0, BLOCK_N)
    for first_key in tl.range(start, end, BLOCK_N):
        keys = first_key + block_keys  # [BLOCK_N]
        # int64 before the multiplication: a long cache with many heads per row passes 2^31 elements.
        key_block = key_base + tl.cast(first_key, tl.int64) * key_stride_n
        value_block = value_base + tl.cast(first_key, tl.int64) * value_stride_n
        key_address = key_block + block_keys[None, :] * key_stride_n + dims[:, None]
        value_address = value_block + block_keys[:, None] * value_stride_n + value_dims[None, :]
        if MASKED:
            inside = keys < num_keys
            key = tl.load(key_address, mask=inside[None, :] & (dims[:, None] < HEAD_DIM), other=0.0)
            value = tl.load(value_address, mask=inside[:, None] & (value_dims[None, :] < VALUE_DIM), other=0.0)
        else:
            key = (
                tl.load(key_address, mask=dims[:, None] < HEAD_DIM, other=0.0)
                if HEAD_DIM != BLOCK_D
                else tl.load(key_address)
            )
            value = (
                tl.load(value_address, mask=value_dims[None, :] < VALUE_DIM, other=0.0)
                if VALUE_DIM != BLOCK_DV
                else tl.load(value_address)
            )

        # [BLOCK_M, BLOCK_D] . [BLOCK_D, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        scores = tl.dot(query, key, input_precision="ieee")
        if not FOLDED:
            scores = scores * score_multiplier
        if BIASED:
            bias = tl.load(bias_base + keys, mask=keys < num_keys, other=0.0) if MASKED else tl.load(bias_base + keys)
            if HAS_GATE:
                scores = scores + tl.where(gate[:, None], bias[None, :], 0.0)
            else:
                scores = scores + bias[None, :]
            if HAS_PADDING:
                attend = tl.load(
                    padding_base + tl.cast(keys, tl.int64) * padding_stride_n, mask=keys < num_keys, other=1
                )
                scores = tl.where(attend[None, :] != 0, scores, float("-inf"))
        if MASKED:
            visible = inside[None, :]
            if IS_CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            scores = tl.where(visible, scores, float("-inf"))

        probabilities, correction, maximum, total = online_softmax_step(scores, maximum, total, factor)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(probabilities.to(value.dtype), value, accumulator, input_precision="ieee")
    return accumulator, maximum, total


# Lengths change at every step of a decode; specialising on them would compile the kernel again and again.
@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,  # (B, 1 or H, Nk) float32, prepared: in units when FOLDED, otherwise times log2(e)
    range_ptr,  # (B, 1 or H, 2) int32: the keys whose bias is not 0
    padding_ptr,  # (B, Nk) uint8, read only with HAS_PADDING
    gate_ptr,  # (B, Nq) uint8, read only with HAS_GATE
    output_ptr,
    lse_ptr,  # (B, H, Nq) float32 contiguous
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
    padding_stride_b,
    padding_stride_n,
    gate_stride_b,
    gate_stride_n,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    num_heads,
    group_size,
    num_queries,
    num_keys,
    score_multiplier,
    factor,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    FOLDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program per (batch, head, tile of BLOCK_M rows); the tiles of a head are neighbours, the longest causal ones
    first.
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    batch = (batch_head // num_heads).to(tl.int64)
    head = (batch_head % num_heads).to(tl.int64)
    kv_head = head // group_size

    offset = num_keys - num_queries  # row i sees keys up to i + offset: bottom-right
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows_64 = rows.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    query = tl.load(
        query_ptr + batch * query_stride_b + head * query_stride_h + rows_64[:, None] * query_stride_n + dims[None, :],
        mask=(rows[:, None] < num_queries) & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    gate = rows < num_queries
    if HAS_GATE:
        gate = (
            tl.load(gate_ptr + batch * gate_stride_b + rows_64 * gate_stride_n, mask=rows < num_queries, other=0) != 0
        )

    end, full_end = num_keys, num_keys // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        end = tl.maximum(tl.minimum(num_keys, first_row + BLOCK_M + offset), 0)
        # The first row of the tile sees first_row + offset + 1 keys; blocks beyond those need the causal mask.
        full_end = tl.maximum(tl.minimum(full_end, (first_row + offset + 1) // BLOCK_N * BLOCK_N), 0)

    bias_base = bias_ptr
    bias_start, bias_end = 0, 0
    if HAS_BIAS:
        bias_row = batch * bias_stride_b + head * bias_stride_h
        bias_base = bias_ptr + bias_row * num_keys
        bias_start = tl.minimum(tl.load(range_ptr + 2 * bias_row) // BLOCK_N * BLOCK_N, full_end)
        bias_end = tl.minimum(tl.cdiv(tl.load(range_ptr + 2 * bias_row + 1), BLOCK_N) * BLOCK_N, full_end)
        bias_end = tl.maximum(bias_end, bias_start)

    key_base = key_ptr + batch * key_stride_b + kv_head * key_stride_h
    value_base = value_ptr + batch * value_stride_b + kv_head * value_stride_h
    padding_base = padding_ptr + batch * padding_stride_b

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # fmt: off
    if HAS_BIAS:
        accumulator, maximum, total = _attend_range(
            accumulator, maximum, total, query, key_base, value_base, bias_base, padding_base, gate, rows + offset,
            0, bias_start, num_keys, key_stride_n, value_stride_n, padding_stride_n, score_multiplier, factor,
            False, False, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV)
        accumulator, maximum, total = _attend_range(
            accumulator, maximum, total, query, key_base, value_base, bias_base, padding_base, gate, rows + offset,
            bias_start, bias_end, num_keys, key_stride_n, value_stride_n, padding_stride_n, score_multiplier, factor,
            True, False, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV)
    accumulator, maximum, total = _attend_range(
        accumulator, maximum, total, query, key_base, value_base, bias_base, padding_base, gate, rows + offset,
        bias_end, full_end, num_keys, key_stride_n, value_stride_n, padding_stride_n, score_multiplier, factor,
        False, False, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV)
    accumulator, maximum, total = _attend_range(
        accumulator, maximum, total, query, key_base, value_base, bias_base, padding_base, gate, rows + offset,
        full_end, end, num_keys, key_stride_n, value_stride_n, padding_stride_n, score_multiplier, factor,
        HAS_BIAS, True, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV)
    # fmt: on

    output = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]  # a row that saw no key: 0
    value_dims = tl.arange(0, BLOCK_DV)
    output_base = output_ptr + batch * output_stride_b + head * output_stride_h
    tl.store(
        output_base + rows_64[:, None] * output_stride_n + value_dims[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=(rows[:, None] < num_queries) & (value_dims[None, :] < VALUE_DIM),
    )
    if RETURN_LSE:
        LN_2: tl.constexpr = 0.6931471805599453
        lse = (finite_maximum(maximum) * factor + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2
        lse = tl.where(total == 0.0, float("-inf"), lse)
        lse_row = (batch * num_heads + head) * num_queries + rows_64
        tl.store(lse_ptr + lse_row, lse, mask=rows < num_queries)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    row_gate: Tensor | None,
    is_causal: bool,
    scale: float,
    output: Tensor,
    lse: Tensor | None,
    compute_capability: int,
) -> None:
    """Launches the kernel, which writes output (B, H, Nq, Dv), unit last stride, and lse (B, H, Nq) float32 contiguous
    if given.

    The rest is as in `backends.interface.AttentionCall`.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = value.shape[2:]
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    launch = launch_arguments(head_dim, value_dim, query.element_size(), compute_capability, scale)
    # Without a row gate, padding is a bias of -inf; with one it must be kept apart, since it holds for every row.
    has_gate = row_gate is not None and key_bias is not None
    has_bias = key_bias is not None or key_padding_mask is not None
    prepared, key_range = query, query
    if has_bias:
        multiplier = 1.0 / scale if launch["FOLDED"] else LOG2_E
        prepared, key_range = prepare_key_bias(
            key_bias, None if has_gate else key_padding_mask, batch, num_keys, multiplier
        )
        if has_gate and key_padding_mask is not None:  # the biased loop must also cover the padded keys
            _, key_range = prepare_key_bias(key_bias, key_padding_mask, batch, num_keys, multiplier)
    bias_heads = prepared.shape[1] if has_bias else 1
    has_padding = has_gate and key_padding_mask is not None
    padding = key_padding_mask.view(torch.uint8) if has_padding else query
    gate = row_gate.view(torch.uint8) if has_gate else query

    grid = (batch * heads * triton.cdiv(num_queries, launch["BLOCK_M"]),)
    attention_forward_kernel[grid](
        query,
        key,
        value,
        prepared,
        key_range,
        padding,
        gate,
        output,
        query if lse is None else lse,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        bias_heads,
        1 if bias_heads > 1 else 0,
        *(padding.stride() if has_padding else (0, 0)),
        *(gate.stride() if has_gate else (0, 0)),
        *output.stride()[:3],
        heads,
        heads // key.shape[1],
        num_queries,
        num_keys,
        HAS_BIAS=has_bias,
        HAS_PADDING=has_padding,
        HAS_GATE=has_gate,
        IS_CAUSAL=is_causal,
        RETURN_LSE=lse is not None,
        **launch,
    )


# With a smaller scale, bias / scale could overflow float32.
_SMALLEST_FOLDED_SCALE = 1e-6


def launch_arguments(head_dim: int, value_dim: int, element_size: int, compute_capability: int, scale: float) -> dict:
    """What follows from the shapes: the tile, padded dimensions and the units of the scores."""
    block_d, block_dv = (max(16, triton.next_power_of_2(dim)) for dim in (head_dim, value_dim))
    tile = forward_tile(compute_capability, element_size, max(block_d, block_dv))
    folded = scale >= _SMALLEST_FOLDED_SCALE
    return {
        "score_multiplier": scale * LOG2_E,
        "factor": scale * LOG2_E if folded else 1.0,
        "FOLDED": folded,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
