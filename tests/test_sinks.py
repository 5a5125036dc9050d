# SPDX-License-Identifier: Apache-2.0
"""A sink of telemetry that hangs holds up neither the training nor another sink, and what it misses is counted. A disk
that does not say what is free holds up no event.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.crash import build, train

import layerwise_dist as lwd
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.telemetry import free_space, recorder, sinks
from layerwise_dist.telemetry.assembling import Assembler, Boundary, GivenUp, Measures
from layerwise_dist.telemetry.free_space import FreeSpace
from layerwise_dist.telemetry.recorder import Telemetry
from layerwise_dist.telemetry.sinks import SinkThread

torch.set_num_threads(1)

EVENTS = {"events": "events.jsonl"}


class Gate:
    """A sink whose disk does not answer until `open` is set."""

    name = "gate"

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self.told: list[dict[str, Any]] = []

    def write(self, event: dict[str, Any]) -> None:
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        self.open.wait()
        self.told.append(event)

    def close(self) -> None: ...

    def leave_to_parent(self) -> None: ...


class Free:
    """A sink that takes everything at once."""

    name = "free"

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.closed = threading.Event()

    def write(self, event: dict[str, Any]) -> None:
        self.told.put(event)

    def close(self) -> None:
        self.closed.set()

    def leave_to_parent(self) -> None: ...


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    sink = Gate()
    monkeypatch.setattr("layerwise_dist.telemetry.opening.EventsFile", lambda *_: sink)
    monkeypatch.setattr(sinks, "_MOST_EVENTS", 5)
    yield sink
    sink.open.set()


def events_of_a_run(root: Path) -> tuple[int, int]:
    """The most events that waited, and how many were lost, of a run whose sink does not answer."""
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(root), telemetry=EVENTS, commit={"timeout_s": 5.0}) as ckpt:
        telemetry = workings_of(ckpt).telemetry
        assert telemetry is not None
        for step in ckpt.steps(20):
            train(model, optimizer, 0, 0, step)
        ckpt.wait(20)
        telemetry.close(0.0)  # close() of the engine would wait for its deadline
        telemetry._thread.join(30)  # which hands on all that was noted
        most = telemetry._sinks[0]._events.qsize()
    return most, ckpt.stats()["telemetry_lost"]


def test_a_sink_that_hangs_holds_nothing_up_and_takes_bounded_memory(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        most, lost = events_of_a_run(tmp_path)
    assert gate.threads == {"layerwise-sink-gate"}
    assert most <= 5 + 2 and lost > 0, "the last event and the end come on top"
    said = [record.getMessage() for record in caplog.records]
    assert sum("telemetry (gate): 5 events wait for it" in text for text in said) == 1
    assert any("telemetry (gate) was not written within" in text for text in said)


def test_mutation_a_queue_without_a_bound_is_caught(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SinkThread, "put", lambda self, event: self._events.put(event))
    most, _ = events_of_a_run(tmp_path)
    assert most > 5 + 2


def test_mutation_a_thread_that_trains_and_writes_is_caught(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open.set()

    def at_once(self: Telemetry, note: Any) -> None:
        for event in self._assembler.take(note, time.monotonic()):
            self._write(event, time.monotonic())

    monkeypatch.setattr(Telemetry, "_put", at_once)
    monkeypatch.setattr(SinkThread, "put", lambda self, event: self._write(event))
    events_of_a_run(tmp_path)
    assert gate.threads != {"layerwise-sink-gate"}


def made(facts: Callable[[], Measures] = dict) -> Assembler:
    return Assembler(1, lambda: Boundary(0, 0.0), facts)


def note(telemetry: Telemetry, seq: int) -> None:
    telemetry._put(GivenUp(seq, seq, "skipped", "full"))


@pytest.mark.quick
def test_a_sink_that_hangs_stops_no_other_and_what_it_missed_is_counted(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    free = Free()
    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        telemetry = Telemetry(made(), 0, [gate, free], {})
        assert gate.entered.wait(30) and free.told.get(timeout=30)["event"] == "start"
        for seq in range(1, 21):
            note(telemetry, seq)
            assert free.told.get(timeout=30)["seq"] == seq
        assert gate.told == [] and telemetry.events_written == 0
        closing = threading.Thread(target=telemetry.close, args=(60.0,))
        closing.start()
        assert free.closed.wait(30) and closing.is_alive(), "only the one at the gate is waited for"
        gate.open.set()
        closing.join(30)
    last = free.told.get(timeout=30)
    assert (last["event"], last["events"], last["lost"]) == ("end", 21, 0)
    assert [event["event"] for event in gate.told] == ["start", *["checkpoint"] * 5, "end"]
    assert (gate.told[-1]["events"], gate.told[-1]["lost"]) == (6, 15)
    assert (telemetry.events_written, telemetry.events_lost) == (7, 15)
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if "(free)" in text] == []
    assert ["5 events wait" in text or "15 events were lost" in text for text in said] == [True, True]


def test_mutation_one_thread_for_all_sinks_is_caught(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SinkThread, "put", lambda self, event: self._write(event))
    free = Free()
    telemetry = Telemetry(made(), 0, [gate, free], {})
    with pytest.raises(queue.Empty):
        free.told.get(timeout=0.2)
    gate.open.set()
    telemetry.close(30)


@pytest.mark.quick
def test_notes_are_bounded_where_the_thread_that_takes_them_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_MOST_NOTES", 5)
    asked, answer = threading.Event(), threading.Event()

    def facts() -> Measures:
        asked.set()
        answer.wait()
        return {}

    free = Free()
    telemetry = Telemetry(made(facts), 0, [free], {})
    note(telemetry, 1)
    assert asked.wait(30)
    for seq in range(2, 12):
        note(telemetry, seq)
    answer.set()
    telemetry.close(30)
    assert (telemetry.events_written, telemetry.events_lost) == (1 + 6 + 1, 5)


@pytest.mark.quick
def test_a_sink_whose_thread_ends_is_warned_of_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    class Exits(Free):
        name = "exits"

        def write(self, event: dict[str, Any]) -> None:
            raise SystemExit("of nobody's")

    exits, free = Exits(), Free()
    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        telemetry = Telemetry(made(), 0, [exits, free], {})
        assert exits.closed.wait(30)
        note(telemetry, 1)
        telemetry.close(30)
    assert [free.told.get(timeout=30)["event"] for _ in range(3)] == ["start", "checkpoint", "end"]
    assert telemetry.events_written == 0 and telemetry.events_lost > 0
    assert any(
        "telemetry (exits) has ended: thread layerwise-sink-exits: SystemExit" in r.getMessage() for r in caplog.records
    )


# -- the disk of the checkpoints ---------------------------------------------------------------------------------------


class Disk:
    """It says how much is `left` on it, while `open` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.asked, self.left = 0, 1000

    def free_bytes(self, directory: str) -> int:
        self.asked += 1
        self.open.wait()
        return self.left


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Nobody has patience with it once it is shut: what is not there at once does not come."""
    made = Disk()
    monkeypatch.setattr(free_space, "free_bytes", made.free_bytes)
    yield made
    made.open.set()


def shut(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_space, "_PATIENCE_S", 0.0)
    disk.open.clear()


@pytest.mark.quick
def test_a_disk_that_does_not_say_what_is_free_stops_no_event(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    free, space = Free(), FreeSpace("anywhere")
    telemetry = Telemetry(made(space.measures), 0, [free], {})
    assert free.told.get(timeout=30)["event"] == "start"

    def told(seq: int) -> tuple[int, float]:
        note(telemetry, seq)
        event = free.told.get(timeout=30)
        assert event["seq"] == seq
        return event["disk_free_bytes"], event["disk_free_age_s"]

    assert told(1)[0] == 1000
    shut(disk, monkeypatch)
    disk.left = 500
    aged = [told(seq) for seq in range(2, 22)]
    assert {nbytes for nbytes, _ in aged} == {1000} and aged == sorted(aged), "the last answer, older each time"
    disk.open.set()
    assert space._question is not None
    space._question.join(30)
    assert disk.asked == 2, "one question waited for its answer, however often it was looked for"
    assert told(22)[0] == 500
    telemetry.close(30)


def test_a_run_on_a_disk_that_never_says_what_is_free_is_told_to_its_end(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut(disk, monkeypatch)
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(tmp_path), telemetry=EVENTS) as ckpt:
        for step in ckpt.steps(5):
            train(model, optimizer, 0, 0, step)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "checkpoint"]
    assert [event["step"] for event in told] == [1, 2, 3, 4, 5] and events[-1]["event"] == "end"
    assert {(event["disk_free_bytes"], event["disk_free_age_s"]) for event in told} == {(None, None)}
    assert disk.asked <= 1 and ckpt.stats()["telemetry_lost"] == 0


def test_mutation_a_disk_that_is_asked_by_the_thread_that_tells_is_caught(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut(disk, monkeypatch)
    monkeypatch.setattr(FreeSpace, "measures", lambda self: {"disk_free_bytes": disk.free_bytes(self._directory)})
    free = Free()
    telemetry = Telemetry(made(FreeSpace("anywhere").measures), 0, [free], {})
    assert free.told.get(timeout=30)["event"] == "start"
    note(telemetry, 1)
    with pytest.raises(queue.Empty):
        free.told.get(timeout=0.2)
    disk.open.set()
    telemetry.close(30)


@pytest.mark.quick
def test_a_disk_with_an_error_has_no_bytes_and_no_age(tmp_path: Path) -> None:
    there, gone = FreeSpace(str(tmp_path)).measures(), FreeSpace(str(tmp_path / "gone")).measures()
    assert there["disk_free_bytes"] and there["disk_free_age_s"] is not None
    assert gone == {"disk_free_bytes": None, "disk_free_age_s": None}
