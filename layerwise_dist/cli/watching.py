# SPDX-License-Identifier: Apache-2.0
"""`layerwise watch`: shows a running job from its events and manifests, and writes nothing."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.cli.console import Answer, age
from layerwise_dist.errors import shown
from layerwise_dist.supervision import background
from layerwise_dist.supervision.patience import stuck_calls, within
from layerwise_dist.supervision.processes import terminable
from layerwise_dist.telemetry.reading import EventReader
from layerwise_dist.telemetry.summary import Commit, Summary
from layerwise_dist.units import size

_LONGEST_REASON = 300
_START_S = 30.0  # longest time for a first look
_LOOK_S = 2.0  # and for each one after it, until the view says that it takes long
_SILENT_S = 120.0  # without an event, a job is said to be silent
_SOON_S = 86400.0


class Watcher:
    """Of one directory. Raises WrongUsage for a directory without checkpoints."""

    def __init__(self, directory: str, events: str | None) -> None:
        self.root = Catalogue(directory).root
        self._reader = reader_of(self.root, events)
        self._summary = Summary()

    def look(self) -> dict[str, Any]:
        """Raises OSError where the directory is gone, WrongUsage where it no longer holds checkpoints."""
        lineage = Catalogue(self.root).lineage
        for event in self._reader.poll():
            self._summary.take(event)
        commits = [Commit(each.step, each.created, each.nbytes, each.seq) for each in lineage]
        found = os.statvfs(self.root)
        return {"dir": self.root, **self._summary.now(time.time(), commits, found.f_bavail * found.f_frsize)}


def reader_of(root: str, events: str | None) -> EventReader:
    """Raises WrongUsage where a file that is asked for is none."""
    try:
        return EventReader(root, events)
    except OSError as error:
        raise WrongUsage(f"--events: {error}") from None


def once(directory: str, events: str | None) -> Answer:
    """Raises as `Watcher`, and DeadlineError for a disk that does not answer."""
    found = within(_START_S, f"a look at {directory}", lambda: Watcher(directory, events).look())
    return Answer(found, [*lines(found)], good=found["stopped"] is None)


def live(directory: str, events: str | None, every_s: float) -> None:
    """Until Ctrl-C. Raises WrongUsage and DeadlineError at the start only: a directory that goes away is reported, and
    may come back.
    """
    console = Console(highlight=False)
    try:
        frames = Frames(within(_START_S, f"a look at {directory}", lambda: Watcher(directory, events)))
        with terminable(), Live(Text(""), console=console, auto_refresh=False) as view:
            while True:
                view.update(frames.next(), refresh=True)
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


class Frames:
    """What is shown, one after another. Files are looked at on another thread: a look that takes long, at a disk that
    does not answer say, is told and freezes nothing.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._thread: threading.Thread | None = None  # of the look that is under way; none follows before it is over
        self._began = 0.0
        self._last: list[Text] = [Text("")]

    def next(self) -> Group:
        if self._thread is None:
            self._began = time.monotonic()
            try:
                self._thread = background.start("layerwise-watch", self._look, background.log_only)
            except OSError as error:
                return Group(Text(shown(str(error), _LONGEST_REASON), style="bold red"), *self._last)
        self._thread.join(_LOOK_S)
        if self._thread.is_alive():
            told = f"this look at it has taken {seconds(time.monotonic() - self._began)} so far{stuck_calls()}"
            return Group(Text(shown(told, _LONGEST_REASON), style="bold red"), *self._last)
        self._thread = None
        return Group(*self._last)

    def _look(self) -> None:
        try:
            self._last = lines(self._watcher.look())
        except Exception as error:  # the view outlives whatever happens to the files
            self._last = [Text("not readable now", style="bold red"), Text(shown(str(error), _LONGEST_REASON))]


def lines(found: dict[str, Any]) -> list[Text]:
    """At 80 columns; a reason may take more than one line."""
    made = [Text(shown(found["dir"], 400), style="bold", overflow="ellipsis", no_wrap=True)]

    def add(label: str, text: str, style: str = "") -> None:
        made.append(Text(f"{label:<11}", style="dim") + Text(shown(text), style=style))

    add("job", *_job(found))
    add("committed", *_committed(found))
    rate = [f"{found['steps_per_s']:.3g} steps/s"] if found["steps_per_s"] else []
    rate += [f"{found['checkpoints_per_h']:,.0f} checkpoints/h"] if found["checkpoints_per_h"] else []
    add("rate", ", ".join(rate) or "not known yet")
    if found["checkpoint_bytes"] is not None:
        speed = f", {found['gb_per_s']:.3g} GB/s" if found["gb_per_s"] else ""
        took = f", committed after {seconds(found['committed_s'])}" if found["committed_s"] is not None else ""
        add("size", f"{size(found['checkpoint_bytes'])} a checkpoint{speed}{took}")
    if found["stall_ms_p50"] is not None:
        add("stall", f"{found['stall_ms_p50']:.3g} ms a checkpoint, p99 {found['stall_ms_p99']:.3g} ms")
    if found["outcomes"] is not None:
        bad = found["outcomes"]["failed"]
        add("outcomes", ", ".join(f"{count} {name}" for name, count in found["outcomes"].items()), "red" if bad else "")
    for each in reversed(found["failures"]):
        add("failed", f"step {each['step']}, {age(each['age_s'])} ago: {_reason(each['reason'] or '')}", "red")
    if found["stopped"] is not None:
        add("stopped", _reason(found["stopped"]), "bold red")
    add("disk", *_disk(found))
    return made


def _reason(text: str) -> str:
    """Without line ends: one could stand for a line of this view."""
    return shown(" ".join(text.split()), _LONGEST_REASON)


def _job(found: dict[str, Any]) -> tuple[str, str]:
    if found["state"] is None:
        return "no events here: set telemetry.events, or give --events FILE", "yellow"
    silent = found["last_event_age_s"]
    where = f" at step {found['step']}" if found["step"] is not None else ""
    count = found["world_size"]
    ranks = f" on {count} rank{'s' if count != 1 else ''}" if count is not None else ""
    if found["state"] == "running" and silent > _SILENT_S:
        return f"silent{where}{ranks}: no event for {age(silent)}", "yellow"
    return f"{found['state']}{where}{ranks}, last event {age(silent)} ago", "green" if found[
        "state"
    ] == "running" else ""


def _committed(found: dict[str, Any]) -> tuple[str, str]:
    if found["committed_step"] is None:
        return "nothing yet", "yellow"
    lag = f", {found['lag_steps']} steps ago" if found["lag_steps"] else ""
    return f"step {found['committed_step']}, {age(found['committed_age_s'])} old{lag}", "bold"


def _disk(found: dict[str, Any]) -> tuple[str, str]:
    left = f"{size(found['disk_free_bytes'])} left"
    if found["disk_full_in_s"] is None:
        return left, ""
    return f"disk full in {age(found['disk_full_in_s'])} ({left})", "bold red" if found[
        "disk_full_in_s"
    ] < _SOON_S else ""


def seconds(value: float) -> str:
    """``850 ms``, ``4.2 s``."""
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 120 else age(value)


def interactive() -> bool:
    return sys.stdout.isatty()
