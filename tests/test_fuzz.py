# SPDX-License-Identifier: Apache-2.0
"""The readers of files under a coverage-guided fuzzer (tests/fuzz): nothing but a DamageError comes out of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "fuzz"
SECONDS, LONG_SECONDS = 2, 600  # a target


def test_no_reader_raises_anything_but_a_damage_error(long: bool) -> None:
    seconds = LONG_SECONDS if long else SECONDS
    command = [sys.executable, str(HERE / "fuzz.py"), "--seconds", str(seconds), "--seed", "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=5 * seconds + 100)
    assert found.returncode == 0, found.stdout + found.stderr
    reached = re.findall(r"(\d+) inputs, \d+ steps from line to line at first, (\d+) at the end", found.stdout)
    assert len(reached) == 5 and all(int(inputs) > 50 and int(steps) > 20 for inputs, steps in reached), found.stdout


def test_what_guides_the_fuzzer_is_there() -> None:
    from fuzz.targets import TARGETS

    package = Path(__file__).parents[1] / "layerwise_dist"
    assert not [each for target in TARGETS.values() for each in target.watched if not (package / each).is_file()]


def test_mutation_a_reader_that_trusts_a_table_is_found_by_the_fuzzer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    from fuzz.engine import Fuzzer
    from fuzz.targets import TARGETS

    from layerwise_dist.storage import header

    monkeypatch.setattr(header, "_check_tensor", lambda name, item: None)
    fuzzer = Fuzzer(TARGETS["header"], HERE / "corpus" / "header", seed=1)
    fuzzer.load()
    fuzzer.run(20)
    assert fuzzer.crashes
