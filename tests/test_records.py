# SPDX-License-Identifier: Apache-2.0
"""What a record says against itself is damage by name, though its checksum is right; anything else comes back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from attacks.kit import compact, seal

from layerwise_dist.commit import records
from layerwise_dist.commit.records import Branch, Manifest, ParentRef, ShardRecord, Span, decode, encode
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import strict_json
from layerwise_dist.storage.filenames import AttemptId, shard_file

pytestmark = pytest.mark.quick

ATTEMPT, PARENT, BASE = AttemptId(2, 9, 40).text, AttemptId(2, 8, 30).text, AttemptId(1, 3, 10).text


def manifest(**changed: Any) -> Manifest:
    """Of two ranks on two nodes; both refer to a base, and it descends from an older branch."""
    base = {"attempt": BASE, "nbytes": 8192, "header_bytes": 4096, "header_hash": "0" * 16}
    shards = [
        ShardRecord.model_validate(
            {"rank": rank, "file": shard_file(rank), "nbytes": 8192, "header_bytes": 4096, "header_hash": "f" * 16,
             "base": base}
        )
        for rank in range(2)
    ]  # fmt: skip
    made = Manifest(
        identity="1" * 32, session="2" * 32, epoch=2, seq=9, attempt=ATTEMPT, parent=ParentRef(seq=8, attempt=PARENT),
        branch=7, before=[Span(first=1, last=4)], root=1, step=40, world_size=2, framework="plain", boundary="loader",
        places=[[0], [1]], tag="best", created=1.5e9, software={"torch": "2"}, bases=[BASE], shards=shards,
    )  # fmt: skip
    return made.model_copy(update=changed)


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    tree = json.loads(encode(manifest()))
    del tree["checksum"]
    change(tree)
    return seal(compact(tree))


def set_(**members: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree.update(members)


AGAINST_ITSELF: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another attempt": (set_(attempt=PARENT), f"attempt is {PARENT}, epoch and seq make it {ATTEMPT}"),
    "a parent that is itself": (set_(parent={"seq": 9, "attempt": ATTEMPT}), "seq 9 continues seq 9"),
    "ancestors that came later": (set_(before=[{"first": 3, "last": 9}]), "seq 9 descends from later ones"),
    "a root that came later": (set_(root=10), "its root 10 is above its seq 9"),
    "a branch before its root": (set_(root=8), "root 8, branch 7 and seq 9 are out of order"),
    "a branch after itself": (set_(branch=10), "root 1, branch 10 and seq 9 are out of order"),
    "an empty tag": (set_(tag=""), "the tag is not one of 1 to 255 printable characters"),
    "a tag of two lines": (set_(tag="a\nb"), "the tag is not one of 1 to 255 printable characters"),
    "a shard too few": (lambda tree: tree["shards"].pop(), "it does not list one shard for each of 2 ranks"),
    "a shard twice": (lambda tree: tree["shards"].reverse(), "it does not list one shard for each of 2 ranks"),
    "a base that no shard refers to": (set_(bases=[BASE, PARENT]), "it lists other bases than its shards refer to"),
    "a rank on two nodes": (set_(places=[[0, 1], [1]]), "places do not have each of 2 ranks once"),
    "a rank in the place of another": (set_(places=[[0], [0]]), "places do not have each of 2 ranks once"),
    "a node without ranks": (set_(places=[[0, 1], []]), "places do not have each of 2 ranks once"),
    "a span that runs back": (set_(before=[{"first": 4, "last": 3}]), "begins at 4 and ends at 3"),
    "a base of no session": (
        lambda tree: (tree["shards"][1]["base"].update(attempt="0" * 16), tree.update(bases=["0" * 16, BASE])),
        "0000000000000000 is not an attempt of any session",
    ),
    "an endless text": (set_(framework="x" * (2 << 20)), "bytes, with strings longer than any record has"),
}


@pytest.mark.parametrize("what", AGAINST_ITSELF)
def test_what_a_manifest_says_against_itself_is_damage_by_name(what: str) -> None:
    change, says = AGAINST_ITSELF[what]
    with pytest.raises(DamageError, match="^manifest.json: not a record of this version: ") as raised:
        decode(changed(change), Manifest, "manifest.json")
    assert says in str(raised.value)


def test_what_says_nothing_against_itself_comes_back_as_it_was_in_any_letters() -> None:
    assert decode(changed(lambda tree: None), Manifest, "manifest.json") == manifest()
    named = manifest(tag="größte Genauigkeit", framework="ünïcode")
    assert encode(named).isascii() and decode(encode(named), Manifest, "manifest.json") == named
    branch = Branch(identity="1" * 32, session="2" * 32, seq=9, parent=None, before=[], root=0)
    assert decode(encode(branch), Branch, "branch.json") == branch


def test_a_branch_record_that_goes_on_from_itself_is_damage() -> None:
    branch = Branch(
        identity="1" * 32, session="2" * 32, seq=9, parent=ParentRef(seq=9, attempt=ATTEMPT), before=[], root=0
    )  # fmt: skip
    with pytest.raises(DamageError, match="branch.json: .*seq 9 continues seq 9"):
        decode(encode(branch), Branch, "branch.json")


def test_a_record_whose_values_would_take_too_much_memory_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    data = changed(lambda tree: None)
    monkeypatch.setattr(strict_json, "WEIGHT_CAP", 1 << 10)
    with pytest.raises(DamageError, match="its values would take about"):
        decode(data, Manifest, "manifest.json")


@pytest.mark.parametrize("step", [1, 2, 7, 64, 4096])
def test_what_a_text_weighs_does_not_depend_on_where_it_is_cut(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(step)
    names = ["a" * length for length in (0, 1, 30, 3000)]
    tree = [{draw.choice(names): ['x"[{,' * draw.randrange(9), "\\" * draw.randrange(4), 5]} for _ in range(40)]
    bare = [{"": ["", "", 5]} for _ in tree]
    expected = strict_json._weight(compact(bare).encode())
    monkeypatch.setattr(strict_json, "_CHUNK", step)
    assert strict_json._weight_outside_strings(compact(tree).encode()) == expected


def test_mutation_members_that_nobody_compares_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_contradiction", lambda manifest: None)
    assert decode(changed(set_(root=8)), Manifest, "manifest.json").root == 8
