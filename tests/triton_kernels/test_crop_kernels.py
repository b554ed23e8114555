"""The Triton kernels of crop_resize."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="hypothesis draws these cases")
pytest.importorskip("PIL", reason="Pillow is what levels equal")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from crop_cases import ALL_CASES, CASES, CropCase, check
from devices import DEVICE
from finegrain_ops import backends, crop_resize
from finegrain_ops.backends import triton as triton_backend
from finegrain_ops.backends.crops.interface import CropCall
from finegrain_ops.backends.crops.sampling import dense_weights, sample
from finegrain_ops.kernels import crop_resize as kernels
from finegrain_ops.kernels.crop_weights import Images
from finegrain_ops.kernels.tuning import Tile
from ptx import chosen_capability

pytestmark = pytest.mark.triton

is_interpreted = triton_backend._interpreted  # as it is when no test runs: tests/ptx says that all tensors may pass


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a large tile as for a small one, so for the most part it gets few of them.
    As PTX the tiles are those of a device.
    """
    if DEVICE == "cpu" and chosen_capability() is None:
        monkeypatch.setattr(kernels, "CROP_TILE", Tile(64, 64, num_warps=4, num_stages=1))
        monkeypatch.setattr(kernels, "CHUNK", 32)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch, large_tiles: None) -> None:
    """Several of them in both directions, and several chunks."""
    monkeypatch.setattr(kernels, "CROP_TILE", Tile(16, 16, num_warps=1, num_stages=1))
    monkeypatch.setattr(kernels, "CHUNK", 16)


def noise(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(DEVICE, dtype)


def count_of_taps(case: CropCase) -> tuple[int, int]:
    """Of the first box, which has integer edges."""
    x0, y0, x1, y1 = case.boxes[0]
    lengths = (y1 - y0, x1 - x0)
    return tuple(min(int(length), int(4 * max(length / n, 1))) for length, n in zip(lengths, case.size))


@pytest.mark.parametrize("case", ALL_CASES)
def test_arguments(case: CropCase) -> None:
    check(case, "triton")


_TALL = CropCase(((2.0, 1.0, 30.0, 260.0), (0.0, 60.0, 30.0, 300.0)), ((300, 31),), size=(19, 35))
SEVERAL_TILES = {
    "tall, horizontal first": replace(_TALL, options={"pillow": "11.3"}),
    "tall, vertical first": replace(_TALL, options={"pillow": "13.0"}),
    "tall, Pillow 12.2": replace(_TALL, boxes=_TALL.boxes[:1], options={"pillow": "12.2"}),
    "as thin as a hair, Pillow 12.2": CropCase(
        ((1, 2, 3, 208), (0, 0, 3, 210)), ((210, 5),), size=(19, 20), options={"pillow": "12.2"}
    ),
    "wide": CropCase(((1.0, 2.0, 260.0, 30.0),), ((31, 300),), size=(35, 19)),
    "two passes in one call": CropCase(((0, 0, 30, 250), (0, 0, 31, 20)), ((300, 31),), size=(19, 35)),
    "tall, float32": replace(_TALL, boxes=_TALL.boxes[:1], dtype=torch.float32, options={"pillow": "13.0"}),
    "letterboxed, float32": CropCase(
        ((2.0, 1.0, 30.0, 60.0),), size=(19, 35), dtype=torch.float32, options={"pad": "square", "fill": 99.5}
    ),
    "letterboxed": replace(CASES["padded"], boxes=((3, 5, 40, 61), (57, 2, 60, 68))),
    "letterboxed, vertical first": CropCase(
        ((20, 1, 48, 60), (5, 20, 65, 40)), size=(19, 45), options={"pad": "square", "fill": 120, "pillow": "13.0"}
    ),
    "without antialiasing": replace(CASES["without antialiasing"], boxes=((3, 5, 40, 61), (4.5, 9.0, 5.5, 60.3))),
    "cut from the shortest edge": replace(CASES["shortest edge"], size=(28, 20)),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", SEVERAL_TILES)
def test_several_tiles_that_end_early(name: str) -> None:
    check(SEVERAL_TILES[name], "triton")


@pytest.mark.parametrize("size", [(2, 20), (20, 2)], ids=str)
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32], ids=str)
def test_more_than_64_taps(size: tuple[int, int], image_dtype: torch.dtype) -> None:
    case = CropCase(((0, 0, 75, 80), (3.3, 4.4, 74.5, 80)), ((80, 75),), size=size, dtype=image_dtype)
    assert max(count_of_taps(case)) > 64
    check(case, "triton")


