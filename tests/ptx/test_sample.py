"""Every kernel of both backends, compiled, executed and compared with the float64 oracle: sample.py has the calls."""

from __future__ import annotations

import re

import pytest

from ptx import cuda_kernels, sample
from ptx.report import Finding, Kind
from ptx.triton_kernels import NOT_OURS

_CALLS = [
    pytest.param(capability, call, id=f"{call.backend}-sm_{capability}-{call.name}")
    for call in sample.calls()
    for capability in call.capabilities
]


def is_harmless(finding: Finding) -> bool:
    """What is known and does not matter."""
    instruction = finding.instruction
    if finding.kind is Kind.UNINITIALISED and finding.kernel.startswith("crop_resize"):
        # The first pass of csrc/ sums up all rows of a step, also those after the last one, whose sums nobody reads.
        return cuda_kernels.source_line(instruction.source).strip().startswith("sums[s][channel] += weight * own[")
    return finding.kind in NOT_OURS


# What ptxas would contract to one fused multiply-add, if it found both: arithmetic that does not say .rn.
_CONTRACTIBLE = re.compile(r"^.*\b(?:add|sub|mul)\.(?:ftz\.)?f(?:32|64)\b.*$", re.MULTILINE)


@pytest.mark.parametrize(("capability", "call"), _CALLS)
def test_compiled(capability: int, call: sample.Call) -> None:
    if call.backend == "cuda" and (reason := cuda_kernels.missing(capability)):
        pytest.skip(reason)
    texts: dict[str, str] = {}
    with sample.EXECUTE[call.backend](
        capability, mutate=lambda name, ptx: texts.setdefault(name, ptx) and ptx
    ) as runner:
        call.run(call.backend, "cpu")
    if call.backend == "triton":  # csrc/ relies on no product being rounded in one place and not in another
        assert {name: _CONTRACTIBLE.findall(ptx) for name, ptx in texts.items()} == {name: [] for name in texts}
    findings = [finding for finding in runner.report.findings if not is_harmless(finding)]
    assert not findings, "\n".join(map(str, findings))
    assert runner.runs
