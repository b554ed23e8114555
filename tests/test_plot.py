"""`attention_overlay`: what is drawn, looked up pixel by pixel in the rendered figure."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from finegrain_ops.integrations.image_maps import ImageMap
from finegrain_ops.plot import attention_overlay

RED, WHITE = (255, 0, 0), (255, 255, 255)
ROOT = Path(__file__).resolve().parent.parent


class Rendered:
    """A figure's pixels, by the coordinates of the image in one of its panels."""

    def __init__(self, figure, panel: int = 0) -> None:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.rgb = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
        self.axes = figure.axes[panel]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """(row, column) of the canvas."""
        column, up = self.axes.transData.transform((x, y))
        return self.rgb.shape[0] - up, column

    def __call__(self, x: float, y: float) -> np.ndarray:
        row, column = self.place(x, y)
        return self.rgb[int(row), int(column)]


def shade(colormap: str, value: float, alpha: float = 1.0, below=(0, 0, 0)) -> np.ndarray:
    """The colour of a value in 0..1 of the scale over what is below it."""
    return alpha * 255 * np.array(colormaps[colormap](value)[:3]) + (1 - alpha) * np.array(below)


def assert_colour(actual: np.ndarray, expected, tolerance: float = 3.0) -> None:
    assert np.abs(actual - np.asarray(expected)).max() <= tolerance, (actual, expected)


def black(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height))


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (64, 64), (31, 200), (900, 30), (1080, 1920)])
@pytest.mark.parametrize("extent", ["image", "cropped", "padded"])
def test_every_token_has_the_colour_of_its_value_in_its_place(size: tuple[int, int], extent: str) -> None:
    """Over the whole image, its middle part (a centre crop), or a square around it (padding)."""
    height, width = size
    values = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    side, middle = max(size), 0.2
    x0, y0, x1, y1 = {
        "image": (0.0, 0.0, width, height),
        "cropped": (middle * width, 0.0, (1 - middle) * width, height),
        "padded": ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2),
    }[extent]
    at = Rendered(attention_overlay(black(*size), ImageMap(values, (x0, y0, x1, y1)), normalize=None, alpha=0.8))
    looked_at = 0
    for row in range(4):
        for column in range(5):
            for dy in (0.2, 0.5, 0.8):  # also near the token's borders
                for dx in (0.2, 0.5, 0.8):
                    x, y = x0 + (column + dx) * (x1 - x0) / 5, y0 + (row + dy) * (y1 - y0) / 4
                    if 0.5 < x < width - 0.5 and 0.5 < y < height - 0.5:
                        value = float(values[row, column] / values.max())
                        assert_colour(at(x, y), shade("viridis", value, alpha=0.8))
                        looked_at += 1
    assert looked_at >= 12
    if extent == "cropped":  # what the model does not see stays bare
        assert_colour(at(0.1 * width, 0.5 * height), (0, 0, 0), 0)
        assert_colour(at(0.9 * width, 0.5 * height), (0, 0, 0), 0)


def test_nothing_is_drawn_beyond_the_image() -> None:
    map = ImageMap(torch.ones(4, 4), (-40.0, -10.0, 130.0, 80.0))
    at = Rendered(attention_overlay(black(60, 90), map, [(0, 0, 90, 60)]))
    top, left = at.place(0, 0)
    bottom, right = at.place(90, 60)
    canvas = at.rgb.copy()
    bar = int(right) + 5  # the colour scale is on the right
    canvas[int(top) - 1 : int(bottom) + 2, int(left) - 1 : int(right) + 2] = WHITE
    assert (canvas[:, :bar] == WHITE).all()
    assert not (at.rgb[int(top) + 2 : int(bottom) - 2, int(left) + 2 : int(right) - 2] == WHITE).all(-1).any()


