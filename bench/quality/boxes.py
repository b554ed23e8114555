"""Boxes that stand in for the model's own: the true one, one that is deliberately wrong, one that was moved."""

from __future__ import annotations

import numpy as np

from finegrain_ops.boxes import Box
from finegrain_ops.tiny_llava.held_out import Asked

# DualFocus, Table 5, moves boxes by pixels of pictures of many sizes; here they are pixels of a picture of this side.
REFERENCE_SIDE = 640


def oracle_box(one: Asked) -> Box:
    return one.box


def wrong_box(one: Asked) -> Box:
    """That of another card; where the answer is on no card, the first one's."""
    card = one.question.card
    return one.scene.cards[0 if card is None else (card + 1) % len(one.scene.cards)].box


def moved_box(one: Asked, box: Box, pixels: int) -> Box:
    """`box` moved so far along both axes, each to a side drawn with the scene's seed, and back into the scene: it keeps
    its size.
    """
    side = float(one.scene.image.width)
    rng = np.random.default_rng((one.scene.seed, pixels))
    by = [pixels * side / REFERENCE_SIDE * (1 if rng.random() < 0.5 else -1) for _ in range(2)]
    x0, x1 = _inside(box[0] + by[0], box[2] + by[0], side)
    y0, y1 = _inside(box[1] + by[1], box[3] + by[1], side)
    return x0, y0, x1, y1


def _inside(low: float, high: float, side: float) -> tuple[float, float]:
    back = max(0.0, -low) - max(0.0, high - side)
    return max(0.0, low + back), min(side, high + back)
