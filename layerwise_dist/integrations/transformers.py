# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer: one line after it is made, and `train()` resumes exactly after any crash.

    from layerwise_dist.integrations.transformers import attach

    trainer = Trainer(model=model, args=args, train_dataset=data)
    attach(trainer, dir="checkpoints", every_n_steps=50)
    trainer.train()

A callback can't do it: `on_train_begin` comes when the loop has decided where it begins. So some of the Trainer's
methods are wrapped on this one object (`trainer_names.py` lists all of them). In the order of a `train()`:

- `_init_training_state`: the model is prepared here already, so that an engine can be attached and restored before the
  Trainer is told at which epoch and batch it begins.
- `_run_epoch`: in the epoch that a resume begins in, the loader goes on at its place (`loop/placed.py`), not by the
  Trainer's own skipping, which draws other random numbers.
- `get_batch_samples`: before the next step's batches are drawn the last step is over: logged, saved and evaluated.
- `_finalize_training`: the engine is closed before anything loads other weights.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist

from layerwise_dist.config import LayerwiseConfig, load_config
from layerwise_dist.engine.assembly import attach as attach_engine
from layerwise_dist.engine.engine import LayerwiseEngine
from layerwise_dist.engine.notices import OnCommit, OnFailure
from layerwise_dist.errors import BoundaryError, ConfigError, UnsupportedError
from layerwise_dist.integrations import trainer_names
from layerwise_dist.integrations.best import BEST, BestMetric
from layerwise_dist.integrations.prepared_loaders import base_of, seedable_sampler
from layerwise_dist.integrations.trainer_progress import At, Progress
from layerwise_dist.loop.placed import PlacedTap
from layerwise_dist.reading.loading import load

log = logging.getLogger("layerwise_dist")

_HERE = "layerwise_dist"  # as `resume_from_checkpoint`: the place and the random numbers are taken care of
_ATTACHED = "_layerwise_checkpoints"
_LOADER = "loader"


def attach(
    trainer: Any, config: LayerwiseConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None, *,
    fresh: bool = False, best_metric: str | None = None, greater_is_better: bool | None = None, **overrides: Any,
) -> TrainerCheckpoints:  # fmt: skip
    """Turns checkpointing on for each `trainer.train()` from now on. Call it on every rank, once, after the Trainer is
    made.

    Args:
        trainer: a `transformers.Trainer`, or of a class that inherits from it.
        config: as `layerwise_dist.attach`; `overrides` (``dir=...``, ``every_n_steps=...``) go on top. Steps are those
            of `TrainerState.global_step`: optimizer updates.
        fresh: the first `train()` starts a new lineage in a directory that holds checkpoints.
        best_metric: a name that evaluations give (``eval_loss``). The step of the best one is saved under the tag
            ``best``, and its weights are in the model when `train()` returns.
        greater_is_better: of that metric; by default as in TrainingArguments, else unless its name ends with "loss".

    Raises ConfigError, BoundaryError (within `train()`), or UnsupportedError: a Trainer whose data can't be resumed
    exactly, a second `attach()`, or a name that this version of transformers has not. What `layerwise_dist.attach`
    and `restore()` raise, `train()` raises.
    """
    settings = load_config(config, **overrides)
    module = importlib.import_module("transformers.trainer")
    if not isinstance(trainer, module.Trainer):
        raise UnsupportedError(f"attach() needs a transformers.Trainer, not {type(trainer).__name__}")
    if hasattr(trainer, _ATTACHED):
        raise UnsupportedError("this Trainer is already attached: call attach() once, and train() as often as you like")
    if _is_training(trainer, module):
        raise BoundaryError(
            "attach() within this Trainer's train(), which has already started: the epoch and the position in the "
            "data are decided by now. Call it before train()"
        )
    if best_metric is not None and settings.mode == "mock":
        raise ConfigError("best_metric with mode 'mock': nothing is written that could be loaded at the end")
    best = None if best_metric is None else BestMetric(trainer, best_metric, greater_is_better)
    checkpoints = TrainerCheckpoints(trainer, settings, fresh=fresh, best=best)
    if settings.enabled:
        trainer_names.check(module, trainer)
        _check_arguments(trainer)
        checkpoints._wrap()
    setattr(trainer, _ATTACHED, checkpoints)
    return checkpoints


