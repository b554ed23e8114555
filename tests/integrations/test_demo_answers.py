"""What the demo asks, prints and draws about one question: the calls behind it, the table, the four panels."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from finegrain_ops.demo.asking import METHODS, Answers, Asker, Query
from finegrain_ops.demo.cards import default_queries, own_query
from finegrain_ops.demo.panels import attention_before_and_after, panels
from finegrain_ops.demo.table import print_answers, tally
from finegrain_ops.methods.cof import CoFResult
from finegrain_ops.methods.dualfocus import DualFocusResult, Pathway
from finegrain_ops.tiny_llava.model import new_model
from finegrain_ops.tiny_llava.scenes import Scene, draw_scene, seed_of
from finegrain_ops.tiny_llava.tokenizer import make_processor, make_tokenizer

QUESTION = "Which letter is on the green card?"


@pytest.fixture(scope="module")
def asker() -> Asker:
    """Of an untrained model."""
    model = new_model(0).eval()
    return Asker(model, make_processor(make_tokenizer()), preset=None, weight=4.5, max_new_tokens=3)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return draw_scene(seed_of("demo", 2))


@pytest.fixture(scope="module")
def green(scene) -> Query:
    """With the true box."""
    card = next(card for card in scene.cards if card.colour == "green")
    return Query(QUESTION, "letter", (card.letter,), card.box)


@pytest.fixture(scope="module")
def asked(asker, scene, green) -> Answers:
    return asker.ask(scene.image, green)


# --- what is asked ---


@pytest.mark.parametrize("index", range(12))
def test_truths_are_those_of_the_cards(index: int) -> None:
    scene = draw_scene(seed_of("demo", index))
    by_colour = {card.colour: card for card in scene.cards}
    queries = default_queries(scene, None)
    assert {"count", "shape", "letter", "dot"} <= {query.kind for query in queries}
    for query in queries:
        (truth,) = query.truths
        words = query.text.rstrip("?").split()
        if query.kind == "count":
            assert truth == ("three", "four", "five", "six")[len(scene.cards) - 3]
        elif query.kind == "left_of":
            left, right = (by_colour[words[i]].centre[0] for i in (2, 7))
            assert truth == ("yes" if left < right else "no")
        elif query.kind in ("shape", "letter", "dot"):
            assert truth == getattr(by_colour[words[-2]], query.kind)
        else:
            assert by_colour[truth].shape == words[-1]
        assert query.box == (by_colour[truth].box if query.kind == "ambiguous" else None)
    ambiguous = [query for query in queries if query.kind == "ambiguous"]
    assert len(ambiguous) in (0, 2)
    assert len({query.text for query in ambiguous}) <= 1
    assert len({query.truths for query in ambiguous}) == len(ambiguous)


def test_a_given_box_is_asked_with_where_the_question_needs_none(scene) -> None:
    box = (10.0, 20.0, 60.0, 80.0)
    boxes = {query.kind: query.box for query in default_queries(scene, box)}
    assert all((given == box) is (kind != "ambiguous") for kind, given in boxes.items())


@pytest.mark.parametrize("colour", ["pink", "yellow"])
def test_a_box_settles_an_ambiguous_question(scene, colour: str) -> None:
    x0, y0, x1, y1 = next(card.box for card in scene.cards if card.colour == colour)
    query = own_query("What colour is the cross?", scene, (x0 - 9, y0 + 5, x1 + 4, y1 + 2))
    assert query.truths == (colour,)


# --- how ---


def test_plain_is_what_the_model_generates(asker, asked, scene) -> None:
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    inputs = asker.cof.processor(images=scene.image, text=prompt, return_tensors="pt")
    tokens = asker.model.generate(**inputs, do_sample=False, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
    assert len(tokens) == 3
    assert asked.plain == asker.cof.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert not hasattr(asker.model, "_finegrain_handle")  # no patch is left


def test_both_methods_are_given_the_box(asked, green) -> None:
    assert asked.cof.box == asked.dualfocus.box == green.box
    assert asked.cof.grounding_text is asked.dualfocus.grounding_text is None
    assert tuple(asked.seconds) == METHODS


def test_without_a_box_the_model_names_it(asker, scene) -> None:
    one = asker.ask(scene.image, Query(QUESTION))
    assert one.cof.grounding_text
    assert one.dualfocus.grounding_text
    assert [one.is_right(method) for method in METHODS] == [None] * 3
    assert one.marked("plain") == one.plain


@pytest.mark.parametrize(
    ("preset", "weight", "expected"),
    [(None, None, (2.0, 1.3)), ("llava-1.5-13b", None, (4.5, 1.0)), ("llava-1.5-13b", 7.0, (7.0, 1.0))],
    ids=["default", "preset", "weight before preset"],
)
def test_presets(asker, preset, weight, expected) -> None:
    made = Asker(asker.model, asker.cof.processor, preset=preset, weight=weight, max_new_tokens=1)
    assert (made.cof.weight, made.cof.expand) == expected


def test_every_answer_comes_back_in_order_after_one_warm_up(asker, scene, monkeypatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(asker, "ask", lambda image, query: calls.append(query.text) or query)
    queries = [Query("a"), Query("b"), Query("b")]
    assert asker.ask_all(scene.image, queries) == queries
    assert calls == ["a", "a", "b", "b"]


# --- what is printed ---


def answers(plain: str, cof: str, macro: str, micro: str | None, chosen: str, truths: tuple[str, ...]) -> Answers:
    """As they would be of a question; DualFocus's perplexities are 1.25 and 3."""
    low, high = (Pathway(text, perplexity, perplexity, ()) for text, perplexity in ((micro or "", 1.25), (macro, 3.0)))
    if chosen == "macro":
        low, high = replace(low, perplexity=3.0), replace(high, perplexity=1.25)
    common: dict[str, Any] = {"box": None, "grounding_text": None, "perplexity": 1.0, "timings": {}}
    return Answers(
        Query("Which letter?", "letter", truths),
        plain,
        CoFResult(text=cof, chosen="cof", regions=(), **common),
        DualFocusResult(
            text=macro if chosen == "macro" else micro or "",
            chosen=chosen,
            macro=high,
            micro=None if micro is None else low,
            crop=None,
            reason="perplexity",
            work={},
            **common,
        ),
        {"plain": 0.0204, "CoF": 0.1, "DualFocus": 0.0456},
    )


