"""Machine code that NVRTC compiled, kept on disk: <folder>/<variant>-<key>.cubin, each with its checksum.

An entry is written beside its place and moved there, so that a reader sees all of it or nothing, and processes that
compile the same variant at once replace each other's equal files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

_LOGGER = logging.getLogger("finegrain_ops")
_MAGIC = b"finegrain_ops machine code 1\n"
_warned: set[str] = set()


def folder() -> Path:
    """FINEGRAIN_CACHE_DIR, or the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if chosen := os.environ.get("FINEGRAIN_CACHE_DIR"):
        return Path(chosen).expanduser()
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "finegrain_ops" / "cache"
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "finegrain_ops"
    return Path.home() / ".cache" / "finegrain_ops"


def described() -> str:
    try:
        return str(folder())
    except RuntimeError as error:
        return f"no folder, {error}"


def entry_name(variant_name: str, *identity: str) -> str:
    """`identity` is all that the machine code depends on."""
    return f"{variant_name}-{hashlib.sha256(chr(10).join(identity).encode()).hexdigest()[:32]}.cubin"


def load(name: str) -> bytes | None:
    """None where there is no such entry, or only a damaged one."""
    try:
        content = (folder() / name).read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        _warn_once(f"cannot read the cache of compiled kernels: {error}")
        return None
    image = content[len(_MAGIC) + hashlib.sha256().digest_size :]
    if content != _with_checksum(image):
        _LOGGER.warning("finegrain_ops: %s in %s is damaged; it is compiled again", name, described())
        return None
    return image


def store(name: str, image: bytes) -> None:
    """Where the folder cannot be written, this process goes on without it."""
    temporary = None
    try:
        place = folder() / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{name}-", delete=False) as file:
            temporary = file.name
            file.write(_with_checksum(image))
        Path(temporary).replace(place)
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        _warn_once(
            f"cannot keep compiled kernels: {error}; every process compiles them anew. "
            "Set FINEGRAIN_CACHE_DIR to a folder that can be written"
        )


def _with_checksum(image: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(image).digest() + image


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _LOGGER.warning("finegrain_ops: %s", message)
