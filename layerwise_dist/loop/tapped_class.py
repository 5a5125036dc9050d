# SPDX-License-Identifier: Apache-2.0
"""The class of an attached DataLoader: which loaders can be followed, and one that reports each `iter()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader

from layerwise_dist.errors import UnsupportedError


class Tap(Protocol):
    """What `iter()` of its loader goes to."""

    loader: DataLoader[Any]

    def iterate(self) -> Iterator[Any]: ...


def tell_iterations(loader: DataLoader[Any], name: str, weak: Callable[[], Tap | None]) -> None:
    """The loader's `__class__` becomes a subclass of the same name, whose `iter()` goes to the tap that `weak` refers
    to, as long as that is there: a loader in a cycle would leave its workers to the garbage collector.

    Raises UnsupportedError for classes whose instances can't take another.
    """
    base = type(loader)

    def __iter__(tapped: DataLoader[Any]) -> Iterator[Any]:
        tap = weak()
        if tap is None or tapped is not tap.loader:  # a copy of the loader is not attached
            return base.__iter__(tapped)
        return tap.iterate()

    body = {
        "__iter__": __iter__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    try:
        loader.__class__ = type(base.__name__, (base,), body)
    except (AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"loader {name!r}: draws from a {base.__name__} cannot be told ({error}): name a plain torch "
            "DataLoader in state, or give the position as an object with state_dict()"
        ) from error


def doubt_of(kind: type[DataLoader[Any]]) -> str | None:
    """Why a loader of this class may not be where it was after a resume, if its class says so."""
    own = next(each for each in kind.__mro__ if "__iter__" in vars(each))
    if own is DataLoader or own.__module__.startswith("torchdata."):
        return None
    return (
        f"{own.__name__} has an __iter__() of its own, and what that keeps from one iteration to the next is not saved"
    )


def check_class(loader: Any, name: str) -> None:
    """Raises UnsupportedError for what is no DataLoader by its class, and for loaders whose own code decides when and
    what is drawn.
    """
    kinds = type(loader).__mro__
    if any(f"{kind.__module__}.".startswith("accelerate.") for kind in kinds):
        raise UnsupportedError(
            f"loader {name!r} is Accelerate's {type(loader).__name__}, which draws a batch ahead, and seeds and counts "
            "epochs by itself: its position is unknown. Leave the DataLoader out of accelerator.prepare(), and "
            "name it in state as it is: a DistributedSampler divides it among the ranks, and "
            "batch.to(accelerator.device) moves what it yields"
        )
    if DataLoader not in kinds:
        raise UnsupportedError(
            f"loader {name!r}: a {type(loader).__name__} claims to be a DataLoader, but wraps one: name the "
            "DataLoader itself in state"
        )
