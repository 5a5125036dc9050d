# SPDX-License-Identifier: Apache-2.0
"""Writes to TensorBoard and Prometheus by their own clients, imported only when asked for. Rank 0 only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from layerwise_dist.config import TelemetryConfig
from layerwise_dist.errors import ConfigError, UnsupportedError
from layerwise_dist.telemetry.assembling import Boundary, Event
from layerwise_dist.telemetry.names import MEASURES, OUTCOMES, PARTS

TAG = "layerwise/"  # before the name of a measure in TensorBoard
PREFIX = "layerwise_"  # before the name of a metric in Prometheus
_SHUTDOWN_S = 0.1

# Metrics in addition to the measures of the newest checkpoint.
LIVE = {
    "step": "steps completed",
    "committed_step": "the step that a restart would resume from",
    "steps_since_commit": "steps since the newest commit",
    "seconds_since_commit": "seconds since the boundary of the newest commit",
    "checkpoints_total": "checkpoints, by outcome",
    "stall_seconds_total": "seconds that checkpoints blocked the training thread, by part",
    "written_bytes_total": "bytes of this rank's shards",
    "stopped": "1 if no more checkpoints will be committed",
}


def open_boards(config: TelemetryConfig, rank: int) -> list[Any]:
    """Those that the configuration asks for, on rank 0. Raises UnsupportedError for a package that is not installed,
    ConfigError for a port or a directory that can't be had.
    """
    if rank != 0:
        return []
    made: list[Any] = []
    try:
        if config.tensorboard is not None:
            made.append(TensorBoard(config.tensorboard))
        if config.prometheus_port is not None:
            made.append(Prometheus(config.prometheus_host, config.prometheus_port))
    except BaseException:
        for each in made:
            each.close()
        raise
    return made


class TensorBoard:
    """Scalars of each checkpoint at its step, by torch's writer."""

    name = "tensorboard"

    def __init__(self, directory: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UnsupportedError(
                f"telemetry.tensorboard needs the package tensorboard: pip install 'layerwise_dist[tensorboard]' "
                f"({error})"
            ) from error
        path = os.path.abspath(os.path.expanduser(directory))
        try:
            self._writer: Any = SummaryWriter(path)
        except OSError as error:
            raise ConfigError(f"telemetry.tensorboard = {directory!r}: {error}") from error
        self._failed = 0

    def write(self, event: Event) -> None:
        if event["event"] != "checkpoint":
            return
        step, when = event["step"], event["time"]
        if event["outcome"] == "committed":
            for name in MEASURES:
                if event[name] is not None:
                    self._writer.add_scalar(TAG + name, event[name], step, walltime=when)
        elif event["outcome"] == "failed":
            self._failed += 1
            self._writer.add_scalar(TAG + "failed", self._failed, step, walltime=when)
            self._writer.add_text(TAG + "reason", _indented(event["reason"]), step, walltime=when)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def leave_to_parent(self) -> None:
        """The writer's own thread is not in the child, so nothing is written there."""


def _indented(text: str) -> str:
    """So that TensorBoard, which takes Markdown, shows it unchanged."""
    return "\n".join("    " + line for line in text.splitlines())


class Prometheus:
    """An HTTP server of its own registry. `follow` brings what is asked for at each scrape."""

    name = "prometheus"

    def __init__(self, host: str, port: int) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise UnsupportedError(
                f"telemetry.prometheus_port needs the package prometheus-client: "
                f"pip install 'layerwise_dist[prometheus]' ({error})"
            ) from error
        registry = prometheus_client.CollectorRegistry()

        def gauge(name: str, text: str) -> Any:
            return prometheus_client.Gauge(PREFIX + name, text, registry=registry)

        self._measures = {name: gauge(name, text) for name, text in MEASURES.items()}
        self._live = {name: gauge(name, text) for name, text in LIVE.items() if not name.endswith("_total")}
        self._checkpoints = prometheus_client.Counter(
            PREFIX + "checkpoints", LIVE["checkpoints_total"], ["outcome"], registry=registry
        )
        self._stalls = prometheus_client.Counter(
            PREFIX + "stall_seconds", LIVE["stall_seconds_total"], ["part"], registry=registry
        )
        self._bytes = prometheus_client.Counter(
            PREFIX + "written_bytes", LIVE["written_bytes_total"], registry=registry
        )
        for outcome in OUTCOMES:
            self._checkpoints.labels(outcome)
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(
                f"telemetry.prometheus_port = {port} on telemetry.prometheus_host = {host!r}: {error}"
            ) from error

    def follow(self, passed: Callable[[], Boundary], safe: Callable[[], Boundary]) -> None:
        """`passed()` is the newest boundary, `safe()` that of the newest commit."""
        self._live["step"].set_function(lambda: passed().step)
        self._live["committed_step"].set_function(lambda: safe().step)
        self._live["steps_since_commit"].set_function(lambda: passed().step - safe().step)
        self._live["seconds_since_commit"].set_function(lambda: time.monotonic() - safe().at)

    def write(self, event: Event) -> None:
        if event["event"] == "stopped":
            self._live["stopped"].set(1)
        if event["event"] != "checkpoint":
            return
        self._checkpoints.labels(event["outcome"]).inc()
        self._bytes.inc(event["shard_bytes"] or 0)
        for part in PARTS:
            self._stalls.labels(part).inc(event[f"stall_{part}_s"] or 0)
        if event["outcome"] == "committed":
            for name, metric in self._measures.items():
                if event[name] is not None:
                    metric.set(event[name])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_SHUTDOWN_S)

    def leave_to_parent(self) -> None:
        """The child must not go on holding the port once its parent is gone."""
        self._server.socket.close()
