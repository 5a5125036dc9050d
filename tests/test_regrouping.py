# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's word on optimizers, objects and random numbers, for a job that is cut and grouped otherwise."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from layerwise_dist import errors
from layerwise_dist.loop import rng
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.restore import casts, ranks, regrouping
from layerwise_dist.restore.regrouping import regroup, uneven
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.values import alike

pytestmark = pytest.mark.quick


def group(*params: str, **options: Any) -> dict[str, Any]:
    return {"lr": 0.1, "betas": (0.9, 0.99), **options, "params": list(params)}


def saved(*groups: dict[str, Any], kind: str = "AdamW", frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    names = [name for each in groups for name in each["params"] if name not in frozen]
    return {
        "class": kind,
        "groups": list(groups),
        "scalars": {name: {"calls": 3} for name in names},
        "order": {name: ["step", "exp_avg", "calls"] for name in names},
    }


def fit(
    there: list[dict[str, Any]], live: dict[str, Any], *, rename: dict[str, str] | None = None, **options: Any
) -> tuple[Any, list[str]]:
    names = {name for state in there for each in state.get("groups", ()) for name in each["params"]}
    rename = rename or {name: name for name in names}
    defaults: dict[str, Any] = {"held": {*rename}, "idle": (), "lacking": ()}
    return regroup(there, live, rename, **{**defaults, **options})


def live(*groups: dict[str, Any], kind: str = "AdamW") -> dict[str, Any]:
    return {"class": kind, "groups": [{**each, "lr": 7.0} for each in groups]}


def test_groups_go_by_parameter_and_not_by_place() -> None:
    there = saved(group("a", "b", lr=0.1), group("c", lr=0.2))
    found, problems = fit([there], live(group("c"), group("b"), group("a")))
    assert problems == []
    assert [(each["lr"], each["params"]) for each in found["groups"]] == [(0.2, ["c"]), (0.1, ["b"]), (0.1, ["a"])]
    assert found["origins"] == [[1, 0, 0], 2]
    assert found["scalars"] == there["scalars"] and found["order"] == there["order"]


def test_groups_that_are_one_here_must_be_equal_there() -> None:
    there = saved(group("a"), group("b"))
    assert fit([there], live(group("a", "b")))[1] == []
    _, problems = fit([saved(group("a"), group("b", betas=(0.8, 0.99), lr=0.3))], live(group("a", "b")))
    assert problems == [
        "group 0 of the optimizer has a and b, whose groups in the checkpoint differ in betas, lr: give each a group "
        "of its own"
    ]


def test_what_the_class_here_has_no_key_for_is_left_and_kernels_are_this_runs() -> None:
    there = saved(group("a", amsgrad=True, foreach=True, name="first"))
    found, problems = fit([there], live(group("a", fused=True, name="mine")))
    assert problems == []
    assert found["groups"] == [group("a", lr=0.1, fused=True, name="mine")]
    assert found["origins"] == [[0], 1]


def test_parameters_that_nothing_trains_may_be_in_a_group_or_not() -> None:
    names = {name: name for name in ("a", "frozen")}
    without, within = saved(group("a")), saved(group("a", "frozen"), frozen=("frozen",))
    assert fit([within], live(group("a")), rename=names)[1] == []
    found, problems = fit([without], live(group("a", "frozen")), rename=names, idle=["frozen"])
    assert problems == [] and found["groups"][0]["params"] == ["a", "frozen"]
    _, problems = fit([without], live(group("a", "frozen")), rename=names)
    assert problems == ["in group 0 of the optimizer, and in none of the checkpoint's: frozen"]
    _, problems = fit([saved(group("a", "b"))], live(group("a")))
    assert problems == ["updated in the checkpoint, and in no group of the optimizer here: b"]


def test_what_ranks_keep_of_their_own_comes_together_and_each_takes_its_part() -> None:
    one, other = saved(group("a")), saved(group("b"))
    found, problems = fit([one, other], live(group("a", "b")), held={"b"})
    assert problems == []
    assert found["groups"][0]["params"] == ["a", "b"] and [*found["order"]] == ["b"]
    other["scalars"]["b"]["calls"] = 4
    one["scalars"]["b"] = {"calls": 3}
    assert fit([one, other], live(group("a", "b")))[1] == ["calls of b is not the same on all ranks of the checkpoint"]


def test_names_are_those_of_this_job() -> None:
    found, _ = fit([saved(group("emb.weight"))], live(group("head.weight")), rename={"head.weight": "emb.weight"})
    assert found["groups"][0]["params"] == ["head.weight"] and [*found["scalars"]] == ["head.weight"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("AdamW", "ZeroRedundancyOptimizer(AdamW)", True),
        ("AdamW", "Adam", False),
        ("SGD", "ZeroRedundancyOptimizer(AdamW)", False),
    ],
)
def test_classes_that_update_alike(one: str, other: str, same: bool) -> None:
    """Adam's equals are in test_equal_optimizers.py."""
    for was, now in ((one, other), (other, one)):
        _, problems = fit([saved(group("a"), kind=was)], live(group("a"), kind=now))
        assert problems == ([] if same else [f"the checkpoint's optimizer is {was}, this one is {now}"])


