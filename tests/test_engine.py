# SPDX-License-Identifier: Apache-2.0
"""The engine as a script sees it: steps and levels, retention, what a checkpoint holds, and loops that resume from
every step.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.drawing import drawn
from kit.loops import Noisy
from kit.runners import Warm
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import layerwise_dist as lwd
from layerwise_dist import errors

sys.path.insert(0, str(Path(__file__).parent / "jobs"))
from job_kit import contents, differences  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


def job(seed: int = 0, make: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    return model, make(model.parameters(), **{"lr": 0.1, **options})


def update(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def train(ckpt: Any, model: nn.Module, optimizer: Any, total: int) -> None:
    for _ in ckpt.steps(total):
        update(model, optimizer)


def committed(folder: Path) -> list[int]:
    return sorted(int(path.parent.name[5:15]) for path in folder.glob("step_*/manifest.json"))


def restored(folder: Path, model: nn.Module, optimizer: Any, step: int | None = None, **options: Any) -> int:
    with lwd.attach(model, optimizer, dir=str(folder), **options) as ckpt:
        return ckpt.restore(step)


# -- levels, waiting, ending -------------------------------------------------------------------------------------------


def test_a_step_is_staged_then_durable_then_committed(tmp_path: Path) -> None:
    model, optimizer = job()
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        assert (ckpt.staged_step, ckpt.durable_step, ckpt.committed_step) == (None, None, None)
        for _ in ckpt.steps(12):
            update(model, optimizer)
            levels = [level or 0 for level in (ckpt.committed_step, ckpt.durable_step, ckpt.staged_step)]
            assert levels == sorted(levels) and levels[2] <= ckpt.completed
        for level in ("staged", "durable", "committed"):
            ckpt.wait(12, level, timeout=20)
        assert (ckpt.staged_step, ckpt.durable_step, ckpt.committed_step) == (12, 12, 12)
        with pytest.raises(
            errors.DeadlineError, match=r"step 13 was not committed after 0.05 s; the newest that is: step 12"
        ):
            ckpt.wait(13, timeout=0.05)
        with pytest.raises(ValueError, match="level must be"):
            ckpt.wait(12, "saved")
        stats = ckpt.stats()
        assert stats["captures"] == 12 and stats["checkpoints_committed"] + stats["checkpoints_aborted"] == 12
        assert stats["bytes_written"] > 12 * stats["state_bytes"] > 0 and 0 < stats["stall_s"] <= stats["elapsed_s"]
        assert 0 < stats["stall_ms_p50"] <= stats["stall_ms_p99"] and 0 < stats["stall_audit_s"] < stats["stall_s"]
    assert committed(tmp_path) == [11, 12]


def test_close_may_be_called_twice_and_lets_go_of_everything(tmp_path: Path) -> None:
    import threading

    model, optimizer = job()
    threads = threading.active_count()
    fds = len(os.listdir("/proc/self/fd"))
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    train(ckpt, model, optimizer, 2)
    ckpt.close()
    ckpt.close()
    assert threading.active_count() == threads and len(os.listdir("/proc/self/fd")) == fds
    assert not optimizer._optimizer_step_pre_hooks and not model._forward_pre_hooks
    update(model, optimizer)  # trains on, unobserved
    assert committed(tmp_path) == [1, 2]


def test_close_seals_the_iteration_that_break_left(tmp_path: Path) -> None:
    model, optimizer = job()
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    for step in ckpt.steps(10):
        update(model, optimizer)
        if step == 2:
            break
    ckpt.close()
    assert committed(tmp_path) == [2, 3]


def test_an_exception_in_the_loop_is_not_hidden_and_half_an_iteration_is_not_saved(tmp_path: Path) -> None:
    model, optimizer = job()
    with pytest.raises(ZeroDivisionError):
        with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
            for step in ckpt.steps(10):
                update(model, optimizer)
                if step == 2:
                    raise ZeroDivisionError
    assert committed(tmp_path) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("step_")) == [
        "identity.json",
        "owner",
    ]
    assert len(list(tmp_path.glob("step_*"))) == 2, "nothing is left of the attempt that was given up"


# -- which steps, which stay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ({}, [9, 10]),
        ({"keep_last": 1}, [10]),
        ({"keep_last": 4}, [7, 8, 9, 10]),
        ({"every_n_steps": 3}, [9, 10]),
        ({"every_n_steps": 3, "save_last": False}, [6, 9]),
        ({"keep_last": 1, "keep_every_n_steps": 4}, [4, 8, 10]),
    ],
    ids=str,
)
def test_retention_keeps_what_it_says_and_nothing_else(
    tmp_path: Path, options: dict[str, Any], stay: list[int]
) -> None:
    model, optimizer = job()
    with lwd.attach(model, optimizer, dir=str(tmp_path), max_in_flight=64, **options) as ckpt:
        for step in ckpt.steps(10):
            update(model, optimizer)
            # Each is committed before the next: otherwise a newer one may abort an older that is to stay.
            if step and step % options.get("every_n_steps", 1) == 0:
                ckpt.wait(step, timeout=20)
    assert committed(tmp_path) == stay
    assert len(list(tmp_path.glob("step_*"))) == len(stay)


def test_every_file_is_named_as_documented_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    for mode, file_bits, dir_bits in (("0600", 0o600, 0o700), ("0640", 0o640, 0o750)):
        folder = tmp_path / mode
        umask = os.umask(0)
        try:
            model, optimizer = job()
            with lwd.attach(model, optimizer, dir=str(folder), file_mode=mode) as ckpt:
                train(ckpt, model, optimizer, 3)
        finally:
            os.umask(umask)
        for path in [folder, *folder.rglob("*")]:
            expected = dir_bits if path.is_dir() else file_bits
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
            name = str(path.relative_to(folder))
            assert re.fullmatch(
                r"\.|identity\.json|owner|step_\d{10}-[0-9a-f]{16}(/(manifest\.json|rank_\d{5}\.safetensors))?", name
            ), name


def test_a_symbolic_link_in_place_of_a_shard_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = job()
    with lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt"), keep_last=1) as ckpt:
        train(ckpt, model, optimizer, 1)
    (shard,) = (tmp_path / "ckpt").glob("step_*/rank_00000.safetensors")
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    model, optimizer = job(seed=1)
    live = [param.clone() for param in model.parameters()]
    with caplog.at_level("WARNING"), pytest.raises(errors.DamageError, match="no checkpoint .* verifies"):
        restored(tmp_path / "ckpt", model, optimizer)
    assert f"{shard}: is a symbolic link" in caplog.text
    assert all(torch.equal(was, now) for was, now in zip(live, model.parameters(), strict=True))


# -- what a checkpoint holds -------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """bfloat16, channels_last, frozen, tied, unused, buffers of both kinds, and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.narrow = nn.Linear(8, 4, dtype=torch.bfloat16)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("kept", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("transient", torch.zeros(3), persistent=False)
        self.seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.kept += 1
        self.transient += 1
        return self.narrow(self.norm(self.conv(images)).mean((2, 3)).to(torch.bfloat16)).float().sum()


def odd(seed: int) -> tuple[Odd, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Odd().to(memory_format=torch.channels_last)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def test_an_odd_model_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(model: Odd, optimizer: Any, steps: Iterator[int]) -> list[float]:
        losses = []
        for _ in steps:
            loss = model(torch.randn(2, 3, 5, 5))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
        return losses

    model, optimizer = odd(0)
    losses = run(model, optimizer, iter(range(6)))
    expected, seen = contents(model, optimizer), model.seen
    model, optimizer = odd(0)
    assert not model.conv.weight.is_contiguous()
    with lwd.attach(model, optimizer, dir=str(tmp_path), audit="always") as ckpt:
        first = run(model, optimizer, ckpt.steps(3))
    model, optimizer = odd(1)
    for param in model.parameters():
        param.grad = (
            torch.ones_like(param) if param.requires_grad else None
        )  # also of `unused`, which has none in the run
    with lwd.attach(model, optimizer, dir=str(tmp_path), audit="always") as ckpt:
        assert ckpt.restore() == 3
        assert model.unused.weight.grad is None and model.conv.weight.grad is not None
        model.transient += 3  # not persistent: the model's own business
        assert first + run(model, optimizer, ckpt.steps(6)) == losses
    assert differences(contents(model, optimizer), expected) == [] and model.seen == seen


class WideAdam(torch.optim.Optimizer):
    """Keeps float32 moments of bfloat16 parameters, a number and a nested list, as mixed-precision optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "history": [1.5]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["history"].append(group["history"][-1] / 3)
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(count=0, moment=torch.zeros_like(param, dtype=torch.float32))
                state["count"] += 1
                state["moment"].mul_(0.9).add_(param.grad.float() / 3)
                param.sub_((group["lr"] * state["moment"] / state["count"]).to(param.dtype))


def test_float32_moments_of_bfloat16_parameters_are_not_cast(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(5, 3, dtype=torch.bfloat16)
        return model, WideAdam(model.parameters())

    def run(model: nn.Module, optimizer: Any, steps: Iterator[int]) -> None:
        for _ in steps:
            model(torch.ones(2, 5, dtype=torch.bfloat16) / 3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make(0)
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        run(model, optimizer, ckpt.steps(3))
    expected = contents(model, optimizer)
    moments = [expected[name] for name in expected if name.endswith("moment")]
    assert moments and all(moment.dtype == torch.float32 and (moment != moment.bfloat16()).any() for moment in moments)
    model, optimizer = make(1)
    restored(tmp_path, model, optimizer)
    found = contents(model, optimizer)
    assert [name for name in differences(found, expected) if name not in ("rng",)] == []


@pytest.mark.parametrize("broadcast", [True, False], ids=["rank 0's buffers", "buffers of each rank"])
def test_ddp_replicas_with_channels_last_and_frozen_parameters_resume_bit_for_bit(
    warm: Warm, tmp_path: Path, broadcast: bool
) -> None:
    warm.run("replicas.py", 2, tmp_path, int(broadcast), timeout=60)
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["differences"] == []
        assert told["buffers differed between ranks"], "the test needs statistics that differ"
        assert told["buffers are rank 0's"] == (broadcast or rank == 0)


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"fused": True}], ids=str)
def test_a_group_added_between_attach_and_restore_resumes_bit_for_bit(tmp_path: Path, kernel: dict[str, bool]) -> None:
    def run(folder: Path, total: int) -> tuple[int, dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1, **kernel)
        with lwd.attach(model, optimizer, dir=str(folder)) as ckpt:
            optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.3})
            start = ckpt.restore()
            train(ckpt, model, optimizer, total)
        return start, contents(model, optimizer)

    assert run(tmp_path / "stopped", 3)[0] == 0
    start, resumed = run(tmp_path / "stopped", 6)
    assert start == 3
    assert differences(resumed, run(tmp_path / "whole", 6)[1]) == []


# -- loops with something special --------------------------------------------------------------------------------------


def clamped(how: str) -> Callable[[nn.Module], None]:
    def clamp(model: nn.Module) -> None:
        weight = model[0].weight
        if how == "no_grad":
            with torch.no_grad():
                weight.clamp_(-0.05, 0.05)
        elif how == "data":
            weight.data.clamp_(-0.05, 0.05)
        else:
            array = weight.detach().numpy()
            np.clip(array, -0.05, 0.05, out=array)

    return clamp


@pytest.mark.parametrize("how", ["no_grad", "data", "numpy"])
def test_weights_changed_after_the_update_are_saved_as_they_are_at_the_boundary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    clamp = clamped(how)
    model, optimizer = job()
    at: dict[int, dict[str, Any]] = {}
    with lwd.attach(model, optimizer, dir=str(tmp_path), audit="always", keep_last=10) as ckpt:
        for step in ckpt.steps(4):
            update(model, optimizer)
            clamp(model)
            at[step + 1] = contents(model, optimizer)
            assert model[0].weight.abs().max() <= 0.05
    named = [record.getMessage() for record in caplog.records if "param/0.weight changed" in record.getMessage()]
    # The version counter shows the first to the engine; the others are found by the audit, once, and then copied.
    assert len(named) == (0 if how == "no_grad" else 1), caplog.text
    assert committed(tmp_path)[-1] == 4
    for step in committed(tmp_path):
        model, optimizer = job(seed=1)
        copy = tmp_path.parent / f"{how}-{step}"
        shutil.copytree(tmp_path, copy)
        assert restored(copy, model, optimizer, step) == step
        assert [name for name in differences(contents(model, optimizer), at[step]) if name != "rng"] == []


def changed_after_each_boundary(
    folder: Path, rows: int, change: Callable[[torch.Tensor], Any]
) -> tuple[int, int, list[int]]:
    """Trains 40 steps, each of which ends with all weights equal, and begins by changing them while they are written.

    Returns how many checkpoints were aborted and committed, and the steps of committed ones that hold unequal weights.
    """
    model = nn.Linear(1024, rows, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    aborted, sound, torn = 0, 0, []
    options = {"commit": {"raise_after": 100}, "writer": {"queue_depth": 1, "block_kb": 256}}
    with lwd.attach(model, optimizer, dir=str(folder), **options) as ckpt:
        for step in ckpt.steps(40):
            with torch.no_grad():
                change(model.weight)
            if step:
                try:
                    ckpt.wait(step, timeout=20)
                except errors.CommitError as error:
                    assert "weight changed between the boundary and the next update" in str(error)
                    aborted += 1
                else:
                    (path,) = folder.glob(f"step_{step:010d}-*/rank_00000.safetensors")
                    weight = load_file(path)["param/weight"]
                    sound += 1
                    torn += [step] if (weight != weight[0, 0]).any() else []
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.weight.fill_(
                    step % 7 + 2
                )  # written once more at the boundary: the writer is still at it after it
    assert committed(folder)[-1] == 40, "the last one, which nothing changed, is committed"
    return aborted, sound, torn


def test_weights_changed_after_the_boundary_end_the_attempt_and_training_goes_on(tmp_path: Path) -> None:
    aborted, sound, _ = changed_after_each_boundary(tmp_path, 2048, lambda weight: weight.add_(1))
    assert aborted and aborted + sound == 39


def test_a_slow_change_after_the_boundary_is_never_committed_half_done(tmp_path: Path) -> None:
    _, _, torn = changed_after_each_boundary(tmp_path, 4096, lambda weight: weight.pow_(1.7))
    assert torn == []


def test_two_updates_in_one_iteration_save_the_state_after_the_last(tmp_path: Path) -> None:
    model, optimizer = job()
    at = {}
    with lwd.attach(model, optimizer, dir=str(tmp_path), audit="always") as ckpt:
        for step in ckpt.steps(3):
            update(model, optimizer)
            update(model, optimizer)
            at[step + 1] = contents(model, optimizer)
    model, optimizer = job(seed=1)
    assert restored(tmp_path, model, optimizer) == 3
    assert [name for name in differences(contents(model, optimizer), at[3]) if name != "rng"] == []


def test_two_updates_without_a_told_end_are_an_error(tmp_path: Path) -> None:
    model, optimizer = job()
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    with pytest.raises(errors.BoundaryError, match="second optimizer update"):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.step()
    ckpt.close()


def test_a_skipped_update_moves_a_due_checkpoint_to_the_next_applied_one(tmp_path: Path) -> None:
    model, optimizer = job()
    with lwd.attach(model, optimizer, dir=str(tmp_path), every_n_steps=3, keep_last=10, save_last=False) as ckpt:
        for step in ckpt.steps(8):
            if step != 2:  # the iteration that ends at step 3
                update(model, optimizer)
    assert committed(tmp_path) == [4, 6]


def test_iterations_that_update_nothing_are_an_error(tmp_path: Path) -> None:
    model, optimizer = job()
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    with pytest.raises(errors.BoundaryError, match="no optimizer update was observed"):
        for _ in ckpt.steps(8):
            model(torch.ones(2, 3)).sum().backward()
    ckpt.close()


# -- resume from every step --------------------------------------------------------------------------------------------


class Script:
    """A training script with dropout, augmentation, a schedule, and whatever `loop` wants of GradScaler and EMA."""

    TOTAL = 9  # steps: two epochs of four batches, and one

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.loader = DataLoader(Noisy(), batch_size=2, shuffle=True)
        self.val = DataLoader(Noisy(), batch_size=4, shuffle=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        self.at = {"epoch": 0, "step": 0}
        self.losses: dict[int, str] = {}

    def attach(self, folder: Path) -> Any:
        state = {
            "scheduler": self.scheduler,
            "loader": self.loader,
            "scaler": self.scaler,
            "ema": self.ema,
            "at": self.at,
        }
        return lwd.attach(
            self.model, self.optimizer, dir=str(folder), state=state, keep_last=100, audit="always", max_in_flight=64
        )

    def train(self, batch: torch.Tensor) -> None:
        loss = self.model(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.finish(loss)

    def finish(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.losses[self.at["step"]] = loss.item().hex()
        self.at["step"] += 1

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            for batch in self.val:
                self.model(batch)
        self.model.train()

    def contents(self) -> dict[str, Any]:
        held = contents(self.model, self.optimizer)
        held.update({f"ema/{name}": tensor.clone() for name, tensor in self.ema.state_dict().items()})
        held.update(at=dict(self.at), scaler=repr(self.scaler.state_dict()), rate=self.scheduler.get_last_lr()[0].hex())
        return held


def cycle(loader: DataLoader) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def loop_steps(script: Script, ckpt: Any) -> None:
    batches = cycle(script.loader)
    for _ in ckpt.steps(script.TOTAL):
        script.train(next(batches))


def loop_for(script: Script, ckpt: Any, top: bool = False, bottom: bool = False) -> None:
    while script.at["step"] < script.TOTAL:
        for batch in script.loader:
            if top:
                script.evaluate()
            script.train(batch)
            if bottom:
                script.evaluate()
            if script.at["step"] == script.TOTAL:
                return
        script.at["epoch"] += 1


def loop_steps_evaluating(script: Script, ckpt: Any) -> None:
    batches = cycle(script.loader)
    for step in ckpt.steps(script.TOTAL):
        if step % 2:
            script.evaluate()
        script.train(next(batches))
        if step % 3 == 0:
            script.evaluate()


def loop_prefetched(script: Script, ckpt: Any) -> None:
    batches = cycle(script.loader)
    batch = next(batches)
    for _ in ckpt.steps(script.TOTAL):
        loss = script.model(batch).square().mean()
        batch = next(batches)
        loss.backward()
        script.optimizer.step()
        script.finish(loss)


def loop_prefetched_untold(script: Script, ckpt: Any) -> None:
    batches = cycle(script.loader)
    batch = next(batches)
    while script.at["step"] < script.TOTAL:
        loss = script.model(batch).square().mean()
        batch = next(batches)
        loss.backward()
        script.optimizer.step()
        script.finish(loss)


def loop_scaled(script: Script, ckpt: Any) -> None:
    batches = cycle(script.loader)
    for step in ckpt.steps(script.TOTAL):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = script.model(next(batches)).float().square().mean()
        script.scaler.scale(loss).backward()
        if step in (2, 5):
            script.model[0].weight.grad[0, 0] = float("inf")
        script.scaler.step(script.optimizer)
        script.scaler.update()
        script.ema.update_parameters(script.model)
        script.finish(loss)


LOOPS: dict[str, Callable[[Script, Any], None]] = {
    "steps": loop_steps,
    "for": loop_for,
    "evaluation at the top of for": lambda script, ckpt: loop_for(script, ckpt, top=True),
    "evaluation at the bottom of for": lambda script, ckpt: loop_for(script, ckpt, bottom=True),
    "evaluation in steps": loop_steps_evaluating,
    "prefetched batch in steps": loop_prefetched,
    "prefetched batch, no end told": loop_prefetched_untold,
    "GradScaler and EMA": loop_scaled,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_resume_from_every_step_is_exact_or_was_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, long: bool
) -> None:
    """From every second step and the last one, unless with --long; which are drawn."""
    script = Script(0)
    ckpt = script.attach(tmp_path / "whole")
    with ckpt:
        LOOPS[name](script, ckpt)
    losses, expected = script.losses, script.contents()
    steps = committed(tmp_path / "whole")
    skipped = {3, 6} if name == "GradScaler and EMA" else set()
    assert len(steps) >= script.TOTAL - len(skipped) - 2 and steps[-1] == script.TOTAL
    warned = [record.getMessage() for record in caplog.records if "not exact" in record.getMessage()]
    for step in steps if long else sorted({*steps[drawn([0, 1], name) :: 2], steps[-1]}):
        folder = tmp_path / f"from-{step}"  # as a job that was killed right after this commit left it
        shutil.copytree(tmp_path / "whole", folder)
        for path in folder.glob("step_*"):
            if int(path.name[5:15]) > step:
                shutil.rmtree(path)
        script = Script(step)
        script.evaluate()
        with script.attach(folder) as ckpt:
            assert ckpt.restore() == step
            LOOPS[name](script, ckpt)
        wrong = {at for at, loss in script.losses.items() if loss != losses[at]}
        wrong |= set(differences(script.contents(), expected))
        if not script.losses:  # nothing was left to do, so nothing asked for the random numbers
            wrong.discard("rng")
        if wrong:
            assert warned, f"resumed from step {step}, {sorted(map(str, wrong))} differ, and no warning was given"
    if "no end told" not in name:
        assert not warned, f"a loop that is exact was warned of: {warned}"


@pytest.fixture(autouse=True)
def _logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="layerwise_dist")


def test_a_directory_in_memory_is_said_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is not mounted")
    model = torch.nn.Linear(2, 2)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        with lwd.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), dir=root):
            pass
    assert "is on tmpfs: what is committed survives this job, but not the machine" in caplog.text


def test_a_model_of_which_all_is_copied_at_the_boundary_is_durable_when_waited_for(tmp_path: Path) -> None:
    model = torch.nn.Conv2d(64, 512, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with lwd.attach(model, optimizer, dir=str(tmp_path), config={"commit": {"timeout_s": 10}}) as ckpt:
        for _ in ckpt.steps(5):
            model(torch.ones(1, 64, 8, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ckpt.wait(5, "durable")


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u985e", "\U0001f9ea", '"', "\\", "\x7f", "\u2028"])
def test_a_header_has_room_for_many_names_of_any_letters(tmp_path: Path, letter: str) -> None:
    model = nn.ParameterDict({f"{letter * 20}{number}": nn.Parameter(torch.ones(2)) for number in range(300)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with lwd.attach(model, optimizer, dir=str(tmp_path), commit={"on_failure": "raise"}) as ckpt:
        ckpt.explicit()
        sum(param.sum() for param in model.values()).backward()
        optimizer.step()
        ckpt.end_step()
        ckpt.wait(1)
    wanted = {name: param.detach().clone() for name, param in model.items()}
    with torch.no_grad():
        for param in model.values():
            param.zero_()
    assert restored(tmp_path, model, optimizer) == 1
    assert all(torch.equal(param, wanted[name]) for name, param in model.items())
