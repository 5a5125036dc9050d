# SPDX-License-Identifier: Apache-2.0
"""Bytes that a terminal obeys, and lone surrogates, in all that is printed of a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from attacks.headers import TENSOR, edit, meta, table
from attacks.kit import Attack, Make, Target, each

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\u202e\ud800\x7f"


def manifest(change: Callable[[dict[str, Any]], Any]) -> Make:
    return lambda target: target.newest.edit(change)


def state(change: Callable[[dict[str, Any]], Any]) -> Make:
    return lambda target: target.newest.edit_state(change)


def _owner(target: Target) -> None:
    (target.root / "owner").write_text(json.dumps({"epoch": 1, "session": EVIL, "who": EVIL}))


def _folder(target: Target) -> None:
    """Names of entries that are printed because they are odd."""
    for name in ("step_\x1b[2J", "branch_\x1b]0;x\x07.json", "step_0000000009-\x1b[31m00000010000"):
        (target.root / name).mkdir()


def _damaged(target: Target) -> None:
    shutil.rmtree(target.newest.folder)
    tree = target.newest.manifest()
    target.newest.put_manifest({**tree, "framework": EVIL, "tag": EVIL})


def attacks() -> list[Attack]:
    return [
        *each("terminal: manifest", {
            "with a tag": manifest(lambda tree: tree.update(tag=EVIL)),
            "with a framework": manifest(lambda tree: tree.update(framework=EVIL)),
            "with a boundary": manifest(lambda tree: tree.update(boundary=EVIL)),
            "with a software": manifest(lambda tree: tree["software"].update({EVIL: EVIL})),
            "with an unknown member": manifest(lambda tree: tree.update({EVIL: 1})),
            "with a file": manifest(lambda tree: tree["shards"][0].update(file=EVIL)),
            "with an attempt": manifest(lambda tree: tree.update(attempt=EVIL)),
            "with a format": manifest(lambda tree: tree.update(format=EVIL)),
            "older than another": _damaged,
        }, expect="any"),
        *each("terminal: header", {
            "with a tensor": edit(lambda tree: tree.update({f"param/{EVIL[:8]}": tree.pop(TENSOR)})),
            "with a tensor of control characters": edit(lambda tree: tree.update(
                {"param/\x1b[31m\r\n\x9b": tree.pop(TENSOR)})),
            "with a tensor of a surrogate": edit(lambda tree: tree.update({"param/\ud800": tree.pop(TENSOR)})),
            "with a dtype": edit(lambda tree: tree[TENSOR].update(dtype=EVIL)),
            "with a format": meta("format", EVIL),
            "with a step": meta("step", EVIL),
            "with a hash kind": meta("hash", EVIL),
            "with an attempt": meta("attempt", EVIL),
            "with a layer": table("layers", lambda layers: [[EVIL, *each[1:]] for each in layers]),
            "with a bad layer": table("layers", lambda layers: [[EVIL, -1, -1]]),
            "with a slice": table("slices", lambda slices: {**slices, EVIL: {}}),
            "with among": table("slices", lambda slices: {**slices, TENSOR: {"among": EVIL}}),
            "with a key": edit(lambda tree: tree.update({EVIL: {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}})),
        }, expect="any"),
        *each("terminal: state", {
            "with a kind": state(lambda tree: tree["boundary"].update(kind=EVIL)),
            "with an unknown member": state(lambda tree: tree.update({EVIL[:6]: 1})),
            "with a loader's kind": state(lambda tree: tree["boundary"]["loaders"]["loader"].update(kind=EVIL[:6])),
            "with a loader's name": state(lambda tree: tree["boundary"]["loaders"].update({EVIL[:6]: {"kind": 5}})),
            "with an optimizer's class": state(lambda tree: tree["optimizer"].update({"class": EVIL[:6]})),
            "with a parameter": state(lambda tree: tree["optimizer"]["groups"][0]["params"].append(EVIL[:6])),
            "with an object": state(lambda tree: tree["objects"].update({EVIL[:6]: 1})),
            "with a tag of a value": state(lambda tree: tree["objects"].update(extra={"!": EVIL[:6]})),
        }, expect="any"),
        Attack("terminal: an owner's name", _owner, "newest"),
        Attack("terminal: names of entries", _folder, "newest"),
    ]  # fmt: skip
