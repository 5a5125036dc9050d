# SPDX-License-Identifier: Apache-2.0
"""What an optimizer keeps outside `state[parameter]` and its groups: saved, or refused by name.

Three places. `state` under strings (MADGRAD's ``state["k"]``) is saved as it is. What the optimizer's `state_dict()`
tells beyond ``state`` and ``param_groups`` is saved, and given back through its `load_state_dict()`. Attributes that
neither holds cannot be saved: when one changes, the checkpoint is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.tensors.values import alike, bytes_of, fits, leaves

Optimizer = torch.optim.Optimizer

# What torch, its schedulers and its GradScaler put on an optimizer. The rest of an instance is its class's own.
_TORCH_S = frozenset(
    {
        "state", "param_groups", "grad_scale", "found_inf", "_opt_called", "_step_count", "_zero_grad_profile_name",
        "_warned_capturable_if_run_uncaptured", "_step_supports_amp_scaling", "_need_device_dtype_check_for_fused",
        *(f"_optimizer_{what}_hooks" for what in (
            "step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post",
        )),
    }
)  # fmt: skip
# Scratch memory of fused kernels, and a flag that says that a first step has moved the state to its device.
_SCRATCH = frozenset({"_dummy_overflow_buf"})
_FLAGS = {
    "bitsandbytes": frozenset({"initialized"}),
}
# Optimizers of these packages keep nothing elsewhere; what is found on one was put there by the script.
_PLAIN = ("torch.optim.", "deepspeed.ops.", "transformers.optimization.")
_COMPARED = 1024  # elements; whether a larger tensor changed is asked of its version counter
_DEPTH = 8
_SAYS_NOTHING = [("bool", "True"), ("bool", "False"), ("NoneType", "None")]


class Elsewhere:
    """Of one optimizer. `kin` are itself and all that are inside it or around it, whose state is captured too.

    `watched` says that its class may have attributes that are state: it is of none of the packages known not to.
    """

    def __init__(
        self, kind: str, optimizer: Any, kin: Callable[[], Iterable[Optimizer]], *, keyed: bool = True
    ) -> None:
        """`keyed`: its `state` is its own; not that of an object around an optimizer.

        Raises UnsupportedError for a `state_dict()` that fails, changes the training, or differs at each call.
        """
        self.kind, self._optimizer, self._kin, self._has_state = kind, optimizer, kin, keyed
        self.watched = not f"{type(optimizer).__module__}.".startswith(_PLAIN)
        self._looks: dict[str, Any] | None = None  # before the first update
        told = self._told()
        if not alike(told, self._told()):
            raise UnsupportedError(f"{kind}'s state_dict() returns {[*told]}, with other values at each call")
        # How it looks, if it must stay as it is.
        self._fixed = _Looks(kin()).of(told) if told and not takes(optimizer) else {}

    def remember(self) -> None:
        """An update begins."""
        if self.watched and self._looks is None:
            self._looks = self._attributes()

    def describe(self) -> dict[str, Any]:
        """Members of ``optimizer`` in docs/format/state.md, or none. Shares values with live objects.

        Raises UnsupportedError for state under keys that mean nothing to another process, and for attributes that
        changed and that no member tells.
        """
        told = self._told()
        if (told or self._fixed) and not takes(self._optimizer) and _Looks(self._kin()).of(told) != self._fixed:
            raise UnsupportedError(
                f"{self.kind}: what its state_dict() returns ({[*told]}) changes, and its load_state_dict(), "
                "torch.optim.Optimizer's, accepts none of it: define load_state_dict() too, or keep it in "
                "optimizer.state[...] or in a group"
            )
        if self._looks is not None:
            self._check_attributes(self._looks, told)
        members = {**(self._keyed() if self._has_state else {}), "told": told}
        return {name: value for name, value in members.items() if value}

    def check(self, saved: Mapping[str, Any]) -> list[str]:
        """What of a checkpoint does not fit, before anything is loaded."""
        there, here = saved.get("told", {}), self._told()
        if there and not takes(self._optimizer) and not alike(here, there):
            return [f"the checkpoint holds {[*there]}, which {self.kind}'s load_state_dict() does not accept"]
        if here and not there:
            return [f"{self.kind}'s state_dict() returns {[*here]}, which the checkpoint lacks"]
        return []

    def put(self, saved: Mapping[str, Any]) -> bool:
        """Takes `describe()` as it was saved. REQUIRES: the state by parameter, and the groups, are restored.

        Returns whether `load_state_dict()` was called, which casts both: they are to be put in place once more.
        """
        told = saved.get("told") if takes(self._optimizer) else None
        if told:
            whole = {**self._call("state_dict"), **told}
            self._call("load_state_dict", whole)
        self._looks = None
        if self._has_state:
            self._put_keyed(saved)
        return bool(told)

    def _put_keyed(self, saved: Mapping[str, Any]) -> None:
        state, there = self._optimizer.state, saved.get("state", {})
        for key in [key for key in state if isinstance(key, str) and key not in there]:
            del state[key]
        for key, value in there.items():
            live = state.get(key)
            if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor) and fits(live, value):
                with torch.no_grad():
                    live.copy_(value)
            else:
                state[key] = value.to(self._device) if key in saved.get("on_device", ()) else value

    def confirm(self, saved: Mapping[str, Any]) -> None:
        """When all is restored: raises UnsupportedError if `state_dict()` does not tell what the checkpoint holds."""
        told = saved.get("told", {})
        if not alike(self._told(), told):
            raise UnsupportedError(
                f"{self.kind}: after its load_state_dict(), its state_dict() does not return {[*told]} as given: "
                "what they hold cannot be restored exactly"
            )

    # -- under strings ------------------------------------------------------------------------------------------

    def _keyed(self) -> dict[str, Any]:
        """``state``; and ``on_device``, those of it that are tensors where the parameters are, which is not the CPU."""
        state = self._optimizer.state
        if all(issubclass(kind, torch.Tensor) for kind in set(map(type, state))):
            return {}
        found: dict[str, Any] = {}
        on_device = []
        for key, value in state.items():
            if isinstance(key, str):
                found[key] = value
                if isinstance(value, torch.Tensor) and value.device.type != "cpu" and value.device == self._device:
                    on_device.append(key)
                elif any(isinstance(each, torch.Tensor) and each.device.type != "cpu" for each in leaves(value)):
                    raise UnsupportedError(
                        f"{self.kind} keeps tensors in state[{key!r}] that are not on the CPU: a restore could not "
                        "tell which device each belongs on. Keep them on the CPU, or each under a string of its own"
                    )
            elif not isinstance(key, torch.Tensor):
                raise UnsupportedError(
                    f"{self.kind} keeps state under {key!r}, which is neither a parameter nor a string: another "
                    "process could not find it"
                )
        return {"state": found, "on_device": on_device}

    @property
    def _device(self) -> torch.device:
        """Where its first parameter is."""
        return next(param.device for group in self._optimizer.param_groups for param in group["params"])

    # -- what state_dict() tells --------------------------------------------------------------------------------

    def _told(self) -> dict[str, Any]:
        """Its members beyond those of torch's own, and beyond what is captured as it is. References to live objects."""
        optimizer = self._optimizer
        if not tells(optimizer):
            return {}
        sizes = [len(each.state) for each in self._kin()]
        whole = self._call("state_dict")
        if sizes != [len(each.state) for each in self._kin()]:
            for each, size in zip(self._kin(), sizes, strict=True):
                if not size:
                    each.state.clear()
            raise UnsupportedError(
                f"{self.kind}'s state_dict() makes state where there was none (as get_optimizer_state_dict() of "
                "torch.distributed.checkpoint does, by a step), which changes the training. Attach the optimizers "
                "inside it by name instead: attach(model, optimizers={...})"
            )
        whole = {name: value for name, value in whole.items() if name not in ("state", "param_groups")}
        if not whole:
            return {}
        known = self._captured()
        return {name: value for name, value in whole.items() if not _is_captured(value, *known)}

    def _call(self, name: str, *args: Any) -> Any:
        """The optimizer's own code, whose errors are told on all ranks."""
        try:
            return getattr(self._optimizer, name)(*args)
        except Exception as error:
            raise UnsupportedError(f"{self.kind}'s {name}() fails: {type(error).__name__}: {error}") from error

    def _captured(self) -> tuple[set[int], list[Any]]:
        """What is saved in another way: by identity, and as state dicts of the others."""
        kin = list(self._kin())
        return _held(kin), [each.state_dict() for each in kin if each is not self._optimizer]

    # -- attributes ---------------------------------------------------------------------------------------------

    def _check_attributes(self, before: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        now = self._attributes()
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name) and not _mentions(told, name, now.get(name)):
                raise UnsupportedError(
                    f"{self.kind} keeps state in its attribute {name!r}, which changed since the first update, and "
                    "which neither state_dict() nor `state` nor a group has: it would be lost. Keep it in "
                    "optimizer.state[...] or in a group, or let state_dict() return it and load_state_dict() take it "
                    "back (register_state_dict_post_hook() and register_load_state_dict_pre_hook() do, too)"
                )

    def _attributes(self) -> dict[str, Any]:
        """How the plain ones look. The rest (functions, modules, process groups) is taken for what the script makes."""
        optimizer = self._optimizer
        passed = _TORCH_S | _SCRATCH | _FLAGS.get(type(optimizer).__module__.partition(".")[0], frozenset())
        looks = _Looks(self._kin())
        found = {name: looks.of(v) for name, v in getattr(optimizer, "__dict__", {}).items() if name not in passed}
        if isinstance(defaults := found.get("defaults"), dict):
            defaults.pop("differentiable", None)  # __setstate__() adds it
        return {name: look for name, look in found.items() if look is not None}


