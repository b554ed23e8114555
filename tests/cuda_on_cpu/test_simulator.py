"""The simulator itself: its instructions against matrix products, and that it notices each mistake it should."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import simulator
import torch
from simulator import Buffer, Kernel, SimulatorError, buffer_of, build
from torch import Tensor

pytestmark = pytest.mark.skipif(simulator.missing() is not None, reason=simulator.missing() or "")

KERNELS = simulator.HERE / "simulator_kernels"


def kernel(file: str, entry: str, arch: int = 800, **defines: Any) -> Kernel:
    return build(str(KERNELS / file), entry, {"FINEGRAIN_ARCH": arch, **defines})


def structure(*fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


# -------------------------------------------------------------------------------------------------- matrix instructions

BY_COLUMNS, BY_ROWS, SHORT, HALF, BFLOAT16 = 1, 2, 3, 4, 5
INSTRUCTIONS = {  # number, element type, first architecture
    "m8n8k4.row.col": (BY_COLUMNS, torch.float16, 700),
    "m8n8k4.row.row": (BY_ROWS, torch.float16, 700),
    "m16n8k8": (SHORT, torch.float16, 750),
    "m16n8k16.f16": (HALF, torch.float16, 800),
    "m16n8k16.bf16": (BFLOAT16, torch.bfloat16, 800),
}


def fragment_places(instruction: int, lane: int) -> tuple[list[Any], list[Any], list[Any]]:
    """(product, row, column) of a lane's elements of left, right and sums, as the PTX ISA lists them."""
    if instruction in (BY_COLUMNS, BY_ROWS):
        quad, high = lane % 16 // 4, 4 * (lane >= 16)
        left = [(quad, lane % 4 + high, i) for i in range(4)]
        if instruction == BY_ROWS:
            right = [(quad, lane % 4, i + high) for i in range(4)]
        else:
            right = [(quad, i, lane % 4 + high) for i in range(4)]
        sums = [(quad, (lane & 1) + (i & 2) + high, (i & 4) + (lane & 2) + (i & 1)) for i in range(8)]
        return left, right, sums
    group, member = lane // 4, lane % 4
    if instruction == SHORT:
        left = [(0, group + 8 * (i >= 2), 2 * member + i % 2) for i in range(4)]
        right = [(0, 2 * member + i, group) for i in range(2)]
    else:
        left = [(0, group + 8 * (i % 4 >= 2), 2 * member + i % 2 + 8 * (i >= 4)) for i in range(8)]
        right = [(0, 2 * member + i % 2 + 8 * (i >= 2), group) for i in range(4)]
    sums = [(0, group + 8 * (i >= 2), 2 * member + i % 2) for i in range(4)]
    return left, right, sums