def printed(ones: list[Answers], encoding: str = "utf-8", **options: Any) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_answers(ones, "Scene", Console(file=stream, width=150, **options))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


MICRO = answers("K", "H", "K", "H", "micro", ("H",))
MACRO = answers("H", "H", "H", "K", "macro", ("H", "O"))
NO_BOX = answers("H", "H", "H", None, "macro", ())


@pytest.mark.parametrize(
    ("one", "first", "second"),
    [
        (MICRO, ["Which letter?", "H", "✗ K", "✓ H", "✓ H"], "46 ms, micro 1.25 (macro 3.00)"),
        (MACRO, ["Which letter?", "H or O", "✓ H", "✓ H", "✓ H"], "46 ms, macro 1.25 (micro 3.00)"),
        (NO_BOX, ["Which letter?", "?", "H", "H", "H"], "46 ms, macro (no box)"),
    ],
    ids=["micro", "macro", "no box"],
)
def test_rows(one: Answers, first: list[str], second: str) -> None:
    lines = [line.strip("│").split("│") for line in printed([one]).splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [first, ["letter", "", "20 ms", "100 ms", second]]


def test_right_is_green_and_wrong_is_red() -> None:
    text = printed([MICRO], force_terminal=True, color_system="standard", legacy_windows=False)
    assert "\x1b[31m✗ K" in text
    assert text.count("\x1b[32m✓ H") == 2


def test_a_terminal_without_ticks_gets_words() -> None:
    text = printed([MICRO], "ascii")
    assert "wrong: K" in text
    assert text.count("right: H") == 2


def test_only_known_truths_are_counted() -> None:
    assert tally([MICRO, MACRO, NO_BOX]) == "Right, of 2: plain 1, CoF 2, DualFocus 2."
    assert tally([NO_BOX]) == ""


# --- what is drawn ---


def titles(figure) -> list[list[str]]:
    return [axes.get_title().split("\n") for axes in figure.axes[:4]]


def test_four_panels(asker, scene, asked, green) -> None:
    figure = panels(asker, scene.image, asked)
    assert len(figure.axes) == 5  # with the colour scale
    (truth,) = green.truths
    explained = "the box that was given, and the crop (dashed)"
    assert titles(figure)[0] == [explained, f"truth: {truth}"]
    assert titles(figure)[1] == ["attention before", f"plain: {asked.marked('plain')}"]
    assert titles(figure)[2] == ["attention after, λ = 4.5", f"CoF: {asked.marked('CoF')}"]
    chosen = asked.dualfocus.chosen
    assert titles(figure)[3] == [
        "what the model sees of the crop, 112 x 112",
        f"DualFocus, {chosen}: {asked.marked('DualFocus')}",
    ]
    for axes in figure.axes[:3]:
        solid, dashed = axes.patches
        assert solid.get_linestyle() in ("solid", "-")
        assert dashed.get_linestyle() in ("dashed", "--")
        assert [solid.get_xy(), dashed.get_xy()] == [green.box[:2], asked.dualfocus.crop[:2]]
    assert not figure.axes[3].patches
    before, after = (axes.images[1].get_clim() for axes in figure.axes[1:3])
    assert before == after


def test_the_last_panel_is_the_crop_as_pillow_resizes_it(asker, scene, asked) -> None:
    shown = np.asarray(panels(asker, scene.image, asked).axes[3].images[0].get_array()).astype(int)
    crop = scene.image.crop(asked.dualfocus.crop).resize((112, 112), Image.Resampling.BICUBIC)
    assert np.abs(shown - np.asarray(crop).astype(int)).max() <= 1


def test_attention_after_is_that_of_the_regions(asker, scene, asked) -> None:
    before, after = attention_before_and_after(asker, scene.image, asked)
    (x0, y0, x1, y1) = asked.cof.regions[0]
    token = scene.image.width / 8
    in_region = torch.tensor(
        [
            [x0 < (c + 1) * token and c * token < x1 and y0 < (r + 1) * token and r * token < y1 for c in range(8)]
            for r in range(8)
        ]
    )
    shares = [float(panel.values[in_region].sum() / panel.values.sum()) for panel in (before, after)]
    assert 0.05 < shares[0] < 0.4
    assert shares[1] > 1.8 * shares[0]


def test_without_boxes_the_whole_scene_takes_the_place_of_the_crop(asker, scene, asked) -> None:
    whole = (0.0, 0.0, 462.0, 462.0)
    bare = replace(
        asked,
        plain="a long answer " * 9,
        cof=replace(asked.cof, box=None, regions=(whole,)),
        dualfocus=replace(asked.dualfocus, crop=None, micro=None, chosen="macro"),
        query=Query(QUESTION),
    )
    figure = panels(asker, scene.image, bare)
    assert titles(figure)[0] == ["no box, no crop", ""]
    assert titles(figure)[1][1] == "plain: a long answer a long answer a long ..."
    assert not any(axes.patches for axes in figure.axes[:4])
    assert figure.axes[3].images[0].get_array().shape == (112, 112, 3)
