# SPDX-License-Identifier: Apache-2.0
"""The tables of `bash tests/coverage.sh`, out of what gcovr and coverage.py counted.

python tests/coverage_table.py FOLDER      of csrc.json and, where there is one, python.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Counts:
    """Of a file or of a room. `left`: lines that nothing ran."""

    lines: int = 0
    lines_run: int = 0
    branches: int = 0
    branches_run: int = 0
    left: list[int] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.lines += other.lines
        self.lines_run += other.lines_run
        self.branches += other.branches
        self.branches_run += other.branches_run

    def row(self, name: str) -> str:
        return (
            f"| {name} | {self.lines_run} of {self.lines} | {share(self.lines_run, self.lines)} | "
            f"{self.branches_run} of {self.branches} | {share(self.branches_run, self.branches)} |"
        )


def share(part: int, whole: int) -> str:
    """Never rounded up to what it is not."""
    return f"{int(1000 * part / whole) / 10} %" if whole else "-"


def of_python(told: dict[str, Any]) -> Iterator[tuple[str, Counts]]:
    """What `coverage json` says, by file."""
    for path, file in told["files"].items():
        of = file["summary"]
        lines = of["num_statements"], of["covered_lines"]
        yield path, Counts(*lines, of["num_branches"], of["covered_branches"], file["missing_lines"])


def of_csrc(told: dict[str, Any]) -> Iterator[tuple[str, Counts]]:
    """What `gcovr --json` says, by file."""
    for file in told["files"]:
        # A line of a template or of a header is there once for each function that it is part of.
        runs: dict[int, int] = {}
        branches: dict[tuple[int, int], int] = {}
        for line in file["lines"]:
            if line.get("gcovr/noncode"):
                continue
            number = line["line_number"]
            runs[number] = max(runs.get(number, 0), line["count"])
            for place, branch in enumerate(line["branches"]):
                branches[number, place] = max(branches.get((number, place), 0), branch["count"])
        left = sorted(number for number, count in runs.items() if not count)
        taken = sum(count > 0 for count in branches.values())
        yield file["file"], Counts(len(runs), len(runs) - len(left), len(branches), taken, left)


def room(path: str) -> str:
    """The folder that a file belongs to: one of the package's rooms, or one of csrc's."""
    parts = Path(path).parts
    return "/".join(parts[: 2 if len(parts) > 2 else 1])


def tables(files: Iterable[tuple[str, Counts]]) -> tuple[str, str]:
    """By room, and of each file what is left, the worst first."""
    rooms: dict[str, Counts] = {}
    rows: list[tuple[int, str]] = []
    for path, counts in files:
        rooms.setdefault(room(path), Counts()).add(counts)
        lacking = counts.branches - counts.branches_run
        if counts.left or lacking:
            text = f"- `{path}`: {len(counts.left)} lines, {lacking} branches"
            rows.append((len(counts.left), text + (f": {ranges(counts.left)}" if counts.left else "")))
    head = "| room | lines | | branches | |\n|---|---|---|---|---|\n"
    body = "\n".join(counts.row(name) for name, counts in sorted(rooms.items()))
    return head + body, "\n".join(text for _, text in sorted(rows, key=lambda row: (-row[0], row[1])))


def ranges(numbers: list[int]) -> str:
    """1-3, 7 for 1, 2, 3, 7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in found)


def main() -> None:
    folder = Path(sys.argv[1])
    files = list(of_csrc(json.loads((folder / "csrc.json").read_text())))
    if (folder / "python.json").exists():
        files += of_python(json.loads((folder / "python.json").read_text()))
    table, left = tables(files)
    (folder / "table.md").write_text(f"{table}\n\n## What is left\n\n{left}\n")
    print(f"{table}\n\nwhat is left, file by file: {folder / 'table.md'}")


if __name__ == "__main__":
    main()
