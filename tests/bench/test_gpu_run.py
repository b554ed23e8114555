"""`make gpu` as far as it goes without a GPU: what it says, how it divides its time, what stops what."""

from __future__ import annotations

import importlib
import os
import subprocess
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
    assert all((gpu.ROOT / path).exists() for path in (*gpu.TESTS, *gpu.MODEL_TESTS))
    assert set(gpu.MODEL_TESTS) <= set(gpu.tests_command(1))
    hide(monkeypatch, "transformers")
    assert not set(gpu.MODEL_TESTS) & set(gpu.tests_command(1))
    hide(monkeypatch)
    command = gpu.benchmarks_command(123.4, tmp_path)
    assert [option in command for option in ("quick", "--bench-budget=123", f"--results-folder={tmp_path}")] == [
        True
    ] * 3


@pytest.mark.parametrize("total", [60.0, 520.0])
def test_time_is_divided(total: float) -> None:
    """Also where the tests take all that they may, time is left for benchmarks, and for the last of them to end."""
    budget = gpu.Budget(total)
    assert 0 < budget.compiling < 0.5 * budget.tests < budget.tests < budget.tests_limit < total
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
    for _ in range(50):  # it is killed, but may not have ended yet
        if not _is_running(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still running")


def _is_running(pid: int) -> bool:
    """A zombie has no command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


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
    assert commands[0][-1] == "bench.cuda_variants"
    assert ["bench" in command for command in commands] == [False, False] + [True] * measured


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
        (
            "echo 'the backend cannot run here: no bindings'; exit 1",
            "cuda: the backend cannot run here: no bindings",
            0,
        ),
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
    for tool in ("memcheck", "racecheck"):
        for backend in gpu.BACKENDS:
            assert f"compute-sanitizer {tool} of {backend}: " in printed


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


def test_small_calls_launch_every_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them aligned and not, and every kernel in float32 too, which has code of its own."""
    from bench import gpu_kernels
    from finegrain_ops import backends
    from finegrain_ops.backends.cuda import machine
    from finegrain_ops.backends.cuda.variants import Variant, all_variants

    launched = []

    class Watched:
        architecture, num_processors = 90, 132

        def launch(self, variant: Variant, grid: tuple[int, int, int], arguments: object) -> None:
            launched.append((variant, bool(getattr(arguments, "aligned", True))))

    monkeypatch.setattr(machine, "unavailable_reasons", lambda: [])
    monkeypatch.setattr(machine, "device_reasons", lambda *arguments, **options: [])
    monkeypatch.setattr(machine, "launcher", lambda device: Watched())
    backends.select.cache_clear()
    try:
        gpu_kernels.main("cpu", "cuda")
    finally:
        backends.select.cache_clear()
    for element in ("half_t", "float", "byte_t"):
        called = {(variant.kernel, variant.options) for variant, _ in launched if variant.element == element}
        every = [variant for variant in all_variants([90]) if variant.element == element]
        assert called == {(variant.kernel, variant.options) for variant in every}
    for kernel in ("attention_forward", "attention_backward_query", "attention_backward_keys"):
        assert {aligned for variant, aligned in launched if variant.kernel == kernel} == {True, False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", gpu.BACKENDS)
def test_small_calls_say_why_they_cannot_run(backend: str) -> None:
    """In the words that `judge_sanitizer` looks for, so that this is no error of a kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu_kernels", backend]
    done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True, check=False)
    verdict, is_error = gpu.judge_sanitizer(done.returncode, done.stdout)
    assert verdict.startswith(gpu.CANNOT_RUN)
    assert not is_error
