"""The world that the small model sees: scenes of coloured cards, each with a letter and a dot too small to read at the
model's resolution, made from seeds alone.

Coordinate convention: boxes are (x0, y0, x1, y1) in continuous pixels of the scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import ImageDraw

from ..boxes import Box
from .drawing import RGB, draw_background, draw_card, draw_clutter, draw_noise, near

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 215),
    "yellow": (240, 210, 40),
    "purple": (135, 50, 170),
    "orange": (245, 135, 30),
    "cyan": (50, 200, 215),
    "pink": (245, 140, 185),
}
SHAPES = ("square", "circle", "triangle", "cross")
LETTERS = tuple("ACEHKLOTXZ")

# Where the seeds of each split begin. Nothing but seeds tells scenes apart, so splits are far from each other.
SPLITS = {"train": 0, "validation": 100_000_000, "test": 200_000_000, "guard": 300_000_000, "demo": 400_000_000}

Range: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Difficulty:
    """What makes a scene hard to see. Sizes are fractions of the scene's side, which is in pixels.

    Attributes:
        num_cards: fewest and most; at most eight, for no two cards of a scene have the same colour.
        card_side: of a card's square, smallest and largest; all shrink together where they do not fit.
        colour_spread: levels by which a card's channels may be off its colour.
        nearness: 0..1, how far a card's colour is moved towards another one of the world's.
        noise: standard deviation, in levels, of a noise whose grain is about a pixel of what the model sees.
        clutter: fewest and most strokes on the background.
        side: of the square scene, smallest and largest.
    """

    num_cards: tuple[int, int] = (3, 6)
    card_side: Range = (0.15, 0.21)
    colour_spread: int = 12
    nearness: float = 0.0
    noise: float = 0.0
    clutter: tuple[int, int] = (2, 6)
    side: tuple[int, int] = (448, 672)


PLAIN = Difficulty()
CROWDED = Difficulty(num_cards=(6, 8), card_side=(0.13, 0.18), colour_spread=18, noise=6.0, clutter=(6, 14))
# Never trained on. Set by plain accuracy on colours alone, before any method was measured: see docs/tiny_llava.md.
HARD = Difficulty(
    num_cards=(7, 8), card_side=(0.11, 0.15), colour_spread=20, nearness=0.3, noise=20.0, clutter=(10, 20)
)
DIFFICULTIES = {"plain": PLAIN, "crowded": CROWDED, "hard": HARD}


@dataclass(frozen=True)
class Card:
    colour: str
    shape: str
    letter: str
    dot: str  # the colour of its dot
    box: Box
    letter_box: Box
    dot_box: Box

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    seed: int
    cards: tuple[Card, ...]
    image: Any  # Pillow, RGB

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        width, height = self.image.size
        return height, width


def seed_of(split: str, index: int) -> int:
    """The seed of scene `index` of a split.

    Raises:
        ValueError: there is no such split, or no such scene in it.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    if not 0 <= index < 100_000_000:
        raise ValueError(f"index: expected 0 to 99999999, got {index}")
    return SPLITS[split] + index


def draw_scene(seed: int, difficulty: Difficulty = PLAIN) -> Scene:
    """The scene of a seed: the same pixels and the same cards on every call."""
    rng = np.random.default_rng(seed)
    side = int(rng.integers(difficulty.side[0], difficulty.side[1] + 1))
    boxes = _places(rng, int(rng.integers(difficulty.num_cards[0], difficulty.num_cards[1] + 1)), difficulty.card_side)
    names = list(COLOURS)
    image = draw_background(rng, side)
    draw_clutter(rng, image, int(rng.integers(difficulty.clutter[0], difficulty.clutter[1] + 1)))
    canvas = ImageDraw.Draw(image)
    cards = []
    for fractions, which in zip(boxes, rng.permutation(len(names))):
        colour = names[int(which)]
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        letter = LETTERS[int(rng.integers(len(LETTERS)))]
        dot = _other(rng, names, colour)
        x0, y0, x1, y1 = (float(edge * side) for edge in fractions)
        box = (x0, y0, x1, y1)
        paint = _paint(rng, COLOURS[colour], COLOURS[_other(rng, names, colour)], difficulty)
        drawn = draw_card(rng, image, canvas, box, shape, paint, letter, COLOURS[dot], list(COLOURS.values()))
        cards.append(Card(colour, shape, letter, dot, box, *drawn))
    return Scene(seed, tuple(cards), draw_noise(rng, image, difficulty.noise))


def _places(rng: np.random.Generator, count: int, card_side: Range) -> Sequence[tuple[float, float, float, float]]:
    """Squares in 0..1 that keep a distance from each other."""
    places: list[tuple[float, float, float, float]] = []
    scale, tries = 1.0, 0
    while len(places) < count:
        side = float(rng.uniform(*card_side)) * scale
        x, y = rng.uniform(0.01, 0.99 - side, 2).tolist()
        if all(x + side < a[0] - 0.01 or a[2] + 0.01 < x or y + side < a[1] - 0.01 or a[3] + 0.01 < y for a in places):
            places.append((x, y, x + side, y + side))
        tries += 1
        if tries % 60 == 0:
            scale *= 0.93
    return places


def _other(rng: np.random.Generator, names: Sequence[str], colour: str) -> str:
    return str(rng.choice([name for name in names if name != colour]))


def _paint(rng: np.random.Generator, colour: RGB, other: RGB, difficulty: Difficulty) -> RGB:
    mixed = np.array(colour) * (1 - difficulty.nearness) + np.array(other) * difficulty.nearness
    return near(rng, mixed, difficulty.colour_spread)


def intersection_over_union(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = math.prod((a[2] - a[0], a[3] - a[1])) + math.prod((b[2] - b[0], b[3] - b[1])) - width * height
    return width * height / union if union > 0 else 0.0
