# SPDX-License-Identifier: Apache-2.0
"""Damaged bytes are always found and named, never loaded; and the shards are what any safetensors reader expects."""

from __future__ import annotations

import errno
import logging
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import numpy as np
import pytest
import torch
from kit.crash import ROOT, Story, build, in_ranks, settings, tensors_of, train, try_ranks
from kit.shards import raw
from torch import nn

from layerwise_dist import _native
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Manifest
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.errors import DamageError, LayerwiseError
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.storage import reader
from layerwise_dist.storage.reader import Shard, ShardElsewhere
from layerwise_dist.storage.shard_layout import HEADER_CAP

pytestmark = pytest.mark.quick

CASES = 1000


class Disk:
    """Three committed steps of two ranks in memory; files can be damaged and mended."""

    def __init__(self) -> None:
        self.story = Story(testing.MemoryEnv())
        self.story.session(1, 3, keep_last=3)
        self.env = self.story.env
        self.manager = CheckpointMetadataManager(self.env, ROOT)
        self.pool = _native.WriterPool(1)
        self.commits = self.manager.inventory().lineage()

    def read(self, path: str) -> bytes:
        return self.env.read_file(path, 1 << 30)

    def put(self, path: str, data: bytes) -> None:
        self.env.unlink(path)
        self.env.write_file(path, data)

    def shard(self, manifest: Manifest, rank: int) -> Shard:
        record = manifest.shards[rank]
        return Shard(
            self.env, self.pool, self.manager.shard_path(manifest, rank),
            nbytes=record.nbytes, header_bytes=record.header_bytes, header_hash=int(record.header_hash, 16),
        )  # fmt: skip

    def findings(self, manifest: Manifest) -> str:
        """What the reading code says of a commit; anything but a DamageError is a failure of the test."""
        found = list(self.manager.inventory().damaged.values())
        for rank in range(manifest.world_size):
            try:
                found += self.shard(manifest, rank).verify()
            except DamageError as error:
                found.append(str(error))
        return "\n".join(found)


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.pool.close()


def damage(data: bytes, kind: str, draw: random.Random) -> tuple[bytes, int | None]:
    """The damaged bytes, and the one offset that was hit (None where it is more than one)."""
    at = draw.randrange(len(data))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :], at
    if kind == "byte":
        return data[:at] + bytes([(data[at] + draw.randrange(1, 256)) % 256]) + data[at + 1 :], at
    if kind == "cut":
        return data[:at], None
    if kind == "append":
        return data + draw.randbytes(draw.choice([1, 511, 512, 4096])), None
    begin = at // 512 * 512
    return data[:begin] + bytes(min(512, len(data) - begin)) + data[begin + 512 :], None


def expected_words(shard: Shard, at: int) -> list[str]:
    """What a message about byte `at` of this shard must say besides its path."""
    index = shard.index
    for number, (offset, length) in enumerate(index.blocks):
        if offset <= at < offset + length:
            names = [n for n, e in index.entries.items() if e.begin < offset + length and offset < e.end]
            return [f"block {number} ", f"step {index.step}", *(names[:1] or ["padding"])]
    return ["state block"] if at >= index.state_range[0] else ["header"]


@pytest.mark.slow
def test_every_damage_of_a_shard_is_found_and_named(disk: Disk, long: bool) -> None:
    draw = random.Random(1)
    pristine = {(m.seq, rank): disk.shard(m, rank) for m in disk.commits for rank in range(2)}
    tried = 0
    while tried < (10 * CASES if long else CASES):
        manifest, rank = draw.choice(disk.commits), draw.randrange(2)
        path = disk.manager.shard_path(manifest, rank)
        good = disk.read(path)
        kind = draw.choice(["bit", "byte", "cut", "append", "sector"])
        bad, at = damage(good, kind, draw)
        if bad == good:
            continue
        disk.put(path, bad)
        said = disk.findings(manifest)
        words = [path] + (expected_words(pristine[manifest.seq, rank], at) if at is not None else [])
        missing = [word for word in words if word not in said]
        assert not missing, f"case {tried}: {kind} at {at} of {path}: {missing} not in: {said!r}"
        disk.put(path, good)
        tried += 1
    assert not any(disk.findings(manifest) for manifest in disk.commits)


