# SPDX-License-Identifier: Apache-2.0
"""Every block of code in README and docs runs as it stands, within what its page says that a script has.

Those of docs/loops.md, and of pages about other packages' loops, run in jobs: tests/jobs/loops.py, tests/jobs/hf.py.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit.commands import functions_in
from kit.snippets import members, run, snippets
from torch import nn
from torch.utils.data import DataLoader

import layerwise_dist as lwd
from layerwise_dist import LayerwiseConfig

_PAGES = "test_the_page_of_loops_runs_as_it_stands"
# Which test runs what is not run here.
ELSEWHERE = {
    "docs/telemetry.md 1": "test_telemetry.py::test_weights_and_biases_takes_what_the_page_shows",
    "docs/integrations/accelerate.md 1": f"test_accelerate.py::{_PAGES}",
    "docs/integrations/lightning.md 1": f"test_lightning.py::{_PAGES}",
    "docs/integrations/transformers.md 1": f"test_hf.py::{_PAGES}",
    "docs/integrations/deepspeed.md 1": "test_loops.py::test_deepspeeds_goes_on",
    "docs/integrations/deepspeed.md 2": "test_loops.py::test_deepspeeds_goes_on",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pages save in "checkpoints"."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one rank, made as docs/integrations/launchers.md says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    run("docs/integrations/launchers.md 1", {})
    yield
    dist.destroy_process_group()


class Words(nn.Module):
    """With what pages name: an embedding."""

    def __init__(self, trunk: str = "trunk", head: str = "head") -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 2)
        self.add_module(trunk, nn.Linear(2, 3))
        self.add_module(head, nn.Linear(3, 1))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        _, trunk, head = self.children()
        return head(trunk(self.embed(words)))


def script(model: Words | None = None) -> dict[str, Any]:
    """The names that a training script has, and `update`, which makes one."""
    torch.manual_seed(0)
    model = Words() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def update() -> None:
        model(torch.randint(2000, (4,))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "lwd": lwd, "torch": torch, "model": model, "optimizer": optimizer, "total": 3, "update": update,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "loader": DataLoader(torch.arange(8)),
    }  # fmt: skip


def trained(steps: int = 2, model: Words | None = None, **options: Any) -> Words:
    """The model, of which "checkpoints" has a checkpoint then."""
    held = script(model)
    with lwd.attach(held["model"], held["optimizer"], dir="checkpoints", **options) as ckpt:
        ckpt.restore()
        for _ in ckpt.steps(steps):
            held["update"]()
    return held["model"]


# -- what begins a training -------------------------------------------------------------------------------------------


def test_the_readmes_script_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    for many in ("3", "5"):
        run("README.md 1", {}, many=many)
    assert re.findall(r"after step (\d+)", capsys.readouterr().out) == ["0", "3"]


def test_the_quickstarts_script_resumes() -> None:
    starts = []
    for total in (3, 5):
        starts.append(run("docs/quickstart.md 1", {**script(), "total": total}, body="update()")["start"])
    assert starts == [0, 3]


def test_several_models_by_name() -> None:
    one, other = script(), script()
    held = {
        **one, "generator": one["model"], "generator_optimizer": one["optimizer"],
        "critic": other["model"], "critic_optimizer": other["optimizer"], "average": Words(),
    }  # fmt: skip
    with run("docs/integrations/several.md 1", held)["ckpt"] as ckpt:
        for _ in ckpt.steps(1):
            one["update"]()
            other["update"]()
    with lwd.open_checkpoint("checkpoints") as saved:
        assert "param/average.embed.weight" in saved and "param/critic.head.bias" in saved


def test_a_script_of_pcchecks_resumes() -> None:
    missing = []
    for _ in range(2):
        held = {**script(), "loss": lambda found: found.square().sum(), "batches": torch.arange(6).view(2, 3)}
        missing.append(run("docs/appendix/from-pccheck.md 1", held)["missing"])
    assert missing[0] and missing[1] == []


# -- what a running training does -------------------------------------------------------------------------------------


def looped(held: dict[str, Any], at: int, act: Callable[[], object], **options: Any) -> None:
    """Three iterations; `act` comes in the middle of the one that ends with step `at`."""
    with lwd.attach(held["model"], held["optimizer"], dir="checkpoints", **options) as held["ckpt"]:
        for step in held["ckpt"].steps(3):
            held["update"]()
            if step + 1 == at:
                act()


def test_a_save_within_a_loop() -> None:
    held = script()
    looped(held, 2, lambda: run("docs/guide.md 2", held), every_n_steps=None, save_last=False)
    with lwd.open_checkpoint("checkpoints") as saved:
        assert saved.step == 2


def test_a_save_under_a_name_and_back() -> None:
    held = {**script(), "epoch": 3, "history": [0.5, 0.25]}
    with lwd.attach(held["model"], held["optimizer"], dir="checkpoints") as held["ckpt"]:
        held["ckpt"].explicit()
        for _ in range(2):
            held["update"]()
            held["ckpt"].end_step()
        run("docs/guide.md 3", held)
        assert held["step"] == 2 and held["ckpt"].client_state == {"epoch": 3, "history": [0.5, 0.25]}


def test_callbacks_hear_of_each_commit() -> None:
    seen: list[str] = []
    held = {**script(), "rank": 0, "upload": seen.append, "page_somebody": seen.append}
    with lwd.attach(held["model"], held["optimizer"], dir="checkpoints") as held["ckpt"]:
        run("docs/operations.md 1", held)
        for _ in held["ckpt"].steps(3):
            held["update"]()
    assert [re.findall(r"step_0*(\d+)", path) for path in seen] == [["1"], ["2"], ["3"]]


def test_an_interval_from_measured_costs() -> None:
    held = script()
    with run("docs/operations.md 2", held)["ckpt"] as ckpt:
        for _ in ckpt.steps(10):
            held["update"]()
    assert ckpt.committed_step == 10


# -- what reads checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_without_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = {"last_epoch": 4}
    model = trained(state={"scheduler": scheduler})
    held = run("docs/guide.md 4", {"lwd": lwd})
    assert torch.equal(held["rows"], model.embed.weight[1000:2000]) and held["scheduler"] == scheduler
    printed = capsys.readouterr().out
    assert printed.startswith("2 None 1 0.001\n") and "embed.weight (2000, 2) torch.float32" in printed


def test_weights_are_loaded_in_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is for another model, or other checkpoints."""
    plain, with_optimizer, renamed, not_strict, cast, by_name = snippets()["docs/guide.md 5"].splitlines()

    def load(line: str, into: Words) -> Words:
        exec(line, script(into))
        return into

    def elsewhere(name: str) -> None:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)

    model = trained()
    for line in (plain, with_optimizer, not_strict):
        assert torch.equal(load(line, Words()).embed.weight, model.embed.weight)
    assert torch.equal(load(cast, Words().bfloat16()).embed.weight, model.embed.weight.bfloat16())
    elsewhere("renamed")
    model, into = trained(model=Words("backbone")), Words("model", "top")
    del into.top
    assert torch.equal(load(renamed, into).model.weight, model.backbone.weight)
    elsewhere("named")
    held, average = script(), Words()
    models, optimizers = {"model": held["model"], "ema": average}, {"model": held["optimizer"]}
    with lwd.attach(models=models, optimizers=optimizers, dir="checkpoints") as ckpt:
        for _ in ckpt.steps(1):
            held["update"]()
    assert torch.equal(load(by_name, Words()).embed.weight, average.embed.weight)


