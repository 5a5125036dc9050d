# SPDX-License-Identifier: Apache-2.0
"""Blocks that several ranks need are read once; who is lost meanwhile, and what is damaged, is named on all ranks."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.crash import RankThread, build, settings, tensors_of, train, try_ranks
from kit.runners import Warm, told
from kit.shards import differing

from layerwise_dist import errors
from layerwise_dist._native import Env, PosixEnv
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.restore import handing
from layerwise_dist.restore.clipping import within
from layerwise_dist.restore.handing import Handing
from layerwise_dist.restore.reslice import reach

_SAID = re.compile(
    r"step [23] (?:resharded|restored across nodes): (\d+) bytes of shards read here, (\d+) received from other ranks, "
    r"(\d+) held here"
)

Written = tuple[Path, dict[tuple[str, int], str], list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Written:
    """A folder with checkpoints of two ranks under FSDP2 and DDP, digests of what they hold, and what each rank told of
    checkpoints on disks of nodes.
    """
    out = tmp_path_factory.mktemp("recut")
    warm.run("recut.py", 2, out, "write")
    digests = {(each["source"], each["step"]): each["digest"] for each in told(out) if "node" not in each}
    on_nodes = [[each for each in told(out, rank) if "node" in each] for rank in range(2)]
    for rank in range(2):
        (out / f"{rank}.jsonl").unlink()
    return out, digests, on_nodes


@pytest.fixture(scope="module")
def read(written: Written, warm: Warm) -> list[list[dict[str, Any]]]:
    """What each of three ranks told that restored all of it."""
    out, _, _ = written
    warm.run("recut.py", 3, out, "read")
    found = [told(out, rank) for rank in range(3)]
    for rank in range(3):
        (out / f"{rank}.jsonl").unlink()
    return found


def test_each_block_is_read_once_and_what_is_damaged_is_named_by_who_reads_it(
    written: Written, read: list[list[dict[str, Any]]]
) -> None:
    _, digests, _ = written
    every = [[each for each in told if "node" not in each] for told in read]
    assert [len(each) for each in every] == [5, 5, 5]
    for at, (source, target) in enumerate(itertools.product(("fsdp2", "ddp"), repeat=2)):
        ranks = [each[at] for each in every]
        assert all((each["source"], each["target"], each["step"]) == (source, target, 2) for each in ranks)
        assert {each["digest"] for each in ranks} == {digests[source, 2]}
        said = counts(ranks)
        assert len(said) == 3, ranks
        read, handed = sum(each[0] for each in said), [each[1] for each in said]
        distinct = said[0][2] if target == "ddp" else sum(each[2] for each in said)
        assert read <= 1.1 * distinct, (source, target, said)
        assert all(handed) if target == "ddp" else sum(handed) < distinct
        if target == "ddp":
            assert all(each[0] <= 0.5 * read for each in said), "each reads its share"
    for each in (found[4] for found in every):
        assert each["step"] == 1 and each["digest"] == digests["fsdp2", 1]
        named = [line for line in each["log"] if "load step 2: rank 2: shard " in line]
        assert len(named) == 1 and "rank_00001.safetensors of step 2: block" in named[0] and "exp_avg_sq/0" in named[0]


def counts(ranks: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Of ranks that restored together: bytes read, handed over by others, and held."""
    found = [found for each in ranks for line in each["log"] if (found := _SAID.search(line))]
    return [tuple(map(int, each.groups())) for each in found]


