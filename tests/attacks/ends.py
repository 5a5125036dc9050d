# SPDX-License-Identifier: Apache-2.0
"""Epochs, seqs, steps and ranks at their ends, in names and in records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from attacks.kit import Attack, Make, Target, each, read_record, write_record


def renumbered(**numbers: int) -> Make:
    """The newest commit under other numbers, in its folder's name, its manifest and its shard's header."""

    def make(target: Target) -> None:
        commit = target.newest
        tree = commit.manifest()
        tree |= numbers
        tree["attempt"] = f"{tree['epoch']:08x}{tree['seq']:08x}"
        header = commit.header()
        header["__metadata__"] |= {"attempt": tree["attempt"], "step": str(tree["step"])}
        state = json.loads(commit.state()[0])
        state["step"] = tree["step"]
        commit.put_manifest(tree)
        commit.put_header(header)
        commit.put_state(json.dumps(state))
        folder = commit.folder.with_name(f"step_{tree['step']:010d}-{tree['attempt']}")
        os.rename(commit.folder, folder)

    return make


def folder(name: str) -> Make:
    return lambda target: (target.root / name).mkdir(parents=True)


def file(name: str, data: bytes = b"") -> Make:
    return lambda target: (target.root / name).write_bytes(data) and None


def owner(epoch: Any) -> Make:
    return file("owner", json.dumps({"epoch": epoch, "session": "0" * 32, "who": "pid 1 on host"}).encode())


def branch(seq: int, change: Callable[[dict[str, Any]], Any] = lambda tree: None) -> Make:
    """A sound branch record of that seq, which goes on from the newest commit."""

    def make(target: Target) -> None:
        commit = target.newest.manifest()
        tree = {
            "format": "layerwise-branch-1", "identity": commit["identity"], "session": commit["session"], "seq": seq,
            "parent": {"seq": commit["seq"], "attempt": commit["attempt"]},
            "before": [{"first": 0, "last": commit["seq"]}], "root": commit["root"],
        }  # fmt: skip
        change(tree)
        write_record(target.root / f"branch_{seq:010d}.json", tree)

    return make


def base(name: str) -> Make:
    def make(target: Target) -> None:
        (target.root / "base" / name).mkdir()
        (target.root / "base" / name / "rank_00000.safetensors").write_bytes(b"x")

    return make


ALL = (1 << 32) - 1
ZERO = "\u0660"  # an Arabic digit


def attacks() -> list[Attack]:
    return [
        *each("a folder that is left over", {
            "of the last seq": folder("step_0000000009-00000001ffffffff"),
            "of the last epoch": folder("step_0000000009-ffffffff00000009"),
            "of the last of all": folder("step_9999999999-ffffffffffffffff"),
            "of epoch 0": folder("step_0000000009-0000000000000009"),
            "of seq 0": folder("step_0000000009-0000000100000000"),
            "in capitals": folder("step_0000000009-00000001000000FF"),
            "with Arabic digits": folder(f"step_{ZERO * 9}\u0669-0000000100000009"),
            "with a digit too many": folder("step_00000000009-0000000100000009"),
            "with a newline": folder("step_0000000009-0000000100000009\n"),
        }, expect="newest"),
        *each("a damaged commit", {
            "of the last seq": _damaged("step_0000000009-00000001ffffffff"),
            "of the last epoch": _damaged("step_0000000009-ffffffff00000001"),
        }, expect="newest"),
        *each("a commit", {
            "of the last seq": renumbered(seq=ALL),
            "of the last seq but one": renumbered(seq=ALL - 1),
            "of the last epoch": renumbered(epoch=ALL),
            "of the last step": renumbered(step=10**10 - 1),
            "of the last of all": renumbered(seq=ALL, epoch=ALL, step=10**10 - 1),
        }),
        Attack("a commit of a seq that leaves too little room", renumbered(seq=0xFEFFFFFF), "named"),
        Attack("a commit of an epoch that leaves too little room", renumbered(epoch=0xFEFFFFFF), "named"),
        *each("a base that is left over", {
            "of the last seq": base("00000001ffffffff"),
            "of the last epoch": base("ffffffff00000001"),
            "of nothing": base("0000000000000000"),
            "in capitals": base("00000001FFFFFFFF"),
        }, expect="newest"),
        *each("an owner", {
            "of the last epoch": owner(ALL),
            "of the last epoch but one": owner(ALL - 1),
            "of an epoch with a fraction": owner(1.5),
            "of an endless epoch": file("owner", b'{"epoch":' + b"9" * 4000 + b"}"),
            "of a negative epoch": owner(-1),
            "of an epoch that is true": owner(True),
        }, expect="newest"),
        *each("branched: a branch record", {
            "of the last seq": branch(ALL),
            "of a seq above all": branch(ALL + 1),
            "of ten nines": file("branch_9999999999.json", b"x"),
            "with Arabic digits": file(f"branch_{ZERO * 8}\u0669\u0669.json", b"x"),
            "of seq 0": file("branch_0000000000.json", b"x"),
        }, expect="newest"),
        *each("a spare", {
            "of the last of all": file("spare_ffffffffffffffff_99999", b"x"),
            "with Arabic digits": file("spare_0000000100000001_\u0660\u0660\u0660\u0660\u0660", b"x"),
        }, expect="newest"),
        Attack("ranks in the billions", _edit(world_size=10**9)),
        Attack("ranks beyond all that a name can hold", _edit(world_size=100_001)),
        Attack("a world of an endless number", _edit(world_size=10**4000)),
        Attack("a size of an endless number", lambda target: target.newest.edit(
            lambda tree: tree["shards"][0].update(nbytes=10**4000))),
        Attack("a size above all files", lambda target: target.newest.edit(
            lambda tree: tree["shards"][0].update(nbytes=1 << 63))),
        Attack("a header above all files", lambda target: target.newest.edit(
            lambda tree: tree["shards"][0].update(header_bytes=1 << 62))),
    ]  # fmt: skip


def _edit(**members: Any) -> Make:
    return lambda target: target.newest.edit(lambda tree: tree.update(members))


def _damaged(name: str) -> Make:
    def make(target: Target) -> None:
        (target.root / name).mkdir()
        (target.root / name / "manifest.json").write_bytes(b"not one")

    return make


__all__ = ["attacks", "branch", "read_record"]
