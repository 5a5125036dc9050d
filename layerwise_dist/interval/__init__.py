# SPDX-License-Identifier: Apache-2.0
"""How many steps should lie between checkpoints. Pure: no clock, no I/O; others measure.

`choose` says it for given costs (rule.py); `Pace` follows a job that runs (pace.py).
"""

from layerwise_dist.interval.pace import FIRST, FIRST_OF_FAILING, Pace
from layerwise_dist.interval.rule import Choice, Costs, Limits, choose, loss_s, optimum_s, overhead, seconds

__all__ = [
    "FIRST", "FIRST_OF_FAILING", "Choice", "Costs", "Limits", "Pace", "choose", "loss_s", "optimum_s", "overhead",
    "seconds",
]  # fmt: skip
