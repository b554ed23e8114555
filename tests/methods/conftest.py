"""The tiny models of tests/integrations serve here too. These tests run against transformers 5 and 4.57 as well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
