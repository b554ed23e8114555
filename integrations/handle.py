"""What `patch` returns: makes regions, biases and gates for the model, reads its attention, and removes the patch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..geometry import Box, check_image_size, token_coverage, token_mask
from ..key_bias import log_weight_times_mask
from ..validation import clip_boxes_of_image, describe, require_number
from .attention_reading import AttentionReader, require_layers, rows_to_read
from .changes import Changes
from .decoder import per_key
from .family import Family, ImageTokens, family_of
from .image_maps import ImageMap, image_map

_COMPLEMENTS = (None, "image", "prompt")


class PatchHandle:
    """A patched model's regions, biases and attention. A context manager: leaving it removes the patch."""

    def __init__(
        self, model: nn.Module, processor: Any, model_type: str, layers: Sequence[nn.Module], changes: Changes
    ) -> None:
        self.model = model
        self.processor = processor
        self.model_type = model_type
        self.num_layers = len(layers)  # how many attention layers heed a bias
        self.num_heads = _num_heads(layers[0])
        self._changes = changes

    @property
    def family(self) -> Family:
        return family_of(self.model_type)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model exactly. Calling it again does nothing.

        Raises:
            RuntimeError: something else replaced what patch had put in place; remove that first. Nothing was changed.
        """
        self._changes.undo()

    def region_mask(
        self,
        inputs: Any,
        boxes: Sequence[Any],
        image_sizes: Sequence[tuple[int, int]] | Tensor,
        soft: bool = False,
    ) -> Tensor:
        """M of CoF (arXiv 2412.16869, Sec. II-C): the image tokens that the boxes touch, in the sequence's positions.

        Args:
            inputs: what the processor returned for the batch (input_ids with the image tokens in place).
            boxes: for each image, in the order of the prompts, a list of (x0, y0, x1, y1) in pixels of the original
                image; a single box need not be wrapped, [] is an image without a region. Parts outside the image are
                clipped.
            image_sizes: for each image, the original (height, width).
            soft: give the share of each token's area that the boxes cover, instead of whether they touch it. A weight
                of 0 removes a token with any share.

        Returns:
            (B, P) bool, or float32 in [0, 1] with `soft`, on the device of inputs. Of a Q-Former (images, 257): the
            vision encoder's keys, CLS first.

        Raises:
            ValueError: a box is malformed or outside its image, or the counts of images, boxes and sizes differ.

        Warns where the image processor crops all of an image's boxes away.
        """
        return self._mask(inputs, *self._regions(inputs, boxes, image_sizes), soft)

    def key_bias(
        self,
        inputs: Any,
        boxes: Sequence[Any],
        image_sizes: Sequence[tuple[int, int]] | Tensor,
        weight: float | Tensor | Sequence[Any] = 2.0,
        soft: bool = False,
        complement: str | None = None,
    ) -> Tensor:
        """log(weight) * region_mask: what to give to the model as `key_bias`. Examples: docs/steering.md.

        Args:
            inputs, boxes, image_sizes, soft: see `region_mask`.
            weight: lambda >= 0: above 1 the region gets more attention, below 1 less, 0 none. A number; a tensor
                (L, H), (L, 1) or (1, H) with the weight of each of the `num_layers` layers and heads; or for each
                image a list with the weight of each of its boxes, or one number for all of them. Where boxes of
                different weights overlap, the one that moves attention the most (the largest |log(lambda)|, times the
                share with `soft`) holds: 0 before all, and of lambda and 1 / lambda the smaller.
            complement: None: the region. "image": every image token outside of it. "prompt": every key outside of it,
                text included (PASTA, arXiv 2311.02262, which lowers the rest instead of raising the region). All of an
                image without boxes is outside.

        Returns:
            (B, P) float32; with a tensor of weights (B, L or 1, H or 1, P), differentiable in it.

        Raises:
            ValueError, TypeError: as `region_mask`; or a weight is negative, not finite, no number, or not one of the
                shapes above.
        """
        if complement not in _COMPLEMENTS:
            raise ValueError(f'complement: expected None, "image" or "prompt", got {complement!r}')
        if isinstance(weight, (list, tuple)) and complement is not None:
            raise ValueError("weight: expected a number or a tensor with complement, got a list with one per box")
        images, clipped = self._regions(inputs, boxes, image_sizes)
        if isinstance(weight, (list, tuple)):
            return self._bias_of_weighted_boxes(inputs, images, clipped, weight, soft)
        mask = self._mask(inputs, images, clipped, soft).float()
        if complement is not None:
            within = self.family.image_keys(self.model, inputs) if complement == "image" else torch.ones_like(mask)
            mask = within.to(mask.dtype) * (1.0 - mask)
        if isinstance(weight, Tensor):
            weight = self._checked_weights(weight)
            return log_weight_times_mask(weight.to(mask.device)[None, :, :, None], mask[:, None, None, :])
        return log_weight_times_mask(_weight(weight, "weight"), mask)

    def row_gate(self, inputs: Any, rows: str = "after_image") -> Tensor | None:
        """In which rows the bias acts: what to give to the model as `row_gate`, beside key_bias.

        Args:
            inputs: see `region_mask`.
            rows: "after_image": those after the last image token of each sequence, so that the image's own hidden
                states stay what they are without a bias; of a sequence without an image all. "all": every row.

        Returns:
            (B, P) bool, or None for "all". Generated tokens are always biased.

        Raises:
            ValueError: rows is neither, or "after_image" of a Q-Former, whose rows are queries of its own.
        """
        if rows == "all":
            return None
        if rows != "after_image":
            raise ValueError(f'rows: expected "all" or "after_image", got {rows!r}')
        if "input_ids" not in inputs or tuple(inputs["input_ids"].shape) != self._key_shape(inputs):
            raise ValueError(
                f'rows: expected "all" for model_type {self.model_type!r}, whose rows are queries of their own, not '
                "positions of the prompt"
            )
        image = self.family.image_keys(self.model, inputs)
        token = getattr(self.model.config, "image_token_id", None)
        if token is not None:  # LLaVA-NeXT: the last one ends a row of the image, and shows no place
            image = image | (inputs["input_ids"] == token)
        return image.flip(1).cumsum(1).flip(1) == 0

    def attention_map(
        self,
        inputs: Any,
        *,
        rows: Tensor | Sequence[int] | int | None = None,
        layers: Sequence[int] | int | None = None,
        key_bias: Tensor | None = None,
        row_gate: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """The attention that each image token receives, read in one forward pass without a Q x K matrix.

        TinyGroundingGPT's picture (its Sec. A.8) is rows = the tokens of an object's text or box, layers=-1;
        ViCrop (arXiv 2502.17422) reads rows=-1 at one layer, API prompting (arXiv 2409.17143) the rows that gave an
        answer's tokens. docs/steering.md has an example of each.

        Args:
            inputs: see `region_mask`. With inputs_embeds beside input_ids the model is given the embeddings, and
                input_ids only say where the images are (Qwen2-VL and later then need their position_ids too).
            rows: which positions' attention counts: (P,) or (B, P) bool, a position or a list of them (negative from
                the end: -1 predicts the next token of a batch padded on the left); None: all. Padding never counts.
                Of a Q-Former, its query tokens.
            layers: indices of the `num_layers` layers, negative from the end; None: all.
            key_bias, row_gate: as for the model's forward, to read attention while it is steered.
            reduction: "sum" over layers, heads and rows; "mean" divides that by their number; "none" sums over rows
                only.

        Returns:
            (B, P) float32, 0 where no image token is; with "none" (B, layers, H, P), layers as listed. It carries
            gradients to whatever float input or parameter requires them (ControlMLLM, arXiv 2407.21534); where none
            are wanted, call it under torch.no_grad(), which keeps no activations.

        Raises:
            ValueError, TypeError: rows, layers or reduction are not as said above, or all positions are padding in one
                of the sequences.
        """
        shape = self._key_shape(inputs)
        image_keys = self.family.image_keys(self.model, inputs)
        if key_bias is None:
            key_bias = torch.zeros(shape, device=image_keys.device)
        reader = AttentionReader(
            require_layers(layers, self.num_layers),
            lambda num_rows: rows_to_read(rows, inputs, shape, num_rows),
            reduction,
        )
        given = inputs
        if inputs.get("inputs_embeds") is not None:
            given = {name: value for name, value in inputs.items() if name != "input_ids"}
        gate = {} if row_gate is None else {"row_gate": row_gate}
        self.family.read(self.model, given, key_bias=key_bias, attention_reader=reader, **gate)
        attention = reader.attention
        return attention * per_key(image_keys, attention).to(attention)

    def image_maps(
        self, inputs: Any, attention: Tensor, image_sizes: Sequence[tuple[int, int]] | Tensor
    ) -> list[ImageMap]:
        """(B, P) values of the image tokens, such as `attention_map` gives, as one map per image in its own pixels.

        Where an image is several grids of tokens, the values of a place are added on the finest grid.
        """
        sizes = self._checked_sizes(image_sizes)
        shape = self._key_shape(inputs)
        if not isinstance(attention, Tensor) or tuple(attention.shape) != shape:
            raise ValueError(
                f"attention: expected (B, P) = {shape} as attention_map gives it, got {describe(attention)}"
            )
        values = attention.detach().cpu()
        grids: list[list[ImageTokens]] = [[] for _ in sizes]
        for tokens in self._image_tokens(inputs, sizes):
            grids[tokens.image_index].append(tokens)
        return [image_map([(t.grid, values[t.batch_index, t.positions]) for t in of_image]) for of_image in grids]

    # --- how ---

    def _key_shape(self, inputs: Any) -> tuple[int, int]:
        return self.family.key_shape(self.model, inputs)

    def _image_tokens(self, inputs: Any, sizes: list[tuple[int, int]]) -> Sequence[ImageTokens]:
        if self.processor is None:
            raise ValueError(
                "processor: expected the model's processor, which tells the image geometry, got None; "
                "call patch(model, processor)"
            )
        return self.family.image_tokens(self.model, self.processor, inputs, sizes)

    def _checked_sizes(self, image_sizes: Sequence[tuple[int, int]] | Tensor) -> list[tuple[int, int]]:
        return [check_image_size(size, f"image_sizes[{i}]") for i, size in enumerate(image_sizes)]

    def _regions(
        self, inputs: Any, boxes: Sequence[Any], image_sizes: Sequence[tuple[int, int]] | Tensor
    ) -> tuple[Sequence[ImageTokens], list[list[Box]]]:
        """The grids of all images, and the clipped boxes of each image. Called by public methods: see stacklevel."""
        sizes = self._checked_sizes(image_sizes)
        if len(boxes) != len(sizes):
            raise ValueError(
                f"boxes: expected one list of boxes per image, {len(sizes)} as in image_sizes, got {len(boxes)}"
            )
        clipped = [clip_boxes_of_image(entry, size, f"boxes[{i}]") for i, (entry, size) in enumerate(zip(boxes, sizes))]
        images = self._image_tokens(inputs, sizes)
        seen = [not of_image for of_image in clipped]
        for tokens in images:
            seen[tokens.image_index] |= bool(_on_grid(tokens, clipped, soft=False).any())
        for i in (i for i, is_seen in enumerate(seen) if not is_seen):
            warnings.warn(
                f"boxes[{i}] lie wholly in what the image processor crops away: the model sees nothing of them, "
                "and no token is in the region",
                stacklevel=3,
            )
        return images, clipped

    def _mask(self, inputs: Any, images: Sequence[ImageTokens], boxes: Sequence[Sequence[Box]], soft: bool) -> Tensor:
        """(B, P); boxes are clipped, one list per image."""
        mask = torch.zeros(self._key_shape(inputs), dtype=torch.float32 if soft else torch.bool)
        for tokens in images:
            mask[tokens.batch_index, tokens.positions] = _on_grid(tokens, boxes, soft).flatten()
        return mask.to(_device(inputs))

    def _bias_of_weighted_boxes(
        self,
        inputs: Any,
        images: Sequence[ImageTokens],
        boxes: Sequence[Sequence[Box]],
        weights: Sequence[Any],
        soft: bool,
    ) -> Tensor:
        of_boxes = _weights_of_boxes(weights, boxes)
        bias = torch.zeros(self._key_shape(inputs), device=_device(inputs))
        for weight in sorted({w for of_image in of_boxes for w in of_image}):
            chosen = [[box for box, w in zip(*pair) if w == weight] for pair in zip(boxes, of_boxes)]
            of_weight = log_weight_times_mask(weight, self._mask(inputs, images, chosen, soft).float())
            bias = torch.where(of_weight.abs() > bias.abs(), of_weight, bias)
        return bias

    def _checked_weights(self, weight: Tensor) -> Tensor:
        """(L or 1, H or 1); a number in a tensor is (1, 1)."""
        if weight.dim() == 0 and weight.is_floating_point():
            weight = weight[None, None]
        layers, heads = weight.shape if weight.dim() == 2 and weight.is_floating_point() else (0, 0)
        if layers not in (1, self.num_layers) or heads not in (1, self.num_heads):
            raise ValueError(
                "weight: expected a number, or a float tensor (L, H), (L, 1) or (1, H) with "
                f"L = {self.num_layers} and H = {self.num_heads}, got {describe(weight)}"
            )
        if not bool((weight >= 0).all() & weight.isfinite().all()):
            raise ValueError("weight: expected finite numbers >= 0, got others in the tensor")
        return weight


def _device(inputs: Any) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


def _on_grid(tokens: ImageTokens, boxes: Sequence[Sequence[Box]], soft: bool) -> Tensor:
    """(rows, columns): which tokens of the grid its image's boxes touch, or which share of them they cover."""
    of_image = boxes[tokens.image_index]
    return (token_coverage if soft else token_mask)(of_image, tokens.grid.pixels, tokens.grid.token_size)


