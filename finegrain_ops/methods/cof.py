"""CoF, coarse to fine (arXiv 2412.16869): ask the model where the answer is, then answer with its attention there.

docs/cof.md tells every option, and what the two passes may share.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..boxes import Box
from ..families import ImageGrid
from ..integrations.handle import PatchHandle
from ..integrations.patching import patch
from ..validation import clip_boxes_of_image, require_bool, require_length, require_number
from .arguments import check_questions, one_of
from .box_decoding import write_boxes
from .box_style import BoxStyle
from .box_vocabulary import BoxVocabulary
from .generation import GREEDY, check_generation, generate_answers, grounding_settings
from .grounding import GROUNDING_PROMPT, image_grids, region_around
from .prompt_tree import require_tree_model
from .prompting import Prompter, Template, fill, open_images, require_template
from .results import MethodResult, Stopwatch
from .reuse import IMAGES_IN_PROMPT, ImagePrefix, align_after_images, vision_once

ON_MISSING_BOX = ("whole_image", "plain", "raise")
ROWS = ("all", "after_image")

# Sec. III-A.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llava-1.5-7b": MappingProxyType({"weight": 2.0, "expand": 1.3}),
        "llava-1.5-13b": MappingProxyType({"weight": 4.5, "expand": 1.0}),
        "instructblip-13b": MappingProxyType({"weight": 22.0, "expand": 1.0}),
    }
)

_ANSWER_DEFAULTS = {**GREEDY, "max_new_tokens": 128}


@dataclass(frozen=True)
class CoFResult(MethodResult):
    """One image's answer. `chosen` is "cof", or "macro" where on_missing_box="plain" left the attention as it is.

    Attributes:
        regions: where attention was raised: the boxes, expanded; the whole image where that stood in; () for "macro".
    """

    regions: tuple[Box, ...]


class MissingBoxError(ValueError):
    """With on_missing_box="raise": no box of an image leads to a token.

    Attributes:
        image_index: of the first such image of the batch.
        grounding_text: what the model wrote; None where boxes were given.
    """

    def __init__(self, image_index: int, grounding_text: str | None) -> None:
        came = "the box that was given" if grounding_text is None else f"the grounding text {grounding_text!r}"
        super().__init__(
            f"images[{image_index}]: expected a box in the part of the image that the model sees, got {came}; "
            'on_missing_box="whole_image" or "plain" answers without one'
        )
        self.image_index = image_index
        self.grounding_text = grounding_text


@dataclass(frozen=True)
class _Located:
    """Where one image's answer is."""

    grounding_text: str | None = None
    box: Box | None = None
    regions: tuple[Box, ...] = ()
    is_whole_image: bool = False


@dataclass(frozen=True)
class _Batch:
    images: list[Any]
    sizes: list[tuple[int, int]]
    questions: list[str]
    grids: list[list[ImageGrid]]
    handle: PatchHandle
    watch: Stopwatch


