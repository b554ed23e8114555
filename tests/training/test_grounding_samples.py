"""TinyGroundingGPT's kinds of samples, after the examples of the paper's Figs. 10 and 11."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finegrain_ops.training.annotations import AnnotatedImage, BoxedCaption, BoxedPhrase
from finegrain_ops.training.grounding_samples import (
    GroundingSample,
    conversation,
    coordinate_to_image,
    coordinate_to_text,
    description,
    highlighted,
    image_to_coordinate,
    image_to_text,
    text_to_coordinate,
    text_to_image,
)

IMAGE = AnnotatedImage(1, "1.jpg", (100, 200))
HAT, MAN = (10.0, 20.0, 30.0, 40.0), (100.0, 0.0, 180.0, 100.0)
hat, man = BoxedPhrase(IMAGE, "blue hat", (HAT,)), BoxedPhrase(IMAGE, "the right man", (MAN,))
both = BoxedPhrase(IMAGE, "two things", (HAT, MAN))


def test_text_and_coordinates() -> None:
    there = text_to_coordinate(hat)
    assert there.turns == (("In this image, where is blue hat located?", "<loc>"),)
    assert (there.object_boxes, there.location_boxes) == ((), (HAT,))
    back = coordinate_to_text(hat)
    assert back.turns == (("Describe the object located within the region <loc>.", "blue hat"),)
    assert back.location_boxes == (HAT,)
    assert text_to_coordinate(both).turns[0][1] == "<loc>, <loc>"
    assert text_to_coordinate(both).location_boxes == (HAT, MAN)
    assert coordinate_to_text(both, "What is in {location}?").turns == (("What is in <loc>, <loc>?", "two things"),)


def test_images_and_coordinates() -> None:
    where = image_to_coordinate(hat)
    assert where.turns == (("What is the location of <object>?", "<loc>"),)
    assert where.object_boxes == where.location_boxes == (HAT,)
    which = coordinate_to_image([hat, man], 1)
    expected = ("Which is the item in region <loc>? a. <object>; b. <object>.", "The answer is b.")
    assert which.turns == (expected,)
    assert (which.object_boxes, which.location_boxes) == ((HAT, MAN), (MAN,))


def test_images_and_texts() -> None:
    shown = text_to_image([man, hat], 1)
    assert shown.turns == (("Which is blue hat? a. <object>; b. <object>.", "The answer is b."),)
    assert (shown.object_boxes, shown.location_boxes) == ((MAN, HAT), ())
    named = image_to_text([man, hat], 0)
    assert named.turns == (("What is <object>? a. the right man; b. blue hat.", "The answer is a. the right man."),)
    assert named.object_boxes == (MAN,)


def test_highlighted_objects_of_questions_are_shown() -> None:
    """Fig. 10's examples."""
    question = "Can you identify <blue hat> is worn by whom? A. the left woman B. the right man"
    sample = highlighted(IMAGE, question, "The answer is B. the right man.", {"The blue hat": HAT, "cane": MAN})
    asked = "Can you identify <object> is worn by whom? A. the left woman B. the right man"
    assert sample.turns == ((asked, "The answer is B. the right man."),)
    assert sample.object_boxes == (HAT,)
    question = "What is the right man reading? A. <newspaper> B. <Cane>"
    sample = highlighted(IMAGE, question, "The answer is A. <newspaper>.", {"newspaper": HAT, "a cane": MAN})
    asked = "What is the right man reading? A. <object> B. <object>"
    assert sample.turns == ((asked, "The answer is A. newspaper."),)
    assert sample.object_boxes == (HAT, MAN)


def test_highlights_without_a_box_or_none_at_all() -> None:
    with pytest.raises(ValueError, match="boxes: expected one for 'cane', got only 'hat'"):
        highlighted(IMAGE, "Is it <hat> or <cane>?", "hat", {"hat": HAT})
    with pytest.raises(ValueError, match='question: expected objects highlighted with "<>" in it'):
        highlighted(IMAGE, "Is it [1]?", "<hat>", {"hat": HAT})


ROUNDS = [  # Fig. 11's example
    (
        "What clothes is <the girl> [0.25, 0.5, 0.5, 1.0] wearing?",
        "<The girl> is wearing <a pink dress> [0.25, 0.25, 0.75, 0.5].",
    ),
    ("Why is this <girl> climbing the <stairs>?", "She is going to enter her <playhouse> [0.0, 0.0, 1.0, 0.5]."),
]
GIRL, DRESS, HOUSE = (50.0, 50.0, 100.0, 100.0), (50.0, 25.0, 150.0, 50.0), (0.0, 0.0, 200.0, 50.0)


def test_conversations_in_words_and_coordinates() -> None:
    sample = conversation(IMAGE, ROUNDS, image_share=0.0)
    assert sample.turns == (
        ("What clothes is the girl <loc> wearing?", "The girl is wearing a pink dress <loc>."),
        ("Why is this girl climbing the stairs?", "She is going to enter her playhouse <loc>."),
    )
    assert (sample.object_boxes, sample.location_boxes) == ((), (GIRL, DRESS, HOUSE))


