"""Boxes as the text that a model is to write: the inverse of `boxes.parse_boxes`."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from ..boxes import CONVENTIONS
from ..geometry import check_image_size, clip_box
from ..validation import require_length

__all__ = ["box_text"]

_DECIMALS = {"unit": 2, "unit_padded": 3, "permille": 0, "pixel": 0}  # DualFocus, Fig. 8; TinyGroundingGPT; Qwen


def box_text(
    box: Sequence[float],
    image_size: tuple[int, int],
    convention: str = "unit",
    *,
    decimals: int | None = None,
    processed_size: tuple[int, int] | None = None,
) -> str:
    """ "[x1, y1, x2, y2]" in one of the conventions of `boxes.parse_boxes`, which reads it back.

    Edges are rounded to the nearest number with so many decimals. Where that leaves a box no width or height, its far
    edge (at the image's border its near one) is moved by one step, so that every text is a box.

    Args:
        box: (x0, y0, x1, y1) in pixels of the original image, clipped to it.
        image_size: (height, width) of the original image.
        convention: "unit", "unit_padded", "permille" or "pixel".
        decimals: None: 2 for "unit", 3 for "unit_padded", 0 for the others.
        processed_size: (height, width) of the image that the model sees; needed for "pixel".

    Raises:
        ValueError: the box has no area in its image, the convention is none of these, or "pixel" lacks processed_size.

    Example:
        >>> box_text((128, 196.8, 236.8, 355.2), (480, 640))
        '[0.20, 0.41, 0.37, 0.74]'
    """
    if convention not in _DECIMALS:
        raise ValueError(
            f"convention: expected one of {', '.join(map(repr, CONVENTIONS[1:]))}, got {convention!r}; name "
            "the one that the model is to write"
        )
    if convention == "pixel" and processed_size is None:
        raise ValueError('processed_size: expected (height, width) with convention "pixel", got None')
    decimals = _DECIMALS[convention] if decimals is None else require_length(decimals, "decimals")
    height, width = check_image_size(image_size, "image_size")
    edges = clip_box(box, (height, width), "box")  # type: ignore[arg-type]
    texts = [""] * 4
    for axis, side in enumerate((width, height)):
        shift, span, scale = _axis(convention, axis, (height, width), processed_size)
        steps = [round((Fraction(edge) + shift) * scale * 10**decimals / span) for edge in edges[axis::2]]
        if steps[0] == steps[1]:
            last = (side + shift) * scale * 10**decimals / span
            steps = [steps[0], steps[0] + 1] if steps[0] + 1 <= last else [steps[0] - 1, steps[0]]
        texts[axis::2] = [f"{Decimal(step).scaleb(-decimals):.{decimals}f}" for step in steps]
    return f"[{', '.join(texts)}]"


def _axis(
    convention: str, axis: int, size: tuple[int, int], processed_size: tuple[int, int] | None
) -> tuple[int, int, int]:
    """What is added to an edge, what it is then divided by, and multiplied with; axis 0 is x."""
    height, width = size
    side = (width, height)[axis]
    if convention == "unit_padded":
        longest = max(size)
        return (longest - side) // 2, longest, 1
    if convention == "pixel" and processed_size is not None:
        return 0, side, processed_size[1 - axis]
    return 0, side, 1000 if convention == "permille" else 1
