"""Many commits in a row: nothing of the system is held longer than it is needed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from conftest import Warm

RANKS = 8


def test_a_thousand_commits_in_a_row_leak_nothing(warm: Warm, tmp_path: Path, long: bool) -> None:
    commits = 1000 if long else 120
    shm = set(os.listdir("/dev/shm"))
    warm.run("soak.py", RANKS, tmp_path / "ckpt", tmp_path, commits, timeout=600 if long else 150)
    assert set(os.listdir("/dev/shm")) - shm == set()
    for rank in range(RANKS):
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
