# SPDX-License-Identifier: Apache-2.0
"""Starts a session through monitors, and makes the parts of an engine that use one."""

from __future__ import annotations

from typing import NamedTuple

from layerwise_dist.commit.coordinator_thread import CoordinatorThread
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import SessionInfo
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import CommitRequests
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.monitor.connection import MonitorLink
from layerwise_dist.monitor.messages import Open, Opened
from layerwise_dist.monitor.staging import RemoteCommitter, StagingAdapter
from layerwise_dist.storage.protocols import Env, ShardWriterAdapter


class OpenSession(NamedTuple):
    """What writes and decides for one rank, here or in another process. `committer` and `coordinator` are rank 0's."""

    adapter: ShardWriterAdapter
    manager: CheckpointMetadataManager
    info: SessionInfo
    committer: CommitRequests | None
    coordinator: CoordinatorThread | None


def open_monitored(
    link: MonitorLink, env: Env, config: LayerwiseConfig, participant: Participant, framework: str,
    software: dict[str, str], *, fresh: bool,
) -> OpenSession:  # fmt: skip
    """All ranks together. The monitors take the directory; raises what they raise, on every rank alike."""
    message: Open = {"t": "open", "framework": framework, "software": software, "fresh": fresh}
    opened: Opened = link.ask("open the checkpoint directory", message, 2 * config.commit.timeout_s)
    adapter = StagingAdapter(link, config, opened, participant.written)
    manager = CheckpointMetadataManager(env, config.path, file_mode=config.file_bits)
    committer = RemoteCommitter(link, config.commit.timeout_s) if participant.rank == 0 else None
    return OpenSession(adapter, manager, SessionInfo(**opened["info"]), committer, None)
