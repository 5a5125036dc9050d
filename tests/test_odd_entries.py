# SPDX-License-Identifier: Apache-2.0
"""Links, folders, pipes, sockets and devices in the place of any file: it is damaged or named, the rest goes on."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kit.drawing import drawn
from kit.outside import MAKERS, Job, bases_of_any_size, kind_of, put_odd, snapshot, step_folder

from layerwise_dist import errors
from layerwise_dist.capture import survey
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.listing import ls
from layerwise_dist.cli.showing import show
from layerwise_dist.cli.verifying import verify
from layerwise_dist.doctor import kernel
from layerwise_dist.storage import odd

LOGGER = "layerwise_dist"
LIMIT_S = 10
KINDS = [kind for kind in MAKERS if kind != "device" or os.geteuid() == 0]
SHARD = "rank_00000.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 4; steps 3 and 4 refer to another base than 1 and 2; steps from 2 on are after a branch record."""
    root = tmp_path_factory.mktemp("trained") / "ck"
    with bases_of_any_size():
        Job().run(root, 2, keep_last=9)
        job = Job()
        with job.attach(root, keep_last=9, audit="always") as ckpt:
            ckpt.restore(step=1)
            job.train(ckpt, 1)
            with torch.no_grad():
                job.model[0].weight.add_(1)
            job.train(ckpt, 2)
    assert len(list((root / "base").iterdir())) == 2 and len(list(root.glob("branch_*"))) == 1
    return root


@dataclass(frozen=True)
class Place:
    """`restored`: the step that is restored with something odd there; None: a named error, for all kinds. `leftover`:
    it means nothing, and the next start names it.
    """

    path: str
    restored: int | None = 4
    leftover: bool = False


PLACES = {
    "manifest": Place("step 4/manifest.json", 3),
    "an older manifest": Place("step 3/manifest.json"),
    "step folder": Place("step 4", 3),
    "shard": Place(f"step 4/{SHARD}", 3),
    "file of a base": Place(f"newest base/{SHARD}", 2),
    "folder of a base": Place("newest base", 2),
    "base": Place("base", None),
    "branch record": Place("branch"),
    "partial": Place(f"step 4/{SHARD}.partial", leftover=True),
    "unfinished manifest": Place("step 4/manifest.json.tmp", leftover=True),
    "partial of a dead attempt": Place(f"step_0000000009-0000000200000063/{SHARD}.partial", leftover=True),
    "partial of a base": Place(f"base/0000000200000063/{SHARD}.partial", leftover=True),
    "spare": Place("spare_0000000100000001_00000", leftover=True),
    "probe": Place(f"probe_{'0' * 32}_00000", leftover=True),
    "unfinished branch record": Place("branch_0000000007.json.tmp", leftover=True),
    "unfinished identity": Place("identity.json.tmp", leftover=True),
    "owner": Place("owner", None),
    "identity": Place("identity.json", None),
}


def find(root: Path, path: str) -> Path:
    first, _, rest = path.partition("/")
    folder = root / first
    if first.startswith("step "):
        folder = step_folder(root, int(first[5:]))
    elif first == "newest base":
        folder = sorted((root / "base").iterdir())[-1]
    elif first == "branch":
        (folder,) = root.glob("branch_*.json")
    found = folder / rest if rest else folder
    found.parent.mkdir(exist_ok=True)
    return found


@contextmanager
def in_time() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT_S


def commands(root: Path) -> list[str]:
    """What `ls` and `verify` find, and that they and `show` come to an end."""
    catalogue = Catalogue(str(root))
    ls(catalogue)
    try:
        show(catalogue, None, True)
    except errors.DamageError:
        pass
    kernel.is_locked(str(root / "owner"))
    found = verify(catalogue, None).data
    return [each["damage"] for each in found["damaged_records"]] + [
        line for checkpoint in found["checkpoints"] for line in checkpoint["damage"]
    ]


FOLDERS = ("step folder", "folder of a base", "base")
# A folder in the place of a folder is none that is odd.
CASES = [(place, kind) for place in PLACES for kind in KINDS if kind != "folder" or place not in FOLDERS]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("place", "kind"), CASES)
def test_one_odd_entry_is_one_odd_entry(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str,
    kind: str, long: bool,
) -> None:  # fmt: skip
    if (list(PLACES).index(place) + KINDS.index(kind)) % 2 != drawn([0, 1], "odd entries") and not long:
        pytest.skip("every other kind in this place was drawn; all with --long")
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    monkeypatch.setattr(odd, "_named", set())
    caplog.set_level(logging.INFO, LOGGER)
    root, wanted, outside = tmp_path / "ck", PLACES[place], tmp_path / "out"
    shutil.copytree(trained, root)
    outside.mkdir()
    path = find(root, wanted.path)
    put_odd(path, kind, outside / "spare")
    before, was = snapshot(outside), kind_of(path)
    archived = kind == "link" and place in FOLDERS  # which is fair use: it is read
    with in_time():
        found = commands(root)
        if wanted.leftover or archived:
            assert found == []
        else:
            assert any(path.name in line for line in found), found
        restored = 4 if archived else wanted.restored
        if restored is None:
            with pytest.raises(errors.DamageError if place == "base" else errors.DirectoryError) as caught:
                Job(1).run(root, 0)
            assert str(path) in str(caught.value) + caplog.text
        else:
            assert Job(1).run(root, 1, keep_last=9) == restored
            assert Job(1).run(root, 0) == restored + 1
        if wanted.leftover:
            assert any(str(path) in record.getMessage() for record in caplog.records)
    assert kind_of(path) == was
    assert snapshot(outside) == before
