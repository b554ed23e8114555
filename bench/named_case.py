"""What cases of every kind have in common."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from .generate_models import SHAPES


class NamedCase:
    """A dataclass with an operation, a name and a dtype, which together name it."""

    name: str
    operation: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        return f"{self.operation}-{self.name}-{self.dtype_name}"


class ModelCase(NamedCase):
    """One of a model of generate_models.SHAPES, whose prompts are an image and so much text."""

    model: str
    text_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Of the longest plain prompt."""
        return SHAPES[self.model].image_tokens + self.text_tokens

    def parameters(self) -> dict[str, Any]:
        """What a stored row says about the case; plain JSON values."""
        return {
            **asdict(self),
            "id": self.id,
            "dtype": self.dtype_name,
            "prompt_tokens": self.prompt_tokens,
            "shape": asdict(SHAPES[self.model]),
        }
