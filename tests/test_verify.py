# SPDX-License-Identifier: Apache-2.0
"""What a restore or attach() would not take, `layerwise verify` names, though every byte is what was committed."""

from __future__ import annotations

import itertools
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit.crash import build, in_ranks, settings, tensors_of, train, try_ranks
from kit.shards import differing
from torch import nn
from torch.utils.data import DataLoader

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.verifying import verify
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.restore import contents, sealed_state
from layerwise_dist.restore.reslice import first_gap
from layerwise_dist.storage import typed_json
from layerwise_dist.tensors.pieces import Piece
from layerwise_dist.tensors.slices import Slice

pytestmark = pytest.mark.quick

torch.set_num_threads(1)


def damage(folder: Path) -> list[str]:
    """What verify says of a directory; empty if all is sound."""
    answer = verify(Catalogue(str(folder)), None)
    found = [each["damage"] for each in answer.data["damaged_records"]]
    found += [line for each in answer.data["checkpoints"] for line in each["damage"]]
    assert answer.data["good"] == answer.good == (not found)
    return found


# -- the sealed state --------------------------------------------------------------------------------------------------


class Job:
    """A loader within an epoch, a scheduler, an extra state: a sealed state with all that there can be in one."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.loader = DataLoader(torch.arange(24.0).view(8, 3), batch_size=2, shuffle=True)
        self.state = {"loader": self.loader, "scheduler": torch.optim.lr_scheduler.StepLR(self.optimizer, 2)}

    def train(self, folder: Path) -> None:
        with lwd.attach(self.model, self.optimizer, dir=str(folder), keep_last=1, state=self.state):
            for step, batch in enumerate(self.loader):
                self.model(batch).square().sum().backward()
                self.optimizer.step()
                if step == 1:
                    break

    def restore(self, folder: Path) -> int:
        ckpt = lwd.attach(self.model, self.optimizer, dir=str(folder), state=self.state)
        try:
            return ckpt.restore()
        finally:
            ckpt.close()


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """From now on what is read of a state is what a function makes of it, as if it had been written so."""

    def begin(change: Callable[[Any], Any]) -> None:
        def loads(*args: Any, **options: Any) -> Any:
            return change(typed_json.loads(*args, **options))

        monkeypatch.setattr(sealed_state, "typed_json", SimpleNamespace(loads=loads))

    return begin


NEEDED = """
step updates objects client_state gradients extra_state wrapper
boundary boundary.kind boundary.rng boundary.rng.torch boundary.rng.cuda boundary.rng.python boundary.rng_event
boundary.rng_after boundary.at boundary.loaders
boundary.loaders.loader.kind boundary.loaders.loader.iterating boundary.loaders.loader.draws
boundary.loaders.loader.start boundary.loaders.loader.start.rng.torch boundary.loaders.loader.start.own
boundary.loaders.loader.first boundary.loaders.loader.later boundary.loaders.loader.again
boundary.loaders.loader.now boundary.loaders.loader.now.own boundary.loaders.loader.now.epochs
optimizer optimizer.class optimizer.groups optimizer.groups.0.params optimizer.scalars optimizer.order
""".split()  # fmt: skip


def ways() -> Iterator[tuple[str, list[Any]]]:
    """Each member that is needed: its path, and the keys of the way to it."""
    for path in NEEDED:
        yield f"state.{path}", [int(each) if each.isdigit() else each for each in path.split(".")]


def spoiled(state: Any, way: list[Any], how: str) -> Any:
    inside = state
    for key in way[:-1]:
        inside = inside[key]
    if how == "missing":
        del inside[way[-1]]
    else:
        inside[way[-1]] = 1.5
    return state


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "mistyped"])
def test_a_state_without_a_member_or_with_one_of_another_type_is_damage_that_is_named_and_loads_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tampered: Callable[..., None], how: str
) -> None:
    Job(1).train(tmp_path)
    job = Job(2)
    held = {name: each.clone() for name, each in job.model.state_dict().items()}
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), state=job.state) as ckpt:
        for path, way in ways():
            if how == "mistyped" and path == "state.wrapper":
                continue  # of a plain model it may be anything
            tampered(lambda state, way=way: spoiled(state, way, how))
            caplog.clear()
            with pytest.raises(errors.DamageError, match="no checkpoint"):
                ckpt.restore()
            named = f"its state is not one that can be restored: {path}"
            assert named in caplog.text, (path, caplog.text)
            assert all(named in line for line in damage(tmp_path)), path
            assert len(damage(tmp_path)) == 1
            assert not job.optimizer.state
        assert all(torch.equal(each, held[name]) for name, each in job.model.state_dict().items())
        tampered(lambda state: state)
        assert ckpt.restore() == 2


def test_what_says_that_an_iteration_is_under_way_and_not_how_it_began_is_damage(
    tmp_path: Path, tampered: Callable[..., None]
) -> None:
    def change(state: Any) -> Any:
        state["boundary"]["loaders"]["loader"] |= {"iterating": True, "start": None}
        return state

    Job(1).train(tmp_path)
    tampered(change)
    assert "state.boundary.loaders.loader: " in damage(tmp_path)[0]


def test_a_state_of_another_step_is_damage(tmp_path: Path, tampered: Callable[..., None]) -> None:
    Job(1).train(tmp_path)
    tampered(lambda state: {**state, "step": 3})
    assert "state.step is 3, the header's step is 2" in damage(tmp_path)[0]
    with pytest.raises(errors.DamageError):
        Job(2).restore(tmp_path)


@pytest.mark.parametrize("where", ["", "boundary", "boundary.rng", "optimizer", "boundary.loaders.loader"])
def test_members_that_this_version_does_not_know_are_damage_that_is_named(
    tmp_path: Path, tampered: Callable[..., None], where: str
) -> None:
    def more(state: Any) -> Any:
        inside = state
        for key in filter(None, where.split(".")):
            inside = inside[key]
        inside["more"] = OrderedDict(a=1)
        return state

    Job(1).train(tmp_path)
    tampered(more)
    found = damage(tmp_path)
    assert len(found) == 1 and f"state{'.' * bool(where)}{where}: unknown member 'more'" in found[0], found
    with pytest.raises(errors.DamageError):
        Job(2).restore(tmp_path)


def test_hyper_parameters_may_have_any_name(tmp_path: Path, tampered: Callable[..., None]) -> None:
    def more(state: Any) -> Any:
        state["optimizer"]["groups"][0]["more"] = OrderedDict(a=1)
        return state

    Job(1).train(tmp_path)
    tampered(more)
    assert damage(tmp_path) == []
    assert Job(2).restore(tmp_path) == 2


def test_a_state_that_is_not_checked_ends_in_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tampered: Callable[..., None]
) -> None:
    """The tests above can fail."""
    monkeypatch.setattr(sealed_state, "_check", lambda *_: None)
    Job(1).train(tmp_path)
    tampered(lambda state: {**state, "boundary": {}})
    assert damage(tmp_path) == []
    with pytest.raises(errors.CommitError, match="KeyError"):
        Job(2).restore(tmp_path)


WRAPPERS = [
    ("ddp", 3, "state.wrapper"),
    ("ddp", ["a", 1], "state.wrapper"),
    ("deepspeed", None, "state.wrapper"),
    ("deepspeed", {"counters": {}, "window": "2", "loss_scale": None, "lr_scheduler": None}, "state.wrapper.window"),
    ("deepspeed", {"counters": {}, "window": 2, "loss_scale": {}, "lr_scheduler": None}, "wrapper.loss_scale.external"),
    ("a:ddp,b:plain", {"a": None}, "state.wrapper.b"),
    ("a:ddp,b:plain", {"a": 3, "b": None}, "state.wrapper.a"),
]  # fmt: skip


@pytest.mark.parametrize(("framework", "carried", "says"), WRAPPERS)
def test_what_a_wrapper_has_learnt_is_checked_by_the_wrapper_s_kind(framework: str, carried: Any, says: str) -> None:
    with pytest.raises(sealed_state.Unfit, match=says):
        sealed_state.check_wrapper(carried, framework, "state.wrapper")


# -- what all shards hold together -------------------------------------------------------------------------------------


def frameworks(kind: type[Framework], keep: Callable[[int, Piece], list[Piece]]) -> type[Framework]:
    """A wrapper whose ranks write what `keep` (of rank and piece) makes of what they should."""

    class Losing(kind):  # type: ignore[misc, valid-type]
        def pieces(self, *args: Any, **options: Any) -> list[Piece]:
            return [each for piece in super().pieces(*args, **options) for each in keep(self.rank, piece)]

    return Losing


def saved(folder: Path, framework: type[Framework], steps: int = 1) -> None:
    """Two ranks, which hold the same where it is DDP's."""

    def body(transport: LocalTransport) -> None:
        model, optimizer = build(0)
        wrapped = framework(model, transport.rank, 2)
        with assembly.assemble(
            model, optimizer, settings(str(folder)), transport, PosixEnv(), framework=wrapped
        ) as ckpt:
            for step in ckpt.steps(steps):
                train(model, optimizer, 0, 0, step)

    in_ranks(body)


