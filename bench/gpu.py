"""The correctness tests and the quick benchmarks on an NVIDIA GPU, within a fixed time: `make gpu`.

Nothing is installed: PyTorch, Triton and pytest must be there, and what else is missing is named with what it costs.
First the CUDA C++ kernels are compiled. Then come the tests of every operator on the GPU, with every backend that can
run there, and beside them compute-sanitizer on a small call of every kernel. Where a test fails, nothing is measured.
Then the benchmarks, whose rows are appended to bench/results/. (`python -m bench.gpu --help`)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/test_reweighted_attention.py",
    "tests/test_reweighted_attention_varlen.py",
    "tests/test_attention_map.py",
    "tests/test_crop_resize.py",
    "tests/test_crop_arguments.py",
    "tests/test_operator.py",
    "tests/triton_kernels",
    "tests/cuda_backend/test_on_device.py",
)
MODEL_TESTS = (
    "tests/integrations/test_models_on_device.py",
    "tests/integrations/test_preprocess_llava_next.py",
    "tests/methods/test_prompt_tree.py",
    "tests/methods/test_decoding.py",
    "tests/methods/test_box_decoding.py",
    "tests/methods/test_dualfocus.py",
)
MODELS_NEED = ("transformers", "PIL")
NEEDED = {"torch": "PyTorch", "triton": "Triton", "pytest": "pytest"}
HELPFUL = {
    "xdist": ("pytest-xdist", "the tests run one after another, and fewer of them fit into their time"),
    "hypothesis": ("hypothesis", "tests on drawn arguments are left out"),
    "pytest_benchmark": ("pytest-benchmark", "a stand-in runs the benchmarks; their rows are the same"),
    "rich": ("rich", "rows are stored, but no tables printed"),
    "PIL": ("Pillow", "the tests of crop_resize, which compare with it, and its peers on the host are left out"),
    "cpuinfo": ("py-cpuinfo", "rows name the CPU less exactly"),
    "transformers": ("transformers", "models are neither tested nor measured"),
}
_SANITIZER = "compute-sanitizer"
_FOUND_ERRORS = 99  # the exit status that it is told to end with
BACKENDS = ("triton", "cuda")  # with kernels of our own
CANNOT_RUN = "the backend cannot run here"


@dataclass(frozen=True)
class Budget:
    """Seconds, all in all and for each part."""

    total: float

    @property
    def compiling(self) -> float:
        """What is not compiled then is compiled by the tests."""
        return 0.15 * self.total

    @property
    def tests(self) -> float:
        """No test starts later."""
        return 0.4 * self.total

    @property
    def tests_limit(self) -> float:
        """When tests, or the sanitizer beside them, are taken to hang."""
        return 0.55 * self.total

    def benchmarks(self, elapsed: float) -> float:
        """No benchmark starts later; the last one that did has some time to finish."""
        return max(0.0, 0.92 * self.total - elapsed)


def main(arguments: Sequence[str] | None = None) -> int:
    start, options = time.monotonic(), _parse(arguments)
    if (reason := why_not()) is not None:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 1
    for line in missing_packages():
        print(line, flush=True)
    budget = Budget(options.seconds)

    run([sys.executable, "-m", "bench.cuda_variants"], budget.compiling)  # tests see what did not compile
    sanitizers = start_sanitizers()
    elapsed = time.monotonic() - start
    in_tests = {"FINEGRAIN_DEVICE": "cuda", "FINEGRAIN_TEST_SECONDS": f"{budget.tests - elapsed:.0f}"}
    tests_status = run(tests_command(options.jobs or processes()), budget.tests_limit - elapsed, in_tests)
    sanitizers_status = finish_sanitizers(sanitizers, budget.tests_limit - (time.monotonic() - start))
    if tests_status != 0:
        print("make gpu: the tests failed, so nothing was measured.", file=sys.stderr)
        return 1
    seconds = budget.benchmarks(time.monotonic() - start)
    rest = budget.total - (time.monotonic() - start)
    benchmarks_status = run(benchmarks_command(seconds, options.results_folder), rest)
    if benchmarks_status != 0:
        print("make gpu: the benchmarks did not all end well; the rows of those that did are stored.", file=sys.stderr)
    return 1 if benchmarks_status or sanitizers_status else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything together (default: %(default)g)")
    parser.add_argument("--results-folder", type=Path, help="where the rows go (default: bench/results/)")
    parser.add_argument("--jobs", type=int, help="processes of the tests, which mostly compile (default: up to 12)")
    return parser.parse_args(arguments)


def why_not() -> str | None:
    """Why nothing can run here, in one line."""
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"{', '.join(missing)} must be installed already for {sys.executable}; nothing was run."
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"no NVIDIA GPU that PyTorch {torch.__version__} could use; nothing was run."
    return None


def processes() -> int:
    """One per core, but for two, and per 2 GiB of the GPU's memory, of which each takes some."""
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory >> 31
    return max(1, min(12, (os.cpu_count() or 1) - 2, memory))


