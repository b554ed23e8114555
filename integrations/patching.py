"""`patch`: gives one model instance the keyword `key_bias`, and takes it away again without a trace.

What it changes on the instance, and `remove` restores:
- model.forward and the language model's forward take `key_bias` (a keyword, so it reaches every layer through
  gradient checkpointing, beams, caches and threads without any state outside the call);
- every attention layer of the language model holds a copy of its configuration that names our attention function
  (attention_interface.py). The model's own configuration is not touched.

A family of models is one module with the functions of `Family`; FAMILIES finds it by the configuration's model_type.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedInputError, UnsupportedModelError
from ..geometry import Box, PixelMap, check_image_size, clip_box, token_coverage, token_mask
from ..key_bias import log_weight_times_mask
from ..validation import describe, require_number
from .attention_interface import interface_config

FAMILIES = {"llava": "llava"}  # model_type -> module beside this one


class ImageTokens(Protocol):
    """Where one image's tokens are in the sequence and what they show."""

    batch_index: int
    positions: Tensor  # (grid height * grid width,) int64: indices into the sequence, row major over the grid
    pixels: PixelMap  # from original to processed pixels
    token_size: tuple[int, int]  # side of a token in processed pixels, (height, width)


class Family(Protocol):
    """What patching needs to know of a family of models; see llava.py for an example."""

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder whose layers attend to image tokens, forward(input_ids or inputs_embeds, attention_mask, ...)."""

    def image_tokens(
        self, model: nn.Module, processor: Any, inputs: Any, image_sizes: list[tuple[int, int]]
    ) -> list[ImageTokens]:
        """One entry per image, in the order in which the images appear in the batch."""


def patch(model: nn.Module, processor: Any = None) -> PatchHandle:
    """Lets `model` take `key_bias` in forward and generate, until the returned handle's `remove()`.

    ::

        with finegrain_ops.patch(model, processor) as handle:
            bias = handle.key_bias(inputs, boxes, image_sizes, weight=2.0)       # (B, P) float32
            output = model.generate(**inputs, key_bias=bias, max_new_tokens=64)

    key_bias is (B, P) float, in natural-log units, over the P positions of the prompt, padding included: it is added
    to every score of those keys, in every layer, head and row (CoF, arXiv 2412.16869, Eq. 3). Later positions get 0.
    Without key_bias the model computes exactly what it did before.

    Args:
        model: an instance of a supported family (LLaVA-1.5: `LlavaForConditionalGeneration`). Only this instance is
        touched.
        processor: the model's processor, needed by `handle.region_mask` and `handle.key_bias` for its image geometry.

    Raises:
        UnsupportedModelError: there is nothing in `model` that can be patched; the model is left as it was.
        ValueError: `model` is already patched.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"patch: expected a model of one of the families {sorted(FAMILIES)} (config.model_type), "
            f"got {type(model).__name__} with model_type {model_type!r}"
        )
    if isinstance(model.__dict__.get("_finegrain_handle"), PatchHandle):
        raise ValueError("patch: this model is already patched; call remove() on the handle that patch returned first")
    language_model = _family(model_type).language_model(model)
    layers = _attention_layers(language_model)
    handle = PatchHandle(model, processor, model_type)
    try:
        for layer, config in zip(layers, _shared_interface_configs(layers)):
            handle._set(layer, "config", config)
        handle._set(
            language_model, "forward", types.MethodType(_forward_with_bias(language_model.forward), language_model)
        )
        handle._set(model, "forward", types.MethodType(_forward_that_takes_key_bias(model.forward), model))
        for name, replacement in (
            ("prepare_inputs_for_generation", _prepare_inputs_keeping_mask),
            ("generate_batch", _generate_batch_without_bias),
        ):
            if hasattr(model, name):
                handle._set(model, name, types.MethodType(replacement(getattr(model, name)), model))
        handle._set(model, "_finegrain_handle", handle)
    except BaseException:
        handle.remove()
        raise
    return handle


