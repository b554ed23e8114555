"""TinyGroundingGPT's stage 2 from (object, box) pairs: the filters, then samples of every kind (Sec. 3.2, Fig. 10).

The filters run over all boxes at once; see filters.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import require_length
from .annotations.records import BoxedPhrase
from .filters import area_mask, box_count_mask, confidence_mask, overlap_mask
from .grounding_samples import (
    GroundingSample,
    coordinate_to_image,
    coordinate_to_text,
    image_to_coordinate,
    image_to_text,
    text_to_coordinate,
    text_to_image,
)

__all__ = ["ALIGNMENT_KINDS", "Filters", "alignment_samples", "object_image_mask", "phrase_mask"]

_OF_TEXT = {"text_to_coordinate": text_to_coordinate, "coordinate_to_text": coordinate_to_text}
_OF_IMAGE = {"image_to_coordinate": image_to_coordinate}
_CHOICES = {
    "coordinate_to_image": coordinate_to_image,
    "text_to_image": text_to_image,
    "image_to_text": image_to_text,
}
ALIGNMENT_KINDS = (*_OF_TEXT, *_OF_IMAGE, *_CHOICES)


@dataclass(frozen=True)
class Filters:
    """The numbers of the filters, of which the paper gives none; see the functions of filters.py for each.

    Attributes:
        smallest, largest: shares of the image that an object image may take.
        overlap: the largest IoU of two object images of one question.
        confidence: the lowest score of a detection.
        boxes: the largest number of boxes of one object.
    """

    smallest: float = 0.01
    largest: float = 0.5
    overlap: float = 0.3
    confidence: float = 0.35
    boxes: int = 3


def phrase_mask(phrases: Sequence[BoxedPhrase], filters: Filters = Filters()) -> Tensor:
    """(len(phrases),) bool: phrases with boxes, not too many, that were detected with confidence."""
    group = [i for i, phrase in enumerate(phrases) for _ in phrase.boxes]
    has_boxes = torch.tensor([len(phrase.boxes) > 0 for phrase in phrases], dtype=torch.bool)
    scores = [phrase.score for phrase in phrases]
    return (
        has_boxes
        & box_count_mask(group, len(phrases), most=filters.boxes)
        & confidence_mask(scores, lowest=filters.confidence)
    )


def object_image_mask(phrases: Sequence[BoxedPhrase], filters: Filters = Filters()) -> Tensor:
    """(len(phrases),) bool: phrases of `phrase_mask` with one box, neither too small nor too large to be shown."""
    single = torch.tensor([len(phrase.boxes) == 1 for phrase in phrases], dtype=torch.bool)
    boxes = [phrase.boxes[0] if phrase.boxes else (0.0, 0.0, 0.0, 0.0) for phrase in phrases]
    sizes = torch.tensor([phrase.image.size for phrase in phrases], dtype=torch.float64).reshape(-1, 2)
    fits = area_mask(boxes, sizes, smallest=filters.smallest, largest=filters.largest)
    return phrase_mask(phrases, filters) & single & fits


def alignment_samples(
    phrases: Sequence[BoxedPhrase],
    kinds: Sequence[str] = ALIGNMENT_KINDS,
    *,
    options: int = 2,
    filters: Filters = Filters(),
    seed: int = 0,
) -> list[GroundingSample]:
    """Samples of each kind about each phrase that the filters leave.

    A question with options shows, beside the object that it asks for, others of the same image under other names, drawn
    at random; where two of them overlap too much, or there are not enough, it is left out.

    Args:
        phrases: of any images.
        kinds: some of ALIGNMENT_KINDS.
        options: of a question that has any, 2 to 26.
        seed: of the drawing.

    Returns:
        For each kind in turn, its samples in the order of the phrases.
    """
    for kind in kinds:
        if kind not in ALIGNMENT_KINDS:
            raise ValueError(f"kinds: expected some of {', '.join(map(repr, ALIGNMENT_KINDS))}, got {kind!r}")
    if not 2 <= require_length(options, "options") <= 26:
        raise ValueError(f"options: expected 2 to 26, got {options}")
    rng = random.Random(seed)
    named = _chosen(phrases, phrase_mask(phrases, filters))
    shown = _chosen(phrases, object_image_mask(phrases, filters))
    samples: list[GroundingSample] = []
    for kind in kinds:
        if kind in _OF_TEXT:
            samples += [_OF_TEXT[kind](phrase) for phrase in named]
        elif kind in _OF_IMAGE:
            samples += [_OF_IMAGE[kind](phrase) for phrase in shown]
        else:
            questions = _with_others(shown, options, rng)
            group = [i for i, question in enumerate(questions) for _ in question]
            boxes = [phrase.boxes[0] for question in questions for phrase in question]
            apart = overlap_mask(boxes, group, len(questions), largest=filters.overlap)
            for question in _chosen(questions, apart):
                target = question[0]
                rng.shuffle(question)
                samples.append(_CHOICES[kind](question, question.index(target)))
    return samples


def _with_others(phrases: Sequence[BoxedPhrase], count: int, rng: random.Random) -> list[list[BoxedPhrase]]:
    """Each phrase, and count - 1 others of its image after it, all of different names; none where there are too few."""
    by_image: dict[int | str, dict[str, list[BoxedPhrase]]] = {}
    for phrase in phrases:
        by_image.setdefault(phrase.image.image_id, {}).setdefault(phrase.phrase.lower(), []).append(phrase)
    questions = []
    for phrase in phrases:
        names = by_image[phrase.image.image_id]
        others = [name for name in names if name != phrase.phrase.lower()]
        if len(others) >= count - 1:
            questions.append([phrase, *(rng.choice(names[name]) for name in rng.sample(others, count - 1))])
    return questions


def _chosen(items: Sequence, mask: Tensor) -> list:
    return [item for item, is_kept in zip(items, mask.tolist()) if is_kept]
