# SPDX-License-Identifier: Apache-2.0
"""Makes what `bench export` converts: one state, trained for a step, as each contender's own checkpoint.

    python -m layerwise_dist.bench.export_worker '{"shape": {...}, "folder": ..., "deepspeed": true}'

Under torchrun with one rank. Folders: `layerwise` and `dcp` of a plain job, `zero` and `zero-own` of one with ZeRO-2;
`zero-own` is what DeepSpeed saves.
"""

from __future__ import annotations

import datetime
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist

import layerwise_dist as lwd
from layerwise_dist.bench.model import Shape, windows
from layerwise_dist.bench.trainings import DeepSpeedTraining, Training

_GROUP_TIMEOUT = datetime.timedelta(seconds=300)


def _train(training: Training, shape: Shape) -> None:
    training.backward(training.model(windows(shape, 1)))
    training.optimizer.step()
    training.optimizer.zero_grad()


def _plain(shape: Shape, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    training = Training(shape, "foreach", 1)
    with lwd.attach(training.model, training.optimizer, dir=str(folder / "layerwise")) as engine:
        engine.restore()
        engine.explicit()
        _train(training, shape)
        engine.end_step()
    state: dict[str, Any] = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(state, checkpoint_id=str(folder / "dcp"))
    training.close()


def _zero(shape: Shape, folder: Path) -> None:
    training = DeepSpeedTraining(shape, "foreach", 1, stage=2)
    with lwd.attach(training.model, dir=str(folder / "zero")) as engine:
        engine.restore()
        engine.explicit()
        _train(training, shape)
        engine.end_step()
    training.model.save_checkpoint(str(folder / "zero-own"), tag="step1")
    training.close()


def main() -> None:
    spec = json.loads(sys.argv[1])
    shape, folder = Shape(**spec["shape"]), Path(spec["folder"])
    dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
    try:
        _plain(shape, folder)
        if spec["deepspeed"]:
            _zero(shape, folder)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
