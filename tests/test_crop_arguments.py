"""What `crop_resize` takes and refuses, odd inputs, and the operator under torch's tools."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

import finegrain_ops
from crop_cases import CASES
from devices import DEVICE, crop_ways
from finegrain_ops import UnsupportedInputError, backends, crop_resize, validation
from finegrain_ops.backends.crops import dense, resized
from finegrain_ops.backends.crops.interface import CropFeatures

BACKENDS = [*crop_ways(), *(["interpolate"] if DEVICE == "cpu" else [])]


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(DEVICE)


def crops(images: object, boxes: object, backend: str = "auto", **options: object) -> Tensor:
    options = {"size": (12, 10), "rescale": 1, **options}
    return crop_resize(images, boxes, backend=backend, exact=backend != "interpolate", **options)


# --------------------------------------------------------------------------------------------------------- arguments


def test_rescaled_and_normalised() -> None:
    image, mean, std = noise(3, 40, 50), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    levels = crops([image], [(3, 4, 33, 38)])
    expected = (levels.double() / 255 - torch.tensor(mean)[:, None, None].to(DEVICE)) / torch.tensor(std)[
        :, None, None
    ].to(DEVICE)
    actual = crops([image], [(3, 4, 33, 38)], rescale=1 / 255, mean=mean, std=std)
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-6)
    grey = crops([image], [(3, 4, 33, 38)], rescale=1 / 127.5, mean=1.0)
    torch.testing.assert_close(grey, levels / 127.5 - 1, atol=1e-6, rtol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        half = crops([image], [(3, 4, 33, 38)], rescale=1 / 255, mean=mean, std=std, dtype=dtype)
        assert torch.equal(half, actual.to(dtype))


def test_which_image_a_box_lies_in() -> None:
    batch = noise(3, 3, 40, 50)
    boxes = [(0, 0, 20, 30), (5, 6, 50, 40), (1, 1, 9, 9)]
    singly = [crops([image], [box])[0] for image, box in zip(batch, boxes)]
    assert torch.equal(crops(batch, boxes), torch.stack(singly))
    assert torch.equal(crops(list(batch), torch.tensor(boxes)), torch.stack(singly))
    assert torch.equal(crops(batch[:1], boxes[:1]), singly[0][None])
    of_image_2 = crops(batch, boxes, image_index=[2, 2, 1])
    assert torch.equal(of_image_2[1], crops([batch[2]], [boxes[1]])[0])
    assert torch.equal(of_image_2[2], crops([batch[1]], [boxes[2]])[0])
    as_tensor = crops(batch, boxes, image_index=torch.tensor([2, 2, 1], dtype=torch.int32, device=DEVICE))
    assert torch.equal(as_tensor, of_image_2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_boxes_of_any_type(dtype: torch.dtype) -> None:
    image, boxes = noise(3, 40, 50), [(3, 4, 33, 38), (0, 0, 50, 40)]
    assert torch.equal(crops([image], torch.tensor(boxes, dtype=dtype, device=DEVICE)), crops([image], boxes))
    assert torch.equal(crops([image], np.array(boxes)), crops([image], boxes))


def test_one_size_for_both_sides() -> None:
    image = noise(3, 40, 50)
    assert torch.equal(crops([image], [(3, 4, 33, 38)], size=7), crops([image], [(3, 4, 33, 38)], size=(7, 7)))


def test_images_of_different_dtypes_in_one_list() -> None:
    """Levels are rounded in some and not in others, as each would be alone."""
    images = [
        noise(3, 40, 50),
        noise(3, 31, 20, seed=1).float(),
        noise(3, 9, 50, seed=2),
        noise(3, 20, 20, seed=3).half(),
    ]
    boxes, index = [(0, 0, 20, 9), (3, 1, 18, 30.5), (2, 2, 9, 9), (1, 1, 19, 20), (4, 4, 20, 31)], [2, 1, 0, 3, 1]
    actual = crops(images, boxes, image_index=index, pad="square", fill=7.5)
    expected = [crops([images[i]], [box], pad="square", fill=7.5)[0] for i, box in zip(index, boxes)]
    assert torch.equal(actual, torch.stack(expected))
    assert torch.equal(crops(images, boxes[:4])[3], crops([images[3]], [boxes[3]])[0])


def test_floating_images_of_different_dtypes_in_one_list() -> None:
    images, boxes = [noise(3, 40, 50).float(), noise(3, 31, 20, seed=1).half()], [(0, 0, 20, 9), (3, 1, 18, 30.5)]
    expected = [crops([image], [box])[0] for image, box in zip(images, boxes)]
    assert torch.equal(crops(images, boxes), torch.stack(expected))


@pytest.mark.parametrize("backend", crop_ways())
def test_an_unchecked_index_into_images_of_different_dtypes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "values_are_checked", lambda tensor: False)
    images, index = [noise(3, 40, 50), noise(3, 31, 20).float()], torch.tensor([1, -1, 0, 2, 2**40, -(2**40)])
    result = crops(images, [(1, 2, 20, 31)] * 6, backend, image_index=index.to(DEVICE), fill=7)
    assert torch.equal(result[0], crops(images[1:], [(1, 2, 20, 31)], backend)[0])
    assert torch.equal(result[2], crops(images[:1], [(1, 2, 20, 31)], backend)[0])
    assert bool((result[[1, 3, 4, 5]] == 7).all())


def test_the_fill_of_uint8_images_is_a_level() -> None:
    image = noise(3, 10, 40)
    assert torch.equal(
        crops([image], [(0, 0, 40, 10)], pad="square", fill=7.6), crops([image], [(0, 0, 40, 10)], pad="square", fill=8)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("images", ["batch", "list"])
def test_no_boxes(backend: str, images: str) -> None:
    batch = noise(2, 3, 8, 9)
    result = crops(batch if images == "batch" else list(batch), torch.empty(0, 4), backend, image_index=[])
    assert result.shape == (0, 3, 12, 10)
    assert crops(noise(0, 3, 8, 9), [], backend).shape == (0, 3, 12, 10)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((3, 3, 3, 9), r"boxes\[1\]: expected finite x0 < x1"),
        ((9, 3, 3, 9), r"boxes\[1\]: expected finite x0 < x1"),
        ((math.nan, 3, 9, 9), r"boxes\[1\]: expected finite"),
        ((0, 0, math.inf, 9), r"boxes\[1\]: expected finite"),
        ((50, 3, 60, 9), r"boxes\[1\]: expected a box that overlaps the image of 50 x 40"),
        ((-9, -9, 0, 9), r"boxes\[1\]: expected a box that overlaps"),
    ],
)
def test_bad_boxes_are_named(box: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crops([noise(3, 40, 50)], [(0, 0, 9, 9), box, (1, 1, 2, 2)])
    with pytest.raises(ValueError, match=message.replace("1", "0", 1)):
        crops([noise(3, 40, 50)], torch.tensor([box]))


BOX = [(0, 0, 9, 9)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": np.zeros((3, 4, 4), np.uint8)}, TypeError, "images: expected a tensor .* got ndarray"),
        ({"images": []}, ValueError, "images: expected at least one image"),
        ({"images": torch.zeros(3, 40, 50)}, ValueError, r"images: expected \(B, 3, H, W\).*images\[None\]"),
        ({"images": [torch.zeros(3, 40)]}, ValueError, r"images\[0\]: expected \(3, H, W\)"),
        ({"images": [torch.zeros(4, 9, 8)]}, ValueError, r"images\[0\]: .*\(4, 9, 8\); drop the alpha channel"),
        ({"images": [torch.zeros(40, 50, 3)]}, ValueError, "channels come first"),
        (
            {"images": [torch.zeros(3, 9, 9), torch.zeros(1, 9, 9)]},
            ValueError,
            r"images\[1\]: expected as many channels",
        ),
        ({"images": [torch.zeros(3, 9, 9, dtype=torch.int32)]}, TypeError, r"images\[0\]: expected uint8.*int32"),
        ({"images": [torch.zeros(3, 9, 9, requires_grad=True)]}, ValueError, r"images\[0\]: .*no gradient.*detach"),
        ({"boxes": [(0, 0, 9)]}, ValueError, r"boxes: expected shape \(K, 4\)"),
        ({"boxes": [(0, 0, 9, 9), (0, 0, 9)]}, TypeError, r"boxes: expected a tensor \(K, 4\)"),
        ({"boxes": [("0", 0, 9, 9)]}, TypeError, r"boxes: expected a tensor \(K, 4\)"),
        ({"boxes": torch.zeros(4)}, ValueError, r"boxes: expected shape \(K, 4\)"),
        ({"boxes": torch.zeros(1, 4, dtype=torch.bool)}, TypeError, "boxes: expected real numbers"),
        ({"images": torch.zeros(2, 3, 40, 50)}, ValueError, r"image_index: expected \(K,\).* 1 boxes in 2 images"),
        ({"image_index": [1]}, ValueError, r"image_index\[0\]: expected 0 to 0"),
        ({"image_index": [-1]}, ValueError, "image_index"),
        ({"image_index": [0, 0]}, ValueError, r"image_index: expected shape \(K,\)"),
        ({"image_index": [0.5]}, TypeError, "image_index: expected an integer"),
        ({"image_index": torch.zeros(1)}, TypeError, "image_index: expected torch.int64 or int32"),
        ({"size": 0}, ValueError, r"size: expected \(height, width\)"),
        ({"size": (3, 4, 5)}, ValueError, r"size: expected \(height, width\)"),
        ({"size": (3.5, 4)}, ValueError, r"size: expected \(height, width\)"),
        (
            {"interpolation": "lanczos"},
            ValueError,
            "interpolation: expected 'bilinear' or 'bicubic', got str 'lanczos'",
        ),
        ({"antialias": 1}, TypeError, "antialias: expected True or False"),
        ({"exact": None}, TypeError, "exact: expected True or False"),
        ({"pad": "circle"}, ValueError, "pad: expected None or 'square'"),
        ({"shortest_edge": 11}, ValueError, "shortest_edge: expected at least size"),
        ({"fill": (1, 2)}, ValueError, "fill: expected a number, or one for each of the 3 channels"),
        ({"fill": 256}, ValueError, "fill: expected levels from 0 to 255"),
        ({"fill": math.nan}, ValueError, "fill: expected a finite number"),
        ({"rescale": math.inf}, ValueError, "rescale: expected a finite number"),
        ({"rescale": None}, TypeError, "rescale"),
        ({"mean": "0.5"}, TypeError, "mean"),
        ({"std": (1, 0, 1)}, ValueError, "std: expected numbers > 0"),
        ({"dtype": torch.uint8}, TypeError, "dtype: expected float32, float16 or bfloat16"),
        ({"images": torch.zeros(0, 3, 40, 50)}, ValueError, "images: expected at least one image for the 1 boxes"),
        ({"pillow": 12.3}, ValueError, "pillow: expected a version such as"),
        ({"pillow": "new"}, ValueError, "pillow: expected a version such as"),
        ({"backend": "sdpa"}, ValueError, "backend: expected one of 'auto', 'triton', 'cuda', 'interpolate', 'pillow'"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        crop_resize(**{"images": [torch.zeros(3, 40, 50)], "boxes": BOX, "size": (12, 10), **arguments})


@pytest.mark.parametrize("backend", crop_ways())
def test_unchecked_boxes_give_the_fill(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where nobody has looked at them."""
    monkeypatch.setattr(validation, "values_are_checked", lambda tensor: False)
    image = noise(3, 40, 50)
    good, bad = (2, 3, 40, 39), [(3, 3, 3, 9), (9, 3, 3, 9), (math.nan, 3, 9, 9), (0, 0, 9, math.nan), (50, 3, 60, 9)]
    boxes, fill = [good, *bad, good, good, good], torch.tensor([5.0, 6.0, 7.0])[:, None, None].to(DEVICE)
    index = torch.tensor([0] * (len(boxes) - 2) + [-1, 1])
    result = crops([image], boxes, backend, image_index=index, fill=(5, 6, 7), mean=1.0)
    expected = crops([image], [good], backend, mean=1.0)[0]
    assert torch.equal(result[0], expected)
    assert torch.equal(result[len(bad) + 1], expected)
    for k in (*range(1, len(bad) + 1), -2, -1):
        assert torch.equal(result[k], (fill - 1).expand_as(result[k])), k