def test_the_image_is_where_its_pixels_are() -> None:
    """Pixel (row r, column c) on [c, c+1] x [r, r+1]."""
    colours = np.array([[[250, 10, 20], [30, 240, 50]], [[60, 70, 230], [200, 200, 10]]], dtype=np.uint8)
    at = Rendered(attention_overlay(colours, {"alone": None}))
    for row in range(2):
        for column in range(2):
            for dy, dx in ((0.1, 0.1), (0.5, 0.5), (0.9, 0.9)):
                assert_colour(at(column + dx, row + dy), colours[row, column], 0)
    assert len(at.axes.figure.axes) == 1  # nothing to give a colour scale for


def test_boxes_are_red_lines_on_their_edges() -> None:
    boxes = [(10, 20, 40, 50), (60, 5, 85, 15)]
    at = Rendered(attention_overlay(black(60, 90), torch.zeros(2, 2), boxes, normalize=None, colormap="gray"))
    is_red = np.abs(at.rgb - RED).max(-1) < 40  # the line's own pixels; beside them it is antialiased
    for x0, y0, x1, y1 in boxes:
        for x, y in ((x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1)):
            assert_colour(at(x, y), RED, 40)
        assert_colour(at((x0 + x1) / 2, (y0 + y1) / 2), (0, 0, 0), 0)
        row, left = at.place(x0, (y0 + y1) / 2)  # centred on the edge, 2 points wide
        columns = np.flatnonzero(is_red[int(row), : int(at.place((x0 + x1) / 2, 0)[1])])
        columns = columns[columns > left - 20]
        assert abs(columns.mean() + 0.5 - left) <= 1.0
        assert 1 <= len(columns) <= 4
    assert_colour(at(50, 40), (0, 0, 0), 0)


@pytest.mark.parametrize(
    "boxes",
    [
        [(10, 20, 400, 50)],
        (10, 20, 400, 50),
        torch.tensor([[10.0, 20.0, 400.0, 50.0]]),
        np.array([10, 20, 90, 50]),
    ],
    ids=["list", "one box", "tensor", "array"],
)
def test_boxes_are_clipped_to_the_image_and_may_come_in_any_form(boxes) -> None:
    figure = attention_overlay(black(60, 90), torch.ones(2, 2), boxes)
    assert [p.get_bbox().extents.tolist() for p in figure.axes[0].patches] == [[10, 20, 90, 50]]


def test_further_boxes_are_dashed() -> None:
    box, around = (30.0, 20.0, 50.0, 40.0), (10.0, 5.0, 80.0, 65.0)  # the second reaches beyond the image
    figure = attention_overlay(black(60, 90), torch.zeros(2, 2), box, normalize=None, colormap="gray", dashed=around)
    assert [(p.get_linestyle(), p.get_bbox().extents.tolist()) for p in figure.axes[0].patches] == [
        ("solid", [30, 20, 50, 40]),
        ("dashed", [10, 5, 80, 60]),
    ]
    at = Rendered(figure)
    edges = {x: [bool(np.abs(at(x, y) - RED).max() < 60) for y in np.linspace(22, 38, 80)] for x in (30, 10)}
    assert all(edges[30])
    assert 0.3 < np.mean(edges[10]) < 0.9


def test_a_picture_of_its_own_gets_neither_map_nor_boxes_nor_the_images_size() -> None:
    crop = Image.new("RGB", (20, 40), (0, 0, 255))
    maps = {"image": None, "map": torch.ones(2, 2), "crop": crop}
    figure = attention_overlay(black(60, 90), maps, [(0, 0, 80, 55)], dashed=[(5, 5, 15, 15)], colormap="gray")
    assert [len(axes.images) for axes in figure.axes[:3]] == [1, 2, 1]
    assert [len(axes.patches) for axes in figure.axes[:3]] == [2, 2, 0]
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "map", "crop"]
    assert [figure.axes[2].get_xlim(), figure.axes[2].get_ylim()] == [(0, 20), (40, 0)]
    for x, y in ((1, 1), (19, 1), (1, 39), (19, 39), (5, 5), (15, 10)):
        assert_colour(Rendered(figure, 2)(x, y), (0, 0, 255))


