# SPDX-License-Identifier: Apache-2.0
"""Reports about files that have become durable."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseReport:
    """What a manifest says of a rank's base: who wrote it, sizes in bytes, and the XXH3-64 of its header."""

    attempt: str
    nbytes: int
    header_bytes: int
    header_hash: int


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a rank tells the coordinator once its shard is durable. Sizes in bytes, hash XXH3-64 of the header.

    `base` is the file of frozen parameters that the shard refers to, durable too.
    """

    rank: int
    file: str
    nbytes: int
    header_bytes: int
    header_hash: int
    base: BaseReport | None = None
