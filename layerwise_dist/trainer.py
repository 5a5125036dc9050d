# SPDX-License-Identifier: Apache-2.0
"""LayerwiseCheckpointTrainer: model and optimizer in one object whose `step()` updates and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from layerwise_dist.config import LayerwiseConfig, load_config
from layerwise_dist.engine.assembly import attach
from layerwise_dist.engine.disabled import DisabledEngine
from layerwise_dist.engine.engine import LayerwiseEngine
from layerwise_dist.errors import ConfigError
from layerwise_dist.layers.graph import ROOT, DependencyGraphBuilder
from layerwise_dist.scheduler import BLOCKS_A_BATCH

log = logging.getLogger("layerwise_dist")


class LayerwiseCheckpointTrainer:
    """Trains as before, and saves.

        trainer = LayerwiseCheckpointTrainer(model, optimizer, checkpoint_dir="checkpoints")
        trainer.load_checkpoint()
        for batch in batches:
            trainer.zero_grad()
            loss(model(batch)).backward()
            trainer.step()
        trainer.shutdown()

    An iteration ends with `step()`, so an LR schedule belongs in it: ``trainer.step(scheduler=scheduler)``. Every
    argument but the first two sets keys of the configuration and overrides `config`; docs/appendix/from-pccheck.md has
    the table.

    Args:
        use_pccheck: False writes nothing (``mode: mock``): all else is done, and what would be written is counted.
        use_monitor: a process of its own writes (``mode: monitor``).
        num_threads: writes in flight at once (``writer.queue_depth``).
        max_async: checkpoints in flight at once (``max_in_flight``). With more wanted, `step()` waits.
        batch_size_mb: MiB that are captured and written together at least: small layers are joined until they have as
            much. A single write is a quarter of it (``writer.block_kb``).
        ratio: bytes of the pool for staging and evacuation (``pool_mb``) as a multiple of the bytes of the parameters
            that this rank holds; without it the pool is sized automatically.
        checkpoint_dir: ``dir``.
        is_distributed, rank, world_size: what the script believes; an error if torch.distributed says otherwise.
        state: what else belongs to a step, as `attach()` takes it.
        fresh: start anew in a directory that holds checkpoints.

    Attributes:
        engine: the LayerwiseEngine behind it, with all that is not here.

    Raises as `attach()`; ConfigError for arguments that contradict the job.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, use_pccheck: bool = True, use_monitor: bool = False,
        num_threads: int | None = None, max_async: int | None = None, batch_size_mb: int | None = None,
        ratio: float | None = None, checkpoint_dir: str | None = None, is_distributed: bool | None = None,
        rank: int | None = None, world_size: int | None = None,
        config: LayerwiseConfig | Mapping[str, Any] | str | None = None, state: dict[str, Any] | None = None, *,
        fresh: bool = False,
    ) -> None:  # fmt: skip
        _check_job(is_distributed, rank, world_size)
        if use_monitor and not use_pccheck:
            raise ConfigError("use_monitor=True with use_pccheck=False: there is nothing for a monitor to write")
        self._model, self._optimizer = model, optimizer
        settings = load_config(config)
        changed: dict[str, Any] = {} if use_pccheck else {"mode": "mock"}
        if use_monitor:
            changed["mode"] = "monitor"
        writer: dict[str, Any] = {}
        if num_threads is not None:
            writer["queue_depth"] = num_threads
        if batch_size_mb is not None:
            writer["block_kb"] = batch_size_mb * 1024 // BLOCKS_A_BATCH
        if writer:
            changed["writer"] = {**settings.writer.model_dump(exclude_unset=True), **writer}
        if max_async is not None:
            changed["max_in_flight"] = max_async
        if checkpoint_dir is not None:
            changed["dir"] = checkpoint_dir
        if ratio is not None:
            changed["pool_mb"] = max(8, round(ratio * _local_bytes(model) / 2**20))
        self.engine: LayerwiseEngine | DisabledEngine = attach(
            model, optimizer, settings, state=state, fresh=fresh, **changed
        )
        self.engine.explicit(restored_in_loop=True)
        self._schedulers = [each for each in (state or {}).values() if isinstance(each, LRScheduler)]
        self._scheduled = self._epochs()
        self._warned = False

    @property
    def completed(self) -> int:
        """Steps completed, those before the loaded checkpoint included."""
        return self.engine.completed

    def step(self, closure: Callable[[], Any] | None = None, *, scheduler: LRScheduler | None = None) -> Any:
        """Updates the model, and ends the iteration: if a checkpoint is due, it goes to the disk in the background.

        `scheduler` is stepped in between. Returns what the optimizer's `step()` returns. Raises CommitError when all
        ranks stop because checkpoints fail.
        """
        if not self._warned and self._epochs() != self._scheduled:
            self._warned = True
            log.warning(
                "an LR scheduler was stepped after trainer.step(), where its iteration was over and saved: a "
                "resume would "
                "be one step of it short. Let trainer.step(scheduler=scheduler) do it"
            )
        result = self._optimizer.step() if closure is None else self._optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
        self.engine.end_step()
        self._scheduled = self._epochs()
        return result

    def _epochs(self) -> list[int]:
        return [scheduler.last_epoch for scheduler in self._schedulers]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's."""
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def save_full_checkpoint(self, tag: str = "full") -> int:
        """Saves everything as it is now under a name, and returns the step once it is committed. Between two
        iterations.

        Retention keeps the newest of each name. On all ranks alike.
        """
        step = self.engine.save(tag)
        assert step is not None, "under a tag it is saved at once"
        return step

    def load_checkpoint(self, step: int | None = None, *, tag: str | None = None) -> list[str]:
        """Loads the newest committed checkpoint, or that of `step` or `tag`; returns the layers that it had not.

        Those stay as they are; all of them, if there is no checkpoint. Optimizer state, buffers, random numbers and
        `state` are loaded too. Call it right before the loop: random numbers are as they were when `step()` returned.
        Raises MismatchError, and loads nothing, if it holds what this model has not or in another shape; otherwise as
        `LayerwiseEngine.restore`.
        """
        self.engine.restore(step, tag=tag, partly=True)
        self._scheduled = self._epochs()
        if self.engine.restored_from is None:
            return list(DependencyGraphBuilder(self._model).layer_info)
        layers = (name.split("/", 1)[1].rpartition(".")[0] or ROOT for name in self.engine.lacking)
        return list(dict.fromkeys(layers))

    def shutdown(self) -> None:
        """Waits until the last checkpoint is committed, and lets go of everything."""
        self.engine.close()

    def __enter__(self) -> LayerwiseCheckpointTrainer:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.engine.__exit__(*exception)


def _local_bytes(model: nn.Module) -> int:
    local = [getattr(param, "_local_tensor", param) for param in model.parameters()]
    return sum(each.numel() * each.element_size() for each in local)


def _check_job(is_distributed: bool | None, rank: int | None, world_size: int | None) -> None:
    there = dist.is_available() and dist.is_initialized()
    found = {
        "is_distributed": there, "rank": dist.get_rank() if there else 0,
        "world_size": dist.get_world_size() if there else 1,
    }  # fmt: skip
    given = {"is_distributed": is_distributed, "rank": rank, "world_size": world_size}
    wrong = [f"{name} = {value}" for name, value in given.items() if value is not None and value != found[name]]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: torch.distributed is {'' if there else 'not '}initialized, with rank "
            f"{found['rank']} of "
            f"{found['world_size']}; call init_process_group() first, or leave the argument out"
        )
