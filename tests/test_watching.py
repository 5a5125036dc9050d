# SPDX-License-Identifier: Apache-2.0
"""`layerwise watch` tells how a job is from its files alone, whatever happens to these, and changes nothing."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kit.cli import call, call_json
from kit.crash import build, train
from kit.events import BEGAN, checkpoint, event, start, write

import layerwise_dist as lwd
from layerwise_dist.cli import watching
from layerwise_dist.telemetry import reading
from layerwise_dist.telemetry.reading import EventReader, parse
from layerwise_dist.telemetry.summary import Commit, Summary

GB = 10**9


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *sorted(root.rglob("*"))]
    }  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("job")
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(root), telemetry={"events": "events.jsonl"}) as ckpt:
        for step in ckpt.steps(5):
            train(model, optimizer, 0, 0, step)
    return root


def test_it_tells_of_a_job_and_changes_nothing(job: Path) -> None:
    before = snapshot(job)
    code, output = call("watch", job, "--once")
    assert code == 0 and re.search(r"^job +ended at step 5 on 1 rank, last event \d+ s ago", output, re.MULTILINE)
    assert re.search(r"^committed +step 5, \d+ s old$", output, re.MULTILINE)
    assert re.search(r"^stall +\S+ ms a checkpoint, p99", output, re.MULTILINE)
    assert "5 committed, 0 failed" in output and re.search(r"^disk +.* left$", output, re.MULTILINE)
    code, found = call_json("watch", job)
    assert code == 0 and (found["step"], found["committed_step"], found["lag_steps"]) == (5, 5, 0)
    assert found["gb_per_s"] > 0 and found["steps_per_s"] > 0 and found["outcomes"]["committed"] == 5
    assert snapshot(job) == before


def test_without_events_it_tells_what_the_manifests_say(job: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    assert call("cp", job, copied)[0] == 0
    code, output = call("watch", copied, "--once")
    assert code == 0 and "no events here" in output and re.search(r"^committed +step 5", output, re.MULTILINE)
    code, found = call_json("watch", copied, "--events", job / "events.jsonl")
    assert code == 0 and found["state"] == "ended" and found["outcomes"]["committed"] == 5


def test_what_is_no_directory_of_checkpoints_is_wrong_usage(tmp_path: Path) -> None:
    assert call("watch", tmp_path, "--once")[0] == 2 and call("watch", tmp_path / "none", "--once")[0] == 2


def test_in_a_terminal_it_goes_on_until_ctrl_c_in_80_columns(job: Path) -> None:
    """The directory goes away meanwhile, and comes back."""
    terminal, theirs = pty.openpty()
    code = "import sys; from layerwise_dist.cli import main; sys.argv = ['layerwise', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", code, "watch", str(job), "--every", "0.1"]
    environment = {**os.environ, "COLUMNS": "80", "LINES": "40", "TERM": "xterm"}
    # After `&` a shell lets SIGINT be ignored, and that is inherited.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    watched = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=listening
    )
    os.close(theirs)
    said = b""

    def until(text: bytes) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while text not in said:
            assert time.monotonic() < deadline and watched.poll() is None, said[-2000:]
            if select.select([terminal], [], [], 1.0)[0]:
                said += os.read(terminal, 65536)

    aside = job.with_name("aside")
    try:
        until(b"step 5")
        job.rename(aside)
        until(b"not readable now")
        aside.rename(job)
        said = b""
        until(b"step 5")
        watched.send_signal(signal.SIGINT)
        assert watched.wait(30) == 0
    finally:
        watched.kill()
        watched.wait()
        os.close(terminal)
        if aside.exists():
            aside.rename(job)
    plain = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", said).decode()
    assert max(map(len, plain.replace("\r", "\n").split("\n"))) <= 80


@pytest.mark.parametrize("frozen", [False, True], ids=["it is told", "mutation: the view itself looks"])
def test_a_disk_that_does_not_answer_is_told_and_freezes_nothing(
    job: Path, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, asked, real = threading.Event(), [0], os.statvfs

    def stuck(path: str) -> os.statvfs_result:
        asked[0] += 1
        assert answers.wait(60 if threading.current_thread() is not threading.main_thread() else 0.2), "frozen"
        return real(path)

    def text(frame: Any) -> str:
        return "\n".join(line.plain for line in frame.renderables)

    frames = watching.Frames(watching.Watcher(str(job), None))
    assert "step 5" in text(frames.next())
    monkeypatch.setattr(os, "statvfs", stuck)
    monkeypatch.setattr(watching, "_LOOK_S", 0.05)
    if frozen:
        monkeypatch.setattr(watching.Frames, "next", lambda self: self._watcher.look())
        with pytest.raises(AssertionError, match="frozen"):
            frames.next()
        return
    try:
        deadline = time.monotonic() + 60
        while not asked[0]:
            frames.next()
            assert time.monotonic() < deadline
        shown = [text(frames.next()) for _ in range(3)]
        assert all("this look at it has taken" in each and "step 5" in each for each in shown), shown
        assert asked == [1], "one look at a time"
    finally:
        answers.set()
    deadline = time.monotonic() + 60
    while "has taken" in text(frames.next()):
        assert time.monotonic() < deadline


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_line_counts_once_it_is_whole(tmp_path: Path) -> None:
    path, reader = tmp_path / "events.jsonl", EventReader(str(tmp_path))
    line = json.dumps(checkpoint(1, 1.0)).encode()
    path.write_bytes(line[:30])
    assert reader.poll() == []
    with path.open("ab") as file:
        file.write(line[30:] + b"\n" + line[:5])
    assert [each["step"] for each in reader.poll()] == [1] and reader.poll() == []
    with path.open("ab") as file:  # the job was killed there, and the next one began a line of its own
        file.write(b"\n" + line + b"\n")
    assert [each["step"] for each in reader.poll()] == [1] and reader.skipped == 1


@pytest.mark.quick
def test_files_that_are_rotated_cut_or_gone_are_followed(tmp_path: Path) -> None:
    path, reader = tmp_path / "events.jsonl", EventReader(str(tmp_path))
    write(path, [checkpoint(1, 1.0), checkpoint(2, 2.0)])
    assert len(reader.poll()) == 2
    path.rename(tmp_path / "events.old.jsonl")
    assert reader.poll() == [], "under another name it is the same file"
    write(path, [checkpoint(3, 3.0), checkpoint(4, 4.0), checkpoint(5, 5.0)])
    assert [each["step"] for each in reader.poll()] == [3, 4, 5]
    write(path, [checkpoint(6, 6.0)])  # cut in place, and begun anew
    assert [each["step"] for each in reader.poll()] == [6]
    path.unlink()
    assert reader.poll() == []


@pytest.mark.quick
def test_files_of_one_rank_are_read_oldest_first_whatever_their_names(tmp_path: Path) -> None:
    for name, step, when in (("events.old.jsonl", 1, 10), ("events.jsonl", 2, 20)):
        write(tmp_path / name, [checkpoint(step, step)])
        os.utime(tmp_path / name, (when, when))
    assert [each["step"] for each in EventReader(str(tmp_path)).poll()] == [1, 2]


@pytest.mark.quick
def test_files_of_many_ranks_take_bounded_memory_and_what_is_left_out_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MOST_OF_ALL", 8000)
    monkeypatch.setattr(reading, "_LONGEST_LINE", 1000)
    for rank in range(4):
        write(tmp_path / f"events.{rank:05}.jsonl", [checkpoint(step, step, rank) for step in range(1, 41)])
    reader = EventReader(str(tmp_path))
    found = reader.poll(all_ranks=True)
    assert {each["rank"] for each in found} == {0, 1, 2, 3} and reader.cut == 4 and reader.skipped == 0
    assert sum(len(json.dumps(each)) for each in found) < 8000 and found[-1]["step"] == 40


@pytest.mark.quick
def test_a_file_of_events_that_is_asked_for_and_is_none_is_wrong_usage(job: Path, tmp_path: Path) -> None:
    code, said = call("watch", job, "--once", "--events", tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in said
    (tmp_path / "link.jsonl").symlink_to(job / "events.jsonl")
    assert call_json("watch", job, "--events", tmp_path / "link.jsonl")[1]["state"] == "ended"


@pytest.mark.quick
def test_ranks_are_told_apart_and_links_pipes_and_folders_passed_by(tmp_path: Path) -> None:
    for rank in (0, 3):
        write(tmp_path / ("events.jsonl" if rank == 0 else "events.00003.jsonl"), [start(rank=rank)])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "events.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert [each["rank"] for each in EventReader(str(tmp_path)).poll()] == [0]
    assert sorted(each["rank"] for each in EventReader(str(tmp_path)).poll(all_ranks=True)) == [0, 3]


@pytest.mark.quick
def test_of_a_file_without_end_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_BYTES", 4000)
    write(tmp_path / "events.jsonl", [checkpoint(step, step) for step in range(1, 100)])
    found = EventReader(str(tmp_path)).poll()
    assert found[-1]["step"] == 99 and 1 < len(found) < 10
    (tmp_path / "events.jsonl").write_bytes(b"x" * 10**6)
    assert EventReader(str(tmp_path)).poll() == []


@pytest.mark.quick
@pytest.mark.parametrize(
    "change",
    [
        {"layerwise": 2}, {"event": "party"}, {"event": ["start"]}, {"time": 1e300}, {"time": "now"}, {"rank": -1},
        {"rank": True}, {"step": "1"}, {"step": None}, {"step": 10**12}, {"outcome": "great"}, {"stall_s": "1"},
        {"stall_s": True}, {"reason": 3}, {"reason": "x" * 5000}, {"stall_s": 1 << 70}, {"stall_s": 10**400},
        {"time": 10**400}, {"slowest_rank": 0.5}, {"slowest_rank": -1},
    ],
)  # fmt: skip
def test_what_is_no_event_is_passed_by(change: dict[str, Any]) -> None:
    good = checkpoint(1, 1.0)
    assert parse(json.dumps(good).encode()) == good
    assert parse(json.dumps({**good, **change}).encode()) is None


@pytest.mark.quick
@pytest.mark.parametrize(
    "line",
    [b"", b"\xff", b"[]", b"1", b'{"layerwise":1', b'{"time": NaN}', pytest.param(b"[" * 60_000, id="nested")],
)
def test_what_is_no_object_is_passed_by(line: bytes) -> None:
    assert parse(line) is None


@pytest.mark.quick
def test_unknown_members_are_left_out() -> None:
    assert parse(json.dumps({**checkpoint(1, 1.0), "new_s": {}}).encode()) == checkpoint(1, 1.0)


# -- what it comes to ------------------------------------------------------------------------------------------------


def summary(events: list[dict[str, Any]], now: float, commits: list[Commit], free: int | None = None) -> dict[str, Any]:
    made = Summary()
    for each in events:
        made.take(each)
    return made.now(BEGAN + now, commits, free)


@pytest.mark.quick
def test_rates_lag_and_speed() -> None:
    events = [start(), checkpoint(10, 10.0), checkpoint(20, 20.0)]
    events.append(event("progress", 25.0, step=25, lag_steps=5, lag_s=5.0))
    found = summary(events, 26.0, [Commit(20, BEGAN + 20, 4 * GB, 20), Commit(10, BEGAN + 10, 4 * GB, 10)])
    assert (found["state"], found["step"], found["committed_step"], found["lag_steps"]) == ("running", 25, 20, 5)
    assert (found["committed_age_s"], found["last_event_age_s"]) == (6.0, 1.0)
    assert found["steps_per_s"] == 1.0 and found["checkpoints_per_h"] == 360
    assert found["gb_per_s"] == pytest.approx(4 / 1.1) and found["rank_gb_per_s"] == 1.0
    assert found["stall_ms_p50"] == found["stall_ms_p99"] == 4.0


@pytest.mark.quick
def test_a_commit_tells_how_far_training_was_then() -> None:
    events = [start(), checkpoint(10, 10.0, lag_steps=0), checkpoint(20, 30.0, lag_steps=10)]
    found = summary(events, 30.0, [Commit(20, BEGAN + 30, GB, 20)])
    assert (found["step"], found["lag_steps"], found["steps_per_s"]) == (30, 10, 1.0)


@pytest.mark.quick
def test_the_99th_percentile_of_a_hundred_is_not_the_longest() -> None:
    events = [start(), *(checkpoint(n, n, stall_s=n / 1e3) for n in range(1, 101))]
    assert summary(events, 101.0, [])["stall_ms_p99"] == pytest.approx(99)


@pytest.mark.quick
def test_numbers_that_lie_make_no_number_that_is_none() -> None:
    falls = (1e-300, 1e-310, 0.0)
    events = [start(), *(checkpoint(n, 40.0 * n, disk_free_bytes=free) for n, free in enumerate(falls, 1))]
    json.dumps(summary(events, 160.0, [], 0), allow_nan=False)
    json.dumps(found := summary(events, 160.0, [], 1), allow_nan=False)
    assert found["disk_full_in_s"] is None
    back = [start(), checkpoint(1, 100.0), checkpoint(2, 50.0), checkpoint(3, 50.0)]  # the clock was set back
    json.dumps(found := summary(back, 0.0, [Commit(3, BEGAN + 50, GB, 3)], GB), allow_nan=False)
    assert found["steps_per_s"] is None and watching.lines({"dir": "d", **found})


@pytest.mark.quick
def test_a_disk_that_fills_up_is_full_in_a_time() -> None:
    events = [start(), *(checkpoint(n, 10.0 * n, disk_free_bytes=(100 - n) * GB) for n in range(1, 11))]
    found = summary(events, 110.0, [], 89 * GB)
    assert found["disk_full_in_s"] == pytest.approx(890)
    text = "\n".join(each.plain for each in watching.lines({"dir": "d", **found}))
    assert "disk full in 15 min (89 GB left)" in text
    assert summary(events[:3], 21.0, [], 89 * GB)["disk_full_in_s"] is None, "two looks are no trend"
    aged = [checkpoint(n, 10.0 * n, disk_free_bytes=(101 - n) * GB, disk_free_age_s=10.0) for n in range(1, 11)]
    found = summary([start(), *aged], 110.0, [], 89 * GB)
    assert found["disk_full_in_s"] == pytest.approx(890), "by when the disk said so"
    steady = [start(), *(checkpoint(n, 10.0 * n, disk_free_bytes=9 * GB) for n in range(1, 11))]
    assert summary(steady, 110.0, [], 9 * GB)["disk_full_in_s"] is None


@pytest.mark.quick
def test_failures_are_told_newest_first_and_an_end_of_checkpoints_stays() -> None:
    events = [start(), *(checkpoint(n, n, outcome="failed", reason=f"why {n}") for n in range(1, 6))]
    events.append(event("stopped", 6.0, reason="five in a row"))
    found = summary(events, 10.0, [])
    assert found["state"] == "stopped" and [each["step"] for each in found["failures"]] == [3, 4, 5]
    text = [each.plain for each in watching.lines({"dir": "d", **found, "disk_free_bytes": GB})]
    assert [line.split()[2] for line in text if line.startswith("failed")] == ["5,", "4,", "3,"]
    assert "stopped    five in a row" in text
    assert summary([*events, start(9.0)], 10.0, [])["stopped"] is None, "a new start"


@pytest.mark.quick
def test_a_job_that_says_nothing_is_said_to_be_silent() -> None:
    found = summary([start(), checkpoint(1, 1.0)], 1000.0, [])
    assert "silent at step 1" in watching.lines({"dir": "d", **found, "disk_free_bytes": GB})[1].plain


@pytest.mark.quick
def test_no_name_in_the_files_reaches_the_terminal_as_a_command() -> None:
    bad = "\x1b]0;owned\x07 [red]x[/red] \u202e\nstopped    of course\r\n"
    found = summary([start(), checkpoint(1, 1.0, outcome="failed", reason=bad)], 2.0, [])
    made = [each.plain for each in watching.lines({"dir": bad, **found, "disk_free_bytes": GB})]
    text = "\n".join(made)
    assert not {"\x1b", "\x07", "\u202e"} & set(text) and "[red]x[/red]" in text
    assert not [line for line in made[1:] if "\n" in line], "no line of the view is made up"
