# SPDX-License-Identifier: Apache-2.0
"""Bad input gets one clear error, and loses nothing: not a byte of the live tensors, not a file of the directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.runners import Warm
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.engine import assembly
from layerwise_dist.storage import filenames

torch.set_num_threads(1)


def job(seed: int = 0, width: int = 5, optimizer: Callable[..., Any] = torch.optim.AdamW) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    return model, optimizer(model.parameters(), lr=0.1)


def train(ckpt: Any, model: nn.Module, optimizer: Any, total: int) -> None:
    for _ in ckpt.steps(total):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(folder: Path, total: int = 2) -> tuple[nn.Module, Any]:
    model, optimizer = job()
    with lwd.attach(model, optimizer, dir=str(folder)) as ckpt:
        train(ckpt, model, optimizer, total)
    return model, optimizer


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a directory but the owner file, which names the newest session."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "owner"
    }


# -- the configuration -------------------------------------------------------------------------------------------------

BAD = [
    ({"every": 1}, ["unknown key 'every'", "every_n_steps"]),
    ({"commit": {"timeout": 3.0}}, ["unknown key 'commit.timeout'", "timeout_s"]),
    ({"writer": {"queue_dept": 3}}, ["unknown key 'writer.queue_dept'", "queue_depth"]),
    ({"writer": {"backend": "pmem"}}, ["writer.backend = 'pmem'", "'nvm'"]),
    ({"writer": {"backend": "nvm", "direct_io": "off"}}, ["writer", "direct_io must be 'auto'"]),
    ({"every_n_steps": "2"}, ["every_n_steps = '2'", "integer"]),
    ({"every_n_steps": True}, ["every_n_steps = True", "integer"]),
    ({"every_n_steps": 0}, ["every_n_steps = 0", "greater than or equal to 1"]),
    ({"keep_last": 0}, ["keep_last = 0", "greater than or equal to 1"]),
    ({"keep_every_n_steps": -1}, ["keep_every_n_steps = -1"]),
    ({"dir": ""}, ["dir = ''"]),
    ({"dir": 3}, ["dir = 3", "string"]),
    ({"enabled": "yes"}, ["enabled = 'yes'", "boolean"]),
    ({"update": "in_backwards"}, ["update = 'in_backwards'", "'auto', 'whole', 'pipelined_step' or 'in_backward'"]),
    ({"capture": "leases"}, ["capture = 'leases'", "'auto', 'lease' or 'stage'"]),
    ({"when_full": "drop"}, ["when_full = 'drop'", "'wait' or 'skip'"]),
    ({"pool_mb": 7}, ["pool_mb = 7", "'auto' or a whole number of MiB, 8 or more"]),
    ({"pool_mb": "64"}, ["pool_mb = '64'", "'auto' or a whole number"]),
    ({"pool_mb": 64.0}, ["pool_mb = 64.0", "'auto' or a whole number"]),
    ({"pool_mb": True}, ["pool_mb = True", "'auto' or a whole number"]),
    ({"pool_mb": 8, "writer": {"queue_depth": 9}}, ["pool_mb = 8", "writer.queue_depth x writer.block_kb = 9216 KiB"]),
    ({"hash": 0}, ["hash = 0", "boolean"]),
    ({"audit": "never"}, ["audit = 'never'", "'auto' or 'always'"]),
    ({"commit": {"on_failure": "ignore"}}, ["commit.on_failure = 'ignore'", "'warn' or 'raise'"]),
    ({"commit": {"timeout_s": 0.0}}, ["commit.timeout_s = 0.0", "greater than 0"]),
    ({"commit": 3}, ["commit = 3"]),
    ({"writer": {"block_kb": 6}}, ["writer.block_kb = 6", "multiple of 4"]),
    ({"file_mode": "600"}, ["file_mode = '600'", "four octal digits"]),
    ({"file_mode": "0400"}, ["file_mode = '0400'", "the owner must be able to read and write"]),
    ({"file_mode": 0o600}, ["file_mode = 384", "string"]),
    ({"keep_last": 0, "nonsense": 1}, ["keep_last = 0", "unknown key 'nonsense'"]),
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("source", ["dict", "file", "block", "keywords"])
@pytest.mark.parametrize(("bad", "says"), BAD, ids=[json.dumps(bad) for bad, _ in BAD])
def test_a_bad_configuration_names_the_key_its_value_and_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, bad: dict[str, Any], says: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer = job()
    config: Any = None
    if source == "dict":
        config = bad
    elif source in ("file", "block"):
        config = tmp_path / "config.json"
        config.write_text(json.dumps(bad if source == "file" else {"train_batch_size": 1, "layerwise_checkpoint": bad}))
    with pytest.raises(errors.ConfigError) as caught:
        lwd.attach(model, optimizer, config, **(bad if source == "keywords" else {}))
    for part in says:
        assert part in str(caught.value)
    if source == "file":
        assert str(config) in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name != "config.json"], "nothing was made"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object, found list"),
        ('{"layerwise_checkpoint": 3}', "expected an object, found int"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(errors.ConfigError, match=says) as caught:
        lwd.attach(*job(), path)
    assert str(path) in str(caught.value)


def test_a_missing_configuration_file_and_a_wrong_kind_of_configuration_are_errors(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="none.json: No such file"):
        lwd.attach(*job(), tmp_path / "none.json")
    with pytest.raises(errors.ConfigError, match="not int"):
        lwd.attach(*job(), 3)  # type: ignore[arg-type]


def test_keywords_go_on_top_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"keep_last": 5, "dir": str(tmp_path / "a")}))
    with lwd.attach(*job(), path, dir=str(tmp_path / "b")) as ckpt:
        assert (ckpt.config.keep_last, ckpt.config.dir) == (5, str(tmp_path / "b"))


# -- the directory -----------------------------------------------------------------------------------------------------


def test_a_file_where_the_directory_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("precious")
    for place in ("taken", "taken/below"):
        with pytest.raises(errors.DirectoryError) as caught:
            lwd.attach(*job(), dir=str(tmp_path / place))
        assert str(tmp_path / "taken") in str(caught.value)
    assert (tmp_path / "taken").read_text() == "precious"


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    if os.geteuid():
        target = tmp_path / "sealed"
        target.mkdir(mode=0o500)
        with pytest.raises(errors.DirectoryError, match="cannot write in"):
            lwd.attach(*job(), dir=str(target / "ckpt"))
        return
    # For root a mode forbids nothing; what the kernel itself makes unwritable does.
    if not os.path.isdir("/proc/self"):
        pytest.skip("runs as root and there is no /proc: nothing here is unwritable")
    with pytest.raises(errors.DirectoryError, match="rank 0 cannot write in /proc/self/ckpt"):
        lwd.attach(*job(), dir="/proc/self/ckpt")


_HOLDER = """
import sys, torch, layerwise_dist as lwd
model = torch.nn.Linear(2, 2)
ckpt = lwd.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), dir=sys.argv[1])
print("holding", flush=True)
sys.stdin.read()
ckpt.close()
"""


def test_a_directory_that_another_live_job_owns_names_the_holder_and_is_free_when_that_died(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "ckpt")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "holding"
        with pytest.raises(errors.OwnerError) as caught:
            lwd.attach(*job(), dir=str(tmp_path / "ckpt"))
        assert str(tmp_path / "ckpt") in str(caught.value) and f"pid {holder.pid}" in str(caught.value)
    finally:
        holder.kill()
        holder.communicate(timeout=20)
    lwd.attach(*job(), dir=str(tmp_path / "ckpt")).close()


def test_the_same_process_cannot_own_a_directory_twice(tmp_path: Path) -> None:
    with lwd.attach(*job(), dir=str(tmp_path)):
        with pytest.raises(
            errors.OwnerError, match=rf"another engine of this process \(pid {os.getpid()} on .*close\(\) that"
        ):
            lwd.attach(*job(), dir=str(tmp_path))
    lwd.attach(*job(), dir=str(tmp_path)).close()


def test_stepping_in_a_directory_with_checkpoints_needs_restore_or_fresh(tmp_path: Path) -> None:
    saved(tmp_path)
    before = files(tmp_path)
    model, optimizer = job(seed=1)
    weights = [param.clone() for param in model.parameters()]
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    with pytest.raises(errors.BoundaryError, match=r"already holds checkpoints: call restore\(\).*fresh=True"):
        train(ckpt, model, optimizer, 1)
    ckpt.close()
    assert all(torch.equal(was, now) for was, now in zip(weights, model.parameters(), strict=True))
    assert files(tmp_path) == before


def test_fresh_starts_a_new_lineage_beside_the_old_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path)
    before = files(tmp_path)
    model, optimizer = job(seed=1)
    with lwd.attach(model, optimizer, dir=str(tmp_path), fresh=True) as ckpt:
        assert ckpt.completed == 0
        train(ckpt, model, optimizer, 1)
    after = files(tmp_path)
    assert {name: after.get(name) for name in before} == before, "the old lineage is untouched"
    with lwd.attach(*job(seed=2), dir=str(tmp_path)) as ckpt:
        assert ckpt.restore() == 1, "the new lineage's newest, not the old one's step 2"


# -- model, optimizer, state -------------------------------------------------------------------------------------------


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    model, _ = job()
    _, other = job(width=7)
    with pytest.raises(
        errors.UnsupportedError, match=r"AdamW: parameter 0 of group 0 \(shape \[7, 3\]\) is not one of the model's"
    ):
        lwd.attach(model, other, dir=str(tmp_path))
    with pytest.raises(errors.UnsupportedError, match="needs a torch.optim.Optimizer, not Linear"):
        lwd.attach(model, nn.Linear(1, 1), dir=str(tmp_path))  # type: ignore[arg-type]


def test_a_meta_parameter_is_refused_by_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(errors.UnsupportedError, match="parameter 0.weight is on the meta device: materialise"):
        lwd.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), dir=str(tmp_path))


def test_wrappers_that_cannot_be_captured_are_refused_by_name(tmp_path: Path) -> None:
    def attach(model: Any) -> None:
        lwd.attach(model, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), dir=str(tmp_path))

    with pytest.raises(errors.UnsupportedError, match="DataParallel is not supported; what works: a plain"):
        attach(nn.DataParallel(nn.Linear(2, 2)))
    pipeline = type("PipelineModule", (nn.Module,), {"__module__": "deepspeed.runtime.pipe.module"})
    with pytest.raises(errors.UnsupportedError, match="DeepSpeed's PipelineModule is not supported by this version"):
        attach(pipeline())
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(errors.UnsupportedError, match="the engine has no attribute 'module'"):
        attach(engine())
    with pytest.raises(errors.UnsupportedError, match="needs a torch.nn.Module, not dict"):
        attach({})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"thing": object()}, "state['thing']"),
        ({"a": {"b": [1, {"c": object()}]}}, "state['a']['b'][1]['c']"),
        ({"schedule": lambda step: step}, "state['schedule']"),
        ({3: {}}, "state[3]"),
    ],
    ids=["object", "nested", "function", "name"],
)
def test_a_state_object_that_cannot_be_written_is_refused_at_once_with_its_path(
    tmp_path: Path, state: Any, path: str
) -> None:
    model, optimizer = job()
    with pytest.raises(errors.StateError) as caught:
        lwd.attach(model, optimizer, dir=str(tmp_path), state=state)
    assert caught.value.path == path and path in str(caught.value)


def test_a_state_object_that_turns_bad_later_fails_its_checkpoint_with_the_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = job()
    extra: dict[str, Any] = {"fine": 1}
    with lwd.attach(model, optimizer, dir=str(tmp_path), state={"extra": extra}) as ckpt:
        train(ckpt, model, optimizer, 1)
        extra["fine"] = object()
        train(ckpt, model, optimizer, 2)
        with pytest.raises(errors.CommitError, match=r"\['extra'\]\['fine'\]"):
            ckpt.wait(2, "committed", timeout=20)
        extra["fine"] = 3
        train(ckpt, model, optimizer, 3)
        ckpt.wait(3, "committed", timeout=20)
    assert "['extra']['fine']" in caplog.text


# -- the checkpoint ----------------------------------------------------------------------------------------------------


class Other(nn.Module):
    """Like the saved model, but: 0.weight has another shape, 1.bias is gone, more is new."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(4, 5))
        self.add_module("1", nn.Linear(5, 2, bias=False))
        self.more = nn.Linear(1, 1)
        self.register_buffer("count", torch.zeros(2))


