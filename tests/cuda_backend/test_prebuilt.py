"""Machine code that came with the install is used where it matches, and never where it does not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from finegrain_ops.backends.cuda import compiler, machine, prebuilt, sources
from finegrain_ops.backends.cuda.prebuilt import Manifest
from finegrain_ops.backends.cuda.variants import Variant, all_variants


def image_of(variant: Variant) -> bytes:
    return f"prebuilt {variant.name}".encode()


def install(*architectures: int, digest: str | None = None) -> Path:
    folder = prebuilt.folder()
    folder.mkdir(exist_ok=True)
    cubins = {}
    for variant in all_variants(architectures):
        (folder / f"{variant.name}.cubin").write_bytes(image_of(variant))
        cubins[variant.name] = hashlib.sha256(image_of(variant)).hexdigest()
    Manifest("12.9.86", digest or sources.current_digest(), list(architectures), "", cubins).write(folder)
    prebuilt._manifest.cache_clear()
    return folder


def map_variant(architecture: int) -> Variant:
    return Variant("attention_map", "half_t", 64, architecture)


def test_found_without_any_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(variant: Variant) -> bytes:
        raise AssertionError("compiled")

    install(70, 75)
    monkeypatch.setattr(compiler, "compile", never)
    for architecture in (70, 75):
        for variant in all_variants([architecture]):
            assert machine.image(variant) == image_of(variant)


@pytest.mark.parametrize(
    ("built_for", "architecture", "used"),
    [
        ((70, 75), 75, 75),
        ((70,), 72, 70),
        ((70,), 75, None),  # it would run, with matrix instructions that are slow there
        ((75,), 70, None),
        ((80,), 86, 80),
        ((80, 86), 89, 86),
        ((86,), 80, None),
        ((80, 86, 89), 90, None),
        ((90,), 80, None),
        ((120,), 121, 120),
    ],
)
def test_which_architecture_serves_which(built_for: tuple[int, ...], architecture: int, used: int | None) -> None:
    install(*built_for)
    loaded = prebuilt.load(map_variant(architecture))
    if used is None:
        assert loaded is None
        reason = prebuilt.why_not(architecture)
        assert reason is not None
        assert f"built for {', '.join(f'sm_{a}' for a in built_for)}" in reason
        assert f"TORCH_CUDA_ARCH_LIST={architecture // 10}.{architecture % 10} FINEGRAIN_BUILD_CUDA=1" in reason
    else:
        assert loaded == image_of(map_variant(used))
        assert prebuilt.why_not(architecture) is None


def test_none_were_built() -> None:
    assert prebuilt.load(map_variant(70)) is None
    assert prebuilt.why_not(70) == "none, which is what 'FINEGRAIN_BUILD_CUDA=1 pip install .' is for"


def test_built_from_other_sources() -> None:
    install(70, digest="0" * 64)
    assert prebuilt.load(map_variant(70)) is None
    reason = prebuilt.why_not(70)
    assert reason is not None
    assert "built from other sources or tiles; build them anew with: FINEGRAIN_BUILD_CUDA=1" in reason


def test_a_change_of_the_tiles_is_one_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources.digest(sources.folder())
    shared_bytes = Variant.shared_bytes.func
    monkeypatch.setattr(Variant, "shared_bytes", property(lambda variant: shared_bytes(variant) + 16))
    assert sources.digest(sources.folder()) != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"nvcc": "12.9"}', '{"unknown": 1}'])
def test_a_damaged_manifest(content: str) -> None:
    folder = install(70)
    (folder / prebuilt.MANIFEST).write_text(content)
    prebuilt._manifest.cache_clear()
    assert prebuilt.load(map_variant(70)) is None
    reason = prebuilt.why_not(70)
    assert reason is not None
    assert "manifest.json is damaged" in reason
    assert "install again with" in reason


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"prebuilt atten"), lambda file: file.unlink()])
def test_damaged_machine_code(
    damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning, and NVRTC compiles it instead."""
    folder = install(75)
    monkeypatch.setattr(compiler, "compile", lambda variant: b"compiled")
    damage(folder / f"{map_variant(75).name}.cubin")
    assert machine.image(map_variant(75)) == b"compiled"
    assert "compiling it now" in caplog.text
    other = Variant("attention_map", "half_t", 128, 75)
    assert machine.image(other) == image_of(other), "the others are still used"


def test_the_reason_that_the_build_left(pretend_gpu: Callable[..., None]) -> None:
    prebuilt.folder().mkdir()
    Manifest("", "", [], "nvcc was not found").write(prebuilt.folder())
    pretend_gpu(75)
    assert "FINEGRAIN_BUILD_CUDA=1 could build none: nvcc was not found" in machine.way()
