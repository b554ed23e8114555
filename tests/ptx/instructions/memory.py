"""Loads, stores, asynchronous copies and fences.

Cache hints (.L1::…, .L2::…, .ca, .cg, .cs, .nc, .volatile) say how fast an access is or who else may see it, not what
it gives: within a launch, and with the checks that blocks do not depend on one another, they do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parser import Address, Instruction
from ..registers import DTYPES, OperandError, put
from ..report import Kind
from .forms import Form, Run

if TYPE_CHECKING:
    from ..machine import Machine

_COPY_SIZES = (4, 8, 16)
_WORDS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)} | {16: np.dtype("V16")}


def address_of(operand: Address, machine: Machine) -> Callable[[], np.ndarray]:
    """What gives every thread's address, of 64 or 32 bits as the register has it."""
    registers, base = machine.registers, operand.base
    if registers.is_register(base):
        row = registers.row(base)
        if row.dtype.itemsize < 4:
            raise OperandError(f"{base} is too narrow for an address")
        if not operand.offset:
            return lambda: row
        offset = np.array(operand.offset % 2 ** (8 * row.dtype.itemsize), row.dtype)[()]
        return lambda: row + offset
    if base and base not in machine.kernel.shared:
        raise OperandError(f"{base} is no address")
    start = machine.kernel.shared[base] if base else 0
    constant = np.full(machine.threads, start + operand.offset, np.uint64)
    return lambda: constant


def _vector(operand: Any, i: Instruction) -> list[str]:
    names = operand if isinstance(operand, list) else [operand]
    count = 4 if i.has("v4") else 2 if i.has("v2") else 1
    if len(names) != count:
        raise OperandError(f"{len(names)} registers instead of {count}")
    return names


def _check_size(size: int) -> int:
    if size > 16:
        raise OperandError(f"an access of {size} bytes")
    return size


def _load(i: Instruction, machine: Machine) -> Run:
    names, dtype = _vector(i.operands[0], i), DTYPES[i.kind]
    rows = [machine.registers.extending(name, i.kind) for name in names]
    where, size = address_of(i.operands[1], machine), _check_size(dtype.itemsize * len(names))
    is_global, counts = i.has("global"), machine.counts if machine.checks.checked else None

    def run(m: Any) -> None:
        threads, address = machine.active(m, where())
        if is_global:
            if counts is not None:
                counts.note_global(i, threads, address, size)
            words = machine.memory.load(address, size)
        else:
            if counts is not None:
                counts.note_shared(i, threads, address, size)
            words = machine.shared.load(threads, address, size)
        values = words.view(dtype).reshape(len(threads), len(rows))
        for k, row in enumerate(rows):
            if m is True:
                row[...] = values[:, k]
            else:
                row[threads] = values[:, k]

    return run


def _store(i: Instruction, machine: Machine) -> Run:
    names, dtype = _vector(i.operands[1], i), DTYPES[i.kind]
    values = [machine.registers.source(name, i.kind, narrow=True) for name in names]
    where, size = address_of(i.operands[0], machine), _check_size(dtype.itemsize * len(names))
    is_global, counts = i.has("global"), machine.counts if machine.checks.checked else None

    def run(m: Any) -> None:
        threads, address = machine.active(m, where())
        stacked = np.empty((len(threads), len(values)), dtype)
        for k, value in enumerate(values):
            stacked[:, k] = value if m is True or np.ndim(value) == 0 else value[threads]
        words = stacked.view(_WORDS[size]).ravel()
        if is_global:
            if counts is not None:
                counts.note_global(i, threads, address, size)
            machine.memory.store(address, words)
        else:
            if counts is not None:
                counts.note_shared(i, threads, address, size)
            machine.shared.store(threads, address, words)

    return run


def _load_parameter(i: Instruction, machine: Machine) -> Run:
    names, dtype, at = _vector(i.operands[0], i), DTYPES[i.kind], i.operands[1]
    rows = [machine.registers.extending(name, i.kind) for name in names]
    if machine.registers.is_register(at.base):
        return _load_parameter_at(i, machine, rows, dtype, at)
    cells = [
        machine.registers.parameter(Address(at.base, at.offset + k * dtype.itemsize), dtype) for k in range(len(rows))
    ]

    def run(m: Any) -> None:
        for row, cell in zip(rows, cells):
            put(row, cell[0], m)

    return run


def _load_parameter_at(i: Instruction, machine: Machine, rows: list[np.ndarray], dtype: np.dtype, at: Address) -> Run:
    """A part of a structure whose place is computed."""
    base, size = machine.registers.view(at.base, "s64"), dtype.itemsize * len(rows)
    parameters = machine.registers.parameters

    def run(m: Any) -> None:
        threads, start = machine.active(m, base + at.offset)
        if start.min() < 0 or start.max() + size > parameters.size:
            machine.report.add(Kind.PARAMETER_OUT_OF_BOUNDS, f"{size} bytes at byte {int(start.max())}")
            start = np.clip(start, 0, parameters.size - size)
        values = np.ascontiguousarray(parameters[start[:, None] + np.arange(size)]).view(dtype)
        for k, row in enumerate(rows):
            row[threads] = values[:, k]

    return run


