"""Outcomes of questions, and what is stored of them: how many answers were right, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_Z = 1.96  # 95 % of a normal distribution


@dataclass(frozen=True)
class Answers:
    """One method in one setting, on questions of one kind.

    Attributes:
        method: "plain", "cof" or "dualfocus".
        setting: such as {"weight": 2.0, "boxes": "oracle"}.
        right: of each question.
        facts: further means over the questions, such as the share of micro answers that were chosen.
    """

    method: str
    setting: dict[str, Any]
    right: Sequence[bool]
    facts: dict[str, float]


@dataclass(frozen=True)
class Row:
    """A stored result.

    Attributes:
        difficulty, kind: of the questions.
        gained, lost: answers that are right here and wrong in `base`, and the other way; None of the base itself.
    """

    difficulty: str
    kind: str
    method: str
    setting: dict[str, Any]
    count: int
    right: int
    gained: int | None
    lost: int | None
    facts: dict[str, float]

    @classmethod
    def of(cls, difficulty: str, kind: str, answers: Answers, base: Answers | None) -> Row:
        """`base`: the plain answers to the same questions."""
        gained = lost = None
        if base is not None:
            pairs = list(zip(answers.right, base.right))
            gained, lost = pairs.count((True, False)), pairs.count((False, True))
        right = [bool(value) for value in answers.right]
        return cls(
            difficulty, kind, answers.method, answers.setting, len(right), sum(right), gained, lost, answers.facts
        )

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.count)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score: for shares near 0 and 1 too."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    # At the ends the bounds are 0 and 1, but for rounding.
    return (0.0 if right == 0 else centre - half), (1.0 if right == count else centre + half)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def pooled(rows: Sequence[Row]) -> Row:
    """Rows of several kinds in one: each question counts once, facts are means over the kinds that have them.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    first = rows[0]
    names = set.intersection(*(set(row.facts) for row in rows))
    total: Callable[[str], int | None] = lambda name: (  # noqa: E731
        None if getattr(first, name) is None else sum(getattr(row, name) for row in rows)
    )
    return Row(
        first.difficulty,
        ", ".join(dict.fromkeys(row.kind for row in rows)),
        first.method,
        first.setting,
        sum(row.count for row in rows),
        sum(row.right for row in rows),
        total("gained"),
        total("lost"),
        {name: mean([row.facts[name] for row in rows]) for name in sorted(names)},
    )