def restored(folder: Path, framework: type[Framework]) -> list[Any]:
    """What each rank got: an error, or the step. What it did not load it did not touch."""

    def body(transport: LocalTransport) -> int:
        model, optimizer = build(0, 5)
        before = tensors_of(model, optimizer)
        wrapped = framework(model, transport.rank, 2)
        with assembly.assemble(
            model, optimizer, settings(str(folder)), transport, PosixEnv(), framework=wrapped
        ) as ckpt:
            try:
                return ckpt.restore()
            except errors.LayerwiseError:
                assert differing(tensors_of(model, optimizer), before) == []
                raise

    return [thread.error or thread.value for thread in try_ranks(body)]


def drop(name: str, ranks: tuple[int, ...] = (0, 1)) -> Callable[[int, Piece], list[Piece]]:
    return lambda rank, piece: [] if piece.slice.name == name and rank in ranks else [piece]


def shorten(rank: int, piece: Piece) -> list[Piece]:
    """Rank 1 leaves out the first element of a tensor that both have a part of."""
    part = piece.slice
    if rank != 1 or part.name != "param/2.weight" or not part.is_flat:
        return [piece]
    less = replace(part, start=part.start + 1, length=part.length - 1)
    return [Piece(less, piece.tensor[1:].clone(), False)]