def test_a_checkpoint_of_another_model_lists_what_differs_and_loads_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    before = files(tmp_path)
    model = Other()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    live = [tensor.clone() for tensor in [*model.parameters(), *model.buffers()]]
    random = torch.get_rng_state()
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    with pytest.raises(errors.MismatchError) as caught:
        ckpt.restore()
    text = str(caught.value)
    assert "nothing was loaded" in text
    assert "param/0.weight: the checkpoint has F32[5, 3], the model F32[5, 4]" in text
    missing = next(line for line in text.splitlines() if "missing from the checkpoint" in line)
    assert {"param/more.weight", "param/more.bias", "buffer/count"} <= set(missing.split(": ")[1].split(", "))
    unexpected = next(line for line in text.splitlines() if "unexpected in the checkpoint" in line)
    assert "param/1.bias" in unexpected
    now = [*model.parameters(), *model.buffers()]
    assert all(torch.equal(was, tensor) for was, tensor in zip(live, now, strict=True)) and not optimizer.state
    assert torch.equal(random, torch.get_rng_state())
    with pytest.raises(errors.BoundaryError, match="already holds checkpoints"):
        optimizer.step()
    ckpt.close()
    assert files(tmp_path) == before


def refuse(folder: Path, model: nn.Module, optimizer: Any, **options: Any) -> str:
    live = [param.clone() for param in model.parameters()]
    ckpt = lwd.attach(model, optimizer, dir=str(folder), **options)
    with pytest.raises(errors.MismatchError) as caught:
        ckpt.restore()
    ckpt.close()
    assert all(torch.equal(was, now) for was, now in zip(live, model.parameters(), strict=True))
    return str(caught.value)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    assert "optimizer is AdamW, this one is SGD" in refuse(tmp_path, *job(seed=1, optimizer=torch.optim.SGD))


