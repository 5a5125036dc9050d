# SPDX-License-Identifier: Apache-2.0
"""Every tensor has a name of its own, the one that its author gave it; two that cannot be told apart are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit.models import Keeping
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, offload_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.capture import survey
from layerwise_dist.frameworks import framework, names
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.fsdp1 import FSDP1Framework
from layerwise_dist.frameworks.names import CleanNames
from layerwise_dist.storage.shard_layout import ShardLayout, Source
from layerwise_dist.tensors.slices import Slice

pytestmark = pytest.mark.quick

torch.set_num_threads(1)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Counting(nn.Module):
    """Holds another module under whatever name; has a buffer, a parameter and an extra state of its own."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.name, self.calls = name, 0
        self.add_module(name, inner)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen += len(x)
        return self.get_submodule(self.name)(x) * self.scale

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, calls: int) -> None:
        self.calls = calls


LIKE_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def nested(seed: int = 0) -> nn.Module:
    """Every level has what the one in it has too, under the same name, and is called as a wrapper would call it."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Linear(3, 3)
    for number, name in enumerate(LIKE_WRAPPERS):
        model = Counting(name, model)
        model.calls, model.seen = 100 * number, torch.full((2,), 10.0 * number)
    return model


def train(folder: Path, model: nn.Module, total: int, make: Callable[..., Any] = torch.optim.AdamW) -> int:
    """The step that was restored; then on to `total`."""
    optimizer = make(model.parameters(), lr=0.1)
    with lwd.attach(model, optimizer, dir=str(folder), commit={"on_failure": "raise"}) as ckpt:
        restored = ckpt.restore()
        for _ in ckpt.steps(total):
            model(torch.ones(2, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return restored


def state(model: nn.Module) -> dict[str, Any]:
    return {name: value.tolist() if torch.is_tensor(value) else value for name, value in model.state_dict().items()}


def test_modules_that_are_called_as_wrappers_call_theirs_keep_apart_what_they_hold(tmp_path: Path) -> None:
    model = nested()
    assert train(tmp_path, model, 3) == 0
    again = nested(1)
    assert train(tmp_path, again, 3) == 3
    assert state(again) == state(model)


def test_names_that_no_file_system_would_like_are_names(tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3))
        for name in ("a/b", "param/0", "(boundary)", ' "\\\n', "größe", "state/json"):
            model[0].register_buffer(name, torch.randn(2))
            model[0].register_parameter(f"{name} ", nn.Parameter(torch.randn(2)))
            model.add_module(name, nn.Linear(3, 3))
        return model

    model, again = make(0), make(1)
    train(tmp_path, model, 2)
    assert train(tmp_path, again, 2) == 2
    assert state(again) == state(model)


def test_a_part_of_a_name_is_cut_where_a_wrapper_put_it_and_nowhere_else(one_rank: None) -> None:
    plain = [name for name, _ in nested().named_parameters()]

    def cleaned(model: nn.Module) -> list[str]:
        return [name for _, (name,) in CleanNames(model).parameters()]

    assert cleaned(nested()) == plain
    assert cleaned(DistributedDataParallel(nested())) == plain
    assert cleaned(AveragedModel(nested())) == plain
    assert cleaned(CheckpointWrapper(nested())) == plain
    assert cleaned(offload_wrapper(nested())) == plain
    inside = Counting("module", CheckpointWrapper(offload_wrapper(nn.Linear(3, 3))))
    assert cleaned(inside) == ["scale", "module.weight", "module.bias"]

    class Mine(DistributedDataParallel):
        pass

    assert cleaned(Mine(inside)) == ["scale", "module.weight", "module.bias"]
    device = torch.device("cpu")
    for original in (True, False):
        fsdp = FullyShardedDataParallel(nested(), use_orig_params=original, device_id=device)
        assert [view.fqn for view in FSDP1Framework(fsdp, 0, 1).params] == plain
    parts = nn.Sequential(CheckpointWrapper(nested()), nn.Linear(3, 3))
    fsdp = FullyShardedDataParallel(parts, use_orig_params=False, device_id=device)
    expected = [f"m.0.{name}" for name in plain] + ["m.1.weight", "m.1.bias"]
    assert [view.fqn for view in FSDP1Framework(fsdp, 0, 1, "m").params] == expected


def test_names_of_what_ddp_wraps_are_those_of_what_it_does_not(one_rank: None) -> None:
    model = nested()
    plain, wrapped = framework.Framework(model, 0, 1), DDPFramework(DistributedDataParallel(model), 0, 1)
    assert [view.fqn for view in plain.params] == [view.fqn for view in wrapped.params]
    assert [view.layer for view in plain.params] == [view.layer for view in wrapped.params]
    assert [name for name, _ in plain.buffers()] == [name for name, _ in wrapped.buffers()]
    assert [name for name, _ in plain.extra_states()] == [name for name, _ in wrapped.extra_states()]


class Doubling(AveragedModel):
    """A wrapper that holds something under a name that is taken in what it wraps."""

    def __init__(self, inner: nn.Module, what: str) -> None:
        super().__init__(inner)
        if what == "parameter":
            self.weight = nn.Parameter(torch.ones(3))
        elif what == "buffer":
            self.register_buffer("weight", torch.ones(3))
        else:
            self.register_buffer("mean", torch.ones(3))


class Extra(AveragedModel):
    def get_extra_state(self) -> int:
        return 1


def norm() -> nn.Module:
    inner = nn.Linear(3, 3)
    inner.register_buffer("mean", torch.ones(3))
    return Doubling(inner, "mean")


EQUAL = {
    "two parameters": (lambda: Doubling(nn.Linear(3, 3), "parameter"), "weight"),
    "a parameter and a buffer": (lambda: Doubling(nn.Linear(3, 3), "buffer"), "weight"),
    "two buffers": (norm, "mean"),
    "two buffers ": (lambda: AveragedModel(AveragedModel(nn.Linear(3, 3))), "n_averaged"),
    "two modules with get_extra_state()": (lambda: Extra(Counting("module", nn.Linear(3, 3))), "the root"),
}


@pytest.mark.parametrize("what", EQUAL)
def test_names_that_are_equal_without_what_wrappers_add_are_refused_before_anything_is_written(
    tmp_path: Path, what: str
) -> None:
    make, name = EQUAL[what]
    with pytest.raises(errors.UnsupportedError, match=f"{re.escape(what.strip())} have the same name.*{name}.*rename"):
        train(tmp_path / "checkpoints", make(), 1)
    assert not (tmp_path / "checkpoints").exists()


def test_a_buffer_that_comes_later_and_takes_a_name_is_refused_at_its_first_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(Extra(nn.Linear(3, 3)))
    model[0].module.register_buffer("mean", torch.ones(3))

    class Late(Keeping):
        def keep(self, number: int, param: torch.Tensor, state: dict[Any, Any]) -> None:
            state["updates"] = state.get("updates", 0) + 1
            if state["updates"] == 2:
                model[0].register_buffer("mean", torch.ones(3))

    with pytest.raises(errors.UnsupportedError, match=r"two buffers have the same name.*0\.mean"):
        train(tmp_path, model, 3, Late)
    assert [path.name[:15] for path in tmp_path.glob("step_*") if (path / "manifest.json").exists()] == [
        "step_0000000001"
    ]


def test_cutting_names_wherever_they_occur_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three lines of defence each holds by itself."""

    def cut(module: str, name: str) -> str:
        return ".".join(part for part in f"{module}.{name}".split(".") if part and part not in LIKE_WRAPPERS)

    monkeypatch.setattr(names, "join", cut)
    monkeypatch.setattr(framework, "join", cut)
    with pytest.raises(errors.UnsupportedError, match="two parameters have the same name"):
        train(tmp_path, nested(), 3)
    for module in (framework, survey):
        monkeypatch.setattr(module, "check_unique", lambda what, names: None)
    with pytest.raises(errors.UnsupportedError, match="names that appear twice"):
        train(tmp_path, nested(), 3)
    monkeypatch.setattr(ShardLayout, "_check_names", lambda self: None)
    train(tmp_path, nested(), 3)
    with pytest.raises(errors.DamageError, match="no checkpoint"):
        train(tmp_path, nested(), 3)


