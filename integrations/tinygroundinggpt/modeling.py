"""TinyGroundingGPT (Sec. 3.3): CLIP's and DINOv2's features of each patch, joined, an MLP, and Qwen2.5.

Which patch is where: both encoders see the same square image and cut it row by row into the same grid (24 x 24 for 336
pixels of 14), so token i of an image is patch (i // 24, i % 24) of both. Their CLS tokens are left out.

| encoder | features of a patch                                                              |
|---------|----------------------------------------------------------------------------------|
| CLIP    | hidden state `vision_feature_layer` (-2, as in LLaVA)                            |
| DINOv2  | last hidden state, after the final layer norm; position embeddings interpolated  |
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionModel, Dinov2Model, GenerationMixin, PreTrainedModel, Qwen2Model
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration import TinyGroundingGPTConfig

IS_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


class TinyGroundingGPTVisionTower(nn.Module):
    """Both encoders as one, which is given one tensor for both, so that what it makes of an image can be remembered."""

    def __init__(self, config: TinyGroundingGPTConfig) -> None:
        super().__init__()
        self.clip_tower = CLIPVisionModel._from_config(config.clip_config)
        self.dino_tower = Dinov2Model._from_config(config.dino_config)
        self.feature_layer = config.vision_feature_layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 6, S, S), what CLIP sees and what DINOv2 sees, to (N, patches, both hidden sizes), CLIP's first."""
        clip_pixels, dino_pixels = pixel_values.split(3, dim=1)
        of_clip = self.clip_tower(clip_pixels, output_hidden_states=True).hidden_states[self.feature_layer]
        of_dino = self.dino_tower(dino_pixels).last_hidden_state
        return torch.cat([of_clip[:, 1:], of_dino[:, 1:]], dim=-1)


