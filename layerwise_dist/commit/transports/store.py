"""Messages between processes over a TCPStore of our own.

A store call to a stopped server blocks past its own timeout, so every call runs on a daemon thread that may be given
up, with a client of its own (two threads on one client block each other); callers keep their deadlines outside.
"""

from __future__ import annotations

import datetime
import json
import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from layerwise_dist.commit.transports import COORDINATOR, Handler, Message
from layerwise_dist.errors import CommitError

_POLL = datetime.timedelta(seconds=30)
_QUIT = {"t": "quit"}


class StoreTransport:
    """The Transport over store queues: `in` leads to the coordinator, `out/<rank>` to each rank."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = store
        self._outgoing: queue.SimpleQueue[tuple[str, Message] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._on_error: Callable[[str], None] = lambda text: None

    def start(
        self, on_message: Handler, on_coordinator_message: Handler | None, on_error: Callable[[str], None]
    ) -> None:
        self._on_error = on_error
        self._spawn("send", self._send)
        self._spawn("receive", self._receive, f"out/{self.rank}", on_message)
        if on_coordinator_message is not None:
            self._spawn("coordinator-receive", self._receive, "in", on_coordinator_message)

    def post(self, destination: int, message: Message) -> None:
        name = "in" if destination == COORDINATOR else f"out/{destination}"
        self._outgoing.put((name, message))

    def close(self, timeout_s: float) -> None:
        self._closing.set()
        self.post(self.rank, _QUIT)
        if len(self._threads) > 2:
            self.post(COORDINATOR, _QUIT)
        self._outgoing.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _spawn(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=f"layerwise-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _send(self) -> None:
        client = self._client()
        while client is not None and (item := self._outgoing.get()) is not None:
            name, message = item
            try:
                client.queue_push(name, json.dumps(message, separators=(",", ":")))
            except RuntimeError as error:
                self._fail(error)
                return

    def _receive(self, name: str, handler: Handler) -> None:
        client = self._client()
        while client is not None:
            try:
                message = json.loads(client.queue_pop(name, block=True))
            except dist.DistStoreError as error:
                if "imeout" in str(error) or "imed out" in str(error):
                    continue
                self._fail(error)
                return
            except RuntimeError as error:
                self._fail(error)
                return
            if message == _QUIT:
                return
            handler(message)

    def _client(self) -> Any:
        try:
            client = self._store.clone()
            client.set_timeout(_POLL)
            return client
        except RuntimeError as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        if not self._closing.is_set():
            self._on_error(f"the checkpoint store on rank 0 is gone: {str(error).splitlines()[0]}")


def open_store(rank: int, timeout_s: float) -> Any:
    """A store of this session's own. Collective on the training thread: its address goes over the default group.

    A broadcast, unlike a key of the job's store, cannot be left over from an earlier incarnation of the job.
    Raises CommitError when rank 0 could not open a port or this rank could not reach it.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    server, answer = None, {}
    if rank == 0:
        try:
            server = dist.TCPStore("0.0.0.0", 0, None, True, timeout, wait_for_workers=False)
            answer = {"host": _advertised_host(), "port": server.port}
        except (RuntimeError, OSError) as error:
            answer = {"error": f"rank 0 could not open a port for the checkpoint store: {error}"}
    answer = _broadcast(answer)
    if "error" in answer:
        raise CommitError(answer["error"])
    if server is not None:
        return server
    try:
        return dist.TCPStore(answer["host"], answer["port"], None, False, timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise CommitError(
            f"rank {rank} cannot reach the checkpoint store at {answer['host']}:{answer['port']} on rank 0: {error}"
        ) from None


def _advertised_host() -> str:
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None and local == os.environ.get("WORLD_SIZE"):
        return "127.0.0.1"
    return os.environ.get("MASTER_ADDR") or socket.gethostname()


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    text = json.dumps(answer).encode()[:1024].ljust(1024)
    buffer = torch.tensor(list(text), dtype=torch.uint8, device=device)
    dist.broadcast(buffer, src=0)
    return json.loads(bytes(buffer.cpu().tolist()))
