# SPDX-License-Identifier: Apache-2.0
"""Power fails while something makes a checkpoint outside a training loop: an import, a copy, `dcp.save`. It is whole or
it is not there; once it was said to be there, it stays.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.crash import POLICIES
from kit.made import copied, copied_with_bases, imported, saved
from kit.mutant_env import Deferred, WithEnv
from kit.plays import Play, sweep
from kit.swept import Swept, Told

from layerwise_dist.capture import survey
from layerwise_dist.commit.copying import CheckpointCopy, CopiedFile
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.session import Committer
from layerwise_dist.errors import DamageError
from layerwise_dist.interop.one_commit import OneCommit
from layerwise_dist.storage.adapter import ShardWrite
from layerwise_dist.storage.removal import remove


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """It is there for whoever looks for it with the operating system's calls; what is in it is in memory."""
    path = tmp_path / "ckpt"
    path.mkdir()
    return str(path)


@pytest.mark.parametrize("made", [imported, copied, saved], ids=lambda made: made.__name__)
def test_what_is_made_outside_a_loop_is_whole_or_not_there_after_power_loss(
    folder: str, made: Callable[..., Play], long: bool, told: Told
) -> None:
    found = made(folder)
    swept = sweep(found, 100 if long else 1)
    told.crashes(made.__name__, swept)
    assert swept.states > 4 * found.env.log_size


