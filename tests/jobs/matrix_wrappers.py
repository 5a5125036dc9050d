# SPDX-License-Identifier: Apache-2.0
"""One small training under every wrapper of torch's, and its state in global form: whole tensors by the user's names.

The global form is got and put in by each framework's own means, with nothing of layerwise_dist: what a restore must be
held against. Names in it are `param/<fqn>`, `<the optimizer's name>/<fqn>`, `buffer/<fqn>`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd

Global = dict[str, Tensor]
SAMPLES, WORDS, HIDDEN, INNER = 12, 37, 19, 30
# Two param groups, so that hyper-parameters must find their parameters. What becomes one flat tensor is in one of them.
HYPER: dict[str, dict[str, float]] = {
    "block": {"lr": 0.01, "weight_decay": 0.1},
    "rest": {"lr": 0.02, "weight_decay": 0.01},
}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"foreach": False}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "foreach": False}),
}
KEYS = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "sgd": ("momentum_buffer",)}
COMPARED = ("lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "amsgrad", "maximize")


class Net(nn.Module):
    """Tied weights, sizes that divide by nothing, parameters smaller than a world, a frozen layer, BatchNorm.

    Only the inner width is even, which tensor parallelism asks for. No parameter is without dimensions: FSDP takes
    none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, HIDDEN)
        self.frozen = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.block = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.Tanh(), nn.Linear(INNER, HIDDEN))
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.cube = nn.Parameter(torch.randn(5, 3, 7))
        self.gain = nn.Parameter(torch.rand(1))
        self.shift = nn.Parameter(torch.rand(3))
        self.head = nn.Linear(HIDDEN, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.block(self.frozen(self.embed(tokens)))
        hidden = self.norm(hidden.flatten(0, 1)) * self.gain
        more = torch.tanh(hidden[:, :7] @ self.cube.flatten(0, 1).T).mean(1, keepdim=True)
        return self.head(hidden + more + nn.functional.pad(self.shift, (0, HIDDEN - 3)))


def label(fqn: str) -> str:
    """The param group of a parameter."""
    return "block" if fqn.startswith("block.") else "rest"


def clean(name: str) -> str:
    """Without what FSDP1 adds. No module of `Net` is called so."""
    return name.replace("_fsdp_wrapped_module.", "")


def groups(named: Iterable[tuple[str, nn.Parameter]], *, turned: bool = False) -> list[dict[str, Any]]:
    """`turned`: in the other order, so that groups that are taken by position are the wrong ones."""
    params = list(named)
    made = [
        {"params": [param for fqn, param in params if label(fqn) == which], **hyper} for which, hyper in HYPER.items()
    ]
    return made[::-1] if turned else made


def batch(step: int, share: int, shares: int) -> tuple[Tensor, Tensor]:
    """This share of the iteration's global batch, which is the same for every wrapper and world size."""
    tokens = torch.randint(WORDS, (2, SAMPLES, 5), generator=torch.Generator().manual_seed(1000 + step))
    mine = tokens[:, share * SAMPLES // shares : (share + 1) * SAMPLES // shares]
    return mine[0], mine[1].flatten()


@cache
def mesh(shape: tuple[int, ...], *names: str) -> DeviceMesh:
    """Made once: a mesh brings process groups with threads of their own, which stay."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


class Job:
    """One training script. `take` and `put` are collective."""

    net: nn.Module
    model: nn.Module
    optimizer: Any
    kernel = ""
    dtype = torch.float32  # of parameters and buffers
    masters = False  # whether what is trained, and its state, is in fp32 all the same

    def __init__(self, optimizer: str, seed: int, *, turned: bool = False, frozen_too: bool = False) -> None:
        """`frozen_too`: the optimizer holds frozen parameters as well, as `AdamW(model.parameters())` does."""
        self.kernel = optimizer
        self.rank, self.share, self.shares = dist.get_rank(), dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed)
        self.net = Net().to(self.dtype)
        self.wrap()
        named = [(fqn, param) for fqn, param in self.named() if param.requires_grad or frozen_too]
        self.optimizer = self.make(groups(named, turned=turned))

    def wrap(self) -> None:
        self.model = self.net

    def make(self, grouped: list[dict[str, Any]]) -> Any:
        kind, options = OPTIMIZERS[self.kernel]
        return kind(grouped, **options)

    def attach(self, folder: str, **options: Any) -> Any:
        return lwd.attach(self.model, self.optimizer, dir=folder, **options)

    def train(self, step: int) -> None:
        tokens, targets = batch(step, self.share, self.shares)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(tokens).float(), targets).backward()
        self.optimizer.step()

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(clean(name), param) for name, param in self.net.named_parameters()]

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """The optimizer's, of this rank."""
        return self.optimizer.state

    def buffers(self) -> Global:
        return {f"buffer/{clean(name)}": buffer.detach().clone() for name, buffer in self.net.named_buffers()}

    def without_state(self) -> list[str]:
        """Trained parameters of this rank without state in the optimizer; known before a collective hangs on it."""
        return [
            fqn
            for fqn, param in self.named()
            if param.requires_grad and not {*KEYS[self.kernel]} <= {*self.state.get(param, {})}
        ]

    # -- the global form ------------------------------------------------------------------------------------------

    def take(self) -> Global:
        """What this rank sees of it; rank 0 sees all. Buffers are this rank's own."""
        held = {f"param/{fqn}": self.full(param) for fqn, param in self.named()}
        for fqn, param in self.named():
            for key, value in self.state.get(param, {}).items():
                held[f"{key}/{fqn}"] = self.full(value)
        return {**held, **self.buffers()}

    def hyper(self) -> dict[str, dict[str, Any]]:
        """Of each trained parameter, what its group says. Some ranks may not know of all."""
        names = {id(param): fqn for fqn, param in self.named() if param.requires_grad}
        return {
            names[id(param)]: compared(group)
            for group in self.optimizer.param_groups
            for param in group["params"]
            if id(param) in names
        }

    def live(self) -> Global:
        """What the model computes with, where that is not what `take` gives."""
        return {}

    def put(self, wanted: Mapping[str, Tensor]) -> None:
        """Puts a global form in by hand. State must be there already, of an iteration that was done before."""
        with torch.no_grad():
            for fqn, param in self.named():
                self.lay(param, wanted[f"param/{fqn}"])
                for key, value in self.state.get(param, {}).items():
                    self.lay(value, wanted[f"{key}/{fqn}"])
            self.put_buffers(wanted)

    def put_buffers(self, wanted: Mapping[str, Tensor]) -> None:
        for name, buffer in self.net.named_buffers():
            buffer.copy_(wanted[f"buffer/{clean(name)}"])

    def full(self, value: Tensor) -> Tensor:
        return value.detach().clone()

    def lay(self, into: Tensor, whole: Tensor) -> None:
        into.copy_(whole)

    # -- noise ----------------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[Tensor]:
        """All memory of this rank that a restore must fill."""
        for param in self.model.parameters():
            yield param.data
        for state in self.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield from self.model.buffers()

    def hyper_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def noise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(100 * seed + self.rank)
        with torch.no_grad():
            for tensor in self.tensors():
                here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                here.copy_(torch.rand(here.shape, generator=generator).mul_(2000).sub_(1000))
        for group in self.hyper_groups():
            group["lr"], group["weight_decay"] = 7.5 + seed, 8.5 + seed


def compared(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value := group[key], tuple) else value for key in COMPARED if key in group}


class Replicated(Job):
    """DistributedDataParallel."""

    def wrap(self) -> None:
        self.model = DistributedDataParallel(self.net)


class Redundant(Replicated):
    """DistributedDataParallel with a ZeroRedundancyOptimizer: each rank has the state of some parameters, whole."""

    def make(self, grouped: list[dict[str, Any]]) -> Any:
        kind, options = OPTIMIZERS[self.kernel]
        return ZeroRedundancyOptimizer(grouped, optimizer_class=kind, lr=0.5, **options)

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        return self.optimizer.optim.state

    def without_state(self) -> list[str]:
        mine = {id(param) for group in self.optimizer.optim.param_groups for param in group["params"]}
        lacking = {*super().without_state()}
        return [fqn for fqn, param in self.named() if id(param) in mine and fqn in lacking]

    def take(self) -> Global:
        held = {f"param/{fqn}": self.full(param) for fqn, param in self.named()}
        self.optimizer.consolidate_state_dict(to=0)
        if self.rank == 0:
            names = {id(param): fqn for fqn, param in self.named()}
            order = [names[id(param)] for group in self.optimizer.param_groups for param in group["params"]]
            for number, state in self.optimizer.state_dict()["state"].items():
                held.update({f"{key}/{order[number]}": self.full(value) for key, value in state.items()})
        return {**held, **self.buffers()}


class Sharded(Job):
    """FSDP2 (`fully_shard`), over a mesh."""

    shape: Callable[[int], tuple[int, ...]] = staticmethod(lambda ranks: (ranks,))
    names: tuple[str, ...] = ("shards",)

    def wrap(self) -> None:
        self.model = self.net
        self.shard(mesh(self.shape(self.shares), *self.names))

    def shard(self, over: DeviceMesh) -> None:
        fully_shard(self.net.block, mesh=over)
        fully_shard(self.net, mesh=over)

    def full(self, value: Tensor) -> Tensor:
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()

    def lay(self, into: Tensor, whole: Tensor) -> None:
        if not isinstance(into, DTensor):
            into.copy_(whole)
            return
        shape, offsets = compute_local_shape_and_global_offset(whole.shape, into.device_mesh, into.placements)
        mine = tuple(slice(at, at + length) for at, length in zip(offsets, shape, strict=True))
        into.to_local().copy_(whole[mine].reshape(into.to_local().shape))


class OnMeta(Sharded):
    """Made on the meta device, and given memory by `load`; its optimizer is made after that."""

    def __init__(self, optimizer: str, seed: int, load: Callable[[nn.Module], object]) -> None:
        self._load = load
        super().__init__(optimizer, seed)

    def wrap(self) -> None:
        with torch.device("meta"):
            self.net = Net()
        super().wrap()
        self._load(self.net)


class Hybrid(Sharded):
    """HSDP: shards that are held twice."""

    shape = staticmethod(lambda ranks: (2, ranks // 2))
    names = ("replicas", "shards")


class TensorParallel(Sharded):
    """Tensor parallelism within FSDP2: `block` is sharded along both, and along its second dimension. Two ranks beside
    each other see the same batches.
    """

    shape = staticmethod(lambda ranks: (ranks // 2, 2))
    names = ("shards", "tensors")

    def shard(self, over: DeviceMesh) -> None:
        self.share, self.shares = self.rank // 2, self.shares // 2
        parallelize_module(self.net.block, over["tensors"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        super().shard(over["shards"])


class Flat(Job):
    """FSDP1. Its optimizer has flat parameters, one a wrapped module, or views of them under the original names."""

    original = False

    def wrap(self) -> None:
        options = {"device_id": torch.device("cpu"), "use_orig_params": self.original}
        self.net.block = FullyShardedDataParallel(self.net.block, **options)
        if not self.original:  # a flat parameter is frozen as a whole or not at all
            self.net.frozen = FullyShardedDataParallel(self.net.frozen, **options)
        self.model = FullyShardedDataParallel(self.net, **options)

    @contextlib.contextmanager
    def everything(self) -> Iterator[None]:
        """State dicts are those of whole tensors, on every rank."""
        kinds = FullStateDictConfig(), FullOptimStateDictConfig(rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, *kinds):
            yield

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(clean(name), param) for name, param in self.model.named_parameters()]

    def without_state(self) -> list[str]:
        return [
            fqn
            for fqn, param in self.named()
            if param.requires_grad and param.numel() and not {*KEYS[self.kernel]} <= {*self.state.get(param, {})}
        ]

    def take(self) -> Global:
        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            held = {f"param/{fqn}": param.detach().clone() for fqn, param in self.named()}
        mine = self.optimizer.state_dict()
        with self.everything():
            # One of the optimizer's names at a time: with original parameters on a CPU, torch gathers all of them in
            # one buffer and gives views of it, so that each would have the last one's values.
            for key in KEYS[self.kernel]:
                state = {number: {key: each[key]} for number, each in mine["state"].items() if key in each}
                one = FullyShardedDataParallel.optim_state_dict(self.model, self.optimizer, {**mine, "state": state})
                for fqn, found in one["state"].items():
                    held.update({f"{name}/{fqn}": torch.as_tensor(value).clone() for name, value in found.items()})
        return {**held, **self.buffers()}

    def hyper(self) -> dict[str, dict[str, Any]]:
        with self.everything():
            found = FullyShardedDataParallel.optim_state_dict(self.model, self.optimizer)["param_groups"]
        return {fqn: compared(group) for group in found for fqn in group["params"]}

    def put(self, wanted: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=True):
                for fqn, param in self.named():
                    param.copy_(wanted[f"param/{fqn}"])
            with self.everything():
                whole = FullyShardedDataParallel.optim_state_dict(self.model, self.optimizer)
                for fqn, state in whole["state"].items():
                    state.update({key: wanted[f"{key}/{fqn}"] for key in state})
                mine = FullyShardedDataParallel.optim_state_dict_to_load(self.model, self.optimizer, whole)
            self.optimizer.load_state_dict(mine)
            self.put_buffers(wanted)


class FlatOriginal(Flat):
    """`use_orig_params=True`."""

    original = True
