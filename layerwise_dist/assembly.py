"""`attach()`: from models, optimizers and a configuration to a running engine, or one clear error on all ranks."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from layerwise_dist import _native
from layerwise_dist._version import __version__
from layerwise_dist.capture.objects import StateObjects
from layerwise_dist.capture.room import check_pool
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import open_session, start_coordinator, start_keeper
from layerwise_dist.commit.transports import Transport
from layerwise_dist.commit.transports.choice import open_transport
from layerwise_dist.config import LayerwiseConfig, load_config
from layerwise_dist.disabled import DisabledEngine
from layerwise_dist.engine import LayerwiseEngine
from layerwise_dist.errors import ConfigError, LayerwiseError, UnsupportedError
from layerwise_dist.frameworks import Framework, accumulating, config_block, find_framework, find_optimizer, is_engine
from layerwise_dist.frameworks.optimizers import OptimizerAdapter, TorchOptimizer
from layerwise_dist.layered import LayeredOptimizer
from layerwise_dist.preemption import Preemption, check_thread
from layerwise_dist.restore.agreement import together
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.recycling import recycles


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
    """
    engines = [each for each in (models.values() if isinstance(models, Mapping) else [model]) if is_engine(each)]
    problem = None
    try:
        if config is None and engines:
            config = common_block(engines)
            if config is None and not overrides:
                return disabled(engines)
        settings = load_config(config, **overrides)
    except ConfigError as error:
        settings, problem = LayerwiseConfig(), error  # the other ranks are told before it is raised
    if not settings.enabled:
        return disabled(engines)
    try:
        transport = open_transport(settings.commit.transport, settings.commit.timeout_s)
    except LayerwiseError:
        if problem is not None:
            raise problem from None
        raise
    if problem is not None and transport.world_size == 1:
        raise problem
    env = _environment(settings)
    return assemble(
        model, optimizer, settings, transport, env,
        models=models, optimizers=optimizers, state=state, fresh=fresh, problem=problem,
    )  # fmt: skip


def _environment(config: LayerwiseConfig) -> Any:
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


def disabled(engines: Sequence[Any]) -> DisabledEngine:
    return DisabledEngine(lambda: any(map(accumulating, engines)))


def _torch_adapter(update: str) -> Callable[[Framework, object], OptimizerAdapter]:
    if update in ("auto", "whole"):
        return TorchOptimizer
    return lambda framework, optimizer: LayeredOptimizer(framework, optimizer, update)


def assemble(
    model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None, config: LayerwiseConfig,
    transport: Transport, env: Any, *, models: Mapping[str, torch.nn.Module] | None = None,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    state: dict[str, Any] | None = None, fresh: bool = False, framework: Framework | None = None,
    problem: ConfigError | None = None,
) -> LayerwiseEngine:  # fmt: skip
    """`attach()` behind its two seams: any `Transport`, any `Env`. Rank and world size are the transport's.

    With `problem`, this rank's configuration is bad and `config` stands in for it: all ranks raise `problem`.
    """
    rank, world_size = transport.rank, transport.world_size
    participant = Participant(transport, timeout_s=config.commit.timeout_s, coordinator=None)
    closers: list[Any] = [lambda: participant.close(1.0)]
    try:

        def examine() -> tuple[Framework, OptimizerAdapter, StateObjects]:
            if problem is not None:
                raise problem
            if config.preemption.enabled:
                check_thread()
            found = framework or find_framework(model, models, rank, world_size)
            if config.update not in ("auto", "whole") and (models is not None or optimizers is not None):
                raise UnsupportedError(
                    f"update = {config.update!r}: models and optimizers by name are updated as a whole; use 'auto'"
                )
            adapter = find_optimizer(found, optimizer, optimizers, _torch_adapter(config.update), config.update)
            check_pool(config.pool_mb, config.bounce_bytes, Surveyor(found, adapter, config.capture).look())
            return found, adapter, StateObjects(state)

        _, (found, updates, objects) = together(participant, "attach", examine)
        closers.append(objects.detach)
        who = f"pid {os.getpid()} on {socket.gethostname()}"
        info, manager, owner = open_session(
            env,
            config.path,
            participant,
            file_mode=config.file_bits,
            dir_mode=config.dir_bits,
            who=who,
            fresh=fresh,
            mock=config.mode == "mock",
        )
        committer = coordinator = None
        if owner is not None:
            closers.append(owner.release)
        if not info.shared and (found.shared_params or found.shared_buffers):
            raise UnsupportedError(
                f"{config.path} is not one directory but {len(info.places)} (of ranks {str(info.places)[:80]}): "
                f"under {found.name} "
                "ranks read what others wrote, so all must see one directory. Where each rank writes all that it needs "
                "(plain, FSDP2 with full shards) disks of the nodes will do"
            )
        if owner is not None and rank != 0:
            start_keeper(participant, manager, owner, info)
        elif owner is not None:
            software = {"layerwise_dist": __version__, "torch": torch.__version__, "python": platform.python_version()}
            committer, coordinator = start_coordinator(
                transport, manager, owner, info, framework=found.name, software=software, keep_last=config.keep_last,
                keep_every_n_steps=config.keep_every_n_steps, timeout_s=config.commit.timeout_s,
                on_failure=config.commit.on_failure, raise_after=config.commit.raise_after,
            )  # fmt: skip
            closers.append(lambda: coordinator.close(1.0))
            participant.serve(coordinator.post, coordinator.quiet)

        def start_writer() -> PCCheckAdapter:
            return PCCheckAdapter(
                env, config.path, rank=rank, world_size=world_size, backend=config.writer.backend,
                queue_depth=config.writer.queue_depth, block_bytes=config.writer.block_kb << 10,
                direct_io=config.writer.direct_io == "auto", hash=config.hash, file_mode=config.file_bits,
                dir_mode=config.dir_bits,
                spares=config.max_in_flight + 1 if recycles(env, config.path, config.writer.recycle) else 0,
            )  # fmt: skip

        _, adapter = together(participant, "start the writer", start_writer)
        participant.recycle(adapter.recycler.retire)
        preemption = None
        if config.preemption.enabled:
            preemption = Preemption(
                rank, grace_s=config.preemption.grace_s, exit_code=config.preemption.exit_code,
                ask=lambda why: participant.ask(leave=True, why=why),
            )  # fmt: skip
            closers.append(preemption.close)
            participant.when_leaving(preemption.leaving)
        return LayerwiseEngine(
            found, updates, config, objects, adapter=adapter, manager=manager, info=info, participant=participant,
            committer=committer, coordinator=coordinator, fresh=fresh, preemption=preemption,
        )  # fmt: skip
    except BaseException:
        for close in reversed(closers):
            close()
        raise
