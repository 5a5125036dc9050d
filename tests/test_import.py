# SPDX-License-Identifier: Apache-2.0
"""`layerwise import`: what other tools have written, bit for bit, and nothing that their pickles name is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from kit.cli import call, call_json
from kit.runners import DEEPSPEED, Warm
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.dcp import LayerwiseReader
from layerwise_dist.interop import importing, pickles
from layerwise_dist.restore.planner import ShardSet
from layerwise_dist.restore.whole import Whole

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def tensors(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """All of the newest commit's, whole and verified."""
    catalogue = Catalogue(str(folder))
    manifest = catalogue.chosen(step)
    with catalogue.shards(manifest) as opener:

        def of(rank: int) -> list[Any]:
            base = opener.open_base(rank)
            return [opener.open(rank), *([base] if base is not None else [])]

        whole = Whole(manifest, ShardSet(0, of))
        return {name: found[0].read(0, found[0].numel).view(found[0].shape) for name, found in whole.tensors.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    names = one.keys() | other.keys()
    return sorted(
        name for name in names
        if name not in one or name not in other or one[name].dtype != other[name].dtype
        or one[name].shape != other[name].shape or not torch.equal(one[name], other[name])
    )  # fmt: skip


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(5, 7)
        self.norm = torch.nn.BatchNorm1d(7)
        self.b = torch.nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


def update(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(seed: int, split: bool = False) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    groups: Any = model.parameters()
    if split:
        of = dict(model.named_parameters())
        groups = [
            {"params": [of["b.weight"], of["a.weight"]], "weight_decay": 0.5},
            {"params": [each for name, each in of.items() if name not in ("b.weight", "a.weight")]},
        ]
    optimizer = torch.optim.AdamW(groups, lr=0.1 * seed)
    for _ in range(3):
        update(model, optimizer)
    return model, optimizer


def going_on(folder: Path, model: Net, optimizer: torch.optim.Optimizer, split: bool = False, **options: Any) -> Any:
    """Restores what was imported into another model, which must then be as this one is; returns the engine's step."""
    other, its = trained(9, split)
    ckpt = lwd.attach(other, its, dir=str(folder), save_last=False, every_n_steps=None, **options)
    step = ckpt.restore()
    ckpt.close()
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[one][kind], its.state[two][kind]), (name, kind)
    mine, theirs = ([{**group, "params": 0} for group in each.param_groups] for each in (optimizer, its))
    assert mine == theirs
    return step


def test_a_file_of_torch_save_goes_on_with_its_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    held = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
    torch.save({**held, "step": 40}, tmp_path / "a.pt")
    code, said = call("import", tmp_path / "a.pt", tmp_path / "run")
    assert code == 2 and "--allow-pickle" in said and not (tmp_path / "run").exists()
    code, found = call_json("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle", "--drop", "step")
    assert code == 0, found
    assert (found["kind"], found["step"], found["optimizer"]) == ("torch", 40, "AdamW")
    assert found["tensors"] == {"param": 6, "buffer": 3, "step": 6, "exp_avg": 6, "exp_avg_sq": 6}
    assert found["objects"] == ["scheduler"]
    assert call("verify", tmp_path / "run")[0] == 0
    other = torch.optim.lr_scheduler.StepLR(trained(2)[1], 2)
    assert going_on(tmp_path / "run", model, optimizer, state={"scheduler": other}) == 40
    assert other.state_dict() == schedule.state_dict()
    code, said = call("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle")
    assert code == 2 and "holds checkpoints already" in said


def test_groups_of_numbered_parameters_take_their_names_from_a_file_or_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1, split=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    code, said = call("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle")
    assert code == 1 and "give --names FILE" in said
    names = {each: name for name, each in model.named_parameters()}
    listed = [names[each] for group in optimizer.param_groups for each in group["params"]]
    (tmp_path / "wrong").write_text("\n".join(reversed(listed)))
    code, said = call("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle", "--names", tmp_path / "wrong")
    assert code == 1 and "which it would be of" in said
    (tmp_path / "names").write_text("\n".join(listed) + "\n")
    code, said = call("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle", "--names", tmp_path / "names")
    assert code == 0, said
    assert going_on(tmp_path / "run", model, optimizer, split=True) == 3, "as often as the optimizer has stepped"


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_there_and_back_every_tensor_of_a_training_is_the_same(tmp_path: Path, kind: str) -> None:
    """Out of a training's directory by `dcp.load`, on as a file of another tool's, and back."""
    model, optimizer = trained(1)
    with lwd.attach(model, optimizer, dir=str(tmp_path / "run")) as ckpt:
        for _ in ckpt.steps(2):
            update(model, optimizer)
    other, its = trained(2)
    parts = get_state_dict(other, its)
    held = {"model": parts[0], "optim": parts[1]}
    dcp.load(held, storage_reader=LayerwiseReader(tmp_path / "run"))
    set_state_dict(other, its, model_state_dict=held["model"], optim_state_dict=held["optim"])
    if kind == "dcp":
        dcp.save(held, checkpoint_id=tmp_path / "source")
    else:
        torch.save({"model": other.state_dict(), "optimizer": its.state_dict()}, tmp_path / "source")
    code, said = call("import", tmp_path / "source", tmp_path / "back", "--allow-pickle", "--step", "2")
    assert code == 0, said
    assert differing(tensors(tmp_path / "run"), tensors(tmp_path / "back")) == []
    assert going_on(tmp_path / "back", model, optimizer) == 2


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_what_export_writes_comes_back_every_tensor_the_same(tmp_path: Path, kind: str) -> None:
    model, optimizer = trained(1, split=True)
    with lwd.attach(model, optimizer, dir=str(tmp_path / "run")) as ckpt:
        for _ in ckpt.steps(2):
            update(model, optimizer)
    code, said = call("export", tmp_path / "run", tmp_path / "out", "--format", kind)
    assert code == 0, said
    names = {each: name for name, each in model.named_parameters()}
    listed = [names[each] for group in optimizer.param_groups for each in group["params"]]
    (tmp_path / "names").write_text("\n".join(listed))
    of_torch = ["--names", tmp_path / "names"] if kind == "torch" else []  # which numbers them
    code, said = call(
        "import", tmp_path / "out", tmp_path / "back", "--allow-pickle", "--step", "2", *of_torch
    )  # fmt: skip
    assert code == 0, said
    assert differing(tensors(tmp_path / "run"), tensors(tmp_path / "back")) == []
    assert going_on(tmp_path / "back", model, optimizer, split=True) == 2


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)
        self.head = torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.other = torch.nn.Linear(4, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x)) + self.other(self.embed(x))


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_tied_parameters_are_one_again(tmp_path: Path, kind: str) -> None:
    def made(seed: int) -> tuple[Tied, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.arange(9)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made(1)
    if kind == "torch":
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "source")
    else:
        parts = get_state_dict(model, optimizer)
        dcp.save({"model": parts[0], "optim": parts[1]}, checkpoint_id=tmp_path / "source")
    code, found = call_json("import", tmp_path / "source", tmp_path / "run", "--allow-pickle")
    assert code == 0 and found["tensors"]["param"] == 3, found
    other, its = made(2)
    ckpt = lwd.attach(other, its, dir=str(tmp_path / "run"), save_last=False)
    assert ckpt.restore() == 1
    ckpt.close()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert other.head.weight is other.embed.weight


