"""All that the harness notices, each in a kernel of a few lines that does it wrong, and one that does it right."""

from __future__ import annotations

import pytest
import torch

from ptx.handwritten import run_kernel
from ptx.report import EndlessLoop, FindingError, Kind, Report

POINTER = "mad.wide.u32 %rd10, %r0, 4, %rd0;\n"  # each thread's own element of tensor 0
SHARED = "mov.u32 %r10, memory;\n mad.lo.s32 %r11, %r0, 4, %r10;\n"  # its own word of shared memory


def kinds(report: Report) -> set[Kind]:
    return set(report.kinds())


def ints(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------- global memory


def test_a_kernel_without_faults() -> None:
    data = ints(32)
    assert not kinds(run_kernel(POINTER + "st.global.b32 [%rd10], %r0;", [data]))
    assert data.tolist() == list(range(32))


@pytest.mark.parametrize("offset", [4, -4])
def test_global_out_of_bounds(offset: int) -> None:
    report = run_kernel(POINTER + f"ld.global.b32 %r1, [%rd10+{offset}];", [ints(32)])
    assert kinds(report) == {Kind.GLOBAL_OUT_OF_BOUNDS}


def test_an_access_between_tensors_that_lie_side_by_side() -> None:
    """Not into the other one, as on a GPU."""
    data = ints(64)
    report = run_kernel(POINTER + "ld.global.b32 %r1, [%rd10+64];", [data[:32], data[32:]])
    assert kinds(report) == {Kind.GLOBAL_OUT_OF_BOUNDS}


def test_stores_out_of_bounds_change_nothing() -> None:
    data = ints(64)
    report = run_kernel(POINTER + "st.global.b32 [%rd10+64], %r0;", [data[:32]])
    assert kinds(report) == {Kind.GLOBAL_OUT_OF_BOUNDS}
    assert data[32:].eq(0).all()


def test_the_gap_between_rows_of_a_view() -> None:
    view = torch.zeros(8, 8, dtype=torch.int32)[:, :4]  # 4 of 8 elements of each row
    assert kinds(run_kernel("ld.global.b32 %r1, [%rd0+32];", [view])) == set()
    assert kinds(run_kernel("ld.global.b32 %r1, [%rd0+16];", [view])) == {Kind.GLOBAL_GAP}
    assert kinds(run_kernel("ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%rd0+16];", [view])) == {Kind.GLOBAL_GAP}


def test_offsets_beyond_32_bits_reach_no_other_tensor() -> None:
    """2^30 elements are 2^32 bytes; an offset that has overflowed points 2^31 bytes backwards."""
    right = "mov.u32 %r1, 1073741824; mad.wide.u32 %rd10, %r1, 4, %rd0; ld.global.b32 %r2, [%rd10];"
    wrong = (
        "mov.u32 %r1, 536870912; mul.lo.s32 %r1, %r1, 4; mad.wide.s32 %rd10, %r1, 4, %rd0; ld.global.b32 %r2, [%rd10];"
    )
    for body in (right, wrong):
        assert kinds(run_kernel(body, [ints(32), ints(32)])) == {Kind.GLOBAL_OUT_OF_BOUNDS}


def test_misaligned_global_access() -> None:
    data = torch.zeros(256, dtype=torch.uint8)
    assert kinds(run_kernel("ld.global.b32 %r1, [%rd0+2];", [data])) == {Kind.GLOBAL_MISALIGNED}
    assert kinds(run_kernel("ld.global.v2.b32 {%r1,%r2}, [%rd0+4];", [data])) == {Kind.GLOBAL_MISALIGNED}
    assert kinds(run_kernel("ld.global.v2.b32 {%r1,%r2}, [%rd0+8];", [data])) == set()


def test_a_tensor_is_as_aligned_as_it_is() -> None:
    odd = ints(64)[1:]
    assert odd.data_ptr() % 8 == 4
    assert kinds(run_kernel("ld.global.v2.b32 {%r1,%r2}, [%rd0];", [odd])) == {Kind.GLOBAL_MISALIGNED}


def test_two_blocks_write_the_same_bytes() -> None:
    body = POINTER + "st.global.b32 [%rd10], 7;"
    assert kinds(run_kernel(body, [ints(32)], blocks=1)) == set()
    assert kinds(run_kernel(body, [ints(32)], blocks=2)) == {Kind.TWO_BLOCKS_WRITE}


def test_blocks_write_one_tensor_under_two_names() -> None:
    data = ints(32)
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0; selp.b64 %rd5, %rd0, %rd1, %p0;
              mad.wide.u32 %rd10, %r0, 4, %rd5; st.global.b32 [%rd10], 7;"""
    assert kinds(run_kernel(body, [data, ints(32)], blocks=2)) == set()
    assert kinds(run_kernel(body, [data, data], blocks=2)) == {Kind.TWO_BLOCKS_WRITE}


def test_a_block_reads_what_another_one_wrote() -> None:
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0;
              @%p0 st.global.b32 [%rd0], 7;
              @!%p0 ld.global.b32 %r2, [%rd0];"""
    assert kinds(run_kernel(body, [ints(1)], blocks=2)) == {Kind.READ_OF_ANOTHER_BLOCK}


def test_threads_write_different_values_to_one_address() -> None:
    assert kinds(run_kernel("st.global.b32 [%rd0], %r0;", [ints(1)])) == {Kind.DIFFERENT_VALUES}
    assert kinds(run_kernel("st.global.b32 [%rd0], 7;", [ints(1)])) == set()
    assert kinds(run_kernel(SHARED + "st.shared.b32 [%r10], %r0;")) == {Kind.DIFFERENT_VALUES}


def test_stop_raises_at_the_first_finding() -> None:
    report = Report(stop=True)
    report.at = run_kernel("ld.global.b32 %r1, [%rd0+8];", [ints(1)]).findings[0].instruction
    with pytest.raises(FindingError, match="out of bounds"):
        report.add(Kind.GLOBAL_OUT_OF_BOUNDS, "an example")


# ------------------------------------------------------------------------------------------------------- shared memory


def test_shared_out_of_bounds() -> None:
    for bytes_there, expected in ((128, set()), (124, {Kind.SHARED_OUT_OF_BOUNDS})):
        assert kinds(run_kernel(SHARED + "st.shared.b32 [%r11], 0;", shared_bytes=bytes_there)) == expected
    report = run_kernel(SHARED + "st.shared.b32 [%r11+-4], 0;", shared_bytes=128)
    assert kinds(report) == {Kind.SHARED_OUT_OF_BOUNDS}


def test_misaligned_shared_access() -> None:
    body = SHARED + "st.shared.v2.b32 [%r11], {%r0, %r0};"
    assert kinds(run_kernel(body, shared_bytes=256)) == {Kind.SHARED_MISALIGNED}


def test_uninitialised_shared_memory() -> None:
    body = SHARED + "st.shared.b32 [%r11], 0; ld.shared.b32 %r1, [%r11+{}];"
    assert kinds(run_kernel(body.format(0), shared_bytes=256)) == set()
    assert kinds(run_kernel(body.format(128), shared_bytes=256)) == {Kind.UNINITIALISED}


def test_a_block_finds_nothing_of_the_one_before() -> None:
    body = (
        SHARED
        + """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0;
        @%p0 st.shared.b32 [%r11], 0;
        ld.shared.b32 %r2, [%r11];"""
    )
    assert kinds(run_kernel(body, shared_bytes=128, blocks=1)) == set()
    assert kinds(run_kernel(body, shared_bytes=128, blocks=2)) == {Kind.UNINITIALISED}


OTHER = "xor.b32 %r12, %r0, 32;\n mad.lo.s32 %r12, %r12, 4, %r10;\n"  # the word of the other warp
RACES = {
    Kind.RACE_READ_AFTER_WRITE: "st.shared.b32 [%r11], %r0; {barrier} ld.shared.b32 %r1, [%r12];",
    Kind.RACE_WRITE_AFTER_READ: """st.shared.b32 [%r11], %r0; bar.sync 0; ld.shared.b32 %r1, [%r11]; {barrier}
                                   st.shared.b32 [%r12], 99;""",
    Kind.RACE_WRITE_AFTER_WRITE: "st.shared.b32 [%r11], 1; {barrier} st.shared.b32 [%r12], 2;",
}


@pytest.mark.parametrize("kind", RACES, ids=lambda kind: kind.name)
def test_races_between_warps(kind: Kind) -> None:
    body = SHARED + OTHER + RACES[kind]
    assert kinds(run_kernel(body.format(barrier="bar.sync 0;"), threads=64, shared_bytes=256)) == set()
    assert kinds(run_kernel(body.format(barrier=""), threads=64, shared_bytes=256)) == {kind}


def test_races_between_threads_of_a_warp() -> None:
    body = (
        SHARED
        + "xor.b32 %r12, %r0, 1; mad.lo.s32 %r12, %r12, 4, %r10; st.shared.b32 [%r11], 1; ld.shared.b32 %r1, [%r12];"
    )
    assert kinds(run_kernel(body, shared_bytes=128)) == set()
    assert kinds(run_kernel(body, shared_bytes=128, unit=1)) == {Kind.RACE_READ_AFTER_WRITE}


def test_warps_may_write_the_same_value() -> None:
    body = SHARED + "st.shared.b32 [%r10], 5; st.shared.b32 [%r10], 5;"
    assert kinds(run_kernel(body, threads=64)) == set()


def test_warps_may_read_side_by_side() -> None:
    body = SHARED + "st.shared.b32 [%r11], 5; bar.sync 0; ld.shared.b32 %r1, [%r10]; ld.shared.b32 %r1, [%r10];"
    assert kinds(run_kernel(body, threads=64, shared_bytes=256)) == set()


def test_a_race_of_a_reader_in_the_same_instruction() -> None:
    """Both warps read one word in one instruction; each must find that the other has read it."""
    body = (
        SHARED
        + """st.shared.b32 [%r10], 5; bar.sync 0; ld.shared.b32 %r1, [%r10];
        setp.lt.u32 %p0, %r0, 32; @%p0 st.shared.b32 [%r10], 6;"""
    )
    assert kinds(run_kernel(body, threads=64, shared_bytes=256)) == {Kind.RACE_WRITE_AFTER_READ}


@pytest.mark.parametrize(("serial", "expected"), [(1, 0), (-1, 1)])
def test_serial_runs_make_a_race_visible_in_the_result(serial: int, expected: int) -> None:
    """The second warp reads what the first one writes, before or after it."""
    data = ints(1)
    body = (
        SHARED
        + """st.shared.b32 [%r11], 0; bar.sync 0;
        setp.lt.u32 %p0, %r0, 32;
        @%p0 bra $FIRST;
        ld.shared.b32 %r1, [%r10];
        st.global.b32 [%rd0], %r1;
        bra $END;
        $FIRST: st.shared.b32 [%r10], 1;
        $END:"""
    )
    report = run_kernel(body, [data], threads=64, shared_bytes=256, serial=serial)
    assert kinds(report) & {Kind.RACE_READ_AFTER_WRITE, Kind.RACE_WRITE_AFTER_READ}
    assert data.item() == 1 - expected


# ------------------------------------------------------------------------------------------------------------ cp.async

COPY = SHARED + POINTER + "cp.async.ca.shared.global [%r11], [%rd10], 4;\n cp.async.commit_group;\n"


def test_cp_async_read_before_its_wait() -> None:
    data = torch.arange(32, dtype=torch.int32)
    read = "ld.shared.b32 %r1, [%r11]; add.s32 %r1, %r1, 1; st.global.b32 [%rd10], %r1;"
    assert kinds(run_kernel(COPY + read, [data], shared_bytes=128)) == {Kind.COPY_READ_EARLY}
    data = torch.arange(32, dtype=torch.int32)
    assert kinds(run_kernel(COPY + "cp.async.wait_group 0;" + read, [data], shared_bytes=128)) == set()
    assert data.tolist() == list(range(1, 33))


def test_cp_async_waits_for_older_groups_only() -> None:
    again = "cp.async.ca.shared.global [%r11+128], [%rd10], 4; cp.async.commit_group; cp.async.wait_group 1;"
    for offset, expected in ((0, set()), (128, {Kind.COPY_READ_EARLY})):
        body = COPY + again + f"ld.shared.b32 %r1, [%r11+{offset}];"
        assert kinds(run_kernel(body, [ints(32)], shared_bytes=256)) == expected


def test_a_copy_that_is_not_committed_is_not_waited_for() -> None:
    body = SHARED + POINTER + "cp.async.ca.shared.global [%r11], [%rd10], 4; {} ld.shared.b32 %r1, [%r11];"
    report = run_kernel(body.format("cp.async.wait_group 0;"), [ints(32)], shared_bytes=128)
    assert kinds(report) == {Kind.COPY_READ_EARLY}
    assert kinds(run_kernel(body.format("cp.async.wait_all;"), [ints(32)], shared_bytes=128)) == set()


def test_cp_async_keeps_the_address_that_it_began_with() -> None:
    """The register changes before the bytes arrive."""
    body = COPY + "mov.u32 %r12, %r11; add.s32 %r11, %r11, 128; cp.async.wait_group 0; ld.shared.b32 %r1, [%r12];"
    assert kinds(run_kernel(body, [ints(32)], shared_bytes=256)) == set()


def test_writing_over_a_cp_async_in_flight() -> None:
    store = "st.shared.b32 [%r11], 0;"
    assert kinds(run_kernel(COPY + store, [ints(32)], shared_bytes=128)) == {Kind.COPY_OVERWRITTEN}
    assert kinds(run_kernel(COPY + "cp.async.wait_group 0;" + store, [ints(32)], shared_bytes=128)) == set()
    again = "cp.async.ca.shared.global [%r11], [%rd10], 4;"
    assert kinds(run_kernel(COPY + again, [ints(32)], shared_bytes=128)) == {Kind.COPY_OVERWRITTEN}


def test_another_warp_reads_a_copy_without_a_barrier() -> None:
    body = COPY + OTHER + "cp.async.wait_group 0; {} ld.shared.b32 %r1, [%r12];"
    for barrier, expected in (("bar.sync 0;", set()), ("", {Kind.RACE_READ_AFTER_WRITE})):
        assert kinds(run_kernel(body.format(barrier), [ints(64)], threads=64, shared_bytes=256)) == expected


def test_misaligned_cp_async() -> None:
    data = torch.zeros(1024, dtype=torch.uint8)
    body = SHARED + "mad.lo.s32 %r11, %r0, 16, %r10; cp.async.cg.shared.global [%r11], [%rd0+{}], 16;"
    assert kinds(run_kernel(body.format(16), [data], shared_bytes=512)) == set()
    assert kinds(run_kernel(body.format(8), [data], shared_bytes=512)) == {Kind.GLOBAL_MISALIGNED}


# -------------------------------------------------------------------------------------------------- warps and barriers

DIVIDED = {
    "shfl": "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
    "redux": "redux.sync.add.s32 %r1, %r0, -1;",
    "vote": "vote.sync.any.pred %p1, %p0, -1;",
    "bar": "bar.sync 0;",
    "bar.warp": "bar.warp.sync -1;",
}


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_warps(name: str) -> None:
    body = f"setp.lt.u32 %p0, %r0, {{}}; @%p0 {DIVIDED[name]}"
    for threads, expected in ((32, set()), (64, set()), (40, {Kind.WARP_DIVIDED})):
        assert kinds(run_kernel(body.format(threads), threads=64)) == expected


def test_threads_at_different_barriers() -> None:
    body = "setp.lt.u32 %p0, %r0, 32; @%p0 bra $A; bar.sync 0; bra $B; $A: bar.sync 0; $B:"
    assert kinds(run_kernel(body, threads=64)) == {Kind.BARRIERS_DIFFER}
    assert kinds(run_kernel(body, threads=32)) == set()


def test_warps_that_have_returned_are_not_waited_for() -> None:
    body = (
        SHARED + "setp.lt.u32 %p0, %r0, 32; @%p0 ret; st.shared.b32 [%r11], 0; bar.sync 0; ld.shared.b32 %r1, [%r11];"
    )
    assert kinds(run_kernel(body, threads=64, shared_bytes=256)) == set()


def test_a_loop_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx.machine._MOST_STEPS", 100)
    with pytest.raises(EndlessLoop, match="block 0"):
        run_kernel("$AGAIN: bra $AGAIN;")


def test_division_by_zero() -> None:
    assert kinds(run_kernel(f"add.s32 %r1, %r0, {0}; div.s32 %r2, %r0, %r1;")) == {Kind.DIVISION_BY_ZERO}
    assert kinds(run_kernel(f"add.s32 %r1, %r0, {1}; rem.u32 %r2, %r0, %r1;")) == set()


def test_a_parameter_read_out_of_bounds() -> None:
    body = "mov.u64 %rd5, kernel_param_0; add.s64 %rd5, %rd5, {}; ld.param.u64 %rd6, [%rd5];"
    assert kinds(run_kernel(body.format(0), [ints(1)])) == set()
    assert kinds(run_kernel(body.format(16), [ints(1)])) == {Kind.PARAMETER_OUT_OF_BOUNDS}
