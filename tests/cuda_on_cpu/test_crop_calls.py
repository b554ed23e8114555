"""The CUDA kernels of `crop_resize` in the simulator: to the level what the definition and Pillow give, and nothing is
read or written that is not theirs, whatever the boxes are.
"""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws some of these cases")
from cpu_launcher import CpuLauncher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crop_cases import ALL_CASES, CASES, CropCase, check
from finegrain_ops import UnsupportedInputError, backends, crop_resize, validation
from finegrain_ops.backends.crops import image_table
from finegrain_ops.backends.cuda import crop_launches, machine

_FIVE = ((3, 5, 40, 61), (0, 0, 90, 70), (10, 20, 11, 21), (0, 69, 90, 70), (57, 2, 60, 68))

# A step is 32 or 16 pixels, a piece 128 or 64: both passes go through several of them.
_WIDE, _TALL = ((40, 900),), ((900, 40),)
_TALL_BOXES = ((0, 0, 40, 900), (1.25, 3.5, 30, 880.25))
_VERY_TALL_BOXES = ((0, 0, 6, 601), (0, 0, 6, 600))  # more than a hundred times as tall as wide, and not more
SHRUNK = {
    "wide": CropCase(((0, 0, 900, 40), (3.5, 1.25, 880.25, 30)), _WIDE, size=(3, 35)),
    "tall": CropCase(_TALL_BOXES, _TALL, size=(35, 3), options={"pillow": "13.0"}),
    "tall, horizontal first": CropCase(_TALL_BOXES, _TALL, size=(35, 3), options={"pillow": "12.1"}),
    "very tall": CropCase(_VERY_TALL_BOXES, ((610, 6),), size=(90, 3), options={"pillow": "12.2"}),
    "to one pixel": CropCase(((0, 0, 700, 600),), ((600, 700),), size=(1, 1), options={"pillow": "13.0"}),
    "wide, float32": CropCase(((0, 0, 900, 40),), _WIDE, size=(3, 35), dtype=torch.float32),
    "tall, float32": CropCase(_TALL_BOXES, _TALL, size=(35, 3), dtype=torch.float32),
}


@pytest.fixture
def volta(use_launcher) -> CpuLauncher:
    return use_launcher(CpuLauncher(70))


@pytest.mark.parametrize("case", ALL_CASES)
def test_cases(case: CropCase, volta: CpuLauncher) -> None:
    check(case, "cuda")
    kernels = [variant.kernel for variant in volta.launched]
    assert kernels == ["crop_weights", "crop_resize"] * (2 if case.dtype is None else 1)


@pytest.mark.parametrize("architecture", [75, 80])
@pytest.mark.parametrize("name", ["padded, fractional", "tall, Pillow 13", "bfloat16 images"])
def test_cases_of_other_architectures(name: str, architecture: int, use_launcher) -> None:
    use_launcher(CpuLauncher(architecture))
    check(CASES[name], "cuda")


@pytest.mark.parametrize("name", SHRUNK)
def test_more_pixels_than_shared_memory_holds(name: str, volta: CpuLauncher) -> None:
    check(SHRUNK[name], "cuda")


# ------------------------------------------------------------------------------------------------------------- Pillow


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_integer_boxes_equal_pillow(data: st.DataObject, volta: CpuLauncher) -> None:
    """To the level, in the order of passes that the installed version has."""
    image_module = pytest.importorskip("PIL.Image")
    height, width = data.draw(st.integers(1, 150), "height"), data.draw(st.integers(1, 80), "width")
    size = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)), "size")
    interpolation = data.draw(st.sampled_from(["bicubic", "bilinear"]), "interpolation")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    pixels = torch.randint(0, 2, (3, height, width), generator=generator, dtype=torch.uint8) * 255
    boxes = []
    for _ in range(2):
        left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
        boxes.append((left, top, right, bottom))
    actual = crop_resize(pixels[None], boxes, [0, 0], size=size, interpolation=interpolation, rescale=1, backend="cuda")
    image = image_module.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    for box, crop in zip(boxes, actual):
        resized = image.crop(box).resize(size[::-1], image_module.Resampling[interpolation.upper()])
        expected = torch.tensor(list(resized.tobytes()), dtype=torch.float32).view(*size, 3).permute(2, 0, 1)
        assert torch.equal(crop, expected)


