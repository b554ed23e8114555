"""Model, processor, images and questions of a case of DualFocus, and what it writes of them."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import finegrain_ops

from .dualfocus_cases import DualFocusCase
from .generate_models import SHAPES, make_model, sharing_weights

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_SPACE = "\u2581"  # SentencePiece's mark, which begins a word
_CHARACTERS = "0123456789.,:?[](){}\"'_-\n"
_WORDS = 400  # that questions are made of


@dataclass(frozen=True)
class DualFocusInputs:
    case: DualFocusCase
    model: Any
    processor: Any
    images: list[Any]
    questions: list[str]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def settings(self) -> dict[str, Any]:
        """Of every answer's `generate`: so many tokens, whatever they are. Special ones would not show in its text."""
        length = {"min_new_tokens": self.case.new_tokens, "max_new_tokens": self.case.new_tokens}
        return {"do_sample": False, **length, "suppress_tokens": list(range(len(_SPECIAL)))}

    def batches(self) -> Iterator[slice]:
        for start in range(0, self.case.questions, self.case.batch):
            yield slice(start, start + self.case.batch)

    def answers(self, dualfocus: finegrain_ops.DualFocus) -> list[finegrain_ops.DualFocusResult]:
        return [
            result
            for part in self.batches()
            for result in dualfocus.answer_batch(self.images[part], self.questions[part], **self.settings)
        ]

    @functools.cached_property
    def boxes_written(self) -> list[list[int]]:
        """Of each question, the tokens of the box that DualFocus writes, all defaults."""
        dualfocus = finegrain_ops.DualFocus(self.model, self.processor)
        with watched_boxes() as speakers:
            self.answers(dualfocus)
        return [said for speaker in speakers for said in speaker.said]

    def threshold(self, share: float) -> float:
        """The perplexity_threshold by which this share of the questions is skipped; 0 for none."""
        perplexities, num_skipped = self._macro_perplexities, round(share * self.case.questions)
        if num_skipped in (0, len(perplexities)):
            return 2 * perplexities[-1] if num_skipped else 0.0
        return (perplexities[num_skipped - 1] + perplexities[num_skipped]) / 2

    @functools.cached_property
    def _macro_perplexities(self) -> list[float]:
        """In order, of macro answers that come first, alone."""
        dualfocus = finegrain_ops.DualFocus(self.model, self.processor, perplexity_threshold=1e30)
        return sorted(result.macro.perplexity for result in self.answers(dualfocus))


@contextmanager
def watched_boxes() -> Iterator[list[Any]]:
    """Lists the box_decoding.BoxSpeakers of every DualFocus answer; num_steps is how often each was asked to choose."""
    from finegrain_ops.methods import dualfocus

    speakers: list[Any] = []

    class Watched(dualfocus.BoxSpeaker):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.num_steps = 0
            speakers.append(self)

        def hear(self, tree: Any, logits: Any) -> None:
            self.num_steps += 1
            super().hear(tree, logits)

    unwatched, dualfocus.BoxSpeaker = dualfocus.BoxSpeaker, Watched
    try:
        yield speakers
    finally:
        dualfocus.BoxSpeaker = unwatched


def make_dualfocus_inputs(case: DualFocusCase, device: torch.device) -> DualFocusInputs:
    """LLaVA's, with a tokenizer that has a token for each word of a question, and for each character of a box."""
    import numpy as np
    from PIL import Image

    from finegrain_ops.demo import random_llava

    shape = SHAPES[case.model]
    if shape.family != "llava":
        raise ValueError(f"{case.id}: DualFocus is measured with LLaVA's processor, not with {shape.family}'s")
    model = sharing_weights(make_model(case.model, case.dtype, device))
    tokenizer = _tokenizer(model.config.get_text_config().vocab_size)
    processor = random_llava.make_processor(tokenizer, 14 * shape.image_grid[0])
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    pixels = np.random.default_rng(0).integers(0, 256, (case.questions, 480, 640, 3), dtype=np.uint8)
    around = len(processor.tokenizer("USER: \n? ASSISTANT:")["input_ids"])
    draw = random.Random(0)
    questions = [
        " ".join(f"word{draw.randrange(_WORDS)}" for _ in range(case.text_tokens - around)) + "?"
        for _ in range(case.questions)
    ]
    return DualFocusInputs(case, model, processor, [Image.fromarray(image) for image in pixels], questions)


def _tokenizer(vocabulary: int) -> Any:
    """Like Llama's: words begin with their space, and what a box is made of is spelled in single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from finegrain_ops.methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT

    prompts = re.findall(r"[A-Za-z]+", f"USER ASSISTANT {BOX_PROMPT} {COMBINE_PROMPT}")
    words = [*prompts, *(f"word{i}" for i in range(_WORDS))]
    pieces = [*_SPECIAL, _SPACE, *_CHARACTERS, *words, *(_SPACE + word for word in words)]
    pieces = list(dict.fromkeys(pieces))
    pieces += [f"{_SPACE}other{i}" for i in range(vocabulary - len(pieces))]  # so that all that is said is a word
    scored = [(piece, 0.0 if piece in _SPECIAL else -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=_SPECIAL.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
