# SPDX-License-Identifier: Apache-2.0
"""The commit's own decisions under anything that can happen to them, and proof that each broken rule would be found.

`tests/kit/commit_model/` is the model. A failure prints its seed: `walk(SEED, 1)` makes that run again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from kit.commit_model import Broken, walk
from kit.commit_model.broken_rules import RULES
from kit.drawing import drawn
from kit.swept import Told


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # thousands of failures, all on purpose
    yield
    logging.disable(logging.NOTSET)


def test_no_history_of_crashes_losses_and_failures_breaks_a_rule_of_the_commit(long: bool, told: Told) -> None:
    seed = drawn(range(1 << 30), __name__)
    print(f"seed {seed}")
    seen = walk(seed, 1_000_000 if long else 24_000)
    print(dict(sorted(seen.items())))
    kills = seen["kill"] + seen["kill rank 0"] + seen["orphan"]
    told.say(
        f"model of the commit: {seen['transitions']:,} transitions, {seen['start']:,} starts, "
        f"{seen['commit']:,} commits, {seen['power']:,} power losses, {kills:,} kills, 0 violations"
    )
    for what, least in {
        "commit": 80, "abort": 200, "superseded": 3, "waited": 5, "lost": 20, "power": 30, "branch": 5, "wake": 10,
        "left without": 5, "base goes": 100, "meeting": 20, "left: together": 5,
        "orphan": 20, "ended before": 5, "restore": 10, "restore of an older one": 1,
        "commit: InDoubt": 1, "commit: OSError": 1, "commit: OwnerError": 3, "left: checkpointing": 5,
    }.items():  # fmt: skip
        assert seen[what] >= least, f"{what}: {seen[what]} times: the model does not test what it says"


@pytest.mark.parametrize("rule", RULES)
def test_breaking_a_rule_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    RULES[rule].apply(monkeypatch)
    with pytest.raises(Broken, match=RULES[rule].found_as):
        walk(RULES[rule].seed, 400_000)
