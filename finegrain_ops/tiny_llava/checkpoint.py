"""The trained weights that come with the package: in `weights/`, as transformers saves a model and its processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from .tokenizer import clip_image_processor_class, llava_processor

WEIGHTS = Path(__file__).parent / "weights"
FACTS = "training.json"
WEIGHTS_FILE = "model.safetensors"
_FILES = (
    WEIGHTS_FILE,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",  # transformers 4
    "tokenizer.json",
    "tokenizer_config.json",
)
_RELEASED_NAMES = {
    "vision_tower.": "vision_tower.vision_model.",
    "language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
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
        came = hashlib.sha256(_read(folder / name)).hexdigest()
        if came != digest:
            raise CheckpointError(
                f"{folder / name}: expected the file with the SHA-256 {digest}, got {came}; it is damaged: install "
                "finegrain_ops again, or fetch it again from the repository (git checkout)"
            )
    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        model, keys = loaded
        if keys["missing_keys"] or keys["unexpected_keys"]:
            raise ValueError(f"missing {sorted(keys['missing_keys'])}, unexpected {sorted(keys['unexpected_keys'])}")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        image_processor = clip_image_processor_class().from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: expected a checkpoint of the small LLaVA, {error}") from error
    return model.eval(), llava_processor(tokenizer, image_processor)


def facts_of(folder: Path | str = WEIGHTS) -> dict[str, Any]:
    """How the checkpoint was trained, and its accuracy on validation scenes then.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = Path(folder) / FACTS
    try:
        facts = json.loads(_read(path))
        if not isinstance(facts["sha256"], dict) or WEIGHTS_FILE not in facts["sha256"]:
            raise ValueError(f"no SHA-256 of {WEIGHTS_FILE} in it")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: expected what a training writes, {error!r}; {_REMEDY}") from error
    return dict(facts)


def save(model: Any, processor: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """In float16, with what transformers 4 and 5 each look for."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {_released_name(name): weight.detach().half().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    _make_readable_by_transformers_4(folder / "tokenizer_config.json")
    written = (folder / name for name in _FILES if (folder / name).exists())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
    (folder / FACTS).write_text(json.dumps({"sha256": digests, **facts}, indent=1) + "\n")


def _released_name(name: str) -> str:
    """Of a weight in the released LLaVA checkpoints, which both transformers 4 and 5 read; those that they write
    themselves are not all read by the other.
    """
    name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    for own, released in _RELEASED_NAMES.items():
        if name.startswith(own):
            return released + name.removeprefix(own)
    return name


def _make_readable_by_transformers_4(path: Path) -> None:
    """Release 5 writes names that release 4 does not know, and reads those of both."""
    settings = json.loads(path.read_text("utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = settings.pop("extra_special_tokens", None)
    if isinstance(extra, list):  # in release 4 it is another thing, a dictionary
        settings["additional_special_tokens"] = extra
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a file of the small LLaVA's checkpoint, got {error.strerror}; {_REMEDY}"
        ) from error
