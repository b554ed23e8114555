"""DualFocus (arXiv 2402.14767) as the package has it, in its naive form of three calls of `generate`, and one plain
answer, all from images and questions to text.

In the naive form nothing is shared: every call has its prompt and all of its images processed, encoded and read, and
writes token by token. It is made to write the very boxes that ours writes, as its model left to itself would write
none. What its answers' perplexities cost it is what they cost ours: the logits of `generate`, and no further run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import finegrain_ops

from ..dualfocus_inputs import DualFocusInputs
from .interface import Call, Peer

DUALFOCUS_OURS = "finegrain_ops DualFocus"
NO_JUMP_FORWARD = "finegrain_ops DualFocus, no jump-forward"
HALF_SKIPPED = "finegrain_ops DualFocus, half skipped"
NAIVE = "three separate generates"
ONE_PLAIN_ANSWER = "one plain answer"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the questions, that a threshold skips


@dataclass(frozen=True)
class NaiveAnswer:
    """Of one pathway. logits: (tokens, vocabulary) float32."""

    text: str
    perplexity: float
    tokens: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class NaiveResult:
    """Of one question; as DualFocusResult."""

    macro: NaiveAnswer
    micro: NaiveAnswer
    box: tuple[float, float, float, float]
    timings: dict[str, float]


def skipping(share: float) -> str:
    """The name of the peer that skips this share of the questions."""
    return f"{DUALFOCUS_OURS}, {share:.0%} skipped"


def dualfocus_peers() -> list[Peer]:
    return [
        Peer(DUALFOCUS_OURS, _dualfocus(), is_ours=True),
        Peer(NO_JUMP_FORWARD, _dualfocus(jump_forward=False), is_ours=True),
        Peer(HALF_SKIPPED, _dualfocus(0.5), is_ours=True),
        Peer(NAIVE, _three_generates),
        Peer(ONE_PLAIN_ANSWER, _one_answer),
    ]


def adaptive_peers() -> list[Peer]:
    ours = [Peer(skipping(share), _dualfocus(share), is_ours=True) for share in SHARES]
    return [*ours, Peer(ONE_PLAIN_ANSWER, _one_answer)]


def _dualfocus(share: float = 0.0, **options: Any) -> Callable[[DualFocusInputs], Call]:
    def prepare(inputs: DualFocusInputs) -> Call:
        threshold = inputs.threshold(share) if share else 0.0
        dualfocus = finegrain_ops.DualFocus(inputs.model, inputs.processor, perplexity_threshold=threshold, **options)
        return lambda: inputs.answers(dualfocus)

    return prepare


def _three_generates(inputs: DualFocusInputs) -> Call:
    from finegrain_ops.methods.dualfocus import BOX_PROMPT
    from finegrain_ops.methods.prompting import fill

    asked = [fill(BOX_PROMPT, question) for question in inputs.questions]
    boxes = inputs.boxes_written
    return lambda: [result for part in inputs.batches() for result in _naive_batch(inputs, part, asked, boxes)]


def _naive_batch(inputs: DualFocusInputs, part: slice, asked: list[str], boxes: list[list[int]]) -> list[NaiveResult]:
    from finegrain_ops.boxes import parse_boxes
    from finegrain_ops.methods.dualfocus import COMBINE_PROMPT
    from finegrain_ops.methods.prompting import fill
    from finegrain_ops.methods.results import Stopwatch
    from finegrain_ops.regions import dualfocus_crops

    images, questions, decode = inputs.images[part], inputs.questions[part], inputs.processor.tokenizer.decode
    watch = Stopwatch(inputs.device)
    with watch.phase("macro"):
        macro = _generate(inputs, [[image] for image in images], [_prompt(question) for question in questions])
    with watch.phase("box"):
        prompts = [_prompt(question) for question in asked[part]]
        encoded = _encode(inputs, [[image] for image in images], prompts)
        said = _write(inputs, encoded, boxes[part])
    with watch.phase("crop"):
        texts = [decode(row) for row in said]
        found = [
            parse_boxes(text, image_size=image.size[::-1], convention="unit")[0] for text, image in zip(texts, images)
        ]
        crops = dualfocus_crops(found, [image.size[::-1] for image in images]).tolist()
        zoomed = [image.crop(crop) for image, crop in zip(images, crops)]
    with watch.phase("micro"):
        then = [_prompt(fill(COMBINE_PROMPT, question)) for question in questions]
        chats = [f"{prompt}{text}</s>{after}" for prompt, text, after in zip(prompts, texts, then)]
        micro = _generate(inputs, [[image, crop] for image, crop in zip(images, zoomed)], chats)
    return [NaiveResult(*of_row, dict(watch.seconds)) for of_row in zip(macro, micro, found)]


def _prompt(question: str) -> str:
    return f"USER: <image>\n{question} ASSISTANT:"


def _encode(inputs: DualFocusInputs, images: list[list[Any]], prompts: list[str]) -> Any:
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return inputs.processor(images=images, text=prompts, **options).to(inputs.device, inputs.model.dtype)


def _generate(inputs: DualFocusInputs, images: list[list[Any]], prompts: list[str]) -> list[NaiveAnswer]:
    encoded = _encode(inputs, images, prompts)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    output = inputs.model.generate(**encoded, **inputs.settings, **wanted)
    tokens, logits = output.sequences[:, encoded["input_ids"].shape[1] :], torch.stack(output.logits, 1).float()
    probabilities = logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
    perplexities = probabilities.mean(1).neg().exp().tolist()
    return [
        NaiveAnswer(_text(inputs, row), perplexity, tuple(row), of_row)
        for row, perplexity, of_row in zip(tokens.tolist(), perplexities, logits)
    ]


def _write(inputs: DualFocusInputs, encoded: Any, rows: list[list[int]]) -> list[list[int]]:
    """`generate`s these tokens; what comes after shorter ones is not returned."""
    from transformers import LogitsProcessorList

    start, width = encoded["input_ids"].shape[1], max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=inputs.device)

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, float("-inf")).scatter_(1, padded[:, input_ids.shape[1] - start, None], 0.0)

    written = inputs.model.generate(
        **encoded, do_sample=False, max_new_tokens=width, logits_processor=LogitsProcessorList([force])
    )
    return [tokens[: len(row)] for tokens, row in zip(written[:, start:].tolist(), rows)]


def _one_answer(inputs: DualFocusInputs) -> Call:
    def call() -> list[str]:
        texts = []
        for part in inputs.batches():
            prompts = [_prompt(question) for question in inputs.questions[part]]
            encoded = _encode(inputs, [[image] for image in inputs.images[part]], prompts)
            tokens = inputs.model.generate(**encoded, **inputs.settings)[:, encoded["input_ids"].shape[1] :]
            texts += [_text(inputs, row) for row in tokens.tolist()]
        return texts

    return call


def _text(inputs: DualFocusInputs, tokens: list[int]) -> str:
    return inputs.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
