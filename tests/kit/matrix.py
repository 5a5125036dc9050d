# SPDX-License-Identifier: Apache-2.0
"""The matrix of restores: each wrapper on each number of ranks into each other. tests/jobs/matrix.py does the work."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.runners import Warm

# On which numbers of ranks a wrapper exists. HSDP is 2 x 2, tensor parallelism in FSDP2 is 1 x 2 and 2 x 2.
RANKS: dict[str, tuple[int, ...]] = {
    "plain": (1,), "ddp": (1, 2, 3, 4), "ddp-zero": (1, 2, 3, 4), "fsdp1": (1, 2, 3, 4), "fsdp1-orig": (1, 2, 3, 4),
    "fsdp2": (1, 2, 3, 4), "hsdp": (4,), "tp-fsdp2": (2, 4),
    "zero0": (1, 2, 3, 4), "zero1": (1, 2, 3, 4), "zero2": (1, 2, 3, 4), "zero3": (1, 2, 3, 4),
}  # fmt: skip
CASES = ("adamw-numbers", "sgd-trained")
MORE_CASES = ("adamw-trained", "sgd-numbers")
# Parameters and buffers in bf16 or fp16; under DeepSpeed with fp32 masters and state of what is trained.
LOW: dict[str, tuple[int, ...]] = {
    "ddp-bf16": (2,), "fsdp2-bf16": (3,), "zero1-bf16": (2,), "zero2-fp16": (3,), "zero3-bf16": (2,),
}  # fmt: skip
OK = "ok"
ROUNDED = "rounded"  # refused; and with cast="target" right, with values rounded as torch rounds them
GOOD = (OK, ROUNDED)
_START_S, _STALL_S, _CRASHES = 90.0, 90.0, 3


@dataclass(frozen=True, slots=True)
class Layout:
    """A wrapper on a number of ranks."""

    wrapper: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.wrapper}:{self.ranks}"

    @classmethod
    def of(cls, text: str) -> Layout:
        """`fsdp2:4`. Raises ValueError if there is no such one."""
        wrapper, _, ranks = text.partition(":")
        if not ranks.isdigit() or int(ranks) not in {**RANKS, **LOW}.get(wrapper, ()):
            raise ValueError(f"{text!r} is none of {' '.join(map(str, (*LAYOUTS, *PRECISE)))}")
        return cls(wrapper, int(ranks))


LAYOUTS = tuple(Layout(wrapper, ranks) for wrapper, numbers in RANKS.items() for ranks in numbers)
PRECISE = tuple(Layout(wrapper, ranks) for wrapper, numbers in LOW.items() for ranks in numbers)
_FULL = (Layout("fsdp2", 2), Layout("zero2", 2), Layout("zero3", 3))
# Each precision into each other, those in fp32 on both sides being the matrix above.
PRECISIONS = [
    (source, target)
    for target in (*_FULL, *PRECISE)
    for source in (*_FULL, *PRECISE)
    if source in PRECISE or target in PRECISE
]
Found = dict[tuple[Layout, Layout, str], str]  # by source, target and case: OK, or what is wrong


class Launcher:
    """Starts jobs, from several threads too. A task in which a job ends or stands still is that task's failure; the
    tasks after it are done by another job.
    """

    def __init__(self, torch: Warm, zero: Warm, folder: Path) -> None:
        """`zero` starts those that need DeepSpeed. `folder` is for what the jobs write."""
        self.folder = folder
        self._torch, self._zero = torch, zero
        self._lock, self._numbers = threading.Lock(), itertools.count()

    def run(self, ranks: int, tasks: Sequence[Mapping[str, Any]]) -> list[str]:
        """The verdicts of the tasks, in order."""
        verdicts: list[str] = []
        crashes = 0
        while len(verdicts) < len(tasks):
            if crashes == _CRASHES:
                verdicts += ["not tried: three jobs of this layout had ended before"] * (len(tasks) - len(verdicts))
                break
            end = self._launch(ranks, tasks[len(verdicts) :], verdicts)
            if end:
                crashes += 1
                verdicts[len(verdicts) - (len(verdicts) == len(tasks)) :] = [end]
        return verdicts

    def _launch(self, ranks: int, tasks: Sequence[Mapping[str, Any]], verdicts: list[str]) -> str:
        """Adds to `verdicts`. How the job ended if it did not do all that it should, "" otherwise."""
        path = self.folder / f"job_{next(self._numbers)}"
        plan, out = path.with_suffix(".json"), path.with_suffix(".jsonl")
        plan.write_text(json.dumps(tasks))
        out.touch()
        server = self._zero if any(task["wrapper"].startswith("zero") for task in tasks) else self._torch
        with self._lock:
            job = server.start("matrix.py", ranks, plan, out, env={"COLLECTIVE_S": "60"})
        size, deadline = 0, time.monotonic() + _START_S
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            if out.stat().st_size > size:
                size, deadline = out.stat().st_size, time.monotonic() + _STALL_S
        code = job.poll()
        job.kill()
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        verdicts += [line["verdict"] for line in lines if "verdict" in line]
        if code == 0:
            return ""
        how = f"stood still for {_STALL_S:g} s" if code is None else f"ended with {code}"
        return f"the job {how}: {_last(job.output())}"


def _last(output: str) -> str:
    """The line that says most of why a job ended."""
    errors = re.findall(r"^(?:\[rank\d\]: )?([\w.]*(?:Error|Exception)\b.*)$", output, re.MULTILINE)
    return errors[0][:1000] if errors else output[-500:]


def write_tasks(layout: Layout, cases: Iterable[str], folder: Path) -> list[dict[str, Any]]:
    return [
        {"do": "write", "wrapper": layout.wrapper, "case": case, "into": str(place(folder, layout, case))}
        for case in cases
    ]


def read_task(source: Layout, target: Layout, case: str, folder: Path, **more: Any) -> dict[str, Any]:
    where = str(place(folder, source, case))
    masters = source in PRECISE and source.wrapper.startswith("zero")
    return {
        "do": "read", "wrapper": target.wrapper, "case": case, "source": where, "from_masters": masters, **more
    }  # fmt: skip


def load_task(source: Layout, target: Layout, case: str, folder: Path, how: str) -> dict[str, Any]:
    """As `read_task`, without an engine."""
    where = str(place(folder, source, case))
    return {"do": "load", "wrapper": target.wrapper, "case": case, "source": where, "how": how}


def place(folder: Path, layout: Layout, case: str) -> Path:
    path = folder / f"{layout.wrapper}-{layout.ranks}" / case
    path.mkdir(parents=True, exist_ok=True)
    return path


def tour(launcher: Launcher, layouts: Sequence[Layout], case: str) -> dict[str, str]:
    """One job that goes on under another layout after each step. The verdicts of its legs, up to the first bad one."""
    before, found = None, dict[str, str]()
    for number, layout in enumerate(layouts):
        into = str(launcher.folder / f"leg_{number}")
        task = {
            "do": "leg", "wrapper": layout.wrapper, "case": case, "dir": str(launcher.folder / "tour"), "step": number,
            "before": before, "into": into,
        }  # fmt: skip
        [verdict] = launcher.run(layout.ranks, [task])
        found[f"leg {number}, {layout}"] = verdict
        if verdict != OK:
            break
        before = into
    return found


def restore_all(
    launcher: Launcher, pairs: Sequence[tuple[Layout, Layout]], cases: Sequence[str], *, lanes: int,
    say: Callable[[str], None],
) -> Found:  # fmt: skip
    """Writes each source once, then starts each target once, `lanes` jobs at a time."""
    began, folder, found = time.monotonic(), launcher.folder, Found()
    written: dict[tuple[Layout, str], str] = {}

    def heard(text: str) -> None:
        say(f"{time.monotonic() - began:5.0f} s  {text}")

    def write(source: Layout) -> None:
        verdicts = launcher.run(source.ranks, write_tasks(source, cases, folder))
        written.update(zip(((source, case) for case in cases), verdicts, strict=True))
        heard(f"{source} written" if {*verdicts} == {OK} else f"{source} NOT WRITTEN: {verdicts}")

    def read(target: Layout) -> None:
        mine = [(source, case) for case in cases for source, other in pairs if other == target]
        ready = [each for each in mine if written[each] == OK]
        verdicts = launcher.run(target.ranks, [read_task(source, target, case, folder) for source, case in ready])
        results = dict(zip(ready, verdicts, strict=True))
        for source, case in mine:
            verdict = results.get((source, case), f"not written: {written[source, case]}")
            found[source, target, case] = verdict
            if verdict not in GOOD:
                heard(f"{source} > {target} {case}: {short(verdict)}")
        good = sum(found[source, target, case] in GOOD for source, case in mine)
        heard(f"{target} read {good} of {len(mine)}")

    with ThreadPoolExecutor(lanes) as pool:
        # The largest first, so that none is left alone at the end.
        for work, which in ((write, 0), (read, 1)):
            for _ in pool.map(work, sorted({pair[which] for pair in pairs}, key=lambda layout: -layout.ranks)):
                pass
    return found


def short(verdict: str) -> str:
    """For one line; the jobs' own files have it whole."""
    line = " ".join(verdict.split())
    return line if len(line) <= 240 else f"{line[:240]}..."


