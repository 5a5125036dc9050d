# SPDX-License-Identifier: Apache-2.0
"""Monitor mode, part by part: what is refused, who waits for whom, and which of several things is believed."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import BufferPool, PosixEnv
from layerwise_dist.capture import stage
from layerwise_dist.commit.coordinator import Coordinator
from layerwise_dist.commit.ledger import Ledger
from layerwise_dist.commit.owner import Owner
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.monitor.gathering import Gathering
from layerwise_dist.monitor.holding import StagedShards
from layerwise_dist.monitor.relaying import RelayingTransport, wrapped
from layerwise_dist.monitor.wire import Wire
from layerwise_dist.storage.adapter import PCCheckAdapter

pytestmark = pytest.mark.quick

# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"capture": "lease"}, "capture = 'lease' with mode 'monitor'"),
        ({"commit": {"transport": "mpi"}}, "commit.transport = 'mpi' with mode 'monitor'"),
        ({"writer": {"backend": "nvm"}}, "writer.backend = 'nvm' with mode 'monitor'"),
    ],
)
def test_what_a_monitor_cannot_do_is_a_config_error_that_says_why(more: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigError, match=says):
        load_config({"mode": "monitor", **more})


@pytest.mark.slow
def test_a_configuration_or_owner_that_the_monitor_refuses_is_raised_by_attach(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.DirectoryError, match="is not a directory"):
        lwd.attach(model, optimizer, dir=str(tmp_path / "file"), mode="monitor")
    with lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt"), mode="monitor"):
        began = time.monotonic()
        with pytest.raises(errors.OwnerError, match=f"another live job .the monitor .pid .* of pid {os.getpid()} on"):
            other = torch.nn.Linear(3, 3)
            lwd.attach(
                other, torch.optim.SGD(other.parameters(), lr=0.1), dir=str(tmp_path / "ckpt"), mode="direct"
            )  # fmt: skip
        assert time.monotonic() - began < 30


@pytest.mark.slow
def test_an_optimizer_on_nvme_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise_dist.frameworks.framework import Framework

    monkeypatch.setattr(Framework, "swapped", True)
    model = torch.nn.Linear(3, 3)
    with pytest.raises(errors.UnsupportedError, match="offloaded to NVMe"):
        lwd.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), dir=str(tmp_path), mode="monitor")


def test_a_monitor_that_cannot_be_started_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise_dist.monitor import process

    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for command, says in ((["/no/such/program"], "did not start"), (["/bin/false"], "is gone: exit code 1")):
        monkeypatch.setattr(process, "COMMAND", command)
        with pytest.raises(errors.CommitError, match=says):
            lwd.attach(model, optimizer, dir=str(tmp_path), mode="monitor")


# -- the wire ---------------------------------------------------------------------------------------------------------


def test_what_is_no_message_ends_the_wire_and_nothing_of_it_is_taken() -> None:
    for garbage in (b"\xff\xff\xff\xff", _frame(b"{}"), _frame(b'[{"t": 1}]'), _frame(b"[3]"), _frame(b"nonsense")):
        ours, theirs = socket.socketpair()
        taken: list[Any] = []
        ended = threading.Event()
        wire = Wire(ours, taken.append, lambda why, ended=ended: ended.set())
        wire.start()
        theirs.sendall(garbage)
        assert ended.wait(10)
        assert not taken
        wire.close(1)
        theirs.close()


def _frame(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


def test_messages_of_many_threads_arrive_whole_and_each_thread_s_in_order() -> None:
    ours, theirs = socket.socketpair()
    taken: list[Any] = []
    ended = threading.Event()
    near, far = Wire(ours, lambda _: None, lambda _: None), Wire(theirs, taken.append, lambda _: ended.set())
    near.start(), far.start()
    threads = [
        threading.Thread(target=lambda n=n: [near.send({"t": "x", "of": n, "n": i}) for i in range(200)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    near.close(5)
    assert ended.wait(5)
    far.close(1)
    assert all([m["n"] for m in taken if m["of"] == n] == list(range(200)) for n in range(4))


# -- meeting ----------------------------------------------------------------------------------------------------------


def _meetings(*bodies: Any) -> list[list[dict[str, Any]]]:
    """Runs `body(gather)` of each rank; what each round of gathers held."""
    rounds: list[list[dict[str, Any]]] = []
    barrier = threading.Barrier(len(bodies), timeout=10)
    slots: list[Any] = [None] * len(bodies)

    def gather(rank: int, record: dict[str, Any]) -> list[dict[str, Any]]:
        slots[rank] = record
        barrier.wait()
        found = list(slots)
        if rank == 0:
            rounds.append(found)
        barrier.wait()
        return found

    threads = [
        threading.Thread(target=body, args=(lambda record, rank=rank: gather(rank, record),))
        for rank, body in enumerate(bodies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return rounds


def test_a_monitor_that_does_not_start_is_told_to_all_ranks_and_nobody_waits() -> None:
    def well(gather: Any) -> None:
        gathering = Gathering(0, gather)
        gathering({"place": "a"})
        assert "error" in gathering({"port": 1})[1]

    rounds = _meetings(well, lambda gather: Gathering(1, gather).give_up("no memory"))
    assert rounds[1][1]["error"] == "rank 1: no memory" and len(rounds) == 2


def test_ranks_in_different_modes_are_an_error_on_all() -> None:
    def monitored(gather: Any) -> None:
        gathering = Gathering(0, gather)
        gathering({"place": "a"})
        gathering({"port": 1})
        gathering.give_up("which is nothing new")

    def direct(gather: Any) -> None:
        gather({"place": "b"})
        gather({"port": 2})

    rounds = _meetings(monitored, direct)
    assert "mode is 'monitor' here, and differs on rank(s) 1" in rounds[1][0]["error"] and len(rounds) == 2


# -- who waits for the directory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_monitor_whose_job_has_ended_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = Owner(PosixEnv(), str(tmp_path), file_mode=0o600, who="monitor 1", monitored=True)
    old.begin("a" * 32, 3)
    began = time.monotonic()
    with pytest.raises(errors.OwnerError, match=r"another live job \(monitor 1\)"):
        Owner(PosixEnv(), str(tmp_path), file_mode=0o600, who="me", patience_s=30)
    assert 1 < time.monotonic() - began < 20, "it may just not have noticed yet"
    old.end()
    old.check()
    threading.Timer(0.3, old.release).start()
    new = Owner(PosixEnv(), str(tmp_path), file_mode=0o600, who="me", patience_s=30)
    assert new.previous == 3
    assert "waiting at most 30 s for monitor 1, which finishes" in caplog.text
    new.release()


def test_one_that_never_lets_go_is_named_at_the_deadline(tmp_path: Path) -> None:
    old = Owner(PosixEnv(), str(tmp_path), file_mode=0o600, who="monitor 1", monitored=True)
    old.begin("a" * 32, 3)
    old.end()
    with pytest.raises(errors.OwnerError, match=r"waited 0.2 s for monitor 1, which finishes"):
        Owner(PosixEnv(), str(tmp_path), file_mode=0o600, who="me", patience_s=0.2)
    old.release()


def test_a_live_job_in_direct_mode_is_not_waited_for(tmp_path: Path) -> None:
    old = Owner(PosixEnv(), str(tmp_path), file_mode=0o600, who="pid 1")
    old.begin("a" * 32, 3)
    began = time.monotonic()
    with pytest.raises(errors.OwnerError, match=r"another live job \(pid 1\)"):
        Owner(PosixEnv(), str(tmp_path), file_mode=0o600, who="me", patience_s=30)
    assert time.monotonic() - began < 15
    old.release()


# -- decisions --------------------------------------------------------------------------------------------------------


def _message(kind: str, rank: int, seq: int, **more: Any) -> dict[str, Any]:
    return {"t": kind, "rank": rank, "world_size": 2, "seq": seq, "attempt": f"a{seq}", "step": seq, **more}


def _said(outputs: list[Any]) -> list[tuple[Any, ...]]:
    messages = [
        getattr(output, "message", None) or {"t": type(output).__name__, **asdict(output)} for output in outputs
    ]
    return [(message["t"], message.get("seq")) for message in messages]


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_of_an_orphaned_rank_what_it_had_staged_goes_on_and_the_rest_is_aborted(on_failure: str) -> None:
    coordinator = Coordinator(2, timeout_s=30, on_failure=on_failure, raise_after=5, now=0.0)
    for rank, seq in ((0, 1), (1, 1), (0, 2)):
        coordinator.handle(_message("staged", rank, seq), 0.0)
    said = _said(coordinator.handle({"t": "orphaned", "rank": 1, "why": "killed"}, 1.0))
    assert ("stop", None) in said and ("aborted", 2) in said and ("aborted", 1) not in said
    assert _said(coordinator.handle(_message("staged", 0, 3), 1.0)) == [("aborted", 3)], "rank 1 will never stage it"
    coordinator.handle(_message("failed", 0, 4, error="and another thing", final=True), 1.0)
    coordinator.handle(_message("durable", 0, 1), 2.0)
    assert _said(coordinator.handle(_message("durable", 1, 1), 2.0))[-1] == ("WriteManifest", 1)
    assert ("committed", 1) in _said(coordinator.wrote(1, None))


def test_a_rank_whose_monitor_died_raises_at_the_last_granted_boundary() -> None:
    ledger = Ledger(1, 2)
    ledger.receive({"t": "grant", "b": 40, "tell": 20})
    ledger.lose("its monitor is gone", at_once=False)
    ledger.lose("and so is the connection")
    assert ledger.may_pass(39) and ledger.must_raise(39) is None
    assert ledger.may_pass(40) and ledger.must_raise(40) == "its monitor is gone"
    alone = Ledger(0, 1)
    alone.lose("gone", at_once=False)
    assert alone.must_raise(1) == "gone"


def test_only_the_training_process_answers_for_its_boundaries() -> None:
    """A monitor passes none: its answer would have all meet at one that is long past."""
    hub = LocalHub(1)
    told: list[Any] = []
    transport = RelayingTransport(LocalTransport(hub, 0), told.append)
    heard: list[str] = []
    transport.start(lambda message: heard.append(message["t"]), lambda message: None, lambda why: None)
    kinds = ["grant", "hold", "meet", "staged", "agreed", "stop", "committed"]
    for kind in kinds:
        transport.announce({"t": kind})
    transport.announce(wrapped({"t": "agreed", "key": "1"}))
    transport.listen()
    transport.close(10)
    assert heard == ["staged", "agreed", "stop", "committed"]
    passed_on = [message["m"]["t"] for message in told]
    assert passed_on == ["grant", "hold", "meet", "staged", "stop", "committed", "agreed"]


# -- holding ----------------------------------------------------------------------------------------------------------


class _Participant:
    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def began(self, attempt: Any) -> None: ...
    def staged(self, write: Any) -> None:
        self.said.append(("staged", write.attempt.seq))

    def failed(self, attempt: Any, error: str, write: Any, *, final: bool = False, told: bool = False) -> None:
        self.said.append(("failed", attempt.seq, error))
        if write is not None:
            write.abort()


class _Held:
    """A StagedShards with one layout: one layer of 8192 bytes, and nothing that is copied at the boundary."""

    def __init__(self, root: Path) -> None:
        self.file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        self.owner, begin = BufferPool.shared(self.file, 1 << 20)
        self.adapter = PCCheckAdapter(PosixEnv(), str(root), rank=0, world_size=2, block_bytes=4096)
        self.adapter.allocate_staging_buffer(1)
        self.given: list[Any] = []
        self.participant, self.told = _Participant(), []
        self.wake = os.eventfd(0)
        self.holder = StagedShards(self.adapter, self.participant, 1, self.file, self.wake, self.told.append)  # type: ignore[arg-type]
        self.holder.pool({"begin": begin, "nbytes": self.owner.capacity})
        fields = {
            "kind": "param", "fqn": "w", "dtype": "U8", "global_shape": [8192], "offsets": [0], "lengths": [8192],
            "start": None, "length": None,
        }  # fmt: skip
        layers = json.loads(json.dumps([["layer", [[fields, 0, False]]], ["(boundary)", []]]))
        self.holder.layout({"number": 1, "layers": layers})
        self.holder.begin({"seq": 1, "step": 1, "layout": 1})

    def give(self, kind: str, nbytes: int, **more: Any) -> Any:
        buffer = self.owner.acquire(nbytes, 1)
        self.given.append(buffer)
        with memoryview(buffer) as view:
            view.cast("B")[:] = b"x" * nbytes
        getattr(self.holder, kind)({"seq": 1, "place": buffer.place, "nbytes": nbytes, **more})
        return buffer

    def close(self) -> None:
        self.holder.give_up("over")
        self.adapter.close(10)
        os.close(self.file)
        os.close(self.wake)


def test_a_shard_is_acknowledged_only_once_all_of_it_is_here(tmp_path: Path) -> None:
    for lacking in ("extent", "state", ""):
        root = tmp_path / (lacking or "nothing")
        root.mkdir()
        held = _Held(root)
        if lacking != "extent":
            held.give("give", 8192, extent=0)
        if lacking != "state":
            held.give("state", 10)
        held.holder.sealed({"seq": 1, "state": [6, 4]})
        (said,) = held.participant.said
        if lacking:
            assert said[0] == "failed" and ("1 extents" if lacking == "extent" else "a part of the state") in said[2]
        else:
            assert said == ("staged", 1)
        held.close()


def test_buffers_are_given_back_by_their_places_also_those_of_attempts_that_have_ended(tmp_path: Path) -> None:
    held = _Held(tmp_path)
    first = held.give("give", 8192, extent=0)
    state = held.give("state", 10)
    held.holder.drop({"seq": 1})
    late = held.give("give", 8192, extent=0)
    deadline = time.monotonic() + 10
    while len(places := [place for message in held.told for place in message["places"]]) < 3:
        assert time.monotonic() < deadline
        held.holder.give_back()
    assert sorted(places) == sorted([first.place, state.place, late.place])
    assert os.eventfd_read(held.wake) >= 3
    held.close()


def test_what_lies_outside_the_pool_or_has_another_size_is_refused(tmp_path: Path) -> None:
    held = _Held(tmp_path)
    for place, nbytes in ((held.owner.capacity, 8192), (1, 8192), (0, 1 << 40), (-4096, 8192)):
        with pytest.raises(ValueError, match=r"no free buffer|but there is no pool|negative"):
            held.holder.give({"seq": 1, "extent": 0, "place": place, "nbytes": nbytes})
    with pytest.raises(ValueError, match="extent 0 has 8192 bytes, the buffer 4096"):
        held.give("give", 4096, extent=0)
    with pytest.raises(ValueError, match="not a multiple|the file has|shared buffer pool"):
        held.holder.pool({"begin": 0, "nbytes": 1 << 40})
    held.close()


# -- CUDA -------------------------------------------------------------------------------------------------------------


def test_the_shared_pool_is_page_locked_for_cuda_and_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a runtime that only notes what it is asked for: there is no CUDA here."""
    calls: list[tuple[Any, ...]] = []

    class Runtime:
        def cudaHostRegister(self, *arguments: int) -> int:
            calls.append(("register", *arguments))
            return 0

        def cudaHostUnregister(self, *arguments: int) -> int:
            calls.append(("unregister", *arguments))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(("synchronize",)))
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    pool, _ = BufferPool.shared(file, 1 << 20)
    staged = stage.Stage(pool, pinned=True)
    buffer = pool.acquire(1 << 20, 0.0)
    assert calls == [("register", buffer.address, 1 << 20, 0)], "all of the mapping, before anything is staged"
    buffer.release()
    staged.close(10)
    assert calls[1:] == [("synchronize",), ("unregister", calls[0][1])]
    os.close(file)
