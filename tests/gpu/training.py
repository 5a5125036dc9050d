# SPDX-License-Identifier: Apache-2.0
"""What the sections train, with and without the engine, and the comparison of both, bit for bit.

The comparison needs deterministic kernels: `tests/gpu.sh` sets CUBLAS_WORKSPACE_CONFIG, `main` the rest.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import layerwise_dist as lwd
from gpu.device import STAND_IN, Device, Skip
from layerwise_dist.bench.launching import end_with_launcher

State = dict[str, torch.Tensor]
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Kit:
    """Where and on what a section runs. REQUIRES of a section that calls `apart`: it has not used the device."""

    device: Device
    folder: Path
    quick: bool

    @property
    def width(self) -> int:
        return 33 if self.quick else 1025

    @property
    def steps(self) -> int:
        return 5 if self.quick else 12

    def apart(self, body: Callable[[], Any], timeout_s: float = 60.0) -> tuple[int, Any]:
        """Runs it in a process forked from this one: (exit code, what it returned). SIGKILL after `timeout_s`."""
        return apart(body, timeout_s)


def apart(body: Callable[[], Any], timeout_s: float) -> tuple[int, Any]:
    """(exit code, what `body` returned) of a forked process; the result is None if it was killed, and an exception that
    left it comes out here as RuntimeError, a Skip as it is. Raises TimeoutError, after SIGKILL.
    """
    there, here = _FORK.Pipe(duplex=False)

    def child() -> None:
        end_with_launcher()
        there.close()
        try:
            here.send(("returned", body()))
        except Skip as reason:
            here.send(("skip", str(reason)))
        except BaseException as error:
            traceback.print_exc()
            here.send(("raised", f"{type(error).__name__}: {error}"))

    process = _FORK.Process(target=child)
    process.start()
    here.close()
    try:
        if not there.poll(timeout_s):
            raise TimeoutError(f"not done within {timeout_s:g} s")
        try:
            how, what = there.recv()
        except EOFError:  # killed before it could say anything
            how, what = "returned", None
        process.join(timeout_s)
        if process.is_alive():
            raise TimeoutError(f"done, and not ended within {timeout_s:g} s")
    finally:
        process.kill()
        process.join()
        there.close()
    if how == "skip":
        raise Skip(what)
    if how == "raised":
        raise RuntimeError(what)
    assert process.exitcode is not None
    return process.exitcode, what


# -- what is trained ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of odd sizes with dropout, which draws the device's random numbers, and a buffer that changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


@dataclass
class Job:
    model: Any
    optimizer: Any
    scaler: Any = None
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None  # of a compiled or graphed model

    def attach(self, folder: Path, **options: Any) -> Any:
        state = {} if self.scaler is None else {"scaler": self.scaler}
        optimizer = () if self.optimizer is None else (self.optimizer,)
        options = {"keep_last": 1000, "max_in_flight": 4, "save_last": False, **options}
        return lwd.attach(self.model, *optimizer, dir=str(folder), state=state, **options)


Make = Callable[[Kit], Job]


def adamw(kit: Kit, **options: Any) -> Job:
    model = Net(kit.width).to(kit.device.kind)
    return Job(model, torch.optim.AdamW(model.parameters(), lr=1e-2, **options))


def batch(kit: Kit, step: int) -> torch.Tensor:
    drawn = torch.randn(8, kit.width, generator=torch.Generator().manual_seed(step))
    return drawn.to(kit.device.kind)


def update(kit: Kit, job: Job, step: int) -> torch.Tensor:
    """One iteration's forward, backward and update; its loss."""
    x = batch(kit, step)
    if job.scaler is not None:
        return _scaled(kit, job, x * float("inf") if step == 2 else x)
    forward = job.model if job.forward is None else job.forward
    loss = forward(x).float().square().mean()
    if job.optimizer is None:  # DeepSpeed's engine
        job.model.backward(loss)
        job.model.step()
    else:
        loss.backward()
        job.optimizer.step()
        job.optimizer.zero_grad()
    return loss.detach()


