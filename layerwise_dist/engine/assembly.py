# SPDX-License-Identifier: Apache-2.0
"""`attach()`: from models, optimizers and a configuration to a running engine, or one clear error on all ranks."""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from layerwise_dist import _native
from layerwise_dist._version import __version__
from layerwise_dist.capture.room import check_pool
from layerwise_dist.capture.sealed import Sealer
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.opening import PATIENCE_SHARE
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.start import Rules, start_session, start_writer
from layerwise_dist.commit.transports import Transport
from layerwise_dist.commit.transports.choice import find_ranks, open_transport, over_torch
from layerwise_dist.config import LayerwiseConfig, load_config
from layerwise_dist.engine import at_exit, foreign_loops, same_config
from layerwise_dist.engine.disabled import DisabledEngine
from layerwise_dist.engine.engine import LayerwiseEngine
from layerwise_dist.engine.holdings import Holdings
from layerwise_dist.engine.lent import Loan
from layerwise_dist.engine.preemption import Preemption, check_here
from layerwise_dist.engine.rehearsing import Rehearsal, rehearsed
from layerwise_dist.engine.replicas import Replicas
from layerwise_dist.engine.workings import Workings
from layerwise_dist.errors import ConfigError, LayerwiseError, StateError, UnsupportedError
from layerwise_dist.frameworks import Framework, accumulating, config_block, find_framework, find_optimizer, is_engine
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer
from layerwise_dist.layers.adapter import LayeredOptimizer
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.monitor.attaching import OpenSession, open_monitored
from layerwise_dist.monitor.connection import MonitorLink, start_monitor
from layerwise_dist.monitor.transport import MonitorTransport
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.exposure import exposed, listed
from layerwise_dist.storage.network import memory_by_magic
from layerwise_dist.storage.writer import open_writer
from layerwise_dist.supervision.patience import within
from layerwise_dist.telemetry.boards import open_boards

log = logging.getLogger("layerwise_dist")


def attach(
    model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None,
    config: LayerwiseConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None, *,
    models: Mapping[str, torch.nn.Module] | None = None,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    state: dict[str, Any] | None = None, fresh: bool = False, **overrides: Any,
) -> LayerwiseEngine | DisabledEngine:  # fmt: skip
    """Turns checkpointing on for `model` (plain, DDP or FSDP2) and its `optimizer`; call it on every rank.

    A DeepSpeed engine is given alone. Its configuration is the ``layerwise_checkpoint`` block of ds_config, unless
    `config` is given; without either, and without `overrides`, nothing is turned on.

    Args:
        models: instead of `model`, several by name; those without an optimizer (an average of weights) too.
        optimizers: instead of `optimizer`, several by name, each of parameters of any of the models. DeepSpeed engines
            in `models` bring their own.
        config: a mapping, the path of a JSON file, or None for the defaults; `overrides` (``dir=...``) go on top.
        state: what else belongs to a step, by name: schedulers, scalers, data loaders, generators, plain dicts.
        fresh: start a new lineage in a directory that holds checkpoints, instead of calling `restore()`.

    Raises ConfigError, UnsupportedError, StateError, OwnerError or DirectoryError; on every rank if on any.
    BoundaryError within a Trainer's train().
    """
    engines = [each for each in (models.values() if isinstance(models, Mapping) else [model]) if is_engine(each)]
    problem, rehearsal = None, None
    try:
        if config is None and engines:
            config = common_block(engines)
            if config is None and not overrides:
                config = LayerwiseConfig(enabled=False)
        settings = load_config(config, **overrides)
        if settings.enabled:
            rehearsal = rehearsed(settings)
            settings = settings if rehearsal is None else rehearsal.config
    except ConfigError as error:
        settings, problem = LayerwiseConfig(), error  # the other ranks are told before it is raised
    if (gather := over_torch()) is not None:
        same_config.compare_meeting(settings, problem, gather)
    if not settings.enabled:
        return disabled(engines, settings)
    foreign_loops.check_not_within()
    monitor: MonitorLink | None = None
    transport: Transport
    try:
        if settings.mode == "monitor":
            rank, world_size, gather = find_ranks(settings.commit.transport)
            monitor = start_monitor(settings, rank, world_size, gather)
            transport = MonitorTransport(monitor, rank, world_size)
        else:
            transport = open_transport(settings.commit.transport, settings.commit.timeout_s)
    except LayerwiseError:
        if problem is not None:
            raise problem from None
        raise
    if problem is not None and transport.world_size == 1:
        raise problem
    env = environment(settings)
    return assemble(
        model, optimizer, settings, transport, env,
        models=models, optimizers=optimizers, state=state, fresh=fresh, problem=problem, monitor=monitor,
        rehearsal=rehearsal,
    )  # fmt: skip


