# SPDX-License-Identifier: Apache-2.0
"""Training with the engine on is training without it, bit for bit, and so is what a restart goes on with."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
from exactness_table import FEATURES, OPTIMIZERS, UPDATES, cells, read, reason
from exactness_table import WORLDS as TABLE
from kit.drawing import SEED
from kit.runners import Warm

# 5 steps each of 9 features of a training script and {momentum, AdamW foreach, AdamW fused}; plain also LBFGS.
WORLDS = [
    ("plain", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("plain:stage", 1), ("fsdp2:stage", 2),
    ("plain:auto:in_backward", 1), ("ddp:auto:pipelined_step", 2), ("fsdp2:auto:pipelined_step", 2),
    ("fsdp2:auto:in_backward", 2),
]  # fmt: skip
# Each of these is tried with one of the optimizers, which is drawn, and with all of them by --long.
FEW = ("bare", "clipping", "accumulation", "schedule", "tied", "batchnorm", "unused", "closure")


def sample(wrapper: str, ranks: int) -> list[str]:
    """The features of a plain run, each with the optimizer that it is tried with, or with all."""
    if "in_backward" in wrapper:
        return ["bare"]
    if "pipelined" in wrapper:
        return ["all"]
    dice = random.Random(f"{SEED} {wrapper} {ranks}")
    # Two ranks show every feature of DDP alone; a third changes where parameters are cut, which "all" has all of. That
    # layers are copied or read in place is the same to all features.
    if ranks > 2 or ":" in wrapper:
        return [f"{dice.choice(OPTIMIZERS)}/{feature}" for feature in ("bare", "closure", "all")]
    return ["all", *(f"{dice.choice(OPTIMIZERS)}/{feature}" for feature in FEW)]


@pytest.mark.parametrize(("wrapper", "ranks"), WORLDS, ids=[f"{wrapper}-{ranks}" for wrapper, ranks in WORLDS])
def test_training_with_the_engine_on_and_resumed_training_are_bit_identical(
    warm: Warm, tmp_path: Path, long: bool, wrapper: str, ranks: int
) -> None:
    features = sample(wrapper, ranks)
    if long:
        features = ["bare", "schedule", "tied", "batchnorm"] if "in_backward" in wrapper else []  # all of them
    wanted = sum(1 if "/" in feature else len(OPTIMIZERS) for feature in features) or 27
    print(f"seed {SEED}: {' '.join(features)}")
    warm.run("exactness.py", ranks, wrapper, tmp_path, *features, timeout=170)
    for rank in range(ranks):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(results) >= wanted, f"rank {rank} tried only {sorted(results)}"
        # One ulp of one weight, changed on purpose after the restore: the comparison must see it.
        sabotaged = results.pop("sabotaged", ["only plain tries that"])
        assert sabotaged
        assert {name: problems for name, problems in results.items() if problems} == {}


def test_the_table_in_the_docs_is_whole_and_what_is_tried_again_is_as_it_says(warm: Warm, long: bool) -> None:
    told = read((Path(__file__).parent.parent / "docs" / "tables" / "exactness.md").read_text())
    assert len(told) == len(TABLE) * len(UPDATES) * len(OPTIMIZERS) * len(FEATURES)
    assert not [case for case, verdict in told.items() if not verdict.startswith(("exact", "refused: ", "torch: "))]
    again = [
        ("plain", 1, UPDATES, OPTIMIZERS, tuple(FEATURES)),
        ("ddp", 2, ("in_backward",), OPTIMIZERS[1:2], ("clipping", "accumulation", "unused", "compile")),
        ("fsdp1-flat", 2, ("whole", "pipelined_step"), OPTIMIZERS[:1], ("clipping", "frozen")),
    ]
    for wrapper, ranks, updates, optimizers, features in again if long else [random.choice(again[1:])]:
        found = cells(wrapper, ranks, updates, optimizers, features, partial(warm.run, timeout=900 if long else 150))
        for case, verdict in found.items():
            update, optimizer, feature = case.split()
            assert reason(verdict) == told[wrapper, ranks, update, optimizer, feature], (wrapper, ranks, case)
