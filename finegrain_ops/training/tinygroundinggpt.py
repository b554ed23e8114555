"""TinyGroundingGPT's samples as a dataset and batches for the Trainer.

    dataset = GroundingDataset(samples, "images/")                 # grounding_samples.py, alignment.py
    collate = GroundingCollator(processor)
    Trainer(model, TrainingArguments(..., remove_unused_columns=False), collate, dataset).train()

All images and object images of a batch are cropped, resized and normalised in one call, the processor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .conversations import IGNORED
from .grounding_samples import IMAGE, LOCATION, OBJECT, GroundingSample
from .images import ImageSource, open_image

__all__ = ["GroundingCollator", "GroundingDataset", "GroundingItem", "turn_labels"]

_HEADER = "<|im_start|>assistant\n"  # of Qwen2.5's dialogue


@dataclass(frozen=True)
class GroundingItem:
    """A sample and its Pillow image."""

    image: Any
    sample: GroundingSample


class GroundingDataset(Dataset[GroundingItem]):
    """Samples with their images, which are opened when they are asked for.

    Args:
        samples: any sequence of `GroundingSample`s.
        images: the folder that their paths are relative to, or a function from AnnotatedImage to a Pillow image.
    """

    def __init__(self, samples: Sequence[GroundingSample], images: ImageSource) -> None:
        self._samples, self._images = samples, images

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> GroundingItem:
        sample = self._samples[index]
        return GroundingItem(open_image(sample.image, self._images), sample)


class GroundingCollator:
    """Samples as a batch for the Trainer (remove_unused_columns=False), or for model(**batch).

    Labels are the assistant's turns, each with the <|im_end|> that ends it, and -100 elsewhere. The loss is the mean
    over their tokens.

    Args:
        processor: a TinyGroundingGPTProcessor, whose chat template writes ChatML.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        self._header = torch.tensor(tokenizer(_HEADER, add_special_tokens=False)["input_ids"])
        self._end = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def __call__(self, items: Sequence[GroundingItem]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels (B, P), padded on the right; pixel_values and dino_pixel_values of every
        image and object image in the order in which the rows show them.

        Raises:
            ValueError: there is no item, a text holds special tokens of the model, or the chat template is another.
        """
        if not items:
            raise ValueError("items: expected at least one, got none")
        for i, item in enumerate(items):
            self._require_plain(item.sample, f"items[{i}]")
        samples = [item.sample for item in items]
        texts = [self._processor.apply_chat_template(sample.messages, tokenize=False) for sample in samples]
        batch = self._processor(
            images=[item.image for item in items],
            text=texts,
            object_boxes=[list(sample.object_boxes) for sample in samples],
            location_boxes=[list(sample.location_boxes) for sample in samples],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels, num_turns = turn_labels(batch["input_ids"], self._header, self._end)
        for i, (sample, found) in enumerate(zip(samples, num_turns.tolist())):
            if found != len(sample.turns):
                raise ValueError(
                    f"processor: expected a chat_template that writes {_HEADER!r} before answers, got {found} of them "
                    f"for the {len(sample.turns)} answers of items[{i}]"
                )
        return {**batch, "labels": labels}

    def _require_plain(self, sample: GroundingSample, name: str) -> None:
        for turn in sample.turns:
            for text in turn:
                for token in self._processor.tokenizer.all_special_tokens:
                    if token in text and token not in (IMAGE, OBJECT, LOCATION):
                        raise ValueError(f"{name}: expected text without the special token {token!r}, got {text!r}")


def turn_labels(input_ids: Tensor, header: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """(B, P) labels: input_ids from after each `header` up to and with the next `end`, -100 elsewhere; and (B,) how
    many headers each row has.

    Args:
        input_ids: (B, P) int64.
        header: (n,) int64, the tokens before an answer.
        end: the token that ends it.
    """
    length, width = input_ids.shape[1], len(header)
    places = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    is_header = torch.zeros(len(input_ids), length + 1, dtype=torch.bool, device=input_ids.device)
    if length >= width:
        is_header[:, width:] = (input_ids.unfold(1, width, 1) == header.to(input_ids.device)).all(-1)
    # Where the last answer so far began, and the last end before here was; -1 for nowhere. What roll brings to the
    # first place is not read: no answer begins there.
    began = torch.where(is_header[:, :length], places, -1).cummax(1).values
    ended = torch.where(input_ids == end, places, -1).cummax(1).values.roll(1, 1)
    return torch.where(began > ended, input_ids, IGNORED), is_header.sum(1)
