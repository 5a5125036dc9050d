# SPDX-License-Identifier: Apache-2.0
"""`load`: a training's checkpoint into a model without an engine: for fine-tuning, evaluation and serving."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from layerwise_dist.commit.agreement import Agreeing, together
from layerwise_dist.errors import DamageError, UnsupportedError
from layerwise_dist.frameworks.compiled import without_compiled_wrapper
from layerwise_dist.frameworks.deepspeed import DeepSpeedFramework, is_engine
from layerwise_dist.frameworks.detect import adapt, detect
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer
from layerwise_dist.reading.checkpoint import Checkpoint, open_attempt, open_checkpoint
from layerwise_dist.reading.meta import Materialized, is_meta
from layerwise_dist.reading.renaming import Rename
from layerwise_dist.reading.together import AllRanks, Alone
from layerwise_dist.restore import loader, ranks
from layerwise_dist.restore.anywhere import Fit, Fitting
from layerwise_dist.restore.loader import another_model, listing
from layerwise_dist.restore.source import ReadAlone
from layerwise_dist.storage.filenames import AttemptId

log = logging.getLogger("layerwise_dist")


@dataclass(frozen=True)
class LoadReport:
    """What `load` did. The lists are empty but for `strict=False`.

    Attributes:
        step: of the checkpoint.
        missing: the model's tensors (`<kind>/<fqn>`) that the checkpoint has not: they are as they were.
        unexpected: the checkpoint's tensors that the model has no place for.
        mismatched: the model's tensors that the checkpoint has in another shape, or a dtype that they cannot take, by
            name: in words. They are as they were.
    """

    step: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)


def load(
    model: nn.Module, directory: str | os.PathLike[str], step: int | None = None,
    optimizer: torch.optim.Optimizer | None = None, strict: bool = True, rename: Rename | None = None, *,
    tag: str | None = None, name: str | None = None, cast: str | None = None,
    device: torch.device | str | None = None,
) -> LoadReport:  # fmt: skip
    """Loads parameters, persistent buffers and extra states of a checkpoint into a model, whatever wrapper and number
    of ranks either has, each rank its own part. With `optimizer`, its state and hyper-parameters too. Random numbers,
    `attach(state=...)` objects and the step are not loaded.

    If the model is sharded (FSDP, tensor parallelism, DeepSpeed), all ranks of the default process group call it
    together; otherwise each rank loads for itself. Nothing changes before everything was found to fit.

    Args:
        directory: a training's `dir`; `step` or `tag` choose the checkpoint, by default the newest.
        strict: require the same names and shapes. Otherwise what does not fit is left alone, and reported.
        rename: maps names in the checkpoint to names in the model: a function, or a mapping of prefixes (the longest
            match counts). None in place of a new name leaves a tensor out.
        name: which of several models attached by name.
        cast: "target" allows rounding to the model's dtypes.
        device: where a model on the meta device gets its memory (default: the CPU; DTensors: where their mesh is). Ties
            are restored. What no checkpoint has, such as non-persistent buffers, is filled by `reset_parameters()` or
            `init_weights()` of its module or one around it.

    Raises MismatchError (nothing was loaded), UnsupportedError, NotFoundError, OSError; DamageError, also in the middle
    of reading: then the model's contents are undefined.
    """
    if cast not in (None, "target"):
        raise ValueError(f"cast must be None or 'target', not {cast!r}")
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"load() needs a torch.nn.Module, not {type(model).__name__}")
    real = without_compiled_wrapper(model)
    everyone: Alone | AllRanks = AllRanks() if _is_sharded(real) and dist.is_initialized() else Alone()
    with _opened(everyone, directory, step, tag) as ckpt:
        loading = _Loading(real, ckpt, everyone, strict=strict, cast=cast)
        return loading.run(optimizer, lambda: ckpt.view(rename, name), device)


def _is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of one model, so that all of them load it together."""
    return is_engine(model) or (
        any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        or any(isinstance(param, DTensor) for param in model.parameters())
    )


def _opened(
    everyone: Alone | AllRanks, directory: str | os.PathLike[str], step: int | None, tag: str | None
) -> Checkpoint:
    """The same on all ranks: the one that rank 0 chooses."""
    mine: list[Checkpoint] = []

    def choose() -> list[int] | None:
        if everyone.rank:
            return None
        mine.append(open_checkpoint(directory, step, tag))
        attempt = mine[0].manifest.attempt_id
        return [attempt.epoch, attempt.seq, attempt.step]

    try:
        _, chosen = _done(everyone, "choose a checkpoint", choose)
        [epoch, seq, at] = everyone.agree("hear which", chosen, lambda votes: votes[0])

        def open_the_same() -> None:
            if not mine:
                mine.append(open_attempt(directory, AttemptId(epoch, seq, at)))

        _done(everyone, "open it", open_the_same)
    except BaseException:
        for each in mine:
            each.close()
        raise
    return mine[0]


