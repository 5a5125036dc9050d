# SPDX-License-Identifier: Apache-2.0
"""Disks of nodes: ranks hand over what others do not see, wherever ranks are now and however many there are."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.crash import train
from kit.nodes import Nodes, trains, values
from kit.shards import differing, flip

from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture import survey
from layerwise_dist.commit import pins
from layerwise_dist.commit.keeper import Keeper
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.session import Committer
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.frameworks.parts import WHOLE
from layerwise_dist.restore import copies, handing
from layerwise_dist.restore import nodes as node_shards
from layerwise_dist.restore.gathered import Gathered
from layerwise_dist.restore.handing import Handing
from layerwise_dist.restore.sight import Sight
from layerwise_dist.restore.states import pack, unpack
from layerwise_dist.storage import filenames, strict_json
from layerwise_dist.storage.filenames import AttemptId

_SAID = re.compile(
    r"rank (\d): step \d+ (resharded|restored across nodes): (\d+) bytes of shards read here, (\d+) received from"
)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    monkeypatch.setattr(handing, "BUFFER_BYTES", 4096)  # blocks are read one by one
    return Nodes(tmp_path, monkeypatch)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str, int, int]]:
    """By rank: how it restored, bytes that it read, and bytes that others handed over."""
    found = (_SAID.search(line) for line in caplog.messages)
    return sorted((int(each[1]), each[2], int(each[3]), int(each[4])) for each in found if each)


def check(first: Sequence[dict[int, Any]], then: Sequence[dict[int, Any]], step: int) -> None:
    """What ranks came to equals, bit for bit, what those of an earlier start held; there may be more or fewer now."""
    for rank, held in enumerate(then):
        assert min(held) == step
        assert differing(held[step], first[rank if rank < len(first) else 0][step]) == []


@pytest.mark.parametrize("there", [[0, 1], [1, 0]])
def test_ranks_that_hold_the_same_restore_wherever_they_are(
    nodes: Nodes, caplog: pytest.LogCaptureFixture, there: list[int]
) -> None:
    first = values(nodes.job([0, 1], trains(3)))
    assert nodes.files(0)[-1].endswith("rank_00000") and nodes.files(1)[-1].endswith("rank_00001")
    caplog.set_level(logging.INFO)
    then = values(nodes.job(there, trains(2)))
    check(first, then, 3)
    handed = said(caplog)
    assert [each[1] for each in handed] == ["restored across nodes"] * 2 and all(each[2] and each[3] for each in handed)
    whole = sum(tensor.nbytes for tensor in first[0][3].values())
    assert sum(each[2] for each in handed) <= 1.1 * whole, "each block is read once"
    check(then, values(nodes.job([0, 1], trains(0))), 5)


def test_ranks_that_hold_their_own_get_their_own_wherever_they_are(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first = values(nodes.job([0, 0, 1, 1], trains(2, alike=False), alike=False))
    assert any(differing(first[rank][2], first[0][2]) for rank in (1, 2, 3)), "no two are alike"
    for there in ([1, 0, 0, 1], [0, 1, 0, 1], [2, 0, 1, 2]):
        caplog.clear()
        caplog.set_level(logging.INFO)
        then = values(nodes.job(there, trains(1, alike=False), alike=False))
        check(first, then, max(first[0]))
        assert len(said(caplog)) == 4
        first = then


@pytest.mark.parametrize(
    ("before", "then"), [([0, 0, 1, 1], [0, 1]), ([0, 1], [1, 0, 2]), ([0, 1, 1], [0, 1, 1, 2, 2])]
)
def test_jobs_of_fewer_and_of_more_ranks_restore_and_go_on(
    nodes: Nodes, caplog: pytest.LogCaptureFixture, before: list[int], then: list[int]
) -> None:
    first = values(nodes.job(before, trains(2)))
    caplog.set_level(logging.INFO)
    second = values(nodes.job(then, trains(2)))
    check(first, second, 2)
    assert {each[1] for each in said(caplog)} == {"resharded"} and len(said(caplog)) == len(then)
    check(second, values(nodes.job(then[::-1], trains(0))), 4)


def test_what_no_live_node_holds_is_named_and_all_take_a_step_that_is_whole(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first = values(nodes.job([0, 0], trains(2)))
    values(nodes.job([0, 1], trains(1), keep_last=3))
    errors_of = [thread.error for thread in nodes.job([0], trains(0, step=3))]
    assert all(isinstance(error, errors.DamageError) for error in errors_of)
    text = "step 3: no node of this job holds the shards of rank 1 (all of one disk)"
    assert f"{text}; complete on the nodes of this job: steps [1, 2]" in str(errors_of[0])
    check(first, values(nodes.job([0], trains(0))), 2)
    assert text in caplog.text


@pytest.mark.parametrize("there", [[1, 0], [0, 1, 2]])
def test_a_damaged_block_on_another_node_makes_all_fall_back_together(
    nodes: Nodes, caplog: pytest.LogCaptureFixture, there: list[int]
) -> None:
    first = values(nodes.job([0, 1], trains(2)))
    (path,) = nodes.disk(1).glob("step_0000000002-*/rank_00001.safetensors")
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    flip(path, 8 + size + header["momentum_buffer/4.weight"]["data_offsets"][1] - 1)
    check(first, values(nodes.job(there, trains(0))), 1)
    reader = there.index(1)
    named = [line for line in caplog.messages if line.startswith(f"load step 2: rank {reader}: shard ")]
    where = "rank_00001.safetensors of step 2: block"
    assert named and all(where in line and "momentum_buffer/4.weight" in line for line in named)


def test_a_header_that_is_damaged_on_another_node_is_found_before_anything_changes(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first = values(nodes.job([0, 1], trains(2)))
    (path,) = nodes.disk(1).glob("step_0000000002-*/rank_00001.safetensors")
    flip(path, 40)
    check(first, values(nodes.job([1, 0], trains(0))), 1)
    assert "check step 2: rank 0: shard" in caplog.text and "its header does not match its hash" in caplog.text


def slowed(monkeypatch: pytest.MonkeyPatch, rank: int, seconds: float) -> testing.FaultEnv:
    """An Env whose reads of shards take so long from when that rank begins to read blocks."""
    env = testing.FaultEnv(PosixEnv())
    load = Handing.load

    def slow_load(self: Handing) -> None:
        if self._exchange.rank == rank:
            env.delay("read", "*rank_*", seconds)
        load(self)

    monkeypatch.setattr(Handing, "load", slow_load)
    return env


def test_a_node_that_reads_for_others_may_be_slow_and_is_named_if_it_stops(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    if not long:
        pytest.skip("--long")
    first = values(nodes.job([0, 1], trains(1)))
    began = time.monotonic()
    timeout_s = 4.0
    env = slowed(monkeypatch, 1, 0.4)
    then = values(nodes.job([0, 1], trains(0), envs={1: env}, commit={"timeout_s": timeout_s}))
    check(first, then, 1)
    assert time.monotonic() - began > timeout_s, "it took longer than the deadline, in all"
    env = slowed(monkeypatch, 1, 12.0)
    threads = nodes.job([0, 1], trains(0), envs={1: env}, commit={"timeout_s": timeout_s})
    assert isinstance(threads[0].error, TimeoutError), threads[0].error
    assert re.search(r"rank 1: read|\[1\]", str(threads[0].error))


def test_a_base_stays_with_the_node_that_has_it_and_a_rank_that_moved_writes_its_own(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    first = values(nodes.job([0, 1], trains(2, alike=False), alike=False, frozen=True))
    assert [nodes.files(node)[-1] for node in (0, 1)] == ["base/rank_00000", "base/rank_00001"]
    second = values(nodes.job([1, 0], trains(1, alike=False), alike=False, frozen=True))
    check(first, second, 2)
    assert [name for name in nodes.files(0) if "base" in name] == ["base/rank_00000", "base/rank_00001"]
    third = values(nodes.job([1, 0], trains(2, alike=False), alike=False, frozen=True))
    check(second, third, 3)
    assert [name for name in nodes.files(0) if "base" in name] == ["base/rank_00001"], "nothing refers to it any more"
    check(third, values(nodes.job([0, 1], trains(0, alike=False), alike=False, frozen=True)), 5)


# -- who is dealt which block ------------------------------------------------------------------------------------------


def dealt(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Each deal is changed: `change(rows)` of all ranks' rows, by rank (file, first, last, reader, set)."""
    deal = Handing._deal

    def changed(self: Handing, heard: Sequence[bytes]) -> list[bytes]:
        told = [unpack(each) for each in deal(self, heard)]
        sets = strict_json.loads(bytes(told[0][0]))
        rows = [[list(each) for each in torch.frombuffer(bytearray(rows), dtype=torch.int64).view(-1, 5).tolist()]
                if len(rows) else [] for _, rows in told]  # fmt: skip
        change(self, rows)
        return [pack([json.dumps(sets).encode(), array("Q", sum(each, [])).tobytes()]) for each in rows]

    monkeypatch.setattr(Handing, "_deal", changed)