def test_a_checkpoint_of_other_groups_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model, _ = job(seed=1)
    weights = torch.optim.AdamW([param for param in model.parameters() if param.dim() == 2], lr=0.1)
    told = refuse(tmp_path, model, weights)
    assert "updated in the checkpoint, and in no group of the optimizer here: 0.bias, 1.bias" in told


def test_a_checkpoint_with_other_state_objects_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    assert "the checkpoint lacks ['counter']" in refuse(tmp_path, *job(seed=1), state={"counter": {}})


def test_values_that_would_be_rounded_are_refused_unless_that_is_asked_for(tmp_path: Path) -> None:
    wanted = saved(tmp_path)[0].state_dict()

    def half() -> tuple[nn.Module, Any]:
        model = job(seed=1)[0].bfloat16()
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    text = refuse(tmp_path, *half())
    assert "4 tensors of kind param are F32 in the checkpoint and BF16 here, which cannot hold all their values" in text
    assert "4 tensors of kind exp_avg are F32" in text and 'restore(cast="target") rounds them' in text
    model, optimizer = half()
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        ckpt.restore(cast="target")
    for name, param in model.state_dict().items():
        assert torch.equal(param, wanted[name].to(param.dtype)), name
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}
    wide = job(seed=1)[0].double()
    with lwd.attach(wide, torch.optim.AdamW(wide.parameters(), lr=0.1), dir=str(tmp_path)) as ckpt:
        ckpt.restore()  # every value has its own there
    assert all(torch.equal(param, wanted[name].to(param.dtype)) for name, param in wide.state_dict().items())


