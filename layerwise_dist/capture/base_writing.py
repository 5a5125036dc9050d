# SPDX-License-Identifier: Apache-2.0
"""Writes a base: frozen parameters as blocks of a file, and the thread that flushes them."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Collection, Iterable, Sequence

import torch

from layerwise_dist import _native
from layerwise_dist.capture.held import check_present
from layerwise_dist.capture.stage import copies_for
from layerwise_dist.errors import DeadlineError, LayerwiseError
from layerwise_dist.storage.frozen_file import BaseFile
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.storage.shard_layout import ALIGN
from layerwise_dist.supervision import background
from layerwise_dist.supervision.patience import stuck_calls

log = logging.getLogger("layerwise_dist")

_LOOK_S = 5.0  # a wait in the background is looked at so often; what it waits for has no deadline of its own

Segment = tuple[int, int, int, int, int]


class BaseFailed(LayerwiseError):
    """Frozen parameters could not be written, or changed before they were read. Ends the attempts that need them."""


class Content:
    """Tensors as the blocks of a file hold them: `segments` as in `ShardLayout`, `blocks` with offset and length.

    Attributes:
        on_host: of each block, whether all of it is in host memory.
    """

    on_host: list[bool]

    def __init__(
        self, tensors: Sequence[torch.Tensor], blocks: Sequence[tuple[int, int]], segments: Iterable[Segment]
    ) -> None:
        self.lengths = [nbytes for _, nbytes in blocks]
        self._parts: list[list[tuple[int, int, int, int]]] = [[] for _ in blocks]
        for block, inside, tensor, offset, nbytes in segments:
            self._parts[block].append((tensor, offset, inside, nbytes))
        self.bind(tensors)

    def bind(self, tensors: Sequence[torch.Tensor]) -> None:
        """From now on these are the tensors, of the same sizes."""
        self._tensors = list(tensors)
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self.on_host = [all(on_host(self._tensors[part[0]]) for part in parts) for parts in self._parts]

    def __len__(self) -> int:
        return len(self._parts)

    def tensors_of(self, block: int) -> set[int]:
        return {tensor for tensor, _, _, _ in self._parts[block]}

    def blocks_of(self, tensors: Collection[int]) -> list[int]:
        if not tensors:
            return []
        return [block for block in range(len(self)) if not self.tensors_of(block).isdisjoint(tensors)]

    def hash(self, block: int) -> int:
        """XXH3-64 of what the block would be now. Of device memory it waits for the device."""
        tensor, offset, _, length = self._parts[block][0]
        if length == self.lengths[block] and self.on_host[block]:
            return _native.hash_memory(self._addresses[tensor] + offset, length)
        memory = torch.empty(self.lengths[block], dtype=torch.uint8, device="cpu")
        self.lay([block], [memory])
        return _native.hash_memory(memory.data_ptr(), len(memory))

    def lay(self, blocks: Sequence[int], rows: Sequence[torch.Tensor]) -> None:
        """Copies blocks into rows of bytes in host memory. Returns when that is done."""
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for block, row in zip(blocks, rows, strict=True):
            if sum(part[3] for part in self._parts[block]) < self.lengths[block]:
                row.zero_()  # gaps
            for number, offset, inside, nbytes in self._parts[block]:
                tensor = self._tensors[number]
                if on_host(tensor):  # not by torch, which would start a team of threads for this one
                    ctypes.memmove(row.data_ptr() + inside, self._addresses[number] + offset, nbytes)
                else:
                    check_present("a frozen parameter", tensor)
                    source = tensor.detach().reshape(-1).view(torch.uint8)[offset : offset + nbytes]
                    by_device.setdefault(tensor.device, []).append((row[inside : inside + nbytes], source))
        for device, pairs in by_device.items():
            copies = copies_for(device)
            copies.copy(pairs)
            copies.record().synchronize()


def on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


class Writing:
    """A base on its way to the disk, by a thread of its own. Its tensors, and their memory, stay until they were read.

    A run of blocks is copied, then written from the copy. So what is in the file is what the writer has hashed, and it
    is what the boundary had hashed or the base fails: whoever changed it meanwhile, no fence has to keep it from that.
    """

    def __init__(
        self, file: BaseFile, content: Content, hashes: Sequence[int], names: Sequence[str], held: object
    ) -> None:
        """`hashes` are what the blocks are to hold, `names` the tensors'; `held` holds their memory."""
        self._file, self._hashes, self._names = file, hashes, names
        self._content: Content | None = content
        self._held: object | None = held
        self._report: BaseReport | None = None
        self._failure: BaseException | None = None
        self._read, self._done = threading.Event(), threading.Event()
        self._thread = background.start("layerwise-base", self._run, background.log_only)

    @property
    def bytes_written(self) -> int:
        return self._file.bytes_written

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def over(self) -> bool:
        return self._done.is_set()

    def wait_read(self, timeout_s: float) -> bool:
        """Whether, within the time, no memory of the model's is needed any more."""
        return self._read.wait(timeout_s)

    def report(self, timeout_s: float) -> BaseReport:
        """Once the file is durable. Raises BaseFailed, DeadlineError. Thread-safe."""
        if not self._done.wait(timeout_s):
            raise DeadlineError(
                f"frozen parameters (base {self._file.attempt.text}) were still being written after {timeout_s:g} s"
                f"{stuck_calls()}"
            )
        if self._failure is not None:
            raise BaseFailed(f"frozen parameters: {self._failure}")
        assert self._report is not None
        return self._report

    def close(self, timeout_s: float) -> bool:
        """Gives up what is not written. Whether that could be done in time."""
        deadline = time.monotonic() + timeout_s
        if not self.over and self._file.abort(timeout_s):
            self._thread.join(max(0.0, deadline - time.monotonic()))
        return self.over

    # -- background ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write()
            self._report = self._file.publish()
        except BaseException as error:  # of the disk, of the device: whoever waits for it has to know, not this thread
            self._failure = error
            self._discard()
        finally:
            self._content = self._held = None
            self._read.set()
            self._done.set()

    def _write(self) -> None:
        content, block_bytes = self._content, self._file.layout.block_bytes
        assert content is not None
        self._file.begin()
        memory = torch.empty(self._file.run * block_bytes + ALIGN, dtype=torch.uint8, device="cpu")
        memory = memory[-memory.data_ptr() % ALIGN :]
        self._file.set_addresses([memory.data_ptr() + place * block_bytes for place in range(self._file.run)])
        for first in range(0, len(content), self._file.run):
            run = range(first, min(first + self._file.run, len(content)))
            rows = memory.split(block_bytes)
            content.lay(run, [rows[place][: content.lengths[block]] for place, block in enumerate(run)])
            if run.stop == len(content):
                self._content = self._held = None
                self._read.set()
            self._file.submit(first, len(run))
            while not self._file.wait(_LOOK_S):
                pass
            for block in run:
                if self._file.hash(block) != self._hashes[block]:
                    names = sorted(self._names[number] for number in content.tensors_of(block))
                    raise BaseFailed(f"{' or '.join(names[:3])} changed after the boundary, before it was read")

    def _discard(self) -> None:
        try:
            self._file.discard()
        except OSError as error:
            log.warning("leftovers of base %s stay until the next start: %s", self._file.attempt.text, error)
