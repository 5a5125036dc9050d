# SPDX-License-Identifier: Apache-2.0
"""Huge pages under leased memory: direct I/O pins one page where it pinned 512, and costs a third of the CPU time.

The kernel copies all of that memory once for it, which on a virtual machine takes seconds for a gigabyte. That pays in
some dozens of checkpoints, so it waits for the first few, and then takes a small share of the time.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from layerwise_dist import _native
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GAP = 8192  # bytes; the allocator's own between two tensors
_AFTER = 4  # checkpoints of one layout: the first ones are audited in full, and write new files
_SHARE = 0.04  # of the time, at most: while a piece is copied no page can be pinned, and a core is taken
_PAGE = 2 << 20  # bytes a call; `close` waits for one
_CLOSE_S = 1.0  # and not longer: memory that has gone meanwhile is left alone by the kernel
_TRIES = 3  # what is pinned by a write at one look is free at another
_PAUSE_S = 1.0


class HugePages:
    """Asks the kernel, on a thread of its own, to back tensors by huge pages. What they hold does not change.

    Where the system's setting is `never`, or the kernel cannot, nothing is done. Belongs to the training thread.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted and allowed()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._opened = 0

    def laid_out(self) -> None:
        """The tensors are others from now on, or lie elsewhere."""
        self._stop()
        self._opened = 0

    def opened(self, tensors: Iterable[torch.Tensor]) -> None:
        """A checkpoint that leases these is opened. The fourth of one layout begins."""
        self._opened += 1
        if self._opened == _AFTER:
            self.cover(tensors)

    def cover(self, tensors: Iterable[torch.Tensor]) -> None:
        """Returns at once. A tensor that moved or went meanwhile is left alone by the kernel."""
        if not self._wanted:
            return
        self._stop()
        ranges = joined((tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors)
        self._closing = threading.Event()
        closing = self._closing
        # Without them all goes on, a little slower.
        self._thread = background.start("layerwise-huge-pages", lambda: self._run(ranges, closing), background.log_only)

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._thread is not None:
            self._closing.set()
            self._thread.join(_CLOSE_S)
            self._thread = None

    def _run(self, ranges: list[tuple[int, int]], closing: threading.Event) -> None:
        for _ in range(_TRIES):
            ranges = _collapse(ranges, closing, share=_SHARE)
            if not ranges or closing.wait(_PAUSE_S):
                return


def back_by_huge_pages(ranges: Iterable[tuple[int, int]]) -> None:
    """Asks once, and waits, for huge pages under (address, bytes) ranges; without any all stays as it was."""
    if allowed():
        _collapse(joined(ranges), threading.Event())


def _collapse(ranges: list[tuple[int, int]], closing: threading.Event, *, share: float = 1.0) -> list[tuple[int, int]]:
    """What is worth another try: not, or not all, in huge pages. Nothing if `closing` was set or the kernel cannot.

    `share` of the time is taken, at most.
    """
    left = []
    for begin, nbytes in ranges:
        for at in range(begin, begin + nbytes, _PAGE):
            length = min(_PAGE, begin + nbytes - at)
            if closing.is_set():
                return []
            began = time.monotonic()
            try:
                if _native.make_huge(at, length) < length:
                    left.append((at, length))
            except OSError as error:
                log.debug("no huge pages: %s", error)
                return []
            closing.wait((time.monotonic() - began) * (1 / share - 1))
    return left


def joined(ranges: Iterable[tuple[int, int]], page: int = _PAGE) -> list[tuple[int, int]]:
    """The whole huge pages under (address, bytes) ranges; near ones are taken as one."""
    found: list[list[int]] = []
    for begin, nbytes in sorted(ranges):
        if found and begin - found[-1][1] <= _GAP:
            found[-1][1] = max(found[-1][1], begin + nbytes)
        else:
            found.append([begin, begin + nbytes])
    pages = [(-(-begin // page) * page, end // page * page) for begin, end in found]
    return [(begin, end - begin) for begin, end in pages if end > begin]


def allowed() -> bool:
    """Whether this system's setting is another than `never`."""
    return not re.search(r"\[never\]", _setting())


def _setting() -> str:
    try:
        return _SETTING.read_text()
    except OSError:
        return "[never]"  # a kernel without huge pages
