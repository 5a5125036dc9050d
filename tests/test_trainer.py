# SPDX-License-Identifier: Apache-2.0
"""LayerwiseCheckpointTrainer: the documented loops, what each argument means, and exact resumes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.chain import equal, tensors
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import LayerwiseCheckpointTrainer, errors

pytestmark = pytest.mark.quick

torch.set_num_threads(1)


class Net(nn.Module):
    """Batch normalisation, dropout, and a parameter of the model's own."""

    def __init__(self, seed: int, head: bool = False, width: int = 24) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.Dropout(0.2))
        self.out = nn.Linear(width, 4)
        self.scale = nn.Parameter(torch.ones(4))
        if head:
            self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x)) * self.scale


def job(seed: int = 0, **shape: Any) -> tuple[Net, torch.optim.Optimizer]:
    model = Net(seed, **shape)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def one_step(trainer: LayerwiseCheckpointTrainer, model: nn.Module, **step: Any) -> None:
    trainer.zero_grad()
    model(torch.randn(8, 16)).square().mean().backward()
    trainer.step(**step)


def test_a_killed_loop_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: Path, total: int, seed: int) -> tuple[list[str], dict[str, torch.Tensor], torch.Tensor]:
        model, optimizer = job(seed)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        trainer = LayerwiseCheckpointTrainer(
            model, optimizer, checkpoint_dir=str(folder), state={"scheduler": scheduler}
        )
        missing = trainer.load_checkpoint()
        while trainer.completed < total:
            one_step(trainer, model, scheduler=scheduler)
        trainer.shutdown()
        return missing, tensors(model, optimizer), torch.get_rng_state()

    whole = run(tmp_path / "whole", 7, seed=0)
    assert sorted(whole[0]) == ["(root)", "body.0", "body.1", "out"], "there was nothing to load"
    run(tmp_path / "cut", 3, seed=0)
    missing, held, random = run(tmp_path / "cut", 7, seed=1)
    assert missing == []
    assert equal(held, whole[1]) and torch.equal(random, whole[2])


def test_the_smallest_script_is_the_library_and_nothing_else(tmp_path: Path) -> None:
    """No restore, no zero_grad: forward, backward, step, shutdown."""
    model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters())
    trainer = LayerwiseCheckpointTrainer(model, optimizer, checkpoint_dir=str(tmp_path))
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 784)), torch.randint(10, (8,)))
        loss.backward()
        trainer.step()
    trainer.shutdown()
    assert trainer.engine.committed_step == 3 and trainer.completed == 3


def test_layers_that_the_checkpoint_has_not_are_returned_and_stay_as_they_are(tmp_path: Path) -> None:
    model, optimizer = job()
    with LayerwiseCheckpointTrainer(model, optimizer, checkpoint_dir=str(tmp_path)) as trainer:
        for _ in range(3):
            one_step(trainer, model)
    saved = tensors(model, optimizer)

    larger, optimizer = job(seed=3, head=True)
    head = larger.head.weight.detach().clone()
    with LayerwiseCheckpointTrainer(larger, optimizer, checkpoint_dir=str(tmp_path)) as trainer:
        assert trainer.load_checkpoint() == ["head"]
        assert trainer.completed == 3 and torch.equal(larger.head.weight, head)
        loaded = tensors(larger, optimizer)
        assert {name: value for name, value in loaded.items() if "head" not in name}.keys() == saved.keys()
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
        one_step(trainer, larger)

    smaller, optimizer = job(seed=3, width=12)
    before = tensors(smaller, optimizer)
    with LayerwiseCheckpointTrainer(smaller, optimizer, checkpoint_dir=str(tmp_path)) as trainer:
        with pytest.raises(errors.MismatchError, match=r"body\.0\.weight"):
            trainer.load_checkpoint()
        assert equal(tensors(smaller, optimizer), before)


