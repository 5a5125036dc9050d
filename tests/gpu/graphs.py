# SPDX-License-Identifier: Apache-2.0
"""Sections: CUDA graphs. Each use of them is exact, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from gpu.device import Skip
from gpu.training import Job, Kit, adamw, batch, check_committed, exact, plain, seed, staged, state, update
from layerwise_dist.errors import BoundaryError, UnsupportedError

_WARM = 3  # iterations before a graph is captured, as torch asks for


def graph_of_the_model(kit: Kit) -> str:
    """Forward and backward are replayed, the optimizer steps as ever: exact."""
    kit.device.only_cuda("torch.cuda.make_graphed_callables")

    def make(kit: Kit) -> Job:
        job = adamw(kit)
        job.forward = torch.cuda.make_graphed_callables(job.model, (batch(kit, 0),), allow_unused_input=True)
        return job

    return exact(kit, make)


def _replays(kit: Kit, job: Job) -> Callable[[], None]:
    """Captures a whole iteration, update included, and returns what replays it. The stand-in runs it in Python, unseen
    by the optimizer's hooks, as a replay would be.
    """
    x = batch(kit, 0)
    if kit.device.stand_in:
        params = list(job.model.parameters())

        def replay() -> None:
            grads = torch.autograd.grad(job.model(x).square().mean(), params)
            with torch.no_grad():
                for param, grad in zip(params, grads, strict=True):
                    param.data.sub_(grad, alpha=1e-2)

        return replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM):
            _iterate(job, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _iterate(job, x)
    return graph.replay


def _iterate(job: Job, x: torch.Tensor) -> None:
    job.optimizer.zero_grad(set_to_none=False)
    job.model(x).square().mean().backward()
    job.optimizer.step()


def _capturable(kit: Kit) -> Job:
    return adamw(kit, **({} if kit.device.stand_in else {"capturable": True}))


def graph_of_the_step(kit: Kit) -> str:
    """Captured before `attach()`: the replays' updates are not seen, which is refused at the third; what was committed
    until then is exact.
    """
    if not kit.device.stand_in:
        kit.device.only_cuda("torch.cuda.graph")
    seed()
    job = _capturable(kit)
    replay = _replays(kit, job)
    folder, at = kit.folder / "checkpoints", []
    try:
        with job.attach(folder, **staged(kit)) as ckpt:
            for _ in ckpt.steps(kit.steps):
                replay()
                at.append(state(job))
    except BoundaryError as refusal:
        assert "a replayed graph" in str(refusal), refusal
    else:
        raise AssertionError("replays were taken for updates that the engine has seen")
    assert len(at) <= 3, f"refused after {len(at)} iterations"
    count = check_committed(kit, _capturable, folder, at)
    return f"refused: BoundaryError after {len(at)} replays, {count} checkpoints exact"


def graph_captured_while_attached(kit: Kit) -> str:
    """`optimizer.step()` within a capture is refused, before anything of the engine is in the graph."""
    if not kit.device.stand_in:
        kit.device.only_cuda("torch.cuda.graph")
    seed()
    job = _capturable(kit)
    update(kit, job, 0)
    with job.attach(kit.folder / "checkpoints", **staged(kit)) as ckpt:
        try:
            _capture(kit, job)
        except UnsupportedError as refusal:
            assert "CUDA graph" in str(refusal), refusal
        else:
            raise AssertionError("the engine let itself be captured in a graph")
        kit.device.synchronize()
        for step in ckpt.steps(3):  # it goes on without the graph
            update(kit, job, step)
        ckpt.wait(3, timeout=60)
    return "refused: UnsupportedError; eager steps go on"


def _capture(kit: Kit, job: Job) -> None:
    x = batch(kit, 0)
    if not kit.device.stand_in:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            _iterate(job, x)
        return
    with (
        mock.patch.object(torch.cuda, "is_initialized", lambda: True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        job.optimizer.step()


def compiled(kit: Kit) -> str:
    """torch.compile, whose "reduce-overhead" replays graphs of forward and backward: exact."""
    how: dict[str, Any] = {"backend": "eager"} if kit.device.stand_in else {"mode": "reduce-overhead"}

    def make(kit: Kit) -> Job:
        job = adamw(kit)
        job.forward = torch.compile(job.model, **how)
        return job

    try:
        plain(kit, make, 1)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if any(word in text for word in ("C compiler", "gcc", "Triton", "triton", "g++")):
            raise Skip(f"torch.compile needs what is not here: {text.splitlines()[0][:200]}") from error
        raise
    return exact(kit, make)
