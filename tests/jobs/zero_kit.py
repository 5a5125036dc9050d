# SPDX-License-Identifier: Apache-2.0
"""One small training around one DeepSpeed engine, and the trial: with checkpoints, without, and resumed.

A case is a stage and features joined by ``-``, such as ``2-bf16-clip-accumulate2``.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from job_kit import differences, unsound
from torch import nn

import layerwise_dist as lwd
from layerwise_dist.capture import survey
from layerwise_dist.commit import places
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.frameworks import deepspeed as room
from layerwise_dist.frameworks.deepspeed.groups import split_groups

STEPS, STOP = 6, 3
_LINEAR = nn.functional.linear
logger.setLevel(logging.ERROR)


class Net(nn.Module):
    """Odd sizes, so that ZeRO pads; an unused, a frozen and a tied parameter; dropout; a buffer that counts."""

    def __init__(self, width: int = 29) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 13)
        self.block = nn.Sequential(nn.Linear(13, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 13))
        self.frozen = nn.Linear(13, 13).requires_grad_(False)
        self.tiny = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(13, 19, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        hidden = self.embed(tokens)
        if self.checkpointing:
            hidden = torch.utils.checkpoint.checkpoint(
                self.block, hidden, use_reentrant=self.checkpointing == "reentrant"
            )
        else:
            hidden = self.block(hidden)
        return self.head(self.frozen(hidden) * self.tiny)

    checkpointing = ""


def settings(stage: int, features: set[str], scratch: str = "") -> dict[str, Any]:
    """A ds_config; `scratch` is a folder for what is offloaded to NVMe."""
    zero: dict[str, Any] = {"stage": stage}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 0.01}},
    }
    for feature in features:
        if feature.startswith("accumulate"):
            config["gradient_accumulation_steps"] = int(feature.removeprefix("accumulate"))
    if "bf16" in features:
        config["bf16"] = {"enabled": True}
    if "fp16" in features:  # the scale starts too high, and rises into the next overflow after two updates
        config["fp16"] = {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 1}
    if "clip" in features:
        config["gradient_clipping"] = 0.5
    if "fp32grads" in features:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "offload" in features or "offloadall" in features:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "offloadall" in features:
        zero["offload_param"] = {"device": "cpu"}
    if "nvme" in features or "nvmeall" in features:
        nvme = {"device": "nvme", "nvme_path": tempfile.mkdtemp(dir=scratch), "buffer_count": 16}
        pipelined = "pipelined" in features
        zero["offload_optimizer"] = {**nvme, "pipeline_read": pipelined, "pipeline_write": pipelined}
        if "nvmeall" in features:
            zero["offload_param"] = {**nvme, "buffer_size": 2_000_000, "max_in_cpu": 0}
    if "subgroups" in features:
        zero["sub_group_size"] = 300
    if "gather" in features:  # no parameter stays gathered between iterations
        zero["stage3_param_persistence_threshold"] = 0
    if "inbackward" in features:
        zero["reduce_bucket_size"] = 400  # so that gradients are reduced while the backward goes on
        config.setdefault("gradient_clipping", 0.0)  # it is 1.0 otherwise
    if "robin" in features:
        zero["round_robin_gradients"] = True
    if "overlap" in features:
        zero["overlap_comm"] = True
    return config


def prepare() -> None:
    """What a job needs before its first engine: fp16 on CPU, and no operator that is compiled for a minute."""
    # The CPU accelerator asks for fast fp16 matrix products; slow ones are as exact.
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # only inference uses it


class Keyed(torch.optim.SGD):
    """Counts its steps under a string, and lets them fall with the count."""

    def step(self, closure: Any = None) -> None:
        count = self.state.setdefault("count", torch.zeros(()))  # type: ignore[call-overload]
        count += 1
        for group in self.param_groups:
            group["momentum"] = 0.9 / float(count)
        super().step()


class Job:
    """One training script around one engine. Dropout and batches come from the global generator, one seed a rank.

    `before_micro_batch` is called with the number of those that are done, and so is `after_micro_batch`, with the loss.
    """

    def __init__(
        self, case: str, seed: int, scratch: str = "", *,
        before_micro_batch: Callable[[int], None] = lambda done: None,
        after_micro_batch: Callable[[int, str], None] = lambda done, loss: None,
    ) -> None:  # fmt: skip
        self._before, self._after = before_micro_batch, after_micro_batch
        self._stepped: Any = None
        self.early = 0  # the most units that were updated in one backward
        self.moved = 0  # of a case with "nodes": how many nodes further this rank is than its number says
        stage, *features = case.split("-")
        self.features = set(features)
        nn.functional.linear = _LINEAR  # ZeRO-3 puts another one there, which rounds otherwise, for all the process
        torch.manual_seed(seed)
        # Under NVMe offload DeepSpeed swaps what has a MiB of masters on a rank.
        net = Net(43_000) if self.features & {"nvme", "nvmeall", "wide"} else Net()
        if "nvmeall" in self.features:
            net.requires_grad_(True)
        net.checkpointing = (
            "reentrant" if "reentrant" in self.features else "recompute" * ("recompute" in self.features)
        )
        trained = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        make: Any = (
            Keyed if "keyed" in self.features else torch.optim.SGD if "sgd" in self.features else torch.optim.AdamW
        )
        if "cpuadam" in self.features:
            make = deepspeed.ops.adam.DeepSpeedCPUAdam
        optimizer = make(groups, lr=0.01, **({"momentum": 0.9} if issubclass(make, torch.optim.SGD) else {}))
        config, scheduler = settings(int(stage), self.features, scratch), None
        if "cyclic" in self.features:  # one that keeps something for each group
            rates = {"base_lr": [0.01, 0.02], "max_lr": [0.03, 0.05], "step_size_up": 4, "cycle_momentum": False}
            scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, **rates)
            del config["scheduler"]
        if "flat" not in self.features:
            split_groups(net, optimizer, scheduler)
        self.engine, *_ = deepspeed.initialize(
            model=net, model_parameters=trained, optimizer=optimizer, lr_scheduler=scheduler, config=config
        )
        torch.manual_seed(1000 * seed + dist.get_rank())

    def attach(self, folder: str) -> Any:
        if "nodes" in self.features:  # each rank is on one, with a disk; what tells nodes apart is patched
            node = (dist.get_rank() + self.moved) % dist.get_world_size()
            places.place = lambda: f"node {node}"
            folder = f"{folder}-{node}"
        commit = {"timeout_s": 30.0, "on_failure": "raise"}
        config = {"dir": folder, "audit": "always", "keep_last": 1, "commit": commit}
        if "monitor" in self.features:
            config["mode"] = "monitor"
        if "inbackward" in self.features:
            config["update"] = "in_backward"
        ckpt = lwd.attach(self.engine, config=config)
        self._stepped = workings_of(ckpt).optimizer.in_backward
        return ckpt

    def micro_batch(self) -> str:
        self._before(self.engine.micro_steps)
        generator = None
        if "micro" in self.features:  # without steps() the global generator is put back at the forward, not at the draw
            generator = torch.Generator().manual_seed(100 * self.engine.micro_steps + dist.get_rank())
        tokens = torch.randint(0, 19, (2, 6), generator=generator)
        targets = torch.randint(0, 19, (12,), generator=generator)
        loss = nn.functional.cross_entropy(self.engine(tokens).flatten(0, 1).float(), targets)
        self.engine.backward(loss)
        if self._stepped is not None:
            self.early = max(self.early, self._stepped.stepped)
        self.engine.step()
        self._after(self.engine.micro_steps, loss.item().hex())
        return loss.item().hex()

    def train(self, ckpt: Any, until: int) -> list[str]:
        """Losses of all micro-batches of the iterations up to `until`."""
        window, losses = self.engine.gradient_accumulation_steps(), []
        if ckpt is None:
            return [self.micro_batch() for _ in range(until * window)]
        if "micro" in self.features:
            ckpt.explicit()
            while ckpt.completed < until:
                losses.append(self.micro_batch())
                ckpt.end_step()
        elif "inferred" in self.features:
            losses = [self.micro_batch() for _ in range((until - ckpt.completed) * window)]
        else:
            for _ in ckpt.steps(until):
                losses += [self.micro_batch() for _ in range(window)]
        return losses

    def rates(self) -> dict[str, float]:
        """The learning rate of each parameter."""
        framework = room.DeepSpeedFramework(self.engine, dist.get_rank(), dist.get_world_size())
        groups = room.DeepSpeedOptimizer(framework).hyper_parameters()
        return {name: group["lr"] for group in groups for name in group["params"]}

    def contents(self) -> dict[str, Any]:
        """All that the future of this rank depends on, by parameter; not the padding in ZeRO's units."""
        engine, framework = self.engine, room.DeepSpeedFramework(self.engine, dist.get_rank(), dist.get_world_size())
        framework.units.gather()
        held: dict[str, Any] = {"rng": torch.get_rng_state(), "forwards": engine.module.forwards.clone()}
        base = framework.units.base
        for view in framework.params:
            held[f"live/{view.fqn}"] = view.param.detach().clone()
            held[f"master/{view.fqn}"] = framework.local(view.param).clone()
            if view.fqn not in framework.fragments:
                continue
            number = framework.fragments[view.fqn].unit
            unit = framework.units.tensor(number)
            for name, value in framework.units.state(number).items():
                whole = isinstance(value, torch.Tensor) and value.shape == unit.shape
                held[f"{name}/{view.fqn}"] = framework.fragment_of(view, value).clone() if whole else value
        for number, group in enumerate(base.param_groups):
            held[f"group/{number}"] = {key: value for key, value in group.items() if key != "params"}
        held["keyed"] = {key: value for key, value in base.state.items() if isinstance(key, str)}
        held["counters"] = [engine.global_steps, engine.global_samples, engine.skipped_steps, engine.micro_steps]
        wrapper = framework.units.wrapper
        scaler = getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)
        held["scaler"] = None if scaler is None else {key: repr(value) for key, value in vars(scaler).items()}
        held["scheduler"] = engine.lr_scheduler.state_dict()
        return held


