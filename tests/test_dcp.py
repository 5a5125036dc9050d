# SPDX-License-Identifier: Apache-2.0
"""`dcp.save` and `dcp.load` on this package's writer, format and commit: exact, or refused by name; whole, or not."""

from __future__ import annotations

import collections
import io
import pickle
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from kit.cli import call
from kit.runners import Warm
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.dcp import LayerwiseReader, LayerwiseWriter
from layerwise_dist.dcp import writer as dcp_writer
from layerwise_dist.interop import one_commit

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage"),
]


def values() -> dict[str, Any]:
    """What a state may hold: every dtype, views, tensors without elements or dimensions, objects of many types."""
    torch.manual_seed(1)
    wide = torch.randn(300, 40)
    return {
        "model": {"a": wide, "view": wide.t(), "part": wide[10:20], "none": torch.empty(0, 3), "one": torch.tensor(2.5),
                  "half": torch.randn(7).bfloat16(), "flag": torch.tensor([True, False]), "big": torch.arange(200_000)},
        "optim": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "epoch": 3, "nan": float("inf"), "kinds": (collections.Counter({3: 4}),), "bytes": b"\x80\x02", "nothing": None,
        "names": [["a", "b"], {1, 2}],
    }  # fmt: skip


def empty(state: Any) -> Any:
    """Of the same shape, with nothing of it."""
    if isinstance(state, torch.Tensor):
        return torch.zeros(state.shape, dtype=state.dtype)
    if type(state) is dict:
        return {key: empty(value) for key, value in state.items()}
    if type(state) is list and any(isinstance(each, dict) for each in state):
        return [empty(each) for each in state]
    return None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is dict:
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if type(one) is list:
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def save(folder: Path, state: dict[str, Any], planner: Any = None, **options: Any) -> None:
    dcp.save(state, storage_writer=LayerwiseWriter(folder, **options), planner=planner)


