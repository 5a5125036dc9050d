# SPDX-License-Identifier: Apache-2.0
"""Restores, under FSDP2, a checkpoint of many ranks; what it took to plan and restore that goes into OUT/<rank>.jsonl.

    many.py DIR OUT RANKS PARAMS WIDTH [FILES]

RANKS, PARAMS and WIDTH as `kit.many_headers.make`; FILES more than are open may be opened from then on.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from job_kit import process_group
from torch.distributed.fsdp import fully_shard

import layerwise_dist as lwd
from layerwise_dist.bench import memory
from layerwise_dist.restore.restorer import Restorer

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit.many_headers import model  # noqa: E402

folder, out = sys.argv[1], Path(sys.argv[2])
ranks, params, width, *files = map(int, sys.argv[3:])

with process_group() as rank:
    net, optimizer = model(ranks, params, width)
    fully_shard(net)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    taken: dict[str, Any] = {}
    fill = Restorer._fill

    def filled(self: Restorer, *args: Any) -> Any:
        taken.update(
            planned_s=time.monotonic() - began, planned_cpu_s=time.process_time() - cpu_began,
            planned_bytes=memory.peak() - before,
        )  # fmt: skip
        return fill(self, *args)

    Restorer._fill = filled  # type: ignore[method-assign]
    with lwd.attach(net, optimizer, dir=folder) as ckpt:
        if files:
            most = len(os.listdir("/proc/self/fd")) + files[0]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        dist.barrier()
        memory.start_peak()
        before, began, cpu_began = memory.peak(), time.monotonic(), time.process_time()
        step = ckpt.restore()
        taken["restored_bytes"] = memory.peak() - before
        steps = {float(state["step"]) for state in optimizer.state.values()}
        nonzero = sum(int(tensor.to_local().count_nonzero()) for tensor in net.parameters())
    with open(out / f"{rank}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "steps": sorted(steps), "nonzero": nonzero, **taken}) + "\n")
