"""The benchmarks of crop_resize: their cases, who is refused, what their rows hold and how these are shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import conftest, crop_agreement, crop_inputs, report
from bench.cases import causal
from bench.ceilings import Ceilings
from bench.crop_agreement import expected_crops, keep_correct_crops, levels_off
from bench.crop_cases import HD, MIXES, CropCase, crop_cases_for, small
from bench.crop_inputs import make_crop_inputs
from bench.markdown import SECTION, markdown
from bench.markers import markers
from bench.operations import CROP_RESIZE
from bench.peers import CropPeer, base_peer, crop_peers_for, start_all
from bench.peers.crop_pillow import ONE_THREAD, TWO_THREADS, pillow, pillow_and_copy
from bench.results import RowStore, load, newest, not_run_row, time_rows
from bench.tables import as_text

CPU = torch.device("cpu")
TINY = CropCase("tiny-k5", 5, "small", 24, image_sizes=((160, 200),))
TINY_CASES = [
    TINY,
    dataclasses.replace(TINY, name="several-k5", image_sizes=((160, 200), (155, 151))),
    dataclasses.replace(TINY, name="planes-k5", layout="planes", dtype=torch.bfloat16),
    CropCase("frame-k2", 2, "frame", 24, image_sizes=((90, 70),), dtype=torch.float16),
]
OURS, NEAR = "finegrain_ops pillow", "finegrain_ops interpolate, exact=False"
HOST = (OURS, NEAR, pillow(TWO_THREADS), pillow(ONE_THREAD), "F.interpolate uint8", "F.interpolate float32")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_cases(device_type: str) -> None:
    quick, full = crop_cases_for(device_type, "quick"), crop_cases_for(device_type)
    assert [case.id for case in full[: len(quick)]] == [case.id for case in quick]
    assert len({case.id for case in full}) == len(full)
    assert {case.num_boxes for case in full if case.mix == "mixed" and case.image_sizes == (HD,)} >= {1, 16, 64, 256}
    assert {case.mix for case in full} == set(MIXES)
    assert any(len(case.image_sizes) > 1 for case in full)
    assert {case.size for case in full} == {224, 336}
    assert any(case.dtype != torch.float32 for case in full) == (device_type == "cuda")


@pytest.mark.parametrize("case", [*TINY_CASES, *crop_cases_for("cuda")], ids=lambda case: case.id)
def test_boxes(case: CropCase) -> None:
    sides = MIXES[case.mix]
    for (x0, y0, x1, y1), image in zip(case.boxes(), case.image_index()):
        height, width = case.image_sizes[image]
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        if sides is None:
            assert (x1 - x0) * (y1 - y0) > 0.8 * height * width
        else:
            low, high = sides
            assert all(min(low, height, width) <= side <= high for side in (x1 - x0, y1 - y0))
    assert case.boxes() == case.boxes()


def test_bytes_count_each_pixel_once() -> None:
    case = dataclasses.replace(TINY_CASES[3], num_boxes=1)
    ((x0, y0, x1, y1),) = case.boxes()
    assert case.num_bytes() == 3 * (x1 - x0) * (y1 - y0) + 3 * 24 * 24 * 2
    twice = dataclasses.replace(TINY, num_boxes=200)  # boxes over boxes
    assert twice.num_bytes() <= 3 * 160 * 200 + 200 * 3 * 24 * 24 * 4


def test_a_case_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="mix 'large'"):
        CropCase("x", 1, "large", 24)
    with pytest.raises(ValueError, match="layout 'rows'"):
        CropCase("x", 1, "small", 24, layout="rows")


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.id)
def test_all_peers_agree(case: CropCase) -> None:
    peers, inputs = crop_peers_for("cpu"), make_crop_inputs(case, CPU)
    assert {image.is_contiguous() for image in inputs.images} == {case.layout == "planes"}
    calls, reasons = start_all(peers, inputs)
    calls, fields = keep_correct_crops(calls, peers, inputs, reasons)
    assert list(calls)[:2] == [OURS, NEAR]
    assert calls.keys() >= set(HOST)
    assert calls.keys() | reasons.keys() == {peer.name for peer in peers}
    assert fields.keys() == calls.keys()
    exact = [name for name, row in fields.items() if row["levels_allowed"] == 0]
    assert {OURS, pillow(TWO_THREADS), pillow(ONE_THREAD)} <= set(exact)
    assert {fields[name]["levels_off"] for name in exact} == {0.0}


def test_peers_of_a_gpu_agree_where_they_run_here() -> None:
    peers, inputs = crop_peers_for("cuda"), make_crop_inputs(TINY_CASES[1], CPU)
    calls, reasons = start_all(peers, inputs)
    calls, _ = keep_correct_crops(calls, peers, inputs, reasons)
    assert calls.keys() >= {pillow_and_copy(TWO_THREADS), pillow_and_copy(ONE_THREAD), "F.interpolate float32"}
    assert "transformers CLIPImageProcessorPil and copy" in calls


def off_by(amount: float, peer: CropPeer, **changes: object) -> CropPeer:
    """One whose last pixel is wrong."""

    def prepare(inputs):
        call = peer.prepare(inputs)

        def wrong_call():
            result = call().clone()
            result[-1, -1, -1, -1] += amount * inputs.multiplier[-1, 0, 0]
            return result

        return wrong_call

    return dataclasses.replace(peer, prepare=prepare, **changes)


def test_a_peer_that_is_off_is_refused_and_one_of_ours_fails() -> None:
    ours, *_ = peers = crop_peers_for("cpu")
    inputs = make_crop_inputs(TINY, CPU)
    theirs = next(peer for peer in peers if peer.name == pillow(ONE_THREAD))
    for levels, allowed, is_refused in ((1, 0, True), (-1, 0, True), (2, 3, False), (0.001, 0, False)):
        peer, reasons = off_by(levels, theirs, levels=allowed), {}
        calls, fields = keep_correct_crops({peer.name: peer.start(inputs)}, [peer], inputs, reasons)
        assert (peer.name not in calls) == is_refused
        assert ("levels off Pillow's" in reasons.get(peer.name, "")) == is_refused
        assert not fields or fields[peer.name] == {"levels_off": abs(round(levels, 1)), "levels_allowed": allowed}
    wrong = off_by(1, ours)
    with pytest.raises(AssertionError, match="nothing is timed"):
        keep_correct_crops({wrong.name: wrong.start(inputs)}, [wrong], inputs, {})


def test_what_is_no_result_is_infinitely_far_off() -> None:
    inputs = make_crop_inputs(TINY, CPU)
    expected = expected_crops(inputs)
    assert levels_off(expected, expected, inputs) == (0, 0)
    nan = expected.clone()
    nan[0, 0, 0, 0] = float("nan")
    for result in (nan, expected[1:], expected.half()):
        assert levels_off(result, expected, inputs) == (float("inf"), float("inf"))


def test_crops_a_pixel_beside_the_right_ones_are_refused() -> None:
    peer = next(peer for peer in crop_peers_for("cpu") if peer.name == "F.interpolate float32")
    inputs = make_crop_inputs(small(4), CPU)
    moved = dataclasses.replace(inputs, boxes=[(x0 + 1, y0, x1 + 1, y1) for x0, y0, x1, y1 in inputs.boxes])
    reasons: dict[str, str] = {}
    for start, is_refused in ((inputs, False), (moved, True)):
        calls, _ = keep_correct_crops({peer.name: peer.start(start)}, [peer], inputs, reasons)
        assert (peer.name not in calls) == is_refused
    assert "on average" in reasons[peer.name]


def test_without_pillow_the_definition_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_crop_inputs(TINY_CASES[1], CPU)
    with_pillow = expected_crops(inputs)
    monkeypatch.setattr(crop_agreement.importlib.util, "find_spec", lambda name: None)
    assert levels_off(expected_crops(inputs), with_pillow, inputs).most < 0.001


def test_without_scikit_image_a_drawing_is_cropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop_inputs.importlib.util, "find_spec", lambda name: None)
    crop_inputs._photograph.cache_clear()
    try:
        (image,) = make_crop_inputs(TINY, CPU).images
    finally:
        crop_inputs._photograph.cache_clear()
    assert image.shape == (3, 160, 200)
    assert image.dtype == torch.uint8
    assert image.float().std() > 20


def pretended_rows(device_type: str = "cpu") -> list[dict]:
    machine = {"device": device_type, "name": "Pretended", "threads": 2, "gpu": None, "versions": {"torch": "2.11"}}
    machine |= {"python": "3.12", "commit": "abc", "date": "2026-01-02T03:04:05+00:00", "command": "python -m pytest"}
    rows = []
    for count in (1, 16, 64):
        case = dataclasses.replace(TINY, name=f"tiny-k{count}", num_boxes=count)
        samples = {OURS: [0.5] * 15, NEAR: [0.25] * 15, pillow(TWO_THREADS): [1.0] * 15}
        measured = {
            name: {"levels_off": 2.0 * (name == NEAR), "levels_allowed": 3.0 * (name == NEAR)} for name in samples
        }
        rows += time_rows(case, machine, samples, Ceilings(None, 10.0), crop_peers_for("cpu"), measured)
        rows.append(not_run_row("time", case, "kornia crop_and_resize", machine, "kornia cannot be imported"))
    return rows


def test_rows() -> None:
    rows = {row["peer"]: row for row in pretended_rows() if row["case"]["num_boxes"] == 16}
    ours = rows[OURS]
    assert ours["operation"] == CROP_RESIZE
    assert ours["base"] == pillow(TWO_THREADS)
    assert ours["ratio_p50"] == 0.5
    assert ours["ratios"][NEAR] == [2.0, 2.0, 2.0]
    assert ours["gb_per_s"] == pytest.approx(ours["bytes"] / 0.5e-3 / 1e9, rel=1e-3)
    assert ours["share_of_ceiling"] == pytest.approx(ours["gb_per_s"] / 10, rel=1e-3)
    assert "tflops" not in ours
    assert ours["case"]["sides"] == MIXES["small"]


def test_on_a_gpu_the_base_is_the_loop_there() -> None:
    names = {peer.name for peer in crop_peers_for("cuda")}
    assert {"finegrain_ops triton", "finegrain_ops cuda", "F.interpolate float32"} <= names
    assert NEAR not in names
    assert base_peer(CROP_RESIZE, names) == "F.interpolate float32"


def test_tables_and_report(tmp_path: Path) -> None:
    rows = pretended_rows()
    text = markdown(rows)
    assert "**Regions cropped, resized and normalised (crop_resize).**" in text
    assert "GB/s (of the copy)" in text
    assert f"Over 3 cases ours / {pillow(TWO_THREADS)} is 0.50" in text
    assert f"Levels off Pillow's at most: 0 ({OURS}, {pillow(TWO_THREADS)}), 2 ({NEAR})." in text
    assert "| tiny-k16-float32 (K=16 of 30 to 150 px in 200x160, to 24x24) |" in text
    assert "kornia crop_and_resize not run in" in text
    assert "Ceilings measured in the same run: copy 10 GB/s." in text
    shown = as_text(rows, width=160)
    assert "levels off" in shown
    assert next(line for line in shown.splitlines() if NEAR in line).split()[-3:] == ["2", "of", "3"]

    results, readme, plots = tmp_path / "results", tmp_path / "README.md", tmp_path / "plots"
    RowStore(results).add(rows)
    assert load(results) == json.loads(json.dumps(rows))
    readme.write_text("\n".join(markers(SECTION)))
    report.main(["--results", str(results), "--readme", str(readme), "--plots", str(plots)])
    assert [path.name for path in plots.iterdir()] == ["pretended-crop_resize.png"]
    assert "(plots/pretended-crop_resize.png)" in readme.read_text()


def test_a_newer_commit_of_one_operator_leaves_the_rows_of_the_other(tmp_path: Path) -> None:
    crops = pretended_rows()
    attention = not_run_row(
        "time", causal(640, 64, torch.float32), "eager", {**crops[0]["machine"], "commit": "old"}, ""
    )
    store = RowStore(tmp_path)
    store.add([attention, *crops])
    assert [path.name for path in store.paths] == ["attention-pretended.jsonl", "crop-resize-pretended.jsonl"]
    assert [len(group) for group in newest(load(tmp_path))] == [1, len(crops)]


def test_operators_take_turns() -> None:
    names = ["test_attention.py"] * 3 + ["test_crop_resize.py"] * 2 + ["test_memory.py"]
    items = [SimpleNamespace(path=Path("bench") / name, number=number) for number, name in enumerate(names)]
    conftest.pytest_collection_modifyitems(items)
    assert [item.number for item in items] == [0, 3, 1, 4, 2, 5]
