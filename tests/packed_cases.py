"""The grid of arguments on which every backend's packed sequences are compared with the oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import finegrain_ops
import oracle
from attention_cases import differentiable
from tolerances import assert_close


@dataclass(frozen=True)
class PackedCase:
    """Lengths and arguments of one call; `tensors` draws the numbers, the same for every dtype."""

    query_lengths: tuple[int, ...] = (13, 1, 37, 20)
    key_lengths: tuple[int, ...] | None = None  # None: those of query
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    region: str | None = None  # shape of region_mask: "t", "ht"
    soft: bool = False
    weight: str | float = 1.0  # a number, or the shape of a tensor: "scalar", "s", "sh"
    knocked_out: bool = False  # set the (first) weight to 0
    bias: str | None = None  # shape of key_bias
    removed: str = "none"  # which entries of key_bias are -inf: "none", "some", "sequence" (all of the first sequence)
    gate: bool = False
    is_causal: bool = False
    scale: float | None = None
    slack: int = 0  # how much larger max_seqlen is than any length
    index_dtype: torch.dtype = torch.int32
    layout: str = "thd"  # memory order of query, key, value; "fused", "expanded" and "transposed" have odd strides

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        generator = torch.Generator().manual_seed(30)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        key_lengths = self.query_lengths if self.key_lengths is None else self.key_lengths
        num_queries, num_keys, num_seqs = sum(self.query_lengths), sum(key_lengths), len(key_lengths)
        query = self._lay_out(normal(num_queries, self.heads, self.head_dim), dtype, device)
        key = self._lay_out(normal(num_keys, self.kv_heads, self.head_dim), dtype, device)
        value = self._lay_out(normal(num_keys, self.kv_heads, self.value_dim), dtype, device)
        shapes = {"t": (num_keys,), "ht": (self.heads, num_keys)}
        extra = torch.float64 if dtype == torch.float64 else torch.float32
        arguments: dict[str, Any] = {
            "cu_seqlens_q": self._cumulative(self.query_lengths),
            "cu_seqlens_k": self._cumulative(key_lengths),
            "max_seqlen_q": max(self.query_lengths, default=0) + self.slack,
            "max_seqlen_k": max(key_lengths, default=0) + self.slack,
            "is_causal": self.is_causal,
            "scale": self.scale,
        }
        if self.region:
            mask = uniform(*shapes[self.region])
            mask[..., ::3] = 0.0
            arguments["region_mask"] = mask.to(extra) if self.soft else mask > 0.4
        if isinstance(self.weight, str):
            shape = {"scalar": (), "s": (num_seqs,), "sh": (num_seqs, self.heads)}[self.weight]
            weight = 0.5 + 4.0 * uniform(*shape)
            if self.knocked_out:
                weight.view(-1)[:1] = 0.0
            arguments["weight"] = weight.to(extra)
        else:
            arguments["weight"] = 0.0 if self.knocked_out else self.weight
        if self.bias:
            bias = 2.0 * normal(*shapes[self.bias])
            if self.removed == "some":
                bias[..., 1::3] = float("-inf")
            elif self.removed == "sequence":
                bias[..., : key_lengths[0]] = float("-inf")
            arguments["key_bias"] = bias.to(extra)
        if self.gate:
            arguments["row_gate"] = uniform(num_queries) > 0.5
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return {"query": query, "key": key, "value": value, **moved}

    def _cumulative(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(self.index_dtype)

    def _lay_out(self, tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
        """(T, H, D) values in the memory order of `layout`."""
        tensor = tensor.to(device=device, dtype=dtype)
        if self.layout == "fused":  # one of three in (T, 3, H, D), as a projection to all of them gives it
            fused = torch.full((tensor.shape[0], 3, *tensor.shape[1:]), float("nan"), dtype=dtype, device=device)
            fused[:, 1] = tensor
            return fused[:, 1]
        if self.layout == "htd":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "expanded":  # one head shared by stride 0
            return tensor[:, :1].expand(tensor.shape)
        if self.layout == "transposed":  # no unit stride
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        return tensor


PACKED_CASES: dict[str, PackedCase] = {
    "plain": PackedCase(),
    "plain causal": PackedCase(is_causal=True),
    "one sequence": PackedCase((37,), region="t", weight=2.0, is_causal=True),
    "many short sequences": PackedCase((1, 2, 3, 1, 1, 5, 2, 17, 1), bias="t", is_causal=True),
    "region": PackedCase(region="t", weight=2.0, is_causal=True),
    "region per head": PackedCase(region="ht", weight=4.5),
    "soft region, weight per sequence": PackedCase(region="t", soft=True, weight="s", is_causal=True),
    "soft region per head, weight per sequence and head": PackedCase(region="ht", soft=True, weight="sh"),
    "region, weight per sequence and head": PackedCase(region="t", weight="sh", is_causal=True),
    "scalar weight tensor": PackedCase(region="t", soft=True, weight="scalar"),
    "knock-out": PackedCase(region="t", knocked_out=True),
    "knock-out of one sequence": PackedCase(region="t", soft=True, weight="s", knocked_out=True, is_causal=True),
    "knock-out in one head of one sequence": PackedCase(region="ht", soft=True, weight="sh", knocked_out=True),
    "bias": PackedCase(bias="t"),
    "bias per head with -inf": PackedCase(bias="ht", removed="some", is_causal=True),
    "bias and region": PackedCase(bias="t", region="ht", soft=True, weight="sh", is_causal=True),
    "bias removes every key of a sequence": PackedCase(bias="t", removed="sequence", is_causal=True),
    "bias removes every key of gated rows": PackedCase(bias="ht", removed="sequence", gate=True),
    "row gate": PackedCase(bias="t", gate=True),
    "row gate, -inf, per head": PackedCase(bias="ht", removed="some", gate=True, is_causal=True),
    "row gate without bias": PackedCase(gate=True, is_causal=True),
    "grouped heads": PackedCase(heads=6, kv_heads=2, region="ht", weight="sh", is_causal=True),
    "one kv head": PackedCase(heads=5, kv_heads=1, bias="t"),
    "more keys than queries": PackedCase((5, 1, 17), (20, 33, 18), bias="t", removed="some", is_causal=True),
    "more queries than keys": PackedCase((20, 33, 18), (5, 1, 17), bias="t", is_causal=True),
    "some with more, some with fewer keys, gate": PackedCase(
        (20, 1, 18, 7), (5, 33, 18, 19), bias="ht", removed="some", gate=True, is_causal=True
    ),
    "decode": PackedCase((1, 1, 1), (65, 17, 40), heads=6, kv_heads=2, region="t", weight="s", is_causal=True),
    "no queries in some": PackedCase((0, 9, 0, 0, 21, 0), (4, 9, 0, 17, 21, 3), bias="t", is_causal=True),
    "no keys in some": PackedCase((4, 9, 0, 17, 21, 3), (0, 9, 0, 0, 21, 0), bias="t", gate=True, is_causal=True),
    "no keys in some, not causal": PackedCase((4, 9, 0, 17), (0, 9, 0, 3), region="t", weight="s"),
    "no keys at all": PackedCase((4, 9), (0, 0), bias="t"),
    "no queries at all": PackedCase((0, 0), (4, 9), bias="t"),
    "no sequences": PackedCase((), region="t", weight="s", bias="ht"),
    "wide value": PackedCase(value_dim=40, region="t", weight=2.0, is_causal=True),
    "narrow value": PackedCase(head_dim=40, value_dim=8, bias="t", gate=True),
    "odd head dimension": PackedCase(head_dim=19, value_dim=13, region="t", weight=2.0, is_causal=True),
    "negative scale": PackedCase(scale=-0.3, bias="t", removed="some", gate=True, is_causal=True),
    "zero scale": PackedCase(scale=0.0, bias="t"),
    "max_seqlen larger than any": PackedCase(slack=29, bias="t", gate=True, is_causal=True),
    "int64 lengths": PackedCase(index_dtype=torch.int64, region="t", weight="s"),
    "fused memory": PackedCase(layout="fused", region="t", weight=2.0, is_causal=True),
    "heads outside": PackedCase(layout="htd", bias="ht", is_causal=True),
    "expanded memory": PackedCase(layout="expanded", bias="t"),
    "no unit stride": PackedCase(layout="transposed", region="t", weight=2.0, is_causal=True),
}

ALL_PACKED_CASES = [pytest.param(case, id=name) for name, case in PACKED_CASES.items()]


def check_packed_forward(case: PackedCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    arguments = case.tensors(dtype, device)
    expected, expected_lse = _expected_forward(case, dtype, device, torch.float64)
    eager, eager_lse = _expected_forward(case, dtype, device, dtype)
    with torch.no_grad():
        output, lse = finegrain_ops.reweighted_attention_varlen(**arguments, backend=backend, return_lse=True)
        alone = finegrain_ops.reweighted_attention_varlen(**arguments, backend=backend)
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(output, expected, dtype, "output", eager)
    assert_close(lse, expected_lse, dtype, "lse", eager_lse)
    assert torch.equal(output, alone), "the output depends on return_lse"


def check_packed_gradients(case: PackedCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Of query, key, value and every float among key_bias, region_mask and weight, through output and lse."""
    arguments = case.tensors(dtype, device)
    expected = _expected_gradients(case, dtype, device, torch.float64)
    eager = _expected_gradients(case, dtype, device, dtype)
    actual = _gradients(finegrain_ops.reweighted_attention_varlen, arguments, backend=backend, return_lse=True)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert gradient.dtype == arguments[name].dtype
        assert_close(gradient, expected[name], dtype, f"gradient of {name}", eager[name])


