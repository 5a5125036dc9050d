# SPDX-License-Identifier: Apache-2.0
"""Cells of docs/tables/exactness.md: is training with the engine plain training, bit for bit, and if not, why.

    cells.py WRAPPER OUT UPDATE,UPDATE... OPTIMIZER,OPTIMIZER... FEATURE,FEATURE...

OUT/<rank>.json is {"update optimizer feature": "exact" | "refused: why" | "torch: why" | "WRONG: what"}. "torch" says
that plain training itself raises.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import sys
import tempfile
from pathlib import Path

import exactness
import torch.distributed as dist
from exactness import Job, trial
from job_kit import process_group

from layerwise_dist.errors import BoundaryError, ConfigError, UnsupportedError

_CHARS = 400


def cell(wrapper: str, update: str, optimizer: str, feature: str, root: str) -> str:
    try:
        job = Job(wrapper, optimizer, feature, seed=1)
        job.step()
        job.step()
    except Exception as error:
        return f"torch: {type(error).__name__}: {str(error).splitlines()[0][:_CHARS]}"
    finally:
        job = None
        gc.collect()
    exactness.UPDATE = update
    try:
        problems = trial(wrapper, optimizer, feature, root)
    except (UnsupportedError, BoundaryError, ConfigError) as error:
        return f"refused: {str(error)[:_CHARS]}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {str(error)[:_CHARS]}"
    return f"WRONG: {problems[:3]}" if problems else "exact"


def main() -> None:
    wrapper, out = sys.argv[1], Path(sys.argv[2])
    updates, optimizers, features = (words.split(",") for words in sys.argv[3:6])
    logging.getLogger("layerwise_dist").setLevel(logging.ERROR)
    found = {}
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        if dist.is_initialized():
            dist.broadcast_object_list(paths, src=0)
        for case in itertools.product(updates, optimizers, features):
            found[" ".join(case)] = cell(wrapper, *case, f"{paths[0]}/{'-'.join(case)}")
            if dist.is_initialized():
                dist.barrier()
        (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
