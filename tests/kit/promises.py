# SPDX-License-Identifier: Apache-2.0
"""What a job may be restored to after a power cut, from what it said before: `may N` right before it does anything that
can commit step N, `must N` once step N is promised to survive.
"""

from __future__ import annotations

from collections.abc import Iterable

BEGUN = "begun"  # the mark of a log that comes before all of these


def allowed(said: Iterable[str]) -> tuple[int, set[int]]:
    """The step promised last (0: none), and all that a restore may give then: that one, and those begun after it.

    Raises ValueError for a promise of what was not begun.
    """
    begun: list[int] = [0]
    promised = 0
    for line in said:
        word, _, number = line.partition(" ")
        step = int(number)
        if word == "may":
            begun.append(step)
        elif word == "must":
            # Commits are in order, so what was begun before this one can be the newest no more.
            last = len(begun) - 1 - begun[::-1].index(step)
            begun, promised = begun[last:], step
        else:
            raise ValueError(f"neither may nor must: {line!r}")
    return promised, set(begun)


def in_marks(marks: Iterable[str | None]) -> list[str]:
    """What a job said in the marks of a log, where dashes stand for blanks."""
    return [mark.replace("-", " ") for mark in marks if mark is not None and mark.startswith(("may-", "must-"))]
