"""The tiny models of tests/integrations and tests/methods serve here too. These tests run against transformers 5 and
4.57 as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for _name in ("integrations", "methods"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _name))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small spend their time on handing work to threads, above all where others compute as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
