"""The rules of `make aot`, on made-up machine code: what fails, what is only noted, what can be accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton exists for Linux only")

from bench import aot, aot_table
from bench.aot_configurations import Configuration
from bench.aot_crops import CropConfiguration
from bench.aot_table import Entry, Finding, Table, broken_limit, broken_rules, differences, left_over

AMPERE = Configuration("forward", 80, "bf16", 128, "bias")
HOPPER = Configuration("forward", 90, "bf16", 128, "bias")
GOOD = Entry("128x64, 8 warps, 3 stages", 200, 0, 0, 99 * 1024, False, ("HMMA 500", "HMMA 530", "HMMA 600"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stack_bytes": 8}, "spills: 8 bytes"),
        ({"spills": 2}, "2 accesses"),
        ({"loops": ("HMMA 500", "FFMA 900")}, "no tensor-core instruction"),
        ({"loops": ()}, "no loop"),
        ({"shared_bytes": 99 * 1024 + 1}, "shared memory"),
        ({"serialized": True}, "serialized"),
    ],
)
def test_rules(change: dict, word: str) -> None:
    assert broken_rules(AMPERE, GOOD) == []
    (finding,) = broken_rules(AMPERE, replace(GOOD, **change))
    assert word in finding.what
    assert finding.is_rule


def test_rules_depend_on_type_and_architecture() -> None:
    assert broken_rules(HOPPER, replace(GOOD, shared_bytes=227 * 1024)) == []
    assert broken_rules(replace(AMPERE, dtype="fp32"), replace(GOOD, loops=("FFMA 900",))) == []


def test_rules_of_crops() -> None:
    """Levels take tensor cores, floating images none; the weights are no matrix product, and may not spill either."""
    without_tensor_cores = replace(GOOD, loops=("FFMA 900",))
    assert broken_rules(CropConfiguration("crop_resize", 80, "fp32", "batch"), without_tensor_cores) == []
    (finding,) = broken_rules(CropConfiguration("crop_resize", 80, "u8", "batch"), without_tensor_cores)
    assert "no tensor-core instruction" in finding.what
    (finding,) = broken_rules(CropConfiguration("crop_resize", 80, "u8", "batch"), replace(GOOD, loops=()))
    assert "no loop" in finding.what
    weights = CropConfiguration("crop_weights", 80, "u8", "list")
    assert broken_rules(weights, replace(GOOD, loops=())) == []
    (finding,) = broken_rules(weights, replace(GOOD, loops=(), stack_bytes=8))
    assert "spills" in finding.what


def test_limits() -> None:
    for configuration, limit in ((AMPERE, 545), (HOPPER, 375)):
        at_limit = replace(GOOD, loops=("HMMA 999", f"HMMA {limit}", "HMMA 999"))
        beyond = replace(GOOD, loops=("HMMA 1", f"HMMA {limit + 1}", "HMMA 1"))
        assert broken_limit(configuration, at_limit) == []
        assert [f.is_rule for f in broken_limit(configuration, beyond)] == [True]
    unbiased = replace(AMPERE, features="no bias")
    assert broken_limit(unbiased, replace(GOOD, loops=("HMMA 515", "HMMA 999"))) == []
    assert broken_limit(unbiased, replace(GOOD, loops=("HMMA 516", "HMMA 1")))
    assert broken_limit(unbiased, replace(GOOD, loops=()))


def found(new: Entry | None = None, old: Entry | None = GOOD, same_triton: bool = True, **change) -> list[Finding]:
    return differences("name", new or replace(GOOD, **change), old, same_triton)


def test_equal_and_shorter_code_passes() -> None:
    assert found() == []
    assert found(loops=("HMMA 499", "HMMA 530", "HMMA 600"), registers=255) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"loops": ("HMMA 500", "HMMA 531", "HMMA 600")}, "longer loop"),
        ({"loops": ("HMMA 400", "HMMA 531", "HMMA 500")}, "longer loop"),
        ({"loops": ("HMMA 500", "HMMA 530")}, "other loops"),
    ],
)
def test_growth_fails_with_the_same_triton_and_is_noted_with_another(change: dict, word: str) -> None:
    for same_triton in (True, False):
        (finding,) = found(same_triton=same_triton, **change)
        assert word in finding.what
        assert finding.is_note is not same_triton
        assert not finding.is_rule


@pytest.mark.parametrize("same_triton", [True, False])
def test_what_fails_with_any_triton(same_triton: bool) -> None:
    hopper = replace(GOOD, loops=("HGMMA 300", "HGMMA 350", "HMMA 400"))
    for old, new, word in (
        (None, GOOD, "not in the table"),
        (hopper, replace(GOOD, loops=("HGMMA 300", "HMMA 300", "HMMA 400")), "slower instructions"),
        (GOOD, replace(GOOD, tile="64x64, 4 warps, 2 stages", loops=("HMMA 900",)), "another tile"),
    ):
        (finding,) = found(new, old, same_triton)
        assert word in finding.what
        assert not finding.is_note
        assert not finding.is_rule


def test_faster_instructions_pass() -> None:
    assert found(loops=("HGMMA 300", "HGMMA 350", "HGMMA 400")) == []


def test_rows_that_nothing_ships() -> None:
    (finding,) = left_over(Table("3.7.1", {"a": GOOD, "b": GOOD}), {"b", "c"})
    assert finding.configuration == "a"


def test_stored_and_loaded_again(tmp_path: Path) -> None:
    """A line per configuration."""
    path = tmp_path / "table.json"
    assert Table.load(path) is None
    table = Table("3.7.1", {"a bias": GOOD, "b": replace(GOOD, serialized=True, loops=("HGMMA 300",))})
    table.save(path)
    assert Table.load(path) == table
    lines = path.read_text().splitlines()
    assert [json.loads("{" + line.rstrip(",") + "}").keys() for line in lines[3:5]] == [{"a bias"}, {"b"}]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    """`python -m bench.aot` without a compiler and with a table of its own; the entry that it is to find."""
    compiled = {"entry": GOOD}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("bench.aot_configurations.configurations", lambda every=False: [AMPERE])
    monkeypatch.setattr("bench.aot_crops.crop_configurations", lambda every=False: [])
    monkeypatch.setattr(aot_table, "limited_configurations", list)
    monkeypatch.setattr(aot, "compile_all", lambda chosen, _: (dict.fromkeys(chosen, compiled["entry"]), []))
    monkeypatch.setattr(aot_table, "PATH", tmp_path / "table.json")
    return compiled


def test_command(pretended: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert aot.main([]) == 1
    assert "make aot AOT_FLAGS=--accept" in capsys.readouterr().out
    assert aot.main(["--show"]) == 1

    pretended["entry"] = replace(GOOD, spills=3)
    assert aot.main(["--accept"]) == 1
    assert not aot_table.PATH.exists()
    assert "Rules cannot be accepted" in capsys.readouterr().out

    pretended["entry"] = GOOD
    assert aot.main(["--accept"]) == 0
    assert aot.main([]) == 0
    assert aot.main(["--show"]) == 0
    assert "forward sm_80 bf16 d128 bias" in capsys.readouterr().out

    pretended["entry"] = replace(GOOD, loops=("HMMA 501", *GOOD.loops[1:]))
    assert aot.main(["--only", "forward sm_80"]) == 1
    assert aot.main(["--only", "forward sm_70"]) == 1
    capsys.readouterr()
    monkeypatch.setattr("triton.__version__", "99.0")
    assert aot.main([]) == 0
    printed = capsys.readouterr().out
    assert "this is 99.0: longer loops are no failures" in printed
    assert "was HMMA 500" in printed


def test_not_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 1
