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
from kit.runners import Warm

# 5 steps each of {momentum, AdamW foreach, AdamW fused} x 9 features of a training script; plain also LBFGS.
WORLDS = [
    ("plain", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("plain:stage", 1), ("fsdp2:stage", 2),
    ("plain:auto:in_backward", 1), ("ddp:auto:pipelined_step", 2), ("fsdp2:auto:pipelined_step", 2),
    ("fsdp2:auto:in_backward", 2),
]  # fmt: skip
# Under DDP and FSDP2 each of these is tried with one of the optimizers, which is drawn, and with all of them by --long.
FEW = ("clipping", "accumulation", "schedule", "tied", "batchnorm", "unused", "closure")


@pytest.mark.parametrize(("wrapper", "ranks"), WORLDS, ids=[f"{wrapper}-{ranks}" for wrapper, ranks in WORLDS])
def test_training_with_the_engine_on_and_resumed_training_are_bit_identical(
    warm: Warm, tmp_path: Path, long: bool, wrapper: str, ranks: int
) -> None:
    # Two ranks have shown every feature of DDP alone; a third changes where parameters are cut, which "all" has all of.
    features = ("bare", "closure", "all") if (ranks > 2 or ":" in wrapper) and not long else ()
    if "pipelined" in wrapper and not long:
        features = ("all",)
    elif "in_backward" in wrapper:
        features = ("bare", "schedule", "tied", "batchnorm") if long else ("bare",)
    wanted = 3 * len(features) or 27
    if not features and wrapper != "plain" and not long:
        drawn = [f"{random.choice(OPTIMIZERS)}/{feature}" for feature in FEW]
        features, wanted = ("bare", "all", *drawn), 3 * 2 + len(drawn)
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
