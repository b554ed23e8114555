"""`preprocess` against the processors themselves, which get the crops that Pillow makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

pytest.importorskip("hypothesis", reason="hypothesis draws the boxes")
from hypothesis import given, settings
from hypothesis import strategies as st

import finegrain_ops
from finegrain_ops import UnsupportedInputError, preprocess
from image_processor_cases import (
    RELEASED,
    SMALL,
    assert_equal,
    expected,
    image_processor,
    llava,
    noise,
    qwen2_vl,
    square,
)

Box = tuple[int, int, int, int]

COFFEE, CHELSEA = (Image.fromarray(photograph()) for photograph in (skimage.data.coffee, skimage.data.chelsea))


@pytest.mark.parametrize("name", RELEASED)
def test_photographs_as_the_released_checkpoints_see_them(name: str) -> None:
    boxes = [[(0, 0, 600, 400), (13, 7, 290, 395), (200, 100, 260, 117)], [(100, 50, 250, 200), (400, 3, 451, 290)]]
    crops = [image.crop(box) for image, image_boxes in zip((COFFEE, CHELSEA), boxes) for box in image_boxes]
    for options in ({"do_normalize": False}, {}):
        processor = RELEASED[name](**options)
        actual = preprocess([COFFEE, CHELSEA], boxes, processor)
        assert_equal(actual, expected(processor, crops), 1.0 if options else min(processor.image_std))


@st.composite
def images_and_boxes(draw) -> tuple[list[np.ndarray], list[list[Box]]]:
    images, boxes = [], []
    for _ in range(draw(st.integers(1, 2))):
        height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
        images.append(noise(height, width, draw(st.integers(0, 9))))
        boxes.append([])
        for _ in range(draw(st.integers(0, 3))):
            x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
            boxes[-1].append((x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))))
    return images, boxes


@pytest.mark.parametrize("name", SMALL)
@given(drawn=images_and_boxes())
@settings(max_examples=20, deadline=None)
def test_any_integer_boxes(name: str, drawn) -> None:
    images, boxes = drawn
    crops = [Image.fromarray(image).crop(box) for image, own in zip(images, boxes) for box in own]
    processor, levels = SMALL[name](), SMALL[name](do_normalize=False, do_rescale=False)
    actual = preprocess(images, boxes, processor), preprocess(images, boxes, levels)
    if not crops:  # processors refuse an empty list
        of_one = expected(processor, [COFFEE])
        shape = (1, *of_one["pixel_values"].shape[2:]) if "image_sizes" in of_one else of_one["pixel_values"].shape[1:]
        assert actual[0]["pixel_values"].shape == (0, *shape)
        assert all(actual[0][name].shape == (0, of_one[name].shape[1]) for name in set(of_one) - {"pixel_values"})
        return
    assert_equal(actual[0], expected(processor, crops), min(processor.image_std))
    assert torch.equal(actual[1]["pixel_values"], expected(levels, crops)["pixel_values"].float())


@pytest.mark.parametrize("name", SMALL)
def test_crops_of_one_and_of_three_pixels(name: str) -> None:
    boxes = [(5, 6, 6, 7), (0, 0, 3, 3), (10, 20, 13, 21), (90, 100, 91, 103), (599, 399, 600, 400)]
    processor = SMALL[name]()
    crops = [COFFEE.crop(box) for box in boxes]
    assert_equal(preprocess(COFFEE, boxes, processor), expected(processor, crops), min(processor.image_std))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_modes_of_pil_images_become_rgb_as_in_the_processor(mode: str) -> None:
    image = COFFEE.convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(noise(400, 600)[..., 0]))
    processor = SMALL["BLIP"]()
    box = (20, 10, 300, 320)
    assert_equal(preprocess(image, [box], processor), expected(processor, [image.crop(box)]), 0.26)
    plain = SMALL["BLIP"](do_convert_rgb=False)
    with pytest.raises(ValueError, match=f"images: expected an RGB image, got mode '{mode}'"):
        preprocess(image, [box], plain)
    assert_equal(preprocess(COFFEE, [box], plain), expected(plain, [COFFEE.crop(box)]), 0.26)


def test_transparent_colour_of_an_rgb_image() -> None:
    image = COFFEE.copy()
    image.info["transparency"] = image.getpixel((30, 30))
    box, processor = (20, 10, 300, 320), SMALL["BLIP"]()
    assert_equal(preprocess(image, [box], processor), expected(processor, [image.crop(box)]), 0.26)


def test_ways_to_pass_the_same_images_and_boxes() -> None:
    processor = SMALL["LLaVA"]()
    boxes = [(20, 10, 300, 320), (0, 0, 600, 400)]
    alike = preprocess(COFFEE, boxes, processor)["pixel_values"]
    array = np.array(COFFEE)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    read_only, mirrored = array.copy(), array[:, ::-1].copy()[:, ::-1]
    read_only.setflags(write=False)
    for image in (array, tensor, tensor.contiguous(), read_only, mirrored):
        assert torch.equal(preprocess(image, boxes, processor)["pixel_values"], alike)
    for same in (
        torch.tensor(boxes),
        torch.tensor(boxes, dtype=torch.float32),
        np.array(boxes),
        list(map(list, boxes)),
    ):
        assert torch.equal(preprocess(COFFEE, same, processor)["pixel_values"], alike)
        assert torch.equal(preprocess([COFFEE], [same], processor)["pixel_values"], alike)
        assert torch.equal(preprocess([CHELSEA, COFFEE], [[], same], processor)["pixel_values"], alike)
    wrapped = SimpleNamespace(image_processor=processor)  # as a processor has it
    assert torch.equal(preprocess(COFFEE, boxes, wrapped)["pixel_values"], alike)
    assert torch.equal(preprocess(COFFEE, boxes[0], processor)["pixel_values"], alike[:1])
    assert torch.equal(preprocess(COFFEE, torch.tensor(boxes[1]), processor)["pixel_values"], alike[1:])
    assert torch.equal(preprocess([COFFEE, CHELSEA], [boxes[1], []], processor)["pixel_values"], alike[1:])
    for index in ([1, 1], (1, 1), torch.tensor([1, 1]), torch.tensor([1, 1], dtype=torch.int32)):
        of_both = preprocess([CHELSEA, COFFEE], torch.tensor(boxes), processor, index)
        assert torch.equal(of_both["pixel_values"], alike)


def test_boxes_of_many_images_keep_their_order() -> None:
    """Qwen2-VL's crops are made size by size; with image_index the images take turns."""
    processor = SMALL["Qwen2-VL"]()
    boxes = [(0, 0, 60, 60), (5, 5, 105, 45), (30, 9, 90, 69), (0, 0, 40, 100), (7, 7, 107, 47)]
    index = [0, 1, 0, 1, 0]
    crops = [(COFFEE, CHELSEA)[i].crop(box) for box, i in zip(boxes, index)]
    actual = preprocess([COFFEE, CHELSEA], boxes, processor, image_index=index)
    assert len({tuple(grid) for grid in actual["image_grid_thw"].tolist()}) == 3
    assert_equal(actual, expected(processor, crops), min(processor.image_std))