def test_optimizers_by_name() -> None:
    def named(*pairs: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        state: dict[str, Any] = {"optimizers": {}, "scalars": {}, "order": {}}
        for name, each in pairs:
            state["optimizers"][name] = {"class": each["class"], "groups": each["groups"], "updates": 5}
            state["scalars"].update(each["scalars"])
            state["order"].update(each["order"])
        return state

    there = named(("one", saved(group("a"))), ("two", saved(group("b"))))
    here = {"optimizers": {"one": live(group("a")), "two": live(group("b"))}}
    found, problems = fit([there], here, rename={"a": "a", "b": "b"})
    assert problems == [] and found["optimizers"]["two"]["updates"] == 5
    _, problems = fit([there], {"optimizers": {"one": live(group("a"))}}, rename={"a": "a", "b": "b"})
    assert problems == ["the checkpoint holds optimizers ['one', 'two'], this job has ['one']"]
    _, problems = fit([there], live(group("a")), rename={"a": "a", "b": "b"})
    assert problems == ["the checkpoint has optimizers by name (['one', 'two']), here they are not by name"]


def test_ranks_that_say_different_things_of_their_optimizers_are_named() -> None:
    one = saved(group("a"))
    for other in (
        saved(group("a"), kind="SGD"),
        {"optimizers": {}, "scalars": {}, "order": {}},
        {**one, "inside": {"base": {"class": "SGD"}}},
    ):
        assert fit([one, other], live(group("a")))[1] == ["ranks 0 and 1 of the checkpoint have different optimizers"]


def test_what_lies_in_one_tensor_must_have_the_same_state() -> None:
    state: Any = {"scalars": {"a": {"calls": 3}, "b": {"calls": 3}, "c": {"calls": 4}}}
    kinds = {"a": {"exp_avg"}, "b": {"exp_avg"}, "c": {"exp_avg"}, "d": ()}
    assert uneven([["a", "b"], ["c"]], state, lambda fqn: kinds[fqn]) == []
    (problem,) = uneven([["a", "b", "c"]], state, lambda fqn: kinds[fqn])
    assert "a and c are one tensor" in problem and "['calls']" in problem
    (problem,) = uneven([["d", "a"]], {**state, "scalars": {}}, lambda fqn: kinds[fqn])
    assert "in the checkpoint a has state that d has not" in problem


def test_mutation_groups_that_go_by_place_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_place(self: Any, there: Any, here: Any, translation: Any) -> Any:
        return (
            [{**group, "params": own["params"]} for group, own in zip(there[0]["groups"], here, strict=False)],
            [],
            [],
        )

    monkeypatch.setattr(regrouping._Mapping, "_groups", by_place)
    with pytest.raises(AssertionError):
        test_groups_go_by_parameter_and_not_by_place()


def test_casts_are_exact_where_every_value_has_its_own() -> None:
    floats = {code: dtype for code, dtype in DTYPES.items() if dtype.is_floating_point}
    for source, one in floats.items():
        for target, other in floats.items():
            a, b = torch.finfo(one), torch.finfo(other)
            holds = b.eps <= a.eps and b.max >= a.max and b.smallest_normal <= a.smallest_normal
            assert casts.exact(source, target) == (holds or source == target), (source, target)
            assert casts.possible(source, target)
    assert not casts.possible("F32", "I64") and not casts.exact("I32", "I64") and casts.exact("I64", "I64")


# -- what belongs to a rank -------------------------------------------------------------------------------------------


def for_rank(states: list[Any], rank: int, world_size: int, **choose: str) -> tuple[Any, list[str]]:
    """Objects that are generators here are called so."""
    objects = StateObjects({name: torch.Generator() for name in states[0]["objects"] if name == "generator"})
    return ranks.for_rank(states, rank, world_size, choose=choose, objects=objects)


def sealed(rank: int, objects: dict[str, Any], extra: Any = None) -> Any:
    torch.manual_seed(100 + rank)
    boundary = {"rng": rng.take(), "rng_event": "draw", "rng_after": None, "kind": "explicit", "at": [], "loaders": {}}
    return {"step": 5, "objects": objects, "extra_state": {"m": extra}, "client_state": None, "boundary": boundary}


def test_ranks_that_were_there_keep_their_own_and_new_ones_take_rank_0s() -> None:
    states = [sealed(rank, {"same": {"a": 1}, "own": {"a": rank}}, extra=rank) for rank in range(2)]
    for rank in range(3):
        state, taken = for_rank(states, rank, 3)
        assert state["objects"] == {"same": {"a": 1}, "own": {"a": rank if rank < 2 else 0}}
        assert taken == ["state['own']", "the extra state of m"]
        if rank < 2:
            assert state["boundary"]["rng"] is states[rank]["boundary"]["rng"]
    assert for_rank(states, 1, 2)[1] == []  # as many ranks: each has its own


def test_a_new_ranks_random_numbers_are_its_own_and_the_same_in_every_restore() -> None:
    states = [sealed(0, {})]
    found = [for_rank(states, rank, 4)[0]["boundary"] for rank in (1, 2, 1)]
    assert rng.same(found[0]["rng"], found[2]["rng"]) and not rng.same(found[0]["rng"], found[1]["rng"])
    assert not rng.same(found[0]["rng"], states[0]["boundary"]["rng"]) and rng.problems(found[0]["rng"]) == {}
    assert (found[0]["rng_event"], found[0]["rng_after"]) == ("boundary", None)
    later = [{**states[0], "step": 6}]
    assert not rng.same(for_rank(later, 1, 4)[0]["boundary"]["rng"], found[0]["rng"])


def test_tensors_in_an_object_that_differ_between_ranks_are_refused_unless_rank_0s_are_asked_for() -> None:
    states = [sealed(rank, {"ema": {"w": torch.full((3,), rank)}}) for rank in range(2)]
    for world in (1, 2, 3):  # of the same ranks in another wrapper too: their parts are others
        with pytest.raises(errors.MismatchError, match=r"state\['ema'\] holds tensors that differ.*rank0"):
            for_rank(states, 0, world)
    state, taken = for_rank(states, 1, 3, ema="rank0")
    assert alike(state["objects"]["ema"], states[0]["objects"]["ema"]) and taken == []
    for choice, says in ({"emma": "rank0"}, "no 'emma'"), ({"ema": "anew"}, "'ema' is not a loader"):
        with pytest.raises(errors.MismatchError, match=says):
            for_rank(states, 1, 3, **choice)


def test_generators_of_the_scripts_own_are_no_tensors_that_differ_and_new_ranks_get_their_own() -> None:
    states = [sealed(rank, {"generator": torch.Generator().manual_seed(rank).get_state()}) for rank in range(2)]
    found = [for_rank(states, rank, 4)[0]["objects"]["generator"] for rank in range(4)]
    assert all(alike(found[rank], states[rank]["objects"]["generator"]) for rank in range(2))
    assert len({bytes(state.tolist()) for state in found}) == 4
    assert alike(found[3], for_rank(states, 3, 5)[0]["objects"]["generator"])
    for generator in (random.Random(3), np.random.RandomState(3), np.random.default_rng(3)):
        objects = StateObjects({"own": generator})
        saved = objects.take()["own"]
        new = [objects.derived("own", saved, 5, rank) for rank in (2, 3, 2)]
        assert alike(new[0], new[2]) and not alike(new[0], new[1])
        objects.put({"own": new[0]})