def tells(optimizer: Any) -> bool:
    """Whether `state_dict()` may have members of its own. torch's maps all parameters: it is not called for nothing."""
    return (
        getattr(type(optimizer), "state_dict", Optimizer.state_dict) is not Optimizer.state_dict
        or "state_dict" in getattr(optimizer, "__dict__", ())
        or bool(getattr(optimizer, "_optimizer_state_dict_post_hooks", None))
    )


def takes(optimizer: Any) -> bool:
    """Whether `load_state_dict()` may take more than torch's own does."""
    return (
        getattr(type(optimizer), "load_state_dict", Optimizer.load_state_dict) is not Optimizer.load_state_dict
        or "load_state_dict" in getattr(optimizer, "__dict__", ())
        or bool(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None))
    )


def _held(kin: Iterable[Optimizer]) -> set[int]:
    """The optimizers, and what of them is saved as it is, by identity: no numbers or strings, which are anybody's."""
    found: set[int] = set()
    for each in kin:
        found.update(map(id, (each, each.state, each.param_groups, *each.param_groups)))
        holders: list[Mapping[Any, Any]] = [each.state, *each.param_groups]
        for values in holders:  # a default that is no number is that of every group, too
            found.update(id(value) for value in values.values() if isinstance(value, Mapping | list | torch.Tensor))
    return found