def test_what_may_be_done_to_a_checkpoint_is_said_in_words_that_exist(tmp_path: Path) -> None:
    saved(tmp_path)
    with lwd.attach(*job(seed=1), dir=str(tmp_path)) as ckpt:
        with pytest.raises(ValueError, match="cast must be None or 'target'"):
            ckpt.restore(cast="bf16")
        with pytest.raises(ValueError, match="objects: each must be 'rank0'"):
            ckpt.restore(objects={"schedule": "mine"})
        ckpt.restore()


def test_a_step_that_does_not_exist_is_refused_and_the_existing_ones_are_listed(tmp_path: Path) -> None:
    saved(tmp_path)
    with lwd.attach(*job(), dir=str(tmp_path)) as ckpt:
        with pytest.raises(errors.NotFoundError, match=r"no committed checkpoint of step 7; committed are \[1, 2\]"):
            ckpt.restore(step=7)
        with pytest.raises(ValueError, match="on_missing must be"):
            ckpt.restore(on_missing="maybe")
        assert ckpt.restore() == 2
    with lwd.attach(*job(), dir=str(tmp_path / "empty")) as ckpt:
        with pytest.raises(errors.NotFoundError, match="holds no committed checkpoint"):
            ckpt.restore(on_missing="error")
        assert ckpt.restore() == 0


