"""What every attention kernel is launched with, from batched (B, H, N, D) or packed (T, H, D) tensors.

A kernel sees both alike: a sequence, a head, and strides. Packed sequences have a batch stride of 0 and begin where
cu_seqlens says.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .head_dim import split_head_dim
from .key_bias import PreparedBias, prepare_key_bias
from .tuning import Tile, tile_for

LOG2_E = math.log2(math.e)

# With a smaller scale, bias / scale could overflow float32.
_SMALLEST_FOLDED_SCALE = 1e-6

# Within a range of keys, kernels count elements in 32 bits unless a tensor is longer than that.
_LARGEST_OFFSET = 2**31 - 1
_LONGEST_BLOCK = 256  # no tile has more rows


@dataclass(frozen=True)
class Packing:
    """Sequences one after another: cu_seqlens (sequences + 1,) int32 on the device, and the longest lengths."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Units:
    """How a kernel holds its scores; see softmax.py.

    FOLDED: as dot products, the scale being part of `factor`. Otherwise `score_multiplier` is multiplied onto them and
    factor is 1. `bias_multiplier` brings a bias in natural-log units to the same.
    """

    FOLDED: bool
    score_multiplier: float
    factor: float
    bias_multiplier: float

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(scale: float) -> Units:
        folded = scale >= _SMALLEST_FOLDED_SCALE
        factor = scale * LOG2_E if folded else 1.0
        return Units(
            FOLDED=folded,
            score_multiplier=scale * LOG2_E,
            factor=factor,
            bias_multiplier=1.0 / scale if folded else LOG2_E,
        )


@dataclass(frozen=True)
class AttentionInputs:
    """query (B, H, Nq, D), key (B, Hkv, Nk, D), key_bias (B, 1 or H, Nk) float32, key_padding_mask (B, Nk) bool,
    row_gate (B, Nq) bool; with packing (Tq, H, D), (Tk, Hkv, D), (1 or H, Tk), no padding, (Tq,).
    """

    query: Tensor
    key: Tensor
    key_bias: Tensor | None
    key_padding_mask: Tensor | None
    row_gate: Tensor | None
    is_causal: bool
    scale: float
    compute_capability: int
    packing: Packing | None = None

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1]

    @property
    def num_sequences(self) -> int:
        return self.query.shape[0] if self.packing is None else self.packing.cu_seqlens_q.numel() - 1

    @property
    def longest_query(self) -> int:
        """Rows of the longest sequence, which the grid must cover."""
        return self.query.shape[2] if self.packing is None else self.packing.max_seqlen_q

    @property
    def longest_key(self) -> int:
        return self.key.shape[2] if self.packing is None else self.packing.max_seqlen_k

    @property
    def rows_in_memory(self) -> int:
        """Rows of query in one batch entry, or of all packed sequences together."""
        return self.query.shape[2] if self.packing is None else self.query.shape[0]

    @property
    def keys_in_memory(self) -> int:
        return self.key.shape[2] if self.packing is None else self.key.shape[0]

    @property
    def has_gate(self) -> bool:
        return self.row_gate is not None and self.key_bias is not None

    def tile(self, kernel: str, value_dim: int) -> Tile:
        is_uneven = not self.units.FOLDED or any(sum(split_head_dim(d)) > d for d in (self.head_dim, value_dim))
        regime = "gated" if self.has_gate else "uneven" if is_uneven else "plain" if self.packing is None else "packed"
        element_size = self.key.element_size()
        tile = tile_for(kernel, self.compute_capability, element_size, self.head_dim, value_dim, regime=regime)
        if self.compute_capability >= 90 and not _is_aligned(self.key):
            # Such keys cannot be copied asynchronously, values can. Where a pipeline has both, Triton 3.7 puts no fence
            # between the copy of the keys and the wgmma that reads them; without stages it does.
            return replace(tile, num_stages=1)
        return tile

    @functools.cached_property
    def units(self) -> Units:
        return Units.of(self.scale)

    @functools.cached_property
    def prepared_bias(self) -> PreparedBias | None:
        if self.key_bias is None and self.key_padding_mask is None:
            return None
        return prepare_key_bias(
            self.key_bias,
            self.key_padding_mask,
            None if self.packing is None else self.packing.cu_seqlens_k,
            batch=self.num_sequences,
            num_keys=self.keys_in_memory,
            longest=self.longest_key,
            has_gate=self.has_gate,
            multiplier=self.units.bias_multiplier,
        )

    def _wide_offsets(self, *tensors: Tensor) -> bool:
        """Whether element offsets within a head of one of these tensors pass 32 bits."""
        longest = max(self.rows_in_memory, self.keys_in_memory) + _LONGEST_BLOCK
        return any(longest * row_stride(t) > _LARGEST_OFFSET for t in (self.query, self.key, *tensors))

    def lse_strides(self) -> dict[str, int]:
        """Of (B, H, Nq), or of packed (H, Tq), contiguous."""
        per_sequence = self.heads * self.rows_in_memory if self.packing is None else 0
        return {"lse_stride_b": per_sequence, "lse_stride_h": self.rows_in_memory}

    def kernel_arguments(self, **tensors: Tensor) -> dict[str, Any]:
        """What kernels for batched and for packed tensors share: batched_arguments, and where the sequences begin."""
        packing = self.packing
        return {
            **self.batched_arguments(**tensors),
            "cu_seqlens_q_ptr": self.query if packing is None else packing.cu_seqlens_q,
            "cu_seqlens_k_ptr": self.query if packing is None else packing.cu_seqlens_k,
            "PACKED": packing is not None,
        }

    def batched_arguments(self, **tensors: Tensor) -> dict[str, Any]:
        """What kernels with a prepared bias share: shared_arguments, and that bias. Padding is part of it where no row
        gate is; so HAS_PADDING is for kernels that have to read it apart.
        """
        prepared = self.prepared_bias
        bias: dict[str, Any] = {"bias_ptr": self.query, "range_ptr": self.query}
        bias |= dict.fromkeys(("bias_stride_b", "bias_stride_h", "range_stride_b", "range_stride_h"), 0)
        return {
            **self.shared_arguments(**tensors),
            **(bias if prepared is None else prepared.kernel_arguments()),
            "HAS_BIAS": prepared is not None,
            "HAS_PADDING": self.has_gate and self.key_padding_mask is not None,
        }

    def shared_arguments(self, **tensors: Tensor) -> dict[str, Any]:
        """What all kernels share: pointers and strides of query, key and `tensors`, which are laid out alike, and
        what follows from the call. Pointers that a kernel does not read hold query.
        """
        padding = None if self.key_padding_mask is None else self.key_padding_mask.view(torch.uint8)
        gate = self.row_gate.view(torch.uint8) if self.row_gate is not None and self.has_gate else None
        return {
            **{f"{name}_ptr": tensor for name, tensor in {"query": self.query, "key": self.key, **tensors}.items()},
            **_strides({"query": self.query, "key": self.key, **tensors}),
            "padding_ptr": self.query if padding is None else padding,
            "padding_stride_b": 0 if padding is None else padding.stride(0),
            "padding_stride_n": 0 if padding is None else padding.stride(1),
            "gate_ptr": self.query if gate is None else gate,
            "gate_stride_b": 0 if gate is None or self.packing is not None else gate.stride(0),
            "gate_stride_n": 0 if gate is None else gate.stride(-1),
            "num_heads": self.heads,
            "group_size": self.heads // self.kv_heads,
            "num_queries": self.rows_in_memory,
            "num_keys": self.keys_in_memory,
            "score_multiplier": self.units.score_multiplier,
            "factor": self.units.factor,
            "HAS_GATE": self.has_gate,
            "IS_CAUSAL": self.is_causal,
            "FOLDED": self.units.FOLDED,
            "WIDE_OFFSETS": self._wide_offsets(*tensors.values()),
            **parts("HEAD_DIM", "D", self.head_dim),
        }


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """Of a sequence, a head and a row, in elements: (B, H, N, D), or packed (T, H, D), which has no sequence stride."""
    if tensor.dim() == 4:
        return tensor.stride(0), tensor.stride(1), tensor.stride(2)
    return 0, tensor.stride(1), tensor.stride(0)


