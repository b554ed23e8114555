"""The answers of DualFocus that are measured: which model, how many questions, how many at once.

quick  what tells most; full  the quick ones first, then the rest, as in cases.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .generate_models import SHAPES
from .named_case import ModelCase
from .operations import DUALFOCUS, DUALFOCUS_ADAPTIVE, DUALFOCUS_OPERATIONS

_LLAVA, _SCALED_DOWN = "llava-1.5-7b", "llava-1.5-7b scaled down"


@dataclass(frozen=True)
class DualFocusCase(ModelCase):
    """Each call answers `questions` questions, each about an image of its own, `batch` at a time; there are two even
    where they are asked one by one, so that half of them can be skipped.

    text_tokens: of a plain prompt, beside its image. new_tokens: of every answer.
    """

    name: str
    model: str
    batch: int
    questions: int
    text_tokens: int
    operation: str
    dtype: torch.dtype
    new_tokens: int = 5

    def __post_init__(self) -> None:
        if self.operation not in DUALFOCUS_OPERATIONS:
            raise ValueError(f"{self.name}: operation {self.operation!r} is none of {DUALFOCUS_OPERATIONS}")
        if self.questions % 2 or self.questions % self.batch:
            raise ValueError(
                f"{self.name}: questions are an even number of them and whole batches, not {self.questions} in batches "
                f"of {self.batch}"
            )

    @property
    def num_tokens(self) -> int:
        """Of the answers that a call gives."""
        return self.questions * self.new_tokens


def _case(
    operation: str, model: str, dtype: torch.dtype, batch: int, questions: int, prompt: int = 640
) -> DualFocusCase:
    text = prompt - SHAPES[model].image_tokens
    name = f"{model.removesuffix(' scaled down')}-n{prompt}-b{batch}"
    return DualFocusCase(name, model, batch, questions, text, operation, dtype)


def _quick_cpu_cases() -> list[DualFocusCase]:
    return [_case(DUALFOCUS, _SCALED_DOWN, torch.float32, 1, 2)]


def _full_cpu_cases() -> list[DualFocusCase]:
    return [
        _case(DUALFOCUS, _SCALED_DOWN, torch.float32, 4, 4),
        _case(DUALFOCUS_ADAPTIVE, _SCALED_DOWN, torch.float32, 1, 8),
    ]


def _quick_cuda_cases() -> list[DualFocusCase]:
    return [
        _case(DUALFOCUS, _LLAVA, torch.bfloat16, 1, 2),
        _case(DUALFOCUS, _LLAVA, torch.bfloat16, 8, 8),
        _case(DUALFOCUS_ADAPTIVE, _LLAVA, torch.bfloat16, 8, 16),
    ]


def _full_cuda_cases() -> list[DualFocusCase]:
    return [_case(DUALFOCUS_ADAPTIVE, _LLAVA, torch.bfloat16, 1, 16)]


def dualfocus_cases_for(device_type: str, case_set: str = "full") -> list[DualFocusCase]:
    quick, full = (
        (_quick_cuda_cases, _full_cuda_cases) if device_type == "cuda" else (_quick_cpu_cases, _full_cpu_cases)
    )
    return quick() if case_set == "quick" else [*quick(), *full()]
