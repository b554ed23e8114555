"""Questions that match several objects of their image."""

from __future__ import annotations

import pytest

from finegrain_ops.training.ambiguity import ambiguity_mask, singular
from finegrain_ops.training.annotations import AnnotatedImage, BoxedPhrase, BoxedQuestion

IMAGE = AnnotatedImage(1, "1.jpg", (100, 100))
LEFT, NEAR_LEFT, RIGHT = (0.0, 0.0, 40.0, 90.0), (1.0, 2.0, 41.0, 90.0), (60.0, 0.0, 90.0, 90.0)


def scene(*objects) -> dict:
    """Of (name or names, box)."""
    phrases = []
    for names, box in objects:
        names = (names,) if isinstance(names, str) else names
        phrases.append(BoxedPhrase(IMAGE, names[0], (box,), names=names))
    return {1: phrases}


def keeps(question: str, objects: dict, **options) -> bool:
    (kept,) = ambiguity_mask([BoxedQuestion(IMAGE, 0, question, "Blue.", (LEFT,))], objects, **options).tolist()
    return kept


TWO_PEOPLE = scene(("person", LEFT), ("person", RIGHT), ("tennis ball", LEFT), ("ball", LEFT), ("shirt", LEFT))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the color of the person's shirt?", False),  # the paper's example
        ("What is the color of the PERSON\u2019s shirt?", False),
        ("What is the color of the shirt?", True),
        ("What are the people doing?", True),  # Fig. 8 has it
        ("Where are the persons?", True),
        ("Where is the tennis ball?", True),
        ("Why is it personal?", True),
        ("Who?", True),
        ("", True),
        ("¿Dónde está?", True),
    ],
)
def test_a_question_about_one_of_several_is_ambiguous(question: str, expected: bool) -> None:
    assert keeps(question, TWO_PEOPLE) is expected


def test_one_object_boxed_twice_is_one() -> None:
    twice = scene(("person", LEFT), ("man", LEFT), ("person", NEAR_LEFT))
    assert keeps("Where is the person?", twice)
    assert not keeps("Where is the person?", twice, same=0.99)
    assert not keeps("Where is the person?", scene(("person", LEFT), ("person", NEAR_LEFT), ("person", RIGHT)))


def test_other_names_for_the_same_count() -> None:
    objects = scene((("man", "person"), LEFT), (("woman", "person"), RIGHT), ("trees", LEFT), ("tree", RIGHT))
    assert keeps("Where is the man?", objects)
    assert not keeps("Where is the person?", objects)
    assert not keeps("What is on the tree?", objects)


def test_the_longest_name_counts() -> None:
    objects = scene(
        ("tennis ball", LEFT), ("ball", LEFT), ("ball", RIGHT), ("street sign", LEFT), ("street sign", RIGHT)
    )
    assert keeps("Where is the tennis ball?", objects)
    assert not keeps("Where is the ball?", objects)
    assert not keeps("What does the street sign say?", objects)
    assert keeps("What do the street signs say?", objects)
    assert keeps("What is on the street?", objects)


def test_each_question_is_about_its_image() -> None:
    other = AnnotatedImage("b", "b.jpg", (100, 100))
    objects = {**scene(("dog", LEFT), ("dog", RIGHT), ("cat", LEFT)), "b": [BoxedPhrase(other, "dog", (LEFT,))]}
    questions = [
        BoxedQuestion(image, i, f"Where is the {name}?", "There.", (LEFT,))
        for i, (image, name) in enumerate([(IMAGE, "dog"), (other, "dog"), (IMAGE, "cat"), (other, "cat")])
    ]
    assert ambiguity_mask(questions, objects).tolist() == [False, True, True, True]
    assert ambiguity_mask(questions, {}).tolist() == [True] * 4
    assert ambiguity_mask([], objects).tolist() == []


def test_several_boxes_of_one_phrase_are_several_objects() -> None:
    assert not keeps("Where is the guy?", {1: [BoxedPhrase(IMAGE, "guys", (LEFT, RIGHT))]})


def test_singulars() -> None:
    plurals = "people women firemen boxes dishes benches glasses berries tomatoes buses knives dogs shoes houses horses"
    expected = "person woman fireman box dish bench glass berry tomato bus knife dog shoe house horse"
    words = "grass cactus tennis bus gas is his person specimen tie"
    assert [singular(word) for word in plurals.split()] == expected.split()
    assert [singular(word) for word in words.split()] == words.split()
