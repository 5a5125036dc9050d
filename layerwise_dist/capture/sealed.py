# SPDX-License-Identifier: Apache-2.0
"""Seals everything besides tensors at a boundary, as one value for typed JSON, and restores it into live objects."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch

from layerwise_dist.capture.group_texts import GroupTexts
from layerwise_dist.capture.survey import Survey
from layerwise_dist.errors import StateError
from layerwise_dist.frameworks.described import OptimizerState
from layerwise_dist.frameworks.framework import Framework, ParamView
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.loop.sealed import BoundaryState, Paced, SealedState
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.typed_json_types import Prepared

_N = TypeVar("_N")


class Sealer:
    """Everything of the process at a boundary that is not a parameter, a buffer or a tensor of the optimizer's state.

    The value is a `loop.sealed.SealedState`.
    """

    def __init__(self, framework: Framework, optimizer: OptimizerAdapter, objects: StateObjects) -> None:
        self._framework, self._optimizer, self._objects = framework, optimizer, objects
        self._tied: tuple[list[ParamView], dict[str, list[str]]] = [], {}
        self._prepared: dict[str, tuple[Any, Prepared]] = {}
        self._groups: dict[str, GroupTexts] = {}  # of each optimizer, by its name

    def take(
        self, step: int, updates: int, boundary: BoundaryState, survey: Survey, client_state: dict[str, Any] | None,
        paced: Paced,
    ) -> tuple[bytes, bytes]:  # fmt: skip
        """The state as (JSON text, blob), sharing nothing with live objects; `boundary` is `BoundaryMark.state()`.

        Raises StateError with the path of what cannot be written.
        """
        framework, objects = self._framework, self._objects.take()
        optimizer = {
            **self._optimizer_itself(self._optimizer.describe()),
            "scalars": survey.live_scalars(),
            "order": self._prepare("order", survey.order),
        }
        sealed: SealedState = {
            "step": step,
            "updates": updates,
            "boundary": boundary,
            "objects": objects,
            "client_state": client_state,
            "optimizer": cast(OptimizerState, optimizer),
            "wrapper": framework.carry(),
            "gradients": self._prepare("gradients", framework.with_gradient()),
            "extra_state": {name: _extra_state(name, module) for name, module in survey.extra_states},
        }
        sealed.update(cast(SealedState, paced))
        if classes := self._objects.classes():
            sealed["classes"] = classes
        if aliases := self._aliases():
            sealed["aliases"] = self._prepare("aliases", aliases)
        if survey.standing:
            sealed["standing"] = dict(survey.standing)
        return typed_json.dumps(sealed, path="state")

    def try_out(self, survey: Survey) -> None:
        """Raises what the first checkpoint would: for what cannot be written of objects, extra states and the rest."""
        self.take(0, 0, cast(BoundaryState, {}), survey, None, {})

    def put(self, sealed: SealedState) -> None:
        """Gradients, `state=` objects and extra states as they were sealed; the rest belongs to loader and boundary."""
        present = set(sealed["gradients"])
        for view in self._framework.params:
            self._framework.put_gradient(view, view.fqn in present)
        self._objects.put(sealed["objects"])
        self.put_extra_states(sealed)

    def put_extra_states(self, sealed: SealedState) -> None:
        self._framework.put_extra_states(
            sealed["extra_state"], "state['extra_state']",
            "what was loaded before it, parameters and optimizer state too, is undefined",
        )  # fmt: skip

    def _aliases(self) -> dict[str, list[str]]:
        """Further names of tied parameters, looked for again when the parameters are others."""
        views = self._framework.params  # the very same list while they are the same
        if self._tied[0] is not views:
            self._tied = views, {view.fqn: [*view.aliases] for view in views if view.aliases}
        return self._tied[1]

    def _prepare(self, what: str, names: _N) -> _N:
        """Names as JSON, which typed JSON takes for them; nearly always those of the last checkpoint, which are not
        written out again.
        """
        known = self._prepared.get(what)
        if known is None or known[0] != names:
            known = self._prepared[what] = names, typed_json.prepare(names, path=f"state: {what}")
        return cast(_N, known[1])

    def _optimizer_itself(self, described: dict[str, Any], whose: str = "") -> dict[str, Any]:
        """`OptimizerAdapter.describe()`, with the text of its groups, or of the names in them."""
        if "optimizers" in described:
            named = described["optimizers"].items()
            return {"optimizers": {name: self._optimizer_itself(each, name) for name, each in named}}
        groups = described["groups"]
        text = self._groups.setdefault(whose, GroupTexts()).of(groups)
        if text is not None:
            return {**described, "groups": text}
        named = [self._prepare(f"{whose}: group {n}", group["params"]) for n, group in enumerate(groups)]
        return {**described, "groups": [{**group, "params": each} for group, each in zip(groups, named, strict=True)]}


def _extra_state(name: str, module: torch.nn.Module) -> Any:
    try:
        return module.get_extra_state()
    except Exception as error:
        raise StateError(
            f"state['extra_state'][{name!r}]",
            f"{type(module).__qualname__}.get_extra_state() fails: {type(error).__name__}: {error}",
        ) from error
