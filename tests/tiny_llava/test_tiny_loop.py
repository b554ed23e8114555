"""The training's loop: one that was interrupted ends as one that was not, a folder keeps one run, and it learns."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finegrain_ops.tiny_llava.model import embeddings_of, new_model
from finegrain_ops.tiny_llava.tokenizer import NUMBER_WORDS, vocabulary
from finegrain_ops.tiny_llava.training import loop, rendered
from finegrain_ops.tiny_llava.training.dense import dense_batch
from finegrain_ops.tiny_llava.training.loop import STATE, Run, Settings, Stage, schedule, weight_of_boxes
from finegrain_ops.tiny_llava.training.muon import Muon
from finegrain_ops.tiny_llava.training.packing import IGNORED, Packer
from packed_conversations import logits_of


def shrunk(stage: Stage, **changes: Any) -> Stage:
    """With two or three steps of a scene and two pictures each."""
    sizes = {"rows": min(stage.rows, 1), "dense_images": min(stage.dense_images, 2), "share_of_sheets": 0.5}
    return replace(stage, steps=3, warmup=2, **{**sizes, **changes})


TINY = Settings(
    num_scenes=48,
    tower=shrunk(Settings().tower),
    language=shrunk(Settings().language, share_of_crops=0.3),
    bfloat16=False,
)
STILL = {"lr": 0.0, "matrix_lr": 0.0}
STEPS = [("tower", 1), ("tower", 2), ("tower", 3), ("language", 1), ("language", 2), ("language", 3)]


def only(stage: str, settings: Settings = TINY, **changes: Any) -> Settings:
    """With no other stage."""
    others = {name: replace(of, steps=0) for name, of in settings.stages.items() if name != stage}
    return replace(settings, **others, **{stage: replace(settings.stages[stage], **changes)})


@pytest.fixture
def folder(scenes_folder, tmp_path) -> Path:
    """One in which the scenes are rendered."""
    return with_scenes(scenes_folder, tmp_path / "run")


def with_scenes(scenes_folder: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("train.npy", "train.jsonl"):
        shutil.copy(scenes_folder / name, folder / name)
    return folder


def groups_of(run: Run) -> list[dict[str, Any]]:
    return [group for optimizer in run._optimizers for group in optimizer.param_groups]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    named = [*run.model.state_dict().items(), *((f"head.{k}", v) for k, v in run._head.state_dict().items())]
    return {name: weight.clone() for name, weight in named}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def whole(scenes_folder, tmp_path_factory) -> Run:
    """A run from beginning to end."""
    run = Run(with_scenes(scenes_folder, tmp_path_factory.mktemp("whole") / "run"), TINY, workers=1)
    assert list(run.train()) == STEPS
    return run


def take(run: Run, count: int, seconds_between_states: float) -> None:
    """So many steps, and no more."""
    steps = run.train(seconds_between_states)
    assert [next(steps) for _ in range(count)]
    steps.close()


@pytest.mark.parametrize(
    ("taken", "seconds_between_states", "first_left"),
    [
        pytest.param([2], 0.0, 2, id="in the first stage"),
        pytest.param([3], 0.0, 3, id="between the stages"),
        pytest.param([4], 0.0, 4, id="in the second stage"),
        pytest.param([1, 3, 1], 0.0, 5, id="several times"),
        pytest.param([2], 1e9, 0, id="before any state was stored"),
        pytest.param([5], 1e9, 3, id="with steps after the last state"),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    taken: list[int], seconds_between_states: float, first_left: int, folder: Path, whole: Run
) -> None:
    for count in taken:
        take(Run(folder, TINY, workers=1), count, seconds_between_states)
    run = Run(folder, TINY, workers=1)
    assert not run.is_finished
    assert list(run.train()) == STEPS[first_left:]
    assert run.is_finished
    assert same_weights(weights_of(run), weights_of(whole))
    facts, expected = ([{**row, "seconds": 0} for row in of.history] for of in (run, whole))
    assert facts == expected
    seconds = [row["seconds"] for row in run.history]
    assert seconds == sorted(seconds)
    assert run.seconds == seconds[-1] > 0


def test_a_finished_run_is_there_and_has_nothing_left(whole: Run) -> None:
    again = Run(whole._path.parent, TINY, workers=1)
    assert again.is_finished
    assert same_weights(weights_of(again), weights_of(whole))
    assert again.history == whole.history
    assert list(again.train()) == []


def test_going_on_with_the_same_run_is_going_on(folder: Path, whole: Run) -> None:
    """With `train` called again."""
    run = Run(folder, TINY, workers=1)
    take(run, 5, 0.0)
    assert list(run.train()) == STEPS[5:]
    assert same_weights(weights_of(run), weights_of(whole))


def test_a_state_that_could_not_be_stored_leaves_the_last_one(folder: Path, monkeypatch) -> None:
    take(Run(folder, TINY, workers=1), 2, 0.0)
    run = Run(folder, TINY, workers=1)

    def half(state: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        take(run, 1, 0.0)
    assert Run(folder, TINY, workers=1)._done == {"tower": 2, "language": 0}


OTHERS = {
    "seed": replace(TINY, seed=1),
    "num_scenes": replace(TINY, num_scenes=47),
    "steps": replace(TINY, tower=replace(TINY.tower, steps=4)),
    "lr": replace(TINY, language=replace(TINY.language, lr=3e-3)),
    "bfloat16": replace(TINY, bfloat16=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_keeps_one_run(name: str, whole: Run) -> None:
    folder = whole._path.parent
    with pytest.raises(
        ValueError, match=r"folder: expected a run with these settings in .*; choose another folder, or"
    ):
        Run(folder, OTHERS[name], workers=1)
    with pytest.raises(ValueError, match=STATE):
        Run(folder, OTHERS[name], workers=1)


def test_another_seed_is_another_run(tmp_path) -> None:
    """From its first weights on, which are those of `new_model`; and the head's."""
    runs = {seed: Run(tmp_path, replace(TINY, seed=seed), workers=1) for seed in (0, 1)}
    for seed, run in runs.items():
        assert same_weights(run.model.state_dict(), new_model(seed).state_dict())
    first, second = (weights_of(run) for run in runs.values())
    assert same_weights(first, weights_of(Run(tmp_path, TINY, workers=1)))
    assert {"head.dot.weight", "model.language_model.norm.weight"} & changed(first, second) == {"head.dot.weight"}
    assert len(changed(first, second)) > 50