NAN, INF = math.nan, math.inf
BAD_BOXES = (
    *[tuple(NAN if i == bad else value for i, value in enumerate((1.0, 2.0, 20.0, 25.0))) for bad in range(4)],
    (20.0, 2.0, 1.0, 25.0),  # inverted
    (1.0, 25.0, 20.0, 2.0),
    (5.0, 2.0, 5.0, 25.0),  # no area
    (1.0, 7.0, 20.0, 7.0),
    (-9.0, 2.0, 0.0, 25.0),  # beside, above, and beyond the image
    (1.0, -9.0, 20.0, -1.0),
    (37.0, 2.0, 50.0, 25.0),
    (1.0, 31.0, 20.0, 1e30),
    (INF, 2.0, INF, 25.0),
    (-INF, -INF, -INF, INF),
)


@pytest.mark.parametrize("is_list", [False, True], ids=["batch", "list"])
@pytest.mark.parametrize("options", [{}, {"pad": "square", "shortest_edge": 20}, {"antialias": False}], ids=str)
def test_boxes_that_nobody_checked(is_list: bool, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: those that are none give `fill`, and the others are as without them."""
    monkeypatch.setattr("finegrain_ops.validation.values_are_checked", lambda _: False)
    images = noise(2, 3, 31, 37)
    good = [(1.0, 2.0, 20.0, 25.0), (-INF, 3.5, INF, 1e300)]
    index = [0, 1, -1, 2, 2**40, -(2**62)] + [0, 1] * (len(BAD_BOXES) // 2)
    boxes = [*good, *[good[0]] * 4, *BAD_BOXES]
    call = {"size": (9, 12), "fill": (7, 99, 250), "mean": (0.1, 0.2, 0.3), "std": 0.5, **options}
    images = list(images) if is_list else images
    boxes = torch.tensor(boxes, dtype=torch.float64, device=DEVICE)
    result = crop_resize(images, boxes, torch.tensor(index, device=DEVICE), **call, backend="triton")
    expected = crop_resize(images, good, index[:2], **call, backend="reference")
    fill = (torch.tensor([7, 99, 250]) / 255 - torch.tensor([0.1, 0.2, 0.3])) / 0.5
    torch.testing.assert_close(result[:2], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(result[2:], fill.to(DEVICE)[:, None, None].expand_as(result[2:]), atol=1e-6, rtol=1e-6)


def test_an_image_without_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finegrain_ops.validation.values_are_checked", lambda _: False)
    images = [noise(3, 0, 7), noise(3, 8, 0), noise(3, 8, 7)]
    boxes = torch.tensor([(0.0, 0.0, 7.0, 8.0)] * 3, device=DEVICE)
    result = crop_resize(images, boxes, size=(8, 7), rescale=1.0, fill=9, backend="triton")
    assert torch.equal(result[2], images[2].float())
    assert bool((result[:2] == 9).all())


@pytest.mark.parametrize("pillow", ["11.3", "13.0"], ids=["horizontal first", "vertical first"])
@pytest.mark.parametrize(("pad", "antialias"), [(None, True), (None, False), ("square", True)])
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32], ids=str)
def test_nothing_outside_of_a_crop_is_read(
    image_dtype: torch.dtype, antialias: bool, pad: str | None, pillow: str
) -> None:
    """Whatever lies around it, NaN too, in the image or beyond."""
    box = (20.5, 30.25, 41.0, 100.75)
    buffers = [noise(3, 140, 80, dtype=image_dtype, seed=seed) for seed in (1, 2)]
    if image_dtype.is_floating_point:
        buffers[1].fill_(NAN)
    inside = (slice(None), slice(10 + 30, 10 + 101), slice(10 + 20, 10 + 41))
    buffers[1][inside] = buffers[0][inside]
    results = [
        crop_resize(
            buffer[None, :, 10:130, 10:70],
            [box],
            size=(13, 30),
            antialias=antialias,
            pad=pad,
            fill=50,
            pillow=pillow,
            backend="triton",
        )
        for buffer in buffers
    ]
    assert torch.equal(*results)


class Guarded:
    """Tensors between margins, which nothing may have written."""

    _MARGIN, _PATTERN = 4096, 0x5A

    def __init__(self) -> None:
        self._bytes: list[Tensor] = []

    def of(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        around = torch.full((size + 2 * self._MARGIN,), self._PATTERN, dtype=torch.uint8, device=tensor.device)
        self._bytes.append(around)
        return around[self._MARGIN : self._MARGIN + size].view(tensor.dtype).view(tensor.shape)

    def assert_untouched(self) -> None:
        assert self._bytes
        for around in self._bytes:
            assert bool((around[: self._MARGIN] == self._PATTERN).all())
            assert bool((around[-self._MARGIN :] == self._PATTERN).all())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("most_taps", [None, (1, 2)], ids=["as bounded", "were the bound wrong"])
def test_nothing_outside_of_result_and_scratch_is_written(
    most_taps: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded, new_result, allocate = Guarded(), CropCall.new_result, kernels.allocate_weights

    def allocate_guarded(call: CropCall, boxes: int) -> object:
        weights = allocate(call, boxes)
        tensors = {name: guarded.of(getattr(weights, name)) for name in ("records", "spans", "weights")}
        return replace(weights, **tensors)

    monkeypatch.setattr(CropCall, "new_result", lambda call: guarded.of(new_result(call)))
    monkeypatch.setattr(kernels, "allocate_weights", allocate_guarded)
    if most_taps is not None:
        monkeypatch.setattr(CropCall, "most_taps", lambda call: most_taps)
    for name in ("several sizes", "without antialiasing, bilinear"):
        case = replace(CASES[name], size=(17, 21))
        crop_resize(**{**case.arguments(), "shortest_edge": None}, backend="triton")
    guarded.assert_untouched()


_EVERYWHERE = ((-9, -9, 1e9, 1e9), (0.2, 0.1, 0.9, 0.8), (10.5, 3, 15, 12), (1, 2, 13.5, 10), (0, 0, 15, 15))


@pytest.mark.parametrize("has_index", [True, False])
def test_weights_of_many_boxes_take_turns_in_memory(has_index: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CropCase(_EVERYWHERE, ((12, 15), (1, 1), (13, 20), (11, 15), (15, 15)), size=(5, 7))
    arguments = replace(case, has_index=has_index).arguments()
    together = crop_resize(**arguments, backend="triton")

    launched = []
    launch = kernels.crop_weights

    def recorded(call: CropCall, images: object, first_box: int, boxes: int, weights: object) -> None:
        launched.append((first_box, boxes))
        launch(call, images, first_box, boxes, weights)

    monkeypatch.setattr(kernels, "crop_weights", recorded)
    for limit, expected in ((2.5, [(0, 2), (2, 2), (4, 1)]), (0.5, [(k, 1) for k in range(5)])):
        monkeypatch.setattr(kernels, "bytes_of_a_box", lambda call, limit=limit: int(kernels.SCRATCH_BYTES / limit))
        launched.clear()
        assert torch.equal(crop_resize(**arguments, backend="triton"), together)
        assert launched == expected


def a_call() -> CropCall:
    image, boxes = noise(1, 3, 50, 60), torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    values = ((0.0,) * 3, (1.0,) * 3, (0.0,) * 3)
    return CropCall(image, boxes, None, (5, 7), "bicubic", True, False, None, *values, torch.float32, 0)


def test_scratch_is_counted_as_it_is_allocated() -> None:
    weights = kernels.allocate_weights(a_call(), 2)
    tensors = (weights.records, weights.spans, weights.weights)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 2 * kernels.bytes_of_a_box(a_call())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "no antialias"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["crop", "letterboxed"])
def test_weights_are_the_definitions(interpolation: str, antialias: bool, is_padded: bool) -> None:
    """To the last of their 22 bits, which levels seldom show."""
    corners = torch.rand(4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 50
    boxes = corners.sort(dim=1).values.reshape(4, 4).to(DEVICE)
    call = replace(a_call(), boxes=boxes, interpolation=interpolation, antialias=antialias, is_padded=is_padded)
    weights = kernels.allocate_weights(call, 4)
    kernels.crop_weights(call, Images.of(call), 0, 4, weights)
    height, width = call.size
    for k, box in enumerate(sample(call)):
        of_y, of_x = weights.weights[k].split([weights.most_taps[0] * height, weights.most_taps[1] * width])
        for axis, table, (first, count) in (
            (box.y, of_y.reshape(-1, height), weights.spans[k, :, :height].cpu()),
            (box.x, of_x.reshape(-1, width), weights.spans[k, :, height:].cpu()),
        ):
            expected = dense_weights(axis, table.shape[1], call).cpu()
            actual = torch.zeros_like(expected)
            for place in range(table.shape[1]):
                begin = int(first[place]) - axis.hull_begin
                actual[place, begin : begin + int(count[place])] = table[: int(count[place]), place].cpu().double()
            assert torch.equal(actual, expected)


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, features = backends.load_crop("triton"), a_call().features(exact=True)
    assert backend.not_supported_reasons(features) == []
    (reason,) = backend.not_supported_reasons(features._replace(device_type="mps"))
    assert reason == "images are on mps; Triton runs on CUDA devices"
    monkeypatch.setattr("finegrain_ops.backends.triton._compute_capability", lambda index: 75)
    (reason,) = backend.not_supported_reasons(features._replace(device_type="cuda", device_index=0))
    assert "compute capability is below 8.0" in reason
    with monkeypatch.context() as patch:  # undone within the test, and so before tests/ptx undoes what it patches
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setattr(triton_backend, "_interpreted", is_interpreted)
        (reason,) = backend.not_supported_reasons(features._replace(device_type="cpu"))
    assert "images are on cpu; use a CUDA device, or set TRITON_INTERPRET=1" in reason


def test_batches_and_lists_give_the_same() -> None:
    images = noise(3, 3, 40, 50)
    boxes = [(1, 2, 30, 35), (0, 0, 50, 40), (10.5, 3, 20, 39.5)]
    call = {"image_index": [2, 0, 1], "size": (11, 13), "backend": "triton"}
    expected = crop_resize(images, boxes, **call)
    for other in (
        images.unbind(),
        [images[0], images[1].flip(1).flip(1), images.permute(0, 2, 3, 1).contiguous()[2].permute(2, 0, 1)],
    ):
        assert torch.equal(crop_resize(list(other), boxes, **call), expected)


def pillow_crop(image: Tensor, box: tuple[int, ...], size: tuple[int, int], interpolation: str) -> Tensor:
    resample = Image.Resampling[interpolation.upper()]
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    return torch.from_numpy(np.asarray(pixels.crop(box).resize(size[::-1], resample)).copy()).permute(2, 0, 1)


def integer_boxes(size: tuple[int, int], most: int) -> st.SearchStrategy:
    def interval(length: int) -> st.SearchStrategy:
        return st.integers(0, length - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, length)))

    box = st.tuples(interval(size[1]), interval(size[0])).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))
    return st.lists(box, min_size=1, max_size=most)


SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIDES = st.integers(1, 60)


@given(data=st.data(), height=SIDES, width=SIDES, interpolation=st.sampled_from(["bicubic", "bilinear"]))
@SETTINGS
def test_levels_are_pillows(data: st.DataObject, height: int, width: int, interpolation: str) -> None:
    """Of the Pillow that is installed; integer boxes, to the level."""
    image = noise(3, height, width, seed=height * width)
    boxes = data.draw(integer_boxes((height, width), 3))
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    actual = crop_resize([image], boxes, size=size, interpolation=interpolation, rescale=1.0, backend="triton")
    expected = torch.stack([pillow_crop(image, box, size, interpolation) for box in boxes])
    assert torch.equal(actual.cpu(), expected.float())


FRACTIONAL = st.tuples(*[st.floats(0.0, 45.0) for _ in range(2)], *[st.floats(46.0, 100.0) for _ in range(2)])
ANY_CASE = st.builds(
    CropCase,
    boxes=st.lists(FRACTIONAL, min_size=1, max_size=3).map(tuple),
    sizes=st.lists(st.tuples(st.integers(46, 99), st.integers(46, 99)), min_size=1, max_size=2).map(tuple),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    dtype=st.sampled_from([torch.uint8, torch.uint8, torch.float32, torch.float16]),
    channels=st.sampled_from([1, 3]),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    options=st.fixed_dictionaries(
        {
            "interpolation": st.sampled_from(["bicubic", "bilinear"]),
            "antialias": st.booleans(),
            "pad": st.sampled_from([None, "square"]),
            "shortest_edge": st.sampled_from([None, 30, 37]),
            "fill": st.integers(0, 255),
            "pillow": st.sampled_from(["11.3", "12.2", "13.0"]),
        }
    ),
)


@given(case=ANY_CASE)
@SETTINGS
def test_any_combination(case: CropCase) -> None:
    check(case, "triton")


def calls_of_graphs() -> dict[str, Callable[[Tensor], Tensor]]:
    images = [noise(3, 300, 400, seed=1), noise(3, 200, 100, seed=2)]
    call = {"size": 64, "backend": "triton"}
    return {
        "batch": lambda boxes: crop_resize(
            images[0][None], boxes, torch.zeros(2, dtype=torch.int64, device="cuda"), **call
        ),
        "list": lambda boxes: crop_resize(images, boxes, **call),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("images", ["batch", "list"])
def test_captured_in_a_cuda_graph(images: str) -> None:
    """Run once, captured, and replayed with other boxes."""
    run = calls_of_graphs()[images]
    boxes = torch.tensor([(10.0, 20.0, 90.0, 180.0), (3.5, 1.0, 60.0, 99.0)], dtype=torch.float64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(boxes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(boxes)
    for shift in (0.0, 2.25):
        boxes += shift
        graph.replay()
        assert torch.equal(result, run(boxes))