def _scaled(kit: Kit, job: Job, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.bfloat16 if kit.device.stand_in else torch.float16
    with torch.autocast(kit.device.kind, dtype=dtype):
        loss = job.model(x).float().square().mean()
    job.scaler.scale(loss).backward()
    job.scaler.step(job.optimizer)
    job.scaler.update()
    job.optimizer.zero_grad()
    return loss.detach()


def state(job: Job) -> State:
    """All that the job's future depends on, on the host; not the random numbers."""
    if job.optimizer is None:
        return _units(job)
    held = {f"model/{name}": _host(tensor) for name, tensor in job.model.state_dict().items()}
    for number, entries in job.optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            held[f"state/{number}/{name}"] = _host(torch.as_tensor(value))
    if job.scaler is not None:
        held |= {f"scaler/{name}": torch.as_tensor(value) for name, value in job.scaler.state_dict().items()}
    return held


def _units(job: Job) -> State:
    from layerwise_dist.frameworks.deepspeed import DeepSpeedFramework

    units = DeepSpeedFramework(job.model, 0, 1).units
    held = {}
    for number in range(len(units.groupings())):
        held[f"unit/{number}"] = _host(units.tensor(number))
        held |= {f"unit/{number}/{name}": _host(value) for name, value in units.state(number).items()}
    return held


def _host(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().to(STAND_IN, copy=True)


def differing(one: State, other: State) -> list[str]:
    """Names of what is not there in both with the same bits."""
    found = sorted(one.keys() ^ other.keys())
    for name in sorted(one.keys() & other.keys()):
        mine, yours = one[name], other[name]
        alike = mine.dtype == yours.dtype and mine.shape == yours.shape
        if not alike or not torch.equal(_bytes(mine), _bytes(yours)):
            found.append(name)
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def seed() -> None:
    torch.manual_seed(0)  # of all devices


# -- trained and compared ----------------------------------------------------------------------------------------------


def plain(kit: Kit, make: Make, steps: int, run: Callable[[Kit, Job, int], Any] = update) -> list[State]:
    """What training without the engine holds after each step."""
    seed()
    job = make(kit)
    seed()
    at = []
    for step in range(steps):
        run(kit, job, step)
        at.append(state(job))
    return at


def staged(kit: Kit) -> dict[str, Any]:
    """The stand-in has to be told to stage what a device's tensors are staged for by themselves."""
    return {"capture": "stage"} if kit.device.stand_in else {}


def trained(
    kit: Kit, make: Make, folder: Path, steps: int, run: Callable[[Kit, Job, int], Any] = update,
    last: Callable[[], None] = lambda: None, **options: Any,
) -> tuple[State, dict[str, Any]]:  # fmt: skip
    """Trains with a checkpoint every step; what it holds at the end, and `stats()`. `last` is called after the last
    step, before its commit is waited for.
    """
    seed()
    job = make(kit)
    options = {**staged(kit), "commit": {"timeout_s": 60.0, "raise_after": 1000}, **options}
    with job.attach(folder, **options) as ckpt:
        seed()
        for step in ckpt.steps(steps):
            run(kit, job, step)
        last()
        ckpt.wait(steps, timeout=60)
        held = state(job)
    return held, ckpt.stats()


def committed(folder: Path) -> list[int]:
    return sorted((int(path.parent.name[5:15]) for path in folder.glob("step_*/manifest.json")), reverse=True)


def check_committed(kit: Kit, make: Make, folder: Path, at: list[State], **options: Any) -> int:
    """Restores every commit into a new job, and compares it with what plain training held there. How many there are."""
    steps = committed(folder)
    for step in steps:
        torch.manual_seed(99)
        job = make(kit)
        with job.attach(folder, **{**staged(kit), **options}) as ckpt:
            assert ckpt.restore(step) == step
        wrong = differing(state(job), at[step - 1])
        assert not wrong, f"the checkpoint of step {step} differs from training without the engine: {wrong[:5]}"
    return len(steps)


def exact(
    kit: Kit, make: Make, run: Callable[[Kit, Job, int], Any] = update, *, skipped: int = 0, **options: Any
) -> str:  # fmt: skip
    """Training with the engine, and every checkpoint of it, is what training without holds, bit for bit. So many steps
    are `skipped`: they update nothing, and have no checkpoint.
    """
    folder = kit.folder / "checkpoints"
    at = plain(kit, make, kit.steps, run)
    again = plain(kit, make, kit.steps, run)
    assert not differing(at[-1], again[-1]), "training by itself is not deterministic here: nothing can be compared"
    held, stats = trained(kit, make, folder, kit.steps, run, **options)
    wrong = differing(held, at[-1])
    assert not wrong, f"training with the engine differs: {wrong[:5]}"
    count = check_committed(kit, make, folder, at, **options)
    assert not stats["checkpoints_aborted"], f"{stats['checkpoints_aborted']} checkpoints were aborted"
    assert count == kit.steps - skipped, f"{count} of {kit.steps} steps are committed"
    return f"{kit.steps} steps, {count} checkpoints restored"


@contextmanager
def process_group(kit: Kit) -> Iterator[None]:
    """Of one rank: NCCL on CUDA, gloo on the stand-in."""
    backend = dist.get_default_backend_for_device(kit.device.kind)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    store = dist.FileStore(str(kit.folder / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()
