"""The stages of TinyGroundingGPT's training (Sec. 3.1, App. A.1): what is trained, and how (Table 5)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...validation import describe, require_length

PROJECTOR = ("model.multi_modal_projector.",)
PROJECTOR_AND_LANGUAGE_MODEL = (*PROJECTOR, "model.language_model.", "lm_head.")

WARMUP_RATIO = 0.03

# DeepSpeed's configuration in the paper: `training_arguments(stage, folder, deepspeed=ZERO2)`, which needs its package.
ZERO2 = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@dataclass(frozen=True)
class Stage:
    """A column of Table 5. The paper does not say whether its batch is that of a GPU or of all eight: here, of all."""

    description: str
    trained: tuple[str, ...]  # how the names of the parameters begin
    batch_size: int
    learning_rate: float
    epochs: int


STAGES = {
    "1a": Stage("objects and relations, the projector", PROJECTOR, 32, 1e-3, 1),
    "1b": Stage("objects and relations", PROJECTOR_AND_LANGUAGE_MODEL, 32, 2e-5, 1),
    "2": Stage("alignment of text, coordinates and object images", PROJECTOR_AND_LANGUAGE_MODEL, 32, 2e-5, 1),
    "3": Stage("global alignment", PROJECTOR_AND_LANGUAGE_MODEL, 16, 2e-5, 2),
}


def freeze_for_stage(model: nn.Module, stage: str) -> list[str]:
    """Lets exactly the parameters of a stage require gradients; both vision encoders never do.

    A call for another stage sets all of them anew.

    Args:
        model: a TinyGroundingGPTForConditionalGeneration.
        stage: "1a" (the projector), "1b", "2" or "3" (projector and language model, its head included).

    Returns:
        The names of the parameters that are trained, as in model.named_parameters().

    Raises:
        ValueError: there is no such stage.
        TypeError: the model has no such parameters.
    """
    trained = require_stage(stage).trained
    names = []
    parameters = dict(model.named_parameters())
    if not any(name.startswith(PROJECTOR) for name in parameters):
        raise TypeError(
            f"model: expected a TinyGroundingGPTForConditionalGeneration, got {type(model).__name__} without "
            f"parameters {PROJECTOR[0]}*; unwrap it first"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name.startswith(trained))
        if parameter.requires_grad:
            names.append(name)
    return names


def training_arguments(stage: str, output_dir: str | os.PathLike[str], **overrides: Any) -> Any:
    """Table 5 as transformers' TrainingArguments: batch, learning rate, epochs, cosine decay, warm-up, bf16, TF32.

    The stage's batch is shared by the processes (WORLD_SIZE in the environment, as torchrun sets it). With
    per_device_train_batch_size given, gradients are accumulated over as many steps as make up the batch. TF32 is asked
    for where the GPU has it, and without a GPU the Trainer is told to use the CPU, or bf16 would be refused.
    remove_unused_columns is False, since a collator needs columns that the model's forward does not know.

    Args:
        stage: "1a", "1b", "2" or "3".
        output_dir: of checkpoints.
        overrides: any of TrainingArguments' own, which win; deepspeed=ZERO2 is the paper's.

    Raises:
        ValueError: there is no such stage, or the batch cannot be shared evenly.
        ImportError: accelerate is not installed, which transformers' Trainer needs.
    """
    from transformers import TrainingArguments

    of_stage = require_stage(stage)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "num_train_epochs": of_stage.epochs,
        "learning_rate": of_stage.learning_rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "bf16": True,
        "tf32": True if has_gpu and torch.cuda.get_device_capability() >= (8, 0) else None,
        "use_cpu": not has_gpu,
        "remove_unused_columns": False,
    }
    # Release 5 takes a ratio as a fraction of warmup_steps.
    has_ratio = "warmup_ratio" in TrainingArguments.__dataclass_fields__
    settings["warmup_ratio" if has_ratio else "warmup_steps"] = WARMUP_RATIO
    if "gradient_accumulation_steps" not in overrides:
        settings |= _batches(of_stage.batch_size, processes, overrides.get("per_device_train_batch_size"))
    return TrainingArguments(output_dir=str(output_dir), **{**settings, **overrides})


def require_stage(stage: object) -> Stage:
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(f"stage: expected one of {', '.join(map(repr, STAGES))}, got {describe(stage)}")
    return STAGES[stage]


def _batches(batch_size: int, processes: int, per_device: Any) -> dict[str, int]:
    """Whose product, with the number of processes, is the batch."""
    if per_device is None:
        per_device = batch_size // processes
    per_step = require_length(per_device, "per_device_train_batch_size") * processes
    if per_step == 0 or batch_size % per_step:
        raise ValueError(
            f"per_device_train_batch_size: expected a divisor of the stage's batch of {batch_size} over {processes} "
            f"processes, got {per_device}; give gradient_accumulation_steps as well to train on another batch"
        )
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": batch_size // per_step}
