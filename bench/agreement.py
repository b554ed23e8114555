"""No time is taken of a call whose result is wrong: every peer is first compared with a float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

import finegrain_ops

from .cases import CaseInputs

# For the worst row, in epsilons of the dtype. Seen: up to 15 in float32 (rounding of long dot products, for all peers
# alike); 0.4 in bfloat16, and 3.2 where the scores are stored in it (eager). A forgotten bias of log 2 on 15 % of the
# keys has an error above 0.3, which is 40 epsilons of bfloat16.
TOLERANCE_IN_EPSILONS = {torch.float32: 64.0, torch.float16: 8.0, torch.bfloat16: 8.0}


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE_IN_EPSILONS[dtype] * torch.finfo(dtype).eps


def reference(inputs: CaseInputs, is_biased: bool) -> Tensor:
    """float64, (B, H, Nq, D); one head at a time, since the reference holds a whole Nq x Nk matrix."""
    case = inputs.case
    group = case.heads // case.num_kv_heads
    outputs = []
    for head in range(case.heads):
        query = inputs.query[:, head : head + 1]
        key, value = (t[:, head // group : head // group + 1] for t in (inputs.key, inputs.value))
        outputs.append(
            finegrain_ops.reweighted_attention(
                query.double(),
                key.double(),
                value.double(),
                inputs.region_mask if is_biased else None,
                case.weight,
                is_causal=case.is_causal,
                backend="reference",
            )
        )
    return torch.cat(outputs, dim=1)


def worst_row_error(output: Tensor, expected: Tensor) -> float:
    """max over rows of |output - expected| / |expected|, so that a single wrong row is seen; NaN counts as infinite."""
    error = (output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return error.nan_to_num(nan=float("inf")).max().item()
