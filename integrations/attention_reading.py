"""Reading attention out of a patched model: pass an `AttentionReader` as `attention_reader=` to its forward."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..readout import attention_map
from ..validation import describe
from .attention_interface import AttentionCall

_REDUCTIONS = ("sum", "mean", "none")


class AttentionReader:
    """Collects the attention that every key receives from chosen rows, in chosen layers. Memory is B x H x K a layer.

    For one forward pass: of several, the last one's. `rows(number of rows)` gives (B, rows) bool. The pass needs a
    key_bias, of 0 where nothing is to be steered: only with it do the layers know of padding.
    """

    def __init__(self, layers: Sequence[int], rows: Callable[[int], Tensor], reduction: str = "sum") -> None:
        if reduction not in _REDUCTIONS:
            options = ", ".join(map(repr, _REDUCTIONS))
            raise ValueError(f"reduction: expected one of {options}, got {describe(reduction)}")
        self._layers, self._rows, self._reduction = tuple(layers), rows, reduction
        self._per_layer: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        if call.layer not in self._layers:
            return
        query = call.query
        rows = self._rows(query.shape[2]).to(query.device)
        # Rows before the first that counts need not be computed: the causal mask is aligned at the last row.
        chosen = rows.any(0).nonzero()
        first = int(chosen[0, 0]) if len(chosen) else 0
        self._per_layer[call.layer] = attention_map(
            query[:, :, first:],
            call.key,
            rows=rows[:, first:],
            key_bias=call.key_bias,
            key_padding_mask=call.key_padding_mask,
            row_gate=None if call.row_gate is None else call.row_gate[:, first:],
            is_causal=call.is_causal,
            scale=call.scale,
            reduction="mean" if self._reduction == "mean" else "none",
        )

    @property
    def attention(self) -> Tensor:
        """(B, K); with the reduction "none" (B, layers, H, K) in the order of `layers`. float32, or float64 as the
        model is.
        """
        if len(self._per_layer) != len(set(self._layers)):
            raise RuntimeError(
                "attention_reader was not called in every layer: give it to the forward of a patched model"
            )
        device = self._per_layer[self._layers[0]].device
        per_layer = torch.stack([self._per_layer[layer].to(device) for layer in self._layers], dim=1)
        if self._reduction == "none":
            return per_layer
        return per_layer.mean(1) if self._reduction == "mean" else per_layer.sum((1, 2))


def require_layers(layers: Sequence[int] | int | None, num_layers: int) -> list[int]:
    """Indices from 0 on, each once."""
    if layers is None:
        return list(range(num_layers))
    chosen = [_index(layer, num_layers, "layers") for layer in _listed(layers, "layers", "an index or a list of them")]
    if not chosen:
        raise ValueError("layers: expected at least one, got an empty list; None reads all of them")
    return list(dict.fromkeys(chosen))


def rows_to_read(
    rows: Tensor | Sequence[int] | int | None, inputs: Any, key_shape: tuple[int, int], num_rows: int
) -> Tensor:
    """(B, rows) bool, where padding is left out wherever the rows are the positions of the prompt."""
    batch = key_shape[0]
    mask = inputs.get("attention_mask") if num_rows == key_shape[1] else None
    within = torch.ones(batch, num_rows, dtype=torch.bool) if mask is None else mask.bool()
    if rows is None:
        return within
    if isinstance(rows, Tensor) and rows.dtype == torch.bool:
        if rows.shape not in ((num_rows,), (batch, num_rows)):
            raise ValueError(
                f"rows: expected ({num_rows},) or ({batch}, {num_rows}) bool, got shape {tuple(rows.shape)}"
            )
        return rows.to(within.device).expand(batch, num_rows) & within
    selected = torch.zeros(num_rows, dtype=torch.bool, device=within.device)
    for row in _listed(rows, "rows", "a bool tensor, a position or a list of positions"):
        selected[_index(row, num_rows, "rows")] = True
    if not bool(selected.any()):
        raise ValueError("rows: expected at least one position, got none; None reads all of them")
    counted = selected & within
    if not bool(counted.any(1).all()):
        raise ValueError(
            f"rows: expected positions that are not padding, got {describe(rows)}, which is nothing but padding in "
            f"sequence {int((~counted.any(1)).nonzero()[0, 0])}; pad on the left, or give (B, P) bool"
        )
    return counted


def _listed(value: Any, name: str, expected: str) -> list[Any]:
    """The entries of a list or an integer tensor; of one number, that."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return [value]
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    return list(value)


def _index(value: object, length: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected integers, got {describe(value)}")
    if not -length <= int(value) < length:
        raise ValueError(f"{name}: expected {-length} to {length - 1}, got {value}")
    return int(value) % length
