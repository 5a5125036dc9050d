# SPDX-License-Identifier: Apache-2.0
"""A directory has one owner at a time, and one that was taken over finds out before it commits anything."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest

from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.owner import Owner, read_owner
from layerwise_dist.errors import OwnerError

pytestmark = pytest.mark.quick

NOTE: dict[str, Any] = {"epoch": 3, "session": "a" * 32, "who": "me"}


def owner(root: Path, env: Any = None, who: str = "me") -> Owner:
    return Owner(env or PosixEnv(), str(root), file_mode=0o600, who=who)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\0" * 512, b"[]", b"{}", b"{", b" " * 1_000_000, json.dumps({**NOTE, "epoch": "3"}).encode(),
        json.dumps({**NOTE, "epoch": -1}).encode(), json.dumps({**NOTE, "epoch": 1 << 40}).encode(),
        json.dumps({**NOTE, "who": None}).encode(),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_a_crash_left_of_a_note_says_nothing_and_is_written_anew(tmp_path: Path, text: bytes) -> None:
    assert read_owner(PosixEnv(), str(tmp_path)) == {}
    (tmp_path / "owner").write_bytes(text)
    assert read_owner(PosixEnv(), str(tmp_path)) == {}
    mine = owner(tmp_path)
    assert mine.previous == 0
    mine.begin("a" * 32, 3)
    mine.check()
    assert read_owner(PosixEnv(), str(tmp_path)) == NOTE
    mine.release()
    assert owner(tmp_path).previous == 3


def renew(path: Path) -> None:
    path.unlink()
    path.write_bytes(json.dumps(NOTE).encode())


def take_over(path: Path) -> None:
    path.write_bytes(json.dumps({**NOTE, "epoch": 4, "session": "b" * 32}).encode())


@pytest.mark.parametrize(
    ("happens", "says"),
    [
        (renew, r"owner was replaced: this session \(epoch 3\) no longer owns the directory"),
        (take_over, "owner names epoch 4, this session has epoch 3: a newer job took over; nothing more is committed"),
    ],
)
def test_whose_directory_became_another_s_commits_nothing_more(
    tmp_path: Path, happens: Callable[[Path], None], says: str
) -> None:
    mine = owner(tmp_path)
    mine.begin("a" * 32, 3)
    mine.check()
    happens(tmp_path / "owner")
    with pytest.raises(OwnerError, match=says):
        mine.check()
    mine.let_go()


def test_a_directory_whose_note_cannot_be_read_is_let_go_of_and_its_holder_is_named_so(tmp_path: Path) -> None:
    env = testing.FaultEnv(PosixEnv())
    env.fail(operation="read", path_pattern="*owner")
    with pytest.raises(OSError) as raised:
        owner(tmp_path, env)
    assert raised.value.errno == errno.EIO
    mine = owner(tmp_path, env)
    mine.begin("a" * 32, 3)
    with pytest.raises(OwnerError, match=f"{tmp_path} is owned by another engine of this process"):
        owner(tmp_path, env)
    env.fail(operation="open", path_pattern="*owner", times=-1)
    with pytest.raises(OwnerError, match=f"{tmp_path} is owned by another live job .unreadable: .*Input/output error"):
        owner(tmp_path, env, who="another")
    mine.release()


def test_a_lock_that_cannot_be_let_go_of_is_told_and_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = owner(tmp_path)

    def refuse() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(mine, "release", refuse)
        mine.let_go()
    assert f"{tmp_path} is held until this process ends: [Errno 5]" in caplog.text
    mine.release()


def test_an_owner_that_has_not_begun_ends_without_a_word(tmp_path: Path) -> None:
    mine = owner(tmp_path)
    mine.end()
    assert read_owner(PosixEnv(), str(tmp_path)) == {}
    mine.release()
