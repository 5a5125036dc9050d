# SPDX-License-Identifier: Apache-2.0
"""The accelerator that the sections run on, or the CPU in its place.

Written against `torch.accelerator` where it reaches. What has no such form is CUDA's (ROCm goes by that name too), and
is asked for by `cuda`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from layerwise_dist.capture import audit, stage

STAND_IN = "cpu"


class Skip(Exception):
    """The section can't be tried here; says why."""


def found() -> str | None:
    """The accelerator's type, such as "cuda"; None if torch sees none. It may initialize the device's driver."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else device.type


@dataclass(frozen=True)
class Device:
    kind: str

    @property
    def stand_in(self) -> bool:
        return self.kind == STAND_IN

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def name(self) -> str:
        if self.cuda:
            return torch.cuda.get_device_name()
        return "the CPU as a stand-in" if self.stand_in else self.kind

    def synchronize(self) -> None:
        if not self.stand_in:
            torch.accelerator.synchronize()

    def needed(self, what: str) -> None:
        """Raises Skip on the stand-in."""
        if self.stand_in:
            raise Skip(f"{what} needs a device")

    def only_cuda(self, what: str) -> None:
        """Raises Skip elsewhere."""
        if not self.cuda:
            raise Skip(f"{what} needs CUDA")


# -- copies that are late ----------------------------------------------------------------------------------------------


@dataclass
class Late:
    """Copies of staged layers that begin long after they were launched. `fenced` False leaves out the fence."""

    device: Device
    fenced: bool = True
    held: list[_Held] = field(default_factory=list)

    def make(self, device: torch.device) -> Any:
        """In place of `stage.copies_for`."""
        if self.device.cuda:
            return _Sleeping(device, self.fenced)
        copies = _Held(self.fenced)
        self.held.append(copies)
        return copies

    def launched(self) -> list[_Held.Mark]:
        """Marks of the stand-in's copies that were launched so far. A device's go by themselves: none."""
        return [mark for copies in self.held for mark in copies.marks]

    def release(self) -> None:
        """All of the stand-in's copies that were launched go now, if nothing has waited for them."""
        for mark in self.launched():
            mark.run()

    @contextmanager
    def used(self) -> Iterator[Late]:
        """Engines stage by these copies. Audits are off: they look at what was staged, and so would wait for it."""
        with (
            mock.patch.object(stage, "copies_for", self.make),
            mock.patch.object(audit, "FULL_FIRST", 0),
            mock.patch.object(audit, "units", lambda pieces: []),
        ):
            yield self


SLEEP_CYCLES = 50_000_000  # some 30 ms


class _Sleeping(stage.CudaCopies):
    """The side stream sleeps before each layer's copies."""

    def __init__(self, device: torch.device, fenced: bool) -> None:
        super().__init__(device)
        self._fenced = fenced

    def copy(self, pairs: stage.Pairs) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            torch.cuda._sleep(SLEEP_CYCLES)
        # It waits for the current stream again, which has launched nothing since.
        super().copy(pairs)

    def wait(self, mark: stage.Mark) -> None:
        if self._fenced:
            super().wait(mark)


class _Held:
    """The stand-in: a copy happens when something waits for its mark, or when it is released."""

    class Mark:
        def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            self._pairs, self._ran, self._lock = pairs, threading.Event(), threading.Lock()

        def run(self) -> None:
            with self._lock:
                for to, source in self._pairs:
                    to.copy_(source)
                self._pairs.clear()
            self._ran.set()

        def query(self) -> bool:
            return self._ran.is_set()

        def synchronize(self) -> None:
            if not self._ran.wait(60):
                raise TimeoutError("nobody has released these copies")

    def __init__(self, fenced: bool) -> None:
        self._fenced = fenced
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.marks: list[_Held.Mark] = []

    def copy(self, pairs: stage.Pairs) -> None:
        # As a stream would, which knows addresses: the tensor may get other memory before its copy runs.
        self._pairs += [(to, source.detach()) for to, source in pairs]

    def record(self) -> Mark:
        mark, self._pairs = self.Mark(self._pairs), []
        self.marks.append(mark)
        return mark

    def wait(self, mark: Mark) -> None:
        if self._fenced:
            mark.run()
