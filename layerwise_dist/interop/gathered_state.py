# SPDX-License-Identifier: Apache-2.0
"""What an import found in another tool's checkpoint, as tensors by name and one sealed state."""

from __future__ import annotations

import fnmatch
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from layerwise_dist.errors import StateError, UnsupportedError
from layerwise_dist.interop.pickles import Inert
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.storage import typed_json
from layerwise_dist.tensors.pieces import dtype_code
from layerwise_dist.tensors.slices import Slice

NO_OPTIMIZER = "(none: only weights were imported)"
# Buffers that torch's own modules keep; and what is no floating-point number is no parameter.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Found:
    """One whole tensor, which `read` gives when it is its turn to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Found:
        return Found(tensor.dtype, tuple(tensor.shape), lambda: tensor)


@dataclass
class Imported:
    """Attributes:
    tensors: by `<kind>/<fqn>`, as shards name them.
    groups: the optimizer's, with `params`, the names of their parameters.
    scalars, order: as docs/format/state.md has them.
    notes: what could not be carried over, and what was taken for granted, in words.
    """

    source: str
    framework: str = "plain"
    step: int = 0
    optimizer: str = NO_OPTIMIZER
    tensors: dict[str, Found] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    order: dict[str, list[str]] = field(default_factory=dict)
    wrapper: Any = None
    objects: dict[str, Any] = field(default_factory=dict)
    client_state: dict[Any, Any] | None = None
    extra_state: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, fqn: str, found: Found) -> None:
        """Raises UnsupportedError for a name that is there already, or for what no file can hold."""
        if not fqn or "/" in kind:
            raise UnsupportedError(f"{self.source}: {kind!r} of {fqn!r} is not a name that a checkpoint can have")
        name = f"{kind}/{fqn}"
        if name in self.tensors:
            raise UnsupportedError(f"{self.source}: {name} occurs twice")
        dtype_code(found.dtype, name)
        self.tensors[name] = found

    def add_model(self, fqn: str, value: Any, buffers: Sequence[str]) -> None:
        """A member of a model's `state_dict()`. Its names do not say what is a buffer: see `is_buffer`."""
        if fqn.rpartition(".")[2] == "_extra_state":
            self.extra_state[fqn.rpartition(".")[0]] = value
        elif isinstance(value, (torch.Tensor, Found)):
            found = value if isinstance(value, Found) else Found.of(value.detach())
            self.add("buffer" if is_buffer(fqn, found.dtype, buffers) else "param", fqn, found)
        else:
            self.notes.append(f"{fqn} of the model is a {type(value).__name__}, and no tensor")

    def add_state(self, fqn: str, state: dict[str, Any]) -> None:
        """An optimizer's state of one parameter."""
        self.order[fqn] = list(state)
        for kind, value in state.items():
            if isinstance(value, (torch.Tensor, Found)):
                self.add(kind, fqn, value if isinstance(value, Found) else Found.of(value.detach()))
            else:
                self.scalars.setdefault(fqn, {})[kind] = value

    def add_object(self, name: str, value: Any) -> None:
        """For `state=` of the job that goes on. What typed JSON cannot hold is left out, and noted."""
        if (problem := unwritable(value, name)) is None:
            self.objects[name] = value
        else:
            self.notes.append(problem)

    def tie(self) -> None:
        """A parameter that no group of the optimizer has, and that is to the bit one that a group has, is that one
        under a further name: formats that keep no links have tied parameters twice.
        """
        trained = [fqn for group in self.groups for fqn in group["params"]]
        alike: dict[tuple[torch.dtype, tuple[int, ...]], list[str]] = {}
        for fqn in trained:
            if (each := self.tensors.get(f"param/{fqn}")) is not None:
                alike.setdefault((each.dtype, each.shape), []).append(fqn)
        for name in [name for name in self.tensors if name.startswith("param/")]:
            fqn, each = name.partition("/")[2], self.tensors[name]
            if fqn in trained or not math.prod(each.shape):
                continue
            value = each.read().contiguous().view(torch.uint8) if each.shape else each.read()
            for other in alike.get((each.dtype, each.shape), ()):
                same = self.tensors[f"param/{other}"].read().contiguous()
                if torch.equal(value, same.view(torch.uint8) if each.shape else same):
                    del self.tensors[name]
                    self.aliases.setdefault(other, []).append(fqn)
                    self.notes.append(f"{fqn} is {other} bit for bit, and taken to be tied to it")
                    break

    def slices(self) -> list[tuple[Slice, Found]]:
        """In the order in which they are written: the model, then the optimizer's state."""
        ordered = sorted(
            self.tensors.items(), key=lambda each: each[0].split("/", 1)[0] not in ("param", "master", "buffer")
        )
        parts = []
        for name, found in ordered:
            kind, fqn = name.split("/", 1)
            parts.append((Slice.whole(kind, fqn, dtype_code(found.dtype, name), found.shape), found))
        return parts

    def sealed(self) -> SealedState:
        """What a training would have sealed that had come to this. Random numbers are those of seed 0."""
        torch_state = torch.Generator().manual_seed(0).get_state()
        numbers: Any = {
            "torch": torch_state, "cuda": {}, "python": random.Random(0).getstate(),
            "numpy": np.random.RandomState(0).get_state(),
        }  # fmt: skip
        state: Any = {
            "step": self.step, "updates": self.step,
            "boundary": {
                "kind": "call", "rng": numbers, "rng_event": "boundary", "rng_after": None, "at": [], "loaders": {},
            },
            "objects": self.objects, "client_state": self.client_state,
            "optimizer": {
                "class": self.optimizer, "groups": self.groups, "scalars": self.scalars, "order": self.order,
            },
            "wrapper": self.wrapper, "gradients": [], "extra_state": self.extra_state,
            **({"aliases": self.aliases} if self.aliases else {}),
        }  # fmt: skip
        return cast(SealedState, state)


def is_buffer(fqn: str, dtype: torch.dtype, patterns: Iterable[str]) -> bool:
    """Those of torch's own modules, what is no floating-point number, and what the patterns (as of shells) name."""
    return (
        fqn.rpartition(".")[2] in _BUFFERS
        or not (dtype.is_floating_point or dtype.is_complex)
        or any(fnmatch.fnmatchcase(fqn, pattern) for pattern in patterns)
    )


def unwritable(value: Any, name: str) -> str | None:
    """Why typed JSON cannot hold it, if it cannot."""
    if isinstance(value, Inert):
        return f"{name}: a {value.kind}, which only DeepSpeed or its like could use"
    try:
        typed_json.dumps(value, path=name)
    except StateError as error:
        return str(error)
    return None


def guess_optimizer(groups: Sequence[dict[str, Any]], states: Iterable[Iterable[str]], source: str) -> str:
    """The optimizer's class by what its groups hold, where that tells. Raises UnsupportedError where it does not."""
    keys = {key for group in groups for key in group}
    kinds = {kind for state in states for kind in state}
    if {"exp_avg", "exp_avg_sq"} <= kinds and "betas" in keys and "decoupled_weight_decay" in keys:
        decoupled = {bool(group["decoupled_weight_decay"]) for group in groups}
        if len(decoupled) == 1:
            return "AdamW" if decoupled.pop() else "Adam"
    if {"momentum", "dampening", "nesterov"} <= keys:
        return "SGD"
    raise UnsupportedError(
        f"{source}: it does not say which class the optimizer was: name the class of the job that resumes, such as "
        "--optimizer AdamW"
    )
