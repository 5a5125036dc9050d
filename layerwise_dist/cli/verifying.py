"""`layerwise verify`: reads every byte of checkpoints and compares it with what was committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.console import Answer, row, size, table
from layerwise_dist.commit.metadata import Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import layout

_STYLE = {"sound": "green", "not hashed": "yellow", "damaged": "bold red", "retired": "dim"}


def verify(catalogue: Catalogue, step: int | None) -> Answer:
    """Bad when anything is not what was committed, or cannot be read. Without `step`, all checkpoints are read.

    Of a checkpoint written with `hash: false` sizes, header and state are checked; its tensors are only read, and said
    to be not hashed: nothing tells whether they are what was written.
    """
    if step is None:
        manifests = sorted(catalogue.inventory.manifests.values(), key=lambda manifest: -manifest.seq)
        records = dict(catalogue.inventory.damaged)
    else:
        manifests = [catalogue.of_step(step)]
        records = {
            name: damage
            for name, damage in catalogue.inventory.damaged.items()
            if (attempt := layout.parse_folder(name)) is not None and attempt.step == step
        }
    began = time.monotonic()
    with _progress(sum(manifest.nbytes for manifest in manifests)) as advance:
        results = [_verify_one(catalogue, manifest, advance) for manifest in manifests]
    seconds = time.monotonic() - began

    damage = [*records.values(), *(line for result in results for line in result["damage"])]
    nbytes = sum(result["bytes"] for result in results)
    data = {
        "dir": catalogue.root, "good": not damage, "checkpoints": results,
        "damaged_records": [{"name": name, "damage": text} for name, text in records.items()],
        "bytes": nbytes, "seconds": seconds,
    }  # fmt: skip
    if not manifests and not records:
        return Answer(data, [f"{catalogue.root}: no committed checkpoints to verify"])
    shown = table("step", "seq", "status", "ranks", "size", "result", right=("step", "seq", "ranks", "size"))
    for result in results:
        ranks, whole = result["ranks_here"], result["ranks"]
        cells = (result["step"], result["seq"], result["status"], whole if ranks == whole else f"{ranks} of {whole}")
        row(shown, *cells, size(result["bytes"]), result["result"], style=_STYLE[result["result"]])
    parts: list[Any] = [f"Verified in {catalogue.root}", shown, *(f"damaged: {line}" for line in damage)]
    unhashed = [str(result["step"]) for result in results if result["result"] == "not hashed"]
    if unhashed:
        parts.append(f"data not hashed: whether the tensors of step(s) {', '.join(unhashed)} are sound cannot be told")
    verdict = f"{len(damage)} damages found" if damage else "no damage found" if unhashed else "all sound"
    parts.append(f"{size(nbytes)} read in {seconds:.1f} s; {verdict}")
    return Answer(data, parts, good=not damage)


def _verify_one(catalogue: Catalogue, manifest: Manifest, advance: Callable[[int], None]) -> dict[str, Any]:
    damage: list[str] = []
    hashed = True
    here = catalogue.here(manifest)
    with catalogue.shards(manifest) as opener:
        for record in here:
            try:
                shard = opener.open(record)
                hashed &= shard.index.hashed
                damage += shard.verify()
            except DamageError as error:
                damage.append(str(error))
            except OSError as error:
                damage.append(f"shard {catalogue.manager.shard_path(manifest, record.rank)}: cannot be read: {error}")
            advance(record.nbytes)
    result = "damaged" if damage else "sound" if hashed else "not hashed"
    if damage and not catalogue.still_there(manifest):
        damage, result = [], "retired"  # a job that runs removed it meanwhile
    return {
        "step": manifest.step, "seq": manifest.seq, "attempt": manifest.attempt, "status": catalogue.status(manifest),
        "ranks": manifest.world_size, "ranks_here": len(here), "bytes": sum(record.nbytes for record in here), "folder": manifest.attempt_id.folder,
        "result": result, "damage": damage,
    }  # fmt: skip


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while a person watches; it is gone when the result is printed."""
    console = Console(stderr=True)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verify", total=total)
        yield lambda nbytes: progress.update(task, advance=nbytes)
