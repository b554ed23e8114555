"""How a scene's parts are drawn, with Pillow and the font that comes with matplotlib."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..boxes import Box

RGB: TypeAlias = tuple[int, int, int]

# Fractions of a card's side. At the model's 112 pixels a letter of a whole scene is 2 to 4 pixels high; in a crop of
# its card it has 10 to 15.
GLYPH = 0.17  # height of the letter
DOT = 0.12  # diameter of the dot
SPECK = 0.045  # diameter of the specks, which hide in small pictures which spot is the dot
NUM_SPECKS = 4

_DARK, _LIGHT = (25, 25, 25), (240, 240, 240)
_MIDDLE = {"square": 0.5, "circle": 0.5, "triangle": 0.74, "cross": 0.5}  # height of letter and dot, where it is wide
_ARM = 0.44  # width of a cross's arms


def draw_background(rng: np.random.Generator, side: int) -> Any:
    """A square of light, slowly varying colour."""
    base = rng.integers(205, 246, 3)
    coarse = (rng.integers(-9, 10, (6, 6, 3)) + base).clip(0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)


def draw_clutter(rng: np.random.Generator, image: Any, count: int) -> None:
    """Grey strokes."""
    canvas, side = ImageDraw.Draw(image), image.width
    for _ in range(count):
        grey = int(rng.integers(150, 200))
        x, y = (rng.random(2) * side).tolist()
        angle, length = rng.random() * 2 * math.pi, (0.04 + 0.12 * rng.random()) * side
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        canvas.line((x, y, *end), fill=(grey, grey, grey), width=int(rng.integers(1, 4)))


def draw_noise(rng: np.random.Generator, image: Any, deviation: float) -> Any:
    """The image with coarse noise over it: grains of a 112th of its side, so that resizing leaves them."""
    if deviation == 0:
        return image
    grains = rng.normal(0, deviation, (112, 112, 3)) + 128
    noise = Image.fromarray(grains.clip(0, 255).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    noisy = np.asarray(image).astype(np.int16) + np.asarray(noise).astype(np.int16) - 128
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def draw_card(
    rng: np.random.Generator,
    image: Any,
    canvas: Any,
    box: Box,
    shape: str,
    paint: RGB,
    letter: str,
    dot: RGB,
    specks: Sequence[RGB],
) -> tuple[Box, Box]:
    """A shape in its box, with a letter on one side and a dot on the other, whose boxes are returned.

    Args:
        canvas: Pillow's ImageDraw of the image.
        specks: the colours of the specks.
    """
    x0, y0, x1, _ = box
    side = x1 - x0
    _draw_shape(canvas, box, shape, paint)
    for _ in range(NUM_SPECKS):
        x, y = rng.uniform(0.3, 0.7), _MIDDLE[shape] + rng.uniform(-0.18, 0.18)
        colour = specks[int(rng.integers(len(specks)))]
        _draw_disc(canvas, x0 + x * side, y0 + y * side, SPECK * side, colour)
    direction = 1 if rng.random() < 0.5 else -1
    places = [0.5 - direction * (0.14 + 0.03 * rng.random()), 0.5 + direction * (0.14 + 0.03 * rng.random())]
    heights = [_MIDDLE[shape] + rng.uniform(-0.06, 0.06) for _ in range(2)]
    dot_box = _draw_disc(canvas, x0 + places[1] * side, y0 + heights[1] * side, DOT * side, dot)
    glyph = glyph_mask(letter, max(6, round(GLYPH * side)))
    corner = (x0 + places[0] * side - glyph.width / 2, y0 + heights[0] * side - glyph.height / 2)
    left, top = (round(edge) for edge in corner)
    image.paste(ink_on(paint), (left, top), glyph)
    return (float(left), float(top), float(left + glyph.width), float(top + glyph.height)), dot_box


def near(rng: np.random.Generator, colour: Sequence[float] | np.ndarray, spread: int) -> RGB:
    """A colour whose channels are up to `spread` levels off."""
    levels = np.asarray(colour) + rng.integers(-spread, spread + 1, 3)
    red, green, blue = (int(level) for level in levels.clip(0, 255))
    return red, green, blue


def ink_on(paint: RGB) -> RGB:
    """Dark on light colours, light on dark ones."""
    return _DARK if 0.3 * paint[0] + 0.6 * paint[1] + 0.1 * paint[2] > 110 else _LIGHT


@functools.lru_cache(maxsize=1024)
def glyph_mask(letter: str, height: int) -> Any:
    """How much of each pixel a bold letter of `height` pixels covers, an image of mode "L"."""
    font = _font()
    left, top, right, bottom = font.getbbox(letter)
    whole = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(whole).text((-left, -top), letter, fill=255, font=font)
    width = max(3, round(height * (right - left) / (bottom - top)))
    return whole.resize((width, height), Image.Resampling.BICUBIC)


@functools.cache
def _font() -> Any:
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
    return ImageFont.truetype(str(path), 96)


def _draw_shape(canvas: Any, box: Box, shape: str, paint: RGB) -> None:
    x0, y0, x1, y1 = box
    side = x1 - x0
    if shape == "square":
        canvas.rectangle(box, fill=paint)
    elif shape == "circle":
        canvas.ellipse(box, fill=paint)
    elif shape == "triangle":
        canvas.polygon(((x0 + side / 2, y0), (x0, y1), (x1, y1)), fill=paint)
    else:
        low, high = (0.5 - _ARM / 2) * side, (0.5 + _ARM / 2) * side
        canvas.rectangle((x0, y0 + low, x1, y0 + high), fill=paint)
        canvas.rectangle((x0 + low, y0, x0 + high, y1), fill=paint)


def _draw_disc(canvas: Any, x: float, y: float, diameter: float, colour: RGB) -> Box:
    radius = diameter / 2
    box = (x - radius, y - radius, x + radius, y + radius)
    canvas.ellipse(box, fill=colour)
    return box