def test_parts_outside_of_the_image_are_clipped() -> None:
    processor = SMALL["Qwen3-VL"]()
    beyond = preprocess(COFFEE, [(-50, 300, 200, 1e9)], processor)
    within = preprocess(COFFEE, [(0, 300, 200, 400)], processor)
    assert torch.equal(beyond["pixel_values"], within["pixel_values"])
    assert torch.equal(beyond["image_grid_thw"], within["image_grid_thw"])


@pytest.mark.parametrize("name", ["LLaVA", "BLIP", "Qwen2-VL"])
def test_a_fractional_box_is_sampled_in_place(name: str) -> None:
    """Pillow resizes the box of the integer crop around it; processors cannot say that, so it is resized here."""
    processor = SMALL[name](do_normalize=False)
    box = (20.25, 10.5, 140.75, 130.125)  # of 120.5 x 119.625 pixels, within a crop of 121 x 121
    actual = preprocess(COFFEE, [box], processor)["pixel_values"]
    side = {"LLaVA": (42, 42), "BLIP": (34, 45), "Qwen2-VL": (84, 84)}[name]
    resized = COFFEE.crop((20, 10, 141, 131)).resize(side, Image.BICUBIC, box=(0.25, 0.5, 120.75, 120.125))
    ours = preprocess(resized, [(0, 0, *side)], processor)["pixel_values"]  # resizing to the same size changes nothing
    assert torch.equal(actual, ours)
    assert not torch.equal(actual, preprocess(COFFEE, [(20, 10, 141, 131)], processor)["pixel_values"])


