# SPDX-License-Identifier: Apache-2.0
"""What the sweeps of a run have looked at, counted so that it can be told."""

from __future__ import annotations

from typing import Any

import pytest

LINE, STATES = "sweep", "crash states"  # of a test's report


class Swept:
    """States of the disk after power loss, and how many of them differ. What was looked at is not looked at twice."""

    def __init__(self) -> None:
        self.states = 0
        self._disks = set[int]()
        self._looked_at = set[Any]()

    def is_new(self, env: Any, *promised: Any) -> bool:
        """Counts it. Whether no state of the same bytes, under the same promises, was there before."""
        self.states += 1
        disk = env.fingerprint()
        self._disks.add(disk)
        new = (disk, promised) not in self._looked_at
        self._looked_at.add((disk, promised))
        return new

    @property
    def distinct(self) -> int:
        return len(self._disks)

    def __str__(self) -> str:
        return f"{self.states:,} states after power loss, {self.distinct:,} of them distinct, 0 violations"


class Told:
    """What a test's sweep came to; `summary` has it at the end of a run, from each of its workers."""

    def __init__(self, item: pytest.Item) -> None:
        self._properties = item.user_properties

    def say(self, what: str) -> None:
        self._properties.append((LINE, what))

    def crashes(self, what: str, swept: Swept) -> None:
        """REQUIRES: each state was what had been promised; else the test has failed."""
        self.say(f"{what}: {swept}")
        self._properties.append((STATES, (swept.states, swept.distinct)))


def summary(stats: dict[str, list[Any]]) -> list[str]:
    """Of the tests that passed, by pytest's own lists of reports."""
    said = [each for report in stats.get("passed", []) for each in getattr(report, "user_properties", ())]
    lines = [text for kind, text in said if kind == LINE]
    counts = [counted for kind, counted in said if kind == STATES]
    if counts:
        states, distinct = (sum(column) for column in zip(*counts, strict=True))
        lines.append(f"all states after power loss: {states:,}, {distinct:,} of them distinct, 0 violations")
    return lines
