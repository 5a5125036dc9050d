# SPDX-License-Identifier: Apache-2.0
"""What `attach()` returns with ``enabled: false``: the same calls, which do nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from layerwise_dist import _native
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine.notices import OnCommit, OnFailure


class DisabledEngine:
    """Hooks nothing, writes nothing, restores nothing, so that a script needs no branch for it."""

    staged_step = durable_step = committed_step = None
    client_state = restored_from = None
    lacking: tuple[str, ...] = ()

    def __init__(self, config: LayerwiseConfig, mid_window: Callable[[], bool] = lambda: False) -> None:
        """`mid_window` says whether gradients are being accumulated: an `end_step()` then counts nothing."""
        self.config = config
        self.completed = 0
        self._mid_window = mid_window

    def restore(
        self, step: int | None = None, *, tag: str | None = None, saved: bool = False, on_missing: str | None = None,
        partly: bool = False, cast: str | None = None, objects: Mapping[str, str] | None = None,
        model_only: bool = False,
    ) -> int:  # fmt: skip
        return 0

    def save(
        self, tag: str | None = None, client_state: Mapping[str, Any] | None = None, *, timeout: float | None = None,
        within_window: bool = False,
    ) -> int | None:  # fmt: skip
        return None if tag is None else self.completed

    def drain(self, timeout: float | None = None) -> None:
        return None

    def steps(self, total: int) -> Iterator[int]:
        while self.completed < total:
            yield self.completed
            self.completed += 1

    def end_step(self) -> None:
        self.completed += not self._mid_window()

    def explicit(self, *, restored_in_loop: bool = False) -> None:
        return None

    def wait(self, step: int, level: str = "committed", timeout: float | None = None) -> None:
        return None

    def trace(self, path: str | os.PathLike[str]) -> None:
        return None

    def on_commit(self, callback: OnCommit) -> None:
        return None

    def on_failure(self, callback: OnFailure) -> None:
        return None

    @cached_property
    def metadata(self) -> CheckpointMetadataManager:
        """Of a directory in which there is nothing."""
        env = _native.MockEnv()
        env.make_dir("/disabled", 0o700)
        return CheckpointMetadataManager(env, "/disabled")

    def stats(self) -> dict[str, float | int]:
        return {}

    def close(self) -> None:
        return None

    def __enter__(self) -> DisabledEngine:
        return self

    def __exit__(self, *_: object) -> None:
        return None
