"""What a stored row says about where, when and with what it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import finegrain_ops

_ROOT = Path(__file__).resolve().parent.parent


def describe_machine(device: torch.device, command: str) -> dict:
    """Plain JSON values. `date` is the same for all rows of a run, and tells one run from another."""
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": describe_gpu(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "pillow")}
        | {"finegrain_ops": finegrain_ops.__version__},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def cpu_name() -> str:
    try:
        import cpuinfo  # comes with pytest-benchmark
    except ModuleNotFoundError:
        return platform.processor() or platform.machine()
    return cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or platform.machine()


def describe_gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Short hash, with "+changes" when files other than results differ from it; None outside a repository.

    FINEGRAIN_COMMIT says it where the files were copied without their repository.
    """
    if "FINEGRAIN_COMMIT" in os.environ:
        return os.environ["FINEGRAIN_COMMIT"]
    git = ("git", "--no-optional-locks", "-C", str(_ROOT))
    short_hash = _output_of(*git, "rev-parse", "--short", "HEAD")
    if short_hash is None:
        return None
    changes = _output_of(*git, "status", "--porcelain", "--", ".", ":!bench/results")
    return f"{short_hash}+changes" if changes else short_hash


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
