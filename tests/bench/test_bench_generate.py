"""The benchmark of whole answers: its cases, models and peers, at a size that a CPU runs in a second."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from bench import generate_models
from bench.ceilings import Ceilings
from bench.generate_agreement import difference, keep_right_answers
from bench.generate_cases import GenerateCase, generate_cases_for
from bench.generate_inputs import GenerateInputs, make_generate_inputs
from bench.generate_models import SHAPES, make_prompts, sharing_weights
from bench.markdown import markdown
from bench.operations import GENERATE_DECODE, GENERATE_OPERATIONS, GENERATE_PREFILL
from bench.peers import base_peer, peers_for, start_all
from bench.peers.generate import EAGER_BIASED, PATCHED_BIASED, PATCHED_IDLE, UNPATCHED
from bench.results import time_rows

CPU = torch.device("cpu")
MACHINE = {
    "device": "cpu", "name": "Pretended", "threads": 2, "gpu": None, "versions": {"torch": "2"}, "python": "3",
    "commit": "c0ffee", "date": "2026-01-01T00:00:00+00:00", "command": "python -m pytest bench",
}  # fmt: skip
TINY = {
    name.removesuffix(" scaled down"): replace(
        shape, layers=2, hidden=64, heads=4, kv_heads=min(shape.kv_heads, 2), mlp=96, vision_layers=2, vision_hidden=32,
        vision_heads=2, image_grid=(6, 6), qformer_layers=2, qformer_hidden=96,
    )
    for name, shape in SHAPES.items()
    if name.endswith("scaled down")
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in TINY.items():
        monkeypatch.setitem(SHAPES, f"tiny {name}", shape)


def case_of(model: str, operation: str, batch: int = 2) -> GenerateCase:
    return GenerateCase("tiny", f"tiny {model}", batch, 24, operation, torch.float32, is_padded=batch > 1, new_tokens=3)


CASES = [
    *((model, phase) for model in ("llava-1.5-7b", "qwen2.5-vl-3b") for phase in (GENERATE_PREFILL, GENERATE_DECODE)),
    ("instructblip-vicuna-7b", GENERATE_PREFILL),
]


@pytest.mark.parametrize(("model", "operation"), CASES)
def test_answers_agree_and_become_rows(model: str, operation: str) -> None:
    case = case_of(model, operation)
    inputs = make_generate_inputs(case, CPU)
    with torch.no_grad():
        calls, reasons = start_all(peers_for(operation, "cpu"), inputs)
        assert not reasons
        fields = keep_right_answers(calls, torch.float32)
        again = {name: call() for name, call in calls.items()}  # a call leaves no trace that the next would find
        assert all(torch.equal(again[name], call()) for name, call in calls.items())
    assert fields[PATCHED_BIASED]["logits_off"] < 1e-4
    samples = {name: [1.0, 2.0, 3.0] for name in calls}
    rows = time_rows(case, MACHINE, samples, Ceilings(None, 30.0), peers_for(operation, "cpu"), fields)
    assert [row["peer"] for row in rows] == [PATCHED_BIASED, PATCHED_IDLE, UNPATCHED, EAGER_BIASED]
    assert all(row["base"] == UNPATCHED and row["ratio_p50"] == 1.0 for row in rows)
    image_tokens = 32 if model.startswith("instructblip") else 36
    num_tokens = 2 * 3 if operation == GENERATE_DECODE else 2 * image_tokens + 24 + 16
    assert rows[0]["tokens_per_s"] == pytest.approx(1e3 * num_tokens / 2.0)
    text = markdown(rows)
    assert "tokens per second" in text
    assert f"{1e3 * num_tokens / 2.0:.4g} tokens/s |" in text
    assert "B=2 padded" in text


def test_answers_that_are_wrong_are_not_timed() -> None:
    case = case_of("llava-1.5-7b", GENERATE_PREFILL)
    inputs = make_generate_inputs(case, CPU)
    peers = peers_for(GENERATE_PREFILL, "cpu")
    with torch.no_grad():
        calls, _ = start_all(peers, inputs)
        moved, _ = start_all(peers, replace(inputs, key_bias=2 * inputs.key_bias))
        idle, _ = start_all(peers, replace(inputs, key_bias=0 * inputs.key_bias))
        with pytest.raises(AssertionError, match="of the largest logit off"):
            keep_right_answers({**calls, PATCHED_BIASED: moved[PATCHED_BIASED]}, torch.float32)
        with pytest.raises(AssertionError, match="not unpatched to the bit"):
            keep_right_answers({**calls, PATCHED_IDLE: moved[PATCHED_BIASED]}, torch.float32)
        with pytest.raises(AssertionError, match="the bias changes nothing"):
            keep_right_answers(idle, torch.float32)


def test_peers_share_weights_and_nothing_else() -> None:
    inputs: GenerateInputs = make_generate_inputs(case_of("llava-1.5-7b", GENERATE_PREFILL), CPU)
    duplicate = sharing_weights(inputs.model)
    assert duplicate is not inputs.model
    assert all(a is b for a, b in zip(duplicate.parameters(), inputs.model.parameters()))
    duplicate.set_attn_implementation("eager")
    assert inputs.model.config._attn_implementation == "sdpa"


def test_decode_reads_the_prompt_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call processes new_tokens positions, no more; and its first token is the one that prefill gives."""
    inputs = make_generate_inputs(case_of("llava-1.5-7b", GENERATE_DECODE), CPU)
    rows = []
    forward = torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        if self.weight is inputs.model.model.language_model.layers[0].self_attn.q_proj.weight:
            rows.append(hidden.shape[1])
        return forward(self, hidden)

    peer = next(peer for peer in peers_for(GENERATE_DECODE, "cpu") if peer.name == PATCHED_BIASED)
    with torch.no_grad():
        call = peer.start(inputs)
        monkeypatch.setattr(torch.nn.Linear, "forward", counted)
        call()
    assert rows == [1, 1, 1]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_cases(device_type: str) -> None:
    quick, full = generate_cases_for(device_type, "quick"), generate_cases_for(device_type)
    assert {case.operation for case in quick} == set(GENERATE_OPERATIONS)
    assert full[: len(quick)] == quick
    assert len({case.id for case in full}) == len(full)
    assert {SHAPES[case.model].family for case in full} == {"llava", "qwen2_5_vl", "instructblip"}
    assert any(case.is_padded for case in full)
    is_scaled = {case.model.endswith("scaled down") for case in full}
    assert is_scaled == {device_type == "cpu"}
    assert all(case.prompt_tokens == int(case.name.split("-n")[1].split("-")[0]) for case in full)


