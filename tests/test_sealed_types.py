# SPDX-License-Identifier: Apache-2.0
"""The types of what a boundary seals are what a reader checks, and what docs/format/state.md names."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import BaseModel

from layerwise_dist.frameworks import described
from layerwise_dist.loop import sealed
from layerwise_dist.restore import sealed_state
from layerwise_dist.storage import schemas

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
    (sealed_state.CostsSchema, sealed.PacedCosts),
    (sealed_state.SecondsSchema, sealed.PacedSeconds),
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


RNG: dict[str, Any] = {"torch": torch.get_rng_state(), "cuda": {}, "python": random.Random(0).getstate()}
STARTED: dict[str, Any] = {"rng": RNG, "own": {}}
LOADER: dict[str, Any] = {"iterating": True, "start": STARTED, "now": {"own": {}, "epochs": {}}}
COUNTED = {**LOADER, "kind": "counted", "draws": 2, "first": None, "later": {}, "again": False}
STATEFUL = {**LOADER, "kind": "stateful", "state": {"at": 2}}
ELASTIC = {"begin": 2, "draws": 0, "position": 4, "batch_size": 2, "samples": 9, "seed": 0, "shuffle": True}
NO_STATE = torch.zeros(3, dtype=torch.uint8)
MISSING = "an iteration is under way, and how it began is missing"

WRONG: dict[str, tuple[type[sealed_state.PartSchema], dict[str, Any], str]] = {
    "null for what may be absent": (sealed_state.RngSchema, {**RNG, "numpy": None}, "numpy is null; it may only be"),
    "no state of Python's": (
        sealed_state.RngSchema,
        {**RNG, "python": (3, (1,), None)},
        "python: no generator accepts",
    ),
    "no state of torch's": (sealed_state.RngSchema, {**RNG, "torch": NO_STATE}, "torch: no generator accepts it"),
    "none of a loader's own": (sealed_state.NowSchema, {"own": {"g": NO_STATE}, "epochs": {}}, "no generator accepts"),
    "a place before the begin": (sealed_state.ElasticPositionSchema, {**ELASTIC, "begin": 5}, "not in order: begin 5"),
    "a place after the end": (sealed_state.ElasticPositionSchema, {**ELASTIC, "samples": 3}, "samples 3"),
    "an iteration without a start": (sealed_state.CountedSchema, {**COUNTED, "start": None}, MISSING),
    "its own without a start": (sealed_state.StatefulSchema, {**STATEFUL, "start": None}, MISSING),
    "its own without a state": (sealed_state.StatefulSchema, {**STATEFUL, "state": None}, MISSING),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_state_says_against_itself_is_refused_by_name(what: str) -> None:
    model, tree, says = WRONG[what]
    with pytest.raises((schemas.Unfit, ValueError), match=says):
        schemas.fits(model, tree, "")


def test_what_a_state_may_say_is_taken() -> None:
    for model, tree in (
        (sealed_state.RngSchema, RNG),
        (sealed_state.ElasticPositionSchema, ELASTIC),
        (sealed_state.CountedSchema, COUNTED),
        (sealed_state.CountedSchema, {**COUNTED, "iterating": False, "start": None}),
        (sealed_state.StatefulSchema, STATEFUL),
        (sealed_state.StatefulSchema, {**STATEFUL, "state": None, "elastic": ELASTIC}),
    ):
        assert isinstance(schemas.fits(model, tree, ""), model)


def test_the_table_of_the_format_names_the_members() -> None:
    section = FORMAT.read_text().split("## The state extent", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert named == sealed.SealedState.__required_keys__
