# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of an optimizer. `torch_optimizer.py` is how a `torch.optim.Optimizer` answers.

The engine hears of updates through `UpdateEvents`; everything else that capture and restore need of an optimizer they
ask of its `OptimizerAdapter`, so that one whose state lies in flat, sharded units (DeepSpeed's) looks like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch

from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.tensors.slices import Slice


class UpdateEvents(Protocol):
    """What an adapter tells of its optimizer's updates, on the training thread. The engine implements it."""

    def update_starting(self, *, in_closure: bool = False, layers: Collection[str] | None = None) -> None:
        """An iteration's update begins. With `in_closure` its closure runs first, then this is called again.

        With `layers` it can change nothing but those; one of several optimizers says so.
        """

    def before_closure(self, layers: Collection[str] | None = None) -> None:
        """These layers, or all, may change before the update starts: after `update_starting(in_closure=True)`, before
        the closure's first call; or in a wrapper, before it steps the optimizer, if it does.
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

    @property
    def optimizers(self) -> Sequence[object]:
        """The script's objects behind it, wrappers included, that a second engine must not have too."""
        return ()

    @property
    def scalers(self) -> Mapping[str, torch.amp.GradScaler]:
        """Those that wrappers of the optimizer step by, by what they are called."""
        return {}

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
        """What a checkpoint says of it beside its state: members of ``optimizer`` in docs/format/state.md."""
        return {"class": self.kind, "groups": self.hyper_parameters()}

    def check(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> list[str]:
        """What of a checkpoint's ``optimizer`` state does not fit this one, for a MismatchError; empty if it fits.

        `lacking` names parameters (fqns) that the checkpoint has not, and need not have.
        """
        raise NotImplementedError

    def place(self, view: ParamView, entry: Slice, wrapped: bool) -> torch.Tensor:
        """The tensor to load the saved state `entry` into: the live one if it is alike, else a new one."""
        raise NotImplementedError

    def joined(self) -> list[list[str]]:
        """Names of parameters that have one tensor of state together."""
        return []

    def adopt(
        self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any],
        lacking: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Takes the loaded state: tensors from `place`, by parameter and name, and the saved ``optimizer`` state."""
        raise NotImplementedError

    def keep(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> None:
        """Parameters were loaded, and the optimizer's state stays as it is; `saved` is what `adopt` would have got."""

    def watch(self, events: UpdateEvents) -> None:
        """From now on, tell `events` of every update."""
        raise NotImplementedError

    def detach(self) -> None:
        """Removes the hooks of `watch`."""
        raise NotImplementedError
