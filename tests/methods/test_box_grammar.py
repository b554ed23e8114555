"""The grammar of a box's text against the set of all such texts, against `boxes.parse_boxes`, and rounding."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis", reason="hypothesis draws the formats, the texts and the boxes")
from hypothesis import example, given
from hypothesis import strategies as st

from finegrain_ops import families
from finegrain_ops.boxes import parse_boxes
from finegrain_ops.methods.box_grammar import (
    JSON,
    LIST,
    LIST_OF_THOUSANDTHS,
    MARKUP,
    BoxFormat,
    BoxGrammar,
    BoxState,
    format_of,
)
from finegrain_ops.methods.grounding import as_fractions, first_box

KNOWN = {"list": LIST, "thousandths": LIST_OF_THOUSANDTHS, "markup": MARKUP, "json": JSON}
COMMAS = st.sampled_from([",", ", ", " , "])
LISTS = st.sampled_from(
    [("[", "]"), ("(", ")"), ("Box: [", "]."), ('{"bbox": [', "]}"), ("<box>(", ")</box>")]
).flatmap(lambda ends: st.tuples(st.just(ends[0]), COMMAS, COMMAS, COMMAS, st.just(ends[1])))
POINTS = st.sampled_from([("(", ")"), ("<|box_start|>(", ")<|box_end|>"), ("[[", "]]")]).flatmap(
    lambda ends: st.tuples(
        st.just(ends[0]), COMMAS, st.just("],[" if ends[0] == "[[" else "),("), COMMAS, st.just(ends[1])
    )
)
FORMATS = st.sampled_from(list(KNOWN.values())) | st.builds(
    BoxFormat, LISTS | POINTS, decimals=st.integers(0, 3), may_lead_with_space=st.booleans()
)
SIDES = st.sampled_from([1, 2, 3, 9, 10, 11, 99, 100, 101]) | st.integers(1, 300)
GRAMMARS = st.builds(BoxGrammar, FORMATS, st.tuples(SIDES, SIDES))


@st.composite
def corners(draw: st.DrawFn, grammar: BoxGrammar) -> tuple[int, int, int, int]:
    x0, y0 = (draw(st.integers(0, highest - 1)) for highest in grammar.highest)
    x1, y1 = (draw(st.integers(low + 1, highest)) for low, highest in zip((x0, y0), grammar.highest))
    return x0, y0, x1, y1


def boxes_of(grammar: BoxGrammar) -> set[str]:
    """All texts, one by one, each number spelled by Python's own formatting."""
    width, height = grammar.highest
    a, b, c, d, e = grammar.format.pieces
    places = grammar.format.decimals

    def spelled(value: int) -> str:
        return f"{value / 10**places:.{places}f}"

    texts = {
        f"{a}{spelled(x0)}{b}{spelled(y0)}{c}{spelled(x1)}{d}{spelled(y1)}{e}"
        for x0 in range(width)
        for x1 in range(x0 + 1, width + 1)
        for y0 in range(height)
        for y1 in range(y0 + 1, height + 1)
    }
    return texts | ({f" {text}" for text in texts} if grammar.format.may_lead_with_space else set())


def all_texts(state: BoxState, so_far: str = "") -> set[str]:
    """Every text that next_characters leads to."""
    following = state.next_characters()
    assert len(set(following)) == len(following)
    assert state.is_complete == (not following)
    texts = {so_far} if not following else set()
    for character in following:
        after = state.after(character)
        assert after is not None
        texts |= all_texts(after, so_far + character)
    return texts


def read(grammar: BoxGrammar, text: str) -> list[tuple[float, ...]]:
    """`parse_boxes`, in units."""
    side = max(grammar.highest) + 1
    size = (side * 10**grammar.format.decimals,) * 2
    return parse_boxes(text, image_size=size, convention="pixel", processed_size=(side, side))


@pytest.mark.parametrize("highest", [(1, 1), (1, 2), (3, 2), (2, 10), (10, 3), (11, 1)])
@pytest.mark.parametrize("name", [*KNOWN, "points"])
def test_the_texts_are_those_of_all_ordered_corners(name: str, highest: tuple[int, int]) -> None:
    points = BoxFormat(("(", ",", "),(", ",", ")"), decimals=0)  # in the middle it looks like the end
    grammar = BoxGrammar(KNOWN.get(name, points), highest)
    assert all_texts(grammar.start()) == boxes_of(grammar)


