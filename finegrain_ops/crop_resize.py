"""Regions of images, cropped, resized and normalised in one call: the public function `crop_resize`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .arguments import check_backend
from .backends import CROP_BACKENDS
from .backends.crops.interface import INSTALLED_PILLOW, INTERPOLATIONS, NEWEST_PILLOW, PassOrder
from .geometry import as_box_tensor
from .validation import (
    describe,
    require_bool,
    require_boxes,
    require_length,
    require_number,
    require_shape,
    require_tensor,
)

_IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_RESULT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHANNELS = (1, 3)


def crop_resize(
    images: Tensor | Sequence[Tensor],
    boxes: Tensor | Sequence[Sequence[float]],
    image_index: Tensor | Sequence[int] | None = None,
    *,
    size: int | tuple[int, int],
    interpolation: str = "bicubic",
    antialias: bool = True,
    pad: str | None = None,
    shortest_edge: int | None = None,
    fill: float | Sequence[float] = 0,
    rescale: float = 1 / 255,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    exact: bool = True,
    pillow: str | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Crops any number of boxes out of images and resizes them as Pillow does, rescaled and normalised.

    .. math::
        \mathrm{result}_k = (\mathrm{rescale} \cdot \mathrm{resize}(\mathrm{crop}(\mathrm{image}_k, \mathrm{box}_k))
        - \mathrm{mean}) / \mathrm{std}

    DualFocus (Sec. 3.3) and TinyGroundingGPT (Sec. 3.2) zoom into regions this way. A crop with integer edges equals
    Pillow's ``image.crop(box).resize(size)`` to the level, with the rounding to uint8 after each of its two passes; a
    fractional one equals ``image.crop(outer).resize(size, box=inner)``, where outer is the integer box around it:
    nothing outside of that is read. `finegrain_ops.backends.crops.sampling` is the definition.

    Args:
        images: (B, 3, H, W), or a list of (3, H_i, W_i) of any sizes; uint8, or float16, bfloat16 or float32 in 0..255,
            in a list also mixed; any strides. Grey images have one channel instead of three, all of them. Floating
            images are not rounded to levels, as Pillow's mode "F".
        boxes: (K, 4), (x0, y0, x1, y1) in pixels of the original image, continuous coordinates: (0, 0) to (width,
            height) is the whole image. A tensor on the images' device or on the CPU, or numbers. Clipped to the image.
        image_index: (K,), the image that each box lies in. None: the only one, or image k for box k where there are
            as many as boxes.
        size: (height, width) of the result, or one number for both.
        interpolation: "bicubic" or "bilinear".
        antialias: whether the filter widens as crops shrink, as Pillow's always does. False: torch's `interpolate`,
            rounded as above.
        pad: "square" letterboxes the crop first: centred, with `fill` around it, where an odd remainder leaves the
            larger margin after it (LLaVA's expand2square).
        shortest_edge: resizes the crop so that its shorter side has this length, the other int(shortest_edge * long /
            short), and cuts `size` from the centre, as CLIP's image processor does. None: `size` is the whole crop,
            whatever its shape.
        fill: 0..255, a number or one for each channel; rounded to a level for uint8 images.
        rescale: multiplies the levels.
        mean: a number or one for each channel, subtracted after rescaling. None: 0.
        std: a number or one for each channel, > 0. None: 1.
        dtype: of the result: float32, float16 or bfloat16. Computed in float32.
        exact: False allows levels near Pillow's (at most 3 off) where that is faster: on a CPU.
        pillow: the version of Pillow that is to be equalled, such as "12.3". They differ in which pass comes first,
            which shows at sharp edges, since each pass rounds and clips: before 12.2 the horizontal one; with 12.2 and
            12.3 the vertical one where a crop of H x W becomes h x w with H > 100 W and H > h; from 13.0 on the
            vertical one where H > h and H - h > 2 (W - w). None: the version that is installed, else 13.0.
        backend: "auto" takes the fastest that can run the call; "triton", "cuda", "pillow", "interpolate" (only with
            exact=False) or "reference" run there or raise.

    Returns:
        (K, 3, height, width). No gradient.

    Raises:
        ValueError: a shape or a value is not as said above; a box with no area within its image, or with NaN, is named
            by its index (values on a device only with FINEGRAIN_CHECK=1; unchecked, such a box gives `fill`).
        TypeError: a dtype or a type is not.
        UnsupportedInputError: the named backend cannot run this; every reason is listed.

    On a device nothing waits for it, and images never visit the host. A list of images needs the table of their
    addresses there; the first call with these images makes it, so run one before capturing a CUDA graph.

    Equivalent, for uint8 images and integer boxes::

        for k, box in enumerate(boxes):
            image = Image.fromarray(images[image_index[k]].permute(1, 2, 0).numpy())
            crop = image.crop(box).resize((width, height), Image.Resampling.BICUBIC)
            result[k] = ((rescale * torch.from_numpy(np.array(crop)) - mean) / std).permute(2, 0, 1)
    """
    tensors, image_sizes = _check_images(images)
    device, channels = tensors[0].device, tensors[0].shape[-3]
    boxes = _require_device(as_box_tensor(boxes, "boxes"), "boxes", device)
    if len(boxes) and not image_sizes:
        raise ValueError(f"images: expected at least one image for the {len(boxes)} boxes, got a batch of none")
    image_index = _check_image_index(image_index, len(boxes), len(image_sizes), device)
    boxes = require_boxes(boxes, image_index, image_sizes, "boxes").to(device).contiguous()
    if image_index is not None:
        image_index = image_index.to(device, torch.int64).contiguous()

    height, width = _check_size(size)
    if interpolation not in INTERPOLATIONS:
        options = " or ".join(map(repr, INTERPOLATIONS))
        raise ValueError(f"interpolation: expected {options}, got {describe(interpolation)}")
    antialias, exact = require_bool(antialias, "antialias"), require_bool(exact, "exact")
    if pad not in (None, "square"):
        raise ValueError(f"pad: expected None or 'square', got {describe(pad)}")
    if shortest_edge is not None and require_length(shortest_edge, "shortest_edge") < max(height, width):
        raise ValueError(
            f"shortest_edge: expected at least size {(height, width)}, which is cut from it, got {shortest_edge}"
        )
    rescale = require_number(rescale, "rescale")
    fill = _per_channel(fill, "fill", channels)
    if not all(0 <= value <= 255 for value in fill):
        raise ValueError(f"fill: expected levels from 0 to 255, got {fill}")
    mean = _per_channel(0.0 if mean is None else mean, "mean", channels)
    std = _per_channel(1.0 if std is None else std, "std", channels)
    if not all(value > 0 for value in std):
        raise ValueError(f"std: expected numbers > 0, got {std}")
    if dtype not in _RESULT_DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {describe(dtype)}")
    backend = check_backend(backend, CROP_BACKENDS)
    pass_order = PassOrder.of_pillow(_check_pillow(pillow))

    def run(images: list[Tensor], image_index: Tensor | None) -> Tensor:
        return ops.crop_resize(
            images,
            boxes,
            image_index,
            [height, width],
            interpolation,
            antialias,
            pad is not None,
            shortest_edge or 0,
            [float(round(value)) for value in fill] if images[0].dtype == torch.uint8 else fill,
            [rescale / deviation for deviation in std],
            [-average / deviation for average, deviation in zip(mean, std)],
            dtype,
            pass_order,
            exact,
            backend,
        )

    if all(tensor.dtype == tensors[0].dtype for tensor in tensors):
        return run(tensors, image_index)
    if all(tensor.dtype != torch.uint8 for tensor in tensors):
        return run([tensor.float() for tensor in tensors], image_index)
    # Levels are rounded in some and not in others. Each kind is run for itself, on an index in which the images of the
    # other do not exist: -1, which costs nothing.
    if image_index is None:
        image_index = torch.arange(len(boxes), device=device)
    is_rounded = torch.tensor([tensor.dtype == torch.uint8 for tensor in tensors])
    exists = (image_index >= 0) & (image_index < len(tensors))
    inside = torch.where(exists, image_index, 0)

    def run_kind(of_kind: Tensor, images: list[Tensor]) -> Tensor:
        places = torch.where(of_kind, of_kind.cumsum(0) - 1, -1).to(device)
        return run(images, torch.where(exists, places[inside], -1))

    rounded = run_kind(is_rounded, [tensor for tensor in tensors if tensor.dtype == torch.uint8])
    floating = run_kind(~is_rounded, [tensor.float() for tensor in tensors if tensor.dtype != torch.uint8])
    return torch.where(is_rounded.to(device)[inside][:, None, None, None], rounded, floating)


