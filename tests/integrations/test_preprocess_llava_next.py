"""`preprocess` of LLaVA-NeXT: what its processor gives for the crops that Pillow makes, and a model that sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("hypothesis", reason="hypothesis draws the sizes")
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from finegrain_ops import UnsupportedInputError, preprocess
from finegrain_ops.families import LLAVA_NEXT_PINPOINTS, in_best_resolution
from finegrain_ops.integrations import image_processors
from finegrain_ops.methods.prompting import Prompter
from image_processor_cases import assert_equal, expected, llava_next, noise, square
from tiny_models import IMAGE_TOKEN, PINPOINTS, SIDE, TINY

ARRAYS = [noise(130, 170), noise(60, 610, 1)]
IMAGES = [Image.fromarray(array) for array in ARRAYS]
# 3, 2 and 4 tiles, as wide as high, upright, enlarged and shrunk, and none
BOXES = [[(0, 0, 170, 130), (3, 5, 103, 125), (20, 7, 60, 127), (9, 9, 33, 33)], [(0, 0, 610, 60), (100, 3, 130, 45)]]
LEVELS = {"do_normalize": False, "do_rescale": False}
CROPS = [image.crop(box) for image, own in zip(IMAGES, BOXES) for box in own]


def tiny(side: int = SIDE, **options: Any) -> Any:
    return llava_next(side, **{"image_grid_pinpoints": PINPOINTS, **options})


def test_crops_of_several_images_with_other_numbers_of_tiles(device: str) -> None:
    tensors = [torch.from_numpy(array).permute(2, 0, 1).to(device) for array in ARRAYS]
    actual = preprocess(tensors, BOXES, tiny())
    assert {tensor.device.type for tensor in actual.values()} == {device.split(":")[0]}
    assert_equal(actual.to("cpu"), expected(tiny(), CROPS), min(tiny().image_std))
    levels = preprocess(tensors, BOXES, tiny(**LEVELS))["pixel_values"].cpu()
    assert torch.equal(levels, expected(tiny(**LEVELS), CROPS)["pixel_values"].float())
    assert actual["image_sizes"].tolist() == [[130, 170], [120, 100], [120, 40], [24, 24], [60, 610], [42, 30]]
    assert levels.shape == (6, 5, 3, SIDE, SIDE)
    assert levels.flatten(2).any(2).sum(1).tolist() == [5, 5, 4, 2, 4, 5]  # the others are the zeros behind


@pytest.mark.parametrize("processor", [tiny, llava_next], ids=["tiny", "released"])
@pytest.mark.parametrize(
    "box",
    [(0, 0, 610, 1), (0, 7, 610, 10), (5, 0, 6, 60), (8, 0, 11, 60), (600, 59, 601, 60), (9, 9, 12, 12), (0, 0, 3, 1)],
)
def test_very_wide_high_and_small_crops(processor: Any, box: tuple[int, int, int, int]) -> None:
    processor = processor(**LEVELS)
    actual, theirs = preprocess(IMAGES[1], [box], processor), expected(processor, [IMAGES[1].crop(box)])
    assert torch.equal(actual["pixel_values"], theirs["pixel_values"].float())
    assert torch.equal(actual["image_sizes"], theirs["image_sizes"])


PINPOINT_LISTS = st.sampled_from([LLAVA_NEXT_PINPOINTS, PINPOINTS, [[24, 24]], [[48, 48], [24, 72], [24, 48]]])


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)) | st.tuples(st.integers(1, 60), st.integers(1, 60)),
    PINPOINT_LISTS,
)
@settings(max_examples=300, deadline=None)
def test_the_place_among_the_tiles_is_that_of_transformers(size: tuple[int, int], pinpoints: Any) -> None:
    resolution = select_best_resolution(size, pinpoints)
    resized = get_patch_output_size(np.empty((*size, 1)), resolution, "channels_last")
    pixels = in_best_resolution(size, pinpoints)
    assert pixels.size == resolution
    for axis, length, new, whole in zip((pixels.y, pixels.x), size, resized, resolution):
        assert (axis(0), axis(length)) == ((whole - new) // 2, (whole - new) // 2 + new)


def test_every_output_size_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append((options["size"], len(args[1])))
        return original(*args, **options)

    original = image_processors.crop_resize
    monkeypatch.setattr(image_processors, "crop_resize", counted)
    preprocess(IMAGES, [[*BOXES[0], (30, 20, 54, 44), (0, 0, 48, 48)], BOXES[1]], tiny())
    # the wholes and the tiles of (9, 9, 33, 33) and (30, 20, 54, 44), which are of their size; then 48 x 40 and so on
    assert calls[0] == ((SIDE, SIDE), 8 + 2)
    assert len(calls) == len({size for size, _ in calls})
    assert sum(count for _, count in calls) == 2 * 8


def test_a_fractional_box_is_sampled_in_place() -> None:
    """Its tiles are those of the whole pixels that it touches, 61 x 45 of them: within 48 x 48."""
    x0, y0, x1, y1 = box = (20.25, 10.5, 80.75, 54.125)
    actual = preprocess(IMAGES[0], [box], tiny(**LEVELS))
    assert actual["image_sizes"].tolist() == [[45, 61]]
    crop, inner = IMAGES[0].crop((20, 10, 81, 55)), (x0 - 20, y0 - 10, x1 - 20, y1 - 10)
    whole, resized = (np.array(crop.resize(size, Image.BICUBIC, box=inner)) for size in ((24, 24), (48, 36)))
    together = np.zeros((48, 48, 3), dtype=np.uint8)
    together[6:42] = resized
    tiles = [whole, together[:24, :24], together[:24, 24:], together[24:, :24], together[24:, 24:]]
    assert torch.equal(actual["pixel_values"][0], torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_in_half_precision_are_the_float32_ones_rounded(dtype: torch.dtype) -> None:
    full, half = (preprocess(IMAGES, BOXES, tiny(), dtype=each)["pixel_values"] for each in (torch.float32, dtype))
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": 0.4, "image_std": 0.3},
        {"do_rescale": False, "image_mean": [100.0, 90.0, 80.0]},
        {"do_resize": False},
        {"do_center_crop": False},
        {"size": square(SIDE)},
        {"resample": Image.BILINEAR},
        {"image_grid_pinpoints": [[SIDE, SIDE]]},
        {"image_grid_pinpoints": [[48, 96]]},
    ],
    ids=str,
)
def test_ways_to_set_the_processor(options: dict[str, Any]) -> None:
    processor = tiny(**options)
    smallest_std = np.min(processor.image_std) * (1 if processor.do_rescale else 1 / 255)
    assert_equal(preprocess(IMAGES, BOXES, processor), expected(processor, CROPS), smallest_std)


def test_without_padding_all_crops_need_as_many_tiles() -> None:
    processor = tiny(do_pad=False)
    alike = [BOXES[0][0], BOXES[0][1]]
    crops = [IMAGES[0].crop(box) for box in alike]
    assert_equal(preprocess(IMAGES[0], alike, processor), expected(processor, crops), min(processor.image_std))
    with pytest.raises(ValueError, match=r"boxes: expected crops of one number of tiles, .* got \[5, 5, 4, 2, 4, 5\]"):
        preprocess(IMAGES, BOXES, processor)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"crop_size": square(12)}, "size={.*24} and crop_size={.*12} instead of one side for all tiles"),
        ({"crop_size": {"height": 24, "width": 12}}, "instead of one side for all tiles"),
        ({"crop_size": {"shortest_edge": 24}}, "instead of one side for all tiles"),
        ({"crop_size": None}, "crop_size=None instead of a dictionary"),
        ({"size": {"height": 24, "width": 30}}, "instead of one side for all tiles"),
        ({"size": {"shortest_edge": 24, "longest_edge": 24}}, "instead of one side for all tiles"),
        ({"image_grid_pinpoints": [[24, 48], [36, 48]]}, r"\[36, 48\]\] instead of .* in multiples of 24 cannot"),
        ({"image_grid_pinpoints": [[24, 0]]}, "instead of a list of"),
        ({"image_grid_pinpoints": []}, "instead of a list of"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints=None instead of a list of"),
        ({"image_grid_pinpoints": [24, 48]}, "instead of a list of"),
        ({"image_grid_pinpoints": [["24", "48"]]}, "instead of a list of"),
        ({"resample": Image.LANCZOS}, "resample=.*, neither bilinear nor bicubic"),
    ],
)
def test_what_cannot_be_honoured_is_refused(attributes: dict[str, Any], message: str) -> None:
    processor = tiny()
    for name, value in attributes.items():
        setattr(processor, name, value)
    with pytest.raises(UnsupportedInputError, match=f"processor: LlavaNext.* with .*{message}"):
        preprocess(IMAGES[0], [(0, 0, 9, 9)], processor)


def test_a_model_sees_the_crops_as_it_sees_images(device: str) -> None:
    """The processor counts the image tokens of a prompt by image_sizes, the model puts the tiles together by them."""
    family = TINY["LLaVA-NeXT"]
    model, processor = family.make_model().to(device), family.make_processor()
    for flag, value in LEVELS.items():  # numbers that are the same to the last bit
        setattr(processor.image_processor, flag, value)
    texts = [f"<image> w{7 + i} w9" for i in range(len(CROPS))]
    theirs = processor(images=CROPS, text=texts, padding=True, padding_side="left", return_tensors="pt").to(device)
    theirs["pixel_values"] = theirs["pixel_values"].float()
    tensors = [torch.from_numpy(array).permute(2, 0, 1).to(device) for array in ARRAYS]
    made = preprocess(tensors, BOXES, processor)
    others = [IMAGES[0]] * len(CROPS)  # only how many there are is asked
    ours = Prompter(model, processor, "<image> {question}").encode_follow_ups(texts, others, made)
    assert set(ours) == set(theirs)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert len(set((ours["input_ids"] == IMAGE_TOKEN).sum(1).tolist())) > 3  # crops that need other numbers of tokens
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, model(**theirs).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**ours, **options), model.generate(**theirs, **options))
