"""Trains small DeepSpeed engines with and without checkpoints, and resumes each in a fresh engine; writes what differs.

    zero.py OUT CASE...

A CASE is a stage and features joined by ``-``, such as ``2-bf16-clip-accumulate2``.
OUT/<rank>.json is {case: [differences]}.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger
from kit import differences, process_group
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.frameworks import deepspeed as room
from layerwise_dist.frameworks.deepspeed import counters, units

STEPS, STOP = 6, 3
logger.setLevel(logging.ERROR)
# An op that DeepSpeed would compile for a minute, and that only inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Net(nn.Module):
    """Odd sizes, so that ZeRO pads; an unused, a frozen and a tied parameter; dropout; a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 13)
        self.block = nn.Sequential(nn.Linear(13, 29), nn.Tanh(), nn.Dropout(0.2), nn.Linear(29, 13))
        self.frozen = nn.Linear(13, 13).requires_grad_(False)
        self.tiny = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(13, 19, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        hidden = self.embed(tokens)
        if self.checkpointing:
            hidden = torch.utils.checkpoint.checkpoint(self.block, hidden, use_reentrant=False)
        else:
            hidden = self.block(hidden)
        return self.head(self.frozen(hidden) * self.tiny)

    checkpointing = False


def settings(stage: int, features: set[str]) -> dict[str, Any]:
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
    if "subgroups" in features:
        zero["sub_group_size"] = 300
    if "gather" in features:  # no parameter stays gathered between iterations
        zero["stage3_param_persistence_threshold"] = 0
    if "robin" in features:
        zero["round_robin_gradients"] = True
    if "overlap" in features:
        zero["overlap_comm"] = True
    return config


class Job:
    """One training script around one engine. Dropout and batches come from the global generator, one seed a rank."""

    def __init__(self, case: str, seed: int) -> None:
        stage, *features = case.split("-")
        self.features = set(features)
        torch.manual_seed(seed)
        net = Net()
        net.checkpointing = "recompute" in self.features
        trained = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        if "flat" not in self.features:
            groups = lwd.param_groups(net, groups)
        make = torch.optim.SGD if "sgd" in self.features else torch.optim.AdamW
        options = {"momentum": 0.9} if "sgd" in self.features else {}
        config = settings(int(stage), self.features)
        self.engine, *_ = deepspeed.initialize(
            model=net, model_parameters=trained, optimizer=make(groups, lr=0.01, **options), config=config
        )
        torch.manual_seed(1000 * seed + dist.get_rank())

    def attach(self, folder: str) -> Any:
        commit = {"timeout_s": 30.0, "on_failure": "raise"}
        return lwd.attach(self.engine, config={"dir": folder, "audit": "always", "keep_last": 1, "commit": commit})

    def micro_batch(self) -> str:
        generator = None
        if "micro" in self.features:  # without steps() the global generator is put back at the forward, not at the draw
            generator = torch.Generator().manual_seed(100 * self.engine.micro_steps + dist.get_rank())
        tokens = torch.randint(0, 19, (2, 6), generator=generator)
        targets = torch.randint(0, 19, (12,), generator=generator)
        loss = nn.functional.cross_entropy(self.engine(tokens).flatten(0, 1).float(), targets)
        self.engine.backward(loss)
        self.engine.step()
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

    def contents(self) -> dict[str, Any]:
        """All that the future of this rank depends on, by parameter; not the padding in ZeRO's units."""
        engine, framework = self.engine, room.DeepSpeedFramework(self.engine, dist.get_rank(), dist.get_world_size())
        held: dict[str, Any] = {"rng": torch.get_rng_state(), "forwards": engine.module.forwards.clone()}
        base = framework.units.base
        for view in framework.params:
            held[f"live/{view.fqn}"] = view.param.detach().clone()
            held[f"master/{view.fqn}"] = framework.local(view.param).clone()
            if view.fqn not in framework.fragments:
                continue
            unit = framework.units.tensor(framework.fragments[view.fqn].unit)
            for name, value in base.state.get(unit, {}).items():
                whole = isinstance(value, torch.Tensor) and value.shape == unit.shape
                held[f"{name}/{view.fqn}"] = framework.fragment_of(view, value).clone() if whole else value
        for number, group in enumerate(base.param_groups):
            held[f"group/{number}"] = {key: value for key, value in group.items() if key != "params"}
        held["counters"] = [engine.global_steps, engine.global_samples, engine.skipped_steps, engine.micro_steps]
        wrapper = framework.units.wrapper
        scaler = getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)
        held["scaler"] = None if scaler is None else {key: repr(value) for key, value in vars(scaler).items()}
        held["scheduler"] = engine.lr_scheduler.state_dict()
        return held


