# SPDX-License-Identifier: Apache-2.0
"""One rank's vote in an agreement: a value, or an error that the others then raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layerwise_dist import errors
from layerwise_dist.commit.messages import DescribedError, Outcome
from layerwise_dist.errors import CommitError, LayerwiseError
from layerwise_dist.supervision.patience import within


def tried(timeout_s: float, what: str, action: Callable[[], object]) -> Outcome:
    """What `action`, which waits for a disk, returns or raises, as a vote: ``value`` or ``error``.

    A DeadlineError, which names `what`, where it takes longer than `timeout_s` seconds. Any exception is a vote: the
    other ranks wait for one.
    """
    try:
        return {"value": within(timeout_s, what, action)}
    except Exception as error:
        return {"error": describe_error(error)}


def describe_error(error: Exception) -> DescribedError:
    """An error as a message can carry it; `rebuild_error` makes it again on another rank."""
    described: DescribedError = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, errors.StateError):
        described["path"] = error.path
        described["message"] = str(error).removeprefix(f"{errors.shown(error.path)}: ")
    elif isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        described["errno"] = error.errno
        described["message"] = f"{error.strerror}{where}"
    return described


def rebuild_error(described: DescribedError) -> Exception:
    kind = getattr(errors, described["type"], None)
    message = described["message"]
    if kind is errors.StateError:
        return errors.StateError(described["path"], message)
    if isinstance(kind, type) and issubclass(kind, LayerwiseError):
        return kind(message)
    if "errno" in described:
        return OSError(described["errno"], message)  # Python picks PermissionError and the like by the number
    return CommitError(f"{described['type']}: {message}")


def values(votes: list[Outcome]) -> list[Any]:
    """What the ranks said (`tried`). Raises the first rank's error as it is."""
    found = []
    for vote in votes:
        if "error" in vote:
            raise rebuild_error(vote["error"])
        found.append(vote["value"])
    return found