@pytest.mark.parametrize("where", [("meta", "meta"), ("cpu", "meta"), ("meta", "cpu"), ("cpu", "cpu")], ids=str)
def test_nothing_waits_for_a_device(where: tuple[str, str]) -> None:
    """Tensors on "meta" have no values: nobody can have looked at them."""
    boxes, index = torch.tensor([(0.0, 0.0, 3.0, 3.0)] * 3, device=where[0]), torch.tensor([0, 1, 0], device=where[1])
    batch = torch.empty(2, 3, 9, 9, dtype=torch.uint8, device="meta")
    for images in (batch, list(batch), [batch[0], batch[1].float()]):
        result = crop_resize(images, boxes, index, size=(4, 5))
        assert result.shape == (3, 3, 4, 5)
        assert result.device.type == "meta"


def test_device_values_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEGRAIN_CHECK", "1")
    with pytest.raises(ValueError, match=r"boxes\[0\]"):
        crops([noise(3, 40, 50)], torch.tensor([[3.0, 3, 3, 9]], device=DEVICE))


# --------------------------------------------------------------------------------------------------------- odd inputs


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_outside_of_a_crop_is_read(backend: str) -> None:
    image = noise(3, 40, 50)
    box = (10, 5, 30, 25) if backend == "interpolate" else (10.5, 5.25, 29.5, 24.75)
    expected = crops([image], [box], backend)
    outside = torch.ones(40, 50, dtype=torch.bool, device=DEVICE)
    outside[5:25, 10:30] = False
    image[:, outside] = 255 - image[:, outside]
    assert torch.equal(crops([image], [box], backend), expected)
    image[:, 5, 10] = 255 - image[:, 5, 10]
    assert not torch.equal(crops([image], [box], backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 5, 20000), (3, 20000, 5)])
