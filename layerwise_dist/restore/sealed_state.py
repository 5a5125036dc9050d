"""The state that a boundary sealed (`capture/sealed.py`), read back and checked as far as restore relies on it.

Its members are in docs/format.md, "The state extent". Whoever reads it, a restore or `layerwise verify`, gets it from
here: what is missing or of another type is damage that is found before a live tensor is touched.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from layerwise_dist.errors import DamageError
from layerwise_dist.frameworks.composite import framework_of
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.reader import Shard

_LISTED = 3


class _Part(BaseModel):
    """Members that nobody here knows are let through."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class _Rng(_Part):
    torch: torch.Tensor
    cuda: dict[int, torch.Tensor]
    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[Any, ...] | dict[str, Any] | None = None


class _Generators(_Part):
    rng: _Rng
    own: dict[str, torch.Tensor]


class _Now(_Part):
    own: dict[str, torch.Tensor]
    epochs: dict[str, int]


class _Counted(_Part):
    iterating: bool
    draws: int = Field(ge=0)
    start: _Generators | None
    first: _Generators | None
    later: dict[int, _Generators]
    again: bool
    now: _Now

    @model_validator(mode="after")
    def _started(self) -> _Counted:
        if self.iterating and self.start is None:
            raise ValueError("an iteration is under way, and how it began is missing")
        return self


class _Stateful(_Part):
    iterating: bool
    start: _Generators | None
    state: Any
    now: _Now

    @model_validator(mode="after")
    def _started(self) -> _Stateful:
        if self.iterating and (self.start is None or self.state is None):
            raise ValueError("an iteration is under way, and how it began is missing")
        return self


_LOADERS: dict[Any, type[_Part]] = {"counted": _Counted, "stateful": _Stateful}


class _Boundary(_Part):
    kind: Literal["explicit", "loader", "inferred", "call"]
    rng: _Rng
    rng_event: Literal["boundary", "draw"]
    rng_after: _Rng | None
    at: list[str]
    loaders: dict[str, dict[str, Any]]
    starts: list[str] = []


class _Group(_Part):
    params: list[str]


class _Elsewhere(_Part):
    state: dict[str, Any] = {}
    on_device: list[str] = []
    told: dict[Any, Any] = {}


class _Inside(_Elsewhere):
    kind: str = Field(alias="class")
    own_state: bool
    groups: list[_Group] | None = None


class _Optimizer(_Elsewhere):
    kind: str = Field(alias="class")
    groups: list[_Group]
    inside: dict[str, _Inside] = {}
    around: dict[str, dict[str, Any]] = {}


class _OneOfSeveral(_Optimizer):
    updates: int = Field(ge=0)


class _PerParameter(_Part):
    scalars: dict[str, dict[Any, Any]]
    order: dict[str, list[Any]]


class _Standing(_Part):
    inner: list[str]
    nested: dict[str, _Standing]


class _Sealed(_Part):
    step: int = Field(ge=0)
    updates: int = Field(ge=0)
    boundary: _Boundary
    objects: dict[str, Any]
    client_state: dict[Any, Any] | None
    optimizer: dict[str, Any]
    wrapper: Any
    gradients: list[str]
    extra_state: dict[str, Any]
    standing: dict[str, _Standing] = {}


class _Counters(_Part):
    counters: dict[str, Any]
    window: int
    loss_scale: dict[str, Any] | None
    lr_scheduler: dict[str, Any] | None


class _Problem(Exception):
    """What is wrong, with its path."""


def read_state(shard: Shard, framework: str) -> dict[str, Any]:
    """The sealed state of a shard of that framework, as the manifest names it. Raises DamageError or OSError."""
    where = f"shard {shard.index.path}"
    sealed = typed_json.loads(*shard.state(), where=where)
    try:
        _check(sealed, framework)
        if sealed["step"] != shard.index.step:
            raise _Problem(f"state.step is {sealed['step']}, the header's step is {shard.index.step}")
    except _Problem as problem:
        raise DamageError(f"{where}: its state is not one that can be restored: {problem}") from None
    return sealed


def optimizers_of(sealed: dict[str, Any]) -> list[dict[str, Any]]:
    """What the state says of each optimizer: ``class`` and ``groups``."""
    optimizer = sealed["optimizer"]
    return list(optimizer["optimizers"].values()) if "optimizers" in optimizer else [optimizer]


def _check(sealed: Any, framework: str) -> None:
    _fits(_Sealed, sealed, "state")
    for name, loader in sealed["boundary"]["loaders"].items():
        path = f"state.boundary.loaders.{name}"
        model = _LOADERS.get(loader.get("kind"))
        if model is None:
            raise _Problem(f"{path}.kind is {loader.get('kind')!r}, known are {sorted(_LOADERS)}")
        _fits(model, loader, path)
    optimizer = sealed["optimizer"]
    _fits(_PerParameter, optimizer, "state.optimizer")
    if "optimizers" not in optimizer:
        _fits(_Optimizer, optimizer, "state.optimizer")
    elif not isinstance(optimizer["optimizers"], dict):
        raise _Problem("state.optimizer.optimizers: not a dictionary")
    else:
        for name, each in optimizer["optimizers"].items():
            _fits(_OneOfSeveral, each, f"state.optimizer.optimizers.{name}")
    _check_wrapper(sealed["wrapper"], framework, "state.wrapper")


def _check_wrapper(carried: Any, framework: str, path: str) -> None:
    """What `Framework.carry` gave."""
    named = framework_of(framework)
    for name, each in named.items():
        if not isinstance(carried, dict) or name not in carried:
            raise _Problem(f"{path}.{name}: missing")
        _check_wrapper(carried[name], each, f"{path}.{name}")
    if framework == "deepspeed":
        _fits(_Counters, carried, path)
        scale = carried["loss_scale"]
        if scale is not None and "external" not in scale:
            raise _Problem(f"{path}.loss_scale.external: missing")
    elif framework == "ddp" and not (
        carried is None or (isinstance(carried, list) and all(isinstance(each, str) for each in carried))
    ):
        raise _Problem(f"{path}: not a list of names")


def _fits(model: type[_Part], value: Any, path: str) -> None:
    try:
        model.model_validate(value)
    except ValidationError as error:
        found = [
            f"{'.'.join([path, *map(str, each['loc'])])}: {each['msg']}"
            for each in error.errors(include_url=False, include_input=False)[:_LISTED]
        ]
        raise _Problem("; ".join(found)) from None
