# SPDX-License-Identifier: Apache-2.0
"""Directories that are local to a node: one checkpoint of all, whatever is lost of some.

Nodes are pretended: a directory each, and what tells nodes apart is patched (tests/jobs/failing.py).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kit.crash import build, in_ranks, settings, tensors_of, train, try_ranks
from kit.runners import Warm, told
from kit.shards import differing

from layerwise_dist._native import PosixEnv
from layerwise_dist.bench.light import shard_bytes
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.listing import ls
from layerwise_dist.commit import places
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.errors import DamageError, DirectoryError
from layerwise_dist.restore import nodes

NODE_OF = [0, 0, 1, 1]


def run(warm: Warm, out: Path, total: int, *, ends: bool = True, **more: Any) -> list[list[dict[str, Any]]]:
    """What each rank tells of one start."""
    before = [len(told(out, rank)) for rank in range(4)]
    spec = {
        "dir": str(out / "ckpt"), "out": str(out), "ranks": 4, "node_of": NODE_OF, "total": total, "timeout": 5.0,
        "on_failure": "warn", **more,
    }  # fmt: skip
    job = warm.start("failing.py", 0, json.dumps(spec))
    if ends:
        finished = job.wait(40)
        assert finished.returncode == 0, finished.output[-3000:]
    else:
        deadline = time.monotonic() + 40
        while not all(any("left" in line for line in told(out, rank)[before[rank] :]) for rank in (0, 1, 3)):
            assert time.monotonic() < deadline, job.output()[-3000:]
            time.sleep(0.01)
        job.kill()
    return [told(out, rank)[before[rank] :] for rank in range(4)]


def check(out: Path, steps: list[int]) -> None:
    """Each node has the manifests of these steps, its own ranks' shards, and nothing else."""
    for node in (0, 1):
        root = out / f"ckpt-{node}"
        manager = CheckpointMetadataManager(PosixEnv(), str(root))
        inventory = manager.inventory()
        assert sorted(manifest.step for manifest in inventory.manifests.values()) == steps
        assert not inventory.unfinished and not inventory.damaged
        for manifest in inventory.manifests.values():
            assert manifest.places == [[0, 1], [2, 3]]
            folder = root / manifest.attempt_id.folder
            mine = [rank for rank in range(4) if NODE_OF[rank] == node]
            assert sorted(os.listdir(folder)) == ["manifest.json", *(f"rank_{rank:05d}.safetensors" for rank in mine)]
            for rank in mine:
                assert Path(manager.shard_path(manifest, rank)).read_bytes() == shard_bytes(manifest.attempt_id, rank)
        assert sorted(name for name in os.listdir(root) if not name.startswith("step_")) == ["identity.json", "owner"]


def test_a_job_on_two_nodes_commits_to_both_and_goes_on(warm: Warm, tmp_path: Path) -> None:
    first = run(warm, tmp_path, 6)
    assert all(lines[0]["start"] == 0 and lines[-1] == {"end": 6} for lines in first)
    check(tmp_path, [5, 6])
    for node in (0, 1):
        catalogue = Catalogue(str(tmp_path / f"ckpt-{node}"))
        assert ls(catalogue).good, "what is on the other node is not missing"
        (shard,) = [record for record in catalogue.here(catalogue.chosen()) if record.rank % 2]
        assert shard.rank == 2 * node + 1
        path = Path(catalogue.manager.shard_path(catalogue.chosen(), shard.rank))
        path.rename(tmp_path / "away")
        assert f"{shard.file} is missing" in str(ls(catalogue).data)
        (tmp_path / "away").rename(path)
    again = run(warm, tmp_path, 2)
    assert all(lines[0]["start"] == 6 and lines[-1] == {"end": 2} for lines in again)
    check(tmp_path, [7, 8])


@pytest.mark.parametrize("stage", ["manifest_write", "manifest_rename", "manifest_flush", "retire"])
def test_a_node_that_dies_at_any_moment_of_a_commit_is_brought_what_the_other_has(
    warm: Warm, tmp_path: Path, stage: str
) -> None:
    seen = run(warm, tmp_path, 6, ends=False, rank=2, stage=stage, kind="kill", attempt=3)
    reported = max(line["committed"] for lines in seen for line in lines if "committed" in line)
    again = run(warm, tmp_path, 1)
    (begun,) = {lines[0]["start"] for lines in again}
    # Once rank 0 has written the manifest the step is a commit, though nobody was told so.
    assert begun == (2 if stage == "manifest_write" else 3 if stage != "retire" else reported)
    assert begun >= reported
    check(tmp_path, [begun, begun + 1])


