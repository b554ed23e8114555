"""DualFocus on every family against runs from scratch: transformers' own processor, generate and forward on whole
conversations, with crops made by Pillow. Random weights, a batch of three images of different sizes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finegrain_ops import DualFocus
from finegrain_ops.methods.decoding import TextSpeaker
from finegrain_ops.methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT
from spelling_models import FAMILIES, make_images, make_model, make_processor
from tiny_models import IMAGE_TOKEN, TINY

QUESTIONS = ["What is it?", "And which one of these?", "Why?"]
SHORT = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}  # which DualFocus never says
NUMBERS = {  # all numbers in units of the last digit, how they are written, and what is between them
    "LLaVA": ([f"{n / 100:.2f}" for n in range(101)], ("[", ", ", ", ", ", ", "]")),
    "Qwen2-VL": ([str(n) for n in range(1001)], ("<|box_start|>(", ",", "),(", ",", ")<|box_end|>")),
    "Qwen2.5-VL": (None, ('{"bbox_2d": [', ", ", ", ", ", ", "]}")),
    "Qwen3-VL": ([str(n) for n in range(1001)], ('{"bbox_2d": [', ", ", ", ", ", ", "]}")),
}


@pytest.fixture(scope="module")
def models() -> dict:
    return {}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family: str, models: dict) -> Any:
    if family not in models:
        models[family] = make_model(family)
    return models[family]


def turns(family: str, *parts: str) -> str:
    """A conversation by the template of spelling_models: questions, each with an image, and answers."""
    image = TINY[family].prompt_of_image
    texts = [f"[user]{image}{part}" if i % 2 == 0 else f"[assistant]{part}" for i, part in enumerate(parts)]
    return "".join(texts) + ("[assistant]" if len(parts) % 2 else "")


def encoded(processor: Any, images: list, text: str) -> Any:
    return processor(images=images, text=text, return_tensors="pt")


def generated(model: Any, inputs: Any, **settings: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens, and the logits of each step (N, vocabulary)."""
    options = {**SHORT, "return_dict_in_generate": True, "output_logits": True, **settings}
    output = model.generate(**inputs, **options)
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(output.logits)


@torch.no_grad()
def logits_before(model: Any, processor: Any, images: list, text: str, said: str) -> tuple[list[int], torch.Tensor]:
    """The tokens of `said` after `text`, and a forward's logits in front of each (N, vocabulary)."""
    prompt = encoded(processor, images, text)["input_ids"].shape[1]
    inputs = encoded(processor, images, text + said)
    return inputs["input_ids"][0, prompt:].tolist(), model(**inputs).logits[0, prompt - 1 : -1]


