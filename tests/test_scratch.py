# SPDX-License-Identifier: Apache-2.0
"""Folders for the time of a piece of work are gone however it ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from layerwise_dist.bench.workplace import workplace
from layerwise_dist.exporting.output import beside
from layerwise_dist.selftest.trial import Trial
from layerwise_dist.supervision.scratch import scratch

pytestmark = pytest.mark.quick

MADE: dict[str, Callable[[Path], AbstractContextManager[Path]]] = {
    "scratch": lambda root: scratch(root, "work-"),
    "a benchmark": lambda root: workplace(str(root), disk_bytes=0, memory_bytes=0),
    "an export": lambda root: beside(root / "out", folder=True),
}


def interrupted_as_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes within the system call that makes the first folder, which Python notices right after it."""
    mkdir = os.mkdir

    def interrupted(*args: Any, **kwargs: Any) -> None:
        mkdir(*args, **kwargs)
        monkeypatch.setattr(os, "mkdir", mkdir)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)


@pytest.mark.parametrize("what", MADE)
def test_a_signal_as_the_folder_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    interrupted_as_it_is_made(monkeypatch)
    with pytest.raises(KeyboardInterrupt), MADE[what](tmp_path):
        pytest.fail("it was interrupted before")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_interrupted_as_it_begins_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(str(tmp_path), say=lambda text: None)
    interrupted_as_it_is_made(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        trial.run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", MADE)
def test_an_error_within_leaves_nothing(tmp_path: Path, what: str) -> None:
    with pytest.raises(ValueError, match="within"), MADE[what](tmp_path) as made:
        assert made.is_dir() and (made if what != "an export" else made.parent).stat().st_mode & 0o777 == 0o700
        (made / "file").write_text("x")
        raise ValueError("within")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), scratch(tmp_path / "absent", "work-"):
        pytest.fail("there is nothing to work in")
