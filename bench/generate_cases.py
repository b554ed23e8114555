"""The answers that are measured end to end: which model, how many prompts of which length, which phase.

quick  what tells most; full  the quick ones first, then the rest, as in cases.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .generate_models import SHAPES
from .named_case import ModelCase
from .operations import COF, GENERATE_DECODE, GENERATE_OPERATIONS, GENERATE_PREFILL

_FEWEST_TEXT = 16  # of a padded batch's shortest prompt


@dataclass(frozen=True)
class GenerateCase(ModelCase):
    """`batch` prompts of an image and `text_tokens` of text; padded: of all lengths down to a few tokens of text.

    prefill: `generate` of one token, vision encoder and prompt included. decode: `generate` of `new_tokens` more, on
    the cache of the prompt. cof: a first pass of `grounding_tokens`, then an answer of `new_tokens`.
    """

    name: str
    model: str
    batch: int
    text_tokens: int
    operation: str
    dtype: torch.dtype
    is_padded: bool = False
    new_tokens: int = 16
    weight: float = 2.0
    grounding_tokens: int = 32

    def __post_init__(self) -> None:
        if self.operation not in GENERATE_OPERATIONS:
            raise ValueError(f"{self.name}: operation {self.operation!r} is none of {GENERATE_OPERATIONS}")
        if self.is_padded and self.batch < 2:
            raise ValueError(f"{self.name}: a padded batch has at least 2 prompts, not {self.batch}")

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Of each prompt; in a padded batch evenly spread."""
        if not self.is_padded:
            return (self.text_tokens,) * self.batch
        step = (self.text_tokens - _FEWEST_TEXT) / (self.batch - 1)
        return tuple(round(self.text_tokens - i * step) for i in range(self.batch))

    @property
    def num_tokens(self) -> int:
        """That a call processes, padding not counted."""
        if self.operation != GENERATE_PREFILL:
            return self.batch * self.new_tokens
        return self.batch * SHAPES[self.model].image_tokens + sum(self.text_lengths)


def _case(
    operation: str, model: str, prompt: int, dtype: torch.dtype, batch: int = 1, is_padded: bool = False
) -> GenerateCase:
    text = prompt - SHAPES[model].image_tokens
    name = f"{model.removesuffix(' scaled down')}-n{prompt}-b{batch}{'-padded' if is_padded else ''}"
    return GenerateCase(name, model, batch, text, operation, dtype, is_padded)


def _quick_cpu_cases() -> list[GenerateCase]:
    return [
        _case(operation, "llava-1.5-7b scaled down", 640, torch.float32)
        for operation in (GENERATE_PREFILL, GENERATE_DECODE, COF)
    ]


def _full_cpu_cases() -> list[GenerateCase]:
    llava, qwen, dtype = "llava-1.5-7b scaled down", "qwen2.5-vl-3b scaled down", torch.float32
    return [
        _case(GENERATE_PREFILL, llava, 2048, dtype),
        _case(GENERATE_PREFILL, qwen, 1088, dtype),
        _case(GENERATE_DECODE, qwen, 1088, dtype),
        *(_case(operation, llava, 672, dtype, 4, is_padded=True) for operation in (GENERATE_PREFILL, GENERATE_DECODE)),
        _case(GENERATE_PREFILL, "instructblip-vicuna-7b scaled down", 64, dtype),
    ]


def _quick_cuda_cases() -> list[GenerateCase]:
    llava, dtype, both = "llava-1.5-7b", torch.bfloat16, (GENERATE_PREFILL, GENERATE_DECODE)
    return [
        *(_case(operation, llava, 640, dtype) for operation in both),
        *(_case(operation, llava, 640, dtype, 16) for operation in both),
        *(_case(operation, llava, 672, dtype, 16, is_padded=True) for operation in both),
        *(_case(operation, "qwen2.5-vl-3b", 1088, dtype) for operation in both),
        _case(GENERATE_PREFILL, "instructblip-vicuna-7b", 64, dtype, 16),
        *(_case(COF, llava, 640, dtype, batch) for batch in (1, 8)),
    ]


def _full_cuda_cases() -> list[GenerateCase]:
    llava, dtype = "llava-1.5-7b", torch.bfloat16
    return [
        *(_case(operation, llava, 2944, dtype) for operation in (GENERATE_PREFILL, GENERATE_DECODE)),
        *(
            _case(operation, "qwen2.5-vl-3b", 1088, dtype, 16, is_padded=True)
            for operation in (GENERATE_PREFILL, GENERATE_DECODE)
        ),
        _case(GENERATE_PREFILL, "instructblip-vicuna-7b", 64, dtype),
    ]


def generate_cases_for(device_type: str, case_set: str = "full") -> list[GenerateCase]:
    quick, full = (
        (_quick_cuda_cases, _full_cuda_cases) if device_type == "cuda" else (_quick_cpu_cases, _full_cpu_cases)
    )
    return quick() if case_set == "quick" else [*quick(), *full()]
