# SPDX-License-Identifier: Apache-2.0
"""How a job's monitors meet: each asks its training process, which is in the job's process group, to gather."""

from __future__ import annotations

from typing import Any

from layerwise_dist.commit.transports.rendezvous import Gather

_OF_MEETING = 3  # gathers of `rendezvous.meet`, unless the second or third tells of an error: then it was the last


class Gathering:
    """The gathers of one meeting, made for a monitor. Every rank must make as many, whatever becomes of its monitor."""

    def __init__(self, rank: int, gather: Gather) -> None:
        self._rank, self._gather = rank, gather
        self._made = 0
        self._over = False
        self._others: list[int] = []  # ranks in another mode

    def __call__(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        self._made += 1
        if self._made == 1:
            record = {**record, "mode": "monitor"}
        elif self._others and "error" not in record:
            record = {
                "error": f"rank {self._rank}: mode is 'monitor' here, and differs on rank(s) "
                f"{str(self._others)[1:200].rstrip(']')}, or their configuration is wrong"
            }
        records = self._gather(record)
        if self._made == 1:
            self._others = [rank for rank, each in enumerate(records) if each.get("mode") != "monitor"]
        self._over = self._made == _OF_MEETING or any("error" in each for each in records)
        return records

    def give_up(self, why: str) -> None:
        """The monitor cannot meet the others: they are told, and none of them waits."""
        if not self._made:
            self({"place": f"rank {self._rank}, which has no monitor"})
        if not self._over:
            self({"error": f"rank {self._rank}: {why}"[:400]})
