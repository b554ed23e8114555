"""Questions about scenes that were not trained on, and how a model's answers to them are counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from finegrain_ops.tiny_llava.held_out import Asked, ask_about, box_quality, in_batches
from finegrain_ops.tiny_llava.questions import AMBIGUOUS, KINDS, questions_about
from finegrain_ops.tiny_llava.scenes import HARD, PLAIN, draw_scene, seed_of
from finegrain_ops.tiny_llava.training import validation
from finegrain_ops.tiny_llava.training.validation import validate


@pytest.mark.parametrize("kind", KINDS)
def test_each_question_is_about_a_scene_of_its_own(kind: str) -> None:
    """The first of the split that have such a question."""
    asked = ask_about("test", kind, 4)
    seeds = [one.scene.seed for one in asked]
    assert seeds == sorted(set(seeds))
    assert len(seeds) == 4
    for one in asked:
        assert one.question.kind == kind
        assert one.question in questions_about(one.scene.cards, one.scene.image.width)[kind]
        assert one.box == one.question.box(one.scene)
    first, last = seed_of("test", 0), seeds[-1]
    for seed in set(range(first, last)) - set(seeds):
        scene = draw_scene(seed)
        assert questions_about(scene.cards, scene.image.width)[kind] == []


def test_questions_are_drawn_from_the_scenes_seed() -> None:
    asked, again = ask_about("test", "left_of", 6), ask_about("test", "left_of", 8)
    assert [one.question for one in asked] == [one.question for one in again[:6]]
    # Not always the first one that there is.
    firsts = [questions_about(one.scene.cards, one.scene.image.width)["left_of"][0] for one in asked]
    assert [one.question for one in asked] != firsts


def test_split_and_difficulty() -> None:
    (one,) = ask_about("guard", "count", 1, HARD)
    assert one.scene.cards == draw_scene(seed_of("guard", 0), HARD).cards
    assert ask_about("guard", "count", 1)[0].scene.cards == draw_scene(seed_of("guard", 0), PLAIN).cards
    assert ask_about("guard", "count", 0) == []


@pytest.mark.parametrize(
    ("split", "kind", "message"),
    [
        ("test", "weight", "kind: expected one of 'count', .*, got 'weight'"),
        ("exam", "count", "split: expected one of"),
    ],
)
def test_there_are_no_such_questions(split: str, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask_about(split, kind, 1)


def test_batches() -> None:
    asked = ask_about("test", "count", 5)
    assert [list(batch) for batch in in_batches(asked, 2)] == [asked[:2], asked[2:4], asked[4:]]
    assert [list(batch) for batch in in_batches(asked)] == [asked]


def test_the_quality_of_boxes() -> None:
    (one,) = ask_about("test", "shape", 1)
    x0, y0, x1, y1 = one.box
    assert box_quality(one, None) == 0
    assert box_quality(one, one.box) == pytest.approx(1)
    assert box_quality(one, (x0, y0, (x0 + x1) / 2, y1)) == pytest.approx(0.5)
    assert box_quality(one, (x0, y0, x1, y1 + (y1 - y0))) == pytest.approx(0.5)
    (whole,) = ask_about("test", "count", 1)
    height, width = whole.scene.size
    assert box_quality(whole, (0.0, 0.0, float(width), height / 4)) == pytest.approx(0.25)


def test_where_a_question_is_ambiguous_each_card_is_right() -> None:
    (one,) = ask_about("test", AMBIGUOUS, 1)
    qualities = [box_quality(one, card.box) for card in one.scene.cards]
    assert [i for i, quality in enumerate(qualities) if quality > 0.99] == list(one.question.candidates)
    assert len(one.question.candidates) == 2


# --- validation ---


def test_shares_are_counted(monkeypatch) -> None:
    """Of a model that is right as often as is said here: by the number of the question."""
    asked: list[Asked] = []

    class Oracle:
        def __init__(self, model, processor) -> None:
            assert model.training is False

        def answer_batch(self, images, texts, **generation):
            assert len(images) == len(texts) <= 32
            results = []
            for image, text in zip(images, texts):
                one = known[text, image.tobytes()]
                k = len(asked)
                asked.append(one)
                say = lambda is_right, one=one: SimpleNamespace(text=one.question.answer if is_right else "zebra")  # noqa: E731
                x0, y0, x1, y1 = one.box
                results.append(
                    SimpleNamespace(
                        macro=say(k % 4 != 0),
                        micro=None if k % 4 == 3 else say(k % 4 == 1),
                        text=say(k % 2 == 0).text,
                        box=None if k % 4 == 3 else (x0, y0, x1, y1) if k % 4 else (x0, y0, x0 + 0.4 * (x1 - x0), y1),
                    )
                )
            return results

    known = {
        (one.question.text, one.scene.image.tobytes()): one for kind in KINDS for one in ask_about("guard", kind, 4)
    }
    monkeypatch.setattr(validation, "DualFocus", Oracle)
    model = SimpleNamespace(training=True)
    model.train = lambda mode=True: setattr(model, "training", mode) or model
    model.eval = lambda: model.train(False)
    found = validate(model, None, 4, split="guard")
    assert model.training is True
    assert len(asked) == 4 * len(KINDS)
    assert found == {kind: {"macro": 0.75, "micro": 0.25, "chosen": 0.5, "boxes": 0.5} for kind in KINDS}


def test_an_untrained_model_is_mostly_wrong(model, processor) -> None:
    found = validate(model, processor, 1)
    assert set(found) == set(KINDS)
    shares = [share for row in found.values() for share in row.values()]
    assert set(shares) <= {0.0, 1.0}
    assert sum(shares) < 0.3 * len(shares)
    assert not model.training
