"""Device functions of the online softmax, in base 2.

Scores are kept in units in which softmax(s) = softmax over 2^(score * factor): with factor = scale * log2(e) a score
is the bare dot product (plus bias / scale), and exponentiation is one fused multiply-add and one exp2 per score.
"Units" below are these.

A maximum starts at `lowest`, far below every finite score and yet finite (arguments.py), instead of at -inf. So a row
that has seen no key so far needs no care: 2^(-inf - lowest) is 0, and its total stays 0.
"""

import triton
import triton.language as tl


@triton.jit
def online_softmax_step(scores, maximum, total, factor):
    """One block of keys: scores [BLOCK_M, BLOCK_N] in units; returns probabilities relative to the new maximum.

    -> probabilities [BLOCK_M, BLOCK_N], correction of what was summed so far [BLOCK_M], maximum [BLOCK_M], total
    [BLOCK_M]
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shift = new_maximum * factor
    probabilities = tl.exp2(
        scores * factor - shift[:, None]
    )  # contracted to one FFMA (seen in the machine code) and MUFU.EX2
    correction = tl.exp2(maximum * factor - shift)
    total = total * correction + tl.sum(probabilities, 1)
    return probabilities, correction, new_maximum, total


@triton.jit
def natural_lse(maximum, total, factor):
    """[BLOCK_M] log of the sum of e^score, -inf for a row that saw no key."""
    LN_2: tl.constexpr = 0.6931471805599453
    lse = (maximum * factor + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2
    return tl.where(total == 0.0, float("-inf"), lse)
