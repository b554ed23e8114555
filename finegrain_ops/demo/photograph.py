"""The page of the photograph: attention moved to a region of it, and generation without and with that."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import skimage.data
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .. import backends
from ..backends.interface import AttentionFeatures
from ..boxes import Box
from ..integrations.patching import patch
from ..methods.prompting import Prompter
from ..plot import attention_overlay
from .models import real_llava
from .random_llava import make
from .usage import box_of, device_of

_QUESTION = "What is lying on the saucer next to the cup?"
_BOX: Box = (322.0, 212.0, 412.0, 330.0)  # the spoon
_WEIGHT = 4.5  # CoF's of LLaVA-1.5-13B
_MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Generation:
    """One answer and how fast it came."""

    text: str
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def show(options: argparse.Namespace, output: Path) -> None:
    """Prints what changes with the box, and draws the attention before and after.

    Raises:
        UsageError: the box is outside of the photograph, or there is no such model.
    """
    image = Image.fromarray(skimage.data.coffee())  # CC0
    sizes = [(image.height, image.width)]
    box = box_of(options, sizes[0]) or _BOX
    question = _QUESTION if options.question is None else options.question
    weight = _WEIGHT if options.weight is None else options.weight
    model, processor = _load(options)
    prompter = Prompter(model, processor)
    (inputs,) = prompter.encode([image], prompter.texts([image], [question]))
    with torch.inference_mode(), patch(model, processor) as handle:
        bias = handle.key_bias(inputs, [[box]], sizes, weight=weight)
        region = handle.region_mask(inputs, [[box]], sizes).cpu()
        before, after = (
            handle.attention_map(inputs, rows=-1, key_bias=key_bias, reduction="mean").cpu()
            for key_bias in (None, bias)
        )
        maps = [handle.image_maps(inputs, attention, sizes)[0] for attention in (before, after)]
        plain, focused = _generate_both(options, prompter, inputs, bias)

    table = Table(title=f"{question}   box {tuple(round(edge) for edge in box)}", title_justify="left")
    for column in ("", "before", f"after, lambda = {weight:g}"):
        table.add_column(column, overflow="fold")
    table.add_row("answer", plain.text, focused.text)
    table.add_row("attention mass on the region", *(f"{float(a[region].sum()):.4f}" for a in (before, after)))
    table.add_row(
        "of the attention to the image", *(f"{float(a[region].sum() / a.sum()):.1%}" for a in (before, after))
    )
    table.add_row("tokens per second", *(f"{g.tokens_per_second:.1f}" for g in (plain, focused)))
    table.add_row("attention backend", f"transformers {model.config.text_config._attn_implementation}", _backend(model))
    Console().print(table)
    print(f"{int(region.sum())} of {maps[0].values.numel()} image tokens are in the region. The attention is that of")
    print("the position before the answer, averaged over layers and heads. Both rates include the prompt.")

    note = "random weights" if options.model is None else str(options.model)
    attention_overlay(
        image,
        {
            "photograph and box": None,
            "attention before": maps[0],
            f"attention after, λ = {weight:g}": maps[1],
        },
        [box],
        alpha=0.75,
        title=f"{question}   ({note})",
        label="share of the attention to the image, per token",
    ).savefig(output, dpi=110)
    print(f"Picture of the photograph: {output}")


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    device = device_of(options)
    if options.model is not None:
        return real_llava(options.model, device)
    print("A photograph, and a LLaVA with random weights. Its words mean nothing, its attention is real.\n")
    model, processor = make()
    moved: Any = model
    return moved.to(device), processor


def _generate_both(
    options: argparse.Namespace, prompter: Prompter, inputs: Any, bias: Any
) -> tuple[Generation, Generation]:
    """Without and with the bias, after a short warm-up of each."""
    num_tokens = options.max_new_tokens or _MAX_NEW_TOKENS
    with tqdm(total=2 * num_tokens, desc="generating", unit="token", delay=2, leave=False) as progress:
        for key_bias in (None, bias):
            prompter.model.generate(**inputs, key_bias=key_bias, max_new_tokens=2, do_sample=False)
        plain = _generate(options, prompter, inputs, None, num_tokens, progress)
        progress.update(num_tokens - plain.num_tokens)
        focused = _generate(options, prompter, inputs, bias, num_tokens, progress)
    return plain, focused


def _generate(
    options: argparse.Namespace, prompter: Prompter, inputs: Any, key_bias: Any, num_tokens: int, progress: Any
) -> Generation:
    # Random weights may stop at once, or say one word for ever.
    lively = {"min_new_tokens": num_tokens, "repetition_penalty": 3.0} if options.model is None else {}
    start = time.perf_counter()
    tokens = prompter.model.generate(
        **inputs,
        key_bias=key_bias,
        max_new_tokens=num_tokens,
        do_sample=False,
        streamer=_Counter(progress),
        **lively,
    )[0, inputs["input_ids"].shape[1] :]
    seconds = time.perf_counter() - start
    return Generation(prompter.decode(tokens), len(tokens), seconds)


class _Counter:
    """transformers' streamer interface: moves a progress bar by one for every new token; the first call brings the
    prompt.
    """

    def __init__(self, progress: Any) -> None:
        self.progress, self.prompt_seen = progress, False

    def put(self, ids: Any) -> None:
        if self.prompt_seen:
            self.progress.update(1)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def _backend(model: Any) -> str:
    text, device = model.config.text_config, model.device
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    features = AttentionFeatures(device.type, device.index, model.dtype, head_dim, head_dim, needs_grad=False)
    return f"finegrain_ops {backends.select('auto', features)}"
