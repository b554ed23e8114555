"""PTX with one instruction deleted, or one mask: each mutant is noticed, or never gives a wrong number."""

from __future__ import annotations

import functools

import pytest
import torch
import triton
from torch import Tensor

import finegrain_ops
from ptx import mutants
from ptx.project import on_ptx
from ptx.report import EndlessLoop

# Deleted, these are noticed by nothing and change nothing, in any of three orders of the warps: where the compiler puts
# one at the end of a loop and another before the next one's first product, say. So counted with _TRITON; more of them
# would be a check that has gone blind.
_TRITON = "3.7"
_REDUNDANT: dict[tuple[str, int], dict[str, int]] = {
    ("attention_forward_kernel", 80): {"barrier": 8, "wait for copies": 1},
    ("attention_forward_kernel", 90): {"barrier": 7, "proxy fence": 4, "wait for wgmma": 1},
    ("attention_backward_keys_kernel", 90): {"barrier": 4, "proxy fence": 3},
}
_CASES = [
    pytest.param(kernel, capability, kind, id=f"{kernel}-sm_{capability}-{kind}", marks=pytest.mark.slow)
    for kernel, capability in _REDUNDANT
    for kind in mutants.KINDS
    if capability == 90 or kind not in ("proxy fence", "wait for wgmma")
]


def _inputs(head_dim: int) -> tuple[list[Tensor], Tensor]:
    """Long enough that each loop of a kernel turns more than once; the last tiles of rows and keys are cut."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(1, 1, n, head_dim, generator=generator).bfloat16() for n in (150, 520, 520)]
    bias = torch.randn(1, 520, generator=generator)
    bias[:, :140] = bias[:, 330:] = 0.0
    return operands, bias


def _head_dim(kind: str) -> int:
    """Columns are masked where they fill a tile partly. That has two parts, whose products of wgmma, one after another
    into the same registers, need no wait between them, though Triton puts one there.
    """
    return 72 if kind == mutants.MASK else 64


def _run(kernel: str, kind: str, backend: str) -> list[Tensor]:
    """What the kernel makes: the output, or the gradients."""
    operands, bias = _inputs(_head_dim(kind))
    leaves = [t.requires_grad_("backward" in kernel) for t in (*operands, bias)]
    output = finegrain_ops.reweighted_attention(*leaves[:3], key_bias=leaves[3], is_causal=True, backend=backend)
    if "backward" not in kernel:
        return [output]
    return list(torch.autograd.grad(output.float().sin().sum(), leaves))


@functools.cache
def _expected(kernel: str, kind: str) -> list[Tensor]:
    return _run(kernel, kind, "reference")


def _is_right(kernel: str, kind: str, results: list[Tensor]) -> bool:
    return all(
        bool(torch.isclose(a.float(), e.float(), rtol=0, atol=3e-2 * max(1.0, float(e.abs().max()))).all())
        for a, e in zip(results, _expected(kernel, kind))
    )


def _is_noticed(kernel: str, capability: int, kind: str, line: int) -> bool:
    def change(ptx: str) -> str:
        return mutants.without(kind, ptx, line)

    for serial in (0, 1, -1):
        with on_ptx(capability, serial=serial, mutate=mutants.mutation_of(kernel, change)) as runner:
            try:
                results = _run(kernel, kind, "triton")
            except EndlessLoop:
                return True
        if runner.report.findings or not _is_right(kernel, kind, results):
            return True
    return False


@pytest.mark.skipif(not triton.__version__.startswith(_TRITON), reason=f"redundant barriers are of Triton {_TRITON}")
@pytest.mark.parametrize(("kernel", "capability", "kind"), _CASES)
def test_mutants_are_noticed(kernel: str, capability: int, kind: str) -> None:
    texts: list[str] = []
    with on_ptx(capability, mutate=mutants.mutation_of(kernel, lambda ptx: texts.append(ptx) or ptx)) as runner:
        assert _is_right(kernel, kind, _run(kernel, kind, "triton"))
    assert not runner.report.findings, str(runner.report)
    (run,) = [run for run in runner.runs if run.kernel == kernel]
    lines = mutants.lines_of(kind, texts[0], run)
    assert lines, "nothing to delete"
    passed = [line for line in lines if not _is_noticed(kernel, capability, kind, line)]
    print(f"{kernel} sm_{capability} {kind}: {len(lines) - len(passed)} of {len(lines)} noticed")
    allowed = _REDUNDANT[kernel, capability].get(kind, 0)
    shown = [f"{line}: {texts[0].splitlines()[line].strip()}" for line in passed]
    assert len(passed) <= allowed, f"{len(passed)} of {len(lines)} pass, {allowed} are known: {shown}"
