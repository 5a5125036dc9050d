"""Checks of DeepSpeed engines that are no trials of a whole training; run by zero.py. Each gives what was wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from kit import differences
from zero_kit import STEPS, STOP, Job, Net, settings, trial

from layerwise_dist import errors
from layerwise_dist.frameworks import deepspeed as room
from layerwise_dist.frameworks.deepspeed import counters, nvme, units

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


def nvme_mutation(root: str) -> list[str]:
    """A mirror that is not copied behind the update is an older one, or zeros."""
    return [] if without(nvme.Zero3OnNvme, "_copy", "3-fp32-nvme", root) else ["not seen"]


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

    return [
        *refused(lambda engine: setattr(engine, "zenflow", True), "ZenFlow", root),
        *refused(lambda engine: setattr(engine, "has_moe_layers", True), "mixture-of-experts", root),
        *refused(lambda engine: setattr(engine, "dp_world_size", 1), "tensor or sequence parallelism", root),
        *refused(offload_to_nvme, "frozen parameters under NVMe offload of parameters", root),
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


CHECKS: dict[str, Callable[[str], Any]] = {
    "refusals": refusals, "window": window_in_two, "stages": other_stage, "block": block_in_ds_config,
    "regrouped": regrouped, "mutations": mutations, "nvme mutation": nvme_mutation,
}  # fmt: skip
