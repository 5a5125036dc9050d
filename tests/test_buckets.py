# SPDX-License-Identifier: Apache-2.0
"""With three ranks the order of addition depends on DDP's bucket layout, which a new DDP does not have yet."""

from __future__ import annotations

import pytest
from kit.runners import Warm


@pytest.mark.parametrize(("mode", "exact"), [("take_up", True), ("leave", False)])
def test_a_new_ddp_adds_in_the_order_of_the_one_it_replaces_only_if_it_takes_up_its_buckets(
    warm: Warm, mode: str, exact: bool
) -> None:
    (differing,) = warm.run("buckets.py", 3, mode, timeout=90).lines("differing ")
    assert (int(differing) == 0) == exact
