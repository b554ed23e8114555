"""Any combination of arguments and shapes, drawn by hypothesis, through every Triton kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws these cases")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_cases import Case, check_forward, check_gradients
from finegrain_ops.kernels import attention_decode

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("small_tiles")]

CASES = st.builds(
    Case,
    batch=st.just(2),
    heads=st.just(2),
    kv_heads=st.sampled_from([1, 2]),
    num_queries=st.integers(1, 40),
    num_keys=st.integers(1, 50),
    head_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    region=st.sampled_from([None, "n", "bn", "bhn"]),
    soft=st.booleans(),
    weight=st.sampled_from([2.0, "b", "bh"]),
    knocked_out=st.booleans(),
    bias=st.sampled_from([None, "n", "bhn"]),
    removed=st.sampled_from(["none", "some"]),
    padding=st.sampled_from([None, "random", "left", "row"]),
    gate=st.sampled_from([None, "n", "bn"]),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.7, -0.2, 0.0]),
    layout=st.sampled_from(["bnhd", "sliced", "expanded", "transposed"]),
)

SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("most_rows", [0, 1000], ids=["forward", "decode"])
@given(case=CASES)
@SETTINGS
def test_forward(most_rows: int, case: Case, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(attention_decode, "MOST_ROWS", most_rows)
    check_forward(case, torch.float32, "triton", device)


@given(case=CASES)
@SETTINGS
def test_gradients(case: Case, device: str) -> None:
    check_gradients(case, torch.float32, "triton", device)
