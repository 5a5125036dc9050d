# SPDX-License-Identifier: Apache-2.0
"""Opens telemetry as the configuration asks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from layerwise_dist._version import __version__
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.telemetry.assembling import Assembler, Boundary, Measures
from layerwise_dist.telemetry.boards import Prometheus
from layerwise_dist.telemetry.events_file import EventsFile, path_of_rank
from layerwise_dist.telemetry.free_space import FreeSpace
from layerwise_dist.telemetry.recorder import Telemetry
from layerwise_dist.telemetry.sinks import Sink


def open_telemetry(
    config: LayerwiseConfig, boards: Sequence[Any], *, rank: int, world_size: int, framework: str, epoch: int,
    passed: Callable[[], tuple[int, float]], pool: Callable[[], tuple[int, int, int] | None],
) -> Telemetry | None:  # fmt: skip
    """None where nobody wants any.

    `boards` as `open_boards` opened them. `passed()`: step and end, by `time.monotonic()`, of the newest boundary.
    `pool()`: its size, what is in use and the most that was, in bytes. Raises OSError where there is no thread.
    """
    if not config.telemetry.on:
        return None

    def newest() -> Boundary:
        return Boundary(*passed())

    space = None if config.mode == "mock" else FreeSpace(config.path)

    def facts() -> Measures:
        capacity, used, peak = pool() or (None, None, None)
        disk = {} if space is None else space.measures()
        return {"pool_bytes": capacity, "pool_used_bytes": used, "pool_peak_bytes": peak, **disk}

    assembler = Assembler(epoch, newest, facts)
    sinks: list[Sink] = list(boards)
    for board in boards:
        if isinstance(board, Prometheus):
            board.follow(newest, lambda: assembler.safe)
    if config.telemetry.events is not None:
        sinks.append(EventsFile(path_of_rank(config.telemetry.events, config.path, rank), config.file_bits))
    start = {
        "epoch": epoch, "world_size": world_size, "host": socket.gethostname(), "pid": os.getpid(),
        "mode": config.mode, "framework": framework, "every_n_steps": config.every_n_steps,
        "max_in_flight": config.max_in_flight, "version": __version__,
    }  # fmt: skip
    return Telemetry(assembler, rank, sinks, start)
