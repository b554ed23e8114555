"""Kernels on CPU tensors, executed as the PTX that compilers make of them: README.md."""

from __future__ import annotations

import os


def chosen_capability() -> int | None:
    """The compute capability for which tests/triton_kernels runs here: FINEGRAIN_PTX, unless Triton interprets."""
    chosen = os.environ.get("FINEGRAIN_PTX")
    return int(chosen) if chosen and os.environ.get("TRITON_INTERPRET") != "1" else None
