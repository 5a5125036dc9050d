# SPDX-License-Identifier: Apache-2.0
"""What each wrapper writes, and what is not taken back: who has which elements, other cuts, refusals.

    wrappers.py OUT CASE...      OUT/<rank>.json is {case: [problems]}

A CASE is one of `CHECKS` with a wrapper of exactness.py, as `written:hsdp`, or `trial:fsdp1:adamw-fused:all[:UPDATE]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import exactness
import torch
import torch.distributed as dist
from exactness import Job, trial
from job_kit import differences, process_group, unsound
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.frameworks.fsdp1 import FSDP1Framework
from layerwise_dist.frameworks.names import CleanNames


def attach(job: Job, folder: str, **options: Any) -> Any:
    commit = {"timeout_s": 30.0, "on_failure": "raise"}
    return lwd.attach(job.model, job.optimizer, dir=folder, audit="always", commit=commit, **options)


def saved(wrapper: str, folder: str, steps: int, **options: Any) -> Job:
    job = Job(wrapper, "adamw-fused", "bare", seed=1)
    ckpt = attach(job, folder, **options)
    for step in ckpt.steps(steps):
        job.step()
        if step:
            ckpt.wait(step)
    ckpt.close()
    return job


# -- who writes what -------------------------------------------------------------------------------------------------


def parts(folder: str) -> Iterator[tuple[int, str, dict[str, Any], torch.Tensor]]:
    """(rank, tensor's name, its place, what the file has) of the newest checkpoint in `folder`."""
    for path in sorted(max(Path(folder).glob("step_*/manifest.json")).parent.glob("rank_*.safetensors")):
        with safe_open(path, "pt") as shard:
            places = json.loads(shard.metadata()["slices"])
            for name in shard.keys():
                if not name.startswith((".", "state/")):
                    yield int(path.stem[5:]), name, places.get(name, {}), shard.get_tensor(name)


@contextmanager
def whole(job: Job) -> Iterator[dict[str, torch.Tensor]]:
    """The user's parameters, whole, under clean names."""
    if job.wrapper.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(job.model, writeback=False):
            yield {names[0]: param.detach().clone() for param, names in CleanNames(job.model).parameters()}
        return
    yield {
        names[0]: (put_together(param) if isinstance(param, DTensor) else param).detach().clone()
        for param, names in CleanNames(job.model).parameters()
    }


def put_together(param: DTensor) -> torch.Tensor:
    """FSDP2's parts within each of tensor parallelism's; `full_tensor()` of torch 2.9 is wrong for uneven ones."""
    strided, *_ = param.placements
    if type(strided).__name__ != "_StridedShard":
        return param.full_tensor()
    everybodys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, (tuple(param.device_mesh.get_coordinate() or ()), param.to_local().detach()))
    columns: dict[int, list[torch.Tensor]] = {}
    for (_, column), part in sorted(everybodys, key=lambda each: each[0]):
        columns.setdefault(column, []).append(part)
    return torch.cat([torch.cat(columns[column], strided.dim) for column in sorted(columns)], strided.dim)


def written(wrapper: str, folder: str) -> list[str]:
    """Each element is in the files as often as it should be, in its place; and no rank writes nearly all."""
    job = saved(wrapper, folder, 2, keep_last=1)
    problems = []
    with whole(job) as params:
        expected = {f"param/{name}": param for name, param in params.items()}
        counts = {name: torch.zeros_like(param, dtype=torch.int64) for name, param in expected.items()}
        moments = {name.replace("param/", "exp_avg/"): counts[name].clone() for name in counts}
        bytes_of = [0] * dist.get_world_size()
        for rank, name, place, found in parts(folder):
            if name.startswith("param/"):
                bytes_of[rank] += found.nbytes
                if not torch.equal(region(expected[name], place, found), found):
                    problems.append(f"rank {rank}: {name} at {place} holds something else")
            count = counts.get(name, moments.get(name))
            if count is not None:
                region(count, place, found).add_(1)
        # Modules that tensor parallelism passes by are on a part of the mesh only: both ranks beside it have their own.
        twice = ("embed", "head") if wrapper == "tp" else ()
        copies = {"fsdp1-hybrid": 2, "fsdp1-whole": dist.get_world_size()}.get(wrapper, 1)
        for name, count in {**counts, **moments}.items():
            wanted = 2 if name.split("/")[1].startswith(twice or "-") else copies
            if not (count == wanted).all():
                problems.append(f"{name}: written {count.unique().tolist()} times, {wanted} wanted")
    if max(bytes_of) > 0.6 * sum(bytes_of):
        problems.append(f"bytes of parameters by rank: {bytes_of}")
    return problems + unsound(folder)


