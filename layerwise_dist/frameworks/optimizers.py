"""What the engine asks of an optimizer, and how a `torch.optim.Optimizer` answers.

The engine hears of updates through `UpdateEvents`; everything else that capture and restore need of an optimizer they
ask of its `OptimizerAdapter`, so that one whose state lies in flat, sharded units (DeepSpeed's) looks like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import Framework, ParamView
from layerwise_dist.pieces import DTYPES
from layerwise_dist.slices import Slice

# Which kernel a group uses is this run's choice, not the checkpoint's: kernels are never switched by a restore.
KERNEL_KEYS = frozenset({"foreach", "fused", "capturable", "differentiable"})
NO_STATE: Mapping[str, Any] = {}  # of a parameter without any; one object, since identities are compared


class UpdateEvents(Protocol):
    """What an adapter tells of its optimizer's updates, on the training thread. The engine implements it."""

    def update_starting(self, *, in_closure: bool = False, layers: Collection[str] | None = None) -> None:
        """An iteration's update begins. With `in_closure` its closure runs first, then this is called again.

        With `layers` it can change nothing but those; one of several optimizers says so.
        """

    def wants_layers(self) -> bool:
        """Whether it is worth while that the update that comes goes layer by layer, if it can.

        Before `update_starting`.
        """

    def overwriting(self, layers: Collection[str] | None = None) -> None:
        """Parameters and state of these layers, or of all, are about to be overwritten. An update that goes part by
        part calls it for each part.
        """

    def updated(self, layers: Collection[str]) -> None:
        """These layers are done with, while others may still be updated. What is not named is done with the update."""

    def wanted(self) -> bool:
        """Whether the running update's result is to be saved: what is at hand only now may then be copied."""
        ...

    def update_done(self, *, applied: bool) -> None:
        """All of the update is over; `applied` is False when it was skipped (an overflow)."""


class OptimizerAdapter:
    """One optimizer as capture and restore see it.

    Attributes:
        kind: its class's name, as it is saved.
        several: whether it stands for optimizers that update one by one, so that no update ends an iteration.
    """

    kind: str
    several = False

    @property
    def layer_order(self) -> Sequence[str]:
        """Layers in the order in which they are updated; empty if all are updated at once."""
        return ()

    @property
    def views(self) -> list[ParamView]:
        """The parameters that it updates now, in the model's order."""
        raise NotImplementedError

    @property
    def layers(self) -> Collection[str] | None:
        """The layers that an update can change now; None if that is not known."""
        return {view.layer for view in self.views}

    @property
    def trained(self) -> list[ParamView]:
        """Those of `views` that an update may change, by all that is known of them. The rest may be frozen."""
        return self.views

    @property
    def state_views(self) -> list[ParamView]:
        """Those of `views` whose state this rank has, or may have."""
        return self.views

    @property
    def mid_window(self) -> bool:
        """Whether gradients are being accumulated that no update has used yet, as far as the optimizer knows."""
        return False

    def gather(self) -> None:
        """A capture is about to begin: brings into memory what is kept elsewhere. Raises LayerwiseError or OSError."""

    def states(self, views: Sequence[ParamView]) -> list[Mapping[str, Any]]:
        """The state of each parameter by name, empty where there is none. Tensors are what `Framework.need` and
        `Framework.pieces` take.

        The very same objects while nothing came, went or moved: the survey compares identities. The very same list says
        that all that is no scalar is as it was, and where it was. Raises UnsupportedError if it updates what is not in
        the model.
        """
        raise NotImplementedError

    def hyper_parameters(self) -> list[dict[str, Any]]:
        """The param groups, with names in place of parameters. Shares the values with the live groups."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of it beside its state: members of ``optimizer`` in docs/format.md."""
        return {"class": self.kind, "groups": self.hyper_parameters()}

    def check(self, saved: Mapping[str, Any]) -> list[str]:
        """What of a checkpoint's ``optimizer`` state does not fit this one, for a MismatchError; empty if it fits.

        ``lacking`` in it names parameters that the checkpoint has not, and need not have; of `adopt`'s too.
        """
        raise NotImplementedError

    def place(self, view: ParamView, entry: Slice, wrapped: bool) -> torch.Tensor:
        """The tensor to load the saved state `entry` into: the live one if it is alike, else a new one."""
        raise NotImplementedError

    def adopt(self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any]) -> None:
        """Takes the loaded state: tensors from `place`, by parameter and name, and the saved ``optimizer`` state."""
        raise NotImplementedError

    def watch(self, events: UpdateEvents) -> None:
        """From now on, tell `events` of every update."""
        raise NotImplementedError

    def detach(self) -> None:
        """Removes the hooks of `watch`."""
        raise NotImplementedError


