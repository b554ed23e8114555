"""What the backend says where it cannot run, and that "auto" runs on without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import finegrain_ops
from finegrain_ops import UnsupportedInputError, backends
from finegrain_ops.backends.crops import cuda as crops
from finegrain_ops.backends.crops.interface import CropFeatures
from finegrain_ops.backends.cuda import compiler, machine, prebuilt
from finegrain_ops.backends.interface import AttentionFeatures

HALF_ON_A_GPU = AttentionFeatures("cuda", 0, torch.float16, 64, 64, needs_grad=False)


def assert_auto_runs_here() -> None:
    query = torch.ones(1, 1, 2, 4)
    assert finegrain_ops.reweighted_attention(query, query, query).sum() == 8


def refusal_of_cuda() -> str:
    query = torch.ones(1, 1, 2, 4)
    with pytest.raises(UnsupportedInputError) as raised:
        finegrain_ops.reweighted_attention(query, query, query, backend="cuda")
    return str(raised.value)


def hide_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "cuda.bindings" or name.startswith("cuda.bindings.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)


def no_nvrtc() -> None:
    raise RuntimeError('Failure finding "libnvrtc.so"')


def test_no_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert machine.unavailable_reasons() == ["torch sees no CUDA device"]
    assert "torch sees no CUDA device" in refusal_of_cuda()
    assert_auto_runs_here()


def test_no_device_and_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once, so that nobody mends the one only to be told of the other."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    hide_bindings(monkeypatch)
    refusal = refusal_of_cuda()
    assert "torch sees no CUDA device" in refusal
    assert 'pip install "finegrain_ops[cuda]"' in refusal
    assert_auto_runs_here()


def test_a_gpu_and_nvrtc(pretend_gpu: Callable[..., None]) -> None:
    pretend_gpu(75)
    assert machine.unavailable_reasons() == machine.device_reasons("cuda", 0) == []
    assert machine.device_reasons("cpu", None) == ["query is on cpu; move it to a CUDA device"]
    of_images = crops.not_supported_reasons(CropFeatures("cpu", None, True, 0, True, True))
    assert of_images == ["images are on cpu; move them to a CUDA device"]
    assert f"sm_75: compiled at first use by NVRTC {compiler.version_text()} and kept in" in machine.way()
    assert "prebuilt kernels: none" in machine.way()


def test_a_gpu_without_bindings(pretend_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(70)
    hide_bindings(monkeypatch)
    (reason,) = machine.unavailable_reasons()
    assert reason == (
        "cuda-bindings, which launches the kernels, is not installed; "
        'install it with: pip install "finegrain_ops[cuda]"'
    )
    assert machine.way() == reason
    assert backends.select("auto", HALF_ON_A_GPU) == "sdpa"
    assert_auto_runs_here()


def test_bindings_that_cannot_be_imported(
    pretend_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An installation that is broken, not missing."""
    pretend_gpu(70)
    hide_bindings(monkeypatch)
    (tmp_path / "driver.py").write_text("raise ImportError('undefined symbol: cuInit')\n")
    broken = ModuleType("cuda.bindings")
    broken.__path__ = [str(tmp_path)]
    broken.__spec__ = ModuleSpec("cuda.bindings", None, is_package=True)
    monkeypatch.setitem(sys.modules, "cuda.bindings", broken)
    (reason,) = machine.unavailable_reasons()
    assert reason.startswith("cuda-bindings cannot be imported (ImportError: undefined symbol: cuInit)")
    assert backends.select("auto", HALF_ON_A_GPU) == "sdpa"


def test_a_gpu_without_nvrtc(pretend_gpu: Callable[..., None], nvrtc: Callable[..., object]) -> None:
    """Both ways are quoted, each with what to do."""
    pretend_gpu(70)
    nvrtc(nvrtcVersion=no_nvrtc)
    (reason,) = machine.unavailable_reasons()
    assert reason == (
        "no machine code for this GPU (sm_70). Prebuilt: none, which is what 'FINEGRAIN_BUILD_CUDA=1 pip install .' is "
        'for. At first use: NVRTC cannot be loaded (Failure finding "libnvrtc.so"); install it with: '
        "pip install nvidia-cuda-nvrtc-cu12"
    )
    assert machine.way() == f"sm_70: {reason}"
    assert backends.select("auto", HALF_ON_A_GPU) == "sdpa"
    assert_auto_runs_here()


def test_a_gpu_that_nvrtc_no_longer_knows(pretend_gpu: Callable[..., None], nvrtc: Callable[..., object]) -> None:
    pretend_gpu(70)
    nvrtc(nvrtcVersion=lambda: (0, 13, 0), nvrtcGetSupportedArchs=lambda: (0, [75, 80, 90]))
    (reason,) = machine.unavailable_reasons()
    assert "NVRTC 13.0 begins at sm_75 and does not know sm_70" in reason
    assert backends.select("auto", HALF_ON_A_GPU) == "sdpa"


def test_prebuilt_kernels_need_no_nvrtc(
    pretend_gpu: Callable[..., None], nvrtc: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(70)
    nvrtc(nvrtcVersion=no_nvrtc)
    monkeypatch.setattr(prebuilt, "why_not", lambda architecture: None)
    monkeypatch.setattr(prebuilt, "summary", lambda: "sm_70 by nvcc 12.9.86")
    assert machine.unavailable_reasons() == []
    assert machine.way() == "sm_70: prebuilt (sm_70 by nvcc 12.9.86)"


def test_an_old_gpu(pretend_gpu: Callable[..., None]) -> None:
    pretend_gpu(61)
    assert machine.unavailable_reasons() == ["the GPU's compute capability is 6.1; the kernels need 7.0 or later"]
    assert backends.select("auto", HALF_ON_A_GPU) == "sdpa"


def test_one_of_two_gpus_is_enough(pretend_gpu: Callable[..., None]) -> None:
    pretend_gpu(61, 75)
    assert machine.unavailable_reasons() == []
    assert machine.device_reasons("cuda", 0) != []
    assert machine.device_reasons("cuda", 1) == []
    old, new = machine.way().split("; sm_75: ")
    assert old == "sm_61: the GPU's compute capability is 6.1; the kernels need 7.0 or later"
    assert new.startswith("compiled at first use by NVRTC")


def test_rocm(pretend_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which calls its devices "cuda"."""
    pretend_gpu(90)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert machine.unavailable_reasons() == ["torch is built for ROCm; these kernels are for NVIDIA GPUs"]


def test_info_tells_which_way(capsys: pytest.CaptureFixture[str]) -> None:
    from finegrain_ops.__main__ import main

    main(["info"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "cuda-bindings" in printed
    assert "CUDA C++ kernels" in printed
    if not torch.cuda.is_available():
        assert f"NVRTC {compiler.version_text()}" in printed
