"""Questions about scenes that no model was trained on, and how good the boxes are that it answers with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..boxes import Box
from .questions import AMBIGUOUS, KINDS, Question, questions_about
from .scenes import PLAIN, Difficulty, Scene, draw_scene, intersection_over_union, seed_of


@dataclass(frozen=True)
class Asked:
    """A question about a scene."""

    scene: Scene
    question: Question

    @property
    def box(self) -> Box:
        """Where the answer is."""
        return self.question.box(self.scene)


def ask_about(split: str, kind: str, count: int, difficulty: Difficulty = PLAIN) -> list[Asked]:
    """`count` questions of a kind, each about a scene of its own: of the first scenes of a split that have one.

    Raises:
        ValueError: kind is none of KINDS, or there is no such split.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    asked: list[Asked] = []
    index = 0
    while len(asked) < count:
        scene = draw_scene(seed_of(split, index), difficulty)
        options = questions_about(scene.cards, scene.image.width)[kind]
        if options:
            rng = np.random.default_rng((scene.seed, 2, KINDS.index(kind)))
            asked.append(Asked(scene, options[int(rng.integers(len(options)))]))
        index += 1
    return asked


def in_batches(asked: Sequence[Asked], rows: int = 32) -> Iterator[Sequence[Asked]]:
    for start in range(0, len(asked), rows):
        yield asked[start : start + rows]


def box_quality(one: Asked, box: Box | None) -> float:
    """Intersection over union with the true box; with the best of them where the question is ambiguous; 0 of none."""
    if box is None:
        return 0.0
    if one.question.kind == AMBIGUOUS:
        return max(intersection_over_union(box, one.scene.cards[i].box) for i in one.question.candidates)
    return intersection_over_union(box, one.box)