class TorchOptimizer(OptimizerAdapter):
    """A `torch.optim.Optimizer` of the model's own parameters, whose updates are whole calls of `step()`.

    `whole_only` says, of a subclass, why its updates cannot go layer by layer.
    """

    whole_only = ""

    def __init__(self, framework: Framework, optimizer: object) -> None:
        """Raises UnsupportedError unless `optimizer` is a torch optimizer of this model's own parameters."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UnsupportedError(
                f"attach() needs a torch.optim.Optimizer, not {type(optimizer).__name__} (models without one: "
                "attach(models={name: model, ...}, optimizers={...}))"
            )
        self.kind = type(optimizer).__qualname__
        self._framework, self._optimizer = framework, optimizer
        self._listed: list[ParamView] = []  # of the framework, when `_names` were made; keeps their identities
        self._names: dict[int, str] = {}
        self._follow()
        if not any(group["params"] for group in self._optimizer.param_groups):
            raise UnsupportedError(f"{type(self._optimizer).__name__} has no parameters")
        self._hooks: list[Any] = []

    def _follow(self) -> None:
        """Takes up what the model's parameters are now. Raises UnsupportedError if the groups hold any other."""
        if self._listed is self._framework.params:
            return
        names = self._framework.names()
        self._check(names)
        self._listed, self._names = self._framework.params, names

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
                "model was wrapped, moved and materialised, of the parameters that are in it"
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
        states = self._state
        return [
            view
            for view in self.views
            if view.param.requires_grad or view.param.grad is not None or states.get(view.param)
        ]

    @property
    def _state(self) -> MutableMapping[torch.Tensor, dict[str, Any]]:
        """By parameter, as the optimizer keeps it."""
        return self._optimizer.state

    def states(self, views: Sequence[ParamView]) -> list[Mapping[str, Any]]:
        self._follow()
        of = self._state
        return [of.get(view.param, NO_STATE) for view in views]

    def hyper_parameters(self) -> list[dict[str, Any]]:
        groups = zip(self._optimizer.param_groups, self._group_names(), strict=True)
        return [{**group, "params": names} for group, names in groups]

    # -- restore ------------------------------------------------------------------------------------------------

    def check(self, saved: Mapping[str, Any]) -> list[str]:
        return check_groups(self.kind, self._group_names(), saved)

    def place(self, view: ParamView, entry: Slice, wrapped: bool) -> torch.Tensor:
        dtype, framework = DTYPES[entry.dtype], self._framework
        live = self._state.get(view.param, {}).get(entry.kind)
        if (
            isinstance(live, torch.Tensor)
            and live.dtype == dtype
            and tuple(live.shape) == framework.state_shape(view, entry)
            and framework.is_wrapped(live) == wrapped
        ):
            return live
        return framework.new_state(view, entry, dtype, wrapped)

    def adopt(self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any]) -> None:
        for group, names in zip(self._optimizer.param_groups, self._group_names(), strict=True):
            on_device = group.get("capturable") or group.get("fused")
            for param, fqn in zip(group["params"], names, strict=True):
                loaded = states.get(fqn, {})
                if on_device:  # where such kernels want their scalars
                    device = self._framework.local(param).device
                    loaded = {name: tensor if tensor.dim() else tensor.to(device) for name, tensor in loaded.items()}
                state = in_order({**loaded, **saved["scalars"].get(fqn, {})}, saved["order"].get(fqn, []))
                if state:
                    self._state[param] = state
                else:
                    self._state.pop(param, None)
        adopt_groups(self._optimizer.param_groups, self._group_names(), saved)

    def _group_names(self) -> list[list[str]]:
        """Of the parameters of each group. Raises UnsupportedError if one is not the model's."""
        self._follow()
        names = self._names
        try:
            return [[names[id(param)] for param in group["params"]] for group in self._optimizer.param_groups]
        except KeyError:
            self._check(names)
            raise

    # -- updates ------------------------------------------------------------------------------------------------

    def watch(self, events: UpdateEvents) -> None:
        self._events = events
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before),
            self._optimizer.register_step_post_hook(self._after),
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._events.update_starting()
            self._events.overwriting()
            return None
        self._events.update_starting(in_closure=True)
        wrapped = self._fenced(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _fenced(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, fenced behind its first return: its forward may be the boundary of the last iteration."""
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
        self._events.update_done(applied=not found_inf(optimizer))


def found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has this update skipped: a fused optimizer is stepped then too, and skips in its kernel."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())


def check_groups(kind: str, live: Sequence[Sequence[str]], saved: Mapping[str, Any]) -> list[str]:
    """Whether class and groups (the names of their parameters) fit those of the checkpoint; what does not, in words."""
    if "optimizers" in saved:
        return [f"the checkpoint holds optimizers {sorted(saved['optimizers'])} by name, this one has no name"]
    problems = []
    if saved["class"] != kind:
        problems.append(f"the checkpoint's optimizer is {saved['class']}, this one is {kind}")
    try:
        group_origins(live, saved)
    except ValueError as error:
        problems.append(str(error))
    return problems


def group_origins(live: Sequence[Sequence[str]], saved_state: Mapping[str, Any]) -> list[int | None]:
    """Of each live group (names of its parameters), the number of the saved group that its hyper-parameters are of.

    Groups may have been split since, or merged where their hyper-parameters were equal. Of a group of which the
    checkpoint has nothing, and need not ("lacking"), it is None. Raises ValueError in words.
    """
    saved: Sequence[Mapping[str, Any]] = saved_state["groups"]
    lacking = set(saved_state.get("lacking", ()))
    kept = [list(group["params"]) for group in saved]
    live = [[name for name in group if name not in lacking] for group in live] if lacking else live
    if [list(group) for group in live] == kept:
        return list(range(len(kept)))
    group_of = {name: number for number, names in enumerate(kept) for name in names}
    here = {name for group in live for name in group}
    if here != group_of.keys():
        lengths = [len(group) for group in live], [len(names) for names in kept]
        raise ValueError(
            f"the optimizer's groups hold other parameters: {lengths[0]} here, {lengths[1]} in the checkpoint"
        )
    origins: list[int | None] = []
    for number, names in enumerate(live):
        sources = sorted({group_of[name] for name in names})
        if not sources and lacking:
            origins.append(None)
            continue
        if not sources:
            raise ValueError(
                f"group {number} of the optimizer is empty, and its groups are not those of the checkpoint"
            )
        for other in sources[1:]:
            differing = _differing(saved[sources[0]], saved[other])
            if differing:
                raise ValueError(
                    f"group {number} of the optimizer has parameters of groups {sources[0]} and {other} of the "
                    f"checkpoint, which differ in {', '.join(differing)}"
                )
        origins.append(sources[0])
    return origins


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
        return bool(a == b)

    skipped = {"params", "name", *KERNEL_KEYS}
    keys = sorted((one.keys() | other.keys()) - skipped)
    return [key for key in keys if not (key in one and key in other and equal(one[key], other[key]))]


def in_order(state: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
    """The state in the order in which the optimizer had made it; names that are not in `order` come last."""
    return {name: state[name] for name in dict.fromkeys([*order, *state])}


def adopt_groups(groups: Sequence[dict[str, Any]], names: Sequence[Sequence[str]], saved: Mapping[str, Any]) -> None:
    """Puts the saved hyper-parameters into the live groups, whose parameters are `names`."""
    origins = group_origins(names, saved)
    alike = origins == list(range(len(saved["groups"])))
    for group, origin in zip(groups, origins, strict=True):
        if origin is None:
            continue
        for key, value in saved["groups"][origin].items():
            if key == "params" or key in KERNEL_KEYS or (key == "name" and not alike):
                continue
            if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                with torch.no_grad():
                    group[key].copy_(value)
            else:  # several groups may come from one
                group[key] = value.clone() if isinstance(value, torch.Tensor) else value
