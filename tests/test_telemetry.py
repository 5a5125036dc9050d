# SPDX-License-Identifier: Apache-2.0
"""Telemetry tells what happened to each checkpoint, under the names of its page. Training only appends notes."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
import types
import urllib.request
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import telemetry_page
import torch
from kit.crash import build, in_ranks, settings, tensors_of, train

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.telemetry.assembling import Assembler, Began, Boundary, Captured, GivenUp, Reached, Stalled
from layerwise_dist.telemetry.events_file import EventsFile
from layerwise_dist.telemetry.names import CHECKPOINT, COMMON, FIELDS, MEASURES

torch.set_num_threads(1)

DOCS = Path(__file__).parent.parent / "docs"
EVENTS = {"events": "events.jsonl"}


def lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [event for event in found if kind in (None, event["event"])]


def run(root: Path, steps: int, world: int = 1, env: Any = None, **config: Any) -> list[Any]:
    """Trains; by rank, what stats() says and what was trained."""

    def body(transport: LocalTransport) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        model, optimizer = build(transport.rank)
        options = settings(str(root), **{"telemetry": EVENTS, **config})
        with assembly.assemble(model, optimizer, options, transport, env or PosixEnv()) as ckpt:
            ckpt.restore()
            for step in ckpt.steps(steps):
                train(model, optimizer, transport.rank, 0, step)
        return ckpt.stats(), tensors_of(model, optimizer)

    return in_ranks(body, world=world)


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_page_has_the_names_that_the_code_has() -> None:
    for table in telemetry_page.tables():
        assert table in (DOCS / "tables" / "telemetry.md").read_text()


def test_mutation_a_name_that_the_page_does_not_know_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(telemetry_page.CHECKPOINT, "new_s", "something")
    with pytest.raises(AssertionError):
        test_the_page_has_the_names_that_the_code_has()


def test_weights_and_biases_takes_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the package, which only takes notes."""
    logged: list[dict[str, Any]] = []
    stand_in = types.ModuleType("wandb")
    vars(stand_in).update(init=lambda project: None, log=logged.append, alert=lambda title, text: None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    model, optimizer = build(0)
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    (code,) = re.findall(r"```python\n(import wandb.*?)```", (DOCS / "telemetry.md").read_text(), re.DOTALL)
    exec(code, {"ckpt": ckpt, "total": 3, "train": lambda: train(model, optimizer, 0, 0, ckpt.completed)})
    ckpt.close()
    assert [each["checkpoint/step"] for each in logged if "checkpoint/step" in each] == [1, 2, 3]
    assert any(each.get("checkpoint/captures") == 0 for each in logged)


# -- what is told ------------------------------------------------------------------------------------------------------


def test_each_rank_tells_of_each_checkpoint_what_stats_sums_up(tmp_path: Path) -> None:
    results = run(tmp_path, 5, world=2)
    for rank, (stats, _) in enumerate(results):
        events = lines(tmp_path / ("events.jsonl" if rank == 0 else "events.00001.jsonl"))
        assert [event["event"] for event in events if event["event"] != "progress"] == [
            "start", *["checkpoint"] * 5, "end",
        ]  # fmt: skip
        for event in events:
            assert set(event) == {*COMMON, *FIELDS[event["event"]]} and event["rank"] == rank
        told = [event for event in events if event["event"] == "checkpoint"]
        assert [event["step"] for event in told] == [1, 2, 3, 4, 5]
        for event in told:
            unknown = {name for name, value in event.items() if value is None}
            assert unknown == {"reason", *(set() if rank == 0 else {"slowest_rank", "slowest_behind_s"})}
            assert event["outcome"] == "committed"
            assert 0 <= event["staged_s"] <= event["durable_s"] <= event["committed_s"]
            assert 0 < event["write_s"] <= event["durable_s"]
            assert event["gb_per_s"] == pytest.approx(event["shard_bytes"] / event["write_s"] / 1e9)
            assert event["shard_bytes"] >= event["state_bytes"] == stats["state_bytes"]
            assert event["pool_bytes"] == stats["pool_bytes"] and event["disk_free_bytes"] > 0
            assert 0 <= event["lag_steps"] <= 2
        for part in ("open", "seal", "settle", "fence"):
            total = sum(event[f"stall_{part}_s"] for event in told)
            assert total <= stats[f"stall_{part}_s"] + 1e-6
        assert 0 < sum(event["stall_s"] for event in told) <= stats["stall_s"] + 1e-6
        assert (stats["telemetry_events"], stats["telemetry_lost"]) == (len(events), 0)
        assert events[-1]["lost"] == 0 and events[-1]["events"] == len(events) - 1
    assert {event["slowest_rank"] for event in lines(tmp_path / "events.jsonl", "checkpoint")} <= {0, 1}


def test_failures_skips_and_the_end_are_told_with_their_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, go_on, real = testing.FaultEnv(PosixEnv()), threading.Event(), CheckpointMetadataManager.commit

    def commit(self: CheckpointMetadataManager, manifest: Any) -> None:
        assert go_on.wait(30)
        real(self, manifest)

    monkeypatch.setattr(CheckpointMetadataManager, "commit", commit)

    def body(transport: LocalTransport) -> None:
        model, optimizer = build(0)
        options = settings(
            str(tmp_path), telemetry=EVENTS, max_in_flight=1, when_full="skip", commit={"raise_after": 1}
        )
        ckpt = assembly.assemble(model, optimizer, options, transport, broken)
        with pytest.raises(errors.CommitError), ckpt:
            for step in ckpt.steps(10_000):
                if step == 2:  # which was due while the first was on its way
                    go_on.set()
                    ckpt.wait(1)
                    broken.fail(operation="sync", path_pattern="*rank_00000*", errno=5)
                if step == 3:
                    with pytest.raises(errors.CommitError):
                        ckpt.wait(3)
                train(model, optimizer, 0, 0, step)

    in_ranks(body, world=1)
    told = {event["step"]: event for event in lines(tmp_path / "events.jsonl", "checkpoint")}
    assert told[1]["outcome"] == "committed" and told[1]["reason"] is None
    assert told[2]["outcome"] == "skipped" and "when_full" in told[2]["reason"] and told[2]["stall_s"] is None
    assert told[3]["outcome"] == "failed" and "Input/output error" in told[3]["reason"]
    (stopped,) = lines(tmp_path / "events.jsonl", "stopped")
    assert "step 3" in stopped["reason"]


def test_another_session_goes_on_in_the_file_and_tells_where_it_began(tmp_path: Path) -> None:
    run(tmp_path, 2)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"layerwise":1,"ti')  # a job that was killed within a line
    run(tmp_path, 4)
    found = (tmp_path / "events.jsonl").read_text().splitlines()
    assert sum(line == '{"layerwise":1,"ti' for line in found) == 1
    events = [json.loads(line) for line in found if line != '{"layerwise":1,"ti']
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [1, 2, 3, 4]
    assert [event["epoch"] for event in events if event["event"] == "start"] == [1, 2]
    assert [event["step"] for event in events if event["event"] == "restore"] == [2]


def test_a_monitor_s_commits_are_told_by_the_training_process(tmp_path: Path) -> None:
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(tmp_path), mode="monitor", telemetry=EVENTS) as ckpt:
        for step in ckpt.steps(2):
            train(model, optimizer, 0, 0, step)
    told = lines(tmp_path / "events.jsonl", "checkpoint")
    assert [(event["step"], event["outcome"]) for event in told] == [(1, "committed"), (2, "committed")]
    assert all(event["committed_s"] > 0 and event["stall_s"] > 0 and event["slowest_rank"] is None for event in told)


