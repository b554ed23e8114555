"""These tests run twice, against transformers 5 and 4.57; each process says which."""

from __future__ import annotations

import transformers


def pytest_report_header() -> str:
    return f"transformers {transformers.__version__}"
