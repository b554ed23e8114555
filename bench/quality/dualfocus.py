"""DualFocus's answers: pathways, moved boxes and thresholds; the analogues of DualFocus (arXiv 2402.14767), Tables 3, 5
and 9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from finegrain_ops import DualFocus
from finegrain_ops.boxes import Box
from finegrain_ops.methods.dualfocus import DualFocusResult
from finegrain_ops.tiny_llava.held_out import Asked

from .asking import STAND_INS, are_right, ask, box_facts
from .boxes import moved_box
from .rows import Answers, mean

MOVES = (10, 25, 150)  # Table 5; pixels, see boxes.py
THRESHOLDS = (1.01, 1.05, 1.2, 1.5)  # on the scale of Eq. 7, where 1 is certainty
BOXES = ("predicted", "oracle", "wrong", *(f"moved {pixels} px" for pixels in MOVES))
# "either": right where one of the two is, what a choice that knows the truth would reach.
ANSWERS = ("macro", "micro", "chosen", "either")


def dualfocus_answers(
    model: Any,
    processor: Any,
    asked: Sequence[Asked],
    boxes: Sequence[str] = BOXES,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Iterator[Answers]:
    """Per kind of box all of ANSWERS; then the chosen ones with the model's own boxes and each threshold.

    Args:
        boxes: "predicted" first, if moved ones are among them.
    """
    predicted: list[Box | None] = []
    for which in boxes:
        given: list[Box | None] | None = None
        if which in STAND_INS:
            given = [STAND_INS[which](one) for one in asked]
        elif which != "predicted":
            pixels = int(which.split()[1])
            given = [None if box is None else moved_box(one, box, pixels) for one, box in zip(asked, predicted)]
        results = ask(DualFocus(model, processor), asked, given)
        if which == "predicted":
            predicted = [result.box for result in results]
        yield from _pathways(results, asked, which)
    for threshold in thresholds:
        results = ask(DualFocus(model, processor, perplexity_threshold=threshold), asked, None)
        facts = {"skipped": mean([float(result.reason == "confident") for result in results])}
        right = are_right([result.text for result in results], asked)
        yield Answers("dualfocus", {"answer": "chosen", "boxes": "predicted", "threshold": threshold}, right, facts)


def _pathways(results: Sequence[DualFocusResult], asked: Sequence[Asked], which: str) -> Iterator[Answers]:
    macro = are_right([result.macro.text for result in results], asked)
    micro = are_right([(result.micro or result.macro).text for result in results], asked)
    chosen = are_right([result.text for result in results], asked)
    either = [a or b for a, b in zip(macro, micro)]
    facts = {
        **box_facts([result.box for result in results], asked),
        "chose_micro": mean([float(result.chosen == "micro") for result in results]),
        "macro_perplexity": mean([result.macro.perplexity for result in results]),
        "micro_perplexity": mean([(result.micro or result.macro).perplexity for result in results]),
    }
    for name, right in zip(ANSWERS, (macro, micro, chosen, either)):
        yield Answers("dualfocus", {"answer": name, "boxes": which, "threshold": 0.0}, right, facts)
