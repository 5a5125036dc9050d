# SPDX-License-Identifier: Apache-2.0
"""Accelerate's loop, attached by one line: killed anywhere, it goes on as if it had not been."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.drawing import drawn
from kit.runners import Warm, told
from torch import nn
from torch.utils.data import DataLoader, Dataset

from layerwise_dist.errors import BoundaryError, LayerwiseError, StateError, UnsupportedError

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")

from accelerate.data_loader import skip_first_batches  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin  # noqa: E402

from layerwise_dist.integrations.accelerate import attach  # noqa: E402
from layerwise_dist.loop.placed import PlacedTap  # noqa: E402

BATCHES = {1: 12, 2: 6}  # an epoch's, by the number of ranks
WINDOW, EPOCHS = 3, 3


@pytest.fixture(scope="module")
def fast(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    modules = ["accelerate"] if importlib.util.find_spec("accelerate") else []
    server = Warm(tmp_path_factory.mktemp("warm"), *modules, out_of=warm)
    yield server
    server.close()


def steps_before(micro: int, ranks: int) -> int:
    """Iterations that are over in the body of that micro-batch, which is counted from 1."""
    epoch, within = divmod(micro - 1, BATCHES[ranks])
    return epoch * math.ceil(BATCHES[ranks] / WINDOW) + within // WINDOW


def lines(folder: Path, ranks: int) -> list[dict[Any, Any]]:
    """What each rank told, the last of what it told twice. No line of one run is another one's."""
    kept: list[dict[Any, Any]] = []
    for rank in range(ranks):
        found: dict[Any, Any] = {}
        for line in told(folder, rank):
            if "loss" in line:
                found[line["passes"], line["sum"]] = {**line, "step": None}
            elif "seen" in line:
                found[line["epoch"]] = line
            elif "end" in line:
                found["end"] = {**line, "end": None}
        kept.append(found)
    return kept


def once(fast: Warm, ranks: int, folder: Path, *args: Any, killed: bool = False) -> None:
    done = fast.run("accelerated.py", ranks if ranks > 1 else 0, folder / "ckpt", folder, *args, check=not killed)
    assert done.returncode != 0 or not killed, done.output[-6000:]