class CoF:
    """Coarse-to-fine answers of one model.

    ::

        cof = finegrain_ops.CoF.from_preset("llava-1.5-7b", model, processor)
        result = cof.answer(image, "What does the sign say?", max_new_tokens=64)
        print(result.text, result.box, result.perplexity)

    First pass: the question and a grounding instruction (Sec. II-B); of the boxes in the model's text the first counts,
    expanded by `expand` about its centre. Second pass: the question alone, with log(weight) * M added to the attention
    scores (Eq. 3), where M is 1 for the image tokens that the region touches.

    Args:
        model: of a supported family (README, "Models"). If it is patched already that patch is used, otherwise it is
            patched for the time of each call. One call at a time: threads need a model each.
        processor: the model's; of the original Qwen-VL its tokenizer.
        weight: lambda: a number, or a tensor per layer and head (see `PatchHandle.key_bias`).
        expand: alpha, by which the box's width and height are multiplied.
        on_missing_box: what to do without a box, or with one that preprocessing crops away: "whole_image": M is 1 for
            all image tokens, as the authors do; "plain": answer without a bias; "raise": MissingBoxError.
        grounding: False leaves the first pass out, M is 1 for all image tokens (Table II, "Reweight" alone).
        rows: "all": Eq. 3, every row is biased; "after_image": only those after the image, which then is the same in
            both passes.
        square: make the box a square before it is expanded, as the authors' code does.
        soft: M is the share of each token that the region covers, instead of 0 or 1.
        prompt: the grounding prompt, with "{question}" in it, or a function of the question.
        retry_prompt: such a prompt for a second attempt, by the images that are without a box; None: no attempt.
            grounding.STRICT_GROUNDING_PROMPT is one.
        box_convention: in which convention of `boxes.parse_boxes` the model writes boxes, or "unit_view": 0..1 of what
            is left of the image after preprocessing; "auto": its family's.
        constrained: write the box of the first pass by its grammar, in the family's format and fewer decoder steps
            (box_decoding.py): there always is one then. Families whose prompts hold image tokens.
        grounding_tokens: max_new_tokens of the first pass, where it is not constrained.
        grounding_generation: further settings of its `generate`, likewise; greedy.
        template: how a question becomes the model's prompt; see prompting.Prompter.

    Raises:
        UnsupportedModelError: the model cannot be patched.
        TypeError, ValueError: an option is not as said above, or the processor belongs to another model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        weight: float | Tensor = 2.0,
        expand: float = 1.3,
        on_missing_box: str = "whole_image",
        grounding: bool = True,
        rows: str = "all",
        square: bool = False,
        soft: bool = False,
        prompt: Template = GROUNDING_PROMPT,
        retry_prompt: Template | None = None,
        box_convention: str = "auto",
        constrained: bool = False,
        grounding_tokens: int = 64,
        grounding_generation: Mapping[str, Any] | None = None,
        template: Template | None = None,
    ) -> None:
        if not isinstance(weight, Tensor):  # a tensor is checked against the model's layers, before any pass
            weight = require_number(weight, "weight", minimum=0.0, what="a finite number >= 0, or a tensor")
        self.weight = weight
        self.expand = require_number(expand, "expand", minimum=0.0, what="a finite number > 0")
        if self.expand == 0.0:
            raise ValueError("expand: expected a finite number > 0, got 0.0; 1.0 keeps the box's size")
        self.on_missing_box = one_of(on_missing_box, ON_MISSING_BOX, "on_missing_box")
        self.grounding = require_bool(grounding, "grounding")
        self.rows = one_of(rows, ROWS, "rows")
        self.square = require_bool(square, "square")
        self.soft = require_bool(soft, "soft")
        self.prompt = require_template(prompt, "prompt")
        self.retry_prompt = None if retry_prompt is None else require_template(retry_prompt, "retry_prompt")
        if require_length(grounding_tokens, "grounding_tokens") == 0:
            raise ValueError("grounding_tokens: expected an integer > 0, got 0; grounding=False leaves the pass out")
        self.grounding_tokens = grounding_tokens
        self.box_convention = box_convention
        self.constrained = require_bool(constrained, "constrained")
        self.grounding_generation = grounding_settings(grounding_generation, constrained=constrained)
        self.model = model
        self.processor = processor
        with _patched(model, processor) as handle:  # refuses a model that cannot be patched
            self._prompter = Prompter(model, processor, template)
            self._box_style = BoxStyle.of_cof(handle.model_type, processor, box_convention)
            if self.constrained:
                require_tree_model(model)
                self._vocabulary = BoxVocabulary(self._prompter.tokenizer, self._box_style.format)

    @classmethod
    def from_preset(cls, name: str, model: Any, processor: Any, **options: Any) -> CoF:
        """With the paper's weight and expand (PRESETS) for this model; `options` hold before them.

        Raises:
            ValueError: there is no such preset.
        """
        return cls(model, processor, **{**PRESETS[one_of(name, tuple(PRESETS), "preset")], **options})

    def answer(self, image: Any, question: str, *, boxes: Any = None, **generation: Any) -> CoFResult:
        """One image and question; see `answer_batch`. boxes: one box, or a list of boxes."""
        return self.answer_batch([image], [question], boxes=None if boxes is None else [boxes], **generation)[0]

    def answer_batch(
        self, images: Sequence[Any], questions: Sequence[str], *, boxes: Sequence[Any] | None = None, **generation: Any
    ) -> list[CoFResult]:
        """One question about each image, all in one batch: they ground together and are answered together.

        Args:
            images: Pillow images, or paths of image files (of the original Qwen-VL only paths).
            questions: as many.
            boxes: for each image a box, or a list of boxes, in pixels of the original image, in place of the first
                pass; None or [] for an image without one. They are expanded too.
            generation: settings of the answer's `generate`; greedy and 128 new tokens where they leave that open.

        Raises:
            TypeError, ValueError: images, questions, boxes or generation are not as said above, or the processor's
                inputs do not fit the model; before any pass.
            MissingBoxError: see on_missing_box.
        """
        check_generation(generation)
        check_questions(images, questions)
        if boxes is not None and not self.grounding:
            raise ValueError("boxes: expected None with grounding=False, which takes the whole image")
        pictures, sizes = open_images(images, as_paths=self._prompter.writes_paths)
        given = None if boxes is None else _given_boxes(boxes, sizes)
        watch = Stopwatch(self.model.device)
        # The encoder's output of every image of the batch is kept, for a retry runs only some of them.
        with _patched(self.model, self.processor) as handle, vision_once(self.model, keep=len(pictures)):
            asks_for_boxes = self.grounding and given is None
            inputs, grounding_inputs, prefix = self._inputs(handle, pictures, questions, asks_for_boxes, watch)
            with watch.phase("region"):
                grids = image_grids(handle.model, handle.processor, inputs, sizes)
                on_whole_image = self._bias_on_whole_images(handle, inputs, sizes)
                gate = handle.row_gate(inputs, self.rows)
            batch = _Batch(pictures, sizes, list(questions), grids, handle, watch)
            if given is not None:
                located = [self._given(batch, i, of_image) for i, of_image in enumerate(given)]
            elif grounding_inputs is not None:
                located = self._grounded(batch, grounding_inputs, prefix)
            else:
                located = [_Located() for _ in pictures]
            with watch.phase("region"):
                located = [self._without_gaps(batch, i, of_image) for i, of_image in enumerate(located)]
                patched = self._patched_arguments(batch, inputs, located, on_whole_image, gate)
            with watch.phase("answer"):
                decode = self._prompter.decode
                answers = generate_answers(
                    self.model, inputs, decode, generation, _ANSWER_DEFAULTS, patched=patched, prefix=prefix
                )
        return [
            CoFResult(
                text=text,
                box=of_image.box,
                grounding_text=of_image.grounding_text,
                perplexity=perplexity,
                chosen="cof" if of_image.regions else "macro",
                timings=dict(watch.seconds),
                regions=of_image.regions,
            )
            for text, perplexity, of_image in zip(answers.texts, answers.perplexities, located)
        ]

    def _inputs(
        self, handle: PatchHandle, images: list[Any], questions: Sequence[str], asks_for_boxes: bool, watch: Stopwatch
    ) -> tuple[dict[str, Any], dict[str, Any] | None, ImagePrefix | None]:
        """Of the second pass and of the first, and what both go on from where the rows of the images are not biased."""
        with watch.phase("encode"):
            texts = [self._prompter.texts(images, questions)]
            if asks_for_boxes:
                prompts = [fill(self.prompt, question) for question in questions]
                texts.append(self._prompter.texts(images, prompts))
            encoded = self._prompter.encode(images, *texts)
        if not asks_for_boxes:
            return encoded[0], None, None
        if self.rows == "after_image" and handle.model_type in IMAGES_IN_PROMPT:
            with watch.phase("prefill"):
                laid_out = [align_after_images(inputs, self.model) for inputs in encoded]
                if _alike_up_to_images(handle, *laid_out):
                    return laid_out[0], laid_out[1], ImagePrefix.prefill(self.model, laid_out[0])
        return encoded[0], encoded[1], None

    # --- first pass ---

    def _grounded(self, batch: _Batch, inputs: Mapping[str, Any], prefix: ImagePrefix | None) -> list[_Located]:
        located = self._ground(batch, range(len(batch.images)), inputs, prefix)
        missing = [i for i, of_image in enumerate(located) if not of_image.regions]
        if self.retry_prompt is None or not missing:
            return located
        with batch.watch.phase("encode"):
            pictures = [batch.images[i] for i in missing]
            prompts = [fill(self.retry_prompt, batch.questions[i]) for i in missing]
            (inputs,) = self._prompter.encode(pictures, self._prompter.texts(pictures, prompts))
        for i, again in zip(missing, self._ground(batch, missing, inputs)):
            located[i] = again
        return located

    def _ground(
        self, batch: _Batch, indices: Sequence[int], inputs: Mapping[str, Any], prefix: ImagePrefix | None = None
    ) -> list[_Located]:
        """Asks for the boxes of these images of the batch, which `inputs` hold."""
        with batch.watch.phase("ground"):
            texts = self._grounding_texts(batch, indices, inputs, prefix)
        located = []
        for i, text in zip(indices, texts):
            box = self._box_style.read(text, batch.sizes[i], batch.grids[i])
            region = None if box is None else self._region(batch, i, box)
            located.append(
                _Located(text) if region is None else _Located(grounding_text=text, box=box, regions=(region,))
            )
        return located

    def _grounding_texts(
        self, batch: _Batch, indices: Sequence[int], inputs: Mapping[str, Any], prefix: ImagePrefix | None
    ) -> list[str]:
        decode = self._prompter.decode_markup
        if not self.constrained:
            defaults = {**GREEDY, "max_new_tokens": self.grounding_tokens}
            settings = self.grounding_generation
            return generate_answers(self.model, inputs, decode, settings, defaults, prefix=prefix).texts
        grammars = [self._box_style.grammar(batch.sizes[i], batch.grids[i]) for i in indices]
        return [decode(tokens) for tokens in write_boxes(self.model, inputs, self._vocabulary, grammars, prefix)]

    def _given(self, batch: _Batch, i: int, boxes: list[Box]) -> _Located:
        regions = [self._region(batch, i, box) for box in boxes]
        seen = [(box, region) for box, region in zip(boxes, regions) if region is not None]
        return _Located(box=seen[0][0], regions=tuple(region for _, region in seen)) if seen else _Located()

    def _region(self, batch: _Batch, i: int, box: Box) -> Box | None:
        return region_around(box, self.expand, batch.sizes[i], batch.grids[i], square=self.square)

    def _without_gaps(self, batch: _Batch, i: int, located: _Located) -> _Located:
        if located.regions or (self.on_missing_box == "plain" and self.grounding):
            return located
        if self.on_missing_box == "raise" and self.grounding:
            raise MissingBoxError(i, located.grounding_text)
        height, width = batch.sizes[i]
        return replace(located, regions=((0.0, 0.0, float(width), float(height)),), is_whole_image=True)

    # --- second pass ---

    def _bias_on_whole_images(self, handle: PatchHandle, inputs: Any, sizes: list[tuple[int, int]]) -> Tensor:
        """M = 1 for every image token, those of padding included: all that are outside of no box."""
        return handle.key_bias(inputs, [[] for _ in sizes], sizes, self.weight, complement="image")

    def _patched_arguments(
        self, batch: _Batch, inputs: Any, located: list[_Located], on_whole_image: Tensor, gate: Tensor | None
    ) -> dict[str, Tensor]:
        """key_bias, one row for each image, and row_gate; none where every image is answered as it is."""
        if not any(of_image.regions for of_image in located):
            return {}
        boxes = [[] if of_image.is_whole_image else list(of_image.regions) for of_image in located]
        bias = batch.handle.key_bias(inputs, boxes, batch.sizes, self.weight, soft=self.soft)
        is_whole = torch.tensor([of_image.is_whole_image for of_image in located], device=bias.device)
        bias = torch.where(is_whole.reshape(-1, *(1,) * (bias.dim() - 1)), on_whole_image, bias)
        return {"key_bias": bias} | ({} if gate is None else {"row_gate": gate})


def _alike_up_to_images(handle: PatchHandle, *prompts: Mapping[str, Tensor]) -> bool:
    """Whether two prompts of `align_after_images` share a prefix; not where the question comes before the image."""
    length = int(handle.family.image_keys(handle.model, prompts[0]).any(0).nonzero().max()) + 1
    masks = [prompt["attention_mask"][:, :length] != 0 for prompt in prompts]
    ids = [prompt["input_ids"][:, :length] for prompt in prompts]
    return torch.equal(*masks) and torch.equal(ids[0][masks[0]], ids[1][masks[0]])


@contextmanager
def _patched(model: Any, processor: Any) -> Iterator[PatchHandle]:
    """The patch that the model has, or one for the time being; with this processor's geometry."""
    handle = getattr(model, "__dict__", {}).get("_finegrain_handle")
    if isinstance(handle, PatchHandle):
        handle = copy.copy(handle)
        handle.processor = processor
        yield handle
        return
    with patch(model, processor) as handle:
        yield handle


def _given_boxes(boxes: Sequence[Any], sizes: list[tuple[int, int]]) -> list[list[Box]]:
    if len(boxes) != len(sizes):
        raise ValueError(f"boxes: expected an entry for each of the {len(sizes)} images, got {len(boxes)}")
    return [
        [] if entry is None else clip_boxes_of_image(entry, size, f"boxes[{i}]")
        for i, (entry, size) in enumerate(zip(boxes, sizes))
    ]
