# SPDX-License-Identifier: Apache-2.0
"""docs/tables/messages.md and docs/rooms/monitor.md name every kind of message and its sender, as the types do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from layerwise_dist.commit import messages as between_ranks
from layerwise_dist.monitor import messages as with_monitor

pytestmark = pytest.mark.quick

DOCS = Path(__file__).parent.parent / "docs"


def pages() -> str:
    return "".join((DOCS / page).read_text() for page in ("tables/messages.md", "rooms/monitor.md"))


def stated(section: str, text: str) -> set[tuple[str, str]]:
    """(kind, sender) of each message in the table of that section. Where a row has as many senders as kinds, each kind
    has its own; else all kinds have the one, or the one kind has all.
    """
    within = text.split(f"\n{section}", 1)[1].split("\n## ", 1)[0]
    found = set()
    for kinds, senders in re.findall(r"^\| ((?:`[a-z ]+`(?:, )?)+) \| ([a-z0-9 ,]+) \| .* \|$", within, re.MULTILINE):
        named, who = re.findall(r"`([a-z ]+)`", kinds), senders.split(", ")
        if len(named) == len(who):
            found |= set(zip(named, who, strict=True))
        else:
            assert len(named) == 1 or len(who) == 1, f"who sends which of {kinds}?"
            found |= {(kind, sender) for kind in named for sender in who}
    return found


def kinds(*messages: Any) -> set[str]:
    """What `t` may be in these types, or unions of types."""
    found: set[str] = set()
    for message in messages:
        if members := get_args(message):
            found |= kinds(*members)
        else:
            found |= set(get_args(get_type_hints(message)["t"]))
    return found


def between_ranks_differ(text: str) -> set[Any]:
    said = stated("## Messages", text)
    to_ranks = {kind for kind, sender in said if sender == "rank 0"}
    to_coordinator = {kind for kind, sender in said if sender in ("ranks", "keepers", "monitors")}
    by_transport = {kind for kind, sender in said if sender == "transport"}
    assert {sender for _, sender in said} == {"rank 0", "ranks", "keepers", "monitors", "transport"}
    return (
        (to_ranks ^ kinds(between_ranks.ToRanks))
        | (to_coordinator ^ (kinds(between_ranks.ToCoordinator) - {"gone"}))
        | (by_transport ^ (kinds(between_ranks.Cut) | {"gone"}))
    )


def with_monitor_differ(text: str) -> set[Any]:
    said = stated("## The wire", text)
    assert {sender for _, sender in said} == {"training", "monitor"}
    of_training = {kind for kind, sender in said if sender == "training"}
    of_monitor = {kind for kind, sender in said if sender == "monitor"}
    return (of_training ^ kinds(with_monitor.ToMonitor)) | (of_monitor ^ kinds(with_monitor.ToTraining))


def test_the_tables_of_messages_are_those_of_their_types() -> None:
    text = pages()
    assert not between_ranks_differ(text)
    assert not with_monitor_differ(text)


@pytest.mark.parametrize(
    ("row", "instead", "found"),
    [
        ("| `unneeded` | rank 0 |", "| `unneeded` | ranks |", {"unneeded"}),
        ("| `grant`, `stop` | rank 0 |", "| `grant` | rank 0 |", {"stop"}),
        ("| `log`, `bye` | monitor |", "| `log`, `bye`, `wave` | monitor |", {"wave"}),
        ("| `answer` | monitor |", "| `answer` | training |", {"answer"}),
    ],
)
def test_a_row_that_is_missing_or_says_another_sender_is_found(row: str, instead: str, found: set[str]) -> None:
    text = pages()
    assert text.count(row) == 1
    changed = text.replace(row, instead)
    assert between_ranks_differ(changed) | with_monitor_differ(changed) == found
