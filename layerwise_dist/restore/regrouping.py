# SPDX-License-Identifier: Apache-2.0
"""Rewrites what a commit says about its optimizers for a job with another cut or other groups.

Pure data: values of the state extent (docs/format/state.md) go in and come out. Groups are mapped by parameter, so a
job may have split them, merged equal ones, or reordered them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from layerwise_dist.errors import named
from layerwise_dist.frameworks import adams
from layerwise_dist.frameworks.described import OptimizerState
from layerwise_dist.frameworks.param_groups import KERNEL_KEYS, differing
from layerwise_dist.tensors.values import alike

T = TypeVar("T")

_NAMED = 4  # parameters, in a message
_OWN = ("class", "groups", "updates", "scalars", "order", "optimizers", *adams.MEMBERS)


def regroup(
    saved: Sequence[Mapping[str, Any]], live: Mapping[str, Any], rename: Mapping[str, str], *,
    held: Collection[str], idle: Collection[str], lacking: Collection[str],
) -> tuple[OptimizerState, list[str]]:  # fmt: skip
    """The optimizers' state for one rank, and what of it does not fit, in words. Each optimizer has a member more than
    the format: ``origins``, of each of its groups the number of the checkpoint's, and how many those were.

    Args:
        saved: ``optimizer`` of every saved rank's state, in the order of ranks.
        live: `OptimizerAdapter.describe()` of this rank.
        rename: of each parameter of this job, by fqn, its name in the checkpoint; of what that has.
        held: the parameters whose state this rank keeps.
        idle: parameters that nothing trains here: whether they are in a group makes no difference.
        lacking: parameters that the checkpoint lacks, and need not have.
    """
    here = {name: fqn for fqn, name in rename.items()}
    scalars: dict[str, dict[str, Any]] = {}
    order: dict[str, list[str]] = {}
    problems: list[str] = []
    for values_of in _distinct(state["scalars"] for state in saved):
        for name, values in values_of.items():
            known = scalars.setdefault(name, {})
            for kind, value in values.items():
                if kind in known and not alike(known[kind], value):
                    problems.append(f"{kind} of {name} is not the same on all ranks of the checkpoint")
                known.setdefault(kind, value)
    for kinds_of in _distinct(state["order"] for state in saved):
        for name, kinds in kinds_of.items():
            order[name] = list(dict.fromkeys([*order.get(name, ()), *kinds]))
    if other := _unlike(saved):
        return cast(OptimizerState, {**live, "scalars": {}, "order": {}}), [other]
    for described in saved[0].get("optimizers", {"": saved[0]}).values():
        for name, step in adams.steps_of_groups(described, scalars).items():
            scalars[name]["step"] = step
    stateful = {name for name, kinds in order.items() if kinds}
    mapping = _Mapping(rename, here, stateful, {*idle, *lacking})
    several = "optimizers" in live
    if several != ("optimizers" in saved[0]):
        there = f"by name ({sorted(saved[0]['optimizers'])})" if "optimizers" in saved[0] else "without a name"
        problems.append(f"the checkpoint has optimizers {there}, here they are {'' if several else 'not '}by name")
        return cast(OptimizerState, {**live, "scalars": {}, "order": {}}), problems
    found: dict[str, Any]
    if several:
        found = {"optimizers": {}}
        if live["optimizers"].keys() != saved[0]["optimizers"].keys():
            kept, now = sorted(saved[0]["optimizers"]), sorted(live["optimizers"])
            return cast(OptimizerState, {**live, "scalars": {}, "order": {}}), [
                *problems, f"the checkpoint holds optimizers {kept}, this job has {now}"
            ]  # fmt: skip
        for name, each in live["optimizers"].items():
            members, wrong = mapping.one([state["optimizers"][name] for state in saved], each)
            found["optimizers"][name] = {**members, "updates": saved[0]["optimizers"][name]["updates"]}
            problems += [f"{name}: {problem}" for problem in wrong]
    else:
        found, wrong = mapping.one(saved, live)
        problems += wrong
    found["scalars"] = {here[name]: each for name, each in scalars.items() if here.get(name) in held}
    found["order"] = {here[name]: each for name, each in order.items() if here.get(name) in held}
    return cast(OptimizerState, found), problems


def _distinct(values: Iterable[T]) -> list[T]:
    """By identity, in order: what is alike on many ranks is one object (`restore.states`)."""
    return list({id(value): value for value in values}.values())


def translations(saved: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, adams.Translation]:
    """Of each parameter here whose optimizer is of another class than the equal one in the checkpoint. `saved` and
    `live` as `regroup` takes them.
    """
    there = saved.get("optimizers", {"": saved})
    return {
        fqn: translation
        for name, each in live.get("optimizers", {"": live}).items()
        if name in there and (translation := adams.translation(there[name], each)) is not None
        for group in each["groups"]
        for fqn in group["params"]
    }


def under_names(described: Mapping[str, Any], name_of: Callable[[str], str | None]) -> dict[str, Any]:
    """What a state says of its optimizers, with other names of parameters, and without those that get none."""
    found = dict(described)
    for key in ("scalars", "order"):
        if key in found:
            found[key] = {new: each for fqn, each in found[key].items() if (new := name_of(fqn)) is not None}
    if "groups" in found:
        names = [[new for fqn in group["params"] if (new := name_of(fqn)) is not None] for group in found["groups"]]
        found["groups"] = [{**group, "params": each} for group, each in zip(found["groups"], names, strict=True)]
    for key in ("optimizers", "inside"):
        if key in found:
            found[key] = {name: under_names(each, name_of) for name, each in found[key].items()}
    return found


def _unlike(saved: Sequence[Mapping[str, Any]]) -> str | None:
    """What all ranks that saved must have alike: which optimizers there are, and which are inside them."""

    def shape(state: Mapping[str, Any]) -> Any:
        if "optimizers" in state:
            return {name: shape(each) for name, each in state["optimizers"].items()}
        inside = {place: len(each.get("groups", ())) for place, each in state.get("inside", {}).items()}
        return [state["class"], len(state["groups"]), inside]

    for rank, state in enumerate(saved):
        if shape(state) != shape(saved[0]):
            return f"ranks 0 and {rank} of the checkpoint have different optimizers"
    return None


class _Mapping:
    """Saved groups by parameter, and what may be passed by."""

    def __init__(
        self, rename: Mapping[str, str], here: Mapping[str, str], stateful: Collection[str], passed: Collection[str]
    ) -> None:
        self._rename, self._here, self._stateful, self._passed = rename, here, stateful, passed

    def one(self, saved: Sequence[Mapping[str, Any]], live: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """One optimizer's members, as `live` has them, and what does not fit."""
        problems = adams.unequal(saved[0], live)
        groups, origins, wrong = self._groups(saved, live["groups"], adams.translation(saved[0], live))
        problems += wrong
        rest = {key: value for key, value in saved[0].items() if key not in _OWN}
        for state in saved[1:]:
            other = {key: value for key, value in state.items() if key not in _OWN and key != "inside"}
            if not alike({key: value for key, value in rest.items() if key != "inside"}, other):
                problems.append(f"what {saved[0]['class']} keeps beside its parameters' state differs between ranks")
                break
        if "inside" in rest:
            there = [state.get("inside", {}) for state in saved]  # as many as rank 0 has, as `_unlike` saw
            rest["inside"], wrong = self._inside(there, live.get("inside", {}))
            problems += wrong
        origin = [origins, len(saved[0]["groups"])]
        own = {key: live[key] for key in adams.MEMBERS if key in live}
        return {"class": live["class"], "groups": groups, "origins": origin, **own, **rest}, problems

    def _inside(
        self, saved: Sequence[Mapping[str, Any]], live: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
        """Of optimizers inside, by place; one that is not here is told by the adapter's own check."""
        found, problems = {}, []
        for place, each in saved[0].items():
            found[place] = dict(each)
            if "groups" in each and "groups" in live.get(place, {}):
                found[place]["groups"], _, wrong = self._groups(
                    [state[place] for state in saved], live[place]["groups"]
                )
                problems += [f"{place}: {problem}" for problem in wrong]
        return found, problems

    def _groups(
        self, saved: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]],
        translation: adams.Translation | None = None,
    ) -> tuple[list[dict[str, Any]], list[int | None], list[str]]:  # fmt: skip
        """The live groups with the checkpoint's hyper-parameters, as far as their class has them, and the number of the
        saved group of each.
        """
        problems: list[str] = []
        of: dict[str, Mapping[str, Any]] = {}  # the saved group of a parameter, by its name here
        numbers: dict[int, int] = {}  # of a saved group, by identity
        unknown: list[str] = []
        for groups in _distinct(state["groups"] for state in saved):
            rank = next(rank for rank, state in enumerate(saved) if state["groups"] is groups)
            for number, group in enumerate(groups):
                numbers[id(group)] = number
                for name in group["params"]:
                    fqn = self._here.get(name)
                    if fqn is None:
                        unknown += [name] if name in self._stateful else []
                    elif fqn not in of:
                        of[fqn] = group
                    elif of[fqn] is not group and (what := differing(of[fqn], group)):
                        problems.append(
                            f"{name}: {', '.join(what)} of rank {rank}'s group {number} is another rank's not"
                        )
        held = {fqn for group in live for fqn in group["params"]}
        gone = [fqn for fqn in of if fqn not in held and self._rename[fqn] in self._stateful]
        if gone or unknown:
            problems.append(
                f"updated in the checkpoint, and in no group of the optimizer here: {named(gone + unknown, _NAMED)}"
            )
        found: list[dict[str, Any]] = []
        origins: list[int | None] = []
        for number, group in enumerate(live):
            members = [fqn for fqn in group["params"] if fqn in of]
            new = [fqn for fqn in group["params"] if fqn not in of and fqn not in self._passed]
            if new:
                problems.append(
                    f"in group {number} of the optimizer, and in none of the checkpoint's: {named(new, _NAMED)}"
                )
            sources: list[tuple[str, Mapping[str, Any]]] = []
            for fqn in members:
                if not any(of[fqn] is source for _, source in sources):
                    sources.append((fqn, of[fqn]))
            for fqn, source in sources[1:]:
                if what := differing(sources[0][1], source):
                    problems.append(
                        f"group {number} of the optimizer has {sources[0][0]} and {fqn}, whose groups in the "
                        f"checkpoint differ in {', '.join(what)}: give each a group of its own"
                    )
            source = sources[0][1] if sources else {}
            found.append(_taken(group, translation.group(source) if translation and sources else source))
            origins.append(numbers[id(sources[0][1])] if sources else None)
        return found, origins, problems


