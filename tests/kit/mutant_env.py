# SPDX-License-Identifier: Apache-2.0
"""A file system in memory that goes wrong once, where the engine's Python side flushes or renames."""

from __future__ import annotations

import errno
import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import layerwise_native_testing as testing


@dataclass
class Mutation:
    """One operation that goes wrong: `operation` on a path that matches, called by the function `caller`.

    `forget` acknowledges and does nothing, else it raises EIO. Of `rank` alone, if that is given. Operations inside the
    native core (sync of a file) are forgotten by MemoryEnv itself and have no caller.
    """

    operation: str
    pattern: str
    caller: str | None = None
    forget: bool = True
    rank: int | None = None

    def is_of(self, operation: str, caller: str, path: str) -> bool:
        return (operation, caller) == (self.operation, self.caller) and fnmatch.fnmatchcase(path, self.pattern)


class MutantEnv(testing.MemoryEnv):
    """A MemoryEnv in which one flush or rename of the engine's Python side is left out, told apart by its caller."""

    def __init__(self, mutation: Mutation | None = None) -> None:
        super().__init__()
        self.mutation = mutation
        self.hits = 0
        if mutation is not None and mutation.caller is None:
            self.drop(mutation.operation, mutation.pattern)

    def sync_dir(self, path: str) -> None:
        if not self._mutated("sync_dir", path, sys._getframe(1)):
            super().sync_dir(path)

    def rename(self, source: str, target: str) -> None:
        if not self._mutated("rename", target, sys._getframe(1)):
            super().rename(source, target)

    @property
    def mutated(self) -> int:
        return self.hits + self.dropped

    def _mutated(self, operation: str, path: str, caller: FrameType) -> bool:
        mutation = self.mutation
        if mutation is None or mutation.caller is None:
            return False
        if not mutation.is_of(operation, caller.f_code.co_name, path):
            return False
        if mutation.rank is not None and caller.f_locals["self"]._adapter.rank != mutation.rank:
            return False
        self.hits += 1
        if not mutation.forget:
            raise OSError(errno.EIO, f"{operation} (injected)", path)
        return True


class Recording(testing.MemoryEnv):
    """Keeps which function flushes or renames what: (operation, caller, path)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[str, str, str]] = set()

    def sync_dir(self, path: str) -> None:
        self.calls.add(("sync_dir", sys._getframe(1).f_code.co_name, path))
        super().sync_dir(path)

    def rename(self, source: str, target: str) -> None:
        self.calls.add(("rename", sys._getframe(1).f_code.co_name, target))
        super().rename(source, target)

    @property
    def flushed(self) -> set[str]:
        """Files of which the content was flushed."""
        entries = (self.log_entry(number).split() for number in range(self.log_size))
        return {entry[1] for entry in entries if entry[0] == "sync"}


class Deferred:
    """An Env whose renames and flushes of directories are said to be done, and are done when `do` is called."""

    def __init__(self, env: Any) -> None:
        self._env, self._later = env, list[Callable[[], None]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def rename(self, source: str, target: str) -> None:
        self._later.append(lambda: self._env.rename(source, target))

    def sync_dir(self, path: str) -> None:
        self._later.append(lambda: self._env.sync_dir(path))

    def do(self) -> None:
        for operation in self._later:
            operation()


class WithEnv:
    """An adapter of which Python uses another Env."""

    def __init__(self, adapter: Any, env: Any) -> None:
        self._adapter, self.env = adapter, env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)
