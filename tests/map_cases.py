"""The grid of arguments on which every backend's attention map is compared with the oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import finegrain_ops
import oracle
from attention_cases import Case, differentiable
from tolerances import assert_close


@dataclass(frozen=True)
class MapCase(Case):
    """The arguments of a Case without its value, and what an attention map adds."""

    rows: str | None = None  # "n", "bn"; "few": one row of the last batch entry; "nowhere": none at all
    chosen_heads: tuple[int, ...] | None = None
    knows_lse: bool = False
    reduction: str = "sum"

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        arguments = super().tensors(dtype, device)
        if self.knows_lse:
            _, lse = oracle.reweighted_attention(**arguments)
            arguments["lse"] = lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
        del arguments["value"]
        generator = torch.Generator().manual_seed(40)
        if self.rows:
            shape = (self.num_queries,) if self.rows == "n" else (self.batch, self.num_queries)
            rows = torch.rand(shape, generator=generator) > 0.5
            if self.rows in ("few", "nowhere"):
                rows[:] = False
                rows[-1:, self.num_queries // 2] = self.rows == "few"
            arguments["rows"] = rows.to(device)
        if self.chosen_heads is not None:
            arguments["heads"] = torch.tensor([h in self.chosen_heads for h in range(self.heads)], device=device)
        return {**arguments, "reduction": self.reduction}


MAP_CASES: dict[str, MapCase] = {
    "plain": MapCase(layout="bhnd"),
    "plain causal": MapCase(is_causal=True),
    "mean": MapCase(is_causal=True, reduction="mean"),
    "per head": MapCase(is_causal=True, reduction="none"),
    "rows": MapCase(rows="n", is_causal=True),
    "rows per batch": MapCase(rows="bn", is_causal=True, reduction="none"),
    "rows per batch, mean": MapCase(rows="bn", is_causal=True, reduction="mean"),
    "one row": MapCase(rows="few", is_causal=True),
    "one row, mean": MapCase(rows="few", reduction="mean"),
    "no row": MapCase(rows="nowhere", is_causal=True, reduction="none"),
    "no row, mean": MapCase(rows="nowhere", reduction="mean"),
    "heads": MapCase(heads=4, kv_heads=2, chosen_heads=(1, 2), is_causal=True),
    "heads, per head": MapCase(heads=4, kv_heads=4, chosen_heads=(0, 3), reduction="none"),
    "heads and rows, mean": MapCase(heads=4, kv_heads=2, chosen_heads=(1,), rows="bn", reduction="mean"),
    "no head": MapCase(chosen_heads=(), is_causal=True),
    "no head, mean": MapCase(chosen_heads=(), rows="n", reduction="mean"),
    "region": MapCase(region="bn", weight=2.0, is_causal=True),
    "region shared by the batch": MapCase(region="n", weight=2.0, rows="n"),
    "soft region, weight per batch": MapCase(region="bn", soft=True, weight="b", rows="bn"),
    "soft region per head, weight per head": MapCase(
        region="bhn", soft=True, weight="bh", is_causal=True, reduction="none"
    ),
    "knock-out": MapCase(region="bn", knocked_out=True, rows="bn"),
    "knock-out of one batch entry": MapCase(region="bn", soft=True, weight="b", knocked_out=True),
    "bias": MapCase(bias="bn", rows="n"),
    "bias shared by the batch": MapCase(bias="n", is_causal=True, reduction="none"),
    "bias per head with -inf": MapCase(bias="bhn", removed="some", is_causal=True, rows="bn"),
    "bias removes every key": MapCase(bias="bn", removed="row", is_causal=True, reduction="mean"),
    "bias removes every key of gated rows": MapCase(bias="bn", removed="row", gate="bn", rows="bn"),
    "left padding": MapCase(padding="left", is_causal=True, rows="bn"),
    "random padding": MapCase(padding="random", reduction="none"),
    "a padded row": MapCase(padding="row", is_causal=True),
    "padding and bias": MapCase(padding="random", bias="bn", removed="some", is_causal=True, rows="n"),
    "row gate": MapCase(bias="bn", gate="n", rows="bn"),
    "row gate, -inf, per head": MapCase(bias="bhn", removed="some", gate="bn", is_causal=True, reduction="none"),
    "row gate and padding": MapCase(bias="bn", removed="some", gate="bn", padding="left", is_causal=True, rows="n"),
    "row gate without bias": MapCase(gate="bn", is_causal=True, rows="n"),
    "grouped heads": MapCase(heads=6, kv_heads=2, region="bhn", weight=2.0, is_causal=True, reduction="none"),
    "one kv head": MapCase(heads=5, kv_heads=1, region="bn", weight=2.0, rows="bn"),
    "more keys than queries": MapCase(num_queries=5, num_keys=43, bias="bn", removed="some", is_causal=True, rows="bn"),
    "more queries than keys": MapCase(num_queries=43, num_keys=19, bias="bn", is_causal=True, rows="n"),
    "decode": MapCase(
        num_queries=1, num_keys=65, heads=6, kv_heads=2, region="bn", weight=2.0, padding="left", is_causal=True
    ),
    "one key": MapCase(num_keys=1, bias="bn"),
    "more rows than are held at a time": MapCase(num_queries=301, num_keys=70, bias="bn", is_causal=True, rows="bn"),
    "more rows than are held at a time, all": MapCase(
        num_queries=301, num_keys=70, bias="bn", gate="bn", is_causal=True, knows_lse=True
    ),
    "odd head dimension": MapCase(head_dim=19, region="bn", weight=2.0, is_causal=True, rows="n"),
    "negative scale": MapCase(scale=-0.3, bias="bn", removed="some", gate="bn", is_causal=True),
    "zero scale": MapCase(scale=0.0, bias="bn", gate="bn", rows="n"),
    "large scale": MapCase(scale=3.0, bias="bn", is_causal=True),
    "known lse": MapCase(knows_lse=True, is_causal=True, rows="n"),
    "known lse, everything": MapCase(
        heads=6,
        kv_heads=2,
        knows_lse=True,
        rows="bn",
        chosen_heads=(0, 1, 4),
        bias="bhn",
        removed="some",
        region="bn",
        soft=True,
        weight="bh",
        gate="bn",
        padding="left",
        is_causal=True,
        reduction="mean",
    ),
    "known lse, empty rows": MapCase(knows_lse=True, bias="bn", removed="row", padding="random", is_causal=True),
    "everything": MapCase(
        heads=6,
        kv_heads=2,
        rows="bn",
        chosen_heads=(0, 1, 4),
        bias="bhn",
        removed="some",
        region="bn",
        soft=True,
        weight="bh",
        gate="bn",
        padding="left",
        is_causal=True,
        reduction="none",
    ),
    "sliced memory": MapCase(layout="sliced", region="bn", weight=2.0, is_causal=True, rows="bn"),
    "expanded memory": MapCase(layout="expanded", bias="bn"),
    "no unit stride": MapCase(layout="transposed", region="bn", weight=2.0, is_causal=True, rows="bn"),
}

ALL_MAP_CASES = [pytest.param(case, id=name) for name, case in MAP_CASES.items()]


def check_map(case: MapCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Also for half-precision inputs the map is float32, and as exact as that: their products fit into float32."""
    arguments = case.tensors(dtype, device)
    kept_in = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        actual = finegrain_ops.attention_map(**arguments, backend=backend)
    assert actual.dtype == kept_in
    eager = _expected_map(case, dtype, device, kept_in)
    assert_close(actual, _expected_map(case, dtype, device, torch.float64), kept_in, "map", eager)


