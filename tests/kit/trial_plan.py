# SPDX-License-Identifier: Apache-2.0
"""Trials of the soak (tests/soak.py): a job, its launches and what happens to each, drawn from a seed and a number."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kit.matrix import Layout

TOTAL = 12  # steps at most; references are as long
OPTIMIZER = "adamw"

# Each wrapper with its numbers of ranks, and the updates that are exact for it.
UPDATES: dict[str, tuple[str, ...]] = {
    "plain": ("auto", "pipelined_step", "in_backward"), "ddp": ("auto", "pipelined_step", "in_backward"),
    "ddp-zero": ("auto",), "fsdp1-orig": ("auto", "pipelined_step"), "fsdp2": ("auto", "pipelined_step", "in_backward"),
    "zero1": ("auto",), "zero2": ("auto",), "zero3": ("auto",),
}  # fmt: skip
# What fails or is slow: an operation of the file system, on a rank's shard or on the manifest.
SHARD = ("create", "allocate", "write", "sync", "rename", "sync_dir")
MANIFEST = ("create", "write", "sync", "rename")

ENDS = (  # a launch
    "SIGKILL to a rank", "SIGKILL to all", "SIGTERM to a rank", "SIGTERM to the agent", "SIGTERM to all",
    "SIGTERM and SIGKILL",
)  # fmt: skip
MAY_END = ("full disk", "disk error", "connections cut", "SIGKILL to a monitor")  # by an error with a name
GOES_ON = ("SIGSTOP to a rank", "SIGSTOP to all", "slow disk")
IN_JOB = ("disk error", "slow disk", "connections cut")  # what the job does to itself


@dataclass(frozen=True)
class Fault:
    """`step`: so many steps after the newest that is known to be committed; 0 is the launch's start, before a restore.

    `delay_s` goes by after it. `length_s` is how long it lasts. `rule` is one of `broken_disk.armed`, in which
    {step} and {rank} are not yet put in.
    """

    kind: str
    step: int
    rank: int
    delay_s: float = 0.0
    length_s: float = 0.0
    rule: dict[str, Any] = field(default_factory=dict)

    @property
    def in_job(self) -> bool:
        return self.kind in IN_JOB


@dataclass(frozen=True)
class Launch:
    layout: Layout
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Plan:
    seed: int
    number: int
    total: int
    config: dict[str, Any]
    launches: tuple[Launch, ...]

    def __str__(self) -> str:
        config = {key: value for key, value in self.config.items() if key not in ("commit", "preemption")}
        launches = "; ".join(
            f"{each.layout} {', '.join(f'{fault.kind} ({fault.step}, rank {fault.rank})' for fault in each.faults)}"
            for each in self.launches
        )
        return f"trial {self.number} of seed {self.seed}: {self.total} steps, {config}, launches: {launches}"


def draw(seed: int, number: int, wrappers: Sequence[str] = tuple(UPDATES)) -> Plan:
    """The same for the same seed and number, whatever else is tried, and wherever."""
    dice = random.Random(f"{seed} {number}")
    wrapper = dice.choice(wrappers)
    first = Layout(wrapper, 1 if wrapper == "plain" else dice.choice((1, 2, 2, 3)))
    count = dice.choice((2, 2, 3))
    changes = dice.random() < 0.4
    after = dice.randrange(1, count) if changes else count
    monitor = dice.random() < 0.3
    config = {
        "mode": "monitor" if monitor else "direct", "update": dice.choice(UPDATES[wrapper]),
        "capture": dice.choice(("auto", "auto", "stage")), "keep_last": dice.choice((1, 2, 3)),
        "max_in_flight": dice.choice((1, 2, 3)), "when_full": dice.choice(("wait", "wait", "skip")),
        "every_n_steps": dice.choice((1, 1, 1, 2)), "audit": dice.choice(("auto", "always")), "pool_mb": 8,
        "writer": {"block_kb": 4, "backend": dice.choice(("auto", "posix"))},
        # A disk in trouble is no reason to end: what fails is one checkpoint.
        "commit": {"timeout_s": 20.0, "on_failure": "warn", "raise_after": 1000},
        "preemption": {"enabled": True, "grace_s": 10.0, "exit_code": 77},
    }  # fmt: skip
    second = _other(first, dice)
    layouts = [first if place < after else second for place in range(count)]
    launches = [
        Launch(layout, _faults(dice, layout.ranks, monitor, last=place == count - 1))
        for place, layout in enumerate(layouts)
    ]
    return Plan(seed, number, dice.randint(8, TOTAL), config, tuple(launches))


def _other(layout: Layout, dice: random.Random) -> Layout:
    """With another number of ranks. Plain training with more than one is under DDP."""
    if layout.wrapper == "plain":
        return Layout("ddp", dice.choice((2, 3)))
    return Layout(layout.wrapper, dice.choice([ranks for ranks in (1, 2, 3) if ranks != layout.ranks]))


def _faults(dice: random.Random, ranks: int, monitor: bool, *, last: bool) -> tuple[Fault, ...]:
    """Of one launch, in the order of their steps. The last one is to come to its end."""
    if last:
        kinds = [dice.choice(GOES_ON)] if dice.random() < 0.3 else []
    else:
        wounds = [*MAY_END[:2], "SIGKILL to a monitor" if monitor else "connections cut"]
        if not monitor and ranks == 1:
            wounds.remove("connections cut")
        kinds = [dice.choice([*GOES_ON, *wounds])] if dice.random() < 0.6 else []
        kinds += [dice.choice(ENDS)] if not kinds or dice.random() < 0.7 else []
    steps = sorted(dice.choice((0, 1, 2, 3, 4, 5)) for _ in kinds)
    return tuple(_fault(dice, kind, step, ranks) for kind, step in zip(kinds, steps, strict=True))


def _fault(dice: random.Random, kind: str, step: int, ranks: int) -> Fault:
    rank = dice.randrange(ranks)
    if kind == "disk error":
        what = dice.choice(("shard", "shard", "manifest"))
        rule = _rule(dice.choice(SHARD if what == "shard" else MANIFEST), what)
        times = dice.choice((1, 1, 3))
        number = dice.choice((errno.EIO, errno.EIO, errno.ENOSPC, errno.EDQUOT))
        return Fault(kind, max(step, 1), rank, rule={**rule, "errno": number, "times": times})
    if kind == "slow disk":
        rule = _rule(dice.choice(("write", "sync")), "shard")
        return Fault(kind, max(step, 1), rank, rule={**rule, "seconds": dice.uniform(0.05, 0.4)})
    if kind == "connections cut":
        return Fault(kind, step, dice.randrange(1, ranks))
    lengths = {"SIGSTOP to a rank": (0.05, 1.0), "SIGSTOP to all": (0.05, 1.0), "full disk": (0.1, 0.8)}
    length = dice.uniform(*lengths[kind]) if kind in lengths else 0.0
    return Fault(kind, max(step, int(kind == "full disk")), rank, dice.uniform(0.0, 0.08), length)


def _rule(operation: str, what: str) -> dict[str, Any]:
    """A folder is flushed as such, all else is done to a file in it."""
    name = "" if operation == "sync_dir" else "/manifest*" if what == "manifest" else "/rank_{rank:05d}*"
    return {"operation": operation, "pattern": "*/step_{step:010d}-*" + name}
