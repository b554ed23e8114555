"""Which tokens a box falls on, asked of the families' own image processors: paint the box, see which tokens change.

A resized edge is not sharp. A pixel weighs in those of the result whose centre is within 2 pixels (of the result, or of
the image where it is enlarged) of its own, so what a box changes ends within `blur` of its edges, and by `blur` inside
of them all has changed. Boxes whose edges are further than that from the border of a token tell it exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import finegrain_ops
from finegrain_ops import families
from finegrain_ops.geometry import smart_resize
from finegrain_ops.integrations.llava import pixel_map
from image_processor_cases import blip, image_processor, llava, qwen2_vl, qwen3_vl, square
from tiny_models import IMAGE_TOKEN, PATCH, SIDE, TINY

BACKGROUND, PAINT = 64, 192  # so that what a filter overshoots is seen as well


class LlavaNext:
    """LLaVA-NeXT's image processor; of what it makes of an image, one of the two that become grids of tokens."""

    def __init__(self, **options: Any) -> None:
        sizes = {"size": {"shortest_edge": 336}, "crop_size": square(336)}
        self.processor = image_processor("LlavaNextImageProcessor", **sizes, **options)

    def __call__(self, images: Image.Image, return_tensors: str) -> dict[str, Tensor]:
        pixel_values = self.processor(images=images, return_tensors=return_tensors)["pixel_values"]
        return {"pixel_values": self.part(pixel_values[0], images.size[::-1])[None]}


class WholeImage(LlavaNext):
    def part(self, pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
        return pixel_values[0]


class Tiles(LlavaNext):
    def part(self, pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
        """The tiles side by side, and without the tokens that the model's own unpad_image takes away."""
        rows, columns = get_anyres_image_grid_shape(size, self.processor.image_grid_pinpoints, 336)
        tiles = pixel_values[1:].reshape(rows, columns, 3, 24, 14, 24, 14).permute(2, 4, 6, 0, 3, 1, 5)
        tokens = unpad_image(tiles.reshape(3 * 14 * 14, rows * 24, columns * 24), size)
        kept_rows, kept_columns = tokens.shape[1:]
        pixels = tokens.reshape(3, 14, 14, kept_rows, kept_columns).permute(0, 3, 1, 4, 2)
        return pixels.reshape(3, kept_rows * 14, kept_columns * 14)


# The smallest limit of pixels keeps these images from being enlarged much, which would blur more than half a token.
FAMILIES = {
    "LLaVA": (families.llava, llava()),
    "LLaVA padded": (lambda size: families.llava(size, do_pad=True), llava(do_pad=True)),
    "LLaVA-NeXT, whole image": (lambda size: families.llava_next(size)[0], WholeImage()),
    "LLaVA-NeXT, tiles": (lambda size: families.llava_next(size)[1], Tiles()),
    "LLaVA-NeXT, one tile": (
        lambda size: families.llava_next(size, grid_pinpoints=[(336, 336)])[1],
        Tiles(image_grid_pinpoints=[[336, 336]]),
    ),
    "InstructBLIP": (families.instructblip, blip()),
    "BLIP-2": (families.blip2, blip()),
    # Its own processor, outside of transformers, does the same: resize to 448 x 448.
    "Qwen-VL": (families.qwen_vl, blip(448)),
    "Qwen2-VL": (families.qwen2_vl, qwen2_vl()),
    "Qwen2.5-VL, fewer pixels": (
        lambda size: families.qwen2_5_vl(size, max_pixels=28 * 28 * 100),
        qwen2_vl(max_pixels=28 * 28 * 100),
    ),
    "Qwen3-VL": (families.qwen3_vl, qwen3_vl()),
}


@dataclass
class Painting:
    grid: families.ImageGrid
    processor: Any
    image_size: tuple[int, int]

    def tokens_changed_by(self, box: tuple[int, int, int, int]) -> Tensor:
        """(rows, columns) bool."""
        image = np.full((*self.image_size, 3), BACKGROUND, dtype=np.uint8)
        before = self.processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        x0, y0, x1, y1 = box
        image[y0:y1, x0:x1] = PAINT
        change = self.processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"] != before
        rows, columns = self.grid.shape
        if change.dim() == 2:  # patches, those of a token one after the other
            return change.reshape(rows, columns, -1).any(2)
        return (
            change[0].reshape(3, rows, self.grid.token_size[0], columns, self.grid.token_size[1]).any(4).any(2).any(0)
        )

    @property
    def axes(self) -> list[tuple[Any, int, int]]:
        """x and y: the map, the side of a token, the image's side."""
        pixels, token_size, size = self.grid.pixels, self.grid.token_size, self.image_size
        return [(pixels.x, token_size[1], size[1]), (pixels.y, token_size[0], size[0])]


def blur(scale: float) -> float:
    """In processed pixels, along an axis of that scale: the filter, and half a pixel of the image and of the result."""
    return 2.5 * max(1.0, scale) + 0.5


@st.composite
def paintings(draw, family: tuple[Callable[..., families.ImageGrid], Any]) -> Painting:
    size = draw(st.integers(150, 700)), draw(st.integers(150, 700))
    return Painting(family[0](size), family[1], size)


@st.composite
def edges_within_tokens(draw, axis: Any, token: int, side: int) -> tuple[int, int]:
    """Two edges further than the blur from every border of a token, or as far in what is cut away, or of the image."""
    margin = blur(float(axis.scale))
    places = {x: float(axis(x)) for x in range(side + 1)}
    clear = [
        x
        for x, place in places.items()
        if min(place % token, -place % token) > margin
        or not -margin <= place <= axis.length + margin
        or (x in (0, side) and place in (0, axis.length))  # nothing lies beyond
    ]
    low = draw(st.sampled_from(clear))
    above = [x for x in clear if places[x] - places[low] >= 2]  # or nothing may be left of the box
    assume(above)
    return low, draw(st.sampled_from(above))


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_exactly_the_predicted_tokens_change(name: str, data: st.DataObject) -> None:
    painting = data.draw(paintings(FAMILIES[name]))
    (x0, x1), (y0, y1) = (data.draw(edges_within_tokens(*axis)) for axis in painting.axes)
    changed = painting.tokens_changed_by((x0, y0, x1, y1))
    assert torch.equal(changed, painting.grid.masks([(x0, y0, x1, y1)])[0])


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_any_box_changes_what_it_covers_and_nothing_beyond(name: str, data: st.DataObject) -> None:
    painting = data.draw(paintings(FAMILIES[name]))
    wider, narrower, box = [], [], []
    for axis, _, side in painting.axes:
        low, high = sorted(data.draw(st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True)))
        margin = blur(float(axis.scale)) / float(axis.scale)
        box.append((low, high))
        wider.append((low - margin, high + margin))
        narrower.append((low + margin, high - margin))
    changed = painting.tokens_changed_by((box[0][0], box[1][0], box[0][1], box[1][1]))
    boxes = [(x[0], y[0], x[1], y[1]) for x, y in (box, wider, narrower)]
    predicted, at_most, at_least = painting.grid.masks(boxes)
    if any(low >= high for low, high in narrower):
        at_least = torch.zeros_like(changed)
    assert not (changed & ~at_most).any()
    assert not (at_least & ~changed).any()
    assert not (predicted & ~at_most).any()
    assert not (at_least & ~predicted).any()


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)) | st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.sampled_from([14, 28, 32]),
    st.sampled_from([(56 * 56, 28 * 28 * 1280), (65536, 16777216), (28 * 28 * 4, 28 * 28 * 5), (1000, 100000)]),
)
@settings(max_examples=300, deadline=None)
def test_smart_resize_is_that_of_transformers(size: tuple[int, int], factor: int, limits: tuple[int, int]) -> None:
    theirs = sys.modules[type(qwen2_vl()).__module__].smart_resize
    try:
        expected = theirs(*size, factor, *limits)
    except ValueError:
        with pytest.raises(ValueError, match="sides of at most 200 : 1"):
            smart_resize(size, factor, *limits)
    else:
        assert smart_resize(size, factor, *limits) == expected