def made(passed: list[Boundary]) -> Assembler:
    return Assembler(1, lambda: passed[-1], dict)


@pytest.mark.quick
def test_an_event_comes_once_the_checkpoint_is_decided_and_its_stall_is_known() -> None:
    for stall_first in (True, False):
        assembler = made([Boundary(0, 0.0), Boundary(3, 9.0)])
        stall = Stalled(7, {"open": 1.0, "seal": 0.5, "settle": 0.0, "fence": 0.25})
        notes = [
            (Began(AttemptId(1, 7, 2)), 2.0), (Captured(AttemptId(1, 7, 2), 10, Boundary(2, 5.0)), 5.0),
            *[(stall, 6.0)] * stall_first, (Reached(7, 2, "committed"), 8.0), *[(stall, 8.5)] * (not stall_first),
        ]  # fmt: skip
        told = [event for note, at in notes for event in assembler.take(note, at)]
        assert len(told) == 1 and set(told[0]) - {"event"} == set(CHECKPOINT)
        assert (told[0]["stall_s"], told[0]["committed_s"]) == (1.75, 6.0)
        assert (told[0]["lag_steps"], told[0]["lag_s"]) == (1, 4.0)


@pytest.mark.quick
def test_of_two_checkpoints_of_one_update_the_newest_has_its_stall() -> None:
    assembler = made([Boundary(2, 0.0)])
    for seq in (1, 2):
        assembler.take(Began(AttemptId(1, seq, 2)), 0.0)
        assembler.take(Captured(AttemptId(1, seq, 2), 1, Boundary(2, 0.0)), 0.0)
        assembler.take(Reached(seq, 2, "committed"), 1.0)
    told = assembler.take(Stalled(2, dict.fromkeys(("open", "seal", "settle", "fence"), 1.0)), 2.0)
    assert [(event["seq"], event["stall_s"]) for event in told] == [(1, 0.0), (2, 4.0)]


