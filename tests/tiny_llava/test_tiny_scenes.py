"""Scenes are made from their seeds alone, and what their cards are said to be is what is drawn."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from finegrain_ops.tiny_llava.drawing import GLYPH, draw_card, glyph_mask
from finegrain_ops.tiny_llava.scenes import (
    COLOURS,
    CROWDED,
    DIFFICULTIES,
    HARD,
    LETTERS,
    PLAIN,
    SHAPES,
    SPLITS,
    Card,
    Difficulty,
    Scene,
    draw_scene,
    intersection_over_union,
    seed_of,
)

SEEDS = st.integers(0, 500_000_000 - 1)
# Where a card of a shape is painted, and where the background shows: in its box, as fractions.
INSIDE = {
    "square": [(0.05, 0.05), (0.95, 0.05), (0.05, 0.95), (0.95, 0.95)],
    "circle": [(0.5, 0.05), (0.05, 0.5), (0.5, 0.95), (0.95, 0.5), (0.2, 0.2)],
    "triangle": [(0.5, 0.15), (0.1, 0.95), (0.9, 0.95), (0.4, 0.4), (0.6, 0.4)],
    "cross": [(0.5, 0.05), (0.05, 0.5), (0.5, 0.95), (0.95, 0.5), (0.32, 0.1)],
}
OUTSIDE = {
    "square": [(-0.05, 0.5), (1.05, 0.5), (0.5, -0.05), (0.5, 1.05)],
    "circle": [(0.08, 0.08), (0.92, 0.08), (0.08, 0.92), (0.92, 0.92)],
    "triangle": [(0.1, 0.1), (0.9, 0.1), (0.2, 0.5), (0.8, 0.5)],
    "cross": [(0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9), (0.24, 0.24)],
}


@st.composite
def difficulties(draw) -> Difficulty:
    """The three that there are, and others, the densest too."""
    if draw(st.booleans()):
        return draw(st.sampled_from([PLAIN, CROWDED, HARD]))
    low, high = sorted(draw(st.lists(st.integers(3, 8), min_size=2, max_size=2)))
    smallest, largest = sorted(draw(st.lists(st.sampled_from([0.1, 0.15, 0.2, 0.3]), min_size=2, max_size=2)))
    return Difficulty(
        num_cards=(low, high),
        card_side=(smallest, largest),
        colour_spread=draw(st.integers(0, 30)),
        nearness=draw(st.sampled_from([0.0, 0.4])),
        noise=draw(st.sampled_from([0.0, 10.0])),
        clutter=(0, draw(st.integers(0, 5))),
        side=(150, 200),
    )


def facts_of(cards: tuple[Card, ...]) -> list[list[object]]:
    return [[c.colour, c.shape, c.letter, c.dot, [round(edge, 3) for edge in c.box]] for c in cards]


def at(scene: Scene, card: Card, x: float, y: float) -> tuple[int, ...]:
    """The pixel at a place given in fractions of a card's box."""
    x0, y0, x1, y1 = card.box
    return scene.image.getpixel((int(x0 + x * (x1 - x0)), int(y0 + y * (y1 - y0))))


# --- from seeds ---


@given(SEEDS, difficulties())
@settings(max_examples=20, deadline=None)
def test_a_scene_is_its_seeds(seed: int, difficulty: Difficulty) -> None:
    """Whatever else was drawn at random before."""
    random.seed(1)
    np.random.seed(1)
    first = draw_scene(seed, difficulty)
    random.seed(2)
    np.random.seed(2)
    again, other = draw_scene(seed, difficulty), draw_scene(seed + 1, difficulty)
    assert (first.seed, first.cards, first.size) == (again.seed, again.cards, again.size)
    assert first.image.tobytes() == again.image.tobytes()
    assert facts_of(first.cards) != facts_of(other.cards)


DIGESTS = {"plain": "d575de0b6081de25", "crowded": "a4a9239791c70cbb", "hard": "7d93e0859af9b788"}


