# SPDX-License-Identifier: Apache-2.0
"""What a model's parameters and tensors are is asked at every checkpoint: what came, went, was replaced or reshaped in
the middle of a run is saved as it is, or refused by name.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.capture import survey
from layerwise_dist.frameworks.contents import Contents
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer
from layerwise_dist.tensors import geometry
from layerwise_dist.tensors.geometry import Geometry

sys.path.insert(0, str(Path(__file__).parent / "jobs"))
from job_kit import contents, differences  # noqa: E402

torch.set_num_threads(1)
Change = Callable[[Any], None]


class Job:
    """A trained part, a frozen one, and buffers."""

    def __init__(self, seed: int, make: Callable[..., Any] = torch.optim.AdamW) -> None:
        torch.manual_seed(seed)
        self.model = nn.ModuleDict(
            {"one": nn.Linear(4, 4), "two": nn.Linear(4, 4), "frozen": nn.Linear(4, 4).requires_grad_(False)}
        )
        self.model.register_buffer("table", torch.randn(4, 4))
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad], lr=0.1)

    @property
    def group(self) -> list[nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]

    def step(self) -> None:
        used = [p for p in self.model.parameters() if p.requires_grad]
        inputs = torch.randn(3)
        sum(inputs.sum() * p.float().square().sum() for p in used).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def replace(self, new: torch.Tensor, *, told: bool = True) -> None:
        """The first trained weight, and its state, as densification and pruning of points do it."""
        old, rows = self.model["one"].weight, slice(len(new))
        self.model["one"].weight = nn.Parameter(new)
        if told:
            self.group[self.group.index(old)] = self.model["one"].weight
            state = self.optimizer.state.pop(old, {})
            kept = {name: torch.cat([value, value])[rows] if value.dim() else value for name, value in state.items()}
            if kept:
                self.optimizer.state[self.model["one"].weight] = kept

    def contents(self) -> dict[str, Any]:
        found = contents(self.model, self.optimizer)
        found.pop("rng")  # put back when the loop begins
        return found


def trial(folder: Path, change: Change, *, after: bool = False, **options: Any) -> list[str]:
    """What a job that was made as the first one had become holds otherwise than that one after a restore, and how many
    of its four checkpoints were lost. The change comes before the third update, or after it.
    """
    job = Job(1)
    with lwd.attach(job.model, job.optimizer, dir=str(folder), **options) as ckpt:
        for step in ckpt.steps(4):
            if step == 2 and not after:
                change(job)
            job.step()
            if step == 2 and after:
                change(job)
        ckpt.wait(4)
        lost = int(ckpt.stats()["checkpoints_aborted"])
    expected = job.contents()
    resumed = Job(2)
    change(resumed)
    with lwd.attach(resumed.model, resumed.optimizer, dir=str(folder), **options) as ckpt:
        try:
            assert ckpt.restore() == 4
        except errors.MismatchError as error:
            return [str(error)]
        return differences(resumed.contents(), expected) + [f"{lost} lost"] * bool(lost)


# -- followed ----------------------------------------------------------------------------------------------------------


def densify(job: Job) -> None:
    old = job.model["one"].weight.detach()
    job.replace(torch.cat([old, old[:2] + 1]))


def cull(job: Job) -> None:
    job.replace(job.model["one"].weight.detach()[:3].clone())


def replace_alike(job: Job) -> None:
    job.replace(job.model["one"].weight.detach().clone())


def add_trained(job: Job) -> None:
    job.model["three"] = nn.Linear(4, 2)
    job.optimizer.add_param_group({"params": [*job.model["three"].parameters()], "lr": 0.01})


def add_frozen(job: Job) -> None:
    job.model["three"] = nn.Linear(4, 2).requires_grad_(False)


def remove_frozen(job: Job) -> None:
    del job.model["frozen"]


def assign_frozen(job: Job) -> None:
    job.model["frozen"].load_state_dict(copy.deepcopy(job.model["one"].state_dict()), assign=True)
    job.model["frozen"].requires_grad_(False)


def unfreeze(job: Job) -> None:
    job.optimizer.add_param_group({"params": [*job.model["frozen"].requires_grad_().parameters()]})


def freeze(job: Job) -> None:
    job.model["two"].requires_grad_(False)


def prune_weights(job: Job) -> None:
    prune.l1_unstructured(job.model["two"], "weight", 3)


def unprune(job: Job) -> None:
    prune_weights(job)
    prune.remove(job.model["two"], "weight")


def move(job: Job) -> None:
    module = nn.Module()
    module.w = job.model["two"].weight
    job.model["other"] = module
    del job.model["two"].weight


def rename(job: Job) -> None:
    job.model._modules["last"] = job.model._modules.pop("frozen")


def tie(job: Job) -> None:
    gone = job.model["two"].weight
    job.model["two"].weight = job.model["one"].weight
    job.group.pop(next(place for place, param in enumerate(job.group) if param is gone))
    job.optimizer.state.pop(gone, None)


def into_buffer(job: Job) -> None:
    weight = job.model["frozen"].weight
    del job.model["frozen"].weight
    job.model["frozen"].register_buffer("weight", weight)


def fresh_state(job: Job) -> None:
    for state in job.optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone()


def share_the_buffer(job: Job) -> None:
    job.model["one"].register_buffer("table", job.model._buffers.pop("table"))


def parametrize(job: Job) -> None:
    parametrizations.spectral_norm(job.model["frozen"])


FOLLOWED: list[Change] = [
    densify, cull, replace_alike, add_trained, add_frozen, remove_frozen, assign_frozen, unfreeze, freeze,
    prune_weights, unprune, move, rename, tie, into_buffer, fresh_state, share_the_buffer, parametrize,
]  # fmt: skip


@pytest.mark.parametrize("change", FOLLOWED, ids=lambda change: change.__name__)
def test_parameters_that_came_went_or_were_replaced_are_saved_as_they_are(tmp_path: Path, change: Change) -> None:
    assert trial(tmp_path, change) == []


@pytest.mark.parametrize("options", [{"capture": "stage"}, {"update": "whole", "mode": "monitor"}], ids=str)
def test_densification_is_followed_in_every_way_of_capture(tmp_path: Path, options: dict[str, Any]) -> None:
    assert trial(tmp_path, densify, **options) == []


@pytest.mark.parametrize("nbytes", [1, 1 << 20], ids=["in a base", "in the shard"])
@pytest.mark.parametrize("change", [assign_frozen, into_buffer], ids=lambda change: change.__name__)
def test_frozen_parameters_that_were_replaced_are_never_saved_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, change: Change
) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", nbytes)
    assert trial(tmp_path / "before", change) == []
    if change is assign_frozen:  # also between update and boundary, at no checkpoint's cost
        assert trial(tmp_path / "after", change, after=True) == []


def test_a_teacher_among_several_models_is_followed_and_so_is_a_student_that_grows(tmp_path: Path) -> None:
    def attach(job: Job, teacher: nn.Module, other: Any) -> Any:
        models, optimizers = {"student": job.model, "teacher": teacher}, {"one": job.optimizer, "two": other}
        return lwd.attach(models=models, optimizers=optimizers, dir=str(tmp_path), audit="always")

    def make(seed: int) -> tuple[Job, nn.Module, Any]:
        job = Job(seed)
        del job.optimizer.param_groups[0]["params"][2:]
        return job, copy.deepcopy(job.model).requires_grad_(False), torch.optim.Adam(job.model["two"].parameters())

    job, teacher, other = make(1)
    with attach(job, teacher, other) as ckpt:
        for step in ckpt.steps(4):
            if step == 2:
                densify(job)
            job.step()
            other.step()
            if step == 1:
                teacher.load_state_dict(copy.deepcopy(job.model.state_dict()), assign=True)
                teacher.requires_grad_(False)
        ckpt.wait(4)
        assert ckpt.stats()["checkpoints_aborted"] == 0
    resumed, other_teacher, another = make(2)
    densify(resumed)
    with attach(resumed, other_teacher, another) as ckpt:
        assert ckpt.restore() == 4
    assert differences(resumed.contents() | contents(other_teacher), job.contents() | contents(teacher)) == []


def test_an_update_of_a_parameter_that_is_not_known_yet_may_change_any_layer() -> None:
    job = Job(1)
    framework = Framework(job.model, 0, 1)
    adapter = TorchOptimizer(framework, job.optimizer)
    assert adapter.layers == {"one", "two"}
    replace_alike(job)
    assert adapter.layers is None
    framework.follow()
    adapter.states(framework.params)
    assert adapter.layers == {"one", "two"}


@pytest.mark.parametrize("change", [densify, add_trained, cull], ids=lambda change: change.__name__)
def test_what_changes_between_update_and_boundary_is_saved_as_the_boundary_has_it(
    tmp_path: Path, change: Change
) -> None:
    assert trial(tmp_path, change, after=True) == []


def test_a_roll_back_to_before_a_change_is_a_mismatch_and_loads_nothing(tmp_path: Path) -> None:
    job = Job(1)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), keep_last=9) as ckpt:
        for step in ckpt.steps(3):
            if step == 1:
                densify(job)
            job.step()
        before = job.contents()
        with pytest.raises(
            errors.MismatchError, match=r"one.weight: the checkpoint has F32\[4, 4\], the model F32\[6, 4\]"
        ):
            ckpt.restore(1)
        assert differences(job.contents(), before) == []
        for _ in ckpt.steps(4):
            job.step()
        ckpt.restore(3)
        assert differences(job.contents(), before) == []


# -- the same object, other memory -------------------------------------------------------------------------------------


def cut(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data[:3]


def shift(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data[1:]


def turn(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.t()


def flatten(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.view(2, 8)


def reread(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.view(torch.int32)


def unsqueeze(tensor: torch.Tensor) -> None:
    tensor.unsqueeze_(0)


def shrink(tensor: torch.Tensor) -> None:
    tensor.resize_(2, 4)


def conjugate(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.conj()


def negate(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data._neg_view()


INTO: list[Callable[[torch.Tensor], None]] = [cut, shift, turn, flatten, reread, unsqueeze, shrink, conjugate, negate]


@pytest.mark.parametrize("into", INTO, ids=lambda into: into.__name__)
def test_geometry_is_address_shape_strides_dtype_and_lazy_bits(into: Callable[[torch.Tensor], None]) -> None:
    dtype = torch.complex64 if into is conjugate else torch.float32
    tensors = [torch.randn(4, 4), torch.randn(4, 4).to(dtype), torch.randn(())]
    known = Geometry(tensors)
    assert known.is_of(tensors) and known.is_of(tensors)  # the second time by other means
    tensors[1].mul_(2)
    tensors[0].requires_grad_()
    assert known.is_of(tensors)
    with torch.inference_mode():
        assert known.is_of(tensors)
    assert not known.is_of(tensors[:2]) and not known.is_of([*tensors, tensors[0]])
    twice = [tensors[0], tensors[0]]
    assert Geometry(twice).is_of(twice)
    into(tensors[1])
    assert not known.is_of(tensors) and Geometry(tensors).is_of(tensors)


class Asked(Mapping[str, Any]):
    """Makes its entries at each question."""

    def __init__(self, made: dict[str, Any]) -> None:
        self.made = made

    def __getitem__(self, name: str) -> Any:
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def renamed(held: Any) -> None:
    held["c"] = held.pop("b2")


def reordered(held: Any) -> None:
    held["a"] = held.pop("a")


OTHERWISE: dict[str, Callable[[Any], object]] = {
    "a name more": lambda held: held.update(c=1), "a name less": lambda held: held.pop("b2"), "another name": renamed,
    "another order": reordered,
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda made: defaultdict(dict, made), Asked])
def test_contents_are_names_in_order_and_the_very_objects(kind: Callable[[dict[str, Any]], Any]) -> None:
    """Equal strings are one name: some mappings make theirs at each question."""
    one, other = object(), [1.5]

    def made() -> list[Any]:
        return [kind({}), kind({"a": one, "".join(["b", "2"]): other}), kind({"a": one})]

    held = Contents(made())
    assert (held.names, held.values) == (["a", "b2", "a"], [one, other, one])
    assert held.same(made()) and held.others(made()) == []
    new = made()
    getattr(new[1], "made", new[1])["b2"] = [1.5]
    assert held.others(new) == [(1, [1.5])] and not held.same(new)
    for change in OTHERWISE.values():
        new = made()
        change(getattr(new[1], "made", new[1]))
        assert held.others(new) is None and not held.same(new)
    for new in (made()[:2], [*made(), kind({})], made()[::-1], [kind({"a": one}), kind({"b2": other, "a": one})]):
        assert held.others(new) is None


@pytest.mark.quick
def test_names_that_are_no_strings_are_one_if_they_are_one_object_and_an_order_that_was_changed_counts() -> None:
    param, twin = torch.zeros(2), torch.zeros(2)
    held = Contents([{param: 1, 1: 2}])
    assert held.same([{param: 1, 1: 2}])
    assert held.others([{twin: 1, 1: 2}]) is held.others([{param: 1, True: 2}]) is None
    ordered = OrderedDict(a=1, b=2)
    held = Contents([ordered])
    ordered.move_to_end("a")
    assert held.others([ordered]) is None


def of_parameter(into: Callable[[torch.Tensor], None]) -> Change:
    def change(job: Job) -> None:
        weight = job.model["one"].weight
        for tensor in (weight, *(v for v in job.optimizer.state.get(weight, {}).values() if v.dim())):
            into(tensor)

    return change


def of_frozen(into: Callable[[torch.Tensor], None]) -> Change:
    return lambda job: into(job.model["frozen"].weight)


def of_buffer(into: Callable[[torch.Tensor], None]) -> Change:
    return lambda job: into(job.model.table)


def halve(job: Job) -> None:
    job.model.half()
    job.optimizer.state.clear()


RESHAPED: dict[str, Change] = {
    **{f"parameter {into.__name__}": of_parameter(into) for into in (cut, shift, turn, flatten)},
    **{f"frozen {into.__name__}": of_frozen(into) for into in (cut, turn, unsqueeze)},
    **{f"buffer {into.__name__}": of_buffer(into) for into in (cut, shift, turn, reread, unsqueeze, shrink)},
    "model.half()": halve,
}


@pytest.mark.parametrize("what", RESHAPED)
def test_what_got_another_shape_in_the_same_memory_is_saved_as_it_is(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    assert trial(tmp_path, RESHAPED[what]) == []


@pytest.mark.parametrize("what", ["parameter turn", "buffer shrink"])
def test_another_shape_between_update_and_boundary_is_saved_as_the_boundary_has_it(tmp_path: Path, what: str) -> None:
    assert trial(tmp_path, RESHAPED[what], after=True) == []


# -- proofs that these can fail ----------------------------------------------------------------------------------------


def test_mutation_a_tree_that_is_not_asked_for_its_parameters_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise_dist.frameworks.framework._DICTS", operator.attrgetter("_modules", "_buffers"))
    assert trial(tmp_path, assign_frozen) != []


@pytest.mark.parametrize("change", [assign_frozen, fresh_state], ids=lambda change: change.__name__)
def test_mutation_a_comparison_of_names_alone_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    monkeypatch.setattr(Contents, "others", lambda held, now: [] if Contents(now).names == held.names else None)
    assert trial(tmp_path, change) != []


@pytest.mark.parametrize("what", ["parameter cut", "frozen unsqueeze", "buffer reread"])
def test_mutation_a_glance_at_addresses_alone_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(Geometry, "is_of", lambda known, tensors: geometry._addresses(tensors) == known._addresses)
    assert trial(tmp_path, RESHAPED[what]) != []


# -- refused -----------------------------------------------------------------------------------------------------------


def replace_untold(job: Job) -> None:
    job.replace(job.model["one"].weight.detach().clone(), told=False)


def assign_all(job: Job) -> None:
    job.model.load_state_dict(copy.deepcopy(job.model.state_dict()), assign=True)


def convert(job: Job) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        job.model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def remove_trained(job: Job) -> None:
    del job.model["one"]


def trained_into_buffer(job: Job) -> None:
    weight = job.model["one"].weight
    del job.model["one"].weight
    job.model["one"].register_buffer("weight", weight)


def weight_norm(job: Job) -> None:
    parametrizations.weight_norm(job.model["one"])


def foreign(job: Job) -> None:
    job.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})


def replace_in_the_group_only(job: Job) -> None:
    job.group[0] = nn.Parameter(job.group[0].detach().clone())


REPLACED = r"parameter 0 of group 0 is the Parameter that was one.weight; the model has another one in its place"
GONE = r"parameter 0 of group 0 was one.weight, which is no longer in the model under any name"
REFUSED: dict[Change, str] = {
    replace_untold: REPLACED, assign_all: REPLACED, convert: REPLACED, remove_trained: GONE, trained_into_buffer: GONE,
    weight_norm: GONE, foreign: r"parameter 0 of group 1 \(shape \[7\]\) is not one of the model's",
    replace_in_the_group_only: r"parameter 0 of group 0 \(shape \[4, 4\]\) is not one of the model's",
}  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before the update", "after it"])
@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_an_optimizer_that_updates_what_is_not_in_the_model_is_refused_by_name_before_anything_is_committed(
    tmp_path: Path, change: Change, after: bool
) -> None:
    job = Job(1, torch.optim.SGD)
    ckpt = lwd.attach(job.model, job.optimizer, dir=str(tmp_path))
    with pytest.raises(errors.UnsupportedError, match=REFUSED[change]):
        for step in ckpt.steps(9):
            if step == 2 and not after:
                change(job)
            job.step()
            if step == 2 and after:
                change(job)
    assert step == 2
    with pytest.raises(errors.CommitError, match=REFUSED[change]):
        ckpt.close()
    assert ckpt.committed_step == 2


def test_replicas_that_share_a_parameter_refuse_it_with_another_number_of_elements() -> None:
    job = Job(1)
    framework = DDPFramework(job.model, 1, 2)
    surveyor = survey.Surveyor(framework, TorchOptimizer(framework, job.optimizer))
    surveyor.look()
    turn(job.model["frozen"].weight)
    surveyor.look()
    cut(job.model["frozen"].weight)
    with pytest.raises(errors.UnsupportedError, match="frozen.weight had 16 elements at attach.. and has 12 now"):
        surveyor.look()
    with pytest.raises(errors.UnsupportedError, match="frozen.weight had 16 elements"):
        surveyor.look()


@pytest.mark.parametrize("update", ["pipelined_step", "in_backward"])
def test_layered_updates_follow_what_they_do_not_update_and_refuse_the_rest(tmp_path: Path, update: str) -> None:
    assert trial(tmp_path / "frozen", assign_frozen, update=update) == []
    for change in (replace_alike, move, add_trained):
        with pytest.raises(errors.UnsupportedError, match="update = 'whole'"):
            trial(tmp_path / change.__name__, change, update=update)
    with pytest.raises(errors.UnsupportedError, match=REPLACED):
        trial(tmp_path / "untold", replace_untold, update=update)
