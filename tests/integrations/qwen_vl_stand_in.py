"""A random Qwen-VL small enough for CI, with the interface of the checkpoints' own code, whose licence keeps it out.

What patching and the tests see of that code is here: QWenLMHeadModel.forward and prepare_inputs_for_generation,
transformer.h[i].attn._attn, caches (B, S, H, D), queries scaled by log n beyond seq_length, masks made in
_prepare_decoder_attention_mask (wrongly for several tokens on top of a cache, where that code raises), gradient
checkpointing, and a `visual` that encodes the image whose path input_ids spell. Everything else is as small as can be.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IMAGE_START, IMAGE_END, IMAGE_PAD, PAD = 260, 261, 262, 263  # below 256: bytes
TOKENS_PER_IMAGE = 256


class Config(SimpleNamespace):
    model_type = "qwen"

    def __init__(self, **options) -> None:
        defaults = {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "seq_length": 2048,
            "use_logn_attn": True,
            "attn_dropout_prob": 0.0,
            "output_attentions": False,
            "visual": {"image_start_id": IMAGE_START, "image_size": 32, "patch_size": 8},
        }
        super().__init__(**{**defaults, **options})

    def to_dict(self) -> dict:
        return dict(vars(self))


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale_attn_weights = True
        self.use_logn_attn = config.use_logn_attn
        positions = torch.arange(1, 4097, dtype=torch.float32)
        self.logn = (positions.log() / math.log(config.seq_length)).clamp(min=1.0)
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.attn_dropout = nn.Dropout(config.attn_dropout_prob)

    def _attn(self, query, key, value, registered_causal_mask, attention_mask=None, head_mask=None):
        scores = query @ key.mT / self.head_dim**0.5
        probabilities = self.attn_dropout((scores + attention_mask).softmax(-1))
        if head_mask is not None:
            probabilities = probabilities * head_mask
        return (probabilities @ value).transpose(1, 2), probabilities

    def forward(
        self,
        hidden_states,
        rotation,
        registered_causal_mask=None,
        layer_past=None,
        attention_mask=None,
        head_mask=None,
        use_cache=False,
        output_attentions=False,
    ):
        batch, length, width = hidden_states.shape
        query, key, value = self.c_attn(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim).unbind(2)
        query, key = rotated(query, rotation), rotated(key, rotation)
        if layer_past is not None:
            key, value = (torch.cat(pair, 1) for pair in zip(layer_past, (key, value)))
        present = (key, value) if use_cache else None
        if self.use_logn_attn and not self.training:
            query = query * self.logn[key.shape[1] - length : key.shape[1], None, None]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output, probabilities = self._attn(query, key, value, registered_causal_mask, attention_mask, head_mask)
        outputs = self.c_proj(output.reshape(batch, length, width)), present
        return (*outputs, probabilities) if output_attentions else outputs


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.hidden_size) for _ in range(2))
        self.attn = Attention(config)
        self.mlp = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, *args, **kwargs):
        attended, *outputs = self.attn(self.ln_1(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attended
        return (hidden_states + F.silu(self.mlp(self.ln_2(hidden_states))), *outputs)


class Visual(nn.Module):
    """Patches, and 16 x 16 queries that attend to them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        patch_size = config.visual["patch_size"]
        self.pictures: dict[str, Tensor] = {}  # path -> (3, height, width); the real one opens files
        self.conv1 = nn.Conv2d(3, config.hidden_size, patch_size, patch_size)
        self.query = nn.Parameter(torch.randn(TOKENS_PER_IMAGE, config.hidden_size))
        self.attn_pool = nn.MultiheadAttention(config.hidden_size, 1, batch_first=True)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        return self.attn_pool(self.query.expand(len(pixels), -1, -1), patches, patches, need_weights=False)[0]

    def encode(self, paths: list[str]) -> Tensor:
        return self(torch.stack([self.pictures[path] for path in paths]))


