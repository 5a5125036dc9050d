# SPDX-License-Identifier: Apache-2.0
"""python tests/attacks [--only WORDS] [THEME...]: tries them, and prints the figures and each problem."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attacks import THEMES, run  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/attacks", description="Crafted directories: tries them all.")
    parser.add_argument("themes", nargs="*", metavar="THEME", help=f"of {', '.join(THEMES)}; all by default")
    parser.add_argument("--only", default="", metavar="WORDS", help="those whose names have these words")
    asked = parser.parse_args()
    if unknown := [theme for theme in asked.themes if theme not in THEMES]:
        parser.error(f"no theme {unknown[0]!r}; there are {', '.join(THEMES)}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = [run.Worker(Path(folder) / f"worker_{number}") for number in range(2)]
        for worker in workers:
            stack.callback(worker.close)
        figures = run.run(workers, asked.themes or None, asked.only)
    for line in figures.problems:
        print(line)
    print(figures)
    return 1 if figures.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
