# SPDX-License-Identifier: Apache-2.0
"""Shards as a rank knows them that has not read their headers: where the blocks are, and their hashes. One rank of the
job has read each header.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from layerwise_dist import _native
from layerwise_dist.errors import DamageError, MismatchError
from layerwise_dist.storage.reader import Blocks, Shard, open_file, read_verified

Span = tuple[int, int, int]


class Index(Protocol):
    """What must be known of a header to read a file: see `ShardIndex`."""

    @property
    def rank(self) -> int: ...
    @property
    def hashed(self) -> bool: ...
    @property
    def blocks(self) -> Blocks: ...
    @property
    def hashes(self) -> Sequence[int | None]: ...


class Readable(Protocol):
    """What a byte range is read out of: a `Shard`, or a `PlannedShard`."""

    @property
    def index(self) -> Index: ...

    def read_into(self, spans: list[Span]) -> None: ...


class Files:
    """Opens files as they are needed, and keeps only the last one open.

    Attributes:
        bytes_read: of blocks, whole ones.
    """

    def __init__(
        self, env: _native.Env, pool: _native.WriterPool, path: Callable[[int, int], str], count: Callable[[int], None],
        sees: Callable[[int], bool],
    ) -> None:  # fmt: skip
        """`path(rank, which)`: of a rank's shard (0) or base (1). `count(bytes)` is called with all that is read.
        `sees(rank)`: whether this process sees that rank's files.
        """
        self._env, self._pool, self._count = env, pool, count
        self.path, self.sees = path, sees
        self._last: tuple[str, _native.ShardReader] | None = None
        self.bytes_read = 0

    def reader(self, path: str, nbytes: int, check: Callable[[], object] | None) -> _native.ShardReader:
        """`check` is called before a file is opened. Raises what that raises, DamageError or OSError."""
        if self._last is not None and self._last[0] == path:
            return self._last[1]
        self._last = None
        if check is not None:
            check()
        reader = open_file(self._env, self._pool, path, nbytes)
        self._last = path, reader
        return reader

    def read(self, nbytes: int) -> None:
        self.bytes_read += nbytes
        self._count(nbytes)


@dataclass(frozen=True, eq=False, slots=True)
class PlannedShard:
    """One file of a commit. `number` tells it from the others, on all ranks alike.

    `whole` opens it with all of its header, verified: to say what a bad block holds, and whether it is the file.
    """

    number: int
    rank: int
    path: str
    nbytes: int
    blocks: Blocks
    hashes: Sequence[int | None]
    files: Files
    whole: Callable[[], Shard]

    @property
    def index(self) -> Index:
        return self

    @property
    def hashed(self) -> bool:
        return not self.hashes or self.hashes[0] is not None

    def read_into(self, spans: list[Span]) -> None:
        """As `Shard.read_into`. Raises MismatchError for a file on another node, which others have to read."""
        if not self.files.sees(self.rank):
            raise MismatchError(
                f"shard {self.path}: it is on another node, and this rank has to read it by itself: copy all shards "
                "into one directory that all ranks see"
            )
        # Another node may have another file of this name and length, which a job has left there. Where blocks have no
        # hashes, only the header tells.
        reader = self.files.reader(self.path, self.nbytes, None if self.hashed else self.whole)
        bad, nbytes = read_verified(reader, self.blocks, self.hashes, spans)
        self.files.read(nbytes)
        if bad:
            shard = self.whole()
            raise DamageError("; ".join(shard.describe(block) for block in bad[:5]))
