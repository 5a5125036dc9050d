# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters: files below `base/` that several commits refer to. Damage to one is damage to all of them."""

from __future__ import annotations

import shutil

from attacks.kit import Attack, Make, Target, each


def _header(name: str, value: object) -> Make:
    def make(target: Target) -> None:
        commit = target.newest
        commit.edit_header(lambda tree: tree["__metadata__"].update({name: value}), commit.base())

    return make


def _data(change) -> Make:  # noqa: ANN001
    def make(target: Target) -> None:
        path = target.newest.base()
        path.write_bytes(change(path.read_bytes()))

    return make


def _also_in_shard(target: Target) -> None:
    """A tensor of the base, in the shard as well."""
    commit = target.newest
    tree = commit.header()
    end = tree["state/json"]["data_offsets"][0]
    name = next(name for name in commit.header(commit.base()) if name.startswith("param/"))
    tree[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    commit.put_header(tree)


def _another(target: Target) -> None:
    """Only the newest commit refers to a base that is not there."""
    other = "0000000100000063"
    target.newest.edit(lambda tree: (tree["shards"][0]["base"].update(attempt=other), tree.update(bases=[other])))


def attacks() -> list[Attack]:
    return [
        *each("base", {
            "missing": lambda target: target.newest.base().unlink(),
            "without its folder": lambda target: shutil.rmtree(target.root / "base"),
            "cut": _data(lambda data: data[:-1]),
            "longer": _data(lambda data: data + b"\0"),
            "of zeros": _data(lambda data: bytes(len(data))),
            "with a byte changed": _data(lambda data: data[:4100] + bytes([data[4100] ^ 1]) + data[4101:]),
            "of another rank": _header("rank", "1"),
            "of another attempt": _header("attempt", "0" * 16),
            "of another world": _header("world_size", "3"),
            "of another format": _header("format", "x"),
        }, expect="named"),
        # The state of a base is empty, and no restore reads it.
        Attack("base: of a state hash that is not", _header("state_hash", "0" * 16), "newest", says="state block"),
        Attack("a tensor in the shard and in the base", _also_in_shard),
        Attack("a base that is not there", _another),
        Attack("bases that are a file", lambda target: _file_for_bases(target), "named"),
    ]  # fmt: skip


def _file_for_bases(target: Target) -> None:
    shutil.rmtree(target.root / "base")
    (target.root / "base").write_bytes(b"x")