def test_a_disk_that_is_full_on_one_node_ends_that_attempt_on_all(warm: Warm, tmp_path: Path) -> None:
    for lines in run(warm, tmp_path, 6, rank=2, stage="manifest_write", kind="full", attempt=3):
        assert [line.get("committed") or -line["aborted"] for line in lines[1:-1]] == [1, 2, -3, 4, 5, 6]
        assert "rank 2, which keeps the manifests of its node" in lines[3]["why"] and "No space left" in lines[3]["why"]
    check(tmp_path, [5, 6])


def test_a_manifest_that_one_node_could_not_publish_is_a_commit_and_stops_the_session(
    warm: Warm, tmp_path: Path
) -> None:
    for lines in run(warm, tmp_path, 9, ends=True, rank=2, stage="manifest_rename", kind="broken", attempt=3):
        error = next(line["error"] for line in lines if "raised" in line)
        assert "step 3 is committed, but its manifest is not on every node: rank 2" in error
        assert not [line for line in lines if line.get("committed") == 3]
    assert {lines[0]["start"] for lines in run(warm, tmp_path, 1)} == {3}
    check(tmp_path, [3, 4])


def test_a_replaced_disk_is_an_error_that_says_which_node_lacks_what(warm: Warm, tmp_path: Path) -> None:
    run(warm, tmp_path, 3)
    shutil.move(tmp_path / "ckpt-1", tmp_path / "away")
    for lines in run(warm, tmp_path, 1):
        assert lines[0]["refused"].startswith("DirectoryError: ranks 2-3 on ")
        assert "holds nothing, and ranks 0-1 on " in lines[0]["refused"] and "up to step 3" in lines[0]["refused"]
    shutil.rmtree(tmp_path / "ckpt-1")
    shutil.move(tmp_path / "away", tmp_path / "ckpt-1")
    assert {lines[0]["start"] for lines in run(warm, tmp_path, 1)} == {3}
    check(tmp_path, [3, 4])


