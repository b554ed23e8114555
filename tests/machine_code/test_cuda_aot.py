"""The rules of `python -m bench.cuda_aot` on made-up machine code, and its command with a made-up compiler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton exists for Linux only")

from bench import cuda_aot, cuda_aot_markdown, cuda_aot_table
from bench.cuda_aot_table import (
    ARCHITECTURES,
    CudaEntry,
    CudaTable,
    Finding,
    broken_rules,
    differences,
    left_over,
    tile_text,
)
from bench.cuda_machine_code import CudaCode
from bench.markers import markers
from finegrain_ops.backends.cuda.variants import Variant, all_variants

HALF = Variant("attention_forward", "half_t", 128, 80)
MATRIX = {
    ("half_t", 70): {"HMMA.884.F32.F32": 64},
    ("half_t", 75): {"HMMA.1688.F32": 64},
    ("half_t", 80): {"HMMA.16816.F32": 64},
    ("half_t", 90): {"HMMA.16816.F32": 64},
    ("bfloat16_t", 80): {"HMMA.16816.F32.BF16": 64},
    ("bfloat16_t", 90): {"HMMA.16816.F32.BF16": 64},
}


def code(variant: Variant, **change) -> CudaCode:
    matrix = MATRIX.get((variant.element, variant.architecture), {})
    good = CudaCode("nvcc 13.0.88", 128, 0, 0, 0, 0, matrix, 100, 4, 40, ("HMMA 500", "HMMA 1000", "HMMA 700"))
    return replace(good, **change)


def entry(variant: Variant = HALF, **change) -> CudaEntry:
    return replace(CudaEntry.of(variant, code(variant)), **change)


GOOD = entry()


def test_entry() -> None:
    # registers allow four blocks of four warps of 128 registers
    tile = HALF.tile
    assert GOOD.tile == f"{16 * tile.warps}x{tile.step}, {tile.warps} warps, {tile.blocks} blocks"
    assert (GOOD.registers, GOOD.loop, GOOD.loop_length) == (128, "HMMA 1000", 1000)
    assert GOOD.warps == GOOD.blocks * tile.warps
    assert GOOD.shared_bytes == HALF.shared_bytes
    assert CudaEntry.of(HALF, code(HALF, static_shared_bytes=1024)).shared_bytes == HALF.shared_bytes + 1024
    assert CudaEntry.of(HALF, code(HALF, loops=())).loop_length == 0


def test_what_the_system_keeps_of_shared_memory_is_counted_once() -> None:
    """cuobjdump counts it as static from sm_90 on, where the kernel has any of its own."""
    hopper = replace(HALF, architecture=90)
    for static, expected in ((0, 0), (1024, 0), (1024 + 512, 512)):
        assert (
            CudaEntry.of(hopper, code(hopper, static_shared_bytes=static)).shared_bytes - hopper.shared_bytes
            == expected
        )
    assert CudaEntry.of(hopper, code(hopper, static_shared_bytes=1024)) == CudaEntry.of(hopper, code(hopper))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stack_bytes": 8}, "spills: 8 bytes of stack"),
        ({"spills": 2}, "2 LDL and STL"),
        ({"spilled_bytes": 16}, "16 bytes by ptxas"),
        ({"disagreement": "ptxas counts"}, "ptxas counts"),
        ({"shared_bytes": 99 * 1024 + 1}, "and 101376 are there"),
        ({"blocks": 0}, "holds 0 blocks"),
        ({"matrix": {}}, "HMMA.16816 of half_t expected, got none"),
        ({"matrix": {"HMMA.1688.F32": 64}}, "got 64 HMMA.1688.F32"),
        ({"matrix": {"HMMA.16816.F32": 60, "HMMA.1688.F32": 4}}, "4 HMMA.1688.F32"),
        ({"matrix": {"HMMA.16816.F32.BF16": 64}}, "of half_t expected"),
        ({"loop": ""}, "no loop"),
        ({"wide_global_loads": 0}, "no 128-bit load from global memory"),
        ({"wide_shared_loads": 0}, "no 128-bit load from shared memory"),
    ],
)
def test_rules(change: dict, word: str) -> None:
    assert broken_rules(HALF, GOOD) == []
    (finding,) = broken_rules(HALF, replace(GOOD, **change))
    assert word in finding.what
    assert finding.is_rule
    assert finding.configuration == HALF.name


@pytest.mark.parametrize(("element", "architecture"), MATRIX)
def test_each_architecture_has_its_matrix_instruction(element: str, architecture: int) -> None:
    variant = Variant("attention_map", element, 64, architecture)
    assert broken_rules(variant, entry(variant)) == []
    for other, matrix in MATRIX.items():
        is_same = matrix == MATRIX[element, architecture]
        assert bool(broken_rules(variant, entry(variant, matrix=matrix))) is not is_same, other


def test_float32_has_none() -> None:
    variant = Variant("attention_map", "float", 64, 80)
    assert broken_rules(variant, entry(variant)) == []
    for change, word in (({"ffma": 0}, "no FFMA"), ({"matrix": {"HMMA.1684.F32.TF32": 8}}, "tensor cores")):
        (finding,) = broken_rules(variant, entry(variant, **change))
        assert word in finding.what


def test_known_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many and no more; and the list is to be kept short."""
    assert set(cuda_aot_table.KNOWN_SPILLS) <= {variant.name for variant in all_variants(ARCHITECTURES)}
    monkeypatch.setattr(cuda_aot_table, "KNOWN_SPILLS", {HALF.name: 7})
    assert broken_rules(HALF, entry(spills=7, stack_bytes=16, spilled_bytes=28)) == []
    for found, word in ((entry(spills=8, stack_bytes=16), "8 LDL and STL"), (GOOD, "take it out of KNOWN_SPILLS")):
        (finding,) = broken_rules(HALF, found)
        assert word in finding.what