def load(folder: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp.load(state, storage_reader=LayerwiseReader(folder, **options))
    return state


def test_a_state_comes_back_with_every_type_and_bit_and_nothing_on_the_disk_is_a_pickle(tmp_path: Path) -> None:
    save(tmp_path / "c", values())
    assert same(load(tmp_path / "c", empty(values())), values())
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["identity.json", "manifest.json", "owner", "rank_00000.safetensors"]
    for path in files:
        data = path.read_bytes()
        assert b"data.pkl" not in data and b"PK\x03\x04" not in data, path
    assert call("verify", tmp_path / "c")[0] == 0
    # The same by what DCP does without a state that says what there is.
    out = tmp_path / "whole.pt"
    made: dict[str, Any] = {}
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    _load_state_dict(
        made, storage_reader=LayerwiseReader(tmp_path / "c"), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    torch.save(made, out)
    assert same(made["model"], values()["model"])


def refused(caplog: pytest.LogCaptureFixture, root: Path, state: dict[str, Any], **options: Any) -> str:
    """What a load that fails says: torch 2.9 leaves the reason out of its error, so the log has it."""
    caplog.clear()
    with pytest.raises(CheckpointException) as raised:
        load(root, state, **options)
    return f"{raised.value}\n{caplog.text}"


def test_each_save_is_a_checkpoint_and_the_newest_or_a_named_one_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1, 5):
        tag = "t2" if number == 2 else None  # which keeps it
        save(tmp_path, {"n": number, "t": torch.full((3,), float(number))}, tag=tag, keep_last=2)
    assert load(tmp_path, {"n": 0, "t": torch.zeros(3)})["n"] == 4
    assert load(tmp_path, {"n": 0, "t": torch.zeros(3)}, step=3)["t"].tolist() == [3.0] * 3
    assert load(tmp_path, {"n": 0, "t": torch.zeros(3)}, tag="t2")["n"] == 2
    assert "no committed checkpoint of step 1; committed are" in refused(caplog, tmp_path, {"n": 0}, step=1)
    save(tmp_path, {"n": 9}, step=100)
    save(tmp_path, {"n": 10})
    assert load(tmp_path, {"n": 0}, step=101)["n"] == 10
    with pytest.raises(errors.ConfigError, match="not both"):
        LayerwiseReader(tmp_path, step=1, tag="a")


class Custom:
    pass


class OwnBytes(DefaultSavePlanner):
    def transform_object(self, write_item: Any, object: Any) -> Any:
        made = super().transform_object(write_item, object)
        return io.BytesIO(made.getvalue() + b"more") if isinstance(made, io.BytesIO) else made


class Other(DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        found = super().resolve_data(write_item)
        return found.double() if isinstance(found, torch.Tensor) else found


class NoLookup(DefaultSavePlanner):
    lookup_object = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "state, planner, message",
    [
        ({"a": {"b": Custom()}}, None, r"state_dict\['a\.b'\]: .*Custom is an object"),
        ({"a": 1}, OwnBytes(), "a: OwnBytes makes bytes of its own"),
        ({"a": 1}, NoLookup(), "a: NoLookup has no lookup_object"),
        ({"a": torch.ones(3)}, Other(), r"a: the planner gives F64\[3\], its plan says F32\[3\]"),
        ({"a": torch.ones(3, dtype=torch.complex128)}, None, "a has dtype torch.complex128"),
        ({"": torch.ones(3)}, None, "a tensor without a name"),
        ({"a" * 5000: torch.ones(3)}, None, "names of more than 4096 characters"),
        ({"a": torch.ones(3), "b": torch.ones(2, 2).to_sparse()}, None, "b"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, state: dict[str, Any], planner: Any, message: str
) -> None:
    save(tmp_path, {"a": 0})
    with pytest.raises((CheckpointException, NotImplementedError, RuntimeError), match=message):
        save(tmp_path, state, planner)
    names = [path.name for path in tmp_path.iterdir() if path.name.startswith("step_")]
    assert names == ["step_0000000001-0000000100000001"], "not even a folder"
    save(tmp_path, {"a": 2})
    assert load(tmp_path, {"a": None})["a"] == 2


def test_ways_of_saving_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedError, match="use AsyncCheckpointerType.THREAD"):
        pickle.dumps(LayerwiseWriter(tmp_path))
    with pytest.raises(errors.UnsupportedError, match="leave use_collectives=True"):
        dcp.save({"a": 1}, storage_writer=LayerwiseWriter(tmp_path), use_collectives=False, no_dist=True)
    with pytest.raises(errors.ConfigError, match="is not the path of a directory"):
        LayerwiseWriter("s3://bucket/run")
    assert not LayerwiseWriter.validate_checkpoint_id("s3://a") and LayerwiseReader.validate_checkpoint_id("/a")
    for wrong in ({"step": -1}, {"tag": ""}, {"keep_last": 0}, {"timeout_s": 0}):
        with pytest.raises(errors.ConfigError, match=next(iter(wrong))):
            LayerwiseWriter(tmp_path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointException, match="use enable_plan_caching=False"):
        for _ in range(2):
            save(tmp_path, {"a": torch.ones(2)}, DefaultSavePlanner(enable_plan_caching=True))


def test_what_a_planner_says_it_changes_is_saved_as_it_says(tmp_path: Path) -> None:
    """The example of DCP's documentation: weights in half precision."""

    class Half(DefaultSavePlanner):
        def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
            half = {key: each.bfloat16() if torch.is_tensor(each) else each for key, each in state_dict.items()}
            super().set_up_planner(half, *args, **kwargs)

        def resolve_data(self, write_item: Any) -> Any:
            return super().resolve_data(write_item)

    save(tmp_path, {"a": torch.ones(3) / 3, "n": 4}, Half())
    found = load(tmp_path, {"a": torch.zeros(3).bfloat16(), "n": 0})
    assert found["n"] == 4 and torch.equal(found["a"], (torch.ones(3) / 3).bfloat16())


def test_a_training_and_dcp_do_not_share_a_directory(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path / "run"))
    for _ in ckpt.steps(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    ckpt.close()
    with pytest.raises(CheckpointException, match="holds the checkpoints of a training"):
        save(tmp_path / "run", {"a": 1})
    save(tmp_path / "dcp", {"a": 1})
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path / "dcp"))
    with pytest.raises(errors.MismatchError, match="written by dcp.save"):
        ckpt.restore()
    ckpt.close()


def shard(folder: Path) -> Path:
    (found,) = folder.glob("step_*2-*/rank_00000.safetensors")
    return found