def test_every_line_of_the_titles_gets_room() -> None:
    heights = [
        attention_overlay(black(60, 90), {title: torch.ones(2, 2), "b": None}).get_figheight()
        for title in ("one", "one\ntwo", "one\ntwo\nthree")
    ]
    assert np.diff(heights) == pytest.approx([0.3, 0.3])


def colours_of(figure, panel: int, points: list[tuple[float, float]]) -> list[np.ndarray]:
    at = Rendered(figure, panel)
    return [at(x, y) for x, y in points]


LEFT_AND_RIGHT = [(22, 30), (67, 30)]


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        (None, [(0.25, 0.75), (0.5, 1.0)]),  # 1, 3 and 2, 4 of 4
        ("sum", [(1 / 3, 1.0), (4 / 9, 8 / 9)]),  # 1/4, 3/4 and 1/3, 2/3 of 3/4
        ("max", [(1 / 3, 1.0), (0.5, 1.0)]),
    ],
)
def test_several_maps_share_one_scale(normalize, expected) -> None:
    maps = {"before": torch.tensor([[1.0, 3.0]]), "after": np.array([[2, 4]])}
    figure = attention_overlay(
        black(60, 90), maps, normalize=normalize, colormap="gray", alpha=1.0, title="costs $5^^ or $6?"
    )
    for panel, values in enumerate(expected):
        for colour, value in zip(colours_of(figure, panel, LEFT_AND_RIGHT), values):
            assert_colour(colour, shade("gray", value))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["before", "after"]
    assert figure.get_suptitle() == "costs $5^^ or $6?"
    assert len(figure.axes) == 3  # with the colour scale
    named = attention_overlay(black(60, 90), list(maps.values()), label="attention")
    assert named.axes[2].get_ylabel() == "attention"


def test_a_strip_of_an_image_gets_margins_instead_of_a_figure_without_end() -> None:
    heights = [attention_overlay(black(*size), {"": None}).get_figheight() for size in ((2000, 10), (10, 2000))]
    assert heights == pytest.approx([2 * 4.2, 4.2 / 4])


def test_negative_values_begin_the_scale() -> None:
    figure = attention_overlay(black(60, 90), torch.tensor([[-1.0, 1.0]]), normalize=None, colormap="gray", alpha=1.0)
    left, right = colours_of(figure, 0, LEFT_AND_RIGHT)
    assert_colour(left, (0, 0, 0))
    assert_colour(right, WHITE)


def test_smooth_interpolates_between_tokens() -> None:
    values = torch.tensor([[0.0, 1.0]])
    along = np.linspace(2, 88, 60)
    exact, smooth = (
        np.array(
            colours_of(
                attention_overlay(black(60, 90), values, colormap="gray", alpha=1.0, smooth=is_smooth),
                0,
                [(x, 30) for x in along],
            )
        )[:, 0]
        for is_smooth in (False, True)
    )
    assert set(exact) == {0, 255}
    assert (np.diff(smooth) >= 0).all()
    assert len(set(smooth)) > 10
    assert smooth[0] < 20
    assert smooth[-1] > 235


def test_an_image_may_come_in_any_form() -> None:
    array = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [array, Image.fromarray(array), tensor, tensor.float() / 255, tensor.to(torch.float64) / 255]
    expected, *others = [Rendered(attention_overlay(form, torch.ones(2, 3), alpha=0.3)).rgb for form in forms]
    assert all(np.array_equal(other, expected) for other in others)
    grey = array[..., 0]
    as_grey, as_colour, as_pil = (
        Rendered(attention_overlay(form, {"": None})).rgb
        for form in (grey, np.stack([grey] * 3, -1), Image.fromarray(grey))
    )
    assert np.array_equal(as_grey, as_colour)
    assert np.array_equal(as_pil, as_colour)


