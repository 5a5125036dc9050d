# SPDX-License-Identifier: Apache-2.0
"""Checks, without a model, whether a restore would take a commit. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise_dist.cli.catalogue import ShardOpener
from layerwise_dist.commit.records import OF_DCP, Manifest, ShardRecord
from layerwise_dist.dcp.metadata import contradictions
from layerwise_dist.errors import DamageError
from layerwise_dist.restore import contents
from layerwise_dist.restore.sealed_state import SealedState
from layerwise_dist.storage.reader import Entry


def unrestorable(manifest: Manifest, here: Sequence[ShardRecord], opener: ShardOpener) -> list[str]:
    """What a restore would not take of the shards that are `here`, found by what a restore finds it by.

    Whether all shards together hold every tensor whole is looked at only where all of them are here.
    """
    if manifest.framework == OF_DCP:
        return _unloadable(manifest, here, opener)
    problems: list[str] = []
    entries: dict[int, dict[str, Entry]] = {}
    sealed: dict[int, SealedState] = {}
    for record in here:
        try:
            base = opener.open_base(record.rank)
            held = contents.read([opener.open(record.rank), *([base] if base else [])], manifest.framework)
        except DamageError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"rank {record.rank} of step {manifest.step}: cannot be read: {error}")
        else:
            entries[record.rank] = {name: entry for name, (_, entry) in held.entries.items()}
            sealed[record.rank] = held.sealed
    if len(sealed) == manifest.world_size:
        problems += contents.lacking(manifest, entries, sealed)
    return problems


def _unloadable(manifest: Manifest, here: Sequence[ShardRecord], opener: ShardOpener) -> list[str]:
    """The same of what `dcp.save()` wrote, and `dcp.load()`."""
    try:
        return contradictions(manifest, {record.rank: opener.open(record.rank) for record in here})
    except DamageError as error:
        return [str(error)]
    except OSError as error:
        return [f"step {manifest.step}: cannot be read: {error}"]
