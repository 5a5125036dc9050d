# SPDX-License-Identifier: Apache-2.0
"""`owner` and `identity.json`: torn, odd, or not there. None of it may lock a directory forever."""

from __future__ import annotations

import json

from attacks.kit import Attack, Make, Target, each, read_record, seal, write_record


def put(name: str, data: bytes) -> Make:
    return lambda target: (target.root / name).write_bytes(data) and None


def gone(name: str) -> Make:
    return lambda target: (target.root / name).unlink()


def identity(**members: object) -> Make:
    def make(target: Target) -> None:
        path = target.root / "identity.json"
        write_record(path, {**read_record(path), **members})

    return make


def _of_another(target: Target) -> None:
    """Every record says one identity, the directory's file another."""
    write_record(target.root / "identity.json", {"format": "layerwise-identity-1", "identity": "e" * 32})


def _torn_beside_a_copy(target: Target) -> None:
    """The identity is torn, and of the commits one is another directory's."""
    put("identity.json", b"x")(target)
    target.commits[-1].edit(lambda tree: tree.update(identity="e" * 32))


def attacks() -> list[Attack]:
    return [
        *each("owner", {
            "missing": gone("owner"),
            "empty": put("owner", b""),
            "torn": put("owner", b'{"epo'),
            "no JSON": put("owner", b"hello"),
            "no UTF-8": put("owner", b'{"epoch":1,"session":"\xff\xfe"}'),
            "a list": put("owner", b"[1]"),
            "nested without end": put("owner", b"[" * 4000),
            "with a member twice": put("owner", b'{"epoch":1,"epoch":2}'),
            "with an unknown member": put("owner", b'{"epoch":1,"session":"a","who":"b","more":1}'),
            "with who of another kind": put("owner", json.dumps({"epoch": 1, "session": [], "who": {}}).encode()),
            "too large": put("owner", b" " * 4097),
            "of zeros": put("owner", bytes(300)),
        }, expect="newest"),
        *each("identity", {
            "missing": gone("identity.json"),
            "empty": put("identity.json", b""),
            "cut": put("identity.json", b'{"format":'),
            "zeros": put("identity.json", bytes(100)),
            "with an unknown member": identity(more=1),
            "of another format": identity(format="layerwise-identity-2"),
            "in capitals": identity(identity="ABCDEF0123456789" * 2),
            "with a newline": identity(identity="0" * 32 + "\n"),
            "too short": identity(identity="0" * 31),
            "with a member twice": put("identity.json", seal(
                b'{"format":"layerwise-identity-1","identity":"' + b"0" * 32 + b'","identity":"' + b"1" * 32 + b'"}')),
            "without its format": put("identity.json", seal(b'{"identity":"' + b"0" * 32 + b'"}')),
        }, expect="newest"),
        Attack("identity of another directory than all commits", _of_another, "named"),
        Attack("identity torn beside a copied commit", _torn_beside_a_copy, "any"),
    ]  # fmt: skip