def test_conversations_show_objects_in_questions() -> None:
    forms = set()
    for seed in range(40):
        sample = conversation(IMAGE, ROUNDS, image_share=1.0, rng=random.Random(seed))
        forms.add((sample.turns[0][0], sample.object_boxes, sample.location_boxes))
        assert sample.turns[0][1] == "The girl is wearing a pink dress <loc>."
        # No box was ever given for the stairs; the girl's was, in the round before.
        assert sample.turns[1][0] == "Why is this <object> climbing the stairs?"
    assert forms == {
        ("What clothes is <object> <loc> wearing?", (GIRL, GIRL), (GIRL, DRESS, HOUSE)),
        ("What clothes is the girl <object> wearing?", (GIRL, GIRL), (DRESS, HOUSE)),
    }
    known = conversation(IMAGE, ROUNDS, {"Stairs": HAT}, image_share=1.0)
    assert known.turns[1][0] == "Why is this <object> climbing the <object>?"
    assert known.object_boxes == (GIRL, GIRL, HAT)
    shares = [len(conversation(IMAGE, ROUNDS, rng=random.Random(seed)).object_boxes) for seed in range(200)]
    assert 0.4 < sum(shares) / 400 < 0.6
    assert conversation(IMAGE, ROUNDS) == conversation(IMAGE, ROUNDS)


def test_coordinates_alone_other_conventions_and_other_brackets() -> None:
    rounds = [("What is at [250, 500, 500, 1000]? [sic] <x> [no box]", "<object>, not <image> [0, 0, 1000, 500].")]
    sample = conversation(IMAGE, rounds, convention="permille")
    assert sample.turns == (("What is at <loc>? [sic] x [no box]", "object, not image <loc>."),)
    assert sample.location_boxes == (GIRL, HOUSE)


def test_descriptions_have_coordinates_after_phrases() -> None:
    text = "Zwei Jungen mit einem Hut ."
    boys = BoxedPhrase(IMAGE, "Zwei Jungen", (GIRL, MAN), "1")
    caption = BoxedCaption(IMAGE, text, (boys, BoxedPhrase(IMAGE, "einem Hut", (HAT,), "2")), ((0, 11), (16, 25)))
    sample = description(caption)
    assert sample.turns[0][1] == "Zwei Jungen <loc>, <loc> mit einem Hut <loc> ."
    assert sample.location_boxes == (GIRL, MAN, HAT)
    assert description(BoxedCaption(IMAGE, "Nichts .", (), ())).turns[0][1] == "Nichts ."


def test_messages_begin_with_the_image() -> None:
    assert conversation(IMAGE, [("a", "b"), ("c", "d")]).messages == [
        {"role": "user", "content": "<image>\na"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


other = BoxedPhrase(AnnotatedImage(2, "2.jpg", (100, 200)), "else", (HAT,))
BAD = {
    "no turns": (lambda: GroundingSample("x", IMAGE, ()), "turns: expected at least one"),
    "image named": (lambda: GroundingSample("x", IMAGE, (("<image>", "a"),)), "turns: expected texts without <image>"),
    "no object box": (lambda: GroundingSample("x", IMAGE, (("<object>", "a"),)), "object_boxes: expected one for each"),
    "a location too many": (
        lambda: GroundingSample("x", IMAGE, (("a", "<loc>"),), (), (HAT, HAT)),
        r"location_boxes: expected one for each of the 1 <loc> of 'a\\n<loc>', got 2",
    ),
    "object in an answer": (
        lambda: GroundingSample("x", IMAGE, (("a", "<object>"),), (HAT,)),
        r"turns\[0\]: expected an answer without <object>",
    ),
    "box outside": (
        lambda: text_to_coordinate(BoxedPhrase(IMAGE, "a", ((200.0, 0.0, 210.0, 5.0),))),
        r"location_boxes\[0\]: expected a box with an area in the image of \(100, 200\)",
    ),
    "no area": (
        lambda: image_to_coordinate(BoxedPhrase(IMAGE, "a", ((5.0, 0.0, 5.0, 5.0),))),
        r"object_boxes\[0\]: expected a box with an area",
    ),
    "no box": (lambda: text_to_coordinate(BoxedPhrase(IMAGE, "a", ())), "phrase: expected one with a box, got 'a'"),
    "two boxes shown": (
        lambda: image_to_coordinate(both),
        "phrase: expected one box, which an object image",
    ),
    "placeholder in a phrase": (
        lambda: text_to_coordinate(BoxedPhrase(IMAGE, "a <loc>", (HAT,))),
        "phrase: expected text without the placeholder <loc>",
    ),
    "options of two images": (lambda: text_to_image([hat, other], 0), "options: expected phrases of one image"),
    "question without place": (
        lambda: text_to_coordinate(hat, "Where?"),
        r'question: expected "\{phrase\}" in it, got',
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_samples_that_there_are_none_of(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


mentions = ["<girl>", "<the Girl>", "<a b>", "<object>", "<loc>", "<image>", "[0.1, 0.2, 0.3, 0.4]", "[1, 2]"]
pieces = st.sampled_from([*mentions, "<", ">", " ", "x", "é", "["])
texts = st.lists(pieces, max_size=8).map("".join)


def test_brackets_in_brackets_make_no_placeholders() -> None:
    with pytest.raises(ValueError, match="turns: expected texts without <image>"):
        conversation(IMAGE, [("<<image>>", "a")])
    with pytest.raises(ValueError, match="location_boxes: expected one for each of the 1 <loc>"):
        conversation(IMAGE, [("<<loc>>", "a")])


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 9))
@settings(deadline=None, max_examples=300)
def test_every_placeholder_of_a_conversation_has_its_box(rounds, share: float, seed: int) -> None:
    """Whatever a model wrote."""
    assume(not any("<<" in text for turn in rounds for text in turn))  # brackets in brackets: refused
    sample = conversation(IMAGE, rounds, {"girl": GIRL}, image_share=share, rng=random.Random(seed))
    text = "\n".join(map("\n".join, sample.turns))
    assert text.count("<object>") == len(sample.object_boxes)
    assert text.count("<loc>") == len(sample.location_boxes)
    assert "<image>" not in text
    assert not any("<object>" in answer for _, answer in sample.turns)
