# SPDX-License-Identifier: Apache-2.0
"""Many commits in a row: nothing of the system is held longer than it is needed; and a job in a storm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import soak
from kit.runners import Running, Warm


def test_a_thousand_commits_in_a_row_leak_nothing(warm: Warm, tmp_path: Path, long: bool) -> None:
    commits, ranks = (1000, 8) if long else (120, 4)
    shm = set(os.listdir("/dev/shm"))
    warm.run("soak.py", ranks, tmp_path / "ckpt", tmp_path, commits, timeout=600 if long else 150)
    assert set(os.listdir("/dev/shm")) - shm == set()
    for rank in range(ranks):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        seen, where = told["seen"], f"rank {rank}: {told['seen']}"
        assert told["committed"] == commits
        early, late, before, after = seen["4"], seen["10"], seen["before"], seen["after"]
        for what, slack in {"files": 0, "threads": 3, "shared": 0}.items():  # the kernel's io_uring threads come and go
            assert late[what] <= early[what] + slack, f"{what}: {where}"
            assert after[what] <= before[what] + slack, f"{what}: {where}"
        assert late["objects"] - early["objects"] < 300, where
        assert late["bytes"] - early["bytes"] < 2 << 20, where
    names = os.listdir(tmp_path / "ckpt")
    assert sorted(name for name in names if not name.startswith("step_")) == ["identity.json", "owner"]
    assert len(names) == 2 + 2, "the checkpoints that are kept, and no others"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"hash": "other"}, r"launch 00002, rank 0, .*not as plain training at \[7\]"),
        ({"start": 3}, r"launch 00002: ranks started from \{3, 6\}"),
        ({"start": 3, "other": 3}, r"launch 00002 from \{3\}, and 5 was committed"),
    ],
)
def test_what_is_wrong_after_a_storm_is_found(tmp_path: Path, change: dict[str, Any], says: str | None) -> None:
    plain = [[{"step": step, "hash": f"{rank} {step}"} for step in range(9)] for rank in range(2)]
    for launch, begin in ((1, 0), (2, 6)):
        for rank in range(2):
            lines = [{"launched": "0", "pid": 1}, {"start": begin}]
            lines += [{**line, "committed": line["step"] - 1 or None} for line in plain[rank][begin : begin + 7]]
            if launch == 2:
                lines[1]["start"] = change.get("other", begin) if rank else change.get("start", begin)
                lines[3]["hash"] = lines[3]["hash"] if rank else change.get("hash", lines[3]["hash"])
            folder = tmp_path / f"{launch:05d}"
            folder.mkdir(exist_ok=True)
            (folder / f"{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if says is None:
        assert soak.check(tmp_path, plain) == {"launches": 2, "resumed": 1, "steps": 20, "newest": 7}
        return
    with pytest.raises(AssertionError, match=says):
        soak.check(tmp_path, plain)


def own_mounts() -> list[str]:
    """What runs a command where its mounts are its own, and end with it; nothing where that is not allowed."""
    for command in (["unshare", "-m"], ["unshare", "-Urm"]):
        if shutil.which("unshare") and not subprocess.run([*command, "true"], capture_output=True).returncode:
            return command
    return []


def test_a_job_in_a_storm_goes_on_bit_for_bit_and_nothing_ends_or_hangs_by_itself(
    start: Callable[..., Running], tmp_path: Path, soak_minutes: float
) -> None:
    """With `--soak-minutes`; by itself, and with `--long`, as conftest.py says."""
    command = [sys.executable, soak.__file__, str(tmp_path / "soak"), "--minutes", str(soak_minutes)]
    done = start([*own_mounts(), *command]).wait(60 * soak_minutes * 2 + 170)
    assert done.returncode == 0, done.output[-30000:]
    found = json.loads(done.output.splitlines()[-1])
    print(found)
    assert found["launches"] > 1 and found["resumed"] >= 1 and found["watcher"]["looks"] > 0
    if not found["disk"]:
        pytest.skip("no mounts are allowed here, so that the disk never filled; the rest held")
    assert found["filled"] > 0
