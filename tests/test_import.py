"""What an import brings along, from where it works, and that `kernels` stays the name of the Hugging Face package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Without the finder that an editable install leaves in site-packages: as if nothing were installed.
NOT_INSTALLED = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]; "
USE = (
    "import finegrain_ops, torch; "
    "from finegrain_ops.kernels import tuning; "
    "from finegrain_ops.integrations import patching; "
    "assert finegrain_ops.reweighted_attention(*torch.ones(3, 1, 1, 2, 4)).sum() == 8; "
    "print(finegrain_ops.__file__, tuning.__file__, patching.__file__, sep='\\n')"
)


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lean() -> None:
    """Neither triton nor NVRTC (torch imports the rest of cuda.bindings) nor transformers, nor what only the command
    line needs.
    """
    heavy = "('triton', 'cuda.bindings.nvrtc', 'transformers', 'rich', 'matplotlib')"
    code = f"import finegrain_ops, sys; print([m for m in {heavy} if m in sys.modules])"
    assert python(code, ROOT, ROOT).strip() == "[]"


def test_a_call_on_a_cpu_imports_no_triton() -> None:
    call = "finegrain_ops.reweighted_attention(*torch.ones(3, 1, 1, 2, 4))"
    code = f"import finegrain_ops, sys, torch; {call}; print('triton' in sys.modules)"
    assert python(code, ROOT, ROOT).strip() == "False"


def test_uninstalled_checkout(tmp_path: Path) -> None:
    for cwd, path in ((ROOT, None), (tmp_path, ROOT)):
        files = python(NOT_INSTALLED + ("sys.path.insert(0, ''); " if path is None else "") + USE, cwd, path).split()
        assert files == [
            str(ROOT / f) for f in ("finegrain_ops/__init__.py", "kernels/tuning.py", "integrations/patching.py")
        ]


def test_wheel(tmp_path: Path) -> None:
    """Builds without a compiler, a GPU or torch in the build environment; holds every module, the small model's weights
    and py.typed, and nothing else.
    """
    source = tmp_path / "source"  # a build writes beside the sources
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    sources = {f"finegrain_ops/{p.relative_to(ROOT / 'finegrain_ops')}" for p in (ROOT / "finegrain_ops").rglob("*.py")}
    for folder in ("kernels", "integrations"):
        sources |= {f"finegrain_ops/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}
    sources |= {f"finegrain_ops/{p.relative_to(ROOT)}" for p in (ROOT / "csrc").rglob("*.cuh")}
    weights = ROOT / "finegrain_ops" / "tiny_llava" / "weights"
    sources |= {str(p.relative_to(ROOT)) for p in weights.iterdir()}
    packed = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file() and ".dist-info" not in str(p)}
    assert packed == sources | {"finegrain_ops/py.typed"}
    files = python(NOT_INSTALLED + USE, tmp_path, installed).split()
    assert all(file.startswith(str(installed)) for file in files)
    load = "from finegrain_ops.tiny_llava import checkpoint; checkpoint.load(); print(checkpoint.WEIGHTS)"
    found = python(f"{NOT_INSTALLED}import transformers; {load}", tmp_path, installed)
    assert found.strip() == str(installed / "finegrain_ops" / "tiny_llava" / "weights")


def test_our_folders_do_not_shadow_other_packages() -> None:
    """With the repository's root first on the path, `kernels` is Hugging Face's, and transformers works with it."""
    pytest.importorskip("kernels", reason="the Hugging Face package is part of the test requirements")
    code = (
        "import sys; sys.path.insert(0, ''); import kernels; from transformers import LlavaForConditionalGeneration; "
        "import finegrain_ops.kernels.tuning; print(kernels.__file__)"
    )
    assert "site-packages" in python(code, ROOT)
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "integrations" / "__init__.py").exists()
