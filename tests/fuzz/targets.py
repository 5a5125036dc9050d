# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: each reader of bytes from a file, as a function that may raise DamageError and nothing else.

Hashes and lengths are made right before the reader sees the bytes, since a fuzzer does not guess them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from layerwise_dist import _native
from layerwise_dist.commit import owner, records
from layerwise_dist.errors import DamageError
from layerwise_dist.loop import rng
from layerwise_dist.restore import contents, sealed_state
from layerwise_dist.restore.reslice import first_gap
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.header import parse_header
from layerwise_dist.storage.shard_layout import ALIGN, ShardLayout, Source, round_up
from layerwise_dist.tensors.slices import Slice

BLOB = bytes(range(256)) * 64
_SIZES = (8192, 12288, 16384, 24576)


@dataclass(frozen=True)
class Target:
    """`seeds` are inputs that the reader takes; `watched` names the modules whose lines count as new."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    watched: tuple[str, ...]


def record(data: bytes) -> None:
    """A body of a record, with its checksum."""
    body = data[:-1]
    sealed = body + b',"checksum":"%016x"}\n' % _native.xxh3_64(body)
    for model in (records.Manifest, records.Branch, records.Identity):
        with contextlib.suppress(DamageError):
            found = records.decode(sealed, model, "it")
            assert records.decode(records.encode(found), model, "again") == found


def header(data: bytes) -> None:
    """The JSON of a header, padded, of files of several sizes."""
    size = round_up(8 + len(data), ALIGN)
    region = (size - 8).to_bytes(8, "little") + data.ljust(size - 8)
    for nbytes in (*_SIZES, len(region)):
        with contextlib.suppress(DamageError):
            index = parse_header("it", nbytes, region)
            assert len(list(index.blocks)) == len(index.blocks) == len(index.hashes)
            for number in range(0, len(index.blocks), max(1, len(index.blocks) // 50)):
                offset, length = index.blocks[number]
                assert index.blocks.at(offset) == index.blocks.at(offset + length - 1) == number
            contents.entries([_Shard(index)])
            for entry in list(index.entries.values())[:20]:
                assert entry.begin <= entry.end <= nbytes and entry.slice.nbytes == entry.end - entry.begin
                first_gap([entry.slice])


@dataclass
class _Shard:
    index: Any


def typed(data: bytes) -> None:
    """A text of typed JSON beside a blob that may be cut to what it describes."""
    for blob in (BLOB, b""):
        with contextlib.suppress(DamageError):
            _again(typed_json.loads(data, blob))
    with contextlib.suppress(DamageError):
        reader = typed_json.Reader(typed_json.np.frombuffer(BLOB, typed_json.np.uint8))
        with contextlib.suppress(typed_json.Problem, ValueError, RecursionError):
            reader.value(typed_json.strict_json.loads(data), 0)
            _again(typed_json.loads(data, BLOB[: reader.end]))


def _again(value: Any) -> None:
    """What was read is written as something that reads back."""
    text, blob = typed_json.dumps(value)
    typed_json.loads(text, blob)


def sealed(data: bytes) -> None:
    """The text of a sealed state, checked as a restore does."""

    class Index:
        path, step = "it", 3

    class Shard:
        index = Index

        @staticmethod
        def state() -> tuple[bytes, bytes]:
            return data, _state()[1]

    for framework in ("plain", "ddp", "deepspeed", "a:plain,b:ddp"):
        with contextlib.suppress(DamageError):
            state = sealed_state.read_state(Shard, framework)  # type: ignore[arg-type]
            list(contents.absent(state, lambda kind, fqn: False))


def owners(data: bytes) -> None:
    class OneFile:
        @staticmethod
        def read_file(path: str, cap: int) -> bytes:
            return data

    found = owner.read_owner(OneFile, "/")
    assert found == {} or type(found["epoch"]) is int


# -- seeds -------------------------------------------------------------------------------------------------------------


def _records() -> list[bytes]:
    ref = {"seq": 1, "attempt": "0000000100000001"}
    base = {"attempt": "0000000100000001", "nbytes": 8192, "header_bytes": 4096, "header_hash": "0" * 16}
    shard = {"rank": 0, "file": "rank_00000.safetensors", "nbytes": 8192, "header_bytes": 4096, "header_hash": "f" * 16}
    manifest = {
        "format": "layerwise-manifest-1", "identity": "a" * 32, "session": "b" * 32, "epoch": 1, "seq": 2,
        "attempt": "0000000100000002", "parent": ref, "branch": 0, "before": [{"first": 0, "last": 1}], "root": 0,
        "step": 7, "world_size": 1, "framework": "plain", "boundary": "explicit", "places": None, "tag": "best",
        "created": 1.5, "software": {"torch": "2"}, "bases": ["0000000100000001"], "shards": [{**shard, "base": base}],
    }  # fmt: skip
    two = {**shard, "rank": 1, "file": "rank_00001.safetensors", "base": None}
    branch = {
        "format": "layerwise-branch-1", "identity": "a" * 32, "session": "b" * 32, "seq": 3, "parent": ref,
        "before": [], "root": 0,
    }  # fmt: skip
    identity = {"format": "layerwise-identity-1", "identity": "a" * 32}
    several = {
        **manifest, "world_size": 2, "places": [[0], [1]], "shards": [{**shard, "base": None}, two], "bases": [],
    }  # fmt: skip
    return [json.dumps(each, separators=(",", ":")).encode() for each in (manifest, several, branch, identity)]


def _header() -> list[bytes]:
    whole = Slice.whole("param", "a.weight", "F32", (8, 16))
    box = Slice("exp_avg", "a.weight", "F32", (16, 16), offsets=(8, 0), lengths=(8, 16), among="0,1")
    flat = Slice("master", "a.bias", "BF16", (64,), start=0, length=32)
    made = []
    several = [("a", [Source(whole), Source(box, wrapped=True)]), ("b", [Source(flat)])]
    for layers in ([("a", [Source(whole)])], several):
        laid = ShardLayout(layers, 512, 4096)
        blocks = len(laid.blocks)
        for hashes in ("0123456789abcdef" * blocks, None):
            text = laid.header(
                attempt="0000000100000002", step=7, rank=0, world_size=2, hashes=hashes, state=(100, 50),
                state_hash="0" * 16,
            )  # fmt: skip
            made.append(text[8:].rstrip())
    return made


def _typed() -> list[bytes]:
    value = {
        "a": [1, 2.5, None, True, "x", (1, 2), {1, 2}, frozenset({"a"}), b"abc", bytearray(b"d"), 1 << 80],
        "l": float("inf"),
        "b": {1: 2, (1, "x"): 3}, "c": complex(1, 2), "d": slice(1, 2), "e": range(3), "f": torch.arange(6).view(2, 3),
        "g": torch.float32, "h": torch.device("cpu"), "i": torch.Size([1, 2]), "j": list(range(100)), "k": "\ud800",
    }  # fmt: skip
    text, _ = typed_json.dumps(value)
    return [text, typed_json.dumps({"a": {"b": [1, [2, [3]]]}})[0], b"null", b'{"!":"deque","max":3,"v":[1]}']


@cache
def _state() -> tuple[bytes, bytes]:
    """(text, blob) of a whole state."""
    now = {"own": {}, "epochs": {"sampler": 1}}
    start = {"rng": rng.take(), "own": {}}
    counted = {
        "kind": "counted", "iterating": True, "draws": 2, "start": start, "first": None, "later": {}, "again": False,
        "now": now,
    }  # fmt: skip
    stateful = {"kind": "stateful", "iterating": False, "start": None, "state": None, "now": now}
    return typed_json.dumps({
        "step": 3, "updates": 3,
        "boundary": {
            "kind": "loader", "rng": rng.take(), "rng_event": "draw", "rng_after": None, "at": ["l"], "starts": [],
            "loaders": {"l": counted, "m": stateful},
        },
        "objects": {"x": {"a": 1}}, "client_state": None,
        "optimizer": {"class": "AdamW", "groups": [{"params": ["a"], "lr": 0.1}], "scalars": {"a": {"step": 1.0}},
                      "order": {"a": ["step"]}},
        "wrapper": None, "gradients": ["a"], "extra_state": {},
    })  # fmt: skip


def _sealed() -> list[bytes]:
    return [_state()[0]]


def _owner() -> list[bytes]:
    return [b'{"epoch":3,"session":"%s","who":"pid 1 on host","monitor":true,"ends":true}' % (b"a" * 32)]


_STORAGE = (
    "storage/header.py",
    "storage/strict_json.py",
    "storage/schemas.py",
    "tensors/slices.py",
    "restore/contents.py",
)
_TYPED = ("storage/typed_json.py", "storage/typed_json_read.py", "storage/strict_json.py")

TARGETS: dict[str, Target] = {
    "record": Target(record, _records, ("commit/records.py", "storage/strict_json.py", "storage/schemas.py")),
    "header": Target(header, _header, _STORAGE),
    "typed": Target(typed, _typed, _TYPED),
    "sealed": Target(sealed, _sealed, (*_TYPED, "restore/sealed_state.py", "storage/schemas.py", "loop/rng.py")),
    "owner": Target(owners, _owner, ("commit/owner.py", "storage/strict_json.py")),
}
