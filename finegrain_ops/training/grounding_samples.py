"""TinyGroundingGPT's kinds of samples: text, coordinates and object images of the same things, asked for each other.

A sample is turns of a question and an answer about an image. "<object>" in them is an object image and "<loc>" a box as
text; the sample has a box for each, in order. Wordings are those of the paper's Figs. 10 and 11 ("Postprocess"), where
it gives any.

| kind               | asks for                                              | stage (Table 6)               |
|--------------------|-------------------------------------------------------|-------------------------------|
| text_to_coordinate | where a phrase is                                     | 2, text-coordinate pairs      |
| coordinate_to_text | what is in a region                                   | 2, text-coordinate pairs      |
| image_to_coordinate| where an object image is                              | 2, image-coordinate pairs     |
| coordinate_to_image| which object image is in a region                     | 2, image-coordinate pairs     |
| text_to_image      | which object image a phrase is about                  | 2, text-image pairs           |
| image_to_text      | which phrase is about an object image                 | 2, text-image pairs           |
| highlighted        | a question whose highlighted objects are shown        | 2, text-image pairs           |
| conversation       | several rounds about objects, in all three forms      | 3, grounding conversation     |
| description        | the image, with coordinates after what is in it       | 3, grounding description      |
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..boxes import Box, parse_boxes
from .annotations.records import AnnotatedImage, BoxedCaption, BoxedPhrase, clipped

IMAGE, OBJECT, LOCATION = "<image>", "<object>", "<loc>"

# "<the girl> [0.019, 0.302, 0.285, 0.678]", either alone or both.
_COORDINATES = r"\[[^\[\]<>]*\]"
_MENTION = re.compile(rf"<(?P<phrase>[^<>\[\]]+)>(?:\s*(?P<box>{_COORDINATES}))?|(?P<alone>{_COORDINATES})")
_ARTICLE = re.compile(r"^(the|a|an)\s+")


@dataclass(frozen=True, slots=True)
class GroundingSample:
    """Turns about one image.

    Attributes:
        kind: of the table above.
        turns: (question, answer), with "<object>" and "<loc>" in them; object images in questions only.
        object_boxes, location_boxes: for each of these one xyxy box in pixels of the image, in order over all turns.

    Raises:
        ValueError: placeholders and boxes differ in number, a box has no area in the image, there is no turn, an answer
            shows an object image, or a text names "<image>".
    """

    kind: str
    image: AnnotatedImage
    turns: tuple[tuple[str, str], ...]
    object_boxes: tuple[Box, ...] = ()
    location_boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("turns: expected at least one question and answer, got none")
        text = "\n".join(text for turn in self.turns for text in turn)
        if IMAGE in text:
            raise ValueError(f"turns: expected texts without {IMAGE}, which comes first by itself, got {text!r}")
        for token, name in ((OBJECT, "object_boxes"), (LOCATION, "location_boxes")):
            boxes = getattr(self, name)
            if text.count(token) != len(boxes):
                raise ValueError(
                    f"{name}: expected one for each of the {text.count(token)} {token} of {text!r}, got {len(boxes)}"
                )
            for k, box in enumerate(boxes):
                if clipped(box, self.image.size) is None:
                    raise ValueError(
                        f"{name}[{k}]: expected a box with an area in the image of {self.image.size} (height, width), "
                        f"got {box}"
                    )
        for k, (_, answer) in enumerate(self.turns):
            if OBJECT in answer:
                raise ValueError(f"turns[{k}]: expected an answer without {OBJECT}, which a model cannot write")

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as of `apply_chat_template`; the image comes before the first question."""
        messages = []
        for k, (question, answer) in enumerate(self.turns):
            messages.append({"role": "user", "content": question if k else f"{IMAGE}\n{question}"})
            messages.append({"role": "assistant", "content": answer})
        return messages


# --- stage 2 ---


def text_to_coordinate(
    phrase: BoxedPhrase, question: str = "In this image, where is {phrase} located?"
) -> GroundingSample:
    """The boxes of a phrase, all of them."""
    turn = (_fill(question, phrase=_plain(phrase.phrase)), _locations(phrase))
    return GroundingSample("text_to_coordinate", phrase.image, (turn,), location_boxes=phrase.boxes)