def missing_packages() -> list[str]:
    return [
        f"{name} is not installed: {cost}."
        for module, (name, cost) in HELPFUL.items()
        if importlib.util.find_spec(module) is None
    ]


def tests_command(jobs: int) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:benchmark", *TESTS]
    if all(importlib.util.find_spec(module) is not None for module in MODELS_NEED):
        command += MODEL_TESTS
    if importlib.util.find_spec("xdist") is not None and jobs > 1:
        command += ["-n", str(jobs), "--maxfail=20"]
    return command


def benchmarks_command(seconds: float, results_folder: Path | None) -> list[str]:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if importlib.util.find_spec("pytest_benchmark") is not None:
        command.append("--benchmark-only")
    command += ["--bench-device", "cuda", "--bench-set", "quick", f"--bench-budget={seconds:.0f}", "--save-results"]
    return command + ([f"--results-folder={results_folder}"] if results_folder else [])


def run(command: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None) -> int:
    """The exit status; 1 where it was ended for taking longer."""
    print("+", *command, flush=True)
    process = _start(command, variables or {})
    try:
        return process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        print(f"It did not end within {seconds:.0f} s.", file=sys.stderr)
        return 1
    finally:
        _end(process)


def _start(command: Sequence[str], variables: Mapping[str, str], output: IO[str] | None = None) -> subprocess.Popen:
    """In the repository's root, and in a session of its own, so that it can be ended with all that it started."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    stderr = None if output is None else subprocess.STDOUT
    return subprocess.Popen(
        command, cwd=ROOT, env={**environment, **variables}, stdout=output, stderr=stderr, start_new_session=True
    )


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find_sanitizer(folders: Iterable[str | None] | None = None) -> str | None:
    """On PATH, or in the CUDA toolkit that CUDA_HOME or CUDA_PATH names or that lies where it usually does."""
    if folders is None:
        folders = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = [Path(folder, part) for folder in folders if folder for part in ("bin", "compute-sanitizer")]
    return shutil.which(_SANITIZER) or next((p for f in places if (p := shutil.which(_SANITIZER, path=f))), None)


@dataclass(frozen=True)
class Sanitizer:
    name: str
    process: subprocess.Popen
    output: IO[str]


def start_sanitizers() -> list[Sanitizer]:
    """memcheck and racecheck, each on one small call of every kernel of a backend; they run beside the tests."""
    binary = find_sanitizer()
    if binary is None:
        print(f"{_SANITIZER} is neither on PATH nor under CUDA_HOME: memcheck and racecheck are left out.", flush=True)
        return []
    # PyTorch asks CUDA for what it may not have, and copes; that is no error of a kernel.
    options = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
    started = []
    for backend, tool in product(BACKENDS, options):
        command = [binary, "--tool", tool, "--error-exitcode", str(_FOUND_ERRORS), *options[tool]]
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- read and closed when the process has ended
        # Without torch's pool of memory every tensor is an allocation of its own, whose bounds are watched.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        process = _start([*command, sys.executable, "-m", "bench.gpu_kernels", backend], variables, output)
        started.append(Sanitizer(f"{tool} of {backend}", process, output))
    return started


def finish_sanitizers(started: Sequence[Sanitizer], seconds: float) -> int:
    """1 where one of them found an error."""
    end, status = time.monotonic() + seconds, 0
    for sanitizer in started:
        try:
            returncode = sanitizer.process.wait(max(end - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            returncode = None
        _end(sanitizer.process)
        with sanitizer.output as output:
            output.seek(0)
            verdict, is_error = judge_sanitizer(returncode, output.read())
        print(f"{_SANITIZER} {sanitizer.name}: {verdict}", flush=True)
        status |= is_error
    return status


def judge_sanitizer(returncode: int | None, output: str) -> tuple[str, bool]:
    """What to print, and whether it counts as an error; a returncode of None means that it took too long."""
    if returncode is None:
        return "not finished in time.", False
    if returncode == 0:
        return "no errors.", False
    if "Device not supported" in output:  # a virtual machine may not let it watch its GPU
        return "it cannot watch this device.", False
    if CANNOT_RUN in output:
        return next(line for line in output.splitlines() if CANNOT_RUN in line), False
    what = "errors" if returncode == _FOUND_ERRORS else f"the program ended with status {returncode}"
    return f"{what}:\n{output[-4000:]}", True


if __name__ == "__main__":
    sys.exit(main())
