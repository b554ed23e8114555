"""FINEGRAIN_BUILD_CUDA=1: with a good nvcc, and with every kind of bad one, which must not stop the install."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finegrain_ops.backends.cuda import nvcc, prebuilt, sources
from finegrain_ops.backends.cuda.nvcc import BuildError, Nvcc
from finegrain_ops.backends.cuda.variants import Variant, all_variants

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-ins for nvcc are shell scripts")

GOOD_VERSION = "echo 'Cuda compilation tools, release 12.9, V12.9.86'; exit 0"
GOOD_LIST = "printf 'sm_70\\nsm_75\\nsm_80\\n'; exit 0"
# Its machine code is its command line.
GOOD_COMPILE = 'all="$*"; while [ "$1" != "-o" ]; do shift; done; echo "$all" > "$2"'


def stand_in(folder: Path, version: str = GOOD_VERSION, listed: str = GOOD_LIST, compiles: str = GOOD_COMPILE) -> dict:
    """An environment with such an nvcc."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    script = folder / "bin" / "nvcc"
    script.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) {version};;\n--list-gpu-code) {listed};;\nesac\n{compiles}\n", "utf-8"
    )
    script.chmod(0o755)
    return {"PATH": os.environ["PATH"], "CUDA_HOME": str(folder), "FINEGRAIN_BUILD_CUDA": "1"}


def build(tmp_path: Path, environment: dict[str, str], kernels: set[str] | None = None) -> prebuilt.Manifest:
    return nvcc.build(prebuilt.folder(), tmp_path / "work", sources.folder(), environment, kernels)


BROKEN = {
    "fails": ({"version": "echo 'no license' >&2; exit 1"}, r"nvcc --version failed \(1\): no license"),
    "garbage": ({"version": "echo 'Hello'; exit 0"}, "does not tell its version, but: Hello"),
    "silent": ({"version": "exit 0"}, r"does not tell its version, but: \(no output\)"),
    "crashes": ({"version": "kill -SEGV $$"}, r"nvcc --version failed \(-11\)"),
    "knows nothing": ({"listed": "echo what; exit 0"}, "--list-gpu-code lists no architecture"),
    "too old": (
        {"listed": "printf 'sm_50\\nsm_61\\n'; exit 0"},
        "there is no architecture to build for; sm_70 is left",
    ),
    "cannot compile": (
        {"compiles": "echo 'ptxas fatal error: out of luck' >&2; exit 2"},
        "nvcc 12.9.86 failed: .*ptxas fatal error: out of luck",
    ),
    "writes nothing": ({"compiles": "exit 0"}, r"reported success, but wrote no .*\.cubin"),
}


