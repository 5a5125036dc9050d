# SPDX-License-Identifier: Apache-2.0
"""Tensors that are views of a kind: their values are saved and come back, or they are refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.crash import in_ranks, settings
from kit.models import Keeping
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.restore import filling
from layerwise_dist.tensors import pieces

pytestmark = pytest.mark.quick

torch.set_num_threads(1)
# From 16 KiB on a tensor is not packed with others but read where it lies.
SIZES = (6, 100)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


VIEWS: dict[str, Callable[[int], torch.Tensor]] = {
    "conj": lambda n: numbers(n, n, dtype=torch.complex64).conj(),
    "conj of a transposed": lambda n: numbers(n, n + 1, dtype=torch.complex64).mH,
    "neg": lambda n: torch._neg_view(numbers(n, n)),
    "neg of integers": lambda n: torch._neg_view(torch.randint(1, 99, (n, n))),
    "imaginary part of a conj": lambda n: numbers(n, n, dtype=torch.complex64).conj().imag,
    "conj of a conj": lambda n: numbers(n, n, dtype=torch.complex64).conj().conj(),
    "part of a conj": lambda n: numbers(n, n, dtype=torch.complex64).conj()[1:],
    "transposed": lambda n: numbers(n, n + 1).t(),
    "permuted": lambda n: numbers(2, n, n).permute(1, 2, 0),
    "every other column": lambda n: numbers(n, 2 * n)[:, ::2],
    "a part of larger memory": lambda n: numbers(n, 2 * n)[1:-1, 3:-2],
    "diagonal": lambda n: numbers(n, n).diagonal(),
    "unfolded without overlap": lambda n: numbers(4 * n).unfold(0, 3, 4),
    "expanded along one": lambda n: numbers(n).expand(1, n),
    "no elements": lambda n: numbers(1, 0).expand(n, 0),
    "scalar": lambda n: numbers(n)[2],
}


class Views(nn.Module):
    """Each view as a buffer, as a frozen parameter, and as one that is trained where its dtype can be."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(2, 1)
        self.buffers_of, self.frozen, self.trained = nn.Module(), nn.ParameterDict(), nn.ParameterDict()
        for name, make in VIEWS.items():
            for size in SIZES:
                self.buffers_of.register_buffer(f"{name} {size}", make(size))
                tensor = make(size)
                self.frozen[f"{name} {size}"] = nn.Parameter(tensor, requires_grad=False)
                if tensor.is_floating_point() or tensor.is_complex():
                    self.trained[f"{name} {size}"] = nn.Parameter(make(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).sum() + sum((each * each).abs().sum() for each in self.trained.values())


class Conjugating(Keeping):
    """Keeps state that is seen through a bit, as parts of its own row of memory."""

    def keep(self, number: int, param: torch.Tensor, state: dict[Any, Any]) -> None:
        if number < 4:
            state["seen"] = torch.full((5, 9), number + 1j, dtype=torch.complex64).conj()[:, ::2]
            state["scale"] = torch._neg_view(torch.tensor(number + 0.5))


def train(folder: Path, model: nn.Module, total: int, **config: Any) -> tuple[int, Any]:
    optimizer = Conjugating(model.parameters(), lr=0.01)
    with lwd.attach(model, optimizer, dir=str(folder), commit={"on_failure": "raise"}, **config) as ckpt:
        restored = ckpt.restore()
        for _ in ckpt.steps(total):
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return restored, optimizer


def values(model: nn.Module, optimizer: Any) -> dict[str, list[Any]]:
    found = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{key} of {name}"] = value
    return {name: tensor.detach().resolve_conj().resolve_neg().flatten().tolist() for name, tensor in found.items()}


def differing(folder: Path, **config: Any) -> list[str]:
    """Names of what a restore of a restore has other values of, or another layout."""
    model = Views(1)
    held = values(model, train(folder, model, 2, **config)[1])
    bad: set[str] = set()
    for seed in (2, 3):
        again = Views(seed)
        layouts = {name: (each.stride(), each.is_conj(), each.is_neg()) for name, each in again.state_dict().items()}
        restored, optimizer = train(folder, again, 2)
        assert restored == 2
        now = values(again, optimizer)
        bad |= {name for name in held if now[name] != held[name]}
        # One more checkpoint, of what was restored; and it is held against what the first one had.
        held_now = layouts == {n: (e.stride(), e.is_conj(), e.is_neg()) for n, e in again.state_dict().items()}
        bad |= set() if held_now else {"layout"}
        with lwd.attach(again, optimizer, dir=str(folder)) as ckpt:
            ckpt.restore()
            ckpt.save("again")
    return sorted(bad)


@pytest.mark.parametrize("capture", ["auto", "stage"])
def test_what_a_view_shows_is_saved_and_comes_back_however_often(tmp_path: Path, capture: str) -> None:
    assert differing(tmp_path, capture=capture) == []


def test_ranks_that_write_parts_of_a_view_each_write_what_it_shows(tmp_path: Path) -> None:
    def run(transport: LocalTransport, models: list[Views]) -> tuple[int, dict[str, list[Any]]]:
        model = models[transport.rank]
        optimizer = torch.optim.SGD(model.first.parameters(), lr=0.1)
        ddp = DDPFramework(model, transport.rank, 2)
        where = settings(str(tmp_path))
        with assembly.assemble(model, optimizer, where, transport, PosixEnv(), framework=ddp) as ckpt:
            restored = ckpt.restore()
            for _ in ckpt.steps(1):
                model(torch.ones(3, 2)).sum().backward()
                optimizer.step()
        return restored, {name: value for name, value in values(model, optimizer).items() if "buffers_of" not in name}

    same, other = [Views(1), Views(1)], [Views(2), Views(3)]
    (_, held), _ = in_ranks(lambda transport: run(transport, same))
    assert in_ranks(lambda transport: run(transport, other)) == [(1, held), (1, held)]


@pytest.mark.parametrize("module", [pieces, filling])
def test_taking_memory_for_what_is_seen_through_a_bit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    """On the way out, and on the way in."""
    monkeypatch.setattr(module, "is_dense", torch.Tensor.is_contiguous)
    bad = differing(tmp_path)
    assert any("conj" in name for name in bad)
    assert any("neg" in name for name in bad)
    assert not any("transposed" in name and "conj" not in name for name in bad)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def jagged(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def compressed() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.eye(3).to_sparse_csr()


SHARING = "several elements in one place in memory.*contiguous.*persistent=False"
REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "expanded": (lambda: torch.ones(1).expand(5), SHARING),
    "expanded in the middle": (lambda: torch.ones(2, 1, 3).expand(2, 4, 3), SHARING),
    "overlapping windows": (lambda: torch.arange(9.0).unfold(0, 3, 1), SHARING),
    "as_strided": (lambda: torch.arange(9.0).as_strided((3, 3), (2, 1)), SHARING),
    "sparse": (lambda: torch.eye(3).to_sparse(), "a sparse_coo tensor"),
    "compressed": (compressed, "a sparse_csr tensor"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "a _mkldnn tensor"),
    "nested": (lambda: jagged(torch.strided), "a nested tensor"),
    "jagged": (lambda: jagged(torch.jagged), "a nested tensor"),
    "quantized": (quantized, "dtype torch.qint8"),
    "meta": (lambda: torch.ones(3, device="meta"), "on the meta device"),
    "subclass": (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "a TwoTensor, which has no memory of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_buffer_that_cannot_be_filled_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, says = REFUSED[kind]
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].register_buffer("odd", make())
    with pytest.raises(errors.UnsupportedError, match=rf"buffer.0\.odd.*{says}"):
        train(tmp_path / "checkpoints", model, 1)
    assert not (tmp_path / "checkpoints").exists()
    model[0].register_buffer("odd", make(), persistent=False)  # nobody saves it: that is the way out
    train(tmp_path / "checkpoints", model, 1)


@pytest.mark.parametrize("kind", ["expanded", "overlapping windows", "sparse", "meta"])
def test_a_parameter_that_cannot_be_filled_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, says = REFUSED[kind]
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].odd = nn.Parameter(make(), requires_grad=False)
    with pytest.raises(errors.UnsupportedError, match=rf"parameter 0\.odd.*{says}"):
        train(tmp_path, model, 1)
    with pytest.raises(errors.UnsupportedError, match="parameter weight has no shape yet: run a forward"):
        train(tmp_path, nn.LazyLinear(3), 1)


class Odd(Keeping):
    """From its second update on, it keeps what no checkpoint can hold."""

    make: Any = None

    def keep(self, number: int, param: torch.Tensor, state: dict[Any, Any]) -> None:
        state["updates"] = state.get("updates", 0) + 1
        if state["updates"] > 1:
            state["odd"] = self.make()


@pytest.mark.parametrize("kind", ["expanded", "overlapping windows", "nested", "sparse", "meta"])
def test_optimizer_state_that_cannot_be_filled_is_refused_at_the_first_checkpoint_that_has_it(
    tmp_path: Path, kind: str
) -> None:
    make, says = REFUSED[kind]
    model = nn.Linear(2, 1)
    optimizer = Odd(model.parameters(), lr=0.1)
    optimizer.make = make
    done = []
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    with pytest.raises(errors.UnsupportedError, match=f"Odd's state odd of weight.*{says}"):
        for step in ckpt.steps(4):
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
            done.append(step)
    assert len(done) == 1
    with suppress(errors.CommitError):  # raised again, unless rank 0 has not decided by then that all stop
        ckpt.close()
    assert [path.parent.name[:15] for path in tmp_path.glob("step_*/manifest.json")] == ["step_0000000001"]
