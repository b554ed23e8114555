"""The image's work done once, for methods that ask a model about one image more than once.

- `vision_once`: the vision encoder runs once per distinct image. Right for every family, with or without a bias.
- `align_after_images` and `ImagePrefix`: the decoder runs once over the prompt up to the last image, and every further
  prompt goes on from its KV cache (DualFocus, App. A, Figs. 6-7). Under a key_bias only with a row_gate that leaves the
  image's own rows alone: their hidden states would else change from the first layer on.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # transformers registers its ModelOutput there
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import UnsupportedInputError, UnsupportedModelError
from ..integrations.changes import Changes, bound_to
from ..integrations.decoder import check_key_bias, with_keywords
from ..integrations.family import FAMILIES, family_of
from ..validation import describe

_OF_A_PATCH = ("key_bias", "row_gate", "attention_reader")  # Qwen's encoder is given them in transformers 5
# Model types.
IMAGES_IN_PROMPT = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "tinygroundinggpt")

_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # (B, P); the last two are not used

# --- the vision encoder -----------------------------------------------------------------------------------------------


@contextmanager
def vision_once(model: nn.Module, keep: int = 8) -> Iterator[VisionMemo]:
    """Within it, the vision encoder encodes every distinct image once, however often the model is called.

    ::

        with vision_once(model) as memo:
            boxes = model.generate(**grounding_inputs)
            answers = model.generate(**inputs, key_bias=bias)  # memo.runs == 1

    Images are told apart by their pixels, one by one: a batch may hold old and new ones, and each of the copies that
    beams make counts as the same image. While gradients are enabled, or in training mode, every call is computed.
    The encoder's weights must stay as they are. A patch put on within is to be removed within.

    Args:
        model: an instance of a supported family (README, "Models"), patched or not.
        keep: how many images are remembered beyond those of the last call. One is all that the encoder returned for
            it: in LLaVA-1.5, that is the hidden states of 25 layers, 30 MB in bfloat16.

    Yields:
        VisionMemo, which counts.

    Raises:
        UnsupportedModelError: the model's family is not known.
    """
    encoder = _vision_encoder(model)
    memo, changes = VisionMemo(keep), Changes()
    changes.replace_method(encoder, "forward", memo._forward)
    try:
        yield memo
    finally:
        changes.undo()


class VisionMemo:
    """What a vision encoder made of the last images.

    runs: how often the encoder ran. reused: for how many images it did not have to.
    """

    def __init__(self, keep: int) -> None:
        self.runs = 0
        self.reused = 0
        self._keep = keep
        self._encoded: list[_EncodedImage] = []  # the last used come last

    def _forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(encoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
            encode = bound_to(encoder, original)
            names = list(inspect.signature(type(encoder).forward).parameters)[1:]
            arguments = {k: v for k, v in (kwargs | dict(zip(names, args))).items() if k not in _OF_A_PATCH}
            pixels, grids = arguments.pop(names[0], None), arguments.pop("grid_thw", None)
            if torch.is_grad_enabled() or encoder.training or not _are_images(pixels, grids, arguments):
                self.runs += 1
                return encode(*args, **kwargs)

            def encode_images(pixels: Tensor, grids: Tensor | None) -> Any:
                self.runs += 1
                return encode(**{names[0]: pixels}, **({} if grids is None else {"grid_thw": grids}), **arguments)

            return self._encode(encode_images, pixels, grids, arguments)

        forward.__signature__ = with_keywords(original)  # type: ignore[attr-defined]
        return forward

    def _encode(self, encode: Callable[[Tensor, Tensor | None], Any], pixels: Tensor, grids: Any, others: Any) -> Any:
        sizes = [1] * len(pixels) if grids is None else grids.prod(-1).tolist()
        grid_of = [None] * len(sizes) if grids is None else grids.tolist()
        wanted: list[_EncodedImage] = []
        new: dict[int, _EncodedImage] = {}  # by their places in this call
        for i, image in enumerate(pixels.split(sizes)):
            key = _key(image, grid_of[i])
            known = (e for e in [*self._encoded, *new.values()] if e.key == key)
            match = next((e for e in known if e.others == others and torch.equal(e.pixels, image)), None)
            if match is None:
                match = new[i] = _EncodedImage(key, image, others)
            wanted.append(match)

        output = None
        if new:
            all_new = len(new) == len(sizes)
            of_new = pixels if all_new else torch.cat([e.pixels for e in new.values()])
            output = encode(of_new, grids if all_new or grids is None else grids[list(new)])
            leaves, structure = pytree.tree_flatten(output)
            new_sizes = [sizes[i] for i in new]
            of_images = zip(*(_split(leaf, new_sizes) for leaf in leaves))
            for encoded, of_image in zip(new.values(), of_images):
                encoded.leaves, encoded.structure = of_image, structure
                encoded.pixels = encoded.pixels.clone()  # the caller may change its own
        self.reused += len(sizes) - len(new)
        used = list(dict.fromkeys(wanted))
        forgettable = [e for e in self._encoded if e not in used]
        self._encoded = forgettable[max(0, len(forgettable) - self._keep) :] + used
        return output if len(new) == len(sizes) else _joined(wanted)


class _EncodedImage:
    def __init__(self, key: object, pixels: Tensor, others: dict[str, Any]) -> None:
        self.key = key
        self.pixels = pixels
        self.others = others
        self.leaves: tuple[Tensor | None, ...] = ()  # its rows of every tensor that the encoder returned
        self.structure: Any = None  # in which these were


def _vision_encoder(model: nn.Module) -> nn.Module:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"vision_once: expected a model of one of the families {sorted(FAMILIES)} (config.model_type), "
            f"got {type(model).__name__} with model_type {model_type!r}"
        )
    return family_of(model_type).vision_encoder(model)


def _are_images(pixels: object, grids: object, others: dict[str, Any]) -> bool:
    """(images, channels, height, width), or (patches, pixels) with the (images, 3) patches of each; nothing else that
    could differ between images.
    """
    return (
        isinstance(pixels, Tensor)
        and pixels.dim() == (4 if grids is None else 2)
        and (grids is None or isinstance(grids, Tensor))
        and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(others))
    )


def _key(image: Tensor, grid: list[int] | None) -> object:
    """Equal for equal images, and cheap: 32 of the pixels, so that few images have to be compared as a whole."""
    pixels = image.reshape(-1)
    some = pixels[:: max(1, len(pixels) // 32)][:32].tolist()
    return image.shape, image.dtype, image.device, None if grid is None else tuple(grid), tuple(some)


def _split(leaf: Tensor | None, sizes: list[int]) -> tuple[Tensor | None, ...]:
    """An output's rows image by image. A merger of patches makes fewer rows, in proportion."""
    if leaf is None:
        return (None,) * len(sizes)
    per_size = len(leaf) / sum(sizes)
    return leaf.split([round(size * per_size) for size in sizes])


