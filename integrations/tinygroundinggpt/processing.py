"""Prompts of TinyGroundingGPT: text, images, object images cut out of them, and boxes as text.

| in the text | becomes                                                                                   |
|-------------|-------------------------------------------------------------------------------------------|
| <image>     | the tokens of the next of `images`                                                        |
| <object>    | the tokens of an object image: its box, cropped and zoomed from the image                 |
| <loc>       | its box as text, [x1, y1, x2, y2] in 0.000 .. 1.000 of the image padded to a square       |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from ...boxes import Box, parse_boxes
from ...geometry import check_image_size, clip_box
from ...validation import describe
from .image_processing import as_image_tensors
from .modeling import IS_TRANSFORMERS_5

IMAGE_TOKEN, OBJECT_TOKEN, LOCATION = "<image>", "<object>", "<loc>"

# Qwen2.5's dialogue (ChatML), for contents that are text or a list of images, object images, boxes and text.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}"
    "{%- elif part['type'] == 'object' -%}{{- '<object>' -}}"
    "{%- elif part['type'] == 'location' -%}{{- '<loc>' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


class TinyGroundingGPTProcessor(ProcessorMixin):  # type: ignore[misc]
    """A tokenizer and a `TinyGroundingGPTImageProcessor` as one.

    Args:
        image_processor: a TinyGroundingGPTImageProcessor.
        tokenizer: Qwen2.5's, with "<image>" and "<object>" in it: see `add_placeholder_tokens`.
        patch_size: of the encoders; an image makes (size / patch_size)^2 tokens.
        chat_template: None: CHAT_TEMPLATE. A tokenizer's own is not taken: Qwen2.5's knows no images.

    Raises:
        ValueError: the tokenizer lacks one of the two tokens, or the image is not a whole number of patches.
    """

    if not IS_TRANSFORMERS_5:  # release 5 reads the signature of __init__ instead, and warns of these
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self, image_processor: Any, tokenizer: Any, patch_size: int = 14, chat_template: Any = None, **kwargs: Any
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        if IMAGE_TOKEN not in vocabulary or OBJECT_TOKEN not in vocabulary:
            raise ValueError(
                f"tokenizer: expected one with the tokens {IMAGE_TOKEN} and {OBJECT_TOKEN}, got "
                f"{type(tokenizer).__name__} without; call add_placeholder_tokens(tokenizer, model) first"
            )
        side = image_processor.size["height"]
        if side % patch_size:
            raise ValueError(f"patch_size: expected a divisor of the image's {side} pixels, got {patch_size}")
        self.patch_size = patch_size
        self.image_token, self.object_token = IMAGE_TOKEN, OBJECT_TOKEN
        self.image_token_id, self.object_token_id = vocabulary[IMAGE_TOKEN], vocabulary[OBJECT_TOKEN]
        super().__init__(
            image_processor,
            tokenizer,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
            **kwargs,
        )

    @property
    def image_seq_length(self) -> int:
        """Tokens of an image, or of an object image."""
        return int(self.image_processor.size["height"] // self.patch_size) ** 2

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        object_boxes: Any = None,
        location_boxes: Any = None,
        *,
        device: torch.device | str | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The model's inputs for one text or several.

        An <object> or <loc> belongs to the image that was named last before it, or to the text's first. Images and
        objects of all texts are cropped, resized and normalised in one call.

        Args:
            images: for each <image> one, in order over all texts: PIL images, uint8 tensors (3, H, W) on any device,
                or uint8 arrays (H, W, 3). A single one need not be wrapped.
            text: a text, or a list of them.
            object_boxes: for each <object> of a text one (x0, y0, x1, y1) in pixels of the original image, clipped to
                it. Of one text a list of boxes or a tensor (K, 4); of a list of texts a list of these, where [] or None
                is a text without.
            location_boxes: the same for each <loc>.
            device: where images are brought to be cropped, and where the pixels then are. None: where they are.
            return_tensors: "pt" for tensors of ids, which needs texts of one length or padding=True.
            kwargs: to the tokenizer (padding, padding_side, max_length, add_special_tokens, ...).

        Returns:
            BatchFeature with input_ids and attention_mask (B, P), and with images pixel_values and dino_pixel_values
            (N, 3, S, S) float32: the images and object images of all texts in the order in which they appear.

        Raises:
            ValueError: placeholders and images or boxes differ in number, an <object> or <loc> has no image, a box has
                no area in its image, truncation cuts placeholders off, or a text has more tokens than
                tokenizer.model_max_length.
            TypeError: an argument is of another type.
        """
        if text is None:
            if images is None or object_boxes is not None or location_boxes is not None:
                raise ValueError("text: expected a text or a list of texts, got None")
            return self.image_processor(images, device=device)
        for name in ("videos", "audio"):  # apply_chat_template passes them, as None
            if kwargs.pop(name, None) is not None:
                raise TypeError(f"{name}: TinyGroundingGPT takes none")
        is_one = isinstance(text, str)
        texts: list[Any] = [text] if is_one else list(text)
        if not all(isinstance(entry, str) for entry in texts):
            raise TypeError(f"text: expected a text or a list of texts, got {describe(text)}")
        tensors = [] if images is None else as_image_tensors(images)
        named = sum(entry.count(IMAGE_TOKEN) for entry in texts)
        if named != len(tensors):
            raise ValueError(f"images: expected one for each of the {named} {IMAGE_TOKEN} of text, got {len(tensors)}")
        objects = _boxes_of_texts(object_boxes, len(texts), is_one, "object_boxes")
        locations = _boxes_of_texts(location_boxes, len(texts), is_one, "location_boxes")
        sizes = [(tensor.shape[1], tensor.shape[2]) for tensor in tensors]

        shown: list[tuple[int, Box]] = []  # image and box of everything that becomes pixels
        expanded, counts = [], []
        first_image = 0
        for i, entry in enumerate(texts):
            name = "text" if is_one else f"text[{i}]"
            before = len(shown)
            expanded.append(self._expand(entry, name, first_image, sizes, objects[i], locations[i], shown))
            counts.append(len(shown) - before)
            first_image += entry.count(IMAGE_TOKEN)
        encoded = self.tokenizer(expanded, **kwargs)
        self._check_rows(encoded["input_ids"], encoded.get("attention_mask"), counts, is_one)
        data = dict(encoded)
        if shown:
            # One call, of an attribute: methods/prompting.py puts one there that remembers what it made.
            indices, boxes = zip(*shown)
            data |= self.image_processor(tensors, boxes=list(boxes), image_index=list(indices), device=device)
        return BatchFeature(data, tensor_type=return_tensors)

    def format_box(self, box: Sequence[float] | Tensor, image_size: tuple[int, int]) -> str:
        """(x0, y0, x1, y1) in pixels of an image of (height, width) as the model reads and writes it.

        Each edge is x' = (x + (M - W) // 2) / M of the square of side M = max(H, W) that the image is padded to, with
        three decimals: "[0.125, 0.250, 0.500, 0.750]". Raises ValueError where the box has no area in the image.
        """
        height, width = check_image_size(image_size, "image_size")
        x0, y0, x1, y1 = clip_box(box, (height, width), "box")  # type: ignore[arg-type]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        edges = ((x0 + left) / side, (y0 + top) / side, (x1 + left) / side, (y1 + top) / side)
        return "[" + ", ".join(f"{edge:.3f}" for edge in edges) + "]"

    def post_process_grounding(self, texts: Sequence[str], image_sizes: Sequence[tuple[int, int]]) -> list[list[Box]]:
        """The boxes in each of the model's texts, in pixels of its image of (height, width); [] where there is none."""
        if isinstance(texts, str) or len(texts) != len(image_sizes):
            raise ValueError(
                f"texts: expected a list with one text for each of the {len(image_sizes)} image_sizes, got "
                f"{describe(texts)}"
            )
        return [parse_boxes(text, image_size=size, convention="unit_padded") for text, size in zip(texts, image_sizes)]

    # --- how ---

    def _expand(
        self,
        text: str,
        name: str,
        first_image: int,
        sizes: list[tuple[int, int]],
        objects: list[Any],
        locations: list[Any],
        shown: list[tuple[int, Box]],
    ) -> str:
        """`text` with tokens and boxes in place; what is to be seen is appended to `shown`."""
        suffix = name.removeprefix("text")
        for token, boxes, argument in (
            (OBJECT_TOKEN, objects, "object_boxes"),
            (LOCATION, locations, "location_boxes"),
        ):
            if text.count(token) != len(boxes):
                raise ValueError(
                    f"{argument}{suffix}: expected one box for each of the {text.count(token)} {token} of {name}, got "
                    f"{len(boxes)}"
                )
        if IMAGE_TOKEN not in text and (objects or locations):
            raise ValueError(
                f"{name}: expected {IMAGE_TOKEN} in it, since it has {OBJECT_TOKEN} or {LOCATION}, whose boxes lie in "
                "an image"
            )
        remaining = {OBJECT_TOKEN: list(enumerate(objects)), LOCATION: list(enumerate(locations))}
        named = 0

        def replacement(match: re.Match[str]) -> str:
            nonlocal named
            token = match.group()
            if token == IMAGE_TOKEN:
                height, width = sizes[first_image + named]
                shown.append((first_image + named, (0.0, 0.0, float(width), float(height))))
                named += 1
                return IMAGE_TOKEN * self.image_seq_length
            image = first_image + max(named - 1, 0)
            k, box = remaining[token].pop(0)
            argument = "object_boxes" if token == OBJECT_TOKEN else "location_boxes"
            clipped = clip_box(box, sizes[image], f"{argument}{suffix}[{k}]")
            if token == LOCATION:
                return self.format_box(clipped, sizes[image])
            shown.append((image, clipped))
            return OBJECT_TOKEN * self.image_seq_length

        return re.sub(f"{IMAGE_TOKEN}|{OBJECT_TOKEN}|{LOCATION}", replacement, text)

    def _check_rows(self, input_ids: Any, attention_mask: Any, counts: list[int], is_one: bool) -> None:
        """Of each text: as many tokens of images as it shows, and no more tokens than the tokenizer allows."""
        limit = self.tokenizer.model_max_length
        for i, (row, count) in enumerate(zip(input_ids, counts)):
            name = "text" if is_one else f"text[{i}]"
            expected = count * self.image_seq_length
            got = row.count(self.image_token_id) + row.count(self.object_token_id)
            if got != expected:
                raise ValueError(
                    f"{name}: expected {expected} tokens for its {count} images and objects, got {got}; without "
                    "truncation, or with a larger max_length"
                )
            length = len(row) if attention_mask is None else sum(attention_mask[i])
            if length > limit:
                raise ValueError(
                    f"{name}: expected at most {limit} tokens (tokenizer.model_max_length), got {length}, of which "
                    f"{expected} stand for its {count} images and objects"
                )