@pytest.mark.jobs
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_within_a_window_and_an_epoch_it_goes_on_bit_for_bit(
    fast: Warm, tmp_path: Path, ranks: int, long: bool
) -> None:
    """Samples draw random numbers in the main process; so do body and evaluation."""
    seed = drawn(range(1 << 32), __name__)
    dice = random.Random(seed)
    cases: list[list[Any]] = [[], ["--seedable"]] if long else [dice.choice([[], ["--seedable"]])]
    if long:
        cases += [["--workers", 2], ["--every", 4]]
    for number, options in enumerate(cases):
        plain = tmp_path / f"plain{number}"
        plain.mkdir()
        once(fast, ranks, plain, "--plain", *options)
        expected = lines(plain, ranks)
        for trial in range(8 if long else 1):
            out = tmp_path / f"trial{number}-{trial}"
            out.mkdir()
            where = f"seed {seed}, {options}, trial {trial}"
            at = dice.randrange(WINDOW + 1, EPOCHS * BATCHES[ranks] + 1)
            once(fast, ranks, out, *options, "--die-at", at, "--die-rank", dice.randrange(ranks), killed=True)
            once(fast, ranks, out, *options)
            starts = [[line["start"] for line in told(out, rank) if "start" in line] for rank in range(ranks)]
            every = options[1] if "--every" in options else 1
            assert starts == [[0, steps_before(at, ranks) // every * every]] * ranks, where
            assert lines(out, ranks) == expected, where


@pytest.mark.jobs
def test_the_fsdp2_plugin_goes_on_bit_for_bit(fast: Warm, tmp_path: Path) -> None:
    """On CPUs, by the stand-in of tests/jobs/accelerated.py."""
    plain, out = tmp_path / "plain", tmp_path / "out"
    for each in (plain, out):
        each.mkdir()
    once(fast, 2, plain, "--plain", "--fsdp2")
    once(fast, 2, out, "--fsdp2", "--die-at", 10, killed=True)
    once(fast, 2, out, "--fsdp2")
    assert [[line["sharded"] for line in told(out, rank) if "sharded" in line] for rank in range(2)] == [[True] * 2] * 2
    assert lines(out, 2) == lines(plain, 2)


@pytest.mark.jobs
def test_the_deepspeed_plugin_goes_on_bit_for_bit(zero: Warm, tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("--long")
    plain, out = tmp_path / "plain", tmp_path / "out"
    for each in (plain, out):
        each.mkdir()
    once(zero, 2, plain, "--plain", "--deepspeed")
    once(zero, 2, out, "--deepspeed", "--die-at", 10, killed=True)
    once(zero, 2, out, "--deepspeed")
    assert lines(out, 2) == lines(plain, 2)


@pytest.mark.jobs
def test_the_page_of_loops_runs_as_it_stands(fast: Warm, tmp_path: Path) -> None:
    fast.run("loops.py", 0, tmp_path, "Accelerate")
    assert json.loads((tmp_path / "0.json").read_text()) == [3 * 16, 3 * 16, 5 * 16]


# -- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_states() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    gc.collect()


def prepared(seed: int = 0, accumulate: int = 2, order: int = 7, **options: Any) -> tuple[Any, Any, Any, Any, Any]:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    torch.manual_seed(order)
    loader = DataLoader(Drawing(), batch_size=2, shuffle=True)
    return (accelerator, *accelerator.prepare(model, optimizer, scheduler, loader))


class Drawing(Dataset[Any]):
    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(index)) + torch.rand(3)


class Crash(Exception):
    pass


def trained(made: Any, root: Path | None, crash_at: int = -1) -> list[float]:
    """Losses of two epochs, or until the crash."""
    accelerator, model, optimizer, scheduler, loader = made
    losses: list[float] = []
    ckpt: Any = None if root is None else attach(*made, dir=str(root))
    torch.rand(2)  # a resume draws it as well, where the run that was never interrupted had other numbers
    try:
        for _ in range(2) if ckpt is None else ckpt.epochs(2):
            for x in loader:
                with accelerator.accumulate(model):
                    loss = model(x).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
                if len(losses) == crash_at:
                    ckpt.wait(ckpt.completed)
                    raise Crash
    except Crash as crash:
        ckpt.__exit__(Crash, crash, None)
        return losses
    if ckpt is not None:
        ckpt.close()
    return losses


def resumed(tmp_path: Path) -> tuple[list[float], list[float]]:
    """What a crash within the second epoch's second window leads to, and what should come of it."""
    whole = trained(prepared(), None)
    trained(prepared(), tmp_path, crash_at=10)
    after = trained(prepared(seed=1), tmp_path)
    return after, whole[len(whole) - len(after) :]


def test_a_crash_within_a_window_goes_on_at_its_beginning(tmp_path: Path) -> None:
    after, expected = resumed(tmp_path)
    assert len(after) == 5 and after == expected


def test_a_seedable_sampler_goes_on_in_its_order_whatever_the_seed_is_now(tmp_path: Path) -> None:
    seedable = {"dataloader_config": DataLoaderConfiguration(use_seedable_sampler=True)}
    whole = trained(prepared(**seedable), None)
    trained(prepared(**seedable), tmp_path, crash_at=10)
    after = trained(prepared(seed=1, order=8, **seedable), tmp_path)
    assert len(after) == 5 and after == whole[len(whole) - 5 :]


@pytest.mark.parametrize("broken", ["the batch ahead counts as used", "random numbers stay as they are"])
def test_mutation_a_resume_that_is_not_exact_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "the batch ahead counts as used":
        monkeypatch.setattr(PlacedTap, "_drawing", lambda tap, _, by_for: None)
    else:
        monkeypatch.setattr(PlacedTap, "go_on", lambda tap: None)
    after, expected = resumed(tmp_path)
    assert after != expected


def refused(made: Any, root: Path, match: str, kind: type[LayerwiseError] = UnsupportedError, **options: Any) -> None:
    with pytest.raises(kind, match=match):
        attach(*made, dir=str(root), **options)


def test_what_is_attached_the_wrong_way_is_refused_by_name(tmp_path: Path) -> None:
    made = prepared()
    accelerator, model, optimizer, scheduler, loader = made
    plain = nn.Linear(3, 1)
    refused((accelerator, plain, *made[2:]), tmp_path, "a Linear that accelerator.prepare\\(\\) has not returned")
    raw = DataLoader(Drawing(), batch_size=2)
    refused((*made[:4], raw), tmp_path, "a DataLoader, not what accelerator.prepare\\(\\) returns")
    refused((*made[:4], skip_first_batches(loader, 2)), tmp_path, "skip_first_batches")
    refused(made, tmp_path, "the name is taken", StateError, state={"scheduler": {}})
    for _ in loader:
        refused(made, tmp_path, "within the loop over the loader: too late", BoundaryError)
        break
    made = prepared(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    refused(made, tmp_path, "dispatch_batches")
    made = prepared()
    del made[0]._models
    refused(made, tmp_path, r"has no Accelerator._models, by which its loop is followed. Tested with accelerate 1\.")
    assert type(made[4]).__iter__ is type(loader).__iter__, "nothing is left of what was tried"


def test_a_plugin_that_accelerate_does_not_turn_on_is_said_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # the plugin sets it; put back after the test
    made = prepared(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    refused(made, tmp_path, "an FSDP plugin is asked for, but Accelerate has not turned it on.*this job is NO on cpu")


def test_calls_that_would_cut_an_iteration_in_two_are_refused(tmp_path: Path) -> None:
    made = prepared()
    accelerator, model, optimizer, _, loader = made
    with attach(*made, dir=str(tmp_path)) as ckpt:
        with pytest.raises(BoundaryError, match=r"outside of `for epoch in ckpt.epochs"):
            next(iter(loader))
        for call in (lambda: ckpt.steps(3), ckpt.end_step, ckpt.explicit):
            with pytest.raises(BoundaryError, match="Accelerate's loop marks where its iterations end"):
                call()
        with pytest.raises(BoundaryError, match="the gradient of 0.weight is there at the end of an accumulation"):
            for _ in ckpt.epochs(1):
                for x in loader:
                    with accelerator.accumulate(model):
                        with pytest.raises(BoundaryError, match="save.'x'. within an iteration of Accelerate's"):
                            ckpt.save("x")
                        accelerator.backward(model(x).square().mean())
                        optimizer.step()


def test_a_window_that_was_left_by_break_is_made_anew(tmp_path: Path) -> None:
    """close() saves no batch as consumed whose gradient is in no update."""
    whole = trained(prepared(), None)
    made = prepared()
    accelerator, model, optimizer, scheduler, loader = made
    with attach(*made, dir=str(tmp_path), every_n_steps=3) as ckpt:
        for _ in ckpt.epochs(1):
            for number, x in enumerate(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(model(x).square().mean())
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if number == 4:
                    break
    assert trained(prepared(), tmp_path) == whole


def test_an_engine_that_is_turned_off_leaves_the_loop_as_it_is(tmp_path: Path) -> None:
    made = prepared()
    ckpt = attach(*made, enabled=False)
    assert [*ckpt.epochs(2)] == [0, 1] and len([*made[4]]) == 7
