"""DualFocus's training data (arXiv 2402.14767, Sec. 3.2 and 3.3): two rounds about one question in one sample.

    <image> Q1: please provide the bounding box coordinate of the region this question asks ... -> A1: [0.20, 0.41, ...]
    <crop>  Q2: please combine the information from these two images and answer ...             -> A2: the answer

Both rounds go through the model in one forward pass, with the true box in A1 and the crop around it in Q2.

Eq. 4 is L = L1(box) + L2(answer). The model's loss over the labels here is the mean over the tokens of both rounds at
once, as next-token training has it: with n1 and n2 tokens in a batch's boxes and answers (their ends counted),

    loss = (sum of -log p over the n1 + n2 tokens) / (n1 + n2) = (n1 * L1 + n2 * L2) / (n1 + n2)

where L1 and L2 are the means over their own tokens. So each token weighs the same, and a box, of more tokens than most
answers, more than its answer. Under gradient accumulation the Trainer divides by the tokens of all batches of a step.
`round_losses` gives L1 and L2 apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import Dataset

from ..boxes import Box
from ..families import ImageGrid
from ..geometry import clip_box
from ..integrations.image_processors import preprocess
from ..methods.box_style import BoxStyle
from ..methods.dualfocus import BOX_PROMPT, COMBINE_PROMPT
from ..methods.grounding import image_grids
from ..methods.prompting import Template, fill, require_template
from ..regions import dualfocus_crops
from .annotations.records import BoxedQuestion
from .conversations import ConversationBatch, answer_rounds, end_of_answers, prompter_on_cpu
from .images import ImageSource, open_image

__all__ = ["DualFocusCollator", "DualFocusDataset", "DualFocusSample", "dualfocus_rounds"]

# Of a batch, the boxes of each image in it and the images' sizes, as `handle.key_bias` takes them.
KeyBias: TypeAlias = Callable[[dict[str, Tensor], list[list[Box]], list[tuple[int, int]]], Tensor]


@dataclass(frozen=True)
class DualFocusSample:
    """A question about a Pillow image, its answer, and the box of what it asks about in the image's pixels. None: a
    question about the whole image, which is asked in one round (Eq. 5), as in the VQA data that the paper mixes in.
    """

    image: Any
    question: str
    answer: str
    box: Box | None = None


class DualFocusDataset(Dataset[DualFocusSample]):
    """Questions with boxes as samples; images are opened when they are asked for.

    Args:
        questions: any sequence of `BoxedQuestion`s; the box of one is the smallest around all its boxes.
        images: the folder that their paths are relative to, or a function from AnnotatedImage to a Pillow image.
    """

    def __init__(self, questions: Sequence[BoxedQuestion], images: ImageSource) -> None:
        self._questions, self._images = questions, images

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> DualFocusSample:
        question = self._questions[index]
        image = open_image(question.image, self._images)
        return DualFocusSample(image, question.question, question.answer, question.box)


class DualFocusCollator:
    """Samples as a batch for the Trainer (remove_unused_columns=False), or for model(**batch).

    Args:
        model: a model of a family that takes several images: LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, Qwen3-VL.
            Only its configuration is kept.
        processor: the model's.
        template: the prompt around a question, as of `methods.prompting.Prompter`.
        box_prompt, combine_prompt: Q1 and Q2, texts with "{question}" in them or functions of the question.
        box_convention: how the model is to write boxes, as of `DualFocus`, which then reads them: "unit" is the
            paper's, "auto" that for LLaVAs and otherwise the family's.
        margin: pixels around the square about the box, as of `regions.dualfocus_crops`.
        key_bias: makes batch["key_bias"], to train through reweighted attention on the true boxes with a patched model:
            `lambda *a: handle.key_bias(*a, weight=2.0)`. It is called with the batch, a list of boxes for each image
            ([] for crops) and the images' (height, width).

    Raises:
        ValueError: a prompt lacks "{question}", the convention is unknown, or the processor belongs to another model.
        UnsupportedModelError: the model takes one image only.
        UnsupportedInputError: `preprocess` does not know the processor; raised by the call.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        template: Template | None = None,
        box_prompt: Template = BOX_PROMPT,
        combine_prompt: Template = COMBINE_PROMPT,
        box_convention: str = "auto",
        margin: int = 25,
        key_bias: KeyBias | None = None,
    ) -> None:
        self._prompter = prompter_on_cpu(model, processor, template)
        self._processor = processor
        self._box_prompt = require_template(box_prompt, "box_prompt")
        self._combine_prompt = require_template(combine_prompt, "combine_prompt")
        self._box_style = BoxStyle.of_dualfocus(model.config.model_type, processor, box_convention)
        if self._box_style.convention == "unit_view" and model.config.model_type == "llava_next":
            raise ValueError('box_convention: expected "unit" or "unit_padded" for LLaVA-NeXT, got "unit_view"')
        self._margin = margin
        self._key_bias = key_bias
        self._end = end_of_answers(model, self._prompter)

    def __call__(self, samples: Sequence[DualFocusSample]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels (B, P), padded on the right, and the pixels of both rounds: image and
        crop of the first row, of the second, ...

        Raises:
            ValueError: there is no sample, a box has no area in its image, or a text holds special tokens of the model.
        """
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        images = [sample.image for sample in samples]
        sizes = [(image.height, image.width) for image in images]
        boxes = {i: sample.box for i, sample in enumerate(samples) if sample.box is not None}
        batch = ConversationBatch(self._prompter, self._end, len(samples))
        asked = [
            fill(self._box_prompt, sample.question) if i in boxes else sample.question
            for i, sample in enumerate(samples)
        ]
        inputs = batch.ask(asked, images)
        style = self._box_style
        grids: list[list[ImageGrid]] = [[] for _ in samples]
        if style.needs_grids:
            grids = image_grids(self._prompter.model, self._processor, inputs, sizes)
        said = [sample.answer for sample in samples]
        for i, box in boxes.items():
            said[i] = style.text(clip_box(box, sizes[i], f"samples[{i}].box"), sizes[i], grids[i])
        batch.answer(range(len(samples)), said)
        crops: list[Box] = []
        if boxes:
            zoomed, shown = list(boxes), [images[i] for i in boxes]
            crops = dualfocus_crops(list(boxes.values()), [sizes[i] for i in zoomed], margin=self._margin).tolist()
            made = preprocess(shown, [[crop] for crop in crops], self._processor)
            batch.ask_more(zoomed, [fill(self._combine_prompt, samples[i].question) for i in zoomed], shown, made)
            batch.answer(zoomed, [samples[i].answer for i in zoomed])
        finished = batch.finish()
        if self._key_bias is not None:
            left = iter(crops)
            shown_boxes: list[list[Box]] = []
            shown_sizes = []
            for i, size in enumerate(sizes):  # each image, and its crop after it, in which nothing is biased
                shown_boxes.append([boxes[i]] if i in boxes else [])
                shown_sizes.append(size)
                if i in boxes:
                    x0, y0, x1, y1 = map(int, next(left))
                    shown_boxes.append([])
                    shown_sizes.append((y1 - y0, x1 - x0))
            finished["key_bias"] = self._key_bias(finished, shown_boxes, shown_sizes)
        return finished


def dualfocus_rounds(labels: Tensor) -> Tensor:
    """For `round_losses`: 1 where a label belongs to a box, 2 where to an answer, 0 elsewhere; (B, P) int64."""
    rounds = answer_rounds(labels)
    # The answer comes last; questions about the whole image have nothing else.
    return (rounds + 2 - rounds.amax(1, keepdim=True)) * (rounds > 0)
