# SPDX-License-Identifier: Apache-2.0
"""Sections: what waits for what on a device's streams, and what happens where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from gpu.device import Late
from gpu.training import Job, Kit, State, adamw, check_committed, differing, plain, trained, update
from layerwise_dist.capture import stage
from layerwise_dist.engine import attempts


def fences(kit: Kit) -> str:
    """The next update waits for copies that are late. Without the fence it gets into them: this can fail."""
    at = plain(kit, adamw, kit.steps)
    count, stats = _late_training(kit, at, fenced=True)
    assert count, "nothing was committed"
    try:
        _late_training(kit, at, fenced=False)
    except AssertionError:
        stall = 1e3 * stats["stall_s"] / kit.steps
        return f"{count} checkpoints exact, stall {stall:.1f} ms a step; without the fence they are not"
    raise AssertionError("without the fence all checkpoints were exact too: nothing was shown")


def _late_training(kit: Kit, at: list[State], *, fenced: bool) -> tuple[int, dict[str, Any]]:
    late, folder = Late(kit.device, fenced), kit.folder / f"fenced-{fenced}"

    def run(kit: Kit, job: Job, step: int) -> Any:
        overtaken = late.launched()
        loss = update(kit, job, step)
        for mark in overtaken:
            mark.run()
        return loss

    with late.used():
        held, stats = trained(kit, adamw, folder, kit.steps, run, late.release)
    wrong = differing(held, at[-1])
    if wrong:
        raise RuntimeError(f"training with the engine differs: {wrong[:5]}")
    return check_committed(kit, adamw, folder, at), stats


def freed_memory(kit: Kit) -> str:
    """Parameters get other memory while copies of the old are on their way, and other tensors take the old."""
    at = plain(kit, adamw, kit.steps)
    late = Late(kit.device)
    folder = kit.folder / "checkpoints"
    others: list[torch.Tensor] = []

    def run(kit: Kit, job: Job, step: int) -> Any:
        loss = update(kit, job, step)
        others.clear()
        for param in job.model.parameters():
            size, dtype = param.shape, param.dtype
            param.data = param.data.clone()
            others.append(torch.full(size, float("nan"), dtype=dtype, device=kit.device.kind))
        late.release()
        return loss

    with late.used():
        held, _ = trained(kit, adamw, folder, kit.steps, run, late.release)
    assert not differing(held, at[-1]), "training changed"
    count = check_committed(kit, adamw, folder, at)
    assert count, "nothing was committed"
    return f"{count} checkpoints exact"


# -- the pool ----------------------------------------------------------------------------------------------------------


class _Runtime:
    """CUDA's calls to page-lock memory; those of the stand-in do nothing. `refuses`: as a driver without room."""

    def __init__(self, real: Any, refuses: bool) -> None:
        self._real, self._refuses = real, refuses
        self.registered: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self._refuses:
            return 2  # cudaErrorMemoryAllocation
        self.registered.append(address)
        return 0 if self._real is None else self._real.cudaHostRegister(address, nbytes, flags)

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0 if self._real is None else self._real.cudaHostUnregister(address)


@contextmanager
def _page_locking(kit: Kit, refuses: bool) -> Iterator[_Runtime]:
    runtime = _Runtime(torch.cuda.cudart() if kit.device.cuda else None, refuses)
    with mock.patch.object(torch.cuda, "cudart", lambda: runtime):
        if kit.device.cuda:
            yield runtime
            return
        pinned = lambda pool, pinned: stage.Stage(pool, pinned=True)  # noqa: E731
        with mock.patch.object(attempts, "Stage", pinned), mock.patch.object(torch.cuda, "synchronize"):
            yield runtime


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def pinned_pool(kit: Kit) -> str:
    """The pool is page-locked until the engine closes; where it can't be, that is said, and all goes on."""
    if not kit.device.stand_in:
        kit.device.only_cuda("page-locking")
    at = plain(kit, adamw, kit.steps)
    for refuses in (False, True):
        heard, log = _Heard(), logging.getLogger("layerwise_dist")
        folder = kit.folder / f"refused-{refuses}"
        log.addHandler(heard)
        try:
            with _page_locking(kit, refuses) as runtime:
                held, _ = trained(kit, adamw, folder, kit.steps)
        finally:
            log.removeHandler(heard)
        assert runtime.registered == [], "it was not given back"
        said = any("cannot be page-locked" in line for line in heard.lines)
        assert said == refuses, heard.lines
        assert not differing(held, at[-1]), "training changed"
        assert check_committed(kit, adamw, folder, at) == kit.steps
    return "locked and given back; a refusal is logged, and all checkpoints are exact"


def out_of_memory(kit: Kit) -> str:
    """A copy for which the device has no memory ends that checkpoint, not training, and later ones are committed."""
    at = plain(kit, adamw, kit.steps)
    folder = kit.folder / "checkpoints"
    kind = stage.CudaCopies if kit.device.cuda else stage.HostCopies
    real = kind.copy
    calls = 0

    def copy(self: Any, pairs: stage.Pairs) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            real(self, list(pairs)[:1])  # on its way when the next one fails
            if kit.device.stand_in:
                raise torch.OutOfMemoryError("as a device says")
            torch.empty(1 << 50, dtype=torch.uint8, device=kit.device.kind)
        real(self, pairs)

    with mock.patch.object(kind, "copy", copy):
        held, stats = trained(kit, adamw, folder, kit.steps)
    assert stats["checkpoints_aborted"] == 1, f"{stats['checkpoints_aborted']} checkpoints were aborted"
    assert not differing(held, at[-1]), "training changed"
    assert check_committed(kit, adamw, folder, at) == kit.steps - 1
    return f"1 checkpoint ended, {kit.steps - 1} exact"
