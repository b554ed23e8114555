"""CoF's answers: boxes and lambda swept; the analogue of CoF (arXiv 2412.16869), Table II, and of its choice of
lambda.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from finegrain_ops import CoF
from finegrain_ops.boxes import Box
from finegrain_ops.tiny_llava.held_out import Asked

from .asking import STAND_INS, are_right, ask, box_facts
from .rows import Answers

WEIGHTS = (1.0, 2.0, 4.5, 10.0, 22.0)  # the paper's presets among them
# "none": the whole image's attention is raised (Table II, "Reweight" alone).
BOXES = ("predicted", "oracle", "wrong", "none")


def cof_answers(
    model: Any,
    processor: Any,
    asked: Sequence[Asked],
    weights: Sequence[float] = WEIGHTS,
    boxes: Sequence[str] = BOXES,
    **options: Any,
) -> Iterator[Answers]:
    """For every kind of box and every weight. The model is asked for its boxes once.

    Args:
        options: of `CoF`.
    """
    predicted: list[Box | None] = []
    for which in boxes:
        for weight in weights:
            method = CoF(model, processor, weight=weight, grounding=which != "none", **options)
            given: list[Box | None] | None = None
            if which in STAND_INS:
                given = [STAND_INS[which](one) for one in asked]
            elif which == "predicted" and predicted:
                given = predicted
            results = ask(method, asked, given)
            facts = {}
            if which == "predicted":
                predicted = predicted or [result.box for result in results]
                facts = box_facts(predicted, asked)
            right = are_right([result.text for result in results], asked)
            yield Answers("cof", {"boxes": which, "weight": weight}, right, facts)
