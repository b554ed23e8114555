"""The checks that the attention functions share, and what autocast does to their tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import BACKENDS
from .validation import FLOATING_DTYPES, describe, require_number, require_same_device, require_tensor


def check_batched(**tensors: Tensor) -> None:
    """query (B, H, Nq, D), key (B, Hkv, Nk, D) and, where there is one, value (B, Hkv, Nk, Dv) fit together."""
    _check_each(tensors, {"query": "(B, H, Nq, D)", "key": "(B, Hkv, Nk, D)", "value": "(B, Hkv, Nk, Dv)"})
    query, key = tensors["query"], tensors["key"]
    batch, heads, _, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key: expected (B, Hkv, Nk, D) with query's B = {batch} and D = {head_dim}, got shape {tuple(key.shape)}"
        )
    _check_groups(heads, key.shape[1], key)
    if "value" in tensors and tensors["value"].shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected (B, Hkv, Nk, Dv) with key's (B, Hkv, Nk) = {tuple(key.shape[:3])}, "
            f"got shape {tuple(tensors['value'].shape)}"
        )


def check_packed(**tensors: Tensor) -> None:
    """query (Tq, H, D), key (Tk, Hkv, D) and value (Tk, Hkv, Dv) fit together."""
    _check_each(tensors, {"query": "(Tq, H, D)", "key": "(Tk, Hkv, D)", "value": "(Tk, Hkv, Dv)"})
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    _, heads, head_dim = query.shape
    if key.shape[2] != head_dim:
        raise ValueError(f"key: expected (Tk, Hkv, D) with query's D = {head_dim}, got shape {tuple(key.shape)}")
    _check_groups(heads, key.shape[1], key)
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"value: expected (Tk, Hkv, Dv) with key's (Tk, Hkv) = {tuple(key.shape[:2])}, got shape "
            f"{tuple(value.shape)}"
        )


def _check_each(tensors: dict[str, Tensor], layouts: dict[str, str]) -> None:
    query = tensors["query"]
    for name, tensor in tensors.items():
        layout, num_dimensions = layouts[name], layouts[name].count(",") + 1
        require_tensor(tensor, name, f"a tensor {layout}")
        if tensor.dim() != num_dimensions:
            raise ValueError(f"{name}: expected {num_dimensions} dimensions {layout}, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATING_DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
        require_same_device(tensor, name, query)
    if not torch.is_autocast_enabled(query.device.type):
        for name, tensor in tensors.items():
            if tensor.dtype != query.dtype:
                raise TypeError(f"{name}: expected query's dtype {query.dtype}, got {tensor.dtype}; cast one of them")
    if query.shape[-1] == 0:
        raise ValueError("query: expected a head dimension D of at least 1, got 0")


def _check_groups(heads: int, kv_heads: int, key: Tensor) -> None:
    if (heads % kv_heads if kv_heads else heads) != 0:
        raise ValueError(
            f"key: expected a number of heads Hkv that divides query's H = {heads}, got Hkv = {kv_heads} "
            f"(shape {tuple(key.shape)})"
        )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each in the dtype that scaled_dot_product_attention would get it in; float64 stays."""
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
    return tensors


def check_scale(scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if scale is None else require_number(scale, "scale")


def check_backend(backend: str, known: tuple[str, ...] = BACKENDS) -> str:
    if backend != "auto" and backend not in known:
        options = ", ".join(map(repr, ("auto", *known)))
        raise ValueError(f"backend: expected one of {options}, got {describe(backend)}")
    return backend


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
