"""Small Triton kernels through Runner, against torch; and what else Runner promises."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton exists for Linux only")
import triton.language as tl  # noqa: E402

from ptx.launches import merged_coverage  # noqa: E402
from ptx.project import unread_pointers  # noqa: E402
from ptx.report import FindingError, Kind  # noqa: E402
from ptx.triton_kernels import Runner  # noqa: E402

CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])


@triton.jit
def softmax_kernel(x_ptr, y_ptr, stride, columns, BLOCK: tl.constexpr):
    row, offsets = tl.program_id(0), tl.arange(0, BLOCK)
    is_column = offsets < columns
    x = tl.load(x_ptr + row * stride + offsets, mask=is_column, other=float("-inf"))
    exponentials = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * stride + offsets, exponentials / tl.sum(exponentials, 0), mask=is_column)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            a_ptr + rows[:, None] * k + depth[None, :], mask=(rows[:, None] < m) & (depth[None, :] < k), other=0
        )
        b = tl.load(
            b_ptr + depth[:, None] * n + columns[None, :], mask=(depth[:, None] < k) & (columns[None, :] < n), other=0
        )
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows[:, None] * n + columns[None, :], total, mask=(rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def shift_kernel(x_ptr, y_ptr, z_ptr, count, BLOCK: tl.constexpr):
    """One element too far."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets + 1, mask=offsets < count), mask=offsets < count)


@CAPABILITIES
def test_softmax(capability: int) -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    y = torch.empty_like(x)
    with Runner(capability) as runner:
        softmax_kernel[(5,)](x, y, x.stride(0), x.shape[1], BLOCK=512, num_warps=4)
    assert not runner.report.findings, str(runner.report)
    torch.testing.assert_close(y, x.softmax(1))


@CAPABILITIES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matmul(capability: int, dtype: torch.dtype) -> None:
    m, n, k = 100, 72, 136
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    c = torch.full((m, n), float("nan"))
    with Runner(capability) as runner:
        blocks = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}
        matmul_kernel[(2, 3)](a, b, c, m, n, k, **blocks, num_warps=4, num_stages=3)
    assert not runner.report.findings, str(runner.report)
    assert (runner.runs[0].instructions["wgmma"] > 0) == (capability == 90)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-4)


def shift(runner: Runner) -> torch.Tensor:
    x, y = torch.arange(64, dtype=torch.float32), torch.zeros(64)
    with runner:
        shift_kernel[(2,)](x, y, x, 64, BLOCK=32, num_warps=1)
    return y


def test_a_finding_names_its_source_line() -> None:
    runner = Runner()
    y = shift(runner)
    (finding,) = runner.report.findings
    assert finding.kind == Kind.GLOBAL_OUT_OF_BOUNDS
    assert finding.instruction.source.startswith("test_triton_kernels.py:")
    assert "x_ptr" in finding.example
    assert y[:63].tolist() == list(range(1, 64))


def test_stop_raises() -> None:
    with pytest.raises(FindingError, match="out of bounds"):
        shift(Runner(stop=True))


def test_some_blocks_only() -> None:
    runner = Runner(ctas=lambda name, grid: [0])
    y = shift(runner)
    assert not runner.report.findings
    assert (runner.runs[0].grid, runner.runs[0].blocks) == ((2, 1, 1), 1)
    assert y[32:].eq(0).all()


def test_a_mutant() -> None:
    """Every block takes itself for the first one."""

    def mutate(name: str, ptx: str) -> str:
        assert name == "shift_kernel"
        assert "%ctaid.x" in ptx
        return ptx.replace("%ctaid.x", "0")

    runner = Runner(mutate=mutate)
    y = shift(runner)
    assert set(runner.report.kinds()) == {Kind.TWO_BLOCKS_WRITE}
    assert y[32:].eq(0).all()


def test_which_pointers_were_used() -> None:
    runner = Runner()
    shift(runner)
    run = runner.runs[0]
    assert run.loads == {"x_ptr": 2, "y_ptr": 0, "z_ptr": 0}
    assert run.stores == {"x_ptr": 0, "y_ptr": 2, "z_ptr": 0}


def test_pointers_that_must_not_be_read() -> None:
    runner = Runner(unread=lambda name, tensors: {"x_ptr"})
    shift(runner)
    assert Kind.UNREAD_POINTER in runner.report.kinds()


def test_which_pointers_those_are() -> None:
    query, key, bias, lse = (torch.zeros(1) for _ in range(4))
    tensors = {"query_ptr": query, "key_ptr": key, "bias_ptr": query, "grad_map_ptr": lse, "row_lse_ptr": lse}
    assert unread_pointers("", tensors) == {"bias_ptr", "grad_map_ptr"}
    assert unread_pointers("", {"query_ptr": query, "key_ptr": query, "value_ptr": query}) == set()
    assert unread_pointers("", {"query_ptr": query, "key_ptr": key, "bias_ptr": bias}) == set()


def test_runs_add_up_to_a_coverage() -> None:
    runner = Runner()
    shift(runner)
    shift(runner)
    (coverage,) = merged_coverage(runner.runs).values()
    assert coverage.share == 1.0
    assert coverage.total == len(runner.runs[0].code)
    assert "shift_kernel: 2 blocks" in runner.summary()