def environment(config: LayerwiseConfig) -> _native.Env:
    """The Env of the disk that it writes to."""
    if config.mode == "mock":
        return _native.MockEnv()
    return _native.NvmEnv() if config.writer.backend == "nvm" else _native.PosixEnv()


def common_block(engines: Sequence[Any]) -> Any:
    """The ``layerwise_checkpoint`` block of the engines that have one, None if none has. ConfigError if they differ."""
    blocks = [block for block in map(config_block, engines) if block is not None]
    if any(block != blocks[0] for block in blocks):
        raise ConfigError(
            "the engines' ds_configs have different layerwise_checkpoint blocks: give a block to one, or the "
            "same to all"
        )
    return blocks[0] if blocks else None


def disabled(engines: Sequence[Any], config: LayerwiseConfig) -> DisabledEngine:
    return DisabledEngine(config, lambda: any(map(accumulating, engines)))


def _torch_adapter(
    update: Literal["auto", "whole", "pipelined_step", "in_backward"],
) -> Callable[[Framework, object], OptimizerAdapter]:
    if update == "auto" or update == "whole":
        return TorchOptimizer
    return lambda framework, optimizer: LayeredOptimizer(framework, optimizer, update)


def assemble(
    model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None, config: LayerwiseConfig,
    transport: Transport, env: _native.Env, *, models: Mapping[str, torch.nn.Module] | None = None,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    state: dict[str, Any] | None = None, fresh: bool = False, framework: Framework | None = None,
    problem: ConfigError | None = None, monitor: MonitorLink | None = None, loan: Loan | None = None,
    rehearsal: Rehearsal | None = None,
) -> LayerwiseEngine:  # fmt: skip
    """`attach()` behind its two seams: any `Transport`, any `Env`. Rank and world size are the transport's.

    With `monitor`, `transport` goes through it, and `env` is what this process reads by. With `problem`, this rank's
    configuration is bad and `config` stands in for it: all ranks raise `problem`. With `loan`, the new engine saves
    what the lender does, and hooks nothing: it is for calls of `save()` while nothing is trained.
    """
    rank, world_size = transport.rank, transport.world_size
    participant = Participant(transport, timeout_s=config.commit.timeout_s, through_monitor=monitor is not None)
    closers: list[Callable[[], object]] = [] if monitor is None else [monitor.close]
    boards: list[Any] = []
    closers.append(lambda: participant.close(1.0))

    def in_memory() -> str | None:
        return memory_by_magic(env.file_system(config.path))

    def looked_after() -> list[str]:
        try:
            return exposed(config.path)
        except OSError as error:
            return [f"{config.path}: whether others may write there can't be told ({error})"]

    try:
        same_config.compare(participant, config if rehearsal is None else rehearsal.asked, problem)

        def examine() -> tuple[Framework, OptimizerAdapter, StateObjects]:
            if loan is not None:
                return loan.framework, loan.optimizer, loan.objects
            if config.preemption.enabled:
                check_here()
            found = framework or find_framework(model, models, rank, world_size)
            closers.append(found.detach)
            if config.update not in ("auto", "whole") and (models is not None or optimizers is not None):
                raise UnsupportedError(
                    f"update = {config.update!r}: models and optimizers by name are updated as a whole; use 'auto'"
                )
            adapter = find_optimizer(found, optimizer, optimizers, _torch_adapter(config.update), config.update)
            typed_json.dumps(adapter.describe(), path="optimizer")  # what it cannot write is refused now
            objects = StateObjects(state)
            at_exit.check_free(Holdings(found, adapter, objects.loaders))
            check_scalers(adapter, objects)
            pooled = monitor is not None
            if pooled and found.swapped:
                raise UnsupportedError(
                    "mode = 'monitor' with an optimizer offloaded to NVMe: its mirrors are as large as what was "
                    "offloaded, and a pool for copies of them would be too; use mode 'direct'"
                )
            if config.replicas == "apart":
                found.write_apart()
            survey = Surveyor(found, adapter, config.captured_by, bases=not pooled).look()
            check_pool(config.pool_mb, config.bounce_bytes, survey, pooled=pooled)
            Sealer(found, adapter, objects).try_out(survey)
            boards.extend(open_boards(config.telemetry, rank))
            closers.extend(board.close for board in boards)
            closers.append(objects.detach)
            objects.tap()
            return found, adapter, objects

        _, examined = together(participant, "attach", examine)
        assert examined is not None, "nothing is read here that could be damaged"
        found, updates, objects = examined
        replicas = Replicas(found, updates, participant, sampled=config.replica_drift != "off")
        replicas.meet()
        if monitor is not None:
            parts = open_monitored(monitor, env, config, participant, found.name, _software(), fresh=fresh)
            closers.append(lambda: parts.adapter.close(1.0))
        else:
            parts = _open_direct(config, env, transport, participant, found, fresh, closers)
        if rank == 0 and config.mode != "mock" and (memory := within(participant.disk_s, "a look", in_memory)):
            log.warning("%s is on %s: what is committed survives this job, but not the machine", config.path, memory)
        if rank == 0 and config.mode != "mock" and (others := within(participant.disk_s, "a look", looked_after)):
            log.warning(
                "%s: others may change or remove checkpoints, or put links there; give it to the user of the job with "
                "mode %o",
                listed(others), config.dir_bits & ~0o022,
            )  # fmt: skip
        preemption = None
        if config.preemption.enabled:
            preemption = Preemption(
                rank, grace_s=config.preemption.grace_s, exit_code=config.preemption.exit_code,
                ask=lambda why: participant.ask(leave=True, why=why), failed=participant.broke,
            )  # fmt: skip
            closers.append(preemption.close)
            participant.when_leaving(preemption.leaving)
        workings = Workings(
            found, updates, config, objects, adapter=parts.adapter, manager=parts.manager, info=parts.info,
            participant=participant, committer=parts.committer, coordinator=parts.coordinator, fresh=fresh,
            preemption=preemption, replicas=replicas, loan=loan, rehearsal=rehearsal, boards=boards,
        )  # fmt: skip
        return LayerwiseEngine(workings)
    except BaseException:
        for close in reversed(closers):
            try:
                close()
            except Exception as error:  # the rest is let go of all the same
                log.warning("rank %d: attach: what had been started could not be stopped: %s", rank, error)
        env.let_go()
        raise


