# SPDX-License-Identifier: Apache-2.0
"""The state that a boundary sealed (`capture/sealed.py`), read back and checked as far as restore relies on it.

Its members are in docs/format/state.md, "The state extent". A restore and `layerwise verify` both read it from
here: what is missing or of another type is damage that is found before a live tensor is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from layerwise_dist.commit.records import OF_DCP
from layerwise_dist.errors import DamageError, MismatchError, shown
from layerwise_dist.frameworks.composite import framework_of
from layerwise_dist.frameworks.described import DescribedOptimizer
from layerwise_dist.loop import rng
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.alike_json import Alike
from layerwise_dist.storage.filenames import STEPS_END
from layerwise_dist.storage.reader import Shard
from layerwise_dist.storage.schemas import Schema, Unfit, fits

__all__ = ["SealedState", "optimizers_of", "read_state"]

_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Many = Annotated[int, Field(ge=1, lt=1 << 63)]


class PartSchema(Schema):
    @model_validator(mode="after")
    def _missing_or_there(self) -> PartSchema:
        for name in self.model_fields_set & type(self).model_fields.keys():
            field = type(self).model_fields[name]
            if not field.is_required() and field.default is None and getattr(self, name) is None:
                raise ValueError(f"{name} is null; it may only be absent")
        return self


class RngSchema(PartSchema):
    torch: Tensor
    cuda: dict[int, Tensor]
    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[Any, ...] | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _can_be_put(self) -> RngSchema:
        there = {name: getattr(self, name) for name in self.model_fields_set}
        for name, problem in rng.problems(there).items():
            raise ValueError(f"{name}: no generator accepts it: {problem}")
        return self


def _generator(state: torch.Tensor) -> torch.Tensor:
    if problem := rng.refused(lambda: torch.Generator().set_state(state)):
        raise ValueError(f"no generator accepts it: {problem}")
    return state


_Own = dict[str, Annotated[torch.Tensor, AfterValidator(_generator)]]


class GeneratorsSchema(PartSchema):
    rng: RngSchema
    own: _Own


class NowSchema(PartSchema):
    own: _Own
    epochs: dict[str, _Count]


class ElasticPositionSchema(PartSchema):
    begin: _Count
    draws: _Count
    position: _Count
    batch_size: _Many | None
    samples: _Count
    seed: int
    shuffle: bool

    @model_validator(mode="after")
    def _within(self) -> ElasticPositionSchema:
        if not self.begin <= self.position <= self.samples:
            raise ValueError(f"not in order: begin {self.begin}, position {self.position}, samples {self.samples}")
        return self


class CountedSchema(PartSchema):
    kind: Literal["counted"]
    iterating: bool
    draws: _Count
    start: GeneratorsSchema | None
    first: GeneratorsSchema | None
    later: dict[int, GeneratorsSchema]
    again: bool
    now: NowSchema
    ahead: RngSchema | None = None
    replicas: _Many | None = None
    elastic: ElasticPositionSchema | None = None

    @model_validator(mode="after")
    def _started(self) -> CountedSchema:
        if self.iterating and self.start is None:
            raise ValueError("an iteration is under way, and how it began is missing")
        return self


class StatefulSchema(PartSchema):
    kind: Literal["stateful"]
    iterating: bool
    start: GeneratorsSchema | None
    state: Any
    now: NowSchema
    ahead: RngSchema | None = None
    replicas: _Many | None = None
    elastic: ElasticPositionSchema | None = None

    @model_validator(mode="after")
    def _started(self) -> StatefulSchema:
        begun = self.elastic is not None and not self.elastic.draws  # and then nothing is to be skipped
        if self.iterating and (self.start is None or (self.state is None and not begun)):
            raise ValueError("an iteration is under way, and how it began is missing")
        return self


LOADERS: dict[Any, type[PartSchema]] = {"counted": CountedSchema, "stateful": StatefulSchema}


class BoundarySchema(PartSchema):
    kind: Literal["explicit", "loader", "inferred", "call"]
    rng: RngSchema
    rng_event: Literal["boundary", "draw"]
    rng_after: RngSchema | None
    at: list[str]
    loaders: dict[str, dict[str, Any]]
    starts: list[str] = []


class GroupSchema(PartSchema):
    """With the group's hyper-parameters beside it, whatever they are."""

    others: ClassVar[bool] = True
    model_config = Schema.model_config | {"extra": "allow"}
    params: list[str]


class ElsewhereSchema(PartSchema):
    state: dict[str, Any] = {}
    on_device: list[str] = []
    told: dict[Any, Any] = {}


class InsideSchema(ElsewhereSchema):
    kind: str = Field(alias="class")
    own_state: bool
    groups: list[GroupSchema] | None = None


class OptimizerSchema(ElsewhereSchema):
    kind: str = Field(alias="class")
    groups: list[GroupSchema]
    inside: dict[str, InsideSchema] = {}
    around: dict[str, ElsewhereSchema] = {}
    adam_w_mode: bool = True
    step_by_group: bool = False


class OneOfSeveralSchema(OptimizerSchema):
    updates: _Count


class PerParameterSchema(PartSchema):
    scalars: dict[str, dict[str, Any]]
    order: dict[str, list[str]]


class SingleSchema(OptimizerSchema, PerParameterSchema):
    pass


class SeveralSchema(PerParameterSchema):
    optimizers: dict[str, OneOfSeveralSchema]


