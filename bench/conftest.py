"""Options of the benchmarks, the device they run on, how long they may take, and what becomes of their rows."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

from . import results
from .cases import SETS, cases_for
from .ceilings import MeasuredCeilings
from .crop_cases import crop_cases_for
from .dualfocus_cases import dualfocus_cases_for
from .generate_cases import generate_cases_for
from .machine import describe_machine
from .measurement import Measurement
from .stand_in import BenchmarkStandIn

_STORE = pytest.StashKey[results.RowStore]()
_START = pytest.StashKey[float]()
_LEFT_OUT = pytest.StashKey[list[str]]()

_IN_TURNS = ("test_attention.py", "test_crop_resize.py", "test_generate.py", "test_dualfocus.py")
_SECONDS = {("cpu", "quick"): 2.0, ("cpu", "full"): 5.0, ("cuda", "quick"): 0.3, ("cuda", "full"): 0.5}


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
    group.addoption(
        "--bench-set",
        choices=SETS,
        default="full",
        help="quick: the most telling cases, under 5 minutes on an H200; full: all of them (default)",
    )
    group.addoption(
        "--bench-budget",
        type=float,
        metavar="SECONDS",
        help="start no new case when the run has taken so long; the cases left out are named",
    )
    group.addoption(
        "--bench-seconds",
        type=float,
        help="how long to sample one case (default: 5 on a CPU, 0.5 on CUDA; of the quick set 2 and 0.3)",
    )
    group.addoption("--bench-rounds", type=int, help="samples of every peer, instead of as many as fit --bench-seconds")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--results-folder") if config.getoption("--save-results") else None
    config.stash[_STORE] = results.RowStore(folder)
    config.stash[_START] = time.monotonic()
    config.stash[_LEFT_OUT] = []


if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark() -> BenchmarkStandIn:
        return BenchmarkStandIn()


def device_type(config: pytest.Config) -> str:
    return config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    finders = {
        "case": cases_for,
        "crop_case": crop_cases_for,
        "generate_case": generate_cases_for,
        "dualfocus_case": dualfocus_cases_for,
    }
    for name, find in finders.items():
        if name in metafunc.fixturenames:
            cases = find(device_type(metafunc.config), metafunc.config.getoption("--bench-set"))
            metafunc.parametrize(name, cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The operators' cases take turns, so that a run that ends early has some of each."""
    first, *others = ([item for item in items if item.path.name == name] for name in _IN_TURNS)
    rest = [item for item in items if item.path.name not in _IN_TURNS]
    in_turns = chain.from_iterable(zip_longest(first, *others))
    items[:] = [*(item for item in in_turns if item is not None), *rest]


@pytest.fixture(autouse=True)
def within_budget(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> None:
    budget = pytestconfig.getoption("--bench-budget")
    if budget is not None and time.monotonic() - pytestconfig.stash[_START] >= budget:
        pytestconfig.stash[_LEFT_OUT].append(request.node.name)
        pytest.skip(f"--bench-budget {budget:g} is used up")


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
def ceilings(device: torch.device) -> MeasuredCeilings:
    return MeasuredCeilings(device)


@pytest.fixture(scope="session")
def seconds_per_case(pytestconfig: pytest.Config) -> float:
    default = _SECONDS[device_type(pytestconfig), pytestconfig.getoption("--bench-set")]
    return pytestconfig.getoption("--bench-seconds") or default


@pytest.fixture(scope="session")
def store(pytestconfig: pytest.Config) -> results.RowStore:
    """Where a benchmark puts its rows. They are printed when all have run, and with --save-results stored at once."""
    return pytestconfig.stash[_STORE]


@pytest.fixture
def measurement(
    benchmark: Any,
    device: torch.device,
    machine: dict,
    store: results.RowStore,
    seconds_per_case: float,
    pytestconfig: pytest.Config,
) -> Measurement:
    return Measurement(benchmark, device, machine, store, seconds_per_case, pytestconfig.getoption("--bench-rounds"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    store, left_out = config.stash[_STORE], config.stash[_LEFT_OUT]
    if left_out:
        terminalreporter.section(f"left out: --bench-budget {config.getoption('--bench-budget'):g} was used up")
        terminalreporter.write_line(", ".join(left_out))
    if not store.rows:
        return
    terminalreporter.section("peers, taken in turns")
    if importlib.util.find_spec("rich") is None:
        terminalreporter.write_line("Their tables need the package rich; `python -m bench.report` prints stored rows.")
    else:
        from . import tables

        terminalreporter.write(tables.as_text(store.rows, terminalreporter._tw.fullwidth))
    if store.folder is not None:
        paths = ", ".join(str(path) for path in store.paths)
        terminalreporter.write_line(f"Appended {len(store.rows)} rows to {paths}")
    else:
        terminalreporter.write_line("Nothing was stored; --save-results appends these rows to bench/results/.")
