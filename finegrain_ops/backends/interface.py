"""What a backend is given and what it must offer: the one thing that all backends share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One validated call, as every backend receives it.

    query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), any strides. key_bias (B, 1 or H, Nk) float32
    (float64 for float64 inputs), natural-log units, may hold -inf; key_padding_mask (B, Nk) bool, True = attend;
    row_gate (B, Nq) bool, True = the bias acts on this row. Causal masking is aligned bottom-right.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    key_padding_mask: Tensor | None
    row_gate: Tensor | None
    is_causal: bool
    scale: float
    return_lse: bool = True

    def features(self, needs_grad: bool) -> AttentionFeatures:
        return AttentionFeatures(
            device_type=self.query.device.type,
            device_index=self.query.device.index,
            dtype=self.query.dtype,
            head_dim=self.query.shape[-1],
            value_dim=self.value.shape[-1],
            needs_grad=needs_grad,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The precision in which scores, lse and key_bias are kept."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


def new_output(query: Tensor, num_rows: int, dim: int) -> Tensor:
    """An uninitialised (B, H, num_rows, dim), laid out in memory as query is.

    Contiguous for a contiguous query. Otherwise (B, num_rows, H, dim) in memory, which is how projections give it and
    how the layer after attention wants it back.
    """
    batch, heads = query.shape[:2]
    if query.is_contiguous():
        return query.new_empty(batch, heads, num_rows, dim)
    return query.new_empty(batch, num_rows, heads, dim).transpose(1, 2)


class AttentionFeatures(NamedTuple):
    """All of a call that may decide which backend can run it; hashable, and the same at every step of a decode."""

    device_type: str
    device_index: int | None
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    needs_grad: bool


class AttentionGradients(NamedTuple):
    """Gradients in the shapes of query, key, value and key_bias (None where it was not asked for)."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None


class Backend(Protocol):
    """A module in this folder. It declares what it can run, and never falls back by itself."""

    def unavailable_reasons(self) -> list[str]:
        """Why nothing at all can run on this machine; [] when something can."""

    def not_supported_reasons(self, features: AttentionFeatures) -> list[str]:
        """Every reason why a call with these features cannot run; [] when it can."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Output (B, H, Nq, Dv) and, when call.return_lse, lse (B, H, Nq) in compute_dtype."""

    def backward(
        self,
        call: AttentionCall,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        bias_needs_grad: bool,
    ) -> AttentionGradients:
        """The vector-Jacobian product of forward, given what forward returned."""