def check_scalers(optimizer: OptimizerAdapter, objects: StateObjects) -> None:
    """Raises StateError for a GradScaler that a wrapper of an optimizer steps by, and that nobody saves."""
    for place, scaler in optimizer.scalers.items():
        if scaler.is_enabled() and not any(scaler is each for each in objects.scalers):
            raise StateError(
                "state", f"the GradScaler that {place} steps by is not in it: its scale would be lost. Name it in "
                "attach(state={'scaler': ...})",
            )  # fmt: skip


def _software() -> dict[str, str]:
    return {"layerwise_dist": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _open_direct(
    config: LayerwiseConfig, env: _native.Env, transport: Transport, participant: Participant, found: Framework,
    fresh: bool, closers: list[Callable[[], object]],
) -> OpenSession:  # fmt: skip
    """This process takes the directory, decides on rank 0, and writes. What is to be undone goes into `closers`."""
    session = start_session(
        env, config.path, transport, participant, Rules.of(config, found.name, _software()),
        file_mode=config.file_bits, dir_mode=config.dir_bits, who=f"pid {os.getpid()} on {socket.gethostname()}",
        fresh=fresh, mock=config.mode == "mock", patience_s=PATIENCE_SHARE * config.commit.timeout_s,
    )  # fmt: skip
    owner, coordinator = session.owner, session.coordinator
    if owner is not None:
        closers.append(owner.release)
    if coordinator is not None:
        closers.append(lambda: coordinator.close(1.0))

    def begin() -> PCCheckAdapter:
        made = within(
            participant.disk_s, "the writer's start",
            lambda: open_writer(env, config, transport.rank, transport.world_size, participant.broke),
        )  # fmt: skip
        closers.append(lambda: made.close(1.0))
        return made

    adapter = start_writer(participant, begin)
    return OpenSession(adapter, session.manager, session.info, session.committer, coordinator)
