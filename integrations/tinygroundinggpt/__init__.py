"""TinyGroundingGPT (Sec. 3.3 of its paper) for Hugging Face transformers: configuration, model, processor, training.

Importing this package makes transformers' Auto classes know it.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # not hidden where torchvision is missing

from .assembly import from_checkpoints
from .configuration import TinyGroundingGPTConfig
from .image_processing import TinyGroundingGPTImageProcessor
from .modeling import (
    TinyGroundingGPTForConditionalGeneration,
    TinyGroundingGPTModel,
    TinyGroundingGPTPreTrainedModel,
)
from .picture import attention_picture, object_attention
from .processing import TinyGroundingGPTProcessor, add_placeholder_tokens
from .training import STAGES, ZERO2, freeze_for_stage, training_arguments

__all__ = [
    "STAGES",
    "TinyGroundingGPTConfig",
    "TinyGroundingGPTForConditionalGeneration",
    "TinyGroundingGPTImageProcessor",
    "TinyGroundingGPTModel",
    "TinyGroundingGPTPreTrainedModel",
    "TinyGroundingGPTProcessor",
    "ZERO2",
    "add_placeholder_tokens",
    "attention_picture",
    "freeze_for_stage",
    "from_checkpoints",
    "object_attention",
    "training_arguments",
]

# exist_ok: importlib.reload runs this again.
AutoConfig.register(TinyGroundingGPTConfig.model_type, TinyGroundingGPTConfig, exist_ok=True)
AutoModel.register(TinyGroundingGPTConfig, TinyGroundingGPTModel, exist_ok=True)
AutoModelForImageTextToText.register(TinyGroundingGPTConfig, TinyGroundingGPTForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(
    TinyGroundingGPTConfig, slow_image_processor_class=TinyGroundingGPTImageProcessor, exist_ok=True
)
AutoProcessor.register(TinyGroundingGPTConfig, TinyGroundingGPTProcessor, exist_ok=True)
