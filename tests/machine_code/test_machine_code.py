"""The forward kernel compiled to machine code for GPUs that are not here: tensor cores used, nothing spilled, no bias
work without bias.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is installed where it exists: on Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's process compiles nothing", allow_module_level=True)

from bench.machine_code import SHARED_MEMORY_LIMIT, compile_forward
from finegrain_ops.kernels.tuning import forward_tile

VARIANTS = {"bias": {}, "gate, padding, negative scale": {"has_gate": True, "scale": -1.0}}


def check(capability: int, head_dim: int, dtype: str, variant: str) -> None:
    code = compile_forward(capability, head_dim, dtype, **VARIANTS[variant])
    assert len(code.loops) == 4, code
    assert all(loop.spills == 0 for loop in code.loops[:3]), code
    # float32 with a gate and a scale <= 0 puts up to four values aside, at its last loop, that of masked blocks.
    assert code.stack_bytes <= (16 if dtype == "fp32" and variant != "bias" else 0), code
    assert code.shared_bytes <= SHARED_MEMORY_LIMIT[capability]
    if capability == 80:  # sm_86 and sm_89 take the same rows
        assert code.shared_bytes <= SHARED_MEMORY_LIMIT[86]
    if dtype != "fp32":
        assert all(loop.mma > 0 for loop in code.loops), code
        before, biased, after, _ = (loop.instructions for loop in code.loops)
        assert max(before, after) < biased  # key blocks outside the biased range do no bias work


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_half_precision(capability: int, head_dim: int) -> None:
    check(capability, head_dim, "fp16", "bias")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 72, 80, 96, 128, 160, 256])
def test_every_shipped_configuration(head_dim: int, dtype: str, capability: int, variant: str) -> None:
    check(capability, head_dim, dtype, variant)


def test_small_shared_memory_gets_small_tiles() -> None:
    """Compute capability 12.0 is newer than 9.0 and has less shared memory."""
    code = compile_forward(120, 128)
    assert code.shared_bytes <= SHARED_MEMORY_LIMIT[120]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_every_call_has_a_tile(capability: int, element_size: int, head_dim: int) -> None:
    tile = forward_tile(capability, element_size, head_dim)
    assert tile.BLOCK_M >= 16
    assert tile.BLOCK_N >= 16
