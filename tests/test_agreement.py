# SPDX-License-Identifier: Apache-2.0
"""What one rank meets while all restore is raised on all of them, whatever it is."""

from __future__ import annotations

from typing import Any

import pytest
from kit.crash import try_ranks

from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.errors import CommitError, DamageError, MismatchError, StateError

pytestmark = pytest.mark.quick


def outcomes(errors: dict[int, BaseException], *, world: int = 3) -> list[Any]:
    """What `together` gives on each rank, or raises, if these ranks raise these."""

    def body(transport: LocalTransport) -> Any:
        participant = Participant(transport, timeout_s=20, coordinator=None)

        def action() -> int:
            if transport.rank in errors:
                raise errors[transport.rank]
            return transport.rank

        try:
            return together(participant, "look", action)
        finally:
            participant.close(5)

    return [thread.error or thread.value for thread in try_ranks(body, world=world, timeout_s=60)]


@pytest.mark.parametrize(
    "error",
    [KeyError("boundary"), RecursionError("too deep"), MemoryError(), AttributeError("x\x1b[31m"), ZeroDivisionError()],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_of_a_rank_is_raised_on_all(error: Exception) -> None:
    found = outcomes({1: error})
    assert [type(each) for each in found] == [CommitError] * 3
    assert all(type(error).__name__ in str(each) and "rank 1" in str(each) for each in found)
    assert all(str(each).isprintable() for each in found)
    assert found[1].__cause__ is error


def test_named_errors_keep_their_names() -> None:
    assert [type(each) for each in outcomes({0: MismatchError("a"), 2: DamageError("b")})] == [MismatchError] * 3
    assert [type(each) for each in outcomes({2: OSError(5, "gone", "/f")})] == [OSError] * 3
    for each in outcomes({1: StateError("state['\x1b']", "no")}):
        assert type(each) is StateError and str(each).count("state[") == 1


def test_damage_of_a_rank_makes_all_go_on() -> None:
    assert outcomes({1: DamageError("b")}) == [(False, 0), (False, None), (False, 2)]
