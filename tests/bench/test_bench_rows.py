"""Rows: stored, read again, as tables, in the README and as plots, from a pretended GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from bench.cases import SIZES, AttentionCase, cache, causal, llava_read_out, masked, packed
from bench.ceilings import Ceilings
from bench.markdown import SECTION, markdown
from bench.markers import markers, replace_between
from bench.operations import ATTENTION_OPERATIONS, BACKWARD, DECODE, FORWARD, MASKED, OPERATIONS, PACKED, READ_OUT
from bench.peers import SDPA_EFFICIENT_MASK, base_peer, ours, ours_unbiased, peers_for
from bench.results import RESULTS, RowStore, load, newest, not_run_row, time_rows
from bench.tables import as_text

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = markers(SECTION)
OURS, UNBIASED, FLASH, EAGER = "finegrain_ops triton", ours_unbiased("triton"), "SDPA flash unbiased", "eager"
MACHINE = {
    "device": "cuda",
    "name": "NVIDIA Pretended 9000",
    "threads": 8,
    "gpu": {"driver": "1", "cuda": "13"},
    "versions": {"torch": "2.11"},
    "python": "3.12",
    "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m pytest bench",
}


def pretended_rows(sizes: tuple[int, ...] = SIZES) -> list[dict]:
    rows = []
    ceilings = Ceilings(800.0, 4000.0)
    for size in sizes:
        for dtype in (torch.float16, torch.bfloat16):
            for case in (
                causal(size, 128, dtype),
                causal(size, 64, dtype, BACKWARD),
                cache(size, 80, dtype),
                packed(size, 96, dtype),
                causal(size, 64, dtype, READ_OUT),
                *([masked(size, 64, is_causal=False)] if dtype == torch.float16 else []),
            ):
                own = f"one forward, {OURS}" if case.operation == READ_OUT else UNBIASED
                ms = {OURS: 0.01 * size, own: 0.0098 * size, EAGER: 0.1 * size}
                if case.operation in (FORWARD, BACKWARD, DECODE):
                    ms[FLASH] = 0.008 * size
                if case.operation == MASKED:
                    ms = {ours("cuda"): 0.02 * size, SDPA_EFFICIENT_MASK: 0.025 * size}
                samples = {peer: [mean * (1 + 0.01 * step) for step in range(15)] for peer, mean in ms.items()}
                measured = {peer: {"error": 1e-3, "peak_bytes": 1 << 20} for peer in samples}
                rows += time_rows(case, MACHINE, samples, ceilings, peers_for(case.operation, "cuda"), measured)
                rows.append(not_run_row("time", case, "flash-attn unbiased", MACHINE, "it is not installed"))
    return rows


def test_rows_come_back_as_they_were_stored_and_are_there_at_once(tmp_path: Path) -> None:
    rows = pretended_rows((256, 512))
    store = RowStore(tmp_path)
    store.add(rows[:3])
    assert load(tmp_path) == json.loads(json.dumps(rows[:3]))
    store.add(rows[3:])
    assert [path.name for path in store.paths] == ["attention-nvidia-pretended-9000.jsonl"]
    assert load(tmp_path) == json.loads(json.dumps(rows)) == json.loads(json.dumps(store.rows))
    (group,) = newest(load(tmp_path))
    assert len(group) == len(rows)


def test_without_a_folder_nothing_is_stored(tmp_path: Path) -> None:
    store = RowStore()
    store.add(pretended_rows((256,)))
    assert store.rows
    assert not store.paths


def test_a_row_names_its_base_and_ours_holds_the_ratios_to_all() -> None:
    rows = {row["peer"]: row for row in pretended_rows((1024,)) if row["operation"] == FORWARD}
    assert {row["base"] for row in rows.values() if row["reason"] is None} == {FLASH}
    assert rows[OURS]["ratio_p50"] == pytest.approx(1.25)
    assert rows[OURS]["ratios"][UNBIASED][1] == pytest.approx(1.0204, abs=1e-4)
    assert set(rows[OURS]["ratios"]) == {UNBIASED, FLASH, EAGER}
    assert "ratios" not in rows[EAGER]
    assert rows[OURS]["share_of_ceiling"] == pytest.approx(rows[OURS]["tflops"] / 800, rel=1e-3)


def test_a_forward_beside_a_read_out_of_few_rows_is_counted_as_a_forward() -> None:
    case = llava_read_out(2944, torch.bfloat16)
    samples = {name: [1.0] * 15 for name in (OURS, f"one forward, {OURS}")}
    peers, measured = peers_for(READ_OUT, "cuda"), {name: {} for name in samples}
    read_out, forward = time_rows(case, MACHINE, samples, Ceilings(800.0, 4000.0), peers, measured)
    assert forward["tflops"] == pytest.approx(4 * 32 * 2944**2 / 2 * 128 / 1e9, rel=1e-3)
    assert read_out["tflops"] < forward["tflops"] / 50
    assert forward["operation"] == READ_OUT


@pytest.mark.parametrize(
    ("operation", "ran", "base"),
    [
        (FORWARD, {"SDPA unbiased", FLASH}, FLASH),
        (DECODE, {"SDPA unbiased"}, "SDPA unbiased"),
        (PACKED, {UNBIASED, "flash-attn unbiased"}, UNBIASED),
        (PACKED, {"SDPA unbiased, per sequence", "flash-attn unbiased"}, "flash-attn unbiased"),
        (PACKED, {"SDPA unbiased, per sequence"}, "SDPA unbiased, per sequence"),
        (READ_OUT, {"one forward, finegrain_ops sdpa"}, "one forward, finegrain_ops sdpa"),
        (MASKED, {"SDPA unbiased", SDPA_EFFICIENT_MASK}, SDPA_EFFICIENT_MASK),
        (MASKED, {"SDPA unbiased"}, None),
        (FORWARD, {EAGER}, None),
    ],
)
def test_the_base_is_the_first_candidate_that_ran(operation: str, ran: set[str], base: str | None) -> None:
    assert base_peer(operation, ran) == base


def rows_with_a_mask(case: AttentionCase) -> list[dict]:
    """The CUDA kernels take 0.8 of the time that the memory-efficient kernel takes with a mask."""
    ms = {ours("cuda"): 0.8, SDPA_EFFICIENT_MASK: 1.0, "SDPA unbiased": 0.5}
    if case.operation == FORWARD:
        ms = {OURS: 0.6, **ms}
    samples = {peer: [mean] * 15 for peer, mean in ms.items()}
    measured = {peer: {} for peer in samples}
    return time_rows(case, MACHINE, samples, Ceilings(800.0, 4000.0), peers_for(case.operation, "cuda"), measured)


def test_the_ratio_of_the_cuda_kernels_to_a_mask_is_shown() -> None:
    """Where that is the base as the ratio of their row; beside another base in a column of its own."""
    rows = rows_with_a_mask(masked(1024, 64, is_causal=False))
    assert {row["base"] for row in rows} == {SDPA_EFFICIENT_MASK}
    text = markdown(rows)
    assert "0.8, 0.80x" in text
    assert "ours / SDPA memory-efficient with mask" not in text  # a summary needs more than one case
    assert "cuda / memory-efficient with mask" not in text
    assert "to mask" not in as_text(rows)

    rows = rows_with_a_mask(causal(1024, 64, torch.float16))
    (line,) = [line for line in markdown(rows).splitlines() if line.startswith("| causal-n1024-d64-float16 ")]
    (header,) = [line for line in markdown(rows).splitlines() if line.startswith("| case ")]
    cells = dict(zip(header.split(" | "), line.split(" | ")))
    assert cells["cuda / memory-efficient with mask"] == "0.80x"
    shown = as_text(rows, width=160).splitlines()
    assert any("to mask" in line for line in shown)
    assert next(line for line in shown if ours("cuda") in line).split()[-1] == "0.80"
    assert next(line for line in shown if OURS in line).split()[-1] == "0.60"


def test_both_kinds_of_masked_cases_are_summarized() -> None:
    rows = [row for is_causal in (True, False) for row in rows_with_a_mask(masked(512, 64, is_causal))]
    assert "Over 2 cases ours / SDPA memory-efficient with mask is 0.80, from 0.80 to 0.80." in markdown(rows)


def test_rows_from_before_there_were_operations_are_forward_passes(tmp_path: Path) -> None:
    old = {
        "kind": "time",
        "case": causal(640, 64, torch.float32).parameters() | {"id": "causal-n640-d64-float32"},
        "peer": "finegrain_ops sdpa",
        "reason": None,
        "machine": MACHINE,
        "rounds": 15,
        "error": 1e-6,
        "peak_bytes": None,
        **{f"{name}_ms": 1.0 for name in ("p20", "p50", "p80")},
        **{f"ratio_{name}": 1.1 for name in ("p20", "p50", "p80")},
    }
    for field in ("lengths", "read_rows"):
        del old["case"][field]
    (tmp_path / "attention-old.jsonl").write_text(json.dumps(old) + "\n")
    (row,) = load(tmp_path)
    assert row["operation"] == FORWARD
    assert "1.10x" in markdown([row])
    assert "causal-n640-d64" in as_text([row])


def test_the_stored_rows_of_the_repository_load() -> None:
    rows = load(RESULTS)
    assert rows
    assert {row["operation"] for row in rows} <= set(OPERATIONS)
    assert all(markdown(group) for group in newest(rows))


def test_markdown_has_a_table_per_operation() -> None:
    text = markdown(pretended_rows())
    for title in ("Forward.", "Forward and backward.", "Decode.", "Packed", "Read-out"):
        assert f"**{title}" in text
    assert "ours / own unbiased" in text
    assert "1.020x" in text
    assert "GB/s" in text
    assert "flash-attn unbiased not run in" in text
    assert "| flash-attn" not in text  # no column for a peer that ran nowhere
    assert "Ceilings measured in the same run: float16 matrix product 800 TFLOP/s" in text


def test_of_many_cases_the_readme_shows_the_quick_ones() -> None:
    rows = [row for row in pretended_rows() if row["operation"] == FORWARD]
    more = [json.loads(json.dumps(row).replace("-d128-", "-d129-")) for row in rows]
    text = markdown(rows + more)
    shown = sum(line.startswith("| causal") for line in text.splitlines())
    assert 1 < shown < 14
    assert f"{shown} of 28 cases are shown" in text
    assert "d129" not in text


def test_only_what_is_between_the_markers_changes() -> None:
    before, after = "# Title\n\ntext  \n", "\n\nmore | text\n\n"
    text = f"{before}{BEGIN}\nold\n{END}{after}"
    assert replace_between(text, SECTION, "new\n") == f"{before}{BEGIN}\nnew\n{END}{after}"


@pytest.mark.parametrize("text", ["no markers", BEGIN, END + BEGIN, BEGIN + END + BEGIN + END])
def test_a_readme_without_its_markers_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        replace_between(text, SECTION, "new")


def test_the_report_writes_plots_and_shows_them_in_the_readme(tmp_path: Path) -> None:
    RowStore(tmp_path / "results").add(pretended_rows())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    plots = tmp_path / "docs" / "benchmarks"
    report.main(["--results", str(tmp_path / "results"), "--readme", str(readme), "--plots", str(plots)])
    names = {f"nvidia-pretended-9000-{operation}.png" for operation in ATTENTION_OPERATIONS}
    assert {path.name for path in plots.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert all(f"(docs/benchmarks/{name})" in text for name in names)


def test_a_single_size_is_plotted_too(tmp_path: Path) -> None:
    from bench.plots import write_plots

    paths = write_plots(pretended_rows((1024,)), tmp_path)
    assert set(paths) == set(ATTENTION_OPERATIONS)


def test_a_spent_budget_starts_no_case_and_names_those_left_out(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--bench-device", "cpu", "--bench-set", "quick", "-q"]
    command += ["--bench-budget", "0", "--save-results", "--results-folder", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 skipped" in done.stdout
    assert "left out: --bench-budget 0 was used up" in done.stdout
    assert "decode-llava-decode-n640-float32" in done.stdout
    assert "crop_resize-mixed-k16-float32" in done.stdout
    assert "generate-decode-llava-1.5-7b-n640-b1-float32" in done.stdout
    assert "dualfocus-llava-1.5-7b-n640-b1-float32" in done.stdout
    assert not list(tmp_path.iterdir())
