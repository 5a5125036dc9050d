# SPDX-License-Identifier: Apache-2.0
"""This package as a storage of `torch.distributed.checkpoint`.

    dcp.save(state, storage_writer=layerwise_dist.dcp.LayerwiseWriter("checkpoints"))
    dcp.load(state, storage_reader=layerwise_dist.dcp.LayerwiseReader("checkpoints"))

docs/integrations/interop.md has the rest.
"""

from __future__ import annotations

from layerwise_dist.dcp.reader import LayerwiseReader
from layerwise_dist.dcp.writer import LayerwiseWriter

__all__ = ["LayerwiseReader", "LayerwiseWriter"]