def test_a_full_checkpoint_is_kept_and_found_by_its_name(tmp_path: Path) -> None:
    model, optimizer = job()
    with LayerwiseCheckpointTrainer(model, optimizer, checkpoint_dir=str(tmp_path), config={"keep_last": 1}) as trainer:
        for _ in range(2):
            one_step(trainer, model)
        assert trainer.save_full_checkpoint("half way") == 2
        held, random = tensors(model, optimizer), torch.get_rng_state()
        for _ in range(4):
            one_step(trainer, model)
        assert trainer.save_full_checkpoint() == 6
    model, optimizer = job(seed=4)
    with LayerwiseCheckpointTrainer(model, optimizer, checkpoint_dir=str(tmp_path)) as trainer:
        trainer.load_checkpoint(tag="half way")
        assert trainer.completed == 2 and equal(tensors(model, optimizer), held)
        assert torch.equal(torch.get_rng_state(), random)
        one_step(trainer, model)


def test_an_lr_schedule_after_the_step_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = job()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    options = {"checkpoint_dir": str(tmp_path), "state": {"scheduler": scheduler}}
    with caplog.at_level(logging.WARNING), LayerwiseCheckpointTrainer(model, optimizer, **options) as trainer:
        for _ in range(3):
            one_step(trainer, model)
            scheduler.step()
    assert sum("after trainer.step()" in record.getMessage() for record in caplog.records) == 1


def test_each_argument_is_a_key_of_the_configuration(tmp_path: Path) -> None:
    model, optimizer = job()
    trainer = LayerwiseCheckpointTrainer(
        model, optimizer, use_pccheck=False, num_threads=2, max_async=5, batch_size_mb=8, ratio=2.0,
        checkpoint_dir=str(tmp_path / "none"), is_distributed=False, rank=0, world_size=1,
        config={"keep_last": 7, "writer": {"backend": "posix"}},
    )  # fmt: skip
    config = trainer.engine.config
    assert (config.mode, config.max_in_flight, config.keep_last) == ("mock", 5, 7)
    assert (config.writer.queue_depth, config.writer.block_kb, config.writer.backend) == (2, 2048, "posix")
    assert config.pool_mb == 8 and config.dir == str(tmp_path / "none")
    one_step(trainer, model)
    trainer.shutdown()
    assert trainer.engine.stats()["bytes_written"] > 0 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"use_monitor": True, "use_pccheck": False}, errors.ConfigError, "use_monitor=True with use_pccheck=False"),
        ({"is_distributed": True}, errors.ConfigError, "is_distributed = True: torch.distributed is not initialized"),
        ({"rank": 1}, errors.ConfigError, "rank = 1"),
        ({"world_size": 4}, errors.ConfigError, "world_size = 4"),
        ({"num_threads": 0}, errors.ConfigError, "writer.queue_depth = 0"),
        ({"max_async": 0}, errors.ConfigError, "max_in_flight = 0"),
        ({"batch_size_mb": 0}, errors.ConfigError, "writer.block_kb = 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    model, optimizer = job()
    with pytest.raises(error, match=says):
        LayerwiseCheckpointTrainer(model, optimizer, checkpoint_dir=str(tmp_path), **arguments)


def test_more_requests_than_max_async_are_never_an_error(tmp_path: Path) -> None:
    model, optimizer = job()
    with LayerwiseCheckpointTrainer(model, optimizer, max_async=1, checkpoint_dir=str(tmp_path)) as trainer:
        for _ in range(40):
            one_step(trainer, model)
    assert trainer.engine.committed_step == 40


def test_the_stages_are_to_be_had_under_their_names() -> None:
    for name in ("DependencyGraphBuilder", "LayerwiseOptimizer", "LayerwiseCheckpointScheduler", "PCCheckAdapter",
                 "CheckpointMetadataManager", "LayerwiseCheckpointTrainer"):  # fmt: skip
        assert getattr(lwd, name).__doc__
