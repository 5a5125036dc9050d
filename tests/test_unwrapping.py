# SPDX-License-Identifier: Apache-2.0
"""Optimizers that are wrapped around a real one, and other things that libraries put around a training loop's own."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.algorithms.model_averaging.averagers as averagers
from kit.chain import on_a_slow_disk
from kit.runners import Warm
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.utils.data import DataLoader

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.frameworks import torch_optimizer, unwrapping

torch.set_num_threads(1)

Make = Callable[[nn.Module], Any]


# -- wrappers, as they are written in the wild ------------------------------------------------------------------------


class Averager(averagers.ModelAverager):
    """Counts as PeriodicModelAverager does, and changes parameters after the optimizer's step."""

    def __init__(self) -> None:
        self.step = 0

    def average_parameters(self, params: Any) -> None:
        if self.step % 3 == 2:
            for group in params:
                for param in group["params"]:
                    param.data = param.data * 0.5
        self.step += 1


class Lookahead(torch.optim.Optimizer):
    """Slow weights, which it writes by `.data`: no version counter tells. What it keeps, it tells."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 4) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        result = self.optimizer.step(closure) if closure else self.optimizer.step()
        self.count += 1
        if self.count % self.k == 0:
            time.sleep(0.03)  # a writer that had been told that the update is over has read by then
            for slow, group in zip(self.slow, self.param_groups, strict=True):
                for kept, param in zip(slow, group["params"], strict=True):
                    kept.add_(param.data - kept, alpha=0.5)
                    param.data.copy_(kept)
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"fast": self.optimizer.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["fast"])
        self.count = state_dict["count"]
        for mine, theirs in zip(self.slow, state_dict["slow"], strict=True):
            for kept, other in zip(mine, theirs, strict=True):
                kept.copy_(other)


class Decayed:
    """No optimizer at all by its class; changes parameters before the step of the one at `optim`, and keeps nothing."""

    def __init__(self, optim: torch.optim.Optimizer) -> None:
        self.optim = optim

    def zero_grad(self) -> None:
        self.optim.zero_grad()

    def step(self) -> None:
        with torch.no_grad():
            for group in self.optim.param_groups:
                for param in group["params"]:
                    param.mul_(0.99)
        self.optim.step()


class Twice(Decayed):
    """Two steps of the optimizer are one of its own."""

    def step(self) -> None:
        self.optim.step()
        self.optim.step()


class Forgetful(Decayed):
    """Counts, and tells nobody."""

    count = 0

    def step(self) -> None:
        self.optim.step()
        self.count += 1


class Loading(Decayed):
    def state_dict(self) -> dict[str, Any]:
        return {"optim": self.optim.state_dict(), "n": 3}


def around(kind: Callable[..., Any], *more: Any, real: Any = torch.optim.Adam) -> Make:
    return lambda model: kind(real(model.parameters(), lr=0.1), *more)


def job(make: Make, seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    return model, make(model)


def train(ckpt: Any, model: nn.Module, optimizer: Any, total: int) -> None:
    for _ in ckpt.steps(total) if hasattr(ckpt, "steps") else range(total):
        model(torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def held(model: nn.Module, optimizer: Any) -> list[bytes]:
    real = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", optimizer)
    tensors = [*model.parameters()]
    tensors += [value for param in model.parameters() for value in real.state[param].values()]
    tensors += [each for slow in getattr(optimizer, "slow", []) for each in slow]
    counts = [optimizer.averager.step if hasattr(optimizer, "averager") else getattr(optimizer, "count", 0)]
    tensors.append(torch.get_rng_state())
    return [tensor.detach().numpy().tobytes() for tensor in tensors] + [str(counts).encode()]


WRAPPERS: dict[str, Make] = {
    "PostLocalSGD": lambda model: PostLocalSGDOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), Averager()),
    "Lookahead": around(Lookahead),
    "no optimizer by class": around(Decayed),
    "two steps in one": around(Twice),
    "a wrapper within a wrapper": lambda model: Decayed(Lookahead(torch.optim.Adam(model.parameters(), lr=0.1))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", WRAPPERS)
def test_training_is_what_it_is_without_and_a_resume_goes_on_bit_for_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    plain = job(WRAPPERS[what])
    train(None, *plain, 10)
    first = job(WRAPPERS[what])
    with lwd.attach(*first, dir=str(tmp_path), keep_last=20) as ckpt:
        train(ckpt, *first, 10)
        ckpt.wait(10)
        assert ckpt.stats()["checkpoints_committed"] == 10
    assert held(*first) == held(*plain)
    assert "without raising" not in caplog.text, "it was captured before the wrapper was done with it"
    assert "step" not in getattr(first[1], "__dict__", {}), "its step is its class's again"
    for at in (4, 6):
        second = job(WRAPPERS[what], seed=1)
        with lwd.attach(*second, dir=str(tmp_path), keep_last=20) as ckpt:
            assert ckpt.restore(at) == at
            train(ckpt, *second, 10)
        assert held(*second) == held(*plain)


def slow_writes(root: Path, make: Make) -> tuple[int, int]:
    """Aborted and committed checkpoints of a wrapper on a disk that still writes when its next step begins."""
    torch.manual_seed(0)
    model = nn.Linear(128, 256)
    optimizer = make(model)
    with on_a_slow_disk(model, optimizer, root) as ckpt:
        for _ in ckpt.steps(8):  # the first one is written before its boundary is over, since all is audited
            model(torch.ones(2, 128)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    stats = ckpt.stats()
    return int(stats["checkpoints_aborted"]), int(stats["checkpoints_committed"])


def test_what_a_wrapper_changes_before_the_step_is_fenced(tmp_path: Path) -> None:
    assert slow_writes(tmp_path, around(Decayed, real=torch.optim.SGD)) == (0, 8)


def test_mutation_hooks_of_the_inner_step_alone_are_caught(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_optimizer, "is_thin", lambda wrapper: True)
    with pytest.raises(AssertionError):
        test_what_a_wrapper_changes_before_the_step_is_fenced(tmp_path / "before")
    with pytest.raises(AssertionError):  # what is changed after it, without raising a version counter
        test_training_is_what_it_is_without_and_a_resume_goes_on_bit_for_bit(tmp_path / "after", caplog, "Lookahead")


def test_mutation_a_wrapper_s_own_state_that_is_left_out_is_caught(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unwrapping.Around, "__init__", lambda self, wrappers, kin: setattr(self, "_parts", {}))
    with pytest.raises(AssertionError):
        test_training_is_what_it_is_without_and_a_resume_goes_on_bit_for_bit(tmp_path, caplog, "PostLocalSGD")


def test_schedulers_and_others_may_put_their_own_step_around_it(tmp_path: Path) -> None:
    model, optimizer = job(WRAPPERS["PostLocalSGD"])
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        optimizer.defaults = {}
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)  # patches step, and asks for its function
        train(ckpt, model, optimizer, 3)
        ckpt.wait(3)
        assert ckpt.stats()["captures"] == 3
    assert optimizer._opt_called and scheduler is not None
    train(None, model, optimizer, 1)  # through both, of which one is over


def refused(tmp_path: Path, make: Make, **options: Any) -> str:
    model, optimizer = job(make)
    with pytest.raises(errors.LayerwiseError) as caught:
        with lwd.attach(model, optimizer, dir=str(tmp_path), **options) as ckpt:
            train(ckpt, model, optimizer, 8)
    return str(caught.value)


def test_wrappers_that_cannot_be_taken_apart_are_refused_by_name(tmp_path: Path) -> None:
    def two(model: nn.Module) -> Any:
        wrapper = Decayed(torch.optim.SGD(model.parameters(), lr=0.1))
        wrapper.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[attr-defined]
        return wrapper

    def itself(model: nn.Module) -> Any:
        wrapper = Decayed(None)  # type: ignore[arg-type]
        wrapper.optim, wrapper.param_groups = wrapper, []  # type: ignore[attr-defined, assignment]
        return wrapper

    def slotted(model: nn.Module) -> Any:
        class Slotted:
            __slots__ = ("optim",)
            step = zero_grad = Decayed.step

        wrapper = Slotted()
        wrapper.optim = torch.optim.SGD(model.parameters(), lr=0.1)
        return wrapper

    assert "attach() needs a torch.optim.Optimizer, not Decayed" in refused(tmp_path / "1", two)
    assert "attach() needs a torch.optim.Optimizer, not Decayed" in refused(tmp_path / "2", itself)
    assert "Slotted: calls of its step() cannot be seen" in refused(tmp_path / "3", slotted)
    found = refused(tmp_path / "4", around(torch.optim.lr_scheduler.StepLR, 1))
    assert "attach() needs a torch.optim.Optimizer, not StepLR" in found
    assert "Forgetful keeps state in its attribute 'count'" in refused(tmp_path / "5", around(Forgetful))
    twice = around(lambda real: Lookahead(Lookahead(real)))
    assert "a Lookahead around another Lookahead" in refused(tmp_path / "6", twice)
    found = refused(tmp_path / "7", around(Decayed), update="pipelined_step")
    assert "Decayed may change parameters after its optimizer's step" in found and "use update = 'whole'" in found


def test_what_a_wrapper_keeps_fits_only_where_it_is_there_too(tmp_path: Path) -> None:
    def mismatch(saved: Make, restored: Make) -> str:
        root = str(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        model, optimizer = job(saved)
        with lwd.attach(model, optimizer, dir=root) as ckpt:
            train(ckpt, model, optimizer, 1)
        model, optimizer = job(restored, 1)
        with lwd.attach(model, optimizer, dir=root) as ckpt, pytest.raises(errors.MismatchError) as caught:
            ckpt.restore()
        return str(caught.value)

    bare = around(lambda real: real)
    found = mismatch(WRAPPERS["PostLocalSGD"], bare)
    assert "the checkpoint's Adam was inside a PostLocalSGDOptimizer, and it holds ['step']" in found
    found = mismatch(bare, WRAPPERS["PostLocalSGD"])
    assert "PostLocalSGDOptimizer's state_dict() returns ['step'], which the checkpoint lacks" in found
    found = mismatch(bare, around(Loading))
    assert "Loading's state_dict() returns ['n'], which the checkpoint lacks" in found


# -- GradScaler, state and extra state --------------------------------------------------------------------------------


@pytest.mark.parametrize("was_on", [False, True])
def test_a_scaler_that_is_off_on_one_side_only_is_a_mismatch_before_anything_is_loaded(
    tmp_path: Path, was_on: bool
) -> None:
    real = around(lambda real: real)
    model, optimizer = job(real)
    state = {"scaler": torch.amp.GradScaler("cpu", enabled=was_on)}
    with lwd.attach(model, optimizer, dir=str(tmp_path), state=state) as ckpt:
        train(ckpt, model, optimizer, 2)
    model, optimizer = job(real, 1)
    before = held(model, optimizer)[:4]
    state = {"scaler": torch.amp.GradScaler("cpu", enabled=not was_on)}
    was, now = ("on", "off") if was_on else ("off", "on")
    with lwd.attach(model, optimizer, dir=str(tmp_path), state=state) as ckpt:
        with pytest.raises(errors.MismatchError, match=rf"'scaler'\].*was {was} when.* is {now}.*enabled={was_on}"):
            ckpt.restore()
        assert held(model, optimizer)[:4] == before
    # The way out that it names.
    scaler = torch.amp.GradScaler("cpu", enabled=was_on)
    with lwd.attach(model, optimizer, dir=str(tmp_path), state={"scaler": scaler}) as ckpt:
        assert ckpt.restore() == 2
    with lwd.attach(model, optimizer, dir=str(tmp_path), state=state, fresh=True) as ckpt:
        train(ckpt, model, optimizer, 1)


class Extra(nn.Linear):
    """With what no checkpoint can hold, or with code of its own that fails."""

    keeps: Any = None

    def get_extra_state(self) -> Any:
        return self.keeps() if callable(self.keeps) else self.keeps

    def set_extra_state(self, state: Any) -> None:
        raise KeyError("no such thing")


class Stubborn:
    def __init__(self, value: Any = 1) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value() if callable(self.value) else self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError("I would rather not")


def raises() -> Any:
    raise ZeroDivisionError("of a script's own")


UNWRITABLE = {
    "extra state": (object(), 1, r"state\['extra_state'\]\['0'\].*object is an object"),
    "extra state that fails": (raises, 1, r"state\['extra_state'\]\['0'\].*Extra.get_extra_state\(\) fails: ZeroDiv"),
    "an object's state": (None, object(), r"state\['mine'\]\['value'\].*object is an object"),
    "an object's state that fails": (None, raises, r"state\['mine'\].*Stubborn.state_dict\(\) fails: ZeroDiv"),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_what_cannot_be_written_is_found_at_attach(tmp_path: Path, what: str) -> None:
    extra, value, says = UNWRITABLE[what]
    model = nn.Sequential(Extra(2, 2))
    model[0].keeps = extra
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(errors.StateError, match=says):
        lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt"), state={"mine": Stubborn(value)})
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (True, "Extra does not accept what the checkpoint holds: KeyError"),
        (False, "'mine'.*Stubborn does not accept"),
    ],
)
def test_what_does_not_take_back_what_it_gave_is_named_and_nothing_is_trained_then(
    tmp_path: Path, extra: bool, says: str
) -> None:
    def attach() -> tuple[Any, nn.Module, Any]:
        model = nn.Sequential(Extra(2, 2) if extra else nn.Linear(2, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = {} if extra else {"mine": Stubborn()}
        return lwd.attach(model, optimizer, dir=str(tmp_path), state=state), model, optimizer

    ckpt, model, optimizer = attach()
    with ckpt:
        for _ in ckpt.steps(1):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    ckpt, model, optimizer = attach()
    with ckpt:
        with pytest.raises(errors.StateError, match=says):
            ckpt.restore()
        with pytest.raises(errors.DamageError, match="undefined"):
            optimizer.step()


def test_a_loader_whose_class_draws_in_its_own_way_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Endless(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            while True:
                yield from super().__iter__()

    class Proxy:
        """As some libraries' wrappers do."""

        __class__ = DataLoader  # type: ignore[assignment]

    model, optimizer = job(around(lambda real: real))
    loader = Endless(list(torch.randn(8, 3)), batch_size=2)
    with lwd.attach(model, optimizer, dir=str(tmp_path / "1"), state={"data": loader}) as ckpt:
        for _, batch in zip(ckpt.steps(3), loader, strict=False):
            model(batch).sum().backward()
            optimizer.step()
    assert "Endless has an __iter__() of its own, and what that keeps" in caplog.text
    with pytest.raises(errors.UnsupportedError, match="a Proxy claims to be a DataLoader, but wraps one"):
        lwd.attach(model, optimizer, dir=str(tmp_path / "2"), state={"data": Proxy()})


