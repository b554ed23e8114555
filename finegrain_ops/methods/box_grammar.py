"""The texts that spell a box: which characters may follow, and which must.

A format is five pieces of fixed text with four numbers between them, x0, y0, x1, y1, in whole units: hundredths of the
image, thousandths, or pixels. A `BoxState` is how far a text has got; from it follow the characters that may come next
(one of them: it is forced). Corners are in order, x0 < x1 and y0 < y1, so that every complete text is a box with area.

Coordinate convention: that of `boxes`; numbers are those of `boxes.parse_boxes`'s conventions times 10**decimals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..boxes import Box
from ..families import ImageGrid

_AXES = ("x", "y", "x", "y")


@dataclass(frozen=True)
class BoxFormat:
    """How a model writes a box.

    Attributes:
        pieces: the text before x0, before y0, before x1, before y1, and after y1.
        decimals: of each number; 0 for whole numbers, which have no leading zeros.
        may_lead_with_space: whether a space may come before the text, as after "ASSISTANT:".
    """

    pieces: tuple[str, str, str, str, str]
    decimals: int
    may_lead_with_space: bool = False

    def number(self, value: int) -> str:
        """`value` units: 7 is "0.07" with two decimals."""
        if self.decimals == 0:
            return str(value)
        digits = str(value).zfill(self.decimals + 1)
        return f"{digits[: -self.decimals]}.{digits[-self.decimals :]}"

    def text(self, numbers: Sequence[int]) -> str:
        """The box of four numbers of units."""
        written = (piece + self.number(value) for piece, value in zip(self.pieces, numbers))
        return "".join(written) + self.pieces[4]


LIST = BoxFormat(("[", ", ", ", ", ", ", "]"), decimals=2, may_lead_with_space=True)  # LLaVA; DualFocus, Fig. 8
LIST_OF_THOUSANDTHS = BoxFormat(LIST.pieces, decimals=3, may_lead_with_space=True)  # TinyGroundingGPT
MARKUP = BoxFormat(("<|box_start|>(", ",", "),(", ",", ")<|box_end|>"), decimals=0)  # Qwen2-VL
JSON = BoxFormat(('{"bbox_2d": [', ", ", ", ", ", ", "]}"), decimals=0)  # Qwen2.5-VL, Qwen3-VL

_FORMATS = {"qwen2_vl": MARKUP, "qwen2_5_vl": JSON, "qwen3_vl": JSON, "tinygroundinggpt": LIST_OF_THOUSANDTHS}


def format_of(model_type: str, convention: str) -> BoxFormat:
    """The format in which a family writes boxes of a convention: its own; a list of fractions for "unit" and its kin;
    JSON for whole numbers elsewhere.
    """
    is_fraction = convention.startswith("unit")
    own = _FORMATS.get(model_type)
    if own is not None and is_fraction == (own.decimals > 0):
        return own
    return LIST if is_fraction else JSON


@dataclass(frozen=True)
class BoxGrammar:
    """All boxes of one image in one format.

    Attributes:
        highest: how many units what the numbers count from is wide and high. At least 1.
        within: x0, y0, x1, y1 of the units that the image covers, between which all numbers are; None: all of them.
    """

    format: BoxFormat
    highest: tuple[int, int]
    within: tuple[int, int, int, int] | None = None

    @classmethod
    def of_image(cls, written: BoxFormat, convention: str, grids: Sequence[ImageGrid]) -> BoxGrammar:
        """`grids`: the image's, the whole of it first; "pixel" counts the pixels of the processed image."""
        if convention == "pixel":
            height, width = grids[0].pixels.size
            return cls(written, (width, height))
        units = 10**written.decimals if convention.startswith("unit") else 1000
        return cls(written, (units, units))

    def covering(self, image: Box) -> BoxGrammar:
        """Those that do not lie in the padding around an image, whose edges are `image` in 0..1 of what `highest`
        counts.
        """
        x0, x1 = _units(image[0], image[2], self.highest[0])
        y0, y1 = _units(image[1], image[3], self.highest[1])
        return replace(self, within=None if (x0, y0, x1, y1) == (0, 0, *self.highest) else (x0, y0, x1, y1))

    def start(self) -> BoxState:
        return BoxState(self)

    def bounds(self, axis: int) -> tuple[int, int]:
        """The smallest and the largest number in x (axis 0) or y."""
        return (0, self.highest[axis]) if self.within is None else (self.within[axis], self.within[axis + 2])

    def numbers_of(self, box: Box) -> tuple[int, int, int, int]:
        """A box with edges in 0..1 of what `highest` counts, rounded to units, with at least one unit of area."""
        (x0, x1), (y0, y1) = (self._numbers_of_edges(box[axis], box[axis + 2], axis) for axis in (0, 1))
        return x0, y0, x1, y1

    def _numbers_of_edges(self, low: float, high: float, axis: int) -> tuple[int, int]:
        lowest, highest = self.bounds(axis)
        first = min(max(round(low * self.highest[axis]), lowest), highest - 1)
        return first, min(max(round(high * self.highest[axis]), first + 1), highest)