def test_whole_numbers_beyond_nine_and_a_hundred() -> None:
    """Where a number may go on or end."""
    for highest in ((101, 1), (2, 12), (12, 11)):
        grammar = BoxGrammar(MARKUP, highest)
        assert all_texts(grammar.start()) == boxes_of(grammar)


@given(GRAMMARS, st.data())
def test_any_walk_ends_in_one_box(grammar: BoxGrammar, data: st.DataObject) -> None:
    state, text = grammar.start(), ""
    while following := state.next_characters():
        is_at_number = state.is_at_number
        character = data.draw(st.sampled_from(following))
        assert not is_at_number or character.isdigit()
        text += character
        after = state.after(character)
        assert after is not None
        state = after
        assert len(text) < 100
    assert state.is_complete
    ((x0, y0, x1, y1),) = read(grammar, text)
    assert (x0, y0, x1, y1) == pytest.approx(state.numbers, abs=1e-6)
    assert 0 <= state.numbers[0] < state.numbers[2] <= grammar.highest[0]
    assert 0 <= state.numbers[1] < state.numbers[3] <= grammar.highest[1]


@given(GRAMMARS, st.booleans(), st.data())
def test_every_box_is_accepted_however_its_text_is_cut(grammar: BoxGrammar, leads: bool, data: st.DataObject) -> None:
    numbers = data.draw(corners(grammar))
    text = " " * (leads and grammar.format.may_lead_with_space) + grammar.format.text(numbers)
    whole = grammar.start().after(text)
    assert whole is not None
    assert whole.is_complete
    assert whole.numbers == numbers
    ((x0, y0, x1, y1),) = read(grammar, text)
    assert (x0, y0, x1, y1) == pytest.approx(numbers, abs=1e-6)
    cut = data.draw(st.integers(0, len(text)))
    half = grammar.start().after(text[:cut])
    assert half is not None
    assert half.after(text[cut:]) == whole
    state: BoxState | None = grammar.start()
    for character in text:
        assert state is not None
        state = state.after(character)
    assert state == whole


@given(GRAMMARS, st.data())
def test_another_character_leads_nowhere(grammar: BoxGrammar, data: st.DataObject) -> None:
    text = grammar.format.text(data.draw(corners(grammar)))
    cut = data.draw(st.integers(0, len(text)))
    state = grammar.start().after(text[:cut])
    assert state is not None
    following = state.next_characters()
    others = [c for c in " 0123456789.,[](){}<|>x-+e" if c not in following]
    assert all(state.after(other) is None for other in others)
    assert all(state.after(other + text[cut:]) is None for other in others)
    assert state.after("") == state
    assert (text[cut:] == "") == state.is_complete == (following == "")


@pytest.mark.parametrize(
    "text",
    [
        "[0.50, 0.10, 0.50, 0.20]",  # no area
        "[0.50, 0.10, 0.40, 0.20]",
        "[0.10, 0.20, 0.40, 0.20]",
        "[1.00, 0.10, 1.00, 0.20]",
        "[0.10, 0.20, 0.40, 1.01]",
        "[0.10, 0.20, 0.4, 0.50]",
        "[0.10, 0.20, 0.40, .50]",
        "[00.10, 0.20, 0.40, 0.50]",
        "  [0.10, 0.20, 0.40, 0.50]",
        "[0.10,0.20, 0.40, 0.50]",
        "[0.10, 0.20, 0.40, 0.50]]",
    ],
)
def test_texts_that_are_no_boxes_of_the_list(text: str) -> None:
    state = BoxGrammar(LIST, (100, 100)).start().after(text)
    assert state is None


@given(GRAMMARS, st.data())
def test_forced_is_what_has_no_alternative(grammar: BoxGrammar, data: st.DataObject) -> None:
    text = grammar.format.text(data.draw(corners(grammar)))
    state = grammar.start().after(text[: data.draw(st.integers(0, len(text)))])
    assert state is not None
    forced, end = state.forced()
    one_by_one = state
    for character in forced:
        assert one_by_one.next_characters() == character
        after = one_by_one.after(character)
        assert after is not None
        one_by_one = after
    assert one_by_one == end
    assert len(end.next_characters()) != 1


@given(GRAMMARS, st.data())
def test_a_guess_is_an_allowed_zero_or_space(grammar: BoxGrammar, data: st.DataObject) -> None:
    text = grammar.format.text(data.draw(corners(grammar)))
    state = grammar.start().after(text[: data.draw(st.integers(0, len(text)))])
    assert state is not None
    state = state.forced()[1]  # guesses are made where more than one character may follow
    following, guess = state.next_characters(), state.likely()
    if not state.numbers and following[:1] == " ":
        assert guess == " "
    elif state.is_at_number and grammar.format.decimals and "0" in following:
        assert guess == "0"
    else:
        assert guess == ""


