"""The benchmark of DualFocus: its cases, inputs and peers, and what is counted of them, at a size that a CPU runs in a
second.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from bench.ceilings import Ceilings
from bench.dualfocus_agreement import require_same_answers
from bench.dualfocus_cases import DualFocusCase, dualfocus_cases_for
from bench.dualfocus_inputs import make_dualfocus_inputs
from bench.dualfocus_table import HEADER, work_lines
from bench.dualfocus_work import measured_fields, observe
from bench.generate_models import SHAPES
from bench.markdown import markdown
from bench.memory import peak_of_call_on_cpu
from bench.operations import DUALFOCUS, DUALFOCUS_ADAPTIVE, DUALFOCUS_OPERATIONS
from bench.peers import base_peer, peers_for, start_all
from bench.peers.dualfocus import (
    DUALFOCUS_OURS,
    HALF_SKIPPED,
    NAIVE,
    NO_JUMP_FORWARD,
    ONE_PLAIN_ANSWER,
    SHARES,
    NaiveAnswer,
    skipping,
)
from bench.results import operator, time_rows
from bench.tables import as_text

CPU = torch.device("cpu")
MACHINE = {
    "device": "cpu", "name": "Pretended", "threads": 2, "gpu": None, "versions": {"torch": "2"}, "python": "3",
    "commit": "c0ffee", "date": "2026-01-01T00:00:00+00:00", "command": "python -m pytest bench",
}  # fmt: skip
BOX_TOKENS = 24  # "[0.25, 0.31, 0.74, 0.80]"


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(
        SHAPES["llava-1.5-7b scaled down"], layers=2, hidden=64, heads=4, kv_heads=2, mlp=96, vision_layers=2,
        vision_hidden=32, vision_heads=2, image_grid=(6, 6),
    )  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", shape)


def case_of(operation: str, batch: int, questions: int) -> DualFocusCase:
    return DualFocusCase("tiny", "tiny", batch, questions, 24, operation, torch.float32)


def observed_of(case: DualFocusCase) -> tuple:
    inputs = make_dualfocus_inputs(case, CPU)
    with torch.no_grad():
        calls, reasons = start_all(peers_for(case.operation, "cpu"), inputs)
        assert not reasons
        observed = {name: observe(inputs, name, call) for name, call in calls.items()}
    return inputs, calls, observed


def rows_of(case: DualFocusCase, fields: dict[str, dict]) -> list[dict]:
    samples = {name: [10.0, 20.0, 30.0] for name in fields}
    return time_rows(case, MACHINE, samples, Ceilings(None, 30.0), peers_for(case.operation, "cpu"), fields)


@pytest.mark.parametrize(("batch", "questions"), [(1, 2), (2, 4)])
def test_answers_agree_and_become_rows(batch: int, questions: int) -> None:
    case = case_of(DUALFOCUS, batch, questions)
    inputs, calls, observed = observed_of(case)
    require_same_answers({name: one.results for name, one in observed.items()}, torch.float32)
    with torch.no_grad():
        fields = measured_fields(inputs, calls, observed)
    batches = questions // batch
    assert list(calls) == [DUALFOCUS_OURS, NO_JUMP_FORWARD, HALF_SKIPPED, NAIVE, ONE_PLAIN_ANSWER]
    assert [fields[name].get("skipped") for name in calls] == [0.0, 0.0, 0.5, None, None]

    # What the hook counts is what is written down here.
    assert fields[ONE_PLAIN_ANSWER]["forwards"] == batches * 5
    assert fields[ONE_PLAIN_ANSWER]["positions"] == questions * (36 + 24 + 4)
    assert fields[NAIVE]["forwards"] == batches * (5 + BOX_TOKENS + 5)
    assert fields[NAIVE]["box_steps"] == fields[NO_JUMP_FORWARD]["box_steps"] == batches * BOX_TOKENS
    assert fields[DUALFOCUS_OURS]["box_steps"] <= 0.5 * batches * BOX_TOKENS
    for name in (DUALFOCUS_OURS, NO_JUMP_FORWARD, HALF_SKIPPED):
        assert sum(fields[name]["phases_forwards"].values()) == fields[name]["forwards"]
        assert 0 < sum(fields[name]["phases_tokens"].values()) <= fields[name]["positions"]
    assert fields[NO_JUMP_FORWARD]["phases_forwards"]["macro_and_box"] == batches * BOX_TOKENS
    assert fields[DUALFOCUS_OURS]["phases_tokens"]["micro"] < fields[NAIVE]["positions"] / 3
    assert set(fields[NAIVE]["phases_ms"]) == {"macro", "box", "crop", "micro"}
    assert set(fields[HALF_SKIPPED]["phases_ms"]) == {"encode", "macro", "box", "crop", "micro"}
    assert all(of_peer["peak_bytes"] > 0 for of_peer in fields.values())

    rows = rows_of(case, fields)
    assert {row["base"] for row in rows} == {ONE_PLAIN_ANSWER}
    assert {operator(row) for row in rows} == {"dualfocus"}
    assert rows[0]["tokens_per_s"] == pytest.approx(1e3 * questions * 5 / 20.0)
    lines = {line[0]: dict(zip(HEADER, line, strict=True)) for line in work_lines(rows)}
    assert lines[HALF_SKIPPED]["skipped"] == "50%"
    assert lines[NAIVE]["forwards"] == "34"
    assert lines[ONE_PLAIN_ANSWER]["positions"] == "64"
    assert lines[NO_JUMP_FORWARD]["box steps"] == "24"
    assert float(lines[NAIVE]["ms per question"]) == 20.0 / questions
    text = markdown(rows)
    assert "| peer | skipped | ms per question |" in text
    assert "**DualFocus, from images and questions to answers.**" in text
    assert "macro_and_box" in as_text(rows, 250)


def test_each_threshold_skips_its_share() -> None:
    case = case_of(DUALFOCUS_ADAPTIVE, 2, 8)
    inputs, calls, observed = observed_of(case)
    require_same_answers({name: one.results for name, one in observed.items()}, torch.float32)
    assert list(calls) == [*(skipping(share) for share in SHARES), ONE_PLAIN_ANSWER]
    with torch.no_grad():
        fields = measured_fields(inputs, calls, observed)
    assert [fields[skipping(share)]["skipped"] for share in SHARES] == list(SHARES)
    assert fields[skipping(1.0)]["forwards"] == fields[ONE_PLAIN_ANSWER]["forwards"]  # nothing but the macro answer
    positions = [fields[skipping(share)]["positions"] for share in SHARES]
    assert positions[1:] == sorted(positions[1:], reverse=True)
    assert "100% skipped" in markdown(rows_of(case, fields))


def test_prompts_have_the_length_that_the_case_says() -> None:
    inputs = make_dualfocus_inputs(case_of(DUALFOCUS, 2, 4), CPU)
    prompt = f"USER: <image>\n{inputs.questions[0]} ASSISTANT:"
    encoded = inputs.processor(images=[inputs.images[0]], text=[prompt], return_tensors="pt")
    assert encoded["input_ids"].shape == (1, 36 + 24)
    assert inputs.processor.tokenizer.unk_token_id not in encoded["input_ids"]
    assert len(set(inputs.questions)) == 4
    tokens = inputs.processor.tokenizer("[0.25, 0.31, 0.74, 0.80]", add_special_tokens=False)["input_ids"]
    assert len(tokens) == BOX_TOKENS
    assert len(inputs.processor.tokenizer) == 32000  # so that all that a model says has a text


def test_answers_that_are_wrong_are_not_timed() -> None:
    _, _, observed = observed_of(case_of(DUALFOCUS, 2, 2))
    results = {name: one.results for name, one in observed.items()}
    first, second = results[DUALFOCUS_OURS]
    moved = replace(first, box=(0.0, 0.0, 1.0, 1.0))
    unsure = replace(first, macro=replace(first.macro, perplexity=1.01 * first.macro.perplexity))
    other = replace(first, micro=second.micro)
    for wrong, message in ((moved, "the box is"), (unsure, "macro answer: the perplexity is"), (other, "worse")):
        with pytest.raises(AssertionError, match=message):
            require_same_answers({**results, NO_JUMP_FORWARD: [wrong, second]}, torch.float32)
    with pytest.raises(AssertionError, match="is not the plain one"):
        require_same_answers({**results, ONE_PLAIN_ANSWER: ["", ""]}, torch.float32)
    with pytest.raises(ValueError, match="longer than argument 1"):
        require_same_answers({**results, DUALFOCUS_OURS: [first]}, torch.float32)


def test_in_half_precision_a_token_may_be_as_good_as_another() -> None:
    _, _, observed = observed_of(case_of(DUALFOCUS, 1, 2))
    results = {name: one.results for name, one in observed.items()}
    (first, *_), (naive, second) = results[DUALFOCUS_OURS], results[NAIVE]
    said = naive.macro
    for closeness, is_allowed in ((0.99, True), (0.5, False)):
        logits = torch.zeros_like(said.logits)
        logits[0, said.tokens[0]], logits[0, first.macro.tokens[0] + 1] = 10.0, 10.0 * closeness
        answer = NaiveAnswer(said.text, said.perplexity, said.tokens, logits)
        tokens = (first.macro.tokens[0] + 1, *first.macro.tokens[1:])
        ours = [replace(one, macro=replace(one.macro, tokens=tokens)) for one in results[DUALFOCUS_OURS][:1]]
        compared = {
            **results,
            NAIVE: [replace(naive, macro=answer), second],
            DUALFOCUS_OURS: [*ours, results[DUALFOCUS_OURS][1]],
            NO_JUMP_FORWARD: results[DUALFOCUS_OURS],
            HALF_SKIPPED: results[DUALFOCUS_OURS],
        }
        if is_allowed:
            require_same_answers(compared, torch.bfloat16)
        else:
            with pytest.raises(AssertionError, match=r"token 0 is .* worse"):
                require_same_answers(compared, torch.bfloat16)
        without_logits = {name: compared[name] for name in (NO_JUMP_FORWARD, DUALFOCUS_OURS, ONE_PLAIN_ANSWER)}
        require_same_answers(without_logits, torch.bfloat16)
        with pytest.raises(AssertionError, match="macro answer: "):
            require_same_answers(without_logits, torch.float32)


def test_the_peak_of_a_call_on_a_cpu() -> None:
    mib = 1 << 20

    def call() -> torch.Tensor:
        first = torch.zeros(10 * mib, dtype=torch.uint8)
        second = first + 1  # 20 MiB are held now
        del first
        return torch.cat([second, second[: 5 * mib]])  # and now 25

    assert peak_of_call_on_cpu(call) == pytest.approx(25 * mib, rel=1e-3)
    assert peak_of_call_on_cpu(lambda: None) == 0


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_cases(device_type: str) -> None:
    quick, full = dualfocus_cases_for(device_type, "quick"), dualfocus_cases_for(device_type)
    assert full[: len(quick)] == quick
    assert len({case.id for case in full}) == len(full)
    assert {case.operation for case in full} == set(DUALFOCUS_OPERATIONS)
    assert quick[0].operation == DUALFOCUS
    assert {case.model.endswith("scaled down") for case in full} == {device_type == "cpu"}
    assert {(case.prompt_tokens, case.new_tokens) for case in full} == {(640, 5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operation": "cof"}, "operation 'cof' is none of"),
        ({"questions": 5}, "an even number"),
        ({"batch": 3}, "whole batches"),
    ],
)
def test_cases_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(case_of(DUALFOCUS, 2, 4), **change)


def test_other_families_are_not_measured() -> None:
    case = replace(case_of(DUALFOCUS, 2, 4), model="qwen2.5-vl-3b scaled down")
    with pytest.raises(ValueError, match="LLaVA's processor, not with qwen2_5_vl's"):
        make_dualfocus_inputs(case, CPU)


def test_the_base_is_one_plain_answer() -> None:
    assert base_peer(DUALFOCUS, {DUALFOCUS_OURS, ONE_PLAIN_ANSWER}) == ONE_PLAIN_ANSWER
    assert base_peer(DUALFOCUS_ADAPTIVE, {skipping(0.5)}) is None