def trial(case: str, root: str, sabotage: Callable[[Job], None] | None = None) -> list[str]:
    """What differs between the plain run, the run with checkpoints, and the run that stopped and was resumed."""
    job = Job(case, seed=1)
    losses = job.train(None, STEPS)
    expected, skipped = job.contents(), job.engine.skipped_steps
    problems = [] if bool(skipped) == ("fp16" in case and not case.startswith("0")) else [f"{skipped} skipped updates"]

    def compare(what: str, job: Job, found: list[str], wanted: list[str]) -> None:
        if found != wanted:
            problems.append(f"{what}: losses {found}, expected {wanted}")
        problems.extend(f"{what}: {name}" for name in differences(job.contents(), expected))

    job = Job(case, seed=1)
    ckpt = job.attach(f"{root}/on")
    found = job.train(ckpt, STEPS)
    ckpt.close()
    compare("checkpoints on", job, found, losses)
    if ckpt.stats()["checkpoints_committed"] != STEPS - skipped:
        problems.append(f"checkpoints on: {ckpt.stats()['checkpoints_committed']} committed, {skipped} skipped")

    job = Job(case, seed=1)
    ckpt = job.attach(f"{root}/stopped")
    job.train(ckpt, STOP)
    ckpt.close()
    job = Job(case, seed=2)
    job.train(None, 1)  # live state to be overwritten
    ckpt = job.attach(f"{root}/stopped")
    start = ckpt.restore()
    if not 0 < start <= STOP or (start < STOP and not skipped):
        problems.append(f"resumed from step {start}")
    if sabotage is not None:
        sabotage(job)
    found = job.train(ckpt, STEPS)
    ckpt.close()
    compare("resumed", job, found, losses[start * job.engine.gradient_accumulation_steps() :])
    return problems


# -- what must be seen -----------------------------------------------------------------------------------------------


def one_ulp(job: Job) -> None:
    framework = room.DeepSpeedFramework(job.engine, dist.get_rank(), dist.get_world_size())
    view = next(view for view in framework.params if view.fqn == "block.0.weight")
    framework.local(view.param).view(torch.int32)[0] ^= 1


def without(place: Any, name: str, case: str, root: str) -> list[str]:
    """The trial with one step of the restore left out."""
    original = getattr(place, name)
    setattr(place, name, lambda *args: None)
    try:
        return trial(case, root)
    finally:
        setattr(place, name, original)


def mutations(root: str) -> dict[str, bool]:
    """By name, whether the trial saw it."""
    return {
        "one ulp of a master": bool(trial("2-bf16", f"{root}/ulp", one_ulp)),
        "low-precision copies of ZeRO-2 not derived": bool(
            without(units.Zero12, "after_load", "2-bf16", f"{root}/lp2")
        ),
        "low-precision copies of ZeRO-3 not derived": bool(without(units.Zero3, "after_load", "3-bf16", f"{root}/lp3")),
        "counters not put back": bool(without(counters.Counters, "put", "1-fp32-accumulate3", f"{root}/counters")),
    }


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(change: Callable[[Any], None], message: str, root: str) -> list[str]:
    job = Job("2-bf16", seed=1)
    change(job.engine)
    before = dict(vars(job.engine))
    try:
        job.attach(root).close()
    except errors.UnsupportedError as error:
        found = [] if message in str(error) else [f"{error} does not say {message!r}"]
        return found + ([] if vars(job.engine) == before else ["something was left on the engine"])
    return [f"not refused: {message}"]