# -- what needs a process group ---------------------------------------------------------------------------------------


def test_a_sampler_for_other_ranks(group: None) -> None:
    loader = run("docs/guide.md 1", {"data": range(100), "DataLoader": DataLoader})["loader"]
    assert sorted(torch.cat([*loader]).tolist()) == [*range(100)]


def test_dcp_saves_and_loads(group: None) -> None:
    held = {"state": {"model": Words().state_dict()}}
    before = held["state"]["model"]["embed.weight"].clone()
    run("docs/integrations/dcp.md 1", held)
    assert torch.equal(held["state"]["model"]["embed.weight"], before)


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", snippets("json"))
def test_each_block_of_json_is_a_configuration(name: str) -> None:
    found = members(name)
    LayerwiseConfig.model_validate(found.get("layerwise_checkpoint", found))


@pytest.mark.quick
def test_every_snippet_is_run_by_a_test() -> None:
    here = set(re.findall(r'run\("(.+? \d)"', Path(__file__).read_text())) | {"docs/guide.md 5"}
    told = {name for name in snippets() if not name.startswith("docs/loops.md")}  # test_loops.py has those
    assert len(told) > 15 and here | {*ELSEWHERE} == told and not here & {*ELSEWHERE}
    for who in ELSEWHERE.values():
        file, _, name = who.partition("::")
        assert name in functions_in(file), who
