"""Stage 2 in bulk: filters first, then every kind of sample."""

from __future__ import annotations

import itertools
import random

import pytest

from finegrain_ops.training.alignment import (
    ALIGNMENT_KINDS,
    Filters,
    alignment_samples,
    object_image_mask,
    phrase_mask,
)
from finegrain_ops.training.annotations import AnnotatedImage, BoxedPhrase

IMAGE = AnnotatedImage(1, "1.jpg", (100, 100))
LEFT, RIGHT, WHOLE, TINY = (
    (0.0, 0.0, 40.0, 40.0),
    (50.0, 0.0, 90.0, 40.0),
    (0.0, 0.0, 100.0, 100.0),
    (0.0, 0.0, 5.0, 5.0),
)


def phrase(name: str, *boxes, image: AnnotatedImage = IMAGE, score: float = 1.0) -> BoxedPhrase:
    return BoxedPhrase(image, name, boxes, score=score)


PHRASES = [
    phrase("left", LEFT),
    phrase("right", RIGHT),
    phrase("whole", WHOLE),
    phrase("tiny", TINY),
    phrase("unsure", LEFT, score=0.2),
    phrase("two", LEFT, RIGHT),
    phrase("many", LEFT, RIGHT, WHOLE, TINY),
    phrase("none"),
]


def test_what_the_filters_leave() -> None:
    assert phrase_mask(PHRASES).tolist() == [True, True, True, True, False, True, False, False]
    assert object_image_mask(PHRASES).tolist() == [True, True, False, False, False, False, False, False]
    loose = Filters(smallest=0.0, largest=1.0, confidence=0.0, boxes=4)
    assert phrase_mask(PHRASES, loose).tolist() == [True] * 7 + [False]
    assert object_image_mask(PHRASES, loose).tolist() == [True] * 5 + [False] * 3
    assert phrase_mask([]).tolist() == []
    assert object_image_mask([]).tolist() == []


def test_every_kind_about_every_phrase_that_is_left() -> None:
    samples = alignment_samples(PHRASES)
    kinds = [sample.kind for sample in samples]
    assert {kind: kinds.count(kind) for kind in ALIGNMENT_KINDS} == {
        "text_to_coordinate": 5,
        "coordinate_to_text": 5,
        "image_to_coordinate": 2,
        "coordinate_to_image": 2,
        "text_to_image": 2,
        "image_to_text": 2,
    }
    assert [sample.turns[0][0] for sample in samples[:2]] == [
        "In this image, where is left located?",
        "In this image, where is right located?",
    ]
    assert alignment_samples([]) == []


def scene(seed: int, count: int) -> list[BoxedPhrase]:
    rng = random.Random(seed)
    phrases = []
    for i in range(count):
        x, y = rng.uniform(0, 60), rng.uniform(0, 60)
        box = (x, y, x + rng.uniform(10, 40), y + rng.uniform(10, 40))
        image = AnnotatedImage(i % 3, f"{i % 3}.jpg", (100, 100))
        phrases.append(phrase(rng.choice(["Dog", "dog", "cat", "cup", "hat"]), box, image=image))
    return phrases


@pytest.mark.parametrize("options", [2, 3])
def test_options_are_apart_and_differ_and_the_answer_is_right(options: int) -> None:
    phrases = scene(0, 60)
    kinds = ("coordinate_to_image", "text_to_image")
    samples = alignment_samples(phrases, kinds, options=options, filters=Filters(overlap=0.2))
    assert 20 < len(samples) < 2 * len(phrases)  # some were left out
    by_box = {p.boxes[0]: p for p in phrases}
    letters = set()
    for sample in samples:
        (question, answer), boxes = sample.turns[0], sample.object_boxes
        assert len(boxes) == options
        assert len({by_box[box].phrase.lower() for box in boxes}) == options
        assert {by_box[box].image.image_id for box in boxes} == {sample.image.image_id}
        for a, b in itertools.combinations(boxes, 2):
            shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
            assert shared / (areas - shared) <= 0.2
        chosen = boxes["abc".index(answer[-2])]
        letters.add(answer[-2])
        if sample.kind == "coordinate_to_image":
            assert sample.location_boxes == (chosen,)
        else:
            assert by_box[chosen].phrase in question
    assert letters == set("abc"[:options])


def test_a_seed_draws_the_same() -> None:
    phrases = scene(1, 30)
    assert alignment_samples(phrases, seed=4) == alignment_samples(phrases, seed=4)
    assert alignment_samples(phrases, seed=4) != alignment_samples(phrases, seed=5)


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"kinds: expected some of 'text_to_coordinate', .* got 'text'"):
        alignment_samples(PHRASES, ["text"])
    with pytest.raises(ValueError, match="options: expected 2 to 26, got 1"):
        alignment_samples(PHRASES, options=1)
