# SPDX-License-Identifier: Apache-2.0
"""The types of what a boundary seals are what a reader checks, and what docs/format/state.md names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from layerwise_dist.frameworks import described
from layerwise_dist.loop import sealed
from layerwise_dist.restore import sealed_state

pytestmark = pytest.mark.quick

FORMAT = Path(__file__).parent.parent / "docs" / "format" / "state.md"

PAIRS: list[tuple[type[BaseModel], Any]] = [
    (sealed_state.SealedSchema, sealed.SealedState),
    (sealed_state.BoundarySchema, sealed.BoundaryState),
    (sealed_state.RngSchema, sealed.RngState),
    (sealed_state.GeneratorsSchema, sealed.GeneratorStates),
    (sealed_state.NowSchema, sealed.LoaderNow),
    (sealed_state.ElasticPositionSchema, sealed.ElasticPosition),
    (sealed_state.CountedSchema, sealed.CountedLoader),
    (sealed_state.StatefulSchema, sealed.StatefulLoader),
    (sealed_state.SingleSchema, described.SingleOptimizer),
    (sealed_state.SeveralSchema, described.SeveralOptimizers),
    (sealed_state.OneOfSeveralSchema, described.DescribedOptimizer),
    (sealed_state.InsideSchema, described.Inside),
    (sealed_state.ElsewhereSchema, described.KeptElsewhere),
    (sealed_state.StandingSchema, described.Standing),
    (sealed_state.CountersSchema, described.CarriedCounters),
]
OF_SEVERAL_ONLY = {"updates"}


def differences(model: type[BaseModel], typed: Any) -> set[str]:
    """Members that only one of them has, or that only one of them requires."""
    named = {field.alias or name: field.is_required() for name, field in model.model_fields.items()}
    members = {name: name in typed.__required_keys__ for name in typed.__required_keys__ | typed.__optional_keys__}
    found = named.items() ^ members.items()
    return {name for name, _ in found} - (OF_SEVERAL_ONLY if issubclass(model, sealed_state.OptimizerSchema) else set())


@pytest.mark.parametrize(("model", "typed"), PAIRS)
def test_the_types_of_the_state_are_what_a_reader_checks(model: type[BaseModel], typed: Any) -> None:
    assert differences(model, typed) == set()


def test_every_model_of_the_reader_has_its_type() -> None:
    parts = {each for each in vars(sealed_state).values() if isinstance(each, type)}
    parts = {
        each for each in parts if issubclass(each, sealed_state.PartSchema) and each.__module__ == sealed_state.__name__
    }
    without = {
        sealed_state.PartSchema,
        sealed_state.GroupSchema,
        sealed_state.OptimizerSchema,
        sealed_state.PerParameterSchema,
    }
    assert parts - without == {model for model, _ in PAIRS}


def test_a_member_that_only_one_side_has_or_requires_is_found() -> None:
    class Now(sealed_state.PartSchema):
        others: ClassVar[bool] = False
        own: dict[str, Any] = {}
        more: int

    assert differences(Now, sealed.LoaderNow) == {"own", "epochs", "more"}


def test_the_table_of_the_format_names_the_members() -> None:
    section = FORMAT.read_text().split("## The state extent", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert named == sealed.SealedState.__required_keys__