def test_names_in_alphabetical_order_say_nothing_of_the_optimizers(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"b": torch.nn.Linear(3, 3, bias=False), "a": torch.nn.Linear(3, 3, bias=False)})
    optimizer = torch.optim.AdamW(model.parameters())
    held = {"model": dict(sorted(model.state_dict().items())), "optimizer": optimizer.state_dict()}
    torch.save(held, tmp_path / "a.pt")
    code, said = call("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle")
    assert code == 1 and "in alphabetical order" in said


def test_what_dcp_saved_goes_on_with_its_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    parts = get_state_dict(model, optimizer)
    dcp.save({"model": parts[0], "optim": parts[1], "epoch": 2}, checkpoint_id=tmp_path / "dcp")
    code, said = call("import", tmp_path / "dcp", tmp_path / "run", "--allow-pickle", "--step", "7", "--drop", "epoch")
    assert code == 0, said
    assert going_on(tmp_path / "run", model, optimizer) == 7


def test_weights_of_safetensors_are_taken_whole_and_a_missing_file_is_named(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    held = {f"layers.{number}.weight": torch.randn(30, 20) for number in range(4)}
    for number in range(2):
        part = {name: each for name, each in held.items() if int(name.split(".")[1]) % 2 == number}
        save_file(part, source / f"model-{number}.safetensors")
    index = {name: f"model-{int(name.split('.')[1]) % 2}.safetensors" for name in held}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    code, found = call_json("import", source, tmp_path / "run", "--step", "0")
    assert code == 0 and found["optimizer"] is None, found
    assert differing(tensors(tmp_path / "run"), {f"param/{name}": each for name, each in held.items()}) == []
    with lwd.open_checkpoint(tmp_path / "run") as ckpt:
        assert ckpt.weights() == {name: f"param/{name}" for name in sorted(held)}
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(20, 30, bias=False) for _ in range(4))})
    engine = lwd.attach(model, torch.optim.AdamW(model.parameters()), dir=str(tmp_path / "run"), save_last=False)
    with pytest.raises(errors.MismatchError, match="none: only weights were imported"):
        engine.restore()
    engine.close()
    (source / "model-1.safetensors").unlink()
    code, said = call("import", source, tmp_path / "other")
    assert code == 1 and "model-1.safetensors is missing" in said
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    code, said = call("import", source, tmp_path / "other")
    assert code == 1 and "outside its folder" in said
    assert not (tmp_path / "other").exists()


