"""How good the model is at every kind of question on scenes that it was not trained on, through DualFocus itself."""

from __future__ import annotations

from typing import Any

from ...methods.dualfocus import DualFocus, DualFocusResult
from ..held_out import ask_about, box_quality, in_batches
from ..questions import KINDS


def validate(model: Any, processor: Any, count: int, split: str = "validation") -> dict[str, dict[str, float]]:
    """Per kind: the share of right answers from the whole image ("macro") and with the crop of the model's own box
    ("micro"), of what the perplexity chose ("chosen"), and of boxes with an IoU of 0.5 ("boxes").
    """
    was_training = model.training
    method = DualFocus(model.eval(), processor)
    found = {}
    for kind in KINDS:
        asked = ask_about(split, kind, count)
        results: list[DualFocusResult] = []
        for batch in in_batches(asked):
            images, texts = [one.scene.image for one in batch], [one.question.text for one in batch]
            results += method.answer_batch(images, texts, max_new_tokens=4)
        answers = [one.question.answer for one in asked]
        found[kind] = {
            "macro": _share(result.macro.text == answer for result, answer in zip(results, answers)),
            "micro": _share(
                result.micro is not None and result.micro.text == answer for result, answer in zip(results, answers)
            ),
            "chosen": _share(result.text == answer for result, answer in zip(results, answers)),
            "boxes": _share(box_quality(one, result.box) >= 0.5 for one, result in zip(asked, results)),
        }
    model.train(was_training)
    return found


def _share(outcomes: Any) -> float:
    outcomes = list(outcomes)
    return sum(outcomes) / len(outcomes)
