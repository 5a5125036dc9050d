# SPDX-License-Identifier: Apache-2.0
"""What two ranks get for input that is bad on one of them, or on both: OUT/<rank>.json is {what: [error, message]}.

bad_input.py OUT      OUT/two gets a checkpoint of two ranks
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from job_kit import process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd


def net(width: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def main() -> None:
    out = Path(sys.argv[1])
    told: dict[str, tuple[str, str]] = {}

    def attach(model: nn.Module, folder: str, optimizer: Any = None, **options: Any) -> Any:
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)
        return lwd.attach(model, optimizer, dir=str(out / folder), commit={"timeout_s": 20.0}, **options)

    def tried(what: str, action: Callable[[], Any]) -> None:
        try:
            action().close()
            told[what] = ("nothing", "")
        except Exception as error:  # noqa: BLE001
            told[what] = (type(error).__name__, str(error))

    def restore(model: nn.Module, folder: str) -> Any:
        before = [param.clone() for param in model.parameters()]
        ckpt = attach(model, folder)
        try:
            ckpt.restore()
        finally:
            ckpt.close()
            assert all(torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))
        return ckpt

    with process_group() as rank:
        model = DistributedDataParallel(net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        ckpt = attach(model, "two", optimizer)
        for _ in ckpt.steps(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ckpt.close()
        plain = net()
        tried("one rank's state object", lambda: attach(plain, "a", state={"bad": object() if rank else {}}))
        foreign = torch.optim.SGD((net() if rank else plain).parameters(), lr=0.1)
        tried("one rank's optimizer", lambda: attach(plain, "b", foreign))
        tried("ddp inside", lambda: attach(nn.Sequential(DistributedDataParallel(net())), "d"))
        # DDP itself compares shapes at its construction; a buffer that only rank 1 has passes it.
        odd = net()
        if rank:
            odd.register_buffer("only_here", torch.zeros(1))
        tried(
            "one rank's model",
            lambda: restore(DistributedDataParallel(odd, broadcast_buffers=False, init_sync=False), "two"),
        )
        tried("one rank's directory", lambda: attach(plain, "e" if rank == 0 else "missing/mount"))
        tried("one rank's writer", lambda: attach(plain, "f", writer={"backend": "nvm" if rank else "posix"}))
        wide = net(700_000) if rank else plain  # 11 MB in its first layer
        tried("one rank's pool", lambda: attach(wide, "g", capture="stage", pool_mb=8))
        tried("one rank's interval", lambda: attach(plain, "h", every_n_steps=1 + rank))
        tried("one rank's retention in monitor mode", lambda: attach(plain, "h", mode="monitor", keep_last=1 + rank))
        tried("one rank's mode", lambda: attach(plain, "h", mode="direct" if rank else "monitor"))
        tried("one rank enabled", lambda: attach(plain, "h", enabled=rank == 0))
        tried("one rank's key", lambda: attach(plain, "h", **({"keep": 1} if rank else {})))
        tried("one rank's key in monitor mode", lambda: attach(plain, "h", mode="monitor", keep_last=1 - rank))
        tried("one rank's own keys", lambda: attach(plain, "i", writer={"queue_depth": 1 + rank}, pool_mb=8 + rank))
        (out / f"{rank}.json").write_text(json.dumps(told))
        del model


if __name__ == "__main__":
    main()
