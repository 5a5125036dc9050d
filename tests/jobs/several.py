# SPDX-License-Identifier: Apache-2.0
"""Several models and optimizers in one attach: trained with and without checkpoints, and resumed from every step.

    several.py OUT CASE...      OUT/<rank>.json is {case: [differences]}

Each case is a class here; in one process the tests call `trial` themselves.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import contents, differences, process_group, unsound
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd

STEPS = 5


class Job:
    """`models` and `optimizers` by name; `step` is one iteration and returns what it computed, in hexadecimal."""

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    state: dict[str, Any]

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.models, self.optimizers, self.state = {}, {}, {}
        self.build()
        torch.manual_seed(1000 * seed + (dist.get_rank() if dist.is_initialized() else 0))

    def build(self) -> None:
        raise NotImplementedError

    def step(self, number: int) -> list[str]:
        raise NotImplementedError

    def contents(self) -> dict[str, Any]:
        return contents(nn.ModuleDict(self.models), *self.optimizers.values())


def _wrap(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


class Gan(Job):
    """Two updates of the critic, one of the generator; then its average is moved by hand. One's rate is scheduled."""

    def build(self) -> None:
        generator = nn.Sequential(nn.Linear(3, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 5))
        critic = nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Dropout(0.2), nn.Linear(13, 1))
        average = nn.Linear(17, 5)
        self.models = {"generator": _wrap(generator), "critic": _wrap(critic), "average": average}
        self.last = generator[3]
        self.optimizers = {
            "generator": torch.optim.AdamW(generator.parameters(), lr=0.01, fused=True),
            "critic": torch.optim.SGD(critic.parameters(), lr=0.05, momentum=0.9),
        }
        self.state = {"scheduler": torch.optim.lr_scheduler.StepLR(self.optimizers["critic"], 3, 0.5)}

    def step(self, number: int) -> list[str]:
        generator, critic = self.models["generator"], self.models["critic"]
        for _ in range(2):
            self.optimizers["critic"].zero_grad()
            with torch.no_grad():
                fake = generator(torch.randn(4, 3))
            (critic(fake).mean() - critic(torch.randn(4, 5)).mean()).backward()
            self.optimizers["critic"].step()
        self.state["scheduler"].step()
        self.optimizers["generator"].zero_grad()
        loss = -critic(generator(torch.randn(4, 3))).mean()
        loss.backward()
        self.optimizers["generator"].step()
        with torch.no_grad():
            for mine, live in zip(self.models["average"].parameters(), self.last.parameters(), strict=True):
                mine.lerp_(live, 0.1)
        return [loss.item().hex()]


class ActorCritic(Job):
    """An encoder that both share and the critic's optimizer updates; the actor is updated every other iteration; a
    target network follows the critic. One of its parameters is never used.
    """

    def build(self) -> None:
        encoder = nn.Linear(3, 9)
        self.models = {
            "critic": nn.Sequential(encoder, nn.Tanh(), nn.Linear(9, 1)),
            "actor": nn.Sequential(encoder, nn.Tanh(), nn.Linear(9, 2)),
            "target": nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1)).requires_grad_(False),
        }
        self.optimizers = {
            "critic": torch.optim.AdamW(self.models["critic"].parameters(), lr=0.01),
            "actor": torch.optim.RMSprop(self.models["actor"][2].parameters(), lr=0.01),
        }

    def step(self, number: int) -> list[str]:
        critic, actor, target = self.models["critic"], self.models["actor"], self.models["target"]
        seen = torch.randn(4, 3)
        self.optimizers["critic"].zero_grad()
        loss = (critic(seen) - target(seen) - 1).square().mean()
        loss.backward()
        self.optimizers["critic"].step()
        if number % 2:
            self.optimizers["actor"].zero_grad()
            actor(seen).square().mean().backward(inputs=list(actor[2].parameters()))
            self.optimizers["actor"].step()
        with torch.no_grad():
            for mine, live in zip(target.parameters(), critic.parameters(), strict=True):
                mine.mul_(0.9).add_(live, alpha=0.1)
        return [loss.item().hex()]