@pytest.mark.parametrize("name", DIFFICULTIES)
def test_the_cards_of_seeds_stay_what_they_are(name: str) -> None:
    """The trained checkpoint and what was measured with it are about these scenes."""
    facts = [facts_of(draw_scene(seed_of("test", i), DIFFICULTIES[name]).cards) for i in range(12)]
    assert hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16] == DIGESTS[name], facts[0]


def test_splits_have_no_seed_in_common() -> None:
    assert set(SPLITS) == {"train", "validation", "test", "guard", "demo"}
    ranges = sorted((seed_of(split, 0), seed_of(split, 99_999_999)) for split in SPLITS)
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))
    assert [seed_of(split, 7) - seed_of(split, 0) for split in SPLITS] == [7] * len(SPLITS)


@pytest.mark.parametrize(
    ("split", "index", "message"),
    [
        ("exam", 0, "split: expected one of 'train', 'validation', 'test', 'guard', 'demo', got 'exam'"),
        ("train", -1, "index: expected 0 to 99999999, got -1"),
        ("train", 100_000_000, "index: expected 0 to 99999999, got 100000000"),
    ],
)
def test_there_is_no_such_scene(split: str, index: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        seed_of(split, index)


# --- cards ---


@given(SEEDS, difficulties())
@settings(max_examples=30, deadline=None)
def test_cards_are_as_the_difficulty_says(seed: int, difficulty: Difficulty) -> None:
    scene = draw_scene(seed, difficulty)
    height, side = scene.size
    assert height == side == scene.image.width
    assert scene.image.mode == "RGB"
    assert difficulty.side[0] <= side <= difficulty.side[1]
    assert difficulty.num_cards[0] <= len(scene.cards) <= difficulty.num_cards[1]
    assert len({card.colour for card in scene.cards}) == len(scene.cards)
    for card in scene.cards:
        assert card.colour in COLOURS
        assert card.shape in SHAPES
        assert card.letter in LETTERS
        assert card.dot in set(COLOURS) - {card.colour}
        x0, y0, x1, y1 = card.box
        assert x0 >= 0
        assert y0 >= 0
        assert x1 <= side
        assert y1 <= side
        assert x1 - x0 == pytest.approx(y1 - y0)
        assert 0 < x1 - x0 <= difficulty.card_side[1] * side + 1e-6
        assert card.centre == (pytest.approx(x0 + (x1 - x0) / 2), pytest.approx(y0 + (y1 - y0) / 2))
    for a, b in itertools.combinations(scene.cards, 2):
        gaps = [max(a.box[k] - b.box[k + 2], b.box[k] - a.box[k + 2]) for k in (0, 1)]
        assert max(gaps) > 0  # on one axis they lie apart
        assert intersection_over_union(a.box, b.box) == 0


def test_all_numbers_sizes_and_names_occur() -> None:
    scenes = [draw_scene(seed, replace(PLAIN, side=(120, 124))) for seed in range(150)]
    cards = [card for scene in scenes for card in scene.cards]
    assert {len(scene.cards) for scene in scenes} == {3, 4, 5, 6}
    assert {scene.image.width for scene in scenes} == {120, 121, 122, 123, 124}
    assert {card.colour for card in cards} == {card.dot for card in cards} == set(COLOURS)
    assert {card.shape for card in cards} == set(SHAPES)
    assert {card.letter for card in cards} == set(LETTERS)
    shares = [(card.box[2] - card.box[0]) / scene.image.width for scene in scenes for card in scene.cards]
    assert min(shares) < 0.155
    assert 0.2 < max(shares) <= 0.21


# --- pixels ---


@pytest.mark.parametrize("seed", range(8))
def test_cards_are_painted_where_they_are_said_to_be(seed: int) -> None:
    scene = draw_scene(seed, replace(PLAIN, num_cards=(8, 8), colour_spread=0))
    for card in scene.cards:
        paint = COLOURS[card.colour]
        assert [at(scene, card, *place) for place in INSIDE[card.shape]] == [paint] * len(INSIDE[card.shape])
        assert paint not in [at(scene, card, *place) for place in OUTSIDE[card.shape]]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_letter_and_the_dot_lie_on_the_shape(shape: str) -> None:
    """What another letter or dot changes, is on the card and in the box that is given for it; and another letter
    changes nothing of the dot.
    """

    def drawn(seed: int, letter: str, dot: tuple[int, int, int]):
        image = Image.new("RGB", (100, 100), (230, 230, 230))
        box = (10.0, 10.0, 90.0, 90.0)
        specks = list(COLOURS.values())
        rng = np.random.default_rng(seed)
        boxes = draw_card(rng, image, ImageDraw.Draw(image), box, shape, (40, 160, 60), letter, dot, specks)
        return np.asarray(image).astype(int), *boxes

    background = np.full((100, 100, 3), 230)
    for seed in range(20):
        first, letter_box, dot_box = drawn(seed, "A", (1, 2, 3))
        is_card = (first != background).any(-1)
        of_letter = (first != drawn(seed, "Z", (1, 2, 3))[0]).any(-1)
        of_dot = (first != drawn(seed, "A", (3, 2, 1))[0]).any(-1)
        assert (of_dot == (first == (1, 2, 3)).all(-1)).all()
        assert is_card[of_letter | of_dot].all()
        assert not (of_letter & of_dot).any()
        # Pillow draws what an edge touches.
        assert np.pi / 4 * (0.12 * 80) ** 2 <= of_dot.sum() <= np.pi / 4 * (0.12 * 80 + 2) ** 2
        assert bounds(of_dot) == pytest.approx(dot_box, abs=1.01)
        x0, y0, x1, y1 = (int(edge) for edge in letter_box)
        assert y1 - y0 == round(0.17 * 80)
        is_ink = np.zeros((100, 100), bool)
        is_ink[y0:y1, x0:x1] = (first[y0:y1, x0:x1] == 25).all(-1)
        assert bounds(is_ink) == pytest.approx(letter_box, abs=1.01)
        assert 20 < (of_letter & is_ink).sum() < 0.8 * (x1 - x0) * (y1 - y0)


def bounds(mask: np.ndarray) -> tuple[float, ...]:
    """The box around what is marked."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def test_letters_and_dots_of_scenes_can_be_read() -> None:
    """Each in its own box: a letter from the pixels that are wholly ink, a dot from how much there is of its colour."""
    for seed in range(12):
        scene = draw_scene(seed, PLAIN)
        pixels = np.asarray(scene.image)
        for card in scene.cards:
            size = card.box[2] - card.box[0]
            x0, y0, x1, y1 = card.dot_box
            assert (x1 - x0, y1 - y0) == (pytest.approx(0.12 * size), pytest.approx(0.12 * size))
            of_dot = pixels[round(y0) : round(y1), round(x0) : round(x1)]
            assert (of_dot == COLOURS[card.dot]).all(-1).mean() > 0.7
            x0, y0, x1, y1 = (int(edge) for edge in card.letter_box)
            assert card.letter_box == (x0, y0, x1, y1)
            of_letter = pixels[y0:y1, x0:x1]
            ink = (of_letter == 25).all(-1) | (of_letter == 240).all(-1)
            height = max(6, round(GLYPH * size))
            fits = {letter for letter in LETTERS if _is_same(ink, np.asarray(glyph_mask(letter, height)) == 255)}
            assert fits == {card.letter}, (seed, card)
            for box in (card.letter_box, card.dot_box):
                assert all(card.box[k] < box[k] and box[k + 2] < card.box[k + 2] for k in (0, 1))


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def test_letters_are_too_small_in_the_whole_and_large_enough_in_a_crop() -> None:
    """As drawing.py has it: 2 to 4 of the model's 112 pixels, and 10 to 15 of them in DualFocus's crop."""
    for difficulty in DIFFICULTIES.values():
        for seed in range(6):
            scene = draw_scene(seed, difficulty)
            for card in scene.cards:
                size = card.box[2] - card.box[0]
                height = max(6, round(GLYPH * size))
                assert height * 112 / scene.image.width < 4.3
                assert height * 112 / (size + 2 * 25) > 8.5


@pytest.mark.parametrize("letter", LETTERS)
def test_glyphs_have_their_height(letter: str) -> None:
    for height in (6, 13, 30):
        mask = np.asarray(glyph_mask(letter, height))
        assert mask.shape[0] == height
        assert mask.max() > 200
        assert 0.15 < (mask / 255).mean() < 0.75


def test_noise_stays_when_the_scene_is_made_small() -> None:
    """Its grains are a 112th of the side; of pixels' own noise, 4 to 6 pixels to one, hardly anything would be left."""
    plain, noisy = draw_scene(3, PLAIN), draw_scene(3, replace(PLAIN, noise=20.0))
    assert plain.cards == noisy.cards

    def small(scene: Scene) -> np.ndarray:
        return np.asarray(scene.image.resize((112, 112), Image.Resampling.BOX)).astype(float)

    spread = (small(noisy) - small(plain)).std()
    assert 10 < spread < 21  # light pixels are clipped
    assert abs((small(noisy) - small(plain)).mean()) < 3


def test_nearness_moves_a_cards_colour_towards_another_one() -> None:
    nothing_else = replace(PLAIN, colour_spread=0, num_cards=(6, 6))
    for seed in range(4):
        near, plain = draw_scene(seed, replace(nothing_else, nearness=0.3)), draw_scene(seed, nothing_else)
        assert near.cards == plain.cards
        for card in near.cards:
            paint = np.array(at(near, card, *INSIDE[card.shape][0]))
            mixed = {
                name: 0.7 * np.array(COLOURS[card.colour]) + 0.3 * np.array(other) for name, other in COLOURS.items()
            }
            fits = [name for name, colour in mixed.items() if np.abs(paint - colour).max() <= 1]
            assert len(fits) == 1
            assert fits[0] != card.colour


def test_colours_spread() -> None:
    """Each channel, by up to so many levels."""
    off = []
    for seed in range(12):
        scene = draw_scene(seed, replace(PLAIN, colour_spread=12))
        for card in scene.cards:
            off.append(np.array(at(scene, card, *INSIDE[card.shape][0])) - COLOURS[card.colour])
    off = np.array(off)
    assert np.abs(off).max() <= 12
    assert (off.min(0) < -6).all()
    assert (off.max(0) > 6).all()


def test_clutter_is_grey_strokes() -> None:
    def num_grey(scene: Scene) -> int:
        pixels = np.asarray(scene.image).astype(int)
        is_grey = np.ptp(pixels, -1) == 0
        return int((is_grey & (pixels[..., 0] >= 150) & (pixels[..., 0] < 200)).sum())

    for seed in range(4):
        assert num_grey(draw_scene(seed, replace(PLAIN, clutter=(0, 0)))) < 20
        assert num_grey(draw_scene(seed, replace(PLAIN, clutter=(9, 9)))) > 200


# --- overlap ---


@given(*[st.tuples(*[st.integers(0, 12)] * 4)] * 2)
@settings(max_examples=60, deadline=None)
def test_intersection_over_union_counts_cells(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Of boxes with whole edges."""
    a, b = ((min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3])) for v in (a, b))
    cells = [{(x, y) for x in range(v[0], v[2]) for y in range(v[1], v[3])} for v in (a, b)]
    union = len(cells[0] | cells[1])
    expected = len(cells[0] & cells[1]) / union if union else 0.0
    assert intersection_over_union(a, b) == pytest.approx(expected)
