# SPDX-License-Identifier: Apache-2.0
"""Does what a trial of the soak plans: starts its launches, does to them what was drawn, and judges what they told."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.digests import digest
from kit.kill import read
from kit.matrix import Layout
from kit.runners import Warm, WarmJob
from kit.soak import send
from kit.trial_plan import ENDS, MAY_END, OPTIMIZER, Fault, Plan
from kit.trial_plan import Launch as Planned
from kit.trial_truth import Told, Truths, check, check_read, text
from layerwise_dist import open_checkpoint
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.verifying import verify
from layerwise_dist.errors import NotFoundError
from layerwise_dist.supervision.processes import fields_of, marked

MOVES_S = 90.0  # longest time in which a job that nobody has stopped tells nothing new
LEAVES_S = 60.0  # longest time from a signal that ends a launch until all of it is gone; the agent waits 30 s itself
PAUSE_S = 0.004  # of each step: else most faults would come after the end
TOKEN = "LAYERWISE_SOAK_TRIAL"


class Interrupted(Exception):
    """Somebody wants the soak to end."""


class Wrong(AssertionError):
    """Something is not as it must be."""


class Hung(AssertionError):
    """Something goes on for longer than it may."""


class Dead(AssertionError):
    """A launch ended, and nothing that was done to it says why."""


@dataclass
class Found:
    """What a trial came to."""

    faults: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    resumed: int = 0
    other_ranks: int = 0
    steps: int = 0
    reads: int = 0


# -- the jobs ---------------------------------------------------------------------------------------------------------


class Starter:
    """Starts jobs of tests/jobs/trial.py, from several threads too."""

    def __init__(self, torch: Warm, zero: Callable[[], Warm]) -> None:
        """`zero` gives what starts those that need DeepSpeed, which takes seconds the first time."""
        self._torch, self._zero = torch, zero
        self._lock = threading.Lock()

    def start(self, layout: Layout, spec: dict[str, Any], token: str = "") -> WarmJob:
        env = {"COLLECTIVE_S": "60", "PYTHONFAULTHANDLER": "1", TOKEN: token}
        with self._lock:
            server = self._zero() if layout.wrapper.startswith("zero") else self._torch
            return server.start("trial.py", layout.ranks, json.dumps(spec), env=env)


class Running:
    """One launch."""

    def __init__(self, starter: Starter, plan: Plan, planned: Planned, place: int, known: int, folder: Path, root: Path,
                 token: str, over: threading.Event) -> None:  # fmt: skip
        self.planned, self._known, self._over = planned, known, over
        self._out = folder / f"launch_{place}"
        self._out.mkdir()
        cuts = [[each.rank, known + each.step] for each in planned.faults if each.kind == "connections cut"]
        spec = {
            "wrapper": planned.layout.wrapper, "optimizer": OPTIMIZER, "total": plan.total, "out": str(self._out),
            "dir": str(root), "config": plan.config, "pause_s": PAUSE_S, "cut": (cuts or [None])[0],
            "rules": [self._rule(each) for each in planned.faults if each.rule],
        }  # fmt: skip
        self.job = starter.start(planned.layout, spec, token)

    def _rule(self, fault: Fault) -> dict[str, Any]:
        pattern = fault.rule["pattern"].format(step=self._known + fault.step, rank=fault.rank)
        return {**fault.rule, "pattern": pattern}

    def told(self) -> list[list[dict[str, Any]]]:
        return read(self._out, self.planned.layout.ranks)

    def newest(self, rank: int) -> int:
        """The step that this rank has told of; the known one before the first."""
        lines = self.told()[rank]
        return max((line["step"] for line in lines if "step" in line), default=self._known if lines else -1)

    def before(self, fault: Fault) -> int:
        """The newest step before it. Files of a step are written before the step is told of."""
        return self._known + fault.step - bool(fault.rule)

    def wait(self, what: Callable[[], bool]) -> bool:
        """Until it is so, or the job has ended, which is False. Hung if nothing is told for too long."""
        said, deadline, look = -1, time.monotonic() + MOVES_S, 0.0
        while not what():
            if self._over.wait(0.01):
                raise Interrupted
            if time.monotonic() < look:
                continue
            if self.job.poll() is not None:
                return what()
            if said != (now := sum(map(len, self.told()))):
                said, deadline = now, time.monotonic() + MOVES_S
            if time.monotonic() > deadline:
                raise Hung(f"nothing new for {MOVES_S:g} s: {self.where()}")
            look = time.monotonic() + 0.1
        return True

    def ends(self) -> int:
        """The agent's exit code, once all of the launch is gone."""
        self.wait(lambda: False)
        code = self.job.poll()
        assert code is not None
        self.job.kill()
        return code

    def leaves(self) -> None:
        """As `ends`, after a signal that ends it."""
        deadline = time.monotonic() + LEAVES_S
        while self.job.poll() is None:
            if self._over.wait(0.05):
                raise Interrupted
            if time.monotonic() > deadline:
                raise Hung(f"still there {LEAVES_S:g} s after the signal: {self.where()}")
        self.job.kill()

    def where(self) -> str:
        for pid in self.job.pids():
            send([pid], signal.SIGCONT)
            send([pid], signal.SIGUSR1)  # prints where it is (tests/jobs/warm.py)
        time.sleep(0.5)
        return f"output:\n{self.job.output()[-5000:]}"

    def at_end(self) -> bool:
        """Whether a rank has come to its end, see `pid`."""
        return any("end" in line for lines in self.told() for line in lines)

    def pid(self, rank: int) -> list[int]:
        """None of a rank that has come to its end: it waits for torch's agent then, in a `multiprocessing.Event`, and
        if it is killed there the agent waits for it forever.
        """
        lines = self.told()[rank]
        return [line["pid"] for line in lines if "pid" in line and not any("end" in other for other in lines)]

    def monitor(self, rank: int) -> list[int]:
        return [line["monitor"] for line in self.told()[rank] if "monitor" in line]


