"""What every reader of annotations gives: frozen records, with boxes xyxy in pixels of the original image.

Coordinates are continuous, as in `finegrain_ops.boxes`: (0, 0) is the top-left corner of the first pixel, (W, H) the
bottom-right corner of the last.

What is wrong with a record decides what happens to it. A record that does not have its published form (a key is
missing, a number is text) is an error that names the file and the record: the file is another one, or cut short. A
record of the right form that cannot serve (its box lies outside of the image, its answer is empty), as the published
files hold thousands of, is skipped and counted under its reason, in the reader's `skipped`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...boxes import Box
from ...validation import describe


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image that annotations are of.

    Attributes:
        image_id: its number in Visual Genome and COCO, its name without ending in Flickr30k.
        path: its file, relative to the folder that holds the images.
        size: (height, width) in pixels, in which the boxes are.
    """

    image_id: int | str
    path: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BoxedQuestion:
    """A question about an image, its answer, and the boxes of what it asks about; without boxes it asks about all."""

    image: AnnotatedImage
    question_id: int
    question: str
    answer: str
    boxes: tuple[Box, ...] = ()

    @property
    def box(self) -> Box | None:
        """The smallest box around all boxes: DualFocus grounds one region with all objects that are asked about."""
        return union(self.boxes) if self.boxes else None


@dataclass(frozen=True, slots=True)
class BoxedPhrase:
    """Words for something in an image, and where it is: one box, or one for each part of a group.

    Attributes:
        phrase_id: of the annotation: VG's region or object, RefCOCO's ref, Flickr30k's chain of entities.
        names: other words for the same.
        score: a detector's confidence; 1 where people drew the boxes.
    """

    image: AnnotatedImage
    phrase: str
    boxes: tuple[Box, ...]
    phrase_id: int | str = 0
    names: tuple[str, ...] = ()
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class BoxedCaption:
    """A sentence about an image, and the phrases in it that have boxes.

    Attributes:
        text: without markup.
        spans: where each of `phrases` is: text[start:end].
    """

    image: AnnotatedImage
    text: str
    phrases: tuple[BoxedPhrase, ...]
    spans: tuple[tuple[int, int], ...]


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around all of them."""
    x0, y0, x1, y1 = zip(*boxes)
    return min(x0), min(y0), max(x1), max(y1)


def clipped(box: Box, size: tuple[int, int]) -> Box | None:
    """What of a box lies in an image of (height, width); None where nothing does. No number of it raises."""
    height, width = size
    if not all(map(math.isfinite, box)):
        return None
    x0, y0, x1, y1 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


# --- fields of records ---


def field(record: Any, keys: Sequence[str], kind: type | tuple[type, ...], where: str) -> Any:
    """The value under the first of `keys` that the record has.

    Raises:
        ValueError: it has none of them, or something else than `kind` there; `where` names file and record.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with {_either(keys)}, got {describe(record)}")
    for key in keys:
        if key in record:
            value = record[key]
            if not isinstance(value, kind) or isinstance(value, bool):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                names = " or ".join("a number" if k is numbers.Real else k.__name__ for k in kinds)
                raise ValueError(f"{where}: expected {key!r} to be {names}, got {describe(value)}")
            return value
    raise ValueError(f"{where}: expected {_either(keys)}, got only {', '.join(map(repr, record)) or 'nothing'}")


def number(record: Any, *keys: str, where: str) -> float:
    return float(field(record, keys, numbers.Real, where))


def image_size(record: Any, where: str) -> tuple[int, int]:
    """(height, width) from the keys of that name.

    Raises:
        ValueError: they are not positive.
    """
    height, width = (int(field(record, [key], int, where)) for key in ("height", "width"))
    if height <= 0 or width <= 0:
        raise ValueError(f"{where}: expected a positive height and width, got {height} and {width}")
    return height, width


def require_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of `names` that is in the folder.

    Raises:
        FileNotFoundError: none is.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: expected {_either(names)} in it; download and unpack it there")


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))
