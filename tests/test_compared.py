# SPDX-License-Identifier: Apache-2.0
"""When ranks compare what they are said to hold alike: before the first checkpoint, whatever opens it, all together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.crash import settings, try_ranks
from torch import nn

from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.samples import Common
from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.ddp import DDPFramework

pytestmark = pytest.mark.quick


def first_checkpoint(
    path: Path, *, several: bool = False, spoil: Any = lambda rank, model, optimizers: None, timeout_s: float = 20.0
) -> tuple[list[Any], float]:
    """What two replicas raise at theirs, and after how many seconds; `spoil` runs after the update."""

    def body(transport: LocalTransport) -> None:
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3))
        for param in model.parameters():
            nn.init.constant_(param, 0.1)  # the ranks are threads: they draw from the same random numbers
        params = [[*model[0].parameters()], [*model[1].parameters(), *model[2].parameters()]]
        optimizers = {
            name: torch.optim.SGD(each, lr=0.1, momentum=0.9)
            for name, each in zip("ab", params if several else [sum(params, [])], strict=False)
        }
        replicas = DDPFramework(model, transport.rank, 2)
        config = settings(str(path), commit={"timeout_s": timeout_s, "on_failure": "raise"})
        given: dict[str, Any] = {"optimizers": optimizers} if several else {}
        optimizer = None if several else optimizers["a"]
        with assembly.assemble(model, optimizer, config, transport, PosixEnv(), framework=replicas, **given) as ckpt:
            for _ in ckpt.steps(1):
                model(torch.ones(2, 6)).square().mean().backward()
                for each in optimizers.values():
                    each.step()
                spoil(transport.rank, model, optimizers)

    began = time.monotonic()
    errors = [thread.error for thread in try_ranks(body)]
    return errors, time.monotonic() - began


def other_bias(rank: int, model: nn.Module, optimizers: Any) -> None:
    with torch.no_grad():
        model[2].bias.add_(rank)


@pytest.mark.parametrize("several", [False, True])
def test_one_parameter_that_differs_is_found_at_the_first_checkpoint(tmp_path: Path, several: bool) -> None:
    """No sample of a few tensors would do: the one that differs is the last of six."""
    errors, _ = first_checkpoint(tmp_path, several=several, spoil=other_bias)
    assert [type(error) for error in errors] == [UnsupportedError] * 2
    assert all("different values of param/2.bias," in str(error) for error in errors)
    assert first_checkpoint(tmp_path / "alike", several=several)[0] == [None, None]


def test_mutation_several_optimizers_without_the_comparison_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Captures, "compare_replicas", lambda captures: False)
    errors, _ = first_checkpoint(tmp_path, several=True, spoil=other_bias)
    assert not any("different values of param/2.bias," in str(error) for error in errors)


def test_what_one_rank_cannot_compare_all_ranks_are_told_at_once(tmp_path: Path) -> None:
    def odd_state(rank: int, model: nn.Module, optimizers: Any) -> None:
        if rank == 1:
            optimizers["a"].state[model[0].weight]["odd"] = torch.empty(4, dtype=torch.bits8)

    errors, took = first_checkpoint(tmp_path, spoil=odd_state, timeout_s=40.0)
    assert [type(error) for error in errors] == [UnsupportedError] * 2
    assert all("rank 1: odd/0.weight has dtype" in str(error) for error in errors) and took < 20


def late_state(path: Path, steps: int = 5) -> list[int]:
    """Which steps are committed where each rank keeps something of its own under one name, from step 4 on."""

    def body(transport: LocalTransport) -> None:
        model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(10)])
        for param in model.parameters():
            nn.init.constant_(param, 0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        replicas = DDPFramework(model, transport.rank, 2)
        config = settings(str(path), keep_last=steps)
        with assembly.assemble(model, optimizer, config, transport, PosixEnv(), framework=replicas) as ckpt:
            ckpt.explicit()
            for step in range(1, steps + 1):
                model(torch.ones(2, 6)).square().mean().backward()
                optimizer.step()
                if step > 3:
                    for param in model.parameters():
                        optimizer.state[param]["own"] = torch.full_like(param, transport.rank)
                ckpt.end_step()
                ckpt.drain()

    for thread in try_ranks(body):
        if thread.error is not None:
            raise thread.error
    return sorted(manifest.step for manifest in CheckpointMetadataManager(PosixEnv(), str(path)).inventory().lineage())


def test_state_that_comes_later_is_compared_whole_and_never_mixed(tmp_path: Path) -> None:
    assert late_state(tmp_path) == [1, 2, 3, 5], "the first checkpoint that shows it is dropped, the next is right"


def test_mutation_state_that_comes_later_and_is_only_sampled_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Common, "new", lambda common, known: [])
    nothing = {
        "seq": 0,
        "step": 0,
        "late": False,
        "params": "",
        "state": "",
        "blocks": [],
    }  # as where its turn is another tensor's
    monkeypatch.setattr(Common, "sample", lambda common, attempt, name: nothing)
    assert 4 in late_state(tmp_path, 4)