# ----------------------------------------------------------------------------------------------------- any combination


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    boxes=st.lists(
        st.tuples(st.floats(-9, 50), st.floats(-9, 60), st.floats(0.01, 90), st.floats(0.01, 90)),
        min_size=1,
        max_size=3,
    ),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    shorter=st.integers(0, 9),
    options=st.fixed_dictionaries(
        {
            "interpolation": st.sampled_from(["bicubic", "bilinear"]),
            "antialias": st.booleans(),
            "pad": st.sampled_from([None, "square"]),
            "fill": st.sampled_from([0.0, 77.4]),
            "pillow": st.sampled_from(["11.3", "12.3", "13.0"]),
        }
    ),
)
def test_any_combination(boxes: list, shorter: int, options: dict, volta: CpuLauncher, **case) -> None:
    corners = tuple((x, y, max(x, 0) + width, max(y, 0) + height) for x, y, width, height in boxes)
    if shorter:
        options = {**options, "shortest_edge": max(case["size"]) + shorter}
    check(CropCase(corners, ((70, 60), (61, 52)), options=options, **case), "cuda")


# ---------------------------------------------------------------------------------------------- boxes nobody looked at

_NAN, _INF = float("nan"), float("inf")
_NO_BOXES = (
    *((_NAN, 0, 5, 5), (0, _NAN, 5, 5), (0, 0, _NAN, 5), (0, 0, 5, _NAN), (_NAN,) * 4, (9, 3, 4, 8), (3, 9, 8, 4)),
    *((4, 4, 4, 9), (4, 4, 9, 4), (-9, -9, -1, -1), (90, 70, 99, 99), (_INF, 0, _INF, 5), (-1e300, 0, -1e299, 5)),
)  # fmt: skip


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: nobody looks at values."""
    monkeypatch.setattr(validation, "values_are_checked", lambda tensor: False)


def images_of(kind: str) -> Tensor | list[Tensor]:
    return CASES["batch"].images() if kind == "batch" else CASES["several sizes"].images()


def check_boxes_that_do_not_exist(kind: str = "batch", pad: str | None = None) -> None:
    """They give `fill`, and those between them what they give alone."""
    images, good = images_of(kind), (3, 5, 40, 61)
    options = {"size": (35, 20), "pad": pad, "fill": (3, 80, 250), "mean": 0.5, "std": 0.25, "backend": "cuda"}
    expected = crop_resize(images, [good], [0], **options)[0]
    fill = (torch.tensor([3.0, 80.0, 250.0]) / 255 - 0.5) / 0.25
    boxes = [box for bad in _NO_BOXES for box in (bad, good)]
    result = crop_resize(images, boxes, [0] * len(boxes), **options)
    wild = crop_resize(images, [good] * 5, torch.tensor([-1, 2**40, 0, len(images), -(2**62)]), **options)
    torch.testing.assert_close(result[::2], fill[:, None, None].expand_as(result[::2]), rtol=1e-6, atol=1e-6)
    assert (result[1::2] == expected).all()
    torch.testing.assert_close(wild[[0, 1, 3, 4]], fill[:, None, None].expand(4, 3, 35, 20), rtol=1e-6, atol=1e-6)
    assert torch.equal(wild[2], expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("pad", [None, "square"])
@pytest.mark.parametrize("kind", ["batch", "list"])
def test_boxes_that_do_not_exist(kind: str, pad: str | None, volta: CpuLauncher) -> None:
    check_boxes_that_do_not_exist(kind, pad)


@pytest.mark.usefixtures("unchecked")
def test_boundless_boxes_are_clipped(volta: CpuLauncher) -> None:
    images = images_of("batch")
    options = {"image_index": [1], "size": 24, "backend": "cuda"}
    expected = crop_resize(images, [(0, 0, 90, 70)], **options)
    for box in ((-_INF, -_INF, _INF, _INF), (-1e300, -1.5, 1e300, 71), (-5, -0.0, 90, 1e18)):
        assert torch.equal(crop_resize(images, [box], **options), expected)


# ------------------------------------------------------------------------------------------------------------- rounding


def check_rounding() -> None:
    """A crop as large as its result is the image: every result is the nearest of its type, ties to even."""
    bits = torch.randint(0x3F80, 0x437F, (3, 40, 50), generator=torch.Generator().manual_seed(1)) << 16  # 1 to 255
    bits += torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(10)
    bits[1, 7, 9] = 0x7FFFFFFF  # the NaN that GPUs make
    image = bits.to(torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        result = crop_resize([image], [(0, 0, 50, 40)], size=(40, 50), rescale=1, dtype=dtype, backend="cuda")[0]
        assert result[1].isnan().any()
        torch.testing.assert_close(result[::2], image[::2].to(dtype), rtol=0, atol=0)


def test_rounding(volta: CpuLauncher) -> None:
    check_rounding()


# ------------------------------------------------------------------------------------------------------------ launches


def check_scratch_memory(at_once: int) -> None:
    """Of so many boxes: the others follow in launches of their own."""
    arguments = CropCase(_FIVE, batch=5, has_index=False, options={"rescale": 1}).arguments()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crop_launches, "boxes_at_once", lambda *_: at_once)
        assert torch.equal(crop_resize(**arguments, backend="cuda"), crop_resize(**arguments, backend="reference"))


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_scratch_memory_of_a_few_boxes(at_once: int, volta: CpuLauncher) -> None:
    check_scratch_memory(at_once)
    assert [variant.kernel for variant in volta.launched] == ["crop_weights", "crop_resize"] * -(-5 // at_once)


def test_how_many_boxes_at_once() -> None:
    """In 64 MiB, of 8 bytes of taps for each place and 4 for each weight."""
    assert crop_launches.boxes_at_once(10**6, (224, 224), (41, 41)) == 2**26 // (64 + 448 * 8 + 448 * 41 * 4) == 870
    assert crop_launches.boxes_at_once(9, (224, 224), (41, 41)) == 9
    assert crop_launches.boxes_at_once(9, (1, 1), (2**25, 2**25)) == 1


def test_images_are_not_copied(volta: CpuLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided views go to the kernel as they are."""
    images, boxes = CASES["sliced"].images(), torch.tensor([[3.0, 5, 40, 61]], dtype=torch.float64)
    seen: list[dict[str, Tensor]] = []
    monkeypatch.setattr(volta, "launch", lambda variant, grid, arguments: seen.append(arguments.tensors))
    crop_resize(images, boxes, size=8, backend="cuda")
    crop_resize([*images, *images], boxes, [1], size=8, backend="cuda")
    assert [tensors["boxes"].data_ptr() for tensors in seen] == [boxes.data_ptr()] * 4
    assert seen[0]["images"].data_ptr() == seen[2]["images[0]"].data_ptr() == images[0].data_ptr()


