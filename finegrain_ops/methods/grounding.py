"""From what a model wrote when asked for a box to the region of the image whose tokens are reweighted."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ..boxes import CONVENTIONS, Box, expand_box, parse_boxes
from ..families import ImageGrid
from ..geometry import AxisMap, PixelMap, token_mask
from ..integrations.family import family_of

# Those of `parse_boxes`, and 0..1 of what the model sees: of the square that is cut out, or of the padded square.
BOX_CONVENTIONS = (*CONVENTIONS, "unit_view")

# CoF (arXiv 2412.16869), Sec. II-B.
GROUNDING_PROMPT = (
    "{question}\nAccording to the information in the image and the question, detail the bounding box of the region in "
    "the image that contains the answer in JSON format."
)
# For a second attempt where the first gave no box.
STRICT_GROUNDING_PROMPT = (
    "{question}\nWhere in the image is the answer to this question? Reply with one bounding box [x1, y1, x2, y2] and "
    "nothing else."
)


def image_grids(model: Any, processor: Any, inputs: Any, image_sizes: list[tuple[int, int]]) -> list[list[ImageGrid]]:
    """The grids of tokens of each image; see integrations/family.py.

    Raises:
        ValueError: inputs do not fit the images.
    """
    grids: list[list[ImageGrid]] = [[] for _ in image_sizes]
    for tokens in family_of(model.config.model_type).image_tokens(model, processor, inputs, image_sizes):
        grids[tokens.image_index].append(tokens.grid)
    return grids


def first_box(text: str, image_size: tuple[int, int], convention: str, grids: Sequence[ImageGrid]) -> Box | None:
    """The first box of a model's text, in pixels of the original image; None without any. No text raises.

    Args:
        convention: one of BOX_CONVENTIONS.
        grids: of the image, the whole of it first.
    """
    pixels = grids[0].pixels
    if convention == "unit_view":
        boxes = parse_boxes(text, image_size=pixels.size, convention="unit")
        boxes = [box for box in (_seen_through(pixels, box, image_size) for box in boxes) if box is not None]
    else:
        boxes = parse_boxes(text, image_size=image_size, convention=convention, processed_size=pixels.size)
    return boxes[0] if boxes else None


def as_fractions(box: Box, image_size: tuple[int, int], convention: str, grids: Sequence[ImageGrid]) -> Box:
    """A box in pixels of the original image, 0..1 of what its convention counts from: of the image; of the padded
    square; or of what the model sees. The inverse of `first_box`.
    """
    height, width = image_size
    if convention == "unit_view":
        pixels = grids[0].pixels
    elif convention == "unit_padded":
        pixels = PixelMap.of_image(image_size).pad_to_square()
    else:
        return box[0] / width, box[1] / height, box[2] / width, box[3] / height
    height, width = pixels.size
    x0, x1 = (float(pixels.x(edge) / width) for edge in box[::2])
    y0, y1 = (float(pixels.y(edge) / height) for edge in box[1::2])
    return x0, y0, x1, y1


def _seen_through(pixels: PixelMap, box: Box, image_size: tuple[int, int]) -> Box | None:
    """A box in processed pixels as one in the original image; None where only padding is in it."""
    height, width = image_size
    x0, x1 = (_original(pixels.x, edge, width) for edge in box[::2])
    y0, y1 = (_original(pixels.y, edge, height) for edge in box[1::2])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _original(axis: AxisMap, edge: float, length: int) -> float:
    """Where a processed coordinate is in the original image, clipped to it."""
    return min(max(0.0, float((Fraction(edge) - axis.shift) / axis.scale)), float(length))


def region_around(
    box: Box, factor: float, image_size: tuple[int, int], grids: Sequence[ImageGrid], *, square: bool = False
) -> Box | None:
    """`expand_box`; None where no token would be in it: nothing is left in floats, or all of it is cropped away."""
    region = expand_box(box, factor, image_size, square=square)
    x0, y0, x1, y1 = region
    if not (x0 < x1 and y0 < y1) or not any(token_mask([region], g.pixels, g.token_size).any() for g in grids):
        return None
    return region
