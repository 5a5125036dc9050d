# SPDX-License-Identifier: Apache-2.0
"""Who holds a tensor with whom: what ranks share is written once, what they do not share each saves for itself, and
replicas that are none are found.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from kit.runners import Warm

from layerwise_dist.commit.coordinator import Announce, Coordinator
from layerwise_dist.engine.replicas import judge
from layerwise_dist.engine.samples import in_turn
from layerwise_dist.errors import DamageError, MismatchError, UnsupportedError
from layerwise_dist.restore import contents
from layerwise_dist.restore.contents import RankPart, entries
from layerwise_dist.restore.loader import index_of
from layerwise_dist.restore.planner import ShardSet, plan
from layerwise_dist.storage.reader import Entry, parse_header
from layerwise_dist.storage.shard_layout import ShardLayout, Source, state_extent
from layerwise_dist.tensors.slices import Slice, ranks_of, ranks_text

RIGHT = [
    "ignored", "groups", "stages", "stages_apart", "owner", "owner_later", "own_state", "local", "apart", "averaging",
    "later", "later_monitored", "later_forgiven", "later_unseen",
]  # fmt: skip
MUTATIONS = ["ignored", "groups", "owner", "owner_later", "local", "later"]


@pytest.fixture(scope="module")
def found(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """By rank, what is wrong in each case."""
    folder = tmp_path_factory.mktemp("holders")
    warm.run("holders.py", 4, folder, *RIGHT, *(f"mutation:{case}" for case in MUTATIONS), timeout=180)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", RIGHT)
def test_what_ranks_do_not_share_is_saved_by_each_and_replicas_that_are_none_are_found(
    found: list[dict[str, list[str]]], case: str
) -> None:
    assert [each[case] for each in found] == [[]] * 4


@pytest.mark.parametrize("case", MUTATIONS)
def test_taking_the_world_for_replicas_or_leaving_out_a_comparison_is_found(
    found: list[dict[str, list[str]]], case: str
) -> None:
    assert any(each[f"mutation:{case}"] for each in found)


# -- in a file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([], ""), ([3], ""), ([0, 1], "0,1"), (range(8), "0-7"), ([0, 8, 16], "0-16/8"), ([5, 1, 3, 4, 9], "1,3-5,9")],
)
def test_ranks_have_one_text(ranks: Any, text: str) -> None:
    assert ranks_text(ranks) == text
    assert ranks_of(text, 17) == (tuple(sorted(ranks)) if text else ())


@pytest.mark.parametrize(
    "text", ["0", "1,0", "0,0", "0-2,2", "0-17", "0,1,2", "0-3/0", "a", "0,", "-1,2", "0-4/3", "0-99999999", "٣,4"]
)
def test_what_is_no_list_of_ranks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no list of ranks"):
        ranks_of(text, 17)


def header_of(part: Slice) -> tuple[bytes, int]:
    """Of rank 1's shard in a world of four, and the shard's size."""
    layout = ShardLayout([("layer", [Source(part)])], 512, 4096)
    hashes = "0" * 16 * len(layout.blocks)
    said = {"attempt": "0" * 16, "state_hash": "0" * 16, "hashes": hashes, "state": (2, 0)}
    header = layout.header(step=1, rank=1, world_size=4, **said)
    return header, layout.end + len(state_extent(b"{}", b""))


def test_a_shard_says_which_ranks_hold_a_tensor_and_a_wrong_list_is_damage() -> None:
    part = Slice("param", "w", "F32", (4, 4), start=3, length=5, among="1-3")
    header, size = header_of(part)
    assert parse_header("x", size, header).entries["param/w"].slice == part
    alone = Slice.whole("param", "w", "F32", (4, 4))
    header, size = header_of(alone)
    assert parse_header("x", size, header).entries["param/w"].slice == alone and b"among" not in header
    for wrong in ("3-1", "0,2", "1-9", "1,,"):  # the second: without this rank
        header, size = header_of(part)
        with pytest.raises(DamageError, match="ranks"):
            parse_header("x", size, header.replace(b"1-3", wrong.encode()))


# -- what restore takes ----------------------------------------------------------------------------------------------


def shard(rank: int, *slices: Slice) -> Any:
    entries = {part.name: Entry(part, 0, part.nbytes, False) for part in slices}
    return SimpleNamespace(index=SimpleNamespace(path=f"rank_{rank}", rank=rank, entries=entries))


def test_restore_takes_of_other_ranks_only_parts_of_the_same_tensor() -> None:
    def half(rank: int, among: str, fqn: str = "w") -> Slice:
        return Slice("param", fqn, "F32", (8,), start=4 * (rank % 2), length=4, among=among)

    opened: list[int] = []
    held = {
        0: shard(0, half(0, "0,1"), Slice.whole("momentum", "w", "F32", (8,))),
        1: shard(1, half(1, "0,1"), Slice.whole("momentum", "v", "F32", (8,))),
        2: shard(2, half(0, "2,3")),
        3: shard(3, half(1, "2,3")),
    }

    def index(ranks: tuple[int, ...]) -> dict[str, Any]:
        opened.clear()
        shards = ShardSet(0, lambda rank: (opened.append(rank), [held[rank]])[1])
        return index_of(RankPart(entries(shards.own), {}), shards, ranks, lambda name, fqn: ranks)

    wanted = Slice.whole("param", "w", "F32", (8,), "0,1")
    found = index((0, 1))
    assert [span.shard.index.rank for span in plan(wanted, found["param/w"])] == [0, 1]
    assert opened == [0, 1], "the files of the other stage are none of its business"
    assert "momentum/v" not in found, "what another rank has for itself alone is not this rank's"
    crossed = Slice.whole("param", "w", "F32", (8,), "0,2")
    with pytest.raises(MismatchError, match="ranks 0,1 hold it together, here ranks 0,2 hold it together"):
        plan(crossed, index((0, 2))["param/w"])


def test_what_one_stage_holds_does_not_make_another_stage_whole() -> None:
    def part(rank: int, among: str) -> dict[str, Entry]:
        return shard(rank, Slice("param", "w", "F32", (8,), start=4 * (rank % 2), length=4, among=among)).index.entries

    manifest: Any = SimpleNamespace(step=1, world_size=4, framework="ddp")
    held = {0: part(0, "0,1"), 1: part(1, "0,1"), 2: part(2, "2,3"), 3: part(3, "2,3")}
    assert contents.lacking(manifest, held, {}) == []
    for rank in held:
        assert contents.lacking(manifest, {**held, rank: {}}, {}) == [
            f"step 1: param/w of shape [8]: no shard has its element [{4 * (rank % 2)}]"
        ]


# -- what is compared ------------------------------------------------------------------------------------------------


def test_state_that_differs_is_named_and_parameters_that_differ_are_an_error_with_the_ranks() -> None:
    w, m, v = ["param/w", "F32 (2,)", "1"], ["momentum/w", "F32 (2,)", "2"], ["momentum/v", "F32 (2,)", "3"]
    assert judge(["0,1"], [{"0,1": [w, m, v]}, {"0,1": [w, v]}]) == ["w"]
    longer = ["momentum/w", "F32 (3,)", "2"]
    assert judge(["0,1"], [{"0,1": [w, m]}, {"0,1": [w, longer]}]) == ["w"]
    assert judge(["0,1"], [{"0,1": [w, v]}, {"0,1": [w, ["momentum/v", "F32 (2,)", "4"]]}]) == ["v"]
    other = ["param/w", "F32 (2,)", "4"]
    with pytest.raises(UnsupportedError, match="rank 0,2 and rank 1 hold different values of param/w"):
        judge(["0-2"], [{"0-2": [w, v]}, {"0-2": [other, m]}, {"0-2": [w, v]}])
    with pytest.raises(UnsupportedError, match=r"ranks 0,1 hold param/w .* rank 1 has no such parameter"):
        judge(["0,1"], [{"0,1": [w]}, {"0,1": []}])
    with pytest.raises(UnsupportedError, match="not in the same order"):
        judge(["0,1"], [{"0,1": [w, ["param/v", "F32 (2,)", "1"]]}, {"0,1": [["param/v", "F32 (2,)", "1"], w]}])


@pytest.mark.parametrize("count", [0, 1, 7, 100, 250, 400])
def test_samples_come_round_in_a_hundred_checkpoints_and_are_small(count: int) -> None:
    chosen = [in_turn(range(count), turn) for turn in range(100)]
    assert {each for part in chosen for each in part} == set(range(count))
    assert max(map(len, chosen)) <= -(-count // 100)


def coordinator() -> Coordinator:
    return Coordinator(3, timeout_s=10.0, on_failure="warn", raise_after=5, now=0.0)


def told(coordinator: Coordinator, *each: tuple[int, str]) -> list[dict[str, Any]]:
    """What is announced when ranks say each a listing, and hashes of parameters and of state."""
    out = []
    for rank, said in each:
        listing, params, state, *new = said
        sampled = {
            "seq": 1, "step": 7, "late": False, "params": 16 * params, "state": 16 * state,
            "blocks": [] if rank else ["param/w (block 0)", "exp_avg/w (block 0)"],
        }  # fmt: skip
        groups = [
            {"ranks": "0,2", "count": 2, "listing": "same", "samples": [], "new": []},
            {"ranks": "0-2", "count": 3, "listing": listing, "samples": [sampled], "new": new},
        ]
        message = {
            "t": "alike", "rank": rank, "world_size": 3, "seq": 1, "attempt": "a", "step": 7, "groups": groups,
        }  # fmt: skip
        out += coordinator.handle(message, 0.0)
    return [output.message for output in out if isinstance(output, Announce)]


def test_what_differs_by_sample_ends_the_session_and_names_tensor_and_ranks() -> None:
    assert told(coordinator(), (2, "aps"), (0, "aps"), (1, "aps")) == []
    stop, aborted = told(coordinator(), (2, "aps"), (1, "aqt"), (0, "aps"))
    assert stop["t"] == "stop" and aborted["failure"] and not aborted["unlike"]
    assert "ranks 0,2 and rank 1 hold different values of param/w (block 0) at step 7 (rank 1 agai" in stop["reason"]


def test_what_differs_is_said_of_the_ranks_that_have_spoken_if_one_never_does() -> None:
    judge = coordinator()
    assert told(judge, (2, "aps"), (0, "aqs")) == []
    failed = {
        "t": "failed", "rank": 1, "world_size": 3, "seq": 1, "attempt": "a", "step": 7, "error": "no", "final": False,
    }  # fmt: skip
    stop, _ = [output.message for output in judge.handle(failed, 0.0)]
    assert stop["t"] == "stop" and "rank 0 and rank 2 hold different values of param/w" in stop["reason"]


@pytest.mark.parametrize("new", ["", "np", "nq", "mq"])
def test_what_is_new_is_compared_whole_where_both_say_it(new: str) -> None:
    found = told(coordinator(), (0, "apsnp"), (1, "aps" + new), (2, "apsnp"))
    assert [each["unlike"] for each in found] == (["0-2"] if new == "nq" else [])


# Another hash of state; other tensors, whose hashes say nothing.
@pytest.mark.parametrize("other", ["apt", "bqt"])
def test_state_that_comes_to_differ_costs_a_checkpoint_and_no_failure(other: str) -> None:
    (aborted,) = told(coordinator(), (0, "aps"), (1, other), (2, "aps"))
    assert (aborted["t"], aborted["failure"], aborted["unlike"]) == ("aborted", False, "0-2")
