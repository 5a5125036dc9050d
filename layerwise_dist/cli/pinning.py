# SPDX-License-Identifier: Apache-2.0
"""`layerwise pin` and `unpin`: keep a checkpoint, or let retention have it."""

from __future__ import annotations

from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.cli.console import Answer
from layerwise_dist.commit import pins


def pin(catalogue: Catalogue, step: int | None, tag: str | None, *, keep: bool) -> Answer:
    """Raises WrongUsage, LayerwiseError, or OSError where the directory can't be written."""
    if step is None and tag is None:
        raise WrongUsage("which checkpoint? Give --step or --tag; layerwise ls lists them")
    manifest = catalogue.chosen(step, tag)
    changed = (pins.pin if keep else pins.unpin)(catalogue.manager, manifest)
    folder = manifest.attempt_id.folder
    data = {
        "dir": catalogue.root, "step": manifest.step, "seq": manifest.seq, "tag": manifest.tag, "folder": folder,
        "pinned": keep, "changed": changed, "good": True,
    }  # fmt: skip
    if keep:
        said = "pinned: retention and layerwise prune keep it" if changed else "was pinned already"
    else:
        said = "no longer pinned: retention may remove it" if changed else "was not pinned"
    return Answer(data, [f"step {manifest.step} ({folder}) {said}"])
