"""`preprocess`: what a model's own image processor gives for the crops of boxes, in one `crop_resize` for all of them.

The steps of transformers' processors, each only where its flag says so: RGB, pad to a square (LLaVA), resize (shorter
side, fixed size, or Qwen2-VL's `smart_resize`), centre crop, rescale, normalise, and for Qwen2-VL the cut into patches.
A processor is read, never called. What cannot be honoured is refused: UnsupportedInputError names it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_transforms import convert_to_rgb

from ..crop_resize import crop_resize
from ..errors import UnsupportedInputError
from ..geometry import as_box_tensor, clip_box, smart_resize
from ..validation import describe, require_length, values_are_checked

# The steps that not every class has. A name stands for all backends of the class: with "Fast" or "Pil" at its end, too.
_CLASSES = {
    "CLIPImageProcessor": {"do_center_crop"},
    "LlavaImageProcessor": {"do_pad", "do_center_crop"},
    "BlipImageProcessor": set(),
    "Qwen2VLImageProcessor": {"patches"},
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic", None: "bilinear"}
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
            BlipImageProcessor (InstructBLIP, BLIP-2) or Qwen2VLImageProcessor (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).
        image_index: (K,), the image that each box lies in, for boxes (K, 4).
        dtype: of pixel_values: float32, float16 or bfloat16.
        exact, backend: see `crop_resize`.

    Returns:
        BatchFeature with tensors on the images' device, boxes in order: pixel_values (K, 3, height, width); of Qwen2-VL
        pixel_values (sum of patches, C * T * P * P) and image_grid_thw (K, 3) int64, (1, rows, columns) of patches.

    Raises:
        UnsupportedInputError: the processor is of another class, or has a flag set that cannot be honoured.
        ValueError: an image or box is not as said above, or the numbers of images and of lists of boxes differ.
        TypeError: an image is of another type.

    Boxes on a device are waited for only where the size of the result depends on them: Qwen2-VL, and shorter sides
    without centre crop.
    """
    steps = _steps(getattr(processor, "image_processor", processor))
    is_one = not isinstance(images, (list, tuple))
    tensors = [_as_tensor(image, steps, i, is_one) for i, image in enumerate([images] if is_one else images)]
    if not tensors:
        raise ValueError("images: expected at least one image, got an empty list")
    boxes, image_index = _flat_boxes(boxes, image_index, tensors, is_one)

    def crop(chosen: Tensor | slice, size: tuple[int, int], shortest_edge: int | None = None) -> Tensor:
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
        return _patches(steps, boxes, image_index, tensors, crop, dtype)
    if steps.shortest_edge is None:
        pixel_values = crop(slice(None), steps.size)
        if steps.cut is not None:
            top, left = ((side - cut) // 2 for side, cut in zip(steps.size, steps.cut))
            pixel_values = pixel_values[:, :, top : top + steps.cut[0], left : left + steps.cut[1]].contiguous()
    elif steps.cut is not None:
        pixel_values = crop(slice(None), steps.cut, steps.shortest_edge)
    else:
        pixel_values = crop(slice(None), _common_size(steps, boxes, image_index, tensors))
    return BatchFeature({"pixel_values": pixel_values})


# --- the processor -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patches:
    """How Qwen2-VL cuts a resized image up; see geometry.smart_resize."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int


@dataclass(frozen=True)
class _Steps:
    """What an image processor is set to do."""

    do_convert_rgb: bool
    do_pad: bool
    fill: tuple[int, ...]
    shortest_edge: int | None
    size: tuple[int, int] | None  # without shortest_edge and patches
    cut: tuple[int, int] | None  # from the centre
    interpolation: str
    rescale: float
    mean: Any
    std: Any
    patches: _Patches | None


def _steps(image_processor: Any) -> _Steps:
    kind = type(image_processor)
    name = kind.__name__.removesuffix("Fast").removesuffix("Pil")
    if name not in _CLASSES or not kind.__module__.startswith("transformers."):
        raise UnsupportedInputError(
            f"processor: expected one with an image processor of transformers' classes {', '.join(_CLASSES)}, got "
            f"{kind.__module__}.{kind.__name__}; call crop_resize with the steps of this one"
        )

    def refuse(what: str) -> UnsupportedInputError:
        return UnsupportedInputError(f"processor: {kind.__name__} with {what} cannot be honoured")

    def flag(name: str, default: bool) -> bool:
        return bool(getattr(image_processor, name, default))

    def sides(name: str) -> dict[str, int]:
        value = getattr(image_processor, name, None)
        try:
            return {key: side for key, side in dict(value).items() if side is not None}
        except (TypeError, ValueError):
            raise refuse(f"{name}={value!r} instead of a dictionary") from None

    if not flag("do_resize", True):
        raise refuse("do_resize=False, which keeps each crop's own size,")
    for optional in ("do_pad", "do_center_crop"):
        if flag(optional, False) and optional not in _CLASSES[name]:
            raise refuse(f"{optional}=True")
    resample = getattr(image_processor, "resample", None)
    resample = getattr(resample, "value", resample)
    if resample not in _INTERPOLATIONS:
        raise refuse(f"resample={image_processor.resample!r}, neither bilinear nor bicubic,")

    size = sides("size")
    shortest_edge = fixed_size = cut = patches = None
    do_pad = flag("do_pad", False)
    if "patches" in _CLASSES[name]:
        patches = _read_patches(image_processor, size, refuse)
    elif set(size) == {"shortest_edge"}:
        shortest_edge = size["shortest_edge"]
    elif set(size) == {"height", "width"}:
        fixed_size = size["height"], size["width"]
    else:
        raise refuse(f"size={size}")
    if flag("do_center_crop", False):
        crop_size = sides("crop_size")
        if set(crop_size) != {"height", "width"}:
            raise refuse(f"crop_size={crop_size}")
        cut = crop_size["height"], crop_size["width"]
        resized = fixed_size or (shortest_edge, shortest_edge)
        if cut[0] > resized[0] or cut[1] > resized[1]:
            raise refuse(f"crop_size={crop_size} beyond size={size}, which pads,")
    elif do_pad and shortest_edge is not None:  # the sides of a square are all its shortest
        shortest_edge, fixed_size = None, (shortest_edge, shortest_edge)
    mean = image_processor.image_mean
    if do_pad and not isinstance(mean, (list, tuple)):
        raise refuse(f"do_pad=True and image_mean={mean!r} instead of three numbers")
    do_normalize = flag("do_normalize", True)
    return _Steps(
        do_convert_rgb=flag("do_convert_rgb", False),
        do_pad=do_pad,
        fill=tuple(int(average * 255) for average in mean) if do_pad else (0, 0, 0),
        shortest_edge=shortest_edge,
        size=fixed_size,
        cut=cut,
        interpolation=_INTERPOLATIONS[resample],
        rescale=float(image_processor.rescale_factor) if flag("do_rescale", True) else 1.0,
        mean=mean if do_normalize else None,
        std=image_processor.image_std if do_normalize else None,
        patches=patches,
    )


def _read_patches(image_processor: Any, size: dict[str, int], refuse: Any) -> _Patches:
    limits = pixel_limits(image_processor)
    if not all(limits):
        raise refuse(f"size={size} instead of shortest_edge and longest_edge")
    return _Patches(
        image_processor.patch_size,
        image_processor.merge_size,
        image_processor.temporal_patch_size,
        *limits,
    )


def pixel_limits(image_processor: Any) -> list[int | None]:
    """min_pixels and max_pixels of Qwen2-VL. The older pair of attributes wins over `size` where it is set, as it does
    in the processor.
    """
    limits = []
    for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        limit = getattr(image_processor, name, None)
        limits.append(image_processor.size.get(key) if limit is None else limit)
    return limits


# --- images and boxes --------------------------------------------------------------------------------------------


def _as_tensor(image: Any, steps: _Steps, index: int, is_one: bool) -> Tensor:
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


def _common_size(steps: _Steps, boxes: Tensor, image_index: Tensor, images: list[Tensor]) -> tuple[int, int]:
    """Of crops whose shorter side becomes shortest_edge, with nothing cut off."""
    edge = steps.shortest_edge
    sizes = {tuple(int(edge * side / min(size)) for side in size) for size in _crop_sizes(boxes, image_index, images)}
    if len(sizes) > 1:
        raise ValueError(
            f"boxes: expected crops of one shape, since the processor has do_center_crop=False, got the sizes "
            f"{sorted(sizes)} (height, width); pass the boxes one by one"
        )
    return sizes.pop() if sizes else (edge, edge)


def _patches(
    steps: _Steps, boxes: Tensor, image_index: Tensor, images: list[Tensor], crop: Any, dtype: torch.dtype
) -> BatchFeature:
    """Crops of one size at a time, each cut into patches; the patches of each box where its turn is."""
    device, patches = images[0].device, steps.patches
    factor = patches.patch_size * patches.merge_size
    of_size: dict[tuple[int, int], list[int]] = {}
    grids = []
    for k, crop_size in enumerate(_crop_sizes(boxes, image_index, images)):
        try:
            size = smart_resize(crop_size, factor, patches.min_pixels, patches.max_pixels)
        except ValueError as error:
            raise ValueError(f"boxes[{k}]: {error}") from None
        of_size.setdefault(size, []).append(k)
        grids.append((1, size[0] // patches.patch_size, size[1] // patches.patch_size))

    counts = [rows * columns for _, rows, columns in grids]
    length = 3 * patches.temporal_patch_size * patches.patch_size**2
    pixel_values = torch.empty(sum(counts), length, dtype=dtype, device=device)
    places = pixel_values.split(counts)
    for size, chosen in of_size.items():
        crops = crop(torch.tensor(chosen, device=boxes.device), size)
        for k, pixels in zip(chosen, crops):
            # (rows, columns) of tokens, (rows, columns) of patches in each, C, T, patch height, patch width
            cut = pixels.unflatten(2, (-1, patches.merge_size, patches.patch_size))
            cut = cut.unflatten(1, (-1, patches.merge_size, patches.patch_size)).permute(1, 4, 2, 5, 0, 3, 6)
            place = places[k].view(*cut.shape[:5], patches.temporal_patch_size, *cut.shape[5:])
            place.copy_(cut.unsqueeze(5).expand_as(place))
    grid = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3).to(device)
    return BatchFeature({"pixel_values": pixel_values, "image_grid_thw": grid})