def test_ranks_that_swap_nodes_get_what_was_theirs_and_go_on(written: Written) -> None:
    """Disks of nodes, under torchrun: FSDP2, where each has its own, and DDP, where each needs what others wrote."""
    _, _, on_nodes = written
    for source in ("fsdp2", "ddp"):
        ranks = [[each for each in told if each["source"] == source] for told in on_nodes]
        for rank, (fresh, one, two, again, three) in enumerate(ranks):
            assert (fresh["step"], fresh["node"], again["step"], again["node"]) == (0, rank, 2, 1 - rank)
            assert again["digest"] == two["digest"] == ranks[0][2]["digest"]
            assert (one["after"], two["after"], three["after"]) == (1, 2, 3)
            assert three["drawn"] == torch.randn(3, generator=torch.Generator().manual_seed(2000 + rank)).tolist()
        said = counts([told[3] for told in ranks])
        assert len(said) == 2 and all(handed for _, handed, _ in said)
        distinct = said[0][2] if source == "ddp" else sum(held for *_, held in said)
        assert sum(read for read, *_ in said) <= 1.1 * distinct, said


def test_a_node_more_and_another_wrapper_restore_from_disks_of_nodes(
    written: Written, read: list[list[dict[str, Any]]]
) -> None:
    _, _, on_nodes = written
    last = {each["source"]: each["digest"] for each in on_nodes[0] if each.get("after") == 3}
    every = [[each for each in told if "node" in each] for told in read]
    for at, (source, target) in enumerate(itertools.product(("fsdp2", "ddp"), repeat=2)):
        ranks = [each[at] for each in every]
        assert all((each["source"], each["target"], each["step"]) == (source, target, 3) for each in ranks)
        assert {each["digest"] for each in ranks} == {last[source]}
        said = counts(ranks)
        distinct = said[0][2] if target == "ddp" else sum(held for *_, held in said)
        assert len(said) == 3 and sum(read for read, *_ in said) <= 1.1 * distinct, said
        assert said[2][0] == 0 and said[2][1], "the new node's rank reads nothing by itself"


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [("killed", "CommitError", "rank 1: its connection is gone"), ("stopped", "DeadlineError", r"rank\(s\) \[1\]")],
)
def test_a_rank_that_is_lost_while_blocks_are_handed_over_is_named_on_all_others(
    written: Written, warm: Warm, how: str, kind: str, text: str
) -> None:
    out, _, _ = written
    job = warm.start("recut.py", 3, out, how)
    try:
        deadline = time.monotonic() + 120
        while not all(found(out, rank) for rank in (0, 2)):
            assert time.monotonic() < deadline, job.output()[-6000:]
            time.sleep(0.05)
        for rank in (0, 2):
            (said,) = found(out, rank)
            assert said["error"] == kind and re.search(text, said["text"]), said
    finally:
        job.kill()
        for rank in range(3):
            (out / f"{rank}.jsonl").unlink(missing_ok=True)


def found(out: Path, rank: int) -> list[dict[str, Any]]:
    return [each for each in told(out, rank) if "error" in each]


# -- deadlines --------------------------------------------------------------------------------------------------------


def restored_with(folder: Path, slow: dict[int, testing.FaultEnv], timeout_s: float) -> list[RankThread]:
    """Three ranks restore what two wrote. Those of `slow` read by an Env of their own."""

    def body(transport: LocalTransport) -> dict[str, torch.Tensor]:
        model, optimizer = build(0, 5)
        framework = DDPFramework(model, transport.rank, 3)
        env: Env = slow.get(transport.rank, PosixEnv())
        config = settings(str(folder), commit={"timeout_s": timeout_s})
        with assembly.assemble(model, optimizer, config, transport, env, framework=framework) as ckpt:
            assert ckpt.restore() == 1
            return tensors_of(model, optimizer)

    return try_ranks(body, world=3, timeout_s=60)


