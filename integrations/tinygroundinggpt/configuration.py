"""Configuration of TinyGroundingGPT: two vision encoders, and a language model."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, Dinov2Config, PretrainedConfig, Qwen2Config

from ...validation import describe

# ViT-L/14 of CLIP at 336 pixels (openai/clip-vit-large-patch14-336): 24 x 24 patches.
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# ViT-L/14 of DINOv2 (facebook/dinov2-large). 518 is what its 37 x 37 position embeddings were trained on; the model
# interpolates them to the grid of the image that it is given.
DINOV2_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
}
_QWEN2_5 = {
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}
QWEN2_5 = {  # size -> Qwen/Qwen2.5-*-Instruct
    "1.5b": {
        **_QWEN2_5,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "3b": {
        **_QWEN2_5,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
    },
}


class TinyGroundingGPTConfig(PretrainedConfig):  # type: ignore[misc]
    """TinyGroundingGPT (paper Sec. 3.3). `from_size` gives the two sizes of the paper.

    Both encoders see the same square image of clip_config.image_size pixels and must cut it into the same grid of
    patches: the features of a patch are CLIP's and DINOv2's of that very patch, side by side.

    Args:
        clip_config: of a `CLIPVisionModel`, a CLIPVisionConfig or a dict. None: ViT-L/14 at 336 pixels.
        dino_config: of a `Dinov2Model`, a Dinov2Config or a dict. None: ViT-L/14, trained at 518 pixels.
        text_config: of a `Qwen2Model`, a Qwen2Config or a dict. None: Qwen2.5-3B.
        image_token_id: stands in input_ids for each patch of an image. The default is what Qwen2.5's tokenizer gives to
            the first token that is added to it.
        object_token_id: the same for an object image; the second.
        vision_feature_layer: which of CLIP's hidden states is taken, 0 being its embeddings. -2 as in LLaVA: the last
            layer of CLIP serves its contrastive loss. Of DINOv2 it is the last one, after its layer norm.
        projector_hidden_act: between the two layers of the projector.

    Raises:
        ValueError: the encoders cut the image into different grids, or it is not a whole number of patches.
        TypeError: a sub-configuration is none.
    """

    model_type = "tinygroundinggpt"
    sub_configs = {"clip_config": CLIPVisionConfig, "dino_config": Dinov2Config, "text_config": Qwen2Config}  # noqa: RUF012

    def __init__(
        self,
        clip_config: Any = None,
        dino_config: Any = None,
        text_config: Any = None,
        image_token_id: int = 151665,
        object_token_id: int = 151666,
        vision_feature_layer: int = -2,
        projector_hidden_act: str = "gelu",
        **kwargs: Any,
    ) -> None:
        self.clip_config = _sub_config(clip_config, "clip_config", CLIPVisionConfig, CLIP_LARGE_336)
        self.dino_config = _sub_config(dino_config, "dino_config", Dinov2Config, DINOV2_LARGE)
        self.text_config = _sub_config(text_config, "text_config", Qwen2Config, QWEN2_5["3b"])
        self.image_token_id = image_token_id
        self.object_token_id = object_token_id
        self.vision_feature_layer = vision_feature_layer
        self.projector_hidden_act = projector_hidden_act
        side = self.clip_config.image_size
        if side % self.clip_config.patch_size or side % self.dino_config.patch_size:
            raise ValueError(
                f"clip_config.image_size: expected a multiple of both patch sizes, {self.clip_config.patch_size} and "
                f"{self.dino_config.patch_size}, got {side}"
            )
        if self.clip_config.patch_size != self.dino_config.patch_size:
            raise ValueError(
                f"dino_config.patch_size: expected clip_config's {self.clip_config.patch_size}, so that the features "
                f"of each patch can be joined, got {self.dino_config.patch_size}"
            )
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        super().__init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **options: Any) -> TinyGroundingGPTConfig:
        """The configuration of TinyGroundingGPT-3B ("3b") or TinyGroundingGPT-1.5B ("1.5b"), with other `options`."""
        if size not in QWEN2_5:
            raise ValueError(f'size: expected "3b" or "1.5b", got {describe(size)}')
        return cls(text_config=QWEN2_5[size], **options)

    @property
    def grid_size(self) -> int:
        """Patches along a side of the image."""
        return int(self.clip_config.image_size // self.clip_config.patch_size)

    @property
    def image_seq_length(self) -> int:
        """Tokens of an image, or of an object image."""
        return self.grid_size**2


def _sub_config(value: Any, name: str, kind: type[PretrainedConfig], default: dict[str, Any]) -> Any:
    if value is None:
        value = default
    if isinstance(value, dict):
        return kind(**value)
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, a dict or None, got {describe(value)}")
    return value