def test_pixels_far_apart_in_memory(volta: CpuLauncher) -> None:
    """Offsets beyond 2^31: 40 rows, 2^26 + 3 bytes apart. Pages that are not touched cost no memory."""
    near = CropCase(sizes=((40, 50),), batch=2).images()
    stride = 2**26 + 3
    far = torch.empty(39 * stride + 300, dtype=torch.uint8).as_strided(near.shape, (150, 50, stride, 1)).copy_(near)
    for boxes in ([(3, 1, 47, 40)], [(0.5, 0.25, 9, 39.5)]):
        expected = crop_resize(near, boxes, [1], size=12, backend="cuda")
        assert torch.equal(crop_resize(far, boxes, [1], size=12, backend="cuda"), expected)


# ------------------------------------------------------------------------------------------------ operators and errors


def test_opcheck(volta: CpuLauncher) -> None:
    images, boxes = CASES["batch"].images(), torch.tensor([[3.0, 5, 40, 61]], dtype=torch.float64)
    rest = ([8, 9], "bicubic", True, False, 0, [0.0] * 3, [1.0] * 3, [0.0] * 3, torch.float16, 2, True, "cuda")
    torch.library.opcheck(
        torch.ops.finegrain_ops.crop_resize.default,
        ([images], boxes, torch.zeros(1, dtype=torch.int64), *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_images_on_a_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.select.cache_clear()
    monkeypatch.setattr(machine, "unavailable_reasons", lambda: [])
    with pytest.raises(UnsupportedInputError, match="images are on cpu; move them to a CUDA device"):
        crop_resize(CASES["batch"].images(), [(0, 0, 5, 5)], [0], size=8, backend="cuda")
    backends.select.cache_clear()


# --------------------------------------------------------------------------------------------------- table of addresses


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> OrderedDict:
    tables: OrderedDict = OrderedDict()
    monkeypatch.setattr(image_table, "_tables", tables)
    return tables


def test_a_table_says_where_images_lie(no_tables: OrderedDict) -> None:
    images = [torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(7, 6, 3)[1:].permute(2, 0, 1)]
    table = image_table.image_table(images)
    assert table.dtype == torch.int64
    assert table.tolist() == [[images[0].data_ptr(), 20, 5, 1, 4, 5], [images[1].data_ptr(), 1, 18, 3, 6, 6]]
    assert len(image_table.COLUMNS) == table.shape[1]
    assert image_table.image_table([image.view_as(image) for image in images]) is table
    assert image_table.image_table(images[::-1]) is not table
    assert image_table.image_table([images[0][:, 1:], images[1]]) is not table


def test_the_tables_used_last_are_remembered(no_tables: OrderedDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_table, "_MOST_TABLES", 2)
    first, second, third, fourth = ([torch.zeros(1, 1, 1 + i)] for i in range(4))
    tables = [image_table.image_table(images) for images in (first, second)]
    next(iter(no_tables.values())).is_captured = True  # a CUDA graph reads the first whenever it is replayed
    for images in (third, second, fourth):
        image_table.image_table(images)
    assert image_table.image_table(first) is tables[0]
    assert image_table.image_table(second) is tables[1]
    assert len(no_tables) == 3