def nll(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return -logits.log_softmax(-1)[range(len(tokens)), tokens]


def square_with_margin(box: tuple, size: tuple[int, int]) -> tuple[int, ...]:
    """The authors' code, in plain numbers."""
    (x0, y0, x1, y1), (height, width) = box, size
    side, x, y = max(x1 - x0, y1 - y0), (x0 + x1) / 2, (y0 + y1) / 2
    x0, y0 = max(0, x - side / 2), max(0, y - side / 2)
    x1, y1 = min(width, x + side / 2), min(height, y + side / 2)
    return int(max(0, x0 - 25)), int(max(0, y0 - 25)), int(min(width, x1 + 25)), int(min(height, y1 + 25))


class Recorder:
    """The logits of every text, (steps, rows, vocabulary), in the order in which the texts were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: dict[int, list[torch.Tensor]] = {}
        self.speakers: list[TextSpeaker] = []
        hear = TextSpeaker.hear

        def recorded(speaker: TextSpeaker, tree: Any, states: torch.Tensor) -> None:
            if speaker not in self.speakers:
                self.speakers.append(speaker)
            self.heard.setdefault(id(speaker), []).append(tree.logits(states[:, -1]))
            hear(speaker, tree, states)

        monkeypatch.setattr(TextSpeaker, "hear", recorded)

    def logits(self, text: int) -> torch.Tensor:
        return torch.stack(self.heard[id(self.speakers[text])])


def completable(text: str, pieces: tuple[str, ...], numbers: list[list[str]], values: tuple[int, ...] = ()) -> bool:
    """Whether some box's text goes on from this one, whose first numbers are `values`; by trying all numbers."""
    k, piece = len(values), pieces[len(values)]
    if k == 4 or len(text) <= len(piece):
        return piece.startswith(text)
    if not text.startswith(piece):
        return False
    of_axis, text = numbers[k % 2], text.removeprefix(piece)
    lowest, end = (values[k - 2] + 1, len(of_axis)) if k > 1 else (0, len(of_axis) - 1)
    return any(
        number.startswith(text)
        or (text.startswith(number) and completable(text.removeprefix(number), pieces, numbers, (*values, n)))
        for n, number in enumerate(of_axis[:end])
        if n >= lowest
    )


def assert_best_box(family: str, said: str, tokens: list[int], logits: torch.Tensor, processor: Any, size: Any) -> None:
    """Wherever more than one character could follow, the likeliest token was taken of all that a box goes on with."""
    numbers, pieces = NUMBERS["LLaVA" if family.startswith("LLaVA") else family]
    of_axes = [numbers or [str(n) for n in range(side + 1)] for side in reversed(size)]
    decoded = [processor.tokenizer.decode([token]) for token in range(logits.shape[1])]
    written = ""
    for token, of_step in zip(tokens, logits):
        starts = ("", " ") if family.startswith("LLaVA") else ("",)
        allowed = [
            k
            for k, text in enumerate(decoded)
            if text
            and any(
                (written + text).startswith(s) and completable((written + text)[len(s) :], pieces, of_axes)
                for s in starts
            )
        ]
        assert token in allowed
        if len({decoded[k][0] for k in allowed}) > 1:
            assert token == max(allowed, key=lambda k: of_step[k])
        written += decoded[token]
    assert written == said
    assert said.endswith(pieces[4])


@pytest.mark.parametrize("score", ["own_context", "micro_context"])
def test_both_answers_are_those_of_whole_conversations(family: str, model, score: str, monkeypatch) -> None:
    processor, images = make_processor(family), make_images(3)
    record = Recorder(monkeypatch)
    results = DualFocus(model, processor, score=score).answer_batch(images, QUESTIONS, **SHORT)
    monkeypatch.undo()
    for i, (image, question, result) in enumerate(zip(images, QUESTIONS, results)):
        size = image.size[::-1]
        tokens, logits = generated(model, encoded(processor, [image], turns(family, question)))
        assert list(result.macro.tokens) == tokens
        torch.testing.assert_close(record.logits(0)[: len(tokens), i], logits, rtol=0, atol=1e-4)
        macro = nll(logits, tokens)
        assert result.macro.perplexity == pytest.approx(math.exp(macro.mean()), rel=1e-5)

        q1, q2 = (prompt.replace("{question}", question) for prompt in (BOX_PROMPT, COMBINE_PROMPT))
        (first,) = generated(model, encoded(processor, [image], turns(family, q1)), max_new_tokens=1)[1]
        space, bracket = processor.tokenizer.convert_tokens_to_ids(["\u0120", "["])
        may_lead = family.startswith("LLaVA") and first[space] > first[bracket]
        said = (" " if may_lead else "") + result.grounding_text  # which is told without it
        box_tokens, box_logits = logits_before(model, processor, [image], turns(family, q1), said)
        processed = (0, 0)
        if family == "Qwen2.5-VL":  # pixels of the processed image, of 4 to a patch
            grid = encoded(processor, [image], turns(family, q1))["image_grid_thw"][0]
            processed = (4 * int(grid[1]), 4 * int(grid[2]))
        assert_best_box(family, said, box_tokens, box_logits, processor, processed)

        assert result.crop == square_with_margin(result.box, size)
        both, whole = [image, image.crop(result.crop)], turns(family, q1, said, q2)
        tokens, logits = generated(model, encoded(processor, both, whole))
        assert list(result.micro.tokens) == tokens
        torch.testing.assert_close(record.logits(1)[: len(tokens), i], logits, rtol=0, atol=1e-4)
        micro = nll(logits, tokens)
        assert result.micro.perplexity == pytest.approx(math.exp(micro.mean()), rel=1e-5)

        if score == "micro_context":
            said_macro = processor.tokenizer.decode(result.macro.tokens)
            if processor.tokenizer(said_macro, add_special_tokens=False)["input_ids"] != list(result.macro.tokens):
                continue  # bytes that are no text do not survive being written down
            of_box = nll(box_logits, box_tokens)
            again, again_logits = logits_before(model, processor, both, whole, said_macro)
            for pathway, of_answer in ((result.macro, nll(again_logits, again)), (result.micro, micro)):
                assert pathway.score == pytest.approx(math.exp(torch.cat([of_box, of_answer]).mean()), rel=1e-5)
        else:
            assert (result.macro.score, result.micro.score) == (result.macro.perplexity, result.micro.perplexity)
        assert result.chosen == ("macro" if result.macro.score < result.micro.score else "micro")
        chosen = getattr(result, result.chosen)
        assert (result.text, result.perplexity) == (chosen.text, chosen.perplexity)