def check_rows_in_no_sequence(backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Rows behind the last sequence, which a device does not refuse, are 0 and -inf, and nothing of them gets out:
    they hold NaN here. The operator is called as it is, since the public function refuses this on a CPU.
    """
    arguments = PACKED_CASES["row gate, -inf, per head"].tensors(dtype, device)
    tensors = {name: arguments[name] for name in ("query", "key", "value")}
    longer = {n: torch.cat([t, torch.full_like(t[:5], float("nan"))]) for n, t in tensors.items()}
    bias = torch.nn.functional.pad(arguments["key_bias"], (0, 5), value=float("nan"))
    gate = torch.nn.functional.pad(arguments["row_gate"], (0, 5), value=True)
    order = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    options = (True, 0.25, True, True, backend)

    def run(leaves: dict[str, Tensor], bias: Tensor, gate: Tensor, total: int) -> list[Tensor]:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in {**leaves, "key_bias": bias}.items()}
        *packed, key_bias = leaves.values()
        output, lse = torch.ops.finegrain_ops.reweighted_attention_varlen(
            *packed, *(arguments[n] for n in order), key_bias, gate, *options
        )
        inside = output[:total].float().square().sum() + lse[:, :total].masked_fill(lse[:, :total].isinf(), 0.0).sum()
        gradients = torch.autograd.grad(inside, list(leaves.values()))
        return [output, lse.T, *gradients[:3], gradients[3].T]

    total = tensors["query"].shape[0]
    expected = run(tensors, arguments["key_bias"], arguments["row_gate"], total)
    actual = run(longer, bias, gate, total)
    for i, (inner, outer) in enumerate(zip(expected, actual)):
        torch.testing.assert_close(outer[:total], inner)
        assert (outer[total:] == (float("-inf") if i == 1 else 0.0)).all()


def _gradients(attention: Any, arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    arguments = differentiable(arguments)
    output, lse = attention(**arguments, **options)
    generator = torch.Generator().manual_seed(31)
    d_output, d_lse = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (output, lse))
    lse = torch.where(torch.isinf(lse), 0.0, lse)  # a row without keys has lse -inf, whatever its inputs
    loss = (output * d_output.to(output)).sum() + (lse * d_lse.to(lse)).sum()
    leaves = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
    # The loop of the oracle may leave everything out, where there is no sequence.
    if not loss.requires_grad:
        return {n: torch.zeros_like(t) for n, t in leaves.items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients))


# What is expected is the same for every backend.


@functools.lru_cache(maxsize=1024)
def _expected_forward(
    case: PackedCase, dtype: torch.dtype, device: str, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return oracle.reweighted_attention_varlen(**case.tensors(dtype, device), compute_dtype=compute_dtype)


@functools.lru_cache(maxsize=1024)
def _expected_gradients(
    case: PackedCase, dtype: torch.dtype, device: str, compute_dtype: torch.dtype
) -> dict[str, Tensor]:
    return _gradients(oracle.reweighted_attention_varlen, case.tensors(dtype, device), compute_dtype=compute_dtype)