def _stands_still(pid: int) -> bool:
    fields = fields_of(pid)
    return not fields or fields[0] in "TtZX"  # proc(5): stopped, or dead


class Blows:
    """What is done to launches from outside."""

    def __init__(self, disk: Path | None, over: threading.Event) -> None:
        """`disk`: of the checkpoints, so small that it can be filled; None where there is none."""
        self._disk, self._over = disk, over

    def do(self, running: Running, fault: Fault) -> bool:
        """Whether it came to it: the launch may have ended before."""
        if not running.wait(lambda: running.newest(fault.rank) >= running.before(fault)):
            return False
        if fault.in_job:
            return True
        if fault.kind == "SIGKILL to a monitor" and not running.wait(lambda: bool(running.monitor(fault.rank))):
            return False
        self._pause(fault.delay_s)
        if fault.kind == "full disk":
            return self._fill(fault.length_s)
        pids = self._targets(running, fault)
        if not pids or running.job.poll() is not None:
            return False
        if fault.kind.startswith("SIGSTOP"):
            send(pids, signal.SIGSTOP)
            try:
                self._pause(fault.length_s)
            finally:
                send(pids, signal.SIGCONT)
            return True
        number = signal.SIGKILL if fault.kind.startswith("SIGKILL") else signal.SIGTERM
        done = self._end(running, lambda: self._targets(running, fault), number)
        if done and fault.kind == "SIGTERM and SIGKILL":
            self._pause(fault.delay_s)
            self._end(running, lambda: self._targets(running, fault), signal.SIGKILL)
        return done

    def _end(self, running: Running, targets: Callable[[], list[int]], number: int) -> bool:
        """Sends the signal, if there is still somebody to get it. They are stopped first: a rank could come to its end
        between the look and the signal (see `Running.pid`).
        """
        stopped = targets()
        try:
            deadline = time.monotonic() + LEAVES_S
            while not self._stops(stopped):
                if time.monotonic() > deadline:
                    raise Hung(f"not stopped {LEAVES_S:g} s after SIGSTOP: {running.where()}")
                # A process that starts a program stops once its child runs that (vfork(2)), and the child is stopped.
                send(stopped, signal.SIGCONT)
                self._pause(0.005)
            pids = [pid for pid in targets() if pid in stopped]
            send(pids, number)
        finally:
            send(stopped, signal.SIGCONT)
        return bool(pids)

    def _stops(self, pids: list[int]) -> bool:
        """Whether all of them do so at once."""
        send(pids, signal.SIGSTOP)
        until = time.monotonic() + 1.0
        while not all(map(_stands_still, pids)):
            if time.monotonic() > until:
                return False
            self._pause(0.002)
        return True

    def _targets(self, running: Running, fault: Fault) -> list[int]:
        if fault.kind.endswith("to all"):
            # SIGTERM, which the agent may live through, is as bad as SIGKILL for a rank at its end.
            spared = fault.kind.startswith("SIGTERM") and running.at_end()
            return [] if spared else running.job.pids()
        if fault.kind.endswith("to the agent"):
            return [running.job.pid]
        if fault.kind.endswith("to a monitor"):
            return running.monitor(fault.rank)
        return [pid for pid in running.pid(fault.rank) if pid in running.job.pids()]

    def _fill(self, seconds: float) -> bool:
        if self._disk is None:
            return False
        path, until = self._disk / "filler", time.monotonic() + seconds
        with contextlib.ExitStack() as stack:
            stack.callback(path.unlink, missing_ok=True)
            file = None
            while time.monotonic() < until and not self._over.is_set():
                try:
                    file = file or stack.enter_context(open(path, "wb", buffering=0))
                    file.write(bytes(1 << 18))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    self._over.wait(0.01)  # what the job frees is taken too
        return True

    def _pause(self, seconds: float) -> None:
        if self._over.wait(seconds):
            raise Interrupted


