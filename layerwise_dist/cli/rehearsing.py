# SPDX-License-Identifier: Apache-2.0
"""`layerwise rehearse`: the user's own command, run, killed, resumed, and compared. Imports torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from layerwise_dist.cli.catalogue import WrongUsage
from layerwise_dist.cli.console import Answer
from layerwise_dist.errors import DamageError
from layerwise_dist.rehearsal.running import Process, RunFailed, Start
from layerwise_dist.rehearsal.trial import Trial, Unfit, Verdict

_LISTED = 10
EXIT = {"exact": 0, "differs": 1, "failed": 3, "nondeterministic": 4}


def rehearse(
    command: Sequence[str], directory: str, *, steps: int, kill_at: int | None, timeout_s: float, keep: bool,
    start: Start = Process,
) -> Answer:  # fmt: skip
    """Raises WrongUsage for a command that can't be started, a directory that can't be written, or steps that don't fit
    the script.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.1f} s  {text}", file=sys.stderr, flush=True)

    try:
        trial = Trial(
            command, directory, steps=steps, kill_at=steps // 2 if kill_at is None else kill_at, timeout_s=timeout_s,
            say=say, start=start,
        )  # fmt: skip
        verdict, kept = trial.run(keep=keep)
    except Unfit as error:
        raise WrongUsage(str(error)) from None
    except OSError as error:
        raise WrongUsage(f"cannot rehearse {command[0]} in {directory}: {error}") from None
    except RunFailed as error:
        return _failed(str(error), "nothing could be compared: the script itself failed", error.kept)
    except DamageError as error:  # which is no difference between two runs
        return _failed(str(error), "the runs could not be compared: a checkpoint is damaged", None)
    return told(verdict, kept, time.monotonic() - began)


def _failed(error: str, why: str, kept: str | None) -> Answer:
    data = {"verdict": "failed", "good": False, "error": error, "kept": kept}
    parts: list[Any] = [error, why] if kept is None else [error, why, f"kept: {kept}"]
    return Answer(data, parts, False, EXIT["failed"])


def told(verdict: Verdict, kept: str | None, seconds: float) -> Answer:
    reason = verdict.reason
    data: dict[str, Any] = {
        "verdict": verdict.kind, "good": verdict.kind == "exact", "step": verdict.step, "rank": verdict.rank,
        "where": verdict.where, "reason": None if reason is None else vars(reason), "restored": verdict.restored,
        "compared": verdict.compared, "ranks": verdict.ranks, "notes": verdict.notes, "kept": kept, "seconds": seconds,
    }  # fmt: skip
    parts: list[Any] = []
    if reason is None:
        parts.append(
            f"exact: killed, and resumed after step {verdict.restored}, the script continues bit for bit as if it "
            f"had not been interrupted ({verdict.compared} pairs of checkpoints are equal; world size {verdict.ranks})"
        )
    else:
        rank = "" if verdict.rank is None else f", rank {verdict.rank}"
        what = "the resumed run differs" if verdict.kind == "differs" else "two uninterrupted runs differ"
        parts.append(f"{what} first at step {verdict.step}{rank}")
        parts += [f"  {name}" for name in verdict.where[:_LISTED]]
        if len(verdict.where) > _LISTED:
            parts.append(f"  and {len(verdict.where) - _LISTED} more (--json)")
        parts += [f"likeliest reason: {reason.text}", f"what to do: {reason.advice}"]
    parts += [f"note: {note}" for note in verdict.notes]
    if kept is not None:
        parts.append(f"kept: {kept}")
    return Answer(data, parts, verdict.kind == "exact", EXIT[verdict.kind])