GOOD = {"image": black(60, 90), "map": torch.ones(2, 3)}
BAD = {
    "no image": ({"image": "cup.jpg"}, TypeError, "image: expected a PIL image, a uint8 array or a tensor"),
    "array of floats": ({"image": np.zeros((4, 4, 3))}, TypeError, "image: expected an array of uint8, got float64"),
    "array of four channels": (
        {"image": np.zeros((4, 5, 4), np.uint8)},
        ValueError,
        "image: expected an array (H, W, 3) or (H, W), got shape (4, 5, 4)",
    ),
    "tensor, channels last": (
        {"image": torch.zeros(4, 5, 3)},
        ValueError,
        "image: expected a tensor (3, H, W), got shape (4, 5, 3)",
    ),
    "a model's pixels": ({"image": torch.randn(3, 9, 9)}, ValueError, "image: expected values in 0..1"),
    "tensor of integers": ({"image": torch.zeros(3, 4, 5).int()}, TypeError, "image: expected a uint8 or float tensor"),
    "a flat map": ({"map": torch.ones(6)}, ValueError, "map: expected shape (rows, columns), got (6,)"),
    "an empty map": ({"map": torch.ones(0, 3)}, ValueError, "map: expected shape (rows, columns), got (0, 3)"),
    "a map of NaN": ({"map": [torch.full((2, 2), float("nan"))]}, ValueError, "map[0]: expected finite values"),
    "a map of text": ({"map": {"a": "b"}}, TypeError, "map['a']: expected an ImageMap, a tensor or an array"),
    "no map": ({"map": []}, ValueError, "map: expected at least one map"),
    "zeros": ({"map": torch.zeros(2, 2)}, ValueError, "map: expected a sum above 0 to divide by, got 0.0"),
    "zeros, by the largest": (
        {"map": torch.zeros(2, 2), "normalize": "max"},
        ValueError,
        "map: expected a largest value above 0",
    ),
    "normalize": ({"normalize": "softmax"}, ValueError, 'normalize: expected "sum", "max" or None'),
    "colormap": ({"colormap": "rainbowest"}, ValueError, "colormap: expected the name of one of matplotlib's"),
    "alpha": ({"alpha": 1.5}, ValueError, "alpha: expected a number in 0..1, got 1.5"),
    "panel_width": ({"panel_width": 0}, ValueError, "panel_width: expected a number of inches above 0"),
    "box outside": ({"boxes": [(0, 0, 9, 9), (95, 0, 99, 9)]}, ValueError, "boxes[1]: expected a box that overlaps"),
    "box inverted": ({"boxes": (9, 0, 0, 9)}, ValueError, "boxes: expected finite x0 < x1"),
    "dashed outside": ({"dashed": [(95, 0, 99, 9)]}, ValueError, "dashed[0]: expected a box that overlaps"),
    "dashed of text": ({"dashed": "0 0 9 9"}, TypeError, "dashed: expected a list of (x0, y0, x1, y1)"),
    "boxes of text": ({"boxes": "0 0 9 9"}, TypeError, "boxes: expected a list of (x0, y0, x1, y1)"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        attention_overlay(**{**GOOD, **arguments})


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_leaves_pyplot_and_transformers_alone() -> None:
    heavy = "('matplotlib.pyplot', 'transformers')"
    draw = "finegrain_ops.plot.attention_overlay(torch.zeros(3, 4, 5), torch.ones(2, 2)).savefig(io.BytesIO())"
    assert (
        python(f"import io, sys, torch, finegrain_ops.plot; {draw}; print([m for m in {heavy} if m in sys.modules])")
        == "[]"
    )


def test_without_matplotlib_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "try:\n    import finegrain_ops.plot\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert python(code).startswith("finegrain_ops.plot needs matplotlib, one of the packages of `pip install")
