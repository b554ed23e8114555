"""Training on these batches: through reweighted attention, and by transformers' Trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import finegrain_ops
import talking_models
import tiny_tinygroundinggpt
from finegrain_ops.training.annotations import AnnotatedImage, BoxedPhrase, BoxedQuestion
from finegrain_ops.training.dualfocus import DualFocusCollator, DualFocusDataset, DualFocusSample
from finegrain_ops.training.grounding_samples import image_to_coordinate, text_to_coordinate
from finegrain_ops.training.tinygroundinggpt import GroundingCollator, GroundingDataset
from tiny_models import EagerOracle

SHORT = {"box_prompt": "Box? {question}", "combine_prompt": "Both: {question}"}
SIZES = ((60, 80), (48, 48), (48, 72))
BOXES = ((10, 20, 50, 50), None, (0, 0, 30, 48))


def samples() -> list[DualFocusSample]:
    images = talking_models.make_images(*SIZES)
    return [DualFocusSample(image, "What?", "This.", box) for image, box in zip(images, BOXES)]


def gradients(model: Any, **batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL"])
def test_gradients_through_reweighted_attention_are_those_of_eager_attention(name: str) -> None:
    """With the bias of the true boxes in eager attention's mask; of every parameter."""
    model, processor, _, template = talking_models.make(name)
    asked = []
    with finegrain_ops.patch(model, processor) as handle:

        def key_bias(batch, boxes, sizes):
            asked.append((boxes, sizes))
            return handle.key_bias(batch, boxes, sizes, weight=5.0)

        batch = DualFocusCollator(model, processor, template=template, key_bias=key_bias, **SHORT)(samples())
        bias = batch["key_bias"]
        ours = gradients(model, **batch)
    # Of each image its box, of the crops none.
    assert asked == [([[BOXES[0]], [], [], [BOXES[2]], []], [(60, 80), (60, 75), (48, 48), (48, 72), (48, 64)])]
    assert bias.shape == batch["input_ids"].shape
    values = bias.unique()
    assert values.tolist() == pytest.approx([0.0, math.log(5.0)], rel=1e-6)
    assert (bias != 0).any(1).tolist() == [True, False, True]
    del batch["key_bias"]
    with EagerOracle(model, bias) as oracle:
        expected = gradients(oracle, **batch)
    unbiased = gradients(model, **batch)
    assert ours.keys() == expected.keys()
    for parameter, gradient in expected.items():
        # Biases of keys have no gradient but that of rounding.
        error, size = (ours[parameter] - gradient).norm(), gradient.norm()
        assert error <= 1e-4 * size + 1e-6, parameter
    moved = [(expected[p] - unbiased[p]).norm() / (expected[p].norm() + 1e-6) for p in expected]
    assert sum(share > 0.01 for share in moved) > len(moved) / 2


def trainer(model: Any, collate: Any, dataset: Any, folder: Any, **options: Any) -> Any:
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    import transformers

    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **settings,
    )
    return transformers.Trainer(model=model, args=arguments, data_collator=collate, train_dataset=dataset)


def losses(of: Any) -> list[float]:
    of.train()
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


@pytest.fixture
def questions(tmp_path) -> DualFocusDataset:
    records = []
    for i, (image, box) in enumerate(zip(talking_models.make_images(*SIZES[::2]), BOXES[::2])):
        image.save(tmp_path / f"{i}.png")
        records.append(BoxedQuestion(AnnotatedImage(i, f"{i}.png", image.size[::-1]), i, "What?", "This.", (box,)))
    return DualFocusDataset(records, tmp_path)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_learns_both_rounds_through_reweighted_attention(tmp_path, questions, accumulated: int) -> None:
    """And its loss is the mean over the tokens of a step, whatever batches it has."""
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    model, processor, _, _ = talking_models.make("LLaVA-1.5")
    with finegrain_ops.patch(model, processor) as handle:
        collate = DualFocusCollator(model, processor, key_bias=lambda *a: handle.key_bias(*a, weight=3.0), **SHORT)
        with torch.no_grad():
            before = model(**collate([questions[0], questions[1]])).loss.item()
        of = trainer(
            model,
            collate,
            questions,
            tmp_path / "out",
            per_device_train_batch_size=2 // accumulated,
            gradient_accumulation_steps=accumulated,
        )
        history = losses(of)
    assert history[0] == pytest.approx(before, rel=1e-3)
    assert len(history) == 6
    assert history[-1] < 0.7 * history[0]


def test_the_trainer_learns_grounding(tmp_path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    model, processor = tiny_tinygroundinggpt.make_model(), tiny_tinygroundinggpt.make_processor()
    grounding = []
    for i, (image, box) in enumerate(tiny_tinygroundinggpt.make_scenes(4)):
        image.save(tmp_path / f"{i}.png")
        phrase = BoxedPhrase(AnnotatedImage(i, f"{i}.png", image.size[::-1]), "red box", (box,))
        grounding += [text_to_coordinate(phrase), image_to_coordinate(phrase)]
    data = GroundingDataset(grounding, tmp_path)
    history = losses(trainer(model, GroundingCollator(processor), data, tmp_path / "out", dataloader_num_workers=1))
    assert history[-1] < 0.7 * history[0]
