# SPDX-License-Identifier: Apache-2.0
"""Restores into other ranks and other names, in threads of one process; docs/tables/restore-matrix.md has them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from kit.crash import build, in_ranks, settings, tensors_of, train, try_ranks
from kit.shards import differing
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture import survey
from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.restore import collector, headers, whole
from layerwise_dist.restore.restorer import Restorer
from layerwise_dist.storage.entries import Entry
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.tensors.slices import Slice

pytestmark = pytest.mark.quick

torch.set_num_threads(1)
Seen = list[tuple[int, dict[str, torch.Tensor]]]


def session(
    folder: Path,
    kind: type[Framework],
    world: int,
    steps: int,
    *,
    own: bool = False,
    only: bool = False,
    frozen: bool = False,
    **options: Any,
) -> Seen:
    """Restores, trains to `steps`, and closes: of each rank, the step restored and the tensors, as restored (`only`) or
    at the end. `own`: each rank trains on data of its own.
    """

    def body(transport: LocalTransport) -> tuple[int, dict[str, torch.Tensor]]:
        model, optimizer = build(0, salt=world, frozen=frozen)
        framework = kind(model, transport.rank, world)
        config = settings(str(folder), **options)
        with assembly.assemble(model, optimizer, config, transport, PosixEnv(), framework=framework) as ckpt:
            begin = ckpt.restore()
            for step in ckpt.steps(begin if only else steps):
                train(model, optimizer, transport.rank if own else 0, 0, step)
            return begin, tensors_of(model, optimizer)

    return in_ranks(body, world=world)


@pytest.mark.parametrize(("kind", "world"), [(Framework, 1), (DDPFramework, 3), (Framework, 3)])
def test_other_ranks_get_the_same_state_and_go_on_from_it(
    tmp_path: Path, kind: type[Framework], world: int, caplog: pytest.LogCaptureFixture
) -> None:
    ((_, wanted), _) = session(tmp_path, DDPFramework, 2, 3)
    for begin, found in session(tmp_path, kind, world, 0, only=True):
        assert begin == 3 and differing(found, wanted) == []
    assert f"step 3 was written by 2 rank(s), this job has {world}" in caplog.text
    ((_, later), *_) = session(tmp_path, kind, world, 5, keep_last=1)
    folders = sorted(path.name for path in tmp_path.glob("step_*"))
    assert len(folders) == 1 and folders[0].startswith("step_0000000005"), "what other ranks wrote goes as well"
    for begin, found in session(tmp_path, DDPFramework, 2, 0, only=True):
        assert begin == 5 and differing(found, later) == []


def test_training_goes_on_as_if_nothing_had_changed(tmp_path: Path) -> None:
    ((_, wanted), _) = session(tmp_path / "whole", DDPFramework, 2, 6)
    session(tmp_path / "parts", DDPFramework, 2, 2)
    session(tmp_path / "parts", Framework, 1, 3)
    session(tmp_path / "parts", DDPFramework, 4, 5)
    assert all(differing(found, wanted) == [] for _, found in session(tmp_path / "parts", DDPFramework, 2, 6))


def refused(folder: Path, kind: type[Framework], world: int) -> list[Any]:
    def body(transport: LocalTransport) -> int:
        model, optimizer = build(0, 5)
        before = tensors_of(model, optimizer)
        framework = kind(model, transport.rank, world)
        config = settings(str(folder))
        with assembly.assemble(model, optimizer, config, transport, PosixEnv(), framework=framework) as ckpt:
            try:
                return ckpt.restore()
            except errors.LayerwiseError:
                assert differing(tensors_of(model, optimizer), before) == []
                raise

    return [thread.error or thread.value for thread in try_ranks(body, world=world)]


def test_frozen_parameters_of_another_cut_are_written_anew_and_restored_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)

    def bases() -> set[str]:
        return {path.name for path in tmp_path.glob("base/*")}

    session(tmp_path, DDPFramework, 2, 2, frozen=True, keep_last=1)
    before = bases()
    ((_, wanted), *_) = session(tmp_path, DDPFramework, 3, 3, frozen=True, keep_last=1)
    after = bases()
    assert len(before) == len(after) == 1 and before != after
    for world in (2, 3):
        for begin, found in session(tmp_path, DDPFramework, world, 0, frozen=True, only=True):
            assert begin == 3 and differing(found, wanted) == []
    session(tmp_path, DDPFramework, 3, 4, frozen=True, keep_last=1)
    assert bases() == after, "of the same cut it is the same base"


def test_mutation_a_base_of_another_cut_that_is_referred_to_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Restorer._fit

    def with_base(self: Any, manifest: Any, exchange: Any, terms: Any) -> Any:
        fit, gathered = original(self, manifest, exchange, terms)
        record = manifest.shards[0].base
        if record is not None:
            report = BaseReport(record.attempt, record.nbytes, record.header_bytes, int(record.header_hash, 16))
            fit.loading = replace(fit.loading, base=(report, self._open(manifest, 0)[1].index))
        return fit, gathered

    def take_up(self: Any, found: Any) -> None:
        if self._restored is not None:
            report, self._restored = self._restored[0], None
            self._begin = lambda found, attempt: replace(
                FrozenBases._begin(self, found, attempt), report=lambda timeout_s: report
            )

    monkeypatch.setattr(Restorer, "_fit", with_base)
    monkeypatch.setattr(FrozenBases, "_take_up", take_up)
    with pytest.raises((AssertionError, errors.LayerwiseError)):
        test_frozen_parameters_of_another_cut_are_written_anew_and_restored_from_there(tmp_path, monkeypatch)


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_that_hold_different_tensors_under_one_name_go_nowhere_else(tmp_path: Path, world: int) -> None:
    session(tmp_path, Framework, 2, 2, own=True)
    for error in refused(tmp_path, Framework, world):
        assert isinstance(error, errors.MismatchError)
        assert "rank(s) 0 and 1 of the checkpoint hold different ones" in str(error)
    assert [begin for begin, _ in session(tmp_path, Framework, 2, 0, only=True)] == [2, 2]


def test_mutation_copies_that_are_not_compared_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "marks", lambda shard, own, data: ["the same"] * len(own))
    with pytest.raises(AssertionError):
        test_ranks_that_hold_different_tensors_under_one_name_go_nowhere_else(tmp_path, 1)


def test_a_large_tensor_in_small_parts_is_not_taken_for_a_small_one() -> None:
    part = Slice("param", "w", "F32", (1000, 1000), start=0, length=10, among="0,1")
    tensor = whole.SavedTensor((0, 1), [(cast(Any, None), Entry(part, 0, 40, False))])
    assert tensor.slice.nbytes == 40 and tensor.nbytes == 4_000_000


def test_a_damaged_block_of_any_rank_makes_all_go_back_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session(tmp_path, DDPFramework, 2, 1)
    ((_, wanted), _) = session(tmp_path, DDPFramework, 2, 1)
    session(tmp_path, DDPFramework, 2, 2)
    (shard,) = tmp_path.glob("step_0000000002-*/rank_00001.safetensors")
    content = bytearray(shard.read_bytes())
    content[int.from_bytes(content[:8], "little") + 8 + 5000] ^= 1
    shard.write_bytes(content)
    for begin, found in session(tmp_path, DDPFramework, 3, 0, only=True):
        assert begin == 1 and differing(found, wanted) == []
    assert f"shard {os.path.join(shard.parent, 'rank_00001.safetensors')} of step 2: block 0" in caplog.text


def test_what_the_checkpoint_lacks_stays_as_it_is_with_other_ranks_too(tmp_path: Path) -> None:
    ((_, wanted), _) = session(tmp_path, DDPFramework, 2, 2)

    def body(transport: LocalTransport) -> None:
        model, _ = build(0, 5)
        model.append(nn.Linear(3, 2))
        before = model[5].weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        framework = Framework(model, transport.rank, 3)
        with assembly.assemble(
            model, optimizer, settings(str(tmp_path)), transport, PosixEnv(), framework=framework
        ) as ckpt:
            with pytest.raises(errors.MismatchError, match="missing from the checkpoint: param/5.weight, param/5.bias"):
                ckpt.restore()
            assert ckpt.restore(partly=True) == 2
            assert ckpt.lacking == ["param/5.weight", "param/5.bias"]
            assert torch.equal(model[5].weight, before)
            found = {name: value for name, value in tensors_of(model, optimizer).items() if "/5." not in name}
            assert differing(found, wanted) == []

    in_ranks(body, world=3)


def test_rank_0s_object_for_all_where_that_is_asked_for(tmp_path: Path) -> None:
    def body(transport: LocalTransport) -> None:
        averages = {"own": torch.full((3,), float(transport.rank))}
        model, optimizer = build(0)
        world = transport.world_size
        framework = DDPFramework(model, transport.rank, world)
        with assembly.assemble(
            model, optimizer, settings(str(tmp_path)), transport, PosixEnv(), framework=framework,
            state={"averages": averages},
        ) as ckpt:  # fmt: skip
            if not ckpt.metadata.inventory().empty:
                if world != 2:
                    with pytest.raises(errors.MismatchError, match=r"restore\(objects=\{'averages': \"rank0\"\}\)"):
                        ckpt.restore()
                averages["own"] = torch.full((3,), 9.0)
                with pytest.raises(errors.MismatchError, match="no 'average' in its state"):
                    ckpt.restore(objects={"average": "rank0"})
                ckpt.restore(objects={"averages": "rank0"})
                assert averages["own"].tolist() == [0.0, 0.0, 0.0]
            else:
                ckpt.restore()
                for step in ckpt.steps(1):
                    train(model, optimizer, 0, 0, step)

    in_ranks(body, world=2)
    in_ranks(body, world=2)
    in_ranks(body, world=3)


# -- names ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and a head that are one parameter, first met under the one name or the other."""

    def __init__(self, head_first: bool, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(head_first)
        emb, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        if tied:
            head.weight = emb.weight
        for name, module in [("head", head), ("emb", emb)][:: 1 if head_first else -1]:
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.emb(x))


