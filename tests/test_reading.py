# SPDX-License-Identifier: Apache-2.0
"""`open_checkpoint`: what it reads, what it verifies, and that the retention of a running job passes it by."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from kit.crash import build as build_for_rank
from kit.crash import in_ranks, settings, tensors_of
from kit.crash import train as train_rank
from kit.shards import differing
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import layerwise_dist as lwd
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit import metadata
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.dcp import LayerwiseReader, LayerwiseWriter
from layerwise_dist.engine import assembly
from layerwise_dist.errors import DamageError, DirectoryError, MismatchError, NotFoundError
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.reading import checkpoint as reading

pytestmark = pytest.mark.quick

torch.set_num_threads(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mid, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.head.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mid(self.emb(x))))


class Job:
    """A training that goes on as long as it is told to; what it holds is what each boundary had."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = Tied()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.ckpt = lwd.attach(
            self.model, self.optimizer, state={"scheduler": self.scheduler}, dir=str(folder), **options
        )
        self.ckpt.explicit()
        self.held: dict[int, dict[str, torch.Tensor]] = {}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.arange(7) * (self.ckpt.completed + 1) % 7).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.ckpt.end_step()
            self.ckpt.wait(self.ckpt.completed)
            buffers = {f"buffer/{name}": value.clone() for name, value in self.model.named_buffers()}
            self.held[self.ckpt.completed] = {**tensors_of(self.model, self.optimizer), **buffers}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: Any) -> None:
        self.ckpt.__exit__(*error)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Job]]:
    """Steps 1 to 3, the second saved again as `best`."""
    folder = tmp_path_factory.mktemp("reading")
    with Job(folder, keep_last=10) as job:
        job.train(2)
        job.ckpt.save("best", {"loss": 0.5})
        job.train(1)
    yield folder, job


def steps(folder: Path) -> set[int]:
    return {
        manifest.step for manifest in CheckpointMetadataManager(PosixEnv(), str(folder)).inventory().manifests.values()
    }


# -- what is in it ----------------------------------------------------------------------------------------------------


def test_every_tensor_is_what_the_job_held(trained: tuple[Path, Job]) -> None:
    folder, job = trained
    for step in (1, 3):
        with lwd.open_checkpoint(folder, step=step) as ckpt:
            found = {name: ckpt[name][...] for name in ckpt}
            assert (ckpt.step, ckpt.tag, ckpt.world_size, ckpt.models, ckpt.hashed) == (step, None, 1, [], True)
            assert ckpt.names == sorted(job.held[step]) and len(ckpt) == len(found)
            assert differing(found, job.held[step]) == []


def test_what_is_no_tensor(trained: tuple[Path, Job]) -> None:
    folder, job = trained
    with lwd.open_checkpoint(folder) as ckpt:
        assert ckpt.state_names == ["scheduler"] and ckpt.state("scheduler")["last_epoch"] == 3
        ckpt.state("scheduler")["last_epoch"] = 9
        assert ckpt.state("scheduler")["last_epoch"] == 3, "each is a copy"
        [group] = ckpt.hyperparameters[""]
        assert group["lr"] == pytest.approx(0.01) and group["betas"] == (0.9, 0.999)
        assert group["params"] == ["emb.weight", "mid.weight", "mid.bias", "norm.weight", "norm.bias"]
        assert ckpt.client_state is None
        with pytest.raises(KeyError, match="no state 'loader'; it has scheduler"):
            ckpt.state("loader")
    with lwd.open_checkpoint(folder, tag="best") as ckpt:
        assert (ckpt.step, ckpt.tag, ckpt.client_state) == (2, "best", {"loss": 0.5})


def test_names_kinds_and_tied_names(trained: tuple[Path, Job]) -> None:
    folder, job = trained
    with lwd.open_checkpoint(folder) as ckpt:
        info = ckpt.info("exp_avg/mid.weight")
        assert (info.kind, info.fqn, info.dtype, info.shape, info.nbytes) == (
            "exp_avg", "mid.weight", torch.float32, (5, 5), 100,
        )  # fmt: skip
        assert ckpt.info("param/emb.weight").aliases == ("param/head.weight",)
        assert "param/head.weight" in ckpt and "param/head.weight" not in ckpt.names
        for name in ("param/head.weight", "exp_avg/head.weight"):
            assert torch.equal(ckpt[name][...], ckpt[name.replace("head", "emb")][...])
        assert ckpt.weights().keys() == job.model.state_dict().keys()
        assert ckpt.weights()["head.weight"] == "param/emb.weight"
        assert ckpt.state_kinds("mid.bias") == ["exp_avg", "exp_avg_sq", "step"]
        with pytest.raises(KeyError, match="no tensor 'param/other'"):
            ckpt["param/other"]