class TinyGroundingGPTProjector(nn.Module):
    """From the joined features to the language model's embeddings."""

    def __init__(self, config: TinyGroundingGPTConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.clip_config.hidden_size + config.dino_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class TinyGroundingGPTPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = TinyGroundingGPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class TinyGroundingGPTModel(TinyGroundingGPTPreTrainedModel):
    """The model without its language modelling head."""

    def __init__(self, config: TinyGroundingGPTConfig) -> None:
        super().__init__(config)
        self.vision_tower = TinyGroundingGPTVisionTower(config)
        self.multi_modal_projector = TinyGroundingGPTProjector(config)
        self.language_model = Qwen2Model._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model = decoder

    def get_image_features(self, pixel_values: Tensor | None, dino_pixel_values: Tensor | None) -> Tensor:
        """(N, 3, S, S) normalised for each encoder to (N, patches, hidden size), as embedded tokens.

        Raises:
            ValueError: the two are not both given, or not of the same (N, 3, S, S).
        """
        if pixel_values is None or dino_pixel_values is None:
            missing = "pixel_values" if pixel_values is None else "dino_pixel_values"
            raise ValueError(f"{missing}: expected what the processor returned, beside the other encoder's, got None")
        side = self.config.clip_config.image_size
        if pixel_values.shape[1:] != (3, side, side) or dino_pixel_values.shape != pixel_values.shape:
            raise ValueError(
                f"pixel_values, dino_pixel_values: expected (N, 3, {side}, {side}) both, got "
                f"{tuple(pixel_values.shape)} and {tuple(dino_pixel_values.shape)}"
            )
        both = torch.cat([pixel_values, dino_pixel_values.to(pixel_values)], dim=1)
        return self.multi_modal_projector(self.vision_tower(both))

    def image_places(self, input_ids: Tensor) -> Tensor:
        """(B, P) bool: the tokens whose place the features of images and objects take.

        Of each row as many as make whole images, from its start. Fewer than that beyond them are of the model's own
        making: it may write "<object>", which then is a token like any other.
        """
        places = (input_ids == self.config.image_token_id) | (input_ids == self.config.object_token_id)
        length = self.config.image_seq_length
        return places & (places.cumsum(1) <= places.sum(1, keepdim=True) // length * length)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        dino_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """See TinyGroundingGPTForConditionalGeneration.forward."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        features = None
        has_pixels = pixel_values is not None or dino_pixel_values is not None
        if inputs_embeds is not None and has_pixels:
            raise ValueError(
                "pixel_values: expected input_ids beside them, which say where images are, got inputs_embeds"
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if has_pixels:
                features = self.get_image_features(pixel_values, dino_pixel_values)
                inputs_embeds = self._with_features(input_ids, inputs_embeds, features)
        self._check_length(inputs_embeds, attention_mask)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )

    def _with_features(self, input_ids: Any, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        places = self.image_places(input_ids)
        # Masked scattering fills what is missing with anything. Compiled code is not made to wait for the count.
        if not torch.compiler.is_compiling() and int(places.sum()) != features.shape[0] * features.shape[1]:
            raise ValueError(
                f"input_ids: expected {features.shape[1]} image or object tokens for each of the {len(features)} "
                f"images of pixel_values, got {int(places.sum())}; pass what the processor returned"
            )
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(places[:, :, None].to(inputs_embeds.device), features)

    def _check_length(self, inputs_embeds: Tensor, attention_mask: Tensor | None) -> None:
        has_padding_mask = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
        length = attention_mask.shape[1] if has_padding_mask else inputs_embeds.shape[1]  # type: ignore[union-attr]
        limit = self.config.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"input_ids: expected at most {limit} tokens (text_config.max_position_embeddings), got {length}; "
                f"an image or object takes {self.config.image_seq_length} of them"
            )


class TinyGroundingGPTForConditionalGeneration(TinyGroundingGPTPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """TinyGroundingGPT as a Hugging Face model: from_pretrained, generate, gradient checkpointing, Trainer."""

    # The same in the form that the installed transformers wants: a list, and from release 5 on what is tied to what.
    _tied_weights_keys: Any = (
        {"lm_head.weight": "model.language_model.embed_tokens.weight"} if IS_TRANSFORMERS_5 else ["lm_head.weight"]
    )

    def __init__(self, config: TinyGroundingGPTConfig) -> None:
        super().__init__(config)
        self.model = TinyGroundingGPTModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.model.set_decoder(decoder)

    def get_image_features(self, pixel_values: Tensor | None, dino_pixel_values: Tensor | None) -> Tensor:
        """See TinyGroundingGPTModel.get_image_features."""
        return self.model.get_image_features(pixel_values, dino_pixel_values)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        dino_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Next-token logits, and with labels their mean cross-entropy.

        Args:
            input_ids: (B, P) int64, with `config.image_seq_length` tokens image_token_id for every image and as many
                object_token_id for every object image.
            pixel_values: (N, 3, S, S), the batch's images and object images in the order in which they appear, row by
                row, normalised for CLIP.
            dino_pixel_values: the same, normalised for DINOv2.
            attention_mask: (B, K), 0 for padding, over all keys so far.
            position_ids, past_key_values: see Qwen2Model.
            inputs_embeds: (B, P, hidden size) instead of input_ids, without pixels.
            labels: (B, P) int64, -100 where there is no loss; shifted within.
            logits_to_keep: of how many positions, from the end, logits are computed; 0: all.

        Raises:
            ValueError: pixels and their tokens differ in number, the encoders' pixels differ in shape, or there are
                more tokens than text_config.max_position_embeddings.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            dino_pixel_values=dino_pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        pixel_values: Tensor | None = None,
        dino_pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pixels go with the step whose tokens stand for them: the first, unless the cache already holds the images."""
        model_inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        step_ids = model_inputs.get("input_ids")
        if pixel_values is not None and step_ids is not None and bool(self.model.image_places(step_ids).any()):
            model_inputs |= {"pixel_values": pixel_values, "dino_pixel_values": dino_pixel_values}
        return model_inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """For beams and several sequences: the images of a row together, where transformers repeats each by itself."""
        pixels = {name: kwargs.pop(name, None) for name in ("pixel_values", "dino_pixel_values")}
        if expand_size > 1 and input_ids is not None and pixels["pixel_values"] is not None:
            counts = self.model.image_places(input_ids).sum(1) // self.config.image_seq_length
            pixels = {
                name: torch.cat([of_row.repeat(expand_size, 1, 1, 1) for of_row in value.split(counts.tolist())])
                for name, value in pixels.items()
                if value is not None
            }
        input_ids, expanded = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, expanded | {name: value for name, value in pixels.items() if value is not None}
