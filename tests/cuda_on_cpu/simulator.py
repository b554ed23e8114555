"""Runs the CUDA kernels of csrc/ on the CPU: compiles them with g++ against primitives_on_cpu.h and launches them.

    kernel = build(str(CSRC / "attention_forward.cuh"), "attention_forward", {"FINEGRAIN_ARCH": 800, ...})
    kernel.launch((4, 1, 1), 128, 49152, arguments, [buffer_of(query), buffer_of(output, writable=True)])

A race in shared memory, an access outside the buffers, a misaligned vector or a divergent barrier is a SimulatorError.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

_COMPILER = "g++"
_FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall"]
_FLAGS += ["-ffp-contract=off", "-fno-strict-aliasing"]  # the same numbers on every CPU; casts as nvcc takes them
_KERNEL_FLAGS = ["-DFINEGRAIN_ON_CPU", "-Wno-unknown-pragmas", "-Wno-unused-function"]
# "race": the calls that ThreadSanitizer would receive go to memory_checks.cpp, so libtsan is not linked.
_SANITIZER_FLAGS = {"race": ["-fsanitize=thread"], "address": ["-fsanitize=address"]}
_MACHINE_FLAGS = {"race": ["-O3"], "address": ["-fsanitize=address"]}
_LINK_FLAGS = {"race": ["-Wl,-z,defs"], "address": ["-fsanitize=address"]}


class SimulatorError(RuntimeError):
    """What is wrong with a kernel or with a launch of it."""


class Buffer(NamedTuple):
    """Memory that a launch may read, and write if it says so."""

    address: int
    bytes: int
    writable: bool = False


def buffer_of(tensor: Any, *, writable: bool = False) -> Buffer:
    """From the first element of a tensor to its last one, with whatever its strides leave out."""
    if tensor.numel() == 0:
        return Buffer(tensor.data_ptr(), 0, writable)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return Buffer(tensor.data_ptr(), (last + 1) * tensor.element_size(), writable)


def missing() -> str | None:
    """Why nothing can be simulated here, or None."""
    if sys.platform != "linux":
        return "CUDA kernels are simulated on Linux only"
    if shutil.which(_COMPILER) is None:
        return "CUDA kernels are simulated where g++ is installed"
    return None


def address_sanitizer_environment() -> dict[str, str]:
    """The environment of a process that may build with sanitizer="address"."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):  # libstdc++ too: libasan wraps what throws exceptions
        found = _run([_COMPILER, f"-print-file-name={name}"]).strip()
        libraries.append(str(Path(found).resolve()))
    options = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=99"
    # Python's own allocator would hide the ends of small buffers.
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options, "PYTHONMALLOC": "malloc"}


# ------------------------------------------------------------------------------------------------------------- building


def build(
    source: str,
    entry: str,
    defines: Mapping[str, str | int],
    *,
    sanitizer: str = "race",
    overrides: Mapping[str, str] | None = None,
) -> Kernel:
    """Compiles the kernel `entry` of a .cuh file, unless the cache has it.

    sanitizer: "race" checks bounds and races; "address" uses AddressSanitizer, in a process of its own.
    overrides: by file name, another text for files of the source's folder: mutants of a kernel.
    """
    if (reason := missing()) is not None:
        raise SimulatorError(reason)
    if sanitizer == "address" and not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise SimulatorError("sanitizer='address' needs a process with address_sanitizer_environment()")
    folders = {"source": Path(source).resolve().parent, "csrc": CSRC}
    # Read once: what is compiled is what the cache's key says, even while somebody edits.
    texts = {}
    for name, folder in folders.items():
        texts |= {f"{name}/{path.name}": path.read_text() for path in sorted(folder.glob("*.cuh"))}
    for name, text in (overrides or {}).items():
        if texts[f"source/{name}"] == text:
            raise ValueError(f"the override of {name} changes nothing")
        texts[f"source/{name}"] = text
    machine = _build_machine(sanitizer)
    flags = [*_FLAGS, *_KERNEL_FLAGS, *_SANITIZER_FLAGS[sanitizer]]
    flags += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    key = repr((Path(source).name, texts, flags, _LINK_FLAGS[sanitizer], machine[0].name))
    library = _cache() / f"{entry}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as temporary:
            for name in folders:
                Path(temporary, name).mkdir()
            for name, text in texts.items():
                Path(temporary, name).write_text(text)
            includes = [f"-I{temporary}/source", f"-I{temporary}/csrc", f"-I{HERE}"]
            file, compiled, linked = f"{temporary}/source/{Path(source).name}", f"{temporary}/o", f"{temporary}/so"
            _run([_COMPILER, *flags, *includes, "-x", "c++", "-c", file, "-o", compiled])
            _run([_COMPILER, "-shared", *_LINK_FLAGS[sanitizer], compiled, *map(str, machine), "-o", linked])
            Path(linked).replace(library)  # at once: another process may compile the same
    return _load(library, entry)


