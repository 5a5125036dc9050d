# SPDX-License-Identifier: Apache-2.0
"""How many steps should lie between checkpoints: from what they cost, and from how often a job fails.

Up to three lower bounds, in steps, and the largest of them holds:

- the budget: what training loses by a checkpoint is at most `max_overhead` of what it takes without. Where failures
  are given and it is not, there is none: with frequent failures it would cost more than it saves;
- the disk: checkpoints begin no faster than it ends them (PCcheck, ASPLOS 2025: write time with N in flight, over N,
  over the step time with its overhead);
- the failures, if their mean distance is given: J. T. Daly, "A higher order estimate of the optimum checkpoint
  interval for restart dumps" (2006), after J. W. Young (1974). Saving more often than that costs more than it saves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_BUDGET = 0.02  # where neither a budget nor failures are given


@dataclass(frozen=True, slots=True)
class Limits:
    """As the configuration's `interval` has them."""

    max_overhead: float | None = None
    mtbf_s: float | None = None
    min_steps: int = 1
    max_steps: int | None = None

    @property
    def budget(self) -> float | None:
        """The largest overhead; None if there is no limit."""
        return DEFAULT_BUDGET if self.max_overhead is None and self.mtbf_s is None else self.max_overhead

    def within(self, steps: int) -> int:
        steps = max(steps, self.min_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True, slots=True)
class Costs:
    """In seconds: `step_s` of a step that no checkpoint slows down; `checkpoint_s` by which one checkpoint makes
    training longer (stalls, and slower steps while it is written); `write_s` from its boundary until it is committed;
    `disk_s` between two commits, where one follows the other as fast as they can: less than `write_s` where several are
    in flight.
    """

    step_s: float
    checkpoint_s: float
    write_s: float
    disk_s: float


@dataclass(frozen=True, slots=True)
class Choice:
    """`steps` between checkpoints, and why."""

    steps: int
    why: str


def choose(costs: Costs, limits: Limits) -> Choice:
    """The interval for these costs. Raises ValueError for a step that takes no time."""
    if not costs.step_s > 0:
        raise ValueError(f"a step takes {costs.step_s} s")
    budget = limits.budget
    disk = costs.disk_s / ((1 + (budget or 0.0)) * costs.step_s)
    said = f"the disk finishes a checkpoint every {seconds(costs.disk_s)}, and a step takes {seconds(costs.step_s)}"
    bounds = [(disk, said)]
    if budget is not None:
        said = (
            f"a checkpoint costs {seconds(costs.checkpoint_s)}, a step takes {seconds(costs.step_s)}, and "
            f"max_overhead is {budget:g}"
        )
        bounds.append((costs.checkpoint_s / (budget * costs.step_s), said))
    if limits.mtbf_s is not None:
        best = optimum_s(costs.checkpoint_s, limits.mtbf_s) / costs.step_s
        bounds.append((best, f"with a failure every {seconds(limits.mtbf_s)} more checkpoints cost more than they save "
                             f"(Young/Daly: one costs {seconds(costs.checkpoint_s)})"))  # fmt: skip
    wanted, why = max(bounds)
    steps = max(1, math.ceil(wanted - 1e-9))
    kept = limits.within(steps)
    if kept != steps:
        name = "min_steps" if kept > steps else "max_steps"
        why = f"{name} is {kept}; otherwise it would be {steps}: {why}"
    return Choice(kept, why)


def optimum_s(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds of training between checkpoints that lose least in all (Daly's estimate of third order)."""
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = checkpoint_s / (2 * mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def overhead(steps: int, costs: Costs) -> float:
    """What checkpoints cost, as a share of training without."""
    return costs.checkpoint_s / (steps * costs.step_s)


def loss_s(steps: int, costs: Costs) -> float:
    """Expected seconds of training that a failure loses: half an interval, and what was not committed yet."""
    return (steps * costs.step_s + costs.checkpoint_s) / 2 + costs.write_s


def seconds(value: float) -> str:
    """Three digits: ``12.3 ms``, ``4.56 s``, ``3.00 h``."""
    for unit, scale in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if value >= scale * (1 if unit == "s" else 2):
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e3:.3g} ms"
