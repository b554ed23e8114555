"""Small kernels that tests write by hand.

report = run_kernel("ld.global.u32 %r1, [%rd0+128];", [tensor])      32 threads; %r0 is the thread, %rd0 the tensor
result = evaluate("add.s32 {d}, {a}, {b};", np.int32, x, y)          one thread for each element
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .global_memory import GlobalMemory
from .launches import buffer_of
from .machine import Checks, Machine
from .parser import parse
from .report import Report

_REGISTERS = {1: "rs", 2: "rs", 4: "r", 8: "rd"}
_BODY = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel({parameters})
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<160>;
    .reg .b64 %rd<32>;
    .shared .align 1024 .b8 memory[{shared_bytes}];
    mov.u32 %r0, %tid.x;
    {loads}
    {body}
    ret;
}}
"""


def module(body: str, num_tensors: int = 0, shared_bytes: int = 16) -> str:
    """A kernel whose register %r0 is the thread's number, and %rd0, %rd1 … the tensors' addresses."""
    parameters = ", ".join(f".param .u64 kernel_param_{k}" for k in range(num_tensors))
    loads = "".join(f"ld.param.u64 %rd{k}, [kernel_param_{k}];\n" for k in range(num_tensors))
    return _BODY.format(parameters=parameters, shared_bytes=shared_bytes, loads=loads, body=body)


def run_kernel(
    body: str,
    tensors: list[Tensor] | None = None,
    *,
    threads: int = 32,
    shared_bytes: int = 16,
    blocks: int = 1,
    **checks: Any,
) -> Report:
    """Runs such a kernel; it writes into the tensors."""
    return run_machine(body, tensors, threads=threads, shared_bytes=shared_bytes, blocks=blocks, **checks).report


def run_machine(
    body: str,
    tensors: list[Tensor] | None = None,
    *,
    threads: int = 32,
    shared_bytes: int = 16,
    blocks: int = 1,
    **checks: Any,
) -> Machine:
    """The same, and returns the machine, whose registers and counts are as the last block has left them."""
    tensors = tensors or []
    machine = Machine(parse(module(body, len(tensors), shared_bytes)), threads, 0, Checks(**checks))
    memory = GlobalMemory(Report())
    names = [f"tensor {k}" for k in range(len(tensors))]
    parameters = [struct.pack("<Q", memory.bind(name, buffer_of(t))) for name, t in zip(names, tensors)]
    machine.launch(memory, (blocks, 1, 1), parameters)
    return machine


def evaluate(instruction: str, result: Any, *inputs: Any) -> np.ndarray:
    """What an instruction gives for arrays of equal lengths: {a}, {b}, {c} are registers with their elements (of type
    bool: predicates), {d} the register with the result, a number of type `result`.
    """
    arrays = np.broadcast_arrays(*map(np.atleast_1d, inputs))
    count = len(arrays[0])
    threads = -(-count // 32) * 32
    tensors, names, body = [], {}, []
    for k, (name, array) in enumerate(zip("abc", arrays)):
        padded = np.resize(array, threads)
        tensors.append(torch.from_numpy(padded.view(np.uint8)))
        size = array.dtype.itemsize
        register = f"%{_REGISTERS[size]}{20 + k}"
        body.append(f"mad.wide.u32 %rd10, %r0, {size}, %rd{k};")
        body.append(f"ld.global.b{8 * size} {register}, [%rd10];")
        if array.dtype.kind == "b":
            body.append(f"setp.ne.b16 %p{k}, {register}, 0;")
            register = f"%p{k}"
        names[name] = register
    dtype = np.dtype(result)
    output = torch.zeros(threads * dtype.itemsize, dtype=torch.uint8)
    target = f"%{_REGISTERS[dtype.itemsize]}30"
    names["d"] = "%p8" if dtype.kind == "b" else target
    body.append(instruction.format(**names))
    if dtype.kind == "b":
        body.append(f"selp.b16 {target}, 1, 0, %p8;")
    body.append(f"mad.wide.u32 %rd10, %r0, {dtype.itemsize}, %rd{len(arrays)};")
    body.append(f"st.global.b{8 * dtype.itemsize} [%rd10], {target};")
    report = run_kernel("\n".join(body), [*tensors, output], threads=threads)
    assert not report.findings, str(report)
    return output.numpy().view(dtype)[:count]
