# SPDX-License-Identifier: Apache-2.0
"""`layerwise show`: one checkpoint, from its manifest and the headers of its shards."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.cli.console import Answer, damaged, row, size, table
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import filenames, strict_json
from layerwise_dist.storage.reader import Shard
from layerwise_dist.tensors.slices import Slice

_LISTED = 20
_TAG = "!"  # of a dict that is written as pairs, since not all of its keys can be JSON's (docs/format/state.md)
_SHARDS = 200

Found = dict[str, Any]


def show(catalogue: Catalogue, step: int | None, everything: bool, tag: str | None = None) -> Answer:
    """Bad when a shard's header does not read; blocks are not read."""
    with catalogue.held(step, tag) as manifest:
        held = read_headers(catalogue, manifest)
    problems = held.problems
    data = {
        "dir": catalogue.root,
        "folder": manifest.attempt_id.folder,
        "status": catalogue.status(manifest),
        "pinned": catalogue.manager.pinned(manifest.attempt_id),
        "good": not problems,
        "problems": problems,
        "manifest": manifest.model_dump(mode="json"),
        "objects": held.objects,
        "shards": held.shards,
        "tensors": list(held.tensors.values()),
    }
    return Answer(data, _parts(data, manifest, everything), good=not problems)


@dataclass
class Headers:
    """Of one checkpoint: its files, its tensors by name, the names of what `state=` named, and what does not read."""

    shards: list[Found]
    tensors: dict[str, Found]
    objects: list[str]
    problems: list[str]


def read_headers(catalogue: Catalogue, manifest: Manifest) -> Headers:
    """Raises WrongUsage if the checkpoint was removed meanwhile."""
    shards: list[dict[str, Any]] = []
    tensors: dict[str, dict[str, Any]] = {}
    objects: dict[str, None] = {}
    problems: list[str] = []
    with catalogue.shards(manifest) as opener:
        for record in catalogue.here(manifest):
            files: list[tuple[dict[str, Any], Callable[[int], Shard | None]]] = [
                ({"rank": record.rank, "file": record.file, "bytes": record.nbytes}, opener.open)
            ]
            if record.base is not None:
                file = f"{filenames.base_folder(record.base.attempt)}/{record.file}"
                files.append(({"rank": record.rank, "file": file, "bytes": record.base.nbytes}, opener.open_base))
            for shard, open_it in files:
                shards.append(shard)
                try:
                    opened = open_it(record.rank)
                except DamageError as error:
                    problems.append(str(error))
                    continue
                assert opened is not None, "the manifest names it"
                index = opened.index
                shard |= {"tensors": len(index.entries), "layers": len(index.layers), "blocks": len(index.blocks)}
                shard["hash"] = "XXH3-64" if index.hashed else "none"
                for name, entry in index.entries.items():
                    tensor = tensors.setdefault(name, _tensor(name, entry.slice))
                    place = {"begin": entry.begin, "end": entry.end, **_place(entry.slice)}
                    tensor["parts"].append({"rank": record.rank, "file": shard["file"], **place})
                if open_it == opener.open:
                    try:
                        objects |= dict.fromkeys(_objects(opened))
                    except DamageError as error:
                        problems.append(str(error))
    if problems and not catalogue.still_there(manifest):  # where nothing can be held
        raise WrongUsage(f"step {manifest.step} in {catalogue.root} was just removed by retention")
    return Headers(shards, tensors, list(objects), problems)


def _objects(shard: Shard) -> list[str]:
    """Without what is in them, which only a restore makes. Raises DamageError or OSError."""
    text, _ = shard.state()
    try:
        tree = strict_json.loads(bytes(text))
    except ValueError as error:
        raise DamageError(f"shard {shard.index.path}: its state is not JSON: {error}") from None
    found = tree.get("objects") if type(tree) is dict else None
    if type(found) is dict and _TAG in found:
        pairs = found.get("v")
        sound = type(pairs) is list and all(type(each) is list and len(each) == 2 for each in pairs)
        found = {ascii(key): value for key, value in pairs} if sound and pairs is not None else None
    if type(found) is not dict:
        raise DamageError(f"shard {shard.index.path}: its state names no objects")
    return list(found)


def _tensor(name: str, part: Slice) -> dict[str, Any]:
    shape = list(part.global_shape)
    return {"name": name, "kind": part.kind, "fqn": part.fqn, "dtype": part.dtype, "shape": shape, "parts": []}


def _place(part: Slice) -> dict[str, Any]:
    if part.is_flat:
        return {"start": part.start, "length": part.length}
    return {"offsets": list(part.offsets or ()), "lengths": list(part.lengths or ())}


def _shared(manifest: Manifest) -> str:
    folders = ", ".join(map(filenames.base_folder, manifest.bases))
    return f"{size(manifest.base_nbytes)} of frozen parameters in {folders}: to copy the checkpoint, copy that too"


def _parts(data: dict[str, Any], manifest: Manifest, everything: bool) -> list[Any]:
    facts = table("manifest", "", folded=("",))
    parent = "none: the first of its lineage"
    if manifest.parent is not None:
        parent = f"seq {manifest.parent.seq}, attempt {manifest.parent.attempt}"
    created = datetime.datetime.fromtimestamp(manifest.created).astimezone().isoformat(" ", "seconds")
    for name, value in (
        ("folder", data["folder"]),
        ("status", data["status"] + (", pinned" if data["pinned"] else "")),
        ("committed", created),
        ("seq, attempt", f"{manifest.seq}, {manifest.attempt}"),
        ("parent", parent),
        ("session, epoch", f"{manifest.session}, {manifest.epoch}"),
        ("ranks, framework", f"{manifest.world_size}, {manifest.framework}"),
        ("boundary", manifest.boundary),
        *((("tag", manifest.tag),) if manifest.tag is not None else ()),
        ("state objects", ", ".join(data["objects"]) or "none"),
        ("software", ", ".join(f"{name} {version}" for name, version in sorted(manifest.software.items()))),
        ("size", size(manifest.nbytes)),
        *((("shared", _shared(manifest)),) if manifest.bases else ()),
    ):
        row(facts, name, value)

    right = ("rank", "size", "tensors", "layers", "blocks")
    shards = table("rank", "shard", "size", "tensors", "layers", "blocks", "hash", right=right)
    for shard in data["shards"][: None if everything else _SHARDS]:
        counts = (shard.get(name, "?") for name in ("tensors", "layers", "blocks", "hash"))
        row(shards, shard["rank"], shard["file"], size(shard["bytes"]), *counts)

    tensors = data["tensors"] if everything else data["tensors"][:_LISTED]
    listed = table("tensor", "dtype", "shape", "ranks", "size", right=("size",), folded=("tensor", "ranks"))
    for tensor in tensors:
        nbytes = sum(part["end"] - part["begin"] for part in tensor["parts"])
        ranks = ", ".join(str(part["rank"]) for part in tensor["parts"])
        row(listed, tensor["name"], tensor["dtype"], tensor["shape"], ranks, size(nbytes))
    parts: list[RenderableType] = [f"Step {manifest.step} in {data['dir']}", facts, shards, listed]
    if len(data["shards"]) > _SHARDS and not everything:
        parts.append(f"and {len(data['shards']) - _SHARDS} more files: --all lists them")
    hidden = len(data["tensors"]) - len(tensors)
    if hidden:
        parts.append(f"and {hidden} more tensors: --all lists them")
    return parts + damaged(data["problems"])
