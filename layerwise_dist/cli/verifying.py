# SPDX-License-Identifier: Apache-2.0
"""`layerwise verify`: reads every byte of checkpoints and compares it with what was committed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import RenderableType

from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.console import Answer, damaged, row, size, table
from layerwise_dist.cli.progress import bytes_bar
from layerwise_dist.commit.opening import unusable
from layerwise_dist.commit.records import BaseRecord, Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.reader import Shard

_STYLE = {"sound": "green", "not hashed": "yellow", "damaged": "bold red", "retired": "dim"}


def verify(catalogue: Catalogue, step: int | None = None, tag: str | None = None) -> Answer:
    """Bad when anything is not what was committed, or cannot be read. Without `step` or `tag`, all checkpoints are
    read.

    Of a checkpoint written with `hash: false` sizes, header and state are checked; its tensors are only read, and said
    to be not hashed: nothing tells whether they are what was written.
    """
    everything = step is None and tag is None
    if everything:
        manifests = sorted(catalogue.inventory.manifests.values(), key=lambda manifest: -manifest.seq)
        records = dict(catalogue.damaged_records)
    else:
        manifests = [catalogue.chosen(step, tag)]
        records = {
            name: damage
            for name, damage in catalogue.inventory.damaged.items()
            if (attempt := filenames.parse_folder(name)) is not None and attempt.step == manifests[0].step
        }
    odd = catalogue.odd_commits() if everything else {}
    records |= {**odd, **unusable(catalogue.manager, catalogue.inventory)}
    from layerwise_dist.cli.restorable import unrestorable  # torch comes along, of whose tensors state is made

    began = time.monotonic()
    bases = {(rank, base): base.nbytes for manifest in manifests for rank, base in catalogue.bases_here(manifest)}
    total = sum(record.nbytes for manifest in manifests for record in catalogue.here(manifest)) + sum(bases.values())
    with bytes_bar("verifying", total) as advance:
        found = _Verifier(catalogue, advance, unrestorable)
        results = [found.look(manifest) for manifest in manifests]
    seconds = time.monotonic() - began

    # What checkpoints share is damaged once.
    damage = list(dict.fromkeys([*records.values(), *(line for result in results for line in result["damage"])]))
    nbytes = sum(result["bytes"] for result in results) + sum(bases.values())
    data = {
        "dir": catalogue.root, "good": not damage, "checkpoints": results,
        "bases": found.told(), "damaged_records": [{"name": name, "damage": text} for name, text in records.items()],
        "bytes": nbytes, "seconds": seconds, "odd": catalogue.inventory.odd,
    }  # fmt: skip
    if not manifests and not records:
        return Answer(data, [f"{catalogue.root}: no committed checkpoints to verify", *catalogue.odd()])
    shown = table("step", "seq", "status", "ranks", "size", "result", right=("step", "seq", "ranks", "size"))
    for result in results:
        ranks, whole = result["ranks_here"], result["ranks"]
        cells = (result["step"], result["seq"], result["status"], whole if ranks == whole else f"{ranks} of {whole}")
        row(shown, *cells, size(result["bytes"]), result["result"], style=_STYLE[result["result"]])
    parts: list[RenderableType] = [f"Verified in {catalogue.root}", shown, *damaged(damage)]
    elsewhere = [result["step"] for result in results if result["ranks_here"] < result["ranks"]]
    if elsewhere:
        parts.append(
            f"of step(s) {_listed(elsewhere)} only some ranks' shards lie here: whether they hold every tensor "
            "together was not checked"
        )
    unhashed = [str(result["step"]) for result in results if result["result"] == "not hashed"]
    if unhashed:
        parts.append(f"data not hashed: damage to tensors of step(s) {', '.join(unhashed)} cannot be detected")
    verdict = f"{len(damage)} damages found" if damage else "no damage found" if unhashed else "all sound"
    for base in data["bases"]:
        if base["damage"]:
            parts.append(f"base {base['attempt']} of rank {base['rank']} is needed by step(s) {_listed(base['steps'])}")
    parts += catalogue.odd()
    parts.append(f"{size(nbytes)} read in {seconds:.1f} s; {verdict}")
    return Answer(data, parts, good=not damage)


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


class _Verifier:
    """Looks at checkpoints; at what several of them refer to, once."""

    def __init__(
        self, catalogue: Catalogue, advance: Callable[[int], None], unrestorable: Callable[..., list[str]]
    ) -> None:
        self._catalogue, self._advance, self._unrestorable = catalogue, advance, unrestorable
        self._bases: dict[tuple[int, BaseRecord], list[str]] = {}  # damage, by rank and record
        self._steps: dict[tuple[int, BaseRecord], list[int]] = {}

    def look(self, manifest: Manifest) -> dict[str, Any]:
        catalogue, damage, hashed = self._catalogue, list[str](), True
        here, bases = catalogue.here(manifest), catalogue.bases_here(manifest)
        with catalogue.shards(manifest) as opener:
            for record in here:
                path = catalogue.manager.shard_path(manifest, record.rank)
                problems, full = _read(path, partial(opener.open, record.rank))
                damage += problems
                hashed &= full
                self._advance(record.nbytes)
            for rank, base in bases:
                if (rank, base) not in self._bases:
                    path = catalogue.manager.base_path(base.attempt, rank)
                    self._bases[rank, base], _ = _read(path, partial(opener.open_base, rank))
                    self._advance(base.nbytes)
                damage += self._bases[rank, base]
                self._steps.setdefault((rank, base), []).append(manifest.step)
            damage += self._unrestorable(manifest, here, opener)
        damage = list(dict.fromkeys(damage))
        result = "damaged" if damage else "sound" if hashed else "not hashed"
        if damage and not catalogue.still_there(manifest):
            damage, result = [], "retired"  # a job that runs removed it meanwhile
        return {
            "step": manifest.step, "seq": manifest.seq, "attempt": manifest.attempt,
            "status": catalogue.status(manifest),
            "ranks": manifest.world_size, "ranks_here": len(here), "bytes": sum(record.nbytes for record in here),
            "base_bytes": sum(base.nbytes for _, base in bases),
            "folder": manifest.attempt_id.folder, "result": result, "damage": damage,
        }  # fmt: skip

    def told(self) -> list[dict[str, Any]]:
        """Of each base, by rank: what is wrong with it, and the steps of the checkpoints that need it."""
        return [
            {"attempt": base.attempt, "rank": rank, "bytes": base.nbytes, "damage": damage,
             "steps": sorted(set(self._steps[rank, base]))}
            for (rank, base), damage in self._bases.items()
        ]  # fmt: skip


def _read(path: str, open_it: Callable[[], Shard | None]) -> tuple[list[str], bool]:
    """(what is damaged in one file, whether it is hashed)."""
    try:
        shard = open_it()
        assert shard is not None, "the manifest names it"
        return shard.verify(), shard.index.hashed
    except DamageError as error:
        return [str(error)], True
    except OSError as error:
        return [f"shard {path}: cannot be read: {error}"], True