def _done(everyone: Agreeing, what: str, action: Callable[[], Any]) -> tuple[bool, Any]:
    """`together`, where there is nothing to fall back to: damage is raised on all ranks."""
    met: list[DamageError] = []

    def tried() -> Any:
        try:
            return action()
        except DamageError as error:
            met.append(error)
            raise

    sound, value = together(everyone, what, tried)
    if not sound:
        raise met[0] if met else DamageError(f"{what}: another rank found damage; see the warnings")
    return sound, value


class _Loading:
    def __init__(
        self, model: nn.Module, ckpt: Checkpoint, everyone: Alone | AllRanks, *, strict: bool, cast: str | None
    ) -> None:
        self._model, self._ckpt, self._everyone, self._strict, self._cast = model, ckpt, everyone, strict, cast
        self._where = f"step {ckpt.step} in {os.path.dirname(ckpt.path)}"

    def run(
        self, optimizer: torch.optim.Optimizer | None, view: Callable[[], Checkpoint],
        device: torch.device | str | None,
    ) -> LoadReport:  # fmt: skip
        everyone, model = self._everyone, self._model
        memory: Materialized | None = None
        if any(map(is_meta, (*model.parameters(), *model.buffers()))):
            if optimizer is not None:
                raise UnsupportedError(
                    "the model is on the meta device, so its optimizer would go on with parameters that are not there: "
                    "load() the model first, then build the optimizer, then load(model, ..., optimizer=...)"
                )
            memory = Materialized(model, torch.device(device if device is not None else "cpu"))
        try:
            _, found = _done(everyone, f"look for {self._where}", lambda: self._fit(optimizer, view))
            framework, adapter, parts, fit = cast(tuple[Framework, OptimizerAdapter | None, Parts, Fit], found)
            report = self._agree(fit)
            if memory is not None:
                fqns = {name.split("/", 1)[1] for name in fit.names}
                _done(everyone, "initialize what no checkpoint has", lambda: memory.initialize(fqns))
        except BaseException:
            if memory is not None:
                memory.undo()
            raise
        _done(everyone, f"load {self._where}", lambda: self._read(framework, adapter, parts, fit))
        return report

    def _fit(
        self, optimizer: torch.optim.Optimizer | None, view: Callable[[], Checkpoint]
    ) -> tuple[Framework, OptimizerAdapter | None, Parts, Fit]:
        everyone, ckpt = self._everyone, self._ckpt
        sharded = _is_sharded(self._model)
        # A replica is as good as a model of its own: this rank reads all of it.
        framework = detect(self._model, everyone.rank, everyone.world_size) if sharded else Framework(self._model, 0, 1)
        adapter = None
        if optimizer is not None or isinstance(framework, DeepSpeedFramework):
            adapter = adapt(framework, optimizer, TorchOptimizer)
        parts = Parts(module_only=optimizer is None, strict=self._strict)
        seen = view()
        if seen.models:
            seen.weights()  # which of several is meant must be said
        whole = seen.whole
        own = whole.sealed[framework.rank if framework.rank < len(whole.sealed) else 0]
        same = len(whole.sealed) == framework.world_size
        wrapper, _ = ranks.carried(framework, own, ckpt.manifest.framework, parts, same_world=same)
        source = ReadAlone(whole, framework.rank, framework.world_size)
        fitting = Fitting(
            framework, cast(OptimizerAdapter, adapter), source, {**own, "wrapper": wrapper}, self._where,
            partly=not self._strict, parts=parts, cast=self._cast, pass_unfit=not self._strict,
        )  # fmt: skip
        return framework, adapter, parts, fitting.fit()

    def _agree(self, fit: Fit) -> LoadReport:
        """Raises MismatchError for what does not fit on any rank, and for what has no place on any of them."""

        def decide(votes: list[list[Any]]) -> list[Any]:
            found = [(rank, problems) for rank, (problems, *_) in enumerate(votes) if problems]
            unknown = sorted(set.intersection(*(set(names) for _, names, *_ in votes)))
            said = list(found[0][1]) if found else []
            said += listing("unexpected in the checkpoint", unknown) if self._strict else []
            if said:
                rank = f"rank {found[0][0]}: " if found and len(votes) > 1 else ""
                raise another_model(rank + self._where, said)
            missing = list(dict.fromkeys(name for _, _, names, _ in votes for name in names))
            unfit = {name: text for _, _, _, each in votes for name, text in each.items()}
            return [[name for name in missing if name not in unfit], unknown, unfit]

        vote = [fit.problems, sorted(fit.unknown), fit.loading.lacking, fit.unfit]
        missing, unknown, unfit = self._everyone.agree("compare what fits", vote, decide)
        return LoadReport(self._ckpt.step, missing, unknown, unfit)

    def _read(self, framework: Framework, adapter: OptimizerAdapter | None, parts: Parts, fit: Fit) -> None:
        loading = fit.loading
        sealed = loading.sealed
        framework.take_up(framework.part_of(sealed["wrapper"], parts))
        loader.load(loading)
        if adapter is not None and parts.takes_optimizer:
            adapter.adopt(loading.states, sealed["optimizer"], loading.lacking_fqns)
        elif adapter is not None:
            adapter.keep(sealed["optimizer"], loading.lacking_fqns)
        framework.put_extra_states(sealed["extra_state"], "extra_state", "what was loaded before it stays")
