# SPDX-License-Identifier: Apache-2.0
"""Saves under one cut, and restores under another; what each rank finds goes into OUT/<rank>.jsonl.

recut.py OUT write          under FSDP2 and DDP, two steps each; then with a disk on each of two nodes, which ranks swap
recut.py OUT read           each of them into each, then with a damaged block that only the last rank needs; then with
                            a node more
recut.py OUT killed|stopped rank 1 is, while blocks are handed over

Nodes are pretended: a directory each, and what tells nodes apart is patched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import process_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.commit import places
from layerwise_dist.restore import handing

WIDTH, LAYERS, BLOCK_KB = 520, 3, 64  # a layer is of 1 MiB
OUT, WHAT = Path(sys.argv[1]), sys.argv[2]


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def build(wrapper: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    if wrapper == "ddp":
        net = DistributedDataParallel(net)
    else:
        for layer in net:
            fully_shard(layer)
        fully_shard(net)
    return net, torch.optim.AdamW(net.parameters(), lr=0.01, foreach=False)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of everything in global form."""
    found = hashlib.sha256()
    for param in model.parameters():
        for tensor in (param, *(optimizer.state[param][kind] for kind in ("step", "exp_avg", "exp_avg_sq"))):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found.update(whole.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str, timeout_s: float = 60.0) -> Any:
    return lwd.attach(
        model, optimizer, dir=str(OUT / folder), writer={"block_kb": BLOCK_KB}, keep_last=3,
        commit={"timeout_s": timeout_s},
    )  # fmt: skip


def tell(**what: Any) -> None:
    with open(OUT / f"{dist.get_rank()}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def write(wrapper: str) -> None:
    model, optimizer = build(wrapper, 0)
    with attach(model, optimizer, wrapper) as ckpt:
        for step in ckpt.steps(2):
            torch.manual_seed(step)
            model(torch.randn(4, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            tell(source=wrapper, step=step + 1, digest=digest(model, optimizer))


def read(source: str, target: str, log: Log, timeout_s: float = 60.0) -> None:
    model, optimizer = build(target, 1)
    del log.lines[:]
    with attach(model, optimizer, source, timeout_s) as ckpt:
        step = ckpt.restore()
        tell(source=source, target=target, step=step, digest=digest(model, optimizer), log=log.lines)


def on_node(source: str, target: str, node: int, steps: int, log: Log) -> None:
    """This rank is on that node: restores, and makes so many steps. Random numbers are each rank's own."""
    places.place = lambda: f"node {node}"
    model, optimizer = build(target, 1)
    del log.lines[:]
    with attach(model, optimizer, f"{source}-{node}") as ckpt:
        step = ckpt.restore()
        tell(
            node=node, source=source, target=target, step=step, log=log.lines,
            digest=digest(model, optimizer) if step else None,
        )  # fmt: skip
        for at in ckpt.steps(step + steps):
            drawn = torch.randn(3).tolist()
            torch.manual_seed(at)
            model(torch.randn(4, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.manual_seed(1000 * (at + 1) + dist.get_rank())
            tell(node=node, source=source, after=at + 1, drawn=drawn, digest=digest(model, optimizer))


def damage() -> None:
    """The last byte of the last rows of the first layer."""
    (path,) = (OUT / "fsdp2").glob("step_0000000002-*/rank_00001.safetensors")
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        place = 8 + size + header["exp_avg_sq/0.weight"]["data_offsets"][1] - 1
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def lose(how: str, log: Log) -> None:
    """Rank 1 is lost while blocks are handed over. The launcher ends the others then, which have to tell first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if dist.get_rank() == 1:
        which = signal.SIGKILL if how == "killed" else signal.SIGSTOP
        handing.Handing._read = lambda *_: os.kill(os.getpid(), which)  # type: ignore[method-assign]
    try:
        read("ddp", "ddp", log, 2.0)
    except errors.LayerwiseError as error:
        tell(error=type(error).__name__, text=str(error))
        os._exit(0)


with process_group() as rank:
    seen = Log()
    logging.getLogger("layerwise_dist").addHandler(seen)
    logging.getLogger("layerwise_dist").setLevel(logging.INFO)
    if WHAT == "write":
        write("fsdp2")
        write("ddp")
        for wrapper in ("fsdp2", "ddp"):
            on_node(wrapper, wrapper, rank, 2, seen)
            on_node(wrapper, wrapper, 1 - rank, 1, seen)
    elif WHAT == "read":
        for first in ("fsdp2", "ddp"):
            for second in ("fsdp2", "ddp"):
                read(first, second, seen)
        dist.barrier()
        if rank == 0:
            damage()
        dist.barrier()
        read("fsdp2", "fsdp2", seen)
        for first in ("fsdp2", "ddp"):
            for second in ("fsdp2", "ddp"):
                on_node(first, second, rank, 0, seen)
    else:
        lose(WHAT, seen)
