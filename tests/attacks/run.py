# SPDX-License-Identifier: Apache-2.0
"""Gives crafted directories to workers, and judges what comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from attacks import THEMES
from attacks.kit import Attack

COMMANDS = {"ls", "show", "verify", "json"}
MORE_BYTES = 256 << 20
BUDGET_S = 1.0
# Of the processor: what is read in a second at least, beside the second that everything may take.
BYTES_A_SECOND = 4 << 20
LONGEST = 8192  # characters of a line that a command prints, or of an error
_RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Worker:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "COLUMNS": "200"}
        self._errors = open(folder / "errors", "w+b")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder / "good")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env,
        )  # fmt: skip
        self._folder, self._count = folder, 0

    def ask(self, theme: str, number: int, folder: str, mutation: str | None = None) -> dict[str, Any]:
        self._count += 1
        place = str(self._folder / f"case_{self._count}")
        assert self._process.stdin is not None and self._process.stdout is not None
        said = self._errors.seek(0, os.SEEK_END)
        request = {"theme": theme, "number": number, "place": place, "folder": folder, "mutation": mutation}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        self._errors.seek(said)
        errors = self._errors.read().decode(errors="replace")
        if not line:
            raise RuntimeError(f"a worker ended: {errors[-4000:]}")
        return {**json.loads(line), "errors": errors}

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)
        self._errors.close()


@dataclass
class Figures:
    tried: int = 0
    named: int = 0
    older: int = 0
    newest: int = 0
    foreign: int = 0
    hangs: int = 0
    memory: int = 0
    outside: int = 0
    slow: int = 0
    otherwise: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.tried} crafted directories: {self.named} named errors, {self.older} times the next older commit, "
            f"{self.newest} harmless; foreign exceptions {self.foreign}, hangs {self.hangs}, more than 256 MB beyond "
            f"the directory's size {self.memory}, outside {self.outside}, over the budget of time {self.slow}, other "
            f"than expected {self.otherwise}"
        )

    def add(self, other: Figures) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def budget(size: int, *, crowded: bool) -> float:
    """Seconds of the processor. Where more runs than there are processors, each does half of the work or less."""
    return (3 if crowded else 1) * (BUDGET_S + size / BYTES_A_SECOND)


def judge(theme: str, attack: Attack, found: dict[str, Any]) -> Figures:
    figures = Figures(tried=1)

    def problem(kind: str, text: str) -> None:
        setattr(figures, kind, 1)
        figures.problems.append(f"{theme}: {attack.name}: {kind}: {text}")

    if "died" in found:
        kinds = {"hung": "hangs", f"ended with {-signal.SIGXCPU}": "slow"}
        problem("hangs" if "Timeout" in found["errors"] else kinds.get(found["died"], "foreign"),
                f"{found['died']}: {found['errors'][-1500:]}")  # fmt: skip
        return figures
    actions, size = found["actions"], found["size"]
    allowed = budget(size, crowded=os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1))
    if found["outside"]:
        problem("outside", "something outside was touched")
    for name, each in actions.items():
        if "foreign" in each:
            problem("foreign", f"{name}: {each['foreign']}\n{each.get('trace', '')[-1200:]}")
        if each["bytes"] > size + MORE_BYTES:
            problem("memory", f"{name} took {each['bytes'] >> 20} MB, the directory has {size >> 20}")
        if each["cpu_seconds"] > allowed:
            problem("slow", f"{name} took {each['cpu_seconds']:.1f} s, {each['seconds']:.1f} s in all")
        _look_at_text(name, each, problem)
    for name in COMMANDS & actions.keys():
        if actions[name].get("code") not in (0, 1, None) and not attack.usage:
            problem("otherwise", f"{name} ended with {actions[name]['code']}: {actions[name]['said'][:300]}")
    _judge_restore(attack, found, figures, problem)
    if attack.says and attack.says not in actions["verify"].get("said", ""):
        problem("otherwise", f"verify does not say {attack.says!r}: {actions['verify'].get('said', '')[:300]}")
    return figures


def _look_at_text(name: str, action: dict[str, Any], problem: Any) -> None:
    said = action.get("said", "")
    if raw := _RAW.search(said):
        problem("otherwise", f"{name} prints {raw[0]!r} raw")
    if "\\u001b" not in said and name == "json" and "foreign" not in action:
        try:
            json.loads(said)
        except ValueError:
            problem("otherwise", f"json prints no JSON: {said[:300]}")
    if name != "json" and max(map(len, said.splitlines()), default=0) > LONGEST:
        problem("otherwise", f"{name} prints a line of {max(map(len, said.splitlines()))} characters")


def _judge_restore(attack: Attack, found: dict[str, Any], figures: Figures, problem: Any) -> None:
    restored, sound = found["actions"]["restore"], found["actions"]["verify"].get("code") == 0
    if "foreign" in restored:
        return
    if "named" in restored:
        outcome = "named"
    else:
        outcome = "newest" if restored["step"] == 3 else "older"
        digest = found["good"].get(f"{found['template']} {restored['step']}")
        if digest != restored["digest"] and attack.expect != "tensors":
            problem("otherwise", f"step {restored['step']} is not what was saved")
    setattr(figures, outcome, getattr(figures, outcome) + 1)
    allowed = {"any": ("named", "older", "newest")}.get(attack.expect, (attack.expect,))
    if outcome not in allowed:
        said = restored.get("named") or f"step {restored['step']}: {restored['said'][:500]}"
        problem("otherwise", f"restore: {outcome}, expected {attack.expect}: {said[:700]}")
    mismatch = restored.get("named", "").startswith("MismatchError")
    if sound and outcome != "newest" and not mismatch and not attack.quiet:
        problem("otherwise", f"verify calls sound what restore does not take ({outcome}): "
                f"{(restored.get('named') or restored['said'])[:500]}")  # fmt: skip


def mutated(worker: Worker, theme: str, name: str, mutation: str) -> Figures:
    """What is found with that mutation in the case of that theme and name."""
    number = next(number for number, attack in enumerate(THEMES[theme]) if attack.name == name)
    return judge(theme, THEMES[theme][number], worker.ask(theme, number, "dir", mutation))


def run(
    workers: list[Worker], themes: list[str] | None = None, only: str = "", *, root: str = "dir", every: int = 1
) -> Figures:
    """`root` is the directory's name; each of its characters is one byte. Of every `every` cases one is run."""
    jobs = [(theme, number) for theme in themes or list(THEMES) for number in range(0, len(THEMES[theme]), every)]
    jobs = [(theme, number) for theme, number in jobs if only in THEMES[theme][number].name]
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def one(job: tuple[str, int]) -> Figures:
        worker = free.get()
        try:
            return judge(job[0], THEMES[job[0]][job[1]], worker.ask(*job, root))
        finally:
            free.put(worker)

    total = Figures()
    with ThreadPoolExecutor(len(workers)) as pool:
        for figures in pool.map(one, jobs):
            total.add(figures)
    return total
