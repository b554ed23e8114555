"""Which tests run in this process: Triton's interpreter must be chosen before a kernel is imported, so it gets a
process of its own, as does the PTX of each compute capability (FINEGRAIN_PTX), and `make gpu` runs those that need a
device, there.
"""

from __future__ import annotations

import math
import os
import random
import time
from pathlib import Path

import pytest
import torch

from devices import DEVICE
from ptx import chosen_capability

try:
    import hypothesis
except ModuleNotFoundError:  # on a machine that was not set up for this project; its tests are left out there
    hypothesis = None  # type: ignore[assignment]

TRITON_RUNS_HERE = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
PTX_CAPABILITY = chosen_capability()
_EXECUTED_AS_PTX = Path(__file__).parent / "triton_kernels"
RUN_ALL = os.environ.get("FINEGRAIN_TEST_ALL") == "1"
# Start no test after so many seconds; they come in a shuffled order then, so that those left out are of every kind.
SECONDS = float(os.environ.get("FINEGRAIN_TEST_SECONDS", "inf"))
_START = time.monotonic()

# On CI the same examples every time, so that red means a changed project; elsewhere new ones, to find what is left.
if hypothesis is not None:
    hypothesis.settings.register_profile("ci", derandomize=True)
    if os.environ.get("CI"):
        hypothesis.settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, torch.get_num_threads()) // workers))


def pytest_report_header(config: pytest.Config) -> str:
    triton = "run" if TRITON_RUNS_HERE else "left out (set TRITON_INTERPRET=1, or FINEGRAIN_PTX=80)"
    if PTX_CAPABILITY is not None:
        triton = f"executed as PTX for sm_{PTX_CAPABILITY}"
    slow = "all" if RUN_ALL else "sampled"
    return (
        f"finegrain_ops: torch {torch.__version__}, operators on {DEVICE}, Triton kernels {triton}, slow sweeps {slow}"
    )


@pytest.fixture(scope="session")
def device() -> str:
    """Tests that take it are run by `make gpu` too."""
    return DEVICE


@pytest.fixture(autouse=True)
def no_precision_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4's TrainingArguments(bf16=True) sets it for the whole process: the next Trainer would compute in
    bfloat16, and wrap the model's forward.
    """
    name = "ACCELERATE_MIXED_PRECISION"
    monkeypatch.setenv(name, os.environ.get(name, "no"))


def _runs_triton(item: pytest.Item) -> bool:
    if PTX_CAPABILITY is not None:  # the other folders do not go through the harness
        return _EXECUTED_AS_PTX in item.path.parents
    return TRITON_RUNS_HERE


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what cannot run here, and all but a fixed sample of the slow sweeps."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    sampled = set(slow if RUN_ALL else slow[::8])
    kept, left_out = [], []
    for item in items:
        is_triton = item.get_closest_marker("triton") is not None
        runs = not is_triton or _runs_triton(item)
        runs = runs and (item in sampled or not item.get_closest_marker("slow"))
        runs = runs and (DEVICE == "cpu" or is_triton or "device" in getattr(item, "fixturenames", ()))
        (kept if runs else left_out).append(item)
    if math.isfinite(SECONDS):
        random.Random(0).shuffle(kept)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - _START > SECONDS:
        pytest.skip(f"FINEGRAIN_TEST_SECONDS={SECONDS:g} are used up")
