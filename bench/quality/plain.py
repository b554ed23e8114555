"""The model's answers without any method: transformers' own `generate`, greedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finegrain_ops.methods.prompting import Prompter
from finegrain_ops.tiny_llava.held_out import Asked, in_batches

from .asking import MAX_NEW_TOKENS, are_right
from .rows import Answers


def plain_answers(model: Any, processor: Any, asked: Sequence[Asked]) -> Answers:
    prompter = Prompter(model, processor)
    texts: list[str] = []
    for batch in in_batches(asked):
        images = [one.scene.image for one in batch]
        (inputs,) = prompter.encode(images, prompter.texts(images, [one.question.text for one in batch]))
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts += [prompter.decode(row) for row in tokens[:, inputs["input_ids"].shape[1] :]]
    return Answers("plain", {}, are_right(texts, asked), {})
