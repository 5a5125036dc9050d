# SPDX-License-Identifier: Apache-2.0
"""Short hashes of what jobs hold, for comparison with what others held at the same step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def digest(values: Iterable[Any]) -> str:
    """Of tensors (of sharded ones this rank's part), with dtype and shape, and of anything else by its repr."""
    seen = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            here = value.detach()
            here = here.to_local() if isinstance(here, DTensor) else here
            seen.update(f"{here.dtype} {list(here.shape)}:".encode())
            seen.update(here.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            seen.update(f"{value!r}:".encode())
    return seen.hexdigest()[:24]