def test_an_import_that_is_interrupted_leaves_no_checkpoint_and_the_next_one_begins_anew(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(300, 300), "b": torch.ones(5)}, tmp_path / "a.pt")
    wanted = importing.Wanted(allow_pickle=True)

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importing.write(importing.read(str(tmp_path / "a.pt"), wanted)[1], str(tmp_path / "run"), wanted, interrupt)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["identity.json", "owner"]
    assert call("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle")[0] == 0
    assert sorted(tensors(tmp_path / "run")) == ["param/a", "param/b"]


class Runs:
    """What a hostile pickle does: it has something called."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


def hostile(folder: Path) -> dict[str, Any]:
    mark = str(folder / "sprung")
    return {
        "system": Runs(os.system, f"touch {mark}"),
        "eval": Runs(eval, f"open({mark!r}, 'w')"),
        "open": Runs(open, mark, "w"),
        "popen": Runs(subprocess.getoutput, f"touch {mark}"),
        "getattr": Runs(getattr, "text", "upper"),
        "import": Runs(__import__, "antigravity"),
        "own": Runs(Runs, print),
    }


@pytest.mark.parametrize("what", [*hostile(Path("/"))])
@pytest.mark.parametrize("kind", ["zip", "legacy", "metadata", "object"])
def test_nothing_that_a_hostile_pickle_names_is_run(tmp_path: Path, what: str, kind: str) -> None:
    value, source = hostile(tmp_path)[what], tmp_path / "a.pt"
    if kind in ("zip", "legacy"):
        held = {"model": {"a": torch.ones(2)}, "more": value}
        torch.save(held, source, _use_new_zipfile_serialization=kind == "zip")
    else:
        source = tmp_path / "dcp"
        dcp.save({"model": {"a": torch.ones(2)}, "epoch": value if kind == "object" else 1}, checkpoint_id=source)
        if kind == "metadata":
            (source / ".metadata").write_bytes(pickle.dumps(value))
    code, said = call("import", source, tmp_path / "run", "--allow-pickle")
    assert code == 1 and "not on the list of names" in said, said
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "run").exists()
    # The file is what it is said to be: with an unpickler that takes everything, it is sprung.
    if what == "system" and kind == "zip":
        torch.load(source, weights_only=False)
        assert (tmp_path / "sprung").exists()


def test_a_name_that_another_library_allowed_torch_is_not_taken_either(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "more": Runs(print, "sprung")}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([print]):
        with pytest.raises(errors.UnsupportedError, match="it holds print, which is not on the list"):
            pickles.load(str(tmp_path / "a.pt"), allowed=True)
        assert print in torch.serialization.get_safe_globals(), "and it is as it was"


def test_stand_ins_do_nothing_and_keep_what_was_said(tmp_path: Path) -> None:
    for name in pickles.NAMES:
        made = next(each for each, known in pickles._STAND_INS if known == name)(1, b=2)
        made.__setstate__({"c": 3})
        assert (made.args, made.get("c"), made.get("d"), made.kind) == ((1, 2), 3, None, name)
        assert not callable(made)


@pytest.mark.parametrize("cut", [0, 10, 500])
def test_bad_input_is_one_line_and_no_traceback(tmp_path: Path, cut: int) -> None:
    torch.save({"model": {"a": torch.ones(200)}}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:cut])
    code, said = call("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle")
    assert code == 1 and said.startswith("layerwise: ") and "Traceback" not in said
    for source, reason in ((tmp_path / "none", "no such file"), (tmp_path, "no checkpoint of a kind")):
        code, said = call("import", source, tmp_path / "run", "--allow-pickle")
        assert code in (1, 2) and reason in said
    assert not (tmp_path / "run").exists()


# DeepSpeed's own checkpoints of two ranks, and what goes on from them, on three.
ZERO = {"1-fp32-accumulate2": "3-fp32", "2-bf16": "1-bf16", "3-fp32-subgroups": "2-fp32"}


@pytest.fixture(scope="module")
def made(zero: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each as DeepSpeed saves it (`ds`), as its own converter does (`universal`), and as an engine does (`ours`); what
    was imported of the first (`run`), restored and saved again.
    """
    out = tmp_path_factory.mktemp("zero")
    zero.run("imports.py", 2, "save", out, *ZERO, env=DEEPSPEED, timeout=120)
    restores: list[object] = []
    for case, into in ZERO.items():
        code, found = call_json("import", out / case / "ds", out / case / "run", "--allow-pickle")
        assert code == 0, found
        (out / case / "found.json").write_text(json.dumps(found))
        shutil.copytree(out / case / "run", out / case / "imported")
        restores += [out / case / "run", into]
    said = zero.run("imports.py", 3, "restore", *restores, env=DEEPSPEED, timeout=120).lines("RESTORED")
    for case, each in zip(ZERO, said, strict=True):
        (out / case / "said").write_text(each)
    return out


