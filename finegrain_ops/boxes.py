"""Boxes in a model's text: reading them, and expanding them inside the image.

Coordinate convention of this module
    box          (x0, y0, x1, y1), "xyxy", floats, x0 <= x1 and y0 <= y1
    coordinates  continuous pixels of the original image: (0, 0) is the top-left corner of the first pixel, (W, H) the
                 bottom-right corner of the last, so [0, 0, W, H] is the whole image and a pixel is a unit square
    axes         x to the right, y down
    sizes        always (height, width), in whole pixels, although boxes are written x first
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

__all__ = ["CONVENTIONS", "Box", "expand_box", "parse_boxes"]

Box: TypeAlias = tuple[float, float, float, float]

CONVENTIONS = ("auto", "unit", "unit_padded", "permille", "pixel")

# The keys of a mapping that spells a box out, in the order x0, y0, x1, y1; underscores, hyphens and case are dropped
# before they are compared. "topleftx" is also what {"top_left": [x, y]} and {"top_left": {"x": .., "y": ..}} come to.
_CORNER_KEYS = (
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("minx", "miny", "maxx", "maxy"),
    ("left", "top", "right", "bottom"),
    ("topleftx", "toplefty", "bottomrightx", "bottomrighty"),
)
# The same in the order x, y, width, height, where (x, y) is the top-left corner. Corners win over these: a mapping with
# both may mean the image's width and height.
_SIZE_KEYS = (
    ("x", "y", "width", "height"),
    ("x", "y", "w", "h"),
    ("xmin", "ymin", "width", "height"),
    ("left", "top", "width", "height"),
)
_KNOWN_KEYS = frozenset(key for keys in _CORNER_KEYS + _SIZE_KEYS for key in keys)

# Every alternative is free of nested repetition, so that the scan is linear in the length of the text. Quotes and
# backslashes are skipped: "x1", 'x1', \"x1\" and x1 are the same key, "0.5" and 0.5 the same number, and an apostrophe
# in prose opens no string. no_number is an item that makes its box worthless; percentages belong to no convention.
_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_TOKEN = re.compile(
    rf"""(?P<no_number>{_NUMBER}\s*%|[+-]?\b(?:nan|inf|infinity|null|none)\b)
       | (?P<number>{_NUMBER})
       | (?P<word>[^\W\d]\w*(?:-\w+)*)
       | (?P<open>[\[({{])
       | (?P<close>[\])}}])
       | (?P<comma>,)
       | (?P<colon>[:=])
       | (?P<skip>[\s"'\u2018\u2019\u201c\u201d\\]+)
       | (?P<other>.)""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
# What "auto" takes for 0..1: a box may overshoot the border a little, and nobody grounds 1.5 pixels.
_UNIT_LOWEST, _UNIT_HIGHEST = -0.5, 1.5
_PERMILLE_MARKUP = re.compile(r"<box>|<\|box_start\|>")

# How many open brackets are remembered. No shape of box needs more than three, and hostile text may open thousands.
_DEEPEST = 32

_Size: TypeAlias = tuple[int, int]  # height, width
_AxisMap: TypeAlias = tuple[int, int, int, int]  # limit, multiplier, divisor, offset
_Point: TypeAlias = tuple[float, float]
# What a comma separates: a number, a bracketed pair, or (None) anything that makes the run no box.
_Item: TypeAlias = "float | _Point | None"


class _Found(NamedTuple):
    """Four numbers of the text that spell a box, not yet in any unit."""

    start: int
    numbers: Box
    is_size: bool = False  # x, y, width, height instead of two corners
    is_bare: bool = False  # without brackets or keys of its own


class _Level:
    """What has been read so far at one depth of brackets; the text itself is the outermost level."""

    def __init__(self, start: int, key: str, found: list[_Found], bracket: str) -> None:
        self.start = start
        self.key = key  # the key that this bracket is the value of, or ""
        self.is_list = bracket == "["
        self.is_pure = bracket != ""  # True while there is nothing here but one run of items
        self.word = ""  # the word just read
        self.number_key = ""  # that word, once a colon has made it a key
        self.after_comma = False
        self._found = found
        self._run: list[_Item] = []
        self._run_start = start
        self._fields: dict[str, float] = {}
        self._fields_start = start

    def add(self, item: _Item, start: int) -> None:
        """Appends an item to the run, or begins a new run with it where no comma joins them."""
        if self._run and not self.after_comma:
            self.interrupt()
        if not self._run:
            self._run_start = start
        self._run.append(item)
        self.after_comma = False

    def comma(self) -> None:
        if not self._run:
            self.is_pure = False
        elif self.after_comma:
            self._run.append(None)
        self.after_comma = True

    def interrupt(self) -> None:
        """Ends the run at something that is neither an item nor a comma."""
        self._end_run()
        self.is_pure = False

    def set_field(self, key: str, value: float, start: int) -> None:
        if key not in _KNOWN_KEYS:
            return
        if key in self._fields:  # the next box of a text that has no brackets around each
            self._end_fields()
        if not self._fields:
            self._fields_start = start
        self._fields[key] = value

    def add_child(self, child: _Level, point: _Point | None) -> None:
        """Takes note of a bracket that was closed inside this level."""
        if point is not None and child.key:
            self.set_field(child.key + "x", point[0], child.start)
            self.set_field(child.key + "y", point[1], child.start)
        if point is not None or child.is_pure:
            self.add(point, child.start)
        else:
            self.interrupt()

    def close(self) -> _Point | None:
        """Ends the level; returns the point that the whole bracket spells, if it spells one."""
        match self._run:
            case [float(x), float(y)] if self.is_pure:
                return x, y
            case [float(x0), float(y0), float(x1), float(y1)] if self.is_pure:
                self._found.append(_Found(self.start, (x0, y0, x1, y1)))
                return None
        self._end_run()
        if self._fields.keys() == {"x", "y"}:
            return self._fields["x"], self._fields["y"]
        self._end_fields()
        return None

    def _end_run(self) -> None:
        match self._run:
            case [(float(x0), float(y0)), (float(x1), float(y1))]:
                self._found.append(_Found(self._run_start, (x0, y0, x1, y1)))
            case [float(x0), float(y0), float(x1), float(y1)] if not self.is_list:
                self._found.append(_Found(self._run_start, (x0, y0, x1, y1), is_bare=True))
        self._run = []

    def _end_fields(self) -> None:
        """Makes a box of the keyed numbers where they are complete, and forgets them."""
        fields, self._fields = self._fields, {}
        if len(fields) < 4:  # most levels: a shortcut
            return
        for keys in _CORNER_KEYS + _SIZE_KEYS:
            if fields.keys() >= set(keys):
                x0, y0, x1, y1 = (fields[key] for key in keys)
                self._found.append(_Found(self._fields_start, (x0, y0, x1, y1), is_size=keys in _SIZE_KEYS))
                return


def _scan(text: str) -> list[_Found]:
    """Finds every shape of box in one pass over the text."""
    found: list[_Found] = []
    levels = [_Level(0, "", found, "")]
    for token in _TOKEN.finditer(text):
        kind, start = token.lastgroup, token.start()
        if kind == "skip":
            continue
        level = levels[-1]
        word, key = level.word, level.number_key
        level.word = level.number_key = ""
        if kind in ("number", "no_number"):
            value = float(token.group()) if kind == "number" else math.nan
            level.set_field(key, value, start)
            level.add(value, start)
        elif kind == "comma":
            level.comma()
        elif kind == "open":
            levels.append(_Level(start, key, found, token.group()))
            del levels[1:-_DEEPEST]
        elif kind == "close" and len(levels) > 1:
            _close_innermost(levels)
        else:
            level.interrupt()
            if kind == "word":
                level.word = token.group()
            elif kind == "colon":
                level.number_key = word.replace("_", "").replace("-", "").lower()
    while len(levels) > 1:
        if levels[-1].after_comma:
            levels[-1].comma()  # the text was cut off where one more item was to come
        _close_innermost(levels)
    levels[0].close()
    return sorted(found, key=lambda box: box.start)


def _close_innermost(levels: list[_Level]) -> None:
    """Closes the innermost bracket, whatever its kind: "[1, 2, 3, 4)" is a slip of the pen, not another structure."""
    level = levels.pop()
    levels[-1].add_child(level, level.close())


def _choose_convention(text: str, found: list[_Found], has_processed_size: bool) -> str:
    """The convention that "auto" stands for; "original" means pixels of the original image."""
    if _PERMILLE_MARKUP.search(text):
        return "permille"
    numbers = [number for box in found for number in box.numbers]
    if all(_UNIT_LOWEST <= number <= _UNIT_HIGHEST for number in numbers):
        return "unit"
    if has_processed_size:
        return "pixel"
    return "permille" if all(number <= 1000 for number in numbers) else "original"


def _axis_maps(convention: str, image_size: _Size, processed_size: _Size) -> tuple[_AxisMap, _AxisMap]:
    """For x and for y: how a coordinate of the text becomes a pixel of the image."""
    height, width = image_size
    if convention == "unit_padded":
        side = max(height, width)
        return (width, side, 1, (side - width) // 2), (height, side, 1, (side - height) // 2)
    ranges = {"unit": (1, 1), "permille": (1000, 1000), "pixel": processed_size, "original": image_size}
    range_y, range_x = ranges[convention]
    return (width, width, range_x, 0), (height, height, range_y, 0)


def _to_span(start: float, end: float, axis_map: _AxisMap) -> tuple[float, float]:
    """Maps the two edges of a box along one axis to pixels, ordered and clipped to the image."""
    limit, multiplier, divisor, offset = axis_map
    # Multiplying first keeps whole numbers exact: 70 permille of 200 is 14, and 14.000000000000002 the other way round.
    low, high = (edge * multiplier / divisor - offset for edge in sorted((start, end)))
    return min(max(0.0, low), float(limit)), min(max(0.0, high), float(limit))


def _to_box(found: _Found, axis_maps: tuple[_AxisMap, _AxisMap]) -> Box:
    x0, y0, x1, y1 = found.numbers
    if found.is_size:
        x1, y1 = x0 + x1, y0 + y1
    left, right = _to_span(x0, x1, axis_maps[0])
    top, bottom = _to_span(y0, y1, axis_maps[1])
    return left, top, right, bottom


def _check_size(value: object, argument: str) -> _Size:
    """value as (height, width), or ValueError."""
    try:
        height, width = (operator.index(item) for item in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        height = width = 0
    if not (0 < height < 2**53 and 0 < width < 2**53):  # so that every size is a float exactly
        raise ValueError(
            f"{argument} must be (height, width), two positive integers below 2**53; got {value!r}. "
            f"Pass whole pixels, height first, e.g. {argument}=(480, 640) for a landscape image."
        )
    return height, width


def _as_floats(values: object) -> list[float]:
    """values as floats; the empty list where they are no numbers, so that callers refuse them with their own words."""
    try:
        items = list(values)  # type: ignore[call-overload]
        # float() would also read strings, and "1234" is not the box (1, 2, 3, 4).
        return [] if any(isinstance(item, (str, bytes)) for item in items) else [float(item) for item in items]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of many elements
        return []


def parse_boxes(
    text: str, *, image_size: Sequence[int], convention: str = "auto", processed_size: Sequence[int] | None = None
) -> list[Box]:
    """Reads the bounding boxes that a model wrote in its answer.

    This is the step between the grounding prompt and the image: CoF, Sec. II-B ("detail the bounding box ... in JSON
    format"); DualFocus, Sec. 3.3, Eq. 2 ("[x1, y1, x2, y2]" as plain text); TinyGroundingGPT, Sec. 3.3 (<loc>).

    What counts as a box, in prose, in JSON, in a code fence, with single quotes or none, trailing commas, cut-off ends:

    - a list of four numbers and nothing else, in brackets of any kind: ``[a, b, c, d]``, ``(a, b, c, d)``;
    - two points with a comma between: ``(a, b), (c, d)``, ``[[a, b], [c, d]]``, ``[{"x": a, "y": b}, ...]``;
    - keyed numbers, with ``:`` or ``=``, in brackets or without: x1 y1 x2 y2, x0 y0 x1 y1, xmin ymin xmax ymax (also
      x_min, min_x, ...), left top right bottom, top_left and bottom_right (as points or ..._x, ..._y), and the
      top-left corner with the size: x y width height, x y w h, left top width height, xmin ymin width height;
    - only where the text has none of these: four numbers with commas between, outside square brackets: ``a, b, c, d``.

    More or fewer numbers or points in a row are no box. Corners in the wrong order are put in order, boxes are clipped
    to the image, and a box without area after that, or with nan, null, inf or a percentage in it, is dropped.
    Repeated boxes are kept: dropping them is easy for the caller, bringing them back is not.

    Conventions, with W and H the width and height of the original image:

    - "unit": 0..1 of W and H: x * W, y * H (DualFocus).
    - "unit_padded": 0..1 of the square of side M = max(W, H) that the image was centred in by padding: x * M -
      (M - W) // 2, y * M - (M - H) // 2 (LLaVA, TinyGroundingGPT).
    - "permille": 0..1000 of W and H: x * W / 1000, y * H / 1000 (Qwen-VL, Qwen2-VL, Qwen3-VL).
    - "pixel": pixels of the processed image: x * W / W', y * H / H' with processed_size = (H', W') (Qwen2.5-VL).
    - "auto": one for the whole text, by the first of these that holds for the numbers of all its boxes: ``<box>`` or
      ``<|box_start|>`` is in the text: permille; all are in [-0.5, 1.5] (0..1, with some overshoot): unit;
      processed_size is given: pixel; all are at most 1000: permille; otherwise pixels of the original image. It
      cannot tell unit_padded from unit: name the convention of a model that you know.

    Args:
        text: what the model wrote; any string at all.
        image_size: (height, width) of the original image, in pixels.
        convention: one of the above.
        processed_size: (height, width) in pixels of the image that the model saw; needed for "pixel", used by "auto".

    Returns:
        The boxes in order of appearance, as (x0, y0, x1, y1) in pixels of the original image; [] without any.

    Raises:
        TypeError: text is no str. Which characters it holds never raises.
        ValueError: a size is not two positive integers, the convention is unknown, or "pixel" lacks processed_size.

    Example:
        >>> parse_boxes("It is at [0.25, 0.5, 0.75, 1].", image_size=(480, 640))
        [(160.0, 240.0, 480.0, 480.0)]
        >>> parse_boxes('[{"bbox_2d": [14, 28, 70, 56]}]', image_size=(100, 200), processed_size=(112, 140))
        [(20.0, 25.0, 100.0, 50.0)]
    """
    if not isinstance(text, str):
        raise TypeError(
            f"text must be a str, the model's answer; got {type(text).__name__}. Decode token ids first, and call "
            "parse_boxes once per answer of a batch."
        )
    size = _check_size(image_size, "image_size")
    if convention not in CONVENTIONS:
        raise ValueError(
            f"convention must be one of {', '.join(map(repr, CONVENTIONS))}; got {convention!r}. Pass the one that the "
            'model was trained with, or "auto".'
        )
    if convention == "pixel" and processed_size is None:
        raise ValueError(
            'processed_size must be (height, width) with convention="pixel"; got None. Pass the size that the image '
            "has after the model's preprocessing."
        )
    processed = size if processed_size is None else _check_size(processed_size, "processed_size")
    found = [box for box in _scan(text) if all(map(math.isfinite, box.numbers))]
    found = [box for box in found if not box.is_bare] or found
    if convention == "auto":
        convention = _choose_convention(text, found, processed_size is not None)
    axis_maps = _axis_maps(convention, size, processed)
    boxes = (_to_box(box, axis_maps) for box in found)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes if (x1 - x0) * (y1 - y0) > 0]


def _expand_axis(low: float, high: float, size: float, limit: int) -> tuple[float, float]:
    """Gives the span (low, high) the given size about its centre, then moves it into (0, limit)."""
    # Growing from the edges, not from the centre, leaves them as they are, to the bit, where the size does not change.
    margin = (size - (high - low)) / 2
    low, high = low - margin, high + margin
    if low > high:  # only by rounding, where the size is next to nothing
        low = high
    if low >= 0 and high <= limit:
        return low, high
    if size >= limit:
        return 0.0, float(limit)
    return (0.0, size) if low < 0 else (limit - size, float(limit))


def expand_box(box: Sequence[float], factor: float, image_size: Sequence[int], *, square: bool = False) -> Box:
    """Scales a box about its centre and moves it back inside the image.

    CoF, Sec. II-B: the box is expanded by alpha about its centre, and moved where it exceeds the image's boundary. So,
    with w = x1 - x0 and h = y1 - y0::

        (w', h') = (factor * w, factor * h), or both factor * max(w, h) with square=True
        x0' = clamp((x0 + x1 - w') / 2, 0, W - w'),  x1' = x0' + w'       and so in y

    An axis along which the box would be as large as the image or larger gets the whole of the image's side, so that
    a square may come out as an oblong there. factor=1 returns a box inside the image exactly as it is.

    Args:
        box: (x0, y0, x1, y1) in pixels of the original image; it may stick out of the image in part.
        factor: alpha, positive; 1.3 makes the box 30 % wider and higher, a value below 1 shrinks it.
        image_size: (height, width) of the original image, in pixels.
        square: make the box a square first, of its longer side.

    Returns:
        (x0, y0, x1, y1) in pixels with 0 <= x0 <= x1 <= W and 0 <= y0 <= y1 <= H.

    Raises:
        ValueError: box is not four finite, ordered numbers or lies outside the image, factor is not a positive finite
            number, or image_size is not two positive integers.

    Example:
        >>> expand_box((100, 100, 200, 150), 2, (480, 640))
        (50.0, 75.0, 250.0, 175.0)
        >>> expand_box((0, 100, 100, 150), 2, (480, 640), square=True)
        (0.0, 25.0, 200.0, 225.0)
    """
    height, width = _check_size(image_size, "image_size")
    scales = _as_floats([factor])
    if not scales or not 0 < scales[0] < math.inf:
        raise ValueError(f"factor must be a positive finite number; got {factor!r}. Pass 1.0 to keep the box's size.")
    edges = _as_floats(box)
    if len(edges) != 4 or not all(map(math.isfinite, edges)) or edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise ValueError(
            f"box must be four finite numbers (x0, y0, x1, y1) with x0 < x1 and y0 < y1; got {box!r}. Pass one box, "
            "its corners in order, as parse_boxes gives it."
        )
    x0, y0, x1, y1 = edges
    if x0 >= width or x1 <= 0 or y0 >= height or y1 <= 0:
        raise ValueError(
            f"box must overlap the image, x from 0 to {width} and y from 0 to {height}; got {box!r}. Pass pixels of "
            "the original image, and image_size as (height, width)."
        )
    box_width, box_height = x1 - x0, y1 - y0
    if square:
        box_width = box_height = max(box_width, box_height)
    left, right = _expand_axis(x0, x1, box_width * scales[0], width)
    top, bottom = _expand_axis(y0, y1, box_height * scales[0], height)
    return left, top, right, bottom
