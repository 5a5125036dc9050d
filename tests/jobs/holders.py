# SPDX-License-Identifier: Apache-2.0
"""Ranks that hold other things under the same names, or are said to hold the same and do not: saved and resumed.

    holders.py OUT CASE...      OUT/<rank>.json is {case: [problems]}, for four ranks

A CASE is one of `CASES`. With `mutation:` before it, the mechanism that it is about is left out, and problems are what
is expected.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from job_kit import contents, differences, process_group
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.commit import alike
from layerwise_dist.engine import replicas
from layerwise_dist.frameworks import ddp

IGNORED = ("expert.weight", "expert.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


class Net(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.expert = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.b = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.expert(self.a(x))))


class OneOwner(torch.optim.Optimizer):
    """Keeps the momentum of each parameter on one rank, which sends the parameter around, as distributed Muon does.

    With `from_step` it does so from that step on, and before all ranks keep all of it. With `noise` each rank has state
    of its own beside that.
    """

    def __init__(self, params: Any, from_step: int = 0, *, noise: bool = False) -> None:
        super().__init__(params, {"lr": 0.1, "steps": 0})
        self.from_step, self.noise = from_step, noise

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["steps"] += 1
        for number, param in enumerate(group["params"]):
            owner, alone = number % dist.get_world_size(), group["steps"] > self.from_step
            if alone and dist.get_rank() != owner:
                self.state.pop(param, None)
            else:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                param.sub_(momentum.mul_(0.9).add_(param.grad), alpha=0.1)
            if self.noise:
                self.state[param].setdefault("noise", torch.zeros_like(param)).normal_()
            if alone:
                dist.broadcast(param.detach(), owner)


class Job:
    """A model and an optimizer of this rank, with random numbers of its own."""

    def __init__(self, seed: int, make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]]) -> None:
        torch.manual_seed(10 * seed + dist.get_rank())
        self.model, self.optimizer = make()
        torch.manual_seed(100 * seed + dist.get_rank())

    def attach(self, folder: str, **options: Any) -> Any:
        options = {"audit": "always", "commit": {"timeout_s": 20.0}, **options}
        return lwd.attach(self.model, self.optimizer, dir=folder, **options)

    def train(self, ckpt: Any, total: int, *, synced: bool = True, after: Callable[[int], None] | None = None) -> None:
        for step in ckpt.steps(total):
            with contextlib.nullcontext() if synced else self.model.no_sync():
                self.model(torch.randn(4, 6)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if after is not None:
                after(step)

    def held(self) -> dict[str, Any]:
        return contents(self.model, self.optimizer)


def wrapped(net: nn.Module | None = None, optimizer: Any = None, **options: Any) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = DistributedDataParallel(net or Net(), **options)
        return model, (optimizer or (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)))(model.parameters())

    return make


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def pairs(*groups: list[int]) -> dist.ProcessGroup:
    """This rank's of these groups; all ranks make all of them."""
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]
    return next(group for ranks, group in made if dist.get_rank() in ranks)


def restored(ckpt: Any, step: int) -> list[str]:
    try:
        return [] if ckpt.restore(step=step) == step else ["not restored"]
    except (errors.MismatchError, errors.DamageError) as error:
        return [str(error)]


def saved_and_resumed(
    make: Callable[[], Any], folder: str, *, buffers_of: int | None = None, options: Any = None, **training: Any
) -> list[str]:
    """What differs, after a resume, from what was saved. `buffers_of`: the rank whose buffers stand for this one's."""
    job = Job(1, make)
    ckpt = job.attach(folder, **(options or {}))
    job.train(ckpt, 3, **training)
    ckpt.close()
    held = everywhere(job.held())
    wanted = held[dist.get_rank()]
    if buffers_of is not None:
        wanted |= {name: value for name, value in held[buffers_of].items() if name.startswith("buffer/")}
    again = Job(2, make)
    ckpt = again.attach(folder, **(options or {}))
    with ckpt:
        problems = restored(ckpt, 3) or differences(again.held(), wanted)
    return [name for name in problems if name != "rng"]


