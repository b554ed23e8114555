"""Options of the benchmarks, the device they run on, and what becomes of their rows."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import report, results
from .cases import cases_for
from .machine import describe_machine

_ROWS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("finegrain_ops benchmarks")
    group.addoption(
        "--save-results", action="store_true", help="append the rows to bench/results/ (default: only print)"
    )
    group.addoption("--results-folder", type=Path, default=results.RESULTS, help="where --save-results appends")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption(
        "--bench-threads", type=int, help="torch's threads (default: 2 on a CPU, torch's own choice on CUDA)"
    )
    group.addoption("--bench-seconds", type=float, default=5.0, help="how long to sample one case (default: 5)")
    group.addoption("--bench-rounds", type=int, help="samples of every peer, instead of as many as fit --bench-seconds")


def device_type(config: pytest.Config) -> str:
    return config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = cases_for(device_type(metafunc.config))
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Iterator[torch.device]:
    kind = device_type(pytestconfig)
    threads, before = pytestconfig.getoption("--bench-threads"), torch.get_num_threads()
    if threads or kind == "cpu":
        torch.set_num_threads(threads or 2)
    yield torch.device(kind, 0 if kind == "cuda" else None)
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def machine(device: torch.device, pytestconfig: pytest.Config) -> dict:
    return describe_machine(device, "python -m pytest " + shlex.join(pytestconfig.invocation_params.args))


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> list[dict]:
    """Where a benchmark puts its rows. They are printed, and stored if asked for, when all have run."""
    return pytestconfig.stash.setdefault(_ROWS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    terminalreporter.section("peers, taken in turns")
    terminalreporter.write(report.as_text(rows, terminalreporter._tw.fullwidth))
    if config.getoption("--save-results"):
        paths = ", ".join(str(path) for path in results.append(rows, config.getoption("--results-folder")))
        terminalreporter.write_line(f"Appended {len(rows)} rows to {paths}")
    else:
        terminalreporter.write_line("Nothing was stored; --save-results appends these rows to bench/results/.")
