"""`crop_resize` against Pillow, called as its users call it, and against torch; its arguments, and what it refuses.

Backends against the reference: crop_cases.py, whose cases run here for the backends of a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
pytest.importorskip("PIL", reason="Pillow is what the results equal")
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crop_cases import ALL_CASES, CropCase, check
from devices import DEVICE, crop_ways
from finegrain_ops import UnsupportedInputError, crop_resize
from finegrain_ops.backends.crops.interface import INSTALLED_PILLOW, PassOrder

EXACT = crop_ways()
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@functools.cache
def photograph(name: str) -> Tensor:
    """(3, H, W) uint8; noise where scikit-image is not installed."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randint(0, 256, (3, 311, 402), generator=generator, dtype=torch.uint8)
    if name == "noise":
        return noise.to(DEVICE)
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    return torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).to(DEVICE)


def as_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


def levels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def levels(images: Tensor | list[Tensor], boxes: object, size: object, **options: object) -> Tensor:
    return crop_resize(images, boxes, size=size, rescale=1, **options).cpu()


# ------------------------------------------------------------------------------------------------- equal to Pillow


@st.composite
def integer_boxes(draw: st.DrawFn, height: int, width: int) -> tuple[int, int, int, int]:
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))


@st.composite
def fractional_boxes(draw: st.DrawFn, height: int, width: int) -> tuple[float, float, float, float]:
    edges = []
    for length in (width, height):
        low = draw(st.floats(0, length - 0.01))
        edges.append((low, draw(st.floats(low + 0.005, length))))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


SIZES = st.one_of(st.just((336, 336)), st.tuples(st.integers(1, 260), st.integers(1, 260)))


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("name", ["noise", "chelsea", "coffee"])
@settings(max_examples=15, deadline=None)
@given(data=st.data(), size=SIZES, interpolation=st.sampled_from(list(FILTERS)))
def test_integer_boxes_equal_pillow(
    name: str, backend: str, data: st.DataObject, size: tuple, interpolation: str
) -> None:
    image = photograph(name)
    box = data.draw(integer_boxes(*image.shape[1:]))
    expected = levels_of(as_pillow(image).crop(box).resize(size[::-1], FILTERS[interpolation]))
    actual = levels([image], [box], size, interpolation=interpolation, backend=backend)[0]
    assert torch.equal(actual, expected.float())


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), size=SIZES, interpolation=st.sampled_from(list(FILTERS)))
def test_fractional_boxes_equal_pillow(backend: str, data: st.DataObject, size: tuple, interpolation: str) -> None:
    """Pillow resizes a part of an image if it is given one; outer is the whole pixels that the part touches."""
    image = photograph("noise")
    box = data.draw(fractional_boxes(*image.shape[1:]))
    outer = (*np.floor(box[:2]).astype(int), *np.ceil(box[2:]).astype(int))
    inner = np.array(box) - np.array([*outer[:2], *outer[:2]])
    expected = as_pillow(image).crop(outer).resize(size[::-1], FILTERS[interpolation], box=tuple(inner))
    actual = levels([image], [box], size, interpolation=interpolation, backend=backend)[0]
    assert torch.equal(actual, levels_of(expected).float())


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=20, deadline=None)
@given(
    data=st.data(), size=st.tuples(st.integers(1, 90), st.integers(1, 90)), fill=st.tuples(*[st.integers(0, 255)] * 3)
)
def test_letterboxed_crops_equal_pillow(backend: str, data: st.DataObject, size: tuple, fill: tuple) -> None:
    image = photograph("noise")
    box = data.draw(integer_boxes(*image.shape[1:]))
    crop = as_pillow(image).crop(box)
    side = max(crop.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(crop, ((side - crop.size[0]) // 2, (side - crop.size[1]) // 2))
    expected = levels_of(square.resize(size[::-1], FILTERS["bicubic"]))
    assert torch.equal(levels([image], [box], size, pad="square", fill=fill, backend=backend)[0], expected.float())


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=20, deadline=None)
@given(data=st.data(), edge=st.integers(20, 60), size=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_shortest_edge_equals_pillow(backend: str, data: st.DataObject, edge: int, size: tuple) -> None:
    image = photograph("noise")
    box = data.draw(
        integer_boxes(*image.shape[1:]).filter(
            lambda b: max(b[2] - b[0], b[3] - b[1]) < 60 * min(b[2] - b[0], b[3] - b[1])
        )
    )
    crop = as_pillow(image).crop(box)
    short, long = sorted(crop.size)
    new_long = int(edge * long / short)
    width, height = (edge, new_long) if crop.size[0] <= crop.size[1] else (new_long, edge)
    whole = levels_of(crop.resize((width, height), FILTERS["bicubic"]))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    expected = whole[:, top : top + size[0], left : left + size[1]]
    assert torch.equal(levels([image], [box], size, shortest_edge=edge, backend=backend)[0], expected.float())


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("box", [(3.5, 1.5, 88, 30), (10.9, 10.9, 13.1, 40.2)])
def test_the_shortest_edge_of_fractional_boxes_is_that_of_their_whole_pixels(backend: str, box: tuple) -> None:
    image, edge, size = photograph("noise"), 40, (31, 27)
    outer = (*np.floor(box[:2]).astype(int), *np.ceil(box[2:]).astype(int))
    crop = as_pillow(image).crop(outer)
    width, height = (int(edge * side / min(crop.size)) for side in crop.size)
    inner = tuple(np.array(box) - np.array([*outer[:2], *outer[:2]]))
    whole = levels_of(crop.resize((width, height), FILTERS["bicubic"], box=inner))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    expected = whole[:, top : top + size[0], left : left + size[1]]
    assert torch.equal(levels([image], [box], size, shortest_edge=edge, backend=backend)[0], expected.float())


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_floating_images_equal_pillow(backend: str, interpolation: str) -> None:
    """Its mode "F", channel by channel: neither rounded nor clipped."""
    image = photograph("noise").float() * 1.25 - 30
    box = (3, 5, 300, 77)
    channels = [Image.fromarray(channel.cpu().numpy()).crop(box) for channel in image]
    expected = np.stack([np.array(channel.resize((400, 60), FILTERS[interpolation])) for channel in channels])
    actual = levels([image], [box], (60, 400), interpolation=interpolation, backend=backend)[0]
    assert actual.max() > 255
    assert actual.min() < 0
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=255 * 2.0**-20, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1300, 13), (1301, 13), (900, 9), (700, 20)])
@pytest.mark.parametrize("size", [(30, 12), (30, 60), (1400, 5)])
def test_tall_crops_equal_pillow(height: int, width: int, size: tuple[int, int]) -> None:
    """Some of which Pillow 12.2, and others Pillow 13, puts through the vertical pass first."""
    generator = torch.Generator().manual_seed(height)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8).to(DEVICE)
    expected = levels_of(as_pillow(image).resize(size[::-1], FILTERS["bicubic"])).float()
    for backend in ("auto", "reference"):
        assert torch.equal(levels([image], [(0, 0, width, height)], size, backend=backend)[0], expected)


