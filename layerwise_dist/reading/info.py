# SPDX-License-Identifier: Apache-2.0
"""What is known of a tensor in an open checkpoint before it is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        name: `<kind>/<fqn>`.
        kind: `param`, `master` (the fp32 copy that DeepSpeed saves in a parameter's place), `buffer`, or the
            optimizer's name for a tensor of its state: `exp_avg`.
        fqn: the parameter's or buffer's name in the model; of several models it begins with the model's name.
        dtype, shape, nbytes: of the global tensor.
        aliases: other names of the same parameter, where it is tied.
        copies: the ranks of each tensor under this name; several where ranks have one each, such as a counter.
    """

    name: str
    kind: str
    fqn: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    aliases: tuple[str, ...]
    copies: tuple[tuple[int, ...], ...]