@pytest.fixture
def small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """A checkpoint of two ranks in blocks of 4 KiB, which are read one by one; and what it holds."""
    monkeypatch.setattr(handing, "BUFFER_BYTES", 4096)

    def body(transport: LocalTransport) -> dict[str, torch.Tensor]:
        model, optimizer = build(0)
        framework = DDPFramework(model, transport.rank, 2)
        config = settings(str(tmp_path), writer={"queue_depth": 2, "block_kb": 4})
        with assembly.assemble(model, optimizer, config, transport, PosixEnv(), framework=framework) as ckpt:
            ckpt.restore()
            for step in ckpt.steps(1):
                train(model, optimizer, 0, 0, step)
            return tensors_of(model, optimizer)

    threads = try_ranks(body, world=2)
    assert threads[0].error is None
    yield tmp_path, threads[0].value


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> testing.FaultEnv:
    """An Env whose reads of shards take so long from when rank 1 begins to read blocks."""
    env = testing.FaultEnv(PosixEnv())
    load = Handing.load

    def slow_load(self: Handing) -> None:
        if self._exchange.rank == 1:
            env.delay("read", "*rank_*", seconds)
        load(self)

    monkeypatch.setattr(Handing, "load", slow_load)
    return env


def test_a_slow_rank_that_gets_on_is_waited_for(
    small_blocks: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = small_blocks
    env, timeout_s = slowed(monkeypatch, 0.25), 2.0
    began = time.monotonic()
    threads = restored_with(folder, {1: env}, timeout_s)
    assert [thread.error for thread in threads] == [None] * 3
    assert all(differing(thread.value, wanted) == [] for thread in threads)
    assert time.monotonic() - began > timeout_s, "it took longer than the deadline, in all"


def test_a_rank_that_stops_reading_is_named(
    small_blocks: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = small_blocks
    env = slowed(monkeypatch, 6.0)
    threads = restored_with(folder, {1: env}, 1.5)
    for thread in (threads[0], threads[2]):
        assert isinstance(thread.error, TimeoutError) and re.search(r"rank 1: read|\[1\]", str(thread.error)), (
            thread.error
        )
    assert isinstance(threads[1].error, errors.LayerwiseError | OSError), threads[1].error
    assert not [thread for thread in threading.enumerate() if thread.name == "layerwise-messages"]


def test_mutation_without_word_of_getting_on_a_slow_rank_is_given_up(
    small_blocks: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(dict[int, float]):
        def __setitem__(self, key: int, value: float) -> None:
            return None

    folder, _ = small_blocks
    env = slowed(monkeypatch, 0.4)
    load = Handing.load

    def deaf_load(self: Handing) -> None:
        self._exchange._heard = Deaf(self._exchange._heard)
        load(self)

    monkeypatch.setattr(Handing, "load", deaf_load)
    threads = restored_with(folder, {1: env}, 1.5)
    assert any(isinstance(thread.error, errors.DeadlineError) for thread in threads)


# -- parts of spans ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_what_lies_within_some_bytes_is_each_element_once_and_in_its_place() -> None:
    draw = random.Random(1)
    for _ in range(1500):
        lengths = [draw.randint(1, 4) for _ in range(draw.randint(0, 4))]
        boxed = [(draw.randint(1, size), size) for size in lengths]
        strides = [int(torch.tensor(lengths[at + 1 :]).prod()) for at in range(len(lengths))]
        kept = [(part, stride) for (part, _), stride in zip(boxed, strides, strict=True) if part > 1]
        shape, source = tuple(part for part, _ in kept), tuple(stride for _, stride in kept)
        target = tuple(int(torch.tensor(shape[at + 1 :]).prod()) for at in range(len(shape)))
        begin = draw.randint(-2, reach(shape, source))
        end = draw.randint(begin, reach(shape, source) + 2)
        wanted = {
            place(index, source): place(index, target)
            for index in itertools.product(*map(range, shape))
            if begin <= place(index, source) < end
        }
        seen: dict[int, int] = {}
        parts = list(within(shape, source, target, begin, end))
        for at, to, part in parts:
            lacking = len(shape) - len(part)
            for index in itertools.product(*map(range, part)):
                assert seen.setdefault(at + place(index, source[lacking:]), -1) == -1, "once"
                seen[at + place(index, source[lacking:])] = to + place(index, target[lacking:])
        assert seen == wanted and len(parts) <= 2 * len(shape) + 1


def place(index: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum(at * stride for at, stride in zip(index, strides, strict=True))
