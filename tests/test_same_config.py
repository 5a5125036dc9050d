# SPDX-License-Identifier: Apache-2.0
"""Ranks whose configurations differ are told so at `attach()`, all of them, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from kit.crash import try_ranks
from kit.threads import Gathering, in_threads

from layerwise_dist import errors
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.transports.rendezvous import RECORD_BYTES
from layerwise_dist.config import LayerwiseConfig, load_config, ranks
from layerwise_dist.engine import same_config

KEYS = ranks.values(LayerwiseConfig())
OTHER: dict[str, Any] = {
    "enabled": False, "mode": "mock", "commit.transport": "store",
    "every_n_steps": 2, "interval.max_overhead": 0.5, "interval.mtbf_s": 60.0, "interval.min_steps": 2,
    "interval.max_steps": 9, "save_last": False, "keep_last": 3, "keep_every_n_steps": 10, "keep_tags": 4,
    "max_in_flight": 1, "when_full": "skip", "fence_timeout_s": 1.0,
    "update": "whole", "replicas": "apart", "replica_drift": "warn", "hash": False, "file_mode": "0640",
    "commit.timeout_s": 20.0, "commit.on_failure": "raise", "commit.raise_after": 1, "preemption.enabled": True,
    "preemption.grace_s": 5.0,
    "dir": "elsewhere", "pool_mb": 64, "capture": "stage", "audit": "always", "writer.backend": "posix",
    "writer.queue_depth": 2, "writer.block_kb": 64, "writer.recycle": False, "writer.huge_pages": "off",
    "writer.direct_io": "off", "reader.direct_io": "off", "telemetry.events": "events.jsonl",
    "telemetry.tensorboard": "board",
    "telemetry.prometheus_port": 9000, "telemetry.prometheus_host": "0.0.0.0", "preemption.exit_code": 1,
}  # fmt: skip


def config(**changed: Any) -> LayerwiseConfig:
    """`changed` by keys such as ``writer.queue_depth``."""
    tree: dict[str, Any] = {}
    for key, value in changed.items():
        part, dot, name = key.partition(".")
        if dot:
            tree.setdefault(part, {})[name] = value
        else:
            tree[key] = value
    return load_config(tree)


def compared(*by_rank: LayerwiseConfig, problems: dict[int, str] | None = None) -> list[str | None]:
    """What each rank is told over the session's own messages."""

    def run(transport: Any) -> None:
        participant = Participant(transport, timeout_s=20.0)
        try:
            same_config.compare(participant, by_rank[transport.rank], _problem(problems, transport.rank))
        finally:
            participant.close(1.0)

    return _told(thread.error for thread in try_ranks(run, world=len(by_rank)))


def met(*by_rank: LayerwiseConfig, problems: dict[int, str] | None = None) -> list[str | None]:
    """What each rank is told over the job's default group."""
    gathering = Gathering(len(by_rank))

    def run(rank: int) -> None:
        same_config.compare_meeting(by_rank[rank], _problem(problems, rank), gathering.of(rank))

    return _told(in_threads(len(by_rank), run))


def _problem(problems: dict[int, str] | None, rank: int) -> errors.ConfigError | None:
    return errors.ConfigError(problems[rank]) if problems and rank in problems else None


def _told(found: Any) -> list[str | None]:
    said = []
    for error in found:
        assert error is None or type(error) is errors.ConfigError, repr(error)
        said.append(None if error is None else str(error))
    return said


# -- every key ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_every_key_is_said_to_be_the_same_on_all_ranks_or_each_one_s_own() -> None:
    assert ranks.SAME.isdisjoint(ranks.OWN) and ranks.MEETING <= ranks.SAME
    assert KEYS.keys() == ranks.SAME | ranks.OWN
    assert OTHER.keys() == KEYS.keys() and all(OTHER[key] != KEYS[key] for key in KEYS), "a new key is tried below too"


@pytest.mark.parametrize("key", sorted(ranks.SAME))
def test_a_key_that_differs_is_named_on_all_ranks_with_its_values(key: str) -> None:
    told = compared(config(), config(**{key: OTHER[key]}), config())
    assert told == [told[0]] * 3 and told[0] is not None
    assert (
        f"the ranks' configurations differ: {key} = {KEYS[key]!r} on ranks 0,2 and {OTHER[key]!r} on rank 1." in told[0]
    )


def test_each_rank_may_have_its_own_of_the_other_keys() -> None:
    assert compared(config(), config(**{key: OTHER[key] for key in ranks.OWN})) == [None, None]


def test_all_that_differ_are_named_and_of_many_values_a_few() -> None:
    told = compared(*(config(keep_last=1 + rank, when_full="wait" if rank % 2 else "skip") for rank in range(6)))
    assert told[0] is not None and told == [told[0]] * 6
    assert "keep_last = 1 on rank 0, 2 on rank 1, 3 on rank 2, 4 on rank 3 and 2 more values;" in told[0]
    assert "when_full = 'skip' on ranks 0-4/2 and 'wait' on ranks 1-5/2." in told[0]


def test_mutation_a_key_that_is_not_compared_goes_by_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SAME", ranks.SAME - {"every_n_steps"})
    assert compared(config(), config(every_n_steps=2)) == [None, None]


# -- before the ranks meet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(ranks.MEETING))
def test_ranks_that_would_wait_for_each_other_are_told_before_they_do(key: str) -> None:
    told = met(config(), config(**{key: OTHER[key]}))
    assert told == [told[0]] * 2 and told[0] is not None
    assert f"{key} = {KEYS[key]!r} on rank 0 and {OTHER[key]!r} on rank 1." in told[0]


@pytest.mark.parametrize("way", [compared, met])
def test_what_is_wrong_on_one_rank_is_told_on_all(way: Callable[..., list[str | None]]) -> None:
    assert way(config(), config(keep_last=9), problems={1: "keep_last = 0"}) == ["rank 1: keep_last = 0"] * 2


@pytest.mark.parametrize("text", ["a", "\U0001f642", "\x00", "\n", "\\", '"'])
def test_what_is_wrong_fits_the_record_however_long_it_is(text: str) -> None:
    def gather(record: dict[str, Any]) -> list[dict[str, Any]]:
        assert len(json.dumps(record)) <= RECORD_BYTES
        return [record]

    with pytest.raises(errors.ConfigError, match="rank 0: "):
        same_config.compare_meeting(config(), errors.ConfigError(text * 10_000), gather)