def _is_training(trainer: Any, module: Any) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "train" and frame.f_globals is vars(module) and frame.f_locals.get("self") is trainer:
            return True
        frame = frame.f_back
    return False


def _check_arguments(trainer: Any) -> None:
    args, refused = trainer.args, []
    if args.ignore_data_skip:
        refused.append("ignore_data_skip=True: a resume would restart the epoch's data")
    if args.auto_find_batch_size:
        refused.append("auto_find_batch_size=True: a step could start with one batch size and end with another")
    if trainer.is_deepspeed_enabled:
        refused.append(
            "deepspeed: this Trainer's engine has not been tried. Train the engine that deepspeed.initialize() returns "
            "(docs/integrations/deepspeed.md)"
        )
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1 and args.world_size == 1:
        refused.append(
            f"this is one of {world} processes by its environment, and a Trainer that trains alone: set use_cpu=True "
            "where there is no accelerator"
        )
    if refused:
        raise UnsupportedError("TrainingArguments that a run can't be resumed exactly with: " + "; ".join(refused))


class TrainerCheckpoints:
    """What `attach()` returns. All methods belong to the training thread.

    Attributes:
        ckpt: the engine, while `train()` runs: `save()` asks for a checkpoint of this step's end, `wait()`, `stats()`
            and the like; None before and after, and where nothing is turned on.
        resumed_from: the step that the last `train()` resumed from; 0 if it started from scratch.
    """

    def __init__(self, trainer: Any, settings: LayerwiseConfig, *, fresh: bool, best: BestMetric | None) -> None:
        self._trainer, self._settings, self._fresh, self._best = trainer, settings, fresh, best
        self.ckpt: LayerwiseEngine | None = None
        self.resumed_from = 0
        self._on_commit: list[OnCommit] = []
        self._on_failure: list[OnFailure] = []
        # Of one train(): what the Trainer has made, and what a resume brings until the loop takes it.
        self._progress: Progress | None = None
        self._tap: PlacedTap | None = None
        self._loader: Any = None
        self._prepared: Any = None
        self._resume: At | None = None
        self._eval_on_start: bool | None = None
        self._forget()

    def on_commit(self, callback: OnCommit) -> None:
        """As `LayerwiseEngine.on_commit`, for each `train()` that begins from now on."""
        self._on_commit.append(callback)

    def on_failure(self, callback: OnFailure) -> None:
        """As `LayerwiseEngine.on_failure`, for each `train()` that begins from now on."""
        self._on_failure.append(callback)

    # -- the Trainer's methods ------------------------------------------------------------------------------------

    def _wrap(self) -> None:
        around: dict[str, Callable[..., Any]] = {
            "train": self._asked, "_inner_training_loop": self._train, "set_initial_training_values": self._values,
            "_init_training_state": self._init_training_state, "_prepare_for_training": self._prepare,
            "_run_epoch": self._run_epoch, "get_batch_samples": self._batches, "_load_rng_state": self._load_rng,
            "_finalize_training": self._finalize,
        }  # fmt: skip
        for name, method in around.items():
            plain = getattr(self._trainer, name)
            setattr(self._trainer, name, functools.wraps(plain)(functools.partial(method, plain)))
        callback = importlib.import_module("transformers.trainer_callback").TrainerCallback
        # First of all, so that what others draw when an epoch begins is drawn from the boundary's random numbers.
        self._trainer.callback_handler.callbacks.insert(0, _callback(callback, self._epoch_begins, self._evaluated))

    def _asked(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        if given.get("resume_from_checkpoint"):
            raise UnsupportedError(
                f"train(resume_from_checkpoint=...) with checkpoints attached in {self._settings.path}: it "
                "continues from those. Leave it out"
            )
        if given.get("trial") is not None:
            raise UnsupportedError(
                "hyperparameter_search() with checkpoints attached: trials would continue from each other"
            )
        return plain(*args, **kwargs)

    def _train(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._forget()
        try:
            result = plain(*args, **kwargs)
        except BaseException as error:
            if self.ckpt is not None:
                self.ckpt.__exit__(type(error), error, error.__traceback__)
            raise
        finally:
            self.ckpt = None
            if self._tap is not None:
                self._tap.detach()
            if self._eval_on_start is not None:
                self._trainer.args.eval_on_start = self._eval_on_start
            self._forget()
        return result

    def _values(self, plain: Callable[..., Any], args: Any, dataloader: Any) -> Any:
        self._loader = dataloader
        values = plain(args, dataloader)
        self._steps_in_epoch = values[5]
        return values

    def _init_training_state(
        self, plain: Callable[..., Any], max_steps: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        """Where the training begins: epoch, and batches of it that are consumed."""
        trainer = self._trainer
        begins = plain(max_steps, *args, **kwargs)
        # The Trainer would do it next.
        self._prepared = trainer._prepare_for_training(max_steps, self._loader, None)
        ckpt, progress = self._attach()
        fresh, self._fresh = self._fresh, False
        self._step = self.resumed_from = 0 if fresh else ckpt.restore()
        if progress.saved is None:
            return begins
        assert self._tap is not None
        self._tap.restored()
        progress.put()
        progress.put_kept()
        self._save_best()  # the job may have died right before it was
        at = progress.at
        self._before_s, self._resume = at["elapsed_s"], at
        self._eval_on_start, trainer.args.eval_on_start = trainer.args.eval_on_start, False
        over = at["stopped"] or trainer.state.global_step >= max_steps
        log.info("resuming at step %d, epoch %.6g%s", self._step, trainer.state.epoch, ": nothing is left" * over)
        if over:
            return sys.maxsize, 0  # no epoch is left
        return at["epoch"], at["micro"]

    def _prepare(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared, self._prepared = self._prepared, None
        return plain(*args, **kwargs) if prepared is None else prepared

    def _epoch_begins(self) -> None:
        if self._tap is not None and self._resume is not None and self._resume["micro"] == 0:
            self._tap.go_on()

    def _evaluated(self, metrics: Mapping[str, Any]) -> None:
        if self._best is None or self._progress is None or self._trainer.state.global_step == self._step:
            return  # evaluate() outside train(), or eval_on_start
        value = self._best.value(metrics)
        if value is not None and self._best.better(value, self._progress.best):
            self._progress.best = {"value": value, "step": self._trainer.state.global_step, "saved": False}

    def _run_epoch(self, plain: Callable[..., Any], **call: Any) -> None:
        self._enter_loop()
        resume, self._resume = self._resume, None
        self._epoch, self._micro, self._began_s = call["epoch"], 0, call["start_time"]
        call["start_time"] -= self._before_s
        if resume is None or resume["micro"] == 0:
            plain(**call)
        else:
            self._micro = resume["micro"]
            with _skipping_nothing():
                plain(**{**call, "resume_from_checkpoint": _HERE})
        control, within = self._trainer.control, self._micro < self._steps_in_epoch
        if control.should_training_stop and not control.should_epoch_stop and within:
            self._end_step(self._epoch, self._micro)
        else:
            assert self._tap is not None
            self._tap.left()
            self._end_step(self._epoch + 1, 0)

    def _batches(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._end_step(self._epoch, self._micro)
        batches, count = plain(*args, **kwargs)
        self._micro += len(batches)
        return batches, count

    def _load_rng(self, plain: Callable[..., Any], checkpoint: Any) -> None:
        if checkpoint != _HERE:
            plain(checkpoint)

    def _finalize(self, plain: Callable[..., Any], trial: Any, num_train_samples: Any, start_time: float) -> Any:
        self._enter_loop()
        if self.ckpt is not None:
            self.ckpt.close()
            if self._best is not None and self._progress is not None and self._progress.best is not None:
                # What a restart continues from stays the last step.
                load(self._trainer.model_wrapped, self.ckpt.config.path, tag=BEST)
        # All launches count, since what is logged of them does.
        return plain(trial, num_train_samples, start_time - self._before_s)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Of one `train()`."""
        self._progress = self._tap = self._loader = self._prepared = None
        self._resume = self._eval_on_start = None
        self._step = self._epoch = self._micro = self._steps_in_epoch = 0
        self._before_s, self._began_s = 0.0, time.time()

    def _attach(self) -> tuple[LayerwiseEngine, Progress]:
        trainer = self._trainer
        base = base_of(self._loader, _LOADER)
        self._tap = PlacedTap(base, _LOADER, one_ahead=base is not self._loader)
        exportable = importlib.import_module("transformers.trainer_callback").ExportableState
        progress = self._progress = Progress(trainer, exportable, self._shape())
        state = {_LOADER: self._tap, "trainer": progress, "scheduler": trainer.lr_scheduler}
        if trainer.accelerator.scaler is not None:
            state["scaler"] = trainer.accelerator.scaler
        made = attach_engine(trainer.model_wrapped, trainer.optimizer, self._settings, state=state, fresh=self._fresh)
        assert isinstance(made, LayerwiseEngine), "it is enabled"
        self.ckpt = made
        for on_commit in self._on_commit:
            made.on_commit(on_commit)
        for on_failure in self._on_failure:
            made.on_failure(on_failure)
        made.explicit(restored_in_loop=True)
        return made, progress

    def _shape(self) -> dict[str, int | None]:
        args = self._trainer.args
        return {
            "world size": dist.get_world_size() if dist.is_initialized() else 1,
            "batch size of each device": self._trainer._train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "batches of an epoch": self._steps_in_epoch,
            "seed of the order": getattr(seedable_sampler(base_of(self._loader, _LOADER)), "initial_seed", None),
        }

    def _enter_loop(self) -> None:
        """The Trainer has set up all that it keeps, and trains from here on."""
        if self._eval_on_start is None:
            return
        self._trainer.args.eval_on_start, self._eval_on_start = self._eval_on_start, None
        assert self._progress is not None
        self._progress.put_kept()

    def _end_step(self, epoch: int, micro: int) -> None:
        """If the Trainer has counted a step since the last: the next begins there."""
        state, control = self._trainer.state, self._trainer.control
        if state.global_step == self._step:
            return
        self._step = state.global_step
        assert self.ckpt is not None and self._progress is not None
        self._progress.at = {
            "epoch": epoch, "micro": micro,
            "stopped": bool(control.should_training_stop) and state.global_step < state.max_steps,
            "elapsed_s": self._before_s + time.time() - self._began_s,
        }  # fmt: skip
        self.ckpt.end_step()
        self._save_best()

    def _save_best(self) -> None:
        """This step's evaluation was the best so far: all ranks know it alike."""
        assert self.ckpt is not None and self._progress is not None
        best = self._progress.best
        if self._best is not None and best is not None and not best["saved"] and best["step"] == self._step:
            self.ckpt.save(BEST, {"metric": self._best.name, "value": best["value"]})
            best["saved"] = True


@contextmanager
def _skipping_nothing() -> Iterator[None]:
    """The Trainer skips what a resumed epoch has had by a loader of its own; here the loader goes on by itself."""
    module: Any = importlib.import_module("transformers.trainer")
    plain = getattr(module, trainer_names.SKIPS)
    setattr(module, trainer_names.SKIPS, lambda loader, num_batches=0: loader)
    try:
        yield
    finally:
        setattr(module, trainer_names.SKIPS, plain)


def _callback(base: type, begins: Callable[[], None], evaluated: Callable[[Mapping[str, Any]], None]) -> Any:
    class LayerwiseCallback(base):  # type: ignore[misc]
        """Reports when an epoch begins, and what an evaluation returned."""

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            begins()

        def on_evaluate(self, *_: Any, metrics: Mapping[str, Any], **__: Any) -> None:
            evaluated(metrics)

    return LayerwiseCallback()