def region(whole: torch.Tensor, place: dict[str, Any], part: torch.Tensor) -> torch.Tensor:
    """A view of the elements that `part` has, of its shape."""
    if "start" in place:
        return whole.view(-1)[place["start"] : place["start"] + part.numel()]
    if "offsets" in place:
        return whole[tuple(slice(at, at + n) for at, n in zip(place["offsets"], part.shape, strict=True))]
    return whole


def recut(wrapper: str, folder: str) -> list[str]:
    """Parameters that were sharded along one dimension are restored where they are sharded along the other."""
    assert wrapper == "fsdp2"
    found: list[dict[str, torch.Tensor]] = []
    for way, dimension in enumerate((0, 1, 0)):
        torch.manual_seed(way)
        model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3).requires_grad_(False))
        fully_shard(model, shard_placement_fn=lambda param, d=dimension: Shard(min(d, param.dim() - 1)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with lwd.attach(model, optimizer, dir=folder, commit={"timeout_s": 30.0, "on_failure": "raise"}) as ckpt:
            if ckpt.restore():
                found.append(full(model, optimizer))
            for _ in ckpt.steps(2 * way + 2):
                model(torch.rand(2, 6)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(full(model, optimizer))
    _, *rest = found
    pairs = zip([found[0], rest[1]], [rest[0], rest[2]], strict=True)
    return [name for saved, restored in pairs for name in saved if not torch.equal(saved[name], restored[name])]


# -- other cuts --------------------------------------------------------------------------------------------------------


def takes(wrappers: str, folder: str) -> list[str]:
    """A checkpoint of the first wrapper is the second's too: the same ranks hold the same tensors together."""
    first, second = wrappers.split(">")
    expected = full(*_trained(saved(first, folder, 2)))
    job = Job(second, "adamw-fused", "bare", seed=2)
    ckpt = attach(job, folder)
    step = ckpt.restore()
    found = full(*_trained(job))
    ckpt.close()
    wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
    return wrong if step == 2 else [f"{second} restored step {step}"]


def _trained(job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    return job.model, job.optimizer


def full(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    held = {name: param.full_tensor().detach().clone() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        for kind, value in optimizer.state.get(param, {}).items():
            held[f"{kind}/{name}"] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return held


def roll_back(wrapper: str, folder: str) -> list[str]:
    """A restore after an evaluation, which leaves the root gathered, is seen by the next forward."""
    job = saved(wrapper, folder, 3, keep_last=3, max_in_flight=3)
    expected = job.contents()
    ckpt = attach(job, folder)
    ckpt.restore()
    job.model.eval()
    with torch.no_grad():
        job.model(torch.randint(0, 19, (2, 6)))
    job.model.train()
    ckpt.restore(1)
    for _ in ckpt.steps(3):
        job.step()
    ckpt.close()
    return differences(job.contents(), expected)


def mutation(wrapper: str, folder: str) -> list[str]:
    """`roll_back` sees it when what is gathered is not freed."""
    take_up = FSDP1Framework.take_up
    FSDP1Framework.take_up = lambda self, carried: None
    try:
        return [] if roll_back(wrapper, folder) else ["not seen"]
    finally:
        FSDP1Framework.take_up = take_up


def refusals(wrapper: str, folder: str) -> list[str]:
    cpu = {"device_id": torch.device("cpu")}
    conv = nn.Sequential(nn.Conv2d(3, 5, 3)).to(memory_format=torch.channels_last)

    def both() -> nn.Module:
        one, two = nn.Linear(4, 4), nn.Linear(4, 4)
        return nn.Sequential(DistributedDataParallel(one), FullyShardedDataParallel(two, **cpu))

    tries: list[tuple[Callable[[], nn.Module], str]] = [
        (lambda: FullyShardedDataParallel(nn.Linear(4, 4), cpu_offload=CPUOffload(True), **cpu), "CPU offload"),
        (lambda: FullyShardedDataParallel(conv, use_orig_params=True, **cpu), "0.weight of the root is not row-major"),
        (both, "DistributedDataParallel inside another"),
    ]  # fmt: skip
    problems = []
    for make, message in tries:
        model = make()
        problems += refused(model, torch.optim.SGD(model.parameters(), lr=0.1), message, folder)
    for wrapper, update, message in (
        ("fsdp1-flat", "pipelined_step", "one flat parameter a wrapped module"),
        ("zero", "pipelined_step", "it steps its own optimizer"),
        ("zero", "in_backward", "it steps its own optimizer"),
    ):
        job = Job(wrapper, "adamw-fused", "bare", seed=1)
        problems += refused(job.model, job.optimizer, message, folder, update=update)
    return problems


def refused(model: nn.Module, optimizer: Any, message: str, folder: str, **options: Any) -> list[str]:
    try:
        lwd.attach(model, optimizer, dir=folder, **options).close()
    except errors.UnsupportedError as error:
        return [] if message in str(error) else [f"{error} does not say {message!r}"]
    return [f"not refused: {message}"]


# -- parameters that are replaced ------------------------------------------------------------------------------------


def replaced(case: str, folder: str) -> list[str]:
    """Parameters that are replaced where that is not followed, by assignment or by hand: an error on all ranks, by
    name, before anything more is committed.
    """
    wrapper, _, by_hand = case.partition("-")
    model = wrapped(wrapper)
    inside = model.module if wrapper == "ddp" else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ckpt = lwd.attach(model, optimizer, dir=folder, commit={"timeout_s": 30.0})
    message = ""
    try:
        for step in ckpt.steps(200):
            if step == 2:
                ckpt.wait(2)
            train(model, optimizer)
            if step == 2 and by_hand:
                inside[1].weight = nn.Parameter(inside[1].weight.detach().clone(), requires_grad=False)
            elif step == 2:
                inside.load_state_dict({k: v.clone() for k, v in inside.state_dict().items()}, assign=True)
    except errors.CommitError as error:
        message = str(error)
    workings_of(ckpt).closing.end(orderly=False)
    wanted = {
        "ddp": "0.weight, 0.bias, 1.weight and 1 more were replaced by another Parameter after attach(). Distributed",
        "fsdp1-hand": "1.weight was replaced by another Parameter after attach(). FSDP1 trains what it was given",
        "fsdp2": "SGD: parameter 0 of group 0 is the Parameter that was 0.weight",
        "fsdp2-hand": "1.weight was replaced by another Parameter after attach(). FSDP2 puts back what it was given",
    }[case]
    problems = [] if wanted in message else [f"{message!r} does not say {wanted!r}"]
    return problems + [f"committed {ckpt.committed_step}"] * (ckpt.committed_step != 2)


def follows(wrapper: str, folder: str) -> list[str]:
    """A frozen part that FSDP2 itself lets be replaced is saved as it is now, also where the boundary finds the model
    gathered.
    """
    kept = []
    for seed in (1, 2):
        model = wrapped(wrapper, seed, reshard_after_forward=False)
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        ckpt = lwd.attach(model, optimizer, dir=folder, commit={"timeout_s": 30.0, "on_failure": "raise"})
        ckpt.restore()
        for step in ckpt.steps(4):
            train(model, optimizer)
            if step == 1:
                new = {name: value.clone() + 1 for name, value in model[1].state_dict().items()}
                model[1].load_state_dict(new, assign=True)
                model[1].requires_grad_(False)
            with torch.no_grad():
                model(torch.ones(2, 8))  # stays gathered
        ckpt.close()
        kept.append([value.full_tensor().clone() for value in model.state_dict().values()])
    return [] if all(map(torch.equal, *kept)) else ["resumed with something else"]


def wrapped(wrapper: str, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False))
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


CHECKS = {
    "written": written, "recut": recut, "takes": takes, "rollback": roll_back, "mutation": mutation,
    "refusals": refusals, "replaced": replaced, "follows": follows,
}  # fmt: skip


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    results: dict[str, list[str]] = {}
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        dist.broadcast_object_list(paths, src=0)
        for number, case in enumerate(cases):
            what, _, which = case.partition(":")
            root = f"{paths[0]}/{number}"
            if what == "trial":
                wrapper, optimizer, feature, update = [*which.split(":"), "auto"][:4]
                exactness.UPDATE = update
                results[case] = trial(wrapper, optimizer, feature, root)
            else:
                results[case] = CHECKS[what](which, root)
        (out / f"{rank}.json").write_text(json.dumps(results))
        dist.barrier()


if __name__ == "__main__":
    main()
