"""Where the sources of the CUDA C++ kernels lie, and what identifies them."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from .tiles import CLASSES
from .variants import all_variants


def find_folder(package: Path) -> Path:
    """`package` is the folder of finegrain_ops: csrc/ lies in it when installed, beside it in a checkout."""
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "primitives.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"the sources of the CUDA C++ kernels are missing: neither {package / 'csrc'} nor {package.parent / 'csrc'} "
        "holds primitives.cuh; install finegrain_ops again"
    )


@functools.cache
def folder() -> Path:
    return find_folder(Path(__file__).resolve().parents[2])


def digest(folder: Path) -> str:
    """Of all sources, since any kernel may include any of them, and of the tiles that are compiled into them: machine
    code must never be launched with other tiles than its own.
    """
    result = hashlib.sha256()
    for path in sorted(folder.glob("*.cuh")):
        result.update(f"{path.name} {path.stat().st_size}\n".encode())
        result.update(path.read_bytes())
    compiled_in = {variant.name: variant.defines() for variant in all_variants(CLASSES)}
    result.update(json.dumps(compiled_in).encode())
    return result.hexdigest()


@functools.cache
def current_digest() -> str:
    return digest(folder())
