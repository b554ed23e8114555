"""`reweighted_attention_varlen` against the float64 oracle, on a CPU or a GPU, and as a PyTorch operator."""

from __future__ import annotations

import math

import pytest
import torch

import oracle
from devices import pad_packed_sequences, require_support, ways
from finegrain_ops import backends, reweighted_attention, reweighted_attention_varlen
from finegrain_ops.backends import unpacking
from finegrain_ops.backends.interface import PackedCall
from finegrain_ops.key_bias import compose_packed_key_bias
from packed_cases import (
    ALL_PACKED_CASES,
    PACKED_CASES,
    PackedCase,
    check_packed_forward,
    check_packed_gradients,
    check_rows_in_no_sequence,
)
from tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=ways("reference", "sdpa", "reference on any device", "sdpa on any device"))
def backend(request, monkeypatch) -> str:
    if request.param.endswith("on any device"):
        pad_packed_sequences(monkeypatch)
    return request.param.split()[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_PACKED_CASES)
def test_forward(case: PackedCase, dtype: torch.dtype, backend: str, device: str) -> None:
    require_support(backend, dtype, "reweighted_attention_varlen")
    check_packed_forward(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_PACKED_CASES)
def test_gradients(case: PackedCase, dtype: torch.dtype, backend: str, device: str) -> None:
    require_support(backend, dtype, "reweighted_attention_varlen")
    check_packed_gradients(case, dtype, backend, device)


@pytest.mark.parametrize("name", ["grouped heads", "row gate", "some with more, some with fewer keys, gate"])
def test_gradcheck(name: str, backend: str) -> None:
    small = {"heads": 2, "query_lengths": (3, 1, 0, 2), "key_lengths": (2, 4, 1, 2), "head_dim": 3, "value_dim": 3}
    case = PackedCase(**{**vars(PACKED_CASES[name]), **small, "kv_heads": 1 if name == "grouped heads" else 2})
    arguments = case.tensors(torch.float64)
    names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    finite = torch.isfinite(oracle.reweighted_attention_varlen(**arguments)[1])

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        changed = {**arguments, **dict(zip(names, tensors))}
        output, lse = reweighted_attention_varlen(**changed, backend=backend, return_lse=True)
        return output, lse[finite]

    leaves = []
    for n in names:
        leaf = arguments[n].detach().clone()
        leaves.append(leaf.requires_grad_(bool(torch.isfinite(leaf).all())))  # -inf has no finite difference
    assert torch.autograd.gradcheck(function, leaves)


def test_equation_of_the_docstring() -> None:
    arguments = PACKED_CASES["row gate"].tensors(torch.float64)
    bounds = [arguments[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
    outputs = []
    for q0, q1, k0, k1 in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:]):
        query, key, value = (
            arguments[name][start:stop].transpose(0, 1)[None]
            for name, start, stop in (("query", q0, q1), ("key", k0, k1), ("value", k0, k1))
        )
        bias, gate = arguments["key_bias"][k0:k1], arguments["row_gate"][q0:q1]
        outputs.append(reweighted_attention(query, key, value, key_bias=bias, row_gate=gate)[0].transpose(0, 1))
    torch.testing.assert_close(reweighted_attention_varlen(**arguments), torch.cat(outputs))


