"""The one command: trains, says how good the model is, and leaves a checkpoint, a curve and its history."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finegrain_ops.tiny_llava.checkpoint import facts_of, load
from finegrain_ops.tiny_llava.questions import KINDS
from finegrain_ops.tiny_llava.training import __main__ as command
from finegrain_ops.tiny_llava.training.curve import _smoothed, plot_curve
from finegrain_ops.tiny_llava.training.loop import Run, Settings


def tiny_settings(**options) -> Settings:
    stages = {
        name: replace(stage, steps=steps, warmup=1, rows=min(stage.rows, 1), dense_images=2)
        for steps, (name, stage) in enumerate(Settings().stages.items(), 2)
    }
    return Settings(num_scenes=48, **stages, **options)


@pytest.fixture
def run_command(monkeypatch, scenes_folder, tmp_path):
    """Calls it with tiny settings; gives the arguments of each validation."""
    validated: list[tuple[int, bool]] = []

    def validate(model, processor, count: int):
        validated.append((count, model.training))
        return {kind: {"macro": 0.125, "boxes": 0.5} for kind in KINDS}

    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("train.npy", "train.jsonl"):
        shutil.copy(scenes_folder / name, folder / name)
    monkeypatch.setattr(command, "Settings", tiny_settings)
    monkeypatch.setattr(command, "validate", validate)
    monkeypatch.setattr(command, "_VALIDATE_EVERY", 2)
    threads = torch.get_num_threads()

    def call(*arguments: str) -> list[tuple[int, bool]]:
        validated.clear()
        monkeypatch.setattr(sys, "argv", ["training", "--folder", str(folder), "--threads", "1", *arguments])
        command.main()
        return list(validated)

    call.folder = folder
    yield call
    torch.set_num_threads(threads)


def test_from_nothing_to_a_checkpoint(run_command, tmp_path, capsys) -> None:
    output = tmp_path / "output"
    counts = run_command("--seed", "3", "--output", str(output))
    assert [count for count, _ in counts] == [64, 400]  # after two steps of talking, and in the end
    facts = facts_of(output)
    assert facts["seed"] == 3
    assert facts["validation"]["count"] == {"macro": 0.125, "boxes": 0.5}
    trained = Run(run_command.folder, tiny_settings(seed=3), workers=1)
    assert trained.is_finished
    assert facts["minutes"] == pytest.approx(trained.seconds / 60)
    model, _ = load(output)
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.half().to(weight.dtype)), name
    lines = (run_command.folder / "history.jsonl").read_text().splitlines()
    assert [(row["stage"], row["step"]) for row in map(json.loads, lines)] == [
        ("tower", 1),
        ("tower", 2),
        ("language", 1),
        ("language", 2),
        ("language", 3),
    ]
    with Image.open(run_command.folder / "curve.png") as curve:
        assert curve.width > 300
        assert np.asarray(curve.convert("L")).std() > 5
    said = capsys.readouterr().out
    assert "12.5%" in said
    assert str(output) in said.replace("\n", "")


def test_the_same_command_again_goes_on_and_writes_into_its_folder(run_command) -> None:
    """From after the steps at which the model would have been validated before the end."""
    first = Run(run_command.folder, tiny_settings(seed=0), workers=1)
    steps = first.train(0.0)
    assert [next(steps) for _ in range(4)][-1] == ("language", 2)
    steps.close()
    assert run_command() == [(400, True)]
    load(run_command.folder / "checkpoint")
    finished = Run(run_command.folder, tiny_settings(seed=0), workers=1)
    assert finished.history[:4] == first.history
    assert len(finished.history) == 5


def test_other_options_want_another_folder(run_command) -> None:
    Run(run_command.folder, tiny_settings(seed=0), workers=1).save()
    with pytest.raises(ValueError, match="choose another folder"):
        run_command("--seed", "1")
    with pytest.raises(ValueError, match="choose another folder"):
        run_command("--bfloat16")


# --- its curve ---


def test_a_curve_of_one_half_alone(tmp_path) -> None:
    rows = [{"stage": "language", "seconds": k, "loss": 3.0 / (k + 1), "right": k / 9} for k in range(9)]
    plot_curve(rows, tmp_path / "curve.png")
    plot_curve(rows[:1], tmp_path / "one.png")
    with Image.open(tmp_path / "curve.png") as curve, Image.open(tmp_path / "one.png") as one:
        assert np.asarray(curve).std() > 5
        assert curve.size == one.size
        assert not np.array_equal(np.asarray(curve), np.asarray(one))


def test_values_are_smoothed_over_the_last_fifty() -> None:
    values = np.random.default_rng(0).random(130)
    expected = [values[max(0, i - 49) : i + 1].mean() for i in range(130)]
    assert _smoothed(values) == pytest.approx(expected)