def refusals(root: str) -> list[str]:
    class Strange(torch.optim.SGD):
        __module__ = "deepspeed.strange"

    def offload_to_nvme(engine: Any) -> None:
        nvme = DeepSpeedZeroConfig(stage=3, offload_optimizer={"device": "nvme"})
        engine._config.zero_config.offload_optimizer = nvme.offload_optimizer

    def lose_an_attribute(engine: Any) -> None:
        del engine.optimizer.bit16_groups

    def strange_optimizer(engine: Any) -> None:
        engine.optimizer.optimizer.__class__ = Strange

    def state_of_another_shape(engine: Any) -> None:
        unit = engine.optimizer.single_partition_of_fp32_groups[0]
        engine.optimizer.optimizer.state[unit]["factor"] = torch.zeros(3)

    return [
        *refused(lambda engine: setattr(engine, "zenflow", True), "ZenFlow", root),
        *refused(lambda engine: setattr(engine, "has_moe_layers", True), "mixture-of-experts", root),
        *refused(lambda engine: setattr(engine, "dp_world_size", 1), "tensor or sequence parallelism", root),
        *refused(offload_to_nvme, "NVMe offload", root),
        *refused(lose_an_attribute, "DeepSpeedZeroOptimizer has no attribute 'bit16_groups'", root),
        *refused(strange_optimizer, "optimizer Strange is not supported", root),
        *refused(state_of_another_shape, "'factor' of shape [3]", root),
        *refused(lambda engine: setattr(engine, "optimizer", None), "no optimizer", root),
    ]


def window_in_two(root: str) -> list[str]:
    """steps() with one micro-batch as its body, at two micro-batches a window."""
    job = Job("2-bf16-accumulate2", seed=1)
    ckpt = job.attach(root)
    try:
        for _ in ckpt.steps(2):
            job.micro_batch()
    except errors.BoundaryError as error:
        return [] if "within an accumulation window" in str(error) else [str(error)]
    finally:
        ckpt.close()
    return ["a window was cut in two"]


def other_stage(root: str) -> list[str]:
    """A checkpoint of stage 1 is one of stage 2, and not one of stage 3: nothing is loaded then."""
    found = []
    job = Job("1-bf16", seed=1)
    ckpt = job.attach(root)
    job.train(ckpt, 2)
    ckpt.close()
    expected = job.contents()
    job = Job("2-bf16", seed=2)
    ckpt = job.attach(root)
    ckpt.restore()
    ckpt.close()
    got = job.contents()
    found += [name for name in differences(got, expected) if name != "rng"]
    job = Job("3-bf16", seed=2)
    before = job.contents()
    ckpt = job.attach(root)
    try:
        ckpt.restore()
        found.append("stage 3 took a checkpoint of stage 1")
    except errors.MismatchError:
        found += differences(job.contents(), before)
    ckpt.close()
    return found


def block_in_ds_config(root: str) -> list[str]:
    """The block turns it on, `enabled: false` and no block leave the engine alone; the drop-in does all of it."""
    import layerwise_dist.deepspeed as drop_in

    found = []
    for block, on in (({"dir": root}, True), ({"dir": root, "enabled": False}, False), (None, False)):
        net = Net()
        config = settings(2, {"bf16"})
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
        if block is not None:
            config["layerwise_checkpoint"] = block
        engine, *rest = drop_in.initialize(model=net, config=config)
        hooked = "_take_model_step" in vars(engine)
        if hooked != on or len(rest) != 3:
            found.append(f"block {block}: hooked is {hooked}")
        names = [group.get("name") for group in engine.optimizer.param_groups]
        if sorted(names) != ["", "block.0", "block.3", "embed"]:
            found.append(f"groups {names}")
        engine.layerwise.close()
        if "_take_model_step" in vars(engine):
            found.append("close() left its hook")
    if drop_in.zero is not deepspeed.zero:
        found.append("other names are not DeepSpeed's own")
    return found


CHECKS = {
    "refusals": refusals, "window": window_in_two, "stages": other_stage, "block": block_in_ds_config,
}  # fmt: skip


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    # The CPU accelerator asks for fast fp16 matrix products; slow ones are as exact.
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    results: dict[str, Any] = {}
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        dist.broadcast_object_list(paths, src=0)
        deepspeed.init_distributed("gloo")
        for case in cases:
            root = f"{paths[0]}/{case}"
            if case == "mutations":
                results[case] = mutations(root)
            else:
                results[case] = CHECKS[case](root) if case in CHECKS else trial(case, root)
        (out / f"{rank}.json").write_text(json.dumps(results))
        dist.barrier()


if __name__ == "__main__":
    main()
