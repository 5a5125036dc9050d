# SPDX-License-Identifier: Apache-2.0
"""A DataLoader's position: counted at every draw, saved at a boundary, and reached again after a restart.

A plain `torch.utils.data.DataLoader` has no `state_dict`. What it yields is a function of the random numbers that
`iter()` and the sampler drew, and of how many batches were drawn since. So its position is *counted*:

    {"kind": "counted", "iterating": bool, "draws": batches drawn since iter(),
     "start":  {"rng": RngState, "own": {...}}  just before iter(),
     "first":  the same just before the first draw, or None when equal to what iter() left (RandomSampler seeds itself
     there), "later":  {index: the same} just before later index draws of a sampler that goes on drawing from the global
     generators, "again":  persistent workers that lived before this iter(), "now": {"own": {...}, "epochs": {...}}}
     own generators and `set_epoch` epochs at the snapshot

and reached again by a replay: the generators set to `start`, `iter()`, the indices (or, where workers or an iterable
dataset hold the position, the batches) skipped, then the global generators as they were before the replay and the own
ones to `now`.

torchdata's StatefulDataLoader knows its position: {"kind": "stateful", "iterating", "start", "state": its state_dict()
or None where no iteration is under way, "now"}. Its state_dict leaves its generator out, so the next epoch's order
would be wrong without `now`, which is set after iter() (torchdata 0.11).

Either has `replicas` where a DistributedSampler deals out the epoch, and `elastic` where an ElasticDistributedSampler
does (`elastic.py`).

What a replay cannot give back is said in `LoaderTap.doubt`, for the caller to warn of.
"""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from layerwise_dist.errors import BoundaryError, MismatchError, UnsupportedError
from layerwise_dist.frameworks.private_names import require
from layerwise_dist.loop import rng
from layerwise_dist.loop.elastic import Elastic
from layerwise_dist.loop.generators import Generators, draws_once, epochs, same, samplers
from layerwise_dist.loop.position import Position, drawn_by_for
from layerwise_dist.loop.sealed import LoaderNow, LoaderState
from layerwise_dist.loop.tapped_class import check_class, doubt_of, tell_iterations

_LATER_LIMIT = 16  # an RngState is 12 KB in every checkpoint


class _Drawn:
    """The loader's iterator, with every draw told first. Anything else is the iterator's own."""

    __slots__ = ("_inner", "_tap", "_position", "__weakref__")

    def __init__(self, inner: Iterator[Any], tap: LoaderTap, position: Position) -> None:
        self._inner, self._tap, self._position = inner, tap, position

    def __iter__(self) -> _Drawn:
        return self

    def __next__(self) -> Any:
        return self._tap._draw(self._inner, self._position, drawn_by_for(sys._getframe(1)))

    def __len__(self) -> int:
        return len(self._inner)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name in self.__slots__:  # not set: an instance made by copying, which torch refuses too
            raise AttributeError(name)
        return getattr(self._inner, name)


