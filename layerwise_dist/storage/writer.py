# SPDX-License-Identifier: Apache-2.0
"""Makes the writer of shards that a configuration asks for, in whichever process it runs."""

from __future__ import annotations

from layerwise_dist import _native
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.recycling import recycles
from layerwise_dist.supervision import background
from layerwise_dist.supervision.patience import DISK_SHARE


def open_writer(
    env: _native.Env, config: LayerwiseConfig, rank: int, world_size: int, failed: background.Failed
) -> PCCheckAdapter:
    """`failed` as `PCCheckAdapter`'s. Raises ConfigError or OSError."""
    return PCCheckAdapter(
        env, config.path, rank=rank, world_size=world_size, backend=config.writer.backend,
        queue_depth=config.writer.queue_depth, block_bytes=config.writer.block_kb << 10,
        direct_io=config.writer.direct_io == "auto", hash=config.hash, file_mode=config.file_bits,
        dir_mode=config.dir_bits, patience_s=DISK_SHARE * config.commit.timeout_s,
        reads=config.reader.direct_io,
        spares=config.max_in_flight + 1 if recycles(env, config.path, config.writer.recycle) else 0,
        failed=failed,
    )  # fmt: skip
