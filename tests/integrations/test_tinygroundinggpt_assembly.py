"""Three checkpoints become one model: their weights are in it, and it answers, trains and is saved as any other."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

from finegrain_ops.integrations import tinygroundinggpt as tgg
from tiny_tinygroundinggpt import PATCH, SIDE, make_config, make_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Checkpoints of the parts: CLIP with a text model, as it is published."""
    config, folder = make_config(), tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPConfig(text_config=text, vision_config=config.clip_config.to_dict(), projection_dim=32)
    parts = {
        "clip": transformers.CLIPModel(clip),
        "dino": transformers.Dinov2Model(config.dino_config),
        "language_model": transformers.Qwen2ForCausalLM(config.text_config),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return {name: str(folder / name) for name in parts}


def test_from_checkpoints(folders, tmp_path) -> None:
    tokenizer = make_tokenizer()
    model = tgg.from_checkpoints(**folders, tokenizer=tokenizer)
    assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])
    text = transformers.AutoModelForCausalLM.from_pretrained(folders["language_model"])
    clip = transformers.CLIPVisionModel.from_pretrained(folders["clip"])
    dino = transformers.Dinov2Model.from_pretrained(folders["dino"])
    assert model.lm_head.weight is model.get_input_embeddings().weight  # tied, as its configuration says

    ids = torch.tensor([[10, 20, 30, 40]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, text(input_ids=ids).logits)
        pixels = torch.randn(2, 3, SIDE, SIDE)
        of_clip = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        of_dino = dino(pixels).last_hidden_state[:, 1:]
        projector = model.model.multi_modal_projector
        expected = projector(torch.cat([of_clip, of_dino], -1))
        torch.testing.assert_close(model.get_image_features(pixels, pixels), expected)

    image_processor = tgg.TinyGroundingGPTImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = tgg.TinyGroundingGPTProcessor(image_processor, tokenizer, patch_size=PATCH)
    inputs = processor(Image.new("RGB", (60, 40), "red"), "<image>\nWhat?", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    tgg.freeze_for_stage(model, "1a")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert projector.linear_1.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4, do_sample=False), answer)


def test_dtype(folders) -> None:
    options = {"dtype": torch.bfloat16}
    model = tgg.from_checkpoints(**folders, tokenizer=make_tokenizer(), **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