def test_an_index_is_what_torch_makes_of_it(trained: tuple[Path, Job]) -> None:
    folder, job = trained
    with lwd.open_checkpoint(folder) as ckpt:
        lazy, whole = ckpt.get_slice("param/emb.weight"), job.held[3]["param/emb.weight"]
        assert lazy.get_shape() == [7, 5] and lazy.get_dtype() == "F32" and lazy.dtype == torch.float32
        for index in (
            (...,), (2,), (-1,), (slice(1, 4),), (slice(None), 3), (slice(1, 7, 2), slice(0, 5, 3)),
            (..., slice(-2, None)), (3, slice(2, 2)), (slice(5, 1),), (6, 4), (slice(None), ..., 0),
        ):  # fmt: skip
            found = lazy[index if len(index) > 1 else index[0]]
            assert found.shape == whole[index].shape and torch.equal(found, whole[index]), index
        assert torch.equal(lazy.read_range(8, 9), whole.reshape(-1)[8:17])
        assert ckpt["step/emb.weight"][()] == ckpt["step/emb.weight"][...] == 3
        for wrong in (7, -8, (0, 0, 0), (..., ...), slice(None, None, -1)):
            with pytest.raises(IndexError):
                lazy[wrong]
        with pytest.raises(TypeError, match="an integer, a slice or"):
            lazy[True]


@pytest.mark.parametrize("kind", [DDPFramework, Framework])
def test_it_is_one_whole_whichever_ranks_wrote_it(
    tmp_path: Path, kind: type[Framework], caplog: pytest.LogCaptureFixture
) -> None:
    def body(transport: LocalTransport) -> dict[str, torch.Tensor]:
        model, optimizer = build_for_rank(0)
        model[4].register_buffer("mine", torch.full((3,), float(transport.rank)))
        framework = kind(model, transport.rank, 2)
        with assembly.assemble(
            model, optimizer, settings(str(tmp_path)), transport, PosixEnv(), framework=framework
        ) as ckpt:
            ckpt.restore()
            for step in ckpt.steps(2):
                train_rank(model, optimizer, 0, 0, step)
            return tensors_of(model, optimizer)

    wanted, _ = in_ranks(body)
    with lwd.open_checkpoint(tmp_path) as ckpt:
        found = {name: ckpt[name][...] for name in ckpt if not name.startswith("buffer/")}
        assert ckpt.world_size == 2 and differing(found, wanted) == []
        if len(ckpt.info("buffer/4.mine").copies) == 2:
            assert ckpt["buffer/4.mine"][...].tolist() == [0.0] * 3
            assert (
                "buffer/4.mine of step 2: ranks hold different ones (those of 0, 1); rank 0's is taken" in caplog.text
            )
            assert ckpt.tensor("buffer/4.mine", rank=1)[...].tolist() == [1.0] * 3 and ckpt.unlike("buffer/4.mine")
    if kind is Framework:
        assert "rank 0's is taken" in caplog.text


def test_a_parameter_of_which_ranks_hold_different_ones_is_read_by_rank_only(tmp_path: Path) -> None:
    def body(transport: LocalTransport) -> torch.Tensor:
        model, optimizer = build_for_rank(transport.rank)
        framework = Framework(model, transport.rank, 2)
        with assembly.assemble(
            model, optimizer, settings(str(tmp_path)), transport, PosixEnv(), framework=framework
        ) as ckpt:
            for step in ckpt.steps(1):
                train_rank(model, optimizer, transport.rank, 0, step)
            return model[0].weight.detach().clone()

    held = in_ranks(body)
    with lwd.open_checkpoint(tmp_path) as ckpt:
        with pytest.raises(
            MismatchError, match=r"param/0.weight of step 1: .*\(those of 0, 1\): choose one with tensor"
        ):
            ckpt["param/0.weight"][...]
        assert all(torch.equal(ckpt.tensor("param/0.weight", rank)[...], held[rank]) for rank in (0, 1))
        with pytest.raises(KeyError, match="rank 2 of step 1"):
            ckpt.tensor("param/0.weight", 2)


def test_several_models_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {"student": nn.Linear(3, 2), "ema": nn.Linear(3, 2)}
    optimizers = {"student": torch.optim.SGD(models["student"].parameters(), lr=0.1, momentum=0.9)}
    with lwd.attach(models=models, optimizers=optimizers, dir=str(tmp_path)) as engine:
        for _ in engine.steps(1):
            models["student"](torch.ones(1, 3)).sum().backward()
            optimizers["student"].step()
    with lwd.open_checkpoint(tmp_path) as ckpt:
        assert ckpt.models == ["ema", "student"]
        assert ckpt.weights("ema") == {"bias": "param/ema.bias", "weight": "param/ema.weight"}
        assert torch.equal(ckpt[ckpt.weights("student")["weight"]][...], models["student"].weight)
        assert "momentum_buffer/student.weight" in ckpt
        for wrong in (None, "teacher"):
            with pytest.raises(MismatchError, match="name one of ema, student"):
                ckpt.weights(wrong)


