# SPDX-License-Identifier: Apache-2.0
"""Calls that may never return, such as to a stuck disk: awaited up to a deadline, then named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from layerwise_dist import _native
from layerwise_dist.errors import DeadlineError, named
from layerwise_dist.supervision import background

T = TypeVar("T")

# Of commit.timeout_s, for one rank's disk: what it says is heard before the others' time is up.
DISK_SHARE = 0.5

_LEAST_S = 0.2  # what is younger need not be stuck
_LISTED = 3


def stuck_calls() -> str:
    """The calls to the operating system that have not returned for long, in brackets, to end a sentence with."""
    found = [(name, path, seconds) for name, path, seconds in _native.calls_under_way() if seconds >= _LEAST_S]
    if not found:
        return ""
    said = [f"{name} {path}".rstrip() + f" for {seconds:.1f} s" for name, path, seconds in found]
    return f" (calls that have not returned: {named(said, _LISTED)})"


def within(timeout_s: float, what: str, action: Callable[[], T]) -> T:
    """Runs `action` on a thread of its own, and returns or raises what it does.

    Raises DeadlineError after `timeout_s` seconds. It then continues in the background, and what it returns or
    raises is lost.
    """
    value: list[T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            value.append(action())
        except BaseException as raised:
            error.append(raised)

    background.start("layerwise-within", run, background.log_only).join(timeout_s)
    if error:
        raise error[0]
    if not value:
        raise DeadlineError(f"{what} did not end within {timeout_s:g} s{stuck_calls()}")
    return value[0]
