"""What patching, steering and the methods need to know of a family of models: one module with the names of `Family`.

FAMILIES finds the module by the configuration's model_type. llava.py is the shortest example.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..families import ImageGrid
from .changes import Changes

FAMILIES = {  # model_type -> module beside this one
    "blip-2": "instructblip",
    "instructblip": "instructblip",
    "llava": "llava",
    "llava_next": "llava_next",
    "qwen": "qwen_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen2_vl",
    "tinygroundinggpt": "tinygroundinggpt.family",
}

ImageSizes = list[tuple[int, int]]  # original (height, width) of each image


@dataclass(frozen=True)
class ImageTokens:
    """One grid of tokens of one image: where they are among the keys, and what they show.

    An image is one such grid, or several (LLaVA-NeXT: the whole image, and its tiles put together).
    """

    image_index: int  # among all images of the batch, in the order of the prompts
    batch_index: int
    positions: Tensor  # (rows * columns,) int64: indices among the keys, row major over the grid
    grid: ImageGrid


class Family(Protocol):
    """One module per family; the functions are module-level."""

    def install(self, changes: Changes, model: nn.Module) -> Sequence[nn.Module]:
        """Gives `model` the keywords key_bias, row_gate and attention_reader, and returns the attention modules that
        heed them, in order. For a decoder: `decoder.install(changes, model, its language model)`. A model in which
        there is nothing to patch: UnsupportedModelError.
        """

    def vision_encoder(self, model: nn.Module) -> nn.Module:
        """The module whose forward takes pixels first and knows nothing of the text."""

    def key_shape(self, model: nn.Module, inputs: Any) -> tuple[int, int]:
        """(B, P) of a key_bias."""

    def image_keys(self, model: nn.Module, inputs: Any) -> Tensor:
        """(B, P) bool: the keys that show a place of an image."""

    def image_tokens(
        self, model: nn.Module, processor: Any, inputs: Any, image_sizes: ImageSizes
    ) -> Sequence[ImageTokens]:
        """The grids of all images, in the order of the images; ValueError where inputs do not fit image_sizes."""

    def read(self, model: nn.Module, inputs: Any, **patched: Any) -> None:
        """One forward pass, at least as far as the attention modules, with the keywords that `install` added. For a
        decoder: `decoder.read`.
        """

    def box_convention(self, processor: Any) -> str:
        """How the family's released checkpoints write boxes: a convention of `boxes.parse_boxes`, or "unit_view", 0..1
        of what is left of the image after preprocessing.
        """


def family_of(model_type: str) -> Family:
    return cast(Family, importlib.import_module(f".{FAMILIES[model_type]}", __package__))


def positions_of_images(inputs: Any, image_token_id: int, counts: list[int]) -> list[tuple[int, Tensor]]:
    """(batch index, positions) of each image's tokens, where counts[i] tokens of input_ids stand for image i. Images
    appear row by row of the batch.

    Raises:
        ValueError: inputs hold another number of image tokens, or an image is spread over two rows.
    """
    places = (inputs["input_ids"].cpu() == image_token_id).nonzero()  # (number of image tokens, 2)
    if len(places) != sum(counts):
        raise ValueError(
            f"inputs: expected {sum(counts)} image tokens for the {len(counts)} images of image_sizes, "
            f"got {len(places)}; pass what the processor returned for these images"
        )
    found = []
    for image_places in torch.split(places, counts):
        batch_index = int(image_places[0, 0])
        if bool((image_places[:, 0] != batch_index).any()):
            raise ValueError("inputs: the image tokens of one image are spread over two sequences of the batch")
        found.append((batch_index, image_places[:, 1]))
    return found
