"""`preprocess`: what a model's own image processor gives for the crops of boxes, all of a size in one `crop_resize`.

The steps of transformers' processors, each only where its flag says so: RGB, pad to a square (LLaVA), resize (shorter
side, fixed size, or Qwen2-VL's `smart_resize`), centre crop, rescale, normalise, the cut into patches (Qwen2-VL) and
that into tiles (LLaVA-NeXT). A processor is read, never called (image_processor_steps.py). What cannot be honoured is
refused: UnsupportedInputError names it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_transforms import convert_to_rgb

from ..crop_resize import crop_resize
from ..families import in_best_resolution
from ..geometry import as_box_tensor, clip_box, smart_resize
from ..validation import describe, require_length, values_are_checked
from .image_processor_steps import Steps, pixel_limits, read_steps

__all__ = ["pixel_limits", "preprocess"]

_RGB_ARGUMENTS = {"return_numpy": True} if "return_numpy" in inspect.signature(convert_to_rgb).parameters else {}


def preprocess(
    images: Any,
    boxes: Any,
    processor: Any,
    image_index: Tensor | Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    exact: bool = True,
    backend: str = "auto",
) -> BatchFeature:
    """What `processor(images=[image.crop(box) for each box])` gives, without making the crops.

    ::

        crops = finegrain_ops.regions.dualfocus_crops(boxes, image_size)
        inputs = finegrain_ops.preprocess(image, crops, processor)      # pixel_values, one for each box

    For boxes with integer edges the levels before rescaling are those of Pillow, and so of the processor wherever it
    resizes with Pillow. A fractional box is sampled where it lies, as `crop_resize` does; a processor could only be
    given whole pixels.

    Args:
        images: a PIL image, an uint8 tensor (3, H, W) on any device or an uint8 array (H, W, 3); one, or a list. PIL
            images become RGB as the installed transformers does it: release 5 lays transparent pixels over white.
        boxes: (x0, y0, x1, y1) in pixels of the original image, clipped to it. For one image (K, 4), a tensor or a list
            of boxes; for a list of images a list of such for each, where [] is an image without boxes and a single box
            need not be wrapped; or (K, 4) with image_index.
        processor: a processor, or its image processor: of the classes CLIPImageProcessor, LlavaImageProcessor,
            LlavaNextImageProcessor, BlipImageProcessor (InstructBLIP, BLIP-2) or Qwen2VLImageProcessor (Qwen2-VL,
            Qwen2.5-VL, Qwen3-VL).
        image_index: (K,), the image that each box lies in, for boxes (K, 4).
        dtype: of pixel_values: float32, float16 or bfloat16.
        exact, backend: see `crop_resize`.

    Returns:
        BatchFeature with tensors on the images' device, boxes in order: pixel_values (K, 3, height, width); of Qwen2-VL
        pixel_values (sum of patches, C * T * P * P) and image_grid_thw (K, 3) int64, (1, rows, columns) of patches; of
        LLaVA-NeXT pixel_values (K, 1 + tiles, 3, side, side), the whole crop and its tiles, then zeros where another
        crop has more tiles, and image_sizes (K, 2) int64, (height, width) of each crop in whole pixels.

    Raises:
        UnsupportedInputError: the processor is of another class, or has a flag set that cannot be honoured.
        ValueError: an image or box is not as said above, or the numbers of images and of lists of boxes differ; the
            crops would differ in shape, and the processor neither cuts nor pads them.
        TypeError: an image is of another type.

    Boxes on a device are waited for only where the size of the result depends on them: Qwen2-VL, LLaVA-NeXT, and
    shorter sides without centre crop.
    """
    steps = read_steps(getattr(processor, "image_processor", processor))
    is_one = not isinstance(images, (list, tuple))
    tensors = [_as_tensor(image, steps, i, is_one) for i, image in enumerate([images] if is_one else images)]
    if not tensors:
        raise ValueError("images: expected at least one image, got an empty list")
    boxes, image_index = _flat_boxes(boxes, image_index, tensors, is_one)

    def crop(size: tuple[int, int], shortest_edge: int | None = None, only: list[int] | None = None) -> Tensor:
        chosen = slice(None) if only is None else torch.tensor(only, device=boxes.device)
        return crop_resize(
            tensors,
            boxes[chosen],
            image_index[chosen],
            size=size,
            interpolation=steps.interpolation,
            pad="square" if steps.do_pad else None,
            shortest_edge=shortest_edge,
            fill=steps.fill,
            rescale=steps.rescale,
            mean=steps.mean,
            std=steps.std,
            dtype=dtype,
            exact=exact,
            backend=backend,
        )

    if steps.patches is not None:
        return _patches(steps, _crop_sizes(boxes, image_index, tensors), crop, dtype, tensors[0].device)
    if steps.tiles is not None:
        return _tiles(steps, _crop_sizes(boxes, image_index, tensors), crop, dtype, tensors[0].device)
    if steps.shortest_edge is None:
        pixel_values = crop(steps.size)
        if steps.cut is not None:
            top, left = ((side - cut) // 2 for side, cut in zip(steps.size, steps.cut))
            pixel_values = pixel_values[:, :, top : top + steps.cut[0], left : left + steps.cut[1]].contiguous()
    elif steps.cut is not None:
        pixel_values = crop(steps.cut, steps.shortest_edge)
    else:
        pixel_values = crop(_common_size(steps.shortest_edge, _crop_sizes(boxes, image_index, tensors)))
    return BatchFeature({"pixel_values": pixel_values})


# --- images and boxes --------------------------------------------------------------------------------------------


def _as_tensor(image: Any, steps: Steps, index: int, is_one: bool) -> Tensor:
    """(3, H, W) uint8, on the image's device."""
    name = "images" if is_one else f"images[{index}]"
    if hasattr(image, "getbands"):
        if steps.do_convert_rgb:
            image = convert_to_rgb(image, **_RGB_ARGUMENTS)
        elif image.mode != "RGB":
            raise ValueError(
                f"{name}: expected an RGB image, got mode {image.mode!r}, and the processor has do_convert_rgb=False; "
                'pass image.convert("RGB")'
            )
        image = np.asarray(image)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(
            f"{name}: expected a PIL image, a tensor (3, H, W) or an array (H, W, 3), got {describe(image)}"
        )
    if image.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"{name}: expected uint8, levels from 0 to 255, got {image.dtype}")
    return channels_first(image, name)