def multiply(instruction: int, arch: int, left: Tensor, right: Tensor, sums: Tensor, seed: int = 0) -> Tensor:
    """Deals the matrices out to 32 lanes, runs the instruction and collects the sums."""
    lefts = torch.zeros(32, 8, dtype=left.dtype)
    rights = torch.zeros(32, 4, dtype=left.dtype)
    accumulators = torch.zeros(32, 8)
    for lane in range(32):
        fragments = (lefts, left), (rights, right), (accumulators, sums)
        for (to, matrix), places in zip(fragments, fragment_places(instruction, lane)):
            for i, place in enumerate(places):
                to[lane, i] = matrix[place]
    arguments = structure(*((name, ctypes.c_void_p) for name in ("left", "right", "sums")))
    kernel("instructions.cuh", "multiply", arch, INSTRUCTION=instruction, ELEMENT="finegrain::half_t").launch(
        (1, 1, 1),
        32,
        0,
        arguments(lefts.data_ptr(), rights.data_ptr(), accumulators.data_ptr()),
        [buffer_of(lefts), buffer_of(rights), buffer_of(accumulators, writable=True)],
        seed,
    )
    result = torch.full_like(sums, float("nan"))
    for lane in range(32):
        for i, place in enumerate(fragment_places(instruction, lane)[2]):
            result[place] = accumulators[lane, i]
    return result


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_multiply(name: str) -> None:
    instruction, dtype, arch = INSTRUCTIONS[name]
    products, rows, depth = (4, 8, 4) if instruction in (BY_COLUMNS, BY_ROWS) else (1, 16, 16)
    if instruction == SHORT:
        depth = 8
    torch.manual_seed(instruction)
    left, right = torch.randn(products, rows, depth).to(dtype), torch.randn(products, depth, 8).to(dtype)
    sums = torch.randn(products, rows, 8)
    result = multiply(instruction, arch, left, right, sums)
    torch.testing.assert_close(result.double(), sums.double() + left.double() @ right.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(result, multiply(instruction, arch, left, right, sums, seed=1))


@pytest.mark.parametrize(("name", "arch"), [("m16n8k8", 700), ("m16n8k16.f16", 750), ("m16n8k16.bf16", 750)])
def test_older_machines_lack_instructions(name: str, arch: int) -> None:
    instruction, dtype, first = INSTRUCTIONS[name]
    zeros = torch.zeros(4, 16, 16)
    with pytest.raises(SimulatorError, match=f"needs FINEGRAIN_ARCH {first} or later"):
        multiply(instruction, arch, zeros.to(dtype), zeros.to(dtype), zeros)


def load_matrices(transposed: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """Four matrices, and the registers of 32 lanes that they are loaded into."""
    matrices = torch.randperm(256).to(torch.int16).reshape(4, 8, 8)
    registers = torch.full((32, 4, 2), -1, dtype=torch.int16)
    arguments = structure(*((name, ctypes.c_void_p) for name in ("rows", "registers")), ("transposed", ctypes.c_int64))
    defines = {"FINEGRAIN_ARCH": 750, "INSTRUCTION": 0, "ELEMENT": "finegrain::half_t"}
    build(str(KERNELS / "instructions.cuh"), "load", defines, **options).launch(
        (1, 1, 1),
        32,
        32 * 48,
        arguments(matrices.data_ptr(), registers.data_ptr(), transposed),
        [buffer_of(matrices), buffer_of(registers, writable=True)],
    )
    return matrices, registers


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(transposed: bool) -> None:
    matrices, registers = load_matrices(transposed)
    for i in range(4):
        matrix = matrices[i].T if transposed else matrices[i]
        assert torch.equal(registers[:, i].reshape(8, 8), matrix)


# ---------------------------------------------------------------------------------------------------------- conversions


def interesting_floats(dtype: torch.dtype) -> Tensor:
    """All values of the type, the ties between neighbours, their neighbours in float32, and much else."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].unique()
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    random = torch.randint(-(2**31), 2**31 - 1, (50_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    limit = torch.tensor(
        [65504.0, 65519.996, 65520.0, 65536.0, 3.4e38, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-26]
    )
    around = [torch.nextafter(ties, torch.tensor(sign * torch.inf)) for sign in (1, -1)]
    return torch.cat([every, ties, *around, random, limit, -limit])


@pytest.mark.parametrize(("element", "dtype"), [("half_t", torch.float16), ("bfloat16_t", torch.bfloat16)])
def test_conversions(element: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = interesting_floats(dtype)
    count = values.numel()
    rounded, pairs = torch.zeros(count, dtype=torch.int16), torch.zeros(count, 2, dtype=torch.int16)
    widened, powers = torch.zeros(count), torch.zeros(count)
    names = ("values", "rounded", "pairs", "widened", "powers")
    tensors = (values, rounded, pairs, widened, powers)
    arguments = structure(*((name, ctypes.c_void_p) for name in names), ("count", ctypes.c_int64))
    kernel("instructions.cuh", "convert", INSTRUCTION=0, ELEMENT=f"finegrain::{element}").launch(
        (4, 1, 1),
        256,
        0,
        arguments(*(tensor.data_ptr() for tensor in tensors), count),
        [buffer_of(values), *(buffer_of(tensor, writable=True) for tensor in tensors[1:])],
    )
    is_nan = values.isnan()
    expected = values.to(dtype)
    assert torch.equal(rounded[~is_nan], expected.view(torch.int16)[~is_nan])
    assert (rounded[is_nan] == 0x7FFF).all()
    assert is_nan.sum() > 100
    negated = (-values).to(dtype).view(torch.int16)
    assert torch.equal(pairs[~is_nan], torch.stack([rounded, negated], dim=1)[~is_nan])
    assert torch.equal(widened[~is_nan], expected.float()[~is_nan])
    assert widened[is_nan].isnan().all()
    exact = values.double().exp2().float()
    exact[exact < torch.finfo(torch.float32).tiny] = 0.0
    torch.testing.assert_close(powers, exact, rtol=2e-7, atol=2e-38, equal_nan=True)


def test_bfloat16_does_not_compile_for_older_machines() -> None:
    with pytest.raises(SimulatorError, match=r"(?s)instructions\.cuh.*error: [^\n]*one"):
        kernel("instructions.cuh", "convert", 750, INSTRUCTION=0, ELEMENT="finegrain::bfloat16_t")


# ---------------------------------------------------------------------------------------------------------------- races

REDUCTIONS = (KERNELS / "reductions.cuh").read_text()


def reduce(entry: str, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """The sums, and what they should be."""
    torch.manual_seed(0)
    values = torch.randn(3, 4, 32)
    expected = values.sum(2) if entry == "sum_by_warp" else values.sum((1, 2))
    sums = torch.full_like(expected, float("nan"))
    arguments = structure(("values", ctypes.c_void_p), ("sums", ctypes.c_void_p))(values.data_ptr(), sums.data_ptr())
    buffers = [buffer_of(values), buffer_of(sums, writable=True)]
    build(str(KERNELS / "reductions.cuh"), entry, {"FINEGRAIN_ARCH": 800}, **options).launch(
        (3, 1, 1), 128, 512, arguments, buffers, seed
    )
    return sums, expected


@pytest.mark.parametrize("entry", ["sum_by_warp", "sum_by_block"])
def test_trees_with_barriers_are_right(entry: str) -> None:
    sums, expected = reduce(entry)
    torch.testing.assert_close(sums, expected)
    for seed in range(1, 5):
        assert torch.equal(sums, reduce(entry, seed)[0])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("entry", "barrier"), [("sum_by_warp", "__syncwarp();"), ("sum_by_block", "__syncthreads();")])
def test_trees_without_a_barrier_race(entry: str, barrier: str, which: int) -> None:
    parts = REDUCTIONS.split(barrier)
    assert len(parts) == 3
    mutant = parts[0] + ("" if which == 0 else barrier) + parts[1] + (barrier if which == 0 else "") + parts[2]
    for seed in range(5):
        with pytest.raises(SimulatorError, match=r"race on shared memory byte \d+: .*by thread \d+.*by thread") as info:
            reduce(entry, seed, overrides={"reductions.cuh": mutant})
        assert f"without a {'__syncwarp' if entry == 'sum_by_warp' else '__sync'}" in str(info.value)
        assert "reductions.cuh:" in str(info.value)
    reduce(entry)  # the original is not affected


def test_a_barrier_of_the_warp_does_not_order_the_block() -> None:
    mutant = REDUCTIONS.replace("__syncthreads();", "__syncwarp();")
    with pytest.raises(SimulatorError, match=r"race on shared memory byte .* without a __syncthreads between"):
        reduce("sum_by_block", overrides={"reductions.cuh": mutant})


def test_collectives_are_no_barriers() -> None:
    mutant = REDUCTIONS.replace("__syncwarp();", "__shfl_sync(~0u, lane, 0);")
    with pytest.raises(SimulatorError, match=r"race on shared memory byte .* without a __syncwarp between"):
        reduce("sum_by_warp", overrides={"reductions.cuh": mutant})
    mutant = (KERNELS / "instructions.cuh").read_text().replace("__syncwarp();", "")
    with pytest.raises(SimulatorError, match=r"race on shared memory byte .* read for the whole warp .*__syncwarp"):
        load_matrices(transposed=False, overrides={"instructions.cuh": mutant})


def test_overrides_must_change_something() -> None:
    with pytest.raises(ValueError, match="changes nothing"):
        reduce("sum_by_warp", overrides={"reductions.cuh": REDUCTIONS})


# ------------------------------------------------------------------------------------------------------------- mistakes


def mistake(
    entry: str, mode: int, number: int = 0, *, seed: int = 0, writable: bool = True, shared_bytes: int | None = None
) -> Tensor:
    """Runs a kernel of mistakes.cuh on 64 numbers that lie between others, and returns what it has written."""
    memory = torch.arange(256.0)  # input: 64 to 127, output: 160 to 223
    source, output = memory[64:128], memory[160:224]
    arguments = structure(
        ("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("mode", ctypes.c_int), ("number", ctypes.c_int)
    )(source.data_ptr(), output.data_ptr(), mode, number)
    if shared_bytes is None:
        shared_bytes = 512 if entry == "copy_asynchronously" else 256
    kernel("mistakes.cuh", entry).launch(
        (1, 1, 1), 64, shared_bytes, arguments, [buffer_of(source), buffer_of(output, writable=writable)], seed
    )
    return output.clone()


INPUT = torch.arange(64.0, 128.0)


def test_right_accesses() -> None:
    assert torch.equal(mistake("access_memory", 0), INPUT)
    assert torch.equal(mistake("access_memory", 4), INPUT)
    assert torch.equal(mistake("access_memory", 5, 4), INPUT + 68)
    assert torch.equal(mistake("access_memory", 7, 3), INPUT)


def test_shared_memory_begins_as_nan() -> None:
    assert mistake("access_memory", 11).isnan().all()


@pytest.mark.parametrize(
    ("mode", "number", "words"),
    [
        (1, 0, "read of 4 bytes, 0 bytes after the end of buffer 0 (256 bytes)"),
        (1, 3, "read of 4 bytes, 12 bytes after the end of buffer 0"),
        (1, -65, "read of 4 bytes, 4 bytes before buffer 0"),
        (2, 0, "write of 4 bytes, 0 bytes after the end of buffer 1"),
        (2, -70, "write of 4 bytes, 24 bytes before buffer 1"),
        (3, 0, "write of 4 bytes to read-only buffer 0"),
        (4, 1, "write of 4 bytes, 0 bytes after the end of shared memory (256 bytes)"),
        (4, -65, "before shared memory"),
        (5, 64, "read of 16 bytes, 0 bytes after the end of buffer 0"),
        (5, 1, "accessed as 16 bytes at once, which must be aligned"),
        (6, 3, "shared memory at byte 12 is accessed as 8 bytes at once"),
        (8, 2, "accessed as 4 bytes at once, which must be aligned"),
        (9, 2, "shared memory at byte 8 is accessed as 16 bytes at once"),
        (9, 64, "load_matrices: its 16 bytes at offset 256 are not in shared memory of 256 bytes"),
        (13, 64, "read of 16 bytes, 0 bytes after the end of buffer 0"),
        (14, 64, "write of 16 bytes, 0 bytes after the end of buffer 1"),
        (10, 0, "read of 4 bytes at 0, which is far from every buffer"),
    ],
)
def test_wrong_accesses(mode: int, number: int, words: str) -> None:
    with pytest.raises(SimulatorError) as info:
        mistake("access_memory", mode, number)
    assert words in str(info.value)
    assert "(block 0, 0, 0, thread " in str(info.value)
    assert torch.equal(mistake("access_memory", 0), INPUT)  # usable after an error


def test_an_access_across_the_end() -> None:
    with pytest.raises(SimulatorError, match="write of 4 bytes that reaches beyond the end of shared memory"):
        mistake("access_memory", 4, shared_bytes=254)


def test_writing_a_buffer_that_is_not_writable() -> None:
    with pytest.raises(SimulatorError, match="write of 4 bytes to read-only buffer 1"):
        mistake("access_memory", 0, writable=False)


def test_barriers_and_shuffles() -> None:
    assert torch.equal(mistake("diverge", 0, 40), INPUT + 1)
    assert torch.equal(mistake("diverge", 0, 64), INPUT)
    for seed in range(3):
        lanes = torch.arange(64)
        expected = INPUT + INPUT[lanes ^ 5] + 1000 * INPUT[lanes // 32 * 32 + 6]
        assert torch.equal(mistake("diverge", 6, 5, seed=seed), expected)


@pytest.mark.parametrize(
    ("mode", "number", "words"),
    [
        (1, 32, "warp 1 has ended while others wait at a barrier of the block"),
        (1, 16, r"lanes of its warp (have ended|wait at __syncthreads)"),
        (2, 32, r"warp 0 waits at __syncthreads \[mistakes.cuh:.*\] and warp 1 at __syncthreads_or \[mistakes.cuh:"),
        (2, 16, r"has come to __syncthreads.*lanes of its warp wait at __syncthreads"),
        (3, 16, r"(has come to __syncwarp.*wait at a shuffle|has come to a shuffle.*wait at __syncwarp)"),
        (
            4,
            16,
            r"(ends while \d+ lanes of its warp wait at a shuffle|waits at a shuffle.*lanes of its warp have ended)",
        ),
        (5, 8, "__syncwarp with the mask 0xff: only whole warps"),
    ],
)
def test_divergence(mode: int, number: int, words: str) -> None:
    for seed in range(4):
        with pytest.raises(SimulatorError, match=words):
            mistake("diverge", mode, number, seed=seed)
    assert torch.equal(mistake("diverge", 0, 64), INPUT)


def test_asynchronous_copies() -> None:
    for seed in range(4):
        assert torch.equal(mistake("copy_asynchronously", 0, seed=seed), INPUT)


@pytest.mark.parametrize(
    ("mode", "number", "words"),
    [
        (1, 0, "while an asynchronous copy of thread .* is still on its way"),
        (2, 0, "while an asynchronous copy of thread .* is still on its way"),
        (3, 0, "while an asynchronous copy of thread .* is still on its way"),
        (4, 0, "race on shared memory byte|while an asynchronous copy of thread"),
        (5, 0, "race on shared memory byte"),
        (6, 4, "race on shared memory byte .* by an asynchronous copy that"),
        (6, 5, "accessed as 16 bytes at once, which must be aligned"),
        (6, 128, "copy_16_bytes: its 16 bytes at offset 512 are not in shared memory"),
        (7, 64, "read of 16 bytes, 0 bytes after the end of buffer 0"),
        (7, 65, "accessed as 16 bytes at once, which must be aligned"),
        (8, 0, "the thread ends with 1 asynchronous copies that it has not waited for"),
    ],
)
def test_wrong_asynchronous_copies(mode: int, number: int, words: str) -> None:
    for seed in range(4):
        with pytest.raises(SimulatorError, match=words):
            mistake("copy_asynchronously", mode, number, seed=seed)


# ------------------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize(
    ("grid", "threads", "words"),
    [
        ((1, 1, 1), 160, "more threads than the kernel is compiled for"),
        ((1, 1, 1), 100, "a multiple of 32"),
        ((0, 1, 1), 128, "an empty grid"),
        ((1, 65536, 1), 128, "65535"),
    ],
)
def test_wrong_launches(grid: tuple[int, int, int], threads: int, words: str) -> None:
    arguments = structure(("values", ctypes.c_void_p), ("sums", ctypes.c_void_p))()
    with pytest.raises(SimulatorError, match=words):
        kernel("reductions.cuh", "sum_by_warp").launch(grid, threads, 512, arguments, [])


def test_arguments_of_another_size() -> None:
    with pytest.raises(SimulatorError, match="another size"):
        kernel("reductions.cuh", "sum_by_warp").launch((1, 1, 1), 128, 512, structure(("a", ctypes.c_void_p))(), [])


def test_kernels_that_do_not_exist() -> None:
    with pytest.raises(SimulatorError, match="no FINEGRAIN_KERNEL"):
        kernel("reductions.cuh", "sum_by_grid")


def test_buffer_of_a_view() -> None:
    tensor = torch.zeros(4, 6)
    assert buffer_of(tensor[1:, 2:4]) == Buffer(tensor.data_ptr() + 32, 4 * 14, False)


# ----------------------------------------------------------------------------------------------------- AddressSanitizer

SUBPROCESS = """
import ctypes, sys
from simulator import Buffer, SimulatorError, build
entry, mode, number, shared_bytes = sys.argv[2], *map(int, sys.argv[3:])
class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("input", "output")]
    _fields_ += [(name, ctypes.c_int) for name in ("mode", "number")]
numbers = (ctypes.c_float * 64)(*range(64))
results = (ctypes.c_float * 64)()
arguments = Arguments(ctypes.addressof(numbers), ctypes.addressof(results), mode, number)
buffers = [Buffer(ctypes.addressof(numbers), 256), Buffer(ctypes.addressof(results), 256, True)]
kernel = build(sys.argv[1], entry, {"FINEGRAIN_ARCH": 800}, sanitizer="address")
for seed in range(3):
    try:
        kernel.launch((2, 1, 1), 64, shared_bytes, arguments, buffers, seed)
        print("sum", sum(results))
    except SimulatorError as error:
        print("SimulatorError", error)
"""


def run_with_address_sanitizer(
    entry: str, mode: int, number: int, shared_bytes: int
) -> subprocess.CompletedProcess[str]:
    if not Path(address_sanitizer()).exists():
        pytest.skip("g++ has come without libasan")
    command = [
        sys.executable,
        "-c",
        SUBPROCESS,
        KERNELS / "mistakes.cuh",
        entry,
        *map(str, (mode, number, shared_bytes)),
    ]
    environment = {**simulator.address_sanitizer_environment(), "PYTHONPATH": str(simulator.HERE)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


def address_sanitizer() -> str:
    return simulator.address_sanitizer_environment()["LD_PRELOAD"].split()[0]


@pytest.mark.parametrize(
    ("entry", "mode", "shared_bytes"), [("access_memory", 4, 256), ("diverge", 6, 0), ("copy_asynchronously", 0, 512)]
)
def test_address_sanitizer_is_content_with_right_kernels(entry: str, mode: int, shared_bytes: int) -> None:
    result = run_with_address_sanitizer(entry, mode, 0, shared_bytes)
    assert result.returncode == 0, result.stderr
    assert "AddressSanitizer" not in result.stderr
    assert result.stdout.count("sum ") == 3, result.stdout


def test_address_sanitizer_survives_errors() -> None:
    result = run_with_address_sanitizer("diverge", 3, 16, 0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("SimulatorError the thread has come to") == 3, result.stdout


@pytest.mark.parametrize(
    ("mode", "number", "place", "words"),
    [
        (4, 1, "heap", "WRITE of size 4"),  # shared memory
        (1, 0, "heap", "READ of size 4"),
        (2, 0, "heap", "WRITE of size 4"),
        (12, 8, "stack", "READ of size 4"),
    ],
)
def test_address_sanitizer_finds_an_overrun(mode: int, number: int, place: str, words: str) -> None:
    result = run_with_address_sanitizer("access_memory", mode, number, 256)
    assert result.returncode == 99, result.stdout
    assert f"{place}-buffer-overflow" in result.stderr
    assert words in result.stderr


def test_address_sanitizer_needs_its_environment() -> None:
    assert "asan" not in os.environ.get("LD_PRELOAD", "")
    with pytest.raises(SimulatorError, match="address_sanitizer_environment"):
        build(str(KERNELS / "mistakes.cuh"), "diverge", {"FINEGRAIN_ARCH": 800}, sanitizer="address")
