# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the optimizer's own update, one layer at a time, bit for bit what its whole step does.

Nothing of the optimizer is replaced. A pre-step hook does the layered update and sets the gradients aside, so that the
step itself finds nothing to do; a post-step hook puts them back. docs/rooms/layers.md says when which mode is exact.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from layerwise_dist.errors import BoundaryError, ConfigError, UnsupportedError
from layerwise_dist.frameworks.compiled import without_compiled_wrapper
from layerwise_dist.frameworks.overlaps import LayersApart
from layerwise_dist.frameworks.subset_step import SubsetStep
from layerwise_dist.layers.exact import Mode, check_layered, check_observed, check_scaler
from layerwise_dist.layers.gradients import Arrivals
from layerwise_dist.layers.graph import DependencyGraphBuilder
from layerwise_dist.layers.wrapper_gradients import watch

_MODES = ("pipelined_step", "in_backward")
_KEY = "_layerwise"  # in the optimizer's attributes

Subset = list[list[nn.Parameter]]  # for each group of the optimizer


class LayerwiseOptimizer(torch.optim.Optimizer):
    """`optimizer`, stepping one layer at a time.

    It is the same optimizer under another name: both share all attributes (groups, state, hooks), so learning rate
    schedulers, GradScaler and state dicts take either, and `step()` of either is layered.

    Args:
        optimizer: any that `subset_step` knows; all its parameters must be the model's.
        model: the model as it is trained, wrapped in DDP or FSDP2 if it is.
        mode: ``pipelined_step``: `step()` goes layer by layer in the order in which gradients became ready.
            ``in_backward``: a layer is updated in the backward, as soon as all its gradients are there.
        graph: its order is used; one that has observed an iteration saves the observation here.
        before_layer: called with the layer's name and the number of the update (1 for the first), right before the
            layer is overwritten. Of a layer without gradients it is called too.
        after_layer: the same, right after the layer's update.
        active: asked once an iteration, at the step or at the first gradient of a backward. Where it says False, the
            original step runs untouched and nothing is called. Without it every step is layered.

    The first iteration, in which the order is observed, is stepped whole, with the calls for all layers before and
    after it. So is a step that finds a pre-step hook registered after this one's, since that may still change
    gradients.

    Attributes:
        graph: the DependencyGraphBuilder with the order.

    Raises:
        UnsupportedError: an optimizer whose subsets cannot be stepped, a parameter that is not the model's, or a
            wrapper under which in_backward is not exact.
        ConfigError: an unknown mode, or an optimizer that is layered already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        mode: Mode = "pipelined_step",
        graph: DependencyGraphBuilder | None = None,
        before_layer: Callable[[str, int], None] | None = None,
        after_layer: Callable[[str, int], None] | None = None,
        active: Callable[[], bool] | None = None,
    ) -> None:
        if mode not in _MODES:
            raise ConfigError(f"mode is {mode!r}; allowed: {', '.join(_MODES)}")
        if _KEY in optimizer.__dict__:
            raise ConfigError("this optimizer is already stepped one layer at a time: detach() the first one")
        graph = graph or DependencyGraphBuilder(model)
        stepping = _Stepping(optimizer, model, mode, graph, before_layer or _nothing, after_layer or _nothing, active)
        # Shared, not copied: whatever anybody sets on one (a scheduler, a scaler, load_state_dict) is set on the other.
        self.__dict__ = optimizer.__dict__
        self.__dict__[_KEY] = stepping

    @property
    def graph(self) -> DependencyGraphBuilder:
        return self.__dict__[_KEY].graph

    def detach(self) -> None:
        """Leaves the original optimizer as it was found. Between iterations only."""
        self.__dict__.pop(_KEY).detach()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """What the original's `step()` does and returns. A closure is refused, since it updates before the step's end.

        Raises:
            UnsupportedError: a closure; or, with in_backward, something that makes an update in the backward inexact.
            BoundaryError: with in_backward, a gradient changed after its update.
        """
        optimizer = self.__dict__[_KEY].optimizer
        return type(optimizer).step(optimizer) if closure is None else type(optimizer).step(optimizer, closure)

    step.hooked = True  # type: ignore[attr-defined]  # the original's step calls the hooks, which both share

    # Optimizers have versions of their own of what these call.
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__[_KEY].optimizer.__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__[_KEY].optimizer.load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        return self.__dict__[_KEY].optimizer.state_dict()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Later steps cover it; its layers must be the model's."""
        self.__dict__[_KEY].optimizer.add_param_group(param_group)


