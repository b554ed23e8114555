"""PTX instructions as functions of a mask of threads, each built once for a kernel.

The tables say which opcodes, modifiers and operands are known. All else raises UnknownInstruction, when the kernel is
built: an instruction that is taken for another one would give a wrong answer to the question whether a kernel is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..parser import Instruction, Kernel
from ..registers import OperandError
from . import conversions, floats, integers, matrix, memory, predicates, warp, wgmma
from .forms import Form, Run

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["FORMS", "Run", "build", "check_control"]


def _never(i: Instruction, machine: Machine) -> Run:
    raise AssertionError("the machine itself executes what changes the flow of control")


CONTROL = (
    # .uni promises that no warp divides here, which without a predicate none can.
    Form("bra[.uni]", "d", _never),
    Form("{ret,exit}", "", _never),
    Form("bar[.cta].sync", "n", _never),
    Form("barrier[.cta].sync.aligned", "n", _never),
    Form("{bar,barrier}[.cta].red[.aligned].{and,or}.pred", "d n x", _never),
)
_BY_NAME: dict[str, list[Form]] = {}
FORMS = tuple(
    form for module in (conversions, floats, integers, matrix, memory, predicates, warp, wgmma) for form in module.FORMS
)
for _form in FORMS:
    for _name in _form.names:
        _BY_NAME.setdefault(_name, []).append(_form)


def build(i: Instruction, machine: Machine) -> Run:
    """What executes the instruction.

    Raises:
        UnknownInstruction: it is not one of FORMS.
    """
    form = _find(i, _BY_NAME.get(i.name, []))
    try:
        run = form.build(i, machine)
    except OperandError as error:
        raise i.unknown(str(error)) from None
    return machine.wgmma.guard(i, run, written=form.written(i), read=form.read(i))


def _find(i: Instruction, forms: list[Form]) -> Form:
    if not forms:
        raise i.unknown("unknown opcode")
    matching = [form for form in forms if form.matches(i.opcode)]
    if not matching:
        raise i.unknown("unknown modifier or type")
    problems = [form.problem(i) for form in matching]
    for form, problem in zip(matching, problems):
        if problem is None:
            return form
    raise i.unknown(str(problems[0]))


def check_control(i: Instruction, kernel: Kernel) -> None:
    """The same for what changes the flow of control, which the machine executes itself.

    Raises:
        UnknownInstruction: it is not one of CONTROL.
    """
    if i.has("warp"):
        return
    _find(i, [form for form in CONTROL if i.name in form.names])
    if i.name == "bra":
        if i.operands[0] not in kernel.labels:
            raise i.unknown("a branch to no label of the kernel")
        if i.predicate and i.has("uni"):
            raise i.unknown("a branch with a predicate that must not divide a warp")
    elif i.name in ("bar", "barrier"):
        # Other numbers, and barriers for a part of the threads, are for kernels whose warps do different things.
        number = i.operands[1] if i.has("red") else i.operands[0]
        if number != "0":
            raise i.unknown("a barrier other than the first one")
