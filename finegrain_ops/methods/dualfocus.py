"""DualFocus (arXiv 2402.14767): one answer from the whole image, one with a zoomed crop, and the surer of the two.

docs/dualfocus.md tells every option, what is computed once, and what is measured.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..boxes import Box
from ..integrations.image_processor_steps import read_steps
from ..validation import clip_boxes_of_image, require_bool, require_length, require_number
from .arguments import check_questions, one_of
from .box_decoding import BoxSpeaker
from .box_style import BoxStyle
from .box_vocabulary import BoxVocabulary
from .decoding import Reciter, TextSpeaker
from .dualfocus_passes import BoxWriter, Crop, InContext, Passes, Work, Written
from .generation import check_generation, grounding_settings
from .grounding import image_grids
from .perplexity import perplexity_of
from .prompt_tree import require_tree_model
from .prompting import Prompter, Template, fill, open_images, require_template
from .results import MethodResult, Stopwatch
from .reuse import vision_once

# Q1 and Q2 of Sec. 3.2, as the authors' code words them.
BOX_PROMPT = "Please provide the bounding box coordinate of the region this question asks: {question}"
COMBINE_PROMPT = "Please combine the information from these two images and answer this question: {question}"

SCORES = ("own_context", "micro_context")

_ANSWER_DEFAULTS: Mapping[str, Any] = MappingProxyType({"max_new_tokens": 128})


@dataclass(frozen=True)
class Pathway:
    """One of the two answers.

    Attributes:
        text: the answer.
        perplexity: exp(-1/N sum log p) over its N tokens in the context that it was written in (Eq. 7), its
            end-of-sequence token among them; float32 logits before temperature and the like.
        score: what is compared: `perplexity`, or with score="micro_context" the perplexity of box and answer in the
            context of both images.
        tokens: N, that end included.
    """

    text: str
    perplexity: float
    score: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class DualFocusResult(MethodResult):
    """One image's answer: `text` and `perplexity` are those of the chosen pathway, "macro" or "micro".

    Attributes:
        macro, micro: both answers; micro is None where there was no second pass.
        crop: what the second pass saw, (x0, y0, x1, y1) in whole pixels of the original image.
        reason: what decided: "perplexity"; "letter": one answer alone was one of the `letters`; "no_box": the model's
            text has none, or one without area in the image; "confident": perplexity_threshold.
        work: what the decoder did in each phase, for the whole batch.
    """

    macro: Pathway
    micro: Pathway | None
    crop: Crop | None
    reason: str
    work: Mapping[str, Work]


class DualFocus:
    """Macro and micro answers of one model.

    ::

        dualfocus = finegrain_ops.DualFocus(model, processor)
        result = dualfocus.answer(image, "What does the sign say?", max_new_tokens=64)
        print(result.text, result.chosen, result.box, result.macro.perplexity, result.micro.perplexity)

    First pass: the question (macro), and beside it Q1, which asks for a box; the image's keys and values are computed
    and stored once. Second pass: the box's crop, zoomed, and Q2 go on from Q1 and the box (micro, Eq. 6). The answer of
    lower perplexity wins (Eqs. 7, 8).

    Args:
        model: LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL or Qwen3-VL, with sdpa or eager attention. It is not changed.
        processor: the model's.
        perplexity_threshold: skip box and micro answer where the macro answer's perplexity is below it (App. C); the
            macro answer then comes first, alone. 0 never skips. Perplexities by Eq. 7 are at least 1: docs/dualfocus.md
            says what the paper's 0.7 and 0.8 mean.
        score: "own_context": each answer's perplexity where it was written. "micro_context", as the authors' code has
            it: both answers with the box's tokens, in the context of both images; scored in the second pass's run.
        constrained: write the box by its grammar, so that there always is one; False: as the model likes.
        jump_forward: what a box's grammar leaves no choice about is run together with the choice before it.
        margin: pixels of the image around the squared box (authors' code).
        prompt: Q1: text with "{question}" in it, or a function of the question.
        combine_prompt: Q2.
        box_convention: in which convention of `boxes.parse_boxes` the model writes boxes, or "unit_view"; "auto": 0..1
            of the image for LLaVAs, as DualFocus trains them, and otherwise the family's.
        grounding_tokens: max_new_tokens of the box where it is not constrained.
        grounding_generation: further settings of its `generate`, likewise; greedy.
        template: how a question becomes the model's prompt; see prompting.Prompter.

    Raises:
        UnsupportedModelError: the model is of another family, or its attention takes no mask for each row.
        UnsupportedInputError: the image processor is set to do what `preprocess` does not.
        TypeError, ValueError: an option is not as said above, the processor belongs to another model, or its tokenizer
            cannot write a box.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        perplexity_threshold: float = 0.0,
        score: str = "own_context",
        constrained: bool = True,
        jump_forward: bool = True,
        margin: int = 25,
        prompt: Template = BOX_PROMPT,
        combine_prompt: Template = COMBINE_PROMPT,
        box_convention: str = "auto",
        grounding_tokens: int = 64,
        grounding_generation: Mapping[str, Any] | None = None,
        template: Template | None = None,
    ) -> None:
        require_tree_model(model)
        self.perplexity_threshold = require_number(
            perplexity_threshold, "perplexity_threshold", minimum=0.0, what="a finite number >= 0"
        )
        self.score = one_of(score, SCORES, "score")
        self.constrained = require_bool(constrained, "constrained")
        self.jump_forward = require_bool(jump_forward, "jump_forward")
        if require_length(margin, "margin") == 0:
            raise ValueError("margin: expected at least 1 pixel, so that no crop is empty, got 0")
        self.margin = margin
        self.prompt = require_template(prompt, "prompt")
        self.combine_prompt = require_template(combine_prompt, "combine_prompt")
        if require_length(grounding_tokens, "grounding_tokens") == 0:
            raise ValueError("grounding_tokens: expected an integer > 0, got 0")
        self.grounding_tokens = grounding_tokens
        self.grounding_generation = grounding_settings(grounding_generation, constrained=constrained)
        self.model = model
        self.processor = processor
        self.prompter = Prompter(model, processor, template)
        read_steps(self.prompter.image_processor)  # refuses one whose crops could not be made
        self.box_style = BoxStyle.of_dualfocus(model.config.model_type, processor, box_convention)
        if self.constrained:
            self.vocabulary  # noqa: B018  refuses a tokenizer that cannot write boxes

    @functools.cached_property
    def vocabulary(self) -> BoxVocabulary:
        """Of boxes; see box_vocabulary.py."""
        return BoxVocabulary(self.prompter.tokenizer, self.box_style.format)

    def answer(
        self, image: Any, question: str, *, box: Any = None, letters: Iterable[str] | None = None, **generation: Any
    ) -> DualFocusResult:
        """One image and question; see `answer_batch`."""
        boxes = None if box is None else [box]
        return self.answer_batch([image], [question], boxes=boxes, letters=letters, **generation)[0]

    def answer_batch(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        *,
        boxes: Sequence[Any] | None = None,
        letters: Iterable[str] | None = None,
        **generation: Any,
    ) -> list[DualFocusResult]:
        """One question about each image, all in one batch.

        Args:
            images: Pillow images, or paths of image files.
            questions: as many.
            boxes: for each image a box in pixels of the original image that stands in for the model's; None for an
                image without one. It is written into the conversation as the model would write it.
            letters: of multiple-choice questions, the options, such as "ABCD": an answer that begins with one of them
                ("B", "(B)", "B. a dog") beats one that does not, whatever the perplexities.
            generation: settings of both answers' `generate`: greedy or sampled; greedy and 128 new tokens where they
                leave that open.

        Raises:
            TypeError, ValueError: images, questions, boxes or generation are not as said above, the processor's inputs
                do not fit the model, or a prompt with both images is longer than the model's context.
            UnsupportedInputError: generation asks for beams or the like; or the prompt has the question before the
                image.
        """
        check_generation(generation)
        check_questions(images, questions)
        options = None if letters is None else _options(letters)
        pictures, sizes = open_images(images, as_paths=False)
        given = None if boxes is None else _given_boxes(boxes, sizes)
        batch = _Batch(self, pictures, sizes, list(questions), generation)
        # Of several questions about one image, its pixels and those of one crop are encoded once.
        with torch.no_grad(), vision_once(self.model, keep=0):
            batch.encode()
            batch.first_pass(given)
            batch.second_pass()
        return [batch.result(i, options) for i in range(len(pictures))]


