# SPDX-License-Identifier: Apache-2.0
"""One iteration of a DataLoader: who draws, and how far it is."""

from __future__ import annotations

import dis
import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from layerwise_dist.loop.sealed import GeneratorStates

_FOR_ITER = dis.opmap["FOR_ITER"]
_EXTENDED_ARG = dis.opmap["EXTENDED_ARG"]
_YIELDS_FROM = {dis.opmap[name] for name in ("SEND", "YIELD_FROM") if name in dis.opmap}
_GENERATOR = 0x20  # inspect.CO_GENERATOR


def drawn_by_for(frame: FrameType | None) -> bool:
    """Is the `__next__` that `frame` is just calling made by a `for`?

    True for `for b in loader`, also through `enumerate`, `zip` and generators that are themselves driven by a `for`
    (tqdm); False for `next(it)` and for `next()` of a generator (`cycle`). `co_code` shows the base opcodes whatever
    the interpreter has specialized or instrumented, and `f_lasti` is a byte offset into it, on CPython 3.10 to 3.14.
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
class Position:
    """One `iter(loader)` and how far it has come. The iterator may be gone while this is still wanted."""

    start: GeneratorStates | None = None
    first: GeneratorStates | None = None
    later: dict[int, GeneratorStates] = field(default_factory=dict)
    again: bool = False
    left: GeneratorStates | None = None  # the generators as iter() left them, until the first draw
    replaying: dict[int, GeneratorStates] = field(default_factory=dict)  # `later` of the snapshot, while it is replayed
    draws: int = 0
    begin: int = 0  # of its ElasticDistributedSampler, if it has one
    exhausted: bool = False
    by_for: bool = False
    stale: bool = False  # restore() came after iter()
    iterator: weakref.ref[Any] | None = None

    @property
    def alive(self) -> bool:
        return self.iterator is not None and self.iterator() is not None

    @property
    def under_way(self) -> bool:
        return self.alive and not self.exhausted
