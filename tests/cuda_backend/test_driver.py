"""What the CUDA driver is asked for. It is stubbed: the functions of cuda.bindings note their arguments."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finegrain_ops.backends.cuda.driver import DriverError, DriverLauncher
from finegrain_ops.backends.cuda.variants import Variant, all_variants

SMALL = Variant("attention_map", "half_t", 32, 70)
LARGE = max(all_variants([70]), key=lambda variant: variant.shared_bytes)
MERGE = Variant("merge_splits", "half_t", 128, 70)
STREAM = 0x5EED


class Arguments(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("scale", ctypes.c_float), ("count", ctypes.c_int))


class StubbedDriver:
    """cuda.bindings.driver with its functions replaced; its enumerations are real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is part of the test requirements")
        self.results = module.CUresult
        self.attributes = module.CUfunction_attribute
        self.relaxed = module.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self.calls: list[tuple] = []
        self.launched: list[tuple[Any, ...]] = []
        self.passed: list[Arguments] = []
        self.launch_results: list[Any] = []
        answers: dict[str, tuple] = {
            "cuDeviceGet": ("device",),
            "cuDevicePrimaryCtxRetain": ("context",),
            "cuCtxSetCurrent": (),
            "cuThreadExchangeStreamCaptureMode": ("global mode",),
            "cuModuleGetFunction": ("function",),
            "cuFuncSetAttribute": (),
        }
        for name, values in answers.items():
            monkeypatch.setattr(module, name, self.noting(name, values))
        monkeypatch.setattr(module, "cuModuleLoadData", self.load)
        monkeypatch.setattr(module, "cuLaunchKernel", self.launch)
        monkeypatch.setattr(module, "cuGetErrorName", lambda result: (self.results.CUDA_SUCCESS, result.name.encode()))
        monkeypatch.setattr(module, "cuGetErrorString", lambda result: (self.results.CUDA_SUCCESS, b"explanation"))

    def noting(self, name: str, values: tuple) -> Any:
        def function(*arguments: Any) -> tuple:
            self.calls.append((name, *arguments))
            return (self.results.CUDA_SUCCESS, *values)

        return function

    def load(self, address: int) -> tuple:
        self.calls.append(("cuModuleLoadData", ctypes.string_at(address)))
        return self.results.CUDA_SUCCESS, "module"

    def launch(self, *arguments: Any) -> tuple:
        self.launched.append(arguments)
        pointers, extra = arguments[-2:]
        assert extra == 0
        pointer = ctypes.c_void_p.from_address(pointers).value
        assert pointer is not None
        self.passed.append(Arguments.from_buffer_copy(ctypes.string_at(pointer, ctypes.sizeof(Arguments))))
        return (self.launch_results.pop(0) if self.launch_results else self.results.CUDA_SUCCESS,)

    def asked(self, name: str) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> StubbedDriver:
    properties = SimpleNamespace(major=7, minor=0, multi_processor_count=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=STREAM + index))
    return StubbedDriver(monkeypatch)


def launcher(device: str = "cuda:1") -> DriverLauncher:
    return DriverLauncher(torch.device(device), lambda variant: f"image of {variant.name}".encode())


def test_it_knows_its_device(driver: StubbedDriver) -> None:
    assert (launcher().architecture, launcher().num_processors) == (70, 80)


def test_a_launch(driver: StubbedDriver) -> None:
    launcher().launch(SMALL, (5, 1, 1), Arguments(0xDA7A, 0.5, 7))
    (launched,) = driver.launched
    assert launched[:9] == ("function", 5, 1, 1, SMALL.threads, 1, 1, SMALL.shared_bytes, STREAM + 1)
    (passed,) = driver.passed
    assert (passed.data, passed.scale, passed.count) == (0xDA7A, 0.5, 7)
    assert driver.asked("cuModuleLoadData") == [(b"image of attention_map-half_t-32-sm_70",)]
    assert driver.asked("cuModuleGetFunction") == [("module", b"attention_map")]


