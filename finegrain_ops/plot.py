"""Pictures of attention: maps of image tokens laid over the image. Needs matplotlib; `import finegrain_ops.plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"finegrain_ops.plot needs {missing.name}, one of the packages of `pip install finegrain-ops[plot]`"
    ) from missing

from .geometry import Box
from .integrations.image_maps import ImageMap
from .validation import clip_boxes_of_image, describe, require_number

Map = Any  # ImageMap, a 2-D tensor or a 2-D array
_LABELS = {"sum": "share of the map, per token", "max": "share of the map's largest value", None: "value per token"}


def attention_overlay(
    image: Any,
    map: Map | Sequence[Map] | Mapping[str, Map | None],
    boxes: Sequence[Any] | Tensor = (),
    *,
    dashed: Sequence[Any] | Tensor = (),
    normalize: Literal["sum", "max"] | None = "sum",
    smooth: bool = False,
    colormap: str = "viridis",
    alpha: float = 0.6,
    title: str | None = None,
    label: str | None = None,
    panel_width: float = 4.2,
) -> Figure:
    """Attention laid over the image that it was paid to, the boxes in red (TinyGroundingGPT, Sec. A.8).

    ::

        attention = handle.attention_map(inputs, rows=positions_of_the_object, layers=-1)  # summed over heads and rows
        (map,) = handle.image_maps(inputs, attention, [(image.height, image.width)])
        attention_overlay(image, map, [box]).savefig("attention.png")

    Args:
        image: a PIL image; a uint8 array (H, W, 3), or grey (H, W); or a tensor (3, H, W), uint8, or float in 0..1.
        map: an `ImageMap` (handle.image_maps), or a 2-D tensor or array that covers the whole image. Several side by
            side, on one colour scale: a list, or {title: map}, where None stands for the image alone, and a PIL image
            for another picture, such as a crop, that gets neither map nor boxes.
        boxes: (x0, y0, x1, y1) in pixels of the image, clipped to it; a single one need not be wrapped.
        dashed: further ones, whose outline is dashed.
        normalize: "sum": each map's values add up to 1 (over all its tokens, those that show padding too); "max": each
            map's largest is 1; None: values as they are. 0 is always on the colour scale.
        smooth: interpolate between the tokens (bicubic), as heat maps often are; otherwise every token is a rectangle
            of one colour, which is what the model has.
        colormap: a name of one of matplotlib's.
        alpha: how opaque the map is, 0..1. Places of the image that have no token are left bare, and nothing is drawn
            beyond the image.
        title: of the whole figure.
        label: of the colour scale; by default it says how the values are normalised.
        panel_width: of each picture, in inches.

    Returns:
        A matplotlib Figure, which pyplot does not know of: save it with `savefig`, or show it in a notebook.

    Raises:
        TypeError, ValueError: an argument is not as said above, a map holds NaN or infinity, or its sum (its largest
            value) is not above 0, so that it cannot be normalised.
    """
    pixels = _pixels(image)
    size = pixels.shape[:2]
    if normalize not in _LABELS:
        raise ValueError(f'normalize: expected "sum", "max" or None, got {describe(normalize)}')
    if not isinstance(colormap, str) or colormap not in colormaps:
        raise ValueError(f"colormap: expected the name of one of matplotlib's, got {describe(colormap)}")
    if not 0.0 <= require_number(alpha, "alpha", what="a number in 0..1") <= 1.0:
        raise ValueError(f"alpha: expected a number in 0..1, got {alpha}")
    if require_number(panel_width, "panel_width", what="a number of inches above 0") <= 0.0:
        raise ValueError(f"panel_width: expected a number of inches above 0, got {panel_width}")
    outlines = [(box, "solid") for box in _clipped(boxes, size, "boxes")]
    outlines += [(box, "dashed") for box in _clipped(dashed, size, "dashed")]
    panels = [(heading, _panel(panel, size, normalize, name)) for heading, panel, name in _panels(map)]
    drawn = [panel.values.flatten() for _, panel in panels if isinstance(panel, ImageMap)]
    every = torch.cat([torch.zeros(1, dtype=torch.float64), *drawn])  # 0 is always on the scale
    lowest, highest = float(every.min()), float(every.max())
    if lowest == highest:  # all values are 0; matplotlib would draw them as the middle of a scale of its own
        highest = 1.0

    height = panel_width * min(max(size[0] / size[1], 0.25), 2.0)  # an image beyond 1 : 2 or 4 : 1 gets margins
    height += 0.3 * max(len(heading.splitlines()) if heading else 0 for heading, _ in panels)
    height += 0.4 * (title is not None)
    figure = Figure(figsize=(panel_width * len(panels) + 1.0 * bool(drawn), height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (heading, panel) in zip(all_axes, panels):
        if _is_picture(panel):
            _draw(axes, _pixels(panel), [], heading)
            continue
        _draw(axes, pixels, outlines, heading)
        if isinstance(panel, ImageMap):
            x0, y0, x1, y1 = panel.extent
            shown = axes.imshow(
                panel.values.numpy(),
                extent=(x0, x1, y1, y0),
                cmap=colormap,
                alpha=alpha,
                vmin=lowest,
                vmax=highest,
                interpolation="bicubic" if smooth else "nearest",
            )
        # What was drawn last may reach beyond the image, and would set the limits.
        axes.set_xlim(0, size[1])
        axes.set_ylim(size[0], 0)
    if drawn:
        figure.colorbar(shown, ax=list(all_axes), shrink=0.9, label=_LABELS[normalize] if label is None else label)
    if title is not None:
        figure.suptitle(title, parse_math=False)  # a question may hold dollar signs
    return figure


def _draw(axes: Axes, pixels: np.ndarray, outlines: Sequence[tuple[Box, str]], heading: str | None) -> None:
    """The image, pixel (row r, column c) on [c, c+1] x [r, r+1], and its boxes, each with the style of its line."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0))
    axes.set_axis_off()
    if heading is not None:
        axes.set_title(heading, parse_math=False)
    for (x0, y0, x1, y1), style in outlines:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="red", linewidth=2, linestyle=style))