@functools.cache
def _build_machine(sanitizer: str) -> list[Path]:
    """The simulator itself, compiled once for all kernels; each has a copy of its own."""
    flags = [*_FLAGS, *_MACHINE_FLAGS[sanitizer]]
    digest = hashlib.sha256(repr((flags, _compiler_version())).encode())
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        digest.update(f"\0{path.name}\0{path.read_text()}".encode())
    objects = []
    for path in sorted(HERE.glob("*.cpp")):
        objects.append(_cache() / f"{path.stem}-{digest.hexdigest()[:24]}.o")
        if not objects[-1].exists():
            with tempfile.TemporaryDirectory(dir=_cache()) as temporary:
                compiled = Path(temporary) / "machine.o"
                _run([_COMPILER, *flags, "-c", str(path), "-o", str(compiled)])
                compiled.replace(objects[-1])
    return objects


@functools.cache
def _compiler_version() -> str:
    return _run([_COMPILER, "-dumpfullversion", "-dumpmachine"])


@functools.cache
def _cache() -> Path:
    default = Path(tempfile.gettempdir()) / f"finegrain-simulator-{os.getuid()}"
    folder = Path(os.environ.get("FINEGRAIN_SIMULATOR_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: Sequence[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    environment.pop("LD_PRELOAD", None)  # AddressSanitizer is for the kernels
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SimulatorError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


@functools.cache
def _load(library: Path, entry: str) -> Kernel:
    return Kernel(library, entry)


# ------------------------------------------------------------------------------------------------------------ launching


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("is_writable", ctypes.c_int),
        ("unused", ctypes.c_int),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("arguments", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("argument_bytes", ctypes.c_uint64),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("num_buffers", ctypes.c_int),
        ("unused", ctypes.c_int),
    )


class Kernel:
    """A compiled kernel; launches of it follow one another."""

    def __init__(self, library: Path, entry: str):
        self._library = library
        try:
            # PyDLL keeps the interpreter's lock, so that no second launch begins while one runs.
            self._launch = ctypes.PyDLL(str(library))[f"launch_{entry}"]
        except AttributeError:
            raise SimulatorError(f"no FINEGRAIN_KERNEL({entry}, ...) in {library}") from None
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [ctypes.POINTER(_Launch)]

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        buffers: Sequence[tuple[int, int, bool]],
        seed: int = 0,
    ) -> None:
        """Runs all blocks. The seed chooses the order of blocks, of warps and of lanes."""
        listed = (_Buffer * max(len(buffers), 1))(*(_Buffer(*buffer, 0) for buffer in buffers))
        launch = _Launch(
            arguments=ctypes.addressof(arguments),
            buffers=listed,
            argument_bytes=ctypes.sizeof(arguments),
            shared_bytes=shared_bytes,
            seed=seed % 2**64,
            grid=(ctypes.c_int * 3)(*grid),
            threads=threads,
            num_buffers=len(buffers),
        )
        message = self._launch(ctypes.byref(launch))
        if message is not None:
            raise SimulatorError(re.sub(r"\[\+0x([0-9a-f]+)\]", self._line_of, message.decode()))

    def _line_of(self, site: re.Match[str]) -> str:
        """Where in the kernel's files an instruction comes from, the innermost function first."""
        command = ["addr2line", "-f", "-C", "-s", "-i", "-e", str(self._library), site[1]]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        except FileNotFoundError:
            return site[0]
        lines = [re.sub(r" \(discriminator \d+\)", "", line) for line in found[1::2]]
        ours = [line for line in lines if line.partition(":")[0].endswith(".cuh")]
        return f"[{' < '.join(ours)}]" if ours else site[0]