# -- the cases -------------------------------------------------------------------------------------------------------


def ignored(folder: str) -> list[str]:
    """Experts and buffers that DDP ignores are each rank's own."""

    def make() -> Any:
        net = Net()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, IGNORED)
        return wrapped(net)()

    return saved_and_resumed(make, folder)


def groups(folder: str) -> list[str]:
    """Two stages of two replicas each: the same names, other tensors; and other groups are refused."""
    rank = dist.get_rank()
    stages = pairs([0, 1], [2, 3])
    problems = saved_and_resumed(wrapped(process_group=stages), folder, buffers_of=rank - rank % 2)
    if not problems:
        crossed = Job(3, wrapped(process_group=pairs([0, 2], [1, 3])))
        before = crossed.held()
        with crossed.attach(folder) as ckpt:
            told = "".join(restored(ckpt, 3))
            if "rank(s) 0,1 and 2,3 of the checkpoint hold different ones" not in told:
                problems.append(f"into other groups: {told}")
            problems += differences(crossed.held(), before)
    return problems


def stages(folder: str, alike: bool = True, **options: Any) -> list[str]:
    """FSDP2, two stages that replicate on two ranks each."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("stage", "replicate", "shard"))

    def make() -> Any:
        if alike:  # on the ranks of a stage
            torch.manual_seed(torch.initial_seed() // 10 + dist.get_rank() // 2)
        net = Net(norm=False)
        fully_shard(net, mesh=mesh["replicate", "shard"])
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    return saved_and_resumed(make, folder, options=options)


def stages_apart(folder: str) -> list[str]:
    """Each rank saves its own of what a mesh replicates, where that is wanted."""
    return stages(folder, alike=False, replicas="apart")


def owner(folder: str) -> list[str]:
    """Momentum that is on one rank only is saved there, whole."""
    return saved_and_resumed(wrapped(Net(norm=False), OneOwner), folder)


def owner_later(folder: str) -> list[str]:
    """It leaves the other ranks when it was already taken for shared: nothing is committed without a part of it."""
    make = wrapped(Net(norm=False), lambda params: OneOwner(params, from_step=2))
    job, problems, seen = Job(1, make), [], {}
    ckpt = job.attach(folder, keep_last=20)

    def after(step: int) -> None:
        seen[step + 1] = job.held()

    for total in range(1, 7):
        job.train(ckpt, total, after=after)
        with contextlib.suppress(errors.CommitError):
            ckpt.wait(total)
    commits = everywhere(sorted(manifest.step for manifest in ckpt.metadata.inventory().manifests.values()))
    ckpt.close()
    if commits[0] != [1, 2, 4, 5, 6]:
        problems.append(f"committed are {commits[0]}")
    for step in commits[0]:
        again = Job(2, make)
        with again.attach(folder, every_n_steps=None) as ckpt:
            found = restored(ckpt, step) or differences(again.held(), seen[step])
            problems += [f"step {step}: {name}" for name in found if name != "rng"]
    return problems


def own_state(folder: str) -> list[str]:
    """State that is on all ranks, and not the same, is each rank's own."""
    return saved_and_resumed(wrapped(Net(norm=False), lambda params: OneOwner(params, 99, noise=True)), folder)


def local(folder: str) -> list[str]:
    """Replicas that train alone are refused before anything is committed, on all ranks."""
    job = Job(1, wrapped(Net(norm=False)))
    ckpt = job.attach(folder)
    try:
        job.train(ckpt, 3, synced=False)
        ckpt.close()
        return ["it was saved"]
    except errors.UnsupportedError as error:
        ckpt.close()
        problems = [f"not said: {what}" for what in ("no_sync", "param/a.weight", "'apart'") if what not in str(error)]
        return problems + [f"there is {path.name}" for path in Path(folder).glob("*/manifest.json")]


def apart(folder: str) -> list[str]:
    """Unless each rank saves its own."""
    return saved_and_resumed(wrapped(Net()), folder, options={"replicas": "apart"}, synced=False)


