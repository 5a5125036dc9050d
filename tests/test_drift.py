# SPDX-License-Identifier: Apache-2.0
"""Replicas that drift: one flipped bit is named within a hundred checkpoints, with its rank, tensor and block."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.runners import Warm

from layerwise_dist.commit import alike
from layerwise_dist.commit.coordinator import Announce, Coordinator
from layerwise_dist.engine import samples
from layerwise_dist.engine.samples import Common, Sums
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.tensors.pieces import DTYPE_CODES, Piece
from layerwise_dist.tensors.slices import Slice

RANKS, TRIALS, BLOCK = 3, 20, 512


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Host memory; or what is taken for a device's, which is summed up by torch and comes one checkpoint later."""
    monkeypatch.setattr(samples, "WINDOW_BYTES", BLOCK)
    if request.param == "device":
        monkeypatch.setattr(Piece, "on_host", property(lambda piece: False))
    return str(request.param)


class Replica:
    """One rank, with parameters of many sizes and layouts."""

    def __init__(self, rank: int, ranks: int = RANKS) -> None:
        made = torch.Generator().manual_seed(1)
        shapes = [(70, 90), (3, 5, 7, 2), (1,), (517,), (41, 3), (8191,)]
        kinds = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
        self.rank, self._ranks = rank, ranks
        self.tensors = {
            f"layer{number}": torch.randn(shape, generator=made).to(kind)
            for number, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
        }
        self.tensors["layer1"] = self.tensors["layer1"].to(memory_format=torch.channels_last)
        self.moments = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.common = Common(
            [
                Piece(Slice.whole(kind, name, DTYPE_CODES[each.dtype], tuple(each.shape), "0-2"), each, False)
                for kind, held in (("param", self.tensors), ("exp_avg", self.moments))
                for name, each in held.items()
            ]
        )
        self._sums: Sums | None = None

    def says(self, seq: int) -> Any:
        attempt, first = AttemptId(1, seq, 10 * seq), self.rank == 0
        said = [] if self._sums is None else [self._sums.said(name=first)]
        said.append(self.common.sample(attempt, name=first))
        self._sums = self.common.sums(attempt)
        group = {
            "ranks": "0-2" if self._ranks == 3 else "0,1", "count": self._ranks, "listing": self.common.listing,
            "new": [], "samples": said,
        }  # fmt: skip
        return {
            "t": "alike", "rank": self.rank, "world_size": self._ranks, "seq": seq, "attempt": "a", "step": 10 * seq,
            "groups": [json.loads(json.dumps(group))],
        }  # fmt: skip

    def flip(self, chance: random.Random, held: dict[str, torch.Tensor]) -> tuple[str, int]:
        """Any one bit: of which tensor, and in which of its bytes."""
        place = chance.randrange(sum(tensor.numel() * tensor.element_size() for tensor in held.values()))
        for name, tensor in held.items():
            nbytes = tensor.numel() * tensor.element_size()
            if place < nbytes:
                element, byte = divmod(place, tensor.element_size())
                row_major = tensor.contiguous().view(-1)
                row_major.view(torch.uint8)[place] ^= 1 << chance.randrange(8)
                tensor.copy_(row_major.view(tensor.shape))
                return name, place
            place -= nbytes
        raise AssertionError