# Flushes and renames of these, by what is done and to what. Of a copy's, all lie in a directory of its own.
OF_IMPORT = [
    ("sync", "*/rank_00000.safetensors.partial"), ("rename", "*/rank_00000.safetensors"),
    ("sync_dir", "{root}/step_*"), ("sync_dir", "{root}"), ("sync", "*/manifest.json.tmp"),
    ("rename", "*/manifest.json"),
]  # fmt: skip
OF_COPY = [
    ("sync", "{root}.copy*/rank_00000.safetensors"), ("sync", "{root}.copy*/identity.json.tmp"),
    ("rename", "{root}.copy*/identity.json"), ("sync_dir", "{root}.copy*/step_*"), ("sync_dir", "{root}.copy*-1"),
    ("sync_dir", "{above}"), ("sync", "{root}.copy*/manifest.json.tmp"), ("rename", "{root}.copy*/manifest.json"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("made", "operation", "pattern"),
    [*((imported, *each) for each in OF_IMPORT), *((copied, *each) for each in OF_COPY)],
)
def test_mutation_an_import_and_a_copy_without_one_of_their_flushes_are_found(
    folder: str, made: Callable[..., Play], operation: str, pattern: str
) -> None:
    envs: list[Any] = []

    def forgetful(env: Any) -> None:
        env.drop(operation, pattern.format(root=folder, above=os.path.dirname(folder)))
        envs.append(env)

    with pytest.raises((AssertionError, DamageError, OSError)):
        sweep(made(folder, forgetful), 8)
    assert envs[0].dropped > 0


def test_each_flush_and_rename_of_an_import_and_a_copy_has_a_mutation(folder: str) -> None:
    """The start of an import is that of a job."""
    for made, mutations, first in ((imported, OF_IMPORT, f"{folder}/step_"), (copied, OF_COPY, f"{folder}.copy")):
        found = made(folder)
        patterns = [(kind, text.format(root=folder, above=os.path.dirname(folder))) for kind, text in mutations]
        log = [found.env.log_entry(number).split() for number in range(found.env.log_size)]
        begins = next(number for number, entry in enumerate(log) if entry[1].startswith(first))
        done = {(kind, rest[-1]) for kind, *rest in log[begins:] if kind in ("sync", "sync_dir", "rename")}
        without = [
            (kind, path)
            for kind, path in sorted(done)
            if not any(kind == each and fnmatch.fnmatchcase(path, pattern) for each, pattern in patterns)
        ]
        assert not without, without


def shards_of_a_copy_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, publish = CheckpointCopy._copy, CheckpointCopy.publish
    later: list[tuple[CopiedFile, Callable[[int], None]]] = []

    def first(self: CheckpointCopy) -> None:
        publish(self)
        for each in later:
            copy(self, *each)

    monkeypatch.setattr(CheckpointCopy, "_copy", lambda self, *file: later.append(file))
    monkeypatch.setattr(CheckpointCopy, "verify", lambda self, advance: None)
    monkeypatch.setattr(CheckpointCopy, "publish", first)


def test_mutation_a_copy_whose_manifest_comes_first_is_found(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep(copied(folder), 1).states
    shards_of_a_copy_come_last(monkeypatch)
    with pytest.raises(AssertionError, match="power loss.*its shard is gone"):
        sweep(copied(folder), 1)


def the_shard_of_an_import_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content is durable under another name; the name, and whether it is there, come after the manifest."""
    persist, commit = ShardWrite.persist, Committer.commit
    later: list[Deferred] = []

    def early(write: ShardWrite, timeout_s: float) -> Any:
        later.append(Deferred(write._adapter.env))
        write._adapter = WithEnv(write._adapter, later[-1])  # type: ignore[assignment]
        return persist(write, timeout_s)

    def first(committer: Committer, *of: Any) -> None:
        commit(committer, *of)
        while later:
            later.pop().do()

    def without_a_look(self: OneCommit, reports: Any) -> None:
        self._committer.commit(self.attempt.seq, self.attempt.step, [self._durable(each) for each in reports])

    monkeypatch.setattr(ShardWrite, "persist", early)
    monkeypatch.setattr(Committer, "commit", first)
    monkeypatch.setattr(OneCommit, "commit", without_a_look)


def test_mutation_an_import_whose_manifest_comes_first_is_found(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    the_shard_of_an_import_comes_last(monkeypatch)
    with pytest.raises(AssertionError, match="power loss.*its shard is gone"):
        sweep(imported(folder), 1)


def withdrawn_without_a_flush(self: CheckpointMetadataManager, attempt: Any, *, anyway: bool = False) -> None:
    self._unlink(self.manifest_path(attempt))


def withdrawn_after_the_shard(self: CheckpointMetadataManager, attempt: Any, *, anyway: bool = False) -> None:
    remove(self.env, self.folder(attempt), ["rank_00000.safetensors"])
    withdrawn_without_a_flush(self, attempt)


@pytest.mark.parametrize("careless", [withdrawn_without_a_flush, withdrawn_after_the_shard])
def test_mutation_a_save_by_dcp_that_lets_an_older_one_go_too_early_is_found(
    folder: str, careless: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointMetadataManager, "withdraw", careless)
    with pytest.raises(AssertionError, match="power loss.*its shard is gone"):
        sweep(saved(folder), 4)


@pytest.mark.parametrize(
    "left_out", [None, ("sync", "*.copy/base/*"), ("sync_dir", "*.copy/base"), ("sync_dir", "*.copy/base/*")], ids=str
)
def test_a_copy_has_the_frozen_parameters_that_it_refers_to(
    folder: str, left_out: tuple[str, str] | None, long: bool, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks. Whole, or with a flush left out, which is found."""
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    copy, swept = copied_with_bases(folder, left_out), Swept()

    def swept_whole() -> None:
        seeds = 100 if long and left_out is None else 1
        for prefix in range(copy.begins, copy.story.env.log_size + 1):
            promised = (1, 2) if prefix >= copy.said else (0, 0)
            for number, policy in enumerate([*POLICIES, *["random"] * seeds]):
                left = copy.story.env.crash(prefix, 7919 * prefix + number, policy)
                if swept.is_new(left, promised):
                    copy.story.check(left, promised)

    if left_out is None:
        swept_whole()
        told.crashes("copied, of two ranks with frozen parameters", swept)
    else:
        with pytest.raises(AssertionError, match="file is missing|does not verify"):
            swept_whole()