def test_every_damage_of_a_manifest_is_found_and_named(disk: Disk, long: bool) -> None:
    draw = random.Random(2)
    tried = 0
    while tried < (5000 if long else 500):
        manifest = draw.choice(disk.commits)
        path = disk.manager.manifest_path(manifest.attempt_id)
        good = disk.read(path)
        kind = draw.choice(["bit", "byte", "cut", "append", "sector"])
        bad, at = damage(good, kind, draw)
        disk.put(path, bad)
        damaged = disk.manager.inventory().damaged
        assert list(damaged) == [manifest.attempt_id.folder], f"{kind} at {at} of {path}"
        assert path in damaged[manifest.attempt_id.folder]
        disk.put(path, good)
        tried += 1


def test_swapped_shards_and_manifests_are_found(disk: Disk) -> None:
    newest, older = disk.commits[:2]
    pairs = [
        (disk.manager.shard_path(newest, 0), disk.manager.shard_path(newest, 1)),
        (disk.manager.shard_path(newest, 0), disk.manager.shard_path(older, 0)),
        (disk.manager.manifest_path(newest.attempt_id), disk.manager.manifest_path(older.attempt_id)),
    ]
    for one, other in pairs:
        first, second = disk.read(one), disk.read(other)
        disk.put(one, second)
        disk.put(other, first)
        said = disk.findings(newest)
        assert one in said, (one, said)
        disk.put(one, first)
        disk.put(other, second)


def spoil(disk: Disk, path: str, at: int) -> None:
    data = bytearray(disk.read(path))
    data[at] ^= 0x10
    disk.put(path, bytes(data))


def position_of(disk: Disk, manifest: Manifest, rank: int, name: str) -> int:
    return disk.shard(manifest, rank).index.entries[name].begin + 40_000


