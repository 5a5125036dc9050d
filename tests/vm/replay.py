# SPDX-License-Identifier: Apache-2.0
"""Cuts the power of a recorded job, and checks what a restart finds on this machine.

replay.py NAME LOG STATES [--said FILE] [--drawn N] [--seed N]

LOG is what dm-log-writes wrote of NAME (see guest/record.py), STATES the digests of the training alone. With --said,
which has what the job said, LOG is what QEMU wrote until the machine was killed. What needs.py wrote is beside STATES.
A log and a seed always give the same cuts. For root, in a mount namespace of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import training
from careless import CARELESS
from kit.promises import BEGUN, allowed, in_marks
from kit.write_log import Cut, apply, cuts, last_cuts, read_log, wholly
from system import ChildError, import_all, in_child, mounted, opened, tool

DISK = 384 << 20
_GO_ON_EVERY = 8
_NAMED = re.compile(r"^layerwise_dist\.errors\.\w+: ", re.MULTILINE)


class Replay:
    """Cuts of one log, in their order. `said` is what the job said, unless the log's marks do."""

    def __init__(self, kind: str, log: int, states: list[str], said: list[str] | None, folder: str) -> None:
        self._kind, self._log, self._states, self._told = kind, log, states, said
        self._left, self._after, self._point = (os.path.join(folder, name) for name in ("left", "after", "point"))
        self.entries, self.sector = read_log(log)
        self._begun, self._done = 0, 0
        if said is None:
            self._begun = 1 + next(number for number, entry in enumerate(self.entries) if entry.mark == BEGUN)
        with open(self._left, "wb") as disk:
            disk.truncate(DISK)

    def cuts(self, drawn: int, rng: random.Random) -> list[Cut]:
        if self._told is not None:
            return last_cuts(self.entries, drawn, rng)
        return cuts(self.entries, self._begun, drawn, rng, self.sector)

    def check(self, cut: Cut, go_on: bool) -> str | None:
        """What is wrong after this cut; None if nothing is."""
        with opened(self._left, os.O_RDWR) as disk:
            apply(self._log, self.entries, disk, wholly(self.entries, self._done, cut.end))
        self._done = cut.end
        tool("cp", "--sparse=auto", self._left, self._after)
        with opened(self._after, os.O_RDWR) as disk:
            apply(self._log, self.entries, disk, cut.parts)
        try:
            with attached(self._after, self.sector) as device, mounted(device, self._point, self._kind):
                found = in_child(partial(training.come_back, f"{self._point}/checkpoints", go_on))
        except (OSError, ChildError) as error:
            return str(error)
        said = self._told if self._told is not None else in_marks(e.mark for e in self.entries[self._begun : cut.end])
        return self._judged(found, *allowed(said))

    def _judged(self, found: dict[str, Any], promised: int, possible: set[int]) -> str | None:
        step = found["step"]
        if step not in possible:
            return f"step {step} was restored, step {promised} was promised, possible are {sorted(possible)}"
        if found["digest"] != self._states[step]:
            return f"step {step} was restored with other contents"
        if (after := found.get("next")) is not None and (after["step"], after["digest"]) != (
            step + 1,
            found["trained"],
        ):
            return f"after one more step than {step}, step {after['step']} was restored, or with other contents"
        return None


@contextmanager
def attached(image: str, sector: int) -> Iterator[str]:
    device = tool("losetup", "--find", "--show", "--sector-size", str(sector), image).strip()
    try:
        yield device
    finally:
        tool("losetup", "--detach", device)


def described(number: int, cut: Cut, of: int) -> str:
    return f"cut {number} ({cut.kind}, after entry {cut.end} of {of}, and {len(cut.parts)} parts)"


def replay_all(name: str, replay: Replay, drawn: int, rng: random.Random) -> bool:
    """Whether nothing is wrong after any cut."""
    began, chosen, violations = time.monotonic(), replay.cuts(drawn, rng), 0
    for number, cut in enumerate(chosen):
        wrong = replay.check(cut, number % _GO_ON_EVERY == 0)
        if wrong is not None:
            violations += 1
            print(f"VIOLATION: {described(number, cut, len(replay.entries))}: {wrong}", flush=True)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(cut.kind for cut in chosen).items()))
    print(f"CUTS {len(chosen)} VIOLATIONS {violations} {name}: {kinds}; {time.monotonic() - began:.0f} s", flush=True)
    return violations == 0


def mutation_is_found(name: str, replay: Replay) -> bool:
    """Whether a cut right after a promise shows that a flush was left out: by another step, or by a named error."""
    left_out = (CARELESS[name.split("-")[2]].__doc__ or "").partition(". ")[0].rstrip(".")
    for number, cut in enumerate(replay.cuts(0, random.Random())):
        if not (replay.entries[cut.end - 1].mark or "").startswith("must"):
            continue
        wrong = replay.check(cut, False)
        if wrong is not None and ("was promised" in wrong or _NAMED.search(wrong)):
            why = wrong.strip().splitlines()[-1]
            print(f"MUTATION FOUND {name}: {described(number, cut, len(replay.entries))}: {why}", flush=True)
            return True
    print(f"MUTATION NOT FOUND {name}: {left_out}", flush=True)
    return False


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("log")
    parser.add_argument("states", type=Path)
    parser.add_argument("--said", type=Path)
    parser.add_argument("--drawn", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    training.without_dynamo()
    import_all(json.loads(options.states.with_name("needs").read_text()))
    states = json.loads(options.states.read_text())
    said = None if options.said is None else options.said.read_text().splitlines()
    folder = tempfile.mkdtemp(prefix="layerwise-powercut-", dir="/dev/shm")
    try:
        with opened(options.log, os.O_RDONLY) as log:
            replay = Replay(options.name.split("-")[0], log, states, said, folder)
            if options.name.split("-")[-1] in CARELESS:
                good = mutation_is_found(options.name, replay)
            else:
                good = replay_all(options.name, replay, options.drawn, random.Random(options.seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
