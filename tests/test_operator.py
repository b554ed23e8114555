"""`reweighted_attention` as a PyTorch operator: registration, tracing, dispatch and what it says of bad input."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
import torch._inductor.config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import finegrain_ops
from attention_cases import CASES
from devices import ways
from finegrain_ops import UnsupportedInputError, backends, reweighted_attention
from finegrain_ops.ops import batched


def operator_arguments(requires_grad: bool, backend: str, device: str, gate: bool = False) -> tuple:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, device=device, requires_grad=requires_grad)
    key, value = (torch.randn(2, 2, 7, d, device=device, requires_grad=requires_grad) for d in (8, 6))
    bias = torch.randn(2, 1, 7, device=device, requires_grad=requires_grad)
    padding = torch.rand(2, 7, device=device) > 0.2
    row_gate = torch.rand(2, 5, device=device) > 0.5 if gate else None
    return query, key, value, bias, padding, row_gate, True, 0.3, True, requires_grad, backend


@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("backend", ["auto", *ways("reference", "sdpa")])
def test_opcheck(backend: str, requires_grad: bool, gate: bool, device: str) -> None:
    operator = torch.ops.finegrain_ops.reweighted_attention.default
    torch.library.opcheck(operator, operator_arguments(requires_grad, backend, device, gate))


@pytest.mark.parametrize("backend", ways("reference", "sdpa"))
def test_opcheck_of_the_backward(backend: str, device: str) -> None:
    query, key, value, bias, padding, gate, is_causal, scale, *_ = operator_arguments(False, backend, device, gate=True)
    output, lse = torch.ops.finegrain_ops.reweighted_attention(
        query, key, value, bias, padding, gate, is_causal, scale, True, True, backend
    )
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(output), grad_lse, query, key, value, bias, padding, gate, output, lse)
        torch.library.opcheck(
            torch.ops.finegrain_ops.reweighted_attention_backward.default,
            (*arguments, is_causal, scale, True, backend),
        )


class SeesOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class OfAnotherType(torch.Tensor):
    """Tells what it is called with, as tensors of other libraries do."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's own loop over the batch
def test_the_dispatcher_is_left_out_only_where_nobody_listens(monkeypatch, device: str) -> None:
    """A decode step pays for it; a mode, a transformation, a tensor of another type or a gradient needs it."""
    tensors = [torch.randn(1, 2, 3, 8, device=device) for _ in range(3)]
    expected = reweighted_attention(*tensors)
    operator, calls = batched._reweighted_attention, []
    monkeypatch.setattr(batched, "_reweighted_attention", lambda *a: calls.append(1) or operator(*a))
    assert torch.equal(reweighted_attention(*tensors), expected)
    assert not calls
    with SeesOperators() as mode:
        assert torch.equal(reweighted_attention(*tensors), expected)
    assert mode.names[0] == "finegrain_ops.reweighted_attention.default"
    traced = make_fx(lambda *t: reweighted_attention(*t))(*tensors)
    assert "finegrain_ops.reweighted_attention" in traced.code
    with FakeTensorMode() as fake:
        assert reweighted_attention(*map(fake.from_tensor, tensors)).shape == expected.shape
    assert torch.equal(reweighted_attention(*(t.as_subclass(OfAnotherType) for t in tensors)), expected)
    assert any("reweighted_attention" in name for name in OfAnotherType.seen)
    assert torch.equal(torch.vmap(reweighted_attention)(*(t[None] for t in tensors))[0], expected)
    assert len(calls) == 5
    tensors[0].requires_grad_()
    assert reweighted_attention(*tensors).requires_grad
    with torch.no_grad():
        reweighted_attention(*tensors)
    assert len(calls) == 6


def test_opcheck_of_the_value_check() -> None:
    operator = torch.ops.finegrain_ops.require_values.default
    torch.library.opcheck(operator, (torch.rand(3, requires_grad=True), "mask", 0.0, 1.0, "values in [0, 1]"))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, device: str) -> None:
    """Every argument, forward and backward; dynamic shapes trace once for all lengths."""

    def layer(arguments: dict) -> torch.Tensor:
        output, lse = reweighted_attention(**arguments, return_lse=True)
        return (output * 2).sum() + torch.where(torch.isinf(lse), 0.0, lse).sum()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for name in ("bias and region", "row gate and padding", "knock-out", "decode", "soft region, weight per batch"):
        arguments = CASES[name].tensors(torch.float32, device)
        names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
        results = []
        for function in (layer, compiled):
            leaves = {n: arguments[n].detach().clone().requires_grad_() for n in names}
            loss = function({**arguments, **leaves})
            results.append([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
        for expected, actual in zip(*results):
            torch.testing.assert_close(actual, expected)


def test_compiles_with_inductor(monkeypatch) -> None:
    """The default compiler, once: the composed bias is fused, the operator is called as it is."""

    def layer(query, key, value, region_mask, weight):
        return reweighted_attention(query, key, value, region_mask, weight, is_causal=True) + 1.0

    torch._dynamo.reset()
    # Its cache on disk does not know when the shape function of an operator changes.
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    arguments = (*torch.randn(3, 1, 2, 9, 8).unbind(0), torch.rand(9), torch.tensor(2.0))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*arguments), layer(*arguments))


