"""Model, prompts and bias of a case of `generate`; of a case of CoF model, processor, images and questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .generate_cases import GenerateCase
from .generate_models import SHAPES, make_model, make_prompts, region_bias, sharing_weights


@dataclass(frozen=True)
class GenerateInputs:
    case: GenerateCase
    model: Any  # unpatched; shared by the cases of one shape
    prompts: dict[str, Tensor]
    key_bias: Tensor
    per_position: tuple[str, ...] = ("input_ids", "attention_mask", "mm_token_type_ids")  # (B, P)

    @property
    def device(self) -> torch.device:
        return self.key_bias.device


def make_generate_inputs(case: GenerateCase, device: torch.device) -> GenerateInputs:
    prompts = make_prompts(case.model, case.text_lengths, case.dtype, device)
    if not _takes_token_types():
        prompts.pop("mm_token_type_ids", None)
    bias = region_bias(case.model, prompts["input_ids"], case.weight)
    return GenerateInputs(case, make_model(case.model, case.dtype, device), prompts, bias)


def _takes_token_types() -> bool:
    """transformers 5 tells image tokens by them, 4.57 refuses them."""
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


@dataclass(frozen=True)
class CoFInputs:
    case: GenerateCase
    model: Any
    processor: Any
    images: list[Any]
    questions: list[str]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def encode(self, questions: list[str]) -> Any:
        prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
        encoded = self.processor(
            images=self.images, text=prompts, padding=True, padding_side="left", return_tensors="pt"
        )
        return encoded.to(self.device, self.model.dtype)

    def generate(self, encoded: Any, new_tokens: int, **bias: Tensor) -> list[str]:
        settings = {"do_sample": False, "max_new_tokens": new_tokens, **self.ends_at(new_tokens)}
        tokens = self.model.generate(**encoded, **settings, **bias)[:, -new_tokens:]
        return [self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]

    def ends_at(self, new_tokens: int) -> dict[str, Any]:
        """Words of the processor's only, and as many as that."""
        words = range(len(self.processor.tokenizer), self.model.config.text_config.vocab_size)
        return {"min_new_tokens": new_tokens, "suppress_tokens": [*range(5), *words]}


def make_cof_inputs(case: GenerateCase, device: torch.device) -> CoFInputs:
    """LLaVA's. A question has a word for each token that the case has left for it."""
    import numpy as np
    from PIL import Image

    from finegrain_ops.demo import random_llava

    processor = random_llava.make()[1]
    model = sharing_weights(make_model(case.model, case.dtype, device))
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    pixels = np.random.default_rng(0).integers(0, 256, (case.batch, 480, 640, 3), dtype=np.uint8)
    around = 6  # tokens: beginning, USER : ASSISTANT : and a question mark
    questions = [" ".join(["what"] * (length - around)) + " ?" for length in case.text_lengths]
    assert SHAPES[case.model].family == "llava", f"{case.id}: CoF is measured with LLaVA's processor"
    return CoFInputs(case, model, processor, [Image.fromarray(image) for image in pixels], questions)
