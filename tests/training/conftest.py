"""The tiny models of tests/integrations and tests/methods serve here too. These tests run against transformers 5 and
4.57 as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

for _name in ("integrations", "methods"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _name))
