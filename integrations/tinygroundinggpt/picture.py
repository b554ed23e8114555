"""The attention picture of TinyGroundingGPT (App. A.8): which patches of the image an object's tokens attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...validation import describe
from ..handle import PatchHandle
from ..image_maps import ImageMap
from ..patching import patch
from .image_processing import as_image_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_picture(
    model: Any,
    processor: Any,
    inputs: Any,
    image: Any,
    of: str | int | Tensor,
    *,
    output_ids: Tensor | None = None,
    boxes: Sequence[Any] | Tensor = (),
    layer: int = -1,
    **options: Any,
) -> Figure:
    """The attention between an object's tokens and the image's patches, laid over the image, with boxes in red.

    ::

        inputs = processor(image, text, return_tensors="pt")
        output_ids = model.generate(**inputs)
        attention_picture(model, processor, inputs, image, "[0.250, 0.125, 0.500, 0.750]", output_ids=output_ids,
                          boxes=[box]).savefig("attention.png")

    Summed over the heads of the layer and over those tokens, and normalised to a sum of 1 (App. A.8).

    Args:
        model, processor, inputs, image, of, output_ids, layer: see `object_attention`.
        boxes: (x0, y0, x1, y1) in pixels of the image, as `post_process_grounding` gives them.
        options: to `finegrain_ops.plot.attention_overlay` (normalize, smooth, alpha, title, ...).

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError, TypeError: see `object_attention` and `attention_overlay`.
    """
    from ...plot import attention_overlay

    shown = object_attention(model, processor, inputs, image, of, output_ids=output_ids, layer=layer)
    return attention_overlay(image, shown, boxes, **options)


def object_attention(
    model: Any,
    processor: Any,
    inputs: Any,
    image: Any,
    of: str | int | Tensor,
    *,
    output_ids: Tensor | None = None,
    layer: int = -1,
) -> ImageMap:
    """What `attention_picture` shows, as numbers: sums over heads and tokens, not normalised.

    Args:
        model: a TinyGroundingGPTForConditionalGeneration, patched or not; it is left as it was.
        processor: its processor.
        inputs: what the processor returned for one text with one image.
        image: that image.
        of: which tokens are the object: text or coordinates, as a text whose last occurrence is looked for; the number
            of an <object> of the text, from 0 on; or (P,) bool.
        output_ids: (1, L) what `generate` returned for inputs, the prompt included, to look for `of` in an answer.
        layer: of the language model; negative from the end.

    Raises:
        ValueError: inputs hold several texts or images, the object is not there, or it comes before the image, so that
            its tokens cannot attend to it.
        TypeError: an argument is of another type.
    """
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"inputs: expected those of one text, got {len(inputs['input_ids'])} of them")
    (tensor,) = as_image_tensors([image])
    if output_ids is not None:
        inputs = _with_output(inputs, output_ids)
    rows = object_rows(processor, inputs["input_ids"][0], of)
    first = int((inputs["input_ids"][0] == model.config.image_token_id).int().argmax())
    if not bool(rows[first + 1 :].any()):
        raise ValueError(
            f"of: expected an object after the image, whose tokens can attend to it, got {describe(of)} before it"
        )
    patched = model.__dict__.get("_finegrain_handle")
    handle = patched if isinstance(patched, PatchHandle) else patch(model, processor)
    try:
        with torch.no_grad():
            attention = handle.attention_map(inputs, rows=rows[None], layers=layer)
        (shown,) = handle.image_maps(inputs, attention, [(tensor.shape[1], tensor.shape[2])])
    finally:
        if handle is not patched:
            handle.remove()
    return shown


def object_rows(processor: Any, input_ids: Tensor, of: str | int | Tensor) -> Tensor:
    """(P,) bool: the tokens of an object among the (P,) of a text; see `object_attention`."""
    if isinstance(of, str):
        return _rows_of_text(processor, input_ids, of)
    if isinstance(of, int) and not isinstance(of, bool):
        of_objects = input_ids == processor.object_token_id
        count = int(of_objects.sum()) // processor.image_seq_length
        if not 0 <= of < count:
            raise ValueError(f"of: expected one of the {count} {processor.object_token} of inputs, got {of}")
        return of_objects & ((of_objects.cumsum(0) - 1) // processor.image_seq_length == of)
    if not isinstance(of, Tensor) or of.dtype != torch.bool:
        raise TypeError(f"of: expected a text, the number of an object or a bool tensor (P,), got {describe(of)}")
    if of.shape != input_ids.shape:
        raise ValueError(f"of: expected shape {tuple(input_ids.shape)}, got {tuple(of.shape)}")
    return of.to(input_ids.device)


def _rows_of_text(processor: Any, input_ids: Tensor, text: str) -> Tensor:
    """The fewest tokens that spell the last occurrence of `text`. Images are passed over, and never spelled."""
    placeholder = (input_ids == processor.image_token_id) | (input_ids == processor.object_token_id)
    places = (~placeholder).nonzero()[:, 0]
    ids = input_ids[places].tolist()

    def spells(start: int, end: int) -> bool:
        return text in processor.tokenizer.decode(ids[start:end], skip_special_tokens=False)

    if not text or not spells(0, len(ids)):
        raise ValueError(f"of: expected text that is in inputs or output_ids, got {describe(text)}")
    start = len(ids)
    while not spells(start, len(ids)):
        start -= 1
    end = start
    while not spells(start, end):
        end += 1
    rows = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    rows[places[start:end]] = True
    return rows


def _with_output(inputs: Any, output_ids: Tensor) -> dict[str, Any]:
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    if output_ids.shape[0] != 1 or not torch.equal(output_ids[:, : prompt.shape[1]].to(prompt.device), prompt):
        raise ValueError(
            f"output_ids: expected what generate returned for inputs, (1, L) with their {prompt.shape[1]} tokens "
            f"first, got shape {tuple(output_ids.shape)}"
        )
    new = mask.new_ones(1, output_ids.shape[1] - prompt.shape[1])
    return {**inputs, "input_ids": output_ids, "attention_mask": torch.cat([mask, new], dim=1)}
