# SPDX-License-Identifier: Apache-2.0
"""`reader.direct_io`: a restore takes files out of the page cache where it holds them, and says so; who asks what is on
the disk reads the disk. What is restored is the same, bit for bit, and damage is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit.waiting import Job, equal

from layerwise_dist import _native, errors
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.verifying import verify
from layerwise_dist.storage import reader, writer


@pytest.fixture
def trained(tmp_path: Path) -> list[torch.Tensor]:
    """What step 2 has, in a directory with steps 1 and 2, none of whose shards is in the page cache."""
    if _native.PosixEnv().direct_io(tmp_path) is None:
        pytest.skip("no direct I/O here: everything goes through the page cache")
    job = Job(tmp_path)
    with job.ckpt:
        job.to(2)
    for path in shards(tmp_path):
        drop(path)
    return job.held()


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def drop(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def reads(root: Path, held: list[torch.Tensor], step: int = 2, direct_io: str = "auto") -> tuple[int, int]:
    """Bytes that a restore reads, and those of them that come out of the page cache."""
    job = Job(root, reader={"direct_io": direct_io})
    with job.ckpt:
        assert job.ckpt.restore() == step
        assert equal(job.held(), held)
        stats = job.ckpt.stats()
    return int(stats["bytes_read"]), int(stats["bytes_read_cached"])


def test_a_restore_takes_out_of_the_page_cache_what_is_there(tmp_path: Path, trained: list[torch.Tensor]) -> None:
    nbytes, cached = reads(tmp_path, trained)
    assert nbytes > 256 * 256 * 4 and cached == 0
    newest = shards(tmp_path)[-1]
    newest.read_bytes()
    assert reads(tmp_path, trained) == (nbytes, nbytes)
    assert reads(tmp_path, trained, direct_io="off") == (nbytes, 0)
    with newest.open("rb") as file:  # a small part of it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(4096)
    assert reads(tmp_path, trained) == (nbytes, 0)


def test_mutation_a_writer_that_passes_the_choice_by_is_caught(
    tmp_path: Path, trained: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = writer.PCCheckAdapter

    def unasked(*args: object, reads: str, **options: object) -> writer.PCCheckAdapter:
        return made(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "PCCheckAdapter", unasked)
    shards(tmp_path)[-1].read_bytes()
    with pytest.raises(AssertionError):
        assert reads(tmp_path, trained, direct_io="off")[1] == 0


def test_damage_in_the_page_cache_and_on_the_disk_is_passed_over(tmp_path: Path, trained: list[torch.Tensor]) -> None:
    older, newest = shards(tmp_path)
    offset = newest.stat().st_size // 2
    with newest.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    for path in (older, newest):
        path.read_bytes()
    job = Job(tmp_path)
    with job.ckpt:
        assert job.ckpt.restore() == 1
        assert job.ckpt.stats()["bytes_read_cached"] == job.ckpt.stats()["bytes_read"] > 0
    again = Job(tmp_path)
    with again.ckpt, pytest.raises(errors.DamageError):
        again.ckpt.restore(2)


@pytest.mark.parametrize("mutated", [False, True], ids=["as it is", "mutation: through the page cache"])
def test_verify_reads_the_disk(
    tmp_path: Path, trained: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, mutated: bool
) -> None:
    for path in shards(tmp_path):
        path.read_bytes()
    found: list[bool] = []
    opened: Callable[..., _native.ShardReader] = reader.open_file

    def watched(*args: object) -> _native.ShardReader:
        found.append((file := opened(*args)).cached)
        return file

    monkeypatch.setattr(reader, "open_file", watched)
    if mutated:
        pool = _native.WriterPool
        monkeypatch.setattr(_native, "WriterPool", lambda depth: pool(depth, reads="auto"))
    assert verify(Catalogue(str(tmp_path)), None).good
    assert set(found) == {mutated}
