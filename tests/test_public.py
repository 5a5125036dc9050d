# SPDX-License-Identifier: Apache-2.0
"""The public names of what `attach()` returns: one that goes breaks scripts, and one that comes must be meant."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwise_dist as lwd
from layerwise_dist.engine.disabled import DisabledEngine
from layerwise_dist.engine.updates import UpdateHandler
from layerwise_dist.frameworks.optimizers import UpdateEvents

pytestmark = pytest.mark.quick

CALLS = {
    "close", "drain", "end_step", "explicit", "on_commit", "on_failure", "restore", "save", "stats", "steps", "trace",
    "wait",
}  # fmt: skip
VALUES = {
    "client_state", "committed_step", "completed", "config", "durable_step", "lacking", "metadata", "restored_from",
    "staged_step",
}  # fmt: skip


def attached(tmp_path: Path, **config: Any) -> Any:
    model = nn.Linear(4, 4)
    return lwd.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), dir=str(tmp_path), **config)


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


@pytest.mark.parametrize("enabled", [True, False])
def test_attach_returns_what_has_these_names_and_no_others(tmp_path: Path, enabled: bool) -> None:
    with attached(tmp_path, enabled=enabled) as ckpt:
        assert public(ckpt) == CALLS | VALUES
        assert all(callable(getattr(ckpt, name)) for name in CALLS)
        assert ckpt.config.enabled == enabled


def test_an_engines_names_are_on_the_class_and_each_says_what_it_is() -> None:
    assert public(lwd.LayerwiseEngine) == CALLS | VALUES
    assert [name for name in CALLS | VALUES if not inspect.getdoc(getattr(lwd.LayerwiseEngine, name))] == []


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_disabled_engine_takes_what_an_engine_takes(name: str) -> None:
    taken = [inspect.signature(getattr(kind, name)) for kind in (lwd.LayerwiseEngine, DisabledEngine)]
    assert taken[0] == taken[1]


def test_what_optimizers_tell_of_is_not_among_them() -> None:
    events = public(UpdateEvents)
    assert events <= public(UpdateHandler)
    assert not events & (CALLS | VALUES)


def test_mutation_a_name_more_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lwd.LayerwiseEngine, "updated", lambda engine: None, raising=False)
    with pytest.raises(AssertionError):
        test_attach_returns_what_has_these_names_and_no_others(tmp_path, True)
