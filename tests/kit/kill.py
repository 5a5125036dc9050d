# SPDX-License-Identifier: Apache-2.0
"""Jobs of `jobs/kill.py` that were killed: what their ranks told, and what must be true of it in the end."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.runners import Warm

KEEP = 2
DEADLINE = 90.0


def read(out: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """What each rank told; a line that a kill cut short is left out."""
    told = []
    for rank in range(ranks):
        path = out / f"{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        told.append([json.loads(line) for line in text.split("\n")[:-1]])
    return told


def launches(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One rank's lines, launch by launch."""
    parts: list[list[dict[str, Any]]] = []
    for line in lines:
        if "launched" in line:
            parts.append([])
        parts[-1].append(line)
    return parts


def reference(
    warm: Warm, folder: Path, wrapper: str, ranks: int, total: int
) -> tuple[list[dict[int, str]], list[str], float]:
    """Losses by step and the final hash of each rank of a run that nobody killed, and the seconds it took."""
    folder.mkdir()
    began = time.monotonic()
    warm.run("kill.py", ranks, wrapper, folder / "ckpt", folder, "--total", total, "--keep", KEEP, timeout=DEADLINE)
    took = time.monotonic() - began
    told = read(folder, ranks)
    return (
        [{line["step"]: line["loss"] for line in lines if "step" in line} for lines in told],
        [lines[-1]["hash"] for lines in told],
        took,
    )


def check(out: Path, ranks: int, losses: list[dict[int, str]], finals: list[str], total: int) -> int:
    """What must be true of a job that was killed and at last ended. Returns how many restarts resumed."""
    told = read(out, ranks)
    assert [lines[-1].get("end") for lines in told] == [total] * ranks
    assert [lines[-1]["hash"] for lines in told] == finals
    for rank, lines in enumerate(told):
        wrong = [line for line in lines if "step" in line and line["loss"] != losses[rank][line["step"]]]
        assert not wrong, f"rank {rank}: losses differ: {wrong}"
    # A rank that was killed before it could say `launched` has one launch fewer: launches are matched by their number.
    starts: dict[str, set[int]] = {}
    seen: dict[str, int] = {}
    order: list[str] = []
    for lines in told:
        for part in launches(lines):
            number = part[0]["launched"]
            order.append(number)
            starts.setdefault(number, set()).update(line["start"] for line in part if "start" in line)
            known = [line["committed"] for line in part if line.get("committed") is not None]
            seen[number] = max([seen.get(number, 0), *known])
    assert all(len(found) <= 1 for found in starts.values()), f"ranks started from different steps: {starts}"
    newest = resumed = 0
    for number in sorted(set(order), key=lambda text: [int(part) for part in text.split(".")]):
        for step in starts[number]:
            assert step >= newest, (
                f"launch {number} started from step {step}, but {newest} had been reported as committed"
            )
            resumed += step > 0
        newest = max(newest, seen[number])
    return resumed


def check_folder(root: Path, ranks: Sequence[int], total: int) -> None:
    """Exactly the committed checkpoints that are kept, with these ranks' shards, and nothing of dead attempts."""
    names = sorted(path.name for path in root.iterdir())
    folders = [name for name in names if name.startswith("step_")]
    assert [name for name in names if name not in folders] == ["identity.json", "owner"]
    assert [int(re.match(r"step_(\d+)-", name)[1]) for name in folders] == list(range(total - KEEP + 1, total + 1))
    wanted = sorted(["manifest.json", *(f"rank_{rank:05d}.safetensors" for rank in ranks)])
    assert all(sorted(os.listdir(root / name)) == wanted for name in folders)


def kill_rank(out: Path, rank: int, alive: list[int]) -> bool:
    """SIGKILL to one rank, found by what it told; False when it is not there."""
    path = out / f"{rank}.jsonl"
    if not path.exists():
        return False
    pids = [json.loads(line)["pid"] for line in path.read_text().split("\n")[:-1] if '"pid"' in line]
    if not pids or pids[-1] not in alive:
        return False
    os.kill(pids[-1], signal.SIGKILL)
    return True
