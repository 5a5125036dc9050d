# SPDX-License-Identifier: Apache-2.0
"""Several models and optimizers in one attach: one attempt, one manifest, all or nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.runners import Warm
from safetensors.torch import load_file
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.frameworks import composite

sys.path.insert(0, str(Path(__file__).parent / "jobs"))
import several  # noqa: E402
from several import ActorCritic, Gan, Job, attach, trial  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize("capture", ["lease", "stage"])
@pytest.mark.parametrize("make", [Gan, ActorCritic], ids=["gan", "actor-critic"])
def test_several_models_train_and_resume_from_every_step_bit_for_bit(
    tmp_path: Path, make: Callable[[int], Job], capture: str
) -> None:
    assert trial(make, str(tmp_path), capture=capture) == []


def test_models_under_ddp_at_three_ranks_resume_from_every_step_bit_for_bit(warm: Warm, tmp_path: Path) -> None:
    warm.run("several.py", 3, tmp_path, "gan", timeout=90)
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"gan": []}


def test_models_under_all_wrappers_at_once_resume_from_every_step_bit_for_bit(warm: Warm, tmp_path: Path) -> None:
    warm.run("several.py", 2, tmp_path, "mixed", timeout=90)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"mixed": []}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_deepspeed_engines_resume_from_every_step_bit_for_bit(zero: Warm, tmp_path: Path) -> None:
    zero.run("several.py", 2, tmp_path, "engines", timeout=150)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"engines": []}


# -- what the comparison must catch ----------------------------------------------------------------------------------


def _last(folder: Path) -> Path:
    return max(folder.glob("step_*/rank_00000.safetensors"))


def test_mutation_a_model_without_optimizer_that_is_not_restored_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = composite.CompositeFramework._merge
    monkeypatch.setattr(
        composite.CompositeFramework, "_merge",
        lambda self: [view for view in merge(self) if not view.fqn.startswith("average")],
    )  # fmt: skip
    assert any("average" in problem for problem in trial(Gan, str(tmp_path)))


def test_mutation_an_optimizer_that_is_not_restored_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt = composite.CompositeOptimizer.adopt

    def forget(self: Any, states: Any, saved: Any, lacking: Any) -> None:
        self._members.pop("generator")
        adopt(self, states, saved, lacking)

    monkeypatch.setattr(composite.CompositeOptimizer, "adopt", forget)
    assert any("state/" in problem for problem in trial(Gan, str(tmp_path)))


# -- fences ----------------------------------------------------------------------------------------------------------


def _on_a_slow_disk(root: Path) -> tuple[list[bool], list[torch.Tensor], Any]:
    """Trains two models by turns; whether the second's lease went on after the first's update, the last weights."""
    env = testing.FaultEnv(PosixEnv())
    env.delay("write", "*rank_*", 0.01)
    nets = {"one": nn.Linear(256, 256), "two": nn.Linear(256, 256)}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for name, net in nets.items()}
    options: dict[str, Any] = {
        "writer": {"queue_depth": 1, "block_kb": 64, "backend": "posix"}, "fence_timeout_s": 2,
        "commit": {"on_failure": "raise", "timeout_s": 10},
    }  # fmt: skip
    config = load_config(None, dir=str(root), pool_mb=8, **options)
    ckpt = assembly.assemble(
        None, None, config, LocalTransport(LocalHub(1), 0), env, models=nets, optimizers=optimizers
    )
    went_on = []
    with ckpt:
        for _ in ckpt.steps(6):
            for name, net in nets.items():
                net(torch.ones(256)).square().sum().backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                if name == "one":
                    left = [capture for capture in workings_of(ckpt).captures.sealed if not capture.settled]
                    went_on += [bool(capture.survey.batches_with(["two"]) & capture.unjudged) for capture in left]
            ckpt.wait(ckpt.completed, "staged", timeout=20) if ckpt.completed else None
    return went_on, [param.detach().clone() for param in nets["two"].parameters()], ckpt


def test_an_update_waits_for_its_own_parameters_only_and_every_checkpoint_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    went_on, (weight, bias), ckpt = _on_a_slow_disk(tmp_path)
    assert any(went_on), "the first optimizer's update waited for the second's parameters"
    assert ckpt.stats()["checkpoints_committed"] >= 5 and ckpt.committed_step == 6
    saved = load_file(_last(tmp_path))
    assert torch.equal(saved["param/two.weight"], weight) and torch.equal(saved["param/two.bias"], bias)


def test_mutation_an_update_that_fences_another_s_parameters_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = composite._Counted.update_starting

    def elsewhere(self: Any, *, in_closure: bool = False, layers: Any = None) -> None:
        if self._name == "two":
            self._starting(in_closure=in_closure, layers={"one"})
        else:
            starting(self, in_closure=in_closure)

    monkeypatch.setattr(composite._Counted, "update_starting", elsewhere)
    with pytest.raises(errors.CommitError, match="two.weight.*changed between the boundary and the next update"):
        _on_a_slow_disk(tmp_path)


# -- what is in the file ---------------------------------------------------------------------------------------------


def test_names_begin_with_the_model_s_and_what_models_share_is_there_once(tmp_path: Path) -> None:
    job = ActorCritic(1)
    with attach(job, str(tmp_path)) as ckpt:
        for number in ckpt.steps(2):
            job.step(number)
    tensors = load_file(_last(tmp_path))
    params = sorted(name for name in tensors if name.startswith("param/"))
    target = [f"param/target.{name}" for name in ("0.bias", "0.weight", "2.bias", "2.weight")]
    assert params == [
        "param/actor.2.bias", "param/actor.2.weight",
        "param/critic.0.bias", "param/critic.0.weight", "param/critic.2.bias", "param/critic.2.weight", *target,
    ]  # fmt: skip
    assert torch.equal(tensors["param/target.0.weight"], job.models["target"][0].weight)
    data = _last(tmp_path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    layers = {name: (offset, offset + nbytes) for name, offset, nbytes in json.loads(header["__metadata__"]["layers"])}
    assert list(layers) == ["critic.0 to actor.2", "(boundary)"]
    begin, end = header["param/target.0.weight"]["data_offsets"]
    assert layers["(boundary)"][0] <= begin < end <= layers["(boundary)"][1], "no optimizer updates it: it is copied"
    manifest = json.loads((_last(tmp_path).parent / "manifest.json").read_text())
    assert manifest["framework"] == "actor:plain,critic:plain,target:plain"


def test_each_optimizer_s_updates_are_counted_and_come_back(tmp_path: Path) -> None:
    for total, expected in ((3, {"generator": 3, "critic": 6}), (4, {"generator": 4, "critic": 8})):
        job = Gan(1)
        with attach(job, str(tmp_path)) as ckpt:
            ckpt.restore()
            for number in ckpt.steps(total):
                job.step(number)
        state = json.loads(load_file(_last(tmp_path))["state/json"].numpy().tobytes())
        assert {name: each["updates"] for name, each in state["optimizer"]["optimizers"].items()} == expected
        assert state["updates"] == sum(expected.values())


# -- where an iteration ends -----------------------------------------------------------------------------------------


def test_an_iteration_of_several_updates_must_be_told_where_it_ends(tmp_path: Path) -> None:
    for number, loop in enumerate((_end_step, _nothing_told)):
        job = Gan(1)
        with attach(job, str(tmp_path / str(number))) as ckpt:
            with pytest.raises(errors.BoundaryError, match="several optimizers.*steps"):
                loop(job, ckpt)
            assert ckpt.completed == 0
    job = Gan(1)
    with attach(job, str(tmp_path / "explicit")) as ckpt:
        ckpt.explicit()
        for number in range(3):
            job.step(number)
            ckpt.end_step()
        assert ckpt.completed == 3
        ckpt.wait(3, timeout=20)


def _end_step(job: Job, ckpt: Any) -> None:
    job.step(0)
    ckpt.end_step()


def _nothing_told(job: Job, ckpt: Any) -> None:
    job.optimizers["critic"].step()
    job.models["generator"](torch.randn(4, 3))


class Scaled(Gan):
    """As under a GradScaler, a fused optimizer is stepped on overflow too, and skips inside its kernel."""

    overflows: dict[str, set[int]] = {"generator": {1, 3}, "critic": {3}}

    def build(self) -> None:
        super().build()
        self.optimizers["critic"] = torch.optim.AdamW(self.models["critic"].parameters(), fused=True)
        self.state = {}

    def step(self, number: int) -> list[str]:
        for name, optimizer in self.optimizers.items():
            optimizer.found_inf = torch.tensor(float(number in self.overflows[name]))
            optimizer.grad_scale = torch.ones(())
        generator, critic = self.models["generator"], self.models["critic"]
        critic(generator(torch.randn(4, 3))).mean().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return []


def test_a_checkpoint_is_due_where_one_optimizer_was_applied_and_moves_on_where_none_was(tmp_path: Path) -> None:
    job = Scaled(1)
    with attach(job, str(tmp_path), keep_last=9, max_in_flight=9) as ckpt:
        for number in ckpt.steps(6):
            if number:
                ckpt.wait(number if number != 4 else 3, timeout=20)
            job.step(number)
        assert ckpt.stats()["captures"] == 5  # of step 4 there is none
    there = sorted(int(path.parent.name[5:15]) for path in tmp_path.glob("step_*/manifest.json"))
    assert there == [1, 2, 3, 5, 6]


def test_a_checkpoint_that_is_due_rarely_moves_on_to_the_next_applied_update(tmp_path: Path) -> None:
    job = Scaled(1)
    with attach(job, str(tmp_path), every_n_steps=4, save_last=False) as ckpt:
        for number in ckpt.steps(7):
            job.step(number)
    assert [int(path.parent.name[5:15]) for path in tmp_path.glob("step_*/manifest.json")] == [5]


# -- what is refused -------------------------------------------------------------------------------------------------


def _nets() -> dict[str, nn.Module]:
    return {"one": nn.Linear(2, 2), "two": nn.Linear(2, 3)}


def test_what_cannot_be_attached_together_is_refused_by_name(tmp_path: Path) -> None:
    nets = _nets()
    one = torch.optim.SGD(nets["one"].parameters(), lr=0.1)
    both = torch.optim.SGD([*nets["two"].parameters(), nets["one"].bias], lr=0.1)
    foreign = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    dotted = {"a.b": nets["one"]}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"model": nets["one"], "models": nets, "optimizer": one}, "either a model or models"),
        ({"models": nets, "optimizer": one, "optimizers": {"a": both}}, "one optimizer, or optimizers"),
        ({"models": {}, "optimizer": one}, "models is empty"),
        ({"models": [nets["one"]], "optimizer": one}, "models must be a dict by name, not list"),
        ({"models": nets, "optimizers": {}}, "optimizers is empty"),
        ({"models": nets}, "needs a torch.optim.Optimizer, not NoneType"),
        ({"models": dotted, "optimizer": one}, "models: 'a.b' is not a valid name"),
        ({"models": nets, "optimizers": {"x/y": one}}, "optimizers: 'x/y' is not a valid name"),
        ({"models": nets, "optimizers": {"a": one, "b": both}}, "one.bias is updated by optimizers a and b"),
        ({"models": nets, "optimizers": {"a": one, "b": foreign}}, "not one of the model's"),
        ({"models": {"one": {}}, "optimizer": one}, "needs a torch.nn.Module, not dict"),
        ({"models": nets, "optimizers": {"a": one}, "update": "pipelined_step"}, "updated as a whole"),
    ]
    for arguments, message in refused:
        with pytest.raises(errors.UnsupportedError, match=message):
            lwd.attach(**arguments, dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_engines_whose_configurations_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "config_block", lambda engine: engine)
    assert assembly.common_block([None, {"dir": "a"}, {"dir": "a"}]) == {"dir": "a"}
    assert assembly.common_block([None, None]) is None
    with pytest.raises(errors.ConfigError, match="different layerwise_checkpoint blocks"):
        assembly.common_block([{"dir": "a"}, {"dir": "b"}])


def test_a_checkpoint_of_other_models_or_optimizers_is_refused_by_their_names(tmp_path: Path) -> None:
    def attach(nets: dict[str, nn.Module], **optimizers: Any) -> Any:
        return lwd.attach(models=nets, **optimizers, dir=str(tmp_path))

    def sgd(*nets: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([param for net in nets for param in net.parameters()], lr=0.1, momentum=0.9)

    def step(optimizers: Any) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.ones_like(param)
            optimizer.step()

    nets = _nets()
    optimizers = {"a": sgd(nets["one"]), "b": sgd(nets["two"])}
    with attach(nets, optimizers=optimizers) as ckpt:
        for _ in ckpt.steps(2):
            step(optimizers.values())
    nets = _nets()
    live = [param.detach().clone() for net in nets.values() for param in net.parameters()]
    one, two = nets["one"], nets["two"]
    adam = torch.optim.AdamW(two.parameters())
    others: list[tuple[dict[str, nn.Module], dict[str, Any], str]] = [
        ({"one": one, "three": two}, {"a": sgd(one), "b": sgd(two)}, "missing from the checkpoint: param/three"),
        (nets, {"a": sgd(one), "c": sgd(two)}, r"optimizers \['a', 'b'\], this job has \['a', 'c'\]"),
        (nets, {"a": sgd(one)}, r"optimizers \['a', 'b'\], this job has \['a'\]"),
        (nets, {"a": sgd(two), "b": sgd(one)}, "a: updated in the checkpoint, and in no group of the optimizer"),
        (nets, {"a": sgd(one), "b": adam}, "b: the checkpoint's optimizer is SGD, this one is AdamW"),
    ]  # fmt: skip
    for models, given, message in others:
        with attach(models, optimizers=given) as ckpt, pytest.raises(errors.MismatchError, match=message):
            ckpt.restore()
    with (
        attach(nets, optimizer=sgd(one, two)) as ckpt,
        pytest.raises(errors.MismatchError, match="here they are not by name"),
    ):
        ckpt.restore()
    assert all(torch.equal(was, now) for was, now in zip(live, [*one.parameters(), *two.parameters()], strict=True))
    with attach(nets, optimizers={"b": sgd(two), "a": sgd(one)}) as ckpt:  # in another order
        assert ckpt.restore() == 2


def test_one_model_may_have_several_optimizers(tmp_path: Path) -> None:
    def run(total: int, folder: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        matrices = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)
        vectors = torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1], lr=0.01)
        optimizers = {"matrices": matrices, "vectors": vectors}
        with lwd.attach(model, optimizers=optimizers, dir=str(folder)) as ckpt:
            ckpt.restore()
            for _ in ckpt.steps(total):
                model(torch.randn(2, 3)).square().sum().backward()
                for optimizer in optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
        return several.contents(model, matrices, vectors)

    run(2, tmp_path / "stopped")
    resumed = run(4, tmp_path / "stopped")
    assert several.differences(resumed, run(4, tmp_path / "whole")) == []


def test_a_layer_whose_state_comes_after_another_optimizer_s_update_finds_room_in_the_pool(tmp_path: Path) -> None:
    nets = {"small": nn.Linear(2, 2), "large": nn.Linear(256, 256)}
    optimizers = {name: torch.optim.AdamW(net.parameters()) for name, net in nets.items()}
    options: dict[str, Any] = {"capture": "stage", "writer": {"queue_depth": 1, "block_kb": 64}, "fence_timeout_s": 5}
    with lwd.attach(models=nets, optimizers=optimizers, dir=str(tmp_path), **options) as ckpt:
        for step in ckpt.steps(3):
            for name, net in nets.items():
                net(torch.ones(net.in_features)).sum().backward()
                optimizers[name].step()
            if step:
                ckpt.wait(step, timeout=20)
    assert ckpt.stats()["checkpoints_committed"] == 3 and ckpt.stats()["pool_bytes"] > 3 * 256 * 256 * 4


def test_models_by_name_may_have_more_than_the_checkpoint_has_if_that_is_said(tmp_path: Path) -> None:
    def run(total: int, *, more: bool, partly: bool) -> tuple[list[torch.Tensor], list[str]]:
        torch.manual_seed(int(more))
        models = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3)), "b": nn.Linear(3, 2)})
        if more:
            models["a"].append(nn.Linear(3, 3))
        optimizers = {name: torch.optim.Adam(model.parameters()) for name, model in models.items()}
        with lwd.attach(models=dict(models), optimizers=optimizers, dir=str(tmp_path)) as ckpt:
            ckpt.restore(partly=partly)
            found = [param.detach().clone() for param in (*models["a"][0].parameters(), *models["b"].parameters())]
            for _ in ckpt.steps(total):
                models["b"](models["a"](torch.ones(2, 3))).sum().backward()
                for optimizer in optimizers.values():
                    optimizer.step()
        return found, ckpt.lacking

    run(2, more=False, partly=False)
    kept, lacking = run(2, more=False, partly=True)
    assert lacking == []
    with pytest.raises(errors.MismatchError, match="missing from the checkpoint: param/a.1.weight"):
        run(2, more=True, partly=False)
    found, lacking = run(3, more=True, partly=True)
    assert lacking == ["param/a.1.weight", "param/a.1.bias"]
    assert all(map(torch.equal, found, kept))
    assert run(3, more=True, partly=False)[1] == []
