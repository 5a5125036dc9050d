# SPDX-License-Identifier: Apache-2.0
"""A disk on which drawn operations fail or are slow, for a job and for its monitor.

broken_disk.py RULES SOCKET MEMORY PID      a monitor with such a disk; RULES as `armed` takes them, in JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import layerwise_native_testing as testing

from layerwise_dist import _native


def armed(env: _native.Env, rules: Sequence[dict[str, Any]]) -> testing.FaultEnv:
    """`env` with rules {"operation", "pattern"} and either {"errno", "times"} or {"seconds"}."""
    broken = testing.FaultEnv(env)
    for rule in rules:
        if "seconds" in rule:
            broken.delay(rule["operation"], rule["pattern"], rule["seconds"])
        else:
            broken.fail(
                operation=rule["operation"], path_pattern=rule["pattern"], errno=rule["errno"], times=rule["times"]
            )
    return broken


if __name__ == "__main__":
    from layerwise_dist.monitor.__main__ import main

    _rules, _sound = json.loads(sys.argv.pop(1)), _native.PosixEnv
    _native.PosixEnv = lambda: armed(_sound(), _rules)  # type: ignore[misc, assignment]
    main()
