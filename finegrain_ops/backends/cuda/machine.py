"""Where the kernels run: a launcher for each device, which way its machine code comes, and why it cannot."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from typing import Protocol

import torch

from . import cache, compiler, prebuilt, sources
from .compiler import CompileError
from .variants import OLDEST_ARCHITECTURE, Variant

_LOGGER = logging.getLogger("finegrain_ops")
_has_announced = False


class Launcher(Protocol):
    architecture: int  # 10 * the device's compute capability
    num_processors: int  # streaming multiprocessors

    def launch(self, variant: Variant, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        """Enqueues a kernel on the current stream; `arguments` is passed by value."""


def launcher(device: torch.device) -> Launcher:
    return _launcher(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _launcher(index: int) -> Launcher:
    from .driver import DriverLauncher

    return DriverLauncher(torch.device("cuda", index), image)


def image(variant: Variant) -> bytes:
    """Machine code: prebuilt, else from the cache, else compiled now.

    Raises:
        CompileError: there is none, and none can be compiled.
    """
    if (built := prebuilt.load(variant)) is not None:
        return built
    identity = (sources.current_digest(), compiler.version_text(), *compiler.options(variant))
    name = cache.entry_name(variant.name, *identity)
    if (cached := cache.load(name)) is not None:
        return cached
    _announce(variant)
    compiled = compiler.compile(variant)
    cache.store(name, compiled)
    return compiled


def _announce(variant: Variant) -> None:
    """The first of a process is visible wherever logging was not set up otherwise."""
    global _has_announced
    level = logging.INFO if _has_announced else logging.WARNING
    _has_announced = True
    _LOGGER.log(
        level,
        "finegrain_ops: compiling %s for %s with NVRTC %s (cached in %s)",
        variant.kernel,
        compiler.target_for(variant.architecture).option,
        compiler.version_text(),
        cache.described(),
    )


def unavailable_reasons() -> list[str]:
    """Why no device can run the kernels; [] where one can."""
    reasons = []
    if torch.version.hip is not None:
        return ["torch is built for ROCm; these kernels are for NVIDIA GPUs"]
    if not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    if problem := _bindings_problem():
        reasons.append(problem)
    if reasons:
        return reasons
    refusals = [device_reasons("cuda", index) for index in range(torch.cuda.device_count())]
    return [] if any(not refusal for refusal in refusals) else refusals[0]


def device_reasons(device_type: str, index: int | None, subject: str = "query is") -> list[str]:
    """Why this device, one of several, cannot run the kernels; [] where it can. unavailable_reasons comes first.
    `subject` is what lies there.
    """
    if device_type != "cuda":
        return [f"{subject} on {device_type}; move {'it' if subject.endswith(' is') else 'them'} to a CUDA device"]
    architecture = _architecture(index)
    if architecture < OLDEST_ARCHITECTURE:
        return [f"the GPU's compute capability is {architecture / 10:.1f}; the kernels need 7.0 or later"]
    problem = _machine_code(architecture)[1]
    return [problem] if problem else []


def way() -> str:
    """How machine code comes to the devices here, for `python -m finegrain_ops info`."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        try:
            at_first_use = f"NVRTC {compiler.version_text()}"
        except CompileError as error:
            at_first_use = str(error)
        return f"no device to run on. Prebuilt: {prebuilt.summary()}. To compile at first use: {at_first_use}"
    if problem := _bindings_problem():
        return problem
    first_of = {_architecture(index): index for index in reversed(range(torch.cuda.device_count()))}
    ways = []
    for architecture, index in sorted(first_of.items()):
        reasons = device_reasons("cuda", index)
        ways.append(f"sm_{architecture}: {'; '.join(reasons) or _machine_code(architecture)[0]}")
    return "; ".join(ways)


@functools.cache
def _architecture(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _bindings_problem() -> str | None:
    how = 'install it with: pip install "finegrain_ops[cuda]"'
    if torch.version.cuda is not None:  # of the same CUDA, since an older driver need not have what newer ones ask for
        how += f' "cuda-bindings=={torch.version.cuda.split(".")[0]}.*"'
    try:
        found = importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # not even the package that it lies in
        found = False
    if not found:
        return f"cuda-bindings, which launches the kernels, is not installed; {how}"
    try:
        from cuda.bindings import driver  # noqa: F401
    except Exception as error:
        return f"cuda-bindings cannot be imported ({type(error).__name__}: {error}); {how}"
    return None


@functools.cache
def _machine_code(architecture: int) -> tuple[str, str]:
    """Which way it comes, and why none does: one of the two is empty."""
    not_prebuilt = prebuilt.why_not(architecture)
    if not_prebuilt is None:
        return f"prebuilt ({prebuilt.summary()})", ""
    try:
        target = compiler.target_for(architecture)
    except CompileError as error:
        return "", f"no machine code for this GPU (sm_{architecture}). Prebuilt: {not_prebuilt}. At first use: {error}"
    note = "" if not target.is_ptx else f" as PTX of {target.option}, which the driver compiles further,"
    return (
        f"compiled at first use by NVRTC {compiler.version_text()}{note} and kept in {cache.described()} "
        f"(prebuilt kernels: {not_prebuilt})",
        "",
    )