class _Answer(NamedTuple):
    text: str
    tokens: list[int]
    log_probabilities: list[float]


class _Batch:
    """A batch on its way through the passes; dictionaries are by row."""

    def __init__(
        self, method: DualFocus, images: list[Any], sizes: list[tuple[int, int]], questions: list[str], generation: Any
    ) -> None:
        self.method = method
        self.images = images
        self.sizes = sizes
        self.questions = questions
        self.generation: Mapping[str, Any] = generation
        self.watch = Stopwatch(method.model.device)
        self.work: dict[str, Work] = {}
        self.macro: dict[int, _Answer] = {}
        self.is_asked: set[int] = set()  # rows that perplexity_threshold did not skip
        self.micro: dict[int, _Answer] = {}
        self.in_context: dict[int, InContext] = {}
        self.written: dict[int, Written] = {}  # of boxes
        self.grounding_texts: dict[int, str] = {}
        self.boxes: dict[int, Box] = {}
        self.crops: dict[int, Crop] = {}

    def encode(self) -> None:
        method, prompter = self.method, self.method.prompter
        with self.watch.phase("encode"):
            asked = [fill(method.prompt, question) for question in self.questions]
            texts = prompter.texts(self.images, self.questions), prompter.texts(self.images, asked)
            inputs = prompter.encode(self.images, *texts)
            self.grids = image_grids(method.model, method.processor, inputs[0], self.sizes)
            self.leads = [" " if text and not text[-1].isspace() else "" for text in texts[1]]
            self.passes = Passes(method.model, prompter, *inputs)

    def first_pass(self, given: list[Box | None] | None) -> None:
        threshold = self.method.perplexity_threshold
        macro = self.passes.macro_speaker(self.generation, _ANSWER_DEFAULTS)
        writer = self._box_writer(given) if threshold == 0.0 else None
        with self._phase("macro" if writer is None else "macro_and_box"):
            self.passes.run_first(macro, writer)
            self.macro = self._answers(macro)
        if threshold > 0.0:
            unsure = [i for i in self.passes.rows if not perplexity_of(self.macro[i].log_probabilities) < threshold]
            self.passes.keep(unsure)
            writer = self._box_writer(given) if unsure else None
            with self._phase("box"):
                if writer is not None:
                    self.passes.run_first(None, writer)
        if writer is not None:
            self._read_boxes(writer, given)

    def second_pass(self) -> None:
        rows = [i for i in self.passes.rows if i in self.boxes]
        self.is_asked = set(self.passes.rows)
        if not rows:
            return
        method, images = self.method, [self.images[i] for i in rows]
        with self._phase("crop"):
            self.passes.keep(rows)
            crops, made = self.passes.crops(images, [self.boxes[i] for i in rows], method.margin)
            self.crops = dict(zip(rows, crops))
        with self._phase("micro"):
            micro, in_context = self.passes.run_second(
                [fill(method.combine_prompt, self.questions[i]) for i in rows],
                images,
                made,
                [self.written[i] for i in rows],
                [self.macro[i].tokens for i in rows] if method.score == "micro_context" else None,
                self.generation,
                _ANSWER_DEFAULTS,
            )
            self.micro = self._answers(micro)
            self.in_context = dict(zip(rows, in_context))

    def result(self, i: int, letters: frozenset[str] | None) -> DualFocusResult:
        macro, micro = self._pathways(i)
        if micro is None:
            chosen, reason = "macro", "no_box" if i in self.is_asked else "confident"
        else:
            chosen, reason = _choice(macro, micro, letters)
        answer = macro if micro is None or chosen == "macro" else micro
        return DualFocusResult(
            text=answer.text,
            box=self.boxes.get(i),
            grounding_text=self.grounding_texts.get(i),
            perplexity=answer.perplexity,
            chosen=chosen,
            timings=dict(self.watch.seconds),
            macro=macro,
            micro=micro,
            crop=self.crops.get(i),
            reason=reason,
            work=dict(self.work),
        )

    # --- how ---

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        before = self.passes.work
        with self.watch.phase(name):
            yield
        after = self.passes.work
        self.work[name] = Work(after.forwards - before.forwards, after.tokens - before.tokens)

    def _answers(self, speaker: TextSpeaker) -> dict[int, _Answer]:
        decode = self.method.prompter.decode
        return {
            row: _Answer(decode(said), said, heard)
            for row, said, heard in zip(self.passes.rows, speaker.said, speaker.log_probabilities)
        }

    def _box_writer(self, given: list[Box | None] | None) -> BoxWriter | None:
        """For the present rows; None where there is nothing to write."""
        method, rows = self.method, self.passes.rows
        if given is not None:
            said = [self._tokens_of(i, box) if (box := given[i]) is not None else [] for i in rows]
            return Reciter(said) if any(said) else None
        if method.constrained:
            grammars = [method.box_style.grammar(self.sizes[i], self.grids[i]) for i in rows]
            is_scored = method.score == "micro_context"  # with the box
            return BoxSpeaker(
                method.vocabulary, grammars, jump_forward=method.jump_forward, with_log_probabilities=is_scored
            )
        return self.passes.free_box_speaker(method.grounding_generation, {"max_new_tokens": method.grounding_tokens})

    def _read_boxes(self, writer: BoxWriter, given: list[Box | None] | None) -> None:
        method = self.method
        self.written = self.passes.written(writer, method.grounding_generation)
        for i, written in self.written.items():
            if given is not None:
                box = given[i]
            else:
                text = method.prompter.decode_markup(written.tokens)
                self.grounding_texts[i] = text
                box = method.box_style.read(text, self.sizes[i], self.grids[i])
            if box is not None and box[0] < box[2] and box[1] < box[3]:
                self.boxes[i] = box

    def _tokens_of(self, i: int, box: Box) -> list[int]:
        style, vocabulary = self.method.box_style, self.method.vocabulary
        lead = self.leads[i] if style.format.may_lead_with_space else ""
        size, grids = self.sizes[i], self.grids[i]
        text = lead + style.text(box, size, grids)
        return [option.token for option in vocabulary.options_of(style.grammar(size, grids).start(), "", text)]

    def _pathways(self, i: int) -> tuple[Pathway, Pathway | None]:
        """Macro and micro."""
        macro, micro, context = self.macro[i], self.micro.get(i), self.in_context.get(i)
        if context is None:
            return _pathway(macro), None if micro is None else _pathway(micro)
        assert micro is not None
        scored = (
            _pathway(a, [*context.box, *b]) for a, b in ((macro, context.macro), (micro, micro.log_probabilities))
        )
        return next(scored), next(scored)