def test_what_is_forced_and_guessed_in_a_list() -> None:
    def after(text: str) -> BoxState:
        state = BoxGrammar(LIST, (100, 100)).start().after(text)
        assert state is not None
        return state

    assert after("").next_characters() == " ["
    assert after("").forced()[0] == ""
    assert after("[").forced()[0] == "0."  # x0 leaves room for x1
    assert after("[0.25").forced()[0] == ", 0."
    assert after("[0.25, 0.98").forced()[0] == ", "
    assert after("[0.25, 0.98, ").likely() == "0"
    assert after("[0.25, 0.98, 1").forced()[0] == ".00, "
    assert after("[0.25, 0.98, 1.00, 0").forced() == (".99]", after("[0.25, 0.98, 1.00, 0.99]"))
    assert after("[0.25, 0.99").forced()[0] == ", "
    assert after("[0.25, 0.99, 0.26").forced() == (", 1.00]", after("[0.25, 0.99, 0.26, 1.00]"))
    assert BoxGrammar(LIST, (1, 1)).start().after("[").forced()[0] == "0.00, 0.00, 0.01, 0.01]"


# --- numbers of a box -------------------------------------------------------------------------------------------------


EDGES = st.floats(-3.0, 4.0)


@given(GRAMMARS, EDGES, EDGES, EDGES, EDGES)
@example(BoxGrammar(JSON, (1, 1)), 0.0, 0.0, 0.0, 0.0)
@example(BoxGrammar(LIST, (100, 100)), 1.0, 0.999, 1.0, 1.0)
@example(BoxGrammar(LIST, (100, 100)), -0.1, -2.0, 1.7, -1.0)
@example(BoxGrammar(JSON, (10, 2)), 0.25, 0.25, 0.35, 0.75)
def test_numbers_are_the_nearest_units(grammar: BoxGrammar, a: float, b: float, c: float, d: float) -> None:
    box = (min(a, c), min(b, d), max(a, c), max(b, d))
    numbers = grammar.numbers_of(box)
    for axis, highest in enumerate(grammar.highest):
        low, high = numbers[axis], numbers[axis + 2]
        exact_low, exact_high = (min(max(edge * highest, 0.0), highest) for edge in (box[axis], box[axis + 2]))
        assert 0 <= low < high <= highest
        assert abs(low - exact_low) <= 0.5 or low == highest - 1 < exact_low
        assert abs(high - exact_high) <= 0.5 or high == low + 1
    state = grammar.start().after(grammar.format.text(numbers))
    assert state is not None
    assert state.is_complete


@given(GRAMMARS, st.data())
def test_numbers_of_a_box_in_units_are_those(grammar: BoxGrammar, data: st.DataObject) -> None:
    x0, y0, x1, y1 = numbers = data.draw(corners(grammar))
    width, height = grammar.highest
    assert grammar.numbers_of((x0 / width, y0 / height, x1 / width, y1 / height)) == numbers


GRIDS = {
    "llava": lambda size: families.llava(size),
    "llava, padded": lambda size: families.llava(size, do_pad=True),
    "qwen2_vl": lambda size: families.qwen2_vl(size),
}
WRITTEN = [  # model_type, convention, grid
    ("llava", "unit", "llava"),
    ("llava", "unit_padded", "llava, padded"),
    ("llava", "unit_view", "llava"),
    ("llava", "unit_view", "llava, padded"),
    ("tinygroundinggpt", "unit_padded", "llava, padded"),
    ("qwen2_vl", "permille", "qwen2_vl"),
    ("qwen2_5_vl", "pixel", "qwen2_vl"),
    ("llava", "permille", "llava"),
]