def _taken(live: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that the live group's class lacks are not inserted; which kernel it uses is this run's choice."""
    kept = {"params", "name", *KERNEL_KEYS}
    taken = {key: value if key in kept or key not in saved else saved[key] for key, value in live.items()}
    if "initial_lr" in saved:  # an LR scheduler's, which may be made after the restore
        taken["initial_lr"] = saved["initial_lr"]
    return taken


def uneven(
    units: Sequence[Sequence[str]], state: OptimizerState, kinds: Callable[[str], Collection[str]]
) -> list[str]:  # fmt: skip
    """Parameters that have one tensor of state together here, and in the checkpoint not the same kinds or scalars.

    `units` are their names; `kinds(fqn)` those of a parameter's state that are tensors.
    """
    problems: list[str] = []
    for names in units:
        for fqn in names[1:]:
            if {*kinds(fqn)} != {*kinds(names[0])}:
                with_state, without = (names[0], fqn) if kinds(names[0]) else (fqn, names[0])
                problems.append(
                    f"{names[0]} and {fqn} are one tensor to the optimizer here, and in the checkpoint "
                    f"{with_state} has state that {without} has not: put them into groups of their own"
                )
                break
            if not alike(state["scalars"].get(fqn, {}), state["scalars"].get(names[0], {})):
                problems.append(
                    f"{names[0]} and {fqn} are one tensor to the optimizer here, and differ in the checkpoint in "
                    f"{sorted(state['scalars'].get(names[0], {}))}: put them into groups of their own"
                )
                break
    return problems
