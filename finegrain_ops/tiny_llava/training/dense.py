"""What each patch of an image shows, as labels for the vision tower: it learns to see before the language model talks,
and does not forget what is seldom talked about.

A patch says which card it lies on, with its colour and its shape; in a whole scene also where the card's edges are, in
a crop which letter and which dot is on it, or that there is none. It says so in the language model's own words: what
comes out of the projector is compared with their embeddings. So a question's "circle" and the patches of a circle are
alike before the language model has learnt anything, and it has but to look for what is alike.

Besides there are sheets full of letters and dots, at any place: from crops alone, which have one of each, they are
learnt an order of magnitude slower.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ...boxes import Box
from ..drawing import NUM_SPECKS, glyph_mask, ink_on, near
from ..scenes import COLOURS, LETTERS, PLAIN, SHAPES
from ..tokenizer import IMAGE_SIDE, NUMBER_WORDS, PATCH_SIZE, vocabulary
from .rendered import CROPS, WHOLE, RenderedScenes, Sample

_SIDE = IMAGE_SIDE // PATCH_SIZE  # patches
_NAMES = list(COLOURS)
_NO_LABEL = -100
_COLOUR, _SHAPE, _LETTER, _DOT = range(4)
_PARTS = ("colour", "shape", "letter", "dot")
# The last class of each part but the shape: no card, no letter, no dot.
_CLASSES = (len(COLOURS) + 1, len(SHAPES), len(LETTERS) + 1, len(COLOURS) + 1)
_NONE_WEIGHT = 0.2  # most patches show no letter
_EDGES = 4
_SHARPNESS = 10.0  # of scores: embeddings are about one long, and what is like a word is to be no longer
_NUM_SHEETS = 4096  # drawn once each, which takes longer than to learn from them
_CELL = 28  # pixels of a sheet's cells
# Of a letter or dot, the share in a patch from which the patch is labelled with it, and that up to which it shows none.
_SHOWN, _NOT_SHOWN = 0.2, 0.02


class DenseBatch(NamedTuple):
    images: np.ndarray  # (B, 112, 112, 3) uint8
    labels: Tensor  # (B, patches, 8): a class of each part, -100 for none, and the card's box as shares of the image


class DenseHead(nn.Module):
    """Compares what a patch shows, as the language model gets it, with the words for it.

    Colours, shapes and letters are in it as they are. The dot's colour and the four numbers of the box, which would be
    mistaken for them and for each other, are turned first, each in a way of its own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.none = nn.Linear(width, 3)  # no card, no letter, no dot
        self.dot = nn.Linear(width, width, bias=False)
        self.edges = nn.Linear(width, _EDGES * width, bias=False)
        ids = {word: i for i, word in enumerate(vocabulary())}
        self._colours, self._shapes, self._letters = (
            torch.tensor([ids[f" {word}"] for word in words]) for words in (COLOURS, SHAPES, LETTERS)
        )
        self._numbers = torch.tensor([ids[word] for word in NUMBER_WORDS])

    def loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Also, of the patches that show a part, the share that says which.

        Args:
            features: (B, patches, width), of the projector.
            embeddings: (words, width).
        """
        features, labels = features.float().flatten(0, 1), labels.flatten(0, 1)
        no_card, no_letter, no_dot = self.none(features).split(1, -1)
        colours = embeddings[self._colours].T
        scores = (
            torch.cat([_SHARPNESS * features @ colours, no_card], -1),
            _SHARPNESS * features @ embeddings[self._shapes].T,
            torch.cat([_SHARPNESS * features @ embeddings[self._letters].T, no_letter], -1),
            torch.cat([_SHARPNESS * self.dot(features) @ colours, no_dot], -1),
        )
        losses, right = [], {}
        for k, (name, of_part) in enumerate(zip(_PARTS, scores)):
            classes = labels[:, k].long()
            weight = torch.ones(_CLASSES[k])
            if k in (_LETTER, _DOT):
                weight[-1] = _NONE_WEIGHT
            if (classes != _NO_LABEL).any():
                losses.append(F.cross_entropy(of_part, classes, weight, ignore_index=_NO_LABEL))
            is_shown = (classes != _NO_LABEL) & (weight[classes.clamp(min=0)] == 1.0)
            if is_shown.any():
                right[name] = float((of_part.argmax(-1) == classes)[is_shown].float().mean())
        has_edges = labels[:, len(_CLASSES)] != _NO_LABEL
        if has_edges.any():
            edges = self.edges(features[has_edges]).unflatten(-1, (_EDGES, -1))
            of_numbers = _SHARPNESS * edges @ embeddings[self._numbers].T
            hundredths = (labels[has_edges, len(_CLASSES) :] * 100).round().long()
            losses.append(F.cross_entropy(of_numbers.flatten(0, 1), hundredths.flatten()))
            off = (of_numbers.argmax(-1) - hundredths).abs().float()
            right["edges"] = float((off <= 2).float().mean())
        return torch.stack(losses).sum(), right


def dense_batch(data: RenderedScenes, rng: np.random.Generator, size: int, share_of_sheets: float) -> DenseBatch:
    """Of what are no sheets, half are whole scenes and half crops."""
    num_sheets = round(share_of_sheets * size)
    pairs = [_stored_sheet(int(k)) for k in rng.choice(_NUM_SHEETS, num_sheets, replace=False)]
    for i in np.sort(rng.choice(len(data), size - num_sheets, replace=False)):
        which = WHOLE if rng.random() < 0.5 else CROPS[int(rng.integers(len(CROPS)))]
        pairs.append((data.images[i, which], _labels(data.samples[i], which)))
    return DenseBatch(np.stack([image for image, _ in pairs]), torch.from_numpy(np.stack([of for _, of in pairs])))


def _labels(sample: Sample, which: int) -> np.ndarray:
    labels = _unlabelled()
    labels[..., _COLOUR] = len(COLOURS)
    view: Box = (0.0, 0.0, sample.side, sample.side) if which == WHOLE else sample.crops[which - 1]
    for card in sample.cards:
        x0, x1 = ((edge - view[0]) / (view[2] - view[0]) for edge in card.box[::2])
        y0, y1 = ((edge - view[1]) / (view[3] - view[1]) for edge in card.box[1::2])
        on_card = patches_on((x0, y0, x1, y1)).reshape(_SIDE, _SIDE)
        labels[on_card, _COLOUR] = _NAMES.index(card.colour)
        labels[on_card, _SHAPE] = SHAPES.index(card.shape)
        if which == WHOLE:  # of which alone boxes are asked
            labels[on_card, len(_CLASSES) :] = x0, y0, x1, y1
    if which != WHOLE:  # in which no letter can be read
        letters = [(LETTERS.index(card.letter), _seen(card.letter_box, view)) for card in sample.cards]
        dots = [(_NAMES.index(card.dot), _seen(card.dot_box, view)) for card in sample.cards]
        _label_spots(labels, letters, dots)
    return labels.reshape(_SIDE * _SIDE, -1)


def patches_on(box: Box) -> np.ndarray:
    """(patches,) bool: those on a card, whose box is given as shares of the image. One whose centre is just outside
    still shows the card.
    """
    centres, reach = (np.arange(_SIDE) + 0.5) / _SIDE, 0.35 / _SIDE
    columns = (centres > box[0] - reach) & (centres < box[2] + reach)
    rows = (centres > box[1] - reach) & (centres < box[3] + reach)
    return (rows[:, None] & columns[None]).reshape(-1)


@functools.cache
def _stored_sheet(k: int) -> tuple[np.ndarray, np.ndarray]:
    return _sheet(np.random.default_rng(k))


def _sheet(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A letter and a dot in each of many cells of the cards' colours, which begin anywhere within a patch."""
    shift = rng.integers(0, _CELL, 2).tolist()  # of the first row and column out of the image
    num_cells = IMAGE_SIDE // _CELL + 1
    image = Image.new("RGB", (num_cells * _CELL,) * 2)
    canvas = ImageDraw.Draw(image)
    letters: list[tuple[int, Box]] = []
    dots: list[tuple[int, Box]] = []
    for k in range(num_cells**2):
        x, y = k % num_cells * _CELL, k // num_cells * _CELL
        colour, other = (int(i) for i in rng.permutation(len(_NAMES))[:2])
        paint = near(rng, COLOURS[_NAMES[colour]], PLAIN.colour_spread)
        canvas.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), fill=paint)
        for _ in range(NUM_SPECKS):
            u, v = rng.integers(0, _CELL - 3, 2).tolist()
            speck = COLOURS[_NAMES[int(rng.integers(len(_NAMES)))]]
            canvas.ellipse((x + u, y + v, x + u + 2, y + v + 2), fill=speck)
        letter = int(rng.integers(len(LETTERS)))
        glyph = glyph_mask(LETTERS[letter], int(rng.integers(9, 18)))
        diameter = int(rng.integers(5, 10))
        room = int(rng.integers(0, max(0, _CELL - glyph.width - diameter) + 1))
        # The letter on one side and the dot on the other, as far apart as there is room.
        dot_x, letter_x = (
            (x + room, x + _CELL - glyph.width) if rng.random() < 0.5 else (x + _CELL - diameter - room, x)
        )
        dot_y = y + int(rng.integers(0, _CELL - diameter))
        letter_y = y + int(rng.integers(0, _CELL - glyph.height))
        canvas.ellipse((dot_x, dot_y, dot_x + diameter - 1, dot_y + diameter - 1), fill=COLOURS[_NAMES[other]])
        image.paste(ink_on(paint), (letter_x, letter_y), glyph)
        letters.append((letter, _box_of(letter_x - shift[0], letter_y - shift[1], glyph.width, glyph.height)))
        dots.append((other, _box_of(dot_x - shift[0], dot_y - shift[1], diameter, diameter)))
    labels = _unlabelled()
    _label_spots(labels, letters, dots)
    seen = image.crop((*shift, shift[0] + IMAGE_SIDE, shift[1] + IMAGE_SIDE))
    return np.asarray(seen), labels.reshape(_SIDE * _SIDE, -1)


