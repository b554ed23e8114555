"""What the benchmarks use of pytest-benchmark's fixture, for a machine without it. The stored rows are the same: their
times are taken by sampling.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class BenchmarkStandIn:
    disabled = False

    def __init__(self) -> None:
        self.group: str | None = None
        self.extra_info: dict[str, Any] = {}

    def pedantic(
        self,
        call: Callable[[], object],
        setup: Callable[[], object] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
    ) -> None:
        for _ in range(warmup_rounds + rounds):
            if setup is not None:
                setup()
            call()
