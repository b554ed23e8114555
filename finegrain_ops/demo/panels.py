"""The picture of one question: the image with box and crop, attention before and after CoF, the crop as the model sees
it.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from ..integrations.image_maps import ImageMap
from ..integrations.image_processors import preprocess
from ..integrations.patching import patch
from ..plot import attention_overlay
from .asking import Answers, Asker

_TITLE_WIDTH = 45  # characters


def panels(asker: Asker, image: Any, one: Answers) -> Figure:
    """Four, with each method's answer, and the truth where it is known, in their titles."""
    cof, crop = one.cof, one.dualfocus.crop
    before, after = attention_before_and_after(asker, image, one)
    seen = crop_as_seen(asker, image, crop)
    truth = f"truth: {' or '.join(one.query.truths)}" if one.query.truths else ""
    return attention_overlay(
        image,
        {
            _title(_boxes_explained(one), truth): None,
            _title("attention before", f"plain: {one.marked('plain')}"): before,
            _title(f"attention after, λ = {asker.cof.weight:g}", f"CoF: {one.marked('CoF')}"): after,
            _title(
                f"what the model sees of the crop, {seen.width} x {seen.height}",
                f"DualFocus, {one.dualfocus.chosen}: {one.marked('DualFocus')}",
            ): seen,
        },
        [] if cof.box is None else [cof.box],
        dashed=[] if crop is None else [crop],
        alpha=0.7,
        title=one.query.text,
        label="share of the attention to the image, per token",
    )


def _title(what: str, said: str) -> str:
    """Two lines, the second cut off where it would run into the next panel."""
    said = " ".join(said.split())
    return f"{what}\n{said if len(said) <= _TITLE_WIDTH else said[: _TITLE_WIDTH - 3] + '...'}"


def _boxes_explained(one: Answers) -> str:
    box = "no box" if one.cof.box is None else "the model's box" if one.query.box is None else "the box that was given"
    return f"{box}, {'no crop' if one.dualfocus.crop is None else 'and the crop (dashed)'}"


def attention_before_and_after(asker: Asker, image: Any, one: Answers) -> tuple[ImageMap, ImageMap]:
    """Of the position before the answer, over all layers and heads; after is with CoF's regions."""
    (inputs,) = asker.prompter.encode([image], asker.prompter.texts([image], [one.query.text]))
    sizes = [(image.height, image.width)]
    with torch.inference_mode(), patch(asker.model, asker.cof.processor) as handle:
        bias = handle.key_bias(inputs, [list(one.cof.regions)], sizes, weight=asker.cof.weight)
        before, after = (
            handle.attention_map(inputs, rows=-1, key_bias=key_bias, reduction="mean") for key_bias in (None, bias)
        )
        return handle.image_maps(inputs, before, sizes)[0], handle.image_maps(inputs, after, sizes)[0]


def crop_as_seen(asker: Asker, image: Any, crop: tuple[int, int, int, int] | None) -> Any:
    """What the image processor makes of the crop, as a Pillow image; of the whole image where there is no crop."""
    processor = asker.prompter.image_processor
    box = (0, 0, image.width, image.height) if crop is None else crop
    pixels = preprocess(image, [box], processor)["pixel_values"][0].float().cpu()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    levels = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
