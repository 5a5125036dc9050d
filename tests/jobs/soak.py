# SPDX-License-Identifier: Apache-2.0
"""Commits in a row, and what each rank holds of the system meanwhile; OUT/<rank>.json has it.

soak.py DIR OUT COMMITS
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
from job_kit import process_group

import layerwise_dist as lwd


def held() -> dict[str, int]:
    """Open files, threads, mappings of shared memory, bytes of memory of its own, and Python objects."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    rollup = Path("/proc/self/smaps_rollup").read_text().split()
    return {
        # Background threads open a folder for a moment, to flush or to empty it: that is not held.
        "files": min(_open_files() for _ in range(5)),
        "threads": len(os.listdir("/proc/self/task")),
        "shared": sum("/dev/shm" in line or "/memfd:" in line for line in maps),
        "bytes": 1024 * int(rollup[rollup.index("Anonymous:") + 1]),
        "objects": len(gc.get_objects()),
    }


def _open_files() -> int:
    time.sleep(0.02)
    return len(os.listdir("/proc/self/fd"))


def main() -> None:
    folder, out, commits = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with process_group() as rank:
        torch.manual_seed(rank)
        model = torch.nn.Linear(40, 40)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        gc.collect()
        gc.freeze()  # what was there before is no concern, and there is much of it
        seen = {"before": held()}
        ckpt = lwd.attach(model, optimizer, dir=folder, commit={"on_failure": "raise", "timeout_s": 60.0})
        marks = {commits * tenth // 10: str(tenth) for tenth in range(1, 11)}
        for step in ckpt.steps(commits):
            model(torch.ones(1, 40)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in marks:
                ckpt.wait(step, timeout=60)
                seen[marks[step]] = held()
        ckpt.wait(commits, timeout=60)
        seen["10"] = held()
        stats = ckpt.stats()
        ckpt.close()
        del ckpt
        seen["after"] = held()
        (out / f"{rank}.json").write_text(json.dumps({"seen": seen, "committed": stats["checkpoints_committed"]}))
        del model, optimizer


if __name__ == "__main__":
    main()
