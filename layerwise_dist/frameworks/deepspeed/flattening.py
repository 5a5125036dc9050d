# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's flat tensors by name: which elements of each parameter lie where in what the inner optimizer updates.

A *unit* (`flat.py`) is one tensor in the inner optimizer's groups: a rank's flat part of a param group (ZeRO-1, 2), of
a sub-group (ZeRO-3), a whole flat group, or one parameter (stage 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.flat import Fragment
from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.frameworks.private_names import DEEPSPEED, require_of_deepspeed


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which unit belongs to which of the inner optimizer's param groups, and which parameters are in it."""

    group: int
    params: Sequence[torch.nn.Parameter]


class Units:
    """How one of DeepSpeed's optimizers lays its masters out. `attributes` are those it is asked for, by name.

    `replicated` says that all ranks hold all masters alike, `swapped` that some are in memory only while updated.
    """

    attributes: tuple[str, ...] = ()
    replicated = swapped = False

    def __init__(self, wrapper: Any) -> None:
        """Raises UnsupportedError naming an attribute that this version of DeepSpeed does not have."""
        self.wrapper = wrapper
        self._numbers: dict[int, int] = {}
        require_of_deepspeed(wrapper, self.attributes)

    @property
    def base(self) -> torch.optim.Optimizer:
        """The optimizer whose `step()` updates the units. ZeRO may put another one there, so it is asked each time."""
        return self.wrapper.optimizer

    def live(self, number: int) -> torch.Tensor:
        """The unit of that number: what the inner optimizer has in its groups when it updates it."""
        raise NotImplementedError

    def tensor(self, number: int) -> torch.Tensor:
        """What is saved as the unit of that number, and restored into."""
        return self.live(number)

    def state(self, number: int) -> Mapping[str, Any]:
        """What the inner optimizer keeps for the unit, by name; empty before its first update."""
        return self.base.state.get(self.live(number), {})

    def stepped(self) -> list[int]:
        """Within a step of the inner optimizer: the units that it updates."""
        found = []
        for group in self.base.param_groups:
            for unit in group["params"]:
                number = self._numbers.get(id(unit))
                if number is None or self.live(number) is not unit:
                    self._numbers = {id(self.live(number)): number for number in range(len(self.groupings()))}
                    number = self._numbers.get(id(unit))
                if number is None:
                    raise UnsupportedError("the optimizer updates a tensor that it did not hold at attach()")
                found.append(number)
        return found

    def groupings(self) -> list[Grouping]:
        """Of each unit, where it belongs."""
        raise NotImplementedError

    def fragments(self) -> dict[int, Fragment]:
        """By the parameter's `id`."""
        found: dict[int, Fragment] = {}
        for number, grouping in enumerate(self.groupings()):
            offset = 0
            for param in grouping.params:
                found[id(param)] = Fragment(number, 0, offset, param.numel())
                offset += param.numel()
        return found

    def updated(self, number: int, *, wanted: bool) -> None:
        """Right after a unit's update; `wanted` says that what it leaves is to be saved."""

    def link_state(self) -> None:
        """After the first update of all units: DeepSpeed's own ways to a parameter's state lead to it from now on."""

    def gather(self) -> None:
        """Before a capture: what `tensor` and `state` give has the contents that it stands for."""

    # -- restore ------------------------------------------------------------------------------------------------

    def before_load(self) -> None:
        """Before masters and frozen parameters are overwritten by a restore. All ranks together."""

    def new_state(self, number: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor for state of the unit's shape, of zeros, which is what the padding at a partition's end has."""
        unit = self.tensor(number)
        return torch.zeros(unit.shape, dtype=dtype, device=unit.device)

    def put_state(self, number: int, state: Mapping[str, Any]) -> None:
        """The unit's state is this now, tensors of `new_state` included; empty for none."""
        if state:
            self.base.state[self.live(number)] = dict(state)
        else:
            self.base.state.pop(self.live(number), None)

    def after_load(self) -> None:
        """Derives what the model computes with from the masters. All ranks together."""


class Unwrapped(Units):
    """Stage 0 in fp32: the inner optimizer updates the model's own parameters."""

    replicated = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._params = [param for group in wrapper.param_groups for param in group["params"]]

    @property
    def base(self) -> torch.optim.Optimizer:
        return self.wrapper

    def live(self, number: int) -> torch.Tensor:
        return self._params[number]

    def groupings(self) -> list[Grouping]:
        groups = self.wrapper.param_groups
        return [Grouping(number, [param]) for number, group in enumerate(groups) for param in group["params"]]


class Untrained(Units):
    """An engine without an optimizer: no units. What it computes with is what is saved and restored."""

    replicated = True

    def __init__(self, wrapper: Any) -> None:
        """`wrapper` is None, or what DeepSpeed has in an optimizer's place."""
        super().__init__(wrapper)
        self._base = torch.optim.SGD([torch.zeros(0, dtype=torch.float32, device="cpu", requires_grad=True)])
        self._base.param_groups.clear()

    @property
    def base(self) -> torch.optim.Optimizer:
        return self._base

    def groupings(self) -> list[Grouping]:
        return []


class UntrainedZero3(Untrained):
    """DeepSpeedZeRoOffload: ZeRO-3 that cuts parameters and updates none."""

    attributes = ("partition_all_parameters", "persistent_parameters")

    def before_load(self) -> None:
        self.wrapper.partition_all_parameters()

    def after_load(self) -> None:
        # As DeepSpeed_Stage3's `checkpoint_event_epilogue` does it: these are whole on every rank while it computes.
        if persistent := self.wrapper.persistent_parameters:
            persistent[0].all_gather(persistent)


class UnfusedMasters(Units):
    """FP16_UnfusedOptimizer, stage 0 in fp16 or bf16: one fp32 master a parameter."""

    attributes = ("optimizer", "fp16_groups", "fp32_groups", "loss_scale_config")
    replicated = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._masters = [master for group in wrapper.fp32_groups for master in group]

    def live(self, number: int) -> torch.Tensor:
        return self._masters[number]

    def groupings(self) -> list[Grouping]:
        groups = self.wrapper.fp16_groups
        return [Grouping(number, [param]) for number, group in enumerate(groups) for param in group]

    def after_load(self) -> None:
        for params, masters in zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                param.data.copy_(master.data)


class FusedMasters(Units):
    """FP16_Optimizer, stage 0 with a fused Adam: one flat fp32 tensor a param group."""

    attributes = ("optimizer", "fp16_groups", "fp32_groups_flat", "loss_scale_config")
    replicated = True

    def live(self, number: int) -> torch.Tensor:
        return self.wrapper.fp32_groups_flat[number]

    def groupings(self) -> list[Grouping]:
        return [Grouping(number, group) for number, group in enumerate(self.wrapper.fp16_groups)]

    def after_load(self) -> None:
        for params, master in zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups_flat, strict=True):
            offset = 0
            for param in params:
                param.data.copy_(master.data[offset : offset + param.numel()].view_as(param))
                offset += param.numel()


class _Partitions(Units):
    """One flat fp32 partition a rank and param group; DeepSpeed maps each parameter to its part (`_hp_mapping`)."""

    _groups = _units = ""

    def live(self, number: int) -> torch.Tensor:
        return getattr(self.wrapper, self._units)[number]

    def groupings(self) -> list[Grouping]:
        return [Grouping(number, group) for number, group in enumerate(getattr(self.wrapper, self._groups))]

    def fragments(self) -> dict[int, Fragment]:
        found: dict[int, Fragment] = {}
        for number, grouping in enumerate(self.groupings()):
            params: Sequence[Any] = grouping.params  # to which ZeRO has added what it knows of them
            for param in params:
                require_of_deepspeed(param, DEEPSPEED["parameter of stages 1 and 2"], "a parameter")
                held = param._hp_mapping
                if held is None:
                    found[id(param)] = Fragment(number, 0, 0, 0)
                else:
                    master, part = held.hp_fragment_address, held.lp_fragment_address
                    found[id(param)] = Fragment(number, part.start, master.start, master.numel)
        return found

    def link_state(self) -> None:
        # DeepSpeed's safe_get_* functions read views of the state. It makes those of all groups once, after the step of
        # the first, when the others have no state yet; one rank then raises where the others wait for it.
        self.wrapper._hp_optimizer_states_linked = False
        self.wrapper._lazy_init_hp_params_optimizer_state()

    def after_load(self) -> None:
        wrapper = self.wrapper
        wrapper.update_lp_params()
        wrapper._link_all_hp_params()
        self.link_state()


_LINKS = ("update_lp_params", *DEEPSPEED["stages 1 and 2"])


class Zero12(_Partitions):
    """DeepSpeedZeroOptimizer, stages 1 and 2."""

    attributes = ("optimizer", "bit16_groups", "single_partition_of_fp32_groups", "loss_scaler", *_LINKS)
    _groups, _units = "bit16_groups", "single_partition_of_fp32_groups"


class Bf16(_Partitions):
    """BF16_Optimizer: stage 1 in bf16 with gradients accumulated in fp32."""

    attributes = ("optimizer", "bf16_groups", "fp32_groups_flat_partition", *_LINKS)
    _groups, _units = "bf16_groups", "fp32_groups_flat_partition"


class Zero3(Units):
    """DeepSpeedZeroOptimizer_Stage3: a flat tensor a sub-group, in which each parameter has ceil(numel / ranks)."""

    attributes: tuple[str, ...] = (
        "optimizer", "fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat",
        "sub_group_to_group_id", "loss_scaler", "checkpoint_event_prologue", "checkpoint_event_epilogue",
        *DEEPSPEED["stage 3"],
    )  # fmt: skip

    def __init__(self, wrapper: Any, rank: int) -> None:
        super().__init__(wrapper)
        self._rank = rank

    def live(self, number: int) -> torch.Tensor:
        return self.wrapper.fp32_partitioned_groups_flat[number]

    def groupings(self) -> list[Grouping]:
        groups = self.wrapper.sub_group_to_group_id
        return [Grouping(groups[number], params) for number, params in enumerate(self.wrapper.fp16_groups)]

    def fragments(self) -> dict[int, Fragment]:
        found: dict[int, Fragment] = {}
        for number, grouping in enumerate(self.groupings()):
            offset = 0
            params: Sequence[Any] = grouping.params  # to which ZeRO-3 has added what it knows of them
            for param in params:
                start, length = partition(param, self._rank)
                found[id(param)] = Fragment(number, start, offset, length)
                offset += param.partition_numel()
        return found

    def before_load(self) -> None:
        self.wrapper.checkpoint_event_prologue()

    def after_load(self) -> None:
        for number in range(len(self.wrapper.fp16_groups)):
            self.derive(number)
        self.wrapper.checkpoint_event_epilogue()

    def derive(self, number: int) -> None:
        """The low-precision copy of one unit."""
        self.wrapper._reassign_or_swap_out_partitioned_parameters(number)


def partition(param: Any, rank: int) -> tuple[int, int]:
    """Which elements of a ZeRO-3 parameter `rank` holds: (first, count)."""
    require_of_deepspeed(param, ("ds_numel", "ds_shape", "ds_tensor", "partition_numel"), "a ZeRO-3 parameter")
    each = param.partition_numel()
    return each * rank, max(0, min(each, param.ds_numel - each * rank))


def global_shape(view: ParamView) -> tuple[int, ...]:
    """The parameter's shape as the user made it; ZeRO-3 leaves an empty tensor in its place."""
    return tuple(getattr(view.param, "ds_shape", view.param.shape))