def counted(convention: str, size: tuple[int, int], grid: families.ImageGrid) -> tuple[tuple[float, float], ...]:
    """In x and in y: from where to where 0..1 goes, in pixels of the original image."""
    height, width = size
    if convention == "unit_padded":
        side = max(size)
        x, y = -((side - width) // 2), -((side - height) // 2)
        return (x, x + side), (y, y + side)
    if convention == "unit_view":
        axes = (grid.pixels.x, grid.pixels.y)
        return tuple((float(-a.shift / a.scale), float((a.length - a.shift) / a.scale)) for a in axes)
    return (0, width), (0, height)


@pytest.mark.parametrize(("model_type", "convention", "kind"), WRITTEN)
@given(st.tuples(st.integers(28, 1500), st.integers(28, 1500)), st.data())
def test_a_box_that_is_written_and_read(
    model_type: str, convention: str, kind: str, size: tuple[int, int], data: st.DataObject
) -> None:
    grid = GRIDS[kind](size)
    grammar = BoxGrammar.of_image(format_of(model_type, convention), convention, [grid])
    spans = counted(convention, size, grid)
    units = [(end - start) / highest for (start, end), highest in zip(spans, grammar.highest)]
    box = [0.0] * 4
    for axis, ((start, end), limit) in enumerate(zip(spans, reversed(size))):
        low, high = max(start, 0.0), min(end, float(limit))
        edges = [low + data.draw(st.floats(0, 1)) * (high - low) for _ in range(2)]
        box[axis], box[axis + 2] = min(edges), max(edges)
    text = grammar.format.text(grammar.numbers_of(as_fractions(tuple(box), size, convention, [grid])))
    found = first_box(text, size, convention, [grid])
    is_wide = all(box[axis + 2] - box[axis] > units[axis] for axis in range(2))
    if found is None:  # a box thinner than a unit may become one of padding
        assert not is_wide
        return
    for axis in range(2):
        allowed = units[axis] * (0.5 if is_wide else 1.5) + 1e-6
        for k in (axis, axis + 2):
            assert abs(found[k] - box[k]) <= allowed


def test_formats_of_the_families() -> None:
    assert (
        format_of("llava", "unit") == format_of("llava_next", "unit_padded") == format_of("llava", "unit_view") == LIST
    )
    assert format_of("qwen2_vl", "permille") == MARKUP
    assert format_of("qwen2_5_vl", "pixel") == format_of("qwen3_vl", "permille") == JSON
    assert format_of("tinygroundinggpt", "unit_padded") == LIST_OF_THOUSANDTHS
    assert format_of("qwen2_vl", "unit") == format_of("qwen3_vl", "unit") == LIST
    assert format_of("llava", "permille") == format_of("tinygroundinggpt", "pixel") == JSON
    assert LIST.text((0, 7, 50, 100)) == "[0.00, 0.07, 0.50, 1.00]"
    assert LIST_OF_THOUSANDTHS.text((0, 7, 50, 1000)) == "[0.000, 0.007, 0.050, 1.000]"
    assert MARKUP.text((0, 7, 50, 1000)) == "<|box_start|>(0,7),(50,1000)<|box_end|>"
    assert JSON.text((0, 7, 50, 1000)) == '{"bbox_2d": [0, 7, 50, 1000]}'


def test_how_many_units_an_image_has() -> None:
    grid = families.qwen2_vl((100, 300))
    height, width = grid.pixels.size
    assert height != width
    assert BoxGrammar.of_image(JSON, "pixel", [grid]).highest == (width, height)
    assert BoxGrammar.of_image(JSON, "permille", [grid]).highest == (1000, 1000)
    assert BoxGrammar.of_image(LIST, "unit", [grid]).highest == (100, 100)
    assert BoxGrammar.of_image(LIST_OF_THOUSANDTHS, "unit_padded", [grid]).highest == (1000, 1000)
    assert BoxGrammar.of_image(LIST, "unit_view", [grid, families.qwen2_vl((50, 50))]).highest == (100, 100)


EDGES = st.tuples(st.floats(-0.2, 1.2), st.floats(-0.2, 1.2)).map(sorted)


@given(grammar=GRAMMARS, across=EDGES, down=EDGES, data=st.data())
def test_no_box_is_of_the_padding_around_an_image(grammar: BoxGrammar, across, down, data) -> None:
    """The numbers of any text, and of any box that is written, are units that the image touches."""
    covered = grammar.covering((across[0], down[0], across[1], down[1]))
    state = covered.start()
    while following := state.next_characters():
        state = state.after(data.draw(st.sampled_from(following)))
    x0, y0, x1, y1 = state.numbers
    drawn = data.draw(st.tuples(EDGES, EDGES))
    written = covered.numbers_of((drawn[0][0], drawn[1][0], drawn[0][1], drawn[1][1]))
    for low, high, edges, units in (
        (x0, x1, across, grammar.highest[0]),
        (y0, y1, down, grammar.highest[1]),
        (written[0], written[2], across, grammar.highest[0]),
        (written[1], written[3], down, grammar.highest[1]),
    ):
        first, last = (min(max(edge, 0.0), 1.0) * units for edge in edges)
        assert 0 <= low < high <= units
        assert low + 1 >= first or low == units - 1
        assert low > first - 1 or low == units - 1
        assert high < last + 1 or high == low + 1
