# SPDX-License-Identifier: Apache-2.0
"""A storm around a job, until the time is up: a watcher that opens, reads, maps and watches all that there is, a disk
that fills and empties, and signals to whoever can take them. Nothing may end by itself, nothing may hang, and every
step of every launch is to the bit what plain training has there.

    python tests/kit/soak.py FOLDER --minutes 10 [--seed 0]

It is meant to run in a mount namespace of its own (`unshare -m`), where it makes a small file system for the
checkpoints; without the right to, the disk never fills. What happened is printed as one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for this file as a program

from kit.kill import read  # noqa: E402
from kit.runners import Warm, WarmJob  # noqa: E402
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.verifying import verify

RANKS = 2
DISK_MB = 40
MOVES_S = 45.0  # longest time without a step, of a job that nobody has stopped
LEAVES_S = 40.0  # longest time from the end's signal until all of the job is gone
PAUSE_S = 0.01  # of each step, so that an hour's plain training takes less than an hour


# -- who else is there ------------------------------------------------------------------------------------------------


def watch(root: Path, pause_s: float) -> None:
    """Until standard input ends, with a pause after each round. Maps nothing for longer than it looks: a file that
    shrinks takes that along.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    notify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert notify >= 0, os.strerror(ctypes.get_errno())
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    counts: Counter[str] = Counter()
    held: list[int] = []
    while not ended.is_set():
        for folder, _, names in os.walk(root):
            libc.inotify_add_watch(notify, os.fsencode(folder), 0xFFF)
            for name in names:
                counts["looks"] += 1
                # What is gone by now; what is empty, and cannot be mapped; what shrank while it was.
                with contextlib.suppress(OSError, ValueError):
                    held.append(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC))
                    with mmap.mmap(held[-1], 0, prot=mmap.PROT_READ) as view:
                        counts["mapped"] += len(view)
                        view.madvise(22)  # MADV_POPULATE_READ
                    counts["read"] += len(os.pread(held[-1], 1 << 24, 0))
        while len(held) > 12:
            os.close(held.pop(random.randrange(len(held))))
        with contextlib.suppress(BlockingIOError):
            counts["events"] += len(os.read(notify, 1 << 16)) // 16
        time.sleep(pause_s)
    print(json.dumps(counts), flush=True)


class Watcher:
    """`watch` in a process that is none of the job's."""

    def __init__(self, root: Path, pause_s: float = 0.005) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "watch", str(root), str(pause_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def check(self) -> None:
        assert self._process.poll() is None, f"the watcher ended by itself: {self._process.returncode}"

    def close(self) -> dict[str, int]:
        told, _ = self._process.communicate("", timeout=20)
        return json.loads(told)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)


class Filler:
    """Takes all the room there is, holds it for a moment, and gives it back; on a thread. Not before `root` is made: a
    first start on a full disk ends, with an error that names the file.
    """

    def __init__(self, disk: Path, root: Path, chance: random.Random) -> None:
        self._path, self._made, self._chance = disk / "filler", root / "identity.json", chance
        self.times, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._made.exists() and not self._over.wait(0.05):
            pass
        while not self._over.wait(self._chance.uniform(0.5, 4.0)):
            with open(self._path, "wb", buffering=0) as file:
                until = time.monotonic() + self._chance.uniform(0.3, 2.5)
                while time.monotonic() < until and not self._over.is_set():
                    try:
                        file.write(bytes(1 << 18))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC, error
                        self._over.wait(0.01)  # what the job frees is taken too
            self._path.unlink()
            self.times += 1

    def close(self) -> None:
        self._over.set()
        self._thread.join(20)


@contextlib.contextmanager
def small_disk(folder: Path, mb: int = DISK_MB) -> Iterator[bool]:
    """A file system of so many MiB at `folder`; whether there is one."""
    folder.mkdir()
    image = folder.with_suffix(".img")
    made = False
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        with open(image, "wb") as file:
            file.truncate(mb << 20)
        _quietly("mkfs.ext4", "-q", "-m", "0", str(image))
        _quietly("mount", "-o", "loop", str(image), str(folder))
        made = True
    if not made:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            _quietly("mount", "-t", "tmpfs", "-o", f"size={mb}m", "none", str(folder))
            made = True
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=False)
        image.unlink(missing_ok=True)


