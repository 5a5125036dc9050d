# SPDX-License-Identifier: Apache-2.0
"""Manifests, branch records and the identity: members, types, duplicates, and what they say of each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from attacks.kit import Attack, Make, Target, compact, each, read_record, seal, write_record


def edit(change: Callable[[dict[str, Any]], Any]) -> Make:
    """Of the newest manifest."""
    return lambda target: target.newest.edit(change)


def without(name: str) -> Make:
    return edit(lambda tree: tree.pop(name))


def having(name: str, value: Any) -> Make:
    return edit(lambda tree: tree.update({name: value}))


def of_shard(name: str, value: Any) -> Make:
    return edit(lambda tree: tree["shards"][0].update({name: value}))


def of_base(name: str, value: Any) -> Make:
    return edit(lambda tree: tree["shards"][0]["base"].update({name: value}))


def text(change: Callable[[str], str]) -> Make:
    """Of the newest manifest, with the checksum that the changed text has."""

    def make(target: Target) -> None:
        commit = target.newest
        before = compact(commit.manifest())
        after = change(before)
        assert after != before
        commit.put_manifest(after)

    return make


def raw(data: Callable[[bytes], bytes]) -> Make:
    def make(target: Target) -> None:
        path = target.newest.manifest_path
        path.write_bytes(data(path.read_bytes()))

    return make


def branch(change: Callable[[dict[str, Any]], Any]) -> Make:
    def make(target: Target) -> None:
        path = target.branches[-1]
        tree = read_record(path)
        change(tree)
        write_record(path, tree)

    return make


def same_seq(target: Target) -> None:
    """Another commit under the newest one's seq: its folder, with another epoch."""
    commit = target.newest
    epoch, seq = commit.folder.name[16:24], commit.folder.name[24:]
    other = commit.folder.with_name(f"{commit.folder.name[:16]}{int(epoch, 16) + 1:08x}{seq}")
    shutil.copytree(commit.folder, other)
    tree = read_record(other / "manifest.json")
    write_record(other / "manifest.json", {**tree, "epoch": tree["epoch"] + 1, "attempt": other.name[16:]})


def same_seq_as_branch(target: Target) -> None:
    """A branch record under the newest commit's seq."""
    path = target.branches[-1]
    tree = read_record(path)
    seq = target.newest.manifest()["seq"]
    write_record(path.with_name(f"branch_{seq:010d}.json"), {**tree, "seq": seq})


def another_identity(target: Target) -> None:
    target.newest.edit(lambda tree: tree.update(identity="0123456789abcdef" * 2))


def another_identity_above(target: Target) -> None:
    """A commit of another directory, copied here, whose seq is above all that are here."""
    commit = target.newest
    tree = commit.manifest()
    attempt = f"{tree['epoch']:08x}{tree['seq'] + 1000:08x}"
    folder = commit.folder.with_name(f"{commit.folder.name[:16]}{attempt}")
    shutil.copytree(commit.folder, folder)
    tree |= {"seq": tree["seq"] + 1000, "attempt": attempt, "identity": "f" * 32, "parent": None, "before": []}
    write_record(folder / "manifest.json", tree)


# What each member must be, and is not.
NEEDED = """format identity session epoch seq attempt parent branch before root step world_size framework boundary
created software shards""".split()
MISTYPED: dict[str, Any] = {
    "format": "layerwise-manifest-2", "identity": 5, "session": "g" * 32, "epoch": "1", "seq": 1.0, "attempt": "0" * 15,
    "parent": [], "branch": True, "before": {}, "root": -1, "step": "3", "world_size": 0, "framework": None,
    "boundary": 7, "places": "all", "tag": 5, "created": "now", "software": [], "bases": [5], "shards": {},
}  # fmt: skip


