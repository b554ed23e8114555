"""The attention that every key receives from chosen rows, map_j = sum_i P_ij, and its gradients; no N x N matrix.

    lse_i = log sum_j exp(s_ij)        over the keys for a tile of rows; skipped where the caller has it
    map_j = sum_i exp(s_ij - lse_i)    over the rows for a tile of keys
    delta_i = sum_j P_ij dmap_j        over the keys for a tile of rows; the rest is attention_backward.py's

Rows that are not chosen get a log-sum-exp of +inf, so that their probabilities are 0; tiles before the first and
after the last chosen row are not computed at all, which makes the read-out of a single row cheap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import AttentionInputs, parts
from .attention_backward_keys import attention_backward_keys
from .attention_backward_query import attention_backward_query
from .head_dim import load_rows
from .row_range import row_range_kernel
from .scores import key_ranges, masked_scores, masked_scores_transposed
from .softmax import LOWEST, exponentials, natural_lse, online_softmax_step
from .tuning import EXACT


@triton.jit
def _walk_over_keys(
    shift,  # [BLOCK_M] float32, base 2 (softmax.py); with OF_GRADIENT the sum of the probabilities
    total,  # [BLOCK_M] float32: of exponentials; with OF_GRADIENT of their products with grad_map
    query,  # parts of [BLOCK_M, HEAD_DIM]
    row_lse,  # [BLOCK_M] float32, base 2; read only with OF_GRADIENT
    key_base,
    grad_map_base,
    bias_base,
    padding_base,
    gate,  # [BLOCK_M] int1
    last_key,  # [BLOCK_M] int32
    start,
    end,
    num_keys,
    key_stride_n,
    padding_stride_n,
    score_multiplier,
    factor,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.arange(0, BLOCK_N)
    first = tl.cast(start, tl.int64) if WIDE_OFFSETS else start  # as in attention_forward.py
    key_offset, bias_block = first * key_stride_n, bias_base + start
    for first_key in tl.range(start, end, BLOCK_N):
        inside = first_key + block < num_keys  # [BLOCK_N]
        key = load_rows(key_base + key_offset, block, key_stride_n, inside, HEAD_DIM, D0, D1, D2, MASKED)
        bias_address = tl.multiple_of(bias_block, 16) + block
        # fmt: off
        scores = masked_scores(
            query, key, bias_address, padding_base, gate, last_key, first_key, block, inside, padding_stride_n,
            score_multiplier, BIASED, MASKED, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED)
        # fmt: on
        if OF_GRADIENT:
            grad_map = tl.load(grad_map_base + first_key + block, mask=inside, other=0.0)
            probabilities = exponentials(scores, factor, row_lse[:, None])
            shift += tl.sum(probabilities, 1)
            total += tl.sum(probabilities * grad_map[None, :], 1)
        else:
            _, _, shift, total = online_softmax_step(scores, shift, total, factor)
        key_offset += BLOCK_N * key_stride_n
        bias_block += BLOCK_N
    return shift, total


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_map_rows_kernel(
    query_ptr,
    key_ptr,
    grad_map_ptr,  # (B, H, Nk) float32, read only with OF_GRADIENT
    bias_ptr,  # float32, prepared (key_bias.py)
    range_ptr,  # (B, 1 or H, 4) int32 (key_bias.py)
    padding_ptr,  # (B, Nk) uint8, read only with HAS_PADDING
    gate_ptr,  # (B, Nq) uint8, read only with HAS_GATE
    rows_ptr,  # (B, Nq) uint8, read only with HAS_ROWS
    row_range_ptr,  # (B, 2) int32, read only with HAS_ROWS
    heads_ptr,  # (H,) uint8, read only with HAS_HEADS
    lse_ptr,  # (B, H, Nq) float32, natural log; read with LSE_IS_KNOWN, otherwise written
    row_lse_ptr,  # (B, H, Nq) float32, base 2, +inf for rows that are not chosen or saw no key; written
    delta_ptr,  # (B, H, Nq) float32, written only with OF_GRADIENT
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    bias_stride_b,
    bias_stride_h,
    range_stride_b,
    range_stride_h,
    padding_stride_b,
    padding_stride_n,
    gate_stride_b,
    gate_stride_n,
    rows_stride_b,
    rows_stride_n,
    num_heads,
    group_size,
    num_queries,
    num_keys,
    score_multiplier,
    factor,
    LSE_IS_KNOWN: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch entry, head, tile of BLOCK_M rows): lse if it is not known, and delta if OF_GRADIENT."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    first_row = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M  # the longest causal tiles first
    batch = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    head = (tl.program_id(0) // num_tiles % num_heads).to(tl.int64)

    query_base = query_ptr + (batch * query_stride_b + head * query_stride_h) * STRIDE_UNIT
    key_base = key_ptr + (batch * key_stride_b + head // group_size * key_stride_h) * STRIDE_UNIT
    query_stride_n, key_stride_n = query_stride_n * STRIDE_UNIT, key_stride_n * STRIDE_UNIT
    bias_base = bias_ptr + batch * bias_stride_b + head * bias_stride_h
    grad_map_base = grad_map_ptr + (batch * num_heads + head) * num_keys
    padding_base = padding_ptr + batch * padding_stride_b

    offset = num_keys - num_queries  # row i sees keys up to i + offset: bottom-right
    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows_64 = rows.to(tl.int64)
    is_row = rows < num_queries
    row_at = (batch * num_heads + head) * num_queries + rows_64

    chosen = is_row
    some_chosen = True
    if HAS_ROWS:
        chosen = tl.load(rows_ptr + batch * rows_stride_b + rows_64 * rows_stride_n, mask=is_row, other=0) != 0
        range_start, range_end = tl.load(row_range_ptr + 2 * batch), tl.load(row_range_ptr + 2 * batch + 1)
        some_chosen = (first_row < range_end) & (first_row + BLOCK_M > range_start)
    if HAS_HEADS:
        head_is_chosen = tl.load(heads_ptr + head) != 0
        chosen, some_chosen = chosen & head_is_chosen, some_chosen & head_is_chosen

    key_range = range_ptr + batch * range_stride_b + head * range_stride_h
    start, bias_start, bias_end, full_end, end = key_ranges(
        key_range, first_row, offset, num_keys, HAS_BIAS, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    if some_chosen == 0:
        start, bias_start, bias_end, full_end, end = 0, 0, 0, 0, 0
    if LSE_IS_KNOWN and not OF_GRADIENT:  # nothing to sum: lse only changes its base
        start, bias_start, bias_end, full_end, end = 0, 0, 0, 0, 0

    query = load_rows(query_base, rows_64, query_stride_n, is_row, HEAD_DIM, D0, D1, D2, True)
    gate = is_row
    if HAS_GATE:
        gate = tl.load(gate_ptr + batch * gate_stride_b + rows_64 * gate_stride_n, mask=is_row, other=0) != 0
    shift = tl.full([BLOCK_M], 0.0 if OF_GRADIENT else LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    row_lse = total
    if LSE_IS_KNOWN:
        LOG2_E: tl.constexpr = 1.4426950408889634
        row_lse = tl.load(lse_ptr + row_at, mask=is_row, other=float("-inf")) * LOG2_E
        row_lse = tl.where(chosen & (row_lse != float("-inf")), row_lse, float("inf"))
    # fmt: off
    if HAS_BIAS:
        shift, total = _walk_over_keys(
            shift, total, query, row_lse, key_base, grad_map_base, bias_base, padding_base, gate, rows + offset,
            start, bias_start, num_keys, key_stride_n, padding_stride_n, score_multiplier, factor, False, False,
            OF_GRADIENT, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, BLOCK_N)
        shift, total = _walk_over_keys(
            shift, total, query, row_lse, key_base, grad_map_base, bias_base, padding_base, gate, rows + offset,
            bias_start, bias_end, num_keys, key_stride_n, padding_stride_n, score_multiplier, factor, True, False,
            OF_GRADIENT, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, BLOCK_N)
    shift, total = _walk_over_keys(
        shift, total, query, row_lse, key_base, grad_map_base, bias_base, padding_base, gate, rows + offset,
        bias_end, full_end, num_keys, key_stride_n, padding_stride_n, score_multiplier, factor, False, False,
        OF_GRADIENT, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, BLOCK_N)
    shift, total = _walk_over_keys(
        shift, total, query, row_lse, key_base, grad_map_base, bias_base, padding_base, gate, rows + offset,
        full_end, end, num_keys, key_stride_n, padding_stride_n, score_multiplier, factor, HAS_BIAS, True,
        OF_GRADIENT, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, BLOCK_N)
    # fmt: on
    if OF_GRADIENT:
        # Probabilities from a rounded lse add up to 1 only nearly; without the division the error would stay in every
        # dS.
        tl.store(delta_ptr + row_at, total / tl.where(shift == 0.0, 1.0, shift), mask=is_row)
    if not LSE_IS_KNOWN:
        tl.store(lse_ptr + row_at, natural_lse(shift, total), mask=is_row)
        row_lse = shift + tl.log2(tl.where(total == 0.0, 1.0, total))
        row_lse = tl.where(chosen & (total != 0.0), row_lse, float("inf"))
    tl.store(row_lse_ptr + row_at, row_lse, mask=is_row)


@triton.jit
def _walk_over_rows(
    probabilities,  # [BLOCK_N, BLOCK_M] float32: sums over tiles of rows
    key,  # parts of [BLOCK_N, HEAD_DIM]
    bias,  # [BLOCK_N] float32
    attend,  # [BLOCK_N] int1
    keys,  # [BLOCK_N] int32
    query_base,
    row_lse_base,
    gate_base,
    start,
    end,
    num_queries,
    offset,
    query_stride_n,
    gate_stride_n,
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
    BLOCK_M: tl.constexpr,
):
    block = tl.arange(0, BLOCK_M)
    query_offset = (tl.cast(start, tl.int64) if WIDE_OFFSETS else start) * query_stride_n
    for first_row in tl.range(start, end, BLOCK_M):
        rows = first_row + block  # [BLOCK_M]
        is_row = rows < num_queries
        query = load_rows(query_base + query_offset, block, query_stride_n, is_row, HEAD_DIM, D0, D1, D2, MASKED)
        row_lse = tl.load(row_lse_base + rows, mask=is_row, other=float("inf"))
        gate = is_row
        if HAS_GATE and BIASED:
            gate = tl.load(gate_base + rows.to(tl.int64) * gate_stride_n, mask=is_row, other=0) != 0
        # fmt: off
        scores = masked_scores_transposed(
            key, query, bias, attend, gate, keys, rows + offset, score_multiplier,
            BIASED, MASKED, IS_CAUSAL, HAS_GATE, HAS_PADDING, FOLDED)
        # fmt: on
        probabilities += exponentials(scores, factor, row_lse[None, :])
        query_offset += BLOCK_M * query_stride_n
    return probabilities


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_map_columns_kernel(
    query_ptr,
    key_ptr,
    bias_ptr,  # float32, prepared (key_bias.py)
    range_ptr,  # (B, 1 or H, 4) int32 (key_bias.py)
    padding_ptr,  # (B, Nk) uint8, read only with HAS_PADDING
    gate_ptr,  # (B, Nq) uint8, read only with HAS_GATE
    row_range_ptr,  # (B, 2) int32, read only with HAS_ROWS
    heads_ptr,  # (H,) uint8, read only with HAS_HEADS
    row_lse_ptr,  # (B, H, Nq) float32, base 2, +inf for rows that do not count
    map_ptr,  # (B, H, Nk) float32
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    bias_stride_b,
    bias_stride_h,
    range_stride_b,
    range_stride_h,
    padding_stride_b,
    padding_stride_n,
    gate_stride_b,
    gate_stride_n,
    num_heads,
    group_size,
    num_queries,
    num_keys,
    score_multiplier,
    factor,
    HAS_ROWS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch entry, head, tile of BLOCK_N keys); the rows fall into ranges as in
    attention_backward_keys.py.
    """
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    first_key = tl.program_id(0) % num_tiles * BLOCK_N
    batch = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    head = (tl.program_id(0) // num_tiles % num_heads).to(tl.int64)

    query_base = query_ptr + (batch * query_stride_b + head * query_stride_h) * STRIDE_UNIT
    key_base = key_ptr + (batch * key_stride_b + head // group_size * key_stride_h) * STRIDE_UNIT
    query_stride_n, key_stride_n = query_stride_n * STRIDE_UNIT, key_stride_n * STRIDE_UNIT
    row_lse_base = row_lse_ptr + (batch * num_heads + head) * num_queries
    gate_base = gate_ptr + batch * gate_stride_b

    offset = num_keys - num_queries  # row i sees keys up to i + offset: bottom-right
    keys = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys_64 = keys.to(tl.int64)
    inside = keys < num_keys
    key = load_rows(key_base, keys_64, key_stride_n, inside, HEAD_DIM, D0, D1, D2, True)
    attend = inside
    if HAS_PADDING:
        attend = tl.load(padding_ptr + batch * padding_stride_b + keys_64 * padding_stride_n, mask=inside, other=0) != 0

    start, full_start = 0, 0
    if IS_CAUSAL:
        start = tl.maximum(first_key - offset, 0)  # the first row that sees the first key
        full_start = tl.maximum(first_key + BLOCK_N - 1 - offset, 0)
    end = num_queries
    if HAS_ROWS:
        start = tl.maximum(start, tl.load(row_range_ptr + 2 * batch))
        end = tl.load(row_range_ptr + 2 * batch + 1)
    if HAS_HEADS:
        end = tl.where(tl.load(heads_ptr + head) != 0, end, 0)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + batch * bias_stride_b + head * bias_stride_h + keys)
        key_range = range_ptr + batch * range_stride_b + head * range_stride_h
        is_visible = (tl.load(key_range + 2) < first_key + BLOCK_N) & (tl.load(key_range + 3) > first_key)
        end = tl.where(is_visible, end, 0)
    start = tl.minimum(start // BLOCK_M * BLOCK_M, end)
    full_end = tl.maximum(tl.minimum(end, num_queries // BLOCK_M * BLOCK_M), start)
    full_start = tl.maximum(tl.minimum(tl.cdiv(full_start, BLOCK_M) * BLOCK_M, full_end), start)
    # In whole blocks, also where the range of chosen rows ends within one: rows that do not count have an lse of +inf.
    full_end = tl.minimum(
        full_start + tl.cdiv(full_end - full_start, BLOCK_M) * BLOCK_M, num_queries // BLOCK_M * BLOCK_M
    )
    full_end = tl.maximum(full_end, full_start)
    plain_end = full_end
    if HAS_BIAS:
        is_biased = (tl.load(key_range) < first_key + BLOCK_N) & (tl.load(key_range + 1) > first_key)
        plain_end = tl.where(is_biased, full_start, full_end)

    probabilities = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # fmt: off
    if IS_CAUSAL:
        probabilities = _walk_over_rows(
            probabilities, key, bias, attend, keys, query_base, row_lse_base, gate_base, start, full_start, num_queries,
            offset, query_stride_n, gate_stride_n, score_multiplier, factor, HAS_BIAS, True, IS_CAUSAL, HAS_GATE,
            HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, BLOCK_M)
    probabilities = _walk_over_rows(
        probabilities, key, bias, attend, keys, query_base, row_lse_base, gate_base, full_start, plain_end,
        num_queries, offset, query_stride_n, gate_stride_n, score_multiplier, factor, False, False, IS_CAUSAL,
        HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, BLOCK_M)
    if HAS_BIAS:  # either this loop is empty or the one before
        probabilities = _walk_over_rows(
            probabilities, key, bias, attend, keys, query_base, row_lse_base, gate_base, plain_end, full_end,
            num_queries, offset, query_stride_n, gate_stride_n, score_multiplier, factor, True, False, IS_CAUSAL,
            HAS_GATE, HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, BLOCK_M)
    probabilities = _walk_over_rows(
        probabilities, key, bias, attend, keys, query_base, row_lse_base, gate_base, full_end, end, num_queries,
        offset, query_stride_n, gate_stride_n, score_multiplier, factor, HAS_BIAS, True, IS_CAUSAL, HAS_GATE,
        HAS_PADDING, FOLDED, WIDE_OFFSETS, HEAD_DIM, D0, D1, D2, BLOCK_M)
    # fmt: on
    map_row = map_ptr + (batch * num_heads + head) * num_keys
    tl.store(map_row + keys, tl.sum(probabilities, 1), mask=inside)


class _Selection:
    """Which rows and heads count, as kernel arguments: rows (B, Nq) bool or None, heads (H,) bool or None."""

    def __init__(self, inputs: AttentionInputs, rows: Tensor | None, heads: Tensor | None) -> None:
        unread = inputs.query
        self.rows = unread if rows is None else rows.view(torch.uint8)
        self.row_range = unread
        self.heads = unread if heads is None else heads.contiguous().view(torch.uint8)
        self.rows_strides = (0, 0) if rows is None else rows.stride()
        self.constants = {"HAS_ROWS": rows is not None, "HAS_HEADS": heads is not None}
        if rows is not None:
            batch, num_queries = rows.shape
            self.row_range = torch.empty((batch, 2), dtype=torch.int32, device=rows.device)
            row_range_kernel[(batch,)](self.rows, self.row_range, *rows.stride(), num_queries, BLOCK=1024, **EXACT)


def _launch_rows(
    inputs: AttentionInputs,
    selection: _Selection,
    lse: Tensor,
    lse_is_known: bool,
    grad_map: Tensor | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """Returns row_lse; writes lse unless it is known, and delta if given."""
    row_lse = torch.empty_like(lse)
    tile = inputs.tile("map_rows", inputs.head_dim)
    grid = (inputs.num_sequences * inputs.heads * triton.cdiv(inputs.longest_query, tile.BLOCK_M),)
    attention_map_rows_kernel[grid](
        **inputs.batched_arguments(),
        grad_map_ptr=lse if grad_map is None else grad_map,
        rows_ptr=selection.rows,
        row_range_ptr=selection.row_range,
        heads_ptr=selection.heads,
        lse_ptr=lse,
        row_lse_ptr=row_lse,
        delta_ptr=lse if delta is None else delta,
        rows_stride_b=selection.rows_strides[0],
        rows_stride_n=selection.rows_strides[1],
        LSE_IS_KNOWN=lse_is_known,
        OF_GRADIENT=grad_map is not None,
        **selection.constants,
        **tile.launch_arguments(),
    )
    return row_lse


def attention_map(
    inputs: AttentionInputs, rows: Tensor | None, heads: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> map (B, H, Nk) and lse (B, H, Nq), both float32; lse is the one given, or holds the chosen rows at least."""
    batch, num_heads, num_queries = inputs.query.shape[:3]
    selection = _Selection(inputs, rows, heads)
    lse_is_known = lse is not None
    if lse is None:
        lse = torch.empty((batch, num_heads, num_queries), dtype=torch.float32, device=inputs.query.device)
    row_lse = _launch_rows(inputs, selection, lse, lse_is_known)
    attention_map = torch.empty(
        (batch, num_heads, inputs.keys_in_memory), dtype=torch.float32, device=inputs.query.device
    )
    tile = inputs.tile("map_columns", inputs.head_dim)
    grid = (batch * num_heads * triton.cdiv(inputs.keys_in_memory, tile.BLOCK_N),)
    attention_map_columns_kernel[grid](
        **inputs.batched_arguments(),
        row_range_ptr=selection.row_range,
        heads_ptr=selection.heads,
        row_lse_ptr=row_lse,
        map_ptr=attention_map,
        **selection.constants,
        **tile.launch_arguments(),
    )
    return attention_map, lse


def attention_map_backward(
    inputs: AttentionInputs,
    rows: Tensor | None,
    heads: Tensor | None,
    lse: Tensor,
    grad_map: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    bias_needs_grad: bool,
) -> Tensor | None:
    """Writes grad_query and grad_key; returns the gradient of the bias per head, (B, H, Nk) float32, if wanted."""
    selection = _Selection(inputs, rows, heads)
    grad_map, delta = grad_map.contiguous(), torch.empty_like(lse)
    row_lse = _launch_rows(inputs, selection, lse, True, grad_map, delta)
    unread = {"value": inputs.key, "grad_output": inputs.query}
    constants = parts("VALUE_DIM", "DV", 16)
    attention_backward_query(inputs, unread, constants, grad_map, row_lse, delta, grad_query)
    return attention_backward_keys(
        inputs, unread, constants, grad_map, row_lse, delta, grad_key, inputs.key, bias_needs_grad
    )