@pytest.mark.parametrize("case", ZERO)
def test_deepspeeds_own_checkpoint_goes_on_at_another_stage_on_other_ranks(made: Path, case: str) -> None:
    found = json.loads((made / case / "found.json").read_text())
    assert (found["kind"], found["step"], found["optimizer"], found["groups"]) == ("deepspeed", 3, "AdamW", 2)
    imported = tensors(made / case / "imported")
    assert differing(alike(tensors(made / case / "ours")), alike(imported)) == []
    assert (made / case / "said").read_text().startswith("3 3 2 "), "the step, the engine's, and its schedule's"
    restored = tensors(made / case / "run")
    assert differing(alike(imported), alike(restored)) == [], "what it has restored is what was imported"


@pytest.mark.parametrize("case", list(ZERO)[1:])
def test_a_universal_checkpoint_is_the_same_as_what_it_was_made_of(made: Path, tmp_path: Path, case: str) -> None:
    code, found = call_json("import", made / case / "universal", tmp_path / "run", "--allow-pickle")
    assert code == 0, found
    assert (found["step"], found["groups"]) == (3, 2)
    assert differing(alike(tensors(made / case / "ours")), alike(tensors(tmp_path / "run"))) == []


def alike(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A parameter that is its own master is called either."""
    return {name.replace("master/", "param/"): each for name, each in found.items()}


def test_a_rank_that_is_missing_is_named(made: Path, tmp_path: Path) -> None:
    source = tmp_path / "ds"
    shutil.copytree(made / "2-bf16" / "ds", source)
    for path in source.rglob("*pp_rank_1_mp_rank_00_optim_states.pt"):
        path.unlink()
    code, said = call("import", source, tmp_path / "run", "--allow-pickle")
    assert code == 1 and "some are missing" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "value",
    [
        [1], {"model": {}}, {"model": {"a": 1}}, {"model": {"a": torch.ones(2)}, "optimizer": {"state": 1}},
        {"model": {"a": torch.ones(2)}, "optimizer": {"state": {}, "param_groups": [{"params": [[1]]}]}},
        {"model": {"a": torch.ones(2)}, "optimizer": {"state": {0: 7}, "param_groups": [{"params": [0]}]}},
        {"model": {"a": torch.ones(2)}, "optimizer": {"state": {5: {}}, "param_groups": [{"params": [0]}]}},
        {"model": {"a": torch.ones(2)}, "optimizer": {"state": {}, "param_groups": [{"params": [0, 0]}]}},
        {"model": {"": torch.ones(2)}}, {"model": {1: torch.ones(2)}},
    ],
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_a_named_error(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "a.pt")
    code, said = call("import", tmp_path / "a.pt", tmp_path / "run", "--allow-pickle", "--optimizer", "AdamW")
    assert code == 1 and said.startswith("layerwise: ") and "Traceback" not in said, said
    assert not list((tmp_path / "run").glob("step_*"))
