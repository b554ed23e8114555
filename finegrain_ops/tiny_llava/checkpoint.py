"""The trained weights that come with the package: in `weights/`, as transformers saves a model and its processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from .tokenizer import PATCH_SIZE, clip_image_processor_class

WEIGHTS = Path(__file__).parent / "weights"
FACTS = "training.json"
_WEIGHTS_FILE = "model.safetensors"
_FILES = (
    _WEIGHTS_FILE,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",  # transformers 4
    "tokenizer.json",
    "tokenizer_config.json",
)
_REMEDY = (
    "install finegrain_ops again, or train it with `python -m finegrain_ops.tiny_llava.training` and give its folder"
)


class CheckpointError(RuntimeError):
    """The weights are missing, or are not those that were saved."""


def load(folder: Path | str = WEIGHTS, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model in eval mode, processor) of the small LLaVA, or of another that was trained as it was.

    The same as LlavaForConditionalGeneration.from_pretrained(folder) and AutoProcessor.from_pretrained(folder), which
    with some versions of transformers wants torchvision.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    for name, digest in facts_of(folder)["sha256"].items():
        found = hashlib.sha256(_read(folder / name)).hexdigest()
        if found != digest:
            raise CheckpointError(
                f"{folder / name}: expected the file with the SHA-256 {digest}, got {found}; it is damaged: install "
                "finegrain_ops again, or fetch it again from the repository (git checkout)"
            )
    try:
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        image_processor = clip_image_processor_class().from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: expected a checkpoint of the small LLaVA, {error}") from error
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model.eval(), processor


def facts_of(folder: Path | str = WEIGHTS) -> dict[str, Any]:
    """How the checkpoint was trained, and its accuracy on validation scenes then.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = Path(folder) / FACTS
    try:
        facts = json.loads(_read(path))
        if _WEIGHTS_FILE not in facts["sha256"]:
            raise ValueError(f"no SHA-256 of {_WEIGHTS_FILE} in it")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: expected what a training writes, {error!r}; {_REMEDY}") from error
    return dict(facts)


def save(model: Any, processor: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """In float16, with what transformers 4 and 5 each look for."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().half().contiguous() for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    written = (folder / name for name in _FILES if (folder / name).exists())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
    (folder / FACTS).write_text(json.dumps({"sha256": digests, **facts}, indent=1) + "\n")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a file of the small LLaVA's checkpoint, got {error.strerror}; {_REMEDY}"
        ) from error
