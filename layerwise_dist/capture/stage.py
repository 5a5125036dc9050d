# SPDX-License-Identifier: Apache-2.0
"""Staging: a layer is copied right after its update into pool memory, laid out as its extent in the file.

The host does not wait for the copies of device memory. They run on a stream of their own; the next update's stream
waits for them (the fence), and a layer goes to the writer once they are done.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from layerwise_dist import _native
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.storage.gathered import GatheredExtent
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
Wait = Callable[[], None]


class Mark(Protocol):
    """A point after copies that were launched, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether they are done."""
        ...

    def synchronize(self) -> None:
        """Holds the calling thread up until they are done."""
        ...


class Copies(Protocol):
    """Where copies run. `copy` and `record` belong to the training thread, as does `wait`: that is the fence."""

    def copy(self, pairs: Pairs) -> None:
        """Launches copies of (to host memory, from), after all that this thread has launched so far."""
        ...

    def record(self) -> Mark:
        """A mark after all copies launched so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """What this thread launches from now on comes after the mark. The host need not wait for that."""
        ...


class _Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class HostCopies:
    """Host memory: a copy is done when `copy` returns."""

    def copy(self, pairs: Pairs) -> None:
        for to, source in pairs:
            to.copy_(source)

    def record(self) -> Mark:
        return _Done()

    def wait(self, mark: Mark) -> None:
        return None


class CudaCopies:
    """Memory of one CUDA device: a side stream, which waits for the training thread's current stream at each `copy`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def copy(self, pairs: Pairs) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
                if source.is_cuda:
                    # Freed while its copy is on its way, its memory must not go to another tensor.
                    source.record_stream(self._side)

    def record(self) -> Mark:
        mark = torch.cuda.Event()
        mark.record(self._side)
        return mark

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)  # type: ignore[arg-type]


def copies_for(device: torch.device) -> Copies:
    return CudaCopies(device) if device.type == "cuda" else HostCopies()


class StageError(LayerwiseError):
    """A layer could not be staged: the pool had no room in time, the device none for a copy, or the device failed. Ends
    the attempt.
    """


class Handover:
    """What one attempt has staged and not given to the writer yet. Thread-safe."""

    def __init__(self) -> None:
        self._pending = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def began(self) -> None:
        with self._changed:
            self._pending += 1

    def ended(self, failure: BaseException | None) -> None:
        with self._changed:
            self._pending -= 1
            self._failure = self._failure or failure
            self._changed.notify_all()

    @property
    def done(self) -> bool:
        return self._pending == 0 and self._failure is None

    def wait(self, timeout_s: float) -> bool:
        """Whether all is given within the deadline. Raises StageError if something of it cannot be."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._pending == 0 or self._failure is not None, timeout_s)
            if self._failure is not None:
                raise StageError(f"a staged copy failed: {self._failure}")
            return done


