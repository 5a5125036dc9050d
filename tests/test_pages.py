# SPDX-License-Identifier: Apache-2.0
"""Huge pages under leased memory: asked for, and nothing of what the memory holds changed."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import layerwise_dist as lwd
from layerwise_dist import _native
from layerwise_dist.capture import pages

pytestmark = pytest.mark.quick

MIB = 1 << 20


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes of huge pages in the mapping that the tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() + 4 * MIB < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


def test_near_ranges_are_taken_as_one_and_cut_to_whole_pages() -> None:
    two = 2 * MIB
    assert pages.joined([(two + 64, MIB), (two + 64 + MIB + 64, 3 * MIB)]) == [(2 * two, two)]
    assert pages.joined([(two, two), (2 * two + 65536, two)]) == [(two, two)]
    assert pages.joined([(64, two - 64)]) == []


class Kernel:
    """Takes note of what huge pages are asked for; gives them under half of it, or none at all."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error, self.asked = error, list[tuple[int, int]]()

    def make_huge(self, address: int, nbytes: int) -> int:
        self.asked.append((address, nbytes))
        if self.error is not None:
            raise self.error
        return nbytes // 2


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "enabled")
    monkeypatch.setattr(pages, "_PAUSE_S", 0.0)
    found = Kernel()
    monkeypatch.setattr(pages, "_native", found)
    return found


def covered(nbytes: int) -> None:
    """Covers a tensor, and waits until nothing more is asked for."""
    covering = pages.HugePages(wanted=True)
    covering.cover([torch.zeros(nbytes, dtype=torch.uint8)])
    thread = covering._thread
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()
    covering.close()


def test_memory_that_gets_huge_pages_only_in_part_is_tried_three_times(kernel: Kernel) -> None:
    covered(6 * MIB)
    assert len(set(kernel.asked)) == 2 and len(kernel.asked) == 3 * 2, kernel.asked


def test_a_kernel_that_refuses_huge_pages_is_asked_once_and_one_without_them_never(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.error = OSError(22, "Invalid argument")
    covered(6 * MIB)
    assert len(kernel.asked) == 1
    pages.back_by_huge_pages([(0, 4 * MIB)])
    assert kernel.asked[1:] == [(0, 2 * MIB)]
    monkeypatch.setattr(pages, "_SETTING", Path("/nonexistent/enabled"))
    covered(6 * MIB)
    pages.back_by_huge_pages([(0, 4 * MIB)])
    assert len(kernel.asked) == 2 and not pages.allowed()


def test_they_are_asked_for_with_the_fourth_checkpoint_of_a_layout(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    covering = pages.HugePages(wanted=True)
    begun: list[list[torch.Tensor]] = []
    monkeypatch.setattr(covering, "cover", lambda tensors: begun.append(list(tensors)))
    tensor = torch.zeros(1)
    for layout in (2, 6):
        covering.laid_out()
        for _ in range(layout):
            covering.opened([tensor])
    assert begun == [[tensor]]


def test_they_take_a_small_share_of_the_time(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [0.0], list[float]()

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    def make_huge(address: int, nbytes: int) -> int:
        now[0] += 0.01
        return nbytes

    monkeypatch.setattr(pages, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(kernel, "make_huge", make_huge)
    assert pages._collapse([(0, 20 * MIB)], Closing(), share=pages._SHARE) == []
    assert len(waits) == 10 and now[0] / (now[0] + sum(waits)) == pytest.approx(pages._SHARE)


def test_after_close_no_more_pages_are_asked_for(kernel: Kernel) -> None:
    closing = threading.Event()
    closing.set()
    assert pages._collapse([(0, 4 * MIB)], closing) == [] and kernel.asked == []


@pytest.mark.slow
@pytest.mark.skipif(not pages.allowed(), reason="this system's huge pages are off")
def test_leased_memory_gets_huge_pages_and_trains_the_same(tmp_path: Path) -> None:
    def run(folder: Path | None, **writer: str) -> tuple[torch.Tensor, int]:
        torch.manual_seed(0)
        model = torch.nn.Linear(2048, 2048)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batch = torch.randn(2, 2048)
        ckpt = lwd.attach(model, optimizer, dir=str(folder), writer=writer) if folder else None
        huge = 0
        for step in ckpt.steps(6) if ckpt else range(6):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if ckpt and step > pages._AFTER:
                deadline = time.monotonic() + 10 * (writer.get("huge_pages") != "off")
                while (huge := huge_bytes(model.weight)) < 8 * MIB and time.monotonic() < deadline:
                    time.sleep(0.01)
        if ckpt:
            ckpt.close()
        return model.weight.detach().clone(), huge

    plain, _ = run(None)
    with_pages, huge = run(tmp_path / "a")
    without, _ = run(tmp_path / "b", huge_pages="off")
    assert torch.equal(plain, with_pages) and torch.equal(plain, without)
    try:
        _native.make_huge(0, 0)
        _native.make_huge(plain.data_ptr(), 4 * MIB)
    except OSError:
        pytest.skip("this kernel does not collapse into huge pages")
    assert huge >= 8 * MIB
