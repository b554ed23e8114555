"""Device functions of the online softmax, in base 2.

Scores are kept in units in which softmax(s) = softmax over 2^(score * factor): with factor = scale * log2(e) a score
is the bare dot product (plus bias / scale), and exponentiation is one fused multiply-add and one exp2 per score.
"Units" below are these.

What is carried from block to block is the origin of the exponents, `shift` = max_j score_j * factor, a product that is
rounded once. It is never computed again to be subtracted from itself: a compiler may contract x * c - shift to one
fused multiply-add, whose value for the same x is the rounding error of the product, 1e28 for a shift of -1e37.

A shift starts at LOWEST, below every score and yet finite, instead of at -inf. So a row that has seen no key so far
needs no care: 2^(-inf - LOWEST) is 0, the correction 2^(LOWEST - LOWEST) is 1, and its total stays 0.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2.0**126))  # twice that would overflow float32


@triton.jit
def exponentials(scores, factor, origin):
    """2^(score * factor - origin), the product not rounded: scores [M, N] in units, origin [M, 1] or [1, N] base 2."""
    negative = origin * -1.0  # a sign of the operand; `-origin` would be a subtraction from 0
    return tl.exp2(tl.fma(scores, factor, negative))


@triton.jit
def online_softmax_step(scores, shift, total, factor):
    """One block of keys: scores [BLOCK_M, BLOCK_N] in units; returns probabilities relative to the new shift.

    -> probabilities [BLOCK_M, BLOCK_N], correction of what was summed so far [BLOCK_M], shift [BLOCK_M], total
    [BLOCK_M]
    """
    new_shift = tl.maximum(shift, tl.max(scores, 1) * factor)
    probabilities = exponentials(scores, factor, new_shift[:, None])
    correction = tl.exp2(shift - new_shift)  # exactly 1 where they are equal
    total = tl.fma(total, correction, tl.sum(probabilities, 1))
    return probabilities, correction, new_shift, total


@triton.jit
def natural_lse(shift, total):
    """[BLOCK_M] log of the sum of e^score, -inf for a row that saw no key."""
    LN_2: tl.constexpr = 0.6931471805599453
    lse = (shift + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2
    return tl.where(total == 0.0, float("-inf"), lse)
