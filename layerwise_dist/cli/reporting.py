# SPDX-License-Identifier: Apache-2.0
"""`layerwise report`: one page about a run, from its events, its manifests and the headers of its newest checkpoint."""

from __future__ import annotations

import os
import time

from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.cli.console import Answer, size
from layerwise_dist.cli.watching import reader_of
from layerwise_dist.errors import DamageError
from layerwise_dist.report.facts import Branch, Commit, Facts
from layerwise_dist.report.page import render

_CUT = "event files too long to read whole: {}; only the newest events of each are included"


def report(directory: str, out: str, events: str | None, *, force: bool) -> Answer:
    """Raises WrongUsage if OUT already exists."""
    catalogue = Catalogue(directory)
    if not force and os.path.lexists(out):
        raise WrongUsage(f"{out}: already exists: choose another name, or give --force")
    reader = reader_of(catalogue.root, events)
    told = reader.poll(all_ranks=True)
    layers, problems = _layers(catalogue)
    facts = Facts(
        catalogue.root, time.time(), told, _commits(catalogue),
        [
            Branch(seq, record.parent.seq if record.parent else None)
            for seq, record in sorted(catalogue.inventory.branches.items())
        ],
        layers, [*sorted(catalogue.damaged_records.values()), *problems], _CUT.format(reader.cut) if reader.cut else "",
    )  # fmt: skip
    page = render(facts).encode(errors="replace")
    _write(out, page)
    said = f"{out}: {size(len(page))}, from {len(told)} events and {len(facts.commits)} checkpoints"
    parts = [said, f"{reader.skipped} lines skipped: not events of this version"] if reader.skipped else [said]
    if reader.cut:
        parts.append(_CUT.format(reader.cut))
    data = {"out": os.path.abspath(out), "bytes": len(page), "events": len(told), "checkpoints": len(facts.commits),
            "skipped_lines": reader.skipped, "cut_files": reader.cut}  # fmt: skip
    return Answer(data, [*parts])


def _commits(catalogue: Catalogue) -> list[Commit]:
    lineage = [each.seq for each in catalogue.lineage]
    known = set(lineage)

    def status(seq: int) -> str:
        return "abandoned" if seq not in known else "newest" if seq == lineage[0] else "lineage"

    return [
        Commit(
            each.seq, each.step, each.created, each.nbytes, each.branch, each.parent.seq if each.parent else None,
            status(each.seq), each.tag,
        )
        for _, each in sorted(catalogue.inventory.manifests.items())
    ]  # fmt: skip


def _layers(catalogue: Catalogue) -> tuple[dict[str, int], list[str]]:
    """Bytes by layer of the newest checkpoint, on all ranks that are here; and what can't be read."""
    layers: dict[str, int] = {}
    problems: list[str] = []
    if not catalogue.lineage:
        return layers, problems
    manifest = catalogue.lineage[0]
    with catalogue.shards(manifest) as opener:
        for record in catalogue.here(manifest):
            try:
                opened = [opener.open(record.rank)]
                if (base := opener.open_base(record.rank)) is not None:
                    opened.append(base)
            except (DamageError, FileNotFoundError) as error:
                if catalogue.still_there(manifest):  # else a job has retired it while this reads
                    problems.append(str(error))
                continue
            for shard in opened:
                for entry in shard.index.entries.values():
                    layer = entry.slice.fqn.rpartition(".")[0]
                    layers[layer] = layers.get(layer, 0) + entry.end - entry.begin
    return layers, problems


def _write(out: str, page: bytes) -> None:
    """Whole under its name, or not at all; a link of that name is replaced, not followed."""
    partial = f"{out}.{os.getpid()}.partial"
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(file, "wb") as into:
            into.write(page)
        os.replace(partial, out)
    except BaseException:
        os.unlink(partial)
        raise