def _weights_of_boxes(weights: Sequence[Any], boxes: Sequence[Sequence[Box]]) -> list[list[float]]:
    """One for each box of each image."""
    if len(weights) != len(boxes):
        raise ValueError(f"weight: expected a list for each of the {len(boxes)} images, got {len(weights)}")
    of_boxes = []
    for i, (of_image, image_boxes) in enumerate(zip(weights, boxes)):
        of_image = list(of_image) if isinstance(of_image, (list, tuple)) else [of_image] * len(image_boxes)
        if len(of_image) != len(image_boxes):
            raise ValueError(
                f"weight[{i}]: expected one number for each of its {len(image_boxes)} boxes, got {len(of_image)}"
            )
        of_boxes.append([_weight(w, f"weight[{i}][{k}]") for k, w in enumerate(of_image)])
    return of_boxes


def _num_heads(layer: nn.Module) -> int:
    """Of an attention module: its configuration's, its own, or that of the module that it wraps (Q-Former)."""
    for module in layer.modules():
        for holder in (getattr(module, "config", None), module):
            for name in ("num_attention_heads", "num_heads"):
                if isinstance(getattr(holder, name, None), int):
                    return int(getattr(holder, name))
    raise UnsupportedModelError(f"patch: expected an attention layer that tells its heads, got {type(layer).__name__}")


def _weight(weight: object, name: str) -> float:
    return require_number(weight, name, minimum=0.0, what="a finite number >= 0")
