"""`python -m finegrain_ops demo` as a user runs it: pages, a picture and a checkpoint of one's own, wrong arguments.

The small model is untrained here; how well the trained one answers is tested elsewhere.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from finegrain_ops.__main__ import main
from finegrain_ops.demo import random_llava
from finegrain_ops.tiny_llava import checkpoint
from finegrain_ops.tiny_llava.model import new_model
from finegrain_ops.tiny_llava.tokenizer import make_processor, make_tokenizer

CROSS = "What colour is the cross?"  # of the default scene's five cards, two are crosses


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with an untrained checkpoint of the small LLaVA."""
    folder = tmp_path_factory.mktemp("small")
    checkpoint.save(new_model(0).eval(), make_processor(make_tokenizer()), folder, {})
    return folder


@pytest.fixture
def demo(tmp_path, monkeypatch, capsys):
    """Runs the demo in a folder of its own and gives what it printed, in lines that are not wrapped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["demo", "--max-new-tokens", "3", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Runs the demo, which must end as argparse ends, and gives what it said."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["demo", *map(str, arguments)])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "usage:" in said
        return said

    return run


def rows(printed: str) -> list[list[str]]:
    """The cells of a table's lines."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        assert picture.width > 1000
        return len(picture.convert("RGB").getcolors(maxcolors=2**24) or ())


