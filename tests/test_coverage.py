# SPDX-License-Identifier: Apache-2.0
"""The tables of tests/coverage.sh count what gcovr and coverage.py say, and list what is left."""

from __future__ import annotations

from typing import Any

import pytest
from coverage_table import of_csrc, of_python, ranges, share, tables

pytestmark = pytest.mark.quick

PYTHON = {
    "files": {
        "layerwise_dist/commit/one.py": {
            "summary": {"num_statements": 9, "covered_lines": 6, "num_branches": 4, "covered_branches": 3},
            "missing_lines": [4, 5, 8],
        },
        "layerwise_dist/commit/two.py": {
            "summary": {"num_statements": 1, "covered_lines": 1, "num_branches": 0, "covered_branches": 0},
            "missing_lines": [],
        },
    }
}


def lines(*counts: tuple[int, int, list[int]]) -> list[dict[str, Any]]:
    return [
        {"line_number": number, "count": count, "branches": [{"count": each} for each in branches]}
        for number, count, branches in counts
    ]


def test_a_line_of_two_functions_is_one_line_and_is_run_if_one_of_them_is() -> None:
    told = {"files": [{"file": "csrc/src/one.cc", "lines": lines((1, 0, [0, 2]), (1, 3, [1, 0]), (2, 0, []))}]}
    ((path, counts),) = of_csrc(told)
    assert (path, counts.lines, counts.lines_run, counts.left) == ("csrc/src/one.cc", 2, 1, [2])
    assert (counts.branches, counts.branches_run) == (2, 2)


def test_rooms_are_summed_up_and_what_is_left_is_listed() -> None:
    table, left = tables(of_python(PYTHON))
    assert table.splitlines()[2:] == ["| layerwise_dist/commit | 7 of 10 | 70.0 % | 3 of 4 | 75.0 % |"]
    assert left == "- `layerwise_dist/commit/one.py`: 3 lines, 1 branches: 4-5, 8"


def test_shares_are_never_rounded_up_and_neighbors_are_ranges() -> None:
    assert (share(9999, 10000), share(1, 1), share(0, 0)) == ("99.9 %", "100.0 %", "-")
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
