# SPDX-License-Identifier: Apache-2.0
"""What is not there, or not known, is named: a shard that is gone with what it held, a later format with this one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from kit.nodes import Nodes, trains, values

from layerwise_dist import _native
from layerwise_dist.commit import lost
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.records import Manifest, decode, encode
from layerwise_dist.commit.shards import open_shard
from layerwise_dist.errors import DamageError
from layerwise_dist.storage.reader import Shard


def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Two ranks under DDP have made two steps: each has written its share of what both hold."""
    nodes = Nodes(tmp_path, monkeypatch)
    values(nodes.job([0, 0], trains(2)))
    return nodes


def newest(nodes: Nodes) -> tuple[CheckpointMetadataManager, Manifest]:
    manager = CheckpointMetadataManager(_native.PosixEnv(), str(nodes.disk(0)))
    return manager, manager.inventory().lineage()[0]


def held_by(path: Path) -> dict[str, int]:
    """Elements of the tensors of which a file has some."""
    with open(path, "rb") as file:
        tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    counts = {name: math.prod(each["shape"]) for name, each in tensors.items() if name.startswith(("param/", "mom"))}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("target", [1, 2, 3])
def test_a_shard_that_is_gone_is_named_with_what_it_held_whatever_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, target: int
) -> None:
    nodes = job(tmp_path, monkeypatch)
    (path,) = nodes.disk(0).glob("step_0000000002-*/rank_00001.safetensors")
    held = held_by(path)
    path.unlink()
    values(nodes.job([0] * target, trains(0)))
    (said,) = {line[line.index("shard /") :] for line in caplog.messages if f"shard {path}" in line}
    text = f"shard {path}: the file is missing (rank 1's shard, of 2 ranks, with "
    parts, whole = said.removeprefix(text).removesuffix(")").split(" and all of ")
    named = {name: int(lacking) for name, lacking, _ in re.findall(r"(\S+) \((\d+) of (\d+) elements\)", parts)}
    assert named == {name: held.pop(name) for name in ("param/2.weight", "momentum_buffer/2.weight")}
    assert {f"{kind}/{fqn}" for fqn in whole.split(", ") for kind in ("param", "momentum_buffer")} == {*held}


def test_mutation_what_only_the_lost_shard_had_is_missed_without_the_others_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lost, "_trained", lambda shard: set())
    with pytest.raises(ValueError, match="not enough values to unpack"):
        test_a_shard_that_is_gone_is_named_with_what_it_held_whatever_the_cut(tmp_path, monkeypatch, caplog, 2)


def test_of_a_shard_that_is_gone_with_all_others_nothing_is_said_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = job(tmp_path, monkeypatch)
    manager, manifest = newest(nodes)
    for path in nodes.disk(0).glob("step_*/rank_*"):
        path.unlink()
    pool = _native.WriterPool(1)
    with pytest.raises(DamageError, match=r"missing \(rank 1's shard, of 2 ranks; no other file says what it held\)"):
        open_shard(manager, pool, manifest, 1)
    pool.close()


def test_a_format_that_is_not_known_is_named_with_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, manifest = newest(job(tmp_path, monkeypatch))
    path, size = Path(manager.shard_path(manifest, 0)), manifest.shards[0].header_bytes
    later = path.read_bytes().replace(b"layerwise-shard-1", b"layerwise-shard-2", 1)
    path.write_bytes(later)
    pool = _native.WriterPool(1)
    options: dict[str, Any] = {"header_bytes": size, "header_hash": _native.xxh3_64(later[:size])}
    with pytest.raises(DamageError, match="its format is 'layerwise-shard-2', this version reads 'layerwise-shard-1'"):
        Shard(_native.PosixEnv(), pool, str(path), nbytes=len(later), **options)
    pool.close()
    body = encode(manifest).replace(b"layerwise-manifest-1", b"layerwise-manifest-2", 1)
    body = body[: body.rindex(b',"checksum"')]
    text = body + b',"checksum":"%016x"}\n' % _native.xxh3_64(body)
    expected = "its format is 'layerwise-manifest-2', this version reads 'layerwise-manifest-1'"
    with pytest.raises(DamageError, match=expected):
        decode(text, Manifest, "m")