# --- what is trained ---


def test_what_each_stage_trains(folder: Path) -> None:
    """The tower and what says what it sees: projector, words and head; and all. Of the tower's last norm, which LLaVA
    does not use, nothing changes; and biases of keys have no effect on attention.
    """
    some_of_all = {name: replace(stage, dense_images=8) for name, stage in TINY.stages.items()}
    run = Run(folder, replace(TINY, **some_of_all), workers=1)
    steps, before = run.train(), weights_of(run)
    fixed = {name for name in before if "post_layernorm" in name or "position_ids" in name or "k_proj.bias" in name}
    seeing = ("vision_tower", "multi_modal_projector", "embed_tokens")
    of_tower = {name for name in before if name.startswith("head.") or any(part in name for part in seeing)}
    for name, trained in {"tower": of_tower, "language": set(before)}.items():
        for _ in range(TINY.stages[name].steps):
            next(steps)
        after = weights_of(run)
        assert trained - fixed <= changed(before, after) <= trained, name
        before = after


def test_the_language_model_begins_with_the_words_that_the_tower_learnt(folder: Path) -> None:
    """It says them as it reads them."""
    run = Run(folder, only("language", **STILL), workers=1)
    words = run.model.get_input_embeddings().weight
    with torch.no_grad():
        words += torch.randn_like(words)
    take(run, 1, 1e9)
    assert torch.equal(run.model.get_output_embeddings().weight, words)
    with torch.no_grad():
        words += 1
    run.save()
    resumed = Run(folder, only("language", **STILL), workers=1)
    take(resumed, 1, 1e9)
    assert not torch.equal(resumed.model.get_output_embeddings().weight, resumed.model.get_input_embeddings().weight)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_towers_share_of_the_learning_rate(share: float, folder: Path) -> None:
    run = Run(folder, only("language", tower_lr=share), workers=1)
    start = weights_of(run)
    assert list(run.train()) == STEPS[3:6]
    names = changed(start, weights_of(run))
    assert any("vision_tower" in name for name in names) == (share > 0)
    assert any("language_model" in name for name in names)
    groups = groups_of(run)
    tower = {id(weight) for weight in run.model.model.vision_tower.parameters()}
    last = run.history[-1]["lr"] / TINY.language.matrix_lr  # of the highest
    assert last > 0
    for optimizer, highest in zip(run._optimizers, (TINY.language.matrix_lr, TINY.language.lr)):
        for group in optimizer.param_groups:
            (is_tower,) = {id(weight) in tower for weight in group["params"]}
            assert group["lr"] == pytest.approx(last * highest * (share if is_tower else 1.0))
    assert sum(len(group["params"]) for group in groups) == len([*run.model.parameters(), *run._head.parameters()])


