# SPDX-License-Identifier: Apache-2.0
"""Schemas of everything on disk: exactly these members, of exactly these types."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from layerwise_dist.errors import shown

LISTED = 3
HEX16, HEX32 = r"^[0-9a-f]{16}$", r"^[0-9a-f]{32}$"


class Unfit(Exception):
    """What does not fit, with the path of each member."""


class Schema(BaseModel):
    """Unknown members are refused before any member is looked at, so that a million of them is one error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)
    others: ClassVar[bool] = False  # whether there may be members beside those that are named here

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if type(value) is dict and not cls.others and (more := value.keys() - members(cls)):
            named = ", ".join(ascii(name)[:100] for name in sorted(map(str, more))[:LISTED])
            known = sorted(members(cls))
            raise ValueError(f"unknown member{'s' if len(more) > 1 else ''} {named}; known are {known}")
        return value


@functools.cache
def members(model: type[Schema]) -> frozenset[str]:
    """By their names in JSON; found once for each class, since a manifest has a shard for each rank."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


S = TypeVar("S", bound=BaseModel)


def fits(model: type[S], value: Any, path: str) -> S:
    """The value as that model has it. Raises Unfit naming the members, at most a few, by their paths below `path`."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise Unfit(explain(error, path)) from None


def explain(error: ValidationError, path: str) -> str:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    said = [f"{_path(path, each['loc'])}: {_message(each['msg'])}" for each in found[:LISTED]]
    more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return "; ".join(said) + more


def _path(path: str, where: tuple[int | str, ...]) -> str:
    return ".".join([*([path] if path else []), *(shown(str(part), 100) for part in where)]) or "it"


def _message(said: str) -> str:
    return shown(said.removeprefix("Value error, "), 500)
