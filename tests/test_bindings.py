# SPDX-License-Identifier: Apache-2.0
"""What Python hands to the native core: what cannot be is a named error, and never a crash or another number."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise_dist import _native

pytestmark = pytest.mark.quick


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[_native.ShardReader]:
    path = tmp_path / "shard"
    path.write_bytes(bytes(8192))
    pool = _native.WriterPool(1)
    yield _native.ShardReader(_native.PosixEnv(), pool, path)
    pool.close()


def writer(path: Path, pool: _native.WriterPool, **options: Any) -> _native.ShardWriter:
    """Of one block of 4096 bytes."""
    plan = _native.Plan([(4096, 4096)], [(0, 0, 0, 0, 4096)], 1)
    return _native.ShardWriter(_native.PosixEnv(), pool, plan, path, **options)


WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a negative size": (lambda: _native.BufferPool(-1), ValueError, "-1 is negative"),
    "a negative size to share": (lambda: _native.BufferPool.shared(0, -7), ValueError, "-7 is negative"),
    "a negative place": (lambda: _native.BufferPool(8192).adopt(-4096, 4096), ValueError, "-4096 is negative"),
    "an unknown way to read": (lambda: _native.WriterPool(1, reads="never"), ValueError, "reads 'never' is not"),
    "names without values": (lambda: _native.other_objects([], [], ["a"], []), ValueError, "a name for each value"),
    "a hold on nothing": (lambda: _native.MemoryHold([(0, 0)]), ValueError, "an owner at address 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_is_named(what: str) -> None:
    call, kind, says = WRONG[what]
    with pytest.raises(kind, match=says):
        call()


def test_a_closed_shard_and_a_negative_range_are_refused(shard: _native.ShardReader) -> None:
    assert shard.size == 8192 and shard.read(8000, 4096) == bytes(192) and shard.read(9000, 1) == b""
    with pytest.raises(ValueError, match="-1 is negative"):
        shard.read(-1, 5)
    with pytest.raises(ValueError, match="-4096 is negative"):
        shard.read_blocks([(0, -4096, None)], [])
    shard.close()
    shard.close()
    for use in (lambda: shard.size, lambda: shard.cached, lambda: shard.read(0, 1), lambda: shard.read_blocks([], [])):
        with pytest.raises(ValueError, match="use of a closed shard"):
            use()


def test_a_buffer_is_submitted_once_and_by_nobody_who_looks_into_it(tmp_path: Path) -> None:
    buffers = _native.BufferPool(16 * 4096)
    pool = _native.WriterPool(1, "posix", buffers, 4096)
    to = writer(tmp_path / "shard", pool)
    with pytest.raises(ValueError, match="-1 is negative"):
        to.submit(-1, 1)
    buffer = buffers.acquire(4096, 0)
    assert buffer is not None and buffer.place >= 0
    with memoryview(buffer), pytest.raises(BufferError, match="a view of it still uses"):
        to.submit_buffer(0, 1, buffer)
    to.set_address(0, buffer.address)
    to.submit_buffer(0, 1, buffer)
    for use in (lambda: to.submit_buffer(0, 1, buffer), lambda: buffer.place):
        with pytest.raises(RuntimeError, match="released buffer"):
            use()
    assert to.wait(30) and to.wait_leases(30) and (to.completed, to.bytes_written) == (1, 4096)
    assert to.abort(30) and pool.close()


def test_a_shard_without_hashes_has_none(tmp_path: Path) -> None:
    pool, memory = _native.WriterPool(1), torch.zeros(1024)
    to = writer(tmp_path / "shard", pool, hash=False)
    to.set_address(0, memory.data_ptr())
    to.submit(0, 1)
    assert to.wait(30)
    assert to.hashes_hex() == ""
    assert to.abort(30) and pool.close() and pool.backend == "posix"


@pytest.mark.parametrize(
    ("mappings", "sizes", "names", "values"),
    [
        ([{}], [], [], []), ([{}], [0], ["a"], [1]), ([{"a": 1}], [2], ["a"], [1]), ([{"b": 1}], [1], ["a"], [1]),
        ([{"a": 1, "b": 2}], [1], ["a"], [1]),
    ],
)  # fmt: skip
def test_mappings_with_other_names_are_others(
    mappings: list[Any], sizes: list[int], names: list[str], values: list[Any]
) -> None:
    assert _native.other_objects(mappings, sizes, names, values) is None


def test_files_of_an_env(tmp_path: Path) -> None:
    env = _native.PosixEnv()
    file = env.create(tmp_path / "file")
    file.pwrite(b"abcd", 0)
    file.truncate(2)
    file.sync()
    file.close()
    there = env.open(tmp_path / "file")
    assert (there.size, there.pread(10, 0), there.pread(10, 2), there.pread(1, 5)) == (2, b"ab", b"", b"")
    for absent in (lambda: env.open(tmp_path / "none"), lambda: env.reuse(tmp_path / "none", tmp_path / "other")):
        with pytest.raises(FileNotFoundError) as error:
            absent()
        assert error.value.filename == str(tmp_path / "none")
    with pytest.raises(OSError) as refused:
        _native.NvmEnv().probe(tmp_path)
    assert refused.value.errno in (errno.EOPNOTSUPP, errno.EINVAL) or os.path.exists("/dev/pmem0")


def test_a_mock_counts_and_writes_nothing(tmp_path: Path) -> None:
    env = _native.MockEnv()
    env.make_dir("/nowhere")
    file = env.create("/nowhere/shard")
    file.pwrite(bytes(4096), 0)
    file.sync()
    file.close()
    assert (env.files, env.bytes, env.syncs) == (1, 0, 1) and not Path("/nowhere").exists()