def test_muon_trains_the_layers_matrices_and_adamw_the_rest(folder: Path) -> None:
    """Rows of embeddings and of the output are words, each with a step of its own."""
    run = Run(folder, only("language"), workers=1)
    take(run, 1, 1e9)
    muon, adamw = run._optimizers
    assert (type(muon), type(adamw)) == (Muon, torch.optim.AdamW)
    names = {id(weight): name for name, weight in [*run.model.named_parameters(), *run._head.named_parameters()]}
    of_muon = {names.pop(id(weight)) for group in muon.param_groups for weight in group["params"]}
    of_layers = {name for name, weight in run.model.named_parameters() if ".layers." in name and weight.ndim == 2}
    projector = {name for name, weight in run.model.named_parameters() if "projector" in name and weight.ndim == 2}
    assert len(of_layers) == 52
    assert of_muon == of_layers | projector
    assert {id(weight) for group in adamw.param_groups for weight in group["params"]} == set(names)


def test_vectors_and_embeddings_do_not_decay(folder: Path) -> None:
    run = Run(folder, only("language"), workers=1)
    take(run, 1, 1e9)
    decays = {id(weight): group["weight_decay"] for group in groups_of(run) for weight in group["params"]}
    named = {**dict(run.model.named_parameters()), **dict(run._head.named_parameters())}
    assert len(decays) == len(named)
    embeddings = {id(weight) for weight in embeddings_of(run.model).parameters()}
    embeddings |= {id(of.weight) for of in (run.model.get_input_embeddings(), run.model.get_output_embeddings())}
    for name, weight in named.items():
        assert decays[id(weight)] == (0.0 if weight.ndim == 1 or id(weight) in embeddings else 0.05), name


def test_the_learning_rate_rises_and_falls(whole: Run) -> None:
    """Written out: over the warm-up linearly, times a half cosine from 1 to `final`."""
    for name, stage in TINY.stages.items():
        rates = [row["lr"] for row in whole.history if row["stage"] == name]
        cosine = (1 + np.cos(np.pi * np.arange(stage.steps) / stage.steps)) / 2
        warm = np.minimum(1, np.arange(1, stage.steps + 1) / stage.warmup)
        expected = stage.matrix_lr * warm * (stage.final + (1 - stage.final) * cosine)
        assert rates == pytest.approx(expected.tolist())
    long = replace(TINY.tower, steps=1000, warmup=10, final=0.02)
    factors = [schedule(step, long) for step in range(1001)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] > 0.99
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[500] == pytest.approx(0.51)
    assert factors[1000] == pytest.approx(0.02)


def test_history_has_what_each_stage_is_about(whole: Run) -> None:
    assert [(row["stage"], row["step"]) for row in whole.history] == STEPS
    for row in whole.history:
        assert np.isfinite(row["dense"])
        assert {"loss", "right"} & row.keys() == ({"loss", "right"} if row["stage"] == "language" else set())
        shares = row.keys() & {"right", "colour", "shape", "letter", "dot", "count", "edges"}
        assert len(shares) > 1  # two pictures need not show all
        assert all(0 <= row[name] <= 1 for name in shares)


@pytest.mark.parametrize("name", ["scenes", "crops"])
def test_the_language_loss_is_of_each_next_token_that_is_learnt(name: str, folder: Path, monkeypatch) -> None:
    """From the logits of the whole model, for what was packed; and how many of these tokens it would have said."""
    batches: list[Any] = []
    pack = getattr(Packer, name)
    monkeypatch.setattr(Packer, name, lambda *arguments: batches.append(pack(*arguments)) or batches[-1])
    run = Run(folder, only("language", rows=2, **STILL, share_of_crops=float(name == "crops")), workers=1)
    take(run, 1, 1e9)
    (batch,) = batches
    logits = logits_of(new_model(0), batch.inputs)
    terms, weights, hits = [], [], []
    for row, place in (batch.labels != IGNORED).nonzero().tolist():
        said, label = logits[row, place - 1], batch.labels[row, place].item()
        terms.append(-said.log_softmax(-1)[label].item())
        weights.append(0.1 if vocabulary()[label] in NUMBER_WORDS else 1.0)  # in the first step
        hits.append(said.argmax().item() == label)
    assert set(weights) == ({0.1, 1.0} if name == "scenes" else {1.0})
    assert run.history[0]["loss"] == pytest.approx(np.average(terms, weights=weights), rel=1e-4)
    assert run.history[0]["right"] == pytest.approx(np.mean(hits))


