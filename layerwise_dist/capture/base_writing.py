"""A base on its way to the disk: frozen parameters as blocks of a file, and the thread that has them written."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Sequence

import torch

from layerwise_dist import _native
from layerwise_dist.capture.stage import copies_for
from layerwise_dist.errors import DeadlineError, LayerwiseError
from layerwise_dist.storage.base import BaseFile, BaseReport
from layerwise_dist.storage.shard import ALIGN

log = logging.getLogger("layerwise_dist")

_RUN = 32  # blocks of a base that are with the writer at once: what a shard's own blocks may have to wait for
_LOOK_S = 5.0  # a wait in the background is looked at so often; what it waits for has no deadline of its own
_CLOSE_S = 30.0

Segment = tuple[int, int, int, int, int]


class BaseFailed(LayerwiseError):
    """Frozen parameters could not be written, or changed while they were. Ends the attempts that need them."""


class Content:
    """Tensors as the blocks of a file hold them: `segments` as in `ShardLayout`, `blocks` with offset and length."""

    def __init__(
        self, tensors: Sequence[torch.Tensor], blocks: Sequence[tuple[int, int]], segments: Iterable[Segment]
    ) -> None:
        self.tensors = list(tensors)
        self._lengths = [nbytes for _, nbytes in blocks]
        self._parts: list[list[tuple[int, int, int, int]]] = [[] for _ in blocks]
        for block, inside, tensor, offset, nbytes in segments:
            self._parts[block].append((tensor, offset, inside, nbytes))
        self.on_host = [all(on_host(self.tensors[part[0]]) for part in parts) for parts in self._parts]

    def __len__(self) -> int:
        return len(self._parts)

    def tensors_of(self, block: int) -> set[int]:
        return {tensor for tensor, _, _, _ in self._parts[block]}

    def blocks_of(self, tensors: Collection[int]) -> list[int]:
        return [block for block in range(len(self)) if not self.tensors_of(block).isdisjoint(tensors)] if tensors else []

    def hash(self, block: int) -> int:
        """XXH3-64 of what the block would be now. Of device memory it waits for the device."""
        parts, nbytes = self._parts[block], self._lengths[block]
        tensor, offset, _, length = parts[0]
        if length == nbytes and self.on_host[block]:
            return _native.hash_memory(self.tensors[tensor].data_ptr() + offset, nbytes)
        memory = torch.empty(nbytes, dtype=torch.uint8)
        for to, source in self.pairs(block, memory):
            to.copy_(source)
        return _native.hash_memory(memory.data_ptr(), nbytes)

    def pairs(self, block: int, memory: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Which bytes of which tensor make the block in `memory`, a row of bytes whose gaps are zeroed here."""
        parts = self._parts[block]
        if sum(part[3] for part in parts) < self._lengths[block]:
            memory.zero_()
        rows = {tensor: self.tensors[tensor].detach().reshape(-1).view(torch.uint8) for tensor, _, _, _ in parts}
        return [
            (memory[inside : inside + nbytes], rows[tensor][offset : offset + nbytes])
            for tensor, offset, inside, nbytes in parts
        ]


def on_host(tensor: torch.Tensor) -> bool:
    """Whether the writer can read it in place."""
    return tensor.device.type == "cpu"


class Writing:
    """A base on its way to the disk, by a thread of its own. Its tensors stay alive until they were read.

    Host memory is written in place, other memory through a buffer of some blocks. Nobody fences it: no update changes what
    is frozen, and what changed all the same has another hash.
    """

    def __init__(
        self, file: BaseFile, content: Content, gathered: Sequence[int], hashes: Sequence[int], names: Sequence[str]
    ) -> None:
        """`gathered` are the blocks that are not in host memory, `hashes` what the blocks are to hold, `names` the
        tensors'.
        """
        self._file, self._hashes, self._names = file, hashes, names
        self._content: Content | None = content
        self._gathered = {block: len(content.tensors) + at for at, block in enumerate(gathered)}
        file.set_addresses([tensor.data_ptr() for tensor in content.tensors] + [0] * len(gathered))
        self._report: BaseReport | None = None
        self._failure: Exception | None = None
        self._read, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="layerwise-base", daemon=True)
        self._thread.start()

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
            raise DeadlineError(f"the frozen parameters of {self._file.attempt.text} were still being written")
        if self._failure is not None:
            raise BaseFailed(f"frozen parameters: {self._failure}")
        assert self._report is not None
        return self._report

    def close(self) -> None:
        """Gives up what is not written."""
        if not self.over:
            self._file.abort()
            self._thread.join(_CLOSE_S)

    # -- background ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write()
            self._content = None
            self._read.set()
            self._report = self._file.publish()
        except Exception as error:  # of the disk, of the device: whoever waits for it has to know, not this thread
            self._failure = error
            self._discard()
        finally:
            self._content = None
            self._read.set()
            self._done.set()

    def _write(self) -> None:
        content = self._content
        assert content is not None
        block_bytes = self._file.layout.block_bytes
        memory = torch.empty(_RUN * block_bytes + ALIGN if self._gathered else 0, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % ALIGN :]
        for first in range(0, len(content), _RUN):
            run = range(first, min(first + _RUN, len(content)))
            self._gather([block for block in run if block in self._gathered], content, memory)
            self._file.submit(first, len(run))
            while not self._file.wait(_LOOK_S):
                pass
            for block in run:
                if self._file.hash(block) != self._hashes[block]:
                    names = sorted(self._names[number] for number in content.tensors_of(block))
                    raise BaseFailed(f"{', '.join(names[:3])} changed while it was being written")

    def _gather(self, blocks: Sequence[int], content: Content, memory: torch.Tensor) -> None:
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for place, block in enumerate(blocks):
            nbytes = self._file.layout.blocks[block][1]
            begin = place * self._file.layout.block_bytes
            row = memory[begin : begin + nbytes]
            self._file.set_address(self._gathered[block], row.data_ptr())
            for to, source in content.pairs(block, row):
                by_device.setdefault(source.device, []).append((to, source))
        for device, pairs in by_device.items():
            copies = copies_for(device)
            copies.copy(pairs)
            copies.record().synchronize()

    def _discard(self) -> None:
        try:
            self._file.discard()
        except OSError as error:
            log.warning("leftovers of base %s stay until the next start: %s", self._file.attempt.text, error)