def test_slices_of_a_fused_projection() -> None:
    """What qkv.unbind(1) of a (T, 3, H, D) projection gives, and its gradient."""
    torch.manual_seed(0)
    fused = torch.randn(21, 3, 4, 16, requires_grad=True)
    bounds = torch.tensor([0, 9, 21], dtype=torch.int32)
    expected, _ = oracle.reweighted_attention_varlen(*fused.unbind(1), bounds, bounds, 12, 12, is_causal=True)
    actual = reweighted_attention_varlen(*fused.unbind(1), bounds, bounds, 12, 12, is_causal=True)
    assert_close(actual, expected, torch.float32, "output")
    expected_gradient, gradient = (torch.autograd.grad(t.square().sum(), fused)[0] for t in (expected, actual))
    assert_close(gradient, expected_gradient, torch.float32, "gradient")


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)], ids=["Tq", "H", "Tk", "all"])
def test_empty_inputs(shape: tuple[int, int, int], backend: str, device: str) -> None:
    num_queries, heads, num_keys = shape
    query = torch.randn(num_queries, heads, 8, device=device, requires_grad=True)
    key = torch.randn(num_keys, heads, 8, device=device, requires_grad=True)
    value = torch.randn(num_keys, heads, 6, device=device, requires_grad=True)
    bias = torch.zeros(num_keys, device=device, requires_grad=True)
    weight = torch.full((1,), 2.0, device=device, requires_grad=True)
    bounds = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (num_queries, num_keys)]
    output, lse = reweighted_attention_varlen(
        query,
        key,
        value,
        *bounds,
        num_queries,
        num_keys,
        torch.ones(num_keys, device=device),
        weight,
        key_bias=bias,
        return_lse=True,
        backend=backend,
    )
    assert output.shape == (num_queries, heads, 6)
    assert lse.shape == (heads, num_queries)
    assert (output == 0).all()
    assert (lse == -math.inf).all()
    output.sum().backward()
    assert all(t.grad is not None and (t.grad == 0).all() for t in (query, key, value, bias, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_in_no_sequence(dtype: torch.dtype, backend: str, device: str) -> None:
    check_rows_in_no_sequence(backend, dtype, device)


GARBAGE = {
    "beyond the end": [0, 5, 900],
    "negative": [-7, 3, 8],
    "decreasing": [0, 8, 2],
    "enormous": [-(2**31), 2**31 - 1, 4],
    "too long": [0, 8, 8],
    "starts late": [3, 5, 8],
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("values", GARBAGE.values(), ids=GARBAGE)
def test_nothing_out_of_bounds_is_read(values: list[int], is_causal: bool) -> None:
    """What a device would get unchecked; on a CPU an index out of bounds raises. Every gradient is as finite."""
    tensors = [torch.randn(8, 2, 4) for _ in range(3)]
    bounds = torch.tensor(values, dtype=torch.int32)
    call = PackedCall(*tensors, bounds, bounds, 4, 4, torch.randn(1, 8), torch.rand(8) > 0.5, is_causal, 0.5)
    reference = backends.load("reference")
    output, lse = unpacking.forward_padded(call, reference.forward)
    gradients = unpacking.backward_padded(call, output, lse, output, lse * 0, True, reference.backward)
    assert output.isfinite().all()
    assert gradients.query.shape == (8, 2, 4)
    if values == GARBAGE["starts late"]:
        assert (output[:3] == 0).all()
        assert (lse[:, :3] == -math.inf).all()
        assert (gradients.key[:3] == 0).all()


@pytest.mark.parametrize(("num_seqs", "max_seqlen"), [(0, 8), (2, 0)], ids=["no sequences", "no length"])
def test_rows_without_any_sequence(num_seqs: int, max_seqlen: int, backend: str) -> None:
    """Where values are unchecked, the shapes and numbers alone may say that there is nothing to see."""
    query = torch.randn(8, 2, 4, requires_grad=True)
    bounds = torch.zeros(num_seqs + 1, dtype=torch.int32)
    bias = torch.zeros(1, 8, requires_grad=True)
    output, lse = torch.ops.finegrain_ops.reweighted_attention_varlen(
        query, query, query, bounds, bounds, max_seqlen, max_seqlen, bias, None, False, 0.5, True, True, backend
    )
    assert (output == 0).all()
    assert (lse == -math.inf).all()
    output.sum().backward()
    assert (query.grad == 0).all()
    assert (bias.grad == 0).all()


def test_backends_get_contiguous_int32_lengths(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(unpacking, "forward", lambda call, _: calls.append(call) or (call.query.clone(), None))
    bounds = torch.tensor([0, -1, 4, -1, 9, -1])[::2]
    query = torch.randn(9, 2, 4)
    for lengths in (bounds, bounds.int()):
        reweighted_attention_varlen(query, query, query, lengths, lengths, 5, 5)
    for lengths in (bounds for call in calls for bounds in (call.cu_seqlens_q, call.cu_seqlens_k)):
        assert lengths.dtype == torch.int32
        assert lengths.is_contiguous()
        assert lengths.tolist() == [0, 4, 9]


def test_the_way_of_a_device_waits_for_nothing() -> None:
    """On meta tensors, which hold no values, any question about a value raises."""
    query, key, value = (torch.empty(9, 2, 4, device="meta", requires_grad=True) for _ in range(3))
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    weight, mask = torch.empty(3, 2, device="meta"), torch.empty(9, device="meta")
    bias = compose_packed_key_bias(mask, weight, mask, query, 9, bounds)
    assert bias is not None
    assert bias.shape == (2, 9)
    gate = torch.empty(9, dtype=torch.bool, device="meta")
    call = PackedCall(query, key, value, bounds, bounds, 5, 5, bias, gate, True, 0.5)
    for name in ("reference", "sdpa"):
        output, lse = backends.load(name).packed_forward(call)
        assert output.shape == (9, 2, 4)
        assert lse is not None
        assert lse.shape == (2, 9)
        if name == "reference":
            backends.load(name).packed_backward(call, output, lse, output, lse, True)
    # A number on a CPU meets tensors of any device.
    assert compose_packed_key_bias(mask, torch.tensor(2.0), None, query, 9, bounds).device.type == "meta"


def test_two_runs_are_equal_to_the_bit(backend: str, device: str) -> None:
    arguments = PACKED_CASES["bias and region"].tensors(torch.float32, device)
    names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    runs = []
    for _ in range(2):
        leaves = {n: arguments[n].detach().requires_grad_() for n in names}
        output = reweighted_attention_varlen(**{**arguments, **leaves}, backend=backend)
        runs.append([output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_autocast(backend: str, device: str) -> None:
    """Query, key and value are cast, and nothing else that a backend computes with is."""
    arguments = PACKED_CASES["bias"].tensors(torch.float32, device)
    arguments["key"] = arguments["key"].half()
    cast = {**arguments, **{name: arguments[name].bfloat16() for name in ("query", "key", "value")}}
    bias = arguments["key_bias"].requires_grad_()
    expected, expected_lse = reweighted_attention_varlen(**cast, return_lse=True, backend=backend)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), bias)
    with torch.autocast(device, torch.bfloat16):
        output, lse = reweighted_attention_varlen(**arguments, return_lse=True, backend=backend)
        (gradient,) = torch.autograd.grad(output.sum(), bias)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    assert torch.equal(lse, expected_lse)
    assert torch.equal(gradient, expected_gradient)


# --- as an operator ----------------------------------------------------------------------------------------------


def operator_arguments(requires_grad: bool, backend: str, device: str) -> tuple:
    torch.manual_seed(0)
    query = torch.randn(9, 4, 8, device=device, requires_grad=requires_grad)
    key, value = (torch.randn(11, 2, d, device=device, requires_grad=requires_grad) for d in (8, 6))
    bias = torch.randn(1, 11, device=device, requires_grad=requires_grad)
    bounds = [torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 4, 4, 9], [0, 5, 7, 11])]
    gate = torch.rand(9, device=device) > 0.5
    return query, key, value, *bounds, 5, 6, bias, gate, True, 0.3, True, requires_grad, backend


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
def test_opcheck(backend: str, requires_grad: bool, device: str) -> None:
    operator = torch.ops.finegrain_ops.reweighted_attention_varlen.default
    torch.library.opcheck(operator, operator_arguments(requires_grad, backend, device))


@pytest.mark.parametrize("backend", ways("reference", "sdpa"))
def test_opcheck_of_the_backward(backend: str, device: str) -> None:
    *packed, is_causal, scale, _, _, backend = operator_arguments(False, backend, device)
    output, lse = torch.ops.finegrain_ops.reweighted_attention_varlen(*packed, True, scale, True, True, backend)
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(output), grad_lse, *packed, output, lse, is_causal, scale, True, backend)
        torch.library.opcheck(torch.ops.finegrain_ops.reweighted_attention_varlen_backward.default, arguments)


def test_opcheck_of_the_value_check() -> None:
    operator = torch.ops.finegrain_ops.require_cu_seqlens.default
    torch.library.opcheck(operator, (torch.tensor([0, 3, 5]), "cu_seqlens_q", 5, 3))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, device: str) -> None:
    def layer(arguments: dict) -> torch.Tensor:
        output, lse = reweighted_attention_varlen(**arguments, return_lse=True)
        return (output * 2).sum() + torch.where(torch.isinf(lse), 0.0, lse).sum()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for name in ("bias and region", "row gate", "knock-out", "decode", "int64 lengths", "no keys in some"):
        arguments = PACKED_CASES[name].tensors(torch.float32, device)
        names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
        results = []
        for function in (layer, compiled):
            leaves = {n: arguments[n].detach().clone().requires_grad_() for n in names}
            loss = function({**arguments, **leaves})
            results.append([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
        for expected, actual in zip(*results):
            torch.testing.assert_close(actual, expected)


def test_dynamic_shapes_compile_once() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reweighted_attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    cases = [PackedCase(lengths, region="t", weight="s") for lengths in ((5, 9, 4), (3, 20, 8, 1), (11, 2, 2, 30, 3))]
    for i, case in enumerate(cases):
        arguments = case.tensors(torch.float32)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(**arguments), reweighted_attention_varlen(**arguments))


def test_compiled_values_are_checked_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reweighted_attention_varlen, fullgraph=True, backend="aot_eager")
    query, bounds = torch.randn(5, 1, 4), torch.tensor([0, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected the last value to be query's length 5, got 7"):
        compiled(query, query, query, bounds, bounds, 7, 7)


def test_gradient_under_checkpointing(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    query, key, value = (torch.randn(9, 2, 8, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(9, device=device, requires_grad=True)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        packed = (*tensors[:3], bounds, bounds, 5, 5)
        return reweighted_attention_varlen(*packed, key_bias=tensors[3], is_causal=True).square()

    leaves = (query, key, value, bias)
    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    actual = torch.autograd.grad(checkpoint(layer, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_auto_takes_sdpa_on_a_cpu() -> None:
    features = backends.interface.AttentionFeatures(
        "cpu", None, torch.float32, 64, 64, True, "reweighted_attention_varlen"
    )
    assert backends.select("auto", features) == "sdpa"


# --- bad input ---------------------------------------------------------------------------------------------------

Q, KV, BOUNDS = torch.zeros(5, 4, 8), torch.zeros(7, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_INPUT = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query: expected a tensor .*Tq, H, D.* got list"),
    "batched": ({"query": Q[None]}, ValueError, r"query: expected 3 dimensions \(Tq, H, D\), got shape \(1, 5, 4, 8\)"),
    "integers": ({"query": Q.int()}, TypeError, "query: expected float16, bfloat16, float32 or float64"),
    "dtypes differ": ({"value": KV.half()}, TypeError, "value: expected query's dtype torch.float32"),
    "devices differ": ({"key": KV.to("meta")}, ValueError, "key: expected a tensor on query's device cpu"),
    "head dims differ": ({"key": KV[..., :4]}, ValueError, r"key: expected .* D = 8, got shape \(7, 2, 4\)"),
    "heads no multiple": ({"query": Q[:, :3]}, ValueError, "key: expected a number of heads Hkv that divides"),
    "value is shorter": ({"value": KV[:6]}, ValueError, r"value: expected .* = \(7, 2\), got shape \(6, 2, 8\)"),
    "no head dim": (
        {"query": Q[..., :0], "key": KV[..., :0]},
        ValueError,
        "query: expected a head dimension D of at least 1",
    ),
    "lengths are a list": ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q: expected an int32 tensor"),
    "lengths are floats": (
        {"cu_seqlens_k": torch.tensor([0.0, 7.0])},
        TypeError,
        r"cu_seqlens_k: expected torch.int32 .* got torch.float32; convert it with cu_seqlens_k.int\(\)",
    ),
    "lengths have two dimensions": ({"cu_seqlens_q": BOUNDS[None]}, ValueError, r"cu_seqlens_q: .* got \(1, 3\)"),
    "no lengths": (
        {"cu_seqlens_q": bounds()},
        ValueError,
        r"cu_seqlens_q: expected shape \(num_seqs \+ 1,\).* got \(0,\)",
    ),
    "lengths on another device": ({"cu_seqlens_q": BOUNDS.to("meta")}, ValueError, "cu_seqlens_q: .*device cpu"),
    "not cumulative from 0": (
        {"cu_seqlens_q": bounds(2, 3, 5)},
        ValueError,
        "cu_seqlens_q: expected the first value to be 0, got 2",
    ),
    "decreasing": ({"cu_seqlens_q": bounds(0, 6, 5)}, ValueError, "cu_seqlens_q: expected values that never decrease"),
    "too long": (
        {"cu_seqlens_k": bounds(0, 2, 7)},
        ValueError,
        "cu_seqlens_k: expected no length above max_seqlen_k = 4, got one of 5",
    ),
    "ends before": (
        {"cu_seqlens_q": bounds(0, 2, 4)},
        ValueError,
        "cu_seqlens_q: expected the last value to be query's length 5, got 4",
    ),
    "ends behind": (
        {"cu_seqlens_k": bounds(0, 4, 8)},
        ValueError,
        "cu_seqlens_k: expected the last value to be key's length 7, got 8",
    ),
    "only a zero": ({"cu_seqlens_q": bounds(0)}, ValueError, "cu_seqlens_q: expected the last value to be query's"),
    "different numbers of sequences": (
        {"cu_seqlens_k": bounds(0, 3, 5, 7)},
        ValueError,
        "cu_seqlens_k: expected as many sequences as in cu_seqlens_q, 2, got 3",
    ),
    "max_seqlen is a tensor": ({"max_seqlen_q": torch.tensor(3)}, TypeError, "max_seqlen_q: expected an integer"),
    "max_seqlen is a float": ({"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k: expected an integer, got float 4.0"),
    "max_seqlen is negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected an integer >= 0, got -1"),
    "mask of the wrong length": (
        {"region_mask": torch.ones(6)},
        ValueError,
        r"region_mask: expected shape \(Tk,\) or \(H, Tk\), here \(7,\) or \(4, 7\), got \(6,\)",
    ),
    "mask per sequence": ({"region_mask": torch.ones(2, 7)}, ValueError, "region_mask: expected shape"),
    "mask above 1": ({"region_mask": torch.full((7,), 1.5)}, ValueError, r"region_mask: expected values in \[0, 1\]"),
    "negative weight": ({"weight": -1.0}, ValueError, "weight: expected a finite number >= 0 .* got -1.0"),
    "negative weight tensor": (
        {"weight": torch.tensor([1.0, -1.0])},
        ValueError,
        "weight: expected finite values >= 0",
    ),
    "weight of the wrong shape": (
        {"weight": torch.ones(4)},
        ValueError,
        r"weight: expected shape \(\), \(num_seqs,\) or \(num_seqs, H\), here \(\) or \(2,\) or \(2, 4\), got \(4,\)",
    ),
    "NaN in the bias": ({"key_bias": torch.full((7,), math.nan)}, ValueError, "key_bias: expected values below .inf"),
    "bias of the wrong length": ({"key_bias": torch.ones(5)}, ValueError, r"key_bias: expected shape .* got \(5,\)"),
    "float gate": ({"row_gate": torch.ones(5)}, TypeError, "row_gate: expected torch.bool"),
    "gate of the wrong length": ({"row_gate": torch.ones(7).bool()}, ValueError, r"row_gate: .* got \(7,\)"),
    "causal is no bool": ({"is_causal": 1}, TypeError, "is_causal: expected True or False, got int 1"),
    "scale is NaN": ({"scale": math.nan}, ValueError, "scale: expected a finite number"),
    "unknown backend": ({"backend": "tritn"}, ValueError, "backend: expected one of 'auto', .* got str 'tritn'"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:
    defaults = {"query": Q, "key": KV, "value": KV, "cu_seqlens_q": BOUNDS, "cu_seqlens_k": bounds(0, 4, 7)}
    lengths = {"max_seqlen_q": 3, "max_seqlen_k": 4, "region_mask": torch.ones(7), "weight": 2.0}
    with pytest.raises(error, match=message) as raised:
        reweighted_attention_varlen(**{**defaults, **lengths, **arguments})
    assert type(raised.value) is error
