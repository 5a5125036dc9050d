# SPDX-License-Identifier: Apache-2.0
"""What `layerwise rehearse` tells `attach()` in the processes that it starts: a variable names a file that says all.

One file is there as a whole or not at all, passes through every launcher, and is gone when the rehearsal is over. So a
variable that was left behind is an error, and never a training run that stops or dies unasked.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from layerwise_dist import _native
from layerwise_dist.errors import ConfigError
from layerwise_dist.storage.schemas import Schema, Unfit, fits

VARIABLE = "LAYERWISE_REHEARSAL"
ALL = 1 << 30  # checkpoints that are kept
_LONGEST = 1 << 16  # bytes


def _absolute(path: str) -> str:
    if not os.path.isabs(path) or "\0" in path:
        raise ValueError("not an absolute path")
    return path


_Folder = Annotated[str, AfterValidator(_absolute)]
_Step = Annotated[int, Field(ge=1, lt=1 << 40)]


class Plan(Schema):
    """One run of a rehearsal.

    Attributes:
        checkpoints: what would be saved in a directory is saved in one of its own below this folder.
        told: folder in which each rank records what it does and sees.
        every: each step that is a multiple of this is saved, and nothing is removed.
        stop_at: the step at whose end the processes end, once it is committed.
        kill_after: None, or: once this step or a later one is committed and another iteration is over, each rank says
            so and waits to be killed.
        timeout_s: how long it waits, and for commits, in seconds.
    """

    version: Literal[1] = 1
    checkpoints: _Folder
    told: _Folder
    every: _Step
    stop_at: _Step
    kill_after: _Step | None
    timeout_s: float = Field(gt=0)

    def place_of(self, directory: str) -> str:
        """Where what a script saves in `directory` goes instead."""
        return os.path.join(self.checkpoints, name_of(directory))

    def told_by(self, directory: str, rank: int) -> str:
        """The file in which a rank tells about what it saves there."""
        return os.path.join(self.told, f"{name_of(directory)}.{rank}.jsonl")


def name_of(directory: str) -> str:
    return f"{_native.xxh3_64(os.fsencode(os.path.realpath(directory))):016x}"


def told() -> Plan | None:
    """The plan that this process was given; None outside a rehearsal. Raises ConfigError."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return None
    try:
        return fits(Plan, _read(path), VARIABLE)
    except (OSError, ValueError, Unfit) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"the environment has {VARIABLE}={path!r}, which `layerwise rehearse` sets for the processes that it "
            f"starts, and that file is not what it writes: {why}. Unset the variable: a training needs none"
        ) from None


def redirected(directory: str) -> str:
    """Where what is saved in `directory` goes: there, or in a rehearsal, to a folder of that. Raises ConfigError."""
    plan = told()
    return directory if plan is None else plan.place_of(directory)


def _read(path: str) -> Any:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise ValueError("it belongs to another user, or others may write it")
        text = file.read(_LONGEST + 1)
    if len(text) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} bytes")
    return json.loads(text)
