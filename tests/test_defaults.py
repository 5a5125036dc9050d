# SPDX-License-Identifier: Apache-2.0
"""What a script sets for its own tensors (`torch.set_default_device`, `set_default_dtype`) decides nothing of ours."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwise_dist as lwd

# Made on the default device, unless the call says where.
_FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


@pytest.fixture
def defaults() -> Iterator[None]:
    """No GPU is needed to tell: tensors on "meta" hold nothing that could be written or read."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


class Odd(nn.Module):
    """Buffers, a frozen layer that is large enough for a base, weights that are not row-major."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.device("cpu"):
            random = torch.Generator("cpu").manual_seed(seed)

            def drawn(*shape: int) -> torch.Tensor:
                return torch.randn(*shape, generator=random, dtype=torch.float32)

            self.frozen = nn.Parameter(drawn(600, 512), requires_grad=False)
            self.dense = nn.Parameter(drawn(8, 600))
            self.transposed = nn.Parameter(drawn(8, 4).t())
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", drawn(4))

    def forward(self) -> torch.Tensor:
        self.seen.add_(1)
        self.mean.mul_(0.5).add_(1)
        return (self.transposed @ (self.dense @ self.frozen)).square().mean()


def train(folder: Path, seed: int, total: int, **config: Any) -> dict[str, torch.Tensor]:
    model = Odd(seed)
    optimizer = torch.optim.AdamW([model.dense, model.transposed], lr=1e-3)
    with lwd.attach(model, optimizer, dir=str(folder), state={"seen": {"t": model.mean}}, **config) as ckpt:
        ckpt.restore()
        for _ in ckpt.steps(total):
            model().backward()
            optimizer.step()
            optimizer.zero_grad()
        ckpt.wait(total)
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}.{key}"] = value.clone()
    return found


@pytest.mark.parametrize("capture", ["auto", "stage"])
def test_a_default_device_and_dtype_change_nothing_of_a_checkpoint(
    tmp_path: Path, capture: str, defaults: None
) -> None:
    whole = train(tmp_path / "whole", 0, 6, capture=capture)
    train(tmp_path / "cut", 0, 3, capture=capture)
    resumed = train(tmp_path / "cut", 1, 6, capture=capture)
    assert whole.keys() == resumed.keys() and len(whole) == 11
    for name, tensor in whole.items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, resumed[name]), name


def test_every_tensor_that_the_library_makes_says_where_it_lies() -> None:
    package = Path(lwd.__file__).parent
    unsaid = []
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] in ("bench", "selftest"):
            continue  # scripts of their own, which set no default
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and (node.func.value.id, node.func.attr in _FACTORIES) == ("torch", True)
                and not any(keyword.arg == "device" for keyword in node.keywords)
            ):
                unsaid.append(f"{path.relative_to(package)}:{node.lineno}: torch.{node.func.attr}")
    assert not unsaid
