# SPDX-License-Identifier: Apache-2.0
"""Training by layers against plain training, in one job.

layers.py ALL|SEED WRAPPER|mutations...    for each wrapper, each rank prints `exact <case>` or `differs <case>` for
                                           each case, and `refused <why>` for what is refused. With a seed, each mode
                                           and feature of a wrapper has one kernel, drawn so that all kernels have their
                                           turn; with `all` it has all of them.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import contents, differences, process_group, square
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit.models import Hollow, Reused  # noqa: E402

from layerwise_dist import LayerwiseOptimizer
from layerwise_dist.errors import UnsupportedError  # noqa: E402
from layerwise_dist.frameworks.averaging import Averaging, Following, register_comm_hook  # noqa: E402
from layerwise_dist.layers import wrapper_gradients  # noqa: E402
from layerwise_dist.layers.wrapper_gradients import BucketArrivals  # noqa: E402

KERNELS: list[dict[str, Any]] = [{"foreach": True}, {"foreach": False}, {"fused": True}]
SMALL = {"bucket_cap_mb": 0.0002}  # several buckets, of several layers


class Early(BucketArrivals):
    """Every bucket but the last arrives within the backward, however slow the reductions are."""

    def _began(self, *bucket: Any) -> None:
        for _, _, future in self._pending:
            future.wait()
        super()._began(*bucket)


wrapper_gradients.BucketArrivals = Early


def say(text: str) -> None:
    """One line in one write: those of several ranks come out whole."""
    os.write(1, f"{text}\n".encode())


def rounded(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sums in bfloat16, and gives another tensor than the bucket's."""
    halves = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    return dist.all_reduce(halves, async_op=True).get_future().then(lambda done: done.value()[0].to(torch.float32))


rounded.__annotations__.clear()  # DDP takes annotations for types, and these are strings


def build(wrapper: str, kernel: dict[str, Any], *, ours: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model: nn.Module = Reused(unused=False) if not wrapper.endswith("-hollow") else Hollow()
    wrapper = wrapper.removesuffix("-hollow")
    if wrapper == "ddp":
        model = DistributedDataParallel(model, **SMALL)
    elif wrapper == "ddp-views":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, **SMALL)
    elif wrapper == "ddp-hook":
        model = DistributedDataParallel(model, **SMALL)
        if ours:
            register_comm_hook(model, None, rounded)
        else:
            model.register_comm_hook(None, rounded)
    elif wrapper.startswith("fsdp1"):
        options = {"device_id": torch.device("cpu"), "use_orig_params": wrapper == "fsdp1"}
        if not options["use_orig_params"]:
            options["ignored_modules"] = [model.frozen]  # a flat parameter is frozen as a whole or not at all
        model.block = FullyShardedDataParallel(model.block, **options)
        model.middle = FullyShardedDataParallel(model.middle, **options)
        model = FullyShardedDataParallel(model, **options)
    else:
        mesh = None
        if wrapper == "hsdp":
            mesh = square("replicas", "shards")
        elif wrapper == "tp":
            whole = square("shards", "tensors")
            mesh = whole["shards"]
            plan = {
                "block.0": ColwiseParallel(output_layouts=Replicate()),
                "middle": RowwiseParallel(input_layouts=Replicate()),
            }
            parallelize_module(model, whole["tensors"], plan)
        fully_shard(model.block, mesh=mesh)
        fully_shard(model.middle, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, **kernel)


def backward(model: nn.Module, wrapper: str, step: int) -> None:
    rank = dist.get_rank() // 2 if wrapper == "tp" else dist.get_rank()
    generator = torch.Generator().manual_seed(100 * step + rank)
    model(torch.randint(16, (2, 4), generator=generator)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, wrapper: str, feature: str) -> None:
    for step in range(4):
        optimizer.zero_grad(set_to_none=feature != "zeros")
        if feature == "accumulation":
            with model.no_sync():
                backward(model, wrapper, 1000 + step)
        backward(model, wrapper, step)
        if feature == "clip" and wrapper.startswith("fsdp1"):
            model.clip_grad_norm_(0.01)
        elif feature == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()


def cases(wrapper: str, seed: str) -> list[tuple[dict[str, Any], str, str]]:
    """(kernel, mode, feature)"""
    if wrapper.endswith("-hollow"):
        return [(KERNELS[0], "in_backward", ""), (KERNELS[1], "in_backward", "zeros")]
    if wrapper == "ddp-hook":
        return [
            (KERNELS[0], "in_backward", ""),
            (KERNELS[0], "in_backward", "accumulation"),
            (KERNELS[0], "pipelined_step", "clip"),
        ]
    kinds = [("pipelined_step", "")]
    if wrapper != "tp":  # torch clips no parameters of two meshes
        kinds.append(("pipelined_step", "clip"))
    if wrapper != "fsdp1-flat":
        kinds.append(("in_backward", ""))
    found = [(kernel, *kind) for kernel in KERNELS for kind in kinds]
    if seed != "all":
        order = random.Random(f"{seed} {wrapper}").sample(range(3), 3)
        found = [(KERNELS[order[turn]], *kinds[turn % len(kinds)]) for turn in range(3)]
    if wrapper.startswith("ddp"):
        found += [(KERNELS[0], "in_backward", "accumulation"), (KERNELS[0], "in_backward", "zeros")]
    return found