@pytest.mark.quick
def test_what_another_rank_ended_while_it_was_captured_here_is_told_once() -> None:
    assembler, attempt = made([Boundary(0, 0.0)]), AttemptId(1, 3, 8)
    assembler.take(Began(attempt), 1.0)
    (failed,) = assembler.take(GivenUp(3, 8, "failed", "rank 1"), 2.0)
    assert (failed["outcome"], failed["stall_s"]) == ("failed", None)
    assembler.take(Captured(attempt, 1, Boundary(8, 3.0)), 3.0)
    assert assembler.take(Stalled(3, dict.fromkeys(("open", "seal", "settle", "fence"), 1.0)), 4.0) == []
    assert assembler.end() == []


@pytest.mark.quick
def test_what_never_began_here_is_told_too_and_what_is_left_is_undecided() -> None:
    assembler = made([Boundary(0, 0.0)])
    (skipped,) = assembler.take(GivenUp(4, 9, "skipped", "full"), 1.0)
    assert (skipped["step"], skipped["seq"], skipped["reason"]) == (9, 4, "full")
    assembler.take(Began(AttemptId(1, 5, 10)), 1.0)
    (left,) = assembler.end()
    assert (left["step"], left["outcome"]) == (10, "undecided")


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_warned_of_once_counted_and_changes_no_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "a" / "events.jsonl").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        ((stats, trained),) = run(tmp_path / "a", 4)
    ((plain, expected),) = run(tmp_path / "b", 4, telemetry={})
    assert (tmp_path / "elsewhere").read_text() == ""
    warned = [record.getMessage() for record in caplog.records if "telemetry (events)" in record.getMessage()]
    assert len(warned) == 1 and "symbolic link" in warned[0]
    assert stats["telemetry_lost"] >= 6 and plain["telemetry_lost"] == plain["telemetry_events"] == 0
    assert stats["checkpoints_committed"] == 4
    assert trained.keys() == expected.keys() and all(torch.equal(trained[name], expected[name]) for name in trained)


