"""The grid of arguments on which every backend is compared with the oracle: odd sizes, one feature at a time and all
together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import finegrain_ops
import oracle
from tolerances import assert_close


@dataclass(frozen=True)
class Case:
    """Shapes and arguments of one call; `tensors` draws the numbers, the same for every dtype."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    num_queries: int = 37
    num_keys: int = 37
    head_dim: int = 16
    value_dim: int = 16
    region: str | None = None  # shape of region_mask: "n", "bn", "bhn"
    soft: bool = False
    weight: str | float = 1.0  # a number, or the shape of a tensor: "scalar", "b", "bh"
    knocked_out: bool = False  # set the (first) weight to 0
    bias: str | None = None  # shape of key_bias
    removed: str = "none"  # which entries of key_bias are -inf: "none", "some", "row" (all of batch entry 1)
    padding: str | None = None  # "left", "random", "row" (all of batch entry 1)
    gate: str | None = None  # "n", "bn"
    is_causal: bool = False
    scale: float | None = None
    layout: str = "bnhd"  # memory order of query, key, value; "sliced", "expanded" and "transposed" have odd strides

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        generator = torch.Generator().manual_seed(20)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        query = self._lay_out(normal(self.batch, self.heads, self.num_queries, self.head_dim), dtype, device)
        key = self._lay_out(normal(self.batch, self.kv_heads, self.num_keys, self.head_dim), dtype, device)
        value = self._lay_out(normal(self.batch, self.kv_heads, self.num_keys, self.value_dim), dtype, device)
        shapes = {
            "n": (self.num_keys,),
            "bn": (self.batch, self.num_keys),
            "bhn": (self.batch, self.heads, self.num_keys),
        }
        extra = torch.float64 if dtype == torch.float64 else torch.float32
        arguments: dict[str, Any] = {"is_causal": self.is_causal, "scale": self.scale}
        if self.region:
            mask = uniform(*shapes[self.region])
            mask[..., self.num_keys // 2 :] = 0.0
            arguments["region_mask"] = mask.to(extra) if self.soft else mask > 0.4
        if isinstance(self.weight, str):
            shape = {"scalar": (), "b": (self.batch,), "bh": (self.batch, self.heads)}[self.weight]
            weight = 0.5 + 4.0 * uniform(*shape)
            if self.knocked_out:
                weight.view(-1)[0] = 0.0
            arguments["weight"] = weight.to(extra)
        else:
            arguments["weight"] = 0.0 if self.knocked_out else self.weight
        if self.bias:
            bias = 2.0 * normal(*shapes[self.bias])
            if self.removed == "some":
                bias[..., 1::3] = float("-inf")
            elif self.removed == "row":
                bias[1:] = float("-inf")
            arguments["key_bias"] = bias.to(extra)
        if self.padding:
            attend = uniform(self.batch, self.num_keys) > 0.3
            if self.padding == "left":
                attend = torch.arange(self.num_keys)[None] >= torch.tensor([[0], [self.num_keys // 3]])[: self.batch]
            elif self.padding == "row":
                attend[1:] = False
            arguments["key_padding_mask"] = attend
        if self.gate:
            gate = uniform(*((self.batch,) if self.gate == "bn" else ()), self.num_queries) > 0.5
            arguments["row_gate"] = gate
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return {"query": query, "key": key, "value": value, **moved}

    def _lay_out(self, tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
        """(B, H, N, D) values in the memory order of `layout`."""
        tensor = tensor.to(device=device, dtype=dtype)
        if self.layout == "bnhd":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "sliced":  # rows of a wider buffer, not starting at its beginning
            wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 24), float("nan"), dtype=dtype, device=device)
            wide[..., 8:-16] = tensor
            return wide[..., 8:-16]
        if self.layout == "expanded":  # one head shared by stride 0
            return tensor[:, :1].expand(tensor.shape)
        if self.layout == "transposed":  # no unit stride
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        return tensor


CASES: dict[str, Case] = {
    "plain": Case(layout="bhnd"),
    "plain causal": Case(is_causal=True),
    "region": Case(region="bn", weight=2.0, is_causal=True),
    "region shared by the batch": Case(region="n", weight=2.0),
    "region per head": Case(region="bhn", weight=4.5, is_causal=True),
    "soft region, weight per batch": Case(region="bn", soft=True, weight="b"),
    "soft region per head, weight per head": Case(region="bhn", soft=True, weight="bh", is_causal=True),
    "scalar weight tensor": Case(region="bn", soft=True, weight="scalar", is_causal=True),
    "weight below 1": Case(region="bn", weight=0.01),
    "knock-out": Case(region="bn", knocked_out=True),
    "soft knock-out": Case(region="bn", soft=True, knocked_out=True, is_causal=True),
    "knock-out of one batch entry": Case(region="bn", soft=True, weight="b", knocked_out=True),
    "bias": Case(bias="bn"),
    "bias shared by the batch": Case(bias="n", is_causal=True),
    "bias per head with -inf": Case(bias="bhn", removed="some", is_causal=True),
    "bias and region": Case(bias="bn", region="bhn", soft=True, weight="bh", is_causal=True),
    "bias removes every key": Case(bias="bn", removed="row", is_causal=True),
    "bias removes every key of gated rows": Case(bias="bn", removed="row", gate="bn"),
    "left padding": Case(padding="left", is_causal=True),
    "random padding": Case(padding="random"),
    "a padded row": Case(padding="row", is_causal=True),
    "padding and bias": Case(padding="random", bias="bn", removed="some", is_causal=True),
    "row gate": Case(bias="bn", gate="n"),
    "row gate per batch, -inf": Case(bias="bhn", removed="some", gate="bn", is_causal=True),
    "row gate and padding": Case(bias="bn", removed="some", gate="bn", padding="left", is_causal=True),
    "row gate and a padded row": Case(region="bn", weight=3.0, gate="bn", padding="row"),
    "row gate without bias": Case(gate="bn", padding="left", is_causal=True),
    "grouped heads": Case(heads=6, kv_heads=2, region="bhn", weight=2.0, is_causal=True),
    "one kv head": Case(heads=5, kv_heads=1, region="bn", weight=2.0),
    "more keys than queries": Case(num_queries=5, num_keys=43, bias="bn", removed="some", is_causal=True),
    "more keys than queries, gate and padding": Case(
        num_queries=9, num_keys=43, bias="bhn", removed="some", gate="bn", padding="left", is_causal=True
    ),
    "more queries than keys": Case(num_queries=43, num_keys=19, bias="bn", is_causal=True),
    "decode": Case(
        num_queries=1, num_keys=65, heads=6, kv_heads=2, region="bn", weight=2.0, padding="left", is_causal=True
    ),
    "one key": Case(num_keys=1, bias="bn"),
    "wide value": Case(value_dim=40, region="bn", weight=2.0, is_causal=True),
    "narrow value": Case(head_dim=40, value_dim=8, bias="bn", gate="n"),
    "odd head dimension": Case(head_dim=19, value_dim=13, region="bn", weight=2.0, is_causal=True),
    "negative scale": Case(scale=-0.3, bias="bn", removed="some", gate="bn", is_causal=True),
    "zero scale": Case(scale=0.0, bias="bn", gate="bn"),
    "zero scale, no gate": Case(scale=0.0, bias="bhn", removed="some", is_causal=True),
    "tiny scale": Case(scale=1e-8, bias="bn", gate="bn"),
    "large scale": Case(scale=3.0, bias="bn", is_causal=True),
    "sliced memory": Case(layout="sliced", region="bn", weight=2.0, is_causal=True),
    "expanded memory": Case(layout="expanded", bias="bn"),
    "no unit stride": Case(layout="transposed", region="bn", weight=2.0, is_causal=True),
}

ALL_CASES = [pytest.param(case, id=name) for name, case in CASES.items()]


def differentiable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with every float tensor a leaf that wants a gradient; strides are kept."""
    return {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def check_forward(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    arguments = case.tensors(dtype, device)
    expected, expected_lse = _expected_forward(case, dtype, device, torch.float64)
    eager, eager_lse = _expected_forward(case, dtype, device, dtype)
    with torch.no_grad():
        output, lse = finegrain_ops.reweighted_attention(**arguments, backend=backend, return_lse=True)
        alone = finegrain_ops.reweighted_attention(**arguments, backend=backend)
    assert output.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(output, expected, dtype, "output", eager)
    assert_close(lse, expected_lse, dtype, "lse", eager_lse)
    assert torch.equal(output, alone), "the output depends on return_lse"


def check_gradients(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Of query, key, value and every float among key_bias, region_mask and weight, through output and lse."""
    arguments = case.tensors(dtype, device)
    expected = _expected_gradients(case, dtype, device, torch.float64)
    eager = _expected_gradients(case, dtype, device, dtype)
    actual = _gradients(finegrain_ops.reweighted_attention, arguments, backend=backend, return_lse=True)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert gradient.dtype == arguments[name].dtype
        # The gradients of bias, mask and weight are sums over half-precision terms, whatever their own dtype.
        assert_close(gradient, expected[name], dtype, f"gradient of {name}", eager[name])


def _gradients(attention: Any, arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    arguments = differentiable(arguments)
    output, lse = attention(**arguments, **options)
    generator = torch.Generator().manual_seed(21)
    d_output, d_lse = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (output, lse))
    lse = torch.where(torch.isinf(lse), 0.0, lse)  # a row without keys has lse -inf, whatever its inputs
    loss = (output * d_output.to(output)).sum() + (lse * d_lse.to(lse)).sum()
    leaves = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)))


# What is expected is the same for every backend.


@functools.lru_cache(maxsize=1024)
def _expected_forward(case: Case, dtype: torch.dtype, device: str, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return oracle.reweighted_attention(**case.tensors(dtype, device), compute_dtype=compute_dtype)


@functools.lru_cache(maxsize=1024)
def _expected_gradients(case: Case, dtype: torch.dtype, device: str, compute_dtype: torch.dtype) -> dict[str, Tensor]:
    return _gradients(oracle.reweighted_attention, case.tensors(dtype, device), compute_dtype=compute_dtype)
