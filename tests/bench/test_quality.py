"""`python -m bench.quality`: intervals, boxes that stand in, what is measured, and the tables and plots of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from bench.quality import __main__ as command
from bench.quality import cof, dualfocus
from bench.quality.boxes import REFERENCE_SIDE, moved_box, oracle_box, wrong_box
from bench.quality.cof import cof_answers
from bench.quality.dualfocus import dualfocus_answers
from bench.quality.measure import PARTS, Part, measure_part, read_rows, write_rows
from bench.quality.plain import plain_answers
from bench.quality.rows import Answers, Row, pooled, wilson
from bench.quality.tables import Table, report, summary
from finegrain_ops.tiny_llava import checkpoint
from finegrain_ops.tiny_llava.held_out import Asked, ask_about
from finegrain_ops.tiny_llava.model import new_model
from finegrain_ops.tiny_llava.questions import KINDS
from finegrain_ops.tiny_llava.tokenizer import make_processor, make_tokenizer

FACTS = {
    "versions": {"torch": "2.11", "triton": None},
    "split": "test",
    "weights": "0123456789abcdef",
    "name": "A pretended CPU",
    "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m bench.quality",
}


@pytest.fixture(scope="module")
def untrained() -> tuple:
    return new_model(0).eval(), make_processor(make_tokenizer())


@pytest.fixture(scope="module")
def colours() -> list[Asked]:
    return ask_about("guard", "colour", 3)


def pretended_rows(right: int = 7) -> Iterator[Row]:
    """Every row of a run, of ten questions each."""
    outcomes = [True] * right + [False] * (10 - right)
    plain = Answers("plain", {}, [True] * 5 + [False] * 5, {})
    for difficulty, kind in PARTS:
        yield Row.of(difficulty, kind, plain, None)
        for boxes in cof.BOXES:
            for weight in cof.WEIGHTS:
                facts = {"iou": 0.8, "iou50": 0.9} if boxes == "predicted" else {}
                answers = Answers("cof", {"boxes": boxes, "weight": weight}, outcomes, facts)
                yield Row.of(difficulty, kind, answers, plain)
        for boxes in dualfocus.BOXES:
            for answer in dualfocus.ANSWERS:
                facts = {"iou": 0.7, "iou50": 0.6, "chose_micro": 0.4, "macro_perplexity": 3.0, "micro_perplexity": 1.1}
                setting = {"answer": answer, "boxes": boxes, "threshold": 0.0}
                yield Row.of(difficulty, kind, Answers("dualfocus", setting, outcomes, facts), plain)
        for threshold in dualfocus.THRESHOLDS:
            setting = {"answer": "chosen", "boxes": "predicted", "threshold": threshold}
            yield Row.of(difficulty, kind, Answers("dualfocus", setting, outcomes, {"skipped": 0.25}), plain)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (399, 400, 0.9860, 0.9996)],
)
def test_the_intervals_are_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_an_interval_holds_its_share(shares: tuple[int, int]) -> None:
    low, high = wilson(*shares)
    assert 0.0 <= low <= shares[0] / shares[1] <= high <= 1.0


def test_a_row_counts_what_it_gained_and_lost() -> None:
    base = Answers("plain", {}, [True, True, False, False, False], {})
    row = Row.of("plain", "count", Answers("cof", {}, [True, False, True, True, False], {}), base)
    assert (row.right, row.count, row.gained, row.lost) == (3, 5, 2, 1)
    both = pooled([row, Row.of("plain", "shape", Answers("cof", {}, [True], {}), Answers("plain", {}, [False], {}))])
    assert (both.right, both.count, both.gained, both.lost, both.kind) == (4, 6, 3, 1, "count, shape")
    with pytest.raises(ValueError, match="at least one"):
        pooled([])


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_box_is_another_cards(kind: str) -> None:
    (one,) = ask_about("guard", kind, 1)
    assert wrong_box(one) in {card.box for card in one.scene.cards}
    assert wrong_box(one) != oracle_box(one)


@pytest.mark.parametrize("pixels", dualfocus.MOVES)
def test_a_moved_box_keeps_its_size_and_stays_inside(colours: list[Asked], pixels: int) -> None:
    for one in colours:
        side = one.scene.image.width
        box, moved = one.box, moved_box(one, one.box, pixels)
        assert moved == moved_box(one, one.box, pixels)
        for low, high in ((0, 2), (1, 3)):
            assert 0 <= moved[low] < moved[high] <= side
            assert moved[high] - moved[low] == pytest.approx(box[high] - box[low])
            assert 0 < abs(moved[low] - box[low]) <= pixels * side / REFERENCE_SIDE + 1e-9
    centre = (side / 2 - 10, side / 2 - 10, side / 2 + 10, side / 2 + 10)
    moved = moved_box(one, centre, 25)
    assert abs(moved[0] - centre[0]) == pytest.approx(25 * side / REFERENCE_SIDE)


def test_the_plain_answers_are_dualfocuss_macro_ones(untrained: tuple, colours: list[Asked]) -> None:
    """And lambda = 1 changes nothing, whatever the box."""
    plain = plain_answers(*untrained, colours).right
    found = {
        tuple(answers.setting.items()): answers for answers in dualfocus_answers(*untrained, colours, ["oracle"], [])
    }
    assert [setting[0][1] for setting in found] == list(dualfocus.ANSWERS)
    macro, micro, _, either = (list(answers.right) for answers in found.values())
    assert macro == plain
    assert either == [a or b for a, b in zip(macro, micro)]
    for answers in cof_answers(*untrained, colours, weights=[1.0], boxes=["oracle", "wrong", "none"]):
        assert list(answers.right) == plain


def test_a_part_has_a_row_of_every_setting(untrained: tuple, tmp_path: Path) -> None:
    checkpoint.save(*untrained, tmp_path, {"seed": 0})
    rows = measure_part(Part("hard", "colour", 1, "guard", str(tmp_path)))
    settings = [(row.method, *row.setting.items()) for row in rows]
    expected = [(row.method, *row.setting.items()) for row in pretended_rows() if row.difficulty == "hard"]
    assert settings == expected[: len(settings)]
    assert {row.count for row in rows} == {1}


def test_the_report_shows_every_kind(tmp_path: Path) -> None:
    rows = list(pretended_rows())
    text = report(rows, FACTS, {"cof": "cof.png"})
    assert "![cof](cof.png)" in text
    short = summary(rows, FACTS)
    assert short.count("\n| ") == len(PARTS) + 1  # and the rule under the header
    assert "70.0% (39.7% to 89.2%)" in short
    assert "+2 -0" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") >= 4
    assert "25% skipped" in text
    with pytest.raises(LookupError, match="got 0"):
        Table(rows).find("plain", "count", "cof", weight=3.0)


def test_stored_rows_become_tables_and_plots(tmp_path: Path) -> None:
    rows = list(pretended_rows())
    write_rows(tmp_path / "rows.jsonl", rows, FACTS)
    assert read_rows(tmp_path / "rows.jsonl") == (rows, FACTS)
    readme = tmp_path / "front.md"
    readme.write_text("before\n<!-- quality table: begin -->\nold\n<!-- quality table: end -->\nafter\n")
    command.main(["--stored", "--output", str(tmp_path), "--readme", str(readme)])
    assert readme.read_text() == (
        "before\n<!-- quality table: begin -->\n" + summary(rows, FACTS) + "\n<!-- quality table: end -->\nafter\n"
    )
    text = (tmp_path / "README.md").read_text()
    for name in ("kinds", "cof", "boxes", "thresholds"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
        assert f"]({name}.png)" in text


def test_a_readme_without_a_place_is_a_usage_error_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "front.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--model", str(tmp_path), "--readme", str(readme)])
    assert stopped.value.code == 2
    assert "--readme: expected exactly one" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--model", str(tmp_path)])
    assert stopped.value.code == 2
    assert "training.json" in capsys.readouterr().err