def test_machine_code_is_loaded_once_for_each_variant(driver: StubbedDriver) -> None:
    one = launcher()
    for variant in (SMALL, LARGE, SMALL, LARGE, SMALL):
        one.launch(variant, (1, 1, 1), Arguments())
    assert len(driver.launched) == 5
    assert len(driver.asked("cuModuleLoadData")) == 2


def test_shared_memory(driver: StubbedDriver) -> None:
    """Above 48 KiB it has to be asked for; where there is any, it is preferred to cache."""
    most = driver.attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    carveout = driver.attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    assert SMALL.shared_bytes <= 48 * 1024 < LARGE.shared_bytes
    expected = {
        SMALL: [("function", carveout, 100)],
        LARGE: [("function", most, LARGE.shared_bytes), ("function", carveout, 100)],
        MERGE: [],
    }
    for variant, asked in expected.items():
        driver.calls.clear()
        launcher().launch(variant, (1, 1, 1), Arguments())
        assert driver.asked("cuFuncSetAttribute") == asked


def test_loading_is_allowed_while_a_graph_is_captured(driver: StubbedDriver) -> None:
    launcher().launch(SMALL, (1, 1, 1), Arguments())
    names = [call[0] for call in driver.calls]
    modes = [i for i, name in enumerate(names) if name == "cuThreadExchangeStreamCaptureMode"]
    assert driver.asked("cuThreadExchangeStreamCaptureMode") == [(driver.relaxed,), ("global mode",)]
    assert modes[0] < names.index("cuModuleLoadData") < modes[1]


@pytest.mark.parametrize("name", ["CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_INVALID_HANDLE"])
def test_a_thread_without_a_context_gets_torchs(driver: StubbedDriver, name: str) -> None:
    one = launcher()
    one.launch(SMALL, (1, 1, 1), Arguments())
    driver.calls.clear()
    driver.launch_results = [getattr(driver.results, name)]
    one.launch(SMALL, (2, 1, 1), Arguments())
    assert driver.calls == [
        ("cuDeviceGet", 1),
        ("cuDevicePrimaryCtxRetain", "device"),
        ("cuCtxSetCurrent", "context"),
    ]
    assert [launched[1] for launched in driver.launched] == [1, 2, 2]


def test_a_failed_launch(driver: StubbedDriver) -> None:
    driver.launch_results = [driver.results.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES]
    with pytest.raises(
        DriverError,
        match=r"launching attention_map-half_t-32-sm_70 on a grid of \(3, 1, 1\) failed: "
        r"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES \(701\), explanation",
    ):
        launcher().launch(SMALL, (3, 1, 1), Arguments())


def test_machine_code_that_the_driver_refuses(driver: StubbedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next call tries again."""
    one = launcher()
    with monkeypatch.context() as patched:
        module = pytest.importorskip("cuda.bindings.driver", reason="checked by the fixture")
        patched.setattr(module, "cuModuleLoadData", lambda address: (driver.results.CUDA_ERROR_INVALID_IMAGE, 0))
        with pytest.raises(DriverError, match="loading attention_map-half_t-32-sm_70 failed: CUDA_ERROR_INVALID_IMAGE"):
            one.launch(SMALL, (1, 1, 1), Arguments())
    assert driver.asked("cuThreadExchangeStreamCaptureMode")[-1] == ("global mode",), "restored"
    one.launch(SMALL, (1, 1, 1), Arguments())
    assert len(driver.launched) == 1


def test_another_device_than_the_current_one(driver: StubbedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *_: object) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    launcher("cuda:0").launch(SMALL, (1, 1, 1), Arguments())
    assert entered == [0, None]
    assert driver.launched[0][8] == STREAM
    launcher("cuda:1").launch(SMALL, (1, 1, 1), Arguments())
    launcher("cuda").launch(SMALL, (1, 1, 1), Arguments())
    assert entered == [0, None], "nothing to switch to"
