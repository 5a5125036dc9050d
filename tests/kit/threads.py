# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads of one process, before they have a transport."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from layerwise_dist.commit.transports import rendezvous


class Gathering:
    """The gather of ranks that are threads of one process."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=30)
        self._records: list[dict[str, Any]] = [{}] * world_size

    def of(self, rank: int) -> rendezvous.Gather:
        def gather(record: dict[str, Any]) -> list[dict[str, Any]]:
            self._records[rank] = record
            self._barrier.wait()
            found = list(self._records)
            self._barrier.wait()
            return found

        return gather


def in_threads(world_size: int, body: Callable[[int], Any]) -> list[Any]:
    """`body(rank)` on a thread each; its value or its exception, by rank."""
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except Exception as error:  # noqa: BLE001
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads)
    return results
