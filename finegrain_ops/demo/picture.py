"""The demo's picture: photograph with its box, attention before, attention after."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from ..geometry import Box, PixelMap


def save(
    path: Path, image: Image.Image, box: Box, pixels: PixelMap, before: Tensor, after: Tensor, weight: float, note: str
) -> None:
    """`before` and `after` are (rows, columns) over the image tokens, on one colour scale."""
    aspect = image.height / image.width
    figure = Figure(figsize=(13.5, 4.2 * aspect * 1.05 + 0.75), layout="constrained")
    photograph, left, right = figure.subplots(1, 3)
    photograph.set_title("photograph and box")
    left.set_title("attention before")
    right.set_title(f"attention after, $\\lambda$ = {weight:g}")
    for axes in (photograph, left, right):
        axes.imshow(image)
        axes.set_axis_off()
    highest = float(max(before.max(), after.max()))
    for axes, attention in ((left, before), (right, after)):
        shown = _overlay(axes, attention, pixels, highest)
    figure.colorbar(shown, ax=[left, right], shrink=0.9, label="share of the attention to the image, per token")
    for axes in (photograph, left, right):
        axes.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, edgecolor="red", linewidth=2))
        axes.set_xlim(0, image.width)
        axes.set_ylim(image.height, 0)
    figure.supxlabel(note, fontsize=9)
    figure.savefig(path, dpi=110)


def _overlay(axes: Axes, attention: Tensor, pixels: PixelMap, highest: float) -> AxesImage:
    """The token grid, laid over the part of the photograph that the model sees."""
    left, right = (float((edge - pixels.x.shift) / pixels.x.scale) for edge in (0, pixels.size[1]))
    top, bottom = (float((edge - pixels.y.shift) / pixels.y.scale) for edge in (0, pixels.size[0]))
    return axes.imshow(
        attention.numpy(), extent=(left, right, bottom, top), cmap="viridis", alpha=0.75, vmin=0.0, vmax=highest
    )
