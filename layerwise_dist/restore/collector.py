# SPDX-License-Identifier: Apache-2.0
"""Lets Python's collector of cycles rest."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting() -> Iterator[None]:
    """While many objects are made, and none is in a cycle: looking through all that a training has for one takes
    as long as the rest of a restore.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