def two_readers(self: Handing, rows: list[list[list[int]]]) -> None:
    for each in rows:
        each += [[*row[:3], 1 - row[3], row[4]] for row in each]


def no_reader(self: Handing, rows: list[list[list[int]]]) -> None:
    for each in rows:
        del each[:1]


def one_that_does_not_see_it(self: Handing, rows: list[list[list[int]]]) -> None:
    for each in rows:
        for row in each:
            row[3] = 1 - row[3]


def by_who_asks(self: Handing, rows: list[list[list[int]]]) -> None:
    """Each rank is told that it reads by itself what it needs."""
    for rank, each in enumerate(rows):
        for row in each:
            row[3] = rank


@pytest.mark.parametrize("change", [two_readers, no_reader, one_that_does_not_see_it, by_who_asks])
def test_mutation_a_block_that_is_dealt_wrongly_is_caught(
    nodes: Nodes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    dealt(monkeypatch, change)
    with pytest.raises((AssertionError, errors.LayerwiseError)):
        test_ranks_that_hold_the_same_restore_wherever_they_are(nodes, caplog, [1, 0])


class Heard:
    """What a deal needs of an exchange."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.mark.quick
@pytest.mark.parametrize("asked", [[7, 0, 4], [0, 0, 1 << 40], [0, 8, 4]])
def test_what_is_no_count_is_not_read_for_another_rank(asked: list[int]) -> None:
    reader = Gathered.__new__(Gathered)
    reader.block_bytes = {0: 4096}
    with pytest.raises(ValueError, match="as for a count"):
        reader._elements([asked])


def test_each_block_that_is_needed_is_dealt_to_one_rank_that_sees_it() -> None:
    """All deals of files 0 to 5, of three ranks' shards and bases, for four ranks that need parts of them."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(200):
        seen = [frozenset(row.nonzero().flatten().tolist()) for row in torch.rand(4, 3, generator=generator) < 0.5]
        seen[3] = frozenset(range(3)) - frozenset.union(*seen[:3]) | seen[3]
        sight = Sight(4, 3, seen)
        needs: dict[int, list[tuple[int, int, int]]] = {rank: [] for rank in range(4)}
        for rank in range(4):
            for file in range(6):
                first, last = torch.randint(0, 40, (2,), generator=generator).tolist()
                if first <= last:
                    needs[rank].append((file, first, last))
        reads: dict[tuple[int, int], list[int]] = {}
        told: dict[tuple[int, int, int], list[int]] = {}
        for home in range(4):
            deal = object.__new__(Handing)
            deal._exchange, deal._sight = Heard(home, 4), sight  # type: ignore[assignment]
            deal._block_bytes = dict.fromkeys(range(6), 1 << 20)
            mine = [[need for need in needs[rank] if sight.readers[need[0] // 2] == home] for rank in range(4)]
            heard = [array("Q", [n for need in each for n in need]).tobytes() for each in mine]
            for rank, message in enumerate(deal._deal(heard)):
                _, rows = unpack(message)
                for file, first, last, reader, _ in _rows(rows):
                    for block in range(first, last + 1):
                        told.setdefault((rank, file, block), []).append(reader)
                        if reader == rank:
                            reads.setdefault((file, block), []).append(rank)
        for rank, each in needs.items():
            for file, first, last in each:
                for block in range(first, last + 1):
                    wanting = [r for r in range(4) for f, a, b in needs[r] if f == file and a <= block <= b]
                    if (rank, file, block) not in told:
                        assert wanting == [rank] and sight.sees(rank, file // 2), "it reads it by itself"
                        continue
                    (reader,) = told[rank, file, block]
                    assert reads[file, block] == [reader] and sight.sees(reader, file // 2)


def _rows(rows: memoryview) -> list[list[int]]:
    numbers = array("Q", bytes(rows)).tolist()
    return [numbers[at : at + 5] for at in range(0, len(numbers), 5)]


# -- directories that are empty, or of two histories -------------------------------------------------------------------


def test_a_node_without_anything_is_taken_in_only_if_the_newest_step_is_whole_without_it(nodes: Nodes) -> None:
    first = values(nodes.job([0, 0], trains(2)))
    second = values(nodes.job([0, 1], trains(1), keep_last=3))
    check(first, second, 2)
    refused = [thread.error for thread in nodes.job([0, 2], trains(0))]
    for error in refused:
        assert isinstance(error, errors.DirectoryError) and "rank 1 on " in str(error)
        assert "whose shards of ranks 1 are on no node of this job" in str(error)
    assert not (nodes.disk(2) / "identity.json").exists()
    (nodes.disk(2) / "identity.json").write_bytes((nodes.disk(0) / "identity.json").read_bytes())
    third = values(nodes.job([0, 2], trains(1), keep_last=3))
    check(first, third, 2)
    assert nodes.files(2, "manifest*")
    check(third, values(nodes.job([2, 0], trains(0), keep_last=3)), 3)


def anew(model: Any, optimizer: Any, engine: Any, rank: int) -> None:
    for number in engine.steps(1):
        train(model, optimizer, rank, 7, number)


def test_jobs_that_went_on_without_each_other_are_told_apart(nodes: Nodes) -> None:
    values(nodes.job([0, 0], trains(1)))
    values(nodes.job([0, 1], trains(0)))
    for node in (0, 1):
        values(nodes.job([node], anew, fresh=True))
    for thread in nodes.job([0, 1], trains(0)):
        assert isinstance(thread.error, errors.DirectoryError) and "different jobs continued" in str(thread.error)


def test_ranks_that_see_other_trainings_at_one_path_restore_none(nodes: Nodes) -> None:
    def saves(model: Any, optimizer: Any, engine: Any, rank: int) -> None:
        anew(model, optimizer, engine, rank)
        engine.save("it")

    def restores(model: Any, optimizer: Any, engine: Any, rank: int) -> int:
        elsewhere = str(nodes.disk(2 + rank))
        return workings_of(engine).restores.restore_parts(WHOLE, tag="it", root=elsewhere)

    for node in (2, 3):
        values(nodes.job([node, node], saves, salt=node, alike=False))
    for there in ([0, 0], [0, 1]):
        for thread in nodes.job(there, restores, alike=False, fresh=True):
            assert isinstance(thread.error, errors.DirectoryError) and "different trainings" in str(thread.error)


def with_shards_of_another_job(nodes: Nodes, hashed: bool) -> list[dict[int, Any]]:
    """A step whose shards node 0 has; node 1 has others, under the same names, as long and of another state."""
    first = values(nodes.job([0, 0], trains(1), hash=hashed))
    nodes.disk(1).mkdir()
    shutil.copy(nodes.disk(0) / filenames.IDENTITY, nodes.disk(1))
    (folder,) = nodes.disk(0).glob("step_*")
    shutil.copytree(folder, nodes.disk(1) / folder.name, ignore=shutil.ignore_patterns("manifest*"))
    for path in nodes.disk(1).glob("step_*/rank_*"):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = re.sub(rb'("state_hash":")[0-9a-f]{16}', rb"\g<1>0123456789abcdef", data[:end])
        path.write_bytes(header + bytes(byte ^ 1 for byte in data[end:]))
    return first


@pytest.mark.parametrize("hashed", [True, False])
def test_a_shard_that_another_job_left_under_the_same_name_is_no_part_of_a_restore(
    nodes: Nodes, caplog: pytest.LogCaptureFixture, hashed: bool
) -> None:
    first = with_shards_of_another_job(nodes, hashed)
    check(first, values(nodes.job([0, 0, 1], trains(0, step=1), hash=hashed)), 1)
    check(first, values(nodes.job([0, 1], trains(0, step=1), hash=hashed)), 1)
    for path in nodes.disk(0).glob("step_*/rank_*"):
        path.unlink()
    for thread in nodes.job([0, 0, 1], trains(0, step=1), hash=hashed):
        assert isinstance(thread.error, errors.DamageError)
    assert "rank 2: shard" in caplog.text and "does not match its hash in the" in caplog.text


def test_mutation_a_shard_that_is_taken_by_its_name_alone_ends_the_restore(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_shards, "is_as_committed", lambda *_: True)
    with_shards_of_another_job(nodes, True)
    for thread in nodes.job([0, 0, 1], trains(0, step=1)):
        assert isinstance(thread.error, errors.DamageError)
    assert "does not match its hash in the" in caplog.text


def test_a_manifest_is_brought_to_a_node_whose_ranks_are_others_now(nodes: Nodes) -> None:
    first = values(nodes.job([0, 1], trains(2)))
    (path,) = nodes.disk(1).glob("step_0000000002-*/manifest.json")
    path.unlink()
    check(first, values(nodes.job([1, 0], trains(0))), 2)
    assert path.exists()


# -- what goes, and what stays -----------------------------------------------------------------------------------------


def check_disks(nodes: Nodes, count: int) -> list[int]:
    """Steps that are committed: each node has their manifests, each file that they name is on one node, and there are
    no other files of ranks, but in folders of frozen parameters that some rank refers to.
    """
    managers = [CheckpointMetadataManager(PosixEnv(), str(nodes.disk(node))) for node in range(count)]
    inventories = [manager.inventory() for manager in managers]
    assert not any(each.unfinished or each.damaged for each in inventories)
    known = [{seq: manifest.attempt for seq, manifest in each.manifests.items()} for each in inventories]
    assert known == [known[0]] * count
    wanted: set[str] = set()
    bases: set[str] = set()
    for manifest in inventories[0].manifests.values():
        for record in manifest.shards:
            wanted.add(os.path.join(manifest.attempt_id.folder, record.file))
            if record.base is not None:
                wanted.add(os.path.join("base", record.base.attempt, record.file))
        bases.update(os.path.join("base", base) for base in manifest.bases)
    there = [
        str(path.relative_to(nodes.disk(node))) for node in range(count) for path in nodes.disk(node).rglob("rank_*")
    ]
    assert len(there) == len(set(there)) and wanted <= set(there)
    assert {os.path.dirname(file) for file in set(there) - wanted} <= bases
    return sorted(manifest.step for manifest in inventories[0].manifests.values())


def test_old_shards_go_from_each_disk_whoever_wrote_them_and_nothing_goes_that_a_kept_step_needs(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts of a few ranks, each time placed otherwise; frozen parameters are in files of their own."""
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    last, step = values(nodes.job([0, 1, 2], trains(3), frozen=True)), 3
    assert check_disks(nodes, 3) == [2, 3]
    for there in ([2, 1, 0], [1, 0], [0, 2, 1, 1], [2], [0, 1, 2], [2, 2, 1]):
        try:
            then = values(nodes.job(there, trains(1, step=None), frozen=True))
        except errors.DamageError as error:
            assert "no node of this job holds the shards" in str(error)  # of those that are not in this job
            continue
        check(last, then, step)
        last, step = then, step + 1
        if len(set(there)) == 3:
            assert check_disks(nodes, 3)[-1] == step
    then = values(nodes.job([1, 2, 0], trains(2), frozen=True))
    check(last, then, step)
    assert check_disks(nodes, 3) == [step + 1, step + 2]
    check(then, values(nodes.job([0, 1, 2], trains(0), frozen=True)), step + 2)


def bases_of_another_node_go(nodes: Nodes) -> None:
    values(nodes.job([1, 1], trains(2), frozen=True))
    values(nodes.job([0, 0, 1], trains(3), frozen=True))  # rank 0's disk never had what nobody refers to any more
    check_disks(nodes, 2)


def test_frozen_parameters_that_only_another_node_has_go_when_nothing_refers_to_them(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    bases_of_another_node_go(nodes)


def test_mutation_if_only_rank_0s_disk_is_looked_at_they_stay(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    nothing = property(lambda self: set(), lambda self, _: None)
    monkeypatch.setattr(Committer, "_bases_of_retired", nothing, raising=False)
    with pytest.raises(AssertionError):
        bases_of_another_node_go(nodes)


def test_mutation_if_old_shards_go_by_the_number_of_who_is_there_some_stay(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(self: Keeper, attempt: AttemptId) -> None:
        (nodes.disk(1) / attempt.folder / filenames.shard_file(self.rank)).unlink(missing_ok=True)

    monkeypatch.setattr(Keeper, "_collect", collect)
    values(nodes.job([0, 1, 1], trains(2)))
    values(nodes.job([0, 0, 1], trains(3)))
    with pytest.raises(AssertionError):
        check_disks(nodes, 2)


def test_a_pin_is_heeded_wherever_rank_0_is_and_goes_where_it_is(nodes: Nodes) -> None:
    values(nodes.job([0, 1], trains(2)))

    def manifest_of(node: int, step: int) -> tuple[CheckpointMetadataManager, Any]:
        manager = CheckpointMetadataManager(PosixEnv(), str(nodes.disk(node)))
        found = manager.inventory().manifests.values()
        return manager, next(manifest for manifest in found if manifest.step == step)

    with pytest.raises(errors.DirectoryError, match="is decided by rank 0"):
        pins.pin(*manifest_of(1, 1))
    assert pins.pin(*manifest_of(0, 1))
    values(nodes.job([1, 0], trains(3)))
    assert check_disks(nodes, 2) == [1, 4, 5]
    assert not nodes.files(0, "pinned") and nodes.files(1, "pinned") == ["1/pinned"]
    with pytest.raises(errors.DirectoryError, match="is decided by rank 0"):
        pins.pin(*manifest_of(0, 5))
    assert pins.unpin(*manifest_of(1, 1))
    values(nodes.job([0, 1], trains(1)))
    assert check_disks(nodes, 2) == [5, 6]


# -- copies that no rank sees all of -----------------------------------------------------------------------------------


def test_copies_on_several_nodes_are_one_tensor_if_they_are_equal_and_none_if_they_are_not(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first = values(nodes.job([0, 1], trains(2), replicas="apart"))
    assert nodes.files(0)[-1].endswith("rank_00000") and nodes.files(1)[-1].endswith("rank_00001")
    caplog.set_level(logging.INFO)
    check(first, values(nodes.job([1, 0, 1], trains(0))), 2)
    assert {each[1] for each in said(caplog)} == {"resharded"}
    for node in (0, 1):
        shutil.rmtree(nodes.disk(node))
    values(nodes.job([0, 1], trains(2, alike=False), alike=False))
    refused = [thread.error for thread in nodes.job([1, 0, 1], trains(0, alike=False), alike=False)]
    assert all(isinstance(error, errors.MismatchError) for error in refused), refused
    assert all("rank(s) 0 and 1 of the checkpoint hold different ones" in str(error) for error in refused)


def test_mutation_copies_that_nobody_compares_are_mixed(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    values(nodes.job([0, 1], trains(2, alike=False), alike=False))
    monkeypatch.setattr(copies, "unlike", lambda told: {})
    assert [thread.error for thread in nodes.job([1, 0, 1], trains(0, alike=False), alike=False)] == [None] * 3


@pytest.mark.quick
def test_copies_are_compared_part_by_part_among_all_that_hold_them() -> None:
    def told(name: str, group: list[int], cut: list[int], digest: str, dtype: str = "F32") -> list[Any]:
        return [name, group, dtype, [8], cut, digest]

    halves = [told("param/w", group, [at, 4], f"half {at}") for group in ([0, 1], [2, 3]) for at in (0, 4)]
    assert copies.unlike(halves) == {}
    halves[3][-1] = "another half"
    assert copies.unlike([*halves, told("param/v", [0], [0, 8], "whole")]) == {"param/w": ((0, 1), (2, 3))}
    for other in (told("param/w", [2, 3], [0, 8], "whole"), told("param/w", [2, 3], [0, 4], "half 0", "F64")):
        with pytest.raises(errors.MismatchError, match="param/w"):
            copies.unlike([*halves[:2], other])


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_what_is_read_to_compare_small_copies_is_counted(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    first = values(nodes.job([0, 0], trains(1), replicas="apart"))
    caplog.set_level(logging.INFO)
    check(first, values(nodes.job([0], trains(0))), 1)
    ((_, how, read, _),) = said(caplog)
    sizes = [tensor.nbytes for tensor in first[0][1].values()]
    small = sum(nbytes for nbytes in sizes if nbytes <= 64 << 10)
    assert how == "resharded" and read >= sum(sizes) + 2 * small
