"""`engine.save_checkpoint()` and `engine.load_checkpoint()` of a script that stays as it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.errors import ConfigError, UnsupportedError
from layerwise_dist.frameworks.deepspeed.units import missing

log = logging.getLogger("layerwise_dist")


class Checkpoints(Protocol):
    """What is asked of `LayerwiseEngine`."""

    config: LayerwiseConfig
    client_state: dict[str, Any] | None
    restored_from: str | None

    def save(self, tag: str, client_state: Mapping[str, Any] | None = None) -> int: ...
    def restore(self, *, tag: str | None = None, saved: bool = False) -> int: ...
    def drain(self) -> None: ...


class CheckpointCalls:
    """Takes the place of the two calls on one engine, with DeepSpeed's own signatures and return values.

    `save_checkpoint` returns once the checkpoint is committed. Its directory must be the configuration's: no other is
    written to. `load_checkpoint` without a tag takes the newest that `save_checkpoint` made, as DeepSpeed's does; from
    any other directory DeepSpeed's own loads.
    """

    def __init__(self, engine: Any, ckpt: Checkpoints) -> None:
        """Raises UnsupportedError naming what another version of DeepSpeed does not have."""
        for name in ("save_checkpoint", "load_checkpoint"):
            if not callable(getattr(engine, name, None)):
                raise UnsupportedError(missing("the engine", name))
        self._engine, self._ckpt = engine, ckpt
        self._load_of_deepspeed = engine.load_checkpoint
        engine.save_checkpoint, engine.load_checkpoint = self.save_checkpoint, self.load_checkpoint

    def save_checkpoint(
        self, save_dir: str, tag: Any = None, client_state: Mapping[str, Any] | None = None, save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:  # fmt: skip
        """Raises ConfigError for another directory, UnsupportedError for `save_latest=False`, and as `ckpt.save()`."""
        if not self._is_ours(save_dir):
            raise ConfigError(
                f"save_checkpoint({str(save_dir)!r}): checkpoints go to layerwise_checkpoint.dir = "
                f"{self._ckpt.config.path!r}, and to no other directory"
            )
        if not save_latest:
            raise UnsupportedError(
                "save_checkpoint(save_latest=False): load_checkpoint() without a tag takes the newest checkpoint"
            )
        if exclude_frozen_parameters:
            log.warning("save_checkpoint(exclude_frozen_parameters=True): frozen parameters are saved all the same")
        tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
        self._ckpt.save(tag, client_state)
        return True

    def load_checkpoint(
        self, load_dir: str, tag: Any = None, load_module_strict: bool = True, load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
        """(the checkpoint's folder, its client_state), or (None, None) if there is none.

        Raises UnsupportedError for a load of a part, and as `ckpt.restore()`.
        """
        options = {
            "load_module_strict": load_module_strict, "load_optimizer_states": load_optimizer_states,
            "load_lr_scheduler_states": load_lr_scheduler_states, "load_module_only": load_module_only,
            "custom_load_fn": custom_load_fn,
        }  # fmt: skip
        if not self._is_ours(load_dir):
            self._ckpt.drain()  # DeepSpeed's load overwrites what may still be read
            return self._load_of_deepspeed(load_dir, tag=tag, **options)
        usual = {"load_module_only": False, "custom_load_fn": None}
        for name, value in options.items():
            if value != usual.get(name, True):
                raise UnsupportedError(
                    f"load_checkpoint({name}={value!r}): a layerwise checkpoint is restored as a whole"
                )
        if tag is None:
            self._ckpt.restore(saved=True)
        else:
            self._ckpt.restore(tag=str(tag))
        if self._ckpt.restored_from is None:
            log.warning("load_checkpoint(): save_checkpoint() has made none in %s yet", self._ckpt.config.path)
            return None, None
        return self._ckpt.restored_from, self._ckpt.client_state

    def _is_ours(self, folder: str) -> bool:
        return os.path.realpath(os.path.expanduser(folder)) == os.path.realpath(self._ckpt.config.path)