def test_the_second_stages_gradient_is_that_of_both_losses(folder: Path, data) -> None:
    """Clipped to a norm of 1."""
    run = Run(folder, only("language", **STILL), workers=1)
    take(run, 1, 1e9)
    weights = [weight for group in groups_of(run) for weight in group["params"]]
    found = [None if weight.grad is None else weight.grad.clone() for weight in weights]
    run.model.zero_grad()
    run._head.zero_grad()
    rng = np.random.default_rng((0, 1, 0))
    of_language, _ = run._language_loss(run.settings.language, 0, data, Packer(), rng)
    of_tower, _ = run._dense_loss(run.settings.language, data, rng)
    assert of_language.item() > run.history[0]["loss"]  # where it looks counts too
    assert run.history[0]["dense"] == pytest.approx(of_tower.item(), rel=1e-5)
    expected = torch.autograd.grad(of_language + 0.5 * of_tower, weights, allow_unused=True)
    norm = torch.stack([gradient.norm() for gradient in expected if gradient is not None]).norm()
    assert norm > 1
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b / norm, rtol=1e-3, atol=1e-6)


def test_where_it_looks_counts_by_its_weight(folder: Path, data) -> None:
    run = Run(folder, TINY, workers=1)
    losses = []
    for weight in (0.0, 0.3):
        stage = replace(TINY.language, looking=weight, share_of_crops=0.0)
        loss, facts = run._language_loss(stage, 0, data, Packer(), np.random.default_rng(0))
        losses.append(loss.item())
    assert losses[0] == pytest.approx(facts["loss"], rel=1e-5)
    assert 0 < facts["looks"] < 1
    assert 0.3 * 1.0 < losses[1] - losses[0] < 0.3 * 6.0  # -log of a share


def test_boxes_come_to_count() -> None:
    stage = replace(TINY.language, boxes_after=1000)
    weights = [weight_of_boxes(step, stage) for step in (0, 500, 1000, 5000)]
    assert weights == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert weight_of_boxes(0, replace(stage, boxes_after=0)) == 1.0


def recorded(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def record(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return function(*args, **options)

    return record


@pytest.mark.parametrize("stage", ["tower", "language"])
def test_the_towers_pictures_are_those_of_the_stage(stage: str, folder: Path, monkeypatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(loop, "dense_batch", recorded(dense_batch, calls))
    take(Run(folder, only(stage, dense_images=4, share_of_sheets=0.25), workers=1), 2, 1e9)
    assert len(calls) == 2
    for arguments, options in calls:
        named = inspect.signature(dense_batch).bind(*arguments, **options).arguments
        assert (named["size"], named["share_of_sheets"]) == (4, 0.25)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_steps_is_about_crops(share: float, folder: Path, monkeypatch) -> None:
    """Of twice as many, for they are short; no scene twice in a step, and others in each."""
    calls: dict[str, list[Any]] = {"scenes": [], "crops": []}
    for name, of in calls.items():
        monkeypatch.setattr(Packer, name, recorded(getattr(Packer, name), of))
    run = Run(folder, only("language", share_of_crops=share, rows=2), workers=1)
    take(run, 3, 1e9)
    assert [len(calls["scenes"]), len(calls["crops"])] == ([0, 3] if share else [3, 0])
    drawn = [args[2] for args, _ in [*calls["scenes"], *calls["crops"]]]
    assert all(len(set(indices)) == len(indices) == (4 if share else 2) for indices in drawn)
    assert len(set(map(tuple, drawn))) == 3


def test_bfloat16_computes_in_it_and_keeps_float32(folder: Path) -> None:
    run = Run(folder, only("language", replace(TINY, bfloat16=True), steps=1), workers=1)
    dtypes = []
    in_tower = next(module for name, module in run.model.named_modules() if name.endswith("mlp.fc1"))
    for module in (in_tower, run.model.lm_head, run._head.dot):
        module.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    list(run.train())
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32]  # the tower ran twice
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}
    assert all(np.isfinite(row["loss"] + row["dense"]) for row in run.history)


# --- it learns ---


def test_the_loss_falls_on_two_scenes(tmp_path, rendering_here, monkeypatch) -> None:
    """From that of guessing among all words to well below it; and more tokens are right."""
    monkeypatch.setattr(rendered, "multiprocessing", rendering_here)
    settings = replace(TINY, num_scenes=2)
    settings = only("language", settings, steps=20, lr=3e-3, final=1.0, rows=2, dense_images=1, share_of_crops=0.0)
    run = Run(tmp_path, settings, workers=1)
    list(run.train())
    losses, right = ([row[name] for row in run.history] for name in ("loss", "right"))
    assert losses[0] > 4
    assert np.mean(losses[-3:]) < 0.6 * losses[0]
    assert np.mean(right[-3:]) > 0.25 > right[0]