def test_disabled_hooks_nothing_and_writes_nothing(tmp_path: Path) -> None:
    model, optimizer = job()

    def hooks() -> list[int]:
        tables = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        return [len(table) for table in [*tables, *(module._forward_pre_hooks for module in model.modules())]]

    before = hooks()
    with lwd.attach(model, optimizer, enabled=False, dir=str(tmp_path / "none")) as ckpt:
        assert ckpt.restore() == 0
        train(ckpt, model, optimizer, 3)
        assert hooks() == before
        ckpt.wait(3)
        assert (ckpt.completed, ckpt.committed_step) == (3, None)
        assert ckpt.metadata.inventory().empty
    assert not (tmp_path / "none").exists()


def test_what_the_package_exports_is_listed_and_there() -> None:
    assert set(lwd.__all__) <= set(dir(lwd))
    assert all(getattr(lwd, name) is not None for name in lwd.__all__)


# -- several ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What each of two ranks got from each attempt in tests/jobs/bad_input.py, and the directory they worked in."""
    folder = tmp_path_factory.mktemp("two-ranks")
    warm.run("bad_input.py", 2, folder, timeout=90)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("one rank's state object", "StateError", "state['bad']"),
        ("one rank's optimizer", "UnsupportedError", "rank 1: SGD: parameter 0 of group 0"),
        ("ddp inside", "UnsupportedError", "DistributedDataParallel inside another module"),
        ("one rank's model", "MismatchError", "rank 1"),
        ("one rank's directory", "DirectoryError", "rank 1"),
        ("one rank's writer", "ConfigError", "rank 1: writer.backend = 'nvm'"),
        ("one rank's pool", "ConfigError", "rank 1: pool_mb = 8: staging layer '0'"),
        ("one rank's interval", "ConfigError", "differ: every_n_steps = 1 on rank 0 and 2 on rank 1."),
        ("one rank's retention in monitor mode", "ConfigError", "differ: keep_last = 1 on rank 0 and 2 on rank 1."),
        ("one rank's mode", "ConfigError", "differ: mode = 'monitor' on rank 0 and 'direct' on rank 1."),
        ("one rank enabled", "ConfigError", "differ: enabled = True on rank 0 and False on rank 1."),
        ("one rank's key", "ConfigError", "rank 1: config: unknown key 'keep'"),
        ("one rank's key in monitor mode", "ConfigError", "rank 1: config: keep_last = 0"),
        ("one rank's own keys", "nothing", ""),
    ],
)  # fmt: skip
def test_an_error_on_one_rank_is_raised_on_all(
    two_ranks: tuple[Path, list[dict[str, Any]]], what: str, kind: str, says: str
) -> None:
    for told in two_ranks[1]:
        assert told[what][0] == kind, told[what]
        assert says in told[what][1]
    assert not (two_ranks[0] / "h").exists(), "configurations are compared before anything is made"