def trained(model: nn.Module, folder: Path, steps: int, restore: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with lwd.attach(model, optimizer, dir=str(folder)) as ckpt:
        restore(ckpt)
        for step in ckpt.steps(steps):
            optimizer.zero_grad()
            model(torch.arange(5) * (step + 1) % 5).square().mean().backward()
            optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_tied_parameter_is_found_under_any_of_its_names(tmp_path: Path) -> None:
    wanted = trained(Tied(False), tmp_path / "whole", 4, lambda ckpt: None)
    trained(Tied(False), tmp_path / "parts", 2, lambda ckpt: None)
    found = trained(Tied(True), tmp_path / "parts", 4, lambda ckpt: ckpt.restore())
    assert differing(found, wanted) == []


def test_a_parameter_that_is_tied_there_and_not_here_is_another_model(tmp_path: Path) -> None:
    trained(Tied(False), tmp_path, 2, lambda ckpt: None)

    def restore(ckpt: Any) -> None:
        with pytest.raises(errors.MismatchError, match=r"param/head.weight: .* the same parameter as .*param/emb"):
            ckpt.restore()

    trained(Tied(False, tied=False), tmp_path, 0, restore)


# -- what a plan leaves as it was -------------------------------------------------------------------------------------


@pytest.mark.parametrize("was", [True, False])
def test_the_collector_of_cycles_rests_and_is_as_it_was_though_a_plan_fails(was: bool) -> None:
    try:
        (gc.enable if was else gc.disable)()
        with pytest.raises(KeyError), collector.resting():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == was
    finally:
        gc.enable()
