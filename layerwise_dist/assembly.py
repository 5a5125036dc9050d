"""`attach()`: from a model, an optimizer and a configuration to a running engine, or one clear error on all ranks."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from layerwise_dist import _native
from layerwise_dist._version import __version__
from layerwise_dist.capture.objects import StateObjects
from layerwise_dist.capture.room import check_pool
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.coordinator import Coordinator, CoordinatorThread
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import Committer, open_session
from layerwise_dist.commit.transports import Message, Transport
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.commit.transports.store import StoreTransport, open_store
from layerwise_dist.config import LayerwiseConfig, load_config
from layerwise_dist.disabled import DisabledEngine
from layerwise_dist.engine import LayerwiseEngine
from layerwise_dist.errors import BoundaryError, ConfigError, UnsupportedError
from layerwise_dist.frameworks import Framework, accumulating, adapt, config_block, detect, is_engine
from layerwise_dist.frameworks.optimizers import OptimizerAdapter, TorchOptimizer
from layerwise_dist.layered import LayeredOptimizer
from layerwise_dist.restore.agreement import together
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.recycling import recycles


def attach(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None,
    config: LayerwiseConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None, *,
    state: dict[str, Any] | None = None, fresh: bool = False, **overrides: Any,
) -> LayerwiseEngine | DisabledEngine:  # fmt: skip
    """Turns checkpointing on for `model` (plain, DDP or FSDP2) and its `optimizer`; call it on every rank.

    A DeepSpeed engine is given alone. Its configuration is the ``layerwise_checkpoint`` block of ds_config, unless
    `config` is given; without either, and without `overrides`, nothing is turned on.

    Args:
        config: a mapping, the path of a JSON file, or None for the defaults; `overrides` (``dir=...``) go on top.
        state: what else belongs to a step, by name: schedulers, scalers, data loaders, generators, plain dicts.
        fresh: start a new lineage in a directory that holds checkpoints, instead of calling `restore()`.

    Raises ConfigError, UnsupportedError, StateError, OwnerError or DirectoryError; on every rank if on any.
    """
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        rank, world_size = 0, 1
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1:
            raise BoundaryError(
                f"WORLD_SIZE is {launched}, but torch.distributed is not initialised: call init_process_group() before attach()"
            )
    if config is None and is_engine(model):
        config = config_block(model)
        if config is None and not overrides:
            return disabled(model)
    problem = None
    try:
        settings = load_config(config, **overrides)
    except ConfigError as error:
        if world_size == 1:
            raise
        settings, problem = LayerwiseConfig(), error  # the other ranks are told before it is raised
    if not settings.enabled:
        return disabled(model)
    transport: Transport = LocalTransport(LocalHub(1), 0)
    if world_size > 1:
        transport = StoreTransport(open_store(rank, settings.commit.timeout_s), rank, world_size)
    env = _native.NvmEnv() if settings.writer.backend == "nvm" else _native.PosixEnv()
    return assemble(model, optimizer, settings, transport, env, state=state, fresh=fresh, problem=problem)


def disabled(model: torch.nn.Module) -> DisabledEngine:
    return DisabledEngine(lambda: accumulating(model)) if is_engine(model) else DisabledEngine()


def _torch_adapter(update: str) -> Callable[[Framework, object], OptimizerAdapter]:
    if update in ("auto", "whole"):
        return TorchOptimizer
    return lambda framework, optimizer: LayeredOptimizer(framework, optimizer, update)


def assemble(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, config: LayerwiseConfig, transport: Transport, env: Any, *,
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
            found = framework or detect(model, rank, world_size)
            if is_engine(model) and config.update not in ("auto", "whole"):
                raise UnsupportedError(
                    f"update = {config.update!r}: DeepSpeed steps its optimizer itself, unit by unit; use 'auto'"
                )
            adapter = adapt(found, optimizer, _torch_adapter(config.update))
            check_pool(config.pool_mb, config.bounce_bytes, Surveyor(found, adapter, config.capture).look())
            return found, adapter, StateObjects(state)

        _, (found, updates, objects) = together(participant, "attach", examine)
        closers.append(objects.detach)
        who = f"pid {os.getpid()} on {socket.gethostname()}"
        info, manager, owner = open_session(
            env, config.path, participant, file_mode=config.file_bits, dir_mode=config.dir_bits, who=who
        )
        committer = coordinator = None
        if owner is not None:
            closers.append(owner.release)
            software = {"layerwise_dist": __version__, "torch": torch.__version__, "python": platform.python_version()}
            committer = Committer(
                manager, owner, info, world_size=world_size, framework=found.name, software=software,
                keep_last=config.keep_last, keep_every_n_steps=config.keep_every_n_steps,
            )  # fmt: skip

            def send(message: Message) -> None:
                for peer in range(world_size):
                    transport.post(peer, message)

            logic = Coordinator(
                world_size, send=send, commit=committer.commit, timeout_s=config.commit.timeout_s,
                on_failure=config.commit.on_failure, raise_after=config.commit.raise_after,
            )  # fmt: skip
            coordinator = CoordinatorThread(logic, lambda: committer.retire(send))
            closers.append(lambda: coordinator.close(1.0))
            participant.serve(coordinator.post)

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
        return LayerwiseEngine(
            found, updates, config, objects, adapter=adapter, manager=manager, info=info, participant=participant,
            committer=committer, coordinator=coordinator, fresh=fresh,
        )  # fmt: skip
    except BaseException:
        for close in reversed(closers):
            close()
        raise
