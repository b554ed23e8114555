"""What the demo expects of its options beyond what argparse can check."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from ..geometry import Box, clip_box


class UsageError(Exception):
    """An option is wrong; ends the demo with argparse's usage message."""


def check_options(options: argparse.Namespace, outputs: Iterable[Path]) -> None:
    """Of every page.

    Raises:
        UsageError: an option is out of its range, there is no such device, or no picture can be written.
    """
    from ..methods.cof import PRESETS  # wants transformers, which may be missing until it is asked for

    if options.weight is not None and not 0 <= options.weight < float("inf"):
        raise UsageError(f"--weight: expected a number >= 0, got {options.weight}")
    if options.preset is not None and options.preset not in PRESETS:
        raise UsageError(f"--preset: expected one of {', '.join(PRESETS)}, got {options.preset!r}")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: expected at least 1, got {options.max_new_tokens}")
    if options.question is not None and not options.question.strip():
        raise UsageError(f"--question: expected a question, got {options.question!r}")
    if options.device is not None:
        _check_device(options.device)
    for output in outputs:
        _check_output(output)


def device_of(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def box_of(options: argparse.Namespace, image_size: tuple[int, int]) -> Box | None:
    """--box, clipped to the image of (height, width) pixels; None where it is not given.

    Raises:
        UsageError: it has no area in the image.
    """
    if options.box is None:
        return None
    try:
        return clip_box(options.box, image_size, "--box")
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UsageError(f"--device: expected a device of this machine, got {device!r}: {error}") from error


def _check_output(output: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if output.suffix[1:].lower() not in kinds:
        raise UsageError(f"--output: expected a file name that ends in one of {', '.join(kinds)}, got {output}")
    if not output.parent.is_dir():
        raise UsageError(f"--output: expected a file in a folder that exists, got {output}")
