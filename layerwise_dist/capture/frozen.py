# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters: written once, into a base, to which checkpoints refer as long as it holds what the memory holds.

That is decided at each boundary by hashes: of the blocks whose tensors moved or whose version counters rose, and of the
next hundredth of all, as the audit goes round. All are looked at in the first checkpoints after a base's beginning.
What the writer read is held against the same hashes, so a change while a base is written is found, whoever makes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from layerwise_dist.capture.audit import FULL_FIRST, ROUND, share
from layerwise_dist.capture.base_writing import Content, Writing
from layerwise_dist.capture.survey import Survey
from layerwise_dist.errors import DeadlineError
from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.frozen_file import BaseFile
from layerwise_dist.storage.protocols import ShardWriterAdapter
from layerwise_dist.storage.reader import ShardIndex
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.storage.shard_layout import cut_segments
from layerwise_dist.tensors.pieces import Piece
from layerwise_dist.tensors.slices import Slice

log = logging.getLogger("layerwise_dist")


@dataclass
class _Base:
    """What checkpoints refer to now: a file, what it holds, and where that lies in memory."""

    pieces: tuple[Piece, ...]
    parts: list[tuple[Slice, bool]]
    content: Content
    hashes: Sequence[int]
    versions: list[tuple[int, int]]
    addresses: list[int]
    params: frozenset[int]
    report: Callable[[float], BaseReport]
    nbytes: int
    writing: Writing | None = None  # None: another session wrote it
    age: int = 0  # checkpoints that it was looked at for

    @property
    def gone(self) -> bool:
        return self.writing is not None and self.writing.failed


