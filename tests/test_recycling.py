# SPDX-License-Identifier: Apache-2.0
"""Files of retired checkpoints are written over by later ones: only by the protocol, and only where that is safe."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
from kit.crash import ROOT, Story

from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.session import Committer
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.storage import mounts
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.recycling import Recycler, recycles

pytestmark = pytest.mark.quick

WRITER = {"queue_depth": 2, "block_kb": 32}


def log_of(env: Any) -> list[str]:
    return [env.log_entry(i) for i in range(env.log_size)]


def reused(lines: list[str]) -> list[str]:
    """The renames of waiting files to new attempts."""
    return [line for line in lines if line.startswith("rename") and "/spare_" in line.split(" -> ")[0]]


def spares(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name.startswith("spare_"))


def test_in_a_steady_state_no_shard_is_created_or_removed() -> None:
    story = Story(testing.MemoryEnv())
    story.session(1, 7, keep_last=1, spares_from=2, writer=WRITER)
    log = log_of(story.env)
    steady = log[next(i for i, line in enumerate(log) if "make_dir" in line and "step_0000000003" in line) :]
    end = next(i for i, line in enumerate(steady) if "step_0000000007" in line and line.endswith("/manifest.json"))
    assert len(reused(steady)) == 2 * 5
    assert not [line for line in steady if line.startswith("create") and "rank_" in line]
    assert not [line for line in steady[:end] if line.startswith("unlink") and ("rank_" in line or "spare_" in line)]
    names = story.env.list_dir(ROOT)
    assert not [name for name in names if name.startswith("spare_")], "close() removes what still waits"
    assert len([name for name in names if name.startswith("step_")]) == 1


def test_what_waits_is_bounded_and_what_this_session_did_not_publish_is_not_touched() -> None:
    env = testing.MemoryEnv()
    recycler = Recycler(env, "/", 0, limit=3, file_mode=0o600)
    for seq in range(1, 7):
        attempt = AttemptId(1, seq, seq)
        env.make_dir(f"/{attempt.folder}")
        env.write_file(f"/{attempt.folder}/rank_00000.safetensors", b"x" * 8192)
        recycler.published(attempt, 4096)
        recycler.retire(attempt)
    recycler.retire(AttemptId(1, 9, 9))  # one that this rank never published
    deadline = time.monotonic() + 10
    while recycler.waiting() < 3 or len(env.list_dir("/")) > 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    taken = recycler.take()
    assert env.read_file(taken, 1 << 20) == bytes(4096) + b"x" * 4096
    assert recycler.close(10)
    assert env.list_dir("/") == [os.path.basename(taken)]


class Nfs(testing.MemoryEnv):
    def file_system(self, path: str) -> int:
        return 0x6969


@pytest.mark.parametrize(
    ("env", "recycle", "expected"),
    [
        (testing.MemoryEnv, "auto", True), (Nfs, "auto", False), (Nfs, True, True), (testing.MemoryEnv, False, False),
    ],
)  # fmt: skip
def test_a_network_file_system_is_left_alone_unless_told_otherwise(
    env: Callable[[], Any], recycle: Any, expected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    story = Story(env())
    with caplog.at_level(logging.INFO, "layerwise_dist"):
        story.session(1, 4, keep_last=1, spares_from=2 if expected else None, writer={**WRITER, "recycle": recycle})
    assert bool(reused(log_of(story.env))) == expected
    assert any("is on NFS" in record.getMessage() for record in caplog.records) == (env is Nfs and recycle == "auto")
    assert len([name for name in story.env.list_dir(ROOT) if name.startswith("step_")]) == 1


@pytest.mark.parametrize(("kind", "expected"), [("ext4", True), ("9p", False), ("fuse.sshfs", False)])
def test_what_is_mounted_counts_and_not_only_the_number_that_its_server_gives(
    tmp_path: Path, kind: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """statfs(2) in a 9P mount gives the number of the disk that its server has."""
    table = f"1 0 0:1 / / rw - nfs4 host:/ rw\n23 1 8:1 / /mnt rw,noatime shared:4 - {kind} source rw\n"
    monkeypatch.setattr(mounts, "mounts_and_id", lambda directory: (table, 23))
    assert recycles(testing.MemoryEnv(), str(tmp_path), "auto") is expected
    assert recycles(testing.MemoryEnv(), str(tmp_path), True)


def test_where_nobody_can_tell_who_has_a_file_open_it_is_said_once_and_files_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env = testing.FaultEnv(PosixEnv())
    env.fail(operation="reuse", path_pattern="*", errno=errno.EOPNOTSUPP, times=-1)
    story = Story(env, str(tmp_path / "ckpt"))
    with caplog.at_level(logging.INFO, "layerwise_dist"):
        story.session(1, 6, keep_last=1, writer=WRITER)
    said = [record.getMessage() for record in caplog.records if "who has a file open" in record.getMessage()]
    assert len(said) == 2, "once a rank"
    assert story.check(PosixEnv(), (1, 6)) == (1, 6)
    assert not spares(tmp_path / "ckpt") and len(list((tmp_path / "ckpt").glob("step_*"))) == 1


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_file_whose_header_could_not_be_blanked_is_removed_and_never_reused(tmp_path: Path, operation: str) -> None:
    env = testing.FaultEnv(PosixEnv())
    env.fail(operation=operation, path_pattern="*/spare_0000000100000001_00000")
    story = Story(env, str(tmp_path / "ckpt"))
    story.session(1, 6, keep_last=1, writer=WRITER)
    assert env.injected == 1
    lines = [line for line in env.trace() if "spare_0000000100000001_00000" in line]
    assert [line.split()[0] for line in lines if not line.startswith("reuse")].count("unlink") == 1
    assert lines[-1].startswith("unlink")
    assert story.check(PosixEnv(), (1, 6)) == (1, 6)


def test_the_file_of_an_attempt_that_failed_is_never_reused(tmp_path: Path) -> None:
    env = testing.FaultEnv(PosixEnv())
    env.fail(operation="sync", path_pattern="*step_0000000004*/rank_00001*.partial")
    story = Story(env, str(tmp_path / "ckpt"))
    with pytest.raises(Exception, match="step 4"):
        story.session(1, 4, keep_last=1, spares_from=2, writer=WRITER)
    trace = env.trace()
    failed = max(i for i, line in enumerate(trace) if re.match("sync .*step_0000000004.*rank_00001", line))
    assert env.injected == 1
    later = [line.split()[0] for line in trace[failed + 1 :] if "step_0000000004" in line and "rank_00001" in line]
    assert set(later) == {"unlink"}


READER = """
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
os.close(fd)  # the mapping alone keeps the file
print(hashlib.sha256(view).hexdigest(), flush=True)
sys.stdin.readline()
print(hashlib.sha256(view).hexdigest(), flush=True)
"""


class Careless(PosixEnv):
    """Takes a file over without asking who has it open."""

    def reuse(self, src: str, dst: str, mode: int = 0o600, direct: bool = False) -> Any:
        self.rename(src, dst)
        return OpenFile(dst)


class OpenFile:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR)

    def pwrite(self, data: bytes, offset: int) -> None:
        os.pwrite(self._fd, data, offset)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read_while_training_goes_on(root: Path, env: Any) -> tuple[str, str]:
    """What a process that mapped rank 0's shard of step 1 sees at once, and after four more checkpoints."""
    story = Story(env, str(root))
    readers: list[subprocess.Popen[str]] = []
    seen: list[str] = []

    def open_reader(engine: Any, step: int) -> None:
        if step == 1 and workings_of(engine).adapter.rank == 0:
            (shard,) = root.glob("step_0000000001-*/rank_00000.safetensors")
            readers.append(
                subprocess.Popen(
                    [sys.executable, "-c", READER, str(shard)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            seen.append(readers[0].stdout.readline().strip())

    try:
        story.session(1, 6, keep_last=1, writer=WRITER, at_step=open_reader)
        out, _ = readers[0].communicate("go\n", timeout=30)
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    story.check(PosixEnv(), (1, 6))
    return seen[0], out.strip()


@pytest.mark.slow
def test_a_reader_that_has_a_retired_shard_mapped_keeps_seeing_its_bytes(tmp_path: Path) -> None:
    before, after = read_while_training_goes_on(tmp_path / "ckpt", PosixEnv())
    assert before == after
    before, after = read_while_training_goes_on(tmp_path / "careless", Careless())
    assert before != after, "the proof that this test can fail: without the question the bytes change"


def late_writes(root: Path, spares_from: int | None = None) -> tuple[int, int]:
    """Writes of a killed session land in its shard after a second session has gone on.

    The position that is there then.
    """
    story = Story(PosixEnv(), str(root))
    story.session(1, 2, keep_last=2, writer=WRITER)
    held = [os.open(path, os.O_PATH) for path in root.glob("step_*/rank_*.safetensors")]  # no opener: the kernel's own
    try:
        story.session(2, 5, keep_last=1, spares_from=spares_from, writer=WRITER)
        for fd in held:
            with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as late:
                late.seek(os.fstat(fd).st_size // 2)
                late.write(b"late" * 1024)
        return story.check(PosixEnv(), (2, 5))
    finally:
        for fd in held:
            os.close(fd)


@pytest.mark.slow
def test_files_of_an_earlier_session_are_never_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert late_writes(tmp_path / "ckpt") == (2, 5)

    retire = Recycler.retire

    def trusting(recycler: Recycler, attempt: AttemptId) -> None:
        recycler.published(attempt, 4096)
        retire(recycler, attempt)

    monkeypatch.setattr(Committer, "collect_old", lambda committer, attempt: committer._announced.append(attempt))
    monkeypatch.setattr(Recycler, "retire", trusting)
    with pytest.raises(AssertionError, match="does not verify|damaged|not what rank"):
        late_writes(tmp_path / "trusting", spares_from=3)
