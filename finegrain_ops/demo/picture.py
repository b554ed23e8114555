"""The page of a picture of one's own: a LLaVA-1.5 checkpoint is asked about it in all three ways."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console

from .asking import Asker, Query
from .models import real_llava
from .panels import panels
from .table import METHODS_EXPLAINED, print_answers
from .usage import UsageError, box_of, device_of

_MAX_NEW_TOKENS = 32


def show(options: argparse.Namespace, output: Path) -> None:
    """Prints the answers, and draws where the model looked.

    Raises:
        UsageError: no model or question is given, there is no such picture or model, the box is outside, or a method
            does not take the model.
    """
    if options.model is None:
        raise UsageError(
            "--image: expected --model with it, a LLaVA-1.5 checkpoint such as llava-hf/llava-1.5-7b-hf: the small "
            "model that comes with the package has seen nothing but scenes of cards"
        )
    if options.question is None:
        raise UsageError("--image: expected --question with it, what to ask about the picture")
    image = _open(options.image)
    box = box_of(options, (image.height, image.width))
    model, processor = real_llava(options.model, device_of(options))
    try:
        asker = Asker(
            model,
            processor,
            preset=options.preset,
            weight=options.weight,
            max_new_tokens=options.max_new_tokens or _MAX_NEW_TOKENS,
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"--model: expected a LLaVA-1.5 checkpoint, {error}") from error
    answers = asker.ask_all(image, [Query(options.question, box=box)])
    print_answers(answers, f"{options.image}: {image.width} x {image.height} pixels", Console(), has_truth=False)
    print(METHODS_EXPLAINED)
    panels(asker, image, answers[0]).savefig(output, dpi=110)
    print(f"Picture: {output}")


def _open(path: Path) -> Any:
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"--image: expected a picture, {error}") from error