def _is_captured(value: Any, held: set[int], dicts: Sequence[Any]) -> bool:
    """Whether this member of a state dict is made of what is captured anyway."""
    if id(value) in held or any(alike(value, each) for each in dicts):
        return True
    if isinstance(value, Mapping):
        return all(_is_captured(each, held, dicts) for each in value.values())
    return isinstance(value, list | tuple) and all(_is_captured(each, held, dicts) for each in value)


class _Version:
    """A tensor that is too large to be copied. Equal while it is the same one and nothing was written into it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor  # kept, so that no other takes its place
        self._version = -1 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Version) and self._tensor is other._tensor and self._version == other._version

    __hash__ = None  # type: ignore[assignment]


class _Looks:
    """Values as something that can be compared later, when they have changed in place. None is what is not plain."""

    def __init__(self, kin: Iterable[Optimizer]) -> None:
        kin = list(kin)
        self._passed = _held(kin)
        self._tensors = [p for each in kin for group in each.param_groups for p in group["params"]]
        self._tensors += [
            t for each in kin for state in each.state.values() if isinstance(state, Mapping)
            for t in state.values() if isinstance(t, torch.Tensor)
        ]  # fmt: skip
        self._storages: set[int] | None = None

    def of(self, value: Any, depth: int = 0) -> Any:
        if id(value) in self._passed or depth > _DEPTH:
            return None
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
            return type(value).__name__, repr(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, Mapping):
            return {_key(key): self.of(each, depth + 1) for key, each in value.items()}
        if isinstance(value, list | tuple | deque):
            return [self.of(each, depth + 1) for each in value]
        if isinstance(value, set | frozenset):
            return sorted(map(repr, value)) if all(isinstance(each, str | int | float) for each in value) else None
        return None

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if self._storages is None:
            self._storages = {_storage(each) for each in self._tensors}
        if _storage(tensor) in self._storages:
            return None  # a parameter, or state by parameter
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return _Version(tensor)
        if tensor.numel() > _COMPARED or tensor.device.type == "meta":
            return _Version(tensor)
        return str(tensor.dtype), tuple(tensor.shape), bytes(bytes_of(tensor).numpy())


def _storage(tensor: torch.Tensor) -> int:
    """Of tensors that have none (sparse ones, those of wrapper subclasses) it is the object itself."""
    try:
        return tensor.untyped_storage().data_ptr() or -id(tensor)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def _key(key: Any) -> Any:
    return key if isinstance(key, str | int) else id(key)


def _mentions(told: Any, name: str, look: Any) -> bool:
    """Whether an attribute is in what `state_dict()` tells: under its name, or by a value that says enough."""
    if look and look not in _SAYS_NOTHING and _Looks([]).of(told) == look:
        return True
    if isinstance(told, Mapping):
        names = (name, name.strip("_"))
        return any(key in names or _mentions(each, name, look) for key, each in told.items())
    return isinstance(told, list | tuple) and any(_mentions(each, name, look) for each in told)
