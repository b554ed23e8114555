"""The tiny models of tests/integrations serve here too. These tests run against transformers 5 and 4.57 as well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))


@pytest.fixture(scope="module")
def model() -> Any:
    """The tiny LLaVA that can be made to talk; some test files have another one in its place."""
    import talking_llava

    return talking_llava.make_model()


@pytest.fixture(scope="module")
def processor() -> Any:
    import talking_llava

    return talking_llava.make_processor()
