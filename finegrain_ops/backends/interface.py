"""What a backend is given and what it must offer: the one thing that all backends share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

# A finite bias beyond this, in natural-log units, counts as this: only -inf removes a key. Scores are kept in float32,
# which at 2^17 still holds them to 1/128; a mask of -1e9 or finfo.min would leave nothing of the scores of a row all of
# whose keys carry it, or make them infinite. Kernels clamp as they read (kernels/key_bias.py, csrc/scores.cuh). It is
# above what is added on purpose: ALiBi's steepest slope reaches it at 150,000 keys.
LARGEST_BIAS = 131072.0


def clamp_bias(bias: Tensor) -> Tensor:
    """`bias` with its finite values within +-LARGEST_BIAS, for backends that do not clamp in a kernel."""
    return torch.where(bias == float("-inf"), bias, bias.clamp(-LARGEST_BIAS, LARGEST_BIAS))


class Call:
    """What every call has, whatever its tensors look like."""

    query: Tensor
    operator: ClassVar[str]

    @property
    def value_dim(self) -> int:
        """That of query where there are no values."""
        return self.query.shape[-1]

    def features(self, needs_grad: bool) -> AttentionFeatures:
        return AttentionFeatures(
            device_type=self.query.device.type,
            device_index=self.query.device.index,
            dtype=self.query.dtype,
            head_dim=self.query.shape[-1],
            value_dim=self.value_dim,
            needs_grad=needs_grad,
            operator=self.operator,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The precision in which scores, lse, key_bias and maps are kept."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class AttentionCall(Call):
    """One validated call, as every backend receives it.

    query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), any strides. key_bias (B, 1 or H, Nk) float32
    (float64 for float64 inputs), natural-log units, may hold -inf; key_padding_mask (B, Nk) bool, True = attend;
    row_gate (B, Nq) bool, True = the bias acts on this row. Causal masking is aligned bottom-right.
    """

    operator: ClassVar[str] = "reweighted_attention"

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    key_padding_mask: Tensor | None
    row_gate: Tensor | None
    is_causal: bool
    scale: float
    return_lse: bool = True

    @property
    def value_dim(self) -> int:
        return self.value.shape[-1]

    def new_results(self) -> tuple[Tensor, Tensor | None]:
        """Output and, if it is wanted, lse; uninitialised."""
        lse = self.query.new_empty(self.query.shape[:3], dtype=self.compute_dtype) if self.return_lse else None
        return new_output(self.query, self.query.shape[2], self.value_dim), lse

    def new_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of query, key and value; uninitialised."""
        return new_output_like(self.query), new_output_like(self.key), new_output_like(self.value)


def new_output(query: Tensor, num_rows: int, dim: int) -> Tensor:
    """An uninitialised (B, H, num_rows, dim), laid out in memory as query is.

    Contiguous for a contiguous query. Otherwise (B, num_rows, H, dim) in memory, which is how projections give it and
    how the layer after attention wants it back.
    """
    batch, heads = query.shape[:2]
    if query.is_contiguous():
        return query.new_empty(batch, heads, num_rows, dim)
    return query.new_empty(batch, num_rows, heads, dim).transpose(1, 2)


