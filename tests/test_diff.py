# SPDX-License-Identifier: Apache-2.0
"""`layerwise diff` and `show --tensors`: every bit that differs is found, told how far it is, and nothing else is."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from kit.cli import call, call_json
from kit.commands import ROOT
from safetensors.torch import save_file
from torch import nn

import layerwise_dist as lwd
from layerwise_dist.reading.tensor import LazyTensor
from layerwise_dist.tensors import difference as measured
from layerwise_dist.tensors.difference import Difference, count_odd, difference
from layerwise_dist.tensors.slices import ITEM_BYTES

torch.set_num_threads(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 300)
        self.norm = nn.BatchNorm1d(300)
        self.head = nn.Linear(300, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(x)))


def train(root: Path, steps: int, change: Any = None) -> nn.Module:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    with lwd.attach(model, optimizer, dir=str(root), keep_last=9, state={"place": {"at": 1}}) as ckpt:
        for step in ckpt.steps(steps):
            model(torch.arange(8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if change is not None and step == steps - 1:
                with torch.no_grad():
                    change(model)
        ckpt.save("last")
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    root = tmp_path_factory.mktemp("diff") / "checkpoints"
    return root, train(root, 2)


def changed(model: nn.Module) -> None:
    """One neighbour, a zero's sign, and no number."""
    weight = model.embedding.weight.view(-1)
    weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))
    model.norm.bias[0], model.norm.bias[1] = -0.0, math.nan


