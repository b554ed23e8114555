"""Compiles every variant ahead of time, when the package is installed: FINEGRAIN_BUILD_CUDA=1 pip install .

setup.py runs this without torch, and thus without importing finegrain_ops. nvcc is found through CUDA_HOME, CUDA_PATH
or PATH; ninja runs as many of them as MAX_JOBS or the processor allows; TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import prebuilt, sources
from .variants import OLDEST_ARCHITECTURE, Variant, all_variants

DEFAULT_ARCHITECTURES = (70, 75)  # where Triton has no tensor cores; newer ones compile at first use if they must
_BY_NAME = {  # as torch.utils.cpp_extension has them
    "Volta": (70,),
    "Volta+Tegra": (72,),
    "Turing": (75,),
    "Ampere": (80, 86),
    "Ampere+Tegra": (87,),
    "Ada": (89,),
    "Hopper": (90,),
    "Blackwell": (100, 103, 120, 121),
    "Blackwell+Tegra": (101, 110),
}
_TOO_OLD = ("Kepler", "Kepler+Tesla", "Maxwell", "Maxwell+Tegra", "Pascal")
_KNOWN_TO_NVCC = {  # the releases of nvcc that compile for an architecture, where not all do that this project meets
    70: "12.9 or earlier",
    72: "12.9 or earlier",
    89: "11.8 or later",
    90: "11.8 or later",
    100: "12.8 or later",
    101: "12.8 or 12.9",
    103: "12.9 or later",
    110: "13.0 or later",
    120: "12.8 or later",
    121: "12.9 or later",
}


class BuildError(RuntimeError):
    """Why no kernels can be prebuilt, and what to do."""


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str
    architectures: tuple[int, ...]


def requested(environment: Mapping[str, str]) -> str:
    """FINEGRAIN_BUILD_CUDA: "" (no), "1" (if it is possible) or "require" (or the install fails)."""
    value = environment.get("FINEGRAIN_BUILD_CUDA", "")
    if value not in ("", "0", "1", "require"):
        raise BuildError(f'FINEGRAIN_BUILD_CUDA: expected 0, 1 or "require", got {value!r}')
    return value.replace("0", "")


def find_nvcc(environment: Mapping[str, str]) -> Nvcc:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environment.get(variable):
            path = shutil.which("nvcc", path=str(Path(home) / "bin"))
            if path is None:
                raise BuildError(f"{variable} is {home}, which has no bin/nvcc")
            break
    else:
        path = shutil.which("nvcc", path=environment.get("PATH", ""))
        if path is None:
            raise BuildError("nvcc was not found; install the CUDA toolkit, and set CUDA_HOME or PATH to it")
    printed = _ask(path, "--version")
    found = re.search(r"release [\d.]+, V([\d.]+)", printed)
    if found is None:
        raise BuildError(f"{path} --version does not tell its version, but: {_end_of(printed, 3)}")
    architectures = sorted({int(number) for number in re.findall(r"sm_(\d+)\b", _ask(path, "--list-gpu-code"))})
    if not architectures:
        raise BuildError(f"{path} --list-gpu-code lists no architecture")
    return Nvcc(path, found[1], tuple(architectures))


def _ask(path: str, option: str) -> str:
    try:
        done = subprocess.run([path, option], capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{path} does not run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{path} {option} failed ({done.returncode}): {_end_of(done.stdout + done.stderr, 3)}")
    return done.stdout


def _end_of(text: str, num_lines: int) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-num_lines:]) or "(no output)"


def wanted_architectures(listed: str) -> tuple[list[int], list[str]]:
    """TORCH_CUDA_ARCH_LIST ("7.0;7.5 8.0+PTX", "Volta"), or the default; and notes on what of it is not used."""
    if not listed.strip():
        return list(DEFAULT_ARCHITECTURES), []
    wanted: list[int] = []
    notes = []
    for entry in re.split(r"[\s;,]+", listed.strip(" ;,\t\n")):
        name = entry.removesuffix("+PTX")
        if name != entry:
            notes.append(f"{entry}: without PTX; on GPUs newer than those listed NVRTC compiles at first use")
        number = re.fullmatch(r"(\d+)\.(\d)[af]?", name)
        if number:
            architectures: tuple[int, ...] = (10 * int(number[1]) + int(number[2]),)
        elif name in _BY_NAME:
            architectures = _BY_NAME[name]
        elif name in _TOO_OLD:
            architectures = ()
        else:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {entry!r}; expected such as 7.0, 7.5+PTX or Volta")
        if not architectures or min(architectures) < OLDEST_ARCHITECTURE:
            notes.append(f"{entry} is left out: the kernels need 7.0 or later")
            continue
        wanted.extend(architectures)
    return sorted(set(wanted)), notes


def buildable_architectures(nvcc: Nvcc, listed: str) -> tuple[list[int], list[str]]:
    """Those that are wanted and that nvcc knows; and notes on the others, which say which nvcc would know them."""
    wanted, notes = wanted_architectures(listed)
    for architecture in wanted:
        if architecture not in nvcc.architectures:
            which = _KNOWN_TO_NVCC.get(architecture, "of another release")
            notes.append(f"sm_{architecture} is left out: nvcc {nvcc.version} does not know it, nvcc {which} does")
    known = [architecture for architecture in wanted if architecture in nvcc.architectures]
    if not known:
        raise BuildError("; ".join(["there is no architecture to build for", *notes]))
    return known, notes


def find_ninja(environment: Mapping[str, str]) -> str:
    """Build requirements put it on PATH, or beside this Python."""
    folders = [environment.get("PATH", ""), sysconfig.get_path("scripts")]
    if found := shutil.which("ninja", path=os.pathsep.join(folders)):
        return found
    raise BuildError("ninja, which runs nvcc, was not found; install it with: pip install ninja")


def write_build_file(work: Path, nvcc: Nvcc, variants: Iterable[Variant], source_folder: Path) -> Path:
    def path(p: Path | str) -> str:  # ninja's escapes, in a list of paths
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    command = " ".join(shlex.quote(part).replace("$", "$$") for part in (nvcc.path, "-cubin", "-std=c++17", "-x", "cu"))
    headers = " ".join(path(header) for header in sorted(source_folder.glob("*.cuh")))
    lines = [
        "ninja_required_version = 1.5",
        "rule nvcc",
        f"  command = {command} -Wno-deprecated-gpu-targets -arch=sm_$architecture $defines -o $out $in",
        "  description = nvcc $out",
    ]
    for variant in variants:
        lines += [
            f"build {variant.name}.cubin: nvcc {path(source_folder / variant.source)} | {headers} {path(nvcc.path)}",
            f"  architecture = {variant.architecture}",
            "  defines = " + " ".join(f"-D{name}={value}" for name, value in variant.defines().items()),
        ]
    file = work / "build.ninja"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _compile(
    work: Path, nvcc: Nvcc, variants: list[Variant], source_folder: Path, environment: Mapping[str, str]
) -> None:
    ninja = find_ninja(environment)
    work.mkdir(parents=True, exist_ok=True)
    write_build_file(work, nvcc, variants, source_folder)
    jobs = environment.get("MAX_JOBS") or str(os.cpu_count() or 1)
    done = subprocess.run(
        [ninja, "-C", str(work), "-j", jobs], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        raise BuildError(f"nvcc {nvcc.version} failed: {_end_of(chr(10).join(errors) or done.stdout + done.stderr, 3)}")
    for variant in variants:
        if not (work / f"{variant.name}.cubin").is_file():
            raise BuildError(f"nvcc {nvcc.version} reported success, but wrote no {variant.name}.cubin")


def build(
    output: Path,
    work: Path,
    source_folder: Path,
    environment: Mapping[str, str],
    kernels: Iterable[str] | None = None,
) -> prebuilt.Manifest:
    """Writes cubins and their manifest into `output`, which holds nothing else afterwards. `kernels`: only these.

    Raises:
        BuildError: why nothing was built. `output` then holds a manifest that says so.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    digest = sources.digest(source_folder)
    version = ""
    try:
        nvcc = find_nvcc(environment)
        version = nvcc.version
        architectures, notes = buildable_architectures(nvcc, environment.get("TORCH_CUDA_ARCH_LIST", ""))
        for note in notes:
            _say(note)
        chosen = None if kernels is None else set(kernels)
        variants = [v for v in all_variants(architectures) if chosen is None or v.kernel in chosen]
        names = ", ".join(f"sm_{architecture}" for architecture in architectures)
        _say(f"{nvcc.path} ({version}) compiles {len(variants)} variants for {names}")
        _compile(work, nvcc, variants, source_folder, environment)
    except BuildError as error:
        prebuilt.Manifest(version, digest, [], str(error)).write(output)
        raise
    cubins = {}
    for variant in variants:
        image = (work / f"{variant.name}.cubin").read_bytes()
        (output / f"{variant.name}.cubin").write_bytes(image)
        cubins[variant.name] = hashlib.sha256(image).hexdigest()
    manifest = prebuilt.Manifest(version, digest, architectures, "", cubins)
    manifest.write(output)
    return manifest


def build_for_install(output: Path, work: Path, package: Path, environment: Mapping[str, str]) -> None:
    """What `pip install` runs when FINEGRAIN_BUILD_CUDA is set.

    Raises:
        SystemExit: nothing could be built, and FINEGRAIN_BUILD_CUDA=require.
    """
    try:
        build(output, work, sources.find_folder(package), environment)
    except BuildError as error:
        if requested(environment) == "require":
            raise SystemExit(
                f"finegrain_ops: FINEGRAIN_BUILD_CUDA=require, and no kernels were built: {error}"
            ) from error
        rule = "*" * 100
        _say(
            f"\n{rule}\nWARNING: no CUDA C++ kernels were built: {error}\nThe install goes on without; where NVRTC is "
            f"installed, they are compiled at first use.\n{rule}"
        )


def _say(message: str) -> None:
    print(f"finegrain_ops: {message}", file=sys.stderr, flush=True)
