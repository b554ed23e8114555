"""Attention of a few rows over a long cache of keys (flash decoding): bound by reading the cache once, as fast as it
comes.

    query heads of one KV group share a tile, row r = (head of the group, query):   group_size * Nq <= BLOCK_M rows
    the keys are dealt out to `num_splits` programs, block by block:                 0 1 2 0 1 2 0 1 | 2 0 ...  unfilled
    each leaves an output and a log-sum-exp of its keys, which a second kernel merges

Blocks are dealt out in turn, rather than one long piece to each program, so that the filled part of a static cache,
or of a left-padded one, is shared evenly wherever it lies. A program reads its part of the mask and of the bias
first, and no key before the first or after the last that is visible. The grid depends on shapes and on the device
alone, and nothing is read back: a CUDA graph can capture it while the cache fills.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import AttentionInputs, parts
from .head_dim import add_weighted_rows, dot_rows, load_rows, scale_rows, store_rows, zero_rows
from .key_bias import bias_in_units
from .scores import plus_bias
from .softmax import LOWEST, natural_lse, online_softmax_step
from .tuning import EXACT, decode_splits

MOST_ROWS = 64  # of a KV group: beyond, attention_forward.py has enough to do


@triton.jit
def _visible_blocks(
    bias_base,
    padding_base,
    bias_stride_n,
    padding_stride_n,
    split,
    num_splits,
    num_blocks,  # of this program
    num_keys,
    BIAS_HIDES: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """First and last + 1 of this program's blocks that hold a visible key, and the last + 1 of these keys."""
    first, last, end_key = num_blocks, 0, 0
    for start in range(0, num_blocks, BLOCKS):
        own = start + tl.arange(0, BLOCKS)  # [BLOCKS]
        keys = (own * num_splits + split)[:, None].to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        inside = keys < num_keys  # [BLOCKS, BLOCK_N]
        visible = inside.to(tl.int32)
        if HAS_PADDING:
            visible *= (tl.load(padding_base + keys * padding_stride_n, mask=inside, other=0) != 0).to(tl.int32)
        if BIAS_HIDES:
            bias = tl.load(bias_base + keys * bias_stride_n, mask=inside, other=float("-inf"))
            visible *= (bias != float("-inf")).to(tl.int32)
        end_key = tl.maximum(end_key, tl.max(tl.max(visible * (keys + 1).to(tl.int32), 1), 0))
        any_visible = tl.max(visible, 1) > 0
        first = tl.minimum(first, tl.min(tl.where(any_visible, own, num_blocks), 0))
        last = tl.maximum(last, tl.max(tl.where(any_visible, own + 1, 0), 0))
    return first, last, end_key