class PatchHandle:
    """What `patch` returns: makes biases for the patched model, and removes the patch. A context manager."""

    def __init__(self, model: nn.Module, processor: Any, model_type: str) -> None:
        self.model = model
        self.processor = processor
        self.model_type = model_type
        self._changes: list[tuple[nn.Module, str, Any, Any]] = []

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

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
            image; a
                single box need not be wrapped, [] is an image without a region. Parts outside the image are clipped.
            image_sizes: for each image, the original (height, width).
            soft: give the share of each token's area that the boxes cover, instead of whether they touch it.

        Returns:
            (B, P) bool, or float32 in [0, 1] with `soft`, on the device of input_ids.

        Raises:
            ValueError: a box is malformed or outside its image, or the counts of images, boxes and sizes differ.
        """
        if self.processor is None:
            raise ValueError(
                "region_mask: the patch has no processor, which tells the image geometry; call patch(model, processor)"
            )
        sizes = [check_image_size(size, f"image_sizes[{i}]") for i, size in enumerate(image_sizes)]
        if len(boxes) != len(sizes):
            raise ValueError(
                f"boxes: expected one list of boxes per image, {len(sizes)} as in image_sizes, got {len(boxes)}"
            )
        clipped = [_clipped_boxes(entry, size, f"boxes[{i}]") for i, (entry, size) in enumerate(zip(boxes, sizes))]

        input_ids = inputs["input_ids"]
        mask = torch.zeros(input_ids.shape, dtype=torch.float32 if soft else torch.bool)
        images = _family(self.model_type).image_tokens(self.model, self.processor, inputs, sizes)
        for i, (image, image_boxes) in enumerate(zip(images, clipped)):
            grid = (token_coverage if soft else token_mask)(image_boxes, image.pixels, image.token_size)
            if image_boxes and not grid.any():
                warnings.warn(
                    f"boxes[{i}] lie wholly in what the image processor crops away: the model sees nothing of them, "
                    "and no token is in the region",
                    stacklevel=2,
                )
            mask[image.batch_index, image.positions] = grid.flatten()
        return mask.to(input_ids.device)

    def key_bias(
        self,
        inputs: Any,
        boxes: Sequence[Any],
        image_sizes: Sequence[tuple[int, int]] | Tensor,
        weight: float = 2.0,
        soft: bool = False,
    ) -> Tensor:
        """log(weight) * region_mask, (B, P) float32: what to give to the model as `key_bias`.

        weight is lambda >= 0: above 1 the region gets more attention, below 1 less, 0 none. See `region_mask` for the
        rest.
        """
        weight = require_number(weight, "weight", minimum=0.0, what="a finite number >= 0")
        return log_weight_times_mask(weight, self.region_mask(inputs, boxes, image_sizes, soft=soft).float())

    def remove(self) -> None:
        """Restores the model exactly. Calling it again does nothing.

        Raises:
            RuntimeError: something else replaced what patch had put in place; remove that first. Nothing was changed.
        """
        for owner, name, ours, _ in self._changes:
            if owner.__dict__.get(name) is not ours:
                raise RuntimeError(
                    f"remove: {type(owner).__name__}.{name} was replaced after patch; undo that first, then call remove"
                )
        while self._changes:
            owner, name, _, before = self._changes.pop()
            if before is _ABSENT:
                delattr(owner, name)
            else:
                object.__setattr__(owner, name, before)

    def _set(self, owner: nn.Module, name: str, value: Any) -> None:
        self._changes.append((owner, name, value, owner.__dict__.get(name, _ABSENT)))
        object.__setattr__(owner, name, value)


def _family(model_type: str) -> Family:
    return cast(Family, importlib.import_module(f".{FAMILIES[model_type]}", __package__))


class _ABSENT:
    """Stands for "the instance had no such attribute"; a class, since copy.deepcopy keeps its identity."""


def _attention_layers(language_model: nn.Module) -> list[nn.Module]:
    """The decoder's self-attention modules; raises when there are none that go through AttentionInterface."""
    layers = [
        m
        for m in language_model.modules()
        if hasattr(m, "layer_idx") and hasattr(m, "is_causal") and hasattr(m, "config")
    ]
    if not layers or not getattr(language_model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"patch: {type(language_model).__name__} has no attention layers that call transformers' AttentionInterface"
        )
    return layers


def _shared_interface_configs(layers: list[nn.Module]) -> list[Any]:
    """One interface configuration per configuration, shared by the layers that shared it."""
    copies: dict[int, Any] = {}
    return [copies.setdefault(id(layer.config), interface_config(layer.config)) for layer in layers]


def _clipped_boxes(entry: Any, image_size: tuple[int, int], name: str) -> list[Box]:
    """One image's boxes: a list of boxes, one box, or a tensor of either."""
    if isinstance(entry, Tensor):
        entry = entry.tolist()
    if entry is None or isinstance(entry, (str, bytes)) or not hasattr(entry, "__len__"):
        raise ValueError(f"{name}: expected a list of (x0, y0, x1, y1) boxes, [] for none, got {describe(entry)}")
    if len(entry) == 4 and not any(hasattr(edge, "__len__") for edge in entry):
        return [clip_box(entry, image_size, name)]
    return [clip_box(box, image_size, f"{name}[{k}]") for k, box in enumerate(entry)]


# --- the replaced methods ----------------------------------------------------------------------------------------
#
# Each takes the bound method that it replaces and returns a function of (self, ...). They are bound with
# types.MethodType, so that copy.deepcopy of a patched model gives a patched copy of its own.