def _panels(maps: Any) -> list[tuple[str | None, Any, str]]:
    """(title, map, name in messages) of each picture."""
    panels: list[tuple[str | None, Any, str]] = [(None, maps, "map")]
    if isinstance(maps, Mapping):
        panels = [(str(heading), panel, f"map[{heading!r}]") for heading, panel in maps.items()]
    elif isinstance(maps, (list, tuple)):
        panels = [(None, panel, f"map[{i}]") for i, panel in enumerate(maps)]
    if not panels:
        raise ValueError("map: expected at least one map, got none")
    return panels


def _panel(value: Any, image_size: tuple[int, int], normalize: str | None, name: str) -> Any:
    """An ImageMap, normalised; None, or a PIL image, as it is."""
    if value is None or _is_picture(value):
        return value
    return _normalized(_image_map(value, image_size, name), normalize, name)


def _image_map(value: Any, image_size: tuple[int, int], name: str) -> ImageMap:
    """float64, on the CPU."""
    extent = value.extent if isinstance(value, ImageMap) else (0.0, 0.0, float(image_size[1]), float(image_size[0]))
    values = value.values if isinstance(value, ImageMap) else value
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        values = torch.from_numpy(np.array(values))
    if not isinstance(values, Tensor) or values.is_complex():
        raise TypeError(f"{name}: expected an ImageMap, a tensor or an array of numbers, got {describe(value)}")
    if values.dim() != 2 or not values.numel():
        raise ValueError(
            f"{name}: expected shape (rows, columns), got {tuple(values.shape)}; handle.image_maps makes it"
        )
    values = values.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity among them")
    return ImageMap(values, extent)


def _normalized(panel: ImageMap, normalize: str | None, name: str) -> ImageMap:
    if normalize is None:
        return panel
    total = float(panel.values.sum() if normalize == "sum" else panel.values.max())
    if total <= 0.0:
        what = "sum" if normalize == "sum" else "largest value"
        raise ValueError(
            f"{name}: expected a {what} above 0 to divide by, got {total}; normalize=None draws it as it is"
        )
    return ImageMap(panel.values / total, panel.extent)


def _pixels(image: Any) -> np.ndarray:
    """(H, W, 3) uint8."""
    if _is_picture(image):
        return np.asarray(image.convert("RGB"))
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(f"image: expected a tensor (3, H, W), got shape {tuple(image.shape)}")
        if image.is_floating_point():
            if not bool(((image >= 0) & (image <= 1)).all()):
                raise ValueError(
                    "image: expected values in 0..1 of a float tensor, got others; give the image as it was before it "
                    "was normalised for the model"
                )
            image = (image.detach().float() * 255).round().to(torch.uint8)
        if image.dtype != torch.uint8:
            raise TypeError(f"image: expected a uint8 or float tensor, got {image.dtype}")
        return image.cpu().permute(1, 2, 0).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image: expected a PIL image, a uint8 array or a tensor (3, H, W), got {describe(image)}")
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected an array of uint8, got {image.dtype}")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image: expected an array (H, W, 3) or (H, W), got shape {image.shape}")
    return image


def _is_picture(value: Any) -> bool:
    """A PIL image; Pillow need not be installed."""
    return hasattr(value, "convert") and hasattr(value, "getpixel")


def _clipped(boxes: Any, image_size: tuple[int, int], name: str) -> list[Box]:
    if isinstance(boxes, (str, bytes)) or not hasattr(boxes, "__len__"):
        raise TypeError(f"{name}: expected a list of (x0, y0, x1, y1), got {describe(boxes)}")
    return clip_boxes_of_image(boxes, image_size, name)