@pytest.mark.parametrize("do_pad", [False, True])
def test_patched_llava_sees_the_same_geometry(do_pad: bool) -> None:
    for size in ((480, 640), (641, 333), (336, 336)):
        assert pixel_map(llava(do_pad=do_pad), size) == families.llava(size, do_pad=do_pad).pixels


# Sizes that need little resizing, and boxes whose edges are further than its blur from the border of a token, of both
# grids in LLaVA-NeXT. The last box is where the tiles of LLaVA-NeXT lose the edge of the image.
SIZES = [(48, 48), (24, 72), (48, 40)]
BOXES = [[(6, 18, 30, 42)], [(9, 5, 45, 19)], [(15, 6, 25, 30), (0, 42, 2, 48)]]


def image_tokens_changed(name: str, model: Any, before: Any, after: Any) -> Tensor:
    """(number of image tokens in the batch,) bool, as the model puts the pixels' features in their place."""
    change = before["pixel_values"] != after["pixel_values"]
    if change.dim() == 2:
        return change.reshape(-1, 4 * change.shape[1]).any(1)
    count = SIDE // PATCH
    of_tiles = change.reshape(len(change), -1, 3, count, PATCH, count, PATCH).any(6).any(4).any(2).flatten(2)
    if name == "LLaVA-1.5":
        return of_tiles.flatten()
    counts = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, SIDE) for size in SIZES]
    features = [tiles[:n, :, None].int() for tiles, n in zip(of_tiles, counts)]
    packed, _ = model.model.pack_image_features(features, before["image_sizes"], "default", torch.zeros(1).int())
    return torch.cat(packed)[:, 0].bool()


@pytest.mark.parametrize("painted", [[0, 1, 2], [1]], ids=["every image", "the second image"])
@pytest.mark.parametrize("name", TINY)
def test_regions_of_a_patched_model_are_the_tokens_that_change(name: str, painted: list[int]) -> None:
    """Two images in the first prompt and one in the second, through the whole processor."""
    model, inputs = TINY[name].make_model(), []
    boxes = [of_image if i in painted else [] for i, of_image in enumerate(BOXES)]
    for colour in (BACKGROUND, PAINT):
        images = [np.full((*size, 3), BACKGROUND, dtype=np.uint8) for size in SIZES]
        for image, of_image in zip(images, boxes):
            for x0, y0, x1, y1 in of_image:
                image[y0:y1, x0:x1] = colour
        inputs.append(TINY[name].processed([Image.fromarray(image) for image in images], (2, 1)))
    with finegrain_ops.patch(model, TINY[name].make_processor()) as handle:
        mask = handle.region_mask(inputs[0], boxes, SIZES)
    is_image = inputs[0]["input_ids"] == IMAGE_TOKEN
    assert torch.equal(mask[is_image], image_tokens_changed(name, model, *inputs))
    assert not mask[~is_image].any()
    assert mask.any(1).tolist() == [True, len(painted) == 3]
