# SPDX-License-Identifier: Apache-2.0
"""`layerwise import`: another tool's checkpoint as the first one of a new directory."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType

from layerwise_dist.cli.catalogue import WrongUsage
from layerwise_dist.cli.console import Answer, row, size, table
from layerwise_dist.cli.progress import bytes_bar
from layerwise_dist.errors import DirectoryError, NotFoundError, OwnerError

_LISTED = 20
_IS = {"dcp": "DCP's", "safetensors": "safetensors", "deepspeed": "DeepSpeed's", "torch": "torch.save's"}


def import_checkpoint(source: str, directory: str, *, names: str | None, **options: Any) -> Answer:
    """Raises WrongUsage, LayerwiseError or OSError; then nothing was imported."""
    from layerwise_dist.interop.importing import Wanted, kind_of, read, write  # torch comes along

    listed = None
    if names is not None:
        with open(names, encoding="utf-8", errors="surrogateescape") as file:
            listed = [line.strip() for line in file if line.strip()]
    wanted = Wanted(names=listed, **options)
    try:
        if kind_of(source, wanted.source_tag) != "safetensors" and not wanted.allow_pickle:
            raise WrongUsage(
                f"{source} holds pickles: --allow-pickle reads them with an unpickler that runs nothing and accepts "
                "only tensors, plain values and a fixed list of other names"
            )
        kind, found = read(source, wanted)
        nbytes = sum(part.nbytes for part, _ in found.slices())
        with bytes_bar("importing", nbytes) as advance:
            folder = write(found, directory, wanted, advance)
    except (NotFoundError, DirectoryError, OwnerError) as error:
        raise WrongUsage(str(error)) from None
    kinds: dict[str, int] = {}
    for name in found.tensors:
        kinds[name.split("/", 1)[0]] = kinds.get(name.split("/", 1)[0], 0) + 1
    data = {
        "source": source, "kind": kind, "dir": directory, "folder": folder, "step": found.step, "bytes": nbytes,
        "framework": found.framework, "optimizer": found.optimizer if found.groups else None,
        "groups": len(found.groups), "tensors": kinds, "objects": sorted(found.objects), "notes": found.notes,
    }  # fmt: skip
    facts = table("imported", "", folded=("",))
    row(facts, "source", f"{source} ({_IS[kind]})")
    row(facts, "checkpoint", f"step {found.step} in {directory}")
    row(facts, "tensors", ", ".join(f"{count} {each}" for each, count in kinds.items()))
    row(facts, "optimizer", f"{found.optimizer}, {len(found.groups)} group(s)" if found.groups else "none")
    row(facts, "objects for state=", ", ".join(sorted(found.objects)) or "none")
    row(facts, "size", size(nbytes))
    parts: list[RenderableType] = [facts]
    for note in found.notes[:_LISTED]:
        parts.append(f"not carried over, or worth checking: {note}")
    if len(found.notes) > _LISTED:
        parts.append(f"and {len(found.notes) - _LISTED} more: --json lists them")
    parts.append("none of these formats holds random numbers: the job that resumes starts with those of seed 0")
    return Answer(data, parts, good=True)
