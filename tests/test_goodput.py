# SPDX-License-Identifier: Apache-2.0
"""`layerwise bench goodput`: all time is accounted for, and a real job is killed by the trace and comes back."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from kit.drawing import drawn
from kit.forked import fork_from
from kit.runners import Warm, WarmJob
from typer.testing import CliRunner

from layerwise_dist.bench.goodput import interval
from layerwise_dist.bench.kill_trace import KillTrace, parse
from layerwise_dist.bench.killing import _Watch
from layerwise_dist.bench.lives import Life, Parts, parts_of
from layerwise_dist.cli.app import app
from layerwise_dist.supervision.processes import descendants

CONTENDERS = ("layerwise", "layerwise-auto", "dcp-async", "torch-save")


# -- the trace ---------------------------------------------------------------------------------------------------------


def test_a_poisson_trace_is_the_same_for_the_same_seed_and_has_the_mean_that_was_asked_for() -> None:
    one = parse("poisson:30s", seconds=100_000)
    assert one == parse("poisson:30s", seconds=100_000) != parse("poisson:30s", seconds=100_000, seed=1)
    assert list(one.moments) == sorted(one.moments) and one.moments[-1] < 100_000
    assert 100_000 / len(one.moments) == pytest.approx(30, rel=0.05) and one.mtbf_s == 30


def test_a_file_gives_its_moments_scaled_and_cut(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("# made\n10\n\n 25.5 # two at once\n25.5\n90\n")
    assert parse(str(tmp_path / "trace"), seconds=60, scale=2) == KillTrace((20, 51, 51), 60, 20)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1\nsoon\n", "line 2: 'soon' after 1 is not a time"),
        ("3\n2\n", "line 2: '2' after 3 is not a time"),
        ("-1\n", "line 1: '-1' is not a time"),
        ("nan\n", "line 1: 'nan' is not a time"),
        ("# nothing\n", "no kill within 60 s"),
        ("70\n", "no kill within 60 s"),
        ("0\n" * 10_001, "more than 10000 moments"),
    ],
)
def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ValueError, match=says):
        parse(str(tmp_path / "trace"), seconds=60)
    code, out = call(tmp_path, "--quick", "--trace", tmp_path / "trace", "--seconds", "60s")
    assert code == 2 and says in json.loads(out)["error"]


@pytest.mark.parametrize("trace", ["poisson:", "poisson:0", "poisson:often"])
def test_a_mean_distance_that_is_no_time_is_refused(trace: str) -> None:
    with pytest.raises(ValueError, match="is not a time above 0"):
        parse(trace, seconds=60)


# -- the accounts ------------------------------------------------------------------------------------------------------

# Steps of 1 s without checkpoints, of 1.1 s with. Killed at 10 with 9 steps done, of which 8 are committed; the next
# process is killed before it was ready, the one after that while it loads, and the last one trains on.
LIVES = [
    Life(0.0, 10.0, 0.0, 0.0, 0, [1.1 * number for number in range(1, 10)]),
    Life(10.0, 11.0),
    Life(11.0, 15.0, 14.0),
    Life(15.0, 25.0, 18.0, 18.5, 8, [18.5 + 1.1 * number for number in range(1, 6)]),
]


def total(parts: Parts) -> float:
    return parts.useful_s + parts.overhead_s + parts.lost_s + parts.restart_s + parts.read_s


def test_every_second_is_useful_or_has_a_name() -> None:
    parts = parts_of(LIVES, 1.0)
    assert parts.useful_steps == 8 + 5 and parts.total_s == 25
    assert parts.restart_s == pytest.approx(1 + 3 + 3) and parts.read_s == pytest.approx(1 + 0.5)
    assert parts.overhead_s == pytest.approx(13 * 0.1)
    assert parts.lost_s == pytest.approx((10 - 8 * 1.1) + (25 - 18.5 - 5 * 1.1))
    assert total(parts) == pytest.approx(25)
    assert parts.goodput == pytest.approx(13 / 25) and parts.ceiling == pytest.approx(18 / 25)


def test_what_a_first_step_takes_longer_is_none_of_a_checkpointers() -> None:
    """Of a life that ended within it, as long as it was."""
    lives = [*LIVES, Life(25.0, 28.0, 26.0, 27.8)]
    parts = parts_of(lives, 1.0, 0.5)
    restored = sum(life.restored is not None for life in lives)
    assert parts.first_s == pytest.approx(0.5 * (restored - 1) + 0.2)
    assert parts.ceiling == pytest.approx((28 - parts.restart_s - parts.first_s) / 28)
    assert total(parts) == pytest.approx(28)


def test_steps_that_an_older_checkpoint_undoes_are_lost_in_all_lives() -> None:
    """The third life finds the second one's checkpoints damaged, say."""
    lives = [
        Life(0.0, 5.0, 0.0, 0.0, 0, [1.0, 2.0, 3.0, 4.0]),
        Life(5.0, 10.0, 6.0, 6.0, 4, [7.0, 8.0, 9.0]),
        Life(10.0, 13.0, 11.0, 11.0, 2, [12.0]),
    ]
    parts = parts_of(lives, 1.0)
    assert parts.useful_steps == 2 + 0 + 1 and parts.lost_s == pytest.approx(3 + 4 + 1)
    assert total(parts) == pytest.approx(13)


