"""What this machine has and which backends can run on it: `python -m finegrain_ops info`."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

from . import backends
from ._version import __version__
from .backends.crops.interface import INSTALLED_PILLOW, NEWEST_PILLOW, CropFeatures, PassOrder
from .backends.cuda import machine
from .backends.interface import AttentionFeatures

_PACKAGES = ("torch", "triton", "cuda-bindings", "transformers", "numpy", "pillow")


def devices() -> list[str]:
    """The devices that calls are dispatched for, as torch names them."""
    return ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def backend_status(name: str, device: str) -> list[str]:
    """Reasons why `name` cannot run an ordinary call (half precision on a GPU, float32 on a CPU; head dim 64) on
    `device`.
    """
    kind = torch.device(device)
    dtype = torch.float32 if kind.type == "cpu" else torch.float16
    return backends.not_supported_reasons(
        name, AttentionFeatures(kind.type, kind.index, dtype, 64, 64, needs_grad=False)
    )


def crop_backend_status(name: str, device: str) -> list[str]:
    """Reasons why `name` cannot crop and resize uint8 images on `device` as the installed Pillow would."""
    kind = torch.device(device)
    order = PassOrder.of_pillow(INSTALLED_PILLOW or NEWEST_PILLOW)
    features = CropFeatures(kind.type, kind.index, True, order, exact=True, has_integer_boxes=True)
    return backends.not_supported_reasons(name, features)


def show(console: Console | None = None) -> None:
    console = console or Console()
    console.print(_versions())
    for device in devices():
        kind = torch.device(device).type
        attention = {name: backend_status(name, device) for name in backends.BACKENDS}
        console.print(_backends("Attention", device, attention, backends.preference(kind)))
        crops = {name: crop_backend_status(name, device) for name in backends.CROP_BACKENDS}
        console.print(_backends("crop_resize", device, crops, backends.crop_preference(kind)))


def _versions() -> Table:
    table = Table(title="Versions", title_justify="left")
    table.add_column("package")
    table.add_column("version", overflow="fold")
    table.add_row("finegrain_ops", __version__)
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "not installed")
    table.add_row("CUDA that torch was built with", torch.version.cuda or "none")
    table.add_row("CUDA C++ kernels", machine.way())
    return table


def _backends(what: str, device: str, status: dict[str, list[str]], automatic: tuple[str, ...]) -> Table:
    described = platform.processor() or platform.machine()
    if device != "cpu":
        major, minor = torch.cuda.get_device_capability(device)
        described = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    table = Table(title=f"{what} backends on {device} ({described})", title_justify="left")
    table.add_column("backend")
    table.add_column("runs here")
    table.add_column("why not", overflow="fold")
    chosen = next(name for name in automatic if not status[name])
    for name, reasons in status.items():
        runs = "no" if reasons else 'yes, taken by "auto"' if name == chosen else "yes"
        table.add_row(name, runs, "; ".join(reasons))
    return table
