# SPDX-License-Identifier: Apache-2.0
"""Trains a DeepSpeed engine that saves at every update, and kills a rank in the middle of a save, again and again.

    zero_saves.py OUT SEED KILLS UPDATES          started by torchrun's agent with --max-restarts KILLS

Each launch first looks at what the one before left: OUT/seen.jsonl has a line for each, with what `layerwise verify`
finds wrong, and how many checkpoints were begun and not committed. OUT/<rank>.log has a line for each update of each
launch: its number, the loss, the newest committed step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import deepspeed
import torch.distributed as dist
from job_kit import process_group
from zero_kit import Job, prepare

from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.verifying import verify


def look(folder: Path) -> dict[str, object]:
    catalogue = Catalogue(str(folder))
    inventory = catalogue.inventory
    answer = verify(catalogue, None)
    lacking = [m.step for m in inventory.manifests.values() if catalogue.missing(m) or len(m.shards) != 2]
    return {
        "good": answer.good and not inventory.damaged and not lacking, "unfinished": len(inventory.unfinished),
        "steps": sorted(manifest.step for manifest in inventory.manifests.values()), "found": answer.data,
    }  # fmt: skip


def main() -> None:
    out, seed, kills, updates = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    launch = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    chance = random.Random(f"{seed} {launch}")
    victim, after, delay = chance.randrange(2), chance.randint(1, 3) + (launch == 0), chance.random() * 0.06
    prepare()
    with process_group() as rank:
        deepspeed.init_distributed("gloo")
        if rank == 0 and (out / "ckpt").exists():
            with open(out / "seen.jsonl", "a") as file:
                file.write(json.dumps(look(out / "ckpt")) + "\n")
        dist.barrier()
        job = Job("2-bf16-wide", seed=1)
        ckpt = job.attach(str(out / "ckpt"))
        ckpt.restore()
        trained = 0
        for step in ckpt.steps(updates):
            loss = job.micro_batch()
            trained += 1
            with open(out / f"{rank}.log", "a") as log:
                log.write(f"{step + 1} {loss} {ckpt.committed_step or 0}\n")
            if launch == 0 and trained == 2:
                ckpt.wait(1)  # so that there is something to look at, whenever the kills come
            if launch < kills and rank == victim and trained == after:
                # The save of this update begins with it, and goes on after this line.
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        ckpt.close()
        dist.barrier()


if __name__ == "__main__":
    main()
