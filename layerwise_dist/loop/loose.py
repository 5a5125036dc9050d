# SPDX-License-Identifier: Apache-2.0
"""Loaders that `state=` does not name: when one is started, and which of them continue across iterations.

`iter()` of a DataLoader draws from torch's global generator (the base seed of its workers), unless it has a generator
of its own. So where a loop starts one decides which numbers come after it, in the run that was never interrupted and in
a resumed one. While anything watches, `DataLoader.__iter__` tells of each start; it returns what it always does.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from layerwise_dist.loop import rng

_STATEFUL = "torchdata.stateful_dataloader.stateful_dataloader"

watching: weakref.WeakSet[LooseLoaders] = weakref.WeakSet()
_plain: dict[type[DataLoader[Any]], Callable[[Any], Iterator[Any]]] = {}  # the `__iter__` of each class that tells


_PLACE = (
    "was started within an iteration and continues in later ones: a resume restarts it elsewhere, so random numbers "
    "differ from there on, and its position is lost. Name it in attach(state=...), or start it "
    "before steps()"
)
_ORDER = (
    "takes its order from the global generators: a resume within an epoch gives it another order. Name it in "
    "attach(state=...), or give it a generator of its own that the script seeds for each epoch"
)


@dataclass(eq=False)
class Started:
    """One iterator of such a loader. `moved`: its start drew from the global generators. `doubt`: why a resume is not
    exact if it goes on in later iterations.
    """

    iterator: weakref.ref[Any]
    dataset: Any
    name: str
    length: int | None
    moved: bool
    doubt: str | None
    seen: int = 0  # batches as of the last boundary
    crossed: bool = False  # it lived over a boundary
    fed: bool = False  # drawn from before a training forward of this iteration

    @property
    def drawn(self) -> int | None:
        """Batches that it gave; None if nobody holds it any more."""
        iterator = self.iterator()
        return None if iterator is None else getattr(iterator, "_num_yielded", 0)


class LooseLoaders:
    """What one training loop does with loaders that are not attached. Belongs to the thread of that loop.

    Args:
        starting: called before one is started; whether that is within an iteration, or None if it is none of this
            loop's business (attached, or on another thread).
    """

    def __init__(self, starting: Callable[[DataLoader[Any], str], bool | None]) -> None:
        self.starting = starting
        self._started: list[Started] = []
        self._outside: set[str] = set()  # names of those that a resume starts between iterations, as this run did
        self._seed: int | None = None  # of torch's generator at the last boundary
        watching.add(self)
        _tell()

    def close(self) -> None:
        watching.discard(self)
        self._started.clear()
        if not watching:
            _tell_no_more()

    def started(self, loader: DataLoader[Any], iterator: Any, *, inside: bool, moved: bool) -> None:
        name, doubt = describe(loader), None
        if not inside:
            self._outside.add(name)
        if moved and name not in self._outside:
            doubt = _PLACE
        elif self._seed == torch.initial_seed() and _ordered_globally(loader):  # and the script has not seeded it anew
            doubt = _ORDER
        self._started = [each for each in self._started if each.iterator() is not iterator]  # persistent workers' one
        self._started.append(Started(weakref.ref(iterator), loader.dataset, name, _length(loader), moved, doubt))

    def forward(self) -> None:
        """A training forward begins: what was drawn from before it feeds the training."""
        for each in self._started:
            drawn = each.drawn
            each.fed = each.fed or (not each.crossed if drawn is None else drawn > each.seen)

    def boundary(self, *, closing: bool) -> tuple[list[str], list[Started]]:
        """An iteration is over. Which loaders make a resume inexact, and why; and those that have nothing left to give,
        though they fed this iteration: the next one starts them anew. When `closing`, a `for` that was left by break is
        none of these.
        """
        doubts, ended, alive = [], [], []
        for each in self._started:
            drawn = each.drawn
            if each.doubt is not None and each.crossed and drawn is not None and drawn > each.seen:
                doubts.append(f"a {each.name}, which state= does not name, {each.doubt}")
            if each.fed and each.moved and (not closing if drawn is None else drawn == each.length):
                ended.append(each)
            if drawn is not None:
                each.seen, each.crossed, each.fed = drawn, True, False
                alive.append(each)
        self._started, self._seed = alive, torch.initial_seed()
        return doubts, ended


def describe(loader: DataLoader[Any]) -> str:
    return f"{type(loader).__name__} over {type(loader.dataset).__name__} (batch_size={loader.batch_size})"


def _length(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _ordered_globally(loader: DataLoader[Any]) -> bool:
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if not isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        return False
    return sampler.generator is None


def _tell() -> None:
    stateful = getattr(sys.modules.get(_STATEFUL), "StatefulDataLoader", None)
    for kind in (DataLoader, stateful):
        if kind is not None and kind not in _plain:
            plain = _plain[kind] = kind.__iter__
            kind.__iter__ = _telling(plain)  # type: ignore[method-assign]


def _tell_no_more() -> None:
    for kind, plain in list(_plain.items()):
        if getattr(kind.__iter__, "plain", None) is plain:  # else somebody has put another around it
            kind.__iter__ = plain  # type: ignore[method-assign]
            del _plain[kind]


def _telling(plain: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    def __iter__(self: DataLoader[Any]) -> Iterator[Any]:
        name = describe(self) if watching else ""
        told = [(watch, watch.starting(self, name)) for watch in list(watching)]
        told = [(watch, inside) for watch, inside in told if inside is not None]
        if not told:
            return plain(self)
        before = rng.glance()
        iterator = plain(self)
        moved = before != rng.glance()
        for watch, inside in told:
            watch.started(self, iterator, inside=bool(inside), moved=moved)
        return iterator

    __iter__.plain = plain  # type: ignore[attr-defined]
    return __iter__
