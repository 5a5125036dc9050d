# SPDX-License-Identifier: Apache-2.0
"""The command line: what it says of sound, abandoned, unfinished and damaged checkpoints, and its exit codes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.cli import call, call_json
from kit.shards import flip

import layerwise_dist as lwd
from layerwise_dist.cli import console
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.verifying import verify


def train(root: Path, upto: int, restore_step: int | None = None, **config: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.ReLU(), torch.nn.Linear(96, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=str(root), keep_last=10, **config)
    ckpt.restore(restore_step) if restore_step is not None else ckpt.restore()
    for _ in ckpt.steps(upto):
        model(torch.randn(2, 96)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    ckpt.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 3, then rolled back to 2 and on to a second 3 and 4; one rank."""
    root = tmp_path_factory.mktemp("cli") / "checkpoints"
    train(root, 3)
    train(root, 4, restore_step=2)
    return root


@pytest.fixture
def checkpoints(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


def folder(root: Path, step: int, last: bool = True) -> Path:
    return sorted(root.glob(f"step_{step:010d}-*"))[-1 if last else 0]


def test_ls_tells_the_newest_the_lineage_and_what_was_abandoned(trained: Path) -> None:
    code, found = call_json("ls", trained)
    assert code == 0 and found["good"]
    assert [(entry["step"], entry["status"]) for entry in found["checkpoints"]] == [
        (4, "newest"), (3, "lineage"), (3, "abandoned"), (2, "lineage"), (1, "lineage"),
    ]  # fmt: skip
    seqs = [entry["seq"] for entry in found["checkpoints"]]
    assert seqs == sorted(seqs, reverse=True)
    assert found["branches"][0]["continues_from_seq"] == seqs[3]
    for entry in found["checkpoints"]:
        assert entry["ranks"] == 1
        assert entry["bytes"] == (trained / entry["folder"] / "rank_00000.safetensors").stat().st_size
    code, text = call("ls", trained)
    assert code == 0 and "abandoned" in text and "rolled back" in text


@pytest.mark.parametrize("columns", [200, 80, 60])
def test_ls_can_be_read_and_copied_from_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """With all the columns that there are: tags, and frozen parameters that checkpoints share."""
    model = torch.nn.Sequential(torch.nn.Linear(600, 600), torch.nn.Linear(600, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        for step in ckpt.steps(3):
            model(torch.ones(1, 600)).sum().backward()
            optimizer.step()
            if step == 1:
                ckpt.wait(1)
        ckpt.save("the-best-one-so-far")
    monkeypatch.setattr(console, "_PIPE_WIDTH", columns)
    code, output = call("ls", tmp_path)
    lines = output.splitlines()
    for path in tmp_path.glob("step_*"):
        assert sum(path.name in line.split() for line in lines) == 1, "in one line, whole"
    assert "the-best-one-so-far" in output and "shared" in output and "…" not in output and code == 0
    listed = [line for line in lines[1:] if "frozen parameters" not in line]
    assert all(len(line.rstrip()) <= columns for line in listed), output
    assert (columns == 200) == any("newest" in line and "step_" in line for line in lines)


def test_ls_lists_an_attempt_without_a_manifest_as_incomplete_and_that_is_not_bad(checkpoints: Path) -> None:
    (folder(checkpoints, 4) / "manifest.json").unlink()
    code, found = call_json("ls", checkpoints)
    assert code == 0
    assert found["checkpoints"][0]["status"] == "incomplete" and found["checkpoints"][1]["status"] == "newest"
    assert call("verify", checkpoints)[0] == 0


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_ls_sees_missing_and_cut_shards(checkpoints: Path, harm: str) -> None:
    shard = folder(checkpoints, 4) / "rank_00000.safetensors"
    shard.unlink() if harm == "missing" else os.truncate(shard, shard.stat().st_size - 4096)
    code, found = call_json("ls", checkpoints)
    assert code == 1 and not found["good"]
    assert found["checkpoints"][0]["status"] == "damaged" and "rank_00000" in found["checkpoints"][0]["problem"]
    assert call("ls", checkpoints)[0] == 1
    assert call("verify", checkpoints)[0] == 1


def test_show_gives_every_tensor_with_its_place(trained: Path) -> None:
    code, found = call_json("show", trained)
    assert code == 0 and found["manifest"]["step"] == 4 and found["status"] == "newest"
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        tensor = tensors[f"{kind}/0.weight"]
        assert tensor["shape"] == [96, 96] and tensor["dtype"] == "F32"
        (part,) = tensor["parts"]
        assert part["rank"] == 0 and part["end"] - part["begin"] == 96 * 96 * 4
    code, text = call("show", trained, "--all")
    assert code == 0 and all(name in text for name in tensors)


def test_show_chooses_the_lineage_s_commit_of_a_step(trained: Path) -> None:
    code, found = call_json("show", trained, "--step", 3)
    assert code == 0 and found["status"] == "lineage" and found["folder"] == folder(trained, 3).name


def test_verify_of_sound_checkpoints_reads_all_of_them(trained: Path) -> None:
    code, found = call_json("verify", trained)
    assert code == 0 and found["good"] and len(found["checkpoints"]) == 5
    assert found["bytes"] == sum(path.stat().st_size for path in trained.glob("step_*/rank_*"))
    assert call("verify", trained)[0] == 0


def test_verify_and_show_say_that_data_is_not_hashed(checkpoints: Path) -> None:
    train(checkpoints, 5, hash=False)
    code, found = call_json("verify", checkpoints)
    assert code == 0 and found["good"]
    assert [entry["result"] for entry in found["checkpoints"]] == ["not hashed"] + ["sound"] * 5
    code, text = call("verify", checkpoints)
    assert code == 0 and "data not hashed" in text and "step(s) 5" in text and "all sound" not in text
    code, found = call_json("show", checkpoints)
    assert code == 0 and [shard["hash"] for shard in found["shards"]] == ["none"]
    assert "none" in call("show", checkpoints)[1]
    assert [shard["hash"] for shard in call_json("show", checkpoints, "--step", 4)[1]["shards"]] == ["XXH3-64"]


def test_verify_names_file_block_and_tensor_of_a_flipped_byte(checkpoints: Path) -> None:
    _, shown = call_json("show", checkpoints, "--step", 4)
    tensor = next(tensor for tensor in shown["tensors"] if tensor["name"] == "exp_avg/0.weight")
    shard = folder(checkpoints, 4) / "rank_00000.safetensors"
    flip(shard, tensor["parts"][0]["begin"] + 1000)
    code, found = call_json("verify", checkpoints)
    (damage,) = found["checkpoints"][0]["damage"]
    assert code == 1 and str(shard) in damage and "exp_avg/0.weight" in damage and "block 0" in damage
    assert all(entry["result"] == "sound" for entry in found["checkpoints"][1:])
    assert call("verify", checkpoints, "--step", 4)[0] == 1
    assert call("verify", checkpoints, "--step", 2)[0] == 0


def test_verify_finds_any_flipped_byte(checkpoints: Path, long: bool) -> None:
    files = [folder(checkpoints, 4) / name for name in ("rank_00000.safetensors", "manifest.json")]
    chance = random.Random(0)
    for _ in range(400 if long else 40):
        path = chance.choice(files)
        offset = chance.randrange(path.stat().st_size)
        flip(path, offset)
        code, found = call_json("verify", checkpoints)
        assert code == 1 and not found["good"], f"{path.name} byte {offset}"
        flip(path, offset)
    assert call("verify", checkpoints)[0] == 0


def test_a_damaged_manifest_is_bad_for_every_command(checkpoints: Path) -> None:
    path = folder(checkpoints, 4) / "manifest.json"
    flip(path, 20)
    code, found = call_json("ls", checkpoints)
    newest = found["checkpoints"][0]
    assert code == 1 and newest["status"] == "damaged" and str(path) in newest["problem"]
    assert call("verify", checkpoints)[0] == 1
    code, found = call_json("show", checkpoints, "--step", 4)
    assert code == 1 and str(path) in found["error"]


def test_a_shard_of_another_step_is_found(checkpoints: Path) -> None:
    shutil.copy(folder(checkpoints, 2) / "rank_00000.safetensors", folder(checkpoints, 4) / "rank_00000.safetensors")
    code, found = call_json("verify", checkpoints, "--step", 4)
    assert code == 1 and found["checkpoints"][0]["result"] == "damaged"


def test_a_checkpoint_that_is_retired_while_it_is_read_is_not_damage(checkpoints: Path) -> None:
    catalogue = Catalogue(str(checkpoints))
    shutil.rmtree(folder(checkpoints, 1))
    answer = verify(catalogue, None)
    assert answer.good and answer.data["checkpoints"][-1]["result"] == "retired"


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_wrong_usage_is_exit_code_2_and_says_what(tmp_path: Path, trained: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "[red]other").mkdir()
    cases = {"nowhere": "no such directory", "file": "not a directory", "[red]other": "holds no checkpoints"}
    for target, words in cases.items():
        code, text = call(command, tmp_path / target)
        assert code == 2 and words in text and target in text
        code, found = call_json(command, tmp_path / target)
        assert code == 2 and words in found["error"]
    assert call(command)[0] == 2
    assert call(command, trained, "--bogus")[0] == 2
    if command != "ls":
        code, text = call(command, trained, "--step", 99)
        assert code == 2 and "no checkpoint of step 99; it has 1, 2, 3, 4" in text
        assert call(command, trained, "--step", "-1")[0] == 2


def test_a_new_directory_without_checkpoints_is_not_bad(checkpoints: Path) -> None:
    for path in [*checkpoints.glob("step_*"), *checkpoints.glob("branch_*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert call("ls", checkpoints)[0] == 0
    assert call("verify", checkpoints)[0] == 0
    assert call("show", checkpoints)[0] == 2


def test_the_installed_command_works_and_imports_torch_only_to_read_state(trained: Path) -> None:
    script = (
        "import sys; from layerwise_dist.cli import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules or sys.argv[1] == 'verify'"
    )
    for command in ("ls", "show", "verify"):
        done = subprocess.run(
            [sys.executable, "-c", script, command, str(trained)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
