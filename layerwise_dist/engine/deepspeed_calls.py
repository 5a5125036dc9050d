# SPDX-License-Identifier: Apache-2.0
"""Serves `engine.save_checkpoint()` and `engine.load_checkpoint()` of an unchanged script."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.errors import NotFoundError, UnsupportedError
from layerwise_dist.frameworks.deepspeed.support import accumulating
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.frameworks.private_names import DEEPSPEED, require_of_deepspeed
from layerwise_dist.rehearsal.plan import redirected
from layerwise_dist.storage import filenames

log = logging.getLogger("layerwise_dist")


class Checkpoints(Protocol):
    """What is asked of `on_call.OnCall`. `root` is a directory, None the engine's own."""

    @property
    def config(self) -> LayerwiseConfig: ...
    def save(
        self, root: str | None, tag: str, client_state: Mapping[str, Any] | None, *, within_window: bool = False
    ) -> None: ...
    def load(self, root: str | None, tag: str | None, parts: Parts) -> tuple[str, dict[str, Any] | None] | None: ...
    def loads_elsewhere(self) -> None: ...
    def loaded_elsewhere(self) -> None: ...
    def agree(self, what: str, vote: Any, decide: Callable[[list[Any]], Any]) -> Any: ...


class CheckpointCalls:
    """Takes the place of the two calls on one engine, with DeepSpeed's own signatures and return values.

    `save_checkpoint` returns once the checkpoint is committed. `load_checkpoint` without a tag takes the newest that
    `save_checkpoint` made in that directory, as DeepSpeed's does. Directories other than the configuration's are taken
    for the time of a call. From one that holds none of these checkpoints DeepSpeed's own `load_checkpoint` loads.
    """

    def __init__(self, engine: Any, ckpt: Checkpoints, asked_for: str) -> None:
        """`asked_for` is the directory that the script knows as its own, which is `ckpt`'s unless another engine of
        the process has that.

        Raises UnsupportedError naming what another version of DeepSpeed does not have.
        """
        names = ("save_checkpoint", "load_checkpoint", *DEEPSPEED["engine, its checkpoint calls"])
        require_of_deepspeed(engine, names, "the engine")
        self._engine, self._ckpt = engine, ckpt
        self._own = os.path.realpath(ckpt.config.path)
        self._asked_for = os.path.realpath(os.path.expanduser(asked_for))
        self._warned = False
        self._load_of_deepspeed = engine.load_checkpoint
        engine.save_checkpoint, engine.load_checkpoint = self.save_checkpoint, self.load_checkpoint

    def save_checkpoint(
        self, save_dir: str, tag: Any = None, client_state: Mapping[str, Any] | None = None, save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:  # fmt: skip
        """Raises ValueError for no directory, UnsupportedError for `save_latest=False`, and as `ckpt.save()`."""
        if not save_dir:
            raise ValueError(f"save_checkpoint({save_dir!r}): the name of a directory is expected")
        if not save_latest:
            raise UnsupportedError(
                "save_checkpoint(save_latest=False): load_checkpoint() without a tag takes the newest checkpoint"
            )
        if exclude_frozen_parameters:
            log.warning("save_checkpoint(exclude_frozen_parameters=True): frozen parameters are saved anyway")
        tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
        self._engine._checkpoint_tag_validation(tag)  # what ds_config says of tags that differ
        tag = self._ckpt.agree("name a checkpoint", tag, lambda tags: tags[0])
        within = self._may_be_within()
        folder = self._absolute(save_dir)
        self._event("checkpoint_event_prologue")
        try:
            root = None if self._is_own(folder) else redirected(folder)
            self._ckpt.save(root, tag, client_state, within_window=within)
        finally:
            self._event("checkpoint_event_epilogue")
        return True

    def _event(self, name: str) -> None:
        """What ZeRO-3 does around its own: parameters that are whole on all ranks between iterations are so after."""
        if hasattr(self._engine.optimizer, name):
            getattr(self._engine.optimizer, name)()

    def _may_be_within(self) -> bool:
        """Whether to save within an accumulation window, as DeepSpeed does; not where layers may be updated already."""
        if self._ckpt.config.update == "in_backward":
            return False
        if accumulating(self._engine) and not self._warned:
            self._warned = True
            log.warning(
                "save_checkpoint() within an accumulation window: as with DeepSpeed, the gradients of its first "
                "micro-batches are not saved, and a resume restarts the window"
            )
        return True

    def load_checkpoint(
        self, load_dir: str, tag: Any = None, load_module_strict: bool = True, load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
        """(the checkpoint's folder, its client_state), or (None, None) if there is none.

        Raises UnsupportedError for `custom_load_fn`, and as `ckpt.restore()`.
        """
        folder = self._absolute(load_dir)
        own = self._is_own(folder)
        if not own and (there := redirected(folder)) != folder and self._holds_ours(there):
            folder = there
        if not own and not self._holds_ours(folder):
            self._ckpt.loads_elsewhere()
            found = self._load_of_deepspeed(
                load_dir, tag=tag, load_module_strict=load_module_strict, load_optimizer_states=load_optimizer_states,
                load_lr_scheduler_states=load_lr_scheduler_states, load_module_only=load_module_only,
                custom_load_fn=custom_load_fn,
            )  # fmt: skip
            if found[0] is not None:
                self._ckpt.loaded_elsewhere()
            return found
        if custom_load_fn is not None:
            raise UnsupportedError("load_checkpoint(custom_load_fn=...): this library fills the tensors itself")
        parts = Parts(load_module_only, load_optimizer_states, load_lr_scheduler_states, load_module_strict)
        tag = None if tag is None else str(tag)
        also = redirected(self._asked_for)  # in a rehearsal this engine's own folder stands for it
        shared = own and also != self._own and self._holds_ours(also)
        loaded = None
        try:
            loaded = self._ckpt.load(None if own else folder, tag, parts)
        except NotFoundError:
            if not shared:
                raise
        if shared and loaded is None:
            loaded = self._ckpt.load(also, tag, parts)
        if loaded is None:
            log.warning("load_checkpoint(): save_checkpoint() has made none in %s yet", folder)
            return None, None
        return loaded

    def _absolute(self, folder: Any) -> str:
        return os.path.abspath(os.path.expanduser(os.fspath(folder)))

    def _is_own(self, folder: str) -> bool:
        return os.path.realpath(folder) in (self._own, self._asked_for)

    def _holds_ours(self, folder: str) -> bool:
        """Whether checkpoints of this library are, or were, in a directory; as rank 0 sees it."""
        there = os.path.exists(os.path.join(folder, filenames.IDENTITY))
        return bool(self._ckpt.agree("look into a directory", there, lambda votes: votes[0]))