def trial(
    case: str, root: str, sabotage: Callable[[Job], None] | None = None, *, resumed_only: bool = False
) -> list[str]:  # fmt: skip
    """What differs between the plain run, the run with checkpoints, and the run that stopped and was resumed; without
    the second, or without the third if the second differs.
    """
    os.makedirs(root, exist_ok=True)
    # With "base" the frozen layer is enough for one.
    survey.LEAST_BASE_BYTES = 1 if "base" in case.split("-") else 1 << 20
    job = Job(case, 1, root)
    losses = job.train(None, STEPS)
    expected, skipped = job.contents(), job.engine.skipped_steps
    problems = [] if bool(skipped) == ("fp16" in case and not case.startswith("0")) else [f"{skipped} skipped updates"]

    def compare(what: str, job: Job, found: list[str], wanted: list[str]) -> None:
        if found != wanted:
            problems.append(f"{what}: losses {found}, expected {wanted}")
        problems.extend(f"{what}: {name}" for name in differences(job.contents(), expected))

    if not resumed_only:
        job = Job(case, 1, root)
        ckpt = job.attach(f"{root}/on")
        found = job.train(ckpt, STEPS)
        ckpt.close()
        compare("checkpoints on", job, found, losses)
        if ckpt.stats()["checkpoints_committed"] != STEPS - skipped:
            problems.append(f"checkpoints on: {ckpt.stats()['checkpoints_committed']} committed, {skipped} skipped")
        if ckpt.stats()["bases_written"] != int("base" in job.features):
            problems.append(f"checkpoints on: {ckpt.stats()['bases_written']} bases were written")
        if (job.early > 1) != ("inbackward" in case):
            problems.append(f"{job.early} units were updated in the backward")
        told = [False] * dist.get_world_size()
        dist.all_gather_object(told, bool(problems))
        if any(told):
            return problems or ["checkpoints on: another rank differs"]

    job = Job(case, 1, root)
    ckpt = job.attach(f"{root}/stopped")
    job.train(ckpt, STOP)
    ckpt.close()
    job = Job(case, 2, root)
    job.train(None, 1)  # live state to be overwritten
    job.moved = int("nodes" in job.features)
    ckpt = job.attach(f"{root}/stopped")
    start = ckpt.restore()
    if not 0 < start <= STOP or (start < STOP and not skipped):
        problems.append(f"resumed from step {start}")
    if sabotage is not None:
        sabotage(job)
    found = job.train(ckpt, STEPS)
    ckpt.close()
    compare("resumed", job, found, losses[start * job.engine.gradient_accumulation_steps() :])
    # A restored base is referred to further, unless it lies on the disk of a node where this rank no longer is.
    if ckpt.stats()["bases_written"] != (job.moved if "base" in job.features else 0):
        problems.append(f"resumed: {ckpt.stats()['bases_written']} bases were written")
    return problems + unsound(f"{root}/stopped" + "-0" * ("nodes" in job.features))


def expect(error: type[Exception], message: str, call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except error as raised:
        return [] if re.search(message, str(raised)) else [f"{raised} does not say {message!r}"]
    return [f"no error: {message}"]
