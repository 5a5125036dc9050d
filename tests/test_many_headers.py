# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of hundreds of ranks: each header is read once in the job, and files are opened as they are needed."""

from __future__ import annotations

from pathlib import Path

from kit.many_headers import make
from kit.runners import Warm, told

BUFFERS = 64 << 20  # bytes, at most: what is on its way, and the plan
FILES = 230  # what a rank may open beside what it has: sockets and guests at the door take most of them


def test_more_shards_than_a_rank_may_open_files_restore_in_bounded_memory(tmp_path: Path, warm: Warm) -> None:
    """A rank's memory grows by the moments that it holds, which restore() makes, and by a bounded part."""
    ckpt, ranks, params, width = tmp_path / "ckpt", 260, 3, 1 << 14
    make(ckpt, ranks=ranks, params=params, width=width)
    warm.run("many.py", 2, ckpt, tmp_path, ranks, params, width, FILES, timeout=90)
    kind = 4 * ranks * params * width  # bytes of all parameters, or of all of one of the two moments
    for rank in range(2):
        (said,) = told(tmp_path, rank)
        assert said["step"] == 1 and said["nonzero"] == 0 and said["steps"] == [0.0]
        print(f"rank {rank}: {said['restored_bytes'] / 1e6:.0f} MB for {kind / 1e6:.0f} MB of moments")
        assert said["restored_bytes"] < kind + BUFFERS < 3 * kind, "nobody has the whole model"


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