def compare(wrapper: str, tries: list[tuple[dict[str, Any], str, str]]) -> list[str]:
    """Says of each what it is; returns those that differ."""
    different: list[str] = []
    for kernel, mode, feature in tries:
        plain, layered = build(wrapper, kernel, ours=False), build(wrapper, kernel)
        calls: list[str] = []
        early: list[int] = []
        optimizer = LayerwiseOptimizer(
            layered[1], layered[0], mode=mode, after_layer=lambda layer, _, calls=calls: calls.append(layer)
        )
        layered[1].register_step_pre_hook(lambda *_, calls=calls, early=early: early.append(len(calls)))
        train(*plain, wrapper, feature)
        train(*layered, wrapper, feature)
        one, two = contents(*plain), contents(*layered)
        same = list(one) == list(two) and not differences(one, two)
        layers = len(set(calls))
        same = same and len(calls) == 4 * layers >= 12
        what = f"{wrapper} {kernel} {mode} {feature}"
        if same:
            say(f"exact {what}")
        else:
            different.append(what)
        # The first of the four steps is observed. Layers that are frozen, or that FSDP1 leaves a rank nothing of, are
        # updated in the step.
        if mode == "in_backward" and any(n - step * layers < layers / 2 for step, n in enumerate(early) if step):
            different.append(f"{what}: updated before the steps: {early} of {layers} layers")
        optimizer.detach()
        train(*plain, wrapper, feature)
        train(*layered, wrapper, feature)
        if differences(contents(*plain), contents(*layered)):
            different.append(f"{what} after detach()")
        del plain, layered, optimizer
    return different


def mutations() -> None:
    """Each must make some rank's training differ."""
    for what, place, name, instead in (
        ("a division in place of DDP's product", Averaging, "_divide", lambda _, bucket, n: bucket.buffer().div_(n)),
        ("gradients from before the reduction", BucketArrivals, "_lend", lambda *_: None),
        ("the bucket, where a hook gives another tensor", Following, "_reduce", lambda ours, b: ours._hook(None, b)),
    ):
        original = getattr(place, name)
        setattr(place, name, instead)
        wrapper = "ddp-hook" if place is Following else "ddp"
        say(f"{'seen' if compare(wrapper, [(KERNELS[0], 'in_backward', '')]) else 'unseen'} {what}")
        setattr(place, name, original)


def refused(make: Callable[[], nn.Module]) -> None:
    try:
        model = make()
        LayerwiseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mode="in_backward")
        say("accepted")
    except UnsupportedError as error:
        say(f"refused {error}")


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(16, 4, sparse=True), nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(tokens))


def sparse() -> None:
    for views in (False, True):
        model = DistributedDataParallel(Bag(), gradient_as_bucket_view=views)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        LayerwiseOptimizer(optimizer, model, mode="in_backward")
        try:
            train(model, optimizer, "ddp", "")
        except UnsupportedError as error:
            say(f"refused {error}")


def hooked() -> nn.Module:
    model = DistributedDataParallel(Reused(unused=False))
    model.register_comm_hook(None, allreduce_hook)
    return model


REFUSED: dict[str, list[Callable[[], nn.Module]]] = {
    "ddp": [
        lambda: DistributedDataParallel(Reused(), find_unused_parameters=True),
        lambda: DistributedDataParallel(Reused(unused=False), static_graph=True),
        hooked,
        lambda: nn.Sequential(DistributedDataParallel(Reused(unused=False))),
    ],
    "fsdp1-flat": [lambda: build("fsdp1-flat", {})[0]],
}


def main(seed: str, *wrappers: str) -> None:
    with process_group():
        for wrapper in wrappers:
            if wrapper == "mutations":
                mutations()
                continue
            for what in compare(wrapper, cases(wrapper, seed)):
                say(f"differs {what}")
            for make in (*REFUSED.get(wrapper, ()), Reused):
                refused(make)
            if wrapper == "ddp":
                sparse()
            if wrapper in ("fsdp2", "ddp", "fsdp1"):
                model, optimizer = build(wrapper, {})
                LayerwiseOptimizer(optimizer, model, mode="in_backward")
                try:
                    train(model, optimizer, wrapper, "clip")
                except UnsupportedError as error:
                    say(f"refused {error}")
                del model, optimizer


if __name__ == "__main__":
    main(*sys.argv[1:])