def test_dtype_backend_and_exactness_are_passed_on() -> None:
    processor = SMALL["LLaVA"]()
    full = preprocess(COFFEE, [(20, 10, 300, 320)], processor, backend="reference")["pixel_values"]
    half = preprocess(COFFEE, [(20, 10, 300, 320)], processor, dtype=torch.float16)["pixel_values"]
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), full, atol=2.0**-10, rtol=2.0**-10)
    near = preprocess(COFFEE, [(20, 10, 300, 320)], processor, exact=False)["pixel_values"]
    assert float((near - full).abs().max()) <= 3 / 255 / min(processor.image_std) + 1e-5
    with pytest.raises(ValueError, match="backend: expected"):
        preprocess(COFFEE, [(20, 10, 300, 320)], processor, backend="none")
    patches = preprocess(COFFEE, [(20, 10, 300, 320)], SMALL["Qwen2-VL"](), dtype=torch.bfloat16)["pixel_values"]
    assert patches.dtype == torch.bfloat16


def test_dualfocus_crops_go_straight_in() -> None:
    crops = finegrain_ops.regions.dualfocus_crops([(100.5, 90, 180, 150), (0, 0, 30, 60)], (400, 600))
    processor = SMALL["LLaVA padded"]()
    images = [COFFEE.crop(tuple(crop)) for crop in crops.tolist()]
    assert_equal(preprocess(COFFEE, crops, processor), expected(processor, images), min(processor.image_std))


def test_shorter_sides_without_a_cut() -> None:
    processor = llava(30, do_center_crop=False)
    boxes = [(0, 0, 90, 60), (10, 20, 100, 80)]
    actual = preprocess(COFFEE, boxes, processor)
    assert_equal(actual, expected(processor, [COFFEE.crop(box) for box in boxes]), min(processor.image_std))
    assert preprocess(COFFEE, [], processor)["pixel_values"].shape == (0, 3, 30, 30)
    with pytest.raises(
        ValueError, match=r"boxes: expected crops of one shape, .* got the sizes \[\(30, 30\), \(30, 45\)"
    ):
        preprocess(COFFEE, [*boxes, (0, 0, 40, 40)], processor)


def processor_with(name: str, **attributes: Any) -> Any:
    processor = SMALL[name]()
    for attribute, value in attributes.items():
        setattr(processor, attribute, value)
    return processor


class Customised(type(image_processor("CLIPImageProcessor"))):
    """May do anything in the methods that it overrides."""


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda: processor_with("LLaVA", do_resize=False), "do_resize=False, which keeps each crop's own size, cannot"),
        (lambda: processor_with("CLIP", do_pad=True), "with do_pad=True cannot be honoured"),
        (lambda: processor_with("BLIP", do_pad=True), "with do_pad=True cannot be honoured"),
        (lambda: processor_with("BLIP", do_center_crop=True), "with do_center_crop=True cannot be honoured"),
        (lambda: processor_with("Qwen2-VL", do_center_crop=True), "with do_center_crop=True cannot be honoured"),
        (lambda: processor_with("CLIP", resample=Image.LANCZOS), "with resample=.*, neither bilinear nor bicubic"),
        (lambda: processor_with("CLIP", size={"shortest_edge": 9, "longest_edge": 10}), "with size={.*'longest_edge'"),
        (lambda: processor_with("CLIP", size=224), "with size=224 instead of a dictionary"),
        (lambda: processor_with("CLIP", crop_size=square(50)), "with crop_size={.*} beyond size={.*}, which pads"),
        (lambda: processor_with("CLIP", crop_size={"shortest_edge": 5}), "with crop_size={'shortest_edge': 5}"),
        (lambda: processor_with("LLaVA padded", image_mean=0.5), "do_pad=True and image_mean=0.5 instead of three"),
        (lambda: processor_with("Qwen2-VL", size=square(5), min_pixels=None), "instead of shortest_edge and longest"),
        (lambda: image_processor("ViTImageProcessor"), "expected one with an image processor of transformers' classes"),
        (lambda: Customised(), "expected one with an image processor of transformers' classes .* got test_preprocess"),
        (lambda: None, "expected one with an image processor of .* got builtins.NoneType"),
    ],
)
def test_what_cannot_be_honoured_is_refused(processor, message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=f"processor: .*{message}"):
        preprocess(COFFEE, [(0, 0, 9, 9)], processor())


