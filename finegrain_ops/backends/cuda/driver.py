"""Launches machine code through the CUDA driver, on torch's current stream."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .variants import Variant

_WITHOUT_ASKING = 48 * 1024  # bytes of shared memory that every kernel may use


class DriverError(RuntimeError):
    """The CUDA driver refused; the message has its name for it."""


class _Function(NamedTuple):
    handle: Any
    threads: int
    shared_bytes: int


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(driver: Any, what: str, result: Any, *values: Any) -> Any:
    """cuda.bindings returns (result, *values); a result other than success is raised."""
    if int(result) != 0:
        name = driver.cuGetErrorName(result)[1] or b"unknown error"
        explained = driver.cuGetErrorString(result)[1] or b""
        raise DriverError(f"{what} failed: {name.decode()} ({int(result)}), {explained.decode()}")
    return values[0] if values else None


class DriverLauncher:
    """Launches on one device. Machine code is loaded when a variant is first launched."""

    def __init__(self, device: torch.device, image: Callable[[Variant], bytes]) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index
        properties = torch.cuda.get_device_properties(self._index)
        self.architecture = 10 * properties.major + properties.minor
        self.num_processors = properties.multi_processor_count
        self._image = image
        self._driver = _driver()
        self._functions: dict[Variant, _Function] = {}
        self._lock = threading.Lock()

    def launch(self, variant: Variant, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        if torch.cuda.current_device() == self._index:
            self._launch(variant, grid, arguments)
        else:
            with torch.cuda.device(self._index):
                self._launch(variant, grid, arguments)

    def _launch(self, variant: Variant, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        function = self._functions.get(variant) or self._load(variant)
        pointer = ctypes.c_void_p(ctypes.addressof(arguments))  # the driver wants an array of pointers: of this one
        launch_arguments = (
            function.handle,
            *grid,
            *(function.threads, 1, 1),
            function.shared_bytes,
            torch.cuda.current_stream(self._index).cuda_stream,
            ctypes.addressof(pointer),
            0,
        )
        (result,) = self._driver.cuLaunchKernel(*launch_arguments)
        if int(result) == 0:
            return
        results = self._driver.CUresult
        if result in (results.CUDA_ERROR_INVALID_CONTEXT, results.CUDA_ERROR_INVALID_HANDLE):
            self._enter_context()  # a thread that has not called the CUDA runtime yet
            (result,) = self._driver.cuLaunchKernel(*launch_arguments)
        _check(self._driver, f"launching {variant.name} on a grid of {grid}", result)

    def _enter_context(self) -> None:
        """The device's primary context, which torch uses."""
        driver = self._driver
        device = _check(driver, "cuDeviceGet", *driver.cuDeviceGet(self._index))
        context = _check(driver, "cuDevicePrimaryCtxRetain", *driver.cuDevicePrimaryCtxRetain(device))
        _check(driver, "cuCtxSetCurrent", *driver.cuCtxSetCurrent(context))

    def _load(self, variant: Variant) -> _Function:
        with self._lock:
            if function := self._functions.get(variant):
                return function
            image = ctypes.create_string_buffer(self._image(variant))  # ends in a 0, which PTX needs
            driver = self._driver
            self._enter_context()
            # Loading allocates, which a stream that is being captured into a graph does not allow by default.
            relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            mode = _check(driver, "capture mode", *driver.cuThreadExchangeStreamCaptureMode(relaxed))
            try:
                function = self._load_image(variant, ctypes.addressof(image))
            finally:
                driver.cuThreadExchangeStreamCaptureMode(mode)
            self._functions[variant] = function
            return function

    def _load_image(self, variant: Variant, address: int) -> _Function:
        driver, shared = self._driver, variant.shared_bytes
        module = _check(driver, f"loading {variant.name}", *driver.cuModuleLoadData(address))
        handle = _check(driver, f"finding {variant.entry}", *driver.cuModuleGetFunction(module, variant.entry.encode()))
        attributes = driver.CUfunction_attribute
        if shared > _WITHOUT_ASKING:
            limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(
                driver,
                f"asking for {shared} bytes of shared memory for {variant.name}",
                *driver.cuFuncSetAttribute(handle, limit, shared),
            )
        if shared:  # the rest would be cache, and as many thread blocks as fit are worth more
            carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _check(driver, "preferring shared memory", *driver.cuFuncSetAttribute(handle, carveout, 100))
        return _Function(handle, variant.threads, shared)
