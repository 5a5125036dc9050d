# SPDX-License-Identifier: Apache-2.0
"""`layerwise ls`: the checkpoints of a directory."""

from __future__ import annotations

import os
import time
from typing import Any

from rich.console import RenderableType

from layerwise_dist.cli.catalogue import Catalogue, measure
from layerwise_dist.cli.console import Answer, Beneath, age, damaged, size
from layerwise_dist.storage import filenames

_STYLE = {"newest": "bold green", "lineage": "green", "abandoned": "dim", "incomplete": "yellow", "damaged": "bold red"}


def ls(catalogue: Catalogue) -> Answer:
    """Bad when a manifest is damaged, or a shard is missing or of another size; blocks are not read."""
    now = time.time()
    entries = sorted(
        _committed(catalogue) + _incomplete(catalogue) + _damaged(catalogue),
        key=lambda entry: (-(entry["seq"] or 0), entry["folder"]),
    )
    branches = [
        {"seq": branch.seq, "continues_from_seq": branch.parent.seq if branch.parent else None}
        for _, branch in sorted(catalogue.inventory.branches.items())
    ]
    right = ("step", "seq", "ranks", "size", "shared", "age")
    tags = ("tag",) if any(entry["tag"] for entry in entries) else ()
    pins = ("pin",) if any(entry["pinned"] for entry in entries) else ()
    bases = catalogue.bases()
    shared = ("shared",) if bases else ()
    columns = ("step", "seq", "status", *pins, *tags, "ranks", "size", *shared, "age", "folder")
    shown = Beneath(*columns, right=right, long=("folder", "tag"))
    for entry in entries:
        created = entry["created"]
        named = (*(("pinned" if entry["pinned"] else "",) if pins else ()), *((entry["tag"],) if tags else ()))
        sizes = (size(entry["bytes"]), *((size(entry["base_bytes"]),) if shared else ()))
        cells = (entry["step"], entry["seq"], entry["status"], *named, entry["ranks"], *sizes)
        shown.row(
            *("-" if cell is None else cell for cell in cells),
            "-" if created is None else age(now - created),
            entry["folder"],
            style=_STYLE[entry["status"]],
        )
    heading = f"Checkpoints in {catalogue.root}"
    parts: list[RenderableType] = [heading, shown] if entries else [f"{heading}: none yet"]
    for branch in branches:
        source = branch["continues_from_seq"]
        parts.append(f"seq {branch['seq']}: {'started anew' if source is None else f'rolled back to seq {source}'}")
    if any(entry["status"] == "incomplete" for entry in entries):
        parts.append("incomplete: being written now, or left by a crash (the next start removes it)")
    for base in bases:
        of = f"shared by step(s) {', '.join(map(str, base['steps']))}" if base["steps"] else "of no checkpoint"
        parts.append(f"{base['folder']}: frozen parameters, {size(base['bytes'])}, {of}")
    parts += catalogue.odd()
    problems = [entry["problem"] for entry in entries if entry["problem"]]
    parts += damaged(problems)
    data = {"dir": catalogue.root, "good": not problems, "checkpoints": entries, "branches": branches, "bases": bases,
            "odd": catalogue.inventory.odd}  # fmt: skip
    return Answer(data, parts, good=not problems)


def _committed(catalogue: Catalogue) -> list[dict[str, Any]]:
    found = []
    for manifest in catalogue.inventory.manifests.values():
        problem = catalogue.missing(manifest)
        found.append({
            "step": manifest.step, "seq": manifest.seq, "attempt": manifest.attempt,
            "status": "damaged" if problem else catalogue.status(manifest), "tag": manifest.tag,
            "pinned": catalogue.manager.pinned(manifest.attempt_id),
            "ranks": manifest.world_size,
            "bytes": manifest.nbytes, "base_bytes": manifest.base_nbytes, "created": manifest.created,
            "folder": manifest.attempt_id.folder,
            "problem": f"{manifest.attempt_id.folder}: {problem}" if problem else None,
        })  # fmt: skip
    return found


def _incomplete(catalogue: Catalogue) -> list[dict[str, Any]]:
    found = []
    for attempt in catalogue.inventory.unfinished:
        try:
            nbytes, created = measure(catalogue.folder(attempt))
        except FileNotFoundError:
            continue  # collected while this looks
        found.append({
            "step": attempt.step, "seq": attempt.seq, "attempt": attempt.text, "status": "incomplete", "tag": None,
            "pinned": False, "ranks": None, "bytes": nbytes, "base_bytes": 0, "created": created,
            "folder": attempt.folder, "problem": None,
        })  # fmt: skip
    return found


def _damaged(catalogue: Catalogue) -> list[dict[str, Any]]:
    found = []
    for name, damage in catalogue.damaged_records.items():
        attempt = filenames.parse_folder(name)
        seq = attempt.seq if attempt else filenames.parse_branch(name)
        path = os.path.join(catalogue.root, name)
        try:
            nbytes, created = measure(path) if attempt else (os.lstat(path).st_size, os.lstat(path).st_mtime)
        except FileNotFoundError:
            continue
        found.append({
            "step": attempt.step if attempt else None, "seq": seq, "attempt": attempt.text if attempt else None,
            "status": "damaged", "tag": None, "pinned": False, "ranks": None, "bytes": nbytes, "base_bytes": 0,
            "created": created, "folder": name,
            "problem": damage,
        })  # fmt: skip
    return found
