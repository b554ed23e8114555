"""The scores of one block of rows and keys, and which blocks need the bias, the mask, or neither: what every
attention kernel computes before it differs from the others.

The keys of a tile of rows fall into ranges, each with a loop of its own, so that the bias costs nothing where it is 0:

    keys   start ........ bias_start ........ bias_end ........ full_end .... end
           plain          biased              plain             masked (and biased)

[start, full_end) are blocks that every row of the tile sees whole; the last few blocks hold the causal diagonal or
the end of the keys. Before start and after end there are only keys that no row may see.

With scale > 0 the scores are kept as dot products (FOLDED): the accumulator of q . k starts at b / scale, which the
tensor core adds for nothing (in float32, which has no tensor cores, the bias is added afterwards), and the scale is
folded into the exponent's fused multiply-add. Other scales are multiplied onto the scores first.
"""

import triton
import triton.language as tl

from .head_dim import add_dot_rows, dot_rows


@triton.jit
def key_ranges(
    key_range,  # pointer to the four numbers of key_bias.py
    first_row,
    offset,
    num_keys,
    HAS_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """-> start, bias_start, bias_end, full_end, end for the rows first_row .. first_row + BLOCK_M - 1."""
    start, end, full_end = 0, num_keys, num_keys // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        end = tl.maximum(tl.minimum(num_keys, first_row + BLOCK_M + offset), 0)
        # The first row of the tile sees first_row + offset + 1 keys; blocks beyond those need the causal mask.
        full_end = tl.maximum(tl.minimum(full_end, (first_row + offset + 1) // BLOCK_N * BLOCK_N), 0)
    bias_start, bias_end = 0, 0
    if HAS_BIAS:
        start = tl.minimum(tl.load(key_range + 2) // BLOCK_N * BLOCK_N, end)
        end = tl.minimum(end, tl.cdiv(tl.load(key_range + 3), BLOCK_N) * BLOCK_N)
        full_end = tl.maximum(tl.minimum(full_end, end), start)
        bias_start = tl.maximum(tl.minimum(tl.load(key_range) // BLOCK_N * BLOCK_N, full_end), start)
        bias_end = tl.maximum(tl.minimum(tl.cdiv(tl.load(key_range + 1), BLOCK_N) * BLOCK_N, full_end), bias_start)
    return start, bias_start, bias_end, full_end, end


@triton.jit
def plus_bias(scores, bias):
    """scores + bias, rounded once. Of a plain sum the compiler would make the bias the first value of the product's
    accumulator, where a large one rounds each of the products that are added to it.
    """
    return tl.fma(scores, 1.0, bias)


@triton.jit
def masked_scores(
    query,  # parts of [BLOCK_M, HEAD_DIM]
    key,  # parts of [BLOCK_N, HEAD_DIM]
    bias_address,  # [BLOCK_N] pointers
    padding_base,
    gate,  # [BLOCK_M] int1, read only with HAS_GATE
    last_key,  # [BLOCK_M] int32: the last key that a row may see, under a causal mask
    first_key,
    block,  # [BLOCK_N]
    inside,  # [BLOCK_N] int1: keys that exist
    padding_stride_n,
    score_multiplier,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """-> [BLOCK_M, BLOCK_N] in units (softmax.py), -inf where a row may not see a key."""
    if BIASED:
        bias = tl.load(bias_address)[None, :]
        bias = tl.where(gate[:, None], bias, 0.0) if HAS_GATE else bias
        if FOLDED and query[0].dtype == tl.float32:
            scores = plus_bias(dot_rows(query, key), bias)
        elif FOLDED:
            BLOCK_M: tl.constexpr = query[0].shape[0]
            scores = add_dot_rows(tl.broadcast_to(bias, (BLOCK_M, block.shape[0])), query, key)
        else:
            scores = tl.fma(dot_rows(query, key), score_multiplier, bias)
        if HAS_PADDING:
            keys_64 = tl.cast(first_key, tl.int64) + block
            attend = tl.load(padding_base + keys_64 * padding_stride_n, mask=inside, other=1)
            scores = tl.where(attend[None, :] != 0, scores, float("-inf"))
    else:
        scores = dot_rows(query, key)
        if not FOLDED:
            scores = scores * score_multiplier
    if MASKED:
        visible = inside[None, :]
        if IS_CAUSAL:
            visible = visible & (first_key + block[None, :] <= last_key[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def masked_scores_transposed(
    key,  # parts of [BLOCK_N, HEAD_DIM]
    query,  # parts of [BLOCK_M, HEAD_DIM]
    bias,  # [BLOCK_N] float32
    attend,  # [BLOCK_N] int1, read only with HAS_PADDING
    gate,  # [BLOCK_M] int1, read only with HAS_GATE
    keys,  # [BLOCK_N]
    last_key,  # [BLOCK_M]
    score_multiplier,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """-> [BLOCK_N, BLOCK_M]: for kernels that keep a block of keys and walk over the rows. Rows that do not exist are
    the caller's to leave out.
    """
    scores = dot_rows(key, query)
    if not FOLDED:
        scores = scores * score_multiplier
    if BIASED:  # in half precision a plain sum: the compiler makes the bias the first value of the accumulator
        bias = tl.where(gate[None, :], bias[:, None], 0.0) if HAS_GATE else bias[:, None]
        scores = plus_bias(scores, bias) if query[0].dtype == tl.float32 else scores + bias
        if HAS_PADDING:
            scores = tl.where(attend[:, None], scores, float("-inf"))
    if MASKED and IS_CAUSAL:
        scores = tl.where(keys[:, None] <= last_key[None, :], scores, float("-inf"))
    return scores
