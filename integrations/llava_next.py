"""LLaVA-NeXT (Liu et al., llava-vl.github.io/blog/2024-01-30-llava-next) as transformers implements it:
`LlavaNextForConditionalGeneration`.

An image is two grids of tokens: the whole of it squashed to a square, then its tiles put together to one finer grid,
each row of which ends with a newline token, which shows no place. The finer grid goes without its rows or columns of
padding: `families.llava_next`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import families
from ..errors import UnsupportedModelError
from ..families import ImageGrid
from . import decoder
from .changes import Changes
from .decoder import key_shape, read
from .family import ImageSizes, ImageTokens, positions_of_images

__all__ = [
    "box_convention",
    "image_keys",
    "image_tokens",
    "install",
    "key_shape",
    "read",
    "vision_encoder",
]

_NEWLINE = -1


def install(changes: Changes, model: nn.Module) -> Sequence[nn.Module]:
    return decoder.install(changes, model, _core(model).language_model)


def vision_encoder(model: nn.Module) -> nn.Module:
    return _core(model).vision_tower


def image_keys(model: nn.Module, inputs: Any) -> Tensor:
    keys = inputs["input_ids"] == model.config.image_token_id
    sizes = _sizes(inputs)
    packed = [_packed(model, size, _grids(model, size)) for size in sizes]
    shows_a_place = torch.cat([torch.zeros(0, dtype=torch.bool), *(places[:, 0] != _NEWLINE for places in packed)])
    if len(shows_a_place) != int(keys.sum()):
        raise ValueError(
            f"inputs: expected {len(shows_a_place)} image tokens for the {len(sizes)} images of its image_sizes, got "
            f"{int(keys.sum())}; pass what the processor returned"
        )
    return keys.masked_scatter(keys, shows_a_place.to(keys.device))


def image_tokens(model: nn.Module, processor: Any, inputs: Any, image_sizes: ImageSizes) -> list[ImageTokens]:
    _require_fit(model, processor)
    seen = _sizes(inputs)
    if len(seen) != len(image_sizes):
        raise ValueError(
            f"image_sizes: expected one for each of the {len(seen)} images of inputs, got {len(image_sizes)}"
        )
    for i, (own, size) in enumerate(zip(seen, image_sizes)):
        if own != size:
            raise ValueError(f"image_sizes[{i}]: expected {own} (height, width) as inputs has it, got {size}")
    grids = [_grids(model, size) for size in image_sizes]
    packed = [_packed(model, size, of_image) for size, of_image in zip(image_sizes, grids)]
    places = positions_of_images(inputs, model.config.image_token_id, [len(p) for p in packed])
    found = []
    for i, ((batch_index, positions), of_image, shown) in enumerate(zip(places, grids, packed)):
        positions = positions[shown[:, 0] != _NEWLINE]
        counts = [grid.num_keys for grid in of_image]
        found += [ImageTokens(i, batch_index, p, grid) for p, grid in zip(positions.split(counts), of_image)]
    return found


def box_convention(processor: Any) -> str:
    """0..1 of the image padded to a square, as the original LLaVA's data of boxes."""
    return "unit_padded"


def _core(model: nn.Module) -> Any:
    return getattr(model, "model", model)


def _sizes(inputs: Any) -> ImageSizes:
    """What the processor noted of its images: (height, width) each."""
    return [(int(height), int(width)) for height, width in inputs.get("image_sizes", [])]


def _grids(model: nn.Module, size: tuple[int, int]) -> tuple[ImageGrid, ImageGrid]:
    vision = model.config.vision_config
    return families.llava_next(
        size,
        side=vision.image_size,
        patch_size=vision.patch_size,
        grid_pinpoints=model.config.image_grid_pinpoints,
    )


def _packed(model: nn.Module, size: tuple[int, int], grids: tuple[ImageGrid, ImageGrid]) -> Tensor:
    """(number of tokens, 2) int64: the (row, column) that each token of an image shows, or _NEWLINE; in the first grid,
    then among all rows and columns of the tiles, cut or not.

    Asked of the model's own `pack_image_features`, which gets places as if they were features.
    """
    base, tiles = grids
    side = base.shape[0]
    height, width = families.best_resolution(size, model.config.image_grid_pinpoints)
    rows, columns = height // base.pixels.size[0], width // base.pixels.size[1]  # of tiles
    in_base, in_tiles = _places(side, side), _places(rows * side, columns * side)
    cut = in_tiles.reshape(rows, side, columns, side, 2).transpose(1, 2).reshape(-1, side * side, 2)
    (packed,), _ = _core(model).pack_image_features(
        [torch.cat([in_base.reshape(1, -1, 2), cut])],
        torch.tensor([size]),
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_newline=torch.tensor([_NEWLINE, _NEWLINE]),
    )
    # unpad_image cuts as much from both sides
    top, left = (rows * side - tiles.shape[0]) // 2, (columns * side - tiles.shape[1]) // 2
    expected = in_tiles[top : top + tiles.shape[0], left : left + tiles.shape[1]]
    expected = torch.nn.functional.pad(expected, (0, 0, 0, 1), value=_NEWLINE)
    if not torch.equal(packed, torch.cat([in_base.reshape(-1, 2), expected.reshape(-1, 2)])):
        raise UnsupportedModelError(
            f"{type(model).__name__}: this version of transformers puts the tiles of an image of {size} (height, "
            "width) together in another way than finegrain_ops knows"
        )
    return packed


def _places(rows: int, columns: int) -> Tensor:
    """(rows, columns, 2) int64."""
    return torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=2)


def _require_fit(model: nn.Module, processor: Any) -> None:
    """The image processor must make tiles of the model's size, of the resolutions that the model expects."""
    image_processor, side = processor.image_processor, model.config.vision_config.image_size
    pinpoints = getattr(image_processor, "image_grid_pinpoints", None)
    if pinpoints is None or [tuple(p) for p in pinpoints] != [tuple(p) for p in model.config.image_grid_pinpoints]:
        raise ValueError(
            f"processor: expected an image processor with the model's image_grid_pinpoints "
            f"{model.config.image_grid_pinpoints}, got {type(image_processor).__name__} with {pinpoints}"
        )
    for name in ("size", "crop_size"):
        sides = {key: value for key, value in dict(getattr(image_processor, name)).items() if value is not None}
        if set(sides.values()) != {side}:
            raise ValueError(f"processor: expected {name} of {side}, the side of the model's tiles, got {sides}")
