"""The passes of DualFocus over a batch, in one `PromptTree` (arXiv 2402.14767, App. A, Figs. 6-7).

trunk    what the prompts of both questions begin with: the image
  macro    the question, and the macro answer
  box      Q1, and the box
    zoom     the end of that turn, the crop, Q2
      micro    the micro answer
      macro again, where it is to be scored in the micro answer's context
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..boxes import Box
from ..errors import UnsupportedInputError
from ..integrations.image_processors import preprocess
from ..regions import dualfocus_crops
from .box_decoding import BoxSpeaker
from .decoding import Reciter, Speaker, TextSpeaker, rules_of, speak
from .generation import end_tokens
from .prompt_tree import PromptTree, Segment, left_padded, positions_in_prompts, token_rows
from .prompting import Prompter
from .reuse import images_of

BoxWriter: TypeAlias = TextSpeaker | BoxSpeaker | Reciter
Settings: TypeAlias = Mapping[str, Any]  # of `generate`
Crop: TypeAlias = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels of the image


@dataclass(frozen=True)
class Work:
    """What the decoder did in a phase: how often it ran, and over how many tokens of all rows, padding not counted."""

    forwards: int
    tokens: int


class InContext(NamedTuple):
    """Log probabilities in the context of the micro answer: of the box's tokens, and of the macro answer's."""

    box: Sequence[float]
    macro: Sequence[float]


@dataclass(frozen=True)
class _Prompt:
    """One row's prompts of both questions, of which the first num_shared tokens are the same."""

    macro: list[int]
    box: list[int]
    num_shared: int
    box_positions: Tensor  # (n,), or (3, n) with M-RoPE


@dataclass(frozen=True)
class Written:
    """One row's text: its tokens without the one that ends it, the log probability of each (None where it was not
    heard), and how many of the last were not run yet.
    """

    tokens: list[int]
    log_probabilities: list[float | None]
    num_unfed: int


