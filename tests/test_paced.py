# SPDX-License-Identifier: Apache-2.0
"""`every_n_steps: auto` in real jobs, and `layerwise tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.cli import call_json
from kit.crash import settings
from kit.runners import Warm

import layerwise_dist as lwd
from layerwise_dist.cli.tuning import duration
from layerwise_dist.config import load_config
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.errors import ConfigError
from layerwise_dist.interval import Pace
from layerwise_dist.units import parse_count


def test_all_ranks_change_the_interval_at_one_step_and_a_resume_keeps_it(warm: Warm, tmp_path: Path) -> None:
    warm.run("paced.py", 2, tmp_path, timeout=90)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    for mode in ("direct", "monitor"):
        seen, steps, changes = found[0][mode]
        assert list(dict.fromkeys(seen)) == [10, 3, 7][: changes + 1] and changes >= 1
        assert mode == "monitor" or changes == 2
        assert steps == [step for step, every in enumerate(seen, 1) if step % every == 0]
        assert found[0][f"{mode} resumed"] == seen[steps[-1] - 1]
    assert all(1 <= steps <= 40 for steps in found[0]["real"])
    for folder in (path for path in tmp_path.iterdir() if path.is_dir()):
        model = torch.nn.Linear(6, 4)
        options = settings(str(folder), every_n_steps="auto", save_last=False)
        with lwd.attach(model, torch.optim.AdamW(model.parameters()), options) as ckpt:
            assert ckpt.restore() is not None
            assert ckpt.stats()["every_n_steps"] in {3, 7, *found[0]["real"]}
            pace = workings_of(ckpt).pacing._pace
            assert pace is not None and not any(pace.kept().values()), "two ranks measured it, and one goes on"


def test_one_rank_alone_saves_at_the_interval_and_its_last_step(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = settings(str(tmp_path), every_n_steps="auto", interval={"min_steps": 4, "max_steps": 4}, keep_last=9)
    with lwd.attach(model, optimizer, options) as ckpt:
        for _ in ckpt.steps(10):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    assert sorted(each.step for each in ckpt.metadata.inventory().manifests.values()) == [4, 8, 10]
    assert (ckpt.stats()["every_n_steps"], ckpt.stats()["interval_changes"]) == (4, 0)
    others = settings(str(tmp_path), every_n_steps="auto", interval={"max_steps": 3})
    with lwd.attach(model, optimizer, others) as ckpt:
        assert (ckpt.restore(), ckpt.stats()["every_n_steps"]) == (10, 3), "the limits of now hold"


def test_a_resume_goes_on_with_what_checkpoints_cost_before(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = settings(str(tmp_path), every_n_steps="auto", interval={"min_steps": 5, "max_steps": 5}, save_last=False)

    def attached() -> tuple[Any, Pace]:
        ckpt = lwd.attach(model, optimizer, options)
        pace = workings_of(ckpt).pacing._pace
        assert pace is not None
        return ckpt, pace

    ckpt, pace = attached()
    sealed = pace.kept()
    with ckpt:
        for step in ckpt.steps(60):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            if step and step % 5 == 0:
                ckpt.wait(step, timeout=60)  # so that steps without one are told apart
            sealed = pace.kept()
    assert all(len(each) >= 5 for each in sealed.values()), sealed
    ckpt, pace = attached()
    with ckpt:
        assert (ckpt.restore(), pace.kept()) == (60, sealed)
    options = settings(str(tmp_path), every_n_steps="auto", interval={"min_steps": 3, "max_steps": 3})
    ckpt, pace = attached()
    with ckpt:
        assert ckpt.restore() == 60 and not any(pace.kept().values()), "it was measured at another interval"


@pytest.mark.quick
def test_what_makes_no_sense_is_refused_by_name() -> None:
    for wrong, said in (
        ({"every_n_steps": "sometimes"}, "'auto' or null"),
        ({"interval": {"min_steps": 9, "max_steps": 3}}, "max_steps = 3 is less than min_steps = 9"),
        ({"interval": {"max_overhead": 0.0}}, "interval.max_overhead = 0.0"),
        ({"interval": {"mtbf": 3}}, "unknown key 'interval.mtbf'"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(wrong)


@pytest.mark.quick
def test_counts_and_times_in_words() -> None:
    assert [parse_count(text) for text in ("7B", "1.5b", "98M", "12")] == [7 * 10**9, 15 * 10**8, 98 * 10**6, 12]
    assert [duration("--x", text) for text in ("3", "250ms", "90min", "3h", "2d")] == [3, 0.25, 5400, 10800, 172800]


def test_tune_predicts_from_the_disk(tmp_path: Path) -> None:
    def tune(*more: str) -> tuple[int, dict[str, Any]]:
        return call_json("tune", tmp_path, "--params", "1M", "--ranks", 4, "--step-s", 2, "--quick", *more)

    code, found = tune("--mtbf", "3h", "--cost-s", "400ms")
    assert code == 0 and (found["state_bytes"], found["bytes_a_rank"]) == (12_000_000, 3_000_000)
    assert found["write_s"] == pytest.approx(12e6 / found["rate"])
    assert found["every_n_steps"] == 47 and found["overhead"] == pytest.approx(0.4 / 94), "sqrt(2 x 0.4 x 10800) s"
    assert found["loss_s"] == pytest.approx(47.2 + found["write_s"]) and "Young/Daly" in found["why"]
    assert tune("--cost-s", "400ms")[1]["every_n_steps"] == 10 and tune()[1]["checkpoint_s"] > 0
    assert list(tmp_path.iterdir()) == []
    for wrong in (["--mtbf", "soon"], ["--state-bytes", "1G"], ["--cost-s", "0"]):
        assert tune(*wrong)[0] == 2
