# SPDX-License-Identifier: Apache-2.0
"""Makes docs/tables/restore-matrix.md: a checkpoint of every wrapper and number of ranks, restored into every other.

    .venv/bin/python tests/matrix.py --out docs/tables/restore-matrix.md

takes some 20 minutes on two cores. Parts of it:

    --only fsdp2:4 --only zero3:2   only these layouts, as sources and as targets
    --pair fsdp2:4>zero3:2          only this pair; may be there several times
    --case sgd-trained              only this case; by default adamw-numbers and sgd-trained
    --all-cases                     adamw-trained and sgd-numbers as well
    --part precisions               bf16, fp16 and fp32 among each other; or "wrappers", the matrix in fp32
    --keep FOLDER                   leaves the checkpoints and the jobs' logs there

A line for each source that was written, for each target that is through, and for each pair that failed. Without --out
the table goes to standard output. Exit code 1 if a pair failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from kit.matrix import (
    CASES,
    GOOD,
    LAYOUTS,
    MORE_CASES,
    PRECISE,
    PRECISIONS,
    ROUNDED,
    Launcher,
    Layout,
    restore_all,
    table,
)
from kit.runners import DEEPSPEED, Warm

HEAD = Path(__file__).parent / "restore_matrix_head.md"
PRECISIONS_HEAD = HEAD.with_name("restore_matrix_precisions.md")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", action="append", type=Layout.of, metavar="WRAPPER:RANKS")
    parser.add_argument("--pair", action="append", metavar="SOURCE>TARGET")
    parser.add_argument("--case", action="append", choices=CASES + MORE_CASES)
    parser.add_argument("--all-cases", action="store_true")
    parser.add_argument("--part", choices=("wrappers", "precisions"))
    parser.add_argument("--lanes", type=int, default=2, help="jobs at a time (default: 2)")
    parser.add_argument("--keep", type=Path)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    layouts = given.only or LAYOUTS
    pairs = [(source, target) for target in layouts for source in layouts] * (given.part != "precisions")
    if given.part == "precisions" or not (given.part or given.only):
        pairs += PRECISIONS
    if given.pair:
        pairs = [(Layout.of(source), Layout.of(target)) for source, _, target in (p.partition(">") for p in given.pair)]
    cases = given.case or CASES + MORE_CASES * given.all_cases
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with closing(Warm(folder)) as torch, closing(zero_server(folder)) as zero:
            launcher = Launcher(torch, zero, folder)
            found = restore_all(
                launcher, pairs, cases, lanes=given.lanes, say=lambda text: print(text, file=sys.stderr, flush=True)
            )
    of_precision = {key: verdict for key, verdict in found.items() if key[0] in PRECISE or key[1] in PRECISE}
    of_wrappers = {key: verdict for key, verdict in found.items() if key not in of_precision}
    tables = [table(of_wrappers)] * bool(of_wrappers)
    tables += [PRECISIONS_HEAD.read_text().rstrip(), table(of_precision)] * bool(of_precision)
    text = "\n\n".join([HEAD.read_text().rstrip(), *tables]) + "\n"
    if given.out:
        given.out.write_text(text)
    else:
        print(text)
    failed = sum(verdict not in GOOD for verdict in found.values())
    rounded = sum(verdict == ROUNDED for verdict in found.values())
    print(
        f"{len(found) - failed} of {len(found)} restores are equal to the bit, {rounded} of them rounded as asked for",
        file=sys.stderr,
    )
    sys.exit(failed > 0)


def zero_server(folder: Path) -> Warm:
    (folder / "zero").mkdir(exist_ok=True)
    return Warm(folder / "zero", "zero_ready", env=DEEPSPEED)


if __name__ == "__main__":
    main()
