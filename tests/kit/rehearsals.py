# SPDX-License-Identifier: Apache-2.0
"""How tests start `layerwise rehearse`, and the runs of one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kit.runners import Warm
from layerwise_dist.rehearsal.running import Job

COMMAND = [sys.executable, "-P", "-c", "from layerwise_dist.cli import main; main()", "rehearse"]


def by(warm: Warm) -> Callable[..., Job]:
    """Starts `[SCRIPT, ARGUMENTS...]` without the import of torch."""

    def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Job:
        script, *arguments = command
        return warm.start(script, 0, *arguments, env=environment, folder=log.parent)

    return start
