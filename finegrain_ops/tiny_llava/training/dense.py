"""The first half of training: the vision tower learns to see, from labels of every patch, before it has to talk.

Each patch says which card it lies on: colour, shape, in a crop also letter and dot, and how far the card's edges are.
Half of the pictures, later on, are sheets of sixteen letters and dots of all sizes: on cards alone they are learnt an
order of magnitude slower.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ...boxes import Box
from ..drawing import NUM_SPECKS, glyph_mask, ink_on
from ..scenes import COLOURS, LETTERS, SHAPES
from ..tokenizer import IMAGE_SIDE, PATCH_SIZE
from .rendered import CROPS, WHOLE, RenderedScenes, Sample

_SIDE = IMAGE_SIDE // PATCH_SIZE  # patches
_NAMES = list(COLOURS)
_NO_LABEL = -100
_CLASSES = (len(COLOURS) + 1, len(SHAPES), len(LETTERS), len(COLOURS))  # card (or none), shape, letter, dot
_PARTS = ("colour", "shape", "letter", "dot")
_EDGES = 4
_EDGE_WEIGHT, _EDGE_BETA = 10.0, 0.02
_CELLS = 4  # of a sheet, per side
_SHOWN = 0.2  # share of a letter or dot that a patch must hold to be labelled with it


class DenseBatch(NamedTuple):
    images: np.ndarray  # (B, 112, 112, 3) uint8
    labels: Tensor  # (B, patches, 8): a class of each part, -100 for none, and the distances to the card's four edges


class DenseHead(nn.Linear):
    """From a patch's feature to all parts."""

    def __init__(self, width: int) -> None:
        super().__init__(width, sum(_CLASSES) + _EDGES)

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """features (B, patches, width): the loss, and the share of patches of which each part is right."""
        *scores, edges = self(features).float().flatten(0, 1).split((*_CLASSES, _EDGES), -1)
        labels = labels.flatten(0, 1)
        losses, right = [], {}
        for k, (name, of_part) in enumerate(zip(_PARTS, scores)):
            classes = labels[:, k].long()
            is_labelled = classes != _NO_LABEL
            if is_labelled.any():
                losses.append(F.cross_entropy(of_part, classes, ignore_index=_NO_LABEL))
                right[name] = float((of_part.argmax(-1) == classes)[is_labelled].float().mean())
        on_card = labels[:, 1] != _NO_LABEL
        if on_card.any():
            losses.append(
                _EDGE_WEIGHT * F.smooth_l1_loss(edges[on_card], labels[on_card, len(_CLASSES) :], beta=_EDGE_BETA)
            )
        return torch.stack(losses).sum(), right


def dense_batch(
    data: RenderedScenes, rng: np.random.Generator, size: int, share_of_sheets: float, *, on_spot: bool = False
) -> DenseBatch:
    """
    Args:
        on_spot: of a crop, label those patches with letter and dot that show them; False: all patches of the card.
    """
    num_sheets = round(share_of_sheets * size)
    pairs = [_sheet(rng) for _ in range(num_sheets)]
    for i in np.sort(rng.choice(len(data), size - num_sheets, replace=False)):
        which = WHOLE if rng.random() < 0.5 else CROPS[int(rng.integers(len(CROPS)))]
        pairs.append((data.images[i, which], _labels(data.samples[i], which, on_spot)))
    return DenseBatch(np.stack([image for image, _ in pairs]), torch.from_numpy(np.stack([of for _, of in pairs])))


