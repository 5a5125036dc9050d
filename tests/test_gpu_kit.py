# SPDX-License-Identifier: Apache-2.0
"""The kit for a machine with a GPU (`bash tests/gpu.sh`), on the CPU as a stand-in. It was not tried on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import __main__ as kit
from gpu import exact, graphs, streams
from gpu.device import Device, Late
from gpu.training import Kit

ROOT = Path(__file__).parent.parent
# What no stand-in can act.
DEVICE_ONLY = {"capturable AdamW", "graph of forward and backward"}
IN_PROCESS = (
    "fences", "AMP with GradScaler", "fused AdamW", "graph of the whole step", "graph captured while attached",
    "freed memory", "pinned pool", "out of memory", "device to host",
)  # fmt: skip


@pytest.fixture
def stand_in(tmp_path: Path) -> Kit:
    torch.set_num_threads(1)
    return Kit(Device("cpu"), tmp_path, True)


def test_every_section_passes_on_the_stand_in_or_says_what_it_needs(tmp_path: Path, long: bool) -> None:
    """Two of them without --long: those that need no process of their own are tried below."""
    chosen = [*kit.SECTIONS] if long else ["staging, plain", "capturable AdamW"]
    out = tmp_path / "found.json"
    command = ["bash", str(ROOT / "tests" / "gpu.sh"), "--python", sys.executable, "--device", "cpu", "--quick"]
    done = subprocess.run([*command, "--json", str(out), *chosen], capture_output=True, text=True, timeout=470)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = {each["section"]: each for each in json.loads(out.read_text())["sections"]}
    assert [*found] == chosen and "| section |" in done.stdout
    for name, outcome in found.items():
        assert outcome["what"] == ("skipped" if name in DEVICE_ONLY else "passed"), outcome
        assert f"  {name}: {outcome['remark']}" in done.stdout, "each is said as it ends"
        assert name not in DEVICE_ONLY or "needs" in outcome["remark"]
    if long:
        costs = found["cost of checkpoints"]["data"]["results"]
        assert [row["mode"] for row in costs] == ["layerwise", "dcp-async"] and "÷ plain" in done.stdout


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_section_passes_on_the_stand_in(stand_in: Kit, name: str) -> None:
    assert kit.SECTIONS[name](stand_in)


def test_a_section_of_several_processes_passes_on_the_stand_in(stand_in: Kit) -> None:
    outcome = kit.run("kill and resume", stand_in, 100)
    assert outcome.what == "passed", outcome


def test_without_an_accelerator_it_says_so_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kit, "found", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / "found.json")])
    assert kit.main() == 0
    assert capsys.readouterr().out.startswith("skipped: torch sees no accelerator")
    assert json.loads((tmp_path / "found.json").read_text()) == {"skipped": "torch sees no accelerator"}


def test_an_unknown_section_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "hope"])
    with pytest.raises(SystemExit) as ended:
        kit.main()
    assert ended.value.code == 2 and "no section hope; there are staging, plain" in capsys.readouterr().err


def test_a_section_that_fails_hangs_or_dies_fails_alone(stand_in: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(kit: Kit) -> None:
        import os

        os._exit(7)

    def hangs(kit: Kit) -> None:
        import time

        time.sleep(600)

    def fails(kit: Kit) -> None:
        raise AssertionError("two and two are five")

    for section, says in ((dies, "ended with 7"), (hangs, "not done within 0.2 s"), (fails, "two and two are five")):
        monkeypatch.setitem(kit.SECTIONS, "odd", section)
        outcome = kit.run("odd", stand_in, 0.2 if section is hangs else 60)
        assert outcome.what == "failed" and says in outcome.remark, outcome


# -- mutations: the sections can fail ----------------------------------------------------------------------------------


def test_mutation_random_numbers_that_stay_are_found(stand_in: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise_dist.loop.rng.put", lambda state: None)
    with pytest.raises(AssertionError, match="another sequence after the restore"):
        exact.random_numbers(stand_in)


def test_mutation_a_copy_that_misses_a_byte_is_found(stand_in: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(self: Any, pairs: Any) -> None:
        for to, source in pairs:
            to.copy_(source)
            to.view(torch.uint8).reshape(-1)[:1].add_(1) if to.numel() > 7 else None

    monkeypatch.setattr("layerwise_dist.capture.stage.HostCopies.copy", copy)
    monkeypatch.setattr("layerwise_dist.capture.audit.FULL_FIRST", 0)
    monkeypatch.setattr("layerwise_dist.capture.audit.units", lambda pieces: [])
    with pytest.raises(AssertionError, match="differs from training without the engine"):
        exact.staging_plain(stand_in)


def test_mutation_a_fence_that_is_not_needed_shows_nothing(stand_in: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section fails if its own mutation is not found."""
    monkeypatch.setattr("gpu.streams.Late", lambda device, fenced=True: Late(device, True))
    with pytest.raises(AssertionError, match="nothing was shown"):
        streams.fences(stand_in)


def test_mutation_a_capture_that_is_not_refused_is_found(stand_in: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise_dist.engine.updates._refuse_graph", lambda: None)
    with pytest.raises(AssertionError, match="let itself be captured"):
        graphs.graph_captured_while_attached(stand_in)


def test_mutation_replays_that_are_not_refused_are_found(stand_in: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise_dist.loop.counting.Counting.check_idle", lambda self: None)
    with pytest.raises(AssertionError, match="replays were taken for updates"):
        graphs.graph_of_the_step(stand_in)


def test_mutation_a_pool_that_stays_locked_is_found(stand_in: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise_dist.capture.stage.Stage.close", lambda self, timeout_s: True)
    with pytest.raises(AssertionError, match="it was not given back"):
        streams.pinned_pool(stand_in)


def test_mutation_a_device_without_memory_that_ends_training_is_found(
    stand_in: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise_dist.capture.stage.StageError", RuntimeError)  # which ends no attempt
    with pytest.raises(RuntimeError, match="had no memory left"):
        streams.out_of_memory(stand_in)
