"""Which kernels `make gpu` compiles before it tests and measures, and that they are found afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cuda_variants
from bench.cuda_variants import OLDER, OLDER_WIDTHS, tasks_for
from finegrain_ops.backends.cuda import compiler
from finegrain_ops.backends.cuda.compiler import CompileError
from finegrain_ops.backends.cuda.variants import Variant, all_variants

ROOT = Path(__file__).resolve().parents[2]
OWN = Variant("merge_splits", "half_t", 128, 90)
OLD = Variant("attention_map", "half_t", 32, 70)


def require(architecture: int) -> None:
    try:
        compiler.target_for(architecture)
    except CompileError as error:
        pytest.skip(str(error))


def test_all_of_the_gpus_own_and_some_of_older_ones() -> None:
    tasks = tasks_for(90)
    assert [variant for variant, runs_on in tasks if runs_on is None] == all_variants([90])
    older = [variant for variant, runs_on in tasks if runs_on == 90]
    assert {variant.architecture for variant in older} == set(OLDER)
    for architecture in OLDER:
        of_half = [v for v in older if (v.architecture, v.element) == (architecture, "half_t")]
        every = [v for v in all_variants([architecture]) if v.element == "half_t" and not v.is_of_crops]
        assert {(v.kernel, v.options) for v in of_half} == {(v.kernel, v.options) for v in every}
        assert {v.width for v in of_half} == set(OLDER_WIDTHS)
    assert len(tasks) < 350, "compiled on 16 cores in a minute at most, at 2 s each"


def test_a_gpu_with_older_instructions_has_them_anyway() -> None:
    assert tasks_for(75) == [(variant, None) for variant in all_variants([75])]


def test_an_older_gpus_instructions_in_machine_code_for_a_later_one() -> None:
    """The matrix instruction of sm_70 is known to later compilers too."""
    require(90)
    assert {"--gpu-architecture=sm_90", "--define-macro=FINEGRAIN_ARCH=700"} <= set(compiler.options(OLD, 90))
    assert not any("FINEGRAIN_ARCH" in option for option in compiler.options(Variant(OLD.kernel, OLD.element, 32, 90)))
    image = compiler.compile(OLD, runs_on=90)
    assert image[:4] == b"\x7fELF"
    assert b".text.attention_map\0" in image
    # What a matrix product of sm_70 becomes on a GPU that has none: calls of a function.
    assert b"_mma_row_col_f32_f16_f16_f32" in image
    assert b"_mma_row_col_f32_f16_f16_f32" not in compiler.compile(Variant(OLD.kernel, OLD.element, 32, 90))


def test_what_processes_compile_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require(90)
    monkeypatch.setenv("FINEGRAIN_CACHE_DIR", str(tmp_path))
    tasks = [(OWN, None), (OLD, 90)]
    # A script with a guard, since the processes import it again.
    code = f"""from bench.cuda_variants import Variant, compile_all
if __name__ == "__main__":
    print(compile_all({tasks!r}, 2)[1])
"""
    script = tmp_path / "compile.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr
    assert len(list(tmp_path.glob("*.cubin"))) == 2
    monkeypatch.setattr(compiler, "compile", lambda *_: pytest.fail("it was compiled already"))
    assert all(cuda_variants.image(*task)[:4] == b"\x7fELF" for task in tasks)


def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require(90)
    monkeypatch.setenv("FINEGRAIN_CACHE_DIR", str(tmp_path))

    def refuse(variant: Variant, runs_on: int | None = None) -> bytes:
        raise CompileError("no such instruction")

    monkeypatch.setattr(compiler, "compile", refuse)
    assert cuda_variants._compile((OLD, 90)) == f"{OLD.name}: CompileError: no such instruction"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_variants.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("CUDA C++ kernels are left out: torch sees no CUDA device")
    assert printed.count("\n") == 1
