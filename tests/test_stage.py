# SPDX-License-Identifier: Apache-2.0
"""Leases that end early by evacuation, and staging: what is copied, what waits for what, and no other change."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.chain import LAYERS, attach, build, check_committed, equal, plain, slow, tensors, update
from kit.crash import try_ranks
from torch import nn

from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture import stage
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer

torch.set_num_threads(1)


# -- the fence ---------------------------------------------------------------------------------------------------------


def fenced(root: Path, pool_mb: int) -> tuple[list[int], dict[str, Any]]:
    """Trains on a slow disk; at each fence, how many blocks were still on their way when it let the update go on."""
    model, optimizer = build()
    pending = []
    # The first checkpoint is audited in full and awaited: it is written before its boundary is over.
    with attach(model, optimizer, root, slow(0.002), pool_mb=pool_mb, max_in_flight=4) as ckpt:
        captures: Any = workings_of(ckpt).captures
        for step in ckpt.steps(8):
            update(model, optimizer, step)
            if captures.open is not None:
                pending.append(captures.last_pending)
        stats = ckpt.stats()
    assert equal(tensors(model, optimizer), plain(8)[8]), "training is what it is without the engine"
    return pending, stats


@pytest.fixture
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes in the captures, after each fence, how many blocks of the fenced shard are not written yet."""
    from layerwise_dist.capture.lease import Capture

    real = Captures.fence

    def watched(captures: Any, *layers: Any) -> None:
        sealed: list[Capture] = list(captures.sealed)
        real(captures, *layers)
        captures.last_pending = sum(capture.write.pending for capture in sealed)

    monkeypatch.setattr(Captures, "fence", watched)
    monkeypatch.setattr(Captures, "last_pending", 0, raising=False)


@pytest.mark.usefixtures("_watched")
def test_with_room_in_the_pool_the_fence_does_not_wait_for_the_disk_and_every_checkpoint_is_right(
    tmp_path: Path,
) -> None:
    pending, stats = fenced(tmp_path, pool_mb=16)
    assert max(pending[3:]) > LAYERS, "blocks are still on their way when the update goes on"
    assert stats["bytes_evacuated"] > 0 and stats["pool_peak_bytes"] > stats["bytes_evacuated"] / 8
    assert len(check_committed(tmp_path, 8)) >= 4


@pytest.mark.usefixtures("_watched")
def test_without_room_in_the_pool_the_fence_waits_and_every_checkpoint_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_of_bounce_buffer = 64 << 10
    monkeypatch.setattr("layerwise_dist.engine.attempts.pool_bytes", lambda *_, **__: pool_of_bounce_buffer)
    pending, stats = fenced(tmp_path, pool_mb=8)
    assert stats["bytes_evacuated"] == 0
    assert max(pending) <= 2, "only what is not leased may be on its way: the boundary's copies and the state"
    assert len(check_committed(tmp_path, 8)) >= 4