def _boxes_of_texts(boxes: Any, num_texts: int, is_one: bool, name: str) -> list[list[Any]]:
    """A list of boxes for each text, their values unchecked."""
    if boxes is None:
        return [[] for _ in range(num_texts)]
    if is_one:
        return [_box_list(boxes, name)]
    if isinstance(boxes, (str, bytes)) or not hasattr(boxes, "__len__") or len(boxes) != num_texts:
        raise ValueError(f"{name}: expected a list of boxes for each of the {num_texts} texts, got {describe(boxes)}")
    return [_box_list(entry, f"{name}[{i}]") for i, entry in enumerate(boxes)]


def _box_list(boxes: Any, name: str) -> list[Any]:
    boxes = boxes.tolist() if hasattr(boxes, "tolist") else boxes
    if boxes is None:
        return []
    if isinstance(boxes, (str, bytes)) or not hasattr(boxes, "__len__"):
        raise ValueError(f"{name}: expected a list of (x0, y0, x1, y1) boxes, [] for none, got {describe(boxes)}")
    if len(boxes) == 4 and not any(hasattr(edge, "__len__") for edge in boxes):
        return [boxes]
    return list(boxes)


def add_placeholder_tokens(tokenizer: Any, model: Any = None) -> tuple[int, int]:
    """Adds the special tokens "<image>" and "<object>" to a tokenizer where it does not have them.

    Args:
        tokenizer: Qwen2.5's, or any other.
        model: told the ids of the two tokens; its embeddings grow where they have too few rows (Qwen2.5's have
            151936, for the 151667 tokens that its tokenizer then has, so they stay).

    Returns:
        The ids of "<image>" and "<object>".
    """
    missing = [token for token in ("<image>", "<object>") if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<object>"))
    if model is not None:
        if not hasattr(model.config, "object_token_id"):
            raise TypeError(f"model: expected a TinyGroundingGPT, got {describe(type(model).__name__)}")
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        model.config.image_token_id, model.config.object_token_id = ids
    return ids