class Mixed(Job):
    """Every wrapper once, one after the other, each with its optimizer; each other iteration leaves two of them out."""

    def build(self) -> None:
        options = {"device_id": torch.device("cpu")}
        nets = {name: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for name in "abcde"}
        fully_shard(nets["c"])
        self.models = {
            "a": DistributedDataParallel(nets["a"]),
            "b": FullyShardedDataParallel(nets["b"], use_orig_params=False, **options),
            "c": nets["c"],
            "d": FullyShardedDataParallel(nets["d"], use_orig_params=True, **options),
            "e": nets["e"],
        }
        self.optimizers = {
            f"of-{name}": torch.optim.AdamW(model.parameters(), lr=0.01) for name, model in self.models.items()
        }

    def step(self, number: int) -> list[str]:
        x = torch.randn(3, 5)
        for name in "abcde":
            x = self.models[name](x)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss = x.square().mean()
        loss.backward()
        for name in "abcde" if number % 2 else "acd":
            self.optimizers[f"of-{name}"].step()
        return [loss.item().hex()]


class Engines(Job):
    """Two DeepSpeed engines: one accumulates two micro-batches, the other skips every other iteration."""

    def build(self) -> None:
        import zero_kit

        seed = torch.initial_seed()
        self.jobs = {
            "actor": zero_kit.Job("2-bf16-accumulate2", seed),
            "critic": zero_kit.Job("2-fp32-clip", seed + 10),
        }
        self.models = {name: job.engine for name, job in self.jobs.items()}

    def step(self, number: int) -> list[str]:
        losses = [self.jobs["actor"].micro_batch() for _ in range(2)]
        return losses + ([self.jobs["critic"].micro_batch()] if number % 2 else [])

    def contents(self) -> dict[str, Any]:
        return {f"{name}/{key}": value for name, job in self.jobs.items() for key, value in job.contents().items()}


def attach(job: Job, folder: str, **options: Any) -> Any:
    commit = {"timeout_s": 30.0, "on_failure": "raise"}
    config = {"dir": folder, "audit": "always", "commit": commit, **options}
    return lwd.attach(models=job.models, optimizers=job.optimizers or None, config=config, state=job.state)


def trial(make: Callable[[int], Job], root: str, **options: Any) -> list[str]:
    """What differs between the plain run, the run with checkpoints, and those resumed from each of its steps."""
    job = make(1)
    losses = [job.step(number) for number in range(STEPS)]
    expected = job.contents()
    problems: list[str] = []

    def compare(what: str, job: Job, found: list[Any], wanted: list[Any]) -> None:
        if found != wanted:
            problems.append(f"{what}: losses {found}, expected {wanted}")
        problems.extend(f"{what}: {name}" for name in differences(job.contents(), expected))

    job = make(1)
    ckpt = attach(job, root, keep_last=STEPS, max_in_flight=STEPS, **options)
    found = []
    for number in ckpt.steps(STEPS):
        found.append(job.step(number))
        if number:
            ckpt.wait(number)  # each is committed: a newer one would abort an older one
    ckpt.close()
    compare("checkpoints on", job, found, losses)
    if ckpt.stats()["checkpoints_committed"] != STEPS:
        problems.append(f"{ckpt.stats()['checkpoints_committed']} checkpoints were committed")
    for stop in range(1, STEPS):
        job = make(2)
        if stop % 2 and not dist.is_initialized():  # live state to be overwritten, or none
            job.step(1)
        ckpt = attach(job, root, every_n_steps=100, **options)
        if ckpt.restore(stop) != stop:
            problems.append(f"not restored from {stop}")
        compare(f"resumed from {stop}", job, [job.step(number) for number in ckpt.steps(STEPS)], losses[stop:])
        ckpt.close()
    return problems + unsound(root)


CASES: dict[str, Callable[[int], Job]] = {"gan": Gan, "actor-critic": ActorCritic, "engines": Engines, "mixed": Mixed}


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    results: dict[str, list[str]] = {}
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        dist.broadcast_object_list(paths, src=0)
        if "engines" in cases:
            import zero_kit

            zero_kit.prepare()
        for case in cases:
            results[case] = trial(CASES[case], f"{paths[0]}/{case}")
        (out / f"{rank}.json").write_text(json.dumps(results))
        dist.barrier()


if __name__ == "__main__":
    main()