def test_full_size_has_the_published_number_of_parameters() -> None:
    published = {"llava-1.5-7b": 7.06e9, "qwen2.5-vl-3b": 3.75e9, "instructblip-vicuna-7b": 7.91e9}
    for name, count in published.items():
        with torch.device("meta"):
            model = generate_models._MAKERS[SHAPES[name].family](SHAPES[name])
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.1), name


def test_padded_prompts_are_padded_on_the_left() -> None:
    inputs = make_prompts("tiny llava-1.5-7b", (24, 16), torch.float32, CPU)
    assert inputs["attention_mask"].sum(1).tolist() == [60, 52]
    assert inputs["attention_mask"][1, :8].sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"operation": "forward"}, "operation 'forward' is none of"), ({"batch": 1}, "at least 2 prompts, not 1")],
)
def test_cases_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(case_of("llava-1.5-7b", GENERATE_PREFILL), **change)


def test_the_base_is_the_unpatched_model() -> None:
    assert base_peer(GENERATE_DECODE, {PATCHED_BIASED, UNPATCHED}) == UNPATCHED
    assert base_peer(GENERATE_DECODE, {PATCHED_BIASED}) is None


def test_difference_is_relative_to_the_largest() -> None:
    assert difference(torch.tensor([1.0, 4.5]), torch.tensor([1.0, -5.0])) == pytest.approx(1.9)
