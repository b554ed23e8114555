"""Where these tests cannot run, and what they share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def _reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton exists for Linux only"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "the interpreter's process compiles nothing"
    return None


# Without triton the modules cannot even be imported.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("triton") is None else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := _reason():
        for item in items:  # of the whole session
            if _HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
