"""Questions about images as a model's inputs, for every family: the prompt's text, and tokens and pixels in batches.

A question becomes a prompt by the first of these that there is: a `template` of the caller's; the processor's chat
template; the family's plain format (`PLAIN_FORMATS`).

An image and its question give the same result alone and in a batch. Decoders continue a prompt at its end, so it is
padded on the left. Encoders, T5's and Q-Formers, count positions over the padding, so theirs is on the right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..validation import describe

Template: TypeAlias = "str | Callable[[str], str]"

QUESTION, IMAGE = "{question}", "{image}"  # placeholders; str.format would trip over the braces of JSON

PLAIN_FORMATS = {  # model_type -> format where there is no chat template
    "llava": "USER: {image}\n{question} ASSISTANT:",
    "instructblip": "{question}",
    "blip-2": "{question}",
}
_ONE_IMAGE = ("instructblip", "blip-2")  # model types whose prompt shows one image, by queries before all text
_SOME_ANSWER = "finegrain-ops-answer"  # no template changes or holds it
# The original Qwen-VL: Qwen-VL-Chat's dialogue, where the generation configuration asks for it.
_CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)


class Prompter:
    """Makes the inputs of one model from images and questions.

    Args:
        model: a model of a supported family.
        processor: what transformers' AutoProcessor gives for it; of the original Qwen-VL, its tokenizer.
        template: the whole prompt around a question: text with "{question}" in it, and "{image}" where the image
            belongs, or a function of the question.

    Raises:
        TypeError: `processor` is no processor, or `template` neither text nor a function.
        ValueError: `processor` belongs to another model, or there is no way to make a prompt.
    """

    def __init__(self, model: Any, processor: Any, template: Template | None = None) -> None:
        self.model = model
        self._processor = processor
        self.writes_paths = hasattr(processor, "from_list_format")  # the original Qwen-VL's tokenizer
        self.tokenizer: Any = processor if self.writes_paths else getattr(processor, "tokenizer", None)
        if self.tokenizer is None or not (self.writes_paths or hasattr(processor, "image_processor")):
            raise TypeError(
                "processor: expected the model's processor, with an image_processor and a tokenizer, got "
                f"{type(processor).__name__}; AutoProcessor.from_pretrained gives it (for the original Qwen-VL, "
                "AutoTokenizer)"
            )
        _require_own_image_token(model, processor)
        self._is_encoded = getattr(getattr(model.config, "text_config", None), "is_encoder_decoder", False)
        if template is not None:
            self._template: Template | None = require_template(template, "template")
        else:
            self._template = self._default_template()

    @property
    def image_processor(self) -> Any:
        """None of the original Qwen-VL, whose model opens images itself."""
        return getattr(self._processor, "image_processor", None)

    def texts(self, images: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """The prompt of each question, with the image where the model wants it."""
        return [self._text(image, question) for image, question in zip(images, questions)]

    def follow_up(self, question: str) -> str:
        """What the chat writes between an answer and the next one: the end of that turn, and another with an image and
        this question. Without a chat template, the end-of-sequence token and another prompt.

        Raises:
            UnsupportedModelError: the model takes no second image.
        """
        if self.writes_paths or self.model.config.model_type in _ONE_IMAGE:
            raise UnsupportedModelError(
                f"expected a model that takes a second image in a later turn, got {type(self.model).__name__} with "
                f"model_type {self.model.config.model_type!r}"
            )
        if self._template is not None:
            prompt = self._text(None, question)
            bos = self.tokenizer.bos_token if self._has_bos(prompt) else ""
            return f"{self.tokenizer.eos_token or ''}{prompt.removeprefix(bos).lstrip(' ')}"
        turn = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": _SOME_ANSWER}]},
            {"role": "user", "content": turn},
        ]
        text = str(self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        _, found, after = text.partition(_SOME_ANSWER)
        if not found:
            raise ValueError(
                "processor: expected a chat_template that writes the assistant's turns as they are; give a template of "
                f'your own, with "{IMAGE}" and "{QUESTION}" in it'
            )
        return after

    def encode(self, images: Sequence[Any], *passes: Sequence[str]) -> list[dict[str, Any]]:
        """The inputs of each of several passes over the same images: `passes` are lists of prompts, one per image.

        On the model's device, floats in its dtype. Pixels are computed once and shared by all passes.
        """
        if self.writes_paths:
            return [self._on_device(self._tokenize(texts)) for texts in passes]
        pictures = list(images)
        processor = copy.copy(self._processor)  # shallow: the caller's keeps its image processor
        processor.image_processor = _ComputedOnce(self._processor.image_processor)
        encoded: list[dict[str, Any]] = []
        for texts in passes:
            special = {"add_special_tokens": False} if self._has_bos(texts[0]) else {}
            inputs = dict(
                processor(
                    images=pictures,
                    text=list(texts),
                    padding=True,
                    padding_side="right" if self._is_encoded else "left",
                    return_tensors="pt",
                    **special,
                )
            )
            if "qformer_input_ids" in inputs:
                inputs |= _padded_right(inputs["qformer_input_ids"], inputs["qformer_attention_mask"])
            encoded.append(self._on_device(inputs, encoded[0] if encoded else {}))
        return encoded

    def encode_follow_ups(self, texts: Sequence[str], images: Sequence[Any], made: Any) -> dict[str, Any]:
        """The inputs of texts of `follow_up`, left-padded, without anything before them.

        Args:
            images: one for each text; only their number is looked at.
            made: what the image processor would make of the images to show, `preprocess`'s result.
        """
        processor = copy.copy(self._processor)
        processor.image_processor = _ComputedOnce(self._processor.image_processor, made)
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
        return self._on_device(dict(processor(images=list(images), text=list(texts), **options)))

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """(N,) tokens as text, without special tokens."""
        return str(self.tokenizer.decode(_as_list(tokens), skip_special_tokens=True)).strip()

    def decode_markup(self, tokens: Tensor | Sequence[int]) -> str:
        """(N,) tokens as text in which special tokens such as <|box_start|> stay, but for those that frame it."""
        frame = [getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        kept = [token for token in _as_list(tokens) if token not in frame]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False)).strip()

    # --- how ---

    def _default_template(self) -> Template | None:
        """None: the processor's chat template."""
        if self.writes_paths:
            is_chat = getattr(self.model.generation_config, "chat_format", None) == "chatml"
            return _CHATML if is_chat else QUESTION
        if getattr(self._processor, "chat_template", None) is not None:
            return None
        model_type = self.model.config.model_type
        if model_type not in PLAIN_FORMATS:
            raise ValueError(
                f"template: expected one, since the processor of this model ({model_type}) has no chat_template; give "
                f'the text of a prompt with "{IMAGE}" and "{QUESTION}" in it'
            )
        return PLAIN_FORMATS[model_type]

    def _text(self, image: Any, question: str) -> str:
        if self._template is None:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            return str(self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        if self.writes_paths:
            question = self.tokenizer.from_list_format([{"image": str(image)}, {"text": question}])
        if callable(self._template):
            return self._template(question)
        token = str(getattr(self._processor, "image_token", "<image>"))
        return token.join(fill(part, question) for part in self._template.split(IMAGE))

    def _has_bos(self, text: str) -> bool:
        """Whether the prompt brings its beginning-of-sequence token along, as some chat templates do."""
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Left-padded, with the id that the model pads with: Qwen-VL's tokenizer knows none."""
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        width = max(map(len, rows))
        pad = self.model.generation_config.pad_token_id
        if pad is None and any(len(row) < width for row in rows):
            raise ValueError("model: expected generation_config.pad_token_id to be set, which a batch is padded with")
        return {
            "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        }

    def _on_device(self, inputs: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`inputs` where the model is. What `first`, an earlier pass, has of the same pixels is taken from there."""
        moved: dict[str, Any] = {}
        for name, value in inputs.items():
            if first and name.startswith("pixel_values"):
                value = first[name]
            elif isinstance(value, Tensor):
                dtype = self.model.dtype if value.is_floating_point() else None
                value = value.to(device=self.model.device, dtype=dtype)
            moved[name] = value
        return moved


def require_template(template: object, name: str) -> Template:
    """Text with "{question}" in it, or a function."""
    if callable(template):
        return template
    if not isinstance(template, str):
        raise TypeError(f'{name}: expected text with "{QUESTION}" in it, or a function, got {describe(template)}')
    if QUESTION not in template:
        raise ValueError(f'{name}: expected "{QUESTION}" in it, where the question belongs, got {template!r}')
    return template


def fill(template: Template, question: str) -> str:
    return template.replace(QUESTION, question) if isinstance(template, str) else template(question)


def open_images(images: Sequence[Any], *, as_paths: bool) -> tuple[list[Any], list[tuple[int, int]]]:
    """The images for a `Prompter`, and the (height, width) of each.

    Args:
        images: Pillow images or paths. A file is turned as its EXIF orientation says; an image is taken as it is.
        as_paths: leave paths as they are, for the original Qwen-VL, which opens them itself and takes nothing else.

    Raises:
        TypeError: an image is something else; with as_paths, no path.
    """
    from PIL import Image, ImageOps

    opened: list[Any] = []
    sizes = []
    for i, image in enumerate(images):
        is_path = isinstance(image, (str, Path))
        if as_paths and not is_path:
            raise TypeError(
                f"images[{i}]: expected a path, since this model opens images itself, got {describe(image)}"
            )
        if not is_path and not isinstance(image, Image.Image):
            raise TypeError(f"images[{i}]: expected a Pillow image or a path, got {describe(image)}")
        if not is_path:
            opened.append(image.convert("RGB"))
            sizes.append(image.size[::-1])
            continue
        with Image.open(image) as file:
            opened.append(str(image) if as_paths else ImageOps.exif_transpose(file).convert("RGB"))
            sizes.append(file.size[::-1] if as_paths else opened[-1].size[::-1])
    return opened, sizes


class _ComputedOnce:
    """An image processor that keeps what it made for the passes that follow, which show the same images; or what was
    made elsewhere, in its place.
    """

    def __init__(self, image_processor: Any, made: Any = None) -> None:
        self._image_processor = image_processor
        self._made = made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._made is None:
            self._made = self._image_processor(*args, **kwargs)
        return copy.copy(self._made)  # processors add to it and take from it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)


def _as_list(tokens: Tensor | Sequence[int]) -> list[int]:
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)


def _padded_right(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    order = mask.argsort(dim=1, descending=True, stable=True)
    return {"qformer_input_ids": ids.gather(1, order), "qformer_attention_mask": mask.gather(1, order)}


def _require_own_image_token(model: Any, processor: Any) -> None:
    of_model = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
    of_processor = getattr(processor, "image_token_id", None)
    if None not in (of_model, of_processor) and of_model != of_processor:
        raise ValueError(
            f"processor: expected the one that belongs to the model, whose image token is {of_model}, got "
            f"{type(processor).__name__} whose image token is {of_processor}"
        )