def test_a_fence_that_does_not_evacuate_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without the fence, updates get into what is still being read."""
    monkeypatch.setattr("layerwise_dist.storage.adapter.ShardWrite.evacuate", lambda *_: True)
    model, optimizer = build()
    with attach(model, optimizer, tmp_path, slow(0.002), max_in_flight=4) as ckpt:
        for step in ckpt.steps(6):
            update(model, optimizer, step)
    with pytest.raises(AssertionError):
        check_committed(tmp_path, 6)


# -- staging -----------------------------------------------------------------------------------------------------------


def test_staging_copies_each_byte_of_the_layers_once_and_leasing_less_than_a_hundredth(tmp_path: Path) -> None:
    for capture, share in (("stage", 1.0), ("lease", 0.01)):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 2048, bias=False))
        optimizer = torch.optim.AdamW(model.parameters())
        root = tmp_path / capture
        with attach(model, optimizer, root, capture=capture, pool_mb=64, writer={}) as ckpt:
            for step in ckpt.steps(6):
                if step:
                    ckpt.wait(step, timeout=20)  # so that nothing needs to be evacuated
                model(torch.ones(1, 1024)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        stats = ckpt.stats()
        framework = Framework(model, 0, 1)
        survey = Surveyor(framework, TorchOptimizer(framework, optimizer)).look()
        layers = sum(piece.slice.nbytes for piece in survey.pieces)
        assert stats["checkpoints_committed"] == 6 and stats["bytes_evacuated"] == 0
        if capture == "stage":
            assert stats["bytes_copied"] == 6 * layers == 6 * stats["state_bytes"]
            assert stats["pool_peak_bytes"] >= layers
        else:
            assert 0 < stats["bytes_copied"] < share * 6 * layers
        assert stats["copied_share"] == pytest.approx(stats["bytes_copied"] / (6 * stats["state_bytes"]))


@pytest.mark.parametrize("pool_mb", [16, 8], ids=["room for all", "less room than the state"])
def test_staged_training_is_bit_identical_and_so_is_each_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool_mb: int
) -> None:
    if pool_mb == 8:
        monkeypatch.setattr("layerwise_dist.engine.attempts.pool_bytes", lambda *_, **__: 1 << 20)
    model, optimizer = build()
    with attach(model, optimizer, tmp_path, slow(0.0005), capture="stage", pool_mb=pool_mb, max_in_flight=3) as ckpt:
        for step in ckpt.steps(7):
            update(model, optimizer, step)
            if step % 2:
                with torch.no_grad():
                    model[1].weight.clamp_(-1e3, 1e3)  # changes nothing, but raises the counter: staged again
    stats = ckpt.stats()
    assert equal(tensors(model, optimizer), plain(7)[7])
    assert stats["checkpoints_aborted"] == stats["captures"] - stats["checkpoints_committed"]
    assert len(check_committed(tmp_path, 7)) >= 3
    adapter = workings_of(ckpt).adapter
    assert adapter.buffers.in_use == adapter.bounce_bytes, "all of the pool came back"


def test_a_clamp_after_the_update_is_in_the_staged_checkpoint(tmp_path: Path) -> None:
    for blind in (False, True):
        root = tmp_path / str(blind)
        model, optimizer = build()
        with attach(model, optimizer, root, capture="stage", audit="always") as ckpt:
            for step in ckpt.steps(3):
                update(model, optimizer, step)
                with torch.no_grad():
                    (model[2].weight.data if blind else model[2].weight).clamp_(-0.01, 0.01)
        expected = tensors(model, optimizer)
        model, optimizer = build(seed=1)
        with attach(model, optimizer, root) as ckpt:
            assert ckpt.restore() == 3
        assert equal(tensors(model, optimizer), expected)


def test_staged_tensors_may_change_after_the_boundary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build()
    with attach(model, optimizer, tmp_path, slow(0.001), capture="stage", max_in_flight=8) as ckpt:
        for step in ckpt.steps(5):
            if step:
                with torch.no_grad():
                    model[0].weight.add_(1)  # an evaluation with other weights, say
                    model[0].weight.sub_(1)
            update(model, optimizer, step)
        ckpt.wait(5, timeout=20)
    assert "failed" not in caplog.text


def test_a_layer_that_cannot_fit_the_pool_is_an_error_before_anything_is_made(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1500, 1500))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    says = r"pool_mb = 8: staging layer '0' takes 9006000 bytes .* at least 13 are needed"
    with pytest.raises(errors.ConfigError, match=says):
        attach(model, optimizer, tmp_path / "ckpt", capture="stage", pool_mb=8, writer={})
    assert not (tmp_path / "ckpt").exists()
    attach(model, optimizer, tmp_path / "ckpt", capture="stage", pool_mb=13, writer={}).close()
    attach(model, optimizer, tmp_path / "ckpt", capture="lease", pool_mb=8, writer={}).close()


def test_a_layer_that_its_state_makes_too_large_is_an_error_on_its_rank_and_stops_the_others(tmp_path: Path) -> None:
    def body(transport: LocalTransport) -> None:
        model = nn.Sequential(nn.Linear(1000, 1000))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if transport.rank else 0.0)
        config = load_config({"dir": str(tmp_path), "capture": "stage", "pool_mb": 8, "commit": {"timeout_s": 30.0}})
        framework = Framework(model, transport.rank, 2)
        with assembly.assemble(model, optimizer, config, transport, PosixEnv(), framework=framework) as ckpt:
            for _ in ckpt.steps(1000):
                model(torch.ones(1, 1000)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

    told = [rank.error for rank in try_ranks(body)]
    says = r"pool_mb = 8: staging layer '0' takes \d+ bytes beside 4194304 .* at least 12 are needed"
    assert isinstance(told[1], errors.ConfigError) and re.search(says, str(told[1])), told
    stopped = f"stopped on all ranks: checkpoint of step 1 failed: rank 1: {says}"
    assert isinstance(told[0], errors.CommitError) and re.search(stopped, str(told[0])), told


def test_a_pool_that_stays_full_ends_the_attempt_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = build()
    options = {"capture": "stage", "fence_timeout_s": 0.2, "max_in_flight": 4, "commit": {"raise_after": 100}}
    env = slow(0.3)
    ckpt = attach(model, optimizer, tmp_path, env, pool_mb=8, **options)
    for step in ckpt.steps(4):
        update(model, optimizer, step)
    env.clear()
    with pytest.raises(errors.CommitError, match="step 4 was aborted: .* fence_timeout_s"):
        ckpt.close()
    assert equal(tensors(model, optimizer), plain(4)[4])
    assert "fence_timeout_s" in caplog.text


# -- a device, acted ---------------------------------------------------------------------------------------------------


class LazyCopies:
    """A side stream that copies as late as it may: when something waits for its mark."""

    fenced = True

    class Mark:
        def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], ran: threading.Event) -> None:
            self.pairs, self.ran, self.lock = pairs, ran, threading.Lock()

        def run(self) -> None:
            with self.lock:
                for to, source in self.pairs:
                    to.copy_(source)
                self.pairs.clear()
            self.ran.set()

        def query(self) -> bool:
            return self.ran.is_set()

        def synchronize(self) -> None:
            assert self.ran.wait(20)

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.marks: list[LazyCopies.Mark] = []

    def copy(self, pairs: Any) -> None:
        self.pairs += pairs

    def record(self) -> Mark:
        mark = self.Mark(self.pairs, threading.Event())
        self.pairs = []
        self.marks.append(mark)
        return mark

    def wait(self, mark: Mark) -> None:
        if self.fenced:
            mark.run()


def lazily(root: Path, monkeypatch: pytest.MonkeyPatch, fenced: bool) -> Callable[[], list[int]]:
    copies = LazyCopies()
    copies.fenced = fenced
    monkeypatch.setattr(stage, "copies_for", lambda device: copies)
    # An audit looks at what was staged, and so waits for it; none here.
    monkeypatch.setattr("layerwise_dist.capture.audit.FULL_FIRST", 0)
    monkeypatch.setattr("layerwise_dist.capture.audit.units", lambda pieces: [])
    model, optimizer = build()
    with attach(model, optimizer, root, capture="stage", pool_mb=64, max_in_flight=8) as ckpt:
        for step in ckpt.steps(5):
            update(model, optimizer, step)
            for mark in copies.marks[: -LAYERS - 1]:
                mark.run()  # those of the step before, long after its update
        for mark in copies.marks:
            mark.run()
        ckpt.wait(5, timeout=20)
    assert equal(tensors(model, optimizer), plain(5)[5])
    return lambda: check_committed(root, 5)


def test_an_update_waits_for_the_copies_of_the_step_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = lazily(tmp_path, monkeypatch, fenced=True)
    monkeypatch.undo()
    assert 5 in check()


def test_without_the_fence_an_update_gets_into_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    check = lazily(tmp_path, monkeypatch, fenced=False)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        check()


def test_copies_that_do_not_end_fail_their_checkpoints_by_name_and_keep_the_pool_that_they_go_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = LazyCopies()
    copies.fenced = False
    monkeypatch.setattr(stage, "copies_for", lambda device: copies)
    monkeypatch.setattr("layerwise_dist.capture.audit.FULL_FIRST", 0)
    monkeypatch.setattr("layerwise_dist.capture.audit.units", lambda pieces: [])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 1000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"capture": "stage", "fence_timeout_s": 0.2, "max_in_flight": 1, "commit": {"raise_after": 100}}
    with attach(model, optimizer, tmp_path, **options) as ckpt:
        persisting: Any = workings_of(ckpt).participant._persisting
        real, persisting._timeout_s = persisting._timeout_s, 0.2
        says = {
            1: "copies of device memory were still being made after",
            2: "copies into a pool that is now too small were still being made after fence_timeout_s = 0.2 s",
        }
        for step in ckpt.steps(3):
            if step:
                with pytest.raises(errors.CommitError, match=f"step {step} was aborted: .*{says[step]}"):
                    ckpt.wait(step, timeout=20)
                optimizer.param_groups[0]["momentum"] = 0.9  # from now on its state is as large as the layer
            if step == 2:
                for mark in copies.marks:
                    mark.run()
                workings_of(ckpt).attempts._stage._thread.join(20)  # it has given all that it has, and ends
                copies.fenced, persisting._timeout_s = True, real
            model(torch.ones(1, 1000)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for mark in copies.marks:
            mark.run()
        ckpt.wait(3, timeout=20)
    weight = model[0].weight.detach().clone()
    with attach(model, optimizer, tmp_path) as ckpt:
        assert ckpt.restore() == 3 and torch.equal(model[0].weight, weight)


def test_a_device_that_fails_a_copy_ends_the_attempt_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(LazyCopies):
        class Mark(LazyCopies.Mark):
            def query(self) -> bool:
                return False

            def synchronize(self) -> None:
                raise RuntimeError("device-side assert")

    monkeypatch.setattr(stage, "copies_for", lambda device: Failing())
    model, optimizer = build()
    ckpt = attach(model, optimizer, tmp_path, capture="stage", pool_mb=64, commit={"raise_after": 100})
    for step in ckpt.steps(3):
        update(model, optimizer, step)
    with pytest.raises(errors.CommitError, match="device-side assert"):
        ckpt.close()
    assert "device-side assert" in caplog.text and ckpt.committed_step is None
