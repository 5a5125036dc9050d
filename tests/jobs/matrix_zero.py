# SPDX-License-Identifier: Apache-2.0
"""The training of matrix_wrappers.py around a DeepSpeed engine, ZeRO 0 to 3, and its state in global form."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from matrix_wrappers import KEYS, OPTIMIZERS, SAMPLES, Global, Job, Net, batch, compared, groups
from torch import Tensor, nn

import layerwise_dist as lwd
import layerwise_dist.deepspeed as drop_in

PRECISIONS: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {}, torch.bfloat16: {"bf16": {"enabled": True}},
    torch.float16: {"fp16": {"enabled": True, "initial_scale_power": 4}},
}  # fmt: skip
_LINEAR = nn.functional.linear
logger.setLevel(logging.ERROR)


def prepare() -> None:
    """What a process needs before its first engine. All ranks together."""
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # only inference uses it
    deepspeed.init_distributed("gloo")


class Zero(Job):
    """An engine of stage 0 to 3. Stages 2 and 3 come from the drop-in, with one param group a layer; the others keep
    the two groups that they are given.
    """

    stage = 0
    masters = True

    def __init__(self, optimizer: str, seed: int) -> None:
        self.kernel = optimizer
        self.rank, self.share, self.shares = dist.get_rank(), dist.get_rank(), dist.get_world_size()
        nn.functional.linear = _LINEAR  # ZeRO-3 puts another one there, which rounds otherwise, for all the process
        torch.manual_seed(seed)
        self.net = Net().to(self.dtype)  # buffers too, which DeepSpeed leaves in fp32
        kind, options = OPTIMIZERS[optimizer]
        trained = [(fqn, param) for fqn, param in self.net.named_parameters() if param.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": SAMPLES // self.shares,
            # Of ZeRO-3: larger ones than this are cut between iterations, smaller ones stay whole.
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 50},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **PRECISIONS[self.dtype],
        }
        initialize = drop_in.initialize if self.stage > 1 else deepspeed.initialize
        self.engine, *_ = initialize(
            model=self.net, model_parameters=[param for _, param in trained],
            optimizer=kind(groups(trained, turned=self.stage == 1), **options), config=config,
        )  # fmt: skip
        self.model = self.engine

    @property
    def optimizer(self) -> Any:
        """The one that updates DeepSpeed's flat tensors. ZeRO may put another one there."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    @optimizer.setter
    def optimizer(self, value: Any) -> None:
        raise AttributeError("it is the engine's")

    def attach(self, folder: str, **options: Any) -> Any:
        return lwd.attach(self.engine, config={"dir": folder, **options})

    def train(self, step: int) -> None:
        tokens, targets = batch(step, self.share, self.shares)
        self.engine.backward(nn.functional.cross_entropy(self.engine(tokens).float(), targets))
        self.engine.step()

    def units(self) -> list[tuple[int, Tensor, list[nn.Parameter]]]:
        """The param group of each flat tensor, itself, and the parameters in it."""
        zero = self.engine.optimizer
        if self.stage == 0:
            of = [(number, param) for number, group in enumerate(zero.param_groups) for param in group["params"]]
            return [(number, param, [param]) for number, param in of]
        if self.stage < 3:
            flat = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
            return [(number, unit, list(params)) for number, (unit, params) in enumerate(flat)]
        flat = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        of_group = zero.sub_group_to_group_id
        return [(of_group[number], unit, list(params)) for number, (unit, params) in enumerate(flat)]

    def has_part(self, param: Any) -> bool:
        """Whether this rank updates an element of it."""
        if self.stage == 0:
            return True
        if self.stage < 3:
            return param._hp_mapping is not None
        return param.partition_numel() * self.rank < param.ds_numel

    def by_param(self) -> Iterator[tuple[str, Any, int, dict[str, Any]]]:
        """Each trained parameter: its name, itself, its param group, and the optimizer's state of its flat tensor."""
        names = {id(param): fqn for fqn, param in self.named()}
        for group, unit, params in self.units():
            for param in params:
                if param.requires_grad:
                    yield names[id(param)], param, group, self.state.get(unit, {})

    def without_state(self) -> list[str]:
        keys = {*KEYS[self.kernel]}
        return [fqn for fqn, param, _, state in self.by_param() if self.has_part(param) and not keys <= {*state}]

    # -- the global form ------------------------------------------------------------------------------------------

    def whole(self, param: Any) -> Tensor:
        """What the model computes with."""
        # One that stays whole between iterations is taken as it is: gathering would hide what is wrong with it.
        cut = self.stage == 3 and param.ds_status != ZeroParamStatus.AVAILABLE
        with deepspeed.zero.GatheredParameters([param], enabled=cut):
            return param.detach().clone()

    def live(self) -> Global:
        return {f"param/{fqn}": self.whole(param) for fqn, param in self.named()}

    def take(self) -> Global:
        held = {f"param/{fqn}": self.whole(param) for fqn, param in self.named()}
        for fqn, param, _, state in self.by_param():
            if self.stage:
                held[f"param/{fqn}"] = safe_get_full_fp32_param(param).clone()
            for key in KEYS[self.kernel]:
                if self.stage == 0:
                    held[f"{key}/{fqn}"] = torch.as_tensor(state[key]).detach().clone()
                elif key != "step":
                    held[f"{key}/{fqn}"] = safe_get_full_optimizer_state(param, key).clone()
        if self.stage and "step" in KEYS[self.kernel]:
            held.update(self.counts())
        return {**held, **self.buffers()}

    def counts(self) -> Global:
        """`step` of each parameter; where the ranks that update it do not agree, all that they say."""
        mine = {fqn: float(state["step"]) for fqn, param, _, state in self.by_param() if self.has_part(param)}
        told: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(told, mine)
        by_name: dict[str, set[float]] = {}
        for each in told:
            for fqn, count in each.items():
                by_name.setdefault(fqn, set()).add(count)
        return {
            f"step/{fqn}": torch.tensor(next(iter(counts)) if len(counts) == 1 else sorted(counts))
            for fqn, counts in by_name.items()
        }

    def hyper(self) -> dict[str, dict[str, Any]]:
        return {fqn: compared(self.optimizer.param_groups[group]) for fqn, _, group, _ in self.by_param()}

    def put(self, wanted: Mapping[str, Tensor]) -> None:
        if self.stage in (1, 2):
            # By itself DeepSpeed does it after the update of the first group, when the others have no state yet.
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        with torch.no_grad():
            for fqn, param in self.named():
                with deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=self.stage == 3):
                    param.data.copy_(wanted[f"param/{fqn}"])
            for fqn, param, _, state in self.by_param():
                self.put_master(param, wanted[f"param/{fqn}"])
                for key in KEYS[self.kernel]:
                    if key == "step":
                        state[key].fill_(float(wanted[f"step/{fqn}"]))
                    else:
                        self.put_state(param, state, key, wanted[f"{key}/{fqn}"])
            self.put_buffers(wanted)

    def put_master(self, param: Any, value: Tensor) -> None:
        if self.stage == 3:
            safe_set_local_fp32_param(param, self.mine(param, value))
        elif self.stage:
            safe_set_full_fp32_param(param, value)

    def put_state(self, param: Any, state: dict[str, Any], key: str, value: Tensor) -> None:
        if self.stage == 3:
            safe_set_local_optimizer_state(param, self.mine(param, value), key)
        elif self.stage:
            safe_set_full_optimizer_state(param, value, key)
        else:
            state[key].copy_(value)

    def mine(self, param: Any, value: Tensor) -> Tensor:
        """This rank's part as ZeRO-3 cuts it; zeros after the last element. (Its setters of whole tensors take no
        sizes that do not divide by the ranks.)
        """
        length = param.partition_numel()
        padded = torch.zeros(length * self.shares, dtype=value.dtype)
        padded[: value.numel()] = value.flatten()
        return padded[self.rank * length : (self.rank + 1) * length]

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        for _, unit, _ in self.units():
            yield unit.data
        for param in self.net.parameters():
            if hasattr(param, "ds_tensor"):
                yield param.ds_tensor.data


class Zero1(Zero):
    stage = 1


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3
