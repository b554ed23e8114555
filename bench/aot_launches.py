"""What the kernels are launched with, found out by calling them on tensors without memory, each kernel replaced by a
recorder. So a compiled configuration has the constants, types and tile that the same call has on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from finegrain_ops.kernels import arguments as arguments_module
from finegrain_ops.kernels import attention_backward, attention_decode, attention_forward, attention_map
from finegrain_ops.kernels.arguments import AttentionInputs, Packing
from finegrain_ops.kernels.tuning import Tile

from .machine_code import MachineCode, compile_kernel

KERNELS = {  # every kernel that a call below may launch, and the module in which it is looked up
    "attention_forward_kernel": "attention_forward",
    "attention_backward_query_kernel": "attention_backward_query",
    "attention_backward_keys_kernel": "attention_backward_keys",
    "attention_map_rows_kernel": "attention_map",
    "attention_map_columns_kernel": "attention_map",
    "attention_decode_kernel": "attention_decode",
    "prepare_key_bias_kernel": "key_bias",
    "row_statistics_kernel": "attention_backward",
    "row_range_kernel": "attention_map",
    "crop_weights_kernel": "crop_weights",
    "crop_resize_kernel": "crop_resize",
}
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    float: "fp32",
    int: "i32",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")  # of a launch, besides its arguments
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Call:
    """A causal call of any kernel, on a GPU of this compute capability."""

    compute_capability: int
    dtype: str
    head_dim: int
    has_bias: bool = True
    has_gate: bool = False  # and padding, where sequences are not packed
    is_packed: bool = False
    scale: float = 0.1
    rows: int = 512  # of each of two sequences; keys too
    group_size: int = 1
    tile: Tile | None = None  # instead of the table's

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or DTYPES[self.dtype], device="meta")

    def inputs(self) -> AttentionInputs:
        batch, keys, heads = 2, 512, 2
        packing, padding = None, None
        if self.is_packed:
            query, key = (self.empty(batch * n, heads, self.head_dim) for n in (self.rows, keys))
            bounds = self.empty(batch + 1, dtype=torch.int32)
            bias = self.empty(1, batch * keys, dtype=torch.float32)
            gate = self.empty(batch * self.rows, dtype=torch.bool)
            packing = Packing(bounds, bounds, self.rows, keys)
        else:
            query = self.empty(batch, heads * self.group_size, self.rows, self.head_dim)
            key = self.empty(batch, heads, keys, self.head_dim)
            bias = self.empty(batch, 1, keys, dtype=torch.float32)
            gate = self.empty(batch, self.rows, dtype=torch.bool)
            padding = self.empty(batch, keys, dtype=torch.bool) if self.has_gate else None
        return AttentionInputs(
            query,
            key,
            bias if self.has_bias else None,
            padding,
            gate if self.has_gate else None,
            True,
            self.scale,
            self.compute_capability,
            packing,
        )

    def lse(self) -> Tensor:
        packed, heads = self.is_packed, 2 * self.group_size
        return self.empty(*((heads, 2 * self.rows) if packed else (2, heads, self.rows)), dtype=torch.float32)


def run_forward(call: Call) -> None:
    inputs = call.inputs()
    attention_forward.attention_forward(inputs, inputs.key, torch.empty_like(inputs.query), call.lse())


def run_backward(call: Call) -> None:
    inputs, lse = call.inputs(), call.lse()
    query, key = inputs.query, inputs.key
    gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(key))
    attention_backward.attention_backward(inputs, key, query, lse, query, None, *gradients, call.has_bias)


def run_decode(call: Call) -> None:
    """On one processor, so that nothing is split."""
    inputs = call.inputs()
    attention_decode.attention_decode(inputs, inputs.key, torch.empty_like(inputs.query), call.lse(), 1)


def run_map(call: Call) -> None:
    attention_map.attention_map(call.inputs(), *_selection(call), None)


def run_map_backward(call: Call) -> None:
    inputs = call.inputs()
    grad_map = call.empty(2, inputs.heads, inputs.keys_in_memory, dtype=torch.float32)
    gradients = (torch.empty_like(inputs.query), torch.empty_like(inputs.key))
    attention_map.attention_map_backward(inputs, *_selection(call), call.lse(), grad_map, *gradients, call.has_bias)


def _selection(call: Call) -> tuple[Tensor, Tensor]:
    return call.empty(2, call.rows, dtype=torch.bool), call.empty(2, dtype=torch.bool)


@dataclass(frozen=True)
class Launch:
    """Arguments by name, the tile's and the number of warps and stages among them."""

    kernel: Any
    arguments: dict[str, Any]

    @property
    def tile(self) -> Tile:
        return Tile(**{name: self.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")})

    def compile(self, compute_capability: int) -> MachineCode:
        return compile_kernel(**self.how_to_compile(compute_capability))

    def how_to_compile(self, compute_capability: int) -> dict[str, Any]:
        """For any strides and lengths: of the integers only the strides of a prepared bias, which has a range_ptr, are
        divisible by 16, and none is 1. STRIDE_UNIT says what else is known.
        """
        constants = {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        rest = {p.name: self.arguments[p.name] for p in self.kernel.params if not p.is_constexpr}
        types = {
            name: _TYPES[value.dtype if isinstance(value, Tensor) else type(value)] for name, value in rest.items()
        }
        aligned = {p.name for p in self.kernel.params if not p.do_not_specialize_on_alignment}
        divisible = {name for name, value in rest.items() if isinstance(value, Tensor) and name in aligned}
        if "range_ptr" in rest:
            divisible |= {"bias_stride_b", "bias_stride_h"}
        return {
            "kernel": self.kernel,
            "constants": constants,
            "compute_capability": compute_capability,
            "types": types,
            "divisible": divisible,
            **{name: self.arguments[name] for name in _OPTIONS if name in self.arguments},
        }


def record(run: Callable[[Call], None], call: Call) -> dict[str, Launch]:
    """What `run` launches for the call, by the name of the kernel."""
    if call.tile is None:
        return recorded(lambda: run(call))
    with mock.patch.object(arguments_module, "tile_for", return_value=call.tile):
        return recorded(lambda: run(call))


def recorded(run: Callable[[], object]) -> dict[str, Launch]:
    """What `run` launches, by the name of the kernel."""
    launches: dict[str, Launch] = {}
    with contextlib.ExitStack() as stack:
        for name, module_name in KERNELS.items():
            module = importlib.import_module(f"finegrain_ops.kernels.{module_name}")
            recorder = _Recorder(getattr(module, name), name, launches)
            stack.enter_context(mock.patch.object(module, name, recorder))
        run()
    return launches


class _Recorder:
    def __init__(self, kernel: Any, name: str, launches: dict[str, Launch]) -> None:
        self._kernel, self._name, self._launches = kernel, name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._record

    def _record(self, *positional: Any, **named: Any) -> None:
        arguments = {**dict(zip(self._kernel.arg_names, positional)), **named}
        self._launches[self._name] = Launch(self._kernel, arguments)
