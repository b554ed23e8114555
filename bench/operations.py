"""The operations that are measured, and what one call of each computes and moves.

FLOPs are counted, not measured, as flash-attn's papers count them: two matrix products of 2 D FLOPs per score, so

    forward, decode, packed   4 * B * H * Nq * Nk * D, half of it when causal (packed: the sum over the sequences)
    masked                    the same: a forward pass, of the CUDA C++ kernels and of what they are to replace only
    backward                  3.5 times that: forward, and 2.5 times as much for five products instead of two
    read-out                  4 * B * H * rows * Nk * D: q.k twice (logsumexp, then the sums per key), no value;
                              of causal rows that are not all, the visible scores

A peer that computes more, such as the hidden half of a causal matrix, gets no credit for it. Decode is bound by memory;
its bytes are K and V read once, the query read and the output written. On a CPU, whose caches are not flushed, a share
of the ceiling may exceed 1.

crop_resize counts no FLOPs, since peers differ in what they compute, but the fewest bytes that it moves: every pixel
within any box read once, the result written once. On a CPU arithmetic and not memory is its limit.

Whole answers of a model count tokens: prefill those of the prompts, padding not, decode the new ones, CoF and DualFocus
those of the answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import AttentionCase
    from .ceilings import Ceilings
    from .crop_cases import CropCase
    from .dualfocus_cases import DualFocusCase
    from .generate_cases import GenerateCase

FORWARD, BACKWARD, DECODE, PACKED, READ_OUT, MASKED = ATTENTION_OPERATIONS = (
    "forward",
    "backward",
    "decode",
    "packed",
    "read-out",
    "masked",
)
CROP_RESIZE = "crop_resize"
GENERATE_PREFILL, GENERATE_DECODE, COF = GENERATE_OPERATIONS = ("generate-prefill", "generate-decode", "cof")
DUALFOCUS, DUALFOCUS_ADAPTIVE = DUALFOCUS_OPERATIONS = ("dualfocus", "dualfocus-adaptive")
WHOLE_ANSWERS = (*GENERATE_OPERATIONS, *DUALFOCUS_OPERATIONS)
OPERATIONS = (*ATTENTION_OPERATIONS, CROP_RESIZE, *WHOLE_ANSWERS)
BOUND_BY_MEMORY = (DECODE, CROP_RESIZE)

TITLES = {
    FORWARD: "Forward",
    BACKWARD: "Forward and backward",
    DECODE: "Decode",
    PACKED: "Packed sequences of different lengths",
    READ_OUT: "Read-out (attention_map)",
    MASKED: "Forward, the CUDA C++ kernels against a mask tensor",
    CROP_RESIZE: "Regions cropped, resized and normalised (crop_resize)",
    GENERATE_PREFILL: "A model's prompt up to the first token (generate)",
    GENERATE_DECODE: "A model's further tokens (generate)",
    COF: "CoF, from images and questions to answers",
    DUALFOCUS: "DualFocus, from images and questions to answers",
    DUALFOCUS_ADAPTIVE: "DualFocus, questions skipped by perplexity_threshold",
}

_FORWARDS_OF_WORK = {BACKWARD: 3.5}


def score_count(case: AttentionCase) -> float:
    """Scores that are neither hidden by the causal mask nor belong to two sequences; the diagonal counts half."""
    if case.lengths is not None:
        scores = sum(length * length for length in case.lengths) / (2 if case.is_causal else 1)
    elif case.read_rows is not None:  # the last rows
        scores = case.read_rows * (case.num_keys - (case.read_rows / 2 if case.is_causal else 0))
    else:
        scores = case.num_queries * case.num_keys / (2 if case.is_causal else 1)
    return case.batch * case.heads * scores


def flops(case: AttentionCase) -> float:
    return _FORWARDS_OF_WORK.get(case.operation, 1.0) * 4 * case.head_dim * score_count(case)


def decode_bytes(case: AttentionCase) -> int:
    cache = 2 * case.num_kv_heads * case.num_keys
    query_and_output = 2 * case.heads * case.num_queries
    return case.batch * (cache + query_and_output) * case.head_dim * case.dtype.itemsize


def speed(
    case: AttentionCase | CropCase | GenerateCase | DualFocusCase, milliseconds: float, ceilings: Ceilings
) -> dict[str, Any]:
    """The fields of a row that follow from its time: TFLOP/s, of what memory binds GB/s, and the share of the machine's
    ceiling; of whole answers tokens per second.

    The ceiling is that of a large matrix product or of a device copy; both are of the same run.
    """
    if case.operation in WHOLE_ANSWERS:
        return {"tokens_per_s": _rounded(1e3 * case.num_tokens / milliseconds)}
    if case.operation == CROP_RESIZE:
        return _memory_speed(case.num_bytes(), milliseconds, ceilings)
    tflops = flops(case) / milliseconds / 1e9
    fields: dict[str, Any] = {"tflops": _rounded(tflops)}
    if case.operation == DECODE:
        return fields | _memory_speed(decode_bytes(case), milliseconds, ceilings)
    fields["ceiling_tflops"] = _rounded(ceilings.matmul_tflops)
    return fields | {"share_of_ceiling": _rounded(tflops / ceilings.matmul_tflops)}


def _memory_speed(num_bytes: int, milliseconds: float, ceilings: Ceilings) -> dict[str, Any]:
    gb_per_s = num_bytes / milliseconds / 1e6
    return {
        "bytes": num_bytes,
        "gb_per_s": _rounded(gb_per_s),
        "ceiling_gb_per_s": _rounded(ceilings.copy_gb_per_s),
        "share_of_ceiling": _rounded(gb_per_s / ceilings.copy_gb_per_s),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
