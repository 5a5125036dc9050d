# SPDX-License-Identifier: Apache-2.0
"""Saves twice by `dcp.save`, and is killed within the second.

dcp_killed.py DIR commit     right before the manifest
dcp_killed.py DIR early      by a broken rule: the manifest comes first, and the shard never becomes durable
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from layerwise_dist.dcp import LayerwiseWriter
from layerwise_dist.interop.one_commit import OneCommit
from layerwise_dist.interop.one_shard import OneShard
from layerwise_dist.storage.reports import ShardReport


def die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def commit_before_the_shard() -> None:
    begun: list[OneCommit] = []
    begin = OneCommit.__init__

    def remember(self: OneCommit, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        begun.append(self)

    def persist(self: OneShard, state: Any) -> None:
        (commit,) = begun
        report = commit._durable(ShardReport(0, "rank_00000.safetensors", 8192, 4096, 0))
        commit._committer.commit(commit.attempt.seq, commit.attempt.step, [report])
        die()

    OneCommit.__init__, OneShard.persist = remember, persist  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    folder, how = sys.argv[1:]
    dcp.save({"n": 1, "t": torch.ones(3)}, storage_writer=LayerwiseWriter(folder))
    if how == "commit":
        OneCommit.commit = die  # type: ignore[method-assign]
    else:
        commit_before_the_shard()
    dcp.save({"n": 2, "t": torch.ones(3)}, storage_writer=LayerwiseWriter(folder))
