# SPDX-License-Identifier: Apache-2.0
"""Which of several cases a plain run tries; with --long all are tried."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")
# Of a run, for workers too, which inherit it. LAYERWISE_TEST_SEED=N draws what the run has drawn that told this number.
SEED = int(os.environ.setdefault("LAYERWISE_TEST_SEED", str(random.SystemRandom().randrange(10**6))))


def drawn(cases: Sequence[Case], of: str) -> Case:
    """One of these, another one in the next run. `of` is what they are cases of: each draw is its own."""
    return random.Random(f"{SEED} {of}").choice(cases)