@pytest.mark.parametrize(("script", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_nvcc(
    script: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The install goes on, with a warning now and the reason later; and the next build with a good one works."""
    environment = stand_in(tmp_path / "cuda", **script)
    with pytest.raises(BuildError, match=message) as raised:
        build(tmp_path, environment, {"merge_splits"})
    reason = prebuilt.why_not(70)
    assert reason == f"none, FINEGRAIN_BUILD_CUDA=1 could build none: {raised.value}"
    assert [file.name for file in prebuilt.folder().iterdir()] == [prebuilt.MANIFEST]

    nvcc.build_for_install(prebuilt.folder(), tmp_path / "work", ROOT / "finegrain_ops", environment)
    assert "WARNING: no CUDA C++ kernels were built" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="FINEGRAIN_BUILD_CUDA=require, and no kernels were built"):
        nvcc.build_for_install(
            prebuilt.folder(),
            tmp_path / "work",
            ROOT / "finegrain_ops",
            {**environment, "FINEGRAIN_BUILD_CUDA": "require"},
        )

    assert build(tmp_path, stand_in(tmp_path / "cuda"), {"merge_splits"}).architectures == [70, 75]
    prebuilt._manifest.cache_clear()
    assert prebuilt.why_not(70) is None


def test_no_nvcc(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="nvcc was not found; install the CUDA toolkit, and set CUDA_HOME or PATH"):
        build(tmp_path, {"PATH": str(tmp_path)})
    with pytest.raises(BuildError, match=r"CUDA_HOME is .*, which has no bin/nvcc"):
        build(tmp_path, {"PATH": os.environ["PATH"], "CUDA_HOME": str(tmp_path)})
    assert "which has no bin/nvcc" in str(prebuilt.why_not(75))


def test_no_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match=r"ninja, .*, was not found; install it with: pip install ninja"):
        build(tmp_path, {**stand_in(tmp_path / "cuda"), "PATH": str(tmp_path)})


def test_every_variant_is_built_with_its_own_numbers(tmp_path: Path) -> None:
    """In a folder whose name needs quotes, and in two runs, of which the second compiles nothing."""
    work = tmp_path / "a folder: with $signs"
    environment = {**stand_in(tmp_path / "cuda toolkit"), "TORCH_CUDA_ARCH_LIST": "7.0"}
    manifest = nvcc.build(prebuilt.folder(), work, sources.folder(), environment)
    assert (manifest.nvcc, manifest.architectures) == ("12.9.86", [70])
    assert set(manifest.cubins) == {variant.name for variant in all_variants([70])}
    for variant in all_variants([70]):
        image = prebuilt.load(variant)
        assert image is not None
        command = shlex.split(image.decode())
        assert "-arch=sm_70" in command
        assert str(sources.folder() / variant.source) in command
        for name, value in variant.defines().items():
            assert f"-D{name}={value}" in command
    written = {file: file.stat().st_mtime_ns for file in work.glob("*.cubin")}
    nvcc.build(prebuilt.folder(), work, sources.folder(), environment)
    assert {file: file.stat().st_mtime_ns for file in work.glob("*.cubin")} == written


def test_the_real_nvcc(tmp_path: Path) -> None:
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("nvcc is not on PATH")
    environment = {"PATH": os.environ["PATH"], "TORCH_CUDA_ARCH_LIST": "7.5;8.0"}
    manifest = build(tmp_path, environment, {"merge_splits"})
    assert manifest.architectures == [75, 80]
    assert len(manifest.cubins) == 2 + 3
    image = prebuilt.load(Variant("merge_splits", "bfloat16_t", 128, 86))
    assert image is not None
    assert image[:4] == b"\x7fELF"
    assert b".text.merge_splits\0" in image


@pytest.mark.parametrize(
    ("listed", "wanted", "note"),
    [
        ("", [70, 75], None),
        ("7.0", [70], None),
        ("7.0;7.5 8.0+PTX", [70, 75, 80], r"8\.0\+PTX: without PTX"),
        ("Volta Turing", [70, 75], None),
        (" 8.6, 7.5 ", [75, 86], None),
        ("9.0a;10.3;12.0", [90, 103, 120], None),
        ("5.2 6.0 7.0", [70], r"5\.2 is left out: the kernels need 7\.0"),
        ("Pascal;Ampere", [80, 86], "Pascal is left out"),
    ],
)
def test_torch_cuda_arch_list(listed: str, wanted: list[int], note: str | None) -> None:
    architectures, notes = nvcc.wanted_architectures(listed)
    assert architectures == wanted
    if note is None:
        assert notes == []
    else:
        assert nvcc.re.search(note, "; ".join(notes))


def test_torch_cuda_arch_list_that_nobody_understands() -> None:
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST has 'sm_70'; expected such as 7\.0"):
        nvcc.wanted_architectures("7.5;sm_70")


def test_architectures_that_this_nvcc_does_not_know() -> None:
    thirteen = Nvcc("nvcc", "13.0.88", (75, 80, 86, 89, 90, 100, 120))
    known, (note,) = nvcc.buildable_architectures(thirteen, "")
    assert known == [75]
    assert note == "sm_70 is left out: nvcc 13.0.88 does not know it, nvcc 12.9 or earlier does"
    with pytest.raises(BuildError, match=r"no architecture to build for; sm_70 is left out: .* 12\.9 or earlier does"):
        nvcc.buildable_architectures(thirteen, "7.0")
    eleven = Nvcc("nvcc", "11.7", (70, 75, 80, 86))
    known, (note,) = nvcc.buildable_architectures(eleven, "8.6 12.0")
    assert (known, note) == ([86], "sm_120 is left out: nvcc 11.7 does not know it, nvcc 12.8 or later does")


@pytest.mark.parametrize(("value", "requested"), [(None, ""), ("0", ""), ("", ""), ("1", "1"), ("require", "require")])
def test_finegrain_build_cuda(value: str | None, requested: str) -> None:
    assert nvcc.requested({} if value is None else {"FINEGRAIN_BUILD_CUDA": value}) == requested


def test_finegrain_build_cuda_that_nobody_understands() -> None:
    with pytest.raises(BuildError, match="expected 0, 1 or \"require\", got 'yes'"):
        nvcc.requested({"FINEGRAIN_BUILD_CUDA": "yes"})


def pip_wheel(tmp_path: Path, environment: dict[str, str]) -> tuple[subprocess.CompletedProcess, Path]:
    """What is in the wheel, unpacked."""
    source = tmp_path / "source"  # a build writes beside the sources
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "prebuilt")
    shutil.copytree(ROOT, source, ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--verbose", "--wheel-dir", str(tmp_path / "wheel")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    unpacked = tmp_path / "unpacked"
    for wheel in (tmp_path / "wheel").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    return done, unpacked


def way(unpacked: Path) -> str:
    """As an installed package tells it, in a process of its own."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]; "
        "import finegrain_ops, torch; from finegrain_ops.backends.cuda import machine; "
        "assert finegrain_ops.reweighted_attention(*torch.ones(3, 1, 1, 2, 4)).sum() == 8; "
        "print(finegrain_ops.__file__, machine.way(), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    file, text = done.stdout.splitlines()
    assert file.startswith(str(unpacked))
    return text


def test_install(tmp_path: Path) -> None:
    done, unpacked = pip_wheel(tmp_path, stand_in(tmp_path / "cuda"))
    assert done.returncode == 0, done.stderr
    folder = unpacked / "finegrain_ops" / "backends" / "cuda" / "prebuilt"
    assert {file.stem for file in folder.glob("*.cubin")} == {variant.name for variant in all_variants([70, 75])}
    assert "Prebuilt: sm_70, sm_75 by nvcc 12.9.86." in way(unpacked)


def test_install_with_a_broken_nvcc(tmp_path: Path) -> None:
    environment = stand_in(tmp_path / "cuda", version="echo Hello; exit 0")
    done, unpacked = pip_wheel(tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING: no CUDA C++ kernels were built" in done.stdout + done.stderr
    folder = unpacked / "finegrain_ops" / "backends" / "cuda" / "prebuilt"
    assert [file.name for file in folder.iterdir()] == [prebuilt.MANIFEST]
    assert "Hello" in json.loads((folder / prebuilt.MANIFEST).read_text())["problem"]
    assert "could build none: " in way(unpacked)


def test_install_that_requires_what_cannot_be_built(tmp_path: Path) -> None:
    environment = {**stand_in(tmp_path / "cuda", version="exit 1"), "FINEGRAIN_BUILD_CUDA": "require"}
    done, unpacked = pip_wheel(tmp_path, environment)
    assert done.returncode != 0
    assert "FINEGRAIN_BUILD_CUDA=require, and no kernels were built" in done.stdout + done.stderr
    assert not unpacked.exists()
