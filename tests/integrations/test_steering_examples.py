"""The examples of docs/steering.md run, and do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from finegrain_ops.demo import random_llava

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "steering.md"


@pytest.fixture(scope="module")
def document() -> dict:
    """The names that the examples leave behind, per section."""
    _, processor = random_llava.make()
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.2,
        ),
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=576,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    image = Image.fromarray(skimage.data.coffee())
    names: dict = {"model": model, "processor": processor, "image": image}
    text = DOCUMENT.read_text(encoding="utf-8")
    sections = [(match[1], match.start()) for match in re.finditer(r"^## ([^:,\n]+)", text, flags=re.MULTILINE)]
    left_behind: dict = {}
    for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        first_line = text[: block.start(1)].count("\n")
        exec(compile("\n" * first_line + block[1], str(DOCUMENT), "exec"), names)  # so that a traceback shows its line
        section = next((name for name, start in reversed(sections) if start < block.start()), "")
        left_behind[section] = dict(names)
    assert set(left_behind) == {"", *(name for name, _ in sections)}  # every section has an example
    return left_behind


def test_the_examples_of_the_document_do_what_it_says(document: dict) -> None:
    regions = document["One region"]
    on_image = regions["inputs"]["input_ids"] == regions["model"].config.image_token_id
    assert regions["bias"].shape == (1, 5, 1, on_image.shape[1])
    assert float(regions["gate"].sum()) == int(on_image.shape[1] - on_image[0].nonzero().max() - 1)

    pasta = document["PASTA"]
    lowered = pasta["bias"] < 0
    assert lowered[0, -2:, ::2].any()
    assert not lowered[0, :-2].any()
    assert not lowered[0, :, 1::2].any()
    region = pasta["handle"].region_mask(pasta["inputs"], [[pasta["spoon"]]], pasta["sizes"])[0]
    assert torch.equal(lowered[0, -1, 0], ~region)

    highlighter = document["Prompt Highlighter"]
    positive, negative = highlighter["bias"]
    assert torch.equal(positive > 0, negative < 0)
    assert int((positive > 0).sum()) == int(region.sum()) + 2  # and two words
    assert len(highlighter["guided"]) == on_image.shape[1] + 8

    knocked_out = document["Attention knock-out"]["effects"]
    assert len(knocked_out) == 3
    assert all(effect != 0 for effect in knocked_out)

    vicrop = document["ViCrop"]
    assert vicrop["relative"].values.shape == (24, 24)
    x0, y0, x1, y1 = vicrop["crop"]
    assert (x1 - x0, y1 - y0) == pytest.approx((200, 200))  # half of the 400 x 400 pixels that the model sees
    assert 100 <= x0 <= 300 and 0 <= y0 <= 200  # noqa: PT018
    assert vicrop["closer"]["pixel_values"].shape == (1, 3, 336, 336)

    api = document["API"]
    assert api["prompted"].shape == (400, 400, 3)
    brightest = np.unravel_index(int(api["heat"].values.argmax()), (24, 24))
    assert (
        float(api["brightness"][0, 0, int((brightest[0] + 0.5) * 400 / 24), int((brightest[1] + 0.5) * 400 / 24)]) > 0.8
    )

    energies = document["ControlMLLM"]["energies"]
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < 0.97 * energies[0]

    pictures = document["Pictures"]
    assert isinstance(pictures["figure"], Figure)
    plain, steered = (m.values for m in pictures["maps"].values())
    assert not torch.equal(plain, steered)
    assert "forward" not in pictures["model"].__dict__  # removed
