"""What is not known is refused when the kernel is built, and said with the instruction and its source line."""

from __future__ import annotations

import pytest

from ptx.handwritten import module
from ptx.machine import Checks, Machine
from ptx.parser import parse
from ptx.report import UnknownInstruction


def build(body: str) -> Machine:
    return Machine(parse(module(body, 1)), 32, 0, Checks())


REFUSED = {
    "an opcode": "sad.s32 %r1, %r2, %r3, %r4;",
    "a call": "call (%r1), f, (%r2);",
    "an atomic": "atom.global.add.u32 %r1, [%rd0], %r2;",
    "a reduction in memory": "red.global.add.f32 [%rd0], %r2;",
    "an mbarrier": "mbarrier.init.shared.b64 [%r1], 1;",
    "a bulk copy": "cp.async.bulk.commit_group;",
    "a tensor map": "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], [%r2];",
    "tcgen05": "tcgen05.fence::before_thread_sync;",
    "a rounding mode": "add.rz.f32 %r1, %r2, %r3;",
    "rounding up": "fma.rp.f32 %r1, %r2, %r3, %r4;",
    "saturation": "add.sat.f32 %r1, %r2, %r3;",
    "integer saturation": "add.sat.s32 %r1, %r2, %r3;",
    "xorsign": "max.xorsign.abs.f32 %r1, %r2, %r3;",
    "relu of floats": "cvt.rn.relu.bf16x2.f32 %r1, %r2, %r3;",
    "satfinite": "cvt.rn.satfinite.bf16.f32 %rs1, %r3;",
    "ftz where there is none": "add.ftz.f64 %rd1, %rd2, %rd3;",
    "a 24-bit product": "mul24.lo.s32 %r1, %r2, %r3;",
    "the high half of 64 bits": "mul.hi.s64 %rd1, %rd2, %rd3;",
    "a carry": "add.cc.u32 %r1, %r2, %r3;",
    "a type": "add.s8 %rs1, %rs2, %rs3;",
    "a tf32 product": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, "
    "{%r9,%r10}, {%r11,%r12,%r13,%r14};",
    "a float16 sum": "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1,%r2}, {%r5,%r6,%r7,%r8}, "
    "{%r9,%r10}, {%r11,%r12};",
    "too few registers of a matrix": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r3];",
    "an 8-bit matrix": "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r3];",
    "local memory": "ld.local.b32 %r1, [%rd1];",
    "a generic address": "ld.b32 %r1, [%rd0];",
    "constant memory": "ld.const.b32 %r1, [%rd0];",
    "memory of the cluster": "ld.shared::cluster.b32 %r1, [%r2];",
    "a cache policy": "ld.global.L2::cache_hint.b32 %r1, [%rd0], %rd1;",
    "acquire": "ld.acquire.gpu.global.b32 %r1, [%rd0];",
    "relaxed": "st.relaxed.gpu.global.b32 [%rd0], %r1;",
    "a vector of another length": "ld.global.v2.b32 {%r1, %r2, %r3}, [%rd0];",
    "an access of 32 bytes": "ld.global.v4.b64 {%rd1, %rd2, %rd3, %rd4}, [%rd0];",
    "a copy of 12 bytes": "cp.async.ca.shared.global [%r1], [%rd0], 12;",
    "cg of 8 bytes": "cp.async.cg.shared.global [%r1], [%rd0], 8;",
    "a predicate that ignores the source": "cp.async.ca.shared.global [%r1], [%rd0], 4, %p1;",
    "another barrier": "bar.sync 1;",
    "a barrier of some threads": "bar.sync 0, 32;",
    "an arrival": "bar.arrive 0, 64;",
    "some lanes": "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 15;",
    "a shuffle without sync": "shfl.bfly.b32 %r1, %r2, 1, 31;",
    "a uniform branch with a predicate": "@%p0 bra.uni $L; $L:",
    "a branch to nowhere": "bra $NOWHERE;",
    "an indexed branch": "brx.idx %r1, $L;",
    "a special register": "mov.u32 %r1, %clock;",
    "its 64 bits": "mov.u64 %rd1, %tid.x;",
    "a symbol": "mov.u64 %rd1, constants;",
    "a register that is not declared": "add.s32 %r1, %r2, %x3;",
    "a register that is too wide": "add.s32 %r1, %r2, %rd3;",
    "a register that is too narrow": "add.s32 %rs1, %r2, %r3;",
    "a number for a predicate": "selp.b32 %r1, %r2, %r3, %r4;",
    "a negated operand": "and.pred %p1, %p2, !%p3;",
    "an operand too many": "add.s32 %r1, %r2, %r3, %r4;",
    "an operand too few": "add.s32 %r1, %r2;",
    "an address instead of a register": "add.s32 %r1, %r2, [%rd0];",
    "a list instead of a register": "add.s32 %r1, {%r2, %r3}, %r4;",
    "two results of a comparison": "setp.lt.s32 %p1|%p2, %r1, %r2;",
    "a comparison that goes on": "setp.lt.and.s32 %p1, %r1, %r2, %p3;",
    "a parameter that is none": "ld.param.u64 %rd1, [other];",
    "beyond a parameter": "ld.param.u64 %rd1, [kernel_param_0+8];",
    "a directive": ".local .align 4 .b8 depot[16];",
    "wgmma of tf32": "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1,%r2,%r3,%r4}, %rd1, %rd2, %p1, 1, 1;",
    "wgmma that negates": "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1,%r2,%r3,%r4}, %rd1, %rd2, %p1, "
    "-1, 1, 0, 0;",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    with pytest.raises(UnknownInstruction):
        build(REFUSED[name])


def test_it_is_refused_even_where_it_never_runs() -> None:
    with pytest.raises(UnknownInstruction, match="unknown opcode"):
        build("bra $END; sad.s32 %r1, %r2, %r3, %r4; $END:")


def test_the_error_says_where() -> None:
    text = module(".loc 1 60 42\n add.rz.f32 %r1, %r2, %r3;", 1) + '.file 1 "/some/folder" "kernel.py"\n'
    with pytest.raises(UnknownInstruction) as error:
        Machine(parse(text), 32, 0, Checks())
    assert "add.rz.f32" in str(error.value)
    assert "kernel.py:60" in str(error.value)


ALLOWED = (
    "ld.global.nc.L1::evict_last.v2.b32 {%r1, %r2}, [%rd0];",
    "ld.volatile.global.b32 %r1, [%rd0];",
    "st.global.wt.b32 [%rd0], %r1;",
    "cp.async.cg.shared.global.L2::128B [%r1], [%rd0], 16;",
    "bra.uni $L; $L:",
    "@!%p0 bra $L; $L:",
    "barrier.sync.aligned 0;",
    "membar.gl;",
)


@pytest.mark.parametrize("text", ALLOWED)
def test_hints_that_do_not_matter_are_known(text: str) -> None:
    build(text)
