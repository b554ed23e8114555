"""Launches of Triton kernels on CPU tensors, executed as the PTX that Triton compiles for a GPU.

    with Runner(80) as runner:
        kernel[grid](x, y, BLOCK=64)
    print(runner.report, runner.summary())

All that depends on Triton's version is in this file; it runs with 3.3 to 3.9.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .global_memory import GlobalMemory
from .launches import Executor, address_of, buffer_of, cache_folder, machine_for
from .report import Kind

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
_FORMATS = {"i1": "<?", "i32": "<i", "i64": "<q", "fp32": "<f"}
# Older ones (seen: 3.4 and 3.6) put no fence.proxy.async between the wait for a cp.async and the wgmma that reads its
# bytes, which the PTX ISA asks for: Kind.WGMMA_UNFENCED is right there, and a matter of Triton's.
FENCES_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
NOT_OURS: frozenset[Kind] = frozenset() if FENCES_COPIES else frozenset({Kind.WGMMA_UNFENCED})
_ALIGNED = 16  # bytes, or elements of a stride, that Triton's launcher asks about


@dataclass(frozen=True)
class _Compiled:
    ptx: str
    threads: int
    shared_bytes: int
    passed: tuple[tuple[str, str], ...]  # names and types of the arguments that are not constants


_compiled: dict[str, _Compiled] = {}


class Runner(Executor):
    """Within `with`, every launch of a Triton kernel runs here.

    unread: gets a kernel's name and its tensors, and returns the names of those that it must not read. `options`: an
    Executor's.
    """

    def __init__(
        self,
        compute_capability: int = 80,
        *,
        unread: Callable[[str, dict[str, Tensor]], set[str]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.compute_capability, self.unread = compute_capability, unread
        self._patches = contextlib.ExitStack()
        self._escaped: dict[int, Tensor] = {}  # whose addresses the host has asked for, to write them into tables

    def __enter__(self) -> Runner:
        runner, data_ptr = self, Tensor.data_ptr

        def run(kernel: JITFunction, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
            runner.launch(kernel, grid, positional, named)

        def escaping(tensor: Tensor) -> int:
            runner._escaped[data_ptr(tensor)] = tensor
            return data_ptr(tensor)

        # PTX is all that is wanted: no ptxas, which takes most of the time. What is cached then is no machine code, so
        # it needs a cache of its own.
        folder = {"TRITON_CACHE_DIR": str(cache_folder() / f"triton-{triton.__version__}")}
        self._patches.enter_context(mock.patch.dict(os.environ, folder))
        self._patches.enter_context(mock.patch.object(CUDABackend, "make_cubin", return_value=b""))
        self._patches.enter_context(mock.patch.object(JITFunction, "run", run))
        self._patches.enter_context(mock.patch.object(Tensor, "data_ptr", escaping))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def launch(self, kernel: JITFunction, grid: Any, positional: tuple, named: dict[str, Any]) -> None:
        """Runs a kernel as `kernel[grid](*positional, **named)` would."""
        arguments = {p.name: p.default for p in kernel.params if p.has_default}
        arguments |= {**dict(zip(kernel.arg_names, positional)), **named}
        compiled = self._compile(kernel, arguments)
        name = kernel.__name__
        ptx = self.mutated(name, compiled.ptx)
        machine = machine_for(ptx, None, compiled.threads, compiled.shared_bytes, self.checks)
        memory = GlobalMemory(self.report)
        for tensor in self._escaped.values():
            memory.bind_real("a tensor whose address was taken", buffer_of(tensor))
        tensors = {name: arguments[name] for name, kind in compiled.passed if kind.startswith("*")}
        unread = set() if self.unread is None else self.unread(name, tensors)
        values = [self._pack(memory, p, kind, arguments[p], p in unread) for p, kind in compiled.passed]
        # Then come pointers to scratch memory, which no kernel here has: an access through one is out of bounds.
        values += [bytes(8)] * (len(machine.kernel.parameters) - len(values))
        sizes = tuple(grid(dict(arguments)) if callable(grid) else grid)
        shape = (*sizes, *(1,) * (3 - len(sizes)))
        self.execute(name, name, machine, memory, shape, values)

    def _compile(self, kernel: JITFunction, arguments: dict[str, Any]) -> _Compiled:
        """As Triton's launcher specialises: integers that are 1 or divisible by 16, pointers aligned to 16 bytes."""
        constants: dict[str, Any] = {}
        signature: dict[str, str] = {}
        divisible, passed = [], []
        for position, parameter in enumerate(kernel.params):
            name, value = parameter.name, arguments[parameter.name]
            is_free = parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not is_free):
                constants[name], signature[name] = value, "constexpr"
                continue
            signature[name] = kind = _type_of(value)
            number = address_of(value) if isinstance(value, Tensor) else value
            may_be_aligned = not is_free and not parameter.do_not_specialize_on_alignment
            if may_be_aligned and type(number) is int and number % _ALIGNED == 0:
                divisible.append(position)
            passed.append((name, kind))
        options = {name: arguments[name] for name in _OPTIONS if name in arguments}
        key = repr((kernel.cache_key, self.compute_capability, constants, signature, divisible, options))
        if key not in _compiled:
            attributes = {(position,): [["tt.divisibility", _ALIGNED]] for position in divisible}
            source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
            target = GPUTarget("cuda", self.compute_capability, 32)
            result = triton.compile(source, target=target, options=options)
            threads = 32 * result.metadata.num_warps
            _compiled[key] = _Compiled(result.asm["ptx"], threads, result.metadata.shared, tuple(passed))
        return _compiled[key]

    @staticmethod
    def _pack(memory: GlobalMemory, name: str, kind: str, value: Any, is_unread: bool) -> bytes:
        if isinstance(value, Tensor):
            return struct.pack("<Q", memory.bind(name, buffer_of(value), is_unread))
        return struct.pack(_FORMATS[kind], value)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
