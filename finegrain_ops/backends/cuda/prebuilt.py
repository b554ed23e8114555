"""Machine code that was compiled when the package was installed (FINEGRAIN_BUILD_CUDA=1, nvcc.py): cubins in prebuilt/
beside this file, and a manifest that says what they were made from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from . import sources
from .tiles import class_of
from .variants import Variant

_LOGGER = logging.getLogger("finegrain_ops")
MANIFEST = "manifest.json"
HOW_TO_BUILD = "FINEGRAIN_BUILD_CUDA=1 pip install ."


@dataclass(frozen=True)
class Manifest:
    nvcc: str  # its version, "" where there was none
    sources: str  # sources.digest of what they were built from
    architectures: list[int]
    problem: str = ""  # why nothing was built
    cubins: dict[str, str] = field(default_factory=dict)  # Variant.name: SHA-256 of the machine code

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None where there is none.

        Raises:
            ValueError: it is damaged.
        """
        try:
            return cls(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(f"{folder / MANIFEST} is damaged ({error})") from error


def folder() -> Path:
    return Path(__file__).resolve().parent / "prebuilt"


@functools.cache
def _manifest() -> Manifest | str:
    """Or why nothing prebuilt can be used on any device."""
    try:
        manifest = Manifest.read(folder())
    except ValueError as error:
        return f"{error}; install again with: {HOW_TO_BUILD}"
    if manifest is None:
        return f"none, which is what {HOW_TO_BUILD!r} is for"
    if manifest.problem:
        return f"none, FINEGRAIN_BUILD_CUDA=1 could build none: {manifest.problem}"
    if manifest.sources != sources.current_digest():
        return f"those there are were built from other sources or tiles; build them anew with: {HOW_TO_BUILD}"
    return manifest


def summary() -> str:
    """What is prebuilt, or why nothing is."""
    manifest = _manifest()
    return manifest if isinstance(manifest, str) else f"{_listed(manifest)} by nvcc {manifest.nvcc}"


def _listed(manifest: Manifest) -> str:
    return ", ".join(f"sm_{architecture}" for architecture in manifest.architectures)


def _runs_on(built_for: int, architecture: int) -> bool:
    """Machine code runs on later GPUs of the same major number; but for sm_75 there are tiles and matrix instructions
    other than for sm_70.
    """
    same_major = built_for // 10 == architecture // 10 and built_for <= architecture
    return same_major and class_of(built_for) == class_of(architecture)


def why_not(architecture: int) -> str | None:
    """Why no prebuilt machine code serves a GPU of this architecture; None where it does."""
    manifest = _manifest()
    if isinstance(manifest, str):
        return manifest
    if any(_runs_on(built_for, architecture) for built_for in manifest.architectures):
        return None
    return (
        f"those there are were built for {_listed(manifest)}; build them for this GPU with: "
        f"TORCH_CUDA_ARCH_LIST={architecture // 10}.{architecture % 10} {HOW_TO_BUILD}"
    )


def load(variant: Variant) -> bytes | None:
    """Machine code for the newest architecture that the variant's GPU runs; None where there is none."""
    manifest = _manifest()
    if isinstance(manifest, str):
        return None
    for built_for in sorted(manifest.architectures, reverse=True):
        if not _runs_on(built_for, variant.architecture):
            continue
        name = dataclasses.replace(variant, architecture=built_for).name
        if name not in manifest.cubins:
            continue
        try:
            image = (folder() / f"{name}.cubin").read_bytes()
        except OSError as error:
            _LOGGER.warning("finegrain_ops: prebuilt kernel cannot be read (%s); compiling it now", error)
            return None
        if hashlib.sha256(image).hexdigest() == manifest.cubins[name]:
            return image
        _LOGGER.warning(
            "finegrain_ops: prebuilt kernel %s is damaged; compiling it now. Install again with: %s", name, HOW_TO_BUILD
        )
    return None
