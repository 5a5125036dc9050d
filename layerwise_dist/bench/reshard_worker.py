# SPDX-License-Identifier: Apache-2.0
"""The ranks of `bench restore --reshard` and `--ranks`, under torchrun.

    python -m layerwise_dist.bench.reshard_worker '{"do": "save", "load" or "start", "folder": ..., ...}'

Rank 0 says what it found in lines of JSON after a mark on standard output; reshard.py and starts.py
read them.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import layerwise_dist as lwd
from layerwise_dist.bench import raw
from layerwise_dist.bench.cold import make_cold
from layerwise_dist.bench.launching import tell
from layerwise_dist.bench.model import Shape, windows
from layerwise_dist.bench.restoring import restored
from layerwise_dist.bench.trainings import Training

WAYS = ("same", "reshard", "dcp-load")
_GROUP_TIMEOUT = datetime.timedelta(seconds=300)


def _state(training: Training) -> dict[str, Any]:
    return {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}


def _train(training: Training, shape: Shape) -> None:
    training.model(windows(shape, dist.get_world_size())).backward()
    training.optimizer.step()
    training.optimizer.zero_grad()


def _save(training: Training, shape: Shape, place: Path) -> None:
    """One step."""
    with lwd.attach(training.model, training.optimizer, dir=str(place)) as engine:
        engine.restore()
        engine.explicit()
        _train(training, shape)
        engine.end_step()


def _save_both(training: Training, shape: Shape, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    ranks = dist.get_world_size()
    _save(training, shape, folder / f"layerwise-{ranks}")
    dcp.save(_state(training), checkpoint_id=str(folder / f"dcp-{ranks}"))


def _load(training: Training, folder: Path, way: str, saved: int) -> float:
    """Seconds of the slowest rank."""
    import torch.distributed.checkpoint as dcp

    ranks = dist.get_world_size()
    place = folder / (f"dcp-{saved}" if way == "dcp-load" else f"layerwise-{ranks if way == 'same' else saved}")
    if way == "dcp-load":
        state = _state(training)
        _cold(place)
        began = time.perf_counter()
        dcp.load(state, checkpoint_id=str(place))
        return _slowest(time.perf_counter() - began)
    with lwd.attach(training.model, training.optimizer, dir=str(place)) as engine:
        _cold(place)
        took = restored(engine)
    return _slowest(took)


def _start(training: Training, place: Path, depth: int, block_bytes: int) -> dict[str, float]:
    """Seconds of the slowest rank: attach(), restore(), and the reading alone, each rank its own shard."""
    dist.barrier()
    began = time.perf_counter()
    with lwd.attach(training.model, training.optimizer, dir=str(place)) as engine:
        attach_s = _slowest(time.perf_counter() - began)
        shard = sorted(place.rglob("*.safetensors"))[dist.get_rank()]
        read_s = []
        for direct in (True, False):
            _cold(place)
            began = time.perf_counter()
            raw.read(shard, block_bytes=block_bytes, depth=depth, direct=direct)
            read_s.append(_slowest(time.perf_counter() - began))
        _cold(place)
        restore_s = _slowest(restored(engine))
    return {"attach_s": attach_s, "restore_s": restore_s, "raw_s": min(read_s)}


def _cold(place: Path) -> None:
    if dist.get_rank() == 0:
        make_cold([path for path in place.rglob("*") if path.suffix in (".safetensors", ".distcp")])
    dist.barrier()


def _slowest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def main() -> None:
    spec = json.loads(sys.argv[1])
    shape, folder = Shape(**spec["shape"]), Path(spec["folder"])
    dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
    training = Training(shape, "foreach", dist.get_world_size())
    try:
        if spec["do"] == "save":
            _save_both(training, shape, folder)
        elif spec["do"] == "start":
            place = folder / f"start-{dist.get_world_size()}"
            if not spec["new"]:
                _save(training, shape, place)
            for _ in range(spec["rounds"]):
                found = _start(training, place, spec["depth"], spec["block_bytes"])
                if dist.get_rank() == 0:
                    tell(found)
        else:
            _train(training, shape)  # makes the optimizer's state
            for number in range(spec["rounds"] + 1):
                for way in WAYS:
                    seconds = _load(training, folder, way, spec["saved"])
                    if dist.get_rank() == 0:
                        tell({"round": number, "way": way, "seconds": seconds})
    finally:
        training.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
