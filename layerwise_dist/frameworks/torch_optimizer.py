# SPDX-License-Identifier: Apache-2.0
"""The adapter of a `torch.optim.Optimizer`: its own state, in its own groups, in whole steps."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks import adams
from layerwise_dist.frameworks.framework import Framework, ParamView, same_objects
from layerwise_dist.frameworks.nested import Nest, find
from layerwise_dist.frameworks.optimizers import OptimizerAdapter, UpdateEvents
from layerwise_dist.frameworks.param_groups import adopt_groups, check_groups, in_order
from layerwise_dist.frameworks.subclasses import Opener, live_inner, put_together
from layerwise_dist.frameworks.unwrapping import Steps, is_made, is_thin, scalers_of, unwrap
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.slices import Slice


class TorchOptimizer(OptimizerAdapter):
    """A `torch.optim.Optimizer` of the model's own parameters, whose updates are whole calls of `step()`.

    `whole_only` says, of a subclass, why its updates cannot go layer by layer; `_opens`, whether its state may be
    tensors that stand for others.
    """

    whole_only = ""
    _opens = True

    def __init__(self, framework: Framework, optimizer: object) -> None:
        """Raises UnsupportedError unless `optimizer` is a torch optimizer of this model's own parameters, or is wrapped
        around one.
        """
        optimizer, self._around = unwrap(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UnsupportedError(
                f"attach() needs a torch.optim.Optimizer, not {type(optimizer).__name__} (models without one: "
                "attach(models={name: model, ...}, optimizers={...}))"
            )
        self.kind = type(optimizer).__qualname__
        _check_made(optimizer)
        self._framework, self._optimizer = framework, optimizer
        self._listed: list[ParamView] = []  # of the framework, when `_names` were made; keeps their identities
        self._names: dict[int, str] = {}
        # Of the last groups that were asked for: by which names, their parameters, and what those are called.
        self._grouped: tuple[dict[int, str], list[list[torch.Tensor]], list[list[str]]] = {}, [], []
        self._follow()
        if not any(group["params"] for group in self._optimizer.param_groups):
            raise UnsupportedError(f"{type(self._optimizer).__name__} has no parameters")
        self._nest = Nest(self.kind, self._keeper, self._current_names, [w for w in self._around if not is_thin(w)])
        self._open_states = Opener()
        self._hooks: list[Any] = []
        self._steps: list[Steps] = []
        self._wrapped: _Wrapped | None = None  # the step() of a wrapper that runs
        self._step: FrameType | None = None  # that runs, or was left by an exception
        self._steps_within = 0

    def _follow(self) -> None:
        """Takes up what the model's parameters are now. Raises UnsupportedError if the groups hold any other."""
        if self._listed is self._framework.params:
            return
        names = self._framework.names()
        self._check(names)
        self._listed, self._names = self._framework.params, names

    def _current_names(self) -> Mapping[int, str]:
        self._follow()
        return self._names

    def _check(self, names: Mapping[int, str]) -> None:
        """Whether it can go on with these parameters, by their ids. Raises UnsupportedError."""
        for number, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if id(param) not in names:
                    raise UnsupportedError(self._foreign(param, f"parameter {position} of group {number}", names))

    def _foreign(self, param: torch.Tensor, place: str, names: Mapping[int, str]) -> str:
        kind, name = type(self._optimizer).__name__, self._names.get(id(param))
        if name is None:
            return (
                f"{kind}: {place} (shape {list(param.shape)}) is not one of the model's. Build the optimizer after the "
                "model was wrapped, moved and materialized, of the parameters that are in it"
            )
        if name in names.values():
            return (
                f"{kind}: {place} is the Parameter that was {name}; the model has another one in its place, which is "
                "not updated. Put the new one, and its state, into the param group, or copy values into the old one "
                "(param.data.copy_, load_state_dict() without assign=True)"
            )
        return (
            f"{kind}: {place} was {name}, which is no longer in the model under any name. Take it out of the param "
            "group, or keep it in the model"
        )

    # -- what there is ------------------------------------------------------------------------------------------

    @property
    def optimizers(self) -> Sequence[object]:
        return [self._optimizer, *self._around, *self._nest.inside.values()]

    @property
    def scalers(self) -> Mapping[str, torch.amp.GradScaler]:
        return scalers_of(self._around)

    @property
    def views(self) -> list[ParamView]:
        """Of the groups as they are now: one may have been added since."""
        updated = {id(param) for group in self._optimizer.param_groups for param in group["params"]}
        return [view for view in self._framework.params if id(view.param) in updated]

    @property
    def layers(self) -> Collection[str] | None:
        """None if a Parameter was put into a group since the model was last looked at."""
        held = [id(param) for group in self._optimizer.param_groups for param in group["params"]]
        return super().layers if self._names.keys() >= set(held) else None

    @property
    def trained(self) -> list[ParamView]:
        """Not those that need no gradient, have none, and were never updated: ``AdamW(model.parameters())`` of a model
        with adapters holds its frozen base too, and passes it by.
        """
        views = self.views
        return [
            view
            for view, state in zip(views, self._nest.states(views), strict=True)
            if view.param.requires_grad or view.param.grad is not None or state
        ]

    @property
    def _keeper(self) -> torch.optim.Optimizer:
        """The optimizer that keeps the state."""
        return self._optimizer

    def states(self, views: Sequence[ParamView]) -> list[Mapping[str, Any]]:
        self._follow()
        found = self._nest.states(views)
        return self._open_states(found) if self._opens and self._framework.whole else found

    def hyper_parameters(self) -> list[dict[str, Any]]:
        groups = zip(self._optimizer.param_groups, self._group_names(), strict=True)
        return [{**group, "params": names} for group, names in groups]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self._adam(), **self._nest.describe()}

    def _adam(self) -> dict[str, Any]:
        return adams.describe(self._keeper, together=True)

    # -- restore ------------------------------------------------------------------------------------------------

    def check(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> list[str]:
        groups = self._group_names()
        problems = check_groups(self.kind, groups, saved, lacking) or adams.check(saved, self._adam(), groups)
        return problems or self._nest.check(saved, lacking)

    def place(self, view: ParamView, entry: Slice, wrapped: bool) -> torch.Tensor:
        dtype, framework = DTYPES[entry.dtype], self._framework
        live = live_inner(lambda name: self._nest.live(view.param, name), entry.kind)
        if (
            isinstance(live, torch.Tensor)
            and live.dtype == dtype
            and tuple(live.shape) == framework.state_shape(view, entry)
            and framework.is_wrapped(live) == wrapped
        ):
            return live
        return framework.new_state(view, entry, dtype, wrapped)

    def adopt(
        self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any],
        lacking: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._put(states, saved, lacking)
        if self._nest.put(saved):
            self._put(states, saved, lacking)
            self._nest.confirm(saved, lacking)
        adams.count_on(self._keeper, self._keeper.state.values())

    def _put(
        self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any], lacking: Collection[str]
    ) -> None:
        nest, names = self._nest, self._current_names()
        for place, keeper in nest.owners().items():
            for group in (keeper if place else self._optimizer).param_groups:
                on_device = group.get("capturable") or group.get("fused")
                for param in group["params"]:
                    fqn = names[id(param)]
                    loaded = nest.own(place, states.get(fqn, {}))
                    if on_device:  # where such kernels want their scalars
                        device = self._framework.local(param).device
                        loaded = {name: each if each.dim() else each.to(device) for name, each in loaded.items()}
                    scalars = nest.own(place, saved["scalars"].get(fqn, {}))
                    order = nest.own(place, dict.fromkeys(saved["order"].get(fqn, [])))
                    state = in_order({**loaded, **scalars}, order)
                    if state:
                        keeper.state[param] = put_together(state, keeper.state.get(param, {}))
                    else:
                        keeper.state.pop(param, None)
        adopt_groups(self._optimizer.param_groups, self._group_names(), saved, lacking)
        nest.adopt_groups(saved, lacking)

    def _group_names(self) -> list[list[str]]:
        """Of the parameters of each group; the very same lists while these are the same. Raises UnsupportedError if one
        is not the model's.
        """
        self._follow()
        names, groups = self._names, [group["params"] for group in self._optimizer.param_groups]
        of, known, found = self._grouped
        if of is names and len(known) == len(groups) and all(map(same_objects, groups, known)):
            return found
        try:
            found = [[names[id(param)] for param in group] for group in groups]
        except KeyError:
            self._check(names)
            raise
        self._grouped = names, [[*group] for group in groups], found
        return found

    # -- updates ------------------------------------------------------------------------------------------------

    def watch(self, events: UpdateEvents) -> None:
        self._events = events
        _take_hooks(self._optimizer)
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._begins),
            self._optimizer.register_step_post_hook(self._ends),
        ]
        for wrapper in self._around:
            if not is_thin(wrapper):
                self._steps.append(Steps(wrapper, self._wrapper_begins, self._wrapper_ends))

    def detach(self) -> None:
        for step in reversed(self._steps):
            step.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._steps = [], []

    def _wrapper_begins(self) -> None:
        """It may change parameters before it steps the optimizer, or without."""
        if self._wrapped is None:
            self._nest.remember()
            self._wrapped = _Wrapped()
            self._events.before_closure()
        self._wrapped.depth += 1

    def _wrapper_ends(self, whole: bool) -> None:
        wrapped = self._wrapped
        assert wrapped is not None, "_wrapper_begins() comes first"
        wrapped.depth -= 1
        if not wrapped.depth:
            self._wrapped = None
            if whole and wrapped.applied is not None:
                self._events.update_done(applied=wrapped.applied)

    def _begins(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hooks run for the `step()` of a subclass, and again for its parent's within it: only the outer one counts."""
        if self._step is not None and _is_running(self._step):
            self._steps_within += 1
            return None
        self._step, self._steps_within = sys._getframe(1), 0
        return self._before(optimizer, args, kwargs)

    def _ends(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._steps_within:
            self._steps_within -= 1
            return
        self._step = None
        self._after(optimizer, args, kwargs)

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._nest.remember()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self._wrapped is not None and self._wrapped.applied is not None:
            return None  # a second step within one of the wrapper's: the update is under way
        if closure is None:
            self._events.update_starting()
            self._events.overwriting()
            return None
        self._events.update_starting(in_closure=True)
        if self._nest.foreign:  # SAM, say, climbs before it evaluates
            self._events.before_closure()
        wrapped = self._fenced(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _fenced(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, fenced after its first return: its forward may be the boundary of the last iteration."""
        first = True

        def call() -> Any:
            nonlocal first
            result = closure()
            if first:
                first = False
                self._events.update_starting()
                self._events.overwriting()
            return result

        return call

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        applied = not found_inf(optimizer)
        if self._wrapped is not None:
            self._wrapped.applied = applied or bool(self._wrapped.applied)
        else:
            self._events.update_done(applied=applied)


@dataclass(slots=True)
class _Wrapped:
    """A wrapper's step, of `depth` wrappers within each other. `applied`: of the update that the optimizer has made
    within it; None before that.
    """

    depth: int = 0
    applied: bool | None = None


def _is_running(frame: FrameType) -> bool:
    """Whether a call is under way, on this thread, further out."""
    here: FrameType | None = sys._getframe(1)
    while here is not None and here is not frame:
        here = here.f_back
    return here is not None


def _check_made(optimizer: torch.optim.Optimizer) -> None:
    """Wrappers that inherit from `Optimizer`, and have not called its `__init__`, may have no hooks and no state."""
    if not is_made(optimizer):
        kind = type(optimizer).__name__
        inside = " or ".join(f"optimizer.{place}" for place in find(optimizer))
        raise UnsupportedError(
            f"{kind} did not call torch.optim.Optimizer.__init__(), so its updates and its state cannot be seen: "
            f"call it; or attach the optimizer inside it{f' ({inside})' if inside else ''}, if {kind} "
            "keeps nothing itself that a resume needs"
        )


def _take_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Makes `step()` call hooks, as `Optimizer.__init__` does, which wrappers of their own kind leave out."""
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if type(vars(optimizer)[name]) is dict:  # which a hook's handle cannot refer to
            setattr(optimizer, name, OrderedDict(vars(optimizer)[name]))
    if not getattr(type(optimizer).step, "hooked", False):
        optimizer._patch_step_function()


def found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has this update skipped: a fused optimizer is stepped then too, and skips in its kernel."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())
