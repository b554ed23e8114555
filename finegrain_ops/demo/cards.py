"""The page of cards: a rendered scene, questions about it, and the answers of the small model beside the truth."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..boxes import Box
from ..regions import dualfocus_crops
from ..tiny_llava.drawing import GLYPH
from ..tiny_llava.questions import AMBIGUOUS, LOCAL_KINDS, questions_about
from ..tiny_llava.scenes import Scene, draw_scene, intersection_over_union, seed_of
from ..tiny_llava.tokenizer import IMAGE_SIDE, unknown_words
from .asking import Answers, Asker, Query
from .models import small_llava
from .panels import panels
from .table import METHODS_EXPLAINED, print_answers, tally
from .usage import UsageError, box_of, device_of

_DEFAULT_SCENE = 2  # the first about which all of this can be asked
_ASKED = {"count": 1, "left_of": 1, "colour": 1, "shape": 1, "letter": 2, "dot": 2}  # how many of each
_MAX_NEW_TOKENS = 8  # all answers are one word


def show(options: argparse.Namespace, output: Path) -> None:
    """Prints the answers about a scene, and draws one of them.

    Raises:
        UsageError: there is no such scene, its model is missing or does not know the question's words, or a box is
            outside.
    """
    index = _DEFAULT_SCENE if options.scene is None else options.scene
    try:
        scene = draw_scene(seed_of("demo", index))
    except ValueError as error:
        raise UsageError(f"--scene: {error}") from error
    box = box_of(options, scene.size)
    model, processor = small_llava(options.model, device_of(options))
    if options.question is not None:
        _check_words(processor.tokenizer, options.question)
        queries = [own_query(options.question, scene, box)]
    else:
        queries = default_queries(scene, box)
    asker = Asker(
        model,
        processor,
        preset=options.preset,
        weight=options.weight,
        max_new_tokens=options.max_new_tokens or _MAX_NEW_TOKENS,
    )
    answers = asker.ask_all(scene.image, queries)
    title = f"Scene {index}: {len(scene.cards)} cards, {scene.image.width} x {scene.image.height} pixels"
    print_answers(answers, title, Console())
    print(explanation(scene, answers))
    drawn = next((one for one in answers if one.query.kind == "letter"), answers[0])
    panels(asker, scene.image, drawn).savefig(output, dpi=110)
    print(f'Picture of "{drawn.query.text}": {output}')


def default_queries(scene: Scene, box: Box | None) -> list[Query]:
    """The first questions of several kinds. An ambiguous one is asked once for each card that it could be about, whose
    box is given then; with the others `box` is.
    """
    by_kind = questions_about(scene.cards, scene.image.width)
    chosen = [question for kind, count in _ASKED.items() for question in by_kind[kind][:count]]
    queries = [Query(question.text, question.kind, (question.answer,), box) for question in chosen]
    for question in by_kind[AMBIGUOUS]:
        if question.text == by_kind[AMBIGUOUS][0].text:
            queries.append(Query(question.text, AMBIGUOUS, (question.answer,), question.box(scene)))
    return queries


def own_query(text: str, scene: Scene, box: Box | None) -> Query:
    """With the truth, if it is one of the questions about the scene. Of an ambiguous one every answer is right, or that
    of the card that the box shows.
    """
    by_kind = questions_about(scene.cards, scene.image.width)
    alike = [question for of_kind in by_kind.values() for question in of_kind if question.text == text]
    if not alike:
        return Query(text, box=box)
    if box is not None and alike[0].kind == AMBIGUOUS:
        alike = [max(alike, key=lambda question: intersection_over_union(box, question.box(scene)))]
    return Query(text, alike[0].kind, tuple(question.answer for question in alike), box)


def explanation(scene: Scene, answers: Sequence[Answers]) -> str:
    """What the table shows, in plain words."""
    whole, crop = letter_heights(scene)
    lines = [tally(answers)]
    if any(one.query.kind in LOCAL_KINDS for one in answers):
        lines += [
            f"The model sees {IMAGE_SIDE} x {IMAGE_SIDE} pixels. A letter is {whole} of them high in the whole scene,",
            f"and {crop} in a crop of its card.",
        ]
    if any(one.query.kind == AMBIGUOUS for one in answers):
        lines.append("An ambiguous question fits several cards: only a box tells which one is meant.")
    lines.append(METHODS_EXPLAINED)
    return "\n".join(line for line in lines if line)


def letter_heights(scene: Scene) -> tuple[str, str]:
    """Pixels of what the model sees, smallest to largest: of the whole scene, and of crops around the true boxes."""
    crops = dualfocus_crops([card.box for card in scene.cards], scene.size)
    shown = (crops[:, 3] - crops[:, 1]).tolist()
    letters = [GLYPH * (card.box[3] - card.box[1]) for card in scene.cards]
    return (
        _range([IMAGE_SIDE * letter / scene.image.height for letter in letters]),
        _range([IMAGE_SIDE * letter / height for letter, height in zip(letters, shown)]),
    )


def _range(pixels: Sequence[float]) -> str:
    low, high = round(min(pixels)), round(max(pixels))
    return f"{low}" if low == high else f"{low} to {high}"


def _check_words(tokenizer: Any, question: str) -> None:
    unknown = unknown_words(tokenizer, question)
    if unknown:
        known = sorted({word.strip() for word in tokenizer.get_vocab() if word.strip().isalpha()}, key=str.lower)
        raise UsageError(
            f"--question: expected words that the small model knows, got {', '.join(map(repr, unknown))}. A question "
            f"begins with What, Which, How or Is, and ends with ?; it knows: {' '.join(known)}"
        )
