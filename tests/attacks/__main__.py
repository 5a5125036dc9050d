"""python tests/attacks [--only WORDS] [THEME...]: tries them, and prints the figures and each problem."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attacks import run  # noqa: E402


def main() -> int:
    args, only = sys.argv[1:], ""
    if "--only" in args:
        at = args.index("--only")
        only = args[at + 1]
        del args[at : at + 2]
    with tempfile.TemporaryDirectory() as folder:
        figures = run.run(Path(folder), args or None, only)
    for line in figures.problems:
        print(line)
    print(figures)
    return 1 if figures.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
