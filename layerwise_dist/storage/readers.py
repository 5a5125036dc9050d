# SPDX-License-Identifier: Apache-2.0
"""The threads that read a job's shards, apart from those that write."""

from __future__ import annotations

from layerwise_dist import _native


class Readers:
    """Made when needed. Arguments are those of `_native.WriterPool`."""

    def __init__(self, depth: int, *, patience_s: float, reads: str) -> None:
        self._depth, self._patience_s, self._reads = depth, patience_s, reads
        self._pool: _native.WriterPool | None = None

    @property
    def pool(self) -> _native.WriterPool:
        if self._pool is None:
            self._pool = _native.WriterPool(self._depth, patience_s=self._patience_s, reads=self._reads)
        return self._pool

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes of blocks that were read, and those of them that came out of the page cache by "auto"."""
        return (0, 0) if self._pool is None else (self._pool.bytes_read, self._pool.bytes_cached)

    def close(self, timeout_s: float) -> bool:
        """Whether they have ended within the time."""
        return self._pool is None or self._pool.close(timeout_s)