def _quietly(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# -- the job ----------------------------------------------------------------------------------------------------------


class Launch:
    """One start of the job, whose ranks tell in a folder of its own."""

    def __init__(self, warm: Warm, root: Path, out: Path, number: int, total: int) -> None:
        self._out, self._number = out / f"{number:05d}", number
        self._out.mkdir()
        self.job: WarmJob = warm.start("storm.py", RANKS, root, self._out, total, PAUSE_S)

    def told(self) -> list[list[dict[str, Any]]]:
        """By rank."""
        return read(self._out, RANKS)

    def steps(self) -> int:
        """The newest that all ranks have told; -1 before they have one."""
        newest = [max((line["step"] for line in lines if "step" in line), default=-1) for lines in self.told()]
        return min(newest)

    def ranks(self) -> list[int]:
        return [lines[0]["pid"] for lines in self.told() if lines]

    def workers(self) -> list[int]:
        """Of the loaders: children of ranks."""
        ranks, found = set(self.ranks()), []
        for pid in self.job.pids():
            with contextlib.suppress(OSError):
                fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) in ranks:
                    found.append(pid)
        return found

    def fail(self, why: str) -> None:
        for pid in self.job.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)  # prints where it is
        time.sleep(0.5)
        raise AssertionError(f"launch {self._number}: {why}; its output:\n{self.job.output()[-20000:]}")

    def moves(self) -> None:
        """Within the deadline there are further steps, of all ranks."""
        before, deadline = self.steps(), time.monotonic() + MOVES_S
        while self.steps() <= before:
            if self.job.poll() is not None:
                self.fail("it ended, and nobody had ended it")
            if time.monotonic() > deadline:
                self.fail(f"no step after {before} within {MOVES_S:g} s")
            time.sleep(0.05)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Storm:
    """What is done to launches, drawn by `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.counts: Counter[str] = Counter()

    def bother(self, launch: Launch, seconds: float) -> None:
        """Nothing of this ends the job."""
        until = time.monotonic() + seconds
        while True:
            launch.moves()
            if time.monotonic() > until:
                return
            kind = self._chance.choice(["stop a rank", "stop a worker", "stop all", "tell a worker to leave", "wait"])
            self.counts[kind] += 1
            if kind == "wait":
                time.sleep(self._chance.uniform(0.1, 1.5))
                continue
            of = {"stop a rank": launch.ranks, "stop all": launch.job.pids}.get(kind, launch.workers)()
            if kind != "stop all":
                of = [self._chance.choice(of)] if of else []
            if kind == "tell a worker to leave":
                send(of, signal.SIGTERM)
                continue
            send(of, signal.SIGSTOP)
            time.sleep(self._chance.uniform(0.05, 4.0))
            send(of, signal.SIGCONT)

    def end(self, launch: Launch) -> None:
        kind = self._chance.choice(
            ["SIGTERM to a rank", "SIGTERM to the agent", "SIGTERM to all", "SIGKILL to a rank", "SIGKILL to all",
             "SIGKILL to a worker", "SIGTERM and SIGKILL"]
        )  # fmt: skip
        if launch.job.poll() is not None:
            launch.fail("it ended, and nobody had ended it")
        self.counts[kind] += 1
        rank, workers, agent = self._chance.choice(launch.ranks()), launch.workers(), launch.job.pid
        deadline = time.monotonic() + LEAVES_S
        number = signal.SIGKILL if kind.startswith("SIGKILL") else signal.SIGTERM
        targets = {"the agent": [agent], "all": launch.job.pids(), "a worker": workers[:1] or [rank]}
        send(targets.get(kind.partition(" to ")[2], [rank]), number)
        if kind == "SIGTERM and SIGKILL":
            time.sleep(self._chance.uniform(0.0, 0.4))
            send([rank], signal.SIGKILL)
        while kind == "SIGKILL to a worker" and launch.job.poll() is None and time.monotonic() < deadline:
            time.sleep(1.0)  # that one may have been about to end with its epoch
            send(launch.workers()[:1], signal.SIGKILL)
        if not launch.job.ends_within(LEAVES_S) and kind != "SIGKILL to all":
            raise AssertionError(f"{kind}: still there after {LEAVES_S:g} s; output:\n{launch.job.output()[-20000:]}")


def check(out: Path, reference: list[list[dict[str, Any]]]) -> dict[str, int]:
    """Every step of every launch is what it is in plain training; and nothing is lost that was said to be committed."""
    wanted = [{line["step"]: line["hash"] for line in lines if "step" in line} for lines in reference]
    seen = resumed = known = 0
    folders = sorted(out.iterdir())
    for folder in folders:
        starts: set[int] = set()
        newest = known
        for rank, lines in enumerate(read(folder, RANKS)):
            told = [line for line in lines if "step" in line]
            starts |= {line["start"] for line in lines if "start" in line}
            newest = max([newest, *(line["committed"] or 0 for line in told)])
            wrong = [line["step"] for line in told if wanted[rank][line["step"]] != line["hash"]]
            assert not wrong, f"launch {folder.name}, rank {rank}, from {starts}: not as plain training at {wrong[:5]}"
            seen += len(told)
        assert len(starts) <= 1, f"launch {folder.name}: ranks started from {starts}"
        assert all(start >= known for start in starts), f"launch {folder.name} from {starts}, and {known} was committed"
        resumed += max(starts, default=0) > 0
        known = newest
    return {"launches": len(folders), "resumed": resumed, "steps": seen, "newest": known}


def longest(out: Path) -> int:
    """How many steps any launch has told of."""
    told = (line for each in out.iterdir() for lines in read(each, RANKS) for line in lines)
    return 1 + max(line["step"] for line in told if "step" in line)


def has_committed(out: Path) -> bool:
    told = (line for each in out.iterdir() for lines in read(each, RANKS) for line in lines)
    return any(line.get("committed") for line in told)


def run(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    folder.mkdir(parents=True)
    chance, out, plain = random.Random(seed), folder / "out", folder / "plain"
    for each in (out, plain, folder / "warm"):
        each.mkdir()
    disk = folder / "disk"
    with contextlib.ExitStack() as stack:
        warm = Warm(folder / "warm")
        stack.callback(warm.close)
        limited = stack.enter_context(small_disk(disk))
        root = disk / "ckpt"
        root.mkdir()
        watcher = Watcher(root)
        stack.callback(watcher.kill)
        filler = Filler(disk, root, random.Random(seed + 1)) if limited else None
        if filler is not None:
            stack.callback(filler.close)
        storm, number, until = Storm(chance), 0, time.monotonic() + 60 * minutes
        # Longer where the machine is so busy that no launch has come to a commit, which is what a resume needs.
        while time.monotonic() < until or (not has_committed(out) and time.monotonic() < until + 60):
            number += 1
            launch = Launch(warm, root, out, number, 10**9)
            left = until - time.monotonic()
            storm.bother(launch, min(chance.uniform(1.0, 12.0), max(0.5, left)) if left > 0 else 6.0)
            storm.end(launch)
            watcher.check()
        if filler is not None:
            filler.close()
        total = longest(out) + 10
        last = Launch(warm, root, out, number + 1, total)
        assert last.job.wait(120).returncode == 0, last.job.output()[-8000:]
        looks = watcher.close()
        damage = [line for each in verify(Catalogue(str(root)), None).data["checkpoints"] for line in each["damage"]]
        assert not damage, damage
        names = sorted(path.name for path in root.iterdir())
        steps = [int(found[1]) for name in names if (found := re.match(r"step_(\d+)-", name))]
        assert steps == [total - 1, total] and len(names) == 4, f"the two that are kept, and no others: {names}"
        warm.run("storm.py", RANKS, "plain", plain, total, 0.0, timeout=60 + 0.1 * total)
        found = check(out, read(plain, RANKS))
        return {
            **found, "disk": limited, "filled": filler.times if filler else 0, "watcher": looks,
            "done": dict(sorted(storm.counts.items())),
        }  # fmt: skip


def main() -> None:
    if sys.argv[1] == "watch":
        watch(Path(sys.argv[2]), float(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(run(options.folder, options.minutes, options.seed)))


if __name__ == "__main__":
    main()
