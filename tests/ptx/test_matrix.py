"""Matrix instructions: fragments placed and collected element by element, as the PTX ISA's figures have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.handwritten import run_kernel
from ptx.rounding import from_bf16, to_bf16


def small_integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Whose products and sums every type holds exactly."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def bits_of(x: np.ndarray, kind: str) -> np.ndarray:
    return to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def run_mma(opcode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a, b: 16-bit elements (32 lanes, elements), c: float32 (32 lanes, elements); d of each lane."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x).view(np.uint8).ravel()) for x in (a, b, c)]
    result = torch.zeros(c.size, dtype=torch.float32)
    sizes = [a.shape[1] // 2, b.shape[1] // 2, c.shape[1]]
    body, first, groups = [], 20, []
    for k, count in enumerate(sizes):
        body.append(f"mad.wide.u32 %rd10, %r0, {4 * count}, %rd{k};")
        names = [f"%r{first + n}" for n in range(count)]
        body += [f"ld.global.b32 {name}, [%rd10+{4 * n}];" for n, name in enumerate(names)]
        groups.append("{" + ", ".join(names) + "}")
        first += count
    names = [f"%r{first + n}" for n in range(sizes[2])]
    body.append(f"{opcode} {{{', '.join(names)}}}, {groups[0]}, {groups[1]}, {groups[2]};")
    body.append(f"mad.wide.u32 %rd10, %r0, {4 * sizes[2]}, %rd3;")
    body += [f"st.global.b32 [%rd10+{4 * n}], {name};" for n, name in enumerate(names)]
    report = run_kernel("\n".join(body), [*tensors, result])
    assert not report.findings, str(report)
    return result.numpy().reshape(c.shape)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("depth", [8, 16])
def test_m16n8(depth: int, kind: str) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k8" and "… k16"."""
    a, b, c = small_integers((16, depth), 0), small_integers((depth, 8), 1), small_integers((16, 8), 2)
    lanes_a, lanes_b, lanes_c = np.zeros((32, depth // 2)), np.zeros((32, depth // 4)), np.zeros((32, 4))
    places = []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(depth // 2):
            if depth == 16:
                row = group if i in (0, 1, 4, 5) else group + 8
                column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            else:
                row, column = group + 8 * (i >= 2), thread * 2 + (i & 1)
            lanes_a[lane, i] = a[row, column]
        for i in range(depth // 4):
            lanes_b[lane, i] = b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group]
        for i in range(4):
            row, column = group + (8 if i >= 2 else 0), thread * 2 + (i & 1)
            lanes_c[lane, i] = c[row, column]
            places.append((lane, i, row, column))
    opcode = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    actual = run_mma(opcode, bits_of(lanes_a, kind), bits_of(lanes_b, kind), lanes_c.astype(np.float32))
    expected = a @ b + c
    assert all(actual[lane, i] == expected[row, column] for lane, i, row, column in places)


@pytest.mark.parametrize("layout", ["row", "col"])
def test_m8n8k4(layout: str) -> None:
    """PTX ISA, "Matrix Fragments for mma.m8n8k4": four products, one of each quad pair."""
    a, b, c = small_integers((4, 8, 4), 0), small_integers((4, 4, 8), 1), small_integers((4, 8, 8), 2)
    lanes_a, lanes_b, lanes_c = np.zeros((32, 4)), np.zeros((32, 4)), np.zeros((32, 8))
    places = []
    for lane in range(32):
        pair = lane % 16 // 4
        own = lane % 4 + (4 if lane >= 16 else 0)
        for i in range(4):
            lanes_a[lane, i] = a[pair, own, i]
            lanes_b[lane, i] = b[pair, i, own] if layout == "col" else b[pair, lane % 4, i + (4 if lane >= 16 else 0)]
        for i in range(8):
            x = (lane & 1) + (i & 2)
            row = x if lane < 16 else x + 4
            column = (i & 4) + (lane & 2) + (i & 1)
            lanes_c[lane, i] = c[pair, row, column]
            places.append((lane, i, pair, row, column))
    opcode = f"mma.sync.aligned.m8n8k4.row.{layout}.f32.f16.f16.f32"
    actual = run_mma(opcode, bits_of(lanes_a, "f16"), bits_of(lanes_b, "f16"), lanes_c.astype(np.float32))
    expected = a @ b + c
    assert all(actual[lane, i] == expected[pair, row, column] for lane, i, pair, row, column in places)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_load_and_store_matrix(count: int, is_transposed: bool) -> None:
    """Lane 4 r + t has elements 2 t and 2 t + 1 of row r of each matrix; of column r with .trans."""
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    source = torch.from_numpy(matrices.view(np.int16).ravel())
    result, stored = torch.zeros(32 * count, dtype=torch.int32), torch.zeros(count * 64, dtype=torch.int16)
    names = ", ".join(f"%r{20 + k}" for k in range(count))
    trans = ".trans" if is_transposed else ""
    rows = 8 * count
    body = f"""
        mov.u32 %r10, memory; mad.lo.s32 %r11, %r0, 16, %r10; mad.wide.u32 %rd10, %r0, 16, %rd0;
        setp.lt.u32 %p0, %r0, {rows};
        @%p0 ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd10];
        @%p0 st.shared.v4.b32 [%r11], {{%r1, %r2, %r3, %r4}};
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r11];
        mad.wide.u32 %rd11, %r0, {4 * count}, %rd1;
        {" ".join(f"st.global.b32 [%rd11+{4 * k}], %r{20 + k};" for k in range(count))}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r11+512], {{{names}}};
        @%p0 ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r11+512];
        mad.wide.u32 %rd12, %r0, 16, %rd2;
        @%p0 st.global.v4.b32 [%rd12], {{%r1, %r2, %r3, %r4}};
    """
    report = run_kernel(body, [source, result, stored], shared_bytes=1024)
    assert not report.findings, str(report)
    loaded = result.numpy().view(np.uint16).reshape(32, count, 2)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for k in range(count):
            matrix = matrices[k].T if is_transposed else matrices[k]
            assert loaded[lane, k].tolist() == matrix[row, column : column + 2].tolist()
    assert stored.tolist() == source.tolist()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_cp_async_fills_the_rest_with_zeros(size: int, share: float) -> None:
    data = torch.arange(1, 32 * size + 1).to(torch.uint8)
    result = torch.full((32 * size,), 99, dtype=torch.uint8)
    read = int(share * size)
    cache = "cg" if size == 16 else "ca"
    words = {4: "b32", 8: "b64", 16: "v2.b64"}[size]
    registers = {4: "%r1", 8: "%rd11", 16: "{%rd11, %rd12}"}[size]
    body = f"""
        mov.u32 %r10, memory; mad.lo.s32 %r11, %r0, {size}, %r10; mad.wide.u32 %rd13, %r0, {size}, %rd0;
        mov.u32 %r2, {read};
        cp.async.{cache}.shared.global [%r11], [%rd13], {size}, %r2;
        cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.{words} {registers}, [%r11];
        mad.wide.u32 %rd14, %r0, {size}, %rd1;
        st.global.{words} [%rd14], {registers};
    """
    report = run_kernel(body, [data, result], shared_bytes=512)
    assert not report.findings, str(report)
    expected = data.reshape(32, size).clone()
    expected[:, read:] = 0
    assert result.tolist() == expected.ravel().tolist()


def test_nothing_is_read_where_a_copy_reads_no_bytes() -> None:
    """As kernels do it for rows that are not there."""
    body = """mov.u32 %r10, memory; mad.lo.s32 %r11, %r0, 16, %r10; mov.u32 %r2, 0; add.s64 %rd10, %rd0, 4096;
              cp.async.cg.shared.global [%r11], [%rd10], 16, %r2; cp.async.wait_all;"""
    assert not run_kernel(body, [torch.zeros(8)], shared_bytes=512).findings


def test_products_of_bfloat16_are_exact() -> None:
    """A product of two has 16 bits."""
    x = from_bf16(np.array([0x3FFF], np.uint16))[0]
    a, b = np.full((32, 4), x, np.float32), np.zeros((32, 2), np.float32)
    b[:4, 0] = [x, 0, 0, 0]
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32"
    d = run_mma(opcode, to_bf16(a), to_bf16(b), np.zeros((32, 4), np.float32))
    assert float(d[0, 0]) == float(x) ** 2
