# SPDX-License-Identifier: Apache-2.0
"""Sections: training, staging, kills and resumes are exact, bit for bit."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpu.device import Skip
from gpu.training import Job, Kit, Net, adamw, exact, process_group, seed, staged, state, update


def staging_plain(kit: Kit) -> str:
    return exact(kit, adamw)


def staging_ddp(kit: Kit) -> str:
    def make(kit: Kit) -> Job:
        model = DistributedDataParallel(Net(kit.width).to(kit.device.kind))
        return Job(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    with process_group(kit):
        return exact(kit, make)


def staging_fsdp2(kit: Kit) -> str:
    def make(kit: Kit) -> Job:
        model = Net(kit.width).to(kit.device.kind)
        mesh = init_device_mesh(kit.device.kind, (1,))
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return Job(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    with process_group(kit):
        return exact(kit, make)


def staging_zero(kit: Kit, stage: int) -> str:
    if importlib.util.find_spec("deepspeed") is None:
        raise Skip("DeepSpeed is not installed")
    os.environ["DS_ACCELERATOR"] = kit.device.kind

    def make(kit: Kit) -> Job:
        import deepspeed

        from layerwise_dist.frameworks.deepspeed import param_groups

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
        model = Net(kit.width)
        optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
        config = {
            "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}, "steps_per_print": 1_000_000,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return Job(engine, None)

    with process_group(kit):
        try:
            return exact(kit, make)
        except (ImportError, RuntimeError) as error:
            if any(word in str(error) for word in ("ninja", "CUDA_HOME", "nvcc", "g++")):
                raise Skip(f"DeepSpeed builds an operator here: {error}") from error
            raise


def monitor(kit: Kit) -> str:
    """Staged for a process of its own, which writes."""
    return exact(kit, adamw, mode="monitor")


def mixed_precision(kit: Kit) -> str:
    """autocast and a GradScaler, whose third step overflows and is skipped."""

    def make(kit: Kit) -> Job:
        job = adamw(kit)
        job.scaler = torch.amp.GradScaler(kit.device.kind, init_scale=2.0**10, growth_interval=2)
        return job

    return exact(kit, make, skipped=1)


def fused(kit: Kit) -> str:
    return exact(kit, partial(adamw, fused=True))


def capturable(kit: Kit) -> str:
    """The step counters are on the device."""
    kit.device.needed("capturable=True")
    return exact(kit, partial(adamw, capturable=True))


# -- killed and resumed ------------------------------------------------------------------------------------------------


def _life(kit: Kit, folder: str, steps: int, die_at: int | None) -> dict[str, Any]:
    """One process of a job: where it started, and for each step a digest of what it then held and drew."""
    seed()
    job = adamw(kit)
    seen = {}
    with job.attach(kit.folder / folder, **staged(kit)) as ckpt:
        start = ckpt.restore()
        for step in ckpt.steps(steps):
            loss = update(kit, job, step)
            drawn = torch.rand(3, device=kit.device.kind)
            seen[str(step)] = _digest({**state(job), "loss": loss.cpu(), "drawn": drawn.cpu()})
            if step == die_at:
                ckpt.wait(step, timeout=60)  # the step before this one
                (kit.folder / "seen.json").write_text(json.dumps(seen))
                os.kill(os.getpid(), signal.SIGKILL)
    return {"start": start, "seen": seen}


def _digest(held: dict[str, torch.Tensor]) -> str:
    seen = hashlib.sha256()
    for name, tensor in sorted(held.items()):
        seen.update(name.encode())
        seen.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def kill_and_resume(kit: Kit) -> str:
    """SIGKILL within a step, and a new process: states, losses and the device's random numbers are those of a job that
    was left alone.
    """
    steps, die_at = 2 * kit.steps, kit.steps
    _, whole = kit.apart(lambda: _life(kit, "whole", steps, None))
    code, _ = kit.apart(lambda: _life(kit, "killed", steps, die_at))
    assert code == -signal.SIGKILL, f"the first process ended with {code}, not by SIGKILL"
    before = json.loads((kit.folder / "seen.json").read_text())
    _, after = kit.apart(lambda: _life(kit, "killed", steps, None))
    assert die_at <= after["start"] <= die_at + 1, f"resumed from step {after['start']}, killed in step {die_at}"
    for seen, what in ((before, "before the kill"), (after["seen"], "after the resume")):
        wrong = [step for step, digest in seen.items() if whole["seen"][step] != digest]
        assert not wrong, f"steps {wrong} {what} differ from a job that was left alone"
    return f"killed in step {die_at}, resumed from {after['start']}, {steps} steps equal"


def random_numbers(kit: Kit) -> str:
    """A restore within the process puts the device's generator back."""
    folder, steps = kit.folder / "checkpoints", kit.steps
    draws: list[list[float]] = []
    for start in (None, 2):
        seed()
        job = adamw(kit)
        with job.attach(folder, **staged(kit)) as ckpt:
            if start is not None:
                torch.rand(100, device=kit.device.kind)  # which the restore makes undone
                assert ckpt.restore(start) == start
            draws.append([])
            for step in ckpt.steps(steps):
                draws[-1] += torch.rand(2, device=kit.device.kind).tolist()
                update(kit, job, step)
    assert draws[1] == draws[0][4:], "another sequence after the restore"
    return f"{len(draws[1])} draws equal"