def _bound_to(self: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, rebound when the patched model was copied."""
    function = getattr(original, "__func__", None)
    return original if function is None or original.__self__ is self else types.MethodType(function, self)


def _forward_that_takes_key_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """model.forward with `key_bias` in its signature, which is how generate comes to accept, expand and pass it."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, key_bias: Tensor | None = None, **kwargs: Any) -> Any:
        if key_bias is None:
            return _bound_to(self, original)(*args, **kwargs)
        _check_key_bias(key_bias)
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise UnsupportedInputError(
                "key_bias cannot be combined with output_attentions=True: no attention matrix is made"
            )
        return _bound_to(self, original)(*args, key_bias=key_bias, **kwargs)

    parameters = list(inspect.signature(original).parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("key_bias", inspect.Parameter.KEYWORD_ONLY, default=None))
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    return forward


def _forward_with_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """The language model's forward: makes one bias over all keys of this pass, once for all layers."""
    positional = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, key_bias: Tensor | None = None, **kwargs: Any) -> Any:
        original_here = _bound_to(self, original)
        if key_bias is None:
            return original_here(*args, **kwargs)
        kwargs |= dict(zip(positional, args))
        embedded = kwargs.get("inputs_embeds")
        bias = _bias_over_all_keys(
            key_bias,
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
            kwargs.get("past_key_values"),
            kwargs["input_ids"] if embedded is None else embedded,
        )
        # transformers hands a 4-D mask through to the layers as it is, so no Nq x Nk mask is made; ours read key_bias.
        kwargs["attention_mask"] = bias[:, None, None, :]
        return original_here(**kwargs, key_bias=bias)

    return forward


def _bias_over_all_keys(
    key_bias: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any, new_tokens: Tensor
) -> Tensor:
    """(B, K) float32 for the K keys that exist after this pass: key_bias, 0 beyond it, -inf where the mask says
    padding.
    """
    batch, num_new = new_tokens.shape[:2]
    if key_bias.shape[0] != batch:
        raise ValueError(f"key_bias: expected one row per sequence, here {batch}, got shape {tuple(key_bias.shape)}")
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        raise UnsupportedInputError(
            f"key_bias needs a 2-D attention_mask (B, K), or none, got {describe(attention_mask)}; "
            "a mask of its own per row cannot be combined with key_bias"
        )
    if torch.compiler.is_compiling() and attention_mask is not None:
        num_keys = attention_mask.shape[1]  # a static cache counts on the device; asking it would break the graph
    else:
        num_keys = num_new + (0 if cache is None else int(cache.get_seq_length()))
    may_be_packed = attention_mask is None and cache is None and position_ids is not None
    if may_be_packed and bool((position_ids.diff(dim=-1) != 1).any()):
        raise UnsupportedInputError(
            "key_bias cannot be combined with packed sequences (position_ids that start anew within a row); "
            "pass one sequence per row, with an attention_mask"
        )
    bias = key_bias.to(device=new_tokens.device, dtype=torch.float32)
    bias = F.pad(bias, (0, num_keys - bias.shape[1])) if bias.shape[1] < num_keys else bias[:, :num_keys]
    if attention_mask is None:
        return bias
    if attention_mask.shape[1] < num_keys:
        raise ValueError(
            f"attention_mask: expected (B, K) over all {num_keys} keys so far, got shape {tuple(attention_mask.shape)}"
        )
    return bias.masked_fill(attention_mask[:, :num_keys].to(bias.device) == 0, float("-inf"))


def _prepare_inputs_keeping_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    """prepare_inputs_for_generation turns the mask 4-D for a static cache; with key_bias the (B, K) one is wanted."""

    @functools.wraps(original)
    def prepare_inputs_for_generation(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        model_inputs = _bound_to(self, original)(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if kwargs.get("key_bias") is not None and isinstance(mask, Tensor) and mask.dim() == 2:
            model_inputs["attention_mask"] = mask
        return model_inputs

    return prepare_inputs_for_generation


def _generate_batch_without_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """Continuous batching replaces the attention function, so it would lose a key_bias silently."""

    @functools.wraps(original)
    def generate_batch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("key_bias") is not None:
            raise UnsupportedInputError("key_bias cannot be combined with generate_batch; use generate")
        return _bound_to(self, original)(*args, **kwargs)

    return generate_batch


def _check_key_bias(key_bias: object) -> None:
    if not isinstance(key_bias, Tensor) or not key_bias.is_floating_point():
        raise TypeError(
            f"key_bias: expected a float tensor (B, P), got {describe(key_bias)}; handle.key_bias makes one"
        )
    if key_bias.dim() != 2:
        raise ValueError(f"key_bias: expected shape (B, P), got {tuple(key_bias.shape)}")
