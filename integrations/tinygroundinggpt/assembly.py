"""How TinyGroundingGPT begins: published encoders and language model as one, joined by an untrained projector."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel, Dinov2Model

from .configuration import TinyGroundingGPTConfig
from .modeling import TinyGroundingGPTForConditionalGeneration, TinyGroundingGPTProjector
from .processing import add_placeholder_tokens

Checkpoint = str | os.PathLike[str]


def from_checkpoints(
    clip: Checkpoint, dino: Checkpoint, language_model: Checkpoint, tokenizer: Any, **options: Any
) -> TinyGroundingGPTForConditionalGeneration:
    """What stage 1 of the training starts from (Sec. 3.1): three checkpoints, joined by a random projector.

    ::

        tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-3B-Instruct")
        model = from_checkpoints("openai/clip-vit-large-patch14-336", "facebook/dinov2-large",
                                 "Qwen/Qwen2.5-3B-Instruct", tokenizer)
        processor = TinyGroundingGPTProcessor(TinyGroundingGPTImageProcessor(), tokenizer)

    Args:
        clip, dino, language_model: names or folders, of CLIP (with its text model, or without), DINOv2 and Qwen2.5.
        tokenizer: the language model's; it gets the two placeholder tokens where it lacks them.
        options: of every `from_pretrained`, such as dtype or local_files_only.

    Raises:
        ValueError: the encoders' patches differ in size.
    """
    towers = CLIPVisionModel.from_pretrained(clip, **options), Dinov2Model.from_pretrained(dino, **options)
    text = AutoModelForCausalLM.from_pretrained(language_model, **options)
    config = TinyGroundingGPTConfig(*(part.config for part in (*towers, text)))
    with torch.device("meta"):  # no second copy of the parts in memory
        model = TinyGroundingGPTForConditionalGeneration(config)
    core = model.model
    core.vision_tower.clip_tower, core.vision_tower.dino_tower = towers
    core.language_model, model.lm_head = text.model, text.lm_head
    core.multi_modal_projector = TinyGroundingGPTProjector(config).to(device=text.device, dtype=text.dtype)
    model.generation_config = text.generation_config
    add_placeholder_tokens(tokenizer, model)
    return model.eval()
