# SPDX-License-Identifier: Apache-2.0
"""mode: mock does everything but write: training is the same, and what would be written is what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.chain import build, equal, plain, tensors, update
from kit.crash import in_ranks, tensors_of
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import _native, errors
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly

pytestmark = pytest.mark.quick

STEPS = 6


def trained(
    root: Path, mode: str, keep: int = 10, **options: Any
) -> tuple[lwd.LayerwiseEngine, dict[str, torch.Tensor]]:
    model, optimizer = build()
    with lwd.attach(model, optimizer, dir=str(root), mode=mode, keep_last=keep, max_in_flight=8, **options) as ckpt:
        assert ckpt.restore() == 0
        for step in ckpt.steps(STEPS):
            update(model, optimizer, step)
    return ckpt, tensors(model, optimizer)


def test_nothing_is_written_and_training_is_what_it_is_without_it(tmp_path: Path) -> None:
    ckpt, held = trained(tmp_path / "ckpt", "mock")
    assert list(tmp_path.iterdir()) == []
    assert equal(held, plain(STEPS)[STEPS])
    assert ckpt.committed_step == STEPS


def test_what_is_counted_is_what_is_written(tmp_path: Path) -> None:
    # Staged, so that the layout does not depend on where tensors happen to lie.
    mock, _ = trained(tmp_path / "ckpt", "mock", capture="stage")
    direct, _ = trained(tmp_path / "ckpt", "direct", capture="stage")
    shards = [[each.shards for each in ckpt.metadata.inventory().lineage()] for ckpt in (mock, direct)]
    # A header has the hashes of all that is in its shard: equal headers are equal files.
    assert shards[0] == shards[1] and len(shards[0]) == STEPS
    counted, written = mock.stats(), direct.stats()
    for name in ("writes", "bytes_written", "bytes_copied", "bytes_sealed", "state_bytes"):
        assert counted[name] == written[name], name
    assert mock.metadata.env.bytes >= counted["bytes_written"]


def test_retention_reuses_what_would_be_files(tmp_path: Path) -> None:
    ckpt, _ = trained(tmp_path / "ckpt", "mock", keep=2)
    assert [each.step for each in ckpt.metadata.inventory().lineage()] == [STEPS, STEPS - 1]


def test_several_ranks_have_a_directory_each_that_is_not_there(tmp_path: Path) -> None:
    def run(transport: LocalTransport) -> int | None:
        torch.manual_seed(transport.rank)
        model = nn.Linear(8, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = load_config({"dir": str(tmp_path / "ckpt"), "mode": "mock"})
        with assembly.assemble(model, optimizer, config, transport, _native.MockEnv()) as engine:
            for step in engine.steps(3):
                update_one(model, optimizer, step)
            engine.wait(3)
            assert tensors_of(model, optimizer)
            return engine.committed_step

    assert in_ranks(run) == [3, 3] and not (tmp_path / "ckpt").exists()


def update_one(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model(torch.full((2, 8), float(step))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_mock_keeps_nothing_that_could_be_restored(tmp_path: Path) -> None:
    model, optimizer = build()
    with lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt"), mode="mock") as ckpt:
        for step in ckpt.steps(2):
            update(model, optimizer, step)
        ckpt.wait(2)
        with pytest.raises((errors.LayerwiseError, OSError), match="data was not kept"):
            ckpt.restore()