def _joined(images: list[_EncodedImage]) -> Any:
    """The output for these images; a new object around new tensors, which the model may set attributes on."""
    leaves = [None if rows[0] is None else torch.cat(rows) for rows in zip(*(image.leaves for image in images))]
    return pytree.tree_unflatten(leaves, images[0].structure)


# --- the decoder ------------------------------------------------------------------------------------------------------


def align_after_images(inputs: Any, model: nn.Module) -> dict[str, Any]:
    """The same prompts laid out so that in every row the last image token is in the same column.

    A row becomes [padding][text and images][padding][text after the last image]; positions are counted over the
    attention mask, so the model computes what it did. That makes the columns up to there a prefix (`ImagePrefix`) that
    other questions about the same images share. The batch may get wider.

    Args:
        inputs: what the processor returned for the batch. Every (B, P) tensor is laid out anew, the rest is kept.
        model: of a family that puts image tokens in the prompt.

    Raises:
        ValueError: a row has no image, or no text after the last one.
        UnsupportedModelError: the model's decoder does not attend to image tokens.
        UnsupportedInputError: there are videos.
    """
    ids, mask = _ids_and_mask(inputs)
    is_image = _image_tokens(model, inputs)
    is_token = mask != 0
    head = is_token & _up_to_last(is_image)
    tail = is_token & ~head
    for part, missing in ((head, "no image token"), (tail, "no text after its last image")):
        if not bool(part.any(1).all()):
            raise ValueError(
                f"inputs: expected an image and text after it in every row, got {missing} in rows "
                f"{(~part.any(1)).nonzero()[:, 0].tolist()}"
            )
    # Padding repeats a column that no image is in, which is padding in all rows but those that fill the width.
    padding = is_image.long().argmin(1, keepdim=True)
    columns, is_real = zip(*(_right_aligned(part, padding) for part in (head, tail)))
    column = torch.cat(columns, 1)
    laid_out = {
        name: value.gather(1, column) if _is_per_token(name, value, ids) else value for name, value in inputs.items()
    }
    return laid_out | {"attention_mask": torch.cat(is_real, 1).to(mask.dtype)}