class StandingSchema(PartSchema):
    """As `frameworks.subclasses.describe` has it."""

    kind: str = Field(alias="class")
    context: Any
    size: list[_Count]
    stride: list[_Count]
    inner: list[str]
    nested: dict[str, StandingSchema]


# Bounds within which nothing that is worked out from them overflows.
_Seconds = Annotated[list[Annotated[float, Field(ge=0, le=1e9)]], Field(max_length=32)]


class SecondsSchema(PartSchema):
    step_s: _Seconds
    checkpoint_s: _Seconds
    write_s: _Seconds
    disk_s: _Seconds


class CostsSchema(PartSchema):
    ranks: _Many
    seconds: SecondsSchema


class SealedSchema(PartSchema):
    step: int = Field(ge=0, lt=STEPS_END)
    updates: _Count
    boundary: BoundarySchema
    objects: dict[str, Any]
    client_state: dict[Any, Any] | None
    optimizer: dict[str, Any]
    wrapper: Any
    gradients: list[str]
    extra_state: dict[str, Any]
    aliases: dict[str, list[str]] = {}
    classes: dict[str, str] = {}
    interval: int = Field(default=1, ge=1, lt=STEPS_END)
    costs: CostsSchema | None = None
    standing: dict[str, StandingSchema] = {}


class CountersSchema(PartSchema):
    counters: dict[str, _Count]
    window: int = Field(ge=1, lt=1 << 63)
    loss_scale: dict[str, Any] | None
    lr_scheduler: dict[str, Any] | None
    lr_scheduler_class: str = ""


def read_state(shard: Shard, framework: str) -> SealedState:
    """The sealed state of a shard of that framework, as the manifest names it. Raises DamageError or OSError, and
    MismatchError for what `dcp.save()` wrote.
    """
    return _read(shard, framework, typed_json.loads, {})


class SeenStates:
    """Reads the states of many ranks one after another, as `read_state` does: what is one object in two of them
    (`Alike`) is checked once.
    """

    def __init__(self, framework: str) -> None:
        self._framework, self._alike = framework, Alike()
        self._last: Mapping[str, Any] = {}

    def read(self, shard: Shard) -> SealedState:
        """Raises as `read_state`."""
        sealed = _read(shard, self._framework, self._alike.loads, self._last)
        self._last = cast(Mapping[str, Any], sealed)
        return sealed


def _read(
    shard: Shard, framework: str, loads: Callable[..., SealedState], last: Mapping[str, Any]
) -> SealedState:  # fmt: skip
    if framework == OF_DCP:
        raise MismatchError(
            f"step {shard.index.step} ({shard.index.path}) was written by dcp.save(), not by a training: read it with "
            "dcp.load() and layerwise_dist.dcp.LayerwiseReader"
        )
    where = f"shard {shard.index.path}"
    sealed = loads(*shard.state(), where=where)
    try:
        _check(sealed, framework, last)
        if sealed["step"] != shard.index.step:
            raise Unfit(f"state.step is {sealed['step']}, the header's step is {shard.index.step}")
    except Unfit as problem:
        raise DamageError(f"{where}: its state is not one that can be restored: {problem}") from None
    return sealed


def optimizers_of(sealed: SealedState) -> list[DescribedOptimizer]:
    """What the state says of each optimizer: ``class`` and ``groups``."""
    optimizer = sealed["optimizer"]
    return list(optimizer["optimizers"].values()) if "optimizers" in optimizer else [optimizer]


def _check(sealed: SealedState, framework: str, last: Mapping[str, Any]) -> None:
    """`last` was checked before: what is the same object in it is not looked at again, if all is but the boundary, in
    which each rank has random numbers of its own.
    """
    seen = type(sealed) is dict and sealed.keys() == last.keys()
    if seen and all(value is last[name] for name, value in sealed.items() if name != "boundary"):
        fits(BoundarySchema, sealed["boundary"], "state.boundary")
    else:
        seen = False
        fits(SealedSchema, sealed, "state")
    for name, loader in sealed["boundary"]["loaders"].items():
        path = f"state.boundary.loaders.{shown(name, 100)}"
        kind = loader.get("kind")
        model = LOADERS.get(kind) if type(kind) is str else None
        if model is None:
            raise Unfit(f"{path}.kind is {ascii(kind)[:100]}, known are {sorted(LOADERS)}")
        fits(model, loader, path)
    if not seen:
        several = "optimizers" in sealed["optimizer"]
        fits(SeveralSchema if several else SingleSchema, sealed["optimizer"], "state.optimizer")
        check_wrapper(sealed["wrapper"], framework, "state.wrapper")


def check_wrapper(carried: Any, framework: str, path: str) -> None:
    """What `Framework.carry` of the named framework gave. Raises Unfit."""
    named = framework_of(framework)
    for name, each in named.items():
        if not isinstance(carried, dict) or name not in carried:
            raise Unfit(f"{path}.{name}: missing")
        check_wrapper(carried[name], each, f"{path}.{name}")
    if framework == "deepspeed":
        fits(CountersSchema, carried, path)
        scale = carried["loss_scale"]
        if scale is not None and "external" not in scale:
            raise Unfit(f"{path}.loss_scale.external: missing")
    elif framework == "ddp" and not (
        carried is None or (isinstance(carried, list) and all(isinstance(each, str) for each in carried))
    ):
        raise Unfit(f"{path}: not a list of names")
