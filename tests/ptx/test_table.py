"""The stored counts (make ptx): of every kernel there is, and those that this Triton gives."""

from __future__ import annotations

import json
import re

import pytest
import triton

from finegrain_ops.backends.cuda import sources
from ptx import table

STORED = json.loads(table.JSON.read_text())


def test_every_kernel_is_executed() -> None:
    """A kernel that is added is added to the sample, or this says so."""
    texts = [path.read_text() for path in (table.ROOT / "kernels").glob("*.py")]
    triton_kernels = {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    texts = [path.read_text() for path in sources.folder().glob("*.cuh")]
    cuda_kernels = {name for text in texts for name in re.findall(r"^FINEGRAIN_KERNEL\((\w+)", text, re.MULTILINE)}
    assert len(triton_kernels) >= 12
    executed = set(STORED["coverage"])
    assert executed >= {f"{name} sm_{capability}" for name in triton_kernels for capability in (80, 90)}
    assert executed >= {f"csrc {name} sm_70" for name in cuda_kernels}
    for name, row in STORED["coverage"].items():
        assert row["best"] > 0.5, name


@pytest.mark.skipif(triton.__version__ != STORED["triton"], reason="counted with another version of Triton")
@pytest.mark.parametrize("name", ["attention bf16 d64", "attention fp32 d64", "decode bf16 d128"])
def test_traffic_is_what_is_stored(name: str) -> None:
    """If a kernel has changed, `make ptx` writes the table anew; look at what got worse."""
    (case,) = [case for case in table.cases() if case.name == name and case.capability == 80]
    for kernel, row in table.traffic(case).items():
        assert row == STORED["traffic"][kernel], f"{kernel}: run make ptx"
