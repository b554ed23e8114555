"""Device functions of the online softmax, in base 2.

Scores are kept in units in which softmax(s) = softmax over 2^(score * factor): with factor = scale * log2(e) a score
is the bare dot product (plus bias / scale), and exponentiation is one fused multiply-add and one exp2 per score.
"Units" below are these.
"""

import triton.language as tl

import triton


@triton.jit
def finite_maximum(maximum):
    """[BLOCK_M]: a row that has seen no key yet has maximum -inf; 0 in its place keeps -inf - (-inf) out of the
    exponent.
    """
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def online_softmax_step(scores, maximum, total, factor):
    """One block of keys: scores [BLOCK_M, BLOCK_N] in units; returns probabilities relative to the new maximum.

    -> probabilities [BLOCK_M, BLOCK_N], correction of what was summed so far [BLOCK_M], maximum [BLOCK_M], total
    [BLOCK_M]
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shift = finite_maximum(new_maximum) * factor
    probabilities = tl.exp2(
        scores * factor - shift[:, None]
    )  # contracted to one FFMA (seen in the machine code) and MUFU.EX2
    correction = tl.exp2(maximum * factor - shift)
    total = total * correction + tl.sum(probabilities, 1)
    return probabilities, correction, new_maximum, total
