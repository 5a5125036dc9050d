# SPDX-License-Identifier: Apache-2.0
"""Checks of DeepSpeed engines that are no trials of a whole training; run by zero.py. Each gives what was wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import zero_kit
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import safe_get_full_optimizer_state
from job_kit import differences
from zero_calls import CHECKS as OF_CALLS
from zero_equal import CHECKS as OF_EQUALS
from zero_kit import STEPS, STOP, Job, Net, expect, settings, trial
from zero_stand_ins import CHECKS as OF_STAND_INS

import layerwise_dist as lwd
import layerwise_dist.deepspeed as drop_in
from layerwise_dist import errors
from layerwise_dist.frameworks import adams, flat
from layerwise_dist.frameworks import deepspeed as room
from layerwise_dist.frameworks.deepspeed import counters, flattening, nvme
from layerwise_dist.frameworks.deepspeed import in_backward as in_backward_room

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
        return trial(case, root, resumed_only=True)
    finally:
        setattr(place, name, original)


def mutations(root: str) -> dict[str, bool]:
    """By name, whether the trial saw it."""
    return {
        "one ulp of a master": bool(trial("2-bf16", f"{root}/ulp", one_ulp, resumed_only=True)),
        "low-precision copies of ZeRO-2 not derived": bool(
            without(flattening.Zero12, "after_load", "2-bf16", f"{root}/lp2")
        ),
        "low-precision copies of ZeRO-3 not derived": bool(
            without(flattening.Zero3, "after_load", "3-bf16", f"{root}/lp3")
        ),
        "counters not put back": bool(without(counters.Counters, "put", "1-fp32-accumulate3", f"{root}/counters")),
        "state that got other memory not looked for": bool(not_looked_for(f"{root}/memory")),
    }


def not_looked_for(root: str) -> list[str]:
    original = flat._Cut._in_place
    flat._Cut._in_place = lambda cut: True
    try:
        return given_other_memory("3-bf16", root)
    finally:
        flat._Cut._in_place = original


def nvme_mutation(root: str) -> list[str]:
    """A mirror that is not copied after the update is an older one, or zeros."""
    return [] if without(nvme.Zero3OnNvme, "_copy", "3-fp32-nvme", root) else ["not seen"]


def cpuadam(run: Callable[[str, str], list[str]], root: str) -> list[str]:
    """Resumed where a new kernel would take another power of its beta: the sixth of 0.999 is one by pow() and another
    as a product, and what both have subtracted from 1 is so too.
    """
    usual, (zero_kit.STOP, zero_kit.STEPS) = (zero_kit.STOP, zero_kit.STEPS), (5, 8)
    try:
        return run("2-fp32-cpuadam-offload", f"{root}/2") + run("3-bf16-cpuadam-flat", f"{root}/3")
    finally:
        zero_kit.STOP, zero_kit.STEPS = usual


def cpuadam_mutation(root: str) -> list[str]:
    """A kernel that does not make its steps again rounds otherwise."""
    return [] if cpuadam(partial(without, adams, "count_on"), root) else ["not seen"]


def nvme_full(root: str) -> list[str]:
    """A disk without room for a state's mirrors: that checkpoint fails, training goes on, and the next is whole."""
    original, made = nvme._in_a_file, []

    def full(folder: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(numel)
        # The two masters' come at attach(); those of the state at the first update, for each unit and once it is over.
        if len(made) in (4, 5, 6):
            raise OSError(28, "No space left on device", folder)
        return original(folder, numel, dtype)

    os.makedirs(root, exist_ok=True)
    job = Job("3-fp32-nvme", 1, root)
    losses = job.train(None, STEPS)
    nvme._in_a_file = full
    try:
        job = Job("3-fp32-nvme", 1, root)
        config = {"dir": f"{root}/full", "commit": {"timeout_s": 30.0, "raise_after": 3}}
        with lwd.attach(job.engine, config=config) as ckpt:
            found = [] if job.train(ckpt, STEPS) == losses else ["other losses"]
    finally:
        nvme._in_a_file = original
    stats = ckpt.stats()
    counts = stats["checkpoints_committed"], stats["checkpoints_aborted"]
    return found + ([] if counts == (STEPS - 1, 1) else [f"{counts} committed and aborted, mirrors {made}"])


def nvme_saved(root: str) -> list[str]:
    """Saved when asked, after an update that was not to be saved: read from DeepSpeed's swap files again."""
    os.makedirs(root, exist_ok=True)
    job = Job("3-fp32-nvme", 1, root)
    losses = job.train(None, STEPS)
    expected = job.contents()
    config = {"dir": f"{root}/saved", "every_n_steps": None, "commit": {"timeout_s": 30.0}}
    job = Job("3-fp32-nvme", 1, root)
    with lwd.attach(job.engine, config=config) as ckpt:
        job.train(None, STOP)
        ckpt.save("asked")
    job = Job("3-fp32-nvme", 2, root)
    with lwd.attach(job.engine, config=config) as ckpt:
        ckpt.restore(tag="asked")
        found = [] if job.train(None, STEPS - STOP) == losses[STOP:] else ["losses"]
    return found + differences(job.contents(), expected)


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
        nvme = DeepSpeedZeroConfig(stage=3, offload_param={"device": "nvme"})
        engine._config.zero_config.offload_param = nvme.offload_param

    def lose_an_attribute(engine: Any) -> None:
        del engine.optimizer.bit16_groups

    def strange_optimizer(engine: Any) -> None:
        engine.optimizer.optimizer.__class__ = Strange

    def state_of_another_shape(engine: Any) -> None:
        unit = engine.optimizer.single_partition_of_fp32_groups[0]
        engine.optimizer.optimizer.state[unit]["factor"] = torch.zeros(3)

    def own_state_dict(engine: Any) -> None:
        engine.optimizer.optimizer.state_dict = dict

    def one_inside(engine: Any) -> None:
        base = engine.optimizer.optimizer
        base.inner = torch.optim.SGD(base.param_groups[0]["params"], lr=0.1)

    return [
        *refused(lambda engine: setattr(engine, "zenflow", True), "ZenFlow", root),
        *refused(lambda engine: setattr(engine, "has_moe_layers", True), "mixture-of-experts", root),
        *refused(lambda engine: setattr(next(engine.module.parameters()), "allreduce", False), "as of experts", root),
        *refused(lambda engine: setattr(engine, "dp_world_size", 1), "tensor or sequence parallelism", root),
        *refused(offload_to_nvme, "frozen parameters under NVMe offload of parameters", root),
        *refused(lose_an_attribute, "DeepSpeedZeroOptimizer has no attribute 'bit16_groups'", root),
        *refused(strange_optimizer, "optimizer Strange is not supported", root),
        *refused(state_of_another_shape, "'factor' of shape [3]", root),
        *refused(own_state_dict, "around the optimizer AdamW, which has a state_dict() of its own", root),
        *refused(one_inside, "DeepSpeed: AdamW with optimizers inside it (inner)", root),
        *replaced(),
    ]


def replaced() -> list[str]:
    """A Parameter that comes after attach() is none of the engine's."""
    job = Job("2-bf16", seed=1)
    framework = room.DeepSpeedFramework(job.engine, dist.get_rank(), dist.get_world_size())
    framework.follow()
    layer = next(module for module in job.engine.module.modules() if module._parameters)
    name = next(iter(layer._parameters))
    layer._parameters[name] = torch.nn.Parameter(layer._parameters[name].detach().clone())
    return expect(errors.UnsupportedError, "replaced by another Parameter.*A DeepSpeed engine trains", framework.follow)


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
    """A checkpoint of stage 1 is one of stage 2, which cuts as it does. (`matrix.py` has the other stages.)"""
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
    return [name for name in differences(got, expected) if name != "rng"]


def given_other_memory(case: str, root: str) -> list[str]:
    """Masters and state that get other memory between two iterations, as `engine.offload_states()` does it."""
    job = Job(case, seed=1)
    losses = job.train(None, STEPS)
    expected = job.contents()
    job = Job(case, seed=1)
    ckpt = job.attach(root)
    job.train(ckpt, STOP - 1)
    framework = room.DeepSpeedFramework(job.engine, dist.get_rank(), dist.get_world_size())
    for number in range(len(framework.units.groupings())):
        for held in (framework.units.tensor(number), *framework.units.state(number).values()):
            held.data = held.data.clone()
    job.train(ckpt, STOP)
    ckpt.close()
    job = Job(case, seed=2)
    ckpt = job.attach(root)
    found = [] if ckpt.restore() == STOP else ["another step"]
    found += [] if job.train(ckpt, STEPS) == losses[STOP:] else ["losses"]
    ckpt.close()
    return found + differences(job.contents(), expected)


def regrouped(root: str) -> list[str]:
    """A checkpoint of two groups goes on in one group a layer, with its learning rates and their schedule."""
    job = Job("3-bf16-flat-cyclic", seed=1)
    losses = job.train(None, STEPS)
    expected, rates = job.contents(), job.rates()
    job = Job("3-bf16-flat-cyclic", seed=1)
    ckpt = job.attach(root)
    job.train(ckpt, STOP)
    ckpt.close()
    job = Job("3-bf16-cyclic", seed=2)
    ckpt = job.attach(root)
    ckpt.restore()
    found = [] if job.train(ckpt, STEPS) == losses[STOP:] else ["losses"]
    ckpt.close()
    got = job.contents()
    for held in (got, expected):
        held["scheduler"] = {key: value for key, value in held["scheduler"].items() if not isinstance(value, list)}
    names = [name for name in differences(got, expected) if not name.startswith("group/")]
    return found + names + ([] if job.rates() == rates else [f"rates {job.rates()}, expected {rates}"])


def block_in_ds_config(root: str) -> list[str]:
    """The block turns it on, `enabled: false` and no block leave the engine alone; the drop-in does all of it."""
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
    config["layerwise_checkpoint"] = {"dir": f"{root}/differs", "max_in_flight": 1 + dist.get_rank()}
    found += expect(
        errors.ConfigError, "differ: max_in_flight = 1 on rank 0 and 2 on rank 1",
        lambda: drop_in.initialize(model=Net(), config=config),
    )  # fmt: skip
    if os.path.exists(f"{root}/differs"):
        found.append("configurations that differ have made a directory")
    if drop_in.zero is not deepspeed.zero:
        found.append("other names are not DeepSpeed's own")
    return found


# -- updates in the backward -----------------------------------------------------------------------------------------

NOT_IN_BACKWARD = {
    "3-bf16-inbackward-clip": "gradient_clipping",
    "2-fp16-inbackward": "loss scaling",
    "2-bf16-inbackward-offload": "is offloaded",
    "1-bf16-inbackward-fp32grads": "BF16_Optimizer casts all gradients",
    "0-bf16-inbackward": "casts all gradients",
    "2-bf16-inbackward-accumulate2": "sum up 2 micro-batches",
}


def in_backward(root: str) -> list[str]:
    """What it is refused for, by reason, and what ends it when an iteration is unlike the first."""
    found = []
    for case, reason in NOT_IN_BACKWARD.items():
        job = Job(case, seed=1)
        found += expect(errors.UnsupportedError, f"'in_backward': .*{reason}", lambda job=job: job.attach(root))

    job = Job("2-bf16-inbackward", seed=1)
    del job.engine.optimizer.ipg_buckets
    found += expect(errors.UnsupportedError, "has no attribute 'ipg_buckets'", lambda: job.attach(root))

    def ends(error: type[Exception], message: str, *windows: dict[str, float]) -> list[str]:
        """Windows with these options after one another end with that error."""
        job = Job("3-bf16-inbackward", seed=1)

        def run() -> None:
            with job.attach(f"{root}/{message}") as ckpt:
                for step in ckpt.steps(len(windows)):
                    a_window(job, **windows[step])

        return expect(error, message, run)

    found += ends(errors.UnsupportedError, "more than once in a backward", {"backwards": 2})
    found += ends(errors.BoundaryError, "got another gradient after its update", {}, {"backwards": 2})
    found += ends(errors.BoundaryError, "hyper-parameters changed between", {}, {"faster": 0.01})
    found += ends(errors.BoundaryError, "gradients are not finite", {}, {"scale": float("nan")})
    return found


def a_window(job: Job, backwards: int = 1, faster: float = 0.0, scale: float = 1.0) -> None:
    for _ in range(backwards):
        job.engine.backward(job.engine(torch.randint(0, 19, (2, 6))).float().square().mean() * scale)
    for group in job.engine.optimizer.param_groups:
        group["lr"] += faster
    job.engine.step()


def in_backward_mutation(root: str) -> list[str]:
    """Units that `engine.step()` steps once more."""
    original = in_backward_room.InBackward._is_stepped
    in_backward_room.InBackward._is_stepped = lambda self, number: False  # type: ignore[method-assign]
    try:
        return [] if trial("2-bf16-inbackward", root) else ["not seen"]
    finally:
        in_backward_room.InBackward._is_stepped = original  # type: ignore[method-assign]


def frozen_layers(root: str) -> list[str]:
    """LoRA as it is usually written: the optimizer is given all parameters, and whole layers of them are frozen."""
    found = []
    for stage in (1, 2, 3):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(10, 10) for _ in range(4)))
        model[0].requires_grad_(False)
        model[2].requires_grad_(False)
        config = {
            "train_batch_size": dist.get_world_size(), "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True, "layerwise_checkpoint": {"dir": f"{root}/{stage}"},
        }  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        engine, *_ = drop_in.initialize(model=model, optimizer=optimizer, config=config)
        engine.layerwise.restore()
        for _ in engine.layerwise.steps(2):
            engine.backward(engine(torch.ones(1, 10)).square().mean())
            engine.step()
        trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        for name, param in trained.items():
            # All ranks take part in each: a rank that raised would leave the others waiting.
            moment = safe_get_full_optimizer_state(param, "exp_avg")
            if moment is None or not moment.any():
                found.append(f"stage {stage}: no state of {name}")
        engine.layerwise.close()
    return found


CHECKS: dict[str, Callable[[str], Any]] = {
    "refusals": refusals, "window": window_in_two, "stages": other_stage, "block": block_in_ds_config,
    "regrouped": regrouped, "mutations": mutations,
    "nvme mutation": nvme_mutation, "nvme full": nvme_full, "nvme saved": nvme_saved,
    "in backward": in_backward, "in backward mutation": in_backward_mutation,
    "frozen layers": frozen_layers, **OF_CALLS, **OF_STAND_INS, **OF_EQUALS,
    "cpuadam": partial(cpuadam, trial), "cpuadam mutation": cpuadam_mutation,
    "other memory 2": partial(given_other_memory, "2-bf16"), "other memory 3": partial(given_other_memory, "3-bf16"),
}  # fmt: skip