def test_another_model_is_refused_where_the_checkpoint_is_of_other_ranks_too(
    two_ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    model = Other()
    told = refuse(two_ranks[0] / "two", model, torch.optim.AdamW(model.parameters(), lr=0.1))
    for says in ("param/0.weight: the checkpoint has F32[5, 3]", "missing from the checkpoint: ", "unexpected in the"):
        assert says in told


def test_the_nvm_backend_where_there_is_no_dax_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"writer.backend = 'nvm': .*no DAX here.* use 'auto'") as caught:
        lwd.attach(*job(), dir=str(tmp_path / "ckpt"), writer={"backend": "nvm"})
    assert str(tmp_path / "ckpt") in str(caught.value)
    with pytest.raises(OSError, match="no DAX here"):
        lwd._native.NvmEnv().probe(tmp_path)
    assert not list(tmp_path.glob(".probe-*"))


def test_a_launched_job_without_a_process_group_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        errors.BoundaryError, match=r"WORLD_SIZE is 2, but .* call init_process_group\(\) before attach"
    ):
        lwd.attach(*job(), dir=str(tmp_path))


# -- what is attached already ------------------------------------------------------------------------------------------


def test_a_model_that_is_attached_is_refused_by_name_until_it_is_closed(tmp_path: Path) -> None:
    model, optimizer = job()
    part = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with lwd.attach(model, optimizer, dir=str(tmp_path / "one")) as ckpt:
        for what in (
            {"model": model, "optimizer": optimizer},
            {"model": model[1], "optimizer": part},
            {"model": nn.Sequential(model, nn.ReLU()), "optimizer": optimizer},
            {"models": {"a": nn.Linear(2, 2), "b": model}, "optimizers": {"c": optimizer}},
        ):
            with pytest.raises(errors.UnsupportedError, match=r"is already attached, with checkpoints in .*one: close"):
                lwd.attach(dir=str(tmp_path / "two"), **what)
        assert not (tmp_path / "two").exists()
        other, its = job(1)
        with lwd.attach(other, its, dir=str(tmp_path / "three")) as beside:
            train(beside, other, its, 1)
        train(ckpt, model, optimizer, 2)
        assert ckpt.stats()["captures"] == 2
    with lwd.attach(model, optimizer, dir=str(tmp_path / "two")) as ckpt:
        train(ckpt, model, optimizer, 1)


def test_an_attach_that_failed_leaves_the_model_free(tmp_path: Path) -> None:
    model, optimizer = job()
    with pytest.raises(errors.StateError):
        lwd.attach(model, optimizer, dir=str(tmp_path), state={"bad": {"f": print}})
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        train(ckpt, model, optimizer, 1)


# -- what cannot go on -------------------------------------------------------------------------------------------------


def test_what_an_attach_that_fails_cannot_stop_is_logged_and_the_rest_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Board:
        def close(self) -> None:
            raise RuntimeError("no board any more")

    model, optimizer = job()
    (tmp_path / "ckpt").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(assembly, "open_boards", lambda telemetry, rank: [Board()])
        with pytest.raises(errors.DirectoryError):
            lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt"))
    assert "rank 0: attach: what had been started could not be stopped: no board any more" in caplog.text
    (tmp_path / "ckpt").unlink()
    with lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt")) as ckpt:
        train(ckpt, model, optimizer, 1)
    assert ckpt.committed_step == 1


def test_a_step_that_no_folder_name_can_hold_is_refused_and_what_is_committed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filenames, "STEPS_END", 3)
    model, optimizer = job()
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    with pytest.raises(errors.UnsupportedError, match="step 3, attempt 3 of this directory: steps are below 3, .*new"):
        train(ckpt, model, optimizer, 5)
    with pytest.raises(errors.CommitError, match="steps are below 3"):
        ckpt.close()
    assert ckpt.committed_step == 2
    again, other = job(1)
    with lwd.attach(again, other, dir=str(tmp_path)) as ckpt:
        assert ckpt.restore() == 2
