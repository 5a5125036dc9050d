# SPDX-License-Identifier: Apache-2.0
"""`layerwise bench`: it measures what it says, leaves nothing behind, and says what is missing. No figure is judged."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kit.drawing import drawn
from kit.forked import fork_from
from kit.runners import Warm
from typer.testing import CliRunner

from layerwise_dist.bench import paired, raw, train, workplace
from layerwise_dist.bench.figures import Interval, Spread
from layerwise_dist.bench.paired import order_of
from layerwise_dist.bench.train_worker import by_checkpoint
from layerwise_dist.cli.app import app

SPREAD = {"median", "min", "max"}
# Of several ranks; their starts, by torchrun and from nothing, take most of the time here.
SEVERAL = drawn(["fsdp2", "ddp", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else [])], "several ranks")
MACHINE = {
    "cpu", "cores", "memory", "kernel", "file_system", "device", "direct_io", "hash", "python", "torch",
    "layerwise_dist",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training would have a thread for each, and these would wait for each other where other tests run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


def call(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def quick(folder: Path, what: str, *args: object) -> dict[str, Any]:
    """The JSON of a quick run, which must leave `folder` as it was."""
    code, out, err = call(what, folder, "--quick", "--json", *args)
    assert code == 0, out + err
    assert list(folder.iterdir()) == [], "nothing is left behind"
    found = json.loads(out)
    assert set(found["machine"]) == MACHINE
    assert found["notes"]
    return found


def test_commits_are_measured_with_simulated_ranks_and_with_processes(
    tmp_path: Path, traps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of what lies in the working directory runs."""
    monkeypatch.chdir(traps)
    found = quick(tmp_path, "commit")
    assert not (traps / "sprung").exists()
    assert [row["ranks"] for row in found["simulated"]] == [8, 64]
    assert [row["connections"] for row in found["simulated"]] == [3 + 1, 3 + 15]
    for row in found["simulated"]:
        assert set(row["cpu_s"]) == SPREAD and row["cpu_s"]["median"] >= row["coordinator_cpu_s"]["median"] > 0
        assert row["frames_in"]["median"] >= row["connections"]  # what comes within a millisecond is one frame
    assert [row["ranks"] for row in found["processes"]] == [4]
    assert found["processes"][0]["committed_s"]["min"] > 0


def test_the_writer_is_measured_in_each_backend_and_use_against_raw_writes(tmp_path: Path) -> None:
    found = quick(tmp_path, "writer")
    cases = {(row["tensors"], row["backend"], row["use"]) for row in found["results"]}
    assert {(10, "posix", "first"), (200, "posix", "first"), (10, "posix", "steady"), (200, "posix", "steady")} <= cases
    for row in found["results"]:
        assert set(row["bytes_per_s"]) == set(row["ratio_to_raw"]) == SPREAD
        assert 0 < row["bytes_per_s"]["min"] <= row["bytes_per_s"]["median"] <= row["bytes_per_s"]["max"]
    assert [entry["bytes"] for entry in found["raw"]] == [4_000_000]
    assert "loop" in found["raw"][0]["by_tool"]
    assert ("fio" in found["raw"][0]["by_tool"]) == found["fio"] == raw.has_fio()
    assert {(row["tensors"], row["to_tensors"]) for row in found["many_tensors"]} == {(200, 10)}


