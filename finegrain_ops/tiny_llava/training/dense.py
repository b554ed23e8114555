"""What each patch of an image shows, as labels for the vision tower: it learns to see before the language model talks,
and does not forget what is seldom talked about.

A patch says which card it lies on, with its colour and its shape; in a whole scene also where the card's edges are and
how many cards there are, in a crop which letter and which dot is on it, or that there is none. It says so in the
language model's own words: what comes out of the projector is compared with their embeddings. So a question's "circle"
and the patches of a circle are alike before the language model has learnt anything, and it has but to look for what is
alike.

Besides there are sheets full of letters and dots, at any place: from crops alone, which have one of each, they are
learnt an order of magnitude slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ...boxes import Box
from ..drawing import NUM_SPECKS, glyph_mask, ink_on
from ..questions import NUMBERS
from ..scenes import COLOURS, LETTERS, PLAIN, SHAPES
from ..tokenizer import IMAGE_SIDE, NUMBER_WORDS, PATCH_SIZE, vocabulary
from .rendered import CROPS, WHOLE, RenderedScenes, Sample

_SIDE = IMAGE_SIDE // PATCH_SIZE  # patches
_NAMES = list(COLOURS)
_NO_LABEL = -100
_COLOUR, _SHAPE, _LETTER, _DOT, _COUNT = range(5)
_PARTS = ("colour", "shape", "letter", "dot", "count")
# The last class of colours, letters and dots: no card, no letter, no dot.
_CLASSES = (len(COLOURS) + 1, len(SHAPES), len(LETTERS) + 1, len(COLOURS) + 1, len(NUMBERS))
_NONE_WEIGHT = 0.2  # most patches show no letter
_EDGES = 4
_CELL = 28  # pixels of a sheet's cells
# Of a letter or dot, the share in a patch from which the patch is labelled with it, and that up to which it shows none.
_SHOWN, _NOT_SHOWN = 0.2, 0.02


class DenseBatch(NamedTuple):
    images: np.ndarray  # (B, 112, 112, 3) uint8
    labels: Tensor  # (B, patches, 9): a class of each part, -100 for none, and the card's box as shares of the image


class DenseHead(nn.Module):
    """Compares what a patch shows, as the language model gets it, with the words for it.

    Colours, shapes, letters and how many cards there are are in it as they are. The dot's colour and the four numbers
    of the box, which would be mistaken for them and for each other, are turned first, each in a way of its own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.none = nn.Linear(width, 3)  # no card, no letter, no dot
        self.dot = nn.Linear(width, width, bias=False)
        self.edges = nn.Linear(width, _EDGES * width, bias=False)
        ids = {word: i for i, word in enumerate(vocabulary())}
        self._colours, self._shapes, self._letters, self._counts = (
            torch.tensor([ids[f" {word}"] for word in words]) for words in (COLOURS, SHAPES, LETTERS, NUMBERS.values())
        )
        self._numbers = torch.tensor([ids[word] for word in NUMBER_WORDS])

    def loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Also, of the patches that show a part, the share that says which.

        Args:
            features: (B, patches, width), of the projector.
            embeddings: (words, width).
        """
        features = F.rms_norm(features.float(), features.shape[-1:]).flatten(0, 1)  # as a layer of Llama reads them
        labels = labels.flatten(0, 1)
        no_card, no_letter, no_dot = self.none(features).split(1, -1)
        colours = embeddings[self._colours].T
        scores = (
            torch.cat([features @ colours, no_card], -1),
            features @ embeddings[self._shapes].T,
            torch.cat([features @ embeddings[self._letters].T, no_letter], -1),
            torch.cat([self.dot(features) @ colours, no_dot], -1),
            features @ embeddings[self._counts].T,
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
            of_numbers = edges @ embeddings[self._numbers].T
            hundredths = (labels[has_edges, len(_CLASSES) :] * 100).round().long()
            losses.append(F.cross_entropy(of_numbers.flatten(0, 1), hundredths.flatten()))
            off = (of_numbers.argmax(-1) - hundredths).abs().float()
            right["edges"] = float((off <= 2).float().mean())
        return torch.stack(losses).sum(), right


def dense_batch(data: RenderedScenes, rng: np.random.Generator, size: int, share_of_sheets: float) -> DenseBatch:
    """Of what are no sheets, half are whole scenes and half crops."""
    num_sheets = round(share_of_sheets * size)
    pairs = [_sheet(rng) for _ in range(num_sheets)]
    for i in np.sort(rng.choice(len(data), size - num_sheets, replace=False)):
        which = WHOLE if rng.random() < 0.5 else CROPS[int(rng.integers(len(CROPS)))]
        pairs.append((data.images[i, which], _labels(data.samples[i], which)))
    return DenseBatch(np.stack([image for image, _ in pairs]), torch.from_numpy(np.stack([of for _, of in pairs])))


def _labels(sample: Sample, which: int) -> np.ndarray:
    labels = _unlabelled()
    labels[..., _COLOUR] = len(COLOURS)
    if which == WHOLE:
        labels[..., _COUNT] = list(NUMBERS).index(len(sample.cards))
    view = view_of(sample, which)
    for card in sample.cards:
        box = shares(card.box, view)
        on_card = patches_on(box).reshape(_SIDE, _SIDE)
        labels[on_card, _COLOUR] = _NAMES.index(card.colour)
        labels[on_card, _SHAPE] = SHAPES.index(card.shape)
        if which == WHOLE:  # of which alone boxes are asked
            labels[on_card, len(_CLASSES) :] = box
    if which != WHOLE:  # in which no letter can be read
        letters = [LETTERS.index(card.letter) for card in sample.cards]
        dots = [_NAMES.index(card.dot) for card in sample.cards]
        _label_spots(
            labels,
            (letters, [_seen(card.letter_box, view) for card in sample.cards]),
            (dots, [_seen(card.dot_box, view) for card in sample.cards]),
        )
    return labels.reshape(_SIDE * _SIDE, -1)


def view_of(sample: Sample, which: int) -> Box:
    """What of the scene one of its images shows; of WHOLE and CROPS."""
    return (0.0, 0.0, sample.side, sample.side) if which == WHOLE else sample.crops[CROPS.index(which)]


def shares(box: Box, view: Box) -> Box:
    """A box of the scene as shares of the image that shows `view`."""
    x0, x1 = ((edge - view[0]) / (view[2] - view[0]) for edge in box[::2])
    y0, y1 = ((edge - view[1]) / (view[3] - view[1]) for edge in box[1::2])
    return x0, y0, x1, y1


def patches_on(box: Box) -> np.ndarray:
    """(patches,) bool: those on a card, whose box is given as shares of the image. One whose centre is just outside
    still shows the card.
    """
    centres, reach = (np.arange(_SIDE) + 0.5) / _SIDE, 0.35 / _SIDE
    columns = (centres > box[0] - reach) & (centres < box[2] + reach)
    rows = (centres > box[1] - reach) & (centres < box[3] + reach)
    return (rows[:, None] & columns[None]).reshape(-1)


def _sheet(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A letter and a dot in each of many cells of the cards' colours, which begin anywhere within a patch."""
    num_cells = IMAGE_SIDE // _CELL + 1
    count = num_cells**2
    shift = rng.integers(0, _CELL, 2).tolist()  # of the first row and column out of the image
    colours = rng.integers(len(_NAMES), size=count)
    others = (colours + rng.integers(1, len(_NAMES), count)) % len(_NAMES)
    near = rng.integers(-PLAIN.colour_spread, PLAIN.colour_spread + 1, (count, 3))
    paint_of = list(COLOURS.values())
    paints = (np.array(paint_of)[colours] + near).clip(0, 255).tolist()
    speck_places = rng.integers(0, _CELL - 3, (count, NUM_SPECKS, 2)).tolist()
    speck_colours = rng.integers(len(_NAMES), size=(count, NUM_SPECKS)).tolist()
    which = rng.integers(len(LETTERS), size=count).tolist()
    heights, diameters = rng.integers(9, 18, count).tolist(), rng.integers(5, 10, count).tolist()
    is_right = (rng.random(count) < 0.5).tolist()
    places = rng.random((count, 3)).tolist()  # each as a share of the room that there is
    image = Image.new("RGB", (num_cells * _CELL,) * 2)
    canvas = ImageDraw.Draw(image)
    letters: list[Box] = []
    dots: list[Box] = []
    for k, other in enumerate(others.tolist()):
        x, y = k % num_cells * _CELL, k // num_cells * _CELL
        paint = tuple(paints[k])
        canvas.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), fill=paint)
        for (u, v), speck in zip(speck_places[k], speck_colours[k]):
            canvas.ellipse((x + u, y + v, x + u + 2, y + v + 2), fill=paint_of[speck])
        glyph = glyph_mask(LETTERS[which[k]], heights[k])
        diameter = diameters[k]
        room, dot_y, letter_y = (
            int(share * (1 + free))
            for share, free in zip(
                places[k], (max(0, _CELL - glyph.width - diameter), _CELL - diameter - 1, _CELL - glyph.height - 1)
            )
        )
        # The letter on one side and the dot on the other, as far apart as there is room.
        dot_x, letter_x = (room, _CELL - glyph.width) if is_right[k] else (_CELL - diameter - room, 0)
        dot_x, letter_x, dot_y, letter_y = x + dot_x, x + letter_x, y + dot_y, y + letter_y
        canvas.ellipse((dot_x, dot_y, dot_x + diameter - 1, dot_y + diameter - 1), fill=paint_of[other])
        image.paste(ink_on(paint), (letter_x, letter_y), glyph)
        letters.append(_box_of(letter_x - shift[0], letter_y - shift[1], glyph.width, glyph.height))
        dots.append(_box_of(dot_x - shift[0], dot_y - shift[1], diameter, diameter))
    labels = _unlabelled()
    _label_spots(labels, (which, letters), (others.tolist(), dots))
    seen = image.crop((*shift, shift[0] + IMAGE_SIDE, shift[1] + IMAGE_SIDE))
    return np.asarray(seen), labels.reshape(_SIDE * _SIDE, -1)


