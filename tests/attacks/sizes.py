# SPDX-License-Identifier: Apache-2.0
"""Few bytes that ask for much work or much memory, and files that are far too large."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from attacks.headers import TENSOR, edit, meta, table, tensor, text
from attacks.kit import Attack, Commit, Make, Target, compact, each, seal
from layerwise_dist import _native

HUGE = 10**12


def sparse(name: str, size: int) -> Make:
    """A file of the directory grows to a size without taking space."""

    def make(target: Target) -> None:
        with open(target.root / name, "ab") as file:
            file.truncate(size)

    return make


def of_newest(name: str, size: int) -> Make:
    return lambda target: sparse(os.path.join(target.newest.folder.name, name), size)(target)


def long(change: Callable[[dict[str, Any], str], Any], length: int = 50_000_000) -> Make:
    """A manifest with a string of so many characters."""
    return lambda target: target.newest.edit(lambda tree: change(tree, "x" * length) and None)


def empties(opened: str, closed: str, count: int) -> Make:
    """A manifest with so many empty values in it."""

    def make(target: Target) -> None:
        said = compact(target.newest.manifest())
        many = f"[{','.join([opened + closed] * count)}]"
        target.newest.put_manifest(f'{said[:-1]},"more":{many}}}')

    return make


def object_of(made: Callable[[], str]) -> Make:
    return lambda target: target.newest.put_object(made())


def header_of(count: int, entry: Callable[[int], str]) -> Make:
    """A header with so many more tensors of no bytes."""

    def make(target: Target) -> None:
        commit = target.newest
        said = compact(commit.header())
        commit.put_header(said[:-1] + "".join("," + entry(number) for number in range(count)) + "}")

    return make


def terabyte(hashed: bool, block_bytes: int = 4096) -> Make:
    """A shard of a tensor of a terabyte, sparse; the header is as small as for a few blocks."""

    def make(target: Target) -> None:
        commit = target.newest
        tree = commit.header()
        meta = tree["__metadata__"]
        text, blob = commit.state()
        tree = {name: item for name, item in tree.items() if name[0] != "."}
        for name in [name for name in tree if name not in ("__metadata__", "state/json", "state/bytes")]:
            del tree[name]
        size = 1 << 40
        tree["param/0.weight"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
        middle = size + -(-len(text) // 64) * 64
        last = middle + len(blob) + -(middle + len(blob)) % 4096
        edges = [size, size + len(text), middle, middle + len(blob), last]
        for name, begin, end in zip(("state/json", ".pad/0", "state/bytes", ".pad/1"), edges, edges[1:], strict=False):
            tree[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        meta |= {"block_bytes": str(block_bytes), "layers": compact([["all", 0, size]]), "slices": "{}"}
        if not hashed:
            meta |= {"hash": "none", "hashes": ""}
        commit.put_header(tree, data=b"")
        header = os.path.getsize(commit.shard)
        with open(commit.shard, "ab") as file:
            file.truncate(header + last)
        with open(commit.shard, "rb") as file:
            region = file.read(header)
        commit.name(commit.shard, header, _native.xxh3_64(region), header + last)

    return make


def colliding(kind: str, count: int) -> str:
    """Ints, all of one hash: multiples of the prime that Python takes the remainder by."""
    prime = (1 << 61) - 1
    ints = [f'{{"!":"int","v":"{number * prime:x}"}}' for number in range(9, count + 9)]
    if kind in ("dict", "Counter", "OrderedDict"):
        return f'{{"!":"{kind}","v":[{",".join(f"[{each},0]" for each in ints)}]}}'
    return f'{{"!":"{kind}","v":[{",".join(ints)}]}}'


def colliding_complex(count: int) -> str:
    """All of one hash: that of a complex number is its real part's and 1000003 times its imaginary part's."""
    import struct

    made = [struct.pack(">dd", -1000003.0 * number, float(number)).hex() for number in range(1, count)]
    return f'{{"!":"set","v":[{",".join(f"""{{"!":"complex","v":"{each}"}}""" for each in made)}]}}'


def colliding_tuples(count: int) -> str:
    prime = (1 << 61) - 1
    made = [f'{{"!":"tuple","v":[{{"!":"int","v":"{number * prime:x}"}}]}}' for number in range(9, count + 9)]
    return f'{{"!":"frozenset","v":[{",".join(made)}]}}'


def _huge_manifest(target: Target) -> None:
    """250 MB that are well-formed to the end."""
    commit = target.newest
    tree = commit.manifest()
    tree["shards"] = tree["shards"] * (250_000_000 // len(compact(tree["shards"][0])))
    tree["world_size"] = len(tree["shards"])
    commit.put_manifest(tree)


def _shards(count: int) -> Make:
    """A manifest of that many ranks, as it would be written."""

    def make(target: Target) -> None:
        commit = target.newest
        tree = commit.manifest()
        one = tree["shards"][0]
        tree["shards"] = [{**one, "rank": rank, "file": f"rank_{rank:05d}.safetensors"} for rank in range(count)]
        tree["world_size"] = count
        commit.put_manifest(tree)

    return make


def _deep(opened: str, closed: str, depth: int) -> Callable[[], str]:
    return lambda: opened * depth + closed * depth


def attacks() -> list[Attack]:
    return [
        *each("manifest", {
            "of 250 MB": _huge_manifest,
            "sparse of 10 GB": of_newest("manifest.json", 10 << 30),
            "sparse of an exabyte": of_newest("manifest.json", (1 << 43)),
            "with a tag of 50 MB": long(lambda tree, text: tree.update(tag=text) or True),
            "with a framework of 50 MB": long(lambda tree, text: tree.update(framework=text) or True),
            "with a boundary of 50 MB": long(lambda tree, text: tree.update(boundary=text) or True),
            "with a session of 50 MB": long(lambda tree, text: tree.update(session=text) or True),
            "with a file of 50 MB": long(lambda tree, text: tree["shards"][0].update(file=text) or True),
            "with a software of 50 MB": long(lambda tree, text: tree["software"].update(torch=text) or True),
            "with a member of 50 MB": long(lambda tree, text: tree.update({text: 1}) or True),
            "with a software of a million names": lambda target: target.newest.edit(
                lambda tree: tree.update(software={f"{n}": "1" for n in range(1_000_000)})),
            "with eight million empty lists": empties("[", "]", 8_000_000),
            "with eight million empty objects": empties("{", "}", 8_000_000),
            "with twenty million zeros": empties("0", "", 20_000_000),
            "with two million spans": lambda target: target.newest.edit(
                lambda tree: tree.update(before=[{"first": 0, "last": 1}] * 1_000_000)),
            "with places of a billion": lambda target: target.newest.edit(
                lambda tree: tree.update(world_size=10**9, places=[[0], [10**9 - 1]])),
            "with places of ranks that there are not": lambda target: target.newest.edit(
                lambda tree: tree.update(places=[[5], [-1]])),
            "with places of no ranks": lambda target: target.newest.edit(lambda tree: tree.update(places=[[], []])),
            "with places of a rank twice": lambda target: target.newest.edit(lambda t: t.update(places=[[0], [0]])),
            "with a million places": lambda target: target.newest.edit(
                lambda tree: tree.update(places=[[0]] * 1_000_000)),
            "with a number of a million digits": lambda target: _digits(target.newest, 1_000_000),
            "of 2,000 ranks": _shards(2_000),
        }, expect="any"),
        *each("header", {
            "of a sparse terabyte in blocks of 4 KiB": terabyte(True),
            "of a sparse terabyte in blocks of 4 KiB without hashes": terabyte(False),
            "with a shape of a million dimensions": tensor("shape", [1] * 999_998 + [3, 3]),
            "with a shape of a hundred dimensions": tensor("shape", [1] * 98 + [3, 3]),
            "with a place of a hundred dimensions": table("slices", lambda s: {**s, TENSOR: {
                "shape": [1] * 98 + [3, 3], "offsets": [0] * 100}}),
            "with a slice of nothing of a trillion": edit(lambda tree: _empty(tree, {"shape": [HUGE], "start": 0})),
            "with a slice of nothing after a trillion": edit(
                lambda tree: _empty(tree, {"shape": [HUGE], "start": HUGE})),
            "with a slice of nothing of a trillion rows": edit(lambda tree: _empty(
                tree, {"shape": [HUGE, HUGE], "offsets": [0, 0]}, [0, HUGE])),
            "with 200,000 layers": table("layers", lambda layers: [["x", 0, 0]] * 200_000 + layers),
            "with a name of 50 MB": edit(lambda tree: tree.update({"param/" + "x" * 50_000_000: tree.pop(TENSOR)})),
            "with a name of 5000 characters": edit(lambda tree: tree.update({"param/" + "x" * 5000: tree.pop(TENSOR)})),
            "with a layer of 10 MB": table("layers", lambda layers: [["x" * 10_000_000, *each[1:]] for each in layers]),
            "with among of 10 MB": table("slices", lambda s: {**s, TENSOR: {"among": "0," * 5_000_000 + "0"}}),
            "with among of 10^7 ranks": table("slices", lambda s: {**s, TENSOR: {"among": "0-9999999"}}),
            "with a world of 10^18 and among all of it": edit(_world_among),
            "with eight million empty lists": text(lambda s: s[:-1] + f',"x":[{",".join(["[]"] * 8_000_000)}]}}'),
            "with a dtype of 10 MB": tensor("dtype", "F" * 10_000_000),
            "with a step of 10 MB": meta("step", "1" * 10_000_000),
            "with hashes of 20 MB": meta("hashes", "0" * 20_000_000),
            "with 900,000 tensors of no bytes": header_of(
                900_000, lambda n: f'"a/{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
            "with 400,000 tensors of no bytes": header_of(
                400_000, lambda n: f'"a/{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
            "with 20,000 tensors of no bytes": header_of(
                20_000, lambda n: f'"a/{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
            "above its cap": lambda target: target.newest.put_header(target.newest.header(), room=65 << 20),
        }, expect="any"),
        *each("shard", {
            "sparse of a terabyte": of_newest("rank_00000.safetensors", 1 << 40),
            "sparse of eight terabytes": of_newest("rank_00000.safetensors", 1 << 43),
        }),
        *each("state", {
            "of eight million empty lists": object_of(lambda: f"[{','.join(['[]'] * 8_000_000)}]"),
            "of four million empty objects": object_of(lambda: f"[{','.join(['{}'] * 4_000_000)}]"),
            "of two million objects": object_of(lambda: "[" + ",".join(['{"a":0}'] * 2_000_000) + "]"),
            "of eight million short strings": object_of(
                lambda: "[" + ",".join(f'"{n:x}"' for n in range(8_000_000)) + "]"),
            "of a set of colliding ints": object_of(lambda: colliding("set", 40_000)),
            "of a frozenset of colliding ints": object_of(lambda: colliding("frozenset", 40_000)),
            "of a dict of colliding ints": object_of(lambda: colliding("dict", 40_000)),
            "of a Counter of colliding ints": object_of(lambda: colliding("Counter", 40_000)),
            "of a set of colliding complex numbers": object_of(lambda: colliding_complex(40_000)),
            "of a set of colliding tuples": object_of(lambda: colliding_tuples(40_000)),
            "of lists in lists": object_of(_deep("[", "]", 100_000)),
            "of objects in objects": object_of(lambda: '{"a":' * 100_000 + "0" + "}" * 100_000),
            "of sets in sets": object_of(lambda: '{"!":"frozenset","v":[' * 5_000 + "]}" * 5_000),
            "of an int of ten million digits": object_of(lambda: '{"!":"int","v":"' + "f" * 10_000_000 + '"}'),
            "of a number of a million digits": object_of(lambda: "1" * 1_000_000),
            "of a key of an endless int": object_of(
                lambda: '{"!":"dict","v":[[{"!":"int","v":"' + "f" * 1_000_000 + '"},0]]}'),
            "of a string of 40 MB of brackets": object_of(lambda: json.dumps("[{" * 20_000_000)),
            "of a string of 40 MB": object_of(lambda: json.dumps("x" * 40_000_000)),
            "of a key of 10 MB": object_of(lambda: '{"' + "x" * 10_000_000 + '":{"!":"nothing"}}'),
        }, expect="any"),
        *each("a record", {
            "owner sparse of a terabyte": sparse("owner", 1 << 40),
            "owner of five thousand bytes": lambda target: (target.root / "owner").write_bytes(b" " * 5000) and None,
        }, expect="newest"),
        Attack("identity sparse of a terabyte", sparse("identity.json", 1 << 40), "newest"),
        Attack("branched: a branch record of a terabyte", lambda target: sparse(
            target.branches[-1].name, 1 << 40)(target), "newest"),
        Attack("a hundred thousand entries", _crowd, "newest"),
    ]  # fmt: skip


def _digits(commit: Commit, count: int) -> None:
    said = compact(commit.manifest())
    commit.manifest_path.write_bytes(seal(said.replace('"step":3', '"step":' + "3" * count)))


def _empty(tree: dict[str, Any], place: dict[str, Any], shape: list[int] | None = None) -> None:
    end = tree["state/json"]["data_offsets"][0]
    tree["a/x"] = {"dtype": "F32", "shape": shape or [0], "data_offsets": [end, end]}
    table = json.loads(tree["__metadata__"]["slices"])
    tree["__metadata__"]["slices"] = compact({**table, "a/x": place})


def _world_among(tree: dict[str, Any]) -> None:
    tree["__metadata__"]["world_size"] = str(10**18)
    table = json.loads(tree["__metadata__"]["slices"])
    tree["__metadata__"]["slices"] = compact({**table, TENSOR: {"among": f"0-{10**7 - 1}"}})


def _crowd(target: Target) -> None:
    for number in range(3_000):
        (target.root / f"x{number}").touch()
