"""No time is taken of answers that are wrong: logits of the last new token, every peer's against those that they must
equal.

Patched without a bias equals unpatched to the bit. With a bias ours equals eager attention with the bias in its mask,
as closely as the dtype lets two orders of summation agree, and differs from unbiased by far more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .peers import Call
from .peers.cof import NOTHING_SHARED, SHARED_VISION
from .peers.generate import EAGER_BIASED, PATCHED_BIASED, PATCHED_IDLE, UNPATCHED

# Of the largest logit. Eager itself differs from sdpa, both unbiased, by as much as a third of these.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def keep_right_answers(calls: dict[str, Call], dtype: torch.dtype) -> dict[str, dict]:
    """For the rows of the calls, how far off their logits are.

    One of ours that is wrong fails the test, and then nobody's time is taken.
    """
    logits = {name: call() for name, call in calls.items()}
    assert torch.equal(logits[PATCHED_IDLE], logits[UNPATCHED]), "patched and idle is not unpatched to the bit"
    fields: dict[str, dict] = {name: {} for name in calls}
    if EAGER_BIASED in calls:
        off = difference(logits[PATCHED_BIASED], logits[EAGER_BIASED])
        assert off <= _TOLERANCE[dtype], f"{PATCHED_BIASED} is {off:.1e} of the largest logit off {EAGER_BIASED}"
        fields[PATCHED_BIASED] = {"logits_off": float(f"{off:.2g}")}
    moved = difference(logits[PATCHED_BIASED], logits[UNPATCHED])
    assert moved > 10 * torch.finfo(dtype).eps, "the bias changes nothing"
    return fields


def require_same_answers(calls: dict[str, Call]) -> dict[str, dict]:
    """Of CoF: with Eq. 3 in every row its passes say what they say apart from each other. Biased after the image only,
    they may say something else. That the bias is right is for tests/methods to find.
    """
    answers = {name: call() for name, call in calls.items()}
    assert answers[SHARED_VISION] == answers[NOTHING_SHARED], "CoF's answer is not that of two passes made apart"
    return {name: {} for name in calls}


def difference(logits: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest expected one."""
    return float((logits.float() - expected.float()).abs().max() / expected.float().abs().max())
