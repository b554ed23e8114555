"""Held-out questions put to a method in batches, and what is said of its answers and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finegrain_ops.boxes import Box
from finegrain_ops.tiny_llava.held_out import Asked, box_quality, in_batches

from .boxes import oracle_box, wrong_box
from .rows import mean

MAX_NEW_TOKENS = 4  # of answers; all are one word
STAND_INS = {"oracle": oracle_box, "wrong": wrong_box}  # for the model's boxes


def ask(method: Any, asked: Sequence[Asked], boxes: Sequence[Box | None] | None) -> list[Any]:
    """The results of a `CoF` or `DualFocus`, with its own boxes or with these."""
    results: list[Any] = []
    for batch in in_batches(asked):
        images, questions = [one.scene.image for one in batch], [one.question.text for one in batch]
        given = None if boxes is None else boxes[len(results) : len(results) + len(batch)]
        results += method.answer_batch(images, questions, boxes=given, max_new_tokens=MAX_NEW_TOKENS)
    return results


def are_right(texts: Sequence[str], asked: Sequence[Asked]) -> list[bool]:
    return [text == one.question.answer for text, one in zip(texts, asked)]


def box_facts(boxes: Sequence[Box | None], asked: Sequence[Asked]) -> dict[str, float]:
    """The mean intersection over union with the true boxes, and the share of those with 0.5 or more."""
    qualities = [box_quality(one, box) for one, box in zip(asked, boxes)]
    return {"iou": mean(qualities), "iou50": mean([float(quality >= 0.5) for quality in qualities])}
