# SPDX-License-Identifier: Apache-2.0
"""What the self-test trains: a small model under FSDP2 on the ranks of torchrun, with a checkpoint every step.

    python -m torch.distributed.run ... -m layerwise_dist.selftest.job '{"steps": 20, "dirs": [null, "checkpoints"]}'

It trains once for each of `dirs`, without checkpoints for null. Rank 0 says in lines of JSON after a mark on standard
output where it starts, each step's loss, and what is left at the end.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import layerwise_dist as lwd
from layerwise_dist.commit.transports.rendezvous import over_default_group
from layerwise_dist.selftest.trial import MARK

_WIDTH, _LAYERS, _BATCH = 384, 4, 16


def say(told: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        print(MARK + json.dumps(told), flush=True)


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of all that this rank holds: parameters, the optimizer's state, random numbers."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for param in model.parameters():
        for tensor in (param, *(value for _, value in sorted(optimizer.state[param].items()))):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            digest.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def train(steps: int, directory: str | None) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(_LAYERS) for layer in (nn.Linear(_WIDTH, _WIDTH), nn.Dropout(0.1), nn.Tanh())]
    model = nn.Sequential(*layers)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + dist.get_rank())
    ckpt = None
    loop: Any = range(steps)
    if directory is not None:
        ckpt = lwd.attach(model, optimizer, dir=directory, commit={"on_failure": "raise", "timeout_s": 60.0})
        say({"start": ckpt.restore()})
        loop = ckpt.steps(steps)
    for step in loop:
        loss = model(torch.randn(_BATCH, _WIDTH)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        say({"step": step + 1, "loss": loss.item().hex(), "committed": ckpt.committed_step if ckpt else None})
    if ckpt is not None:
        ckpt.close()
    everyone = over_default_group()({"left": fingerprint(model, optimizer)})
    say({"left": [each["left"] for each in everyone]})


def main() -> None:
    wanted = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for directory in wanted["dirs"]:
            train(wanted["steps"], directory)
    finally:
        gc.collect()  # FSDP's threads must be gone before the group is
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
