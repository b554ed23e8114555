"""What can be asked about a scene, and the right answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeAlias

from ..boxes import Box
from .scenes import COLOURS, LETTERS, SHAPES, Card, Scene

NUMBERS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}

GLOBAL_KINDS = ("count", "leftmost", "left_of", "colour", "shape")  # the whole image is enough
LOCAL_KINDS = ("letter", "dot")  # only a crop is
AMBIGUOUS = "ambiguous"  # only a box tells which card is meant
KINDS = (*GLOBAL_KINDS, *LOCAL_KINDS, AMBIGUOUS)
BOXED_KINDS = ("colour", "shape", *LOCAL_KINDS, AMBIGUOUS)  # their answer is on one card

# What the answers of a kind may be.
ANSWERS: dict[str, tuple[str, ...]] = {
    "count": tuple(NUMBERS.values()),
    "leftmost": tuple(COLOURS),
    "left_of": ("yes", "no"),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "letter": LETTERS,
    "dot": tuple(COLOURS),
    AMBIGUOUS: tuple(COLOURS),
}
# Of a plain scene: of one who knows these answers and sees nothing; where a question is ambiguous, of one who sees all.
CHANCE = {"count": 1 / 4, "leftmost": 1 / 8, "left_of": 1 / 2, "colour": 1 / 8, "shape": 1 / 4, "letter": 1 / 10}
CHANCE |= {"dot": 1 / 7, AMBIGUOUS: 1 / 2}  # a dot never has its card's colour, which the question names

# Two cards whose centres are closer than this share of the side are not compared.
_CLEARLY = 0.04


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        kind: one of KINDS.
        card: the index of the card that the answer is on; None where it is about the scene.
        candidates: the cards that the words fit: `card` alone, or more where the question is ambiguous.
    """

    kind: str
    text: str
    answer: str
    card: int | None = None
    candidates: tuple[int, ...] = ()

    def box(self, scene: Scene) -> Box:
        """Where the answer is: the card's box, or all of the scene."""
        if self.card is None:
            height, width = scene.size
            return 0.0, 0.0, float(width), float(height)
        return scene.cards[self.card].box


QuestionsByKind: TypeAlias = dict[str, list[Question]]


def questions_about(cards: Sequence[Card], side: float) -> QuestionsByKind:
    """All questions about a scene of `side` pixels, by kind; a kind that has none is empty."""
    centres = [card.centre[0] / side for card in cards]
    order = sorted(range(len(cards)), key=lambda i: centres[i])
    found: QuestionsByKind = {kind: [] for kind in KINDS}
    found["count"].append(Question("count", "How many cards are there?", NUMBERS[len(cards)]))
    if centres[order[1]] - centres[order[0]] > _CLEARLY:
        answer = cards[order[0]].colour
        found["leftmost"].append(Question("leftmost", "What colour is the leftmost card?", answer))
    shapes = Counter(card.shape for card in cards)
    for i, card in enumerate(cards):
        alike = tuple(k for k, other in enumerate(cards) if other.shape == card.shape)
        colour_of_shape = f"What colour is the {card.shape}?"
        if shapes[card.shape] == 1:
            found["colour"].append(Question("colour", colour_of_shape, card.colour, i, alike))
        elif shapes[card.shape] == 2:
            found[AMBIGUOUS].append(Question(AMBIGUOUS, colour_of_shape, card.colour, i, alike))
        name = f"the {card.colour} card"
        found["shape"].append(Question("shape", f"What shape is {name}?", card.shape, i, (i,)))
        found["letter"].append(Question("letter", f"Which letter is on {name}?", card.letter, i, (i,)))
        found["dot"].append(Question("dot", f"What colour is the dot on {name}?", card.dot, i, (i,)))
    for i, k in permutations(range(len(cards)), 2):
        if abs(centres[i] - centres[k]) > _CLEARLY:
            text = f"Is the {cards[i].colour} card left of the {cards[k].colour} card?"
            found["left_of"].append(Question("left_of", text, "yes" if centres[i] < centres[k] else "no"))
    return found


def caption(cards: Sequence[Card]) -> Question:
    """The cards from left to right: what teaches a model which shape has which colour. Not among KINDS."""
    ordered = sorted(cards, key=lambda card: card.centre[0])
    return Question("caption", "Which cards are there?", " ".join(f"{card.colour} {card.shape}" for card in ordered))