def channels_first(image: Tensor | np.ndarray, name: str) -> Tensor:
    """(3, H, W) of such a tensor or of an array (H, W, 3); ValueError for other shapes."""
    channels, layout = (0, "(3, H, W)") if isinstance(image, Tensor) else (-1, "(H, W, 3)")
    if image.ndim != 3 or image.shape[channels] != 3 or 0 in image.shape:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(image.shape)}")
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)  # what torch can take


def _flat_boxes(boxes: Any, image_index: Any, images: list[Tensor], is_one: bool) -> tuple[Tensor, Tensor]:
    """boxes (K, 4) float64 and the image of each, (K,) int64."""
    if is_one or image_index is not None:
        flat = _boxes_of_one(boxes, "boxes") if is_one else as_box_tensor(boxes, "boxes")
        if image_index is None:
            image_index = torch.zeros(len(flat), dtype=torch.int64)
        elif not isinstance(image_index, Tensor):
            image_index = torch.tensor([require_length(i, "image_index") for i in image_index], dtype=torch.int64)
        if image_index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"image_index: expected torch.int64 or int32, got {image_index.dtype}")
        if image_index.shape != (len(flat),):
            raise ValueError(
                f"image_index: expected one for each of the {len(flat)} boxes, got {describe(image_index)}"
            )
        return flat, image_index.to(flat.device)
    if isinstance(boxes, (str, bytes)) or not hasattr(boxes, "__len__") or len(boxes) != len(images):
        count = f"{len(boxes)} of them" if hasattr(boxes, "__len__") else describe(boxes)
        raise ValueError(
            f"boxes: expected a list of boxes for each of the {len(images)} images, got {count}; pass image_index with "
            "boxes (K, 4)"
        )
    of_images = [_boxes_of_one(entry, f"boxes[{i}]") for i, entry in enumerate(boxes)]
    for i, (entry, image) in enumerate(zip(of_images, images)):
        if values_are_checked(entry):  # crop_resize would name a box by its place among all
            for k, box in enumerate(entry.tolist()):
                clip_box(box, (image.shape[1], image.shape[2]), f"boxes[{i}][{k}]")
    device = next((entry.device for entry in of_images if entry.device.type != "cpu"), torch.device("cpu"))
    flat = torch.cat([entry.to(device) for entry in of_images])
    counts = torch.tensor([len(entry) for entry in of_images])
    return flat, torch.arange(len(images)).repeat_interleave(counts).to(flat.device)