def _check_images(images: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """One (B, C, H, W) or several (C, H_i, W_i), and (height, width) of each image."""
    if isinstance(images, Tensor):
        _check_image(images, "images", "(B, 3, H, W)")
        return [images], [(images.shape[2], images.shape[3])] * images.shape[0]
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise TypeError(
            f"images: expected a tensor (B, 3, H, W) or a list of tensors (3, H, W), got {describe(images)}; "
            "finegrain_ops.preprocess takes PIL images too"
        )
    tensors = list(images)
    if not tensors:
        raise ValueError("images: expected at least one image, got an empty list")
    for index, image in enumerate(tensors):
        _check_image(image, f"images[{index}]", "(3, H, W)")
        if image.device != tensors[0].device:
            raise ValueError(f"images[{index}]: expected images[0]'s device {tensors[0].device}, got {image.device}")
        if image.shape[0] != tensors[0].shape[0]:
            raise ValueError(
                f"images[{index}]: expected as many channels as images[0], {tensors[0].shape[0]}, got "
                f"{image.shape[0]}; turn a grey image into RGB with image.expand(3, -1, -1)"
            )
    return tensors, [(image.shape[1], image.shape[2]) for image in tensors]


def _check_image(image: object, name: str, layout: str) -> None:
    tensor = require_tensor(image, name, f"a tensor {layout}")
    if tensor.dim() != layout.count(",") + 1:
        hint = "; add a dimension with images[None]" if layout.startswith("(B") and tensor.dim() == 3 else ""
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(tensor.shape)}{hint}")
    if tensor.dtype not in _IMAGE_DTYPES:
        raise TypeError(f"{name}: expected uint8, or float16, bfloat16 or float32 in 0..255, got {tensor.dtype}")
    if tensor.shape[-3] not in _CHANNELS:
        hint = "; drop the alpha channel with image[:3]" if tensor.shape[-3] == 4 else ""
        if tensor.shape[-1] in (1, 3, 4):
            hint = "; channels come first: image.permute(2, 0, 1)"
        raise ValueError(f"{name}: expected {layout}, three channels or one, got shape {tuple(tensor.shape)}{hint}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: crop_resize has no gradient, but this image requires one; pass image.detach()")