def coordinate_to_text(
    phrase: BoxedPhrase, question: str = "Describe the object located within the region {location}."
) -> GroundingSample:
    """What is in the boxes."""
    turn = (_fill(question, location=_locations(phrase)), _plain(phrase.phrase))
    return GroundingSample("coordinate_to_text", phrase.image, (turn,), location_boxes=phrase.boxes)


def image_to_coordinate(phrase: BoxedPhrase, question: str = "What is the location of {object}?") -> GroundingSample:
    """The box that an object image was cut out of; of a phrase with one box."""
    boxes = (_only_box(phrase),)
    turn = (_fill(question, object=OBJECT), LOCATION)
    return GroundingSample("image_to_coordinate", phrase.image, (turn,), boxes, boxes)


def coordinate_to_image(
    options: Sequence[BoxedPhrase], right: int, question: str = "Which is the item in region {location}?"
) -> GroundingSample:
    """Which of several object images is in a box: options[right]; of phrases of one image with one box each."""
    boxes = _boxes_of_options(options)
    turn = (
        f"{_fill(question, location=LOCATION)} {_options([OBJECT] * len(boxes))}.",
        f"The answer is {_letter(right)}.",
    )
    return GroundingSample("coordinate_to_image", options[right].image, (turn,), boxes, (boxes[right],))


def text_to_image(options: Sequence[BoxedPhrase], right: int, question: str = "Which is {phrase}?") -> GroundingSample:
    """Which of several object images a phrase is about: that of options[right]."""
    boxes = _boxes_of_options(options)
    asked = _fill(question, phrase=_plain(options[right].phrase))
    turn = (f"{asked} {_options([OBJECT] * len(boxes))}.", f"The answer is {_letter(right)}.")
    return GroundingSample("text_to_image", options[right].image, (turn,), boxes)


def image_to_text(options: Sequence[BoxedPhrase], right: int, question: str = "What is {object}?") -> GroundingSample:
    """Which of several phrases is about an object image: that of options[right]."""
    boxes, phrases = _boxes_of_options(options), [_plain(option.phrase) for option in options]
    turn = (
        f"{_fill(question, object=OBJECT)} {_options(phrases)}.",
        f"The answer is {_letter(right)}. {phrases[right]}.",
    )
    return GroundingSample("image_to_text", options[right].image, (turn,), (boxes[right],))


def highlighted(image: AnnotatedImage, question: str, answer: str, boxes: Mapping[str, Box]) -> GroundingSample:
    """A question whose highlighted objects are shown instead of named (Fig. 10, Postprocess 3).

    "Can you identify <blue hat> is worn by whom? A. the left woman B. the right man" becomes "Can you identify <object>
    is worn by whom? ...". In the answer only the brackets go.

    Args:
        boxes: for each highlighted object its box in pixels; "<The girl>", "<girl>" and "the girl" are the same.

    Raises:
        ValueError: an object has no box, or nothing is highlighted.
    """
    known = _known(boxes)
    shown: list[Box] = []

    def show(mention: re.Match[str]) -> str:
        if mention["phrase"] is None:
            return mention.group()
        if (name := _same(mention["phrase"])) not in known:
            raise ValueError(f"boxes: expected one for {mention['phrase']!r}, got only {', '.join(map(repr, boxes))}")
        shown.append(known[name])
        return OBJECT

    asked = _MENTION.sub(show, question)
    if not shown:
        raise ValueError(f'question: expected objects highlighted with "<>" in it, got {question!r}')
    said = _MENTION.sub(lambda mention: mention["phrase"] or mention.group(), answer)
    return GroundingSample("highlighted", image, ((asked.strip(), said.strip()),), tuple(shown))


# --- stage 3 ---