def test_a_step_that_was_committed_but_not_told_of_is_useful() -> None:
    parts = parts_of([Life(0.0, 2.5, 0.0, 0.0, 0, [1.0]), Life(2.5, 5.0, 3.0, 4.0, 2, [5.0])], 1.0)
    assert parts.useful_steps == 3 and total(parts) == pytest.approx(5)


def test_the_interval_is_dalys() -> None:
    """sqrt(2 x 0.5 x 100) = 10 s less what the higher terms say, in steps of 0.1 s."""
    assert interval(0.5, 100.0, 0.1) == pytest.approx(97, abs=2)
    assert interval(1e-6, 100.0, 1.0) == 1


# -- what the job says -------------------------------------------------------------------------------------------------


def test_what_a_dead_process_said_belongs_to_its_life_and_a_life_that_no_kill_began_is_an_error() -> None:
    watch = _Watch(cast(Any, None), KillTrace((1.0,), 2.0, 1.0), False)
    assert watch.hear({"life": 0, "ready": 9.0}) == 0
    assert watch.hear({"life": 0, "restored": 10.0, "step": 0}) == 0
    assert watch.hear({"life": 0, "step": 1, "at": 11.0, "every": 1}) == 1
    watch._lives.append(Life(11.5))
    watch.hear({"life": 0, "step": 2, "at": 11.4, "every": 1})  # read after the kill
    watch.hear({"life": 1, "ready": 13.0})
    assert watch.hear({"life": 1, "restored": 14.0, "step": 2}) == 2
    first, second = watch.found().lives
    assert (first.began, first.steps) == (10.0, [11.0, 11.4])
    assert (second.ready, second.restored, second.start, second.steps) == (13.0, 14.0, 2, [])
    assert watch.problem is None
    watch.hear({"life": 2, "ready": 15.0})
    assert watch.problem == "lost a rank that nobody had killed"


# -- real jobs ---------------------------------------------------------------------------------------------------------


def call(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "goodput", *map(str, args), "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def forked(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> list[WarmJob]:
    return fork_from(warm, monkeypatch)


def check(found: dict[str, Any], contenders: Sequence[str], kills: int) -> None:
    assert [row["contender"] for row in found["results"]] == [*contenders]
    assert set(found["costs_s"]) == {"dcp-async", "torch-save"} & {*contenders}
    for row in found["results"]:
        assert row["kills"] == [kills] and row["useful_steps"][0] >= 3 and row["every"][0] >= 1
        shares = [row[name]["median"] for name in ("goodput", "lost", "restart", "read", "overhead")]
        assert sum(shares) == pytest.approx(1) and min(row["restart"]["min"], row["goodput"]["min"]) > 0
        assert row["of_ceiling"]["median"] >= row["goodput"]["median"]
    assert any("Only" in note for note in found["notes"])


def test_a_job_is_killed_by_the_trace_comes_back_and_its_time_is_accounted_for(
    tmp_path: Path, forked: list[WarmJob], long: bool
) -> None:
    """On two ranks under FSDP2: one of the contenders, each of them with --long."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "trace").write_text("0.3\n0.3\n")
    chosen = CONTENDERS if long else (drawn(CONTENDERS, "contender"),)
    asked = ("--quick", "--trace", tmp_path / "trace", "--contenders", ",".join(chosen))
    code, out = call(tmp_path / "disk", *asked)
    assert code == 0, out
    assert list((tmp_path / "disk").iterdir()) == [], "nothing is left behind"
    check(json.loads(out), chosen, 2)
    assert len(forked) == 1 + len(chosen) and not any(job.pids() for job in forked)


def test_the_same_under_torchrun_itself(tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("five jobs under torchrun: --long")
    code, out = call(tmp_path, "--quick")
    assert code == 0, out
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    found = json.loads(out)
    check(found, CONTENDERS, len(found["trace"]["moments_s"]))


def test_a_rank_that_dies_by_itself_is_an_error_and_not_a_kill(
    tmp_path: Path, forked: list[WarmJob], monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """Else a contender that crashes would look like one that restarts quickly."""
    if not long:
        pytest.skip("two jobs, and what it tells by is tried above: --long")
    (tmp_path / "disk").mkdir()
    (tmp_path / "trace").write_text("50\n")
    hear = _Watch.hear

    def crash(watch: _Watch, said: dict[str, Any]) -> int:
        if said.get("step") == 2 and said["life"] == 0 and "at" in said:
            os.kill(descendants(forked[-1].pid)[0], signal.SIGKILL)
        return hear(watch, said)

    monkeypatch.setattr(_Watch, "hear", crash)
    code, out = call(tmp_path / "disk", "--quick", "--trace", tmp_path / "trace", "--contenders", "layerwise")
    assert code == 1 and "lost a rank that nobody had killed" in json.loads(out)["error"]
    assert list((tmp_path / "disk").iterdir()) == []


def test_an_unknown_contender_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    code, out = call(tmp_path, "--quick", "--contenders", "hope")
    assert code == 2 and "contender 'hope': choose from layerwise, layerwise-auto" in json.loads(out)["error"]


def test_a_job_that_cannot_start_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    code, out = call(tmp_path, "--quick")
    assert code == 1 and "measuring costs ended with exit code 1" in json.loads(out)["error"]
    assert list(tmp_path.iterdir()) == []
