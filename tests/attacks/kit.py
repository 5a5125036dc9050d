# SPDX-License-Identifier: Apache-2.0
"""What makers work with: one checkpoint directory, whose files they write anew with all hashes right."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise_dist import _native
from layerwise_dist.storage.shard_layout import ALIGN, round_up, state_extent, state_spans

Make = Callable[["Target"], None]


@dataclass(frozen=True)
class Attack:
    """`make` changes a copy of the directory. `expect` is what `restore()` does then: "older", the next older commit;
    "named", a LayerwiseError; "newest", as if nothing had happened; "any" of the first two. `usage`: the commands may
    say that there is nothing to look at.
    """

    name: str
    make: Make
    expect: str = "older"
    usage: bool = False
    quiet: bool = False  # verify need not call it damage: it is sound, and not what a restore takes
    says: str = ""  # something that verify must say


@dataclass
class Target:
    """A directory with three commits or more. Commits are told from newest to oldest."""

    root: Path

    @property
    def commits(self) -> list[Commit]:
        found = [each for each in self.root.iterdir() if re.fullmatch(r"step_\d{10}-[0-9a-f]{16}", each.name)]
        return [Commit(self.root, each) for each in sorted(found, key=lambda each: each.name[-8:], reverse=True)]

    @property
    def newest(self) -> Commit:
        return self.commits[0]

    @property
    def branches(self) -> list[Path]:
        return sorted(self.root.glob("branch_*.json"))


def seal(body: str | bytes) -> bytes:
    """A record of this text, which ends with `}`, with the checksum that it must have."""
    data = body.encode() if isinstance(body, str) else body
    assert data.endswith(b"}")
    return data[:-1] + b',"checksum":"%016x"}\n' % _native.xxh3_64(data[:-1])


def compact(tree: Any) -> str:
    return json.dumps(tree, separators=(",", ":"))


def read_record(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_bytes())
    del tree["checksum"]
    return tree


def write_record(path: Path, tree: Any) -> None:
    path.write_bytes(seal(tree if isinstance(tree, str | bytes) else compact(tree)))


@dataclass
class Commit:
    """One checkpoint of one rank."""

    root: Path
    folder: Path

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def shard(self) -> Path:
        return self.folder / "rank_00000.safetensors"

    def manifest(self) -> dict[str, Any]:
        return read_record(self.manifest_path)

    def put_manifest(self, tree: Any) -> None:
        """A tree, or the text of one."""
        write_record(self.manifest_path, tree)

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Of the manifest; `change` works in place."""
        tree = self.manifest()
        change(tree)
        self.put_manifest(tree)

    def base(self) -> Path:
        return self.root / "base" / self.manifest()["shards"][0]["base"]["attempt"] / "rank_00000.safetensors"

    # -- the shard ------------------------------------------------------------------------------------------------

    def header(self, path: Path | None = None) -> dict[str, Any]:
        data = (path or self.shard).read_bytes()
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    def put_header(self, tree: Any, path: Path | None = None, *, data: bytes | None = None, room: int = 0) -> None:
        """Writes the header (a tree, text, or bytes) before the data that is there, or before `data`; the manifest
        names it. `path`: of the base.
        """
        path = path or self.shard
        old = path.read_bytes()
        if data is None:
            data = old[8 + int.from_bytes(old[:8], "little") :]
        text = tree if isinstance(tree, bytes) else (tree if isinstance(tree, str) else compact(tree)).encode()
        size = max(round_up(8 + len(text), ALIGN), room, 8 + int.from_bytes(old[:8], "little"))
        region = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
        path.write_bytes(region + data)
        self.name(path, len(region), _native.xxh3_64(region), len(region) + len(data))

    def name(self, path: Path, header_bytes: int, header_hash: int, nbytes: int) -> None:
        """In the manifest, and in all others that refer to the same file."""
        for commit in Target(self.root).commits:
            tree = commit.manifest()
            record = tree["shards"][0]
            if path != commit.shard:
                record = record["base"]
                if record is None or path.parent.name != record["attempt"]:
                    continue
            record |= {"header_bytes": header_bytes, "header_hash": f"{header_hash:016x}", "nbytes": nbytes}
            commit.put_manifest(tree)

    def edit_header(self, change: Callable[[dict[str, Any]], Any], path: Path | None = None) -> None:
        tree = self.header(path)
        change(tree)
        self.put_header(tree, path)

    def edit_table(self, name: str, change: Callable[[Any], Any]) -> None:
        """A table within the metadata: `slices` or `layers`. `change` returns the new one, or changes it in place."""
        tree = self.header()
        table = json.loads(tree["__metadata__"][name])
        made = change(table)
        tree["__metadata__"][name] = compact(table if made is None else made)
        self.put_header(tree)

    # -- the sealed state -----------------------------------------------------------------------------------------

    def state(self) -> tuple[bytes, bytes]:
        """(text, blob)"""
        data = self.shard.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        tree = self.header()
        text, blob = (tree[name]["data_offsets"] for name in ("state/json", "state/bytes"))
        return data[begin + text[0] : begin + text[1]], data[begin + blob[0] : begin + blob[1]]

    def put_state(self, text: bytes | str, blob: bytes | None = None) -> None:
        text = text.encode() if isinstance(text, str) else text
        blob = self.state()[1] if blob is None else blob
        tree = self.header()
        data = self.shard.read_bytes()[8 + int.from_bytes(self.shard.read_bytes()[:8], "little") :]
        begin = tree["state/json"]["data_offsets"][0]
        for name in [name for name, item in tree.items() if name[0] != "_" and item["data_offsets"][0] >= begin]:
            del tree[name]
        pads = len([name for name in tree if name.startswith(".pad/")])
        for name, dtype, shape, first, last, _ in state_spans(begin, len(text), len(blob), pads):
            tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}
        extent = state_extent(text, blob)
        tree["__metadata__"]["state_hash"] = f"{_native.xxh3_64(extent):016x}"
        self.put_header(tree, data=data[:begin] + extent)

    def edit_state(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """The tree of its JSON text, changed in place."""
        tree = json.loads(self.state()[0])
        change(tree)
        self.put_state(compact(tree))

    def put_object(self, text: str, blob: bytes = b"") -> None:
        """The text of one more value in the state: `objects.extra`, which the job has as a dict. What it needs of the
        blob is after all that is there; `@` in it stands for that offset.
        """
        old, held = self.state()
        at = round_up(len(held), 64)
        tree = json.loads(old)
        tree["objects"]["extra"] = "\0"
        made = compact(tree).replace(json.dumps("\0"), text.replace("@", str(at)))
        self.put_state(made, held.ljust(at, b"\0") + blob if blob else held)


def each(prefix: str, ways: dict[str, Make], **options: Any) -> Iterator[Attack]:
    for name, make in ways.items():
        yield Attack(f"{prefix}: {name}", make, **options)


def copy(source: Path, to: Path) -> None:
    shutil.copytree(source, to, symlinks=True)
