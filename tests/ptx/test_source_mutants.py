"""Masks, bounds, the bias and the guards of rows without a key, removed from the source of kernels/: each goes red.

What is executed is what Triton compiles of the mutant; the interpreter would let some of them pass.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import finegrain_ops
import large_bias_cases
from attention_cases import Case, check_forward, check_gradients
from map_cases import MapCase, check_map
from packed_cases import PackedCase, check_packed_forward
from ptx.mutants import SourceMutant, mutated_kernels
from ptx.project import on_ptx
from ptx.report import Kind
from test_bias_gradient import check_no_gradient

_SHAPE = {"batch": 2, "heads": 2, "kv_heads": 1, "num_queries": 100, "num_keys": 150, "head_dim": 72, "value_dim": 72}
_PADDED = Case(**{**_SHAPE, "num_keys": 100}, padding="left", is_causal=True)
_BIASED = Case(**_SHAPE, bias="bhn", removed="some", is_causal=True)
_EMPTY = Case(**_SHAPE, bias="bn", removed="row")
_SLICED = Case(**_SHAPE, bias="bn", layout="sliced")
_GATED = Case(**_SHAPE, bias="bn", gate="bn", padding="left", is_causal=True)
_DECODE = Case(1, 8, 2, 3, 600, 64, 64, bias="bn", removed="some", padding="random", is_causal=True)
_PACKED = PackedCase((90, 1, 70), bias="t", is_causal=True, head_dim=64, value_dim=64)
_MAP = MapCase(num_queries=100, num_keys=150, head_dim=64, bias="bn", padding="left", is_causal=True, rows="bn")


def _forward(case: Case) -> None:
    check_forward(case, torch.bfloat16, "triton")


def _gradients(case: Case) -> None:
    check_gradients(case, torch.bfloat16, "triton")


def _packed(case: PackedCase) -> None:
    check_packed_forward(case, torch.bfloat16, "triton")


def _map(case: MapCase) -> None:
    check_map(case, torch.bfloat16, "triton")


def _large_bias(fill: float) -> None:
    large_bias_cases.check_attention(fill, 64, torch.float32, "triton")


def _no_gradient(dtype: torch.dtype) -> None:
    check_no_gradient("triton", dtype, "cpu")


# name: (file, text, what it becomes), what notices it
_FUSED = SourceMutant("tuning.py", '{"enable_fp_fusion": False}', '{"enable_fp_fusion": True}')
_MUTANTS = {
    "the maximum starts at -inf": (("softmax.py", "-(2.0**126)", 'float("-inf")'), _forward, _PADDED),
    "no correction": (("softmax.py", "tl.exp2(shift - new_shift)", "tl.exp2(shift - shift)"), _forward, _BIASED),
    "rows without a key are not 0": (
        ("attention_forward.py", "1.0 / tl.where(total == 0.0, 1.0, total)", "1.0 / total"), _forward, _PADDED,
    ),
    "their lse is not -inf": (
        ("softmax.py", 'tl.where(total == 0.0, float("-inf"), lse)', "lse"), _forward, _PADDED,
    ),
    "they have gradients": (
        ("attention_backward.py", 'tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)', "lse * LOG2_E"),
        _gradients, _PADDED,
    ),
    "finite biases are not clamped": (
        ("key_bias.py", '(bias < -LARGEST_BIAS) & (bias != float("-inf"))', "bias != bias"), _large_bias, -1e30,
    ),
    "-inf is clamped too": (
        ("key_bias.py", '(bias < -LARGEST_BIAS) & (bias != float("-inf"))', "bias < -LARGEST_BIAS"), _forward, _EMPTY,
    ),
    "float32's bias starts the sum": (
        ("scores.py", "if FOLDED and query[0].dtype == tl.float32:", "if FOLDED and False:"), _large_bias, -1e9,
    ),
    "the delta of a rounded output": (
        ("attention_backward.py", "delta, grad_query, bias_needs_grad)", "delta, grad_query, False)"),
        _no_gradient, torch.bfloat16,
    ),
    "padding is not read": (
        ("key_bias.py", 'prepared = tl.where(padded, float("-inf"), prepared)', "prepared = prepared"),
        _forward, _PADDED,
    ),
    "padding under a gate is not read": (
        ("scores.py", 'scores = tl.where(attend[None, :] != 0, scores, float("-inf"))', "scores = scores"),
        _forward, _GATED,
    ),
    "the gate is open": (
        ("scores.py", "bias = tl.where(gate[:, None], bias, 0.0) if HAS_GATE else bias\n        if FOLDED and query",
         "if FOLDED and query"), _forward, _GATED,
    ),
    "later keys are visible": (
        ("scores.py", "visible & (first_key + block[None, :] <= last_key[:, None])", "visible"), _forward, _BIASED,
    ),
    "the keys do not end": (
        ("attention_forward.py", "inside = first_key + block < num_keys", "inside = first_key + block < num_keys + 64"),
        _forward, _BIASED,
    ),
    "the columns do not end": (
        ("head_dim.py", "elif FIRST + WIDTH > HEAD_DIM:", "elif FIRST + WIDTH > HEAD_DIM + 64:"), _forward, _SLICED,
    ),
    "stored columns do not end": (
        ("head_dim.py", "mask=is_row[:, None] & (dims[None, :] < HEAD_DIM))", "mask=is_row[:, None])"),
        _forward, _BIASED,
    ),
    "the bias of a decode": (
        ("attention_decode.py", "            scores = plus_bias(scores,", "            plus_bias(scores,"),
        _forward, _DECODE,
    ),
    "the padding of a decode": (
        ("attention_decode.py", "            visible = tl.load(padding_base", "            tl.load(padding_base"),
        _forward, _DECODE,
    ),
    "splits are not weighed": (
        ("attention_decode.py", "tl.exp(partial_lse - maximum)", "tl.exp(partial_lse - partial_lse)"),
        _forward, _DECODE,
    ),
    "packed sequences see one another": (
        ("attention_forward.py", "        key_base += tl.cast(key_start, tl.int64) * key_stride_n\n", ""),
        _packed, _PACKED,
    ),
    "rows that do not count": (
        ("attention_map.py", "row_lse = tl.where(chosen & (total != 0.0), row_lse, float(\"inf\"))",
         "row_lse = tl.where(total != 0.0, row_lse, float(\"inf\"))"), _map, _MAP,
    ),
    "causal rows of the keys' gradients": (
        ("scores.py", "scores = tl.where(keys[:, None] <= last_key[None, :], scores, float(\"-inf\"))",
         "scores = scores"), _gradients, _BIASED,
    ),
}  # fmt: skip


def _run(check, case, capability: int) -> str:
    """What notices it: a finding, a wrong number, or "" for nothing."""
    with on_ptx(capability) as runner:
        try:
            check(case)
        except AssertionError as error:
            return str(error)
    return str(runner.report) if runner.report.findings else ""


@pytest.mark.slow
@pytest.mark.parametrize("name", _MUTANTS)
def test_mutants_go_red(name: str) -> None:
    mutant, check, case = _MUTANTS[name]
    with mutated_kernels(SourceMutant(*mutant)):
        assert _run(check, case, 80), "nothing notices this"


@pytest.mark.parametrize(("check", "case"), {id(m[2]): (m[1], m[2]) for m in _MUTANTS.values()}.values())
def test_without_a_mutant_they_are_green(check, case) -> None:
    assert _run(check, case, 80) == ""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_correction_as_it_was(capability: int) -> None:
    """A product subtracted from the same product, contracted: NaN in every padded batch, and only when compiled."""
    once = SourceMutant("softmax.py", "tl.exp2(shift - new_shift)", "tl.exp2(maximum * factor - new_maximum * factor)")
    state = SourceMutant(
        "softmax.py",
        "    new_shift = tl.maximum(shift, tl.max(scores, 1) * factor)\n",
        "    maximum = shift / factor\n    new_maximum = tl.maximum(maximum, tl.max(scores, 1))\n"
        "    new_shift = new_maximum * factor\n",
    )
    lowest = SourceMutant("softmax.py", "-(2.0**126)", "-1e37")
    padded = replace(_PADDED, head_dim=64, value_dim=64)
    with mutated_kernels(once, state, lowest, _FUSED):
        assert "NaN" in _run(_forward, padded, capability)
    assert _run(_forward, padded, capability) == ""


def test_lanes_store_the_same_sums() -> None:
    """Fused, the lanes that add a row up would end at sums one unit in the last place apart, and store them all."""

    def kinds(head_dim: int) -> set[Kind]:
        with on_ptx(80) as runner:
            leaves = [torch.randn(1, 1, 70, head_dim).requires_grad_() for _ in range(3)]
            finegrain_ops.reweighted_attention(*leaves, backend="triton").sin().sum().backward()
        return set(runner.report.kinds())

    for head_dim in (13, 19):
        assert kinds(head_dim) == set()
        with mutated_kernels(_FUSED):
            assert kinds(head_dim) == {Kind.DIFFERENT_VALUES}