class FrozenBases:
    """This rank's base, from checkpoint to checkpoint. Belongs to the training thread.

    What it no longer refers to it never takes up again: rank 0 removes such files.
    """

    def __init__(self, adapter: ShardWriterAdapter, *, always: bool, timeout_s: float) -> None:
        """`always`: look at everything in every checkpoint. `timeout_s`: the longest wait at a boundary."""
        self._adapter, self._always, self._timeout_s = adapter, always, timeout_s
        self._base: _Base | None = None
        self._restored: tuple[BaseReport, ShardIndex] | None = None  # what may become it
        self._writings: list[Writing] = []
        self._changed: set[str] = set()  # at the last boundary
        self._bytes_written = 0  # of those that are over
        self.written = 0  # bases begun
        self.nbytes = 0  # of the file that the last checkpoint refers to

    # -- what there is ------------------------------------------------------------------------------------------

    @property
    def bytes_written(self) -> int:
        self._forget_those_over()
        return self._bytes_written + sum(writing.bytes_written for writing in self._writings)

    # -- at a boundary ------------------------------------------------------------------------------------------

    def seal(
        self, found: Survey, attempt: AttemptId, *, wait: bool
    ) -> tuple[Callable[[float], BaseReport] | None, set[str]]:
        """What the attempt refers to: a call that waits until it is durable; None if nothing is frozen.

        Begins a new base if there is none that holds what the memory holds. With `wait`, or if what is frozen has
        changed, and so may change again, the boundary waits until that was read. Also returns the names of tensors that
        had changed at two boundaries in a row: they are no base's. Raises OSError.
        """
        if not found.frozen:
            self.forget()
            self.nbytes = 0
            return None, set()
        self._take_up(found)
        changed = self._changes(found) if self._base is not None and not self._base.gone else None
        again = (changed or set()) & self._changed
        self._changed = changed or set()
        if self._base is None or changed is None or changed:
            self.forget()
            self._base = self._begin(found, attempt)
            writing = self._base.writing
            assert writing is not None
            if (wait or changed) and not writing.wait_read(self._timeout_s):
                log.warning(
                    "rank %d: %.1f MiB of frozen parameters are still being written after fence_timeout_s = %g s; "
                    "checkpoints that need them wait in the background",
                    self._adapter.rank, self._base.nbytes / 2**20, self._timeout_s,
                )  # fmt: skip
        self.nbytes = self._base.nbytes
        return self._base.report, again

    def forget(self) -> None:
        """The next checkpoint with frozen parameters writes a new base. What is under way goes on."""
        self._base = self._restored = None

    def restored(self, report: BaseReport, index: ShardIndex) -> None:
        """A base was loaded and verified: the next checkpoint refers to it, if it is all that is frozen then."""
        self._restored = report, index

    # -- at other times -----------------------------------------------------------------------------------------

    @property
    def is_read(self) -> bool:
        """Whether a base that is on its way still reads the model's memory."""
        return not all(writing.wait_read(0) for writing in self._writings)

    def before_update(self, trained: Callable[[], Iterable[ParamView]]) -> None:
        """An update is about to change these: one that was frozen, and is still being written, is waited for."""
        if self._base is None or all(writing.over for writing in self._writings):
            return
        if not self._base.params.isdisjoint(id(view.param) for view in trained()):
            for writing in self._writings:
                writing.wait_read(self._timeout_s)  # in vain: then its checkpoints are aborted, as a lease's are

    def drain(self, timeout_s: float) -> None:
        """Waits until no memory of the model's is read any more. Raises DeadlineError."""
        deadline = time.monotonic() + timeout_s
        for writing in self._writings:
            if not writing.wait_read(max(0.0, deadline - time.monotonic())):
                raise DeadlineError(f"frozen parameters were still being written after {timeout_s:g} s")

    def close(self, timeout_s: float) -> bool:
        """Whether it could be done in time. REQUIRES: every attempt is decided or aborted."""
        deadline = time.monotonic() + timeout_s
        closed = [writing.close(max(0.0, deadline - time.monotonic())) for writing in self._writings]
        self.forget()
        return all(closed)

    # -- inside -------------------------------------------------------------------------------------------------

    def _take_up(self, found: Survey) -> None:
        if self._restored is None:
            return
        (report, index), self._restored = self._restored, None
        places = {entry.slice: entry for entry in index.entries.values()}
        alike = [(entry.slice, entry.wrapped) for entry in index.entries.values()]
        if not index.hashed or set(_parts(found.frozen)) != set(alike):
            return
        spans = sorted(
            (places[piece.slice].begin, places[piece.slice].end, number) for number, piece in enumerate(found.frozen)
        )
        content = Content([p.tensor for p in found.frozen], index.blocks, cut_segments(index.blocks, spans))
        hashes = [hash for hash in index.hashes if hash is not None]
        self._base = self._known(found, content, hashes, lambda timeout_s: report, report.nbytes)

    def _begin(self, found: Survey, attempt: AttemptId) -> _Base:
        assert self._adapter.bases is not None, "without bases, no survey finds anything frozen"
        file = BaseFile(self._adapter.bases, attempt, _parts(found.frozen))
        blocks, segments = file.layout.blocks, file.layout.segments
        tensors = [piece.tensor for piece in found.frozen]
        content = Content(tensors, blocks, segments)
        hashes = [content.hash(block) for block in range(len(content))]
        names = [piece.slice.name for piece in found.frozen]
        writing = Writing(file, Content(tensors, blocks, segments), hashes, names, found.held)
        self._forget_those_over()
        self._writings.append(writing)
        self.written += 1
        log.info(
            "rank %d: base %s is written: %.1f MiB of parameters that no optimizer updates; checkpoints refer to it",
            self._adapter.rank, attempt.text, file.layout.end / 2**20,
        )  # fmt: skip
        base = self._known(found, content, hashes, writing.report, file.layout.end)
        base.writing = writing
        return base

    def _known(
        self, found: Survey, content: Content, hashes: Sequence[int], report: Callable[[float], BaseReport], nbytes: int
    ) -> _Base:
        return _Base(
            found.frozen, _parts(found.frozen), content, hashes, _versions(found), _addresses(found.frozen),
            frozenset(map(id, found.frozen_params)), report, nbytes,
        )  # fmt: skip

    def _changes(self, found: Survey) -> set[str] | None:
        """Names of what is not as the base has it; None if the base is of other tensors."""
        base = self._base
        assert base is not None
        if base.pieces is not found.frozen:
            if base.parts != _parts(found.frozen):
                return None
            base.pieces = found.frozen
            base.content.bind([piece.tensor for piece in found.frozen])
        versions, addresses = _versions(found), _addresses(found.frozen)
        suspect = {
            number
            for number, was in enumerate(zip(base.versions, base.addresses, strict=True))
            if was != (versions[number], addresses[number])
        }
        base.versions, base.addresses = versions, addresses
        blocks = {*base.content.blocks_of(suspect), *self._turn(base)}
        base.age += 1
        changed: set[str] = set()
        for block in blocks:
            if base.content.hash(block) != base.hashes[block]:
                inside = base.content.tensors_of(block)
                names = {found.frozen[number].slice.name for number in inside & suspect or inside}
                if not names <= changed:
                    self._tell(names, seen=bool(inside & suspect))
                changed |= names
        return changed

    def _turn(self, base: _Base) -> Sequence[int]:
        """Which blocks this checkpoint looks at in any case."""
        if self._always or base.age < FULL_FIRST:
            return range(len(base.content))
        on_host = base.content.on_host
        blocks = share([[block] for block, here in enumerate(on_host) if here], base.age - FULL_FIRST)
        if base.age % ROUND == ROUND - 1:
            blocks += [block for block, here in enumerate(on_host) if not here]
        return blocks

    def _tell(self, names: Collection[str], *, seen: bool) -> None:
        """`names` lie in one block; no more is known than that it changed."""
        what = " or ".join(sorted(names)[:3]) + (f" or {len(names) - 3} more" if len(names) > 3 else "")
        if seen:
            log.info("rank %d: %s changed, and no optimizer updates it", self._adapter.rank, what)
        else:
            log.warning(
                "rank %d: %s changed without raising its version counter (through .data or numpy, say), and no "
                "optimizer updates it: checkpoints since its last check may hold the old value",
                self._adapter.rank, what,
            )  # fmt: skip

    def _forget_those_over(self) -> None:
        self._bytes_written += sum(writing.bytes_written for writing in self._writings if writing.over)
        self._writings = [writing for writing in self._writings if not writing.over]


def _parts(pieces: Sequence[Piece]) -> list[tuple[Slice, bool]]:
    return [(piece.slice, piece.wrapped) for piece in pieces]


def _versions(found: Survey) -> list[tuple[int, int]]:
    return [
        (param._version, piece.tensor._version) for param, piece in zip(found.frozen_params, found.frozen, strict=True)
    ]


def _addresses(pieces: Sequence[Piece]) -> list[int]:
    return [piece.tensor.data_ptr() for piece in pieces]
