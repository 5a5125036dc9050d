# SPDX-License-Identifier: Apache-2.0
"""What a killed rank leaves behind: DeepSpeed's own save_checkpoint(), and this library's, in one and the same trial.

    python tests/contrast_deepspeed.py

Two ranks train with ZeRO-2 and save. In the second save rank 1 is slow to write its part, and is killed before it
has. DeepSpeed's `latest` then names the checkpoint that lacks rank 1's part. Exit code 0 if that was seen and this
library had committed nothing of the kind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SLOW_S = 2.0  # the most that rank 1 waits for rank 0 to have written its part


def train(folder: Path, ours: bool) -> None:
    """One rank. Rank 1 does not come back from the second save."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.path.insert(0, str(Path(__file__).parent / "jobs"))
    import deepspeed
    import torch
    import torch.distributed as dist
    from job_kit import process_group
    from zero_kit import Net, prepare, settings

    import layerwise_dist.deepspeed as drop_in
    from layerwise_dist.storage.adapter import ShardWrite

    def rank_0_is_done() -> bool:
        if ours:
            return any(folder.glob("step_0000000002-*/rank_00000.safetensors"))
        return (folder / "latest").read_text() == "global_step2"

    def die(*args: Any, **kwargs: Any) -> None:
        deadline = time.monotonic() + SLOW_S
        while not rank_0_is_done() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)  # in which rank 0 may commit
        os.kill(os.getpid(), signal.SIGKILL)

    with process_group() as rank:
        prepare()
        deepspeed.init_distributed("gloo")
        net = Net()
        trained = [param for param in net.parameters() if param.requires_grad]
        config = {**settings(2, {"bf16"}), "layerwise_checkpoint": {"dir": str(folder), "every_n_steps": None}}
        initialize = (drop_in if ours else deepspeed).initialize
        engine, *_ = initialize(model=net, optimizer=torch.optim.AdamW(trained), config=config)
        for step in (1, 2):
            loss = engine(torch.randint(0, 19, (2, 6))).float().square().mean()
            engine.backward(loss)
            engine.step()
            if step == 2 and rank == 1:
                if ours:
                    ShardWrite.persist = die
                else:
                    engine.checkpoint_engine.save = die
            engine.save_checkpoint(str(folder))
        dist.barrier()


def state_of(folder: Path, ours: bool) -> tuple[str | None, list[str]]:
    """(the tag that a restart would load, which files of two ranks it has)."""
    if not ours:
        tag = (folder / "latest").read_text() if (folder / "latest").exists() else None
        return tag, sorted(path.name for path in (folder / str(tag)).glob("*zero_pp_rank_*")) if tag else []
    manifests = sorted(folder.glob("step_*/manifest.json"))
    if not manifests:
        return None, []
    return json.loads(manifests[-1].read_text())["tag"], sorted(p.name for p in manifests[-1].parent.glob("rank_*"))


def trial(ours: bool) -> tuple[str | None, list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoints"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__,
            str(folder), "ours" if ours else "theirs",
        ]  # fmt: skip
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
        return state_of(folder, ours)


def main() -> int:
    bad = {}
    for ours, name in ((False, "DeepSpeed's own"), (True, "layerwise_dist")):
        tag, files = trial(ours)
        bad[ours] = tag is not None and len(files) < 2
        print(f"{name}: a restart would load {tag!r}, which has {', '.join(files) or 'nothing'}", flush=True)
    return 0 if bad == {False: True, True: False} else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]), sys.argv[2] == "ours")
    else:
        sys.exit(main())
