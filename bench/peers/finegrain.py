"""finegrain_ops itself, a peer per backend. It prepares nothing: composing log(lambda) * M is part of each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import finegrain_ops
from finegrain_ops.backends import preference

from ..inputs import CaseInputs, PackedInputs
from ..operations import BACKWARD
from .interface import Call, Peer, Prepare

_FUSED = ("triton", "cuda")  # backends with kernels of our own; only there is "unbiased" more than PyTorch's SDPA


def ours(backend: str, device_type: str = "cpu") -> str:
    """Elsewhere than on a CPU `sdpa` is the rank trick: the bias as more columns of query and key."""
    trick = " (rank trick)" if backend == "sdpa" and device_type != "cpu" else ""
    return f"finegrain_ops {backend}{trick}"


def ours_unbiased(backend: str) -> str:
    return f"finegrain_ops {backend} unbiased"


def with_lse(backend: str, device_type: str = "cpu") -> str:
    return f"{ours(backend, device_type)}, lse given"


def one_forward(backend: str, device_type: str = "cpu") -> str:
    return f"one forward, {ours(backend, device_type)}"


def dense_peers(device_type: str) -> list[Peer]:
    return _biased_and_unbiased(device_type, _attention)


def packed_peers(device_type: str) -> list[Peer]:
    return _biased_and_unbiased(device_type, _packed_attention)


def cuda_peers() -> list[Peer]:
    return [
        Peer(ours("cuda"), _attention("cuda", True), is_ours=True, needs_cuda=True),
        Peer(ours_unbiased("cuda"), _attention("cuda", False), is_ours=True, is_biased=False, needs_cuda=True),
    ]


def read_out_peers(device_type: str) -> list[Peer]:
    """With the logsumexp of a forward pass, which a model has anyway, a read-out needs one pass instead of two."""
    backends = _backends(device_type)
    readers = ["reference"] if device_type == "cpu" else backends  # on a CPU no other has a read-out

    def reader(name: str, prepare: Prepare) -> Peer:
        return Peer(name, prepare, is_ours=True, gives_key_sums=True)

    return [
        *(reader(ours(name, device_type), _attention_map(name, False)) for name in readers),
        *(reader(with_lse(name, device_type), _attention_map(name, True)) for name in readers),
        *(Peer(one_forward(name, device_type), _attention(name, True), is_ours=True) for name in backends),
    ]


def _biased_and_unbiased(device_type: str, prepare: Callable[[str, bool], Prepare]) -> list[Peer]:
    absent = ["cuda"] if device_type == "cpu" else []
    return [
        *(Peer(ours(name, device_type), prepare(name, True), is_ours=True) for name in _backends(device_type)),
        *(Peer(ours(name), prepare(name, True), is_ours=True, needs_cuda=True) for name in absent),
        *(
            Peer(ours_unbiased(name), prepare(name, False), is_ours=True, is_biased=False, needs_cuda=True)
            for name in _FUSED
        ),
    ]


def _backends(device_type: str) -> list[str]:
    """The fastest first, as backend="auto" prefers them; on a CPU, "triton" is an interpreter and is not timed."""
    return [name for name in preference(device_type) if name != "reference"]


def _attention(backend: str, is_biased: bool) -> Prepare:
    def prepare(inputs: CaseInputs) -> Call:
        query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case
        options: dict[str, Any] = {"is_causal": case.is_causal, "backend": backend}
        if is_biased and case.operation == BACKWARD:
            options["key_bias"] = inputs.key_bias
        elif is_biased:
            options |= {"region_mask": inputs.region_mask, "weight": case.weight}
        return lambda: finegrain_ops.reweighted_attention(query, key, value, **options)

    return prepare


def _packed_attention(backend: str, is_biased: bool) -> Prepare:
    def prepare(inputs: PackedInputs) -> Call:
        case, starts = inputs.case, inputs.cu_seqlens
        arguments = (inputs.query, inputs.key, inputs.value, starts, starts, case.longest, case.longest)
        options: dict[str, Any] = {"is_causal": case.is_causal, "backend": backend}
        if is_biased:
            options |= {"region_mask": inputs.region_mask, "weight": case.weight}
        return lambda: finegrain_ops.reweighted_attention_varlen(*arguments, **options)

    return prepare


def _attention_map(backend: str, lse_is_given: bool) -> Prepare:
    def prepare(inputs: CaseInputs) -> Call:
        query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case
        options: dict[str, Any] = {"region_mask": inputs.region_mask, "weight": case.weight}
        options |= {"is_causal": case.is_causal, "backend": backend}
        lse = None
        if lse_is_given:
            _, lse = finegrain_ops.reweighted_attention(query, key, value, return_lse=True, **options)
        return lambda: finegrain_ops.attention_map(query, key, rows=inputs.rows, lse=lse, **options)

    return prepare