class LoaderTap:
    """Attached to one DataLoader: tells of each draw before it is made, and knows how to come back to it.

    The loader yields what it would have yielded. It keeps its identity and attributes; only its `__class__` becomes a
    subclass of the same name, until `detach()`. Only the newest iterator counts, unless it is used up or gone, when an
    older one that is drawn from again counts instead; two live iterators drawn in turn have no one position and are a
    BoundaryError.

    Args:
        loader: the DataLoader, or StatefulDataLoader, to attach to.
        name: how snapshots and messages call it.
        on_draw: called as `on_draw(tap, by_for)` before each draw, the one that ends in StopIteration included.
        on_iter: called as `on_iter(tap)` before `iter(loader)` does anything.

    `Boundary` fills in whichever callback is None. Raises UnsupportedError for anything that is not a DataLoader.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        name: str,
        on_draw: Callable[[LoaderTap, bool], None] | None = None,
        on_iter: Callable[[LoaderTap], None] | None = None,
    ) -> None:
        if not isinstance(loader, DataLoader):
            raise UnsupportedError(
                f"loader {name!r}: expected a torch DataLoader or a torchdata StatefulDataLoader, found "
                f"{type(loader).__qualname__}; "
                "give its state as an object with state_dict() or a dict instead"
            )
        check_class(loader, name)
        require("a DataLoader")
        from torch.utils.data.dataloader import _DatasetKind  # private: not at our import

        self.loader, self.name, self.on_draw, self.on_iter = loader, name, on_draw, on_iter
        self.doubt: str | None = None
        self._generators, self._elastic = Generators(loader, name), Elastic(loader, name)
        self._stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._iterable = loader._dataset_kind == _DatasetKind.Iterable
        keeps_state = self._stateful and hasattr(loader.dataset, "state_dict")
        self._watch_data = self._iterable and loader.num_workers == 0 and not keeps_state
        self._current: Position | None = None
        self._fed: Position | None = None  # the last one that training drew from
        self._pending: LoaderState | None = None
        self._base = type(loader)
        self._watch_sampler = not self._iterable and not self._stateful and not draws_once(loader._index_sampler)

        tell_iterations(loader, name, weakref.ref(self))
        self.doubt = doubt_of(self._base)

    def detach(self) -> None:
        """Give the loader its class back. Iterators that are under way go on, untold."""
        self.loader.__class__ = self._base
        self.on_draw = self.on_iter = None

    # -- what Boundary asks -------------------------------------------------------------------------------------------
    @property
    def position(self) -> object | None:
        """The identity of the iteration that counts; another object after another `iter()`."""
        return self._counts

    @property
    def draws(self) -> int:
        """Batches drawn in the iteration that counts (0 before any)."""
        return self._counts.draws if self._counts is not None else 0

    @property
    def alive(self) -> bool:
        """Does anything still hold the iterator that counts? A `for` lets go of it when it ends, by break too."""
        return self._counts is not None and self._counts.alive

    @property
    def exhausted(self) -> bool:
        return self._counts is None or self._counts.exhausted

    @property
    def in_for(self) -> bool:
        """Is a `for` over this loader under way?"""
        return self._counts is not None and self._counts.under_way and self._counts.by_for

    @property
    def aside(self) -> bool:
        """Is the newest iterator an evaluation's, while the one that training draws from waits?"""
        return self._fed is not None and self._fed is not self._current and self._fed.under_way

    def feeds(self) -> None:
        """Training has drawn from the iterator that counts."""
        self._fed = self._counts

    @property
    def _counts(self) -> Position | None:
        over = self._current is None or not self._current.under_way
        return self._fed if over and self._fed is not None and self._fed.under_way else self._current

    # -- state --------------------------------------------------------------------------------------------------------
    def snapshot(self, *, even_if_dropped: bool = False) -> LoaderState:
        """Where the loader stands now, before whatever is drawn next (the layout is in the module's docstring).

        An iterator that nobody holds any more (a `for` left by break) is no iteration under way: the next thing there
        is a new `iter()`. `even_if_dropped` counts it all the same, for the last checkpoint of a job that stopped
        within an epoch.
        """
        at = self._counts
        now: LoaderNow = {"own": self._generators.take_own(), "epochs": epochs(self.loader)}
        iterating = at is not None and not at.exhausted and (at.alive or even_if_dropped)
        self._drop_what_is_left()
        if self._pending is not None:  # restored and not iterated since: still where the checkpoint was
            pending = self._pending.copy()
            pending["now"] = now
            return pending
        position = at if iterating and at is not None else Position()
        snapshot: LoaderState
        if self._stateful:
            state = copy.deepcopy(self.loader.state_dict()) if iterating else None  # type: ignore[attr-defined]
            snapshot = {"kind": "stateful", "iterating": iterating, "start": position.start, "state": state, "now": now}
        else:
            snapshot = self._counted(iterating, position, now)
        self._elastic.seal(snapshot, position.begin if iterating else self._elastic.begin, position.draws)
        return snapshot

    def _counted(self, iterating: bool, position: Position, now: LoaderNow) -> LoaderState:
        return {
            "kind": "counted",
            "iterating": iterating,
            "draws": position.draws,
            "start": position.start,
            "first": position.first,
            "later": dict(position.later),
            "again": position.again,
            "now": now,
        }

    def check(self, snapshot: LoaderState) -> None:
        """Raises MismatchError if the snapshot is of the other kind of loader, of other generators, or within an order
        that is not this loader's (`Elastic.check`).
        """
        kind = "stateful" if self._stateful else "counted"
        if snapshot["kind"] != kind:
            raise MismatchError(
                f"loader {self.name!r} is a {type(self.loader).__name__} (kind {kind}), "
                f"the checkpoint holds kind {snapshot['kind']}"
            )
        self._generators.check_own(snapshot["now"]["own"])
        self._elastic.check(snapshot)

    def restore(self, snapshot: LoaderState) -> None:
        """Come back to `snapshot`: own generators at once, the position at the next `iter(loader)`.

        Nothing but the training loop may iterate the loader in between, and an iterator made before is refused when
        drawn. Raises MismatchError as `check`.
        """
        self.check(snapshot)
        snapshot = self._elastic.fitted(snapshot)
        self._generators.put_own(snapshot["now"]["own"])
        for name, epoch in snapshot["now"]["epochs"].items():
            sampler = samplers(self.loader).get(name)
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        self._elastic.start(snapshot)
        for position in (self._current, self._fed):
            if position is not None:
                position.stale = True
        self._current = self._fed = None
        self._pending = snapshot if snapshot["iterating"] else None

    def _drop_what_is_left(self) -> None:
        """Of an epoch that the checkpoint stood in, where the script has gone on to another one."""
        if self._pending is not None and self._elastic.gone_on(self._pending):
            self.doubt = self._elastic.lost(self._pending) or self.doubt
            self._pending = None

    # -- iterating ----------------------------------------------------------------------------------------------------
    def iterate(self) -> Iterator[Any]:
        """What `iter(loader)` does."""
        if self.on_iter is not None:
            self.on_iter(self)
        self._drop_what_is_left()
        snapshot, self._pending = self._pending, None
        position = Position()
        if snapshot is not None:
            before = rng.take()
            inner = self._replay(snapshot, position)
            self._generators.put_own(snapshot["now"]["own"])
            rng.put(before)
        else:
            position.start, position.begin = self._generators.take(), self._elastic.begin
            position.again = self._has_persistent_workers()
            inner = self._open(position)
            if self.loader.num_workers == 0:
                position.left = self._generators.take()
        if position.again:
            self.doubt = (
                "persistent workers keep their random state from epoch to epoch, and only this epoch's can be replayed"
            )
        drawn = _Drawn(inner, self, position)
        position.iterator = weakref.ref(drawn)
        self._current = position
        return drawn

    def _open(self, position: Position) -> Iterator[Any]:
        inner = self._base.__iter__(self.loader)
        if self._stateful:
            if self.loader.num_workers > 0:
                self.doubt = "a StatefulDataLoader does not restore the random state inside its workers"
        elif self._watch_sampler and hasattr(inner, "_next_index"):
            self._watch(inner, position)
        return inner

    def _draw(self, inner: Iterator[Any], position: Position, by_for: bool) -> Any:
        if position.stale:
            raise BoundaryError(
                f"loader {self.name!r} is drawn from an iterator made before restore(): call iter(loader) after it"
            )
        newest = self._current
        if position is not newest and newest is not None:
            if newest.alive and newest.draws and not newest.exhausted:
                raise BoundaryError(
                    f"loader {self.name!r} has two live iterators, drawn from in turn, so it has no single position: "
                    "give each its own loader"
                )
            self._current = position
        position.by_for = by_for
        if self.on_draw is not None:
            self.on_draw(self, by_for)
        if position.left is not None:
            here, left, position.left = self._generators.take(), position.left, None
            position.first = None if same(here, left) else here
            if self._stateful and position.first is not None and not self._generators.own_order:
                self.doubt = (
                    "random numbers were drawn between iter() and the first batch, and its sampler has no state_dict()"
                )
        watch = rng.glance() if self._watch_data and position.draws and self.doubt is None else None
        try:
            batch = next(inner)
        except StopIteration:
            position.exhausted = True
            raise
        except BaseException:
            position.draws += 1  # the index is spent, whatever became of the batch
            raise
        position.draws += 1
        if watch is not None and watch != rng.glance():
            self.doubt = (
                "its iterable dataset draws from the global generators, and what it remembers of earlier draws "
                "(a shuffle buffer) is replayed with other numbers"
            )
        return batch

    def _watch(self, inner: Any, position: Position) -> None:
        """Note the generators before a later index draw that moves the global ones (an endless sampler's next one)."""
        next_index, weak = type(inner)._next_index, weakref.ref(inner)  # no cycle: workers end with their iterator
        numbers = itertools.count(getattr(inner, "_send_idx", 0))  # workers are given their first indices by iter()

        def watched() -> Any:
            number = next(numbers)
            if number in position.replaying:
                self._generators.put(position.replaying[number])
            before = self._generators.take()
            index = next_index(weak())
            if number and not rng.same(before["rng"], rng.take()):
                if len(position.later) < _LATER_LIMIT:
                    position.later[number] = before
                else:
                    self.doubt = (
                        f"its sampler drew from the global generators more than {_LATER_LIMIT} times since iter(): "
                        "give it a generator of its own"
                    )
            return index

        inner._next_index = watched

    # -- coming back --------------------------------------------------------------------------------------------------
    def _replay(self, snapshot: LoaderState, position: Position) -> Iterator[Any]:
        start = position.start = snapshot["start"]
        assert start is not None, "an iteration that is under way has begun"
        if snapshot["kind"] == "stateful":
            self._generators.put(start)
            position.begin = self._elastic.start(snapshot)
            if snapshot["state"] is not None:  # else nothing was drawn since `begin`
                self.loader.load_state_dict(copy.deepcopy(snapshot["state"]))  # type: ignore[attr-defined]
                position.draws = snapshot["elastic"]["draws"] if "elastic" in snapshot else 0
            inner: Any = self._open(position)
            pending = getattr(inner, "_sampler_iter", None)
            if isinstance(pending, itertools.islice):  # it would skip at the first draw, with the generators of then
                inner._sampler_iter = itertools.chain(list(itertools.islice(pending, 1)), pending)
            return inner
        position.first, position.again = snapshot["first"], snapshot["again"]
        if position.again and not self._has_persistent_workers():
            self._base.__iter__(self.loader)  # so that the iter() below resets workers, as the one of then did
        self._generators.put(start)
        position.begin = self._elastic.start(snapshot)
        inner = self._open(position)
        if position.first is not None:
            self._generators.put(position.first)
        elif not snapshot["draws"] and self.loader.num_workers == 0:
            position.left = self._generators.take()
        position.replaying = snapshot["later"]
        by_index = self.loader.num_workers == 0 and not self._iterable and hasattr(inner, "_next_index")
        for number in range(snapshot["draws"]):
            try:
                inner._next_index() if by_index else next(inner)
            except StopIteration:
                raise MismatchError(
                    f"loader {self.name!r} ended after {number} batches, the checkpoint was taken after "
                    f"{snapshot['draws']}: other data or another batch size"
                ) from None
        position.draws, position.replaying = snapshot["draws"], {}
        return inner

    def _has_persistent_workers(self) -> bool:
        return self.loader.persistent_workers and self.loader.num_workers > 0 and self.loader._iterator is not None
