# SPDX-License-Identifier: Apache-2.0
"""Tensors may take other memory while they are read in place: what is read stays, and holds what it held."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.runners import Finished, Warm
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import _native
from layerwise_dist.capture import held
from layerwise_dist.capture.held import MemoryGone, check_present, holder

torch.set_num_threads(1)


def moved(warm: Warm, folder: Path, backend: str, *more: str) -> Finished:
    """A job that moves memory in every way, at every moment."""
    return warm.run("moved_memory.py", 0, folder, backend, *more, timeout=150, check=False)


@pytest.mark.parametrize("backend", ["posix", "uring"])
def test_a_lease_keeps_the_memory_that_it_reads_however_tensors_move(
    warm: Warm, tmp_path: Path, backend: str, long: bool
) -> None:
    moments = 2 if long else 1
    if backend == "uring" and _native.WriterPool.probe_uring() is not None:
        pytest.skip("io_uring is refused here")
    ended = moved(warm, tmp_path, backend, str(moments))
    lines = ended.lines("MOVED")
    assert ended.returncode == 0 and len(lines) == 9 * moments, ended.output[-3000:]
    for line in lines:
        found = re.search(r"committed (\d+), aborted (\d+), wrong (.*)", line)
        assert found is not None and found[3] == "[]", line
        committed, aborted = int(found[1]), int(found[2])
        assert committed + aborted == 6, line
        # Where it may have changed while it was read, an attempt is given up; a move alone costs none.
        assert aborted <= (2 if "changes" in line else 0), line


def test_mutation_memory_that_nothing_holds_is_caught(warm: Warm, tmp_path: Path) -> None:
    ended = moved(warm, tmp_path, "posix", "1", "unheld")
    caught = ("wrong ['", "not all of that is mapped memory")  # whichever comes first
    assert ended.returncode < 0 or any(sign in ended.output for sign in caught), ended.output[-3000:]


def job(dir: Path, **config: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, lwd.attach(model, optimizer, dir=str(dir), **config)


def train(ckpt: Any, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, between: Any = None) -> None:
    for step in ckpt.steps(steps):
        model(torch.ones(1, 128)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if between is not None:
            between(step)


def deleter(tensor: torch.Tensor) -> int:
    return holder().deleter_of(tensor.untyped_storage())


def test_what_is_held_goes_when_no_checkpoint_needs_it_and_no_later_than_close(tmp_path: Path) -> None:
    before = _native.MemoryHold.orphans
    model, optimizer, ckpt = job(tmp_path)
    orphans: list[int] = []

    def move(step: int) -> None:
        if step == 3:
            for param in model.parameters():
                param.untyped_storage().resize_(2 * param.untyped_storage().nbytes())
        orphans.append(_native.MemoryHold.orphans - before)

    train(ckpt, model, optimizer, 6, move)
    ckpt.close()
    gc.collect()
    assert max(orphans[3:]) >= 3, "the weights that were read in place"
    assert orphans[-1] == 0, "the checkpoints after it read others"
    assert _native.MemoryHold.orphans == before
    assert ckpt.committed_step == 6


def test_memory_is_let_go_of_at_close_though_the_engine_lives_on(tmp_path: Path) -> None:
    before = _native.MemoryHold.orphans
    model, optimizer, ckpt = job(tmp_path)
    train(ckpt, model, optimizer, 4)
    ckpt.close()
    assert deleter(model[0].weight) == _native.MemoryHold.deleter
    for param in model.parameters():
        param.untyped_storage().resize_(0)
    gc.collect()
    assert _native.MemoryHold.orphans == before


def test_a_held_storage_is_to_torch_what_it_was(tmp_path: Path) -> None:
    model, optimizer, ckpt = job(tmp_path)
    train(ckpt, model, optimizer, 4)
    ckpt.close()
    weight = model[0].weight.detach()
    assert deleter(weight) == _native.MemoryHold.deleter
    values = weight.clone()
    lazy = torch._lazy_clone(weight)  # which wants a storage that is nothing but allocated
    weight.add_(1)
    assert torch.equal(lazy, values) and torch.equal(weight, values + 1)
    assert not weight.is_shared() and weight.share_memory_().is_shared() and torch.equal(weight, values + 1)
    alias = weight.numpy()
    assert alias.ctypes.data == weight.data_ptr()


@pytest.mark.parametrize("kind", ["shared", "file"])
def test_memory_that_cannot_be_held_is_copied(tmp_path: Path, kind: str) -> None:
    """It is told from other memory by its deleter, which must stay."""
    model, optimizer, _ = job(tmp_path / "unused")
    if kind == "shared":
        model.share_memory()
    else:
        for number, param in enumerate(model.parameters()):
            path, nbytes = str(tmp_path / f"{number}"), param.numel()
            storage = torch.from_file(path, shared=True, size=nbytes, dtype=torch.float32).view(param.shape)
            storage.copy_(param.detach())
            param.data = storage
    _.close()
    held_before = [deleter(param) for param in model.parameters()]
    with lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt")) as ckpt:
        train(ckpt, model, optimizer, 4)
        assert ckpt.stats()["bytes_sealed"] >= 4 * sum(4 * param.numel() for param in model.parameters())
    assert ckpt.committed_step == 4
    assert [deleter(param) for param in model.parameters()] == held_before
    assert kind == "file" or all(param.is_shared() for param in model.parameters())


def test_where_torch_keeps_memory_in_another_way_nothing_is_read_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(held, "_is_data_ptr", lambda place, made: False)
    holder.cache_clear()
    try:
        model, optimizer, ckpt = job(tmp_path)
        train(ckpt, model, optimizer, 3)
        ckpt.close()
    finally:
        monkeypatch.undo()
        holder.cache_clear()
    assert ckpt.committed_step == 3
    assert "manages tensor memory in an unknown way" in caplog.text
    assert deleter(model[0].weight) != _native.MemoryHold.deleter


@pytest.mark.parametrize("capture", ["auto", "stage"])
def test_a_tensor_whose_memory_is_gone_or_too_small_fails_that_attempt_by_name_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capture: str
) -> None:
    model, optimizer, ckpt = job(tmp_path, capture=capture, commit={"raise_after": 100})
    weight = model[1].weight
    kept: list[torch.Tensor] = []
    for step in ckpt.steps(6):
        if kept:  # offloaded at the boundary, and back before it is needed
            weight.untyped_storage().resize_(kept[0].untyped_storage().nbytes())
            weight.data.copy_(kept.pop())
        model(torch.ones(1, 128)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (2, 4):
            kept.append(weight.detach().clone())
            weight.untyped_storage().resize_(0 if step == 2 else 4096)
    ckpt.close()
    assert ckpt.committed_step == 6
    assert ckpt.stats()["checkpoints_aborted"] == 2
    assert "param/1.weight has 0 bytes of memory and needs 65536" in caplog.text
    assert "param/1.weight has 4096 bytes of memory and needs 65536" in caplog.text


class Elsewhere:
    """As a tensor whose memory another thread changes between two looks at it."""

    shape, numel = torch.Size([2]), torch.zeros(2).numel

    def __init__(self, there: torch.Tensor, address: int, begin: int) -> None:
        self._storage, self._address, self._begin = there.untyped_storage(), address, begin
        self._cdata = self._storage._cdata

    def untyped_storage(self) -> Elsewhere:
        return self

    def data_ptr(self) -> int:
        """Of the tensor at its first call, of its storage at the next."""
        self._address, found = self._begin, self._address
        return found

    def nbytes(self) -> int:
        return self._storage.nbytes()


def test_memory_that_moves_while_it_is_taken_hold_of_is_named_and_nothing_is_held() -> None:
    there = torch.zeros(2)
    at, before = there.data_ptr(), deleter(there)
    with pytest.raises(MemoryGone, match="a tensor of shape \\[2\\] moved to other memory while it was being read"):
        holder().hold([Elsewhere(there, at + 64, at)])  # type: ignore[list-item]
    with pytest.raises(MemoryGone, match="no other thread may change the model while a step ends"):
        holder().hold([Elsewhere(there, at + 64, at + 64)])  # type: ignore[list-item]
    assert deleter(there) == before
    assert held._is_code(before) and not held._is_code(at) and not held._is_code(0)


def test_how_far_a_tensor_reaches_counts_not_how_many_elements_it_has() -> None:
    base = torch.zeros(10, 10)
    for view in (base[:, 3], base.t()[2:, 1:], base[::3], base[3:3], torch.zeros(()), base.diagonal()):
        check_present("it", view)
    column = base[:, 3]
    base.untyped_storage().resize_(4 * 93)
    with pytest.raises(MemoryGone, match="it has 372 bytes of memory and needs 376"):
        check_present("it", column)


def test_a_hold_is_refused_of_memory_that_moved_since_it_was_looked_at() -> None:
    storage = torch.UntypedStorage(64, device="cpu")
    place = storage._cdata + 8 * holder().place
    with pytest.raises(RuntimeError, match="memory moved while it was looked at"):
        _native.MemoryHold([(place, storage.data_ptr() + 1)])
    with pytest.raises(ValueError, match="address 0"):
        _native.MemoryHold([(0, 1)])
    assert holder().deleter_of(storage) != _native.MemoryHold.deleter