def otherwise(rank: int, piece: Piece) -> list[Piece]:
    if rank != 1 or piece.slice.name != "param/2.weight":
        return [piece]
    part = Slice("param", "2.weight", "F32", (131, 130), start=0, length=131, among=piece.slice.among)
    return [Piece(part, torch.zeros(131), False)]


LOST: list[tuple[type[Framework], Callable[[int, Piece], list[Piece]], str]] = [
    (DDPFramework, drop("param/0.weight"), "param/0.weight: rank 0 had it"),
    (DDPFramework, drop("param/2.weight", (1,)), r"param/2.weight of shape \[130, 130\]: no shard has its element \[6"),
    (DDPFramework, drop("momentum_buffer/4.bias"), "momentum_buffer/4.bias: rank 0 had it"),
    (DDPFramework, drop("momentum_buffer/2.weight", (0,)), r"no shard has its element \[0, 0\]"),
    (DDPFramework, shorten, r"param/2.weight of shape \[130, 130\]: no shard has its element"),
    (
        DDPFramework,
        otherwise,
        r"it is one tensor shared by ranks 0,1, and shards have F32\[130, 130\] and F32\[131, "
        r"130\]",
    ),
    (Framework, drop("param/2.weight", (1,)), "param/2.weight: rank 1 had it"),
    (Framework, drop("momentum_buffer/2.bias", (0,)), "momentum_buffer/2.bias: rank 0 had it"),
]


@pytest.mark.parametrize(("kind", "keep", "says"), LOST)
def test_a_tensor_that_all_shards_together_do_not_have_whole_is_named_and_not_restored(
    tmp_path: Path, kind: type[Framework], keep: Callable[[int, Piece], list[Piece]], says: str
) -> None:
    saved(tmp_path, frameworks(kind, keep))
    found = damage(tmp_path)
    assert found and all(line.startswith("step 1: ") for line in found)
    assert any(re.search(says, line) for line in found), found
    assert all(isinstance(each, errors.LayerwiseError) for each in restored(tmp_path, kind))


@pytest.mark.parametrize("kind", [Framework, DDPFramework])
def test_what_ranks_hold_alone_or_share_is_sound(tmp_path: Path, kind: type[Framework]) -> None:
    saved(tmp_path, kind, 3)
    assert damage(tmp_path) == []
    assert restored(tmp_path, kind) == [3, 3]


def test_mutation_without_the_look_for_gaps_verify_calls_sound_what_nobody_can_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "first_gap", lambda parts: None)
    saved(tmp_path, frameworks(DDPFramework, shorten))
    assert damage(tmp_path) == []
    assert all(isinstance(each, errors.DamageError) for each in restored(tmp_path, DDPFramework))


def test_shards_of_which_some_lie_elsewhere_are_not_looked_at_together_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, Framework)
    monkeypatch.setattr(Catalogue, "here", lambda self, manifest: manifest.shards[:1])
    monkeypatch.setattr(contents, "lacking", None)
    answer = verify(Catalogue(str(tmp_path)), None)
    assert answer.good
    assert any(
        isinstance(part, str) and "of step(s) 1 only some ranks' shards lie here" in part for part in answer.parts
    )


