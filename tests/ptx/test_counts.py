"""Counts of instructions, memory traffic and coverage, where they are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.counts import Coverage, Traffic, by_source_line, sectors, wavefronts
from ptx.handwritten import run_machine
from ptx.machine import Machine

SHARED = "mov.u32 %r10, memory;\n"


def traffic(machine: Machine, name: str) -> Traffic:
    return next(counted for instruction, counted in machine.traffic() if instruction.name == name)


@pytest.mark.parametrize(("stride", "expected"), [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)])
def test_sectors_of_a_warp(stride: int, expected: int) -> None:
    body = f"mad.wide.u32 %rd10, %r0, {stride}, %rd0; ld.global.b32 %r1, [%rd10];"
    machine = run_machine(body, [torch.zeros(4096)])
    assert traffic(machine, "ld") == Traffic(requests=1, bytes=128, sectors=expected)


def test_warps_make_requests_of_their_own() -> None:
    machine = run_machine("ld.global.b32 %r1, [%rd0];", [torch.zeros(4)], threads=96)
    assert traffic(machine, "ld") == Traffic(requests=3, bytes=384, sectors=3)


@pytest.mark.parametrize(
    ("stride", "size", "expected"),
    [
        (4, 4, (1, 1)),  # each thread a bank of its own
        (8, 4, (2, 1)),
        (128, 4, (32, 1)),  # all in one bank
        (0, 4, (1, 1)),  # one word for all
        (16, 16, (4, 4)),  # a quarter warp at a time
        (32, 16, (8, 4)),
        (8, 8, (2, 2)),
        (2, 2, (1, 1)),  # two threads a word
    ],
)
def test_wavefronts_of_a_warp(stride: int, size: int, expected: tuple[int, int]) -> None:
    words = {2: "b16 %rs1", 4: "b32 %r1", 8: "b64 %rd9", 16: "v4.b32 {%r1,%r2,%r3,%r4}"}[size]
    opcode, registers = words.split(maxsplit=1)
    body = SHARED + f"mad.lo.s32 %r11, %r0, {stride}, %r10; st.shared.{opcode} [%r11], {registers};"
    counted = traffic(run_machine(body, shared_bytes=4096 + 16), "st")
    assert (counted.wavefronts, counted.least_wavefronts) == expected


def test_a_matrix_is_read_a_quarter_at_a_time() -> None:
    """Rows of 128 bytes fall into the same banks, of 144 into different ones."""
    for stride, expected in ((144, 4), (128, 32)):
        fill = "st.shared.v4.b32 [%r11], {%r0, %r0, %r0, %r0};"
        load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r11];"
        body = SHARED + f"mad.lo.s32 %r11, %r0, {stride}, %r10; {fill} {load}"
        counted = traffic(run_machine(body, shared_bytes=8192), "ldmatrix")
        assert (counted.wavefronts, counted.least_wavefronts) == (expected, 4)


def test_the_functions_themselves() -> None:
    address = np.arange(32, dtype=np.uint64) * np.uint64(4)
    assert sectors(address + np.uint64(16), np.zeros(32, np.int64), 4) == 5  # not aligned to a sector
    assert wavefronts(address, np.zeros(32, np.int64), 4) == (1, 1)


def test_copies_count_both_sides_and_one_request() -> None:
    body = (
        SHARED
        + """mad.lo.s32 %r11, %r0, 16, %r10; mad.wide.u32 %rd10, %r0, 16, %rd0;
        cp.async.cg.shared.global [%r11], [%rd10], 16; cp.async.wait_all;"""
    )
    expected = Traffic(requests=1, bytes=512, sectors=16, wavefronts=4, least_wavefronts=4)
    assert traffic(run_machine(body, [torch.zeros(128)], shared_bytes=512), "cp") == expected


def test_instructions_are_counted_by_warps() -> None:
    body = (
        "setp.lt.u32 %p0, %r0, 32; @%p0 bra $A; add.s32 %r1, %r0, 1; add.s32 %r1, %r1, 1; $A: mul.lo.s32 %r2, %r0, 3;"
    )
    counted = run_machine(body, threads=64).instructions()
    assert counted["bra"] == 2
    assert counted["integer"] == 2 + 2 + 2  # setp and mul by both warps, add twice by one
    assert sum(counted.values()) == 2 * 5 + 2  # with mov and ret


def test_lines_add_up() -> None:
    body = (
        ".loc 1 5 0\n ld.global.b32 %r1, [%rd0]; ld.global.b32 %r2, [%rd0];\n .loc 1 6 0\n ld.global.b32 %r3, [%rd0];"
    )
    lines = by_source_line(run_machine(body, [torch.zeros(4)]).traffic())
    assert {line: counted.requests for line, counted in lines.items()} == {"1:5": 2, "1:6": 1}


def test_coverage_knows_what_no_thread_has_executed() -> None:
    body = """setp.lt.u32 %p0, %r0, 99; setp.gt.u32 %p1, %r0, 99;
        @%p0 add.s32 %r1, %r0, 1;
        @%p1 add.s32 %r1, %r0, 2;
        @%p0 bra $END;
        add.s32 %r1, %r0, 3;
        $END:"""
    machine = run_machine(body)
    coverage = machine.coverage()
    missed = [i.text for i in machine.kernel.instructions if i.index not in coverage.executed]
    assert missed == ["@%p1 add.s32 %r1, %r0, 2", "add.s32 %r1, %r0, 3"]
    assert coverage.share == 1 - 2 / coverage.total


def test_coverage_is_merged_for_one_text_only() -> None:
    first, second = Coverage("a", frozenset({0, 1}), 4), Coverage("a", frozenset({1, 2}), 4)
    assert (first | second).executed == {0, 1, 2}
    with pytest.raises(ValueError, match="different"):
        first | Coverage("b", frozenset(), 4)
