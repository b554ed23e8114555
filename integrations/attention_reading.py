"""Reading attention out of a patched model: pass an `AttentionReader` as `attention_reader=` to its forward."""

from __future__ import annotations

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

    `rows(number of rows)` gives (B, rows) bool. The forward pass needs a key_bias, of 0 where nothing is to be steered:
    only with it do the layers know of padding.
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
        rows = self._rows(call.query.shape[2]).to(call.query.device)
        query, first = call.query, int(rows.any(0).nonzero()[0, 0]) if bool(rows.any()) else 0
        # The last rows alone see the same keys; the others need not be computed.
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
        """(B, K), or (B, layers, H, K) in the order of `layers` for the reduction "none"; float32."""
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
    """Indices from 0 on."""
    if layers is None:
        return list(range(num_layers))
    chosen = [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers
    if isinstance(chosen, (str, bytes)) or not hasattr(chosen, "__iter__") or isinstance(chosen, bool):
        raise TypeError(f"layers: expected an index or a list of them, got {describe(layers)}")
    chosen = [_index(layer, num_layers, "layers") for layer in chosen]
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
    chosen = rows.tolist() if isinstance(rows, Tensor) else rows
    chosen = [chosen] if isinstance(chosen, int) else chosen
    if isinstance(chosen, (str, bytes)) or not hasattr(chosen, "__iter__"):
        raise TypeError(f"rows: expected a bool tensor, a position or a list of positions, got {describe(rows)}")
    selected = torch.zeros(num_rows, dtype=torch.bool, device=within.device)
    for row in chosen:
        selected[_index(row, num_rows, "rows")] = True
    return selected & within


def _index(value: object, length: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected integers, got {describe(value)}")
    if not -length <= value < length:
        raise ValueError(f"{name}: expected {-length} to {length - 1}, got {value}")
    return value % length