# -- slices ------------------------------------------------------------------------------------------------------------


def boxes(draw: random.Random, shape: tuple[int, ...]) -> Iterator[Slice]:
    """A tensor cut along its dimensions, uneven and perhaps empty parts included."""
    cuts = [[0, *sorted(draw.choices(range(n + 1), k=draw.randint(0, 2))), n] for n in shape]
    for spans in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
        offsets, lengths = tuple(a for a, _ in spans), tuple(b - a for a, b in spans)
        yield Slice("param", "x", "F32", shape, offsets=offsets, lengths=lengths)


def ranges(draw: random.Random, shape: tuple[int, ...]) -> Iterator[Slice]:
    numel = torch.Size(shape).numel()
    for begin, end in itertools.pairwise([0, *sorted(draw.choices(range(numel + 1), k=draw.randint(0, 4))), numel]):
        yield Slice("param", "x", "F32", shape, start=begin, length=end - begin)


def test_gaps_are_found_as_by_marking_every_element() -> None:
    draw = random.Random(5)
    seen = [0, 0]
    for _ in range(1500):
        shape = tuple(draw.choice([0, 1, 2, 3, 5]) for _ in range(draw.randint(0, 3)))
        make = draw.choice([boxes, ranges])
        parts = [*make(draw, shape), *(make(draw, shape) if draw.random() < 0.3 else ())]
        kept = [part for part in parts if draw.random() > draw.choice([0, 0.1, 0.4])] or parts[:1]
        draw.shuffle(kept)
        marked = torch.zeros(shape, dtype=torch.bool)
        for part in kept:
            if part.is_flat:
                marked.view(-1)[part.start : part.start + part.length] = True
            else:
                marked[tuple(slice(o, o + n) for o, n in zip(part.offsets, part.lengths, strict=True))] = True
        gap = first_gap(kept)
        seen[gap is not None] += 1
        assert (gap is None) == bool(marked.all()), (shape, kept, gap)
        assert gap is None or not marked[gap], (shape, kept, gap)
    assert min(seen) > 100


def test_a_name_in_a_shard_and_in_its_base_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entries_of(*names: str) -> Any:
        index = SimpleNamespace(path="/".join(names), entries=dict.fromkeys(names))
        return SimpleNamespace(index=index)

    assert list(contents.entries([entries_of("a", "b"), entries_of("c")])) == ["a", "b", "c"]
    with pytest.raises(errors.DamageError, match="b is also in a/b"):
        contents.entries([entries_of("a", "b"), entries_of("b")])


# -- the directory -----------------------------------------------------------------------------------------------------


def put(name: str, data: bytes | str | None) -> Callable[[Path], None]:
    """Makes a file of these bytes; a link to a name; a folder, of None."""

    def change(root: Path) -> None:
        (root / name).unlink()
        if data is None:
            (root / name).mkdir()
        elif isinstance(data, str):
            (root / name).symlink_to(data)
        else:
            (root / name).write_bytes(data)

    return change


# What verify says: nothing ("sound"), or a name that a start mends by itself ("mended") or refuses ("refused").
DIRECTORIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "owner torn": (put("owner", b'{"epo'), "sound"),
    "owner missing": (lambda root: (root / "owner").unlink(), "sound"),
    "owner too large": (put("owner", b" " * 4097), "sound"),
    "owner a folder": (put("owner", None), "refused"),
    "owner a link": (put("owner", "identity.json"), "refused"),
    "identity cut": (put("identity.json", b'{"format":'), "mended"),
    "identity missing": (lambda root: (root / "identity.json").unlink(), "mended"),
    "identity a folder": (put("identity.json", None), "refused"),
    "identity a link": (put("identity.json", "owner"), "refused"),
}


@pytest.mark.parametrize("what", DIRECTORIES)
def test_verify_names_what_keeps_a_job_from_beginning_in_a_directory(tmp_path: Path, what: str) -> None:
    change, outcome = DIRECTORIES[what]
    Job(1).train(tmp_path)
    change(tmp_path)
    found = damage(tmp_path)
    assert len(found) == (outcome != "sound") and all(what.split()[0] in line for line in found), found
    if outcome == "refused":
        with pytest.raises(errors.DirectoryError):
            Job(2).restore(tmp_path)
    else:
        assert Job(2).restore(tmp_path) == 2
        assert damage(tmp_path) == []
