"""The committed weights through the public methods, on scenes of the split "guard": red when a method stops helping.

Thresholds lie below what was measured on other scenes by more than the 95 % intervals of both; docs/tiny_llava.md has
the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="its font writes the letters of the scenes")

from bench.quality.cof import cof_answers
from bench.quality.dualfocus import dualfocus_answers
from bench.quality.plain import plain_answers
from bench.quality.rows import Answers
from finegrain_ops.tiny_llava import checkpoint
from finegrain_ops.tiny_llava.held_out import Asked, ask_about
from finegrain_ops.tiny_llava.questions import AMBIGUOUS, BOXED_KINDS, CHANCE, GLOBAL_KINDS, KINDS, LOCAL_KINDS

COUNT = 40  # questions of each kind
SETTLED = (*GLOBAL_KINDS, *LOCAL_KINDS)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    return checkpoint.load()


@pytest.fixture(scope="module")
def asked() -> dict[str, list[Asked]]:
    return {kind: ask_about("guard", kind, COUNT) for kind in KINDS}


@pytest.fixture(scope="module")
def answers(trained, asked) -> dict[str, dict[str, Answers]]:
    """DualFocus's with the model's own boxes, by kind and answer ("macro", "micro", "chosen", "either")."""
    return {
        kind: {str(of.setting["answer"]): of for of in dualfocus_answers(*trained, asked[kind], ["predicted"], [])}
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def pathways(answers) -> dict[str, dict[str, list[bool]]]:
    """Which are right."""
    return {kind: {name: list(of.right) for name, of in by_name.items()} for kind, by_name in answers.items()}


def share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes)


def over(pathways: dict[str, dict[str, list[bool]]], kinds: Sequence[str], answer: str) -> float:
    return share([right for kind in kinds for right in pathways[kind][answer]])


def test_boxes_are_found(answers) -> None:
    of_kinds = [answers[kind]["chosen"].facts["iou50"] for kind in BOXED_KINDS]
    assert sum(of_kinds) / len(of_kinds) >= 0.95


@pytest.mark.parametrize("kind", LOCAL_KINDS)
def test_details_are_unreadable_in_the_whole_image(pathways, kind: str) -> None:
    assert share(pathways[kind]["macro"]) <= CHANCE[kind] + 0.15


def test_the_crop_beats_the_whole_image_on_details(pathways) -> None:
    assert over(pathways, LOCAL_KINDS, "micro") >= over(pathways, LOCAL_KINDS, "macro") + 0.7


def test_the_whole_image_is_enough_for_the_rest(pathways) -> None:
    assert over(pathways, GLOBAL_KINDS, "macro") >= 0.97


def test_the_surer_pathway_is_no_worse_than_either(pathways) -> None:
    chosen = over(pathways, SETTLED, "chosen")
    assert chosen >= max(over(pathways, SETTLED, "macro"), over(pathways, SETTLED, "micro")) - 0.01
    assert chosen >= 0.97


def test_reweighting_settles_ambiguous_questions(trained, asked) -> None:
    """The true box draws the answer to it, and that of another card draws it away."""
    steered = {
        (of.setting["boxes"], of.setting["weight"]): share(of.right)
        for of in cof_answers(*trained, asked[AMBIGUOUS], [1.0, 22.0], ["oracle", "wrong"])
    }
    assert 0.25 <= steered["oracle", 1.0] <= 0.75
    assert steered["oracle", 22.0] >= 0.8
    assert steered["oracle", 22.0] >= steered["oracle", 1.0] + 0.25


def test_a_mild_weight_does_not_lower_plain_accuracy(trained, asked) -> None:
    """lambda = 2 with the model's own boxes."""
    plain, steered = [], []
    for kind in GLOBAL_KINDS:
        plain += plain_answers(*trained, asked[kind]).right
        (answers,) = cof_answers(*trained, asked[kind], [2.0], ["predicted"])
        steered += answers.right
    assert share(steered) >= share(plain) - 0.02