def _units(low: float, high: float, highest: int) -> tuple[int, int]:
    """The units that low..high of 0..1 touches, at least one."""
    first = min(max(math.floor(low * highest), 0), highest - 1)
    return first, min(max(math.ceil(high * highest), first + 1), highest)


@dataclass(frozen=True)
class BoxState:
    """How far the text of a box has got: in fixed piece 2 i, or in number 2 i + 1, of which `written` is there."""

    grammar: BoxGrammar
    part: int = 0
    written: str = ""
    numbers: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        return self.part == 8 and self.written == self.grammar.format.pieces[4]

    @property
    def is_at_number(self) -> bool:
        """Whether the next character is the first of a number."""
        return self.part % 2 == 1 and not self.written

    def next_characters(self) -> str:
        """Those that may follow, in order; "" when the text is complete."""
        pieces = self.grammar.format.pieces
        if self.part % 2 == 1:
            following, is_number = self._spellings().get(self.written, ("", False))
            return following + (pieces[self.part // 2 + 1][0] if is_number else "")
        piece = pieces[self.part // 2]
        if self.written == piece:
            return ""
        lead = " " if self.part == 0 and not self.written and self.grammar.format.may_lead_with_space else ""
        return lead + piece[len(self.written)]

    def after(self, text: str) -> BoxState | None:
        """The state that `text` leads to; None where it is not allowed."""
        state: BoxState | None = self
        for character in text:
            if state is None or character not in state.next_characters():
                return None
            state = state._after_allowed(character)
        return state

    def forced(self) -> tuple[str, BoxState]:
        """The characters that have no alternative, and the state after them."""
        text, state = "", self
        while len(following := state.next_characters()) == 1:
            text, state = text + following, state._after_allowed(following)
        return text, state

    def likely(self) -> str:
        """A guess at the next characters where more than one may follow: fractions begin with 0, lists with a space."""
        following = self.next_characters()
        if self.is_at_number and self.grammar.format.decimals and following[:1] == "0":
            return "0"
        return " " if following[:1] == " " else ""

    def _after_allowed(self, character: str) -> BoxState:
        pieces = self.grammar.format.pieces
        if self.part % 2 == 1:
            if character in self._spellings()[self.written][0]:
                return replace(self, written=self.written + character)
            value = int(self.written.replace(".", ""))
            return self._on(part=self.part + 1, written=character, numbers=(*self.numbers, value))
        if self.part == 0 and not self.written and character == " " and pieces[0][0] != " ":
            return replace(self, grammar=_without_lead(self.grammar))
        return self._on(part=self.part, written=self.written + character, numbers=self.numbers)

    def _on(self, part: int, written: str, numbers: tuple[int, ...]) -> BoxState:
        """Past the end of a fixed piece, where a number begins."""
        if part < 8 and written == self.grammar.format.pieces[part // 2]:
            part, written = part + 1, ""
        return BoxState(self.grammar, part, written, numbers)

    def _spellings(self) -> dict[str, tuple[str, bool]]:
        """Of the number that this part is, between what the first corner leaves room for."""
        field = self.part // 2
        lowest, highest = self.grammar.bounds(field % 2)
        if field < 2:
            return _spellings(self.grammar.format, lowest, highest - 1)
        return _spellings(self.grammar.format, self.numbers[field - 2] + 1, highest)


@functools.lru_cache(maxsize=1024)
def _without_lead(grammar: BoxGrammar) -> BoxGrammar:
    return replace(grammar, format=replace(grammar.format, may_lead_with_space=False))


@functools.lru_cache(maxsize=1024)
def _spellings(written: BoxFormat, lowest: int, highest: int) -> dict[str, tuple[str, bool]]:
    """For every beginning of a number in lowest..highest: the characters that may follow, and whether it is one."""
    following: dict[str, set[str]] = {}
    texts = {written.number(value) for value in range(lowest, highest + 1)}
    for text in texts:
        for i, character in enumerate(text):
            following.setdefault(text[:i], set()).add(character)
        following.setdefault(text, set())
    return {prefix: ("".join(sorted(characters)), prefix in texts) for prefix, characters in following.items()}