@pytest.mark.parametrize(
    ("images", "boxes", "error", "message"),
    [
        ([], [], ValueError, "images: expected at least one image"),
        ("coffee.png", [], TypeError, "images: expected a PIL image, a tensor"),
        ([COFFEE, 3], [[], []], TypeError, r"images\[1\]: expected a PIL image, a tensor"),
        (noise(9, 9).astype(np.float32), [], TypeError, "images: expected uint8, levels from 0 to 255, got float32"),
        (torch.zeros(3, 9, 9), [], TypeError, "images: expected uint8, levels from 0 to 255, got torch.float32"),
        (noise(9, 9)[..., :2], [], ValueError, r"images: expected \(H, W, 3\), got shape \(9, 9, 2\)"),
        (noise(9, 9)[..., 0], [], ValueError, r"images: expected \(H, W, 3\), got shape \(9, 9\)"),
        (torch.from_numpy(noise(9, 9)), [], ValueError, r"images: expected \(3, H, W\), got shape \(9, 9, 3\)"),
        (
            [COFFEE, CHELSEA],
            [[]],
            ValueError,
            "boxes: expected a list of boxes for each of the 2 images, got 1 of them",
        ),
        ([COFFEE, CHELSEA], None, ValueError, "boxes: expected a list of boxes for each of the 2 images, got NoneType"),
        ([COFFEE, CHELSEA], [[], None], ValueError, r"boxes\[1\]: expected a list of \(x0, y0, x1, y1\) boxes"),
        ([COFFEE, CHELSEA], [[], [(0, 0, 1)]], ValueError, r"boxes\[1\]: expected shape \(K, 4\)"),
        ([COFFEE, CHELSEA], [[], [(0, 0, 1, 1), (500, 0, 510, 9)]], ValueError, r"boxes\[1\]\[1\]: .* 451 x 300"),
        (COFFEE, [(0, 0, 1, 1), (5, 5, 5, 9)], ValueError, r"boxes\[1\]: expected finite x0 < x1 and y0 < y1"),
        (COFFEE, [(0, 0, 1, float("nan"))], ValueError, r"boxes\[0\]: expected finite x0 < x1 and y0 < y1"),
    ],
)
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL"])
def test_bad_images_and_boxes(name: str, images: Any, boxes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        preprocess(images, boxes, SMALL[name]())


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0], ValueError, "image_index: expected one for each of the 2 boxes"),
        ([0, 2], ValueError, r"image_index\[1\]: expected 0 to 1, the images there are, got 2"),
        ([0, 0.5], TypeError, "image_index: expected an integer"),
        (torch.tensor([0.0, 1.0]), TypeError, "image_index: expected torch.int64 or int32"),
    ],
)
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL"])
def test_bad_indices(name: str, index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        preprocess([COFFEE, CHELSEA], [(0, 0, 9, 9)] * 2, SMALL[name](), index)


def test_a_crop_that_qwen2_vl_refuses_is_named() -> None:
    with pytest.raises(ValueError, match=r"boxes\[1\]: expected .* sides of at most 200 : 1, got 1 x 201 pixels"):
        preprocess(COFFEE, [(0, 0, 200, 1), (0, 0, 201, 1)], qwen2_vl())
