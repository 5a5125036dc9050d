"""What scripts ask for by DeepSpeed's own calls, of any directory and of parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from layerwise_dist.commit.transports.choice import open_transport
from layerwise_dist.config import LayerwiseConfig, PreemptionConfig
from layerwise_dist.engine.assembly import assemble, environment
from layerwise_dist.engine.engine import LayerwiseEngine
from layerwise_dist.frameworks.parts import Parts


class OnCall:
    """A `LayerwiseEngine` as such a script's calls see it; like the engine's own parts it works on its attributes. All
    ranks call alike.
    """

    def __init__(self, ckpt: LayerwiseEngine, way_on: str) -> None:
        """`way_on` tells a script what to do that trains in a directory with checkpoints before it loaded one."""
        self._ckpt = ckpt
        ckpt._way_on = way_on

    @property
    def config(self) -> LayerwiseConfig:
        return self._ckpt.config

    def save(
        self, root: str | None, tag: str, client_state: Mapping[str, Any] | None, *, within_window: bool = False
    ) -> None:
        """`LayerwiseEngine.save`, into another directory if there is a `root`."""
        if root is None:
            self._ckpt.save(tag, client_state, within_window=within_window)
        else:
            _save_beside(self._ckpt, root, tag, client_state, within_window=within_window)

    def load(self, root: str | None, tag: str | None, parts: Parts) -> tuple[str, dict[str, Any] | None] | None:
        """The folder of what was loaded and its client_state; None if there is none and no tag was asked for.

        Raises as `restore(tag=...)`.
        """
        self._ckpt._restore_parts(parts, tag=tag, root=root)
        folder = self._ckpt.restored_from
        return None if folder is None else (folder, self._ckpt.client_state)

    def loads_elsewhere(self) -> None:
        """Something else is about to overwrite the model: nothing reads it any more."""
        self._ckpt.drain()

    def loaded_elsewhere(self) -> None:
        """Something else did; training goes on from there."""
        self._ckpt._begin_behind_newest()

    def agree(self, what: str, vote: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What rank 0 decides from what all ranks say, on every rank."""
        return self._ckpt._participant.agree(what, vote, decide)


def _save_beside(
    ckpt: LayerwiseEngine, root: str, tag: str, client_state: Mapping[str, Any] | None, *, within_window: bool
) -> None:
    """The directory is taken for this call only, so other engines and jobs may save there too, one after the other.
    What is committed follows what was committed there last, whoever did it. Raises as `save()` and `attach()` do.
    """
    ckpt._check_save(tag, within_window)
    ckpt._end_for_call()
    changes: dict[str, Any] = {"dir": root, "every_n_steps": None, "update": "auto", "preemption": PreemptionConfig()}
    if ckpt.config.mode == "monitor":
        changes["mode"] = "direct"  # the call waits until it is committed: there is nothing to outlive
    config = ckpt.config.model_copy(update=changes)
    transport = open_transport(config.commit.transport, config.commit.timeout_s)
    with assemble(None, None, config, transport, environment(config), lender=ckpt) as session:
        session._begin_behind_newest()
        session.save(tag, client_state, within_window=within_window)
