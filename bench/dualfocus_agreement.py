"""No time is taken of answers that are wrong: DualFocus's, question by question, against those of its naive form.

Where both wrote the same, their perplexities are the same. Elsewhere the first token in which they differ was as good
as the other to the naive form, as closely as the dtype lets two orders of summation agree. Random weights make many
tokens about as good as the best, so that half precision may also write another box; then micro answers are not
comparable.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .peers.dualfocus import NAIVE, ONE_PLAIN_ANSWER, NaiveAnswer

# Of the largest logit, and of the logarithm of a perplexity; see generate_agreement.py.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def require_same_answers(results: dict[str, list[Any]], dtype: torch.dtype) -> None:
    """Of each peer, what its call returned; in a sweep, without the naive form, the first peer's answers stand for it,
    and in half precision, without its logits, only what both wrote alike is compared.
    """
    ours = [name for name in results if name not in (NAIVE, ONE_PLAIN_ANSWER)]
    expected = results.get(NAIVE, results[ours[0]])
    for name in ours:
        for i, (result, other) in enumerate(zip(results[name], expected, strict=True)):
            where = f"{name}, question {i}"
            _require_same(result.macro, other.macro, dtype, f"{where}, macro answer")
            if result.micro is None:
                continue
            is_same_box = result.box == other.box
            assert is_same_box or dtype != torch.float32, f"{where}: the box is {result.box}, not {other.box}"
            if is_same_box:
                _require_same(result.micro, other.micro, dtype, f"{where}, micro answer")
    plain = results[ONE_PLAIN_ANSWER]
    for i, (text, other) in enumerate(zip(plain, expected, strict=True)):
        assert text == other.macro.text or NAIVE not in results, (
            f"question {i}: the naive macro answer is not the plain one"
        )


def _require_same(answer: Any, other: Any, dtype: torch.dtype, where: str) -> None:
    tolerance = _TOLERANCE[dtype]
    if answer.tokens == other.tokens:
        off = abs(math.log(answer.perplexity) - math.log(other.perplexity))
        assert answer.text == other.text, f"{where}: the same tokens, but {answer.text!r}, not {other.text!r}"
        assert off <= tolerance, f"{where}: the perplexity is {answer.perplexity}, not {other.perplexity}"
        return
    first = next((k for k, (a, b) in enumerate(zip(answer.tokens, other.tokens)) if a != b), None)
    assert first is not None, f"{where}: {len(answer.tokens)} tokens, not {len(other.tokens)}"
    if not isinstance(other, NaiveAnswer):
        assert dtype != torch.float32, f"{where}: {answer.text!r}, not {other.text!r}"
        return
    logits = other.logits[first]
    off = float((logits[other.tokens[first]] - logits[answer.tokens[first]]) / logits.abs().max())
    assert off <= tolerance, f"{where}: {answer.text!r}, not {other.text!r}; token {first} is {off:.1e} worse"