class ImagePrefix:
    """A batch of prompts up to their last image, run once: its KV cache, from which any number of prompts go on.

    ::

        inputs = align_after_images(processor(...), model)
        prefix = ImagePrefix.prefill(model, inputs)
        boxes = prefix.generate(align_after_images(grounding_inputs, model), max_new_tokens=64)
        answers = prefix.generate(inputs, key_bias=bias, row_gate=handle.row_gate(inputs), max_new_tokens=64)

    length: the number of columns. next_positions: (B,), of the token that comes next in each row.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], cache: Cache, next_positions: Tensor) -> None:
        self.model = model
        self.length = inputs["input_ids"].shape[1]
        self.next_positions = next_positions
        self._inputs = inputs
        self._cache = cache

    @property
    def mask(self) -> Tensor:
        """(B, length) bool: where there is no padding."""
        mask: Tensor = self._inputs["attention_mask"] != 0
        return mask

    @property
    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (B, H, length, D)."""
        layers: Any = self._cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    @classmethod
    @torch.no_grad()
    def prefill(cls, model: Any, inputs: Any) -> ImagePrefix:
        """Runs the columns up to the last image token.

        Raises:
            ValueError: the last image tokens are not in one column: inputs did not come from `align_after_images`.
            UnsupportedModelError: the model's decoder does not attend to image tokens, or has a cache that cannot be
                shared (sliding windows).
            UnsupportedInputError: there are videos.
        """
        before = _up_to_last(_image_tokens(model, inputs))
        length = int(before[0].sum())
        if length == 0 or bool((before != before[:1]).any()):
            raise ValueError(
                f"inputs: expected the last image token of every row in one column, got the columns "
                f"{(before.sum(1) - 1).tolist()}; call align_after_images first"
            )
        _require_known(inputs)
        ids, mask = (tensor[:, :length] for tensor in _ids_and_mask(inputs))
        images = images_of(inputs)
        positions, _ = positions_of(model, ids, mask, images)
        # Without the language-model head: nothing is read off the prefix, and not every head can skip positions.
        cache = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **images
        ).past_key_values
        kinds = {type(layer) for layer in cache.layers}
        if kinds != {DynamicLayer}:
            raise UnsupportedModelError(
                f"ImagePrefix: expected a KV cache that grows, got one of {sorted(kind.__name__ for kind in kinds)}; "
                "use vision_once instead"
            )
        last = positions.amax(0) if positions.dim() == 3 else positions  # with M-RoPE text counts on from the highest
        following = last.masked_fill(mask == 0, -1).amax(1) + 1
        return cls(model, {"input_ids": ids, "attention_mask": mask, **images}, cache, following)

    def generate(self, inputs: Any, **generation: Any) -> Any:
        """What model.generate(**inputs, **generation) returns, with only the columns after the prefix to run.

        Args:
            inputs: whole prompts, laid out by `align_after_images`, equal to the prefix in its columns.
            generation: model.generate's arguments: beams, sampling, num_return_sequences, key_bias with a row_gate ...

        Raises:
            ValueError: inputs are not the prefix's in its columns or have nothing after them; their images are others;
                or a key_bias acts on the prefix's own rows, whose cache would be another (use vision_once there).
            UnsupportedInputError: there are images after the prefix.
        """
        ids, mask = self._checked(inputs)
        for name in ("past_key_values", "position_ids", "use_cache", "inputs_embeds"):
            if name in generation:
                raise ValueError(f"{name}: expected to be left to ImagePrefix.generate, which sets it; leave it out")
        if generation.get("key_bias") is not None:
            self._check_bias(mask, generation["key_bias"], generation.get("row_gate"))
        images = images_of(self._inputs)
        _, rope_deltas = positions_of(self.model, ids, mask, images)
        if rope_deltas is not None:
            # generate counts on from the deltas of whichever batch ran last, so they have to be this one's.
            self.model.model.rope_deltas = rope_deltas
        return self.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=self._branch(), use_cache=True, **generation
        )

    def _branch(self) -> Cache:
        """A cache of its own that starts with the prefix's tensors. It grows by making new ones."""
        cache = copy.copy(self._cache)
        cache.layers = [_BranchLayer.of(layer) for layer in self._cache.layers]
        return cache

    def _checked(self, inputs: Any) -> tuple[Tensor, Tensor]:
        _require_known(inputs)
        ids, mask = _ids_and_mask(inputs)
        own_ids, own_mask = self._inputs["input_ids"], self._inputs["attention_mask"]
        if ids.shape[0] != own_ids.shape[0] or ids.shape[1] <= self.length:
            raise ValueError(
                f"inputs: expected {own_ids.shape[0]} rows of more than the prefix's {self.length} columns, "
                f"got input_ids of shape {tuple(ids.shape)}"
            )
        own = own_mask != 0
        differs = ((mask[:, : self.length] != 0) != own) | ((ids[:, : self.length] != own_ids) & own)
        if bool(differs.any()):
            raise ValueError(
                f"inputs: expected the prefix's {self.length} columns in every row, got others in rows "
                f"{differs.any(1).nonzero()[:, 0].tolist()}; lay both prompts out with align_after_images, with the "
                "same text up to the image"
            )
        if bool(_image_tokens(self.model, inputs)[:, self.length :].any()):
            raise UnsupportedInputError("ImagePrefix.generate: there are image tokens after the prefix")
        for name, value in inputs.items():
            if _is_of_images(name) and not _same(value, self._inputs.get(name)):
                raise ValueError(f"{name}: expected that of the prefix, got another; prefill a prefix for these images")
        return ids, mask

    def _check_bias(self, mask: Tensor, key_bias: Tensor, row_gate: Tensor | None) -> None:
        check_key_bias(key_bias)
        for name, value in (("key_bias", key_bias), ("row_gate", row_gate)):
            if value is not None and (value.shape[0], value.shape[-1]) != tuple(mask.shape):
                raise ValueError(
                    f"{name}: expected (B, P) = {tuple(mask.shape)} as inputs are laid out, got {tuple(value.shape)}"
                )
        biased = (key_bias != 0).flatten(1, -2).any(1) if key_bias.dim() > 2 else key_bias != 0  # (B, P)
        is_token = mask[:, : self.length].to(biased.device) != 0
        sees_bias = (biased[:, : self.length] & is_token).cummax(1).values & is_token
        if row_gate is not None:
            sees_bias = sees_bias & row_gate[:, : self.length].to(biased.device)
        if bool(sees_bias.any()):
            raise ValueError(
                'row_gate: expected a gate that closes every row of the prefix, such as handle.row_gate(inputs, "after_'
                'image"): a key_bias in the rows of the image changes the cache that is to be reused; without the gate '
                "use vision_once alone"
            )


