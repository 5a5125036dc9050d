# SPDX-License-Identifier: Apache-2.0
"""What an engine does in a rehearsal (`layerwise rehearse`): it saves elsewhere, tells what it sees, and ends early."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from layerwise_dist.commit.participant import Participant
from layerwise_dist.config import LayerwiseConfig, TelemetryConfig
from layerwise_dist.engine import at_exit
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.preemption import end_process
from layerwise_dist.frameworks.compiled import eager
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.loop.mark import BoundaryMark
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.rehearsal import digests, script
from layerwise_dist.rehearsal.plan import ALL, VARIABLE, Plan, told

log = logging.getLogger("layerwise_dist")

_FORWARDS = 64  # of one iteration that are told of

_leader: str | None = None  # the directory of this process's first engine: its steps are the ones that count


def rehearsed(config: LayerwiseConfig) -> Rehearsal | None:
    """The rehearsal that this process is part of, if any; `config` is what the script asked for. Raises ConfigError."""
    plan = told()
    return None if plan is None else Rehearsal(plan, config)


class Rehearsal:
    """Of one engine, whose training thread it belongs to.

    Attributes:
        asked: what the script asked for.
        config: what the engine is to be attached with.
    """

    def __init__(self, plan: Plan, asked: LayerwiseConfig) -> None:
        self._plan, self.asked = plan, asked
        commit = asked.commit.model_copy(update={"on_failure": "raise", "timeout_s": plan.timeout_s})
        self.config = asked.model_copy(
            update={
                "dir": plan.place_of(asked.path), "every_n_steps": plan.every, "keep_last": ALL, "when_full": "wait",
                "mode": "direct" if asked.mode == "mock" else asked.mode, "audit": "always", "commit": commit,
                "telemetry": TelemetryConfig(),  # its files and its port are those of the training
            }
        )  # fmt: skip
        self._file: int | None = None
        self._handles: list[RemovableHandle] = []
        self._warnings: _Warnings | None = None
        self._seen: dict[str, Any] = {}

    # -- its beginning and its end ------------------------------------------------------------------------------

    def begin(
        self, framework: Framework, optimizer: OptimizerAdapter, objects: StateObjects, captures: Captures,
        participant: Participant,
    ) -> None:  # fmt: skip
        """The engine is assembled: says so to all who read logs, and to the command."""
        global _leader
        _leader = self.asked.path if _leader is None else _leader
        self._leads = _leader == self.asked.path
        self._framework, self._optimizer, self._objects = framework, optimizer, objects
        self._captures, self._participant, self._thread = captures, participant, threading.get_ident()
        self._file = os.open(
            self._plan.told_by(self.asked.path, participant.rank),
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600,
        )  # fmt: skip
        if participant.rank == 0:
            log.warning(
                "this is a rehearsal (%s): checkpoints go to %s in place of %s, and the job ends after step %d",
                VARIABLE, self.config.path, self.asked.path, self._plan.stop_at,
            )  # fmt: skip
        self._tell(
            "attached", leads=self._leads, dir=self.asked.path, rank=participant.rank,
            ranks=participant.world_size, framework=framework.name, state=objects.names(),
            loaders={name: _described(tap) for name, tap in objects.taps.items()},
        )  # fmt: skip
        self._warnings = _Warnings(lambda text: self._tell("warned", text=text))
        log.addHandler(self._warnings)

    def watch(self) -> None:
        """From now on, until `detach`, what the model is given and what it gives is told. REQUIRES: the engine's own
        hooks are there, since the one before a forward may end the iteration before it.
        """
        for root in self._framework.roots:
            self._handles.append(root.register_forward_pre_hook(eager(self._before_forward), with_kwargs=True))
            self._handles.append(root.register_forward_hook(eager(self._after_forward)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._warnings is None:
            self._close()
            return
        log.removeHandler(self._warnings)
        self._warnings.acquire()  # another thread may be in the midst of a warning
        try:
            self._close()
        finally:
            self._warnings.release()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    # -- what it sees -------------------------------------------------------------------------------------------

    def _before_forward(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not self._trains(module):
            return
        self._look()
        forwards = self._seen.setdefault("forwards", [])
        if len(forwards) < _FORWARDS:
            given = {**dict(enumerate(args)), **kwargs}
            forwards.append({"rng": digests.of_global_generators(), "in": dict(digests.leaves(given))})

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        forwards = self._seen.get("forwards")
        if self._trains(module) and forwards and "out" not in forwards[-1]:
            forwards[-1]["out"] = dict(digests.leaves(output))

    def _trains(self, module: torch.nn.Module) -> bool:
        return module.training and torch.is_grad_enabled() and threading.get_ident() == self._thread

    def updating(self) -> None:
        """An optimizer is about to update, for the first time in this iteration or again."""
        self._look()
        if "gradients" not in self._seen:
            grads = {view.fqn: view.param.grad for view in self._framework.params if view.param.grad is not None}
            self._seen["gradients"] = {name: digests.of_tensor(grad) for name, grad in grads.items()}

    def _look(self) -> None:
        """Once in each iteration, before anything in it changes the model."""
        if "weights" in self._seen:
            return
        tensors = {
            name: tensor
            for root in self._framework.roots
            for name, tensor in [*root.named_parameters(), *root.named_buffers()]
        }
        objects = [*self._objects.held(), *self._optimizer.optimizers]
        known = script.Known(
            map(id, tensors.values()), [id(view.param) for view in self._optimizer.trained], map(id, objects)
        )
        self._seen["weights"] = {name: digests.of_tensor(tensor) for name, tensor in tensors.items()}
        self._seen["hidden"] = {
            name: value for root in self._framework.roots for name, value in script.beside_tensors(root).items()
        }
        self._seen["script"] = script.look(sys._getframe(1), known)

    # -- what it does -------------------------------------------------------------------------------------------

    def passed(self, mark: BoundaryMark) -> None:
        """An iteration is over, and what was due of it is sealed. Does not return at the last one of the run.

        Raises as `LayerwiseEngine.drain` and `wait`.
        """
        seen, self._seen = self._seen, {}
        self._tell("passed", step=mark.step, kind=mark.kind, updated=mark.updated, **seen)
        plan = self._plan
        if not self._leads:
            return
        if plan.kill_after is not None and mark.step > plan.kill_after:
            self._captures.drain(plan.timeout_s)
            committed = self._participant.reached("committed")
            if committed is not None and committed >= plan.kill_after:
                self._tell("ready", step=mark.step, committed=committed)
                self._wait_to_be_killed()
        if mark.step >= plan.stop_at:
            self._captures.drain(plan.timeout_s)
            committed = self._participant.reached("committed")
            self._tell("stopped", step=mark.step, committed=committed)
            for closing in at_exit.open_engines():
                closing.end(orderly=False)
            end_process(0)

    def _wait_to_be_killed(self) -> None:
        threading.Event().wait(self._plan.timeout_s)
        os.kill(os.getpid(), signal.SIGKILL)  # by itself, if nobody is left who would

    def _tell(self, what: str, **more: Any) -> None:
        line = (json.dumps({"t": what, **more}) + "\n").encode()
        while line and self._file is not None:
            line = line[os.write(self._file, line) :]  # of a disk that takes half of it, why comes next


class _Warnings(logging.Handler):
    """Hands on what the library warns of: it may be the reason that is looked for."""

    def __init__(self, tell: Any) -> None:
        super().__init__(logging.WARNING)
        self._say = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._say(record.getMessage())
        except OSError:
            self.handleError(record)  # who warns has nothing to do with it


def _described(tap: LoaderTap) -> dict[str, Any]:
    loader = tap.loader
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    return {
        "data": type(loader.dataset).__name__, "workers": loader.num_workers,
        "persistent": bool(loader.persistent_workers), "sampler": type(sampler).__name__,
        "by_epoch": hasattr(sampler, "set_epoch"),
    }  # fmt: skip