# -- what is not sound, or not there ----------------------------------------------------------------------------------


def spoil(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_block_is_named_when_it_is_touched_and_not_before(tmp_path: Path) -> None:
    with Job(tmp_path, writer={"block_kb": 4}) as job:
        job.train(1)
    [shard] = tmp_path.glob("step_*/rank_00000.safetensors")
    with lwd.open_checkpoint(tmp_path) as ckpt:
        [(file, entry)] = ckpt._whole.tensors["param/emb.weight"][0].parts
        spoil(shard, entry.begin + 2)
        with pytest.raises(DamageError, match=r"rank_00000.safetensors of step 1: block \d+ .* does not match"):
            ckpt["param/emb.weight"][0, 0]
        assert torch.equal(ckpt["buffer/norm.running_mean"][...], job.held[1]["buffer/norm.running_mean"])


def test_mutation_blocks_that_are_not_verified_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise_dist.storage.reader import Shard

    monkeypatch.setattr(Shard, "describe", lambda *_: "unseen")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_a_damaged_block_is_named_when_it_is_touched_and_not_before(tmp_path)


def test_a_newest_one_that_does_not_open_is_passed_by_and_one_that_was_asked_for_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Job(tmp_path) as job:
        job.train(2)
    [shard] = tmp_path.glob("step_0000000002-*/rank_00000.safetensors")
    spoil(shard, 30)
    with lwd.open_checkpoint(tmp_path) as ckpt:
        assert ckpt.step == 1 and "passed by: " in caplog.text and str(shard) in caplog.text
    with pytest.raises(DamageError, match="its header does not match its hash"):
        lwd.open_checkpoint(tmp_path, step=2)
    [other] = tmp_path.glob("step_0000000001-*/rank_00000.safetensors")
    spoil(other, 30)
    with pytest.raises(DamageError, match="no checkpoint in .* opens"):
        lwd.open_checkpoint(tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path, trained: tuple[Path, Job]) -> None:
    with pytest.raises(NotFoundError, match="no such directory"):
        lwd.open_checkpoint(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match="holds no committed checkpoint"):
        lwd.open_checkpoint(tmp_path)
    with pytest.raises(NotFoundError, match=r"no committed checkpoint of step 9; committed are \[1, 2, 3\]"):
        lwd.open_checkpoint(trained[0], step=9)
    with pytest.raises(ValueError, match="one of step and tag"):
        lwd.open_checkpoint(trained[0], step=1, tag="best")


def test_nothing_is_read_of_a_closed_one(trained: tuple[Path, Job]) -> None:
    ckpt = lwd.open_checkpoint(trained[0])
    lazy = ckpt["param/emb.weight"]
    ckpt.close()
    ckpt.close()
    assert ckpt.closed
    with pytest.raises(ValueError, match="is closed"):
        lazy[0]


def files_open_in(folder: Path) -> list[str]:
    links = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    return [path for path in (os.readlink(link) for link in links if os.path.lexists(link)) if str(folder) in path]


def test_no_file_stays_open_behind_a_closed_checkpoint_or_an_error_that_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A removed file takes space until it is closed."""
    with Job(tmp_path) as job:
        job.train(2)
    ckpt = lwd.open_checkpoint(tmp_path)
    assert files_open_in(tmp_path)
    ckpt.close()
    assert files_open_in(tmp_path) == []
    [newest] = tmp_path.glob("step_0000000002-*/rank_00000.safetensors")
    spoil(newest, 30)
    with lwd.open_checkpoint(tmp_path):
        pass
    assert caplog.records and files_open_in(tmp_path) == [], "a log record keeps what the error came through"
    [oldest] = tmp_path.glob("step_0000000001-*/rank_00000.safetensors")
    with open(oldest, "ab") as file:
        file.write(b"more")
    with pytest.raises(DamageError) as error:
        lwd.open_checkpoint(tmp_path, step=2)
    with pytest.raises(DamageError, match="bytes long") as other:
        lwd.open_checkpoint(tmp_path, step=1)
    assert (error, other) and files_open_in(tmp_path) == []
    mine = tmp_path / "mine"
    dcp.save({"w": torch.arange(1000.0)}, storage_writer=LayerwiseWriter(mine), no_dist=True)
    [shard] = mine.glob("step_*/rank_00000.safetensors")
    spoil(shard, 5000)
    with pytest.raises(CheckpointException, match="does not match its hash") as third:
        dcp.load({"w": torch.zeros(1000)}, storage_reader=LayerwiseReader(mine), no_dist=True)
    assert third and files_open_in(tmp_path) == []


def test_mutation_files_that_the_garbage_collector_closes_are_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise_dist.storage.reader import Shard

    monkeypatch.setattr(Shard, "close", lambda self: None)
    with pytest.raises(AssertionError):
        test_no_file_stays_open_behind_a_closed_checkpoint_or_an_error_that_is_kept(tmp_path, caplog)


def test_a_log_record_keeps_the_words_of_an_error_and_not_the_error(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("what was wrong")
    logging.getLogger("layerwise_dist").warning("%s, %r", error, error)
    [record] = caplog.records
    assert record.getMessage() == "what was wrong, ValueError('what was wrong')"
    assert record.args is not None and error not in tuple(record.args)


# -- and a job that runs ----------------------------------------------------------------------------------------------


def test_the_retention_of_a_running_job_passes_an_open_checkpoint_by_and_takes_it_once_it_is_closed(
    tmp_path: Path,
) -> None:
    with Job(tmp_path, keep_last=1) as job:
        job.train(1)
        ckpt = lwd.open_checkpoint(tmp_path)
        job.train(3)
        job.ckpt.drain()
        assert steps(tmp_path) >= {1, 4} and not {2} & steps(tmp_path)
        assert differing({name: ckpt[name][...] for name in ckpt}, job.held[1]) == []
        ckpt.close()
        job.train(1)
    assert steps(tmp_path) == {5}


def test_mutation_retention_that_does_not_ask_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointMetadataManager, "_hold_alone", lambda self, path: None)
    with pytest.raises((AssertionError, DamageError)):
        test_the_retention_of_a_running_job_passes_an_open_checkpoint_by_and_takes_it_once_it_is_closed(tmp_path)


def test_mutation_a_reader_that_holds_nothing_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def release(self) -> None:
            return None

    monkeypatch.setattr(CheckpointMetadataManager, "hold", lambda self, attempt: Nothing())
    with pytest.raises((AssertionError, DamageError)):
        test_the_retention_of_a_running_job_passes_an_open_checkpoint_by_and_takes_it_once_it_is_closed(tmp_path)


def test_a_checkpoint_that_is_removed_between_the_look_and_the_hold_is_looked_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job(tmp_path, keep_last=1) as job:
        job.train(1)
        real, looks = reading.candidates, []

        def late(*args: Any) -> Any:
            found = real(*args)
            looks.append(found[0].step)
            if len(looks) == 1:
                job.train(1)
            return found

        monkeypatch.setattr(reading, "candidates", late)
        settled = job.ckpt.committed_step
        with lwd.open_checkpoint(tmp_path) as ckpt:
            # It may have been held before retention came; whichever it is, it is whole.
            assert settled == 1 and ckpt.step == looks[-1]
            assert differing({name: ckpt[name][...] for name in ckpt}, job.held[ckpt.step]) == []


@pytest.mark.slow
def test_the_right_to_read_is_enough_and_the_end_of_a_process_ends_the_hold(trained: tuple[Path, Job]) -> None:
    folder, _ = trained
    [manifest] = folder.glob("step_0000000001-*/manifest.json")
    code = (
        "import layerwise_dist as lwd, os, sys, time\n"
        f"ckpt = lwd.open_checkpoint({str(folder)!r}, step=1)\n"
        "child = os.fork()\n"
        "if not child: time.sleep(600)\n"  # which does not keep it
        "print(child, flush=True); sys.stdin.read()"
    )
    reader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        assert reader.stdout is not None
        child = int(reader.stdout.readline())
        with pytest.raises(BlockingIOError):
            PosixEnv().hold(manifest, True)
        PosixEnv().hold(manifest).release()  # others may read too
        reader.kill()
        reader.wait(30)
        PosixEnv().hold(manifest, True).release()
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        reader.kill()
        reader.communicate(timeout=30)


def test_without_locks_nothing_is_read_and_retention_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> Any:
        raise OSError(metadata.NO_LOCKS[0], "no locks", "manifest.json")

    caplog.set_level(logging.WARNING)
    with Job(tmp_path, keep_last=1) as job:
        env = type("Env", (), {"hold": none, "__getattr__": lambda self, name: getattr(PosixEnv(), name)})
        manager = CheckpointMetadataManager(PosixEnv(), str(tmp_path))
        job.train(1)
        [manifest] = manager.inventory().manifests.values()
        manager.env = env()
        with pytest.raises(DirectoryError, match="has no locks"):
            reading._first(manager, [manifest], reading.Wish())
        assert manager._hold_alone(manager.manifest_path(manifest.attempt_id)) is None
