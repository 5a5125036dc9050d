# SPDX-License-Identifier: Apache-2.0
"""Changes that no version counter shows are found by reading again: at once in the first checkpoints, then within a
hundred.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import layerwise_dist as lwd
from layerwise_dist.capture import audit, lease
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.errors import CommitError
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer

torch.set_num_threads(1)


def wide(layers: int = 9) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Layers of which two fill a window of the audit: with their momentum, as many windows as layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(362, 362) for _ in range(layers)))
    return model, torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 362)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _surveyor(model: nn.Module, optimizer: torch.optim.Optimizer) -> Surveyor:
    framework = Framework(model, 0, 1)
    return Surveyor(framework, TorchOptimizer(framework, optimizer))


def surveyed(*sizes: int) -> Any:
    model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
    return _surveyor(model, torch.optim.SGD(model.parameters(), lr=0.1)).look()


@pytest.mark.parametrize(
    "sizes",
    [(1,), (0, 3), (1000, 262144, 7), (300_000,) * 3, (5,) * 400, (262144,) * 99, (262144,) * 130, (40_000_000,)],
    ids=lambda sizes: f"{len(sizes)} of {sizes[-1]}",
)
def test_a_hundred_checkpoints_in_a_row_audit_every_byte_and_none_much_more_than_its_share(
    sizes: tuple[int, ...],
) -> None:
    survey = surveyed(*sizes)
    groups = audit.units(survey.pieces)
    total = sum(piece.slice.nbytes for piece in survey.pieces)
    for first in (0, 37):
        seen = [np.zeros(piece.slice.nbytes, bool) for piece in survey.pieces]
        for turn in range(first, first + audit.ROUND):
            windows = audit.share(groups, turn)
            assert 0 < sum(w.end - w.begin for w in windows) <= total / audit.ROUND + 2 * audit.WINDOW_BYTES
            for window in windows:
                seen[window.piece][window.begin : window.end] = True
        assert all(each.all() for each in seen)


@pytest.mark.parametrize("when", ["before the boundary", "after the boundary"])
def test_a_blind_write_that_begins_late_is_found_within_a_hundred_checkpoints_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    model, optimizer = wide()
    weight = model[6].weight
    groups = len(audit.units(_surveyor(model, _stepped(model, optimizer)).look().pieces))
    assert 5 < groups < audit.ROUND

    def found() -> bool:
        return any("param/6.weight changed" in record.getMessage() for record in caplog.records)

    def blind() -> None:
        weight.detach().numpy().view(np.int32)[-1, -1] ^= 1  # one bit: only the window that has it can tell

    found_at = 0
    # One writer of small blocks: what is changed after the boundary is still on its way then.
    options = {"writer": {"queue_depth": 1, "block_kb": 4, "direct_io": "off"}, "commit": {"raise_after": 1000}}
    with lwd.attach(model, optimizer, dir=str(tmp_path), **options) as ckpt:
        for number in ckpt.steps(audit.FULL_FIRST + groups + 3):
            if when == "after the boundary" and number > audit.FULL_FIRST:
                blind()
            step(model, optimizer)
            if when == "before the boundary" and number >= audit.FULL_FIRST:
                blind()
            if found() and not found_at:
                found_at = number + 1
    assert audit.FULL_FIRST < found_at <= audit.FULL_FIRST + groups + 1, caplog.text
    named = [
        record.getMessage() for record in caplog.records if "without raising its version counter" in record.getMessage()
    ]
    assert len(named) == 1 and "param/6.weight" in named[0], "named once; copied at the boundary from then on"
    aborted = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert bool(aborted) == (when == "after the boundary"), "before the boundary the right contents are still to be had"
    assert ckpt.committed_step == audit.FULL_FIRST + groups + 3


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    step(model, optimizer)
    return optimizer


# -- the last look, which the persisting thread makes ------------------------------------------------------------------


def _changed_before_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """A job in which, once all of step 6 is written, a parameter changes blindly before it is looked at again."""
    model, optimizer = wide(1)  # so little that each checkpoint audits all of it
    looks = []
    original = audit.LookBack.look

    def look(back: audit.LookBack, changed: Callable[[], set[int] | None]) -> None:
        looks.append(threading.current_thread() is threading.main_thread())
        if len(looks) == 6 - audit.AWAITED_FIRST:
            model[0].weight.detach().numpy()[0, 0] += 1
        original(back, changed)

    monkeypatch.setattr(audit.LookBack, "look", look)
    seal = lease.Capture.seal

    def sealed(capture: lease.Capture, survey: Any) -> set[str]:
        with pytest.MonkeyPatch.context() as still_read:  # what is written by then is judged at the boundary
            if not capture._audit.awaited:
                still_read.setattr(capture.write, "leases_over", lambda: False)
            return seal(capture, survey)

    monkeypatch.setattr(lease.Capture, "seal", sealed)
    with lwd.attach(model, optimizer, dir=str(tmp_path), commit={"raise_after": 1000}) as ckpt:
        committed = []
        for number in ckpt.steps(7):
            if number:
                with contextlib.suppress(CommitError):
                    ckpt.wait(number, timeout=60)  # before the update, which would look itself
            committed.append(ckpt.committed_step)
            step(model, optimizer)
    assert looks == [False] * (7 - audit.AWAITED_FIRST), "one each, on another thread; none where all is certain"
    return committed


def test_the_persisting_thread_s_look_finds_what_no_counter_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert _changed_before_the_last_look(tmp_path, monkeypatch)[-2:] == [5, 5]
    assert "param/0.weight changed between the boundary and the next update" in caplog.text


def test_a_last_look_that_compares_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.Audit, "changed_by_now", lambda audit, survey: set())
    assert _changed_before_the_last_look(tmp_path, monkeypatch)[-2:] == [5, 6]


def test_what_is_written_by_the_boundary_is_judged_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.LookBack, "look", lambda back, changed: pytest.fail("there is nothing left to look at"))
    copy = lease.Capture._copy_rest

    def written(capture: lease.Capture, survey: Any) -> None:
        copy(capture, survey)
        assert capture.wait_read(60)

    monkeypatch.setattr(lease.Capture, "_copy_rest", written)
    model, optimizer = wide(1)
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        for _ in ckpt.steps(audit.FULL_FIRST + 2):
            step(model, optimizer)
    assert ckpt.committed_step == audit.FULL_FIRST + 2


def test_memory_that_is_overwritten_is_not_looked_at_any_more() -> None:
    back = audit.LookBack()
    assert back.awaited and back.end() is None and not back.awaited
    back.look(lambda: pytest.fail("the memory is another's by now"))
    assert back.end() is None


def test_who_overwrites_memory_waits_for_the_look_at_it() -> None:
    back, begun, go = audit.LookBack(), threading.Event(), threading.Event()

    def changed() -> set[int]:
        begun.set()
        assert go.wait(30)
        return {7}

    looking = threading.Thread(target=back.look, args=(changed,))
    looking.start()
    assert begun.wait(30)
    found: list[set[int] | None] = []
    ending = threading.Thread(target=lambda: found.append(back.end()))
    ending.start()
    assert back.awaited and not found
    go.set()
    ending.join(30)
    looking.join(30)
    assert found == [{7}] and not back.awaited
