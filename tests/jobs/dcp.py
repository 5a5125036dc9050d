# SPDX-License-Identifier: Apache-2.0
"""dcp.save, async_save and dcp.load on several ranks, with FSDP2.

dcp.py DIR [long]    saves, loads into other layouts, fails on one rank, saves again
dcp.py DIR load      loads what another job of any size saved, and prints what it is
"""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from job_kit import process_group
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from layerwise_dist.dcp import LayerwiseReader, LayerwiseWriter


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Linear(13, 5))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    for _ in range(2):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parts = get_state_dict(model, optimizer)
    return {"model": parts[0], "optim": parts[1]}


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = hashlib.sha256()
    for name, param in model.named_parameters():
        for tensor in (param, *(optimizer.state[param][kind] for kind in ("exp_avg", "exp_avg_sq", "step"))):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def load(folder: str, **which: Any) -> str:
    model, optimizer = trained(9)
    held = state(model, optimizer)
    dcp.load(held, storage_reader=LayerwiseReader(folder, **which))
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optim"])
    return f"{digest(model, optimizer)} lr {optimizer.param_groups[0]['lr']}"


class Failing(DefaultSavePlanner):
    """Rank 1 has written one tensor, and then something goes wrong there."""

    left = 1

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("as it is asked to")
        return super().resolve_data(write_item)


def run(folder: str, rank: int) -> None:
    model, optimizer = trained(1)
    saved = state(model, optimizer)
    # One that is laid out along its second dimension, and comes back whole.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    table = torch.arange(60.0).view(6, 10)
    saved["table"], saved["epoch"], saved["kinds"] = distribute_tensor(table, mesh, [Shard(1)]), 3, ("a", {1: 2.5})
    dcp.save(saved, storage_writer=LayerwiseWriter(folder))
    back = {"table": distribute_tensor(torch.zeros(6, 10), mesh, [Replicate()]), "epoch": 0, "kinds": None}
    dcp.load(back, storage_reader=LayerwiseReader(folder))
    assert torch.equal(back["table"].to_local(), table) and back["epoch"] == 3 and back["kinds"] == ("a", {1: 2.5})

    model, optimizer = trained(2)
    expected, held = digest(model, optimizer), state(model, optimizer)
    pending = dcp.async_save(held, storage_writer=LayerwiseWriter(folder, tag="async"))
    assert isinstance(pending, Future)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    pending.result(timeout=60)
    assert load(folder, tag="async").startswith(expected), "what the state was at the call"

    try:
        dcp.save(saved, storage_writer=LayerwiseWriter(folder), planner=Failing())
    except CheckpointException as error:
        assert "as it is asked to" in str(error), error
    else:
        raise AssertionError("rank 1 failed, and the save is said to be good")
    try:
        dcp.save({**saved, "odd": object()}, storage_writer=LayerwiseWriter(folder))
    except CheckpointException as error:
        assert "builtins" in str(error) or "object is an object" in str(error), error
        assert "'odd'" in str(error), error
    else:
        raise AssertionError("an object that no file can hold was saved")
    if "long" in sys.argv:  # it starts a process that imports torch
        try:
            dcp.async_save(
                saved, storage_writer=LayerwiseWriter(folder), async_checkpointer_type=AsyncCheckpointerType.PROCESS
            ).result(timeout=60)
        except Exception as error:
            assert "AsyncCheckpointerType.THREAD" in str(error), error
        else:
            raise AssertionError("a writer was handed to another process")
    assert load(folder).startswith(expected), "the newest is the last that was whole"
    model, optimizer = trained(3)
    dcp.save(state(model, optimizer), storage_writer=LayerwiseWriter(folder, keep_last=2))
    if rank == 0:
        print(f"SAVED {digest_all(model, optimizer)}", flush=True)
    else:
        digest_all(model, optimizer)


def digest_all(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    return f"{digest(model, optimizer)} lr {optimizer.param_groups[0]['lr']}"


if __name__ == "__main__":
    with process_group() as rank:
        if sys.argv[2:] == ["load"]:
            found = load(sys.argv[1])
            if rank == 0:
                print(f"LOADED {found}", flush=True)
        else:
            run(sys.argv[1], rank)