@pytest.mark.parametrize(
    ("ranks", "every", "modes"),
    [
        (1, (1,), ("layerwise", "layerwise-monitor", "layerwise-off-step", "torch-save", "torchsnapshot", "dcp-async")),
        (2, (1, 2), ("layerwise", "dcp-async")),
    ],
    ids=["one process", "FSDP2 on two ranks, two intervals"],
)
def test_training_is_measured_under_each_way_to_checkpoint(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, every: tuple[int, ...],
    modes: tuple[str, ...], long: bool,
) -> None:  # fmt: skip
    """A peer that is not installed is named, and the rest is measured. A package of that name that cannot be imported
    stands for none.
    """
    if ranks > 1 and SEVERAL != "fsdp2" and not long:
        pytest.skip(f"{SEVERAL} was drawn; all with --long")
    fork_from(warm, monkeypatch)
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "torchsnapshot.py").write_text("raise ImportError('shadowed')\n")
    (tmp_path / "disk").mkdir()
    path = os.pathsep.join(filter(None, [str(tmp_path / "shadow"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # of the process that trains
    asked = ("--every", ",".join(map(str, every)), "--modes", ",".join(modes), "--ranks", ranks)
    found = quick(tmp_path / "disk", "train", *asked)
    absent = {"torchsnapshot async": "NotHere: not installed (shadowed)"} if "torchsnapshot" in modes else {}
    assert found["not_run"] == absent
    modes = tuple(mode for mode in modes if mode != "torchsnapshot")
    rows = {(row["mode"], row["every"]): row for row in found["results"]}
    assert set(rows) == {(mode, number) for mode in ("none", *modes) for number in every}
    # Parameters, two moments, and on each rank a counter for each of the 28 tensors.
    assert found["state_bytes"] == 12 * found["model"]["parameters"] + 4 * 28 * ranks
    for (mode, _), row in rows.items():
        assert set(row["step_s"]) == SPREAD
        if mode == "none":
            continue
        assert set(row["ratio_to_plain"]) == set(row["extra_peak_to_state"]) == SPREAD
        if mode == "layerwise-off-step":
            assert row["stall_ms_p99"] is None and row["committed_s"] is None
            continue
        assert set(row["committed_s"]) == set(row["ratio_to_dcp_async"]) == SPREAD
        assert 0 < row["stall_ms_p50"] <= row["stall_ms_p99"]
        ours = mode.startswith("layerwise")
        assert list(row["stalls_ms"]) == (["1st", "later"] if ours else [])
        assert all(0 <= of["audit_p99"] <= of["p99"] for of in row["stalls_ms"].values())
        assert row["flushes"] == ("yes" if ours else "files, not folders")
    assert rows["layerwise", every[0]]["copied_share"]["median"] > 0


def test_what_the_comparison_of_replicas_costs_is_measured_under_ddp(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    assert call("train", tmp_path, "--quick", "--ddp", "--ranks", "1")[0] == 2
    if SEVERAL != "ddp" and not long:
        pytest.skip(f"{SEVERAL} was drawn; all with --long")
    fork_from(warm, monkeypatch)
    found = quick(tmp_path, "train", "--ddp", "--every", "1", "--modes", "layerwise,layerwise-no-drift")
    assert found["ddp"] and found["ranks"] == 2 and found["not_run"] == {}
    assert 12 <= found["state_bytes"] / found["model"]["parameters"] < 13, "replicas are written once"
    rows = {row["mode"]: row for row in found["results"]}
    assert set(rows) == {"none", "layerwise", "layerwise-no-drift"}
    for mode in rows.keys() - {"none"}:
        assert set(rows[mode]["ratio_to_plain"]) == set(rows[mode]["committed_s"]) == SPREAD
        assert 0 < rows[mode]["stall_ms_p50"] <= rows[mode]["stall_ms_p99"]


def test_trainings_that_take_turns_are_measured_in_pairs_beside_another_installation(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """The other one is this one again, found by its interpreter alone."""
    if not long:
        fork_from(warm, monkeypatch, [paired])
    found = quick(tmp_path, "train", "--blocks", 8, "--against", sys.executable)
    assert (found["blocks"], len(found["measured"]), found["every"]) == (2, 2, 1)
    assert [(row["mode"], row["against"]) for row in found["results"]] == [("layerwise", False), ("layerwise", True)]
    for block in found["measured"]:
        assert set(block) == {"none", "layerwise", "layerwise-against"}
        assert all(turn["seconds"] > 0 and turn["cpu"] > 0 for turn in block.values())
        assert block["none"]["stall"] == 0 < block["layerwise"]["stall"]
        assert block["none"]["threads"] == {}
        for mode in ("layerwise", "layerwise-against"):
            threads = block[mode]["threads"]
            assert threads["layerwise-io"] > 0 and threads["layerwise-persist"] > 0
            assert sum(threads.values()) < block[mode]["cpu"]
    (beside,) = found["against"]
    for row in (*found["results"], beside):
        assert set(row["step_ratio"]) == set(row["more_cpu_ms"]) == {"median", "low", "high"}
    ratios = sorted(block["layerwise"]["seconds"] / block["none"]["seconds"] for block in found["measured"])
    assert found["results"][0]["step_ratio"] == pytest.approx(
        {"median": sum(ratios) / 2, "low": ratios[0], "high": ratios[1]}
    )


def test_an_interpreter_without_the_package_ends_the_benchmark_with_what_it_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such package >&2; exit 3\n")
    python.chmod(0o700)
    (tmp_path / "disk").mkdir()
    code, _, err = call("train", tmp_path / "disk", "--quick", "--blocks", 8, "--against", python)
    assert code == 1 and list((tmp_path / "disk").iterdir()) == []
    assert "layerwise, the other installation ended with exit code 3:\nno such package" in err


def test_the_interval_of_a_median_has_it_narrows_with_more_blocks_and_is_the_same_again() -> None:
    drawn = random.Random(5)
    few, many = ([drawn.gauss(1.05, 0.05) for _ in range(count)] for count in (10, 160))
    one, other = Interval.of(few), Interval.of(many)
    assert one.low < one.median < one.high and other.low < 1.05 < other.high
    assert other.high - other.low < (one.high - one.low) / 2
    assert Interval.of(few) == one
    assert Interval.of([2.0] * 9) == Interval(2.0, 2.0, 2.0)


@pytest.mark.quick
def test_who_trains_when_is_drawn_for_each_block_and_the_same_in_each_run() -> None:
    names = ["none", "layerwise", "dcp-async"]
    orders = [order_of(names, block) for block in range(40)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert all(5 <= sum(order.index(name) == place for order in orders) for name in names for place in range(3))
    assert orders == [order_of(names, block) for block in range(40)]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_training_under_deepspeed_is_measured_against_its_own_saves(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    if SEVERAL != "deepspeed" and not long:
        pytest.skip(f"{SEVERAL} was drawn; all with --long")
    fork_from(request.getfixturevalue("zero"), monkeypatch)
    stage = random.choice([2, 3])
    asked = ("--deepspeed", stage, "--every", "1", "--modes", "layerwise,save-checkpoint,fast")
    found = quick(tmp_path, "train", *asked)
    assert found["deepspeed"] == stage and found["ranks"] == 2
    built = stage == 2 or "save_checkpoint, fast writer" not in found["not_run"]
    assert built or "async_io operator is not built" in found["not_run"].pop("save_checkpoint, fast writer")
    assert found["not_run"] == {}
    rows = {row["mode"]: row for row in found["results"]}
    assert set(rows) == {"none", "layerwise", "save-checkpoint", *(["fast"] if built else [])}
    assert found["state_bytes"] >= 12 * found["model"]["parameters"]
    for mode in rows.keys() - {"none"}:
        row = rows[mode]
        assert set(row["ratio_to_plain"]) == set(row["ratio_to_save_checkpoint"]) == set(row["committed_s"]) == SPREAD
        assert 0 < row["stall_ms_p50"] <= row["stall_ms_p99"]
        assert list(row["stalls_ms"]) == (["1st", "later"] if mode == "layerwise" else [])
        assert row["flushes"] == ("yes" if mode == "layerwise" else "no")


def test_restore_is_measured_cold_and_warm_against_other_loaders_and_the_better_raw_reads(
    tmp_path: Path,
) -> None:
    found = quick(tmp_path, "restore")
    rows = {(row["files"], row["way"]): row for row in found["results"]}
    raws, ways = ("raw-direct", "raw-buffered"), ("layerwise", "torch-load", "dcp-load")
    assert set(rows) == {(place, way) for place in ("cold", "warm") for way in (*raws, *ways)}
    for row in rows.values():
        assert set(row["seconds"]) == set(row["bytes_per_s"]) == SPREAD
        assert row["bytes"] > 12 * found["parameters"]
    for place in ("cold", "warm"):
        assert rows[place, "dcp-load"]["ratio_to_dcp_load"] == {"median": 1, "min": 1, "max": 1}
        assert max(rows[place, way]["ratio_to_raw"]["max"] for way in raws) == 1, "one of them is the better"
    assert [start["files"] for start in found["starts"]] == ["cold", "warm"]
    for start in found["starts"]:
        low = start["attach_s"]["min"] + start["restore_s"]["min"] - start["raw_s"]["max"]
        assert low <= start["rest_s"]["min"] and start["attach_s"]["min"] > 0


def test_exports_are_measured_beside_each_tools_own_converter(tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("three jobs' imports: --long")
    found = quick(tmp_path, "export")
    rows = {row["way"]: row for row in found["results"]}
    assert set(rows) == {"torch", "dcp-to-torch-save", "hf", "save-pretrained", "zero", "zero-to-fp32"}
    for row in rows.values():
        assert set(row["seconds"]) == set(row["bytes_per_s"]) == SPREAD
        assert row["bytes"] > 4 * found["parameters"]
        assert (row["ours_to_theirs"] is None) == (row["way"] in ("torch", "hf", "zero"))


@pytest.mark.parametrize("loop", ["accelerate", "lightning", "transformers"])
def test_checkpoints_in_other_packages_loops_are_measured_beside_a_loop_of_ones_own(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool, loop: str
) -> None:
    if loop != "accelerate" and not long:
        pytest.skip("imports for some seconds: --long")
    pytest.importorskip(loop)
    if not long:
        fork_from(warm, monkeypatch)
    (row,) = quick(tmp_path, "loops", "--loops", loop)["results"]
    assert row["loop"] == loop and set(row["seconds"]) == {"own", "by-hand", "loop", "integration"}
    for name in ("integration_to_alone", "by_hand_to_alone", "integration_to_by_hand"):
        assert set(row[name]) == SPREAD and row[name]["min"] > 0


def test_a_restore_into_another_cut_is_measured_beside_the_same_cut_and_dcp(tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("three jobs under torchrun: --long")
    found = quick(tmp_path, "restore", "--reshard", "2:1")
    rows = {row["way"]: row for row in found["results"]}
    assert set(rows) == {"same", "reshard", "dcp-load"} and (found["saved_ranks"], found["ranks"]) == (2, 1)
    assert (
        rows["same"]["ratio_to_same_cut"] == rows["dcp-load"]["ratio_to_dcp_load"] == {"median": 1, "min": 1, "max": 1}
    )
    assert all(set(row["seconds"]) == SPREAD and row["seconds"]["min"] > 0 for row in rows.values())


def test_attach_and_restore_are_measured_beside_the_reading(tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("several jobs under torchrun: --long")
    found = quick(tmp_path, "restore", "--ranks", "1,2")
    assert [(start["ranks"], start["new_processes"]) for start in found["starts"]] == [
        (ranks, new) for ranks in (1, 2) for new in (False, True)
    ]
    for start in found["starts"]:
        assert set(start["rest_s"]) == SPREAD and min(start[part]["min"] for part in ("attach_s", "raw_s")) > 0


def test_the_markdown_is_the_command_the_machine_and_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["layerwise", "bench", "writer", "DIR", "--quick"])
    code, out, _ = call("writer", tmp_path, "--quick", "--markdown")
    assert code == 0
    assert out.startswith("    layerwise bench writer DIR --quick\n")
    assert "| size | tensors | backend | file | GB/s | ÷ raw |\n|---|---|---|---|--:|--:|\n" in out


def test_too_little_space_is_an_error_that_says_how_much_is_needed(tmp_path: Path) -> None:
    code, out, _ = call("writer", tmp_path, "--sizes", "900T", "--json")
    assert code == 2
    needed = re.fullmatch(
        r"the benchmark needs (\d+\.\d) GB of free space in .*, and there are \d+\.\d GB: .*", json.loads(out)["error"]
    )
    assert needed and float(needed[1]) >= 900_000
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace, "available_memory", lambda: 1 << 20)
    code, out, _ = call("restore", tmp_path, "--quick", "--json")
    assert code == 2
    assert "GB of memory, and there are 0.0 GB" in json.loads(out)["error"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("writer", "--sizes", "12"), "--sizes '12': expected a number and K, M, G or T"),
        (("writer", "--backend", "floppy"), "backend 'floppy': this machine has "),
        (("writer", "--tensors", "0"), "--tensors '0': expected whole numbers above 0"),
        (("restore", "--reshard", "4"), "--reshard '4': expected two numbers of ranks"),
        (("restore", "--ranks", "two"), "--ranks 'two': expected whole numbers above 0"),
        (("restore", "--ranks", "2", "--reshard", "2:1"), "--reshard and --ranks are two benchmarks"),
        (("train", "--modes", "dcp,hope"), "mode 'hope': choose from layerwise, "),
        (("train", "--params", "7B"), "--params '7B': expected 34M or 98M"),
        (("train", "--deepspeed", "1"), "--deepspeed 1: expected 2 or 3"),
        (("train", "--deepspeed", "2", "--modes", "dcp"), "mode 'dcp': choose from layerwise, "),
        (("train", "--optimizer", "sgd"), "--optimizer 'sgd': expected foreach or fused"),
        (("train", "--blocks", "40", "--ranks", "2"), "--blocks trains in one process each"),
        (("train", "--blocks", "40", "--modes", "all"), "--blocks takes one interval"),
        (("train", "--blocks", "40", "--modes", "layerwise-monitor"), "writes in another process"),
        (("train", "--against", "python"), "--against goes with --blocks"),
        (("loops", "--loops", "keras"), "loop 'keras': choose from transformers, accelerate, lightning"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    code, _, err = call(args[0], tmp_path, *args[1:])
    assert code == 2
    assert says in err


def test_a_directory_that_does_not_exist_is_wrong_usage(tmp_path: Path) -> None:
    code, _, err = call("writer", tmp_path / "none", "--quick")
    assert (code, "No such file or directory" in err) == (2, True)


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", "from layerwise_dist.cli import main; main()", "bench", *map(str, args)]


def processes_in(folder: Path) -> list[str]:
    """Command lines of the live processes that name `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


@pytest.mark.parametrize(
    ("what", "number"),
    [
        (("writer", "--rounds", "1000", "--sizes", "8M", "--tensors", "10"), signal.SIGINT),
        (("restore", "--rounds", "1000"), signal.SIGTERM),
        (("train", "--quick", "--every", "1", "--ranks", "2"), signal.SIGINT),
        (("goodput", "--quick", "--trace=poisson:100s", "--contenders=layerwise", "--ranks=1"), signal.SIGINT),
    ],
    ids=["writer", "restore", "train on two ranks", "goodput"],
)
def test_an_interrupted_benchmark_leaves_no_file_and_no_process(
    tmp_path: Path, what: tuple[str, ...], number: signal.Signals, long: bool
) -> None:
    if what[0] == "goodput" and not long:
        pytest.skip("two jobs under torchrun: --long")
    if what[0] not in ("train", drawn(["writer", "restore"], "interrupted")) and not long:
        pytest.skip("the other one was drawn; all with --long")
    # After `&` a shell lets SIGINT be ignored, and that is inherited.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    job = subprocess.Popen(
        command(what[0], tmp_path, *what[1:]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listening
    )
    try:
        deadline = time.monotonic() + (90 if what[0] == "goodput" else 60)
        wanted = {"train": "checkpoints", "goodput": "job/checkpoints/layerwise/step_*"}.get(what[0], "*")
        while not list(tmp_path.glob(f"layerwise-bench-*/{wanted}")):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(number)
        out, err = job.communicate(timeout=60)
    finally:
        job.kill()
        job.communicate()
    assert (job.returncode, out) == (130, b""), err.decode()[-2000:]
    assert b"interrupted" in err and b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    assert processes_in(tmp_path) == []


def test_a_training_that_dies_is_reported_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    code, _, err = call("train", tmp_path, "--quick")
    assert (code, "the training ended with exit code 1" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_is_the_median_with_its_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([3.0, 1.0, 2.0]).text(10, 1) == "20.0 (10.0–30.0)"
    assert Spread.of([1.0, 1.0]).text() == "1.00"


def test_the_first_stalls_of_a_block_stand_apart_with_what_audits_took() -> None:
    """Two ranks: the one that stalls longest counts, with its own audit."""
    plain = {"mode": "none", "every": 1, "seconds": [[1.0], [1.0]], "peak": [0, 0]}
    mine = {
        **plain, "mode": "layerwise", "committed": [[0.1], [0.1]], "copied": [None, None], "disk": 1.0,
        "stalls": [[[0.003, 0.001], [0.004, 0.0]], [[0.002, 0.002], [0.005, 0.001]]],
        "first": [[[0.2, 0.19], [0.05, 0.04]], [[0.1, 0.1], [0.06, 0.03]]],
    }  # fmt: skip
    heard: Any = SimpleNamespace(blocks=[plain, mine, plain], total_bytes=1, state_bytes=[1, 1])
    stalls = train._Figures(heard, "layerwise", 1).stalls_of()
    parted = {place: train._parted(found) for place, found in stalls.items()}
    row = {"title": "layerwise", "every": 1, "stalls_ms": parted}
    (chart,) = train._stall_charts([row, {"title": "a peer", "every": 1, "stalls_ms": {}}], 1)
    assert chart.columns == ["", "1st", "2nd", "later, p50", "p99"]
    assert chart.rows == [["layerwise", "200.0 (190.0)", "60.0 (30.0)", "4.0 (1.0)", "5.0 (1.0)"]]
    assert train._stall_charts([row], 2) == []


def test_a_stall_belongs_to_the_checkpoint_that_caused_it() -> None:
    """Open and seal in the step that is due, the fence in the one after it."""
    assert by_checkpoint([5.0, 6.0], 1) == [5.0, 6.0]
    assert by_checkpoint([1.0, 0.0, 4.0, 1.0, 0.0, 7.0], 3) == [5.0, 8.0]


def test_steps_by_layers_are_measured_against_the_optimizers_own() -> None:
    result = CliRunner().invoke(app, ["bench", "layers", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["results"]
    assert [row["kernel"] for row in found] == ["foreach", "fused"]
    assert all(row["fast_to_plain"]["median"] > 0 for row in found)


@pytest.mark.parametrize("update", ["whole", "in_backward"])
def test_a_step_is_traced_and_drawn(tmp_path: Path, update: str) -> None:
    out, picture = tmp_path / "trace.json", tmp_path / "trace.svg"
    code, text, _ = call("trace", tmp_path, "--quick", "--json", "--update", update, "--out", out, "--picture", picture)
    assert code == 0
    rows = json.loads(text)["rows"]
    assert (rows["updates"]["first_begins_ms"] < rows["gradients"]["last_ends_ms"]) == (update == "in_backward")
    assert {event["ph"] for event in json.loads(out.read_text())["traceEvents"]} == {"M", "i", "X"}
    assert picture.read_text().lstrip().startswith("<?xml")
    assert call("trace", tmp_path, "--quick", "--picture", "x.bmp", "--out", out)[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.json", "trace.svg"]
