"""What is read from the compilers' and disassemblers' output, and one small kernel by each compiler."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton exists for Linux only")

from bench import cuda_machine_code
from bench.cuda_machine_code import (
    Cubin,
    compile_cubin,
    compiler_for,
    nvcc_path,
    read,
    read_cubin,
    read_log,
    read_usage,
    readable,
)
from finegrain_ops.backends.cuda import compiler as nvrtc
from finegrain_ops.backends.cuda.variants import Variant

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function attention_map:
  REG:104 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:960 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attention_map' for 'sm_80'
ptxas info    : Function properties for attention_map
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 104 registers, used 1 barriers, 960 bytes cmem[0]
"""


def listing(*lines: str) -> str:
    """As nvdisasm prints it: labels as they are, instructions with an address."""
    return "\n".join(
        x if x.startswith(".L") else f"        /*{16 * i:04x}*/                   {x} ;" for i, x in enumerate(lines)
    )


SASS = listing(
    "STL [R1], R4",
    "LDG.E.U16 R4, [R2.64]",
    "LDG.E.128 R4, [R2.64]",
    "@!P0 LDG.E.128.SYS R4, [R2.64]",
    "LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64], P0",
    "LDGSTS.E.LTC128B.64 [R5], [R2.64]",
    ".L_x_1:",
    "LDSM.16.MT88.4 R8, [R3]",
    "LDS.U.128 R8, [R3]",
    "LDS.64 R8, [R3]",
    "LDS.128 R8, [R3]",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "@!UPT FFMA R1, R2, R3, R1",
    "@P0 BRA `(.L_x_1)",
    "LDL.LU R4, [R1]",
)


def test_resource_usage() -> None:
    assert read_usage(USAGE) == (104, 8, 16)
    assert read_log(LOG) == (104, 8, 32)
    for read_text in (read_usage, read_log):
        with pytest.raises(RuntimeError, match="no resource usage"):
            read_text("nothing")


def test_a_listing() -> None:
    code = read("nvcc 13.0.88", LOG, USAGE, SASS)
    assert (code.compiler, code.registers, code.stack_bytes, code.static_shared_bytes) == ("nvcc 13.0.88", 104, 8, 16)
    assert (code.spilled_bytes, code.spills) == (32, 2)
    assert code.matrix == {"HMMA.16816.F32": 2}
    assert code.ffma == 1
    assert (code.wide_global_loads, code.wide_shared_loads) == (3, 3)
    assert code.loops == ("HMMA 8",)
    assert code.disagreement == ""


def test_four_steps_are_one_product() -> None:
    steps = [f"HMMA.884.F32.F32.STEP{i} R0, R2.reuse.T, R4.reuse.T, R0" for i in range(4)]
    assert read("NVRTC 12.9", "", USAGE, listing(*steps, *steps)).matrix == {"HMMA.884.F32.F32": 2}


def test_what_disagrees() -> None:
    """Three accounts of the same registers."""
    assert read("NVRTC 12.9", "", USAGE, SASS).spilled_bytes is None
    for log, sass, word in (
        (LOG.replace("Used 104", "Used 105"), SASS, "ptxas counts (105, 8)"),
        (LOG.replace("8 bytes stack", "16 bytes stack"), SASS, "ptxas counts (104, 16)"),
        (LOG.replace("12 bytes spill", "0 bytes spill").replace("20 bytes", "0 bytes"), SASS, "2 LDL and STL"),
        (LOG, SASS.replace("LDL", "LDG").replace("STL", "STG"), "0 LDL and STL"),
    ):
        assert word in read("nvcc 13.0.88", log, USAGE, sass).disagreement


def elf(flags: int) -> bytes:
    return b"\x7fELF" + bytes(44) + struct.pack("<I", flags) + bytes(12)


def test_volta_is_read_as_turing() -> None:
    """What the flags hold besides the architectures is kept, and other architectures are left alone."""
    assert readable(elf(0x00460546)) == elf(0x004B054B)
    assert readable(elf(0x004B054B)) == elf(0x004B054B)
    assert readable(elf(0x00500550)) == elf(0x00500550)


def test_nvcc_in_cuda_home_comes_before_that_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc_path() == tmp_path / "home" / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert nvcc_path() == tmp_path / "path" / "nvcc"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvcc_path() is None


def require_nvcc(architecture: int) -> None:
    if nvcc_path() is None:
        pytest.skip("there is no nvcc, on PATH or in CUDA_HOME")
    if not compiler_for(architecture).startswith("nvcc"):
        pytest.skip(f"this nvcc does not know sm_{architecture}")


def test_a_kernel_by_nvcc() -> None:
    require_nvcc(80)
    variant = Variant("attention_map", "bfloat16_t", 32, 80)
    cubin = compile_cubin(variant)
    code = read_cubin(cubin)
    # 16 rows, `step` columns and 32 dimensions per warp, in products of 16 x 8 x 16
    assert code.matrix == {"HMMA.16816.F32.BF16": variant.tile.step // 8 * 2}
    assert code.spilled_bytes == code.spills == code.stack_bytes == 0
    assert 0 < code.registers <= 255
    assert code.wide_global_loads > 0
    assert code.wide_shared_loads > 0
    assert len(code.loops) >= 1
    assert code.disagreement == ""
    assert code.compiler.startswith("nvcc ")


def test_what_nvcc_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    require_nvcc(80)
    variant = Variant("attention_map", "half_t", 32, 80)
    monkeypatch.setattr(Variant, "shared_bytes", 0)  # a static_assert of the source
    with pytest.raises(nvrtc.CompileError, match=f"could not compile {variant.name}: .*less shared memory"):
        compile_cubin(variant)


@pytest.mark.parametrize("element", ["half_t", "float"])
def test_a_kernel_by_nvrtc(element: str) -> None:
    try:
        target = nvrtc.target_for(70)
    except nvrtc.CompileError as error:
        pytest.skip(str(error))
    variant = Variant("attention_map", element, 32, target.architecture)
    code = read_cubin(Cubin(nvrtc.compile(variant), "NVRTC", ""))
    # m8n8k4 multiplies 16 x 16 x 4 per warp
    products = {"HMMA.884.F32.F32": variant.tile.step // 16 * 2 * 4}
    assert code.matrix == (products if element == "half_t" else {})
    if element == "float":
        assert code.ffma >= variant.tile.step // 16 * 2 * 128
    assert code.spilled_bytes is None
    assert code.spills == code.stack_bytes == 0
    assert 0 < code.registers <= 255
    assert code.wide_global_loads > 0
    assert code.wide_shared_loads > 0
    assert len(code.loops) >= 1


def test_without_a_compiler_that_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_machine_code, "_nvcc", lambda: (None, "", frozenset()))
    monkeypatch.setattr(nvrtc, "supported_architectures", lambda: (75, 80, 90))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    assert compiler_for(80) == "NVRTC 13.0"
    for architecture in (70, 86, 100):
        with pytest.raises(nvrtc.CompileError, match=f"sm_{architecture}"):
            compiler_for(architecture)