def _labels(sample: Sample, which: int, on_spot: bool = False) -> np.ndarray:
    labels = np.full((_SIDE, _SIDE, len(_CLASSES) + _EDGES), _NO_LABEL, np.float32)
    labels[..., 0] = len(COLOURS)  # background
    view: Box = (0.0, 0.0, sample.side, sample.side) if which == WHOLE else sample.crops[which - 1]
    centres = (np.arange(_SIDE) + 0.5) / _SIDE
    reach = 0.35 / _SIDE  # a patch whose centre is just outside a card still shows it
    for card in sample.cards:
        x0, x1 = ((edge - view[0]) / (view[2] - view[0]) for edge in card.box[::2])
        y0, y1 = ((edge - view[1]) / (view[3] - view[1]) for edge in card.box[1::2])
        rows = np.nonzero((centres > y0 - reach) & (centres < y1 + reach))[0]
        columns = np.nonzero((centres > x0 - reach) & (centres < x1 + reach))[0]
        if not len(rows) or not len(columns):
            continue
        on_card = labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        on_card[..., 0] = _NAMES.index(card.colour)
        on_card[..., 1] = SHAPES.index(card.shape)
        if which != WHOLE:
            for part, label, box in (
                (2, LETTERS.index(card.letter), card.letter_box),
                (3, _NAMES.index(card.dot), card.dot_box),
            ):
                if on_spot:
                    labels[_shows(box, view), part] = label
                else:
                    on_card[..., part] = label
        x, y = centres[columns][None, :], centres[rows][:, None]
        for k, distance in enumerate((x - x0, y - y0, x1 - x, y1 - y)):
            on_card[..., len(_CLASSES) + k] = distance
    return labels.reshape(_SIDE * _SIDE, -1)


def _shows(box: Box, view: Box) -> np.ndarray:
    """(patches, patches) bool: those that hold a fifth of the box or more."""
    x, width, y, height = (
        length / (view[k + 2] - view[k]) * IMAGE_SIDE
        for k in (0, 1)
        for length in (box[k] - view[k], box[k + 2] - box[k])
    )
    return _share_in_patches(y, height)[:, None] * _share_in_patches(x, width)[None] > _SHOWN


def _sheet(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A letter and a dot in each of many cells of the cards' colours. A patch is labelled with those that it shows most
    of.
    """
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE))
    canvas = ImageDraw.Draw(image)
    labels = np.full((_SIDE, _SIDE, len(_CLASSES) + _EDGES), _NO_LABEL, np.float32)
    most = np.zeros((2, _SIDE, _SIDE))
    cell = IMAGE_SIDE // _CELLS
    for k in range(_CELLS * _CELLS):
        x, y = k % _CELLS * cell, k // _CELLS * cell
        colour, other = (int(i) for i in rng.permutation(len(_NAMES))[:2])
        levels = np.array(COLOURS[_NAMES[colour]]) + rng.integers(-12, 13, 3)
        red, green, blue = (int(level) for level in levels.clip(0, 255))
        canvas.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(red, green, blue))
        for _ in range(NUM_SPECKS):
            u, v = rng.integers(0, cell - 3, 2).tolist()
            speck = COLOURS[_NAMES[int(rng.integers(len(_NAMES)))]]
            canvas.ellipse((x + u, y + v, x + u + 2, y + v + 2), fill=speck)
        letter = int(rng.integers(len(LETTERS)))
        glyph = glyph_mask(LETTERS[letter], int(rng.integers(9, 18)))
        diameter = int(rng.integers(5, 10))
        gap = max(0, cell - glyph.width - diameter)
        shift = int(rng.integers(0, gap + 1))
        left, right = (x, x + cell - glyph.width) if rng.random() < 0.5 else (x + cell - diameter, x)
        at_dot = (left + shift * (1 if left == x else -1), y + int(rng.integers(0, cell - diameter)))
        at_letter = (right, y + int(rng.integers(0, cell - glyph.height)))
        canvas.ellipse((*at_dot, at_dot[0] + diameter - 1, at_dot[1] + diameter - 1), fill=COLOURS[_NAMES[other]])
        image.paste(ink_on((red, green, blue)), at_letter, glyph)
        parts = ((2, letter, at_letter, glyph.size), (3, other, at_dot, (diameter, diameter)))
        for i, (part, label, corner, size) in enumerate(parts):
            share = _share_in_patches(corner[1], size[1])[:, None] * _share_in_patches(corner[0], size[0])[None]
            is_best = (share > _SHOWN) & (share > most[i])
            labels[is_best, part] = label
            most[i] = np.where(is_best, share, most[i])
    return np.asarray(image), labels.reshape(_SIDE * _SIDE, -1)


def _share_in_patches(start: float, length: float) -> np.ndarray:
    edges = np.arange(_SIDE + 1) * PATCH_SIZE
    overlap = np.minimum(edges[1:], start + length) - np.maximum(edges[:-1], start)
    return overlap.clip(0, None) / length