class Stage:
    """Copies layers into the pool and gives each to the writer once it is complete, in order. One for an engine.

    A wait for the pool is a wait for this rank's disk: buffers come back when their blocks are written or aborted.
    """

    def __init__(self, pool: _native.BufferPool, *, pinned: bool = False) -> None:
        """With `pinned`, all of it that is free is page-locked for CUDA until `close`."""
        self._pool = pool
        self._pinned = _pin(pool) if pinned else None
        self._copies: dict[torch.device, Copies] = {}
        self._later: queue.SimpleQueue[tuple[Handover, list[Mark], Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def copy(
        self, extent: GatheredExtent, tensors: Sequence[torch.Tensor], give: Callable[[_native.PoolBuffer], None],
        handover: Handover, deadline: float,
    ) -> list[Wait]:  # fmt: skip
        """Launches the copies of one layer; `give(buffer)` is called when they are done, and must pass the buffer on.

        That may be at once, or later on another thread. `tensors` are all of the layout's. Returns what the training
        thread must call before the layer's next update. Raises StageError when the pool has no room until `deadline`
        (of time.monotonic, seconds).
        """
        buffer = self.room(extent.nbytes, deadline)
        launched = self._launch(buffer, extent, tensors)
        marks = [mark for _, mark in launched]
        if all(mark.query() for mark in marks):
            give(buffer)
        else:
            handover.began()
            self._later.put((handover, marks, partial(give, buffer)))
            self._start()
        return [partial(copies.wait, mark) for copies, mark in launched]

    def room(self, nbytes: int, deadline: float) -> _native.PoolBuffer:
        """A buffer of the pool. Raises StageError when there is none until `deadline` (of time.monotonic, seconds)."""
        buffer = self._pool.acquire(nbytes, max(0.0, deadline - time.monotonic()))
        if buffer is None:
            raise StageError(
                f"a layer of {nbytes} bytes found no room in the pool (pool_mb) within fence_timeout_s: the disk is "
                "too slow"
            )
        return buffer

    def _launch(
        self, buffer: _native.PoolBuffer, extent: GatheredExtent, tensors: Sequence[torch.Tensor]
    ) -> list[tuple[Copies, Mark]]:
        # The views end with this call: a buffer that something still looks into cannot be passed on.
        views = lay_views(torch.frombuffer(buffer, dtype=torch.uint8, count=extent.nbytes), extent, tensors)
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for number, view in views.items():
            by_device.setdefault(tensors[number].device, []).append((view, tensors[number]))
        launched: list[tuple[Copies, Mark]] = []
        for device, pairs in by_device.items():
            copies = self._copies.get(device)
            if copies is None:
                copies = self._copies[device] = copies_for(device)
            try:
                copies.copy(pairs)
            except torch.OutOfMemoryError as error:
                # Copies that were launched go into a buffer that the pool is about to have back.
                for mark in (*(mark for _, mark in launched), copies.record()):
                    mark.synchronize()
                raise StageError(f"{device} had no memory left for the copy of a layer: {error}") from None
            launched.append((copies, copies.record()))
        return launched

    def close(self, timeout_s: float) -> bool:
        """Ends the thread after what it still has to give. Whether it ended in time; if not, the pool stays locked."""
        if self._thread is not None:
            self._later.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        if self._pinned is not None:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._pinned)
            self._pinned = None
        return True

    def _start(self) -> None:
        if self._thread is None:
            self._thread = background.start("layerwise-stage", self._run, background.log_only)

    def _run(self) -> None:
        while (item := self._later.get()) is not None:
            handover, marks, give = item
            failure = None
            try:
                for mark in marks:
                    mark.synchronize()
                give()
            except BaseException as error:  # of the device, say: whoever waits for the attempt has to know
                failure = error
            handover.ended(failure)


def _pin(pool: _native.BufferPool) -> int | None:
    """Page-locks the free rest of the pool, in one piece before anything was staged; its address if it could."""
    rest = pool.acquire(pool.capacity - pool.in_use, 0.0)
    assert rest is not None, "nothing else has the pool yet"
    address, nbytes = rest.address, rest.nbytes
    rest.release()
    error = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
    if int(error) == 0:
        return address
    log.warning(
        "%d bytes of the pool cannot be page-locked (CUDA error %s): copies of device memory block the training "
        "thread; a "
        "smaller pool_mb may help",
        nbytes, error,
    )  # fmt: skip
    return None


def lay_views(memory: torch.Tensor, extent: GatheredExtent, tensors: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Of the layout's tensors that lie in `extent`, by number: views of `memory` in their places. Zeroes the gaps.

    `memory` is a row of `extent.nbytes` bytes.
    """
    for begin, end in extent.gaps:
        memory[begin:end].zero_()
    views = {}
    for number, begin in extent.places:
        like = tensors[number]
        row = memory[begin : begin + like.numel() * like.element_size()]
        views[number] = row.view(like.dtype).view(like.shape)
    return views