# -- Accelerate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    gc.collect()


def accelerated(accelerator: Any, seed: int, accumulate: int) -> tuple[Any, nn.Module, Any, Any]:
    made = accelerator(gradient_accumulation_steps=accumulate)
    model, optimizer = job(around(lambda real: real), seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    model, optimizer, scheduler = made.prepare(model, optimizer, scheduler)
    return made, model, optimizer, scheduler


def accelerated_steps(made: Any, model: nn.Module, optimizer: Any, scheduler: Any, micro: int, steps: Any) -> None:
    for _ in steps:
        for _ in range(micro):
            with made.accumulate(model):
                made.backward(model(torch.randn(2, 3)).square().sum())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("micro", [1, 2])
def test_accelerate_s_optimizer_is_unwrapped_and_a_resume_goes_on_bit_for_bit(
    accelerator: Any, tmp_path: Path, micro: int
) -> None:
    whole = accelerated(accelerator, 0, micro)
    assert type(whole[2]).__name__ == "AcceleratedOptimizer"
    accelerated_steps(*whole, micro, range(7))
    first = accelerated(accelerator, 0, micro)
    with lwd.attach(first[1], first[2], dir=str(tmp_path), state={"scheduler": first[3]}) as ckpt:
        accelerated_steps(*first, micro, ckpt.steps(4))
        assert ckpt.stats()["captures"] == 4
    second = accelerated(accelerator, 1, micro)
    with lwd.attach(second[1], second[2], dir=str(tmp_path), state={"scheduler": second[3]}) as ckpt:
        assert ckpt.restore() == 4
        accelerated_steps(*second, micro, ckpt.steps(7))
    assert held(second[1], second[2]) == held(whole[1], whole[2])
    assert second[3].state_dict() == whole[3].state_dict()
    # It keeps nothing: the checkpoint is that of the optimizer inside, and fits it.
    manifest = CheckpointMetadataManager(PosixEnv(), str(tmp_path)).inventory().lineage()[0]
    assert manifest.step == 7
    model, optimizer = job(around(lambda real: real), 2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    with lwd.attach(model, optimizer, dir=str(tmp_path), state={"scheduler": scheduler}) as ckpt:
        assert ckpt.restore() == 7


def test_accelerate_s_loader_and_its_scaler_are_refused_by_name_if_they_would_be_lost(
    accelerator: Any, tmp_path: Path
) -> None:
    made = accelerator()
    model, optimizer = job(around(lambda real: real))
    loader = made.prepare(DataLoader(list(torch.randn(8, 3)), batch_size=2))
    with pytest.raises(errors.UnsupportedError, match="Accelerate's DataLoaderShard.*out of accelerator.prepare"):
        lwd.attach(model, optimizer, dir=str(tmp_path), state={"data": loader})
    wrapped = made.prepare(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaled = type(wrapped)(optimizer, scaler=scaler)  # as mixed_precision="fp16" has it
    with pytest.raises(errors.StateError, match=r"GradScaler that AcceleratedOptimizer.scaler steps by is not in it"):
        lwd.attach(model, scaled, dir=str(tmp_path))
    with lwd.attach(model, scaled, dir=str(tmp_path), state={"scaler": scaler}) as ckpt:
        for step in ckpt.steps(3):
            loss = model(torch.ones(1, 3)).sum() * (float("inf") if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaled.step()
            scaled.zero_grad()
        ckpt.wait(3)
        assert ckpt.stats()["captures"] == 2, "the second update was skipped"


# -- Join -------------------------------------------------------------------------------------------------------------


def test_uneven_inputs_under_join_are_a_named_error_and_no_hang(warm: Warm, tmp_path: Path) -> None:
    done = warm.start("joined.py", 2, tmp_path / "ckpt", tmp_path).wait(60)
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    for each in told:
        assert each.startswith("UnsupportedError: a training forward within Join or model.join()"), done.output
        assert "even: 3 steps" in each
