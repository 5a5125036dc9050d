# SPDX-License-Identifier: Apache-2.0
"""How each ZeRO stage reduces gradients in the backward, and how it steps one part of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from layerwise_dist.frameworks.deepspeed.flattening import Unwrapped
from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.frameworks.private_names import DEEPSPEED, require_of_deepspeed
from layerwise_dist.frameworks.subset_step import SubsetStep

_PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
Arrived = Callable[[Iterable[nn.Parameter]], None]


class ZeroStage:
    """What can be stepped by itself, by number: a unit, or a layer. `count` of them."""

    count = 0

    def members(self, number: int) -> Sequence[nn.Parameter]:
        """The parameters whose gradients it needs on this rank."""
        raise NotImplementedError

    def step(self, number: int) -> None:
        """REQUIRES: the gradients of its members are final on this rank."""
        raise NotImplementedError

    def watch(self, arrived: Arrived, stepped: Callable[[int], bool]) -> None:
        """From now on, `arrived` is called with parameters whose gradients are final on this rank, and `engine.step()`
        passes by what `stepped` says was stepped.
        """
        raise NotImplementedError

    def detach(self) -> None:
        raise NotImplementedError


class _Zero(ZeroStage):
    """A unit is stepped by DeepSpeed's own `_optimizer_step`, after the method that reduces gradients."""

    attributes: tuple[str, ...] = ()
    reduction = ""

    def __init__(self, wrapper: Any, count: int) -> None:
        """Raises UnsupportedError naming an attribute that this version of DeepSpeed does not have."""
        self.wrapper, self.count = wrapper, count
        require_of_deepspeed(wrapper, (*self.attributes, self.reduction, *DEEPSPEED["in_backward"]))
        self._step_of_deepspeed = wrapper._optimizer_step

    def reduce(self, original: Callable[..., Any], arrived: Arrived, *args: Any, **kwargs: Any) -> Any:
        """Calls the original `reduction`, then `arrived` with the parameters whose gradients it has reduced."""
        raise NotImplementedError

    def watch(self, arrived: Arrived, stepped: Callable[[int], bool]) -> None:
        wrapper, original = self.wrapper, getattr(self.wrapper, self.reduction)

        def optimizer_step(number: int) -> None:
            if not stepped(number):
                self._step_of_deepspeed(number)

        setattr(wrapper, self.reduction, lambda *args, **kwargs: self.reduce(original, arrived, *args, **kwargs))
        wrapper._optimizer_step = optimizer_step

    def detach(self) -> None:
        for name in (self.reduction, "_optimizer_step"):  # the instance's; the class's own come to light again
            vars(self.wrapper).pop(name, None)


class Stage3(_Zero):
    attributes = (
        "averaged_gradients", "fp16_groups", "unscale_and_clip_grads", *DEEPSPEED["stage 3, in_backward"],
    )  # fmt: skip
    reduction = "partition_grads"

    def members(self, number: int) -> Sequence[nn.Parameter]:
        return self.wrapper.fp16_groups[number]

    def reduce(self, original: Callable[..., Any], arrived: Arrived, *args: Any, **kwargs: Any) -> Any:
        params = list(args[0] if args else kwargs["params_to_release"])
        result = original(*args, **kwargs)
        arrived(params)
        return result

    def step(self, number: int) -> None:
        wrapper, partitions = self.wrapper, getattr(self.wrapper, _PARTITIONS)
        # As the backward's epilogue, which comes later, and `step()` have it.
        members: Sequence[Any] = self.members(number)  # to which ZeRO-3 has added their numbers
        wrapper.averaged_gradients[number] = [partitions[param.ds_id] for param in members]
        wrapper._prepare_sub_group(number, set())
        wrapper.unscale_and_clip_grads(number, None)
        self._step_of_deepspeed(number)
        wrapper.fp32_partitioned_groups_flat[number].grad = None


