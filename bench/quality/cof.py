"""CoF's answers: boxes and lambda swept; the analogue of CoF (arXiv 2412.16869), Table II, and of its choice of
lambda.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from finegrain_ops import CoF
from finegrain_ops.methods.cof import CoFResult
from finegrain_ops.tiny_llava.held_out import Asked, box_quality, in_batches

from .boxes import Box, oracle_box, wrong_box
from .plain import MAX_NEW_TOKENS, are_right
from .rows import Answers, mean

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
            if which == "oracle":
                given = [oracle_box(one) for one in asked]
            elif which == "wrong":
                given = [wrong_box(one) for one in asked]
            elif which == "predicted" and predicted:
                given = predicted
            results = _answers(method, asked, given)
            facts = {}
            if which == "predicted":
                predicted = predicted or [result.box for result in results]
                qualities = [box_quality(one, box) for one, box in zip(asked, predicted)]
                facts = {"iou": mean(qualities), "iou50": mean([float(quality >= 0.5) for quality in qualities])}
            right = are_right([result.text for result in results], asked)
            yield Answers("cof", {"boxes": which, "weight": weight}, right, facts)


def _answers(method: CoF, asked: Sequence[Asked], boxes: Sequence[Box | None] | None) -> list[CoFResult]:
    results: list[CoFResult] = []
    for batch in in_batches(asked):
        images, questions = [one.scene.image for one in batch], [one.question.text for one in batch]
        given = None if boxes is None else boxes[len(results) : len(results) + len(batch)]
        results += method.answer_batch(images, questions, boxes=given, max_new_tokens=MAX_NEW_TOKENS)
    return results