@triton.jit(do_not_specialize=["num_keys"])
def attention_decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,  # (B, 1 or H, Nk) float32, natural-log units, read only with HAS_BIAS
    padding_ptr,  # (B, Nk) uint8, read only with HAS_PADDING
    gate_ptr,  # (B, Nq) uint8, read only with HAS_GATE
    output_ptr,  # of the call; with more than one split (splits, B, H, Nq, Dv) float32
    lse_ptr,  # (splits, B, H, Nq) float32, written only with RETURN_LSE
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
    bias_stride_n,
    padding_stride_b,
    padding_stride_n,
    gate_stride_b,
    gate_stride_n,
    output_stride_split,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    lse_stride_split,
    num_heads,
    group_size,
    num_queries,
    num_keys,
    score_multiplier,
    factor,
    bias_multiplier,
    HAS_BIAS: tl.constexpr,
    BIAS_PER_HEAD: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
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
    """One program per (split, batch entry, head of key)."""
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    num_kv_heads = num_heads // group_size
    batch = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % num_kv_heads).to(tl.int64)

    tile_rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    is_row = tile_rows < group_size * num_queries
    heads = kv_head * group_size + tile_rows // num_queries  # int64
    rows = tile_rows % num_queries
    query_rows = (heads * query_stride_h + rows * query_stride_n) * STRIDE_UNIT
    query = load_rows(
        query_ptr + batch * query_stride_b * STRIDE_UNIT, query_rows, 1, is_row, HEAD_DIM, D0, D1, D2, True
    )
    gate = is_row
    if HAS_GATE:
        gate = tl.load(gate_ptr + batch * gate_stride_b + rows * gate_stride_n, mask=is_row, other=0) != 0

    key_base = key_ptr + (batch * key_stride_b + kv_head * key_stride_h) * STRIDE_UNIT
    value_base = value_ptr + (batch * value_stride_b + kv_head * value_stride_h) * STRIDE_UNIT
    key_stride_n, value_stride_n = key_stride_n * STRIDE_UNIT, value_stride_n * STRIDE_UNIT
    bias_base = bias_ptr + batch * bias_stride_b
    padding_base = padding_ptr + batch * padding_stride_b

    first_block, last_block, end_key = 0, tl.cdiv(tl.cdiv(num_keys, BLOCK_N) - split, num_splits), num_keys
    # A bias that every row feels hides its -inf keys from all of them.
    BIAS_HIDES: tl.constexpr = (HAS_BIAS and not BIAS_PER_HEAD) and not HAS_GATE  # Triton 3.3 knows no chains
    if HAS_PADDING or BIAS_HIDES:
        first_block, last_block, end_key = _visible_blocks(
            bias_base,
            padding_base,
            bias_stride_n,
            padding_stride_n,
            split,
            num_splits,
            last_block,
            num_keys,
            BIAS_HIDES,
            HAS_PADDING,
            BLOCK_N,
            16,
        )

    shift = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = zero_rows(BLOCK_M, DV0, DV1, DV2)
    block = tl.arange(0, BLOCK_N)
    for own_block in tl.range(first_block, last_block):
        first_key = (own_block * num_splits + split) * BLOCK_N
        keys = first_key + block  # [BLOCK_N]
        inside = keys < end_key  # what an unfilled cache holds beyond may be NaN, and 0 * NaN is NaN
        first_key_64 = tl.cast(first_key, tl.int64)
        key_block, value_block = key_base + first_key_64 * key_stride_n, value_base + first_key_64 * value_stride_n
        key = load_rows(key_block, block, key_stride_n, inside, HEAD_DIM, D0, D1, D2, True)
        value = load_rows(value_block, block, value_stride_n, inside, VALUE_DIM, DV0, DV1, DV2, True)
        scores = dot_rows(query, key)  # [BLOCK_M, BLOCK_N]
        if not FOLDED:
            scores = scores * score_multiplier
        keys_64 = keys.to(tl.int64)
        if HAS_BIAS:
            if BIAS_PER_HEAD:
                address = bias_base + heads[:, None] * bias_stride_h + keys_64[None, :] * bias_stride_n
                bias = tl.load(address, mask=is_row[:, None] & inside[None, :], other=0.0)
            else:
                bias = tl.load(bias_base + keys_64 * bias_stride_n, mask=inside, other=0.0)[None, :]
            bias = bias_in_units(bias, bias_multiplier)
            scores = plus_bias(scores, tl.where(gate[:, None], bias, 0.0) if HAS_GATE else bias)
        visible = inside
        if HAS_PADDING:
            visible = tl.load(padding_base + keys_64 * padding_stride_n, mask=inside, other=0) != 0
        visible = visible[None, :]
        if IS_CAUSAL:
            visible = visible & (keys[None, :] <= rows[:, None] + num_keys - num_queries)
        scores = tl.where(visible, scores, float("-inf"))
        probabilities, correction, shift, total = online_softmax_step(scores, shift, total, factor)
        accumulator = add_weighted_rows(scale_rows(accumulator, correction), probabilities, value)

    output = scale_rows(accumulator, 1.0 / tl.where(total == 0.0, 1.0, total))  # a row that saw no key: 0
    output_base = output_ptr + split.to(tl.int64) * output_stride_split + batch * output_stride_b
    output_rows = heads * output_stride_h + rows * output_stride_n
    store_rows(output_base, output_rows, 1, is_row, output, VALUE_DIM, DV0, DV1, DV2)
    if RETURN_LSE:
        lse_row = (batch * num_heads + heads) * num_queries + rows
        tl.store(lse_ptr + split * lse_stride_split + lse_row, natural_lse(shift, total), mask=is_row)