def row_stride(tensor: Tensor) -> int:
    return strides_of(tensor)[2]


# A pointer moved by a multiple of this many elements stays aligned to 16 bytes in half precision, and to 32 in float32.
_ALIGNED_ELEMENTS = 8


def _strides(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Of a sequence (b), a head (h) and a row (n), in units of STRIDE_UNIT elements; the last dimension has stride 1.

    Triton knows of an integer argument only whether 16 divides it. With a head dimension of 72, 88 or 104 that is not
    so, yet 8 does, which is all that 16-byte loads need; a stride times a constant 8 says so.
    """
    strides = {}
    for name, tensor in tensors.items():
        b, h, n = strides_of(tensor)
        strides |= {f"{name}_stride_b": b, f"{name}_stride_h": h, f"{name}_stride_n": n}
    unit = _ALIGNED_ELEMENTS if all(stride % _ALIGNED_ELEMENTS == 0 for stride in strides.values()) else 1
    return {name: stride // unit for name, stride in strides.items()} | {"STRIDE_UNIT": unit}


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in strides_of(tensor))


def parts(name: str, prefix: str, head_dim: int) -> dict[str, int]:
    """The constants of head_dim.py."""
    widths = split_head_dim(head_dim)
    return {name: head_dim, **{f"{prefix}{i}": width for i, width in enumerate(widths)}}


def addressable(tensor: Tensor) -> Tensor:
    """The tensor itself, unless its memory is laid out as no kernel can walk it: then a contiguous copy."""
    if tensor.stride(-1) == 1 and row_stride(tensor) * _LONGEST_BLOCK <= _LARGEST_OFFSET:
        return tensor
    return tensor.contiguous()