class Reader:
    """Reads the newest checkpoint of a directory again and again, on a thread."""

    def __init__(self, root: Path) -> None:
        self._root, self._over = root, threading.Event()
        self.found: list[tuple[int, dict[str, str]]] = []
        self.wrong = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.wait(0.1):
                with contextlib.suppress(NotFoundError), open_checkpoint(self._root) as ckpt:
                    # A parameter is its fp32 master where there is one, as in the reference.
                    names = {name.replace("master/", "param/", 1): name for name in sorted(ckpt.names, reverse=True)}
                    whole = {name: digest([ckpt[found][...]]) for name, found in names.items()}
                    if not self.found or self.found[-1] != (ckpt.step, whole):
                        self.found.append((ckpt.step, whole))
        except Exception as error:
            self.wrong = f"a reader got {type(error).__name__}: {error}"

    def close(self) -> None:
        self._over.set()
        self._thread.join(60)


# -- a trial ----------------------------------------------------------------------------------------------------------


def run(plan: Plan, starter: Starter, truths: Truths, folder: Path, root: Path, disk: Path | None,
        over: threading.Event) -> Found:  # fmt: skip
    """`folder` is for what the job tells, `root` its directory, on `disk`.

    Raises Wrong, Hung or Dead, with what all launches told; Interrupted.
    """
    found, told, token = Found(), list[Told](), uuid.uuid4().hex
    folder.mkdir()
    reader = Reader(root)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(reader.close)
            for place, planned in enumerate(plan.launches):
                if place == len(plan.launches) - 1:
                    reader.close()  # what it holds would outlive what is to be kept
                told.append(_launch(plan, planned, place, told, starter, folder, root, disk, token, over, found))
            while not told[-1].ended():  # an error that it may end by came in the last one's way
                if len(told) == len(plan.launches) + 2:
                    raise Dead("two more launches that nothing was done to did not come to their end")
                quiet = Planned(plan.launches[-1].layout, ())
                told.append(_launch(plan, quiet, len(told), told, starter, folder, root, disk, token, over, found))
        _gone(token, over)
        found.steps = check(told, truths)
        if reader.wrong:
            raise Wrong(reader.wrong)
        found.reads = check_read(reader.found, told, truths)
        _check_folder(plan, root, told[-1])
    except AssertionError as error:
        kind = type(error) if isinstance(error, (Hung, Dead)) else Wrong
        raise kind(f"{plan}\n{error}\n{text(told)}") from error
    finally:
        _kill(token)
    found.launches = len(told)
    found.resumed = sum(max(each.starts(), default=0) > 0 for each in told)
    courses = [each.course for each in told if each.course is not None]
    found.other_ranks = int(any(course.origin is not None for course in courses))
    return found