def table(found: Found) -> str:
    """Rows are sources, columns targets. A cell has a mark for each number of ranks: `=` for what is equal to the bit
    in all cases, `~` for what must be rounded in some, else the number of a note below.
    """
    notes: dict[str, tuple[int, str, list[str]]] = {}
    for (source, target, case), verdict in found.items():
        if verdict not in GOOD:
            number, text, where = notes.setdefault(_kind(verdict), (len(notes) + 1, verdict, []))
            where.append(f"{source} > {target} {case}")
    sources = list(dict.fromkeys(source for source, _, _ in found))
    order = [*LAYOUTS, *PRECISE].index
    sources.sort(key=order)
    targets = sorted({target for _, target, _ in found}, key=order)
    wrappers = list(dict.fromkeys(target.wrapper for target in targets))
    numbers = {name: [target for target in targets if target.wrapper == name] for name in wrappers}
    head = [f"{name} {' '.join(str(each.ranks) for each in numbers[name])}" for name in wrappers]
    lines = ["| from | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for source in sources:
        cells = [" ".join(_mark(found, source, each, notes) for each in numbers[name]) for name in wrappers]
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    for number, text, where in notes.values():
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        lines += ["", f"{number}. {short(text)} ({', '.join(where[:3])}{more})"]
    return "\n".join(lines)


def _mark(found: Found, source: Layout, target: Layout, notes: Mapping[str, tuple[int, str, list[str]]]) -> str:
    verdicts = [verdict for (one, other, _), verdict in found.items() if (one, other) == (source, target)]
    numbers = sorted({notes[_kind(verdict)][0] for verdict in verdicts if verdict not in GOOD})
    return ",".join(map(str, numbers)) or ("~" if ROUNDED in verdicts else "=" if verdicts else "·")


def _kind(verdict: str) -> str:
    """What failures have in common that differ in numbers and names only."""
    text = re.sub(r"-?\d+(\.\d+)?(e[+-]\d+)?", "#", verdict)
    return re.sub(r"rank #: |[\w.@#]*[./@][\w.@#]+|\[[^]]*\]", "", text)[:160]