def _pathway(answer: _Answer, in_context: Sequence[float] | None = None) -> Pathway:
    perplexity = perplexity_of(answer.log_probabilities)
    score = perplexity if in_context is None else perplexity_of(in_context)
    return Pathway(answer.text, perplexity, score, tuple(answer.tokens))


def _choice(macro: Pathway, micro: Pathway, letters: frozenset[str] | None) -> tuple[str, str]:
    """Which pathway is the answer, and why (Eq. 8)."""
    if letters is not None:
        macro_is_one, micro_is_one = (_letter(pathway.text) in letters for pathway in (macro, micro))
        if macro_is_one != micro_is_one:
            return ("macro" if macro_is_one else "micro"), "letter"
    return ("macro" if macro.score < micro.score else "micro"), "perplexity"


def _letter(text: str) -> str | None:
    """The option that an answer names at its beginning: "B", "(B)", "B.", "B: a dog"; not that of "Both"."""
    match = re.match(r"\W*(\w)(?!\w)", text)
    return match[1].upper() if match else None


def _options(letters: Iterable[str]) -> frozenset[str]:
    options = list(letters)
    if not options or not all(isinstance(letter, str) and len(letter) == 1 for letter in options):
        raise ValueError(f'letters: expected single letters, such as "ABCD", got {letters!r}')
    return frozenset(letter.upper() for letter in options)


def _given_boxes(boxes: Sequence[Any], sizes: list[tuple[int, int]]) -> list[Box | None]:
    if not isinstance(boxes, (list, tuple)) or len(boxes) != len(sizes):
        raise ValueError(f"boxes: expected a list with an entry for each of the {len(sizes)} images, got {boxes!r}")
    given: list[Box | None] = []
    for i, (entry, size) in enumerate(zip(boxes, sizes)):
        clipped = [] if entry is None else clip_boxes_of_image(entry, size, f"boxes[{i}]")
        if len(clipped) > 1:
            raise ValueError(f"boxes[{i}]: expected one box, since one crop is shown, got {len(clipped)}")
        given.append(clipped[0] if clipped else None)
    return given
