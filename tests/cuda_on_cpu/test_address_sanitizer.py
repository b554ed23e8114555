"""The kernels under AddressSanitizer, which must be there before Python starts: a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulator

HERE = Path(__file__).parent


def _run(file: str, selection: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **simulator.address_sanitizer_environment(),
        "FINEGRAIN_SIMULATOR_SANITIZER": "address",
        "FINEGRAIN_TEST_ALL": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:xdist", str(HERE / file), "-k", selection]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(autouse=True)
def _library() -> None:
    library = simulator.address_sanitizer_environment()["LD_PRELOAD"].split()[0]
    if not Path(library).exists():
        pytest.skip(f"g++ has no AddressSanitizer here ({library})")


@pytest.mark.parametrize("machine", ["sm_70", "sm_80", pytest.param("float32", marks=pytest.mark.slow)])
def test_kernels_stay_within_their_memory(machine: str) -> None:
    """One case with everything for each kernel, and one whose rows are not multiples of 16 bytes."""
    cases = "everything or (odd and head) or (row and gate and padded)"
    result = _run("test_kernels.py", f"{machine} and not bf16 and ({cases})")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) >= 8


def test_a_missing_bounds_check_is_found() -> None:
    result = _run("test_mutations.py", "attention_forward and lse and exists")
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