def test_the_thread_s_own_failure_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def boom(*_: Any) -> Any:
        raise SystemExit("of nobody's")

    monkeypatch.setattr(Assembler, "take", boom)
    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        ((stats, _),) = run(tmp_path, 3)
    assert stats["checkpoints_committed"] == 3 and stats["telemetry_lost"] > 0
    assert any("thread layerwise-telemetry: SystemExit" in record.getMessage() for record in caplog.records)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_file_that_was_moved_or_cut_is_followed_by_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"torn')
    sink = EventsFile(str(path), 0o600)
    sink.write({"n": 1})
    path.rename(tmp_path / "old")
    sink.write({"n": 2})
    path.unlink()
    sink.write({"n": 3})
    sink.close()
    assert (tmp_path / "old").read_bytes() == b'{"torn\n{"n":1}\n' and path.read_bytes() == b'{"n":3}\n'
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.quick
def test_nothing_is_written_through_a_link_or_into_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "to").write_text("")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "to")
    os.mkfifo(tmp_path / "pipe.jsonl")
    reader = os.open(tmp_path / "pipe.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match="symbolic link|not a regular file"):
            EventsFile(str(tmp_path / f"{name}.jsonl"), 0o600).write({"n": 1})
    assert (tmp_path / "to").read_text() == "" and os.read(reader, 10) == b""
    os.close(reader)


@pytest.mark.quick
def test_a_disk_that_takes_half_a_line_costs_that_line_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    sink = EventsFile(str(path), 0o600)
    real, full = os.write, [False]

    def write(file: int, data: bytes) -> int:
        if full[0]:
            raise OSError(28, "No space left on device")
        full[0] = len(data) > 9
        return real(file, data[:5] if full[0] else data)

    monkeypatch.setattr(os, "write", write)
    sink.write({"n": 1})
    with pytest.raises(OSError, match="No space"):
        sink.write({"n": 22222})
    full[0] = False
    sink.write({"n": 3})
    sink.close()
    assert path.read_bytes() == b'{"n":1}\n{"n":\n{"n":3}\n'


# -- the configuration -------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("telemetry", "said"),
    [
        ({"events": "events.txt"}, "ends in .jsonl"), ({"events": "logs/events.jsonl"}, "must be a file name"),
        ({"events": "a.00001.jsonl"}, "no number of a rank"), ({"events": ".jsonl"}, "a name before"),
        ({"events": "a\0.jsonl"}, "must be a file name"), ({"prometheus_port": 0}, "telemetry.prometheus_port = 0"),
        ({"wandb": True}, r"unknown key 'telemetry.wandb'; known are events,"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(telemetry: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.ConfigError, match=said):
        load_config({"telemetry": telemetry})


@pytest.mark.quick
def test_mock_has_no_directory_for_events() -> None:
    with pytest.raises(errors.ConfigError, match="makes no directory"):
        load_config({"mode": "mock", "telemetry": EVENTS})


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [("tensorboard", "tb", "torch.utils.tensorboard"), ("prometheus_port", 9, "prometheus_client")],
)
def test_a_package_that_is_not_there_is_named_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    def body(transport: LocalTransport) -> None:
        model, optimizer = build(transport.rank)
        options = settings(str(tmp_path), telemetry={key: str(tmp_path) if key == "tensorboard" else value})
        with pytest.raises(errors.UnsupportedError, match=rf"telemetry.{key} needs the package .*pip install"):
            assembly.assemble(model, optimizer, options, transport, PosixEnv())

    in_ranks(body, world=2)


# -- the boards --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as ear:
        ear.bind(("127.0.0.1", 0))
        return ear.getsockname()[1]


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(layerwise_\S+) (\S+)$", text, re.MULTILINE)}


def test_prometheus_scrapes_what_the_page_names_and_the_port_is_free_afterwards(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(tmp_path), telemetry={"prometheus_port": port}) as ckpt:
        for step in ckpt.steps(4):
            train(model, optimizer, 0, 0, step)
        ckpt.wait(4)
        deadline = time.monotonic() + 20
        while scraped(port).get('layerwise_checkpoints_total{outcome="committed"}') != 3:  # the fourth has no fence yet
            assert time.monotonic() < deadline
        found = scraped(port)
        names = {name.partition("{")[0] for name in found}
        wanted = {f"layerwise_{name}" for name in (*MEASURES, *telemetry_page.LIVE)}
        assert {name for name in names if not name.endswith("_created")} == wanted
        assert found["layerwise_step"] == found["layerwise_committed_step"] == 4
        assert found["layerwise_steps_since_commit"] == 0 and found["layerwise_stopped"] == 0
        other, its = build(1)
        with pytest.raises(errors.ConfigError, match=f"telemetry.prometheus_port = {port}"):
            lwd.attach(other, its, dir=str(tmp_path / "other"), telemetry={"prometheus_port": port})
        child = os.fork()
        if not child:  # which must not hold the port
            held = any("socket" in os.readlink(f"/proc/self/fd/{n}") and _listens(int(n), port) for n in _descriptors())
            os._exit(held)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with socket.socket() as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.bind(("127.0.0.1", port))


def _descriptors() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]


def _listens(descriptor: int, port: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as found:
        listens = bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        return listens and found.family == socket.AF_INET and found.getsockname()[1] == port


def test_tensorboard_reads_what_the_page_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "run", 3, telemetry={"tensorboard": str(tmp_path / "tb")})
    read = EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {f"layerwise/{name}" for name in MEASURES}
    for name in MEASURES:
        assert [point.step for point in read.Scalars(f"layerwise/{name}")] == [1, 2, 3]
