# SPDX-License-Identifier: Apache-2.0
"""One checkpoint's capture on one rank: batch by batch after the update, sealed at the boundary, fenced before the
next.
"""

from __future__ import annotations

import array
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby

import torch

from layerwise_dist import _native
from layerwise_dist.capture.audit import Audit, Look, LookBack
from layerwise_dist.capture.held import MemoryGone, check_present
from layerwise_dist.capture.stage import Handover, Stage, Wait, lay_views
from layerwise_dist.capture.survey import Survey
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.storage.gathered import GatheredExtent
from layerwise_dist.storage.protocols import InPlaceWrite, ShardWrite
from layerwise_dist.storage.shard_layout import ALIGN
from layerwise_dist.tensors.words import NO_VERSION, versions


class LeaseBroken(LayerwiseError):
    """Captured memory is no longer what the checkpoint needs; this attempt cannot be saved. The message says why."""


class Capture:
    """Leases or stages every batch. Holds its survey, and with it the memory that is leased, until nothing is read any
    more.

    Life: `take` for each batch right after its update, and again after a further update of the same iteration; `seal`
    at the boundary; `settle` whenever the engine is entered; `fence` before the next update, of all or batch by batch;
    these on the training thread. `confirm` waits for them on another one.

    `gathered` are the extents that are written out of one buffer, by number: the survey's staged batches, and what is
    copied at the boundary. `bytes_staged` and `bytes_sealed` count what went into those two.
    """

    def __init__(
        self, step: int, survey: Survey, write: ShardWrite, audit: Audit, stage: Stage,
        gathered: Mapping[int, GatheredExtent], *, timeout_s: float, verdict_wanted: Callable[[], None],
        look: Look | None = None,
    ) -> None:  # fmt: skip
        """`timeout_s`: the longest wait for the disk before memory is overwritten or captured again.

        `look`: at all of it, begun since the update. REQUIRES: then all of it is taken before anything changes.

        `verdict_wanted()` is called once all is written, if the training thread has not judged it by then.
        Raises MemoryGone for what is not mapped.
        """
        self.step, self.write, self.survey = step, write, survey
        self._audit, self._stage, self._gathered = audit, stage, gathered
        self._timeout_s, self._verdict_wanted = timeout_s, verdict_wanted
        self._handover = Handover()
        self._fences: dict[int, list[Wait]] = {}
        self._sealed: torch.Tensor | None = None
        self._look = look  # on its way: that of the update, or of the boundary
        self._back = LookBack(awaited=audit.in_place(survey))
        self._versions = array.array("Q", [NO_VERSION]) * len(survey.tensors)
        self._staging = bool(survey.staged_bytes)  # whether a change could still get into what is staged
        self._unjudged = set(range(len(survey.batches)))
        self._certain = False  # all of it was compared after it was written
        self._settled = threading.Event()
        self._verdict: str | None = None
        self.bytes_staged = self.bytes_sealed = 0
        # Gathered extents get their memory when there is something in it.
        others = len(survey.copied) + len(gathered)
        try:
            write.set_addresses(survey.addresses + [0] * others, keeping=self)
        except ValueError as error:
            raise MemoryGone(f"{error}: a tensor that is not where it says") from error

    def take(self, batches: Collection[int]) -> None:
        """Captures these batches as they are now. REQUIRES: nothing of them is queued (`drain`).

        Raises StageError.
        """
        tensors, pieces_of = self.survey.tensors, self.survey.pieces_of
        for first, count in _runs(batches):
            begin, end = pieces_of[first].start, pieces_of[first + count - 1].stop
            self._versions[begin:end] = versions(tensors[begin:end])
        look = self._begun_look(batches)
        for first, count in self._leased_runs(batches):
            self._in_place.submit(first, count)
        self._audit.note_leased(look)
        self._stage_batches(number for number in batches if self.survey.batches[number].staged)

    def take_all(self) -> None:
        """Captures every batch again."""
        self.take(range(len(self.survey.batches)))

    def drain(self) -> None:
        """Waits until all that was queued is written and hashed. Raises LeaseBroken or StageError."""
        if not self.wait_read(self._timeout_s):
            raise self._too_slow()

    def wait_read(self, timeout_s: float) -> bool:
        """Whether, within the time, all that was queued is written and hashed. Raises StageError."""
        deadline = time.monotonic() + timeout_s
        return self._handover.wait(timeout_s) and self.write.wait_written(max(0.0, deadline - time.monotonic()))

    def fits(self, survey: Survey) -> bool:
        """Whether what there is lies where it did when the capture was opened, so that it can be sealed.

        Addresses are asked beside the key, which has none of what is staged: a new tensor in the place of one that was
        copied from holds something else.
        """
        return survey is self.survey or (survey.key == self.survey.key and survey.addresses == self.survey.addresses)

    def leave(self) -> None:
        """Before another capture writes the attempt: waits until nothing is being staged. Raises LeaseBroken or
        StageError.
        """
        if not self._handover.wait(self._timeout_s):
            raise self._too_slow()

    def sealing(self) -> None:
        """The boundary is here: what is audited is read again beside what comes before `seal`.

        REQUIRES: nothing changes until then.
        """
        self._look = self._audit.look(self.survey)

    def seal(self, survey: Survey) -> set[str]:
        """Brings the capture to the boundary's contents; `survey` is the boundary's own. REQUIRES: `fits(survey)`.

        What was changed since the update (a clamp of the weights, say) is captured again, and what is in no batch is
        copied. Returns the names of tensors that changed in a way only the audit saw. Raises LeaseBroken or StageError.
        """
        moved = self._moved()
        if self._audit.staged(self.survey) and not self._handover.wait(self._timeout_s):
            raise self._too_slow()
        look = self._begun_look()
        unseen = self._audit.changed_since_staged(self.survey) | self._audit.changed(look)
        unseen.difference_update(moved)
        if moved or unseen:
            self.drain()
            self.take({self.survey.batch_of[number] for number in unseen.union(moved)})
        self._copy_rest(survey)
        # What an audited checkpoint holds is certain if all is written by now: nothing changes it any more. On a disk
        # that is too slow for that it is compared once more when its lease ends, as any other.
        if self._audit.awaited:
            with self._audit.spent:
                self._certain = self.wait_read(self._timeout_s)
        # What is over by now is judged now: the job may end without coming here again.
        if self.write.leases_over():
            self._back.end()
        self.settle()
        return self._names(unseen)

    @property
    def certain(self) -> bool:
        """Whether all of it was read again, and written before the boundary was over."""
        return self._certain

    @property
    def unjudged(self) -> frozenset[int]:
        """Numbers of the survey's batches that may have been changed too early; not checked yet."""
        return frozenset(self._unjudged)

    @property
    def settled(self) -> bool:
        """Whether the lease is judged."""
        return self._settled.is_set()

    @property
    def over(self) -> bool:
        """Whether no fence has anything to do any more. At a certain one it looks again before each batch changes."""
        return self._settled.is_set() and (not self._certain or not self._unjudged)

    def settle(self) -> set[str]:
        """Judges the capture, if no more of the tensors' memory is needed by now. On the training thread only.

        A version counter rises when an in-place operation returns. Looked at from another thread it could be looked at
        within one, with half of the change already read; on the thread that makes the changes it tells of all of them.

        Returns the names of tensors that changed in a way only the audit saw, which ends the attempt.
        """
        if self._settled.is_set() or not self._handover.done:
            return set()
        if self._staging and not self._broken(self._moved()):
            self._staging = False
        if self._settled.is_set() or not self.write.leases_over():
            return set()
        if not self._certain and self._back.awaited:
            return set()  # the persisting thread looks, and asks for the verdict then
        return self._judge(self._unjudged)

    def confirm(self, timeout_s: float) -> None:
        """Waits for the training thread's verdict, and until all that was staged is given to the writer.

        Called on the persisting thread before the header is written. Raises LeaseBroken if what was read had changed,
        StageError if something could not be staged.
        """
        deadline = time.monotonic() + timeout_s
        if not self._handover.wait(timeout_s):
            raise LeaseBroken(f"copies of device memory were still being made after {timeout_s:g} s")
        if not self._settled.is_set():
            # Nothing is read any more, so whatever changes from now on changes nothing that was written.
            self._back.look(lambda: self._audit.changed_by_now(self.survey) if self.write.leases_over() else None)
            self._verdict_wanted()
        if not self._settled.wait(max(0.0, deadline - time.monotonic())):
            raise LeaseBroken(
                f"for {timeout_s:g} s after its boundary the training thread neither ran the model nor called the "
                "engine, and only that thread can confirm that the parameters did not change; call wait() or close()"
            )
        if self._verdict:
            raise LeaseBroken(self._verdict)

    def fence(self, layers: Collection[str] | None = None) -> set[str]:
        """Ends the capture's need of memory that is overwritten next, or the attempt if that takes too long.

        With `layers`, only of the batches that these are in. What is not written yet is copied away as far as the pool
        has room, and the rest is waited for.
        Returns the names of tensors that changed since the boundary in a way only the audit saw.
        """
        batches = self._unjudged & (self._unjudged if layers is None else self.survey.batches_with(layers))
        if not batches and (self._unjudged or self._settled.is_set()):
            return set()  # and not where all is copied at the boundary: that is judged by the first fence
        unseen: set[str] = set()
        try:
            self._free_memory(batches)
            unseen = self._judge(batches)
        except LayerwiseError as broken:
            self.give_up(str(broken))
        except BaseException as error:  # nobody comes back for a verdict
            self.give_up(f"it could not be judged: {error}")
            raise
        if self._certain:
            unseen = self._names(self._changed(batches).difference(self._moved()))
        self._unjudged -= batches
        return unseen

    def give_up(self, reason: str) -> None:
        """Ends the attempt, unless it is judged already."""
        if not self._settled.is_set():
            self._verdict = reason
            self._settled.set()

    # -- inside -------------------------------------------------------------------------------------------------

    @property
    def _in_place(self) -> InPlaceWrite:
        """REQUIRES: something is leased."""
        assert self.write.in_place is not None, "where all lies in the pool, nothing is leased"
        return self.write.in_place

    def _begun_look(self, batches: Collection[int] | None = None) -> Look:
        """The one that is on its way, or else one at all batches, or these."""
        look, self._look = self._look or self._audit.look(self.survey, batches), None
        return look

    def _leased_runs(self, batches: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Leased ones of these batches that follow one another in the file, as (first, count)."""
        return _runs(number for number in batches if not self.survey.batches[number].staged)

    def _stage_batches(self, numbers: Iterable[int]) -> None:
        deadline = time.monotonic() + self._timeout_s
        for number in numbers:
            extent = self._gathered[number]
            if extent.nbytes:
                self._check_present(number)
                self._fences.setdefault(number, []).extend(
                    self._stage.copy(
                        extent, self.survey.tensors, partial(self._give, number), self._handover, deadline
                    )
                )  # fmt: skip
                self.bytes_staged += self.survey.batches[number].nbytes

    def _check_present(self, number: int) -> None:
        """Of a staged batch, which nothing holds: what the survey has not seen since may have moved, or gone."""
        survey = self.survey
        for piece in survey.pieces_of[number]:
            if survey.tensors[piece].data_ptr() != survey.addresses[piece]:
                check_present(survey.pieces[piece].slice.name, survey.tensors[piece])

    def _give(self, number: int, buffer: _native.PoolBuffer) -> None:
        """A batch is complete in the pool. On the training thread or the stage's own."""
        extent = self._gathered[number]
        for piece, offset in extent.places:
            self._audit.note(piece, buffer.address + offset)
        self.write.submit_gathered(number, extent.tensor, buffer)

    def _copy_rest(self, survey: Survey) -> None:
        number = len(survey.batches)
        extent = self._gathered[number]
        if not extent.nbytes:
            return
        self.bytes_sealed += sum(piece.slice.nbytes for piece in survey.copied)
        if (in_place := self.write.in_place) is None:
            buffer = self._stage.room(extent.nbytes, time.monotonic() + self._timeout_s)
            _lay_rest(torch.frombuffer(buffer, dtype=torch.uint8, count=extent.nbytes), extent, survey)
            self.write.submit_gathered(number, extent.tensor, buffer)
            return
        memory = torch.empty(extent.nbytes + ALIGN, dtype=torch.uint8, device="cpu")
        begin = -memory.data_ptr() % ALIGN
        self._sealed = memory[begin : begin + extent.nbytes]
        _lay_rest(self._sealed, extent, survey)
        in_place.set_address(extent.tensor, self._sealed.data_ptr())
        in_place.submit(number, 1)

    def _free_memory(self, batches: Collection[int]) -> None:
        for number in batches:
            for wait in self._fences.pop(number, ()):
                wait()
        deadline = time.monotonic() + self._timeout_s
        for first, count in () if self._settled.is_set() else self._leased_runs(batches):
            if not self._in_place.evacuate(first, count, max(0.0, deadline - time.monotonic())):
                raise self._too_slow()

    def _judge(self, batches: Collection[int]) -> set[str]:
        """REQUIRES: no memory of these batches is needed any more. The last ones settle the capture."""
        if self._settled.is_set():
            return set()
        moved = [number for number in self._moved() if self.survey.batch_of[number] in batches]
        # What was written before the boundary was over is certain: what changes now was never read.
        unseen: set[int] = set()
        if not self._certain:
            seen = self._back.end()
            unseen = self._changed(batches) if seen is None else {n for n in seen if self.survey.batch_of[n] in batches}
            unseen.difference_update(moved)
        if not self._broken([*moved, *unseen]) and self._unjudged <= set(batches):
            self._settled.set()
        return self._names(unseen)

    def _changed(self, batches: Collection[int]) -> set[int]:
        """Numbers of the pieces that these batches read in place and that changed, as the audit sees it."""
        return self._audit.changed(self._audit.look(self.survey, batches))

    def _broken(self, changed: Iterable[int]) -> bool:
        """Whether one of these pieces was read, or may have been, when it changed. That is the verdict then."""
        leased = self.survey.leased
        names = sorted(self._names(number for number in changed if leased[number] or self._staging))
        if names:
            self._verdict = (
                f"{', '.join(names[:3])} changed between the boundary and the next update, while it may still have "
                "been read: change parameters before the iteration ends"
            )
            self._settled.set()
        return bool(names)

    def _moved(self) -> list[int]:
        """Numbers of the pieces, not judged yet, whose version counter rose since they were noted."""
        now = versions(self.survey.tensors)
        if now == self._versions:
            return []
        return [
            number
            for number, (was, is_) in enumerate(zip(self._versions, now, strict=True))
            if was != is_ and self.survey.batch_of[number] in self._unjudged
        ]

    def _names(self, numbers: Iterable[int]) -> set[str]:
        return {self.survey.pieces[number].slice.name for number in numbers}

    def _too_slow(self) -> LeaseBroken:
        return LeaseBroken(f"its tensors were still being written after fence_timeout_s = {self._timeout_s:g} s")


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Those that follow one another, as (first, count)."""
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0]):
        found = [number for _, number in run]
        yield found[0], len(found)


def _lay_rest(memory: torch.Tensor, extent: GatheredExtent, survey: Survey) -> None:
    """What the boundary copies, as it lies in the file."""
    parts = [piece.part for piece in survey.copied]
    for index, view in lay_views(memory, extent, [*survey.tensors, *parts]).items():
        view.copy_(parts[index - len(survey.tensors)])
