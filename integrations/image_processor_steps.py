"""What an image processor of transformers is set to do, read from its attributes: `read_steps`.

Of every flag it is said what it means for the pixels; what `preprocess` cannot do is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedInputError

# The steps that not every class has. A name stands for all backends of the class: with "Fast" or "Pil" at its end, too.
_CLASSES = {
    "CLIPImageProcessor": {"do_center_crop"},
    "LlavaImageProcessor": {"do_pad", "do_center_crop"},
    "LlavaNextImageProcessor": {"do_pad", "do_center_crop", "tiles"},
    "BlipImageProcessor": set(),
    "Qwen2VLImageProcessor": {"patches"},
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic", None: "bilinear"}


@dataclass(frozen=True)
class Patches:
    """How Qwen2-VL cuts a resized image up; see geometry.smart_resize."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int


@dataclass(frozen=True)
class Tiles:
    """Into what LLaVA-NeXT cuts an image, beside the whole of it; see families.llava_next."""

    side: int
    grid_pinpoints: tuple[tuple[int, int], ...]  # (height, width), multiples of side
    do_pad: bool  # with zeros, to the largest number of tiles in the call


@dataclass(frozen=True)
class Steps:
    """What an image processor is set to do."""

    do_convert_rgb: bool
    do_pad: bool  # to a square
    fill: tuple[int, ...]
    shortest_edge: int | None
    size: tuple[int, int] | None  # without shortest_edge and patches
    cut: tuple[int, int] | None  # from the centre
    interpolation: str
    rescale: float
    mean: Any
    std: Any
    patches: Patches | None
    tiles: Tiles | None


def read_steps(image_processor: Any) -> Steps:
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

    if not flag("do_resize", True) and "tiles" not in _CLASSES[name]:  # tiles have their size without it
        raise refuse("do_resize=False, which keeps each crop's own size,")
    for optional in ("do_pad", "do_center_crop"):
        if flag(optional, False) and optional not in _CLASSES[name]:
            raise refuse(f"{optional}=True")
    resample = getattr(image_processor, "resample", None)
    resample = getattr(resample, "value", resample)
    if resample not in _INTERPOLATIONS:
        raise refuse(f"resample={image_processor.resample!r}, neither bilinear nor bicubic,")

    size = sides("size")
    shortest_edge = fixed_size = cut = patches = tiles = None
    do_pad = flag("do_pad", False)
    if "patches" in _CLASSES[name]:
        patches = _read_patches(image_processor, size, refuse)
    elif "tiles" in _CLASSES[name]:
        tiles = _read_tiles(image_processor, size, sides("crop_size"), do_pad, refuse)
        fixed_size, do_pad = (tiles.side, tiles.side), False
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
    return Steps(
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
        tiles=tiles,
    )


def _read_patches(image_processor: Any, size: dict[str, int], refuse: Any) -> Patches:
    limits = pixel_limits(image_processor)
    if not all(limits):
        raise refuse(f"size={size} instead of shortest_edge and longest_edge")
    return Patches(
        image_processor.patch_size,
        image_processor.merge_size,
        image_processor.temporal_patch_size,
        *limits,
    )


def _read_tiles(
    image_processor: Any, size: dict[str, int], crop_size: dict[str, int], do_pad: bool, refuse: Any
) -> Tiles:
    """Only tiles of the very size that comes next, as all checkpoints have it, are not resized a second time."""
    sides = {*size.values(), *crop_size.values()}
    is_square = set(size) in ({"shortest_edge"}, {"height", "width"}) and set(crop_size) == {"height", "width"}
    if not is_square or len(sides) > 1:
        raise refuse(f"size={size} and crop_size={crop_size} instead of one side for all tiles")
    side, pinpoints = sides.pop(), image_processor.image_grid_pinpoints
    try:
        grid_pinpoints = tuple((height, width) for height, width in pinpoints)
        is_cut_evenly = all(length > 0 and length % side == 0 for pinpoint in grid_pinpoints for length in pinpoint)
    except (TypeError, ValueError):
        grid_pinpoints, is_cut_evenly = (), False
    if not grid_pinpoints or not is_cut_evenly:
        raise refuse(f"image_grid_pinpoints={pinpoints} instead of a list of (height, width) in multiples of {side}")
    return Tiles(side, grid_pinpoints, do_pad)


def pixel_limits(image_processor: Any) -> list[int | None]:
    """min_pixels and max_pixels of Qwen2-VL. The older pair of attributes wins over `size` where it is set, as it does
    in the processor.
    """
    limits = []
    for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        limit = getattr(image_processor, name, None)
        limits.append(image_processor.size.get(key) if limit is None else limit)
    return limits
