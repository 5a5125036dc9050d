"""Where a DataLoader stands: told at every draw, written down at a boundary, and reached again after a restart.

A plain `torch.utils.data.DataLoader` has no `state_dict`. What it yields is a function of the random numbers that `iter()` and
the sampler drew, and of how many batches were drawn since. So its position is *counted*:

    {"kind": "counted", "iterating": bool, "draws": batches drawn since iter(),
     "start":  {"rng": RngState, "own": {...}}  just before iter(),
     "first":  the same just before the first draw, or None when equal to what iter() left (RandomSampler seeds itself there),
     "later":  {index: the same} just before later index draws of a sampler that goes on drawing from the global generators,
     "again":  persistent workers that lived before this iter(),
     "now": {"own": {...}, "epochs": {...}}}     own generators and `set_epoch` epochs at the snapshot

and reached again by a replay: the generators set to `start`, `iter()`, the indices (or, where workers or an iterable dataset
hold the position, the batches) skipped, then the global generators as they were before the replay and the own ones to `now`.

torchdata's StatefulDataLoader knows its position: {"kind": "stateful", "iterating", "start", "state": its state_dict() or None
where no iteration is under way, "now"}. Its state_dict leaves its generator out, so the next epoch's order would be wrong
without `now`, which is set after iter() (torchdata 0.11).

What a replay cannot give back is said in `LoaderTap.doubt`, for the caller to warn of.
"""

from __future__ import annotations

import copy
import dis
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.dataloader import _DatasetKind
from torch.utils.data.distributed import DistributedSampler

from layerwise_dist.capture import rng
from layerwise_dist.errors import BoundaryError, MismatchError, UnsupportedError

_FOR_ITER = dis.opmap["FOR_ITER"]
_EXTENDED_ARG = dis.opmap["EXTENDED_ARG"]
_YIELDS_FROM = {dis.opmap[name] for name in ("SEND", "YIELD_FROM") if name in dis.opmap}
_GENERATOR = 0x20  # inspect.CO_GENERATOR

# These draw from the global generators at the first index only, so later draws need no watching.
_DRAW_ONCE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
_LATER_LIMIT = 16  # an RngState is 12 KB in every checkpoint


def drawn_by_for(frame: FrameType | None) -> bool:
    """Is the `__next__` that `frame` is just calling made by a `for`?

    True for `for b in loader`, also through `enumerate`, `zip` and generators that are themselves driven by a `for` (tqdm);
    False for `next(it)` and for `next()` of a generator (`cycle`). `co_code` shows the base opcodes whatever the interpreter has
    specialised or instrumented, and `f_lasti` is a byte offset into it, on CPython 3.10 to 3.14.
    """
    while frame is not None:
        code, at = frame.f_code.co_code, frame.f_lasti
        while code[at] == _EXTENDED_ARG:
            at += 2
        if not frame.f_code.co_flags & _GENERATOR:
            return code[at] == _FOR_ITER
        if code[at] != _FOR_ITER and code[at] not in _YIELDS_FROM:
            return False
        frame = frame.f_back
    return False


@dataclass(eq=False)
class _Position:
    """One `iter(loader)` and how far it has come. The iterator may be gone while this is still wanted."""

    start: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    later: dict[int, dict[str, Any]] = field(default_factory=dict)
    again: bool = False
    left: dict[str, Any] | None = None  # the generators as iter() left them, until the first draw
    replaying: dict[int, dict[str, Any]] = field(default_factory=dict)  # `later` of the snapshot, while it is replayed
    draws: int = 0
    exhausted: bool = False
    by_for: bool = False
    stale: bool = False  # restore() came after iter()
    iterator: weakref.ref[_Drawn] | None = None

    @property
    def alive(self) -> bool:
        return self.iterator is not None and self.iterator() is not None


