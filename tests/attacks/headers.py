# SPDX-License-Identifier: Apache-2.0
"""The header of a shard: JSON, members, tables, offsets, blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attacks.kit import Attack, Make, Target, compact, each

TENSOR = "param/0.weight"
HALF = {"shape": [6, 3], "offsets": [0, 0]}


def edit(change: Callable[[dict[str, Any]], Any]) -> Make:
    return lambda target: target.newest.edit_header(change)


def meta(name: str, value: Any) -> Make:
    return edit(lambda tree: tree["__metadata__"].update({name: value}))


def tensor(name: str, value: Any, which: str = TENSOR) -> Make:
    return edit(lambda tree: tree[which].update({name: value}))


def table(name: str, change: Callable[[Any], Any]) -> Make:
    return lambda target: target.newest.edit_table(name, change)


def text(change: Callable[[str], str]) -> Make:
    def make(target: Target) -> None:
        before = compact(target.newest.header())
        after = change(before)
        assert before != after
        target.newest.put_header(after)

    return make


def data(change: Callable[[bytes], bytes]) -> Make:
    def make(target: Target) -> None:
        path = target.newest.shard
        path.write_bytes(change(path.read_bytes()))

    return make


def swapped(target: Target) -> None:
    """Two tensors of one dtype and shape, under each other's name, with all hashes right: nobody can tell."""
    tree = target.newest.header()
    tree["param/0.bias"], tree["param/1.bias"] = tree["param/1.bias"], tree["param/0.bias"]
    target.newest.put_header(tree)


NEEDED = "format attempt step rank world_size block_bytes state_hash hashes slices layers".split()