@dataclass(frozen=True)
class PackedCall(Call):
    """One validated call on packed sequences, which lie one after another without padding.

    query (Tq, H, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv), any strides. Sequence s holds the rows cu_seqlens_q[s] up
    to cu_seqlens_q[s + 1] of query and likewise of key; both cu_seqlens are (num_seqs + 1,) int32, contiguous, on
    query's device. On a device nobody has looked at their values: nothing may be read or written out of bounds whatever
    they are. No length is above max_seqlen_q or max_seqlen_k, which may be larger than any. key_bias (1 or H, Tk)
    float32 (float64 for float64 inputs), natural-log units, may hold -inf; row_gate (Tq,) bool. Causal masking is
    aligned bottom-right in every sequence. Rows of query in no sequence give 0 and -inf, and have gradients of 0.
    """

    operator: ClassVar[str] = "reweighted_attention_varlen"

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_bias: Tensor | None
    row_gate: Tensor | None
    is_causal: bool
    scale: float
    return_lse: bool = True

    @property
    def value_dim(self) -> int:
        return self.value.shape[-1]

    def new_results(self) -> tuple[Tensor, Tensor | None]:
        """Output and, if it is wanted, lse, as rows that belong to no sequence have them: kernels never write those."""
        total, heads = self.query.shape[:2]
        output, lse = self.query.new_zeros(total, heads, self.value_dim), None
        if self.return_lse:
            lse = self.query.new_full((heads, total), float("-inf"), dtype=self.compute_dtype)
        return output, lse

    def new_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of query, key and value, with zeros where no sequence is."""
        query, key, value = (t.new_zeros(t.shape) for t in (self.query, self.key, self.value))
        return query, key, value


@dataclass(frozen=True)
class MapCall(Call):
    """One validated call for an attention map: map_hj = sum over the chosen rows i of softmax_j(s_ij).

    query, key, key_bias, key_padding_mask, row_gate, is_causal and scale as in AttentionCall. rows (B, Nq) bool: the
    rows that count; heads (H,) bool: the heads that count, the others give 0. lse (B, H, Nq) in compute_dtype: the
    logsumexp of the rows where the caller has it, which saves the pass over the keys that finds it.
    """

    operator: ClassVar[str] = "attention_map"

    query: Tensor
    key: Tensor
    key_bias: Tensor | None
    key_padding_mask: Tensor | None
    row_gate: Tensor | None
    rows: Tensor | None
    heads: Tensor | None
    lse: Tensor | None
    is_causal: bool
    scale: float


def new_output_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor for the gradient of a (B, H, N, D) one, laid out as new_output does."""
    return new_output(tensor, tensor.shape[2], tensor.shape[3])


def sum_over_sharing_heads(per_head: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
    """A gradient of the bias in the bias's shape, from that of every head: heads that share a row share it."""
    return None if per_head is None or key_bias is None else per_head.sum_to_size(key_bias.shape)


class AttentionFeatures(NamedTuple):
    """All of a call that may decide which backend can run it; hashable, and the same at every step of a decode."""

    device_type: str
    device_index: int | None
    dtype: torch.dtype
    head_dim: int
    value_dim: int  # head_dim where there are no values
    needs_grad: bool
    operator: str = "reweighted_attention"  # or "reweighted_attention_varlen", "attention_map"


class AttentionGradients(NamedTuple):
    """Gradients in the shapes of query, key, value and key_bias (None where it was not asked for)."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None


class MapGradients(NamedTuple):
    """Gradients in the shapes of query, key and key_bias (None where it was not asked for)."""

    query: Tensor
    key: Tensor
    key_bias: Tensor | None


class Backend(Protocol):
    """A module in this folder. It declares what it can run, and never falls back by itself.

    It is called only with tensors that hold something: ops/ answers calls without rows, keys or sequences.
    """

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

    def packed_forward(self, call: PackedCall) -> tuple[Tensor, Tensor | None]:
        """Output (Tq, H, Dv) and, when call.return_lse, lse (H, Tq) in compute_dtype."""

    def packed_backward(
        self,
        call: PackedCall,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        bias_needs_grad: bool,
    ) -> AttentionGradients:
        """The vector-Jacobian product of packed_forward, given what packed_forward returned."""

    def map_forward(self, call: MapCall) -> tuple[Tensor, Tensor]:
        """Map (B, H, Nk) and lse (B, H, Nq), both in compute_dtype; lse is call.lse where that is given.

        lse may hold anything in rows that call.rows leaves out, and in heads that call.heads does.
        """

    def map_backward(self, call: MapCall, lse: Tensor, grad_map: Tensor, bias_needs_grad: bool) -> MapGradients:
        """The vector-Jacobian product of map_forward, lse (the given or the returned one) counted as a function of
        query, key and key_bias.

        With P = softmax(S), r the chosen rows and G = grad_map: dS_ij = r_i P_ij (G_j - sum_j P_ij G_j), from which
        dQ = scale dS K, dK = scale dS^T Q summed over the heads of a KV group, db_j = sum_i g_i dS_ij. In heads that
        are left out G counts as 0. grad_map (B, H, Nk) in compute_dtype, any strides.
        """
