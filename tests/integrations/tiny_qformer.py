"""Random InstructBLIP and BLIP-2, small enough for CI: 17 keys (CLS, 4 x 4 patches of 6 pixels), and a Q-Former of 4
layers, of which two have cross-attention, with 4 heads and 4 query tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

import image_processor_cases

IMAGE_TOKEN = 99
VOCABULARY = 100
NUM_KEYS = 17
NUM_QUERIES = 4
NUM_HEADS = 4
NUM_LAYERS = 2  # with cross-attention

GREEDY = {"max_new_tokens": 8, "do_sample": False}
MODELS = {
    "InstructBLIP, Llama": ("instructblip", "llama"),
    "InstructBLIP, T5": ("instructblip", "t5"),
    "BLIP-2, OPT": ("blip-2", "opt"),
}

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_TEXT = {
    "llama": lambda: LlamaConfig(
        **_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "opt": lambda: OPTConfig(
        **_TOKENS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
    ),
    "t5": lambda: T5Config(
        **{**_TOKENS, "bos_token_id": None},
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    ),
}


def make_model(family: str = "instructblip", text: str = "llama", implementation: str = "sdpa", **qformer: Any) -> Any:
    torch.manual_seed(0)
    config_type, model_type = {
        "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
        "blip-2": (Blip2Config, Blip2ForConditionalGeneration),
    }[family]
    config = config_type(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 6,
        },
        qformer_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": NUM_HEADS,
            "intermediate_size": 48,
            "encoder_hidden_size": 32,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **qformer,
        },
        text_config=_TEXT[text]().to_dict(),
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    model = model_type(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    parts = {
        "vision_config": model.vision_model,
        "qformer_config": model.qformer,
        "text_config": model.language_model,
    }
    model.set_attn_implementation(
        # In transformers 4.57 some parts know eager attention only.
        {name: implementation if part._supports_sdpa else "eager" for name, part in parts.items()}
    )
    settings = model.language_model.generation_config  # which these models' generate goes by
    settings.pad_token_id, settings.eos_token_id = 0, None
    return model


@functools.cache
def made(name: str) -> Any:
    """One of each, for the tests that leave it as it was."""
    return make_model(*MODELS[name])


def make_processor(model: Any) -> Any:
    """Of words, with the image token where the model has it."""
    image_processor = image_processor_cases.blip(24)
    if model.config.model_type == "blip-2":
        return Blip2Processor(image_processor, _tokenizer(), num_query_tokens=NUM_QUERIES)
    return InstructBlipProcessor(image_processor, _tokenizer(), _tokenizer(), num_query_tokens=NUM_QUERIES)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "<unk>", "where", "what", "is", "it"]
    words += [f"word{i}" for i in range(len(words), IMAGE_TOKEN)] + ["<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


def make_inputs(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of two different images with questions of different lengths, what `generate` takes."""
    generator = torch.Generator().manual_seed(seed)
    questions = [torch.randint(5, 90, (length,), generator=generator).tolist() for length in (6, 3)]
    rows = [[IMAGE_TOKEN] * NUM_QUERIES + [1, *question] for question in questions]
    width = max(map(len, rows))
    inputs = {
        "pixel_values": torch.randn(2, 3, 24, 24, generator=generator),
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    if model.config.model_type == "instructblip":
        inputs["qformer_input_ids"] = torch.tensor([question + [0] * (6 - len(question)) for question in questions])
        inputs["qformer_attention_mask"] = torch.tensor([[1] * len(q) + [0] * (6 - len(q)) for q in questions])
    return inputs


def forward_inputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `forward` takes: an encoder-decoder needs the start of its answer, too."""
    if model.config.use_decoder_only_language_model:
        return inputs
    return {**inputs, "decoder_input_ids": torch.tensor([[0, 7, 8], [0, 9, 10]])}


def logits(model: Any, inputs: dict, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**forward_inputs(model, inputs), **options).logits


def make_bias(strength: float = 4.0) -> torch.Tensor:
    """(N, K): a region of its own, and a sign, for every image."""
    bias = torch.zeros(2, NUM_KEYS)
    bias[0, 3:8], bias[1, 6:14] = strength, -strength
    return bias


def per_head() -> torch.Tensor:
    bias = make_bias()[:, None].repeat(1, NUM_HEADS, 1)
    bias[:, 1], bias[:, 2] = 0.0, -bias[:, 2]
    return bias


class EagerOracle:
    """Cross-attention written out, with the bias added to its scores, in place of transformers'."""

    def __init__(self, model: Any, bias: torch.Tensor) -> None:
        """bias: (N, K), (N, H, K) or (N, L, 1 or H, K)."""
        self.model = model
        heads = bias[:, None] if bias.dim() == 2 else bias
        self.bias = heads[:, None] if heads.dim() == 3 else heads
        self.probabilities: list[torch.Tensor] = []  # of each layer, (N, H, Q, K)

    def _forward(self, module: Any, bias: torch.Tensor) -> Any:
        def split(states: torch.Tensor) -> torch.Tensor:
            return states.reshape(*states.shape[:2], NUM_HEADS, -1).permute(0, 2, 1, 3)

        def forward(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
            query, key, value = (
                split(project(states))
                for project, states in (
                    (module.query, hidden_states),
                    (module.key, encoder_hidden_states),
                    (module.value, encoder_hidden_states),
                )
            )
            scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + bias[:, :, None]
            probabilities = scores.softmax(-1)
            self.probabilities.append(probabilities)
            context = (probabilities @ value).permute(0, 2, 1, 3)
            return context.reshape(*context.shape[:2], -1), probabilities

        return forward

    def __enter__(self) -> Any:
        self.modules = [m for n, m in self.model.qformer.named_modules() if n.endswith("crossattention.attention")]
        for i, module in enumerate(self.modules):
            module.forward = self._forward(module, self.bias[:, i if self.bias.shape[1] > 1 else 0])
        return self.model

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            del module.forward
