# SPDX-License-Identifier: Apache-2.0
"""`layerwise selftest`: two ranks, kill, resume, compare."""

from __future__ import annotations

import sys
import time
from typing import Any

from layerwise_dist.cli.catalogue import WrongUsage
from layerwise_dist.cli.console import Answer, row, table


def selftest(directory: str, *, seed: int | None) -> Answer:
    """Bad when a check is. Raises WrongUsage for a directory that cannot be written."""
    from layerwise_dist.selftest import Check, Trial, TrialFailed

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.1f} s  {text}", file=sys.stderr, flush=True)

    try:
        trial = Trial(directory, say=say, seed=seed)
        checks = trial.run()
    except OSError as error:
        raise WrongUsage(f"cannot write in {directory}: {error}") from None
    except TrialFailed as error:
        checks = [Check("the jobs run", False, str(error))]
    seconds = time.monotonic() - began
    shown = table("", "check", "what was found", folded=("what was found",))
    for check in checks:
        row(shown, "ok" if check.good else "bad", check.what, check.found)
    good = all(check.good for check in checks)
    verdict = "it works on this machine" if good else "it does NOT work on this machine"
    data: dict[str, Any] = {"good": good, "seconds": seconds, "checks": [vars(check) for check in checks]}
    return Answer(data, [shown, f"{verdict} ({seconds:.0f} s)"], good=good)