def told(replicas: list[Replica], first: int, checkpoints: int, **options: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(seq, what rank 0 says to all) of these checkpoints, heard from ranks that run ahead of each other by any two."""
    coordinator = Coordinator(len(replicas), timeout_s=1e9, on_failure="warn", raise_after=1000, now=0.0, **options)
    chance, at = random.Random(first), dict.fromkeys(replicas, first)
    while behind := [replica for replica, seq in at.items() if seq < first + checkpoints]:
        slowest = min(at[replica] for replica in behind)
        replica = chance.choice([each for each in behind if at[each] <= slowest + 2])
        seq, at[replica] = at[replica], at[replica] + 1
        for output in coordinator.handle(replica.says(seq), 0.0):
            if isinstance(output, Announce):
                yield seq, output.message  # type: ignore[misc]


def named(number: int) -> bool:
    """Whether the flip of this trial is named: its step, all ranks, who is alone, its tensor and its block."""
    chance = random.Random(number)
    replicas = [Replica(rank) for rank in range(RANKS)]
    victim = chance.randrange(RANKS)
    name, place = replicas[victim].flip(chance, replicas[victim].tensors)
    first = chance.randrange(1, 1000)
    for seq, message in told(replicas, first, 101):
        if message["t"] == "stop":
            found = re.search(
                r"^ranks? (\S+) and ranks? (\S+) hold different values of param/(layer\d) "
                r"\(block \d+: (?:all \d+ bytes|bytes (\d+) to (\d+))\) at step (\d+) "
                r"\(rank (\d) against 2 that agree\)",
                message["reason"],
            )
            assert found, message["reason"]
            assert (found[3], int(found[7])) == (name, victim) and int(found[6]) // 10 in (seq, seq - 1)
            assert found[4] is None or int(found[4]) <= place < int(found[5])
            return int(found[6]) // 10 - first < 100
    return False


def test_a_flipped_bit_is_named_within_a_hundred_checkpoints_in_twenty_of_twenty_trials(where: str) -> None:
    assert [named(number) for number in range(TRIALS)] == [True] * TRIALS


def test_mutation_a_sample_that_never_comes_round_is_caught(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = samples.in_turn
    monkeypatch.setattr(samples, "in_turn", lambda blocks, turn: real(blocks, 0))
    assert not all(named(number) for number in range(5))


def test_mutation_ranks_that_are_compared_with_themselves_are_caught(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alike, "_sides", lambda said: ([sorted(said)], ""))
    assert not any(named(number) for number in range(2))


def test_equal_replicas_say_nothing_in_300_checkpoints(where: str) -> None:
    assert list(told([Replica(rank) for rank in range(RANKS)], 1, 300)) == []


def test_warn_lets_checkpoints_pass_and_tells_of_one_drift_once(where: str) -> None:
    replicas = [Replica(rank) for rank in range(RANKS)]
    with torch.no_grad():
        replicas[1].tensors["layer5"].add_(1)  # in many blocks
    said = [message for _, message in told(replicas, 1, 120, replica_drift="warn")]
    assert {message["t"] for message in said} == {"drifted"} and len(said) > 40
    assert [message["first"] for message in said] == [True] + [False] * (len(said) - 1)


def test_two_ranks_have_no_majority_and_state_that_drifts_is_named_and_kept_apart(where: str) -> None:
    pair = [Replica(rank, 2) for rank in range(2)]
    pair[1].flip(random.Random(3), pair[1].tensors)
    reason = next(message["reason"] for _, message in told(pair, 1, 101) if message["t"] == "stop")
    assert reason.startswith("rank 0 and rank 1 hold different values of param/") and "against" not in reason
    replicas = [Replica(rank) for rank in range(RANKS)]
    name, _ = replicas[2].flip(random.Random(4), replicas[2].moments)
    _, message = next(told(replicas, 1, 101))
    assert (message["t"], message["failure"], message["unlike"]) == ("aborted", False, "0-2")
    assert f"exp_avg/{name} (block" in message["reason"] and "(rank 2 against 2 that agree)" in message["reason"]


def sampled(seq: int, params: str) -> Any:
    return {"seq": seq, "step": seq, "late": False, "params": params * 16, "state": "", "blocks": ["param/w (block 0)"]}


def test_many_groups_of_ranks_are_compared_at_once_and_old_samples_are_forgotten() -> None:
    held, found = alike.Samples(), []
    for second in (False, True):
        for number in range(0, 400, 2):
            params = "b" if second and number == 2 else "a"
            group: Any = {"ranks": f"{number},{number + 1}", "count": 2, "listing": "", "new": [],
                          "samples": [sampled(7, params)]}  # fmt: skip
            found += held.take(number + second, group)
    assert [unlike.ranks for unlike in found] == ["2,3"]
    for seq in range(8, 200):  # of which the other rank never speaks
        alone: Any = {"ranks": "0,1", "count": 2, "listing": "", "new": [], "samples": [sampled(seq, "a")]}
        assert list(held.take(0, alone)) == []
    assert len(held._said) <= 16


def test_where_a_tensor_lies_in_its_storage_is_no_part_of_its_sum() -> None:
    values = torch.arange(2 * 1024, dtype=torch.bfloat16)
    sums = set()
    for before in range(5):
        storage = torch.cat((torch.zeros(before, dtype=torch.bfloat16), values))
        sums.add(int(samples._sum(storage[before:], 0, 4096)))
    assert len(sums) == 1


def test_blocks_grow_with_the_state_and_come_round_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "WINDOW_BYTES", 64)
    monkeypatch.setattr(samples, "MOST_BLOCKS", 4)
    common = Replica(0).common
    told = [common.sample(AttemptId(1, seq, 1), name=True)["blocks"] for seq in range(7, 107)]
    assert {each for blocks in told for each in blocks} == {common.words(block) for block in common.blocks}
    assert max(map(len, told)) <= 5


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("ddp", 3), ("hsdp", 2), ("hsdp", 4), ("zero0", 2)])
def test_real_jobs_name_each_flip_and_find_nothing_in_a_healthy_run(
    request: pytest.FixtureRequest, tmp_path: Path, long: bool, kind: str, ranks: int
) -> None:
    if not long:
        pytest.skip("jobs of twenty trials and 300 steps each: --long")
    if kind == "zero0" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (launch/setup.sh does it)")
    server: Warm = request.getfixturevalue("zero" if kind == "zero0" else "warm")
    server.run("drift.py", ranks, tmp_path, kind, TRIALS, 300, timeout=900)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)] == [[]] * ranks
