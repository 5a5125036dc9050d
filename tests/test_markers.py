# SPDX-License-Identifier: Apache-2.0
"""What is marked `quick` starts no job, and what starts one is marked so without anybody's doing."""

from __future__ import annotations

import pytest
from conftest import STARTERS, mark_jobs

pytestmark = pytest.mark.quick


def test_no_quick_test_starts_a_job(request: pytest.FixtureRequest) -> None:
    """Of all tests that were collected."""
    quick = [item for item in request.session.items if item.get_closest_marker("quick") is not None]
    assert [item.nodeid for item in quick if item.get_closest_marker("jobs") is not None] == []
    assert [item.nodeid for item in quick if STARTERS.intersection(getattr(item, "fixturenames", ()))] == []


@pytest.mark.parametrize("fixture", sorted(STARTERS))
def test_a_test_that_starts_ranks_is_a_job(request: pytest.FixtureRequest, fixture: str) -> None:
    def starts() -> None:
        pass

    item = pytest.Function.from_parent(request.node.parent, name="starts", callobj=starts)
    item.fixturenames[:] = [fixture]
    mark_jobs([item])
    assert item.get_closest_marker("jobs") is not None