_Spots: TypeAlias = tuple[Sequence[int], Sequence[Box]]  # what each is, and its x0, y0, x1, y1 in pixels of the image


def _label_spots(labels: np.ndarray, letters: _Spots, dots: _Spots) -> None:
    """Of (patches, patches, 9) labels those of letters and dots, where `_spots` finds them."""
    for part, (classes, boxes) in ((_LETTER, letters), (_DOT, dots)):
        labels[..., part] = _spots(np.array(classes), np.array(boxes), _CLASSES[part] - 1)


def _spots(classes: np.ndarray, boxes: np.ndarray, none: int) -> np.ndarray:
    """(patches, patches): the class of the box that a patch shows most of; `none` where it shows next to nothing of
    any; no label in between, nor of boxes that the image cuts.
    """
    shares = (
        _share_in_patches(boxes[:, 1], boxes[:, 3])[:, :, None] * _share_in_patches(boxes[:, 0], boxes[:, 2])[:, None]
    )
    best, most = shares.argmax(0), shares.max(0)
    is_whole = (boxes[:, :2].min(1) >= 0) & (boxes[:, 2:].max(1) <= IMAGE_SIDE)
    shown = np.where((most > _SHOWN) & is_whole[best], classes[best], _NO_LABEL)
    return np.where(most > _NOT_SHOWN, shown, none)


def _seen(box: Box, view: Box) -> Box:
    """A box of the scene in pixels of the image that shows `view`."""
    x0, y0, x1, y1 = (edge * IMAGE_SIDE for edge in shares(box, view))
    return x0, y0, x1, y1


def _box_of(x: int, y: int, width: int, height: int) -> Box:
    return float(x), float(y), float(x + width), float(y + height)


def _share_in_patches(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(boxes, patches): which share of each low..high, in pixels, lies in each row or column of patches."""
    edges = np.arange(_SIDE + 1) * PATCH_SIZE
    overlap = np.minimum(edges[1:], high[:, None]) - np.maximum(edges[:-1], low[:, None])
    return overlap.clip(0, None) / (high - low)[:, None]


def _unlabelled() -> np.ndarray:
    return np.full((_SIDE, _SIDE, len(_CLASSES) + _EDGES), _NO_LABEL, np.float32)