class Stages1And2(_Zero):
    attributes = (
        "averaged_gradients", "all_grad_tensors", "bit16_groups", "params_in_partition", "partition_size",
        "first_offset", "real_dp_process_group", "gradient_accumulation_dtype", "ipg_buckets", "flatten",
        "flatten_dense_tensors_aligned", "get_all_grad_tensors", "get_flat_partition",
        *DEEPSPEED["stages 1 and 2, in_backward"],
    )  # fmt: skip
    reduction = "reduce_ipg_grads"

    def members(self, number: int) -> Sequence[nn.Parameter]:
        return self.wrapper.params_in_partition[number]

    def reduce(self, original: Callable[..., Any], arrived: Arrived, *args: Any, **kwargs: Any) -> Any:
        kind = args[0] if args else kwargs.get("comm_dtype")
        buckets = self.wrapper.ipg_buckets
        held = [place for dtype in (buckets if kind is None else [kind]) for place in buckets[dtype].params]
        result = original(*args, **kwargs)
        arrived(self.wrapper.bit16_groups[group][place] for group, place, _ in held)
        return result

    def step(self, number: int) -> None:
        wrapper = self.wrapper
        unit = wrapper.single_partition_of_fp32_groups[number]
        unit.grad = self._gradient(number).to(unit.dtype)
        self._step_of_deepspeed(number)
        unit.grad = None

    def _gradient(self, number: int) -> torch.Tensor:
        """As the backward's epilogue, which comes later, and `step()` make it."""
        wrapper = self.wrapper
        if wrapper._use_compact_grad_partition_buffer(number):
            return wrapper._get_compact_grad_partition_buffer(number).flat_partition.view(-1)
        params, dtype = wrapper.params_in_partition[number], wrapper.gradient_accumulation_dtype
        wrapper.all_grad_tensors[number] = wrapper.get_all_grad_tensors(params, dtype=dtype)
        size, group = int(wrapper.partition_size[number]), wrapper.real_dp_process_group[number]
        parts = wrapper.get_flat_partition(
            params, wrapper.first_offset[number], size, dtype=dtype, device=params[0].device, param_group_idx=number,
            return_tensor_list=True,
        )  # fmt: skip
        wrapper.all_grad_tensors[number] = None
        if dist.get_rank(group=group) == dist.get_world_size(group=group) - 1:
            return wrapper.flatten_dense_tensors_aligned(parts, size)
        return wrapper.flatten(parts)


class Stage0(ZeroStage):
    """Stage 0 in fp32: a layer's gradients are averaged over the ranks and stepped once all of them have arrived.

    In the order in which the first window's arrived, so that all ranks average the same layers together.
    """

    def __init__(self, engine: Any, units: Unwrapped, views: Sequence[ParamView]) -> None:
        """Raises UnsupportedError for an optimizer that is not known to keep all its state by parameter."""
        require_of_deepspeed(engine, ("allreduce_gradients", "buffered_allreduce_fallback"), "the engine")
        self._engine, self._optimizer = engine, units.base
        self._subset = SubsetStep(self._optimizer)
        layers: dict[str, list[nn.Parameter]] = {}
        for view in views:
            layers.setdefault(view.layer, []).append(view.param)
        self._layers = list(layers.values())
        self.count = len(self._layers)
        self._handles: list[Any] = []
        self._aside: list[tuple[nn.Parameter, torch.Tensor | None]] = []

    def members(self, number: int) -> Sequence[nn.Parameter]:
        return self._layers[number]

    def step(self, number: int) -> None:
        params = self._layers[number]
        self._average(params)
        inside, optimizer = {id(param) for param in params}, self._optimizer
        groups = optimizer.param_groups
        optimizer.param_groups = [
            {**group, **pin, "params": [param for param in group["params"] if id(param) in inside]}
            for group, pin in zip(groups, self._pins(), strict=True)
        ]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups

    def _pins(self) -> list[dict[str, bool]]:
        """All trained parameters have a gradient in DeepSpeed's step, if need be of zeros."""
        return self._subset.pins([group["params"] for group in self._optimizer.param_groups])

    def _average(self, params: Iterable[nn.Parameter]) -> None:
        gradients = cast(list[torch.Tensor], [param.grad for param in params])
        self._engine.buffered_allreduce_fallback(grads=[gradient.data for gradient in gradients])

    def watch(self, arrived: Arrived, stepped: Callable[[int], bool]) -> None:
        engine, original = self._engine, self._engine.allreduce_gradients

        def allreduce_gradients(*args: Any, **kwargs: Any) -> None:
            """DeepSpeed's, of what was not averaged yet."""
            left = [param for number, layer in enumerate(self._layers) if not stepped(number) for param in layer]
            if len(left) == sum(map(len, self._layers)):
                original(*args, **kwargs)
            elif left:
                for param in left:
                    if param.grad is None:
                        param.grad = torch.zeros_like(param)
                self._average(left)

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            done = [param for number, layer in enumerate(self._layers) if stepped(number) for param in layer]
            if optimizer.param_groups is not self._whole:
                return  # a layer's own step
            for param in done:
                self._aside.append((param, param.grad))
                param.grad = None

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if optimizer.param_groups is self._whole:
                for param, gradient in self._aside:
                    param.grad = gradient
                self._aside.clear()

        self._whole = self._optimizer.param_groups
        engine.allreduce_gradients = allreduce_gradients
        self._handles = [
            *(
                param.register_post_accumulate_grad_hook(lambda param: arrived([param]))
                for layer in self._layers
                for param in layer
            ),
            self._optimizer.register_step_pre_hook(before),
            self._optimizer.register_step_post_hook(after),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        vars(self._engine).pop("allreduce_gradients", None)
