"""`python -m finegrain_ops demo`: a photograph, a LLaVA, a box; generation without and with the box's attention
multiplied.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..geometry import Box, clip_box

DEFAULT_QUESTION = "What is lying on the saucer next to the cup?"
DEFAULT_BOX = (322.0, 212.0, 412.0, 330.0)  # the spoon of the default photograph
_SETUP_HINT = "the demo needs the packages of `pip install finegrain-ops[demo]`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="a local folder or hub name of a LLaVA-1.5 checkpoint; default: a small model with random weights",
    )
    parser.add_argument(
        "--image", type=Path, help="a picture; default: the cup of coffee that scikit-image ships (CC0)"
    )
    parser.add_argument(
        "--box",
        type=float,
        nargs=4,
        metavar=("X0", "Y0", "X1", "Y1"),
        help="region in pixels of the image (--image needs one)",
    )
    parser.add_argument(
        "--weight", type=float, default=4.5, help="lambda: multiplies the region's attention (default 4.5)"
    )
    parser.add_argument("--question", default=DEFAULT_QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
    parser.add_argument(
        "--output", type=Path, default=Path("demo.png"), help="where the picture goes (default demo.png)"
    )
    parser.set_defaults(parser=parser)


@dataclass(frozen=True)
class Generation:
    """One answer and how fast it came."""

    text: str
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def run(options: argparse.Namespace) -> int:
    """Returns the exit status; wrong arguments end with argparse's usage message."""
    try:
        import matplotlib  # noqa: F401
        import skimage  # noqa: F401
        import transformers
        from PIL import Image, UnidentifiedImageError
        from tqdm import tqdm  # noqa: F401
    except ModuleNotFoundError as missing:
        options.parser.error(f"{missing.name} is not installed; {_SETUP_HINT}")

    transformers.logging.set_verbosity_error()
    try:
        image = Image.open(options.image).convert("RGB") if options.image else _default_photograph()
    except (OSError, UnidentifiedImageError) as error:
        options.parser.error(f"--image: expected a picture, {error}")
    if options.image and not options.box:
        options.parser.error("--image: give the region with --box X0 Y0 X1 Y1, in pixels of that picture")
    try:
        box = clip_box(options.box or DEFAULT_BOX, (image.height, image.width), "--box")
    except ValueError as error:
        options.parser.error(str(error))
    if not 0 <= options.weight < float("inf"):
        options.parser.error(f"--weight: expected a number >= 0, got {options.weight}")
    try:
        model, processor = _load(options)
    except (OSError, ValueError) as error:
        options.parser.error(f"--model: expected a folder or hub name of a LLaVA checkpoint, {error}")
    _show(options, image, box, model, processor)
    return 0


def _default_photograph() -> Any:
    import skimage.data
    from PIL import Image

    return Image.fromarray(skimage.data.coffee())


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.model is None:
        from . import random_llava

        print("No --model given: a small LLaVA with random weights. Its words mean nothing, its attention is real.\n")
        made: Any
        made, processor = random_llava.make()
        return made.to(device), processor
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    dtype = torch.float32 if device == "cpu" else torch.float16
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=dtype)
    return loaded.to(device).eval(), AutoProcessor.from_pretrained(options.model)


def _show(options: argparse.Namespace, image: Any, box: Box, model: Any, processor: Any) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    import finegrain_ops

    from ..plot import attention_overlay

    inputs = processor(images=image, text=_prompt(processor, options.question), return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    sizes = [(image.height, image.width)]
    with torch.inference_mode(), finegrain_ops.patch(model, processor) as handle:
        bias = handle.key_bias(inputs, [[box]], sizes, weight=options.weight)
        region = handle.region_mask(inputs, [[box]], sizes).cpu()
        before, after = (
            handle.attention_map(inputs, rows=-1, key_bias=b, reduction="mean").cpu() for b in (None, bias)
        )
        maps = [handle.image_maps(inputs, attention, sizes)[0] for attention in (before, after)]
        plain, focused = _generate_both(options, model, processor, inputs, bias)

    table = Table(title=f"{options.question}   box {tuple(round(edge) for edge in box)}", title_justify="left")
    for column in ("", "before", f"after, lambda = {options.weight:g}"):
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
            f"attention after, λ = {options.weight:g}": maps[1],
        },
        [box],
        alpha=0.75,
        title=f"{options.question}   ({note})",
        label="share of the attention to the image, per token",
    ).savefig(options.output, dpi=110)
    print(f"Picture: {options.output}")


def _prompt(processor: Any, question: str) -> Any:
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"USER: <image>\n{question} ASSISTANT:"


def _generate_both(
    options: argparse.Namespace, model: Any, processor: Any, inputs: Any, bias: Any
) -> tuple[Generation, Generation]:
    """Without and with the bias, after a short warm-up of each."""
    from tqdm import tqdm

    total = 2 * options.max_new_tokens
    with tqdm(total=total, desc="generating", unit="token", delay=2, leave=False) as progress:
        for key_bias in (None, bias):
            model.generate(**inputs, key_bias=key_bias, max_new_tokens=2, do_sample=False)
        plain = _generate(options, model, processor, inputs, None, progress)
        progress.update(options.max_new_tokens - plain.num_tokens)
        focused = _generate(options, model, processor, inputs, bias, progress)
    return plain, focused


def _generate(
    options: argparse.Namespace, model: Any, processor: Any, inputs: Any, key_bias: Any, progress: Any
) -> Generation:
    prompt_length = inputs["input_ids"].shape[1]
    # Random weights may stop at once, or say one word for ever.
    lively = {"min_new_tokens": options.max_new_tokens, "repetition_penalty": 3.0} if options.model is None else {}
    start = time.perf_counter()
    ids = model.generate(
        **inputs,
        key_bias=key_bias,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        streamer=_Counter(progress),
        **lively,
    )[0, prompt_length:]
    seconds = time.perf_counter() - start
    return Generation(processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), seconds)


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
    from .. import backends
    from ..backends.interface import AttentionFeatures

    text = model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    device = model.device
    features = AttentionFeatures(device.type, device.index, model.dtype, head_dim, head_dim, needs_grad=False)
    return f"finegrain_ops {backends.select('auto', features)}"
