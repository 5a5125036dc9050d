# SPDX-License-Identifier: Apache-2.0
"""`layerwise prune`: removes old checkpoints by retention's rules, where no job runs."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType

from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.cli.console import Answer, Beneath, size
from layerwise_dist.cli.progress import count_bar
from layerwise_dist.commit.pruning import Kept, Plan, Pruning, plan
from layerwise_dist.commit.records import Manifest
from layerwise_dist.config import LayerwiseConfig, load_config

_GOES = {"goes": "yellow", "removed": "yellow", "stays": "green"}


def kept(
    config: str | None, keep_last: int | None, keep_every: int | None, keep_tags: int | None, *, certain: bool
) -> Kept:
    """What was asked for, before what a job's configuration says. `certain`: it must have been said how many stay.

    Raises WrongUsage or ConfigError.
    """
    if certain and config is None and keep_last is None:
        raise WrongUsage("how many to keep? --yes needs --keep-last, or --config with the job's configuration")
    said = load_config(config) if config is not None else LayerwiseConfig()
    return Kept(
        said.keep_last if keep_last is None else keep_last,
        said.keep_every_n_steps if keep_every is None else keep_every,
        said.keep_tags if keep_tags is None else keep_tags,
    )


def prune(catalogue: Catalogue, rules: Kept, *, yes: bool) -> Answer:
    """Without `yes`, only says what would go. Raises LayerwiseError or OSError; KeyboardInterrupt that says how far it
    came.
    """
    bases = {base["attempt"]: base["bytes"] for base in catalogue.bases()}
    if not yes:
        found = plan(catalogue.manager, catalogue.inventory, rules)
        return _told(catalogue, found, rules, {name: bases.get(name, 0) for name in found.bases}, {}, done=False)
    pruning = Pruning(catalogue.manager, rules)
    removed: list[Manifest] = []
    try:
        with count_bar("removing", len(pruning.plan.going)) as advance:

            def note(manifest: Manifest) -> None:
                removed.append(manifest)
                advance(1)

            try:
                stays = pruning.run(note)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted: {len(removed)} of {len(pruning.plan.going)} checkpoints were removed, each "
                    "completely; the rest is untouched"
                ) from None
    finally:
        pruning.close()
    for name in catalogue.manager.bases():
        bases.pop(name, None)  # it stayed
    return _told(catalogue, pruning.plan, rules, bases, stays, done=True)


def _told(
    catalogue: Catalogue, found: Plan, rules: Kept, bases: dict[str, int], stays: dict[int, str], *, done: bool
) -> Answer:  # fmt: skip
    why = {**found.staying, **stays}
    going = [manifest for manifest in found.going if manifest.seq not in stays]
    manifests = [*going, *(m for seq, m in catalogue.inventory.manifests.items() if seq in why)]
    entries: list[dict[str, Any]] = [
        {
            "step": manifest.step, "seq": manifest.seq, "tag": manifest.tag, "folder": manifest.attempt_id.folder,
            "bytes": manifest.nbytes, "verdict": "stays" if manifest.seq in why else "removed" if done else "goes",
            "why": why.get(manifest.seq),
        }
        for manifest in sorted(manifests, key=lambda manifest: -manifest.seq)
    ]  # fmt: skip
    freed = sum(manifest.nbytes for manifest in going) + sum(bases.values())
    data = {
        "dir": catalogue.root, "good": not stays, "dry_run": not done, "keep_last": rules.keep_last,
        "keep_every_n_steps": rules.keep_every_n_steps, "keep_tags": rules.keep_tags, "checkpoints": entries,
        "bases": sorted(bases), "leftovers": [attempt.folder for attempt in found.leftovers], "bytes": freed,
    }  # fmt: skip
    tags = ("tag",) if any(entry["tag"] for entry in entries) else ()
    shown = Beneath(
        "step", "seq", *tags, "size", "", "why", "folder", right=("step", "seq", "size"), long=("folder", "tag")
    )
    for entry in entries:
        named = (entry["tag"] or "-",) if tags else ()
        cells = (entry["step"], entry["seq"], *named, size(entry["bytes"]), entry["verdict"], entry["why"] or "")
        shown.row(*cells, entry["folder"], style=_GOES[entry["verdict"]])
    parts: list[RenderableType] = (
        [f"Checkpoints in {catalogue.root}", shown] if entries else [f"{catalogue.root}: none"]
    )
    verb = "removed" if done else "would go"
    for base in sorted(bases):
        parts.append(f"base/{base}: frozen parameters that no remaining checkpoint refers to: {verb}")
    for attempt in found.leftovers:
        parts.append(f"{attempt.folder}: left by a crash: {verb}")
    parts.append(f"{len(going)} of {len(entries)} checkpoints {verb}, {size(freed)}")
    if not done and (going or bases or found.leftovers):
        parts.append("nothing was removed: --yes removes them")
    return Answer(data, parts, good=not stays)
