# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own save and load calls, for any directory and for parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from layerwise_dist.commit.transports.choice import open_transport
from layerwise_dist.config import LayerwiseConfig, PreemptionConfig, TelemetryConfig
from layerwise_dist.engine.assembly import assemble, environment
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.engine.workings import Workings
from layerwise_dist.frameworks.parts import Parts


class OnCall:
    """An engine's workings as such a script's calls see them. All ranks call alike."""

    def __init__(self, workings: Workings, way_on: str) -> None:
        """`way_on` tells a script what to do that trains in a directory with checkpoints before it loaded one."""
        self._saves, self._restores, self._captures = workings.saves, workings.restores, workings.captures
        self._participant, self._boundary, self._lend = workings.participant, workings.boundary, workings.lend
        self.config: LayerwiseConfig = workings.config
        self._restores.advise(way_on)

    def save(
        self, root: str | None, tag: str, client_state: Mapping[str, Any] | None, *, within_window: bool = False
    ) -> None:
        """`LayerwiseEngine.save`, into another directory if there is a `root`."""
        if root is None:
            self._saves.save(tag, client_state, within_window=within_window)
        else:
            self._save_beside(root, tag, client_state, within_window=within_window)

    def load(self, root: str | None, tag: str | None, parts: Parts) -> tuple[str, dict[str, Any] | None] | None:
        """The folder of what was loaded and its client_state; None if there is none and no tag was asked for.

        Raises as `restore(tag=...)`.
        """
        self._restores.restore_parts(parts, tag=tag, root=root)
        folder = self._restores.restored_from
        return None if folder is None else (folder, self._restores.client_state)

    def loads_elsewhere(self) -> None:
        """Something else is about to overwrite the model: nothing reads it any more."""
        self._captures.drain(self.config.commit.timeout_s)

    def loaded_elsewhere(self) -> None:
        """Something else did; training continues from there."""
        self._restores.begin_after_newest()

    def agree(self, what: str, vote: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What rank 0 decides from what all ranks say, on every rank."""
        return self._participant.agree(what, vote, decide)

    def _save_beside(self, root: str, tag: str, client_state: Mapping[str, Any] | None, *, within_window: bool) -> None:
        """The directory is taken for this call only, so other engines and jobs may save there too, one after the other.
        What is committed follows what was committed there last, whoever did it. Raises as `save()` and `attach()` do.
        """
        self._saves.check(tag, within_window=within_window)
        self._boundary.call()  # the iteration ends here if it has updated, as with save(tag)
        changes: dict[str, Any] = {
            "dir": root, "every_n_steps": None, "update": "auto", "preemption": PreemptionConfig(),
            "telemetry": TelemetryConfig(),
        }  # fmt: skip
        if self.config.mode == "monitor":
            changes["mode"] = "direct"  # the call waits until it is committed: there is nothing to outlive
        config = self.config.model_copy(update=changes)
        transport = open_transport(config.commit.transport, config.commit.timeout_s)
        with assemble(None, None, config, transport, environment(config), loan=self._lend()) as session:
            workings_of(session).restores.begin_after_newest()
            session.save(tag, client_state, within_window=within_window)