class _Drawn:
    """The loader's iterator, with every draw told first. Anything else is the iterator's own."""

    __slots__ = ("_inner", "_tap", "_position", "__weakref__")

    def __init__(self, inner: Iterator[Any], tap: LoaderTap, position: _Position) -> None:
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

    The loader yields what it would have yielded. It keeps its identity and attributes; only its `__class__` becomes a subclass
    of the same name, until `detach()`. Only the newest iterator counts, unless it is used up or gone, when an older one that
    is drawn from again counts instead; two live iterators drawn in turn have no one position and are a BoundaryError.

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
                f"loader {name!r}: expected a torch DataLoader or a torchdata StatefulDataLoader, found {type(loader).__qualname__}; "
                "give its state as an object with state_dict() or a dict instead"
            )
        self.loader, self.name, self.on_draw, self.on_iter = loader, name, on_draw, on_iter
        self.doubt: str | None = None
        self._stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._iterable = loader._dataset_kind == _DatasetKind.Iterable
        keeps_state = self._stateful and hasattr(loader.dataset, "state_dict")
        self._watch_data = self._iterable and loader.num_workers == 0 and not keeps_state
        self._current: _Position | None = None
        self._pending: dict[str, Any] | None = None
        self._base = type(loader)
        self._watch_sampler = not self._iterable and not self._stateful and not _draws_once(loader._index_sampler)

        base, weak = self._base, weakref.ref(self)  # a loader in a cycle would leave its workers to the garbage collector

        def __iter__(tapped: DataLoader[Any]) -> Iterator[Any]:
            tap = weak()
            if tap is None or tapped is not tap.loader:  # a copy of the loader is not attached
                return base.__iter__(tapped)
            return tap._iter()

        body = {"__iter__": __iter__, "__module__": self._base.__module__, "__qualname__": self._base.__qualname__, "__doc__": self._base.__doc__}
        loader.__class__ = type(self._base.__name__, (self._base,), body)

    def detach(self) -> None:
        """Give the loader its class back. Iterators that are under way go on, untold."""
        self.loader.__class__ = self._base
        self.on_draw = self.on_iter = None

    # -- what Boundary asks -------------------------------------------------------------------------------------------
    @property
    def position(self) -> object | None:
        """The identity of the iteration that counts; another object after another `iter()`."""
        return self._current

    @property
    def draws(self) -> int:
        """Batches drawn in the iteration that counts (0 before any)."""
        return self._current.draws if self._current is not None else 0

    @property
    def alive(self) -> bool:
        """Does anything still hold the iterator that counts? A `for` lets go of it when it ends, by break too."""
        return self._current is not None and self._current.alive

    @property
    def exhausted(self) -> bool:
        return self._current is None or self._current.exhausted

    @property
    def in_for(self) -> bool:
        """Is a `for` over this loader under way?"""
        return self.alive and not self.exhausted and self._current.by_for  # type: ignore[union-attr]

    # -- state --------------------------------------------------------------------------------------------------------
    def snapshot(self, *, even_if_dropped: bool = False) -> dict[str, Any]:
        """Where the loader stands now, before whatever is drawn next (the layout is in the module's docstring).

        An iterator that nobody holds any more (a `for` left by break) is no iteration under way: the next thing there is a new
        `iter()`. `even_if_dropped` counts it all the same, for the last checkpoint of a job that stopped within an epoch.
        """
        own, at = _own_generators(self.loader), self._current
        now = {"own": {name: each.get_state() for name, each in own.items()}, "epochs": _epochs(self.loader)}
        iterating = at is not None and not at.exhausted and (at.alive or even_if_dropped)
        if self._pending is not None:  # restored and not iterated since: still where the checkpoint was
            return {**self._pending, "now": now}
        if self._stateful:
            state = copy.deepcopy(self.loader.state_dict()) if iterating else None  # type: ignore[attr-defined]
            return {"kind": "stateful", "iterating": iterating, "start": at.start if iterating else None, "state": state, "now": now}
        if not iterating:
            return {"kind": "counted", "iterating": False, "draws": 0, "start": None, "first": None, "later": {}, "again": False, "now": now}
        return {
            "kind": "counted", "iterating": True, "draws": at.draws, "start": at.start, "first": at.first, "later": dict(at.later),
            "again": at.again, "now": now,
        }  # fmt: skip

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Come back to `snapshot`: own generators at once, the position at the next `iter(loader)`.

        Nothing but the training loop may iterate the loader in between, and an iterator made before is refused when drawn.
        Raises MismatchError if the snapshot is of the other kind of loader or of other generators.
        """
        kind = "stateful" if self._stateful else "counted"
        if snapshot["kind"] != kind:
            raise MismatchError(f"loader {self.name!r} is a {type(self.loader).__name__} (kind {kind}), the checkpoint holds kind {snapshot['kind']}")
        self._put_own(snapshot["now"]["own"])
        for name, epoch in snapshot["now"]["epochs"].items():
            sampler = _samplers(self.loader).get(name)
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        if self._current is not None:
            self._current.stale = True
        self._current = None
        self._pending = snapshot if snapshot["iterating"] else None

    # -- iterating ----------------------------------------------------------------------------------------------------
    def _iter(self) -> Iterator[Any]:
        if self.on_iter is not None:
            self.on_iter(self)
        snapshot, self._pending = self._pending, None
        position = _Position()
        if snapshot is not None:
            before = rng.take()
            inner = self._replay(snapshot, position)
            self._put_own(snapshot["now"]["own"])
            rng.put(before)
        else:
            position.start = self._generators()
            position.again = self._has_persistent_workers()
            inner = self._open(position)
            if self.loader.num_workers == 0:
                position.left = self._generators()
        if position.again:
            self.doubt = "persistent workers keep their random state from epoch to epoch, and only this epoch's can be replayed"
        drawn = _Drawn(inner, self, position)
        position.iterator = weakref.ref(drawn)
        self._current = position
        return drawn

    def _open(self, position: _Position) -> Iterator[Any]:
        inner = self._base.__iter__(self.loader)
        if self._stateful:
            if self.loader.num_workers > 0:
                self.doubt = "a StatefulDataLoader does not restore the random state inside its workers"
        elif self._watch_sampler and hasattr(inner, "_next_index"):
            self._watch(inner, position)
        return inner

    def _draw(self, inner: Iterator[Any], position: _Position, by_for: bool) -> Any:
        if position.stale:
            raise BoundaryError(f"loader {self.name!r} is drawn from an iterator made before restore(); call iter(loader) after restore()")
        newest = self._current
        if position is not newest and newest is not None:
            if newest.alive and newest.draws and not newest.exhausted:
                raise BoundaryError(f"loader {self.name!r} has two live iterators that are drawn in turn, so it has no one position: give each its own loader")
            self._current = position
        position.by_for = by_for
        if self.on_draw is not None:
            self.on_draw(self, by_for)
        if position.left is not None:
            here, left, position.left = self._generators(), position.left, None
            position.first = None if _same(here, left) else here
            if self._stateful and position.first is not None and not self._own_order():
                self.doubt = "random numbers were drawn between iter() and the first batch, and its sampler has no state_dict()"
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
            self.doubt = "its iterable dataset draws from the global generators; what it remembers of earlier draws (a shuffle buffer) is replayed with others"
        return batch

    def _watch(self, inner: Any, position: _Position) -> None:
        """Note the generators before each later index draw that moves the global ones (an endless sampler's next permutation)."""
        next_index, weak, numbers = type(inner)._next_index, weakref.ref(inner), itertools.count(getattr(inner, "_send_idx", 0))  # workers' first ones are drawn

        def watched() -> Any:
            number = next(numbers)
            if number in position.replaying:
                self._put(position.replaying[number])
            before = self._generators()
            index = next_index(weak())
            if number and not rng.same(before["rng"], rng.take()):
                if len(position.later) < _LATER_LIMIT:
                    position.later[number] = before
                else:
                    self.doubt = f"its sampler drew from the global generators more than {_LATER_LIMIT} times since iter(); give it a generator of its own"
            return index

        inner._next_index = watched

    # -- coming back --------------------------------------------------------------------------------------------------
    def _replay(self, snapshot: dict[str, Any], position: _Position) -> Iterator[Any]:
        position.start = snapshot["start"]
        if self._stateful:
            self._put(snapshot["start"])
            self.loader.load_state_dict(copy.deepcopy(snapshot["state"]))  # type: ignore[attr-defined]
            inner: Any = self._open(position)
            pending = getattr(inner, "_sampler_iter", None)
            if isinstance(pending, itertools.islice):  # torchdata would skip at the first draw, with the generators of then
                inner._sampler_iter = itertools.chain(list(itertools.islice(pending, 1)), pending)
            return inner
        position.first, position.again = snapshot["first"], snapshot["again"]
        if position.again and not self._has_persistent_workers():
            self._base.__iter__(self.loader)  # so that the iter() below resets workers, as the one of then did
        self._put(snapshot["start"])
        inner = self._open(position)
        if position.first is not None:
            self._put(position.first)
        elif not snapshot["draws"] and self.loader.num_workers == 0:
            position.left = self._generators()
        position.replaying = snapshot["later"]
        by_index = self.loader.num_workers == 0 and not self._iterable and hasattr(inner, "_next_index")
        for number in range(snapshot["draws"]):
            try:
                inner._next_index() if by_index else next(inner)
            except StopIteration:
                raise MismatchError(
                    f"loader {self.name!r} ended after {number} batches, the checkpoint was taken after {snapshot['draws']}: other data or another batch size"
                ) from None
        if by_index:
            inner._num_yielded = snapshot["draws"]
        position.draws, position.replaying = snapshot["draws"], {}
        return inner

    def _own_order(self) -> bool:
        """Does the order come from the sampler's own generator or from none at all?"""
        sampler = self.loader.sampler
        return isinstance(sampler, (SequentialSampler, DistributedSampler)) or getattr(sampler, "generator", None) is not None

    def _has_persistent_workers(self) -> bool:
        return self.loader.persistent_workers and self.loader.num_workers > 0 and self.loader._iterator is not None

    def _generators(self) -> dict[str, Any]:
        return {"rng": rng.take(), "own": {name: each.get_state() for name, each in _own_generators(self.loader).items()}}

    def _put(self, state: dict[str, Any]) -> None:
        rng.put(state["rng"])
        self._put_own(state["own"])

    def _put_own(self, states: dict[str, torch.Tensor]) -> None:
        own = _own_generators(self.loader)
        if own.keys() != states.keys():
            raise MismatchError(f"loader {self.name!r} has generators {sorted(own)}, the checkpoint's had {sorted(states)}")
        for name, state in states.items():
            own[name].set_state(state)


def _samplers(loader: DataLoader[Any]) -> dict[str, Any]:
    """Everything that decides the order, by where it sits in the loader."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    return {"loader": loader, "sampler": loader.sampler, "batch_sampler": loader.batch_sampler, "batch_sampler.sampler": inner}


def _own_generators(loader: DataLoader[Any]) -> dict[str, torch.Generator]:
    found: dict[str, torch.Generator] = {}
    for name, owner in _samplers(loader).items():
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not each for each in found.values()):
            found[name] = generator
    return found


def _epochs(loader: DataLoader[Any]) -> dict[str, int]:
    owners = _samplers(loader).items()
    return {name: owner.epoch for name, owner in owners if hasattr(owner, "set_epoch") and isinstance(getattr(owner, "epoch", None), int)}


def _draws_once(sampler: Any) -> bool:
    if type(sampler) is BatchSampler:
        return type(sampler.sampler) in _DRAW_ONCE
    return type(sampler) in _DRAW_ONCE


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return rng.same(one["rng"], other["rng"]) and all(torch.equal(state, other["own"][name]) for name, state in one["own"].items())