class Passes:
    """A batch's tree, and the rows that are still asked about. Rows keep the numbers that they had in the batch.

    Args:
        prompter: of the model.
        macro, box: the inputs of the questions, and of Q1 about the same images.

    Raises:
        UnsupportedInputError: the two prompts do not begin alike up to the end of the image.
    """

    def __init__(self, model: Any, prompter: Prompter, macro: Mapping[str, Any], box: Mapping[str, Any]) -> None:
        self.rows = list(range(len(macro["input_ids"])))
        self._model = model
        self._prompter = prompter
        self._images = images_of(macro)
        self._prompts = self._shared_prompts(token_rows(macro), token_rows(box))
        self._tree = PromptTree(model, len(self.rows))
        self._trunk = self._tree.grow()
        self._box = self._trunk  # the branch of the box, once there is one

    @property
    def work(self) -> Work:
        """So far."""
        return Work(self._tree.forwards, self._tree.tokens)

    def keep(self, rows: Sequence[int]) -> None:
        self._tree.select([self.rows.index(row) for row in rows])
        self.rows = list(rows)

    # --- pass 1 ---

    def macro_speaker(self, generation: Settings, defaults: Settings) -> TextSpeaker:
        return self._text_speaker([self._prompts[row].macro for row in self.rows], generation, defaults)

    def free_box_speaker(self, generation: Settings, defaults: Settings) -> TextSpeaker:
        """Of a box, but it may write anything."""
        return self._text_speaker([self._prompts[row].box for row in self.rows], generation, defaults)

    def run_first(self, macro: TextSpeaker | None, box: BoxWriter | None) -> None:
        """Lets them write, at once where there are both."""
        opening: list[tuple[Segment, Speaker | None]] = []
        images: Mapping[str, Any] = {}
        if self.work.forwards == 0:
            shared = [prompt.box[: prompt.num_shared] for prompt in self._prompts]
            positions = [prompt.box_positions[..., : prompt.num_shared] for prompt in self._prompts]
            opening.append((self._tree.prompt(self._trunk, shared, positions), None))
            images = self._images
        prompts = [self._prompts[row] for row in self.rows]
        if macro is not None:
            macro.branch = self._tree.grow(self._trunk)
            own = [prompt.macro[prompt.num_shared :] for prompt in prompts]
            opening.append((self._tree.text(macro.branch, own), macro))
        if box is not None:
            box.branch = self._box = self._tree.grow(self._trunk)
            own = [prompt.box[prompt.num_shared :] + said for prompt, said in zip(prompts, box.pending())]
            opening.append((self._tree.text(box.branch, own), box))
        speak(self._tree, opening, images)

    def written(self, speaker: BoxWriter, generation: Settings) -> dict[int, Written]:
        """By row, what a speaker that the present rows had wrote with these settings."""
        ends = end_tokens(self._model, generation)["eos_token_id"]
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        written = {}
        for k, row in enumerate(self.rows):
            said, heard, num_unfed = speaker.said[k], list(speaker.log_probabilities[k]), len(speaker.unfed[k])
            has_end = bool(said) and said[-1] in ends
            written[row] = Written(said[:-1], heard[:-1], num_unfed - 1) if has_end else Written(said, heard, num_unfed)
        return written

    # --- pass 2 ---

    def crops(self, images: Sequence[Any], boxes: Sequence[Box], margin: int) -> tuple[list[Crop], Any]:
        """The crops of the rows' boxes, and what the image processor makes of them, on the model's device.

        Args:
            images: Pillow images of the rows.
        """
        sizes = torch.tensor([image.size[::-1] for image in images])
        crops = dualfocus_crops(torch.tensor(boxes, dtype=torch.float64), sizes, margin=margin)
        pixels = [torch.from_numpy(np.array(image)).to(self._model.device).permute(2, 0, 1) for image in images]
        made = preprocess(pixels, [crop[None] for crop in crops], self._prompter.image_processor)
        return [(x0, y0, x1, y1) for x0, y0, x1, y1 in crops.tolist()], made

    def run_second(
        self,
        questions: Sequence[str],
        images: Sequence[Any],
        made: Any,
        boxes: Sequence[Written],
        macro_answers: Sequence[Sequence[int]] | None,
        generation: Settings,
        defaults: Settings,
    ) -> tuple[TextSpeaker, list[InContext]]:
        """The micro answers of the present rows; with macro_answers also how likely these tokens are in their context.

        Args:
            questions: Q2 of each row.
            images: of each row; see `Prompter.encode_follow_ups`.
            made: of `crops`.
            boxes: what was written in pass 1.
        """
        tails = [self._prompter.follow_up(question) for question in questions]
        inputs = self._prompter.encode_follow_ups(tails, images, made)
        tail = token_rows(inputs)
        unfed = [box.tokens[len(box.tokens) - box.num_unfed :] for box in boxes]
        whole = [[*self._prompts[row].box, *box.tokens, *b] for row, box, b in zip(self.rows, boxes, tail)]
        positions = positions_in_prompts(self._model, whole, self._both(inputs))
        of_tail = [of_row[..., of_row.shape[-1] - len(b) :] for of_row, b in zip(positions, tail)]

        zoom = self._tree.grow(self._box)
        rest = Reciter([[*a[1:], b[0]] if a else [] for a, b in zip(unfed, tail)], zoom)
        again = None if macro_answers is None else Reciter(macro_answers)
        opening: list[tuple[Segment, Speaker | None]] = []
        if any(unfed):
            opening.append((self._tree.text(zoom, unfed), None if again is None else rest))
        # All but the last token, from which both the micro answer and the macro answer that is to be scored go on.
        before = self._tree.prompt(zoom, [row[:-1] for row in tail], [of_row[..., :-1] for of_row in of_tail])
        last, last_position = [row[-1:] for row in tail], [of_row[..., -1:] for of_row in of_tail]
        micro = self._text_speaker(whole, generation, defaults)
        micro.branch = self._tree.grow(zoom)
        if again is not None:
            again.branch = self._tree.grow(zoom)
        opening += [(before, None), (self._tree.prompt(micro.branch, last, last_position), micro)]
        if again is not None:
            own = [first + said for first, said in zip(last, again.pending())]
            opening.append((self._tree.text(again.branch, own), again))
        speak(self._tree, opening, images_of(inputs))
        if again is None:
            return micro, []
        of_boxes = [
            [*(heard for heard in box.log_probabilities if heard is not None), *of_rest[:-1]]
            for box, of_rest in zip(boxes, rest.log_probabilities)
        ]
        return micro, [InContext(a, b) for a, b in zip(of_boxes, again.log_probabilities)]

    # --- how ---

    def _shared_prompts(self, macro: list[list[int]], box: list[list[int]]) -> list[_Prompt]:
        image_token = self._model.config.image_token_id
        positions = positions_in_prompts(self._model, box, self._images)
        prompts = []
        for i, (a, b, of_row) in enumerate(zip(macro, box, positions)):
            alike = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            num_shared = min(alike, len(a) - 1, len(b) - 1)
            if image_token in a[num_shared:] or image_token in b[num_shared:]:
                raise UnsupportedInputError(
                    f"template: expected the image before the question, so that its keys and values can be shared, got "
                    f"prompts of questions[{i}] that differ before the end of the image"
                )
            prompts.append(_Prompt(a, b, num_shared, of_row))
        return prompts

    def _text_speaker(self, rows: Sequence[Sequence[int]], generation: Settings, defaults: Settings) -> TextSpeaker:
        pad = end_tokens(self._model, generation)["pad_token_id"]
        pad = 0 if pad is None else int(pad)
        ids, mask = left_padded(rows, pad, self._model.device)
        return TextSpeaker(rules_of(self._model, ids, mask, generation, defaults), ids, pad)

    def _both(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What M-RoPE needs to know of the two images of each row."""
        if "image_grid_thw" not in inputs:
            return {}
        first = self._images["image_grid_thw"][torch.tensor(self.rows, device=self._model.device)]
        return {"image_grid_thw": torch.stack([first, inputs["image_grid_thw"]], 1).flatten(0, 1)}