@pytest.mark.parametrize(
    ("slices", "says"),
    [
        ([("buffer", "mean"), ("param", "weight"), ("buffer", "mean")], "names that appear twice: .'buffer/mean'"),
        ([("state", "json")], "names of the format itself: .'state/json'"),
        ([("state", "bytes")], "names of the format itself: .'state/bytes'"),
        ([(".pad", "0")], "names of the format itself: .'.pad/0'"),
        ([("param", "\ud800")], "names that are not valid Unicode"),
    ],
)
def test_a_layout_with_a_name_twice_or_of_the_format_itself_is_refused(
    slices: list[tuple[str, str]], says: str
) -> None:
    """Be it in one batch or in two."""
    sources = [Source(Slice.whole(kind, fqn, "F32", (3,))) for kind, fqn in slices]
    for layers in ([("a", sources)], [("a", sources[:1]), ("b", sources[1:])]):
        with pytest.raises(errors.UnsupportedError, match=says):
            ShardLayout(layers, 512, 4096)


class Naming(Keeping):
    name: Any = "a"

    def keep(self, number: int, param: torch.Tensor, state: dict[Any, Any]) -> None:
        state[self.name] = torch.zeros(2)


@pytest.mark.parametrize("name", ["", "a/b", ".pad", "state", "param", "buffer", "master", 3])
def test_optimizer_state_under_a_name_that_no_file_can_hold_is_refused_at_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    monkeypatch.setattr(Naming, "name", name)
    with pytest.raises(errors.UnsupportedError, match=f"Naming keeps state under {name!r}"):
        train(tmp_path, nn.Linear(3, 3), 2, Naming)
    assert not list(tmp_path.glob("step_*/manifest.json"))