@pytest.mark.parametrize(
    "variant",
    [Variant("merge_splits", "half_t", 128, 70), Variant("crop_weights", "float", 0, 75)]
    + [Variant("crop_resize", element, 0, 80) for element in ("byte_t", "bfloat16_t")],
    ids=lambda variant: variant.name,
)
def test_some_kernels_may_do_without_products_but_not_spill(variant: Variant) -> None:
    bare = CudaEntry.of(
        variant, code(variant, registers=64, matrix={}, wide_global_loads=0, wide_shared_loads=0, loops=())
    )
    assert broken_rules(variant, bare) == []
    assert len(broken_rules(variant, replace(bare, spills=1))) == 1


def test_the_limit_of_shared_memory_is_the_architectures() -> None:
    for architecture, kib in ((70, 96), (75, 64), (80, 99), (90, 227)):
        variant = Variant("attention_map", "half_t", 64, architecture)
        assert broken_rules(variant, entry(variant, shared_bytes=kib * 1024)) == []
        assert len(broken_rules(variant, entry(variant, shared_bytes=kib * 1024 + 1))) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"warps": GOOD.warps - 4, "registers": 168}, "fewer warps resident"),
        ({"loop": "HMMA 1021"}, "a longer loop"),
    ],
)
def test_worse_code_fails_with_the_same_compiler_and_is_noted_with_another(change: dict, word: str) -> None:
    for compiler in (GOOD.compiler, "NVRTC 12.9"):
        (finding,) = differences("name", replace(GOOD, compiler=compiler, **change), GOOD)
        assert word in finding.what
        assert "was 128 registers" in finding.what
        assert finding.is_note is (compiler != GOOD.compiler)
        assert not finding.is_rule


def test_code_as_good_passes() -> None:
    """More registers cost nothing as long as as many warps are resident."""
    for change in ({}, {"loop": "HMMA 1020"}, {"loop": "HMMA 900"}, {"registers": 160}, {"warps": GOOD.warps + 4}):
        assert differences("name", replace(GOOD, **change), GOOD) == []


def test_other_than_the_table() -> None:
    (finding,) = differences("name", GOOD, None)
    assert "not in the table" in finding.what
    (finding,) = differences("name", replace(GOOD, tile="64x16, 4 warps, 9 blocks"), GOOD)
    assert "another tile" in finding.what
    assert not finding.is_note
    (finding,) = left_over(CudaTable({"a": GOOD, "b": GOOD}), {"b", "c"})
    assert finding.configuration == "a"


def test_stored_and_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert CudaTable.load(path) is None
    table = CudaTable({"a": GOOD, "b": replace(GOOD, spilled_bytes=None, matrix={}, loop="")})
    table.save(path)
    assert CudaTable.load(path) == table
    assert len(path.read_text().splitlines()) == 5  # a line for the sources, and one for each


def test_the_committed_table_covers_every_variant_at_its_tile() -> None:
    table = CudaTable.load()
    assert table is not None
    variants = all_variants(ARCHITECTURES)
    assert list(table.entries) == [variant.name for variant in variants]
    for variant in variants:
        accepted = table.entries[variant.name]
        assert accepted.tile == tile_text(variant), variant.name
        assert accepted.shared_bytes == variant.shared_bytes, variant.name
        assert broken_rules(variant, accepted) == []


def test_the_committed_table_is_by_both_compilers() -> None:
    table = CudaTable.load()
    assert table is not None
    by_architecture = {a: {e.compiler for n, e in table.entries.items() if f"-sm_{a}" in n} for a in ARCHITECTURES}
    assert all(len(compilers) == 1 for compilers in by_architecture.values())
    assert next(iter(by_architecture[70])).startswith("NVRTC 12.")
    assert next(iter(by_architecture[75])).startswith("nvcc 13.")


