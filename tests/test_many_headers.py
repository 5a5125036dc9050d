# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of hundreds of ranks: each header is read once in the job, and files are opened as they are needed."""

from __future__ import annotations

from pathlib import Path

from kit.many_headers import make
from kit.runners import Warm, told

FILES = 230  # what a rank may open beside what it has: sockets and guests at the door take most of them


def test_more_shards_than_a_rank_may_open_files_restore(tmp_path: Path, warm: Warm) -> None:
    ckpt, ranks = tmp_path / "ckpt", 260
    make(ckpt, ranks=ranks, params=3, width=16)
    warm.run("many.py", 2, ckpt, tmp_path, ranks, 3, 16, FILES, timeout=90)
    for rank in range(2):
        (said,) = told(tmp_path, rank)
        assert said["step"] == 1 and said["nonzero"] == 0 and said["steps"] == [0.0]


def test_the_headers_of_512_shards_of_1800_tensors_are_planned_in_bounded_memory(
    tmp_path: Path, warm: Warm, long: bool
) -> None:
    """With --long; otherwise of 32 shards of 240. How long it took is printed, and not judged."""
    ckpt, ranks, params = tmp_path / "ckpt", *((512, 450) if long else (32, 60))
    make(ckpt, ranks=ranks, params=params, width=16)
    warm.run("many.py", 4, ckpt, tmp_path, ranks, params, 16, timeout=300)
    for rank in range(4):
        (said,) = told(tmp_path, rank)
        took = f"{said['planned_s']:.1f} s, {said['planned_cpu_s']:.1f} s of them on a core"
        print(f"rank {rank}: planned in {took}, and {said['planned_bytes'] / 1e6:.0f} MB")
        assert said["step"] == 1 and said["nonzero"] == 0
        assert said["planned_bytes"] < 200e6