def _copy_async(i: Instruction, machine: Machine) -> Run:
    """Copies from global to shared memory; the rest of an access of which fewer bytes are read is filled with zeros."""
    to, source, registers = address_of(i.operands[0], machine), address_of(i.operands[1], machine), machine.registers
    size = int(i.operands[2], 0)
    if size not in _COPY_SIZES or (i.has("cg") and size != 16):
        raise OperandError(f"a copy of {size} bytes")
    read = registers.per_thread(i.operands[3], "u32") if len(i.operands) > 3 else None
    counts = machine.counts if machine.checks.checked else None

    def run(m: Any) -> None:
        threads, target = machine.active(m, to())
        address = source()[threads]
        if read is None or (read[threads] == size).all():
            if counts is not None:
                counts.note_global(i, threads, address, size)
            words = machine.memory.load(address, size)
        else:
            words = np.zeros((len(threads), size), np.uint8)
            of_each = read[threads]
            for count in map(int, np.unique(of_each[of_each > 0])):
                chosen = np.flatnonzero(of_each == count)
                if counts is not None:
                    counts.note_global(i, threads[chosen], address[chosen], count)
                words[chosen, :count] = _read_bytes(machine, address[chosen], count, size)
            words = words.view(_WORDS[size]).ravel()
        if counts is not None:
            counts.note_shared(i, threads, target, size)
        machine.shared.copy_async(threads, target, words)

    return run


def _read_bytes(machine: Machine, address: np.ndarray, count: int, size: int) -> np.ndarray:
    """`count` bytes for each thread, of an access that must be aligned to `size`."""
    if count > size:
        machine.report.add(Kind.GLOBAL_OUT_OF_BOUNDS, f"cp.async reads {count} bytes to write {size}")
        count = size
    if count == size:
        return machine.memory.load(address, size).view(np.uint8).reshape(-1, size)
    if (address % np.uint64(size)).any():
        machine.report.add(Kind.GLOBAL_MISALIGNED, f"cp.async of {size} bytes")
    parts = [machine.memory.load(address + np.uint64(k), 1).view(np.uint8) for k in range(count)]
    return np.stack(parts, -1)


def _commit(i: Instruction, machine: Machine) -> Run:
    return machine.commit_group


def _wait(i: Instruction, machine: Machine) -> Run:
    left = int(i.operands[0])
    return lambda m: machine.wait_group(m, left)


def _wait_all(i: Instruction, machine: Machine) -> Run:
    def run(m: Any) -> None:
        machine.commit_group(m)
        machine.wait_group(m, 0)

    return run


def _proxy_fence(i: Instruction, machine: Machine) -> Run:
    return machine.shared.fence


def _nothing(i: Instruction, machine: Machine) -> Run:
    """Fences between threads: only barriers count as synchronisation here, so a kernel that relies on a fence alone is
    said to have a race.
    """
    return lambda m: None


_TYPES = "{b8,b16,b32,b64,u8,u16,u32,u64,s8,s16,s32,s64,f32,f64}"
_HINTS = "[.{ca,cg,cs,lu,cv}][.nc][.L1::{evict_first,evict_last,no_allocate}][.L2::{64B,128B,256B}]"
_WRITE_HINTS = "[.{wb,cg,cs,wt}][.L1::{evict_first,evict_last,no_allocate}]"
FORMS = (
    Form(f"ld[.volatile].global{_HINTS}[.{{v2,v4}}].{_TYPES}", "V a", _load),
    Form(f"ld[.volatile].shared[::cta][.{{v2,v4}}].{_TYPES}", "V a", _load),
    Form(f"ld.param[.{{v2,v4}}].{_TYPES}", "V a", _load_parameter),
    Form(f"st[.volatile].global{_WRITE_HINTS}[.{{v2,v4}}].{_TYPES}", "a v", _store),
    Form(f"st[.volatile].shared[::cta][.{{v2,v4}}].{_TYPES}", "a v", _store),
    Form("cp.async.{ca,cg}.shared[::cta].global[.L2::{64B,128B,256B}]", "a a n x?", _copy_async),
    Form("cp.async.commit_group", "", _commit),
    Form("cp.async.wait_group", "n", _wait),
    Form("cp.async.wait_all", "", _wait_all),
    Form("fence.proxy.async[.shared::cta]", "", _proxy_fence),
    Form("membar.{cta,gl,sys}", "", _nothing),
    Form("fence[.{sc,acq_rel}].{cta,gpu,sys}", "", _nothing),
)
