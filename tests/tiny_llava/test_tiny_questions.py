"""Every question's answer, found again from its words; and that all that can be asked is asked."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finegrain_ops.tiny_llava.questions import (
    AMBIGUOUS,
    ANSWERS,
    BOXED_KINDS,
    CHANCE,
    GLOBAL_KINDS,
    KINDS,
    LOCAL_KINDS,
    Question,
    caption,
    questions_about,
)
from finegrain_ops.tiny_llava.scenes import COLOURS, DIFFICULTIES, LETTERS, SHAPES, Card, Scene, draw_scene
from finegrain_ops.tiny_llava.tokenizer import unknown_words

SIDE = 1000.0
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
# Centres lie on a grid of 3 hundredths of the side: neighbours are too close to be compared, others are not.
STEP = 30


@st.composite
def cards(draw) -> tuple[Card, ...]:
    count = draw(st.integers(3, 8))
    colours = draw(st.permutations(list(COLOURS)))[:count]
    few_shapes = st.sampled_from(SHAPES[: draw(st.integers(1, 4))])
    made = []
    for colour in colours:
        x, y = draw(st.integers(3, 30)) * STEP, draw(st.integers(3, 30)) * STEP
        half = draw(st.integers(20, 90))
        dot = draw(st.sampled_from([name for name in COLOURS if name != colour]))
        box = (float(x - half), float(y - half), float(x + half), float(y + half))
        made.append(Card(colour, draw(few_shapes), draw(st.sampled_from(LETTERS)), dot, box, box, box))
    return tuple(made)


def middle(card: Card) -> float:
    return (card.box[0] + card.box[2]) / 2


# Kind -> its words, and from what is asked for in them the cards that fit and what the answer is on each of them.
ON_CARDS: dict[str, tuple[str, Callable[[Card, str], bool], Callable[[Card], str]]] = {
    "colour": (r"What colour is the (\w+)\?", lambda card, name: card.shape == name, lambda card: card.colour),
    AMBIGUOUS: (r"What colour is the (\w+)\?", lambda card, name: card.shape == name, lambda card: card.colour),
    "shape": (r"What shape is the (\w+) card\?", lambda card, name: card.colour == name, lambda card: card.shape),
    "letter": (
        r"Which letter is on the (\w+) card\?",
        lambda card, name: card.colour == name,
        lambda card: card.letter,
    ),
    "dot": (
        r"What colour is the dot on the (\w+) card\?",
        lambda card, name: card.colour == name,
        lambda card: card.dot,
    ),
}


@given(cards())
@settings(max_examples=80, deadline=None)
def test_answers_on_a_card_are_what_is_on_it(of_scene: tuple[Card, ...]) -> None:
    found = questions_about(of_scene, SIDE)
    for kind, (words, fits, said) in ON_CARDS.items():
        for question in found[kind]:
            (name,) = re.fullmatch(words, question.text).groups()
            fitting = tuple(i for i, card in enumerate(of_scene) if fits(card, name))
            assert question.kind == kind
            assert question.candidates == fitting
            assert question.card in fitting
            assert question.answer == said(of_scene[question.card])
            assert len(fitting) == (2 if kind == AMBIGUOUS else 1)


@given(cards())
@settings(max_examples=80, deadline=None)
def test_answers_about_the_scene(of_scene: tuple[Card, ...]) -> None:
    found = questions_about(of_scene, SIDE)
    (count,) = found["count"]
    assert (count.text, count.answer) == ("How many cards are there?", NUMBERS[len(of_scene)])
    for question in found["leftmost"]:
        assert question.text == "What colour is the leftmost card?"
        (first,) = [card for card in of_scene if card.colour == question.answer]
        assert all(middle(card) - middle(first) > 40 for card in of_scene if card is not first)
    by_colour = {card.colour: card for card in of_scene}
    for question in found["left_of"]:
        one, other = re.fullmatch(r"Is the (\w+) card left of the (\w+) card\?", question.text).groups()
        assert question.answer == ("yes" if middle(by_colour[one]) < middle(by_colour[other]) else "no")
    for kind in ("count", "leftmost", "left_of"):
        assert all((q.kind, q.card, q.candidates) == (kind, None, ()) for q in found[kind])


@given(cards())
@settings(max_examples=80, deadline=None)
def test_all_that_can_be_asked_is_asked_once(of_scene: tuple[Card, ...]) -> None:
    found = questions_about(of_scene, SIDE)
    assert tuple(found) == KINDS
    asked = {kind: [(question.text, question.card) for question in found[kind]] for kind in KINDS}
    every = [(i, card) for i, card in enumerate(of_scene)]
    of_shape = {shape: [i for i, card in every if card.shape == shape] for shape in SHAPES}
    expected = {
        "count": {("How many cards are there?", None)},
        "leftmost": {("What colour is the leftmost card?", None)},
        "left_of": {
            (f"Is the {a.colour} card left of the {b.colour} card?", None)
            for a in of_scene
            for b in of_scene
            if abs(middle(a) - middle(b)) > 40
        },
        "colour": {(f"What colour is the {name}?", on[0]) for name, on in of_shape.items() if len(on) == 1},
        AMBIGUOUS: {(f"What colour is the {name}?", i) for name, on in of_shape.items() if len(on) == 2 for i in on},
        "shape": {(f"What shape is the {card.colour} card?", i) for i, card in every},
        "letter": {(f"Which letter is on the {card.colour} card?", i) for i, card in every},
        "dot": {(f"What colour is the dot on the {card.colour} card?", i) for i, card in every},
    }
    first, second = sorted(map(middle, of_scene))[:2]
    if second - first <= 40:
        expected["leftmost"] = set()
    for kind in KINDS:
        assert len(asked[kind]) == len(set(asked[kind]))
        assert set(asked[kind]) == expected[kind], kind


@given(cards())
@settings(max_examples=30, deadline=None)
def test_a_caption_names_the_cards_from_left_to_right(of_scene: tuple[Card, ...]) -> None:
    said = caption(of_scene)
    names = said.answer.split(" ")
    pairs = list(zip(names[::2], names[1::2]))
    by_colour = {card.colour: card for card in of_scene}
    assert sorted(pairs) == sorted((card.colour, card.shape) for card in of_scene)
    places = [middle(by_colour[colour]) for colour, _ in pairs]
    assert places == sorted(places)


@pytest.mark.parametrize("name", DIFFICULTIES)
def test_scenes_have_answers_and_words_that_the_model_knows(name: str, tokenizer) -> None:
    kinds = set()
    unknown = tokenizer.unk_token_id
    for seed in range(15):
        scene = draw_scene(seed, DIFFICULTIES[name])
        found = questions_about(scene.cards, scene.image.width)
        for question in [*(question for of_kind in found.values() for question in of_kind), caption(scene.cards)]:
            for text in (question.text, f" {question.answer}"):
                assert unknown_words(tokenizer, text) == []
                assert unknown not in tokenizer(text)["input_ids"]
            if question.kind != "caption":
                kinds.add(question.kind)
                assert question.answer in ANSWERS[question.kind]
                assert len(tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]) == 1
    assert kinds == set(KINDS)


def test_every_answer_of_a_kind_is_given() -> None:
    given_answers: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for seed in range(80):
        for difficulty in DIFFICULTIES.values():
            scene = draw_scene(seed, difficulty)
            for kind, of_kind in questions_about(scene.cards, scene.image.width).items():
                given_answers[kind] |= {question.answer for question in of_kind}
    assert given_answers == {kind: set(answers) for kind, answers in ANSWERS.items()}


def test_kinds() -> None:
    assert set(KINDS) == {*GLOBAL_KINDS, *LOCAL_KINDS, AMBIGUOUS} == set(ANSWERS) == set(CHANCE)
    assert len(KINDS) == len(set(KINDS))
    assert all(1 / len(ANSWERS[kind]) <= CHANCE[kind] < 1 for kind in KINDS)
    scene = draw_scene(2)
    for kind, of_kind in questions_about(scene.cards, scene.image.width).items():
        assert all((question.card is not None) == (kind in BOXED_KINDS) for question in of_kind)


def test_a_questions_box_is_its_cards_or_all_of_the_scene() -> None:
    card = Card("red", "square", "A", "blue", (3.0, 4.0, 8.0, 9.0), (4.0, 5.0, 5.0, 6.0), (6.0, 5.0, 7.0, 6.0))
    scene = Scene(0, (card, card), Image.new("RGB", (30, 20)))
    assert Question("shape", "?", "square", 1, (1,)).box(scene) == card.box
    assert Question("count", "?", "two").box(scene) == (0.0, 0.0, 30.0, 20.0)
