"""`attention_map` against the float64 oracle, on a CPU or a GPU, and as a PyTorch operator."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from devices import require_support, ways
from finegrain_ops import UnsupportedInputError, attention_map, backends, reweighted_attention
from finegrain_ops.backends.interface import MapCall
from map_cases import ALL_MAP_CASES, MAP_CASES, MapCase, check_map, check_map_gradients

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=ways("reference", "reference on any device"))
def backend(request, monkeypatch) -> str:
    """ "reference on any device" is the way that devices go, which cannot be asked which rows count."""
    reference = backends.load("reference")
    if request.param.endswith("on any device"):
        monkeypatch.setattr(reference, "_map_rows", lambda call: _all_rows(call, reference._MAP_ROWS))
    return request.param.split()[0]


def _all_rows(call: MapCall, at_a_time: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(call.query.shape[2]).split(at_a_time)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_MAP_CASES)
def test_map(case: MapCase, dtype: torch.dtype, backend: str, device: str) -> None:
    require_support(backend, dtype, "attention_map")
    check_map(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_MAP_CASES)
def test_gradients(case: MapCase, dtype: torch.dtype, backend: str, device: str) -> None:
    require_support(backend, dtype, "attention_map")
    check_map_gradients(case, dtype, backend, device)


@pytest.mark.parametrize("name", ["everything", "known lse, everything", "a padded row", "more keys than queries"])
def test_gradcheck(name: str) -> None:
    """With a known lse the finite differences of its inputs need the lse that belongs to them."""
    case = dataclasses.replace(MAP_CASES[name], num_queries=3, num_keys=4, head_dim=3, knows_lse=False)
    arguments = case.tensors(torch.float64)
    if case.soft:  # finite differences must not leave [0, 1]
        arguments["region_mask"] = 0.1 + 0.8 * arguments["region_mask"]
    names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        changed = {**arguments, **dict(zip(names, tensors))}
        if MAP_CASES[name].knows_lse:
            only_here = ("rows", "heads", "reduction")
            shared = {n: t.detach() if n in names else t for n, t in changed.items() if n not in only_here}
            _, changed["lse"] = reweighted_attention(**shared, value=shared["key"], return_lse=True)
        return attention_map(**changed, backend="reference")

    leaves = []
    for n in names:
        leaf = arguments[n].detach().clone()
        leaves.append(leaf.requires_grad_(bool(torch.isfinite(leaf).all())))  # -inf has no finite difference
    assert torch.autograd.gradcheck(function, leaves)


def test_equation_of_the_docstring() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 4, 9, 8, dtype=torch.float64).unbind(0)
    region_mask, weight = torch.rand(2, 9, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
    key_bias, rows = torch.randn(2, 9, dtype=torch.float64), torch.rand(2, 9) > 0.5
    heads = torch.tensor([True, False, True, True])
    scores = 8**-0.5 * query @ key.mT + (key_bias + weight.log() * region_mask)[:, None, None, :]
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(0), float("-inf"))
    per_head = (scores.softmax(-1) * rows[:, None, :, None]).sum(2) * heads[:, None]
    mean = per_head.sum(1) / (heads.sum() * rows.sum(-1))[:, None]
    for reduction, expected in (("sum", per_head.sum(1)), ("mean", mean), ("none", per_head)):
        actual = attention_map(
            query,
            key,
            rows=rows,
            heads=heads,
            region_mask=region_mask,
            weight=weight,
            key_bias=key_bias,
            is_causal=True,
            reduction=reduction,
        )
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_of_the_attention_itself(dtype: torch.dtype) -> None:
    """What people do: attend, keep the lse, then read out some rows of it."""
    arguments = MAP_CASES["everything"].tensors(dtype)
    shared = {name: t for name, t in arguments.items() if name not in ("rows", "heads", "reduction")}
    shared["query"].requires_grad_()
    _, lse = reweighted_attention(**shared, value=shared["key"], return_lse=True)
    assert lse.requires_grad
    with_lse, without = (attention_map(**arguments, lse=known) for known in (lse, None))
    torch.testing.assert_close(with_lse, without)
    gradients = [torch.autograd.grad(t.square().sum(), shared["query"])[0] for t in (with_lse, without)]
    torch.testing.assert_close(*gradients)


def test_mass_is_kept() -> None:
    """Every row that sees a key gives away a probability of 1 in every head."""
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 5, 8)
    torch.testing.assert_close(attention_map(query, key, is_causal=True).sum(-1), torch.full((2,), 4.0 * 5))
    torch.testing.assert_close(attention_map(query, key, reduction="mean").sum(-1), torch.ones(2))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(
    "shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0), (0, 0, 0, 0)], ids=["B", "H", "Nq", "Nk", "all"]
)
def test_empty_inputs(shape: tuple[int, int, int, int], reduction: str, device: str) -> None:
    batch, heads, num_queries, num_keys = shape
    query = torch.randn(batch, heads, num_queries, 8, device=device, requires_grad=True)
    key = torch.randn(batch, heads, num_keys, 8, device=device, requires_grad=True)
    bias = torch.zeros(batch, num_keys, device=device, requires_grad=True)
    rows = torch.ones(batch, num_queries, dtype=torch.bool, device=device)
    result = attention_map(query, key, rows=rows, key_bias=bias, is_causal=True, reduction=reduction)
    assert result.shape == ((batch, heads, num_keys) if reduction == "none" else (batch, num_keys))
    assert (result == 0).all()
    result.sum().backward()
    assert all(t.grad is not None and (t.grad == 0).all() for t in (query, key, bias))


def test_rows_and_heads_that_do_not_count_are_not_looked_at() -> None:
    """They may hold anything: here NaN."""
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 5, 4)
    rows, heads = torch.tensor([True, False, True, True, False, True]), torch.tensor([False, True])
    spoilt = query.clone()
    spoilt[:, :, ~rows] = math.nan
    spoilt[:, ~heads] = math.nan
    for known_rows in (rows, rows[None]):
        expected, actual = (attention_map(q, key, rows=known_rows, heads=heads) for q in (query, spoilt))
        torch.testing.assert_close(actual, expected)


class LargestTensor(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation below the operator makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("knows_lse", [False, True], ids=["", "known lse"])
def test_no_quadratic_memory(knows_lse: bool) -> None:
    """The backend is called directly: inside an operator the mode would see nothing."""
    n, rows_at_a_time = 2048, 128
    query, key = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    bias, gate = torch.randn(1, 1, n), torch.rand(1, n) > 0.5
    lse = torch.zeros(1, 1, n) if knows_lse else None
    reference = backends.load("reference")
    for rows in (None, torch.ones(1, n, dtype=torch.bool)):
        call = MapCall(query, key, bias, None, gate, rows, None, lse, True, 0.3)
        with LargestTensor() as largest:
            result, new_lse = reference.map_forward(call)
            reference.map_backward(call, new_lse, result, True)
        assert 4 * n * rows_at_a_time <= largest.nbytes < 2 * 4 * n * rows_at_a_time


def test_the_way_of_a_device_waits_for_nothing() -> None:
    """On meta tensors, which hold no values, any question about a value raises."""
    query, key = (torch.empty(2, 4, 9, 8, device="meta") for _ in range(2))
    bias, lse = torch.empty(2, 1, 9, device="meta"), torch.empty(2, 4, 9, device="meta")
    mask, heads = (torch.empty(*shape, dtype=torch.bool, device="meta") for shape in ((2, 9), (4,)))
    reference = backends.load("reference")
    for known_lse in (None, lse):
        call = MapCall(query, key, bias, mask, mask, mask, heads, known_lse, True, 0.5)
        result, new_lse = reference.map_forward(call)
        reference.map_backward(call, new_lse, result, True)


def test_autocast(device: str) -> None:
    """Query and key are cast, and nothing else that a backend computes with is."""
    arguments = MAP_CASES["bias"].tensors(torch.float32, device)
    arguments["key"] = arguments["key"].half()
    bias = arguments["key_bias"].requires_grad_()
    cast = {**arguments, "query": arguments["query"].bfloat16(), "key": arguments["key"].bfloat16()}
    expected = attention_map(**cast)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), bias)
    with torch.autocast(device, torch.bfloat16):
        actual = attention_map(**arguments)
        (gradient,) = torch.autograd.grad(actual.square().sum(), bias)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert torch.equal(gradient, expected_gradient)


# --- as an operator ----------------------------------------------------------------------------------------------


def operator_arguments(requires_grad: bool, knows_lse: bool, transposed: bool, device: str) -> tuple:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, device=device), torch.randn(2, 2, 7, 8, device=device)
    if transposed:
        query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    bias = torch.randn(2, 1, 7, device=device)
    for tensor in (query, key, bias):
        tensor.requires_grad_(requires_grad)
    padding, gate, rows = (torch.rand(2, n, device=device) > 0.4 for n in (7, 5, 5))
    heads = torch.tensor([True, True, False, True], device=device)
    lse = torch.randn(2, 4, 5, device=device) if knows_lse else None
    return query, key, bias, padding, gate, rows, heads, lse, True, 0.3, requires_grad, "auto"


@pytest.mark.parametrize("knows_lse", [False, True], ids=["", "known lse"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_opcheck(requires_grad: bool, knows_lse: bool, transposed: bool, device: str) -> None:
    operator = torch.ops.finegrain_ops.attention_map.default
    torch.library.opcheck(operator, operator_arguments(requires_grad, knows_lse, transposed, device))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_opcheck_of_the_backward(transposed: bool, device: str) -> None:
    *tensors, _, is_causal, scale, _, backend = operator_arguments(False, False, transposed, device)
    grad_map, lse = torch.randn(2, 4, 7, device=device), torch.randn(2, 4, 5, device=device)
    arguments = (grad_map, *tensors, lse, is_causal, scale)
    for bias_needs_grad in (False, True):
        torch.library.opcheck(
            torch.ops.finegrain_ops.attention_map_backward.default, (*arguments, bias_needs_grad, backend)
        )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, device: str) -> None:
    def loss(arguments: dict) -> torch.Tensor:
        return attention_map(**arguments).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for name in ("everything", "known lse, everything", "rows per batch, mean", "mean", "knock-out", "decode"):
        arguments = MAP_CASES[name].tensors(torch.float32, device)
        names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
        names.remove("lse") if "lse" in names else None
        results = []
        for function in (loss, compiled):
            leaves = {n: arguments[n].detach().clone().requires_grad_() for n in names}
            result = function({**arguments, **leaves})
            results.append([result.detach(), *torch.autograd.grad(result, list(leaves.values()))])
        for expected, actual in zip(*results):
            torch.testing.assert_close(actual, expected)


def test_gradient_under_checkpointing(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    leaves = tuple(torch.randn(1, heads, 9, 8, device=device, requires_grad=True) for heads in (4, 2))

    def layer(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return attention_map(query, key, is_causal=True, reduction="none").square()

    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    actual = torch.autograd.grad(checkpoint(layer, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_auto_takes_reference_on_a_cpu() -> None:
    features = backends.interface.AttentionFeatures("cpu", None, torch.float32, 64, 64, True, "attention_map")
    assert backends.select("auto", features) == "reference"


def test_sdpa_says_why_it_cannot() -> None:
    with pytest.raises(UnsupportedInputError, match="SDPA returns no probabilities"):
        attention_map(Q, K, backend="sdpa")


# --- bad input ---------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)

BAD_INPUT = {
    "query is no tensor": ({"query": None}, TypeError, "query: expected a tensor .*B, H, Nq, D.* got NoneType None"),
    "three dimensions": ({"key": K[0]}, ValueError, r"key: expected 4 dimensions .* got shape \(2, 7, 8\)"),
    "integers": ({"query": Q.int()}, TypeError, "query: expected float16, bfloat16, float32 or float64"),
    "dtypes differ": ({"key": K.half()}, TypeError, "key: expected query's dtype torch.float32"),
    "batches differ": ({"key": K[:1]}, ValueError, r"key: expected .* B = 2 and D = 8, got shape \(1, 2, 7, 8\)"),
    "heads no multiple": ({"query": Q[:, :3]}, ValueError, "key: expected a number of heads Hkv that divides"),
    "rows are numbers": (
        {"rows": torch.tensor([0, 1, 2, 3, 4])},
        TypeError,
        r"rows: expected torch.bool, got torch.int64; convert it with rows.bool\(\)",
    ),
    "rows are a list": ({"rows": [True] * 5}, TypeError, "rows: expected a bool tensor .* got list"),
    "rows of the wrong length": (
        {"rows": torch.ones(7).bool()},
        ValueError,
        r"rows: expected shape \(Nq,\) or \(B, Nq\), here \(5,\) or \(2, 5\), got \(7,\)",
    ),
    "rows on another device": ({"rows": torch.ones(5).bool().to("meta")}, ValueError, "rows: .* device cpu"),
    "heads of the wrong number": (
        {"heads": torch.ones(2).bool()},
        ValueError,
        r"heads: expected shape \(H,\), here \(4,\), got \(2,\)",
    ),
    "heads are numbers": ({"heads": torch.tensor([1, 2])}, TypeError, "heads: expected torch.bool"),
    "lse per row only": ({"lse": torch.zeros(2, 5)}, ValueError, r"lse: expected shape \(B, H, Nq\), here \(2, 4, 5\)"),
    "rounded lse": (
        {"lse": torch.zeros(2, 4, 5).half()},
        TypeError,
        "lse: expected torch.float32 for a torch.float32 query, got torch.float16",
    ),
    "lse is no tensor": ({"lse": True}, TypeError, "lse: expected a tensor .* got bool True"),
    "mask of the wrong length": ({"region_mask": torch.ones(5)}, ValueError, r"region_mask: .* got \(5,\)"),
    "negative weight": ({"weight": -1.0}, ValueError, "weight: expected a finite number >= 0 .* got -1.0"),
    "bias of the wrong length": ({"key_bias": torch.ones(5)}, ValueError, r"key_bias: expected shape .* got \(5,\)"),
    "padding of the wrong shape": (
        {"key_padding_mask": torch.ones(7).bool()},
        ValueError,
        "key_padding_mask: expected shape",
    ),
    "float gate": ({"row_gate": torch.ones(5)}, TypeError, "row_gate: expected torch.bool"),
    "causal is no bool": ({"is_causal": 1}, TypeError, "is_causal: expected True or False, got int 1"),
    "scale is NaN": ({"scale": math.nan}, ValueError, "scale: expected a finite number"),
    "unknown reduction": (
        {"reduction": "max"},
        ValueError,
        "reduction: expected one of 'sum', 'mean', 'none', got str 'max'",
    ),
    "reduction is None": ({"reduction": None}, ValueError, "reduction: expected one of .* got NoneType None"),
    "unknown backend": ({"backend": "tritn"}, ValueError, "backend: expected one of 'auto', .* got str 'tritn'"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        attention_map(**{"query": Q, "key": K, "region_mask": torch.ones(7), "weight": 2.0, **arguments})
    assert type(raised.value) is error
