"""What the tests of the CUDA backend share: they run without a GPU, and say they have one where they need it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from finegrain_ops import backends
from finegrain_ops.backends.cuda import cache, compiler, machine, prebuilt, sources


def _forget() -> None:
    for function in (
        backends.select,
        compiler.version,
        compiler.supported_architectures,
        machine._architecture,
        machine._bindings_problem,
        machine._launcher,
        machine._machine_code,
        prebuilt._manifest,
        sources.current_digest,
        sources.folder,
    ):
        function.cache_clear()
    cache._warned.clear()
    machine._has_announced = False


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing known from tests before, no prebuilt kernels, an empty cache."""
    monkeypatch.setenv("FINEGRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(prebuilt, "folder", lambda: tmp_path / "prebuilt")
    _forget()
    yield
    monkeypatch.undo()
    _forget()


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """pretend_gpu(70): torch sees a GPU of compute capability 7.0."""

    def pretend(*architectures: int) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(architectures))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda index=None: divmod(architectures[index or 0], 10)
        )
        _forget()

    return pretend


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """cuda.bindings.nvrtc; nvrtc(nvrtcVersion=...) replaces functions of it."""
    module = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is part of the test requirements")

    def replace(**functions: Callable[..., object]) -> object:
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)
        _forget()
        return module

    return replace


@pytest.fixture
def small_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of sources that compile fast, in place of csrc/."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "primitives.cuh").write_text("struct half_t { unsigned short bits; };\n")
    (folder / "attention_map.cuh").write_text(
        '#include "primitives.cuh"\n'
        'extern "C" __global__ void attention_map(FINEGRAIN_ELEMENT* map) { map[threadIdx.x] = {FINEGRAIN_WIDTH}; }\n'
    )
    monkeypatch.setattr(sources, "folder", functools.cache(lambda: folder))
    sources.current_digest.cache_clear()
    return folder