def test_bfloat16_needs_the_registers_of_float16() -> None:
    """Which is why the sample holds few of its widths."""
    table = CudaTable.load()
    assert table is not None
    for name, accepted in table.entries.items():
        if "-bfloat16_t-" in name and not name.startswith("crop_"):
            half = table.entries[name.replace("-bfloat16_t-", "-half_t-")]
            assert (accepted.registers, accepted.warps) == (half.registers, half.warps), name


def test_the_documentation_shows_the_committed_table() -> None:
    table = CudaTable.load()
    assert table is not None
    text = cuda_aot_markdown.DOCUMENT.read_text("utf-8")
    assert cuda_aot_markdown.markdown(table) in text, "write it with: python -m bench.cuda_aot --markdown"


def test_markdown(tmp_path: Path) -> None:
    table = CudaTable({v.name: entry(v) for v in all_variants(ARCHITECTURES)})
    text = cuda_aot_markdown.markdown(table)
    shared = HALF.shared_bytes / 1024
    line = next(x for x in text.splitlines() if x.startswith("| attention_forward | 128 |"))
    assert f"| 128, {shared:.1f}, {GOOD.warps}/64 |" in line
    assert "none of them with registers spilled" in text
    spilling = {**table.entries, HALF.name: replace(GOOD, spills=7)}
    assert f"128, {shared:.1f}, {GOOD.warps}/64, 7 spills" in cuda_aot_markdown.markdown(CudaTable(spilling))

    document = tmp_path / "cuda.md"
    begin, end = markers(cuda_aot_markdown.SECTION)
    document.write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    cuda_aot_markdown.update(table, document)
    written = document.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert text in written
    assert "stale" not in written


def test_the_sample() -> None:
    """Every kernel of every architecture and element."""
    variants = all_variants(ARCHITECTURES)
    sample = cuda_aot.sample(variants)

    def seen(chosen: list[Variant]) -> set[tuple]:
        return {(v.kernel, v.options, v.element, v.architecture) for v in chosen}

    assert len(sample) < 0.6 * len(variants)
    assert seen(sample) == seen(variants)


def test_the_committed_table_is_of_these_sources() -> None:
    """All widths were compiled for it, of which the gate compiles a sample."""
    table = CudaTable.load()
    assert table is not None
    assert table.sources == cuda_aot_table.sources_digest()


def test_comments_and_line_breaks_leave_the_table_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_aot_table.sources, "folder", lambda: tmp_path)
    digests = []
    for text in ("int a;  // one\nint b;", "int a;\n\n  int b;  // two", "int a;\nint c;"):
        (tmp_path / "kernel.cuh").write_text(text)
        digests.append(cuda_aot_table.sources_digest())
    assert digests[0] == digests[1] != digests[2]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    """`python -m bench.cuda_aot` without a compiler and with a table of its own; the entry that it is to find."""
    compiled: dict = {"entry": GOOD, "missing": [], "failed": []}
    monkeypatch.setattr(cuda_aot, "all_variants", lambda _: [HALF])
    monkeypatch.setattr(
        cuda_aot, "compile_all", lambda chosen, _: (dict.fromkeys(chosen, compiled["entry"]), list(compiled["failed"]))
    )
    monkeypatch.setattr(cuda_aot, "_with_compiler", lambda chosen: (chosen, compiled["missing"]))
    monkeypatch.setattr(cuda_aot_table, "PATH", tmp_path / "table.json")
    return compiled


def test_command(pretended: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_aot.main([]) == 1
    assert "make aot CUDA_AOT_FLAGS=--accept" in capsys.readouterr().out
    assert cuda_aot.main(["--show"]) == 1

    pretended["entry"] = replace(GOOD, spills=3)
    assert cuda_aot.main(["--accept"]) == 1
    assert "Rules cannot be accepted" in capsys.readouterr().out
    pretended.update(entry=GOOD, missing=[70])
    assert cuda_aot.main(["--accept"]) == 1
    assert not cuda_aot_table.PATH.exists()

    pretended["missing"] = []
    assert cuda_aot.main(["--accept"]) == 0
    assert cuda_aot.main([]) == 0
    assert cuda_aot.main(["--show"]) == 0
    assert HALF.name in capsys.readouterr().out

    pretended["entry"] = replace(GOOD, loop="HMMA 2000")
    assert cuda_aot.main(["--only", "attention_forward sm_80"]) == 1
    assert cuda_aot.main(["--only", "attention_forward sm_70"]) == 1
    pretended["entry"] = replace(pretended["entry"], compiler="nvcc 99.0")
    capsys.readouterr()
    assert cuda_aot.main([]) == 0
    assert "by another compiler" in capsys.readouterr().out

    pretended.update(entry=GOOD, failed=[Finding("x", "it does not compile", is_rule=True)])
    assert cuda_aot.main([]) == 1
    assert "x: it does not compile" in capsys.readouterr().out
