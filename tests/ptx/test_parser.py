"""What the parser makes of the forms that compilers write."""

from __future__ import annotations

import pytest

from ptx.parser import Address, Instruction, Kernel, parse
from ptx.report import UnknownInstruction

TEXT = """
.version 8.7
.target sm_90a
.address_size 64
.global .align 4 .u32 constant_of_the_module = 2;
.extern .shared .align 16 .b8 global_smem[];
.visible .entry first(
    .param .u64 .ptr .global .align 1 first_param_0,
    .param .align 8 .b8 first_param_1[608],
    .param .u32 first_param_2
)
.reqntid 128
{
    .reg .pred %p<3>; // a comment
    .reg .b32 %r<10>;
    .reg .b64 %rd<4>;
    .shared .align 8 .b8 fixed[20];
    .loc 1 10 4
$L__func_begin0:
    ld.param.b64 %rd1, [first_param_0];
    .loc 2 7 0, function_name $L__info_string0, inlined_at 1 10 4
    // begin inline asm
    {
    .reg .pred p;
    setp.ne.b32 p, %r3, 0;
    @p bra $DONE;
    }
    // end inline asm
    @!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 16 ];
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {%r1,%r2},
        %rd1, %rd2, %p1, 1, 1, 0, 0;
    st.shared.b32 [global_smem+-4], %r1;
    shfl.sync.bfly.b32 %r4|%p2, %r1, 1, 31, -1;
    .pragma "nounroll";
$DONE: ret;
}
.visible .entry second(.param .u64 second_param_0) { ret; }
.file 1 "/folder" "kernel.py"
.file 2 "/other/softmax.py"
"""


@pytest.fixture
def kernel() -> Kernel:
    return parse(TEXT)


def find(kernel: Kernel, name: str) -> Instruction:
    return next(i for i in kernel.instructions if i.name == name)


def test_the_signature(kernel: Kernel) -> None:
    assert kernel.name == "first"
    assert kernel.parameters == {"first_param_0": 8, "first_param_1": 608, "first_param_2": 4}


def test_a_kernel_is_chosen_by_name() -> None:
    assert [i.name for i in parse(TEXT, "second").instructions] == ["ret"]
    with pytest.raises(ValueError, match="third"):
        parse(TEXT, "third")


def test_shared_memory(kernel: Kernel) -> None:
    """What the launch adds lies after the arrays of a fixed size."""
    assert kernel.shared == {"fixed": 0, "global_smem": 128}
    assert kernel.shared_bytes == 128


def test_source_lines(kernel: Kernel) -> None:
    assert kernel.instructions[0].source == "kernel.py:10"
    assert find(kernel, "setp").source == "softmax.py:7"


def test_predicates_and_vectors(kernel: Kernel) -> None:
    load = [i for i in kernel.instructions if i.name == "ld"][1]
    assert (load.predicate, load.negated) == ("%p1", True)
    assert load.operands == [["%r1", "%r2"], Address("%rd1", 16)]
    assert load.parts == ["ld", "global", "v2", "b32"]


def test_registers_of_inline_assembly_are_its_own(kernel: Kernel) -> None:
    own = find(kernel, "setp").operands[0]
    assert own != "p"
    assert kernel.registers[str(own)] == "pred"
    assert find(kernel, "bra").predicate == own


def test_an_instruction_over_several_lines(kernel: Kernel) -> None:
    assert find(kernel, "wgmma").operands == [["%r1", "%r2"], "%rd1", "%rd2", "%p1", "1", "1", "0", "0"]


def test_negative_offsets_and_pairs(kernel: Kernel) -> None:
    assert find(kernel, "st").operands[0] == Address("global_smem", -4)
    assert find(kernel, "shfl").operands[0] == "%r4|%p2"


def test_labels(kernel: Kernel) -> None:
    assert kernel.labels["$L__func_begin0"] == 0
    assert kernel.instructions[kernel.labels["$DONE"]].name == "ret"


@pytest.mark.parametrize(
    "line", ["ADD.s32 %r1, %r2;", "ld.global.b32 %r1, [%rd1-4];", ".surprise 3;", "add.s32 %r1, %r2"]
)
def test_what_cannot_be_read_is_refused(line: str) -> None:
    with pytest.raises(UnknownInstruction):
        parse(TEXT.replace("$DONE: ret;", f"$DONE: ret; {line}"))


def test_the_digest_is_that_of_the_text() -> None:
    assert parse(TEXT).digest == parse(TEXT).digest != parse(TEXT + "\n").digest