def _label_spots(labels: np.ndarray, letters: list[tuple[int, Box]], dots: list[tuple[int, Box]]) -> None:
    """Of (patches, patches, 8) labels those of letters and dots, where `_spots` finds them."""
    for part, boxes in ((_LETTER, letters), (_DOT, dots)):
        labels[..., part] = _spots(boxes, _CLASSES[part] - 1)


def _spots(boxes: list[tuple[int, Box]], none: int) -> np.ndarray:
    """(patches, patches): the class of the box that a patch shows most of; `none` where it shows next to nothing of
    any; no label in between, nor of boxes that the image cuts.

    Args:
        boxes: class, and x0, y0, x1, y1 in pixels of the image.
    """
    labels = np.full((_SIDE, _SIDE), float(none), np.float32)
    most = np.zeros((_SIDE, _SIDE))
    for label, (x0, y0, x1, y1) in boxes:
        share = _share_in_patches(y0, y1)[:, None] * _share_in_patches(x0, x1)[None]
        is_best = (share > _NOT_SHOWN) & (share > most)
        is_whole = min(x0, y0) >= 0 and max(x1, y1) <= IMAGE_SIDE
        labels[is_best] = np.where(share[is_best] > _SHOWN, label, _NO_LABEL) if is_whole else _NO_LABEL
        most = np.maximum(most, share)
    return labels


def _seen(box: Box, view: Box) -> Box:
    """A box of the scene in pixels of the image that shows `view`."""
    x0, x1 = ((edge - view[0]) / (view[2] - view[0]) * IMAGE_SIDE for edge in box[::2])
    y0, y1 = ((edge - view[1]) / (view[3] - view[1]) * IMAGE_SIDE for edge in box[1::2])
    return x0, y0, x1, y1


def _box_of(x: int, y: int, width: int, height: int) -> Box:
    return float(x), float(y), float(x + width), float(y + height)


def _share_in_patches(low: float, high: float) -> np.ndarray:
    """(patches,): which share of low..high, in pixels, lies in each row or column of patches."""
    edges = np.arange(_SIDE + 1) * PATCH_SIZE
    overlap = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return overlap.clip(0, None) / (high - low)


def _unlabelled() -> np.ndarray:
    return np.full((_SIDE, _SIDE, len(_CLASSES) + _EDGES), _NO_LABEL, np.float32)