class _Stepping:
    """The hooks of one optimizer, and where in an iteration it is."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        mode: Mode,
        graph: DependencyGraphBuilder,
        before: Callable[[str, int], None],
        after: Callable[[str, int], None],
        active: Callable[[], bool] | None,
    ) -> None:
        self.optimizer, self.graph, self._mode = optimizer, graph, mode
        self._model = without_compiled_wrapper(model)
        self._before_layer, self._after_layer, self._active = before, after, active
        check_layered(optimizer, self._model, mode, graph.views)
        self._subset_step = SubsetStep(optimizer)
        self._names = {id(view.param): view.fqn for view in graph.views}
        self._plan_of: list[list[int]] = []
        self._plan: dict[str, Subset] = {}
        self._make_plan()
        self._apart = LayersApart(graph.views)
        self._step, self._counted = 0, False  # updates begun, and whether this iteration's is one of them
        self._aside: list[tuple[nn.Parameter, torch.Tensor | None]] = []
        self._whole: list[str] = []  # layers to be captured after a whole step
        self._observing = mode == "in_backward" or graph.source != "observed"
        self._arrivals: Arrivals | None = self._watch() if self._observing else None
        # Of the backward that is going on, with in_backward.
        self._is_active: bool | None = None
        self._missing: dict[str, set[str]] = {}  # by layer, names of the parameters whose gradients it waits for
        self._updated: set[str] = set()
        self._pins: list[dict[str, bool]] = []
        self._pre = optimizer.register_step_pre_hook(self._before)
        self._post = optimizer.register_step_post_hook(self._after)
        # First, so that no other hook sees an optimizer without gradients.
        _move_to_end(optimizer._optimizer_step_post_hooks, self._post.id, last=False)

    def detach(self) -> None:
        self._pre.remove()
        self._post.remove()
        if self._arrivals is not None:
            self._arrivals.remove()

    @property
    def _in_backward(self) -> Arrivals:
        """REQUIRES: the mode of that name, which watches gradients from start to end."""
        assert self._arrivals is not None
        return self._arrivals

    def _watch(self) -> Arrivals:
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        on_arrival = self._arrived if self._mode == "in_backward" else None
        named = {self._names[id(param)]: param for param in params}
        in_backward = self._mode == "in_backward"
        return watch(self._model, named, on_arrival, exact=in_backward, reduced=in_backward)

    def _make_plan(self) -> None:
        """Each layer's parameters, by group, in the update order."""
        groups = self.optimizer.param_groups
        self._plan_of = [[id(param) for param in group["params"]] for group in groups]
        plan: dict[str, Subset] = {}
        for index, group in enumerate(groups):
            for place, param in enumerate(group["params"]):
                fqn = self._names.get(id(param))
                if fqn is None:
                    raise UnsupportedError(
                        f"parameter {place} of the optimizer's group {index}, of shape {tuple(param.shape)}, is not a "
                        "parameter of the model, so it has no layer: give the model that owns it. One added later "
                        "needs another LayerwiseOptimizer (with an engine: update = 'whole')"
                    )
                plan.setdefault(self.graph.layer_of[fqn], [[] for _ in groups])[index].append(param)
        order = [*self.graph.get_update_order(), *self.graph.layer_info]
        self._plan = {layer: plan[layer] for layer in dict.fromkeys(order) if layer in plan}

    # The step

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        active = self._is_active if self._is_active is not None else self._ask()
        if not active and not self._observing:
            self._count()
            return
        if active and any(value is not None for value in (*args[1:], *kwargs.values())):
            raise UnsupportedError(
                "step(closure) cannot be layered: call backward() first, then step() without a closure"
            )
        observed = self._observing
        if observed:
            self._look()
        if self._is_regrouped():
            self._regroup()
        self._count()
        if not active:
            return
        if not self._updated:
            self._apart.check(optimizer.param_groups)
        last = next(reversed(optimizer._optimizer_step_pre_hooks)) == self._pre.id
        if self._updated:
            self._judge(last)
        elif observed or not last:
            self._whole = list(self._plan)
            for layer in self._whole:
                self._before_layer(layer, self._step)
            return
        ready = _with_gradients([group["params"] for group in optimizer.param_groups])
        pins = self._pins if self._updated else self._subset_step.pins(ready)
        for layer, subset in self._plan.items():
            if layer not in self._updated:
                self._update(layer, _with_gradients(subset), pins)
        self._aside = [(param, param.grad) for part in ready for param in part]
        for param, _ in self._aside:
            param.grad = None

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for param, grad in self._aside:
            param.grad = grad
        self._aside = []
        whole, self._whole = self._whole, []
        for layer in whole:
            self._after_layer(layer, self._step)
        if next(reversed(optimizer._optimizer_step_pre_hooks)) != self._pre.id:
            _move_to_end(optimizer._optimizer_step_pre_hooks, self._pre.id)
        self._is_active, self._counted = None, False
        self._updated = set()
        self._missing = {}
        if self._arrivals is not None:
            self._arrivals.reset()

    def _update(self, layer: str, subset: Subset, pins: list[dict[str, bool]], *, in_backward: bool = False) -> None:
        self._before_layer(layer, self._step)
        self._subset_step.step(subset, pins)
        if in_backward:
            updated = [param for part in subset for param in part]
            self._in_backward.accept([self._names[id(param)] for param in updated])
            # Fused kernels do not count, and a node that still needs the old values must not run on the new ones.
            increment_version(updated)
        self._after_layer(layer, self._step)

    def _count(self) -> None:
        if not self._counted:
            self._step, self._counted = self._step + 1, True

    def _ask(self) -> bool:
        return self._active is None or self._active()

    def _is_regrouped(self) -> bool:
        return self._plan_of != [[id(param) for param in group["params"]] for group in self.optimizer.param_groups]

    def _regroup(self) -> None:
        if self._updated:
            raise BoundaryError("add_param_group() between backward() and step(): add it before the forward")
        self._make_plan()
        if self._arrivals is not None:
            self._arrivals.remove()
            self._observing, self._arrivals = True, self._watch()

    # The observation, and updates in the backward

    def _look(self) -> None:
        """Ends the observation, unless no gradient came in a backward yet."""
        arrivals = self._arrivals
        if arrivals is None or not arrivals.order:
            return
        if self._mode == "in_backward":
            check_observed(self.optimizer, arrivals)
        self.graph.record(arrivals.order, arrivals.fires)
        self._observing = False
        self._make_plan()
        arrivals.exact = False
        if self._mode == "pipelined_step":
            arrivals.remove()
            self._arrivals = None

    def _arrived(self, fqn: str) -> None:
        if self._observing:
            return
        if self._is_active is None:
            self._begin()
        if not self._is_active:
            return
        layer = self.graph.layer_of[fqn]
        if self._in_backward.fires[fqn] > 1 and layer in self._updated:
            raise BoundaryError(
                f"the gradient of {fqn} arrived again after it was used: accumulation, a second backward, or a "
                "backward without a step(). The parameters hold an update of a part of the gradient: go back to a "
                "checkpoint, and use mode='pipelined_step'"
            )
        missing = self._missing.get(layer)
        if missing is None:
            return  # not all of its parameters were reached in the observation: it is updated in step()
        missing.discard(fqn)
        if not missing and layer not in self._updated:
            self._updated.add(layer)
            with torch.no_grad():
                self._update(layer, _with_gradients(self._plan[layer]), self._pins, in_backward=True)

    def _begin(self) -> None:
        """The first gradient of a backward."""
        self._is_active = self._ask()
        self._missing = {}
        if not self._is_active or self._is_regrouped():
            return  # with new groups the step updates all, and the next iteration is observed
        try:
            self._apart.check(self.optimizer.param_groups)
        except UnsupportedError:
            return  # nothing is updated in this backward, and the step raises it
        # Whatever was registered since then may change gradients, and is judged only if it ran before.
        _move_to_end(self.optimizer._optimizer_step_pre_hooks, self._pre.id)
        reached = self.graph.fires
        groups = [group["params"] for group in self.optimizer.param_groups]
        self._pins = self._subset_step.pins([[p for p in part if reached[self._names[id(p)]]] for part in groups])
        for layer, subset in self._plan.items():
            names = {self._names[id(param)] for part in subset for param in part}
            expected = {fqn for fqn in names if self._in_backward.expects(fqn)}
            if expected and all(reached[fqn] for fqn in expected):
                self._missing[layer] = expected
        self._count()

    def _judge(self, last: bool) -> None:
        """What was updated in the backward, against what `step()` finds."""
        check_scaler(self.optimizer)
        changed = [fqn for fqn in self._in_backward.changed() if self.graph.layer_of[fqn] in self._updated]
        if changed or not last:
            what = f"the gradient of {changed[0]} was changed" if changed else "a step pre-hook was registered"
            raise BoundaryError(
                f"{what} between backward() and step() (clipping, a scaler, zero_grad), after the update "
                "in the backward. The parameters hold an update that plain training would not make: go back to a "
                "checkpoint, and use mode='pipelined_step'"
            )


def _nothing(layer: str, step: int) -> None:
    pass


def _move_to_end(hooks: Mapping[int, object], number: int, *, last: bool = True) -> None:
    """Of a step's hooks, which torch keeps in the order of their calls."""
    assert isinstance(hooks, OrderedDict)
    hooks.move_to_end(number, last)


def _with_gradients(subset: Subset) -> Subset:
    return [[param for param in part if param.grad is not None] for part in subset]