def test_without_arguments_both_pages_are_shown(demo, small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", small)
    printed = demo()
    cards, photograph = printed.split("A photograph, and a LLaVA with random weights.")
    assert cards.startswith("Scene 2: 5 cards, 462 x 462 pixels")
    questions = [row[:2] for row in rows(cards)[::2]]
    assert questions == [
        ["How many cards are there?", "five"],
        ["Is the pink card left of the green card?", "yes"],
        ["What colour is the circle?", "green"],
        ["What shape is the pink card?", "cross"],
        ["Which letter is on the pink card?", "H"],
        ["Which letter is on the green card?", "O"],
        ["What colour is the dot on the pink card?", "yellow"],
        ["What colour is the dot on the green card?", "cyan"],
        [CROSS, "pink"],
        [CROSS, "yellow"],
    ]
    kinds = [row[0] for row in rows(cards)[1::2]]
    assert kinds == [
        "count",
        "left_of",
        "colour",
        "shape",
        *["letter"] * 2,
        *["dot"] * 2,
        *["ambiguous, box given"] * 2,
    ]
    for row in rows(cards)[1::2]:
        assert all(" ms" in cell for cell in row[2:])
        assert "micro" in row[4]
    assert "Right, of 10: plain " in cards
    assert "A letter is 3 to 4 of them high in the whole scene,\nand 11 to 12 in a crop of its card." in cards
    assert 'Picture of "Which letter is on the pink card?": demo.png' in cards
    assert_attention_moves(photograph)
    assert colours(tmp_path / "demo.png") > 1000
    assert colours(tmp_path / "demo-photograph.png") > 10_000  # a photograph, not an empty canvas


def assert_attention_moves(printed: str) -> None:
    for expected in ("attention mass on the region", "tokens per second", "finegrain_ops sdpa", "of 576"):
        assert expected in printed
    (before, after) = next(row[1:] for row in rows(printed) if row[0] == "attention mass on the region")
    assert 1.5 * float(before) < float(after) < 1.0  # lambda = 4.5 draws attention to the region


def test_the_photograph_alone(demo, tmp_path) -> None:
    printed = demo("--page", "photograph", "--output", tmp_path / "spoon.png")
    assert_attention_moves(printed)
    assert "Scene" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["spoon.png"]


def test_the_photograph_with_a_checkpoint_and_a_question_of_ones_own(demo, tmp_path) -> None:
    model, processor = random_llava.make()
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    question = "what colour is the cup ?"
    chosen = ["--model", tmp_path / "llava", "--question", question, "--box", 150, 10, 320, 200, "--weight", 2]
    printed = demo("--page", "photograph", *chosen)
    assert "random weights" not in printed
    assert f"{question}   box (150, 10, 320, 200)" in printed
    assert "after, lambda = 2" in printed
    assert (tmp_path / "demo-photograph.png").is_file()


def test_another_scene_is_of_cards_alone(demo, small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", small)
    printed = demo("--scene", 0, "--output", "scene.png")
    assert printed.startswith("Scene 0: 3 cards")
    assert "ambiguous" not in printed  # this scene has no two cards of a shape
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


@pytest.mark.parametrize(
    ("arguments", "first_row", "second_row"),
    [
        (["Which letter is on the orange card?"], ["Which letter is on the orange card?", "Z"], "letter"),
        ([CROSS], [CROSS, "pink or yellow"], "ambiguous"),
        ([CROSS, "--box", 170, 260, 280, 370], [CROSS, "yellow"], "ambiguous, box given"),
        (["What letter is there?"], ["What letter is there?", "?"], None),
    ],
    ids=["letter", "ambiguous", "ambiguous with a box", "not one of the scene's"],
)
def test_a_question_of_ones_own_about_cards(demo, small, arguments, first_row, second_row) -> None:
    printed = demo("--model", small, "--question", *arguments)
    first, second = rows(printed)
    assert first[:2] == first_row
    assert second[0] == (second_row or "")
    assert ("Right, of 1:" in printed) is (second_row is not None)
    assert f'Picture of "{first_row[0]}"' in printed


def test_a_picture_and_a_checkpoint_of_ones_own(demo, small, tmp_path) -> None:
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "cat.png")
    arguments = ["--image", "cat.png", "--model", small, "--question", "What colour is the dot?"]
    printed = demo(*arguments, "--output", "free.png")
    assert printed.startswith("cat.png: 451 x 300 pixels")
    assert "truth" not in printed
    assert "Right" not in printed
    (first, second) = rows(printed)
    assert first[0] == "What colour is the dot?"
    assert all(" ms" in cell for cell in second[1:])
    printed = demo(*arguments, "--box", 290, 100, 345, 170, "--preset", "llava-1.5-13b", "--output", "given.png")
    assert rows(printed)[1][0] == "box given"
    assert min(colours(tmp_path / "free.png"), colours(tmp_path / "given.png")) > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "cat.png"], "--image: expected --model with it, a LLaVA-1.5 checkpoint"),
        (["--image", "cat.png", "--model", "llava"], "--image: expected --question with it"),
        (["--image", "nowhere.png", "--model", "llava", "--question", "?"], "--image: expected a picture"),
        (["--image", __file__, "--model", "llava", "--question", "?"], "--image: expected a picture"),
        (["--image", "cat.png", "--page", "cards"], "--image: expected neither --page nor --scene"),
        (["--image", "cat.png", "--scene", "1"], "--image: expected neither --page nor --scene"),
        (["--page", "photograph", "--scene", "1"], "--scene: expected --page cards"),
        (
            ["--page", "photograph", "--box", "900", "0", "950", "10"],
            "--box: expected a box that overlaps the image of",
        ),
        (["--page", "photograph", "--box", "50", "0", "10", "10"], "--box: expected finite x0 < x1"),
        (["--box", "900", "0", "950", "10"], "--box: expected a box that overlaps the image of 462 x 462 pixels"),
        (["--page", "photograph", "--model", "./no/such"], "--model: expected a folder or hub name of a LLaVA"),
        (["--model", "./no/such"], "--model: no/such/training.json: expected a file of the small LLaVA's checkpoint"),
        (["--scene", "-1"], "--scene: index: expected 0 to 99999999, got -1"),
        (["--question", " "], "--question: expected a question, got ' '"),
        (["--weight", "-1"], "--weight: expected a number >= 0, got -1.0"),
        (["--weight", "nan"], "--weight: expected a number >= 0, got nan"),
        (["--weight", "inf"], "--weight: expected a number >= 0, got inf"),
        (["--preset", "llava-7b"], "--preset: expected one of llava-1.5-7b, llava-1.5-13b"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        (["--device", "abacus"], "--device: expected a device of this machine, got 'abacus'"),
        (["--output", "demo.exe"], "--output: expected a file name that ends in one of"),
        (["--output", "no/such/folder/demo.png"], "--output: expected a file in a folder that exists"),
    ],
    ids=lambda value: "_".join(value).replace(__file__, "this_file") if isinstance(value, list) else "",
)
def test_wrong_arguments(refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_unknown_words_are_told_with_the_known_ones(refused, small) -> None:
    said = refused("--model", small, "--question", "What colour is the pelican?")
    assert "--question: expected words that the small model knows, got 'pelican'." in said
    known = said.partition("it knows: ")[2].split()
    assert {"What", "colour", "pink", "circle", "leftmost", "Z"} <= set(known)
    assert not {"USER:", "<image>", "0.57", "["} & set(known)


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_weights_that_are_not_there_or_not_whole(refused, small, tmp_path, monkeypatch, harm: str) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(small, folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink() if harm == "missing" else weights.write_bytes(data)
    monkeypatch.setattr(checkpoint, "WEIGHTS", folder)
    said = refused()
    assert {"missing": "expected a file of the small LLaVA's", "damaged": "damaged: install"}[harm] in said
    assert "--model" not in said.partition("error:")[2]  # nobody gave one


@pytest.mark.parametrize("kind", ["another family", "no words for boxes"])
def test_checkpoints_that_the_methods_do_not_take(refused, tmp_path, kind: str) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "grey.png")
    model, processor = random_llava.make()
    (model.model.vision_tower if kind == "another family" else model).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    said = refused("--image", tmp_path / "grey.png", "--model", tmp_path / "model", "--question", "what is it ?")
    assert {
        "another family": "--model: expected a folder or hub name of a LLaVA checkpoint, got one of model_type 'clip",
        "no words for boxes": "--model: expected a LLaVA-1.5 checkpoint, processor: ",
    }[kind] in said
