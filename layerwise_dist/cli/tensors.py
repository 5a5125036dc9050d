# SPDX-License-Identifier: Apache-2.0
"""`layerwise show --tensors`: each tensor of a checkpoint, where it is, and on request its NaNs and Infs."""

from __future__ import annotations

import fnmatch
import re

from rich.console import RenderableType

from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.console import Answer, Beneath, damaged, size
from layerwise_dist.cli.progress import bytes_bar
from layerwise_dist.cli.showing import Found, read_headers
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.tensors.slices import ranks_text


def tensors(catalogue: Catalogue, step: int | None, tag: str | None, pattern: str | None, values: bool) -> Answer:
    """Those whose name, with its kind or without, fits the pattern; all without one. Bad when a header, or a block of
    what is counted, is damaged.
    """
    with catalogue.held(step, tag) as manifest:
        held = read_headers(catalogue, manifest)
        fits = re.compile(fnmatch.translate(pattern or "*")).match
        found = [tensor for name, tensor in held.tensors.items() if fits(name) or fits(tensor["fqn"])]
        problems = list(held.problems)
        if values:
            problems += _count(catalogue, manifest, found)
    problems = list(dict.fromkeys(problems))
    data = {
        "dir": catalogue.root, "step": manifest.step, "folder": manifest.attempt_id.folder, "good": not problems,
        "problems": problems, "objects": held.objects, "tensors": found,
    }  # fmt: skip
    counted = ("NaN", "Inf") if values else ()
    right = (*counted, "size")
    shown = Beneath("tensor", "dtype", "shape", *counted, "size", "where", right=right, long=("where", "tensor"))
    for tensor in found:
        nbytes = sum(part["end"] - part["begin"] for part in tensor["parts"])
        odd = ["?" if tensor[name] is None else tensor[name] for name in ("nan", "inf")] if values else []
        shown.row(tensor["name"], tensor["dtype"], tensor["shape"], *odd, size(nbytes), _where(tensor))
    of = f"{len(found)} of {len(held.tensors)} tensors"
    parts: list[RenderableType] = [f"Step {manifest.step} in {catalogue.root}: {of}", *([shown] if found else [])]
    parts.append(f"state objects: {', '.join(held.objects) or 'none'}")
    return Answer(data, [*parts, *damaged(problems)], good=not problems)


def _where(tensor: Found) -> str:
    """``ranks 0-7``: in the shards of these ranks; ``ranks 0-7 in base/...``: in their frozen parameters."""
    places: dict[str, list[int]] = {}
    for part in tensor["parts"]:
        folder = part["file"].rpartition("/")[0]
        places.setdefault(folder, []).append(part["rank"])
    said = []
    for folder, ranks in places.items():
        text = f"ranks {ranks_text(ranks)}" if len(ranks) > 1 else f"rank {ranks[0]}"
        said.append(text + (f" in {folder}" if folder else ""))
    return "; ".join(said)


def _count(catalogue: Catalogue, manifest: Manifest, found: list[Found]) -> list[str]:
    """Sets `nan` and `inf` of each: elements, of every copy that ranks wrote for themselves; None where some of it
    can't be read. Returns why.
    """
    from layerwise_dist.reading.streaming import stream  # torch comes along
    from layerwise_dist.tensors.difference import count_odd

    by_name: dict[str, Found] = {}
    nbytes = 0
    for tensor in found:
        tensor["nan"] = tensor["inf"] = 0
        by_name[tensor["name"]] = tensor
        nbytes += sum(part["end"] - part["begin"] for part in tensor["parts"])
    problems: list[str] = []
    unread: set[int] = set()
    with bytes_bar("counting", nbytes) as advance, catalogue.shards(manifest) as opener:
        for record in catalogue.here(manifest):
            for open_it in (opener.open, *((opener.open_base,) if record.base is not None else ())):
                try:
                    shard = open_it(record.rank)
                    assert shard is not None, "the manifest names it"
                    for name, values in stream(shard, by_name.__contains__):
                        nan, inf = count_odd(values)
                        by_name[name]["nan"] += nan
                        by_name[name]["inf"] += inf
                        advance(values.nbytes)
                except DamageError as error:
                    problems.append(str(error))
                    unread.add(record.rank)
    for tensor in found:
        if any(part["rank"] in unread for part in tensor["parts"]):
            tensor["nan"] = tensor["inf"] = None
    return problems
