"""Where the demo's models come from: the package, a folder, the hub."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ..tiny_llava import checkpoint
from .usage import UsageError


def small_llava(folder: str | None, device: str) -> tuple[Any, Any]:
    """(model, processor) that know scenes of cards: those of the package, or of a folder.

    Raises:
        UsageError: the weights are missing or damaged.
    """
    transformers.utils.logging.disable_progress_bar()  # it takes a tenth of a second
    try:
        model, processor = checkpoint.load(checkpoint.WEIGHTS if folder is None else folder)
    except checkpoint.CheckpointError as error:
        if folder is None:
            raise UsageError(str(error)) from error
        raise UsageError(f"--model: {error}; a LLaVA-1.5 that knows more than cards wants --image too") from error
    finally:
        transformers.utils.logging.enable_progress_bar()
    return model.to(device), processor


def real_llava(name: str, device: str) -> tuple[Any, Any]:
    """(model in eval mode, processor) of a LLaVA-1.5 checkpoint; in float16 on a GPU.

    Raises:
        UsageError: there is none of that name.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    try:
        model_type = transformers.AutoConfig.from_pretrained(name).model_type
        if model_type != "llava":
            raise ValueError(f"got one of model_type {model_type!r}")
        model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(name, dtype=dtype)
        processor = transformers.AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--model: expected a folder or hub name of a LLaVA checkpoint, {error}") from error
    return model.to(device).eval(), processor
