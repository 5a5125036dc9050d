# SPDX-License-Identifier: Apache-2.0
"""What all tests share: `--long`, and jobs that never outlive their test."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

pytest.register_assert_rewrite("kit")

from kit import drawing, swept  # noqa: E402
from kit.runners import DEEPSPEED, Running, Warm  # noqa: E402

from layerwise_dist.engine import at_exit  # noqa: E402

STARTERS = {"warm", "zero", "start"}  # fixtures that start processes of several ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="full sweeps instead of samples of them")
    parser.addoption("--soak-minutes", type=float, help="of the storm in test_soak.py: 60 with --long, else a tenth")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A full sweep may take an hour; the deadline of a test is for one that hangs."""
    soak_s = 60 * _soak_minutes(config)
    operator = Path(DEEPSPEED["TORCH_EXTENSIONS_DIR"], "deepspeed_shm_comm", "deepspeed_shm_comm.so")
    mark_jobs(items)
    for item in items:
        if "soak_minutes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(3 * soak_s + 210), append=False)
        elif config.getoption("--long"):
            item.add_marker(pytest.mark.timeout(3600), append=False)
        elif "zero" in getattr(item, "fixturenames", ()) and not operator.exists():
            item.add_marker(pytest.mark.timeout(600), append=False)  # DeepSpeed compiles it within the first of these


def mark_jobs(items: list[pytest.Item]) -> None:
    for item in items:
        if STARTERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.jobs)


def _soak_minutes(config: pytest.Config) -> float:
    asked = config.getoption("--soak-minutes")
    return asked if asked is not None else 60.0 if config.getoption("--long") else 1 / 10


@pytest.fixture(scope="session")
def soak_minutes(request: pytest.FixtureRequest) -> float:
    return _soak_minutes(request.config)


def pytest_collection_finish() -> None:
    """Torch and its kin are half a million objects: without this each of a test's collections takes half a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Engines that tests left as a crash would are not to be waited for."""
    for engine in at_exit.open_engines():
        at_exit.closed(engine)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.keys() & {"failed", "error"}:
        terminalreporter.write_line(f"LAYERWISE_TEST_SEED={drawing.SEED} draws the same cases")
    lines = swept.summary(terminalreporter.stats)
    if lines and terminalreporter.config.getoption("--long"):
        terminalreporter.write_sep("=", "what the sweeps came to")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def told(request: pytest.FixtureRequest) -> swept.Told:
    """Takes what a sweep came to. With `--long` it is told at the end of the run."""
    return swept.Told(request.node)


@pytest.fixture
def traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of files that Python would import from the working directory. `sprung` is there once one was."""
    folder = tmp_path_factory.mktemp("traps")
    for name in ("json", "socket", "torch", "numpy", "layerwise_dist"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'sprung')!r}, 'w').close()\nraise SystemExit(3)\n")
    return folder


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the full sweeps were asked for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts a command in the background: `start([...], env=...)`; killed when the test ends, if it still runs."""
    running: list[Running] = []

    def begin(command: list[str], env: Mapping[str, str] | None = None) -> Running:
        running.append(Running(command, env))
        return running[-1]

    yield begin
    for job in running:
        job.close()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Jobs under torchrun's agent without the cost of importing torch anew (see tests/jobs/warm.py)."""
    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def zero(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """As `warm`, for jobs that need DeepSpeed (see tests/jobs/zero_ready.py)."""
    server = Warm(tmp_path_factory.mktemp("zero"), "zero_ready", env=DEEPSPEED, out_of=warm)
    yield server
    server.close()
