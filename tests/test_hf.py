# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer: stopped at any event, by an exception or by SIGKILL, it goes on as if it had not been."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.runners import Warm

missing = [name for name in ("transformers", "accelerate", "peft", "sklearn") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits_hf.py"

# Steps of the cases: 12 for gpt2 (windows of 2, the last of an epoch of 1), 9 for llama (3, 3 and 1), 17 for lora.
SAMPLE = {
    "gpt2": ["substep_end:5", "evaluate:8", "epoch_begin:8"],
    "llama": ["substep_end:4"],
    "lora": ["max:5"],
    "workers": ["substep_end:6"],
    "own loader": ["substep_end:5", "epoch_begin:8"],
}
LONG = {"gpt2": 12, "llama": 9, "lora": 17, "workers": 12, "own loader": 12}
EVENTS = ("step_begin", "substep_end", "optimizer_step", "step_end", "log", "evaluate", "epoch_begin", "epoch_end")


@pytest.fixture(scope="module")
def trainers(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Jobs of tests/jobs/hf.py, out of a process that has imported all that they need."""
    server = Warm(
        tmp_path_factory.mktemp("hf"),
        "hf",
        "peft",
        "sklearn.datasets",
        env={"PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"},
        out_of=warm,
    )
    yield server
    server.close()


def told(out: Path, rank: int) -> dict[str, Any]:
    return json.loads((out / f"{rank}.json").read_text())


def swept(trainers: Warm, out: Path, case: str, stops: list[str], ranks: int = 1) -> Any:
    trainers.run("hf.py", 0 if ranks == 1 else ranks, "sweep", out, case, *stops, timeout=60 + 20 * len(stops))
    return [told(out, rank) for rank in range(ranks)]


@pytest.mark.parametrize("case", SAMPLE)
def test_stopped_by_an_exception_anywhere_it_goes_on_to_the_very_same_end(
    trainers: Warm, tmp_path: Path, case: str, long: bool
) -> None:
    """Parameters, optimizer, schedule, random numbers, what was logged and evaluated, and what callbacks keep."""
    every = [f"{event}:{step}" for step in range(LONG[case] + 1) for event in EVENTS]
    (found,) = swept(trainers, tmp_path, case, every if long else SAMPLE[case])
    unheard = [line for line in found["problems"] if "never happened" in line]
    assert [line for line in found["problems"] if line not in unheard] == []
    assert len(found["steps"]) >= (LONG[case] * 4 if long else len(SAMPLE[case]))
    assert long or unheard == []


def test_two_ranks_stopped_anywhere_go_on_to_the_very_same_end(trainers: Warm, tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("--long only: the two ranks of the next test are killed")
    for case in ("gpt2", "llama"):
        for found in swept(trainers, tmp_path, case, SAMPLE[case], ranks=2):
            assert found["problems"] == [] and min(found["steps"].values()) > 0


@pytest.mark.parametrize(("ranks", "case"), [(1, "gpt2"), (2, "gpt2"), (2, "fsdp2")])
def test_killed_again_and_again_it_ends_as_if_it_had_run_through(
    trainers: Warm, tmp_path: Path, ranks: int, case: str, long: bool
) -> None:
    """SIGKILL to one rank, at events that a generator chooses; and started once more when it is over, by --long on
    several ranks too.
    """
    choose = random.Random(19 + ranks)
    steps = sorted(choose.sample(range(2, 12), 7 if long else 3 - ranks))
    agent, began = (0 if ranks == 1 else ranks), -1
    trainers.run("hf.py", agent, "reference", tmp_path, case, "-", timeout=90)
    expected = [told(tmp_path, rank) for rank in range(ranks)]
    for step in steps:
        at = f"{choose.choice(('substep_end', 'optimizer_step', 'step_end', 'step_begin'))}:{step}"
        assert trainers.start("hf.py", agent, "run", tmp_path, case, at).ends_within(90), at
    for last in (False, True) if long or ranks == 1 else (False,):
        trainers.run("hf.py", agent, "run", tmp_path, case, "-", timeout=90)
        found = [told(tmp_path, rank) for rank in range(ranks)]
        began = found[0]["from"]
        assert began == 12 if last else began >= steps[-1] - 2
        for rank in range(ranks):
            assert {**found[rank], "from": None} == {**expected[rank], "from": None}


def test_what_can_not_be_resumed_is_refused_by_name(trainers: Warm, tmp_path: Path) -> None:
    trainers.run("hf.py", 0, "refused", tmp_path, "gpt2", "-", timeout=90)
    found = told(tmp_path, 0)
    assert (
        "BoundaryError: attach() within Trainer.train(), which has already started"
        in found["a callback, by lwd.attach"]
    )
    assert "BoundaryError: attach() within this Trainer's train()" in found["a callback, by the integration"]
    assert "UnsupportedError: this Trainer is already attached" in found["twice"]
    assert "ignore_data_skip=True: a resume would restart" in found["ignore_data_skip"]
    assert "auto_find_batch_size=True" in found["auto_find_batch_size"]
    assert "this is one of 2 processes by its environment, and a Trainer that trains alone" in found["alone"]
    assert "train(resume_from_checkpoint=...) with checkpoints attached" in found["resume_from_checkpoint"]
    assert "lacks what resuming a Trainer exactly needs: Trainer._run_epoch()" in found["a name that is missing"]
    assert "Tested with transformers 5.24" in found["a name that is missing"]
    assert "attach() needs a transformers.Trainer, not str" in found["no Trainer"]
    assert "the checkpoint stands 4 batches into epoch 0, and" in found["another batch size"]
    assert "batch size of each device 2, here 1" in found["another batch size"]
    assert "ConfigError" in found["a bad key"]


def test_mutation_what_a_resume_needs_beside_the_state_is_missed(trainers: Warm, tmp_path: Path) -> None:
    """Without the random numbers of the batch that is drawn ahead; without what the Trainer keeps outside its state;
    without the boundary's random numbers; with the Trainer's own skipping.
    """
    trainers.run("hf.py", 0, "mutated", tmp_path, "gpt2", "-", timeout=90)
    found = told(tmp_path, 0)
    assert len(found) == 4 and all(found.values()), found


def test_the_best_evaluation_has_its_tag_and_the_model_has_its_weights(trainers: Warm, tmp_path: Path) -> None:
    trainers.run("hf.py", 0, "best", tmp_path, "gpt2", "-", timeout=90)
    found = told(tmp_path, 0)
    for name in ("whole", "cut"):
        assert found[name]["best"] == found[name]["expected"] and found[name]["same"] and found[name]["last"] == 12
    assert found["whole"]["weights"] == found["cut"]["weights"]


def test_the_page_of_loops_runs_as_it_stands(trainers: Warm, tmp_path: Path) -> None:
    trainers.run("hf.py", 0, "page", tmp_path, "gpt2", "-", timeout=90)
    assert told(tmp_path, 0) == {"steps": [[0, 3], [3, 5], [0, 5]]}


def test_the_example_goes_on_within_an_epoch_and_logs_what_it_would_have(trainers: Warm, tmp_path: Path) -> None:
    def run(name: str) -> list[str]:
        return trainers.run(EXAMPLE, 0, "--dir", name, "--epochs", "0.6", folder=tmp_path, timeout=100).lines("step ")

    whole = run("whole")
    assert len(whole) > 5 and any("eval_loss" in line for line in whole)
    job, deadline = (
        trainers.start(EXAMPLE, 0, "--dir", "cut", "--epochs", "0.6", folder=tmp_path),
        time.monotonic() + 100,
    )
    while not any(tmp_path.glob("cut/step_00000000[1-3]?-*/manifest.json")):
        assert job.poll() is None and time.monotonic() < deadline, job.output()[-3000:]
        time.sleep(0.001)
    job.kill()
    again = trainers.run(EXAMPLE, 0, "--dir", "cut", "--epochs", "0.6", folder=tmp_path, timeout=100, whole_exit=True)
    assert again.lines("step ") == whole and 10 <= int(again.lines("resumed from step ")[0]) < 29


def test_the_example_trains_one_replica_a_rank_under_torchrun(trainers: Warm, tmp_path: Path) -> None:
    told = trainers.run(EXAMPLE, 2, "--dir", tmp_path / "ddp", "--epochs", "0.2", timeout=100)
    assert told.lines("resumed from step ") == ["0"] and any("eval_loss" in line for line in told.lines("step "))