def test_compiled_values_are_checked_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reweighted_attention, fullgraph=True, backend="aot_eager")
    query = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="region_mask: expected values in"):
        compiled(query, query, query, torch.tensor([0.0, 2.0, 0.0]), 2.0)


def test_values_on_a_device_are_checked_only_on_request(monkeypatch) -> None:
    from finegrain_ops.validation import values_are_checked

    on_device = torch.empty(3, device="meta")
    monkeypatch.delenv("FINEGRAIN_CHECK", raising=False)
    assert not values_are_checked(on_device)
    assert values_are_checked(torch.empty(3))
    monkeypatch.setenv("FINEGRAIN_CHECK", "1")
    assert values_are_checked(on_device)


def test_gradient_under_checkpointing(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    query, key, value = (torch.randn(1, 2, 9, 8, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(9, device=device, requires_grad=True)

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return reweighted_attention(*tensors[:3], key_bias=tensors[3], is_causal=True).square()

    leaves = (query, key, value, bias)
    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    actual = torch.autograd.grad(checkpoint(layer, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


# --- dispatch ----------------------------------------------------------------------------------------------------


def test_auto_takes_sdpa_on_a_cpu() -> None:
    features = backends.interface.AttentionFeatures("cpu", None, torch.float32, 64, 64, True)
    assert backends.select("auto", features) == "sdpa"


def test_a_named_backend_never_falls_back() -> None:
    query = torch.randn(1, 1, 3, 300, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedInputError) as error:
        reweighted_attention(query, query, query, backend="triton")
    message = str(error.value)
    if backends.load("triton").unavailable_reasons():
        assert "no CUDA device" in message or "not installed" in message
    else:  # under the interpreter: every reason is listed
        assert "float64 is not supported" in message
        assert "at most 256" in message
    assert 'pass backend="auto"' in message
    assert isinstance(error.value, NotImplementedError)
    with pytest.raises(UnsupportedInputError, match=r"no CUDA device|float64 is not supported"):
        reweighted_attention(query, query, query, backend="cuda")


def test_every_reason_is_listed(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    features = backends.interface.AttentionFeatures("cpu", None, torch.bfloat16, 300, 512, True)
    reasons = backends.load("triton").not_supported_reasons(features)
    assert len(reasons) == 3
    assert [word in reason for word, reason in zip(("bfloat16", "300", "512"), reasons)] == [True] * 3


def test_float64_only_on_cpu() -> None:
    features = backends.interface.AttentionFeatures("cuda", 0, torch.float64, 64, 64, False)
    assert "float64" in backends.load("sdpa").not_supported_reasons(features)[0]


# --- bad input ---------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 4, 5, 8)
KV = torch.zeros(2, 2, 7, 8)

BAD_INPUT = {
    "query is no tensor": ({"query": [1.0]}, TypeError, r"query: expected a tensor \(B, H, Nq, D\), got list"),
    "query has 3 dimensions": ({"query": Q[0]}, ValueError, r"query: expected 4 dimensions .* got shape \(4, 5, 8\)"),
    "integer query": (
        {"query": Q.int()},
        TypeError,
        "query: expected float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "dtypes differ": ({"key": KV.half()}, TypeError, "key: expected query's dtype torch.float32, got torch.float16"),
    "devices differ": (
        {"key": KV.to("meta")},
        ValueError,
        "key: expected a tensor on query's device cpu, got one on meta",
    ),
    "batches differ": ({"key": KV[:1]}, ValueError, r"key: expected .* B = 2 and D = 8, got shape \(1, 2, 7, 8\)"),
    "head dims differ": ({"key": KV[..., :4]}, ValueError, "key: expected"),
    "heads no multiple": (
        {"query": Q[:, :3]},
        ValueError,
        "key: expected a number of heads Hkv that divides query's H = 3",
    ),
    "value is shorter": (
        {"value": KV[:, :, :6]},
        ValueError,
        r"value: expected .* \(2, 2, 7\), got shape \(2, 2, 6, 8\)",
    ),
    "no head dim": (
        {"query": Q[..., :0], "key": KV[..., :0]},
        ValueError,
        "query: expected a head dimension D of at least 1",
    ),
    "mask of the wrong length": (
        {"region_mask": torch.ones(6)},
        ValueError,
        r"region_mask: expected shape .* got \(6,\)",
    ),
    "mask of the wrong batch": (
        {"region_mask": torch.ones(3, 7)},
        ValueError,
        r"region_mask: expected shape .* got \(3, 7\)",
    ),
    "integer mask": (
        {"region_mask": torch.ones(7).int()},
        TypeError,
        "region_mask: expected bool or a floating dtype",
    ),
    "mask above 1": ({"region_mask": torch.full((7,), 1.5)}, ValueError, r"region_mask: expected values in \[0, 1\]"),
    "mask below 0": ({"region_mask": torch.full((7,), -0.5)}, ValueError, "region_mask: expected values"),
    "NaN in the mask": ({"region_mask": torch.full((7,), math.nan)}, ValueError, "region_mask: expected values"),
    "negative weight": ({"weight": -1.0}, ValueError, "weight: expected a finite number >= 0 .* got -1.0"),
    "NaN weight": ({"weight": math.nan}, ValueError, "weight: expected a finite number >= 0 .* got nan"),
    "infinite weight": ({"weight": math.inf}, ValueError, "weight: expected a finite number >= 0 .* got inf"),
    "weight is text": ({"weight": "2"}, TypeError, "weight: expected a finite number >= 0 .* got str '2'"),
    "weight is a bool": ({"weight": True}, TypeError, "weight: expected"),
    "negative weight tensor": (
        {"weight": torch.tensor([1.0, -1.0])},
        ValueError,
        "weight: expected finite values >= 0",
    ),
    "NaN weight tensor": ({"weight": torch.tensor(math.nan)}, ValueError, "weight: expected finite values >= 0"),
    "integer weight tensor": ({"weight": torch.tensor(2)}, TypeError, "weight: expected a floating dtype"),
    "weight of the wrong shape": (
        {"weight": torch.ones(4)},
        ValueError,
        r"weight: expected shape \(\), \(B,\) or \(B, H\)",
    ),
    "bias is no tensor": ({"key_bias": 1.0}, TypeError, "key_bias: expected a float tensor"),
    "bool bias": ({"key_bias": torch.ones(7).bool()}, TypeError, "key_bias: expected a floating dtype"),
    "NaN in the bias": (
        {"key_bias": torch.full((7,), math.nan)},
        ValueError,
        "key_bias: expected values below .inf and no NaN",
    ),
    "+inf in the bias": ({"key_bias": torch.full((7,), math.inf)}, ValueError, "key_bias: expected values below .inf"),
    "bias of the wrong length": (
        {"key_bias": torch.ones(2, 4, 8)},
        ValueError,
        r"key_bias: expected shape .* got \(2, 4, 8\)",
    ),
    "integer padding": (
        {"key_padding_mask": torch.ones(2, 7).int()},
        TypeError,
        r"key_padding_mask: .* key_padding_mask.bool\(\)",
    ),
    "padding of the wrong shape": (
        {"key_padding_mask": torch.ones(7).bool()},
        ValueError,
        "key_padding_mask: expected shape",
    ),
    "float gate": ({"row_gate": torch.ones(5)}, TypeError, "row_gate: expected torch.bool"),
    "gate of the wrong length": (
        {"row_gate": torch.ones(7).bool()},
        ValueError,
        r"row_gate: expected shape .* got \(7,\)",
    ),
    "causal is no bool": ({"is_causal": 1}, TypeError, "is_causal: expected True or False, got int 1"),
    "scale is NaN": ({"scale": math.nan}, ValueError, "scale: expected a finite number"),
    "scale is a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale: expected a finite number"),
    "unknown backend": (
        {"backend": "tritn"},
        ValueError,
        "backend: expected one of 'auto', 'triton', .* got str 'tritn'",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:
    defaults = {"query": Q, "key": KV, "value": KV, "region_mask": torch.ones(7), "weight": 2.0}
    with pytest.raises(error, match=message) as raised:
        reweighted_attention(**{**defaults, **arguments})
    assert type(raised.value) is error


def test_info_lists_every_backend(capsys) -> None:
    from finegrain_ops.__main__ import main

    main(["info"])
    printed = capsys.readouterr().out
    for name in (*backends.BACKENDS, *backends.CROP_BACKENDS, "torch", "transformers", finegrain_ops.__version__):
        assert name in printed
