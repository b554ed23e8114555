"""What NVRTC compiled is kept, found again, and replaced where it was damaged."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finegrain_ops.backends.cuda import cache, compiler, machine, sources
from finegrain_ops.backends.cuda.variants import Variant

VARIANT = Variant("attention_map", "half_t", 64, 75)


@pytest.fixture
def compiled(small_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the variants that were compiled, not found."""
    names: list[str] = []
    original = compiler.compile

    def compile_and_note(variant: Variant) -> bytes:
        names.append(variant.name)
        return original(variant)

    monkeypatch.setattr(compiler, "compile", compile_and_note)
    return names


def entry() -> Path:
    (file,) = cache.folder().iterdir()
    return file


def test_found_again(compiled: list[str]) -> None:
    first = machine.image(VARIANT)
    assert first[:4] == b"\x7fELF"
    assert compiled == [VARIANT.name]
    assert entry().name.startswith(VARIANT.name)
    assert machine.image(VARIANT) == first
    assert compiled == [VARIANT.name]


def test_other_variants_have_entries_of_their_own(compiled: list[str]) -> None:
    wider = Variant("attention_map", "half_t", 128, 75)
    assert machine.image(VARIANT) != machine.image(wider)
    assert compiled == [VARIANT.name, wider.name]
    assert len(list(cache.folder().iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[5:],
        lambda content: b"",
        lambda content: b"not machine code",
    ],
    ids=["truncated", "flipped bit", "beginning lost", "empty", "something else"],
)
def test_damaged(compiled: list[str], caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]) -> None:
    first = machine.image(VARIANT)
    entry().write_bytes(damage(entry().read_bytes()))
    assert machine.image(VARIANT) == first
    assert len(compiled) == 2
    assert "is damaged; it is compiled again" in caplog.text
    assert machine.image(VARIANT) == first, "the damaged entry was replaced"
    assert len(compiled) == 2


def test_a_change_of_the_sources(compiled: list[str], small_kernels: Path) -> None:
    first = machine.image(VARIANT)
    header = small_kernels / "primitives.cuh"
    header.write_text(header.read_text() + "// and more\n")
    sources.current_digest.cache_clear()
    machine.image(VARIANT)
    assert len(compiled) == 2
    assert first[:4] == b"\x7fELF"


def test_another_nvrtc(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine.image(VARIANT)
    monkeypatch.setattr(compiler, "version_text", lambda: "99.0")
    machine.image(VARIANT)
    assert len(compiled) == 2


def test_a_folder_that_cannot_be_made(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file is in its place, which stops root too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINEGRAIN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert machine.image(VARIANT) == machine.image(VARIANT)
    assert len(compiled) == 2
    warnings = [r.getMessage() for r in caplog.records if "cannot keep compiled kernels" in r.getMessage()]
    assert len(warnings) == 1, "one for the process, not for each kernel"
    assert "Set FINEGRAIN_CACHE_DIR" in warnings[0]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(compiled: list[str], caplog: pytest.LogCaptureFixture) -> None:
    cache.folder().mkdir()
    cache.folder().chmod(0o500)
    machine.image(VARIANT)
    assert "cannot keep compiled kernels" in caplog.text
    assert list(cache.folder().iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    assert machine.image(VARIANT)[:4] == b"\x7fELF"
    assert "No space left on device" in caplog.text
    assert list(cache.folder().iterdir()) == []


def test_no_home(compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FINEGRAIN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert machine.image(VARIANT)[:4] == b"\x7fELF"
    assert "Could not determine home directory" in caplog.text


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("FINEGRAIN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "finegrain_ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "finegrain_ops"


def test_the_first_compilation_is_announced_once(compiled: list[str], caplog: pytest.LogCaptureFixture) -> None:
    machine.image(VARIANT)
    machine.image(Variant("attention_map", "half_t", 128, 75))
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == (
        f"finegrain_ops: compiling attention_map for sm_75 with NVRTC {compiler.version_text()} "
        f"(cached in {cache.folder()})"
    )


def test_the_announcement_is_visible_without_any_setup() -> None:
    code = (
        "from finegrain_ops.backends.cuda import machine; from finegrain_ops.backends.cuda.variants import Variant; "
        "[machine.image(Variant('merge_splits', element, 128, 75)) for element in ('half_t', 'float')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stderr.splitlines() if "finegrain_ops" in line]
    assert line.startswith("finegrain_ops: compiling merge_splits for sm_75 with NVRTC")
    assert len(list(cache.folder().iterdir())) == 2


def _image_in_a_process(barrier, results, source_folder: Path) -> None:
    sources.folder = lambda: source_folder
    barrier.wait(timeout=120)
    results.put(machine.image(VARIANT))


def test_two_processes_at_once(small_kernels: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_image_in_a_process, args=(barrier, results, small_kernels)) for _ in range(2)]
    for process in processes:
        process.start()
    images = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert images[0] == images[1] == machine.image(VARIANT)
    assert entry().suffix == ".cubin", "one entry, and nothing temporary"
