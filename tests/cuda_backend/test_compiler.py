"""NVRTC compiles the kernels to machine code, here, without a GPU; and says why where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finegrain_ops.backends.cuda import compiler
from finegrain_ops.backends.cuda.compiler import CompileError, Target
from finegrain_ops.backends.cuda.variants import WITH_OF_MAP, Variant

KERNELS = [
    ("attention_forward", {}),
    ("attention_forward", {"long": True}),
    ("attention_map", {}),
    ("merge_splits", {}),
    ("attention_rows", {}),
    *((kernel, {"of_map": True}) for kernel in WITH_OF_MAP),
    ("attention_backward_query", {}),
    ("attention_backward_keys", {}),
    ("crop_weights", {}),
    ("crop_resize", {}),
]


def require(architecture: int) -> None:
    try:
        compiler.target_for(architecture)
    except CompileError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("kernel", "options"), KERNELS, ids=lambda value: "-".join(value))
def test_compiles_for_volta(kernel: str, options: dict[str, bool]) -> None:
    require(70)
    element = "float" if kernel == "crop_weights" else "half_t"
    width = {"merge_splits": 128, "crop_weights": 0, "crop_resize": 0}.get(kernel, 32)
    image = compiler.compile(Variant(kernel, element, width, 70, **options))
    assert image[:4] == b"\x7fELF"
    assert f".text.{kernel}\0".encode() in image


@pytest.mark.parametrize(
    ("element", "architecture"),
    [("float", 70), ("half_t", 75), ("half_t", 80), ("bfloat16_t", 80), ("bfloat16_t", 90), ("half_t", 120)],
)
def test_compiles_for_other_elements_and_architectures(element: str, architecture: int) -> None:
    require(architecture)
    image = compiler.compile(Variant("attention_forward", element, 64, architecture))
    assert image[:4] == b"\x7fELF"


def test_ptx_for_a_gpu_that_is_newer_than_the_compiler(small_kernels: Path) -> None:
    newest = compiler.supported_architectures()[-1]
    target = compiler.target_for(990)
    assert target == Target(newest, is_ptx=True)
    image = compiler.compile(Variant("attention_map", "half_t", 64, 990))
    assert f".target sm_{newest}".encode() in image
    assert image.endswith(b"\0"), "the driver reads PTX as a string"


def test_weights_of_crops_are_rounded_after_every_step() -> None:
    """No product of float64 is fused with the sum after it: ptxas fuses none that is `.rn`. Two are not, after which
    there is no sum: one is compared, of the other floor is taken.
    """
    image = compiler.compile(Variant("crop_weights", "float", 0, 990))
    assert b"fma.rn.f64" not in image
    assert image.count(b"mul.rn.f64") > 10
    assert image.count(b"mul.f64") == 2


def test_machine_code_for_an_older_gpu_of_the_same_major_number(nvrtc: Callable) -> None:
    known = [70, 75, 80, 86, 90, 120]
    nvrtc(nvrtcGetSupportedArchs=lambda: (0, known))
    assert compiler.target_for(86) == Target(86, is_ptx=False)
    assert compiler.target_for(89) == Target(86, is_ptx=False)
    assert compiler.target_for(121) == Target(120, is_ptx=False)
    assert compiler.target_for(103) == Target(90, is_ptx=True)


def test_an_architecture_that_nvrtc_no_longer_knows(nvrtc: Callable) -> None:
    nvrtc(nvrtcVersion=lambda: (0, 13, 0), nvrtcGetSupportedArchs=lambda: (0, [75, 80, 90]))
    with pytest.raises(CompileError, match=r"NVRTC 13\.0 begins at sm_75 .* sm_70, which 12\.9 was the last to know"):
        compiler.compile(Variant("attention_map", "half_t", 64, 70))
    assert compiler.target_for(75) == Target(75, is_ptx=False)


def test_no_nvrtc(nvrtc: Callable) -> None:
    def not_found() -> None:
        raise RuntimeError("Failure finding libnvrtc.so\nsearched here\nand there")

    nvrtc(nvrtcVersion=not_found)
    with pytest.raises(
        CompileError, match=r"cannot be loaded \(Failure finding libnvrtc.so\); .*nvidia-cuda-nvrtc-cu12$"
    ):
        compiler.target_for(70)
    with pytest.raises(CompileError, match="or nvidia-cuda-nvrtc, for CUDA 13"):
        compiler.target_for(75)


def test_an_error_in_the_source_is_quoted(small_kernels: Path) -> None:
    (small_kernels / "attention_map.cuh").write_text('extern "C" __global__ void attention_map() { missing(); }\n')
    variant = Variant("attention_map", "half_t", 64, 75)
    with pytest.raises(CompileError, match=r'attention_map-half_t-64-sm_75.*\n(.*\n)*.*"missing" is undefined'):
        compiler.compile(variant)


def test_the_version_is_that_of_the_library() -> None:
    major, minor = compiler.version()
    assert (major, minor) >= (12, 0)
    assert compiler.version_text() == f"{major}.{minor}"