def test_very_long_images(backend: str, shape: tuple[int, ...]) -> None:
    """With 241 taps and more for a pixel of the result, and boxes of a pixel."""
    image = noise(*shape)
    boxes = [(0, 0, shape[2], shape[1]), (shape[2] - 1, shape[1] - 1, shape[2], shape[1]), (2, 1, 4, 4)]
    result = crops([image], boxes, backend, size=(40, 60))
    assert torch.equal(result[1], image[:, -1:, -1:].expand(3, 40, 60).float())
    expected = crops([image], boxes, "reference", size=(40, 60))
    assert (result - expected).abs().max() <= (3 if backend == "interpolate" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sliver_to_its_shortest_edge_takes_little_memory(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 x 9000 pixels would be 40 x 120000: nobody resizes more than is kept, beyond a limit."""
    image, of_the_definition = noise(3, 3, 9000), []
    levels = dense.levels
    monkeypatch.setattr(dense, "levels", lambda *arguments: of_the_definition.append(1) or levels(*arguments))
    results, takes_definition = [], []
    for limit in (40 * 120000 - 1, 40 * 120000):
        monkeypatch.setattr(resized, "_MOST_PIXELS", limit)
        of_the_definition.clear()
        results.append(crops([image], [(0, 0, 9000, 3)], backend, size=(40, 30), shortest_edge=40))
        takes_definition.append(bool(of_the_definition))
    if backend in ("pillow", "interpolate"):
        assert takes_definition == [True, False]
    assert (results[0] - results[1]).abs().max() <= (3 if backend == "interpolate" else 0)


@pytest.mark.skipif(DEVICE != "cpu", reason="no other backend has threads")
def test_what_a_thread_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    has_raised = threading.Event()

    def levels(*_: object) -> np.ndarray:
        if threading.current_thread() is threading.main_thread():
            assert has_raised.wait(30)
            return np.zeros((3, 12, 10))
        has_raised.set()
        raise MemoryError("of a thread")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(resized, "_levels", levels)
    with pytest.raises(MemoryError, match="of a thread"):
        crops([noise(3, 40, 50)], [(0, 0, 20, 30)] * 3, "pillow")


def test_the_reference_holds_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(3, 71, 90)
    boxes = [(0, 0, 90, 71), (3.5, 1, 20, 70)]
    expected = crops([image], boxes, "reference")
    monkeypatch.setattr(dense, "_LARGEST_CHUNK", 700)
    assert torch.equal(crops([image], boxes, "reference"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    image = noise(3, 81, 101)
    by_pixel = image.permute(1, 2, 0).contiguous()
    views = [
        image,
        by_pixel.permute(2, 0, 1),
        by_pixel[:, ::2].permute(2, 0, 1),
        by_pixel[:1].expand(81, -1, -1).permute(2, 0, 1),
        image[:, ::2, 1::2],
        image[:1].expand(3, -1, -1),
    ]
    for view in views:
        for boxes in ([(1, 2, 31, 38)], [(1, 2, 31, 38), *[(0, 0, 40, 40)] * 4]):  # few pixels of the image, and many
            expected = crops([view.clone(memory_format=torch.contiguous_format)], boxes, backend)
            assert torch.equal(crops([view], boxes, backend), expected)


# ----------------------------------------------------------------------------------------------------------- operator


def operator_arguments(name: str) -> tuple:
    case = CASES[name]
    arguments = case.arguments()
    images = arguments["images"]
    return (
        [images] if isinstance(images, Tensor) else images,
        torch.tensor(case.boxes, dtype=torch.float64, device=DEVICE),
        torch.tensor(arguments["image_index"], device=DEVICE),
        list(case.size),
        "bicubic",
        True,
        "pad" in case.options,
        0,
        [3.0] * 3,
        [1 / 255] * 3,
        [0.5] * 3,
        torch.float16,
        2,
        True,
        "auto",
    )


@pytest.mark.parametrize("name", ["batch", "several sizes", "padded"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(finegrain_ops.ops.crop_resize, operator_arguments(name))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("as_list", [True, False])
def test_compiled(as_list: bool) -> None:
    """One graph, whose checks are still made."""
    torch._dynamo.reset()
    batch, boxes = noise(2, 3, 40, 50), torch.tensor([(0, 0, 20, 30.5), (5, 6, 50, 40)])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(images: Tensor | list[Tensor], boxes: Tensor) -> Tensor:
        return crop_resize(images, boxes, size=(12, 10), mean=0.5, std=(0.1, 0.2, 0.3), pad="square", fill=4) * 2

    images = list(batch) if as_list else batch
    expected = crop_resize(images, boxes, size=(12, 10), mean=0.5, std=(0.1, 0.2, 0.3), pad="square", fill=4) * 2
    assert torch.equal(run(images, boxes), expected)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"boxes\[0\]"):
            run(images, boxes.flip(1))


def test_autocast_changes_nothing() -> None:
    image = noise(3, 40, 50).float()
    expected = crops([image], [(0, 0, 20, 30.5)], antialias=False)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(crops([image], [(0, 0, 20, 30.5)], antialias=False), expected)


# ------------------------------------------------------------------------------------------------------------ choice


def features(**changes: object) -> CropFeatures:
    values = {"device_type": "cpu", "device_index": None, "antialias": True}
    values |= {"pass_order": 2, "exact": True, "has_integer_boxes": True, **changes}
    return CropFeatures(**values)


def test_which_backend_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finegrain_ops.backends.crops.pillow.INSTALLED_PILLOW", (13, 0))
    backends.select.cache_clear()
    assert backends.select("auto", features()) == "pillow"
    assert backends.select("auto", features(antialias=False)) == "reference"
    assert backends.select("auto", features(pass_order=0)) == "reference"
    assert backends.select("auto", features(exact=False)) == "interpolate"
    assert backends.select("auto", features(exact=False, has_integer_boxes=False)) == "pillow"
    assert backends.select("auto", features(exact=False, antialias=False)) == "interpolate"
    backends.select.cache_clear()


def test_every_reason_is_listed() -> None:
    with pytest.raises(UnsupportedInputError, match="pass exact=False to allow that") as error:
        crop_resize([noise(3, 40, 50).cpu()], [(0, 0, 9.5, 9)], size=8, backend="interpolate")
    assert "backend 'interpolate' cannot run this call" in str(error.value)
    with pytest.raises(UnsupportedInputError, match="a box has a fractional edge"):
        crop_resize([noise(3, 40, 50).cpu()], [(0, 0, 9.5, 9)], size=8, backend="interpolate", exact=False)
    with pytest.raises(UnsupportedInputError, match="Pillow always antialiases"):
        crop_resize([noise(3, 40, 50).cpu()], [(0, 0, 9, 9)], size=8, backend="pillow", antialias=False)


def test_without_pillow_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from finegrain_ops.backends.crops import pillow

    monkeypatch.setattr(pillow, "_PROBLEM", "No module named 'PIL'; install both with: pip install pillow numpy")
    backends.select.cache_clear()
    assert backends.select("auto", features()) == "reference"
    with pytest.raises(UnsupportedInputError, match="pip install pillow"):
        crop_resize([noise(3, 40, 50).cpu()], [(0, 0, 9, 9)], size=8, backend="pillow")
    backends.select.cache_clear()