def conversation(
    image: AnnotatedImage,
    rounds: Sequence[tuple[str, str]],
    boxes: Mapping[str, Box] | None = None,
    *,
    convention: str = "unit",
    image_share: float = 0.5,
    rng: random.Random | None = None,
) -> GroundingSample:
    """Rounds about objects that are highlighted, with coordinates or without (Fig. 11).

    "What is <the girl> [0.019, 0.302, 0.285, 0.678] wearing?": coordinates become "<loc>". In questions some objects
    are shown (Postprocess 3): of those with a known box a share, drawn at random; the object image takes the place of
    the name or that of the coordinates. Other highlights lose their brackets, and brackets without a box stay.

    Args:
        rounds: (question, answer).
        boxes: boxes in pixels of objects whose coordinates the texts do not give. A box that a text gives is known from
            there on.
        convention: of the coordinates in the texts, of `boxes.parse_boxes`.
        image_share: how many of the objects in questions are shown, 0 to 1.
        rng: draws which; None: always the same for the same rounds.
    """
    if rng is None:
        rng = random.Random(repr(rounds))
    known = _known(boxes or {})
    shown: list[Box] = []
    located: list[Box] = []

    def write(text: str, is_question: bool) -> str:
        def render(mention: re.Match[str]) -> str:
            phrase, written = mention["phrase"], mention["box"] or mention["alone"]
            found = parse_boxes(written, image_size=image.size, convention=convention) if written else []
            if phrase is None:
                located.extend(found)
                return LOCATION if found else mention.group()
            name = _same(phrase)
            if found:
                known[name] = found[0]
            show = is_question and name in known and rng.random() < image_share
            show_coordinates = show and bool(found) and rng.random() < 0.5
            if show:
                shown.append(known[name])
            if found and not show_coordinates:
                located.append(found[0])
            first = OBJECT if show and not show_coordinates else phrase
            second = f" {OBJECT}" if show_coordinates else f" {LOCATION}" if found else f" {written}" if written else ""
            return first + second

        return _MENTION.sub(render, text).strip()

    turns = tuple((write(question, True), write(answer, False)) for question, answer in rounds)
    return GroundingSample("conversation", image, turns, tuple(shown), tuple(located))


def description(
    caption: BoxedCaption, question: str = "Describe the image, with the coordinates of the objects that you name."
) -> GroundingSample:
    """A caption with coordinates after each phrase that has boxes (Sec. 3.1, grounding description)."""
    text, end = "", 0
    boxes: list[Box] = []
    for phrase, (_, stop) in zip(caption.phrases, caption.spans):
        text += f"{_plain(caption.text[end:stop])} {_locations(phrase)}"
        boxes += phrase.boxes
        end = stop
    text += _plain(caption.text[end:])
    return GroundingSample("description", caption.image, ((question, text.strip()),), location_boxes=tuple(boxes))


# --- how ---


def _fill(template: str, **values: str) -> str:
    for name, value in values.items():
        if f"{{{name}}}" not in template:
            raise ValueError(f'question: expected "{{{name}}}" in it, got {template!r}')
        template = template.replace(f"{{{name}}}", value)
    return template


def _plain(text: str) -> str:
    """Text of annotations, in which placeholders would become images."""
    for token in (IMAGE, OBJECT, LOCATION):
        if token in text:
            raise ValueError(f"phrase: expected text without the placeholder {token}, got {text!r}")
    return text


def _locations(phrase: BoxedPhrase) -> str:
    if not phrase.boxes:
        raise ValueError(f"phrase: expected one with a box, got {phrase.phrase!r} without")
    return ", ".join([LOCATION] * len(phrase.boxes))


def _only_box(phrase: BoxedPhrase) -> Box:
    if len(phrase.boxes) != 1:
        raise ValueError(
            f"phrase: expected one box, which an object image shows, got {len(phrase.boxes)} of {phrase.phrase!r}"
        )
    return phrase.boxes[0]


def _boxes_of_options(options: Sequence[BoxedPhrase]) -> tuple[Box, ...]:
    if len({option.image for option in options}) != 1:
        raise ValueError(f"options: expected phrases of one image, got {[option.image.path for option in options]}")
    return tuple(map(_only_box, options))


def _options(texts: Sequence[str]) -> str:
    return "; ".join(f"{_letter(k)}. {text}" for k, text in enumerate(texts))


def _letter(index: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[index]


def _known(boxes: Mapping[str, Any]) -> dict[str, Box]:
    return {_same(name): box for name, box in boxes.items()}


def _same(phrase: str) -> str:
    """What names of one thing have in common."""
    return _ARTICLE.sub("", phrase.strip().lower())
