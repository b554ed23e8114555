"""What the threads of a warp do together: shuffles, reductions, votes. All of them must take part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..parser import Instruction
from ..registers import OperandError, put
from .forms import Form, Run

if TYPE_CHECKING:
    from ..machine import Machine

_REDUCE = {
    "min": np.minimum,
    "max": np.maximum,
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_ALL_LANES = 0xFFFFFFFF


def _check_members(i: Instruction, machine: Machine, text: str) -> Callable[[Any], np.ndarray]:
    """What gives the warps that are here. The mask of members must name all lanes."""
    mask = machine.registers.source(text, "u32")
    if np.ndim(mask) == 0 and int(mask) != _ALL_LANES:
        raise OperandError(f"a mask of members {int(mask):#x}, not the whole warp")

    def warps(m: Any) -> np.ndarray:
        if np.ndim(mask) and ((mask != _ALL_LANES) & m).any():
            raise i.unknown("a mask of members that is not the whole warp")
        return machine.whole_warps(m)

    return warps


def _shuffle(i: Instruction, machine: Machine) -> Run:
    mode, registers = i.parts[2], machine.registers
    name, _, within = i.operands[0].partition("|")
    d, in_range = registers.view(name, "b32"), registers.view(within, "pred") if within else None
    a, b, c = (registers.per_thread(o, "u32") for o in i.operands[1:4])
    warps = _check_members(i, machine, i.operands[4])
    lane = machine.all_threads & 31

    def run(m: Any) -> None:
        warps(m)
        amount, clamp, segment = (x.astype(np.int64) for x in (b & 31, c & 31, (c >> 8) & 31))
        lowest = lane & segment
        highest = lowest | (clamp & ~segment)
        if mode == "bfly":
            source = lane ^ amount
        elif mode == "idx":
            source = lowest | (amount & ~segment)
        else:
            source = lane - amount if mode == "up" else lane + amount
        valid = source >= highest if mode == "up" else source <= highest
        source = machine.all_threads - lane + np.where(valid, source, lane)
        result = a[source]
        if in_range is not None:
            put(in_range, valid, m)
        put(d, result, m)

    return run


def _redux(i: Instruction, machine: Machine) -> Run:
    registers, function = machine.registers, _REDUCE[i.parts[2]]
    d, a = registers.view(i.operands[0], i.kind), registers.per_thread(i.operands[1], i.kind)
    warps = _check_members(i, machine, i.operands[2])

    def run(m: Any) -> None:
        warps(m)
        put(d, np.repeat(function.reduce(a.reshape(-1, 32), axis=1), 32), m)

    return run


def _vote(i: Instruction, machine: Machine) -> Run:
    mode, registers = i.parts[2], machine.registers
    p = registers.view(i.operands[1], "pred")
    d = registers.view(i.operands[0], "b32" if mode == "ballot" else "pred")
    warps = _check_members(i, machine, i.operands[2])

    def run(m: Any) -> None:
        warps(m)
        votes = p.reshape(-1, 32)
        if mode == "ballot":
            result = (votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
        else:
            result = votes.any(1) if mode == "any" else votes.all(1)
        put(d, np.repeat(result, 32), m)

    return run


def _synchronise(i: Instruction, machine: Machine) -> Run:
    """bar.warp.sync: the threads of a warp run together here anyway."""
    warps = _check_members(i, machine, i.operands[0])

    def run(m: Any) -> None:
        warps(m)

    return run


FORMS = (
    Form("shfl.sync.{bfly,idx,up,down}.b32", "D x x x x", _shuffle),
    Form("redux.sync.{min,max,add}.{s32,u32}", "d x x", _redux),
    Form("redux.sync.{and,or,xor}.b32", "d x x", _redux),
    Form("vote.sync.{any,all}.pred", "d x x", _vote),
    Form("vote.sync.ballot.b32", "d x x", _vote),
    Form("bar.warp.sync", "x", _synchronise),
)
