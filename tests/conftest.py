"""Which tests run in this process: Triton's interpreter must be chosen before a kernel is imported, so it gets a
process of its own.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

TRITON_RUNS_HERE = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
RUN_ALL = os.environ.get("FINEGRAIN_TEST_ALL") == "1"


# On CI the same examples every time, so that red means a changed project; elsewhere new ones, to find what is left.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_report_header(config: pytest.Config) -> str:
    triton = "run" if TRITON_RUNS_HERE else "left out (set TRITON_INTERPRET=1)"
    slow = "all" if RUN_ALL else "sampled"
    return f"finegrain_ops: torch {torch.__version__}, Triton kernels {triton}, slow sweeps {slow}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what cannot run here, and all but a fixed sample of the slow sweeps."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    sampled = set(slow if RUN_ALL else slow[::8])
    kept, left_out = [], []
    for item in items:
        runs = TRITON_RUNS_HERE or not item.get_closest_marker("triton")
        runs = runs and (item in sampled or not item.get_closest_marker("slow"))
        (kept if runs else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
