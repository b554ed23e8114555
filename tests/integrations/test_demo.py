"""`python -m finegrain_ops demo` as a user runs it: table, picture, a checkpoint of one's own, wrong arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from finegrain_ops.__main__ import main
from finegrain_ops.demo import random_llava


def test_default(tmp_path: Path, capsys) -> None:
    output = tmp_path / "demo.png"
    assert main(["demo", "--max-new-tokens", "3", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "random weights",
        "attention mass on the region",
        "tokens per second",
        "finegrain_ops sdpa",
        "of 576",
    ):
        assert expected in printed
    before, after = (float(cell) for cell in cells(printed, "region"))
    assert 1.5 * before < after < 1.0  # lambda = 4.5 draws attention to the region
    with Image.open(output) as picture:
        assert picture.width > 1000
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 10_000  # a photograph, not an empty canvas


def cells(printed: str, row: str) -> list[str]:
    """The two values of a row whose name wraps over two lines and ends in `row`."""
    lines = [line for line in printed.splitlines() if "attention mass on the" in line]
    return [cell.strip() for cell in lines[0].split("│")[2:4]]


def test_a_checkpoint_and_a_picture_of_ones_own(tmp_path: Path, capsys) -> None:
    model, processor = random_llava.make()
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "cat.png")
    arguments = ["--model", tmp_path / "llava", "--image", tmp_path / "cat.png", "--output", tmp_path / "out.png"]
    arguments += ["--box", 290, 100, 345, 170, "--weight", 2, "--question", "what colour is the eye ?"]
    assert main(["demo", "--max-new-tokens", "3", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert "random weights" not in printed
    assert "what colour is the eye ?" in printed
    assert (tmp_path / "out.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "--image: expected a picture"),
        (["--image", __file__], "--image: expected a picture"),
        (["--box", "900", "0", "950", "10"], "--box: expected a box that overlaps the image of 600 x 400 pixels"),
        (["--box", "50", "0", "10", "10"], "--box: expected finite x0 < x1"),
        (["--weight", "-1"], "--weight: expected a number >= 0, got -1.0"),
        (["--weight", "nan"], "--weight: expected a number >= 0, got nan"),
        (["--weight", "inf"], "--weight: expected a number >= 0, got inf"),
        (["--model", "./no/such/checkpoint"], "--model: expected a folder or hub name of a LLaVA checkpoint"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_picture_of_ones_own_needs_a_box(tmp_path: Path, capsys) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "grey.png")
    with pytest.raises(SystemExit):
        main(["demo", "--image", str(tmp_path / "grey.png")])
    assert "give the region with --box" in capsys.readouterr().err
