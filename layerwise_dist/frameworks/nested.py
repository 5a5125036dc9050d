# SPDX-License-Identifier: Apache-2.0
"""An optimizer with others inside it (SAM, Lookahead, containers): all their state, as one optimizer's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.contents import Contents
from layerwise_dist.frameworks.elsewhere import Elsewhere
from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.frameworks.made_mapping import MadeMapping
from layerwise_dist.frameworks.param_groups import adopt_groups, check_groups
from layerwise_dist.frameworks.unwrapping import Around

Optimizer = torch.optim.Optimizer

NO_STATE: Mapping[str, Any] = {}  # of a parameter without any; one object, since identities are compared


class Nest:
    """An optimizer, whose place is "", and those inside it, by their places in it: ``base``, ``optimizers[0]``.

    State by parameter of one inside is captured under names that begin with its place. What is shared (one `state`, the
    same groups) is the outermost one's, and saved once.
    """

    def __init__(
        self, kind: str, outer: Optimizer, names: Callable[[], Mapping[int, str]] | None, around: Sequence[Any] = ()
    ) -> None:
        """`names` tells those of its parameters, by id; None if what it updates are no parameters of the model's.
        `around` are its wrappers (`unwrapping`).

        Raises UnsupportedError for what cannot be captured.
        """
        self.kind, self.outer, self._names = kind, outer, names
        self.inside = find(outer)
        self._members = {"": outer, **self.inside}
        self._joined: dict[int, _JoinedState] = {}
        # Of the last parameters that were asked for: those, what `state` held, and what they had of it.
        self._listed: tuple[Sequence[ParamView], Contents, list[Mapping[str, Any]]] | None = None
        self._check_parameters()
        self._elsewhere = {
            place: Elsewhere(self._called(place), each, self._members.values) for place, each in self._members.items()
        }
        self._around = Around(around, self._members.values)

    @property
    def foreign(self) -> bool:
        """Whether its class is of another package than those that are known to do nothing but update in `step()`."""
        return self._elsewhere[""].watched

    def _called(self, place: str) -> str:
        return f"{self.kind}'s {place} ({type(self._members[place]).__qualname__})" if place else self.kind

    def _check_parameters(self) -> None:
        held = self._held()
        for place, each in self.inside.items():
            if not (hasattr(each, "state") and hasattr(each, "param_groups")):
                raise UnsupportedError(f"{self._called(place)} has no state or groups: its __init__() was not called")
            for number, group in enumerate(each.param_groups):
                for position, param in enumerate(group["params"]):
                    if id(param) not in held:
                        raise UnsupportedError(
                            f"{self._called(place)}: parameter {position} of group {number} (shape "
                            f"{list(param.shape)}) is in none of {self.kind}'s own groups"
                        )

    def _held(self) -> set[int]:
        """Its parameters, by id."""
        return set().union(*(map(id, group["params"]) for group in self.outer.param_groups))

    def refuse_inside(self, where: str) -> None:
        """Raises UnsupportedError if there are optimizers inside, whose state would lie in other tensors `where`."""
        if self.inside:
            raise UnsupportedError(
                f"{where}: {self.kind} with optimizers inside it ({', '.join(self.inside)}) is not supported; it works "
                "where they update the model's own parameters: plain, DDP, FSDP2, FSDP1 with use_orig_params=True"
            )

    # -- state by parameter -------------------------------------------------------------------------------------

    def owners(self) -> dict[str, Optimizer]:
        """Those that have a `state` of their own, by place."""
        states: dict[int, tuple[str, Optimizer]] = {}
        for place, each in self._members.items():
            states.setdefault(id(each.state), (place, each))
        return dict(states.values())

    def states(self, views: Sequence[ParamView]) -> list[Mapping[str, Any]]:
        """As `OptimizerAdapter.states`."""
        if not self.inside:
            return self._own_states(views)
        states = [each.state for each in self.owners().values()]
        return [
            self._joined.setdefault(id(view.param), _JoinedState(self, view.param))
            if any(view.param in state for state in states)
            else NO_STATE
            for view in views
        ]

    def _own_states(self, views: Sequence[ParamView]) -> list[Mapping[str, Any]]:
        of = self.outer.state
        if self._listed is not None:
            listed, held, states = self._listed
            if listed is views and held.same([of]):
                return [*states]
        found = [of.get(view.param, NO_STATE) for view in views]
        if not all(issubclass(kind, Mapping) for kind in {*map(type, found)}):
            raise UnsupportedError(f"{self.kind}: the state of a parameter is not a dict")
        self._listed = views, Contents([of]), [*found]
        return found

    def live(self, param: torch.Tensor, joined: str) -> Any:
        """The state under such a name; None if there is none."""
        place, name = self.split(joined)
        return self._members[place].state.get(param, NO_STATE).get(name)

    def own(self, place: str, joined: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a parameter's state is that optimizer's, under its own names."""
        if not self.inside:
            return joined
        names = [(self.split(name), value) for name, value in joined.items()]
        return {name: value for (of, name), value in names if of == place}

    def split(self, joined: str) -> tuple[str, str]:
        """The place of the optimizer, and its own name for that state."""
        places = [place for place in self.inside if joined.startswith(f"{place}.")]
        place = max(places, key=len, default="")
        return place, joined[len(place) + 1 :] if place else joined

    # -- everything else ----------------------------------------------------------------------------------------

    def remember(self) -> None:
        """An update begins."""
        for each in self._elsewhere.values():
            each.remember()
        self._around.remember()

    def describe(self) -> dict[str, Any]:
        """Members of ``optimizer`` in docs/format/state.md: of the outer one, ``inside``, of the others by place, and
        ``around``, of its wrappers.

        Raises UnsupportedError for what cannot be saved.
        """
        self._check_family()
        members = self._elsewhere[""].describe()
        if self.inside:
            members["inside"] = {place: self._describe(place) for place in self.inside}
        if around := self._around.describe():
            members["around"] = around
        return members

    def _check_family(self) -> None:
        found = find(self.outer)
        if found != self.inside:
            raise UnsupportedError(
                f"{self.kind} has other optimizers inside it ({list(found)}) than at attach() ({list(self.inside)})"
            )
        if self._names is None:
            return  # ZeRO takes its tensors out of the groups between updates
        if self.inside:
            self._check_parameters()
        held = self._held()
        self._joined = {key: each for key, each in self._joined.items() if key in held}
        for place, each in self._members.items():
            if not held.issuperset(map(id, each.state)):
                for key in each.state:
                    if isinstance(key, torch.Tensor) and id(key) not in held:
                        raise UnsupportedError(
                            f"{self._called(place)} keeps state of a tensor (shape {list(key.shape)}) in none of its "
                            "groups: torch's state_dict() fails there too, and another process could not tell "
                            "whose it is. If no step needs it, delete it from optimizer.state"
                        )

    def _describe(self, place: str) -> dict[str, Any]:
        groups, each = self._own_groups(place), self._members[place]
        members = {"class": type(each).__qualname__, "own_state": place in self.owners()}
        if groups is not None:
            names = self._group_names(groups)
            members["groups"] = [{**group, "params": here} for group, here in zip(groups, names, strict=True)]
        return {**members, **self._elsewhere[place].describe()}

    def _own_groups(self, place: str) -> list[dict[str, Any]] | None:
        """None if they are another one's too."""
        groups = self._members[place].param_groups
        for other, each in self._members.items():
            if other == place:
                return groups
            if [*map(id, each.param_groups)] == [*map(id, groups)]:
                return None
        raise KeyError(place)

    def _group_names(self, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        names = self._names() if self._names is not None else {}
        return [[names[id(param)] for param in group["params"]] for group in groups]

    def check(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> list[str]:
        """As `OptimizerAdapter.check`, of all but the outer one's class and groups."""
        there = saved.get("inside", {})
        if there.keys() != self.inside.keys():
            return [
                f"the checkpoint's {saved['class']} has optimizers inside it ({sorted(there) or 'none'}), this one has "
                f"others ({sorted(self.inside) or 'none'})"
            ]
        problems = self._elsewhere[""].check(saved) + self._around.check(saved)
        for place, each in there.items():
            found = self._check_groups(place, saved, each, lacking) or self._elsewhere[place].check(each)
            problems += [f"{place}: {problem}" for problem in found]
        return problems

    def _check_groups(
        self, place: str, saved: Mapping[str, Any], each: Mapping[str, Any], lacking: Collection[str]
    ) -> list[str]:
        kind, groups = type(self._members[place]).__qualname__, self._own_groups(place)
        if (each["own_state"], "groups" in each) != (place in self.owners(), groups is not None):
            return [f"the checkpoint's {each['class']} shares its state or groups with {self.kind}, or here it does"]
        if groups is not None:
            return check_groups(kind, self._group_names(groups), {**saved, **each}, lacking)
        return [] if each["class"] == kind else [f"the checkpoint has a {each['class']}, here it is a {kind}"]

    def adopt_groups(self, saved: Mapping[str, Any], lacking: Collection[str]) -> None:
        """The saved hyper-parameters of the optimizers inside."""
        for place, each in saved.get("inside", {}).items():
            groups = self._own_groups(place)
            if groups is not None:
                adopt_groups(groups, self._group_names(groups), {**saved, **each}, lacking)

    def put(self, saved: Mapping[str, Any]) -> bool:
        """Takes `describe()` as it was saved. REQUIRES: the state by parameter, and all groups, are restored.

        Returns whether a `load_state_dict()` was called, which casts both: they are to be put in place once more.
        """
        called = [self._around.put(saved)]  # first: it loads all of the optimizer
        called += [part.put(self._of(place, saved)) for place, part in self._elsewhere.items()]
        self._check_family()
        return any(called)

    def confirm(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> None:
        """When they are, after a `load_state_dict()`. Raises UnsupportedError if it was not the way back."""
        for place, part in self._elsewhere.items():
            part.confirm(self._of(place, saved))
        self._around.confirm(saved)
        if problems := self.check(saved, lacking):
            raise UnsupportedError(f"{self.kind} changed in its load_state_dict(): {'; '.join(problems)}")

    def _of(self, place: str, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        return saved["inside"][place] if place else saved


class _JoinedState(MadeMapping):
    """A parameter's state in all optimizers of a nest, as it is now: one object, since identities are compared."""

    def __init__(self, nest: Nest, param: torch.Tensor) -> None:
        self._nest, self._param = nest, param

    def _now(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        held: set[int] = set()
        for place, each in self._nest.owners().items():
            state = each.state.get(self._param)
            if state is None:
                continue
            if not isinstance(state, Mapping) or id(state) in held:
                raise UnsupportedError(
                    f"{self._nest.kind}: the state of a parameter is not a dict, or one dict of two optimizers, and "
                    "each has more in its `state`: share all of it, or nothing"
                )
            held.add(id(state))
            for name, value in state.items():
                joined = f"{place}.{name}" if place else name
                if not isinstance(name, str) or self._nest.split(joined) != (place, name):
                    raise UnsupportedError(
                        f"{type(each).__name__} keeps state under {name!r}, which cannot be told from that of the "
                        f"optimizers inside {self._nest.kind} ({', '.join(self._nest.inside)})"
                    )
                found[joined] = value
        return found


def find(outer: Optimizer) -> dict[str, Optimizer]:
    """Optimizers in attributes of `outer`, and of those, also in lists, tuples and dicts: by where each is."""
    found: dict[str, Optimizer] = {}
    seen = {id(outer)}

    def look(value: Any, place: str) -> None:
        if isinstance(value, Optimizer):
            if id(value) not in seen:
                seen.add(id(value))
                found[place] = value
                inside(value, place)
        elif isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(key, str | int):
                    look(each, f"{place}[{key!r}]")

    def inside(optimizer: Optimizer, place: str) -> None:
        for name, value in vars(optimizer).items():
            if name not in ("state", "param_groups", "defaults"):
                look(value, f"{place}.{name}" if place else name)

    inside(outer, "")
    return found