def _check_image_index(
    image_index: Tensor | Sequence[int] | None, num_boxes: int, num_images: int, device: torch.device
) -> Tensor | None:
    if image_index is None:
        if num_images != 1 and num_images != num_boxes:
            raise ValueError(
                f"image_index: expected (K,), the image of each box, for {num_boxes} boxes in {num_images} images; "
                "it may be left out where there is one image, or as many as boxes"
            )
        return None
    if not isinstance(image_index, Tensor):
        image_index = torch.tensor([require_length(index, "image_index") for index in image_index], dtype=torch.int64)
    if image_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"image_index: expected torch.int64 or int32, got {image_index.dtype}")
    require_shape(image_index, "image_index", [(num_boxes,)], "(K,)")
    return _require_device(image_index, "image_index", device)


def _require_device(tensor: Tensor, name: str, device: torch.device) -> Tensor:
    """On `device`, or on the CPU, from where it can go there without waiting."""
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on the images' device {device} or on the CPU, got {tensor.device}")
    return tensor


def _check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else size
    try:
        height, width = (require_length(side, "size") for side in sides)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"size: expected (height, width) in pixels, or one number for both, got {describe(size)}")
    return height, width


def _per_channel(value: float | Sequence[float], name: str, channels: int) -> list[float]:
    values = [value] * channels if isinstance(value, (int, float)) else list(value)
    if len(values) != channels:
        raise ValueError(
            f"{name}: expected a number, or one for each of the {channels} channels, got {describe(value)}"
        )
    return [require_number(number, name) for number in values]


def _check_pillow(pillow: str | None) -> tuple[int, int]:
    """Major and minor version."""
    if pillow is None:
        return INSTALLED_PILLOW or NEWEST_PILLOW
    parts = pillow.split(".") if isinstance(pillow, str) else [""]
    if not all(part.isdecimal() for part in parts[:2]):
        raise ValueError(f'pillow: expected a version such as "12.3", got {describe(pillow)}')
    return int(parts[0]), int(parts[1]) if len(parts) > 1 else 0