def attacks() -> list[Attack]:
    return [
        *each("header without", {name: edit(lambda t, name=name: t["__metadata__"].pop(name)) for name in NEEDED}),
        *each("header with a number for", {name: meta(name, 5) for name in NEEDED}),
        *each("header", {
            "without metadata": edit(lambda tree: tree.pop("__metadata__")),
            "with metadata that is a list": edit(lambda tree: tree.update(__metadata__=[])),
            "with an unknown member": meta("more", "1"),
            "with an unknown member of a tensor": tensor("more", 1),
            "with a tensor without a dtype": edit(lambda tree: tree[TENSOR].pop("dtype")),
            "with a tensor that is a list": edit(lambda tree: tree.update({TENSOR: [1, 2]})),
            "with a tensor that is a number": edit(lambda tree: tree.update({TENSOR: 5})),
            "with a metadata twice": text(lambda s: s.replace('"rank":"0"', '"rank":"0","rank":"0"', 1)),
            "with a tensor twice": text(lambda s: s[:-1] + f',"{TENSOR}":{{"dtype":"F32"}}}}'),
            "with a dtype twice": text(lambda s: s.replace('"dtype":"F32"', '"dtype":"F32","dtype":"F32"', 1)),
            "that is no JSON": text(lambda s: s[:-1]),
            "that is an array": text(lambda s: "[]"),
            "that is null": text(lambda s: "null"),
            "with something after it": text(lambda s: s + " x"),
            "with NaN": text(lambda s: s.replace('"rank":"0"', '"rank":NaN', 1)),
            "that is nested without end": text(lambda s: "[" * 100_000),
            "that is no UTF-8": lambda target: target.newest.put_header(b'{"__metadata__":{"format":"\xff"}}'),
            "of UTF-16": lambda target: target.newest.put_header(compact(target.newest.header()).encode("utf-16")),
            "with a format of later": meta("format", "layerwise-shard-2"),
            "of another attempt": meta("attempt", "0" * 16),
            "of another step": meta("step", "2"),
            "of another rank": meta("rank", "1"),
            "of another world": meta("world_size", "2"),
            "with a step with a plus": meta("step", "+3"),
            "with a step of Arabic digits": meta("step", "\u0663"),
            "with a step of a superscript": meta("step", "\u00b3"),
            "with a step of a zero before it": meta("step", "03"),
            "with an endless step": meta("step", "3" * 5000),
            "with blocks of no bytes": meta("block_bytes", "0"),
            "with blocks of one byte": meta("block_bytes", "1"),
            "with blocks of an odd size": meta("block_bytes", "4097"),
            "with blocks of a terabyte": meta("block_bytes", str(1 << 40)),
            "with hashes in capitals": edit(lambda t: t["__metadata__"].update(
                hashes=t["__metadata__"]["hashes"].upper().replace("0", "A"))),
            "with hashes with spaces": edit(lambda t: t["__metadata__"].update(
                hashes=" " + t["__metadata__"]["hashes"][1:])),
            "with hashes with a sign": edit(lambda t: t["__metadata__"].update(
                hashes="+" + t["__metadata__"]["hashes"][1:])),
            "with hashes with an underscore": edit(lambda t: t["__metadata__"].update(
                hashes=t["__metadata__"]["hashes"][:2] + "_" + t["__metadata__"]["hashes"][3:])),
            "with a hash too few": edit(lambda t: t["__metadata__"].update(hashes=t["__metadata__"]["hashes"][16:])),
            "with a hash too many": edit(lambda t: t["__metadata__"].update(hashes=t["__metadata__"]["hashes"] * 2)),
            "with other hashes": edit(lambda t: t["__metadata__"].update(
                hashes="0" * len(t["__metadata__"]["hashes"]))),
            "with a state hash that is negative": meta("state_hash", "-123456789abcdef"),
            "with a state hash of one digit": meta("state_hash", "0"),
            "with a state hash with 0x": meta("state_hash", "0x0123456789abcd"),
            "with another state hash": meta("state_hash", "0" * 16),
            "with a hash kind that there is not": meta("hash", "md5"),
            "with hashes and none": meta("hash", "none"),
            "with a hash kind that is empty": meta("hash", ""),
            "without the state": edit(lambda tree: tree.pop("state/json")),
            "without the state's bytes": edit(lambda tree: tree.pop("state/bytes")),
            "with a state of floats": tensor("dtype", "F32", "state/json"),
            "with a dtype that there is not": tensor("dtype", "F128"),
            "with a dtype of none": tensor("dtype", None),
            "with a dtype of a list": tensor("dtype", ["F32"]),
            "with another dtype": tensor("dtype", "I16"),
            "with a shape that is a number": tensor("shape", 9),
            "with a shape of words": tensor("shape", "33"),
            "with a shape of fractions": tensor("shape", [3.0, 3.0]),
            "with a shape of truths": tensor("shape", [True, 9]),
            "with a negative shape": tensor("shape", [-3, -3]),
            "with a shape that overflows": tensor("shape", [1 << 62, 1 << 62, 0]),
            "with an endless shape": tensor("shape", [10**4000]),
            "with offsets of three": edit(lambda tree: tree[TENSOR]["data_offsets"].append(1)),
            "with offsets that are words": tensor("data_offsets", "ab"),
            "with offsets that go back": edit(lambda tree: tree[TENSOR]["data_offsets"].reverse()),
            "with offsets that are null": tensor("data_offsets", None),
            "with offsets of another tensor": edit(lambda tree: tree[TENSOR].update(
                data_offsets=tree["param/0.bias"]["data_offsets"])),
            "with a hole": edit(lambda tree: tree.pop(".pad/0")),
            "with a tensor of no kind": edit(lambda tree: tree.update({"weight": tree.pop(TENSOR)})),
            "with a tensor of an empty kind": edit(lambda tree: tree.update({"/0.weight": tree.pop(TENSOR)})),
            "with a tensor of an empty name": edit(lambda tree: tree.update({"param/": tree.pop(TENSOR)})),
            "with a tensor of kind state": edit(lambda tree: tree.update({"state/0.weight": tree.pop(TENSOR)})),
            "with padding that is no bytes": tensor("dtype", "BOOL", ".pad/0"),
            "with a length field of nothing": _length(0),
            "with a length field beyond the file": _length(1 << 63),
        }),
        *each("layers", {
            "that are an object": table("layers", lambda layers: {}),
            "that are none": table("layers", lambda layers: []),
            "of two members": table("layers", lambda layers: [each[:2] for each in layers]),
            "of four members": table("layers", lambda layers: [[*each, 0] for each in layers]),
            "with a name that is a number": table("layers", lambda layers: [[5, *each[1:]] for each in layers]),
            "with a fraction": table("layers", lambda layers: [[n, float(o), b] for n, o, b in layers]),
            "with a truth": table("layers", lambda layers: [[n, o or False, b] for n, o, b in layers]),
            "with a negative size": table("layers", lambda layers: [["a", 0, -4096], *layers]),
            "of an odd size": table("layers", lambda layers: [[n, o, b + 1] for n, o, b in layers]),
            "in another order": table("layers", lambda layers: layers[::-1] if len(layers) > 1 else []),
            "that end within a tensor": table("layers", lambda layers: [
                *layers[:-1], [layers[-1][0], layers[-1][1], layers[-1][2] - 4096]]),
            "that end within the state": table("layers", lambda layers: [
                *layers[:-1], [layers[-1][0], layers[-1][1], layers[-1][2] + 4096]]),
            "without end": table("layers", lambda layers: [*layers, *[["x", sum(layers[-1][1:]), 0]] * 300_000]),
            "with an endless size": table("layers", lambda layers: [["a", 0, 10**4000]]),
            "that are no JSON": meta("layers", "[[[["),
            "with a member twice": meta("slices", '{"param/0.weight":{"start":0,"start":0}}'),
            "nested without end": meta("layers", "[" * 100_000),
        }),
        *each("slices", {
            "that are a list": table("slices", lambda slices: []),
            "of a tensor that is not there": table("slices", lambda slices: {**slices, "param/x": {}}),
            "that are no objects": table("slices", lambda slices: {**slices, TENSOR: 5}),
            "with an unknown member": table("slices", lambda slices: {**slices, TENSOR: {"more": 1}}),
            "with a shape alone": table("slices", lambda slices: {**slices, TENSOR: {"shape": [3, 3]}}),
            "with an offset alone": table("slices", lambda slices: {**slices, TENSOR: {"offsets": [0, 0]}}),
            "with a start alone": table("slices", lambda slices: {**slices, TENSOR: {"start": 0}}),
            "with both": table("slices", lambda s: {**s, TENSOR: {"shape": [3, 3], "offsets": [0, 0], "start": 0}}),
            "with words": table("slices", lambda slices: {**slices, TENSOR: {"shape": "33", "offsets": "00"}}),
            "with fractions": table("slices", lambda s: {**s, TENSOR: {"shape": [6.0, 3], "offsets": [0.0, 0]}}),
            "with truths": table("slices", lambda s: {**s, TENSOR: {"shape": [6, 3], "offsets": [True, False]}}),
            "with a start of a fraction": table("slices", lambda s: {**s, TENSOR: {"shape": [18], "start": 0.5}}),
            "of another number of dimensions": table("slices", lambda s: {**s, TENSOR: {"shape": [9], "offsets": [0]}}),
            "outside": table("slices", lambda slices: {**slices, TENSOR: {"shape": [3, 3], "offsets": [1, 0]}}),
            "with a negative offset": table("slices", lambda s: {**s, TENSOR: {"shape": [3, 3], "offsets": [-1, 0]}}),
            "with a part that nobody has": table("slices", lambda s: {**s, TENSOR: HALF}),
            "among no ranks": table("slices", lambda slices: {**slices, TENSOR: {"among": "x"}}),
            "among other ranks": table("slices", lambda slices: {**slices, TENSOR: {"among": "0,1"}}),
            "among a number": table("slices", lambda slices: {**slices, TENSOR: {"among": 5}}),
            "among a list": table("slices", lambda slices: {**slices, TENSOR: {"among": [0]}}),
            "wrapped in a word": table("slices", lambda slices: {**slices, TENSOR: {"wrapped": "yes"}}),
            "wrapped in null": table("slices", lambda slices: {**slices, TENSOR: {"wrapped": None}}),
            "of no JSON": meta("slices", "{"),
            "of null": meta("slices", "null"),
        }, expect="any"),
        *each("shard", {
            "cut": data(lambda old: old[:-1]),
            "cut to its header": data(lambda old: old[:8192]),
            "of nothing": data(lambda old: b""),
            "with a byte more": data(lambda old: old + b"\0"),
            "of zeros": data(lambda old: bytes(len(old))),
            "missing": lambda target: target.newest.shard.unlink(),
            "of the commit before": lambda target: target.newest.shard.write_bytes(
                target.commits[1].shard.read_bytes()),
        }),
        Attack("header with another shape of the size", tensor("shape", [9]), "named"),
        Attack("a tensor that the model has not", edit(lambda t: t.update({"param/x": t.pop(TENSOR)})), "any"),
    ]  # fmt: skip


def _length(value: int) -> Make:
    """In the first eight bytes, with the manifest's hash of it right."""

    def make(target: Target) -> None:
        from layerwise_dist import _native

        path = target.newest.shard
        old = path.read_bytes()
        size = 8 + int.from_bytes(old[:8], "little")
        new = value.to_bytes(8, "little") + old[8:]
        path.write_bytes(new)
        target.newest.name(path, size, _native.xxh3_64(new[:size]), len(new))

    return make
