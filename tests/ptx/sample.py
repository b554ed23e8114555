"""The calls that CI executes: every kernel of both backends, at shipped tiles, in every regime, once.

They are the cases of the other tests (attention_cases.py and its like), larger, so that tiles are full, cut and empty.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

import crop_cases
from attention_cases import Case, check_forward, check_gradients
from map_cases import MapCase, check_map, check_map_gradients
from packed_cases import PackedCase, check_packed_forward, check_packed_gradients
from ptx.project import on_cuda_ptx, on_ptx

EXECUTE = {"triton": on_ptx, "cuda": on_cuda_ptx}

_HALF, _BRAIN, _FLOAT = torch.float16, torch.bfloat16, torch.float32
_SHAPE = {"batch": 2, "heads": 2, "kv_heads": 1, "num_queries": 150, "num_keys": 200}


@dataclass(frozen=True)
class Call:
    """One call for each GPU that it is compiled for; `run` gets the backend and the device and compares results."""

    name: str
    backend: str
    capabilities: tuple[int, ...]
    run: Callable[[str, str], None]


def calls() -> list[Call]:
    return [*_triton_calls(), *_cuda_calls()]


def _both(
    name: str,
    backend: str,
    capabilities: tuple[int, ...],
    checks: tuple[Callable, Callable],
    case: Case,
    dtype: torch.dtype,
) -> Iterator[Call]:
    """The forward pass of a case, and its gradients, which take most of the time: those for one GPU, in turn."""
    forward, gradients = (partial(_check, check, case, dtype) for check in checks)
    yield Call(f"{name}, forward", backend, capabilities, forward)
    chosen = capabilities[zlib.crc32(name.encode()) % len(capabilities)]
    yield Call(f"{name}, gradients", backend, (chosen,), gradients)


def _check(check: Callable, case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    check(case, dtype, backend, device)


def _sized(case: Case, dim: int) -> Case:
    return replace(case, head_dim=dim, value_dim=dim)


_ATTENTION, _PACKED = (check_forward, check_gradients), (check_packed_forward, check_packed_gradients)
_MAP = (check_map, check_map_gradients)

_CASES = {
    "no bias": (Case(**_SHAPE, is_causal=True), (128,)),
    "bias": (Case(**_SHAPE, bias="bhn", removed="some", is_causal=True), (64, 72, 80, 128, 256)),
    "bias, full": (Case(**_SHAPE, bias="bn"), (88,)),
    "negative scale": (Case(**_SHAPE, bias="bn", scale=-0.1, is_causal=True), (64,)),
    "gate and padding": (Case(**_SHAPE, bias="bn", gate="bn", padding="left", is_causal=True), (64, 112)),
    "left padding": (Case(**{**_SHAPE, "num_queries": 200}, padding="left", is_causal=True), (64,)),
    "more queries than keys": (Case(**{**_SHAPE, "num_queries": 260}, bias="bn", is_causal=True), (80,)),
    "odd": (Case(2, 4, 2, 77, 131, 19, 13, region="bn", weight=2.0, is_causal=True, layout="sliced"), (None,)),
}
_PACKED_CASES = {
    "packed": PackedCase((90, 1, 150, 64), bias="t", is_causal=True),
    "packed, gate": PackedCase((90, 1, 150, 64), bias="ht", removed="some", gate=True),
}
_MAPS = {
    "map": MapCase(num_queries=150, num_keys=200, is_causal=True),
    "map, everything": MapCase(
        heads=4, kv_heads=2, num_queries=150, num_keys=200, rows="bn", chosen_heads=(0, 3), bias="bhn", removed="some",
        gate="bn", padding="left", is_causal=True, reduction="none",
    ),
    "map, known lse": MapCase(num_queries=150, num_keys=200, rows="few", bias="bn", knows_lse=True, is_causal=True),
}  # fmt: skip


def _decode_cases(dim: int) -> Iterator[tuple[str, Case]]:
    for queries, heads in ((1, 8), (1, 64), (3, 8)):
        shape = {"batch": 1, "heads": heads, "kv_heads": 1, "num_queries": queries, "num_keys": 500}
        case = Case(**shape, region="bn", weight=2.0, padding="left", is_causal=True)
        yield f"decode of {queries} x {heads}", _sized(case, dim)
    case = Case(1, 8, 2, 3, 300, bias="bhn", removed="some", gate="bn", padding="random", is_causal=True)
    yield "decode, bias per head, gate", _sized(case, dim)


def _triton_calls() -> Iterator[Call]:
    both = (80, 90)
    for name, (case, dims) in _CASES.items():
        for dim in dims:
            sized = case if dim is None else _sized(case, dim)
            yield from _both(f"{name}, d={dim}, bf16", "triton", both, _ATTENTION, sized, _BRAIN)
    everything = _CASES["gate and padding"][0]
    yield from _both("gate and padding, d=64, fp16", "triton", both, _ATTENTION, _sized(everything, 64), _HALF)
    # Without tensor cores sm_90 has the code of sm_80.
    for dim in (64, 128):
        yield from _both(
            f"gate and padding, d={dim}, fp32", "triton", (80,), _ATTENTION, _sized(everything, dim), _FLOAT
        )
    yield from _both("bias, d=64, fp32", "triton", (80,), _ATTENTION, _sized(_CASES["bias"][0], 64), _FLOAT)
    for (name, packed), dim in zip(_PACKED_CASES.items(), (64, 128)):
        yield from _both(f"{name}, d={dim}, bf16", "triton", both, _PACKED, _sized(packed, dim), _BRAIN)
    for name, case in _decode_cases(128):
        yield Call(f"{name}, d=128, bf16", "triton", both, partial(_check, check_forward, case, _BRAIN))
    for name, case in _MAPS.items():
        for dim in (64, 128) if name == "map" else (64,):
            yield from _both(f"{name}, d={dim}, bf16", "triton", both, _MAP, _sized(case, dim), _BRAIN)
    for name, crop in _crops().items():
        yield Call(f"crops, {name}", "triton", both, crop)


def _cuda_calls() -> Iterator[Call]:
    for capability, dtype in ((70, _HALF), (75, _HALF), (80, _BRAIN), (75, _FLOAT)):
        kind = str(dtype).removeprefix("torch.")
        case = _sized(replace(_CASES["gate and padding"][0], num_queries=70, num_keys=90), 104)
        yield from _both(f"gate and padding, d=104, {kind}", "cuda", (capability,), _ATTENTION, case, dtype)
        case = _sized(replace(_CASES["left padding"][0], num_queries=90, num_keys=90), 128)
        yield Call(f"left padding, d=128, {kind}", "cuda", (capability,), partial(_check, check_forward, case, dtype))
        packed = _sized(PackedCase((40, 1, 70), bias="ht", removed="some", gate=True, is_causal=True), 64)
        run = partial(_check, check_packed_gradients, packed, dtype)
        yield Call(f"packed, gate, d=64, {kind}, gradients", "cuda", (capability,), run)
        case = _sized(replace(_MAPS["map, everything"], num_queries=70, num_keys=90), 64)
        yield from _both(f"map, everything, d=64, {kind}", "cuda", (capability,), _MAP, case, dtype)
        name, decode = list(_decode_cases(64))[1]
        yield Call(f"{name}, d=64, {kind}", "cuda", (capability,), partial(_check, check_forward, decode, dtype))
    for name, crop in _crops().items():
        yield Call(f"crops, {name}", "cuda", (70,), crop)


def _crops() -> dict[str, Callable[[str, str], None]]:
    names = (
        "several sizes",
        "padded, fractional",
        "shortest edge",
        "tall, Pillow 13",
        "float32 images, padded",
        "bfloat16",
    )
    return {name: partial(_check_crop, crop_cases.CASES[name]) for name in names}


def _check_crop(case: crop_cases.CropCase, backend: str, device: str) -> None:
    crop_cases.check(case, backend)
