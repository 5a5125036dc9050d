# SPDX-License-Identifier: Apache-2.0
"""Ranks without models, one of which fails at one stage of one attempt. Each tells what it sees in OUT/<rank>.jsonl.

    failing.py JSON

of {"dir", "out", "ranks", "total", "timeout", "on_failure", "rank", "stage", "kind", "attempt"}; without "kind" nothing
fails. Stages of a rank's shard: open, write, rename, flush, report, after; of rank 0's manifest: manifest_write,
manifest_rename, manifest_flush, retire.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

from layerwise_dist import _native
from layerwise_dist.bench.light import LightRank, Switchboard
from layerwise_dist.commit import places
from layerwise_dist.commit.transports import links, rendezvous
from layerwise_dist.commit.transports.store import over_tcp
from layerwise_dist.errors import CommitError, LayerwiseError


class Failure:
    """What happens when this rank comes to that stage of that attempt."""

    def __init__(self, spec: dict[str, Any], rank: int) -> None:
        self._spec = spec
        self._mine = rank == spec.get("rank") and "kind" in spec
        self._hits = 0
        self.armed = False
        self.cut: Any = None

    def at(self, stage: str) -> None:
        if not self._mine or not self.armed or stage != self._spec["stage"] or self._hits:
            return
        self._hits += 1
        kind, timeout = self._spec["kind"], self._spec["timeout"]
        if kind == "kill":
            if os.fork() == 0:  # a worker of a data loader, say: busy, and it outlives its parent
                time.sleep(20)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "slow":
            time.sleep(0.3 * timeout)
        elif kind == "late":
            time.sleep(1.6 * timeout)
        elif kind == "cut":
            self.cut()
        elif kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device (injected)")
        elif kind == "broken":
            raise OSError(errno.EIO, "Input/output error (injected)")


class StagedEnv(_native.PosixEnv):
    """Says when rank 0 is at a manifest."""

    def __init__(self, at: Any) -> None:
        super().__init__()
        self._at = at
        self._renamed = ""

    def write_file(self, path: str, data: bytes, mode: int) -> None:
        if os.path.basename(path).startswith("manifest"):
            self._at("manifest_write")
        super().write_file(path, data, mode)

    def rename(self, source: str, target: str) -> None:
        if os.path.basename(target).startswith("manifest"):
            self._at("manifest_rename")
            self._renamed = os.path.dirname(target)
        super().rename(source, target)

    def sync_dir(self, path: str) -> None:
        if path == self._renamed:
            self._renamed = ""
            self._at("manifest_flush")
        super().sync_dir(path)

    def unlink(self, path: str) -> None:
        if path.endswith("manifest.json"):
            self._at("retire")
        super().unlink(path)


def move_to(namespace: str) -> None:
    """Into a network namespace that `ip netns add` made."""
    file = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(file, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(file)


def start(transport: Any, spec: dict[str, Any], failure: Failure) -> LightRank:
    return LightRank(
        transport, spec["dir"], env=StagedEnv(failure.at), timeout_s=spec["timeout"], on_failure=spec["on_failure"],
        raise_after=100, at=failure.at,
    )  # fmt: skip


def rank_main(rank: int, board: Switchboard, spec: dict[str, Any]) -> None:
    file = os.open(f"{spec['out']}/{rank}.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def tell(**what: Any) -> None:
        os.write(file, (json.dumps(what) + "\n").encode())

    failure = Failure(spec, rank)
    if "namespace" in spec and rank == spec["ranks"] - 1:
        move_to(spec["namespace"])
    node = spec["node_of"][rank] if "node_of" in spec else None
    if node is not None:  # nodes are pretended: what tells them apart is patched, and each has a directory
        places.place = lambda: f"node {node}"
        spec = {**spec, "dir": f"{spec['dir']}-{node}"}
    if "silence" in spec:
        links._SILENCE_S = spec["silence"]
    met = rendezvous.meet(rank, board.of(rank), 20.0, where=None if node is None else str(node))
    transport = over_tcp(rank, spec["ranks"], met)

    def cut() -> None:
        for line in met.lines.values():
            if line.sock.fileno() >= 0:
                line.sock.shutdown(socket.SHUT_RDWR)

    failure.cut = cut
    try:
        light = start(transport, spec, failure)
    except LayerwiseError as error:
        tell(refused=f"{type(error).__name__}: {error}")
        return
    tell(start=light.start, pid=os.getpid())
    count, began = 0, time.monotonic()
    try:
        while count < spec["total"]:
            count += 1
            failure.armed = count >= spec.get("attempt", 0)
            began = time.monotonic()
            step = light.checkpoint()
            try:
                light.participant.wait(step, "committed", 3 * spec["timeout"])
                tell(committed=step)
                failure.at("after")
            except CommitError as error:
                try:
                    light.participant.ended()
                    tell(aborted=step, why=str(error))
                except CommitError:
                    time.sleep(0.02)  # a boundary to come says where to raise
        light.close()
        tell(end=count)
    except LayerwiseError as error:
        tell(raised=count, seconds=time.monotonic() - began, error=f"{type(error).__name__}: {error}")
        try:
            light.close()
        except LayerwiseError:
            pass
        tell(left=time.monotonic() - began)


def main() -> None:
    spec = json.loads(sys.argv[1])
    board = Switchboard(spec["ranks"])
    pids = []
    for rank in range(spec["ranks"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                rank_main(rank, board, spec)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    board.serve()
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))


if __name__ == "__main__":
    main()
