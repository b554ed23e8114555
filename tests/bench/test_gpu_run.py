"""`make gpu` as far as it goes without a GPU: what it says, how it divides its time, what stops what."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.stand_in import BenchmarkStandIn

FOUND = importlib.util.find_spec


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else FOUND(name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="triton exists for Linux only")
    assert gpu.main([]) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("make gpu: no NVIDIA GPU that PyTorch")
    assert printed.err.count("\n") == 1


def test_packages_that_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "torch", "pytest")
    assert gpu.why_not().startswith("PyTorch, pytest must be installed already")


def test_packages_that_help(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "hypothesis", "pytest_benchmark", "xdist")
    lines = "\n".join(gpu.missing_packages())
    for name, cost in (("hypothesis", "drawn"), ("pytest-benchmark", "stand-in"), ("pytest-xdist", "fewer")):
        assert f"{name} is not installed: " in lines
        assert cost in lines
    assert "-n" not in gpu.tests_command(4)
    assert "--benchmark-only" not in gpu.benchmarks_command(100.0, None)


def test_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch)
    assert all((gpu.ROOT / path).exists() for path in gpu.TESTS)
    command = gpu.benchmarks_command(123.4, tmp_path)
    assert [option in command for option in ("quick", "--bench-budget=123", f"--results-folder={tmp_path}")] == [
        True
    ] * 3


@pytest.mark.parametrize("total", [60.0, 520.0])
def test_time_is_divided(total: float) -> None:
    """Also where the tests take all that they may, time is left for benchmarks, and for the last of them to end."""
    budget = gpu.Budget(total)
    assert 0 < budget.tests < budget.tests_limit < total
    assert budget.benchmarks(budget.tests_limit) > 0.3 * total
    for elapsed in (0.0, budget.tests_limit, total):
        assert elapsed + budget.benchmarks(elapsed) <= max(elapsed, 0.95 * total)


def test_commands_end_in_time(capfd: pytest.CaptureFixture[str]) -> None:
    """With what they started."""
    start = time.monotonic()
    child = "import os; open('/proc/self/fd/1', 'w').write(str(os.getpid())); import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run([sys.executable, "-c", code], 3.0) == 1
    assert time.monotonic() - start < 20
    printed = capfd.readouterr()
    assert "did not end within 3 s" in printed.err
    pid = int(printed.out.splitlines()[-1])
    assert not Path(f"/proc/{pid}/cmdline").exists() or Path(f"/proc/{pid}/cmdline").read_bytes() == b""


def test_variables_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os, sys; sys.exit('TRITON_INTERPRET' in os.environ or os.environ['NEW'] != 'new')"
    assert gpu.run([sys.executable, "-c", code], 30.0, {"NEW": "new"}) == 0


@pytest.mark.parametrize(
    ("tests", "benchmarks", "sanitizers", "status", "measured"),
    [(0, 0, 0, 0, True), (1, 0, 0, 1, False), (0, 1, 0, 1, True), (0, 0, 1, 1, True)],
)
def test_what_stops_what(
    tests: int, benchmarks: int, sanitizers: int, status: int, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], seconds: float, variables: dict[str, str] | None = None) -> int:
        commands.append(command)
        return benchmarks if "bench" in command else tests

    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "start_sanitizers", list)
    monkeypatch.setattr(gpu, "finish_sanitizers", lambda *_: sanitizers)
    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--jobs", "1"]) == status
    assert ["bench" in command for command in commands] == [False] + [True] * measured


def test_sanitizer_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    binary = tmp_path / "toolkit" / "bin" / "compute-sanitizer"
    assert gpu.find_sanitizer([None, str(tmp_path / "toolkit")]) is None
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    assert gpu.find_sanitizer([None, str(tmp_path / "toolkit")]) == str(binary)


def pretended_sanitizer(folder: Path, script: str) -> None:
    binary = folder / "compute-sanitizer"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "word", "status"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'; exit 0", "no errors", 0),
        ("echo '========= Invalid read'; exit 99", "Invalid read", 1),
        ("echo 'Device not supported'; exit 1", "cannot watch", 0),
        ("exit 3", "status 3", 1),
        ("/bin/sleep 30", "not finished", 0),
    ],
)
def test_sanitizers(
    script: str,
    word: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretended_sanitizer(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu.finish_sanitizers(gpu.start_sanitizers(), 5.0 if "sleep" not in script else 1.0) == status
    printed = capsys.readouterr().out
    assert word in printed
    assert "compute-sanitizer racecheck" in printed


def test_no_sanitizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    assert gpu.start_sanitizers() == []
    assert "neither on PATH nor under CUDA_HOME" in capsys.readouterr().out


def test_stand_in_for_pytest_benchmark() -> None:
    calls: list[str] = []
    benchmark = BenchmarkStandIn()
    benchmark.pedantic(lambda: calls.append("call"), setup=lambda: calls.append("setup"), rounds=2, warmup_rounds=1)
    assert calls == ["setup", "call"] * 3


@pytest.mark.triton
def test_small_calls_launch_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import aot_launches, gpu_kernels

    launched = set()

    class Watched:
        def __init__(self, name: str, kernel: object) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.add(self.name)
            return self.kernel[grid]

    kernels = {**aot_launches.KERNELS, "merge_splits_kernel": "attention_decode"}
    for name, module_name in kernels.items():
        module = importlib.import_module(f"finegrain_ops.kernels.{module_name}")
        monkeypatch.setattr(module, name, Watched(name, getattr(module, name)))
    gpu_kernels.main("cuda" if torch.cuda.is_available() else "cpu")
    assert launched == set(kernels)