@pytest.mark.parametrize(
    ("pillow", "is_vertical_first"),
    [
        ("11.3", lambda height, width, new_height, new_width: False),
        ("12.1", lambda height, width, new_height, new_width: False),
        ("12.2", lambda height, width, new_height, new_width: height > 100 * width and height > new_height),
        ("13.0", lambda height, width, new_height, new_width: height - new_height > max(0, 2 * (width - new_width))),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(1300, 13), (1301, 13), (40, 20), (20, 40)])
@pytest.mark.parametrize("size", [(30, 12), (30, 60), (1400, 5), (20, 10), (1301, 9)])
def test_pass_orders(pillow: str, is_vertical_first: Callable, height: int, width: int, size: tuple[int, int]) -> None:
    """Whichever Pillow is installed: resized along one axis and then along the other, in the order of that version."""
    generator = torch.Generator().manual_seed(height)
    image = torch.randint(0, 2, (3, height, width), generator=generator, dtype=torch.uint8).mul(255).to(DEVICE)
    new_height, new_width = size
    between = (width, new_height) if is_vertical_first(height, width, *size) else (new_width, height)
    expected = as_pillow(image).resize(between, FILTERS["bicubic"]).resize((new_width, new_height), FILTERS["bicubic"])
    for backend in ("reference", "auto"):
        actual = levels([image], [(0, 0, width, height)], size, pillow=pillow, backend=backend)[0]
        assert torch.equal(actual, levels_of(expected).float())


def test_grey_images_equal_pillow() -> None:
    image = photograph("noise")[:1]
    expected = Image.fromarray(image[0].cpu().numpy()).crop((5, 6, 70, 90)).resize((40, 30), FILTERS["bicubic"])
    assert torch.equal(levels([image], [(5, 6, 70, 90)], (30, 40))[0, 0], torch.from_numpy(np.array(expected)).float())


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(20, 31), (150, 140)])
def test_without_antialiasing_equals_interpolate(interpolation: str, size: tuple[int, int]) -> None:
    image = photograph("noise").float()
    crop = image[None, :, 4:104, 10:91]
    expected = F.interpolate(crop, size, mode=interpolation, align_corners=False)
    actual = crop_resize(
        [image], [(10, 4, 91, 104)], size=size, rescale=1, interpolation=interpolation, antialias=False
    )
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)  # interpolate computes coordinates in float32


# ----------------------------------------------------------------------------------------------------- backends agree


@pytest.mark.skipif(DEVICE != "cpu", reason="Pillow runs on the CPU")
@pytest.mark.parametrize("case", ALL_CASES)
def test_pillow_backend(case: CropCase) -> None:
    wanted = tuple(int(part) for part in case.options.get("pillow", "").split(".") if part) or INSTALLED_PILLOW
    other_order = PassOrder.of_pillow(wanted) != PassOrder.of_pillow(INSTALLED_PILLOW)
    if not case.options.get("antialias", True) or other_order:
        with pytest.raises(UnsupportedInputError, match="Pillow"):
            check(case, "pillow")
    else:
        check(case, "pillow")


@pytest.mark.skipif(DEVICE != "cpu", reason="interpolate takes uint8 images on the CPU only")
@pytest.mark.parametrize("case", ALL_CASES)
def test_inexact_crops(case: CropCase) -> None:
    """Whichever backend takes the case: at most 3 levels off."""
    check(CropCase(**{**vars(case), "options": {**case.options, "exact": False}}), "auto", levels=3)


@pytest.mark.skipif(DEVICE != "cpu", reason="interpolate takes uint8 images on the CPU only")
@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=SIZES, antialias=st.booleans(), stripes=st.integers(0, 9))
def test_interpolate_is_at_most_three_levels_off(
    data: st.DataObject, size: tuple, antialias: bool, stripes: int
) -> None:
    image = photograph("noise")
    if stripes:  # what the filter overshoots
        rows, columns = (torch.arange(length) // stripes for length in image.shape[1:])
        image = ((rows[:, None] + columns) % 2 * 255).to(torch.uint8).expand_as(image)
    box = data.draw(integer_boxes(*image.shape[1:]))
    expected = levels([image], [box], size, antialias=antialias, backend="reference")
    actual = levels([image], [box], size, antialias=antialias, exact=False, backend="interpolate")
    assert (actual - expected).abs().max() <= 3