def _boxes_of_one(entry: Any, name: str) -> Tensor:
    """(k, 4): a list of boxes, or one that is not wrapped."""
    if isinstance(entry, Tensor):
        return as_box_tensor(entry[None] if entry.shape == (4,) else entry, name)
    if entry is None or isinstance(entry, (str, bytes)) or not hasattr(entry, "__len__"):
        raise ValueError(f"{name}: expected a list of (x0, y0, x1, y1) boxes, [] for none, got {describe(entry)}")
    if isinstance(entry, np.ndarray):
        entry = entry.tolist()
    if len(entry) == 4 and not any(hasattr(edge, "__len__") for edge in entry):
        entry = [entry]
    return as_box_tensor(entry, name)


def _crop_sizes(boxes: Tensor, image_index: Tensor, images: list[Tensor]) -> list[tuple[int, int]]:
    """(height, width) in whole pixels of the crop of each box, as crop_resize takes it."""
    sizes = []
    for k, (box, index) in enumerate(zip(boxes.tolist(), image_index.tolist())):
        if not 0 <= index < len(images):
            raise ValueError(f"image_index[{k}]: expected 0 to {len(images) - 1}, the images there are, got {index}")
        x0, y0, x1, y1 = clip_box(box, (images[index].shape[1], images[index].shape[2]), f"boxes[{k}]")
        sizes.append((math.ceil(y1) - math.floor(y0), math.ceil(x1) - math.floor(x0)))
    return sizes


# --- results whose size depends on the boxes ---------------------------------------------------------------------


