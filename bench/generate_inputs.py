"""Model, prompts and bias of a case of `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .generate_cases import GenerateCase
from .generate_models import make_model, make_prompts, region_bias


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