class QWenModel(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.visual = Visual(config)

    def _prepare_decoder_attention_mask(self, attention_mask, input_shape, inputs_embeds, past_key_values_length):
        lowest, length = torch.finfo(self.wte.weight.dtype).min, input_shape[-1]
        combined = None
        if length > 1:
            later = torch.ones(length, length + past_key_values_length).triu(past_key_values_length + 1)
            combined = (later * lowest)[None, None]
        if attention_mask is not None:
            padding = (attention_mask == 0)[:, None, None] * lowest
            combined = padding if combined is None else combined + padding
        return combined

    def forward(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        head_mask=None,
        use_cache=True,
        output_attentions=False,
    ):
        hidden_states = self.wte(input_ids)
        past_length, num_keys = 0, input_ids.shape[1]
        if past_key_values is None:
            hidden_states = self._with_images(input_ids, hidden_states)
            past_key_values = [None] * len(self.h)
        else:
            past_length = past_key_values[0][0].size(-2)  # the number of heads, as in the real code
            num_keys += past_key_values[0][0].size(1)
        mask = self._prepare_decoder_attention_mask(attention_mask, input_ids.shape, hidden_states, past_length)
        rotation = angles(num_keys, self.h[0].attn.head_dim)[-input_ids.shape[1] :]
        presents, probabilities = [], []
        for block, layer_past in zip(self.h, past_key_values):
            arguments = (hidden_states, rotation, None, layer_past, mask, head_mask, use_cache, output_attentions)
            if self.gradient_checkpointing and self.training:
                outputs = checkpoint(block, *arguments, use_reentrant=False)
            else:
                outputs = block(*arguments)
            hidden_states = outputs[0]
            presents.append(outputs[1])
            probabilities.append(outputs[-1])
        hidden_states = self.ln_f(hidden_states)
        return (
            hidden_states,
            tuple(presents) if use_cache else None,
            tuple(probabilities) if output_attentions else None,
        )

    def _with_images(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        starts, ends = (input_ids == IMAGE_START).nonzero().tolist(), (input_ids == IMAGE_END).nonzero().tolist()
        if not starts:
            return hidden_states
        spelt = [input_ids[row, start + 1 : end] for (row, start), (_, end) in zip(starts, ends)]
        images = self.visual.encode([bytes(ids[ids != IMAGE_PAD].tolist()).decode() for ids in spelt])
        hidden_states = hidden_states.clone()
        for (row, start), (_, end), image in zip(starts, ends, images):
            hidden_states[row, start + 1 : end] = image
        return hidden_states


class QWenLMHeadModel(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        return {
            "input_ids": input_ids[:, -1:] if past_key_values else input_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": kwargs.get("attention_mask"),
            "token_type_ids": kwargs.get("token_type_ids"),
        }

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        head_mask=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        return_dict=None,
    ):
        hidden_states, presents, probabilities = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            head_mask=head_mask,
            use_cache=use_cache is not False,
            output_attentions=bool(output_attentions),
        )
        logits = self.lm_head(hidden_states)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits, past_key_values=presents, attentions=probabilities)

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx) for state in layer_past) for layer_past in past_key_values)


def angles(length: int, head_dim: int) -> Tensor:
    """(length, head_dim / 2) complex: e^(i * position * frequency)."""
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    phases = torch.outer(torch.arange(length), frequencies)
    return torch.polar(torch.ones_like(phases), phases)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """(B, S, H, D); dimension d is paired with d + D / 2."""
    turned = torch.complex(*x.chunk(2, -1)) * rotation[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def make_model(**options) -> QWenLMHeadModel:
    torch.manual_seed(0)
    model = QWenLMHeadModel(Config(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.35)
    generator = torch.Generator().manual_seed(1)
    for path in ("cat.png", "a/d\u00f6g.png", "cup.png"):
        model.transformer.visual.pictures[path] = torch.randn(3, 32, 32, generator=generator)
    return model


def make_inputs(*prompts: list[str | int], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of prompts, each a list of paths of images and numbers of tokens of text."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in prompts:
        row: list[int] = []
        for part in prompt:
            if isinstance(part, int):
                row += torch.randint(1, 256, (part,), generator=generator).tolist()
            else:
                spelt = list(part.encode())
                row += [IMAGE_START, *spelt, *[IMAGE_PAD] * (TOKENS_PER_IMAGE - len(spelt)), IMAGE_END]
        rows.append(row)
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        "token_type_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


class Oracle:
    """Attention in plain PyTorch whose scores carry the bias, in place of _attn; independent of finegrain_ops.

    bias (B, P), (B, H, P) or (B, L, 1 or H, P), mask (B, P) and gate (B, P) are over the prompt. `probabilities` holds
    (B, H, Q, K) of each layer's last pass. It works on the checkpoints' own code as well.
    """

    def __init__(self, model, bias: Tensor, mask: Tensor, gate: Tensor | None = None) -> None:
        self.model, self.layers = model, [block.attn for block in model.transformer.h]
        self.bias = bias.reshape(len(bias), *(1,) * (4 - bias.dim()), *bias.shape[1:])
        self.mask, self.gate = mask.bool(), torch.ones_like(mask).bool() if gate is None else gate
        self.probabilities: dict[int, Tensor] = {}

    def _attn(self, layer: int, query, key, value):
        batch, heads, num_queries, head_dim = query.shape
        num_keys, prompt = key.shape[2], self.mask.shape[1]
        beams, later = batch // len(self.bias), num_keys - prompt
        bias = F.pad(self.bias.expand(-1, len(self.layers), heads, -1)[:, layer], (0, later))
        mask, gate = (F.pad(x, (0, later), value=True)[:, None, None] for x in (self.mask, self.gate))
        bias = torch.where(gate.mT[:, :, num_keys - num_queries : num_keys], bias[:, :, None], 0.0)
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries) & mask
        visible, bias = visible.repeat_interleave(beams, 0), bias.repeat_interleave(beams, 0)
        scores = query @ key.mT / head_dim**0.5 + bias
        probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
        self.probabilities[layer] = probabilities.detach()
        return (probabilities @ value).transpose(1, 2), probabilities

    def __enter__(self) -> QWenLMHeadModel:
        for i, layer in enumerate(self.layers):
            layer._attn = lambda query, key, value, *masks, i=i: self._attn(i, query, key, value)
        self.model.transformer._prepare_decoder_attention_mask = lambda *args: None
        return self.model

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer._attn
        del self.model.transformer._prepare_decoder_attention_mask
