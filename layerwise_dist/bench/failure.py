# SPDX-License-Identifier: Apache-2.0
"""The errors of a benchmark that could not measure what it was asked to."""

from __future__ import annotations

from collections.abc import Iterable


class BenchFailed(Exception):
    """A process that was to be measured ended badly; says with what."""


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Of a name that an option does not know."""
    return ValueError(f"{what} {name!r}: choose from {', '.join(known)}")
