# SPDX-License-Identifier: Apache-2.0
"""Which of several cases a plain run tries; with --long all are tried."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)  # all workers of a run have the same


def drawn(cases: Sequence[Case], of: str) -> Case:
    """One of these, another one in the next run. `of` is what they are cases of: each draw is its own."""
    return random.Random(f"{_RUN} {of}").choice(cases)
