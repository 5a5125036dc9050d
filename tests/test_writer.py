# SPDX-License-Identifier: Apache-2.0
"""The native writer as Python sees it: which backend writes, and the pool's buffers."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from kit.runners import Finished, Warm
from kit.seccomp import FORBID_URING

import layerwise_dist as lwd
from layerwise_dist import _native
from layerwise_dist.errors import ConfigError

TRAIN = """
import logging, sys, torch
import layerwise_dist as lwd
logging.basicConfig(stream=sys.stdout, format="LOG %(message)s")
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(model.parameters())
try:
    ckpt = lwd.attach(model, optimizer, dir=sys.argv[1], writer={"backend": sys.argv[2]})
except lwd.errors.ConfigError as error:
    sys.exit(f"CONFIG {error}")
for _ in ckpt.steps(3):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step(); optimizer.zero_grad()
ckpt.close()
print("COMMITTED", ckpt.committed_step)
"""


def train_where_uring_is_forbidden(warm: Warm, folder: Path, backend: str) -> Finished:
    script = folder / "script.py"
    script.write_text(FORBID_URING + TRAIN)
    return warm.run(script, 0, folder / backend, backend, timeout=120, check=False)


def test_where_io_uring_is_forbidden_threads_write_and_one_line_says_so(warm: Warm, tmp_path: Path) -> None:
    done = train_where_uring_is_forbidden(warm, tmp_path, "auto")
    assert "COMMITTED 3" in done.output, done.output
    logged = [line for line in done.output.splitlines() if "io_uring" in line]
    assert len(logged) == 1 and "Operation not permitted" in logged[0]


def test_a_backend_asked_for_by_name_is_that_or_an_error_that_says_why(warm: Warm, tmp_path: Path) -> None:
    done = train_where_uring_is_forbidden(warm, tmp_path, "uring")
    assert done.returncode == 1 and "CONFIG" in done.output, done.output
    assert "writer.backend = 'uring'" in done.output and "Operation not permitted" in done.output
    done = train_where_uring_is_forbidden(warm, tmp_path, "posix")
    assert "COMMITTED 3" in done.output and "io_uring" not in done.output, done.output


@pytest.mark.parametrize("backend", ["uring", "posix"])
def test_each_backend_s_checkpoints_restore(tmp_path: Path, backend: str) -> None:
    if backend == "uring" and (refusal := _native.WriterPool.probe_uring()) is not None:
        pytest.skip(f"no io_uring here: {refusal}")

    def make(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(300, 257), torch.nn.Linear(257, 9))
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = make(0)
    with lwd.attach(model, optimizer, dir=str(tmp_path), writer={"backend": backend, "block_kb": 64}) as ckpt:
        for _ in ckpt.steps(4):
            model(torch.ones(2, 300)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    again, other = make(1)
    with lwd.attach(again, other, dir=str(tmp_path), writer={"backend": backend, "block_kb": 64}) as ckpt:
        assert ckpt.restore() == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_pool_too_small_for_the_bounce_buffers_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    says = "pool_mb = 8: the writer alone takes writer.queue_depth x writer.block_kb = 9216 KiB"
    with pytest.raises(ConfigError, match=says):
        lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt"), pool_mb=8, writer={"queue_depth": 9})
    assert not (tmp_path / "ckpt").exists()
    with pytest.raises(ValueError, match="has no room for 3 bounce buffers of 4096 bytes"):
        _native.WriterPool(3, "posix", _native.BufferPool(2 * 4096), 4096)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="one of: posix, uring"):
        _native.WriterPool(1, "aio")


def test_a_buffer_is_memory_for_tensors_and_comes_back() -> None:
    pool = _native.BufferPool(3 * 4096)
    buffer = pool.acquire(8192, 0)
    assert buffer is not None and buffer.nbytes == 8192 and pool.in_use == 8192 and pool.capacity == 3 * 4096
    tensor = torch.frombuffer(buffer, dtype=torch.int64)
    assert tensor.data_ptr() == buffer.address and buffer.address % 4096 == 0 and tensor.numel() == 1024
    tensor.fill_(7)
    assert bytes(memoryview(buffer)[:2]) == b"\x07\x00"
    assert pool.acquire(8192, 0.01) is None and pool.acquire(1 << 20, 1e9) is None
    buffer.release()
    buffer.release()
    assert pool.in_use == 0 and pool.peak == 8192 and buffer.nbytes == 0
    with pytest.raises(BufferError, match="released"):
        memoryview(buffer)
    with pytest.raises(RuntimeError, match="released"):
        _ = buffer.address
    with pytest.raises(ValueError):
        pool.acquire(0, 0)


def test_a_buffer_with_an_open_view_is_not_released() -> None:
    buffer = _native.BufferPool(4096).acquire(4096, 0)
    assert buffer is not None
    with memoryview(buffer), pytest.raises(BufferError, match="view"):
        buffer.release()
    buffer.release()


def test_memory_stays_mapped_while_a_tensor_made_from_it_lives() -> None:
    pool = _native.BufferPool(1 << 20)
    buffer = pool.acquire(1 << 20, 0)
    assert buffer is not None
    tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    buffer.release()
    del pool, buffer
    gc.collect()
    tensor.fill_(1)
    assert int(tensor[-1]) == 1


def test_a_buffer_that_is_collected_comes_back() -> None:
    pool = _native.BufferPool(4096)
    assert pool.acquire(4096, 0) is not None
    gc.collect()
    assert pool.in_use == 0