def averaging(folder: str) -> list[str]:
    """As it does where a communication hook of torch's leaves gradients local."""

    def make() -> Any:
        model, optimizer = wrapped(Net(norm=False))()
        model.register_comm_hook(PostLocalSGDState(None, pairs([0, 1], [2, 3]), 1), post_localSGD_hook)
        return model, optimizer

    return saved_and_resumed(make, folder)


def later(folder: str, **options: Any) -> list[str]:
    """A replica that changes alone afterwards is found by sample, and all ranks stop at one step."""
    job = Job(1, wrapped(Net(norm=False)))
    ckpt = job.attach(folder, **options)

    def after(step: int) -> None:
        if step == 2 and dist.get_rank() == 3:
            with torch.no_grad():
                job.model.module.b.bias.add_(1e-3)
        if 0 < step < 3:
            ckpt.wait(step)

    try:
        job.train(ckpt, 40, after=after)
        ckpt.close()
        return ["not found in 40 steps"]
    except errors.CommitError as error:
        completed = everywhere(ckpt.completed)
        ckpt.close()
        said = "ranks 0-2 and rank 3 hold different values of param/b.bias (block 0: all 12 bytes) at step "
        problems = [] if said in str(error) and "(rank 3 against 3 that agree)" in str(error) else [str(error)]
        return problems + ([f"stopped at {completed}"] if len(set(completed)) > 1 else [])


def later_monitored(folder: str) -> list[str]:
    return later(folder, mode="monitor")


def later_forgiven(folder: str, drift: str = "warn") -> list[str]:
    """It is counted on all ranks, and all is committed; or nobody looks."""
    job = Job(1, wrapped(Net(norm=False)))
    ckpt = job.attach(folder, replica_drift=drift)

    def after(step: int) -> None:
        if step == 2 and dist.get_rank() == 3:
            with torch.no_grad():
                job.model.module.b.bias.add_(1e-3)
        if step:
            ckpt.wait(step)

    job.train(ckpt, 16, after=after)
    ckpt.close()
    stats = ckpt.stats()
    found = stats["checkpoints_committed"] == 16 and bool(stats["replica_drifts"]) == (drift == "warn")
    return [] if found else [str(stats)]


def later_unseen(folder: str) -> list[str]:
    return later_forgiven(folder, "off")


CASES = {
    case.__name__: case
    for case in (
        ignored,
        groups,
        stages,
        stages_apart,
        owner,
        owner_later,
        own_state,
        local,
        apart,
        averaging,
        later,
        later_monitored,
        later_forgiven,
        later_unseen,
    )
}


@contextlib.contextmanager
def without(case: str) -> Iterator[None]:
    """The mechanism that a case is about is not there."""
    everyone = list(range(dist.get_world_size()))
    first = (replicas, "_differing", lambda votes: {"any": True, "differing": []})
    sampled = (alike.Samples, "take", lambda self, rank, group: [])
    each = (alike.Alike, "compare", lambda self, message: None)
    left_out = {
        "ignored": [(ddp, "_ignored", lambda wrapper: set()), first, each, sampled],
        "groups": [(ddp.dist, "get_process_group_ranks", lambda group: everyone), first, each, sampled],
        "owner": [first, each, sampled],
        "owner_later": [each, sampled],
        "local": [first, each, sampled],
        "later": [sampled],
    }
    with contextlib.ExitStack() as stack:
        for patch in left_out[case]:
            stack.enter_context(mock.patch.object(*patch))
        yield


def main() -> None:
    out = Path(sys.argv[1])
    problems: dict[str, list[str]] = {}
    with process_group() as rank:
        for case in sys.argv[2:]:
            name = case.removeprefix("mutation:")
            folder = everywhere(tempfile.mkdtemp(dir=out) if rank == 0 else None)[0]
            with without(name) if name != case else contextlib.nullcontext():
                problems[case] = CASES[name](folder)
            dist.barrier()
    (out / f"{rank}.json").write_text(json.dumps(problems))


if __name__ == "__main__":
    main()