def check_map_gradients(case: MapCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Of query, key and every float among key_bias, region_mask and weight."""
    arguments = case.tensors(dtype, device)
    expected = _expected_gradients(case, dtype, device, torch.float64)
    eager = _expected_gradients(case, dtype, device, dtype)
    actual = _gradients(finegrain_ops.attention_map, arguments, backend=backend)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert gradient.dtype == arguments[name].dtype
        # The gradients of bias, mask and weight are sums over half-precision terms, whatever their own dtype.
        assert_close(gradient, expected[name], dtype, f"gradient of {name}", eager[name])


def _gradients(attention_map: Any, arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """lse, where it is given, counts as known and not as an input."""
    arguments = {**differentiable(arguments), **{name: t for name, t in arguments.items() if name == "lse"}}
    result = attention_map(**arguments, **options)
    generator = torch.Generator().manual_seed(41)
    loss = (result * torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)).sum()
    leaves = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
    if not loss.requires_grad:  # the loop of the oracle leaves everything out, where no head counts
        return {n: torch.zeros_like(t) for n, t in leaves.items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients))


# What is expected is the same for every backend.


@functools.lru_cache(maxsize=1024)
def _expected_map(case: MapCase, dtype: torch.dtype, device: str, compute_dtype: torch.dtype) -> Tensor:
    return oracle.attention_map(**case.tensors(dtype, device), compute_dtype=compute_dtype)


@functools.lru_cache(maxsize=1024)
def _expected_gradients(
    case: MapCase, dtype: torch.dtype, device: str, compute_dtype: torch.dtype
) -> dict[str, Tensor]:
    return _gradients(oracle.attention_map, case.tensors(dtype, device), compute_dtype=compute_dtype)
