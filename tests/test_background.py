# SPDX-License-Identifier: Apache-2.0
"""No thread of this package ends unheard: what ends one stops the session on all ranks, by the thread's name."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.crash import build, settings, train, try_ranks

import layerwise_dist
from layerwise_dist import errors
from layerwise_dist._native import BufferPool, PosixEnv
from layerwise_dist.capture import stage
from layerwise_dist.capture.stage import Handover, Stage, StageError
from layerwise_dist.commit.coordinator import Coordinator
from layerwise_dist.commit.keeper import KeeperThread
from layerwise_dist.commit.ledger import Ledger
from layerwise_dist.commit.transports.links import Links
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.commit.transports.proof import Line
from layerwise_dist.engine import assembly
from layerwise_dist.storage import adapter
from layerwise_dist.storage.gathered import GatheredExtent
from layerwise_dist.storage.recycling import Recycler
from layerwise_dist.supervision import background

pytestmark = pytest.mark.quick

SOURCES = Path(layerwise_dist.__file__).parent
# What becomes of a failure in each, and which test here has one. Those of the monitor end its process, of which the
# training process hears.
THREADS = {
    "layerwise-persist": "stops all", "layerwise-coordinator": "stops all", "layerwise-recycle": "stops all",
    "layerwise-end": "stops all", "layerwise-keeper": "stops all", "layerwise-messages": "stops all",
    "layerwise-receive-": "stops this rank (one process only)", "layerwise-stage": "fails the attempt",
    "layerwise-base": "fails the attempts that refer to it", "layerwise-huge-pages": "is logged",
    "layerwise-signals": "stops all", "layerwise-grace": "ends the process",
    "layerwise-flush": "the process ends anyway",
    "layerwise-within": "is raised by who waits", "layerwise-watch": "ends the monitor",
    "layerwise-deadline": "ends the monitor", "layerwise-notices": "is logged", "layerwise-telemetry": "is warned of",
    "layerwise-sink-": "is warned of", "layerwise-free-space": "is logged",
}  # fmt: skip


PATIENCE_S = 60.0


class Boom(BaseException):
    """Of no kind that anybody would expect."""


def boom(*_: Any, **__: Any) -> Any:
    raise Boom("of nobody's")


def test_every_thread_is_started_where_its_end_is_heard() -> None:
    started: set[str] = set()
    for path in SOURCES.rglob("*.py"):
        text = path.read_text()
        if path.parent.name != "bench" and path.name != "background.py":
            assert "threading.Thread(" not in text and "_thread.start_new" not in text, path
        started |= set(re.findall(r"background\.start\(\s*f?\"([a-z-]+)", text))
    assert started == set(THREADS)


@dataclass(frozen=True)
class Case:
    """`where` raises, on the ranks that get there."""

    owner: Any
    where: str
    thread: str
    when: Callable[..., bool] = lambda *_: True


CASES = {
    "persist": Case(adapter.ShardWrite, "persist", "layerwise-persist", lambda write, *_: write.attempt.step == 4),
    "decide": Case(
        Coordinator, "handle", "layerwise-coordinator",
        lambda self, message, now: message["t"] == "durable" and message["step"] == 4,
    ),
    "tick": Case(Coordinator, "tick", "layerwise-coordinator", lambda self, now: bool(self._open)),
    "recycle": Case(Recycler, "_prepare", "layerwise-recycle"),
    "discard": Case(adapter.ShardWrite, "discard", "layerwise-persist"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_what_ends_a_thread_stops_all_ranks_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, world: int
) -> None:
    case = CASES[name]
    real = getattr(case.owner, case.where)

    def raising(*args: Any, **options: Any) -> Any:
        if case.when(*args, **options):
            boom()
        return real(*args, **options)

    monkeypatch.setattr(case.owner, case.where, raising)
    if name == "discard":
        monkeypatch.setattr(adapter.ShardWrite, "persist", lambda write, timeout_s: no_disk())
    steps = [0] * world

    def no_disk() -> Any:
        raise OSError(5, "Input/output error")

    def run(transport: LocalTransport) -> None:
        model, optimizer = build(transport.rank)
        options = settings(
            str(tmp_path), keep_last=1, commit={"on_failure": "warn", "raise_after": 10_000, "timeout_s": 10.0}
        )
        with assembly.assemble(model, optimizer, options, transport, PosixEnv()) as engine:
            for step in engine.steps(5_000):
                train(model, optimizer, transport.rank, 0, step)
                steps[transport.rank] = step

    began = time.monotonic()
    ends = [thread.error for thread in try_ranks(run, world=world, timeout_s=PATIENCE_S)]
    assert time.monotonic() - began < 30
    for error in ends:
        assert isinstance(error, errors.CommitError), error
        assert re.search(rf"rank \d: thread {case.thread}: Boom: of nobody's", str(error)), error
    assert max(steps) < 1_000, "no rank trains for long without checkpoints"


@pytest.mark.slow
def test_mutation_a_thread_that_ends_unheard_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "guarded", lambda name, act, failed: act())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setitem(globals(), "PATIENCE_S", 3.0)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_what_ends_a_thread_stops_all_ranks_by_name(tmp_path, monkeypatch, "persist", 1)


def test_a_failure_of_the_thread_that_serves_connections_ends_all_of_them() -> None:
    ours, theirs = socket.socketpair()
    broken: list[str] = []
    done = threading.Event()
    links = Links({1: Line(ours)})
    links.start(lambda key, body: None, lambda key, why: None, lambda why: (broken.append(why), done.set()))
    links.call(boom)
    assert done.wait(10) and broken == ["thread layerwise-messages: Boom: of nobody's"]
    theirs.settimeout(5)
    assert theirs.recv(1) == b"", "the other end hears of it"
    links.close(1.0)
    theirs.close()


def test_a_keeper_that_fails_lets_go_of_its_directory_and_tells() -> None:
    class Owner:
        released = False

        def let_go(self) -> None:
            self.released = True

    class Keeper:
        rank, owner = 3, Owner()
        handle = staticmethod(boom)

    told: list[str] = []
    keeper = KeeperThread(Keeper(), lambda message: None, told.append)  # type: ignore[arg-type]
    keeper.put({"t": "anything"})
    assert keeper.close(10.0)
    assert told == ["thread layerwise-keeper: Boom: of nobody's"] and Keeper.owner.released


class OnTheirWay:
    """Copies that are not done yet when they are launched, and are their own mark."""

    def copy(self, pairs: Any) -> None:
        pass

    def record(self) -> OnTheirWay:
        return self

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def wait(self, mark: OnTheirWay) -> None:
        pass


def test_a_copy_that_fails_in_any_way_fails_its_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "copies_for", lambda device: OnTheirWay())
    copies, handover = Stage(BufferPool(1 << 16)), Handover()
    extent = GatheredExtent(0, 8, ((0, 0),), ())
    copies.copy(extent, [torch.zeros(2)], boom, handover, time.monotonic() + 10.0)
    with pytest.raises(StageError, match="a staged copy failed: of nobody's"):
        handover.wait(10.0)
    assert copies.close(10.0)


def test_messages_that_cannot_be_taken_stop_this_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ledger.receive
    monkeypatch.setattr(
        Ledger, "receive", lambda self, message: boom() if message["t"] == "committed" else real(self, message)
    )

    def run(transport: LocalTransport) -> None:
        model, optimizer = build(0)
        with assembly.assemble(model, optimizer, settings(str(tmp_path)), transport, PosixEnv()) as engine:
            for step in engine.steps(5_000):
                train(model, optimizer, 0, 0, step)

    (end,) = try_ranks(run, world=1)
    assert isinstance(end.error, errors.CommitError) and "thread layerwise-receive-0: Boom" in str(end.error)


def test_a_system_without_threads_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(OSError, match="no thread layerwise-x .can't start new thread.: see ulimit -u"):
        background.start("layerwise-x", lambda: None, lambda why: None)


def test_a_base_that_fails_in_any_way_fails_the_checkpoints_that_refer_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise_dist.capture.base_writing import Writing

    monkeypatch.setattr(Writing, "_write", boom)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 512), torch.nn.Linear(512, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.raises(errors.CommitError, match="frozen parameters: of nobody's"):
        with layerwise_dist.attach(
            model, optimizer, dir=str(tmp_path), commit={"on_failure": "raise", "timeout_s": 10.0}
        ) as ckpt:
            for _ in ckpt.steps(50):
                model(torch.ones(1, 1024)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(0.01)
