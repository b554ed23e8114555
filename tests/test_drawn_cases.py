"""Any combination of arguments, drawn by hypothesis, for every operator on the CPU backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws these cases")
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import Case, check_forward, check_gradients
from devices import pad_packed_sequences
from map_cases import MapCase, check_map, check_map_gradients
from packed_cases import PackedCase, check_packed_forward, check_packed_gradients

DENSE: dict[str, Any] = {
    "batch": st.integers(2, 3),
    "heads": st.just(4),
    "kv_heads": st.sampled_from([1, 2, 4]),
    "num_queries": st.integers(1, 70),
    "num_keys": st.integers(1, 70),
    "head_dim": st.integers(1, 40),
    "region": st.sampled_from([None, "n", "bn", "bhn"]),
    "soft": st.booleans(),
    "weight": st.sampled_from([2.0, "scalar", "b", "bh"]),
    "knocked_out": st.booleans(),
    "bias": st.sampled_from([None, "n", "bn", "bhn"]),
    "removed": st.sampled_from(["none", "some"]),
    "padding": st.sampled_from([None, "random", "row"]),
    "gate": st.sampled_from([None, "n", "bn"]),
    "is_causal": st.booleans(),
    "layout": st.sampled_from(["bnhd", "bhnd", "sliced", "expanded", "transposed"]),
}


@given(case=st.builds(Case, **DENSE, value_dim=st.integers(1, 40)))
@settings(max_examples=30, deadline=None)
def test_reweighted_attention(case: Case) -> None:
    for backend in ("reference", "sdpa"):
        check_forward(case, torch.float32, backend)
        check_gradients(case, torch.float64, backend)


def packed_cases() -> st.SearchStrategy[PackedCase]:
    lengths = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=4)
    cases = st.builds(
        PackedCase,
        heads=st.just(4),
        kv_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.integers(1, 40),
        value_dim=st.integers(1, 40),
        region=st.sampled_from([None, "t", "ht"]),
        soft=st.booleans(),
        weight=st.sampled_from([2.0, "scalar", "s", "sh"]),
        knocked_out=st.booleans(),
        bias=st.sampled_from([None, "t", "ht"]),
        removed=st.sampled_from(["none", "some"]),
        gate=st.booleans(),
        is_causal=st.booleans(),
        slack=st.sampled_from([0, 1, 40]),
        index_dtype=st.sampled_from([torch.int32, torch.int64]),
        layout=st.sampled_from(["thd", "htd", "fused", "expanded", "transposed"]),
    )

    def with_lengths(case: PackedCase, pairs: list[tuple[int, int]]) -> PackedCase:
        both = {"query_lengths": tuple(q for q, _ in pairs), "key_lengths": tuple(k for _, k in pairs)}
        return PackedCase(**{**vars(case), **both})

    return st.builds(with_lengths, cases, lengths)


@given(case=packed_cases(), padded=st.booleans())
@settings(max_examples=20, deadline=None)
def test_reweighted_attention_varlen(case: PackedCase, padded: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if padded:
            pad_packed_sequences(monkeypatch)
        for backend in ("reference", "sdpa"):
            check_packed_forward(case, torch.float32, backend)
            check_packed_gradients(case, torch.float64, backend)


@given(
    case=st.builds(
        MapCase,
        **DENSE,
        rows=st.sampled_from([None, "n", "bn", "few", "nowhere"]),
        chosen_heads=st.none() | st.sets(st.integers(0, 3)).map(lambda chosen: tuple(sorted(chosen))),
        knows_lse=st.booleans(),
        reduction=st.sampled_from(["sum", "mean", "none"]),
    )
)
@settings(max_examples=20, deadline=None)
def test_attention_map(case: MapCase) -> None:
    check_map(case, torch.float32, "reference")
    check_map_gradients(case, torch.float64, "reference")
