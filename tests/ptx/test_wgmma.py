"""Hopper's products: hand-made descriptors against a matrix product, and what must not happen during one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.handwritten import run_kernel
from ptx.report import Kind, Report
from ptx.test_matrix import bits_of, small_integers

THREADS = 128
B_AT = 16384  # where the second matrix begins in shared memory
SHARED_BYTES = 65536


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    """PTX ISA, "Matrix Descriptor Format": in units of 16 bytes; bits 62 and 63 choose the swizzle."""
    return (start >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62


def swizzled(address: int, width: int) -> int:
    """A row of 8 by `width` bytes: pieces of 16 bytes exchanged by the row's number, in patterns of 128 bytes."""
    return address ^ ((address >> 7) & (width // 16 - 1)) << 4


# Of a tile's two dimensions the one whose elements lie side by side is its major one; k is the one summed over.


def place_k_major(matrix: np.ndarray, width: int, memory: np.ndarray, at: int) -> tuple[int, int]:
    """(rows, 16): core matrices of 8 rows of 16 bytes, or, swizzled, 8 rows of `width` bytes. Returns the offsets."""
    leading, stride = (len(matrix) * 16, 128) if width == 16 else (16, 8 * width)
    for row in range(len(matrix)):
        for k in range(16):
            if width == 16:
                address = at + row // 8 * stride + row % 8 * 16 + k // 8 * leading + k % 8 * 2
            else:
                address = swizzled(at + row // 8 * stride + row % 8 * width + 2 * k, width)
            memory[address // 2] = matrix[row, k]
    return leading, stride


def place_row_major(matrix: np.ndarray, width: int, memory: np.ndarray, at: int) -> tuple[int, int]:
    """(rows, 16) with the rows side by side: for each k, pieces of `width` bytes of them."""
    in_piece = width // 2  # rows
    stride, leading = (8 * width, 16 * width) if width > 16 else (256, 128)
    for row in range(len(matrix)):
        for k in range(16):
            if width == 16:
                address = at + row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * 2
            else:
                address = at + row // in_piece * leading + k // 8 * stride + k % 8 * width + row % in_piece * 2
                address = swizzled(address, width)
            memory[address // 2] = matrix[row, k]
    return leading, stride


FILL = """
    mov.u32 %r10, memory;
    mad.lo.s32 %r11, %r0, 16, %r10; mad.wide.u32 %rd10, %r0, 16, %rd0; mov.u32 %r12, 0;
    $FILL:
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd10];
    st.shared.v4.b32 [%r11], {%r1, %r2, %r3, %r4};
    add.s32 %r11, %r11, 2048; add.s64 %rd10, %rd10, 2048; add.s32 %r12, %r12, 1;
    setp.lt.s32 %p0, %r12, 32;
    @%p0 bra $FILL;
"""
FENCE = "fence.proxy.async.shared::cta;\n"
BARRIER = "bar.sync 0;\n"
WAIT = "wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;\n"


def result_registers(columns: int) -> str:
    return "{" + ", ".join(f"%r{20 + k}" for k in range(columns // 2)) + "}"


def product(columns: int, a: str, b: int, kind: str = "f16", keeps: str = "0", flags: str = "0, 0") -> str:
    registers = result_registers(columns)
    shape = f"m64n{columns}k16.f32.{kind}.{kind}"
    return (
        f"mov.b64 %rd6, {b};\n wgmma.fence.sync.aligned;\n"
        f"setp.ne.u32 %p1, {keeps}, 0;\n"
        f"wgmma.mma_async.sync.aligned.{shape} {registers}, {a}, %rd6, %p1, 1, 1, {flags};\n"
    )


def store(columns: int) -> str:
    count = columns // 2
    lines = [f"mad.wide.u32 %rd11, %r0, {4 * count}, %rd1;"]
    return "\n".join([*lines, *(f"st.global.b32 [%rd11+{4 * k}], %r{20 + k};" for k in range(count))])


def collected(values: np.ndarray, columns: int) -> np.ndarray:
    """PTX ISA, "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"."""
    result = np.zeros((64, columns), np.float32)
    for thread in range(THREADS):
        for k in range(columns // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (k // 2 % 2)
            column = k // 4 * 8 + thread % 4 * 2 + k % 2
            result[row, column] = values[thread, k]
    return result


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 1)])
def test_products_from_shared_memory(swizzle: int, transposed: tuple[int, int], kind: str) -> None:
    columns, width = 64, {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]
    a, b = small_integers((64, 16), 0), small_integers((columns, 16), 1)
    memory = np.zeros(SHARED_BYTES // 2, np.uint16)
    places = [place_row_major if flag else place_k_major for flag in transposed]
    a_offsets = places[0](bits_of(a, kind), width, memory, 0)
    b_offsets = places[1](bits_of(b, kind), width, memory, B_AT)
    a_descriptor, b_descriptor = descriptor(0, *a_offsets, swizzle), descriptor(B_AT, *b_offsets, swizzle)
    body = FILL + FENCE + BARRIER + f"mov.b64 %rd5, {a_descriptor};"
    body += (
        product(columns, "%rd5", b_descriptor, kind, flags=f"{transposed[0]}, {transposed[1]}") + WAIT + store(columns)
    )
    values, report = run(body, memory, columns)
    assert not report.findings, str(report)
    assert (collected(values, columns) == a @ b.T).all()


def run(body: str, memory: np.ndarray, columns: int) -> tuple[np.ndarray, Report]:
    result = torch.zeros(THREADS * columns // 2)
    source = torch.from_numpy(memory.view(np.int16))
    report = run_kernel(body, [source, result], threads=THREADS, shared_bytes=SHARED_BYTES)
    return result.numpy().reshape(THREADS, -1), report


def test_a_product_from_registers_added_to_another() -> None:
    """PTX ISA, "WGMMA .m64nNk16 register fragment layout for matrix A"."""
    columns = 8
    a, b = small_integers((64, 16), 0), small_integers((columns, 16), 1)
    memory = np.zeros(SHARED_BYTES // 2, np.uint16)
    offsets = place_k_major(bits_of(b, "f16"), 16, memory, 0)
    elements = bits_of(a, "f16")
    for thread in range(THREADS):
        for i in range(8):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            memory[8192 + thread * 8 + i] = elements[row, thread % 4 * 2 + i % 2 + 8 * (i // 4)]
    load = "mad.wide.u32 %rd10, %r0, 16, %rd0; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd10+16384];\n"
    b_descriptor = descriptor(0, *offsets, 0)
    registers = "{%r4, %r5, %r6, %r7}"
    body = FILL + FENCE + BARRIER + load + product(columns, registers, b_descriptor, flags="0")
    body += product(columns, registers, b_descriptor, keeps="1", flags="0") + WAIT + store(columns)
    values, report = run(body, memory, columns)
    assert not report.findings, str(report)
    assert (collected(values, columns) == 2 * (a @ b.T)).all()


# ---------------------------------------------------------------------------------------------------- what is reported

PRODUCT = f"mov.b64 %rd5, {descriptor(0, 1024, 128, 0)};" + product(8, "%rd5", descriptor(B_AT, 128, 128, 0))
COMMIT, FINISH = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
READ = "mov.b32 %r15, %r20;\n"
OVERWRITE = "st.shared.b32 [%r10], 0;\n"
FROM_REGISTERS = "mov.b32 %r4, 0; mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, 0;\n" + product(
    8, "{%r4, %r5, %r6, %r7}", descriptor(B_AT, 128, 128, 0), flags="0"
)
COPY = """mad.wide.u32 %rd10, %r0, 16, %rd0; mad.lo.s32 %r11, %r0, 16, %r10;
          cp.async.cg.shared.global [%r11], [%rd10], 16; cp.async.wait_all;\n"""
CASES = {
    "right": (FILL + FENCE + BARRIER + PRODUCT + WAIT + READ, set()),
    "fence after the barrier": (FILL + BARRIER + FENCE + PRODUCT + WAIT + READ, set()),
    "no fence": (FILL + BARRIER + PRODUCT + WAIT, {Kind.WGMMA_UNFENCED}),
    "fence of one warp": (
        FILL + "setp.lt.u32 %p3, %r0, 32; @%p3 " + FENCE + BARRIER + PRODUCT + WAIT,
        {Kind.WGMMA_UNFENCED},
    ),
    "fence of one warp after the barrier": (
        FILL + BARRIER + "setp.lt.u32 %p3, %r0, 32; @%p3 " + FENCE + PRODUCT + WAIT,
        set(),
    ),
    "copies without a fence": (
        FILL + FENCE + BARRIER + COPY + BARRIER + PRODUCT + WAIT,
        {Kind.WGMMA_UNFENCED},
    ),
    "copies and a fence": (FILL + FENCE + BARRIER + COPY + FENCE + BARRIER + PRODUCT + WAIT, set()),
    "no barrier": (FILL + FENCE + PRODUCT + WAIT, {Kind.RACE_READ_AFTER_WRITE}),
    "result read before the wait": (FILL + FENCE + BARRIER + PRODUCT + COMMIT + READ + FINISH, {Kind.WGMMA_REGISTER}),
    "result read after a wait for an older group": (
        FILL + FENCE + BARRIER + PRODUCT + COMMIT + COMMIT + "wgmma.wait_group.sync.aligned 1;\n" + READ,
        set(),
    ),
    "result read after a wait that leaves its group": (
        FILL + FENCE + BARRIER + PRODUCT + COMMIT + "wgmma.wait_group.sync.aligned 1;\n" + READ,
        {Kind.WGMMA_REGISTER},
    ),
    "result written before the wait": (
        FILL + FENCE + BARRIER + PRODUCT + COMMIT + "mov.b32 %r20, 0;\n" + FINISH,
        {Kind.WGMMA_REGISTER},
    ),
    "fragment overwritten": (
        FILL + FENCE + BARRIER + FROM_REGISTERS + COMMIT + "mov.b32 %r5, 1;\n" + FINISH,
        {Kind.WGMMA_REGISTER},
    ),
    "fragment read": (FILL + FENCE + BARRIER + FROM_REGISTERS + COMMIT + "mov.b32 %r15, %r5;\n" + FINISH, set()),
    "shared memory overwritten": (
        FILL + FENCE + BARRIER + PRODUCT + COMMIT + OVERWRITE + FINISH,
        {Kind.WGMMA_OVERWRITTEN},
    ),
    "shared memory overwritten after the wait, before a barrier": (
        FILL + FENCE + BARRIER + PRODUCT + WAIT + "st.shared.b32 [%r10], 77;\n",
        {Kind.RACE_WRITE_AFTER_READ},
    ),
    "shared memory overwritten after the wait": (
        FILL + FENCE + BARRIER + PRODUCT + WAIT + BARRIER + "st.shared.b32 [%r10], 77;\n",
        set(),
    ),
    "a warp group is divided": (
        FILL + FENCE + BARRIER + "setp.lt.u32 %p3, %r0, 64; @%p3 wgmma.fence.sync.aligned;\n" + PRODUCT + WAIT,
        {Kind.WARP_GROUP_DIVIDED},
    ),
    "different descriptors": (
        FILL + FENCE + BARRIER + PRODUCT.replace("wgmma.fence", "add.s64 %rd7, %rd5, 1; setp.eq.u32 %p3, %r0, 5; "
        "selp.b64 %rd5, %rd7, %rd5, %p3; wgmma.fence") + WAIT,
        {Kind.WGMMA_DESCRIPTORS},
    ),
    "uninitialised": (PRODUCT + WAIT, {Kind.UNINITIALISED}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_reported(name: str) -> None:
    body, expected = CASES[name]
    _, report = run(body, np.zeros(SHARED_BYTES // 2, np.uint16), 8)
    assert set(report.kinds()) == expected, str(report)