def _common_size(edge: int, crop_sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Of crops whose shorter side becomes `edge`, with nothing cut off."""
    sizes = {tuple(int(edge * side / min(size)) for side in size) for size in crop_sizes}
    if len(sizes) > 1:
        raise ValueError(
            f"boxes: expected crops of one shape, since the processor has do_center_crop=False, got the sizes "
            f"{sorted(sizes)} (height, width); pass the boxes one by one"
        )
    return sizes.pop() if sizes else (edge, edge)


def _resized(wanted: list[tuple[int, tuple[int, int]]], crop: Callable[..., Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The place in `wanted` and the pixels (3, height, width) of every (box, (height, width)) there, in any order: all
    that are of one size are made at once.
    """
    of_size: dict[tuple[int, int], list[int]] = {}
    for place, (_, size) in enumerate(wanted):
        of_size.setdefault(size, []).append(place)
    for size, places in of_size.items():
        yield from zip(places, crop(size, only=[wanted[place][0] for place in places]))


def _patches(
    steps: Steps, crop_sizes: list[tuple[int, int]], crop: Any, dtype: torch.dtype, device: torch.device
) -> BatchFeature:
    """The patches of each crop, those of each box where its turn is."""
    patches = steps.patches
    factor = patches.patch_size * patches.merge_size
    sizes = []
    for k, crop_size in enumerate(crop_sizes):
        try:
            sizes.append(smart_resize(crop_size, factor, patches.min_pixels, patches.max_pixels))
        except ValueError as error:
            raise ValueError(f"boxes[{k}]: {error}") from None
    grids = [(1, height // patches.patch_size, width // patches.patch_size) for height, width in sizes]

    counts = [rows * columns for _, rows, columns in grids]
    length = 3 * patches.temporal_patch_size * patches.patch_size**2
    pixel_values = torch.empty(sum(counts), length, dtype=dtype, device=device)
    places = pixel_values.split(counts)
    for k, pixels in _resized(list(enumerate(sizes)), crop):
        # (rows, columns) of tokens, (rows, columns) of patches in each, C, T, patch height, patch width
        cut = pixels.unflatten(2, (-1, patches.merge_size, patches.patch_size))
        cut = cut.unflatten(1, (-1, patches.merge_size, patches.patch_size)).permute(1, 4, 2, 5, 0, 3, 6)
        place = places[k].view(*cut.shape[:5], patches.temporal_patch_size, *cut.shape[5:])
        place.copy_(cut.unsqueeze(5).expand_as(place))
    grid = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3).to(device)
    return BatchFeature({"pixel_values": pixel_values, "image_grid_thw": grid})


def _tiles(
    steps: Steps, crop_sizes: list[tuple[int, int]], crop: Any, dtype: torch.dtype, device: torch.device
) -> BatchFeature:
    """The whole of each crop squashed to a tile, then its tiles, which together hold it in its own proportions."""
    side, num_boxes = steps.tiles.side, len(crop_sizes)
    maps = [in_best_resolution(size, steps.tiles.grid_pinpoints) for size in crop_sizes]
    counts = [1 + pixels.size[0] // side * (pixels.size[1] // side) for pixels in maps]
    if len(set(counts)) > 1 and not steps.tiles.do_pad:
        raise ValueError(
            f"boxes: expected crops of one number of tiles, since the processor has do_pad=False, got {counts} with "
            "the whole crops; pass the boxes one by one"
        )
    # (top, left, bottom, right) of each crop among its tiles, in whole pixels
    inner = [
        tuple(int(edge) for edge in (pixels.y(0), pixels.x(0), pixels.y(size[0]), pixels.x(size[1])))
        for pixels, size in zip(maps, crop_sizes)
    ]

    pixel_values = torch.zeros(num_boxes, max(counts, default=1), 3, side, side, dtype=dtype, device=device)
    black = _level_zero(steps).to(device=device, dtype=dtype)
    wholes = [(k, (side, side)) for k in range(num_boxes)]
    resized = [(k, (bottom - top, right - left)) for k, (top, left, bottom, right) in enumerate(inner)]
    for place, pixels in _resized(wholes + resized, crop):
        k = place % num_boxes
        if place < num_boxes:
            pixel_values[k, 0] = pixels
            continue
        top, left, bottom, right = inner[k]
        together = black[:, None, None].repeat(1, *maps[k].size)
        together[:, top:bottom, left:right] = pixels
        # (rows, columns) of tiles, C, tile height, tile width
        cut = together.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(1, 3, 0, 2, 4)
        pixel_values[k, 1 : counts[k]] = cut.flatten(0, 1)
    image_sizes = torch.tensor(crop_sizes, dtype=torch.int64).reshape(-1, 2).to(device)
    return BatchFeature({"pixel_values": pixel_values, "image_sizes": image_sizes})


def _level_zero(steps: Steps) -> Tensor:
    """(3,) float32: what rescaling and normalising make of black, as crop_resize does it."""
    mean, std = (
        torch.tensor(default if value is None else value, dtype=torch.float64).expand(3)
        for value, default in ((steps.mean, 0.0), (steps.std, 1.0))
    )
    return ((0.0 - mean) / std).float()
