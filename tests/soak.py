# SPDX-License-Identifier: Apache-2.0
"""Trial after trial of a drawn job to which drawn things happen, until the time is up; `bash tests/run.sh --soak`.

A trial is a job (wrapper, update, direct or monitor mode, number of ranks) that is started two or three times in one
directory, and ends. On the way there come SIGKILL, SIGTERM, SIGSTOP, a full disk, one with errors, a slow one, cut
connections, and starts with another number of ranks; a reader and a watcher look at the directory all the time. Every
step of every launch is compared, to the bit, with plain training that nothing happened to (kit/trial_truth.py).

The seed says what all trials do. With `--trial N` only that one is done, and its folder stays. How far a job has come
when a signal reaches it is up to the machine: a trial that fails may have to be done more than once to be seen again.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kit.runners import DEEPSPEED, Warm  # noqa: E402
from kit.soak import Watcher, small_disk  # noqa: E402
from kit.trial_plan import UPDATES, draw  # noqa: E402
from kit.trial_run import Found, Interrupted, Starter, keep, run  # noqa: E402
from kit.trial_truth import Truths  # noqa: E402

DISK_MB = 24
MOST_FAILURES = 5  # after which it ends


class Tally:
    """What all trials came to. Any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.trials = 0
        self.failed: Counter[str] = Counter()
        self.sum = Found()

    def add(self, found: Found) -> None:
        with self._lock:
            self.trials += 1
            self.sum.faults.update(found.faults)
            for name in ("launches", "resumed", "other_ranks", "steps", "reads"):
                setattr(self.sum, name, getattr(self.sum, name) + getattr(found, name))

    def fail(self, error: AssertionError) -> None:
        with self._lock:
            self.trials += 1
            self.failed[type(error).__name__.lower()] += 1

    def text(self, seconds: float, *, disk: bool) -> str:
        of = self.sum
        faults = [f"  {count:5}  {kind}" for kind, count in sorted(of.faults.items(), key=lambda each: -each[1])]
        failed = ", ".join(f"{self.failed[kind]} {kind}" for kind in ("wrong", "hung", "dead"))
        return "\n".join([
            f"{self.trials} trials in {seconds / 60:.1f} min: {failed}",
            f"  {of.launches} launches, {of.resumed} resumed, {of.other_ranks} trials with another number of ranks",
            f"  {of.steps} states of ranks and {of.reads} readings compared bit for bit",
            *faults,
            *([] if disk else ["  no disk was filled: no file system may be mounted here"]),
        ])  # fmt: skip


class Soak:
    def __init__(self, folder: Path, seed: int, wrappers: tuple[str, ...] = tuple(UPDATES)) -> None:
        self.folder, self.seed, self.wrappers = folder, seed, wrappers
        self.tally, self.over, self.disk = Tally(), threading.Event(), True
        self._lock, self._next = threading.Lock(), 0
        self._servers: list[Warm] = []
        self._zero: Warm | None = None

    def __enter__(self) -> Soak:
        (self.folder / "torch").mkdir(parents=True)
        warm = Warm(self.folder / "torch", "matrix")
        self._servers.append(warm)
        self._starter = Starter(warm, self._with_deepspeed)
        (self.folder / "truth").mkdir()
        self._truths = Truths(self._starter.start, self.folder / "truth")
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends what runs, and what waits for a job to start."""
        self.over.set()
        for warm in self._servers:
            warm.close()

    def _with_deepspeed(self) -> Warm:
        if self._zero is None:
            (self.folder / "zero").mkdir()
            self._zero = Warm(self.folder / "zero", "zero_ready", "matrix", "matrix_zero", env=DEEPSPEED)
            self._servers.append(self._zero)
        return self._zero

    def lane(self, number: int, more: Callable[[int], bool], first: int = 0) -> None:
        """Trials one after the other, on a disk of its own, as long as `more` says so of the next one's number."""
        with self._disk(number) as disk:
            while not self.over.is_set():
                with self._lock:
                    trial, self._next = first + self._next, self._next + 1
                    if not more(trial):
                        return
                self._try(trial, disk)

    @contextlib.contextmanager
    def _disk(self, lane: int) -> Iterator[Path]:
        place = self.folder / f"disk_{lane}"
        with small_disk(place, DISK_MB) as made:
            self.disk &= made
            watcher = Watcher(place, 0.1)
            try:
                yield place
                if not self.over.is_set():
                    watcher.check()
            finally:
                watcher.kill()

    def _try(self, trial: int, disk: Path) -> None:
        plan, folder = draw(self.seed, trial, self.wrappers), self.folder / f"trial_{trial}"
        root = disk / f"ckpt_{trial}"
        root.mkdir()
        began = time.monotonic()
        try:
            found = run(plan, self._starter, self._truths, folder, root, disk if self.disk else None, self.over)
        except Interrupted:
            return
        except AssertionError as error:
            if self.over.is_set():  # of a job that was ended
                return
            self.tally.fail(error)
            keep(root, folder)
            print(f"{type(error).__name__.upper()} {error}\nkept: {folder}\nagain: bash tests/run.sh --soak 0 --seed "
                  f"{self.seed} --trial {trial}\n", flush=True)  # fmt: skip
            if self.tally.failed.total() >= MOST_FAILURES:
                self.over.set()
        else:
            self.tally.add(found)
            print(f"{time.monotonic() - began:5.1f} s  {plan}", flush=True)
            shutil.rmtree(folder)
        finally:
            shutil.rmtree(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, help="trials begin for so long")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--trial", type=int, help="only this one")
    parser.add_argument("--trials", type=int, default=1 << 62, help="so many at most")
    parser.add_argument("--lanes", type=int, default=max(2, (os.cpu_count() or 2) // 2), help="trials at a time")
    parser.add_argument("--wrappers", default=",".join(UPDATES), help="of these only; other trials than with all")
    options = parser.parse_args()
    wrappers = tuple(options.wrappers.split(","))
    if unknown := set(wrappers) - set(UPDATES):
        parser.error(f"no wrapper {', '.join(sorted(unknown))}; there are {', '.join(UPDATES)}")
    asked = threading.Event()  # to end, however often
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    logging.getLogger("layerwise_dist").setLevel(logging.ERROR)  # of readers, which tell of buffers that differ
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="layerwise-soak-"))

    def more(trial: int) -> bool:
        if options.trial is not None:
            return trial == options.trial
        return trial < options.trials and time.monotonic() - began < 60 * options.minutes

    with Soak(folder, options.seed, wrappers) as soak:
        lanes = 1 if options.trial is not None else options.lanes
        errors: list[BaseException] = []

        def lane(number: int) -> None:
            try:
                soak.lane(number, more, options.trial or 0)
            except BaseException as error:
                errors.append(error)
                soak.over.set()

        threads = [threading.Thread(target=lane, args=(number,)) for number in range(lanes)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not asked.wait(0.1):
            pass
        if asked.is_set():
            print("interrupted: what runs is ended", flush=True)
            soak.stop()
        for thread in threads:
            thread.join()
    print(soak.tally.text(time.monotonic() - began, disk=soak.disk), flush=True)
    if errors:
        raise errors[0]
    failed = soak.tally.failed.total()
    if not failed:
        shutil.rmtree(folder)
    print(f"again: bash tests/run.sh --soak {options.minutes:g} --seed {options.seed}", flush=True)
    return 130 if asked.is_set() else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