@pytest.mark.parametrize("where", ["tensor", "state", "manifest"])
def test_one_flipped_bit_is_found_by_load_and_by_verify_and_no_older_checkpoint_takes_its_place(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"a": torch.arange(5000.0), "n": 1}
    save(tmp_path, state)
    save(tmp_path, state)
    path = shard(tmp_path) if where != "manifest" else shard(tmp_path).parent / "manifest.json"
    data = bytearray(path.read_bytes())
    at = {"tensor": len(data) // 2, "state": data.rfind(b"layerwise-dcp-1"), "manifest": len(data) // 2}[where]
    data[at] ^= 1
    path.write_bytes(bytes(data))
    assert re.search("hash|damaged", refused(caplog, tmp_path, {"a": torch.zeros(5000), "n": 0}))
    code, said = call("verify", tmp_path)
    assert code == 1 and "damaged" in said
    assert load(tmp_path, {"n": 0}, step=1)["n"] == 1


def test_a_save_that_is_killed_before_its_manifest_is_not_there_and_the_next_one_goes_on(
    tmp_path: Path, warm: Warm
) -> None:
    assert kill(warm, tmp_path, "commit") == [1]
    assert load(tmp_path, {"n": 0, "t": torch.zeros(3)})["n"] == 1
    save(tmp_path, {"n": 3, "t": torch.ones(3)})
    assert len(list(tmp_path.glob("step_*"))) == 2, "what was left is gone"


def test_mutation_a_manifest_before_the_shards_is_found(tmp_path: Path, warm: Warm) -> None:
    assert kill(warm, tmp_path, "early") != [1]


def kill(warm: Warm, folder: Path, how: str) -> list[int]:
    """The steps that are committed and sound after a SIGKILL of the second save; -1 for one that is not sound."""
    job = warm.run("dcp_killed.py", 0, folder, how, check=False)
    assert job.returncode == -signal.SIGKILL, job.output
    found = [int(path.parent.name[5:15]) for path in folder.glob("step_*/manifest.json")]
    return sorted(step if call("verify", folder, "--step", step)[0] == 0 else -1 for step in found)


def test_two_ranks_save_whole_or_not_at_all_and_any_other_number_loads(tmp_path: Path, warm: Warm, long: bool) -> None:
    folder = tmp_path / "c"
    said = warm.run("dcp.py", 2, folder, *(["long"] if long else []), timeout=90).lines("SAVED")
    assert warm.run("dcp.py", 1, folder, "load").lines("LOADED") == said
    assert warm.run("dcp.py", 3, folder, "load").lines("LOADED") == said
    assert len(list(folder.glob("step_*/manifest.json"))) == 2
    assert call("verify", folder)[0] == 0


def test_mutation_a_rank_that_failed_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that rank 0 cannot see is no part of a checkpoint: without that look, one is committed without it."""

    def lose(self: Any, state: Any) -> Any:
        report = persist(self, state)
        for path in tmp_path.glob("step_*/rank_*.safetensors"):
            path.unlink()
        return report

    persist = dcp_writer.OneShard.persist
    monkeypatch.setattr(dcp_writer.OneShard, "persist", lose)
    with pytest.raises(CheckpointException, match="rank 0 sees nothing there"):
        save(tmp_path, {"a": 1})
    assert not list(tmp_path.glob("step_*/manifest.json"))
    monkeypatch.setattr(
        one_commit.OneCommit, "commit",
        lambda self, reports: self._committer.commit(
            self.attempt.seq, self.attempt.step, [self._durable(each) for each in reports]
        ),
    )  # fmt: skip
    save(tmp_path, {"a": 1})
    assert call("verify", tmp_path)[0] == 1


def test_errors_of_this_package_travel_between_ranks() -> None:
    for error in (errors.StateError("state['a']", "no"), errors.UnsupportedError("x"), errors.DirectoryError("y")):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error) and str(back) == str(error)


def test_what_a_training_saved_is_loaded_in_the_layout_of_get_state_dict(tmp_path: Path) -> None:
    def trained(seed: int, steps: int, folder: Path | None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
        ckpt = lwd.attach(model, optimizer, dir=str(folder), enabled=folder is not None)
        for _ in ckpt.steps(steps):
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ckpt.close()
        return model, optimizer

    model, optimizer = trained(1, 3, tmp_path)
    other, its = trained(2, 1, None)
    parts = get_state_dict(other, its)
    held = {"model": parts[0], "optim": parts[1], "step": 0}
    load(tmp_path, held)
    set_state_dict(other, its, model_state_dict=held["model"], optim_state_dict=held["optim"])
    assert held["step"] == 3
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    one, two = optimizer.state_dict(), its.state_dict()
    assert same(one["state"], two["state"]) and one["param_groups"] == two["param_groups"]
    found = load(tmp_path, {"net": dict(parts[0])}, model="net", step=2)
    assert not same(found["net"], dict(model.state_dict()))