def test_it_finds_which_tensors_differ_in_how_many_elements_and_how_far(
    trained: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    root, _ = trained
    other = tmp_path / "other"
    train(other, 2, changed)
    code, found = call_json("diff", root, other, "--tag", "last")
    assert code == 1 and not found["good"] and found["equal"] == found["compared"] - 2
    differing = {each["name"]: each for each in found["differing"]}
    assert differing.keys() == {"param/embedding.weight", "param/norm.bias"}
    weight = differing["param/embedding.weight"]
    assert (weight["elements"], weight["of"], weight["max_ulps"], weight["nans"]) == (1, 12000, 1, 0)
    assert 0 < weight["max_abs"] < 1e-6
    assert differing["param/norm.bias"]["elements"] == 2 and differing["param/norm.bias"]["nans"] == 1
    code, text = call("diff", root, other, "--tag", "last")
    assert code == 1 and "param/embedding.weight" in text and "2 of" in text


def test_the_same_training_twice_is_equal_to_the_bit(trained: tuple[Path, nn.Module], tmp_path: Path) -> None:
    root, _ = trained
    train(tmp_path / "other", 2)
    code, found = call_json("diff", root, tmp_path / "other", "--step", 1)
    assert code == 0 and found["good"] and found["equal"] == found["compared"] > 6 and found["differing"] == []
    assert "bit-for-bit equal" in call("diff", root, tmp_path / "other")[1]


def test_two_steps_of_one_directory(trained: tuple[Path, nn.Module]) -> None:
    root, _ = trained
    code, found = call_json("diff", root, "--step", 1, "--step", 2)
    assert code == 1 and {"param/embedding.weight", "exp_avg/embedding.weight", "step/embedding.weight"} <= {
        each["name"] for each in found["differing"]
    }
    assert call("diff", root, "--step", 2, "--tag", "last")[0] == 0


def test_mutation_a_comparison_that_trusts_all_hashes_calls_changed_tensors_equal(
    trained: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = trained
    train(tmp_path / "other", 2, changed)
    monkeypatch.setattr(LazyTensor, "surely_equals", lambda self, other: True)
    assert call("diff", root, tmp_path / "other", "--tag", "last")[0] == 0


@pytest.mark.parametrize("kind", ["safetensors", "torch", "nested", "legacy"])
def test_weights_of_other_tools_are_compared_by_the_models_names(
    trained: tuple[Path, nn.Module], tmp_path: Path, kind: str
) -> None:
    root, model = trained
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def save(tensors: dict[str, torch.Tensor]) -> Path:
        path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
        if kind == "safetensors":
            save_file(tensors, path)
        elif kind == "nested":
            torch.save({"model": tensors, "optimizer": {"x": torch.ones(1)}, "epoch": 3}, path)
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=kind == "torch")
        return path

    code, found = call_json("diff", root, save(state), "--tag", "last")
    assert code == 0, found
    assert found["compared"] == len(state) and found["only_in_a"] == found["only_in_b"] == []
    state["head.weight"][3, 7] += 1
    state["norm.bias"] = state["norm.bias"].double()
    del state["norm.weight"]
    code, found = call_json("diff", save(state), root, "--step", 2)
    assert code == 1 and found["only_in_b"] == ["norm.weight"]
    by_name = {each["name"]: each for each in found["differing"]}
    assert by_name.keys() == {"head.weight", "norm.bias"} and by_name["head.weight"]["elements"] == 1
    assert by_name["norm.bias"]["a"]["dtype"] == "F64" and "elements" not in by_name["norm.bias"]
    assert "A has F64" in call("diff", save(state), root)[1]


def test_folders_of_other_tools_are_compared_with_what_they_have(
    trained: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    root, model = trained
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = sorted(state)
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({name: state[name] for name in names[:3]}, folder / "a.safetensors")
    save_file({name: state[name] for name in names[3:]}, folder / "b.safetensors")
    weight_map = {name: "a.safetensors" if name in names[:3] else "b.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code, found = call_json("diff", root, folder, "--step", 2)
    assert code == 2 and "no step" in found["error"]
    code, found = call_json("diff", root, folder)
    assert code == 0 and found["compared"] == len(state)
    state["norm.bias"][0] += 1
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    code, found = call_json("diff", tmp_path / "dcp", root)
    assert code == 2 and "--allow-pickle" in found["error"]
    code, found = call_json("diff", tmp_path / "dcp", root, "--allow-pickle")
    assert (
        code == 1 and [each["name"] for each in found["differing"]] == ["norm.bias"] and found["compared"] == len(state)
    )


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_what_cannot_be_compared_is_named(
    trained: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root, _ = trained
    torch.save(Harm(), "harm.pt")
    torch.save({"a": 1}, "none.pt")
    torch.save({"a": torch.eye(2).to_sparse()}, "sparse.pt")
    Path("text.pt").write_text("hello")
    Path("empty.pt").touch()
    Path("text.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    os.mkfifo("pipe")
    for arguments, words in (
        ((root, "nowhere"), "no such directory"), ((root,), "with what"), ((root, "harm.pt"), "torch.load"),
        ((root, "none.pt"), "no tensors"), ((root, "sparse.pt"), "not compared"), ((root, "text.pt"), "torch.load"),
        ((root, "empty.pt"), "torch.load"), ((root, "text.safetensors"), "not a safetensors file"),
        ((root, "pipe"), "neither"), ((root, "none.pt", "--step", 1, "--step", 2), "is a file"),
        ((root, "--step", 1, "--step", 2, "--tag", "last"), "at most twice"),
        ((root, "--step", 1, "--step", 9), "no checkpoint of step 9"),
    ):  # fmt: skip
        code, text = call("diff", *arguments)
        assert code == 2 and words in text, (arguments, text)
    assert not Path("harmed").exists()


def test_damage_ends_a_comparison(tmp_path: Path) -> None:
    root, other = tmp_path / "one", tmp_path / "other"
    train(root, 1)
    train(other, 1, changed)
    shown = call_json("show", other, "--tag", "last")[1]
    part = next(tensor for tensor in shown["tensors"] if tensor["name"] == "param/embedding.weight")["parts"][0]
    path = other / shown["folder"] / part["file"]
    data = bytearray(path.read_bytes())
    data[part["begin"] + 900] ^= 1
    path.write_bytes(data)
    code, text = call("diff", root, other, "--tag", "last")
    assert code == 1 and "embedding.weight" in text and "does not match its hash" in text
    code, found = call_json("show", other, "--tag", "last", "--tensors", "--values")
    assert code == 1 and found["problems"] and all(tensor["nan"] is None for tensor in found["tensors"])


# -- how far ----------------------------------------------------------------------------------------------------

FLOATS = [dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", FLOATS)
def test_ulps_are_steps_from_one_number_to_the_next(dtype: torch.dtype) -> None:
    one = torch.tensor([0.0, 1.0, -1.0, 3.5, torch.finfo(dtype).max], dtype=dtype)
    more, at = torch.tensor(math.inf, dtype=dtype), one
    for steps in range(1, 4):
        at = torch.nextafter(at, more)
        assert difference(one[:4], at[:4]).max_ulps == steps and difference(one[:4], at[:4]).elements == 4
    assert difference(one, torch.nextafter(one, more)).max_abs == math.inf
    zeros = torch.tensor([0.0, 0.0], dtype=dtype)
    assert difference(zeros, -zeros) == Difference(2, 0.0, 0, 0)
    least = torch.nextafter(zeros, more)
    assert difference(least, -least).max_ulps == 2
    nan = torch.tensor([math.nan, 1.0], dtype=dtype)
    assert difference(nan, nan) == Difference(max_ulps=0)
    assert difference(nan, torch.ones(2, dtype=dtype)) == Difference(1, 0.0, 0, 1)
    far = torch.tensor([math.inf], dtype=dtype)
    everything = difference(far, -far)
    assert everything.max_ulps == 2 * int(far.view(measured._INTS[dtype.itemsize])) and everything.max_abs == math.inf


@pytest.mark.quick
def test_integers_and_others_are_as_far_as_they_are() -> None:
    long = torch.tensor([-(1 << 63), 5])
    assert difference(long, torch.tensor([(1 << 63) - 1, 5])) == Difference(1, (1 << 64) - 1, None, 0)
    assert (
        difference(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([255, 0], dtype=torch.uint8)).max_abs == 255
    )
    assert difference(torch.tensor([-128], dtype=torch.int8), torch.tensor([127], dtype=torch.int8)).max_abs == 255
    assert difference(torch.tensor([True, False]), torch.tensor([True, True])) == Difference(1, 1, None, 0)
    one, other = torch.tensor([1 + 2j, 3j]), torch.tensor([1 + 2.5j, complex(math.nan, 3)])
    assert difference(one, other) == Difference(2, 0.5, 1 << 21, 1)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        row = torch.tensor([1.0, math.nan, 2.0]).to(dtype)
        assert difference(row, torch.tensor([1.0, 1.0, 2.0]).to(dtype)) == Difference(1, 0.0, 0, 1)
        assert count_odd(row) == (1, 0)
    assert count_odd(torch.tensor([1, 2])) == (0, 0)
    assert difference(torch.ones(0), torch.ones(0)).elements == 0
    assert {measured._INTS[size] for size in ITEM_BYTES.values()} == set(measured._INTS.values())


@pytest.mark.quick
def test_pieces_add_up() -> None:
    one, other = torch.randn(1000), torch.randn(1000)
    other[:300] = one[:300]
    parts = Difference()
    for start in range(0, 1000, 7):
        parts += difference(one[start : start + 7], other[start : start + 7])
    assert parts == difference(one, other)


# -- show --tensors ---------------------------------------------------------------------------------------------


def test_show_lists_the_tensors_that_fit_where_they_lie_and_what_is_no_number(tmp_path: Path) -> None:
    train(tmp_path, 1, changed)
    code, found = call_json("show", tmp_path, "--tag", "last", "--tensors", "*norm.*", "--values")
    counts = {tensor["name"]: (tensor["nan"], tensor["inf"]) for tensor in found["tensors"]}
    assert code == 0 and counts.pop("param/norm.bias") == (1, 0) and set(counts.values()) == {(0, 0)}
    assert {"exp_avg/norm.weight", "buffer/norm.running_mean"} <= counts.keys()
    assert "param/embedding.weight" not in counts and found["objects"] == ["place"]
    named = call_json("show", tmp_path, "--tensors", "norm.bias")[1]["tensors"]
    assert {tensor["kind"] for tensor in named} == {"param", "exp_avg", "exp_avg_sq", "step"}
    code, text = call("show", tmp_path, "--tensors", "param/*")
    assert code == 0 and "rank 0" in text and "F32" in text and "state objects: place" in text
    assert "place" in call("show", tmp_path)[1]
    assert call("show", tmp_path, "param/*")[0] == call("show", tmp_path, "--values")[0] == 2
    assert call_json("show", tmp_path, "--tensors", "[")[1]["tensors"] == []


@pytest.mark.parametrize("columns", [80])
def test_answers_fit_a_terminal_and_a_reader_that_leaves_is_no_error(
    trained: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    root, _ = trained
    from layerwise_dist.cli import console

    monkeypatch.setattr(console, "_PIPE_WIDTH", columns)
    for arguments in (("--tensors", "--values"), ()):
        for line in call("show", root, *arguments)[1].splitlines()[1:]:
            assert len(line.rstrip()) <= columns, line
    for line in call("diff", root, "--step", 1, "--step", 2)[1].splitlines()[2:]:
        assert len(line.rstrip()) <= columns, line
    for command in ("diff", "pin", "unpin", "prune", "cp", "show"):
        code, text = call(command, "--help")
        assert code == 0 and "Example: layerwise " + command in text.replace("\n", " "), text
    script = "import sys; from layerwise_dist.cli import main; main()"
    words = [sys.executable, "-c", script, "show", str(root), "--tensors", "--json"]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    told = job.stderr.read()
    assert job.wait(60) == 0 and b"Traceback" not in told
