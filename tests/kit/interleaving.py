# SPDX-License-Identifier: Apache-2.0
"""Several actors in one directory, in an order that a seed draws: one runs at a time, and each gives way at each of its
calls to the file system. Nothing depends on time, so that a seed repeats what it found.
"""

from __future__ import annotations

import errno
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import layerwise_native_testing as testing

Until = Callable[[], bool]
_HANG_S = 60.0


class Stopped(BaseException):
    """Ends an actor when another one has failed."""


@dataclass
class Actor:
    """A thread that runs only while it has the turn. It looks like a `threading.Thread` to who waits for its end."""

    name: str
    scheduler: Scheduler
    body: Callable[[], None]
    until: Until | None = None
    over: bool = False
    error: BaseException | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def join(self, timeout_s: float | None = None) -> None:
        self.scheduler.gate(lambda: self.over)

    def is_alive(self) -> bool:
        return not self.over

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.scheduler.stopping:
                self.body()
        except Stopped:
            pass
        except BaseException as error:  # told by whoever runs them all
            self.error = error
        self.over = True
        self.scheduler.back.release()


class Scheduler:
    """Runs actors until all have ended. `stay` is how likely an actor goes on that has just had the turn."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._stay = self._draw.choice([0.0, 0.5, 0.9])
        self._actors: list[Actor] = []
        self._of_thread: dict[int, Actor] = {}
        self._now: Actor | None = None
        self.back = threading.Semaphore(0)
        self.stopping = False
        self.turns = 0

    def spawn(self, name: str, body: Callable[[], None]) -> Actor:
        actor = Actor(name, self, body)
        self._actors.append(actor)
        thread = threading.Thread(target=actor.run, name=name, daemon=True)
        thread.start()
        assert thread.ident is not None
        self._of_thread[thread.ident] = actor
        return actor

    def gate(self, until: Until | None = None) -> None:
        """The calling actor gives way; it goes on once `until` holds. Of any other thread: nothing happens."""
        actor = self._of_thread.get(threading.get_ident())
        if actor is None or actor is not self._now:
            return
        actor.until = until
        self.back.release()
        actor.turn.acquire()
        if self.stopping:
            raise Stopped

    def run(self) -> None:
        """Raises what an actor raised, or AssertionError where all wait for one another."""
        try:
            while alive := [actor for actor in self._actors if not actor.over]:
                ready = [actor for actor in alive if actor.until is None or actor.until()]
                assert ready, f"all wait for one another: {', '.join(actor.name for actor in alive)}"
                if self._now not in ready or self._draw.random() >= self._stay:
                    self._now = self._draw.choice(ready)
                self._give(self._now)
                if self._now.error is not None:
                    raise self._now.error
        finally:
            self.stopping = True
            for actor in self._actors:
                while not actor.over:
                    self._give(actor)

    def _give(self, actor: Actor) -> None:
        self._now, self.turns = actor, self.turns + 1
        actor.turn.release()
        assert self.back.acquire(timeout=_HANG_S), f"{actor.name} has not given way for {_HANG_S:g} s"


class GatedQueue:
    """A `queue.SimpleQueue` between actors."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._items = scheduler, deque[Any]()

    def put(self, item: Any) -> None:
        self._items.append(item)

    def get(self) -> Any:
        self._scheduler.gate(lambda: bool(self._items))
        return self._items.popleft()


class GatedLock:
    """A `threading.Lock` that an actor may hold while it gives way."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._held = scheduler, False

    def acquire(self, timeout: float = -1) -> bool:
        self._scheduler.gate(lambda: not self._held)
        self._held = True
        return True

    def release(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


@dataclass(eq=False)
class Hold:
    env: GatedEnv
    path: str
    alone: bool

    def release(self) -> None:
        found = self.env.holds[self.path]
        if self in found:
            found.remove(self)


class GatedEnv(testing.MemoryEnv):
    """A MemoryEnv in which actors give way before each call from Python. It has the locks of a file system too."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self.holds: dict[str, list[Hold]] = {}

    def hold(self, path: str, alone: bool = False) -> Hold:
        self._scheduler.gate()
        super().stat(path)
        found = self.holds.setdefault(path, [])
        if any(alone or other.alone for other in found):
            raise BlockingIOError(errno.EAGAIN, "held", path)
        found.append(Hold(self, path, alone))
        return found[-1]

    def make_dir(self, path: str, mode: int = 0o700) -> None:
        self._scheduler.gate()
        super().make_dir(path, mode)

    def create(self, path: str, mode: int = 0o600, direct: bool = False) -> Any:
        self._scheduler.gate()
        return super().create(path, mode, direct)

    def reuse(self, src: str, dst: str, mode: int = 0o600, direct: bool = False) -> Any:
        self._scheduler.gate()
        return super().reuse(src, dst, mode, direct)

    def open(self, path: str, direct: bool = False) -> Any:
        self._scheduler.gate()
        return super().open(path, direct)

    def rename(self, src: str, dst: str) -> None:
        self._scheduler.gate()
        super().rename(src, dst)

    def sync_dir(self, path: str) -> None:
        self._scheduler.gate()
        super().sync_dir(path)

    def unlink(self, path: str) -> None:
        self._scheduler.gate()
        super().unlink(path)

    def remove_dir(self, path: str) -> None:
        self._scheduler.gate()
        super().remove_dir(path)

    def list_dir(self, path: str) -> list[str]:
        self._scheduler.gate()
        return super().list_dir(path)

    def stat(self, path: str) -> tuple[str, int]:
        self._scheduler.gate()
        return super().stat(path)

    def write_file(self, path: str, data: bytes, mode: int = 0o600) -> None:
        self._scheduler.gate()
        super().write_file(path, data, mode)

    def read_file(self, path: str, cap: int) -> bytes:
        self._scheduler.gate()
        return super().read_file(path, cap)

    def lock(self, path: str, mode: int = 0o600) -> Any:
        self._scheduler.gate()
        return super().lock(path, mode)