def _launch(plan: Plan, planned: Planned, place: int, told: list[Told], starter: Starter, folder: Path, root: Path,
            disk: Path | None, token: str, over: threading.Event, found: Found) -> Told:  # fmt: skip
    known = max((each.committed() for each in told), default=0)
    running, blows = Running(starter, plan, planned, place, known, folder, root, token, over), Blows(disk, over)
    try:
        done = []
        for fault in planned.faults:
            if blows.do(running, fault):
                done.append(fault.kind)
        if any(kind in ENDS for kind in done):
            running.leaves()
        code = running.ends()
        found.faults.update(done)
        mine = Told(planned.layout, running.told())
        _judge(mine, done, code, running)
        return mine
    except AssertionError:
        told.append(Told(planned.layout, running.told()))
        raise
    finally:
        running.job.kill()


def _judge(told: Told, done: list[str], code: int, running: Running) -> None:
    """Whether it may have ended as it did."""
    signalled = any(kind in ENDS for kind in done)
    if code == 0:
        if not told.ended():
            raise Dead(f"ended with 0, and not all ranks came to the end: {running.where()}")
        return
    if signalled:
        return
    errors = [line for lines in told.lines for line in lines if "error" in line]
    if any(kind in MAY_END for kind in done) and any(line["named"] for line in errors):
        return
    raise Dead(f"ended with {code} after {done or 'nothing'}: {running.where()}")


def _check_folder(plan: Plan, root: Path, last: Told) -> None:
    """At the end everything in it is sound, it has what is to be kept, and nothing that was left behind."""
    damage = [line for each in verify(Catalogue(str(root)), None).data["checkpoints"] for line in each["damage"]]
    if damage:
        raise Wrong(f"verify: {damage}")
    names = sorted(path.name for path in root.iterdir())
    steps = sorted(int(name[5:15]) for name in names if name.startswith("step_"))
    rest = [name for name in names if not name.startswith("step_")]
    # What goes late goes with the next commits, of which the last launch may have made none: what a reader held, and
    # what the newest commit replaced just before a kill.
    made = last.committed() - min(last.starts())
    most = plan.config["keep_last"] + (made < 2) + (made < 1)
    if not steps or steps[-1] != plan.total or len(steps) > most:
        raise Wrong(f"steps {steps} of {plan.total}, {most} to be kept: {names}")
    if rest != ["identity.json", "owner"]:
        raise Wrong(f"left behind: {rest}")


# -- what a trial leaves ----------------------------------------------------------------------------------------------


def _with(token: str) -> list[int]:
    """Processes that were started as programs in this trial's jobs: monitors, above all."""
    return marked(f"{TOKEN}={token}".encode())


def _gone(token: str, over: threading.Event) -> None:
    deadline = time.monotonic() + LEAVES_S
    while left := _with(token):
        if time.monotonic() > deadline:
            raise Hung(f"{len(left)} processes of the trial are still there after {LEAVES_S:g} s")
        if over.wait(0.02):
            raise Interrupted


def _kill(token: str) -> None:
    send(_with(token), signal.SIGKILL)


def keep(root: Path, folder: Path) -> None:
    """The directory of a trial that failed, beside what it told."""
    shutil.copytree(root, folder / "ckpt", dirs_exist_ok=True)
