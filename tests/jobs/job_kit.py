# SPDX-License-Identifier: Apache-2.0
"""What the jobs share: a process group that is torn down in order, and bit-exact comparison of all that a job holds."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.verifying import verify
from layerwise_dist.frameworks.names import CleanNames, join


def teller(path: str | os.PathLike[str]) -> Callable[..., None]:
    """`tell(**what)` adds a line of JSON to the file, in one write: what was told is there however the process ends."""
    file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def tell(**what: Any) -> None:
        os.write(file, (json.dumps(what) + "\n").encode())

    return tell


@contextmanager
def process_group() -> Iterator[int]:
    """gloo over what the launcher says; nothing for a job without a launcher. Yields the rank."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        # The agent's store outlives a restart of its ranks, keys and all: a prefix for each attempt keeps them apart.
        store, rank, world_size = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=world_size,
            timeout=timedelta(seconds=float(os.environ.get("COLLECTIVE_S", "1800"))),
        )  # fmt: skip
    try:
        yield int(os.environ.get("RANK", "0"))
    finally:
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


@cache
def square(*names: str) -> DeviceMesh:
    """Four ranks as two by two. Made once: a mesh brings process groups with threads of their own, which stay."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def contents(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a job's future depends on, copied: parameters, gradient presence, buffers, optimizers, RNG."""
    held: dict[str, Any] = {}
    clean, names = CleanNames(model), {}
    for param, (name, *_) in clean.parameters():
        names[param] = name
        held[f"param/{name}"] = local(param.detach()).clone()
        held[f"grad?/{name}"] = param.grad is not None
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                held[f"buffer/{join(clean.of_module[id(module)], name)}"] = local(buffer).clone()
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            for key, value in state.items():
                _flatten(f"state/{names[param]}/{key}", value, held)
    for number, group in enumerate(group for optimizer in optimizers for group in optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                _flatten(f"group/{number}/{key}", value, held)
    held["rng"] = torch.get_rng_state()
    return held


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, torch.Tensor):
        into[name] = local(value.detach()).clone()
    elif isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        into[name] = f"{type(value).__name__} of {len(value)}"
        for key, item in items:
            _flatten(f"{name}/{key}", item, into)
    else:
        into[name] = value.hex() if isinstance(value, float) else value


def odd_model(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A small model of odd sizes that draws random numbers, and its optimizer."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Dropout(0.2), torch.nn.Linear(65, 7))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A hash of `contents`."""
    seen = hashlib.sha256()
    for name, value in sorted(contents(model, optimizer).items()):
        seen.update(name.encode())
        raw = (
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if isinstance(value, torch.Tensor)
            else b""
        )
        seen.update(raw or repr(value).encode())
    return seen.hexdigest()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not equal bit for bit: value, dtype, shape, strides, or there at all."""
    found = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        mine, yours = one[name], other[name]
        if isinstance(mine, torch.Tensor) != isinstance(yours, torch.Tensor) or type(mine) is not type(yours):
            found.append(name)
        elif isinstance(mine, torch.Tensor):
            alike = (mine.dtype, mine.shape, mine.stride()) == (yours.dtype, yours.shape, yours.stride())
            if (
                not alike
                or mine.contiguous().reshape(-1).view(torch.uint8).tolist()
                != yours.contiguous().reshape(-1).view(torch.uint8).tolist()
            ):
                found.append(name)
        elif mine != yours:
            found.append(name)
    return found


def unsound(folder: str) -> list[str]:
    """What `layerwise verify` says of a directory's checkpoints, each of which is sound; rank 0 asks for all."""
    if dist.is_initialized() and dist.get_rank():
        return []
    found = verify(Catalogue(folder), None).data
    return [f"verify: {line}" for each in found["checkpoints"] for line in each["damage"]]
