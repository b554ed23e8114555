"""The sizes of the paper, without their weights: shapes and numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from finegrain_ops.integrations.tinygroundinggpt import (
    TinyGroundingGPTConfig,
    TinyGroundingGPTForConditionalGeneration,
    TinyGroundingGPTImageProcessor,
)

# Written out by hand: ViT-L/14 and Qwen2.5 as published.
WIDTH, MLP, LAYERS, PATCH = 1024, 4096, 24, 3 * 14 * 14
VIT_LAYER = 4 * (WIDTH**2 + WIDTH) + 2 * WIDTH * MLP + MLP + WIDTH + 2 * 2 * WIDTH
CLIP = WIDTH + PATCH * WIDTH + 577 * WIDTH + 2 * 2 * WIDTH + LAYERS * VIT_LAYER  # two norms; patches have no bias
DINO = 2 * WIDTH + PATCH * WIDTH + WIDTH + 1370 * WIDTH + 2 * WIDTH + LAYERS * (VIT_LAYER + 2 * WIDTH)  # layer scale


def qwen(width: int, mlp: int, layers: int, heads: int) -> int:
    kv = 2 * width // heads
    layer = (width**2 + width) + 2 * (width * kv + kv) + width**2 + 3 * width * mlp + 2 * width
    return 151936 * width + layers * layer + width  # the head is the embedding


SIZES = {
    "3b": ((2048, 11008, 36, 16), 3.09),
    "1.5b": ((1536, 8960, 28, 12), 1.54),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_as_many_as_published(size: str) -> None:
    shape, published = SIZES[size]
    config = TinyGroundingGPTConfig.from_size(size)
    with torch.device("meta"):
        model = TinyGroundingGPTForConditionalGeneration(config)
    model.tie_weights()
    tower, width = model.model.vision_tower, shape[0]
    counts = {
        "clip": sum(p.numel() for p in tower.clip_tower.parameters()),
        "dino": sum(p.numel() for p in tower.dino_tower.parameters()),
        "projector": sum(p.numel() for p in model.model.multi_modal_projector.parameters()),
        "language model": sum(p.numel() for p in model.model.language_model.parameters()),
    }
    assert counts == {
        "clip": CLIP,
        "dino": DINO,
        "projector": 2048 * width + width + width**2 + width,
        "language model": qwen(*shape),
    }
    assert counts["clip"] == pytest.approx(303.5e6, rel=1e-3)  # CLIP's ViT-L/14 at 336 pixels, without its projection
    assert counts["dino"] == pytest.approx(304.4e6, rel=1e-3)
    assert round(counts["language model"] / 1e9, 2) == published
    assert sum(p.numel() for p in model.parameters()) == sum(counts.values())  # lm_head is counted once
    assert model.lm_head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def test_shapes_at_the_size_of_the_paper() -> None:
    config = TinyGroundingGPTConfig.from_size("1.5b")
    assert (config.grid_size, config.image_seq_length) == (24, 576)
    with torch.device("meta"):
        model = TinyGroundingGPTForConditionalGeneration(config).eval()
        pixels = torch.zeros(3, 3, 336, 336)
        assert model.get_image_features(pixels, pixels).shape == (3, 576, 1536)
        assert model.model.vision_tower(torch.cat([pixels, pixels], dim=1)).shape == (3, 576, 2048)
    layers = model.model.language_model.layers
    attention, mlp = layers[27].self_attn, layers[27].mlp
    assert len(layers) == 28
    assert attention.q_proj.weight.shape == attention.o_proj.weight.shape == (12 * 128, 1536)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (2 * 128, 1536)
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (8960, 1536)
    assert model.lm_head.weight.shape == (151936, 1536)


def test_dinov2_was_trained_on_another_grid() -> None:
    """Its position embeddings are of 518 pixels, 37 x 37, and interpolated to 24 x 24."""
    config = TinyGroundingGPTConfig.from_size("3b", vision_feature_layer=-1)
    assert config.vision_feature_layer == -1
    assert config.dino_config.image_size == 518
    assert TinyGroundingGPTImageProcessor().size == {"height": 336, "width": 336}


def test_rope_and_context_are_qwens() -> None:
    config = TinyGroundingGPTConfig().text_config
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert rope["rope_theta"] == 1e6
    assert config.max_position_embeddings == 32768


@pytest.mark.parametrize("size", ["7b", 3, None])
def test_a_size_that_there_is_not(size: object) -> None:
    with pytest.raises(ValueError, match=r'size: expected "3b" or "1.5b", got'):
        TinyGroundingGPTConfig.from_size(size)
