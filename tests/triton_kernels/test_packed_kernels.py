"""The Triton kernels on packed sequences, forward and backward."""

from __future__ import annotations

import pytest
import torch

from finegrain_ops import reweighted_attention_varlen
from packed_cases import (
    ALL_PACKED_CASES,
    PackedCase,
    check_packed_forward,
    check_packed_gradients,
    check_rows_in_no_sequence,
)

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("small_tiles")]


@pytest.mark.parametrize("case", ALL_PACKED_CASES)
def test_arguments(case: PackedCase, dtype: torch.dtype, device: str) -> None:
    check_packed_forward(case, dtype, "triton", device)


@pytest.mark.parametrize("case", ALL_PACKED_CASES)
def test_gradients(case: PackedCase, dtype: torch.dtype, device: str) -> None:
    check_packed_gradients(case, dtype, "triton", device)


@pytest.mark.parametrize("cu_seqlens", [[0, 50], [-7, 9], [5, 3], [0, 2**30], [-(2**31), 2**31 - 1]])
def test_lengths_that_lie_touch_no_other_memory(
    cu_seqlens: list[int], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """On a device nobody checks cu_seqlens. The tensors lie in the middle of NaN, which must not get in."""
    from finegrain_ops import validation

    monkeypatch.setattr(validation, "values_are_checked", lambda tensor: False)
    memory = torch.full((3, 300, 2, 16), float("nan"), device=device)
    memory[:, 100:120] = 1.0
    query, key, value = memory[:, 100:120].unbind(0)
    lengths = torch.tensor(cu_seqlens, device=device).int()
    output = reweighted_attention_varlen(query, key, value, lengths, lengths, 64, 64, is_causal=True, backend="triton")
    assert output.isfinite().all()
    assert memory[:, :100].isnan().all()
    assert memory[:, 120:].isnan().all()


def test_rows_in_no_sequence(dtype: torch.dtype, device: str) -> None:
    check_rows_in_no_sequence("triton", dtype, device)