def attacks() -> list[Attack]:
    return [
        *each("manifest without", {name: without(name) for name in NEEDED}),
        *each("manifest with a wrong", {name: having(name, value) for name, value in MISTYPED.items()}),
        *each("manifest", {
            "with an unknown member": having("more", 1),
            "with an unknown member of a shard": of_shard("more", 1),
            "with an unknown member of a base": of_base("more", 1),
            "with an unknown member of its parent": edit(lambda tree: tree["parent"].update(more=1)),
            "with a member twice": text(lambda s: s[:-1] + ',"step":3}'),
            "with a checksum of its own": text(lambda s: s[:-1] + ',"checksum":"0000000000000000"}'),
            "with a member of a shard twice": text(lambda s: s.replace('"rank":0,', '"rank":0,"rank":0,')),
            "with a member of a base twice": text(lambda s: s.replace('"base":{', '"base":{"nbytes":4096,')),
            "with a software twice": text(lambda s: s.replace('"software":{', '"software":{"torch":"1","torch":"1",')),
            "an array": text(lambda s: '[{"a":1}'),
            "a list in an object": text(lambda s: f'[{s},{{}}'),
            "nothing": raw(lambda data: b""),
            "one byte": raw(lambda data: b"{"),
            "only a checksum": raw(lambda data: seal("}")),
            "cut": raw(lambda data: data[:-1]),
            "cut in half": raw(lambda data: data[: len(data) // 2]),
            "with something after it": raw(lambda data: data + b"\n"),
            "twice in one file": raw(lambda data: data + data),
            "with a checksum in capitals": raw(lambda data: data[:-20] + data[-20:].upper()),
            "with another checksum": raw(lambda data: data[:-19] + b"0123456789abcdef" + data[-3:]),
            "zeros": raw(lambda data: bytes(len(data))),
            "of bytes that are no UTF-8": raw(lambda data: seal(data[:-32].replace(b"plain", b"pl\xffin") + b"}")),
            "with a byte order mark": raw(lambda data: seal(b"\xef\xbb\xbf" + data[:-32] + b"}")),
            "with NaN for a time": text(lambda s: s.replace('"created":', '"created":NaN,"x":')),
            "with an endless time": having("created", 1e300),
            "with a time that is infinite": text(lambda s: _number(s, "created", "1e999")),
            "with a time before all": having("created", -1e18),
            "nested without end": text(lambda s: s.replace('"before":[', '"before":[' + "[" * 100_000)),
            "with two shards of one rank": edit(lambda tree: tree["shards"].append(dict(tree["shards"][0]))),
            "without shards": having("shards", []),
            "with a shard of another rank": of_shard("rank", 1),
            "with a file outside": of_shard("file", "../outside/file"),
            "with an absolute file": of_shard("file", "/etc/passwd"),
            "with a file of another rank": of_shard("file", "rank_00001.safetensors"),
            "with a hash in capitals": edit(lambda tree: tree["shards"][0].update(
                header_hash=tree["shards"][0]["header_hash"].upper().replace("0", "A"))),
            "with a hash with an underscore": of_shard("header_hash", "0123_56789abcdef"),
            "with a hash with a newline": edit(lambda tree: tree["shards"][0].update(
                header_hash=tree["shards"][0]["header_hash"] + "\n")),
            "with an attempt with a newline": edit(lambda tree: tree.update(attempt=tree["attempt"] + "\n")),
            "with a hash of Arabic digits": of_shard("header_hash", "\u0660" * 16),
            "with another hash": of_shard("header_hash", "0" * 16),
            "with another size": of_shard("nbytes", 4096),
            "with another size of the header": of_shard("header_bytes", 12288),
            "with a header of no multiple of 4096": of_shard("header_bytes", 4097),
            "of another step than its folder's": having("step", 2),
            "of another epoch than its folder's": having("epoch", 7),
            "of another attempt than its folder's": having("attempt", "0" * 16),
            "of a seq that its attempt has not": having("seq", 2),
            "with bases that nobody refers to": having("bases", ["0000000100000001", "0000000100000002"]),
            "without the bases that are referred to": having("bases", []),
            "with a base twice": edit(lambda tree: tree.update(bases=tree["bases"] * 2)),
            "with a base outside": of_base("attempt", "../../outside/xx"),
            "that continues itself": edit(lambda t: t.update(parent={"seq": t["seq"], "attempt": t["attempt"]})),
            "that continues what comes later": having("parent", {"seq": 99, "attempt": "0000000100000063"}),
            "that descends from what comes later": having("before", [{"first": 90, "last": 99}]),
            "with a span that ends before it begins": having("before", [{"first": 2, "last": 1}]),
            "with a branch above its seq": having("branch", 99),
            "with a root above its branch": having("root", 99),
            "of a boundary that there is not": having("boundary", "nonsense"),
        }),
        Attack("manifest of another framework", having("framework", "nonsense"), "named"),
        Attack("manifest of another directory", another_identity, quiet=True),
        Attack("manifest that was copied here with a seq above all", another_identity_above, "newest"),
        Attack("two commits of one seq", same_seq, "older"),
        Attack("branched: a branch record of the newest commit's seq", same_seq_as_branch, "any"),
        *each("branched: a branch record", {
            "with an unknown member": branch(lambda tree: tree.update(more=1)),
            "without its parent": branch(lambda tree: tree.pop("parent")),
            "without a format": branch(lambda tree: tree.pop("format")),
            "of another seq": branch(lambda tree: tree.update(seq=tree["seq"] + 1)),
            "with a member twice": lambda target: write_record(
                target.branches[-1], compact(read_record(target.branches[-1]))[:-1] + ',"root":0}'),
        }, expect="newest"),
        Attack("branched: a branch record that is cut and is the newest", _cut_newest_branch, "named"),
    ]  # fmt: skip


def _number(said: str, name: str, value: str) -> str:
    return said.replace(f'"{name}":{json.dumps(json.loads(said)[name])}', f'"{name}":{value}')


def _cut_newest_branch(target: Target) -> None:
    shutil.rmtree(target.newest.folder)
    path = target.branches[-1]
    path.write_bytes(path.read_bytes()[:-5])