@triton.jit
def merge_splits_kernel(
    partial_output_ptr,  # (splits, B, H, Nq, Dv) float32, contiguous
    partial_lse_ptr,  # (splits, B, H, Nq) float32
    output_ptr,
    lse_ptr,  # (B, H, Nq) float32, written only with RETURN_LSE
    output_stride_b,
    output_stride_h,
    output_stride_n,
    num_heads,
    num_queries,
    num_rows,  # B * H * Nq
    num_splits,
    RETURN_LSE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program per row: out = sum_s e^(lse_s - lse) out_s, lse = log sum_s e^lse_s."""
    row = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    partial_lse = tl.load(partial_lse_ptr + splits * num_rows + row, mask=splits < num_splits, other=float("-inf"))
    maximum = tl.max(partial_lse, 0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)  # a row that saw no key
    weights = tl.exp(partial_lse - maximum)  # [BLOCK_S]
    total = tl.sum(weights, 0)
    address = partial_output_ptr + (splits[:, None] * num_rows + row) * VALUE_DIM + dims[None, :]
    inside = (splits[:, None] < num_splits) & (dims[None, :] < VALUE_DIM)
    partial_output = tl.load(address, mask=inside, other=0.0)  # [BLOCK_S, BLOCK_DV]
    output = tl.sum(partial_output * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    batch, head, query = row // num_queries // num_heads, row // num_queries % num_heads, row % num_queries
    output_row = output_ptr + batch * output_stride_b + head * output_stride_h + query * output_stride_n
    tl.store(output_row + dims, output.to(output_ptr.dtype.element_ty), mask=dims < VALUE_DIM)
    if RETURN_LSE:
        lse = tl.where(total == 0.0, float("-inf"), maximum + tl.log(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse_ptr + row, lse)


def suits(inputs: AttentionInputs) -> bool:
    """Whether a call is one for this kernel: so few rows that a tile of the forward kernel would be mostly empty."""
    return inputs.packing is None and inputs.longest_query * (inputs.heads // inputs.kv_heads) <= MOST_ROWS


def attention_decode(
    inputs: AttentionInputs, value: Tensor, output: Tensor, lse: Tensor | None, num_processors: int
) -> None:
    """Launches the kernels, which write output (B, H, Nq, Dv), and lse (B, H, Nq) float32 contiguous if given.

    num_processors: the streaming multiprocessors of the device, which the splits are to fill.
    """
    batch, heads, num_queries, value_dim = output.shape
    rows = num_queries * (heads // inputs.kv_heads)
    tile = inputs.tile("decode" if rows <= 16 else "decode_wide", value_dim)
    tile = replace(tile, BLOCK_M=max(16, triton.next_power_of_2(rows)))
    splits = decode_splits(batch * inputs.kv_heads, inputs.keys_in_memory, num_processors, tile.BLOCK_N)
    target, target_lse = output, lse
    if splits > 1:
        target = torch.empty((splits, *output.shape), dtype=torch.float32, device=output.device)
        target_lse = torch.empty((splits, *output.shape[:3]), dtype=torch.float32, device=output.device)
    bias = inputs.key_bias
    attention_decode_kernel[(splits, batch * inputs.kv_heads)](
        **inputs.shared_arguments(value=value),
        bias_ptr=inputs.query if bias is None else bias,
        bias_stride_b=0 if bias is None else bias.stride(0),
        bias_stride_h=0 if bias is None else bias.stride(1),
        bias_stride_n=0 if bias is None else bias.stride(2),
        bias_multiplier=inputs.units.bias_multiplier,
        output_ptr=target,
        output_stride_split=target.stride(0) if splits > 1 else 0,
        output_stride_b=target.stride(-4),
        output_stride_h=target.stride(-3),
        output_stride_n=target.stride(-2),
        lse_ptr=inputs.query if target_lse is None else target_lse,
        lse_stride_split=batch * heads * num_queries,
        HAS_BIAS=bias is not None,
        BIAS_PER_HEAD=bias is not None and bias.shape[1] > 1,
        HAS_PADDING=inputs.key_padding_mask is not None,
        RETURN_LSE=target_lse is not None,
        **parts("VALUE_DIM", "DV", value_dim),
        **tile.launch_arguments(),
    )
    if splits > 1:
        num_rows = batch * heads * num_queries
        merge_splits_kernel[(num_rows,)](
            target,
            target_lse,
            output,
            inputs.query if lse is None else lse,
            *output.stride()[:3],
            heads,
            num_queries,
            num_rows,
            splits,
            RETURN_LSE=lse is not None,
            VALUE_DIM=value_dim,
            BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
            **EXACT,
        )
