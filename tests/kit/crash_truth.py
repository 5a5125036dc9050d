# SPDX-License-Identifier: Apache-2.0
"""What ranks held in a directory and what was said to be durable there; and the check of what a crash left."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from kit.shards import Tensors, beginning_of, content_hash, differing, read_shard, read_tensors
from layerwise_dist import _native
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory
from layerwise_dist.commit.records import Manifest
from layerwise_dist.commit.shards import open_base, open_shard
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import filenames

ROOT = "/ckpt"


@dataclass
class Truth:
    """Of one directory. A position is (phase, step); (phase, 0) is the branch record that began it."""

    env: Any
    root: str = ROOT
    states: dict[tuple[int, int], dict[int, Tensors]] = field(default_factory=dict, repr=False)
    branches: dict[int, int] = field(default_factory=dict)
    published: dict[bytes, tuple[tuple[int, int], int]] = field(default_factory=dict, repr=False)
    # Commits that were read and compared: their position, and what the ranks held then, by the bytes of their files.
    compared: dict[Any, tuple[tuple[int, int], dict[int, Tensors]]] = field(default_factory=dict, repr=False)

    def promised(self, prefix: int) -> tuple[int, int]:
        """The newest position that was said to be durable within the first `prefix` entries of the log."""
        found = (0, 0)
        for index, text in self.env.marks():
            kind, *values = text.split()
            if index < prefix and kind == "committed":
                found = max(found, (int(values[0]), int(values[1])))
        return found

    def attached(self, prefix: int) -> tuple[int, str]:
        """Epoch and identity of the newest session whose attach() had returned within the first `prefix` entries."""
        found = (0, "")
        for index, text in self.env.marks():
            kind, *values = text.split()
            if index < prefix and kind == "attached":
                found = (int(values[0]), values[1])
        return found

    def check(self, env: Any, promised: tuple[int, int], attached: tuple[int, str] = (0, "")) -> tuple[int, int]:
        """Asserts that `env` holds exactly what may be there; returns the position of its newest record."""
        manager = CheckpointMetadataManager(env, self.root)
        try:
            inventory = manager.inventory()
        except FileNotFoundError:
            inventory = Inventory({}, {}, {}, [])
        assert not inventory.damaged, f"records are damaged: {inventory.damaged}"
        if attached[0]:
            self._check_start(env, manager, attached)
        positions = {seq: (self.branches[seq], 0) for seq in inventory.branches if seq in self.branches}
        unsaid = [seq for seq in inventory.branches if seq not in self.branches]
        assert not unsaid, f"branch records {unsaid} were never announced"
        for seq, manifest in inventory.manifests.items():
            positions[seq] = self._check_commit(env, manager, manifest)
        if positions:
            try:
                manager.read_identity()
            except (FileNotFoundError, DamageError) as error:
                raise AssertionError(f"there are records, and the identity is gone: {error}") from error
        newest = positions[max(positions)] if positions else (0, 0)
        assert newest == max(positions.values(), default=(0, 0)), (
            f"the newest record stands for {newest}, of {positions}"
        )
        assert newest >= promised, f"the newest record stands for {newest}, {promised} was said to be committed"
        self._check_retired(env, inventory, promised)
        lineage = inventory.lineage()
        if positions and max(positions) in inventory.manifests:
            assert lineage and lineage[0].seq == max(positions)
        return newest

    def _check_start(self, env: Any, manager: CheckpointMetadataManager, attached: tuple[int, str]) -> None:
        """What attach() had made: no later session may get the same epoch, or see another directory."""
        epoch, identity = attached
        try:
            owner = json.loads(env.read_file(f"{self.root}/{filenames.OWNER}", 4096))
        except (FileNotFoundError, ValueError) as error:
            raise AssertionError(f"epoch {epoch} was taken, and {filenames.OWNER} is gone or torn: {error}") from error
        assert owner["epoch"] >= epoch, f"epoch {epoch} was taken, {filenames.OWNER} names {owner['epoch']}"
        try:
            found = manager.read_identity().identity
        except (FileNotFoundError, DamageError) as error:
            raise AssertionError(f"the directory was made, and its identity is gone: {error}") from error
        assert found == identity, f"the directory was {identity}, it is {found}"

    def _check_retired(self, env: Any, inventory: Inventory, promised: tuple[int, int]) -> None:
        """A file that begins as a commit of the past holds that commit's data still: no old header over other data."""
        paths = []
        for folder in [attempt.folder for attempt in inventory.unfinished]:
            paths += [f"{folder}/{name}" for name in env.list_dir(f"{self.root}/{folder}") if name.startswith("rank_")]
        if paths or inventory.manifests:
            paths += [name for name in env.list_dir(self.root) if filenames.is_spare(name)]
        for path in paths:
            data = env.read_file(f"{self.root}/{path}", 1 << 30)
            position, content = self.published.get(beginning_of(data), ((99, 0), 0))
            if position <= promised:
                assert content_hash(data) == content, f"{path} begins as the commit of {position}, and holds other data"

    def _check_commit(self, env: Any, manager: CheckpointMetadataManager, manifest: Manifest) -> tuple[int, int]:
        """Where the job was. A sweep sees the same bytes many times over; they are read and compared once."""
        contents = contents_of(env, manager, manifest)
        place, states = self.compared.get(contents, ((0, 0), {}))
        if self.states.get(place) is not states:
            pool = _native.WriterPool(1)
            try:
                place = self._compare_commit(env, pool, manager, manifest)
            finally:
                pool.close()
            self.compared[contents] = place, self.states[place]
        return place

    def _compare_commit(
        self, env: Any, pool: Any, manager: CheckpointMetadataManager, manifest: Manifest
    ) -> tuple[int, int]:
        places = set()
        for rank in range(manifest.world_size):
            path = manager.shard_path(manifest, rank)
            try:
                tensors, place = read_shard(open_shard(manager, pool, manifest, rank))
                base = open_base(manager, pool, manifest, rank)
                if base is not None:
                    tensors |= read_tensors(base)
            except DamageError as error:
                raise AssertionError(f"a manifest names a shard that does not verify: {error}") from error
            places.add((place["phase"], place["step"]))
            assert (place["phase"], place["step"]) in self.states, f"{path}: nobody was ever at {place}"
            wrong = differing(tensors, self.states[place["phase"], place["step"]][rank])
            assert not wrong, f"{path}: not what rank {rank} held at {place}: {wrong}"
        assert len(places) == 1 and {step for _, step in places} == {manifest.step}, (
            f"{manager.root}: a mix of {places}"
        )
        return places.pop()


def contents_of(env: Any, manager: CheckpointMetadataManager, manifest: Manifest) -> tuple[Any, ...]:
    """A manifest, and the hash of each file that it names; None for one that is not there."""
    paths = [manager.shard_path(manifest, rank) for rank in range(manifest.world_size)]
    for rank, shard in enumerate(manifest.shards):
        paths += [manager.base_path(shard.base.attempt, rank)] if shard.base is not None else []
    hashes = []
    for path in paths:
        try:
            hashes.append(_native.xxh3_64(env.read_file(path, 1 << 30)))
        except FileNotFoundError:
            hashes.append(None)
    return manifest.model_dump_json(), *hashes