class _BranchLayer(DynamicLayer):
    """A layer that starts with another's tensors, and repeats their rows when beams or num_return_sequences come."""

    @classmethod
    def of(cls, layer: Any) -> _BranchLayer:
        branch = cls()
        branch.__dict__.update(vars(layer))
        return branch

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, own_rows = len(key_states), len(self.keys)  # type: ignore[arg-type]
        if rows != own_rows:
            self.batch_repeat_interleave(rows // own_rows)
        return super().update(key_states, value_states, *args, **kwargs)


# --- the layout of a batch --------------------------------------------------------------------------------------------


def _ids_and_mask(inputs: Any) -> tuple[Tensor, Tensor]:
    ids = inputs["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(f'inputs: expected "input_ids" of shape (B, P), got {describe(ids)}')
    mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f'inputs: expected "attention_mask" of shape {tuple(ids.shape)}, got {describe(mask)}')
    return ids, mask


def require_images_in_prompt(model: Any, advice: str = "") -> None:
    """Raises UnsupportedModelError for a model whose prompts hold no image tokens."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in IMAGES_IN_PROMPT:
        raise UnsupportedModelError(
            f"expected a model of one of {IMAGES_IN_PROMPT}, whose decoders attend to image tokens, got "
            f"{type(model).__name__} with model_type {model_type!r}{advice}"
        )


def _image_tokens(model: Any, inputs: Any) -> Tensor:
    """(B, P) bool: every token that an image's features take the place of. Refuses other models and inputs."""
    require_images_in_prompt(model, "; use vision_once instead")
    if any("video" in name for name in inputs):
        raise UnsupportedInputError(f"inputs: expected images only, got videos among {sorted(inputs)}")
    ids = inputs["input_ids"]
    is_image: Tensor = ids == model.config.image_token_id
    of_objects = getattr(model.config, "object_token_id", None)  # TinyGroundingGPT's object images
    return is_image if of_objects is None else is_image | (ids == of_objects)


def _require_known(inputs: Any) -> None:
    others = sorted(name for name in inputs if name not in _OF_TOKENS and not _is_of_images(name))
    if others:
        raise ValueError(
            f"inputs: expected what the processor returned, laid out by align_after_images, got {others} too; give the "
            "rest to ImagePrefix.generate as keywords"
        )


def _up_to_last(is_image: Tensor) -> Tensor:
    """(B, P) bool: True up to and with the last True of each row."""
    return is_image.flip(1).cumsum(1).flip(1) > 0


def _right_aligned(part: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """For a part of each row: from which columns its tokens come when they are moved to the right, (B, W) int64, and
    which of these are tokens, (B, W) bool; `padding` (B, 1) elsewhere.
    """
    counts = part.sum(1, keepdim=True)
    width = int(counts.max())
    is_real = torch.arange(width, device=part.device) >= width - counts
    return torch.where(is_real, part.long().argsort(dim=1, stable=True)[:, -width:], padding), is_real


def images_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor returned of the images: pixels, sizes, grids."""
    return {name: value for name, value in inputs.items() if _is_of_images(name)}


def _is_of_images(name: str) -> bool:
    return name.startswith(("pixel_", "image_")) or name.endswith("_pixel_values")


def _is_per_token(name: str, value: object, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape and not _is_of_images(name)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)


def positions_of(model: Any, ids: Tensor, mask: Tensor, images: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Position ids as generate makes them, (B, P); of Qwen2-VL and later (3, B, P), with the rope deltas (B, 1)."""
    if not hasattr(model.model, "get_rope_index"):
        return (mask.long().cumsum(1) - 1).clamp(min=0), None
    arguments = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        **images,
    }
    names = inspect.signature(model.model.get_rope_index).parameters
    positions, deltas = model.model.get_rope_index(**{k: v for k, v in arguments.items() if k in names})
    return positions, deltas