def test_of_many_bad_blocks_some_are_described_and_the_rest_is_counted(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = disk.commits[0]
    path, index = disk.manager.shard_path(newest, 0), disk.shard(newest, 0).index
    for offset, _ in index.blocks:
        spoil(disk, path, offset)
    count = len(index.blocks)
    assert count > 1
    monkeypatch.setattr(reader, "_DESCRIBED", 1)
    described, rest = disk.shard(newest, 0).verify()
    assert "block 0 " in described
    assert rest == f"shard {path} of step {newest.step}: {count - 1} more blocks are damaged"


def test_a_header_that_is_said_to_be_larger_than_any_is_not_read(disk: Disk) -> None:
    record = disk.commits[0].shards[0]
    with pytest.raises(DamageError, match="shard gone: a header of 67112960 bytes is over the format's 67108864"):
        Shard(disk.env, disk.pool, "gone", nbytes=record.nbytes, header_bytes=HEADER_CAP + 4096, header_hash=0)


def test_a_shard_in_another_directory_has_a_header_and_a_state_and_no_more(disk: Disk) -> None:
    newest = disk.commits[0]
    here, record = disk.shard(newest, 0), newest.shards[0]
    of = (newest.attempt, 0, newest.world_size)
    known = {"nbytes": record.nbytes, "header_bytes": record.header_bytes, "header_hash": int(record.header_hash, 16)}

    def elsewhere(state: bytes | None) -> ShardElsewhere:
        return ShardElsewhere("there", here.header(), state, of=of, **known)

    there = elsewhere(bytes(here.state_extent()))
    assert there.state() == here.state() and [*there.index.entries] == [*here.index.entries]
    entry = next(entry for _, entry in here.index.entries.items())
    for read in (
        there.header, there.verify, lambda: there.read_into([(entry.begin, entry.end, 0)]),
        lambda: there.peek(np.array([entry.begin]), np.array([entry.end])),
    ):  # fmt: skip
        with pytest.raises(DamageError, match="shard there: it lies in another directory, which this process does not"):
            read()
    with pytest.raises(ValueError, match="the state of shard there was not asked for"):
        elsewhere(None).state_extent()
    with pytest.raises(DamageError, match="the state block does not match its hash"):
        elsewhere(bytes(len(here.state_extent()))).state_extent()


def test_nothing_to_read_is_read_without_a_block(disk: Disk) -> None:
    shard = disk.shard(disk.commits[0], 0)
    assert shard.peek(np.array([5000]), np.array([5000])) == b""
    shard.read_into([(5000, 5000, 0)])


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_next_older_with_a_warning(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    newest, path = disk.commits[0], disk.manager.shard_path(disk.commits[0], 1)
    spoil(disk, path, position_of(disk, newest, 1, "param/2.weight"))
    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        assert disk.story.restart(disk.env) == 2
    said = [record.getMessage() for record in caplog.records]
    assert any(path in text and "param/2.weight" in text and re.search(r"block \d+", text) for text in said), said
    disk.story.session(2, 3, keep_last=9)  # the lineage goes on beside what is damaged
    assert disk.story.restart(disk.env) == 3


def test_a_damaged_newest_manifest_is_passed_over_with_a_warning(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    path = disk.manager.manifest_path(disk.commits[0].attempt_id)
    spoil(disk, path, 100)
    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        assert disk.story.restart(disk.env) == 2
    assert any(path in record.getMessage() for record in caplog.records)
    assert disk.env.stat(path)[0] == "file", "what is damaged is evidence, not a leftover"


@pytest.mark.parametrize("harm", ["damaged", "removed"])
def test_a_bad_manifest_in_the_middle_does_not_hide_what_is_before_it(disk: Disk, harm: str) -> None:
    """The newest shards are damaged, the manifest before them too: the commit before both is restored."""
    newest, middle, oldest = disk.commits
    spoil(disk, disk.manager.shard_path(newest, 1), position_of(disk, newest, 1, "param/2.weight"))
    path = disk.manager.manifest_path(middle.attempt_id)
    spoil(disk, path, 100) if harm == "damaged" else disk.env.unlink(path)
    assert [m.seq for m in disk.manager.inventory().lineage()] == [newest.seq, oldest.seq]
    assert start(disk.env) == [1, 1]


def test_a_bad_manifest_in_the_middle_never_brings_an_abandoned_branch_back(disk: Disk) -> None:
    """Steps 2 and 3 were rolled back; the new step 2 has a damaged parent: restore passes over both, to nothing."""
    oldest = disk.commits[-1]
    disk.story.session(2, 3, restore=1, keep_last=9)
    lineage = disk.manager.inventory().lineage()
    assert [m.step for m in lineage] == [3, 2, 1] and lineage[-1].seq == oldest.seq
    spoil(disk, disk.manager.shard_path(lineage[0], 0), position_of(disk, lineage[0], 0, "param/2.weight"))
    spoil(disk, disk.manager.manifest_path(lineage[1].attempt_id), 100)
    assert start(disk.env) == [1, 1]
    spoil(disk, disk.manager.manifest_path(oldest.attempt_id), 100)
    for error in start(disk.env):
        assert isinstance(error, DamageError), repr(error)


def test_retention_removes_nothing_after_a_damaged_manifest(disk: Disk) -> None:
    spoil(disk, disk.manager.manifest_path(disk.commits[1].attempt_id), 100)
    disk.story.session(2, 6, keep_last=1)
    left = disk.manager.inventory()
    assert sorted(left.manifests) == [disk.commits[2].seq, max(left.manifests)] and len(left.damaged) == 1


def test_without_hashes_sizes_header_and_state_are_checked_and_the_data_is_taken_as_it_is(disk: Disk) -> None:
    disk.story.session(2, 4, keep_last=9, hash=False)
    newest = disk.manager.inventory().lineage()[0]
    shard = disk.shard(newest, 1)
    assert not shard.index.hashed and not disk.findings(newest)
    assert disk.shard(disk.commits[0], 1).index.hashed
    assert start(disk.env) == [4, 4]
    path = disk.manager.shard_path(newest, 1)
    good = disk.read(path)
    spoil(disk, path, position_of(disk, newest, 1, "param/2.weight"))
    assert not disk.findings(newest), "nothing can tell"
    assert start(disk.env) == [4, 4]
    turned = [bytes([*good[:at], good[at] ^ 1, *good[at + 1 :]]) for at in (100, len(good) - 4000)]
    for harm in (good[:-4096], good + bytes(4096), *turned):
        disk.put(path, harm)
        assert path in disk.findings(newest)
        assert start(disk.env) == [3, 3]


def test_a_missing_shard_is_damage(disk: Disk) -> None:
    disk.env.unlink(disk.manager.shard_path(disk.commits[0], 0))
    assert disk.story.restart(disk.env) == 2


def start(env: Any, step: int | None = None, *, attached: Callable[[], None] = lambda: None) -> list[Any]:
    """A start by both ranks; each one's restored step, or the error it raised. `attached` runs before restore()."""
    meet = threading.Barrier(2, action=attached, timeout=30)

    def run(transport: LocalTransport) -> int:
        model, optimizer = build(transport.rank, 5)
        engine = assembly.assemble(
            model, optimizer, settings(), transport, env, state={"place": {"phase": 0, "step": 0}}
        )
        with engine:
            meet.wait()
            return engine.restore(step)

    return [thread.error or thread.value for thread in try_ranks(run)]


@pytest.mark.parametrize("what", ["shards", "manifests"])
def test_when_nothing_verifies_all_ranks_get_a_damage_error(disk: Disk, what: str) -> None:
    for manifest in disk.commits:
        path = disk.manager.shard_path(manifest, 0)
        if what == "manifests":
            spoil(disk, disk.manager.manifest_path(manifest.attempt_id), 50)
        else:
            spoil(disk, path, position_of(disk, manifest, 0, "param/2.weight"))
    for error in start(disk.env):
        assert isinstance(error, DamageError) and ROOT in str(error), repr(error)


def test_a_step_that_was_asked_for_and_is_damaged_is_not_replaced_by_another(disk: Disk) -> None:
    spoil(disk, disk.manager.shard_path(disk.commits[1], 1), position_of(disk, disk.commits[1], 1, "param/2.weight"))
    assert all(isinstance(error, DamageError) for error in start(disk.env, step=2))


def test_a_damaged_branch_record_never_brings_the_abandoned_branch_back(disk: Disk) -> None:
    disk.story.session(2, 2, restore=1, keep_last=9)
    branch = max(name for name in disk.env.list_dir(ROOT) if name.startswith("branch_"))
    for manifest in disk.manager.inventory().lineage()[:1]:
        disk.manager.withdraw(manifest.attempt_id)  # the branch's only commit: the record is the newest again
    assert start(disk.env) == [1, 1]
    spoil(disk, f"{ROOT}/{branch}", 80)
    for error in start(disk.env):
        assert isinstance(error, DamageError) and branch in str(error), repr(error)


@pytest.mark.parametrize(
    "number, kind", [(errno.EIO, OSError), (errno.EACCES, PermissionError), (errno.ESTALE, OSError)]
)
@pytest.mark.parametrize(
    "operation, pattern", [("read", "*/rank_00001*"), ("open", "*/rank_00000*"), ("read", "*/manifest.json")]
)
def test_a_disk_in_trouble_is_an_os_error_and_not_damage(
    disk: Disk, number: int, kind: type[OSError], operation: str, pattern: str
) -> None:
    env = testing.FaultEnv(disk.env)
    for error in start(
        env, attached=lambda: env.fail(operation=operation, path_pattern=pattern, errno=number, times=-1)
    ):
        assert isinstance(error, kind) and not isinstance(error, LayerwiseError) and error.errno == number, repr(error)
        assert pattern.strip("*/") in str(error)
    for error in start(env):  # the same trouble, met by attach(): still nothing about damage
        assert isinstance(error, OSError) and not isinstance(error, DamageError), repr(error)
    env.clear()
    assert start(env) == [3, 3]


class Assorted(nn.Module):
    """Every kind of tensor that a shard may hold: dtypes, no dimensions, no elements, large, not row-major."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.brain, self.short, self.wide = (
            make(171, 333, dtype=torch.bfloat16),
            make(7, dtype=torch.float16),
            make(3, 2, dtype=torch.float64),
        )
        self.scalar, self.empty, self.large = make(), make(0, 5), make(131, 257)
        self.turned = nn.Parameter(make(200, 150).detach().t())
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("complex", torch.randn(4, generator=generator, dtype=torch.complex64))

    def forward(self) -> torch.Tensor:
        return sum((param.float() ** 2).sum() for param in self.parameters())


@pytest.mark.parametrize("wrapper", [Framework, DDPFramework])
def test_shards_open_with_the_safetensors_package_and_equal_the_live_tensors(
    tmp_path: Path, wrapper: type[Framework]
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    root = str(tmp_path / "ckpt")

    def run(transport: LocalTransport) -> dict[str, torch.Tensor]:
        model = Assorted()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        framework = wrapper(model, transport.rank, transport.world_size)
        with assembly.assemble(model, optimizer, settings(root), transport, PosixEnv(), framework=framework) as engine:
            for _ in engine.steps(2):
                optimizer.zero_grad()
                model().backward()
                optimizer.step()
            engine.wait(2)
        return tensors_of(model, optimizer) | {
            f"buffer/{name}": buffer.clone() for name, buffer in model.named_buffers()
        }

    live = in_ranks(run)
    manager = CheckpointMetadataManager(PosixEnv(), root)
    manifest = manager.inventory().lineage()[0]
    parts: dict[str, list[list[torch.Tensor]]] = {}
    for rank in range(manifest.world_size):
        path = manager.shard_path(manifest, rank)
        for name, tensor in safetensors.load_file(path).items():
            if not name.startswith((".pad/", "state/")):
                parts.setdefault(name, [[], []])[rank].append(tensor)
    assert parts.keys() == live[0].keys()
    for name, by_rank in parts.items():
        expected = [tensors[name] for tensors in live]
        if wrapper is DDPFramework and not name.startswith("buffer/"):
            pieces = [tensor for found in by_rank for tensor in found]
            assert all(piece.dtype == expected[0].dtype for piece in pieces)
            assert b"".join(map(raw, pieces)) == raw(expected[0]), name
            assert len(pieces) == 1 or all(piece.dim() == 1 for piece in pieces)
        else:
            for found, tensor in zip(by_rank, expected, strict=True):
                assert len(found) == 1 and found[0].dtype == tensor.dtype and found[0].shape == tensor.shape, name
                assert raw(found[0]) == raw(tensor), name
    if wrapper is DDPFramework:
        assert any(found[0] and found[1] for name, found in parts.items()), "nothing was cut between the ranks"


def test_training_between_save_and_restore_changes_nothing_of_what_is_restored(disk: Disk) -> None:
    def run(transport: LocalTransport) -> bool:
        model, optimizer = build(transport.rank, 5)
        place = {"phase": 0, "step": 0}
        with assembly.assemble(model, optimizer, settings(), transport, disk.env, state={"place": place}) as engine:
            engine.restore()
            train(model, optimizer, transport.rank, 9, 3)
            engine.end_step()
            assert engine.restore(step=3) == 3
            kept = disk.story.states[1, 3][transport.rank]
            return all(raw(tensor) == raw(kept[name]) for name, tensor in tensors_of(model, optimizer).items())

    assert in_ranks(run) == [True, True]
