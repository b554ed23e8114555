"""CoF on every family, each with random weights, its own processor and its own way of writing boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import finegrain_ops
import tiny_qformer
from finegrain_ops import CoF
from finegrain_ops.boxes import expand_box
from finegrain_ops.methods.perplexity import perplexity
from finegrain_ops.methods.prompting import Prompter
from tiny_models import TINY

SIZES = [(48, 64), (80, 40), (56, 56)]  # height, width
BOX = (0.25, 0.5, 0.75, 0.9)  # of the image's width and height
QUESTIONS = ["w5 w6", "w7 w8 w9 w10", "w11"]
WEIGHT = 40.0
WRITTEN = {  # a box of the whole image's numbers, by convention
    "unit": "[{0}, {1}, {2}, {3}]",
    "permille": "<|box_start|>({0},{1}),({2},{3})<|box_end|>",
    "pixel": '{{"bbox_2d": [{0}, {1}, {2}, {3}]}}',
}
PROCESSED = {(48, 64): (40, 48), (80, 40): (64, 32), (56, 56): (48, 48)}  # multiples of 8 with at most 2304 pixels
SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "suppress_tokens": [0, 1, 2, 3, 96, 97, 98, 99]}  # special tokens


def make_family(name: str):
    """(model, processor, template)"""
    if name in TINY:
        family = TINY[name]
        return family.make_model(), family.make_processor(), f"{family.prompt_of_image} {{question}}"
    model = tiny_qformer.make_model(*name.split(" on "))
    return model, tiny_qformer.make_processor(model), None


def make_images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def written(convention: str, size: tuple[int, int]) -> str:
    height, width = size
    if convention == "unit_padded":
        side = max(size)
        x, y = (side - width) // 2, (side - height) // 2
        numbers = [(BOX[0] * width + x) / side, (BOX[1] * height + y) / side]
        numbers += [(BOX[2] * width + x) / side, (BOX[3] * height + y) / side]
    elif convention == "unit_view":  # of the square in the middle, as long as the shorter side
        side = min(size)
        x, y = (width - side) / 2, (height - side) / 2
        numbers = [(BOX[0] * width - x) / side, (BOX[1] * height - y) / side]
        numbers += [(BOX[2] * width - x) / side, (BOX[3] * height - y) / side]
    else:
        across, down = {"unit": (1, 1), "permille": (1000, 1000), "pixel": PROCESSED[size][::-1]}[convention]
        numbers = [BOX[0] * across, BOX[1] * down, BOX[2] * across, BOX[3] * down]
    return WRITTEN.get(convention, WRITTEN["unit"]).format(*numbers)


FAMILIES = [*TINY, "instructblip on llama", "instructblip on t5", "blip-2 on opt"]


@pytest.mark.parametrize("rows", ["all", "after_image"])
@pytest.mark.parametrize("name", FAMILIES)
def test_from_the_familys_own_box_to_the_biased_answer(name: str, rows: str, monkeypatch) -> None:
    """A batch of three, the second without a box; and each alone."""
    model, processor, template = make_family(name)
    is_decoder = name in TINY
    if rows == "after_image" and not is_decoder:
        with pytest.raises(ValueError, match='rows: expected "all" for model_type'):
            CoF(model, processor, rows=rows, template=template).answer(make_images()[0], "w5")
        return
    convention = TINY[name].box_convention if is_decoder else "unit"
    said = [written(convention, size) for size in SIZES]
    said[1] = "nothing"
    images = make_images()
    settings = {"weight": WEIGHT, "template": template, "rows": rows, "on_missing_box": "plain", "grounding_tokens": 3}
    cof = CoF(model, processor, **settings)
    texts = iter(said)
    monkeypatch.setattr(Prompter, "decode_markup", lambda self, tokens: next(texts))
    results = cof.answer_batch(images, QUESTIONS, **SIX)
    unit = [expand_box((BOX[0] * w, BOX[1] * h, BOX[2] * w, BOX[3] * h), 1.3, (h, w)) for h, w in SIZES]
    for result, region, is_grounded in zip(results, unit, [True, False, True]):
        assert len(result.regions) == is_grounded
        if is_grounded:
            np.testing.assert_allclose(result.regions[0], region, atol=1e-9)
    texts = iter(said)
    for i, together in enumerate(results):
        alone = cof.answer(images[i], QUESTIONS[i], **SIX)
        assert (alone.text, alone.regions, alone.grounding_text) == (together.text, together.regions, said[i])
        assert alone.perplexity == pytest.approx(together.perplexity, rel=1e-4)
        prompt = QUESTIONS[i] if template is None else template.replace("{question}", QUESTIONS[i])
        inputs = processor(images=[images[i]], text=[prompt], return_tensors="pt")
        by_hand = {}
        with torch.no_grad(), finegrain_ops.patch(model, processor) as handle:
            for kind, regions in (("biased", list(together.regions)), ("plain", [])):
                arguments = {"key_bias": handle.key_bias(inputs, [regions], [SIZES[i]], weight=WEIGHT)}
                if rows == "after_image":
                    arguments["row_gate"] = handle.row_gate(inputs, rows)
                output = model.generate(
                    **inputs, **arguments, **SIX, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
                tokens = output.sequences[:, -6:]
                text = processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
                by_hand[kind] = text, float(perplexity(tokens, output.logits))
        assert together.text == by_hand["biased"][0]
        assert together.perplexity == pytest.approx(by_hand["biased"][1], rel=1e-4)
        matters = abs(by_hand["biased"][1] / by_hand["plain"][1] - 1) > 1e-3
        assert matters == bool(together.regions)