def test_a_manifest_on_any_node_is_the_commit(warm: Warm, tmp_path: Path) -> None:
    run(warm, tmp_path, 3)
    (newest,) = (tmp_path / "ckpt-0").glob("step_0000000003-*/manifest.json")
    newest.unlink()
    assert {lines[0]["start"] for lines in run(warm, tmp_path, 1)} == {3}
    check(tmp_path, [3, 4])


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank, a thread here, is a node."""
    monkeypatch.setattr(places, "place", lambda: threading.current_thread().name)


def engine(transport: LocalTransport, root: Path, salt: int, **options: Any) -> tuple[Any, Any, Any]:
    model, optimizer = build(transport.rank, salt)
    node = settings(str(root / str(transport.rank)))
    return model, optimizer, assembly.assemble(model, optimizer, node, transport, PosixEnv(), **options)


def trained(root: Path, total: int, *, restore: int | None = None) -> list[dict[int, Any]]:
    def body(transport: LocalTransport) -> dict[int, Any]:
        model, optimizer, ckpt = engine(transport, root, 1)
        held = {}
        with ckpt:
            start = ckpt.restore(restore)
            held[start] = tensors_of(model, optimizer)
            for step in ckpt.steps(total):
                train(model, optimizer, transport.rank, restore or 0, step)
                held[step + 1] = tensors_of(model, optimizer)
        return held

    return in_ranks(body)


def refused(root: Path, step: int | None = None, *, world: int = 2) -> list[BaseException | None]:
    """How a restore fails, on each rank."""

    def body(transport: LocalTransport) -> None:
        _, _, ckpt = engine(transport, root, 2)
        with ckpt:
            ckpt.restore(step)

    return [thread.error for thread in try_ranks(body, world=world)]


def test_an_engine_restores_and_rolls_back_from_disks_of_nodes(two_nodes: None, tmp_path: Path) -> None:
    first = trained(tmp_path, 4)
    second = trained(tmp_path, 5)
    back = trained(tmp_path, 5, restore=4)
    last = trained(tmp_path, 5)
    for rank in range(2):
        assert differing(second[rank][4], first[rank][4]) == [] and differing(back[rank][4], first[rank][4]) == []
        assert differing(back[rank][5], second[rank][5]), "another branch"
        assert list(last[rank]) == [5] and differing(last[rank][5], back[rank][5]) == []
        shutil.rmtree(next(iter((tmp_path / str(rank)).glob("branch_*"))), ignore_errors=True)


def test_a_shard_that_is_gone_from_one_node_makes_all_take_the_step_before(
    two_nodes: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained(tmp_path, 4)
    next(iter((tmp_path / "1").glob("step_0000000004-*/rank_00001.safetensors"))).unlink()
    gone = "step 4: no node of this job holds the shards of rank 1 (all of one disk)"
    errors = refused(tmp_path, 4)
    assert all(isinstance(error, DamageError) for error in errors)
    assert all(f"{gone}; complete on the nodes of this job: steps [3]" in str(error) for error in errors)
    found = trained(tmp_path, 3)
    assert gone in caplog.text
    for rank in range(2):
        assert list(found[rank]) == [3] and differing(found[rank][3], first[rank][3]) == []
    for shard in (tmp_path / "1").glob("step_*/rank_*"):
        shard.unlink()
    errors = refused(tmp_path)
    assert all(isinstance(error, DamageError) for error in errors), "never a start from 0"
    assert all("complete on the nodes of this job: steps none" in str(error) for error in errors)


def test_what_lay_on_a_node_that_is_lost_is_named_by_the_ones_that_are_left(two_nodes: None, tmp_path: Path) -> None:
    trained(tmp_path, 4)
    shutil.rmtree(tmp_path / "1")
    (error,) = refused(tmp_path, world=1)
    assert isinstance(error, DamageError) and "the shards of rank 1 (all of one disk)" in str(error)
    assert "complete on the nodes of this job: steps none" in str(error)


def test_ranks_that_changed_their_nodes_get_what_was_theirs(two_nodes: None, tmp_path: Path) -> None:
    first = trained(tmp_path, 4)
    for old, new in (("0", "away"), ("1", "0"), ("away", "1")):
        (tmp_path / old).rename(tmp_path / new)
    second = trained(tmp_path, 5)
    for rank in range(2):
        assert differing(second[rank][4], first[rank][4]) == []
        shards = {path.name for path in (tmp_path / str(rank)).glob("step_*/rank_*")}
        assert shards == {"rank_00000.safetensors", "rank_00001.safetensors"}, "each where it was written"
    assert differing(trained(tmp_path, 5)[1][5], second[1][5]) == []


def test_mutation_a_node_that_is_taken_to_hold_everything_is_found(
    two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_is_there", lambda manager, path: True)
    monkeypatch.setattr(nodes, "is_as_committed", lambda *_: True)
    with pytest.raises((AssertionError, DamageError)):
        test_ranks_that_changed_their_nodes_get_what_was_theirs(None, tmp_path)


def test_an_empty_node_may_be_taken_in_by_a_fresh_start(two_nodes: None, tmp_path: Path) -> None:
    trained(tmp_path, 2)
    shutil.rmtree(tmp_path / "1")

    def fresh(transport: LocalTransport) -> int:
        model, optimizer, ckpt = engine(transport, tmp_path, 3, fresh=True)
        with ckpt:
            for step in ckpt.steps(2):
                train(model, optimizer, transport.rank, 7, step)
        return ckpt.committed_step

    errors = [thread.error for thread in try_ranks(lambda transport: engine(transport, tmp_path, 2))]
    assert all(isinstance(error, DirectoryError) and "rank 1 on " in str(error) for error in errors)
    shutil.rmtree(tmp_path / "1")
    assert in_ranks(fresh) == [2, 2]
    assert [list(held) for held in trained(tmp_path, 2)] == [[2], [2]]


def vote(keeper: int, node: str, network: str | None = None) -> dict[str, Any]:
    return {"keeper": {"value": keeper}, "host": f"host of {node}", "node": node, "network": network}


def test_directories_that_are_no_nodes_disks_are_a_missing_mount() -> None:
    assert places.grouped([vote(0, "a"), vote(1, "b"), vote(0, "a"), vote(1, "b")], "/c") == [[0, 2], [1, 3]]
    with pytest.raises(DirectoryError, match="rank 0 and rank 1 are both on host of a, and /c is not one directory"):
        places.grouped([vote(0, "a"), vote(1, "a")], "/c")
    with pytest.raises(
        DirectoryError, match="rank 0 is shared by host of a, host of b, and rank 2 on host of c sees another"
    ):
        places.grouped([vote(0, "a"), vote(0, "b"), vote(2, "c")], "/c")
    with pytest.raises(DirectoryError, match="rank 0 is on NFS, and rank 1 on host of b sees another"):
        places.grouped([vote(0, "a", "NFS"), vote(1, "b")], "/c")
