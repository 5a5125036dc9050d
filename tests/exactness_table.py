# SPDX-License-Identifier: Apache-2.0
"""Makes docs/tables/exactness.md: every wrapper, way to update, optimizer and feature, tried one by one.

    .venv/bin/python tests/exactness_table.py > docs/tables/exactness.md

Takes some 12 minutes on two cores. A cell that is neither exact nor refused ends it with exit code 1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORLDS = [
    ("plain", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp1", 2), ("fsdp1-flat", 2), ("zero", 2), ("hsdp", 4),
    ("tp", 4),
]  # fmt: skip
TITLES = {
    "plain": "a plain module", "ddp": "DistributedDataParallel", "fsdp2": "FSDP2 (`fully_shard`)", "fsdp1": "FSDP1",
    "fsdp1-flat": "FSDP1, `use_orig_params=False`", "zero": "ZeroRedundancyOptimizer in DDP",
    "hsdp": "HSDP (FSDP2, 2 x 2)",
    "tp": "tensor parallelism in FSDP2 (2 x 2)",
}  # fmt: skip
UPDATES = ("whole", "pipelined_step", "in_backward")
OPTIMIZERS = ("sgd-momentum", "adamw-foreach", "adamw-fused")
FEATURES = {
    "bare": "nothing else", "clipping": "clip", "accumulation": "accumulation", "schedule": "schedule",
    "scaler": "scaler",
    "tied": "tied", "reused": "reused block", "recompute": "activation checkpointing", "unused": "unused parameter",
    "frozen": "frozen base", "compile": "compile",
}  # fmt: skip
JOB = Path(__file__).parent / "jobs" / "cells.py"
EXACT = "="


def launch(script: Path, ranks: int, *args: str) -> None:
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(script), *args], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(args)} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def cells(
    wrapper: str, ranks: int, updates: tuple[str, ...] = UPDATES, optimizers: tuple[str, ...] = OPTIMIZERS,
    features: tuple[str, ...] = tuple(FEATURES), launch: Callable[..., Any] = launch,
) -> dict[str, str]:  # fmt: skip
    """What `jobs/cells.py` found, which must be the same on all ranks. `launch` gets the job, its ranks (0: without a
    launcher) and arguments.
    """
    with tempfile.TemporaryDirectory() as out:
        job = [wrapper, out, ",".join(updates), ",".join(optimizers), ",".join(features)]
        launch(JOB, ranks if ranks > 1 else 0, *job)
        found = [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(ranks)]
    for rank, other in enumerate(found[1:], 1):
        for case, verdict in other.items():
            if verdict.split(":")[0] != found[0][case].split(":")[0]:
                raise SystemExit(f"{wrapper}, {case}: rank 0 says {found[0][case]}, rank {rank} {verdict}")
    return found[0]


def reason(verdict: str) -> str:
    """A verdict of `jobs/cells.py` without what differs from rank to rank and from optimizer to optimizer."""
    text = re.sub(r"rank \d: ", "", verdict)
    text = re.sub(r"(gradient|parameter|parameters) (of )?(?=[a-z_]*[.\d])[\w.]+", r"\1 \2a parameter", text)
    text = re.sub(r"gradient of [a-z]+\.[\w.]+", "gradient of a parameter", text)
    return re.sub(r"refused: [\w()]+, layer by layer", "refused: this optimizer, layer by layer", text)


class Notes:
    """Reasons, numbered in the order in which they come up."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def cell(self, verdicts: list[str]) -> str:
        """One cell of the table, for all optimizers."""
        shown = [EXACT if verdict == "exact" else self._note(verdict) for verdict in verdicts]
        return shown[0] if len(set(shown)) == 1 else " / ".join(shown)

    def _note(self, verdict: str) -> str:
        text = reason(verdict)
        if text not in self.texts:
            self.texts.append(text)
        return str(1 + self.texts.index(text))


def table(found: dict[tuple[str, int], dict[str, str]]) -> str:
    notes = Notes()
    head = ["wrapper", "ranks", "update", *FEATURES.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (wrapper, ranks), verdicts in found.items():
        for update in UPDATES:
            row = [
                notes.cell([verdicts[f"{update} {optimizer} {feature}"] for optimizer in OPTIMIZERS])
                for feature in FEATURES
            ]
            lines.append("| " + " | ".join([TITLES[wrapper], str(ranks), f"`{update}`", *row]) + " |")
    lines += ["", *(f"{number}. {text}" for number, text in enumerate(notes.texts, 1))]
    return "\n".join(lines)


def read(text: str) -> dict[tuple[str, int, str, str, str], str]:
    """What a table says: "exact" or the reason, by wrapper, ranks, update, optimizer and feature."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    wrappers = {title: wrapper for wrapper, title in TITLES.items()}
    found = {}
    for line in text.splitlines():
        title, *cells = [part.strip() for part in line.strip("|").split("|")]
        if title in wrappers:
            ranks, update = int(cells[0]), cells[1].strip("`")
            for feature, cell in zip(FEATURES, cells[2:], strict=True):
                shown = cell.split(" / ") if "/" in cell else [cell] * len(OPTIMIZERS)
                for optimizer, mark in zip(OPTIMIZERS, shown, strict=True):
                    case = wrappers[title], ranks, update, optimizer, feature
                    found[case] = "exact" if mark == EXACT else reasons[mark]
    return found


def main() -> None:
    found = {}
    for wrapper, ranks in WORLDS:
        print(f"{wrapper} on {ranks} rank(s)", file=sys.stderr, flush=True)
        found[wrapper, ranks] = cells(wrapper, ranks)
    wrong = [
        f"{wrapper}, {ranks} ranks, {case}: {verdict}"
        for (wrapper, ranks), verdicts in found.items()
        for case, verdict in verdicts.items()
        if verdict.startswith("WRONG")
    ]
    print((Path(__file__).parent / "exactness_head.md").read_text().rstrip() + "\n\n" + table(found))
    if wrong:
        raise SystemExit("\n".join(["these cells are wrong:", *wrong]))


if __name__ == "__main__":
    main()
