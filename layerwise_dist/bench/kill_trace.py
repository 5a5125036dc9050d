# SPDX-License-Identifier: Apache-2.0
"""When the job of `bench goodput` is killed: a Poisson process of a given mean distance, or a file of moments.

A file has one moment a line, in seconds since the job's first step, in ascending order; what follows a # is a comment.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

from layerwise_dist.units import parse_seconds

_POISSON = "poisson:"
_MOST = 10_000  # lines of a file


@dataclass(frozen=True, slots=True)
class KillTrace:
    """Moments in seconds since the first step, ascending, all of them within the `seconds` that the job is watched.
    `mtbf_s`: the mean distance of the process that made them, or theirs.
    """

    moments: tuple[float, ...]
    seconds: float
    mtbf_s: float


def parse(text: str, *, seconds: float, scale: float = 1.0, seed: int = 0) -> KillTrace:
    """``poisson:30s``, drawn with `seed`; or the path of a file, whose moments are multiplied by `scale`. Those from
    `seconds` on are left out.

    Raises ValueError, where nothing is left too, and OSError for a file that can't be read.
    """
    if text.startswith(_POISSON):
        mtbf_s = parse_seconds(text.removeprefix(_POISSON))
        moments = tuple(_poisson(mtbf_s, seconds, random.Random(seed)))
    else:
        moments = tuple(moment for each in _read(Path(text)) if (moment := scale * each) < seconds)
        mtbf_s = seconds / max(1, len(moments))
    if not moments:
        raise ValueError(f"--trace {text!r}: no kill within {seconds:g} s, so there is nothing to measure")
    return KillTrace(moments, seconds, mtbf_s)


def _poisson(mtbf_s: float, seconds: float, generator: random.Random) -> list[float]:
    moments = []
    moment = generator.expovariate(1 / mtbf_s)
    while moment < seconds:
        moments.append(moment)
        moment += generator.expovariate(1 / mtbf_s)
    return moments


def _read(path: Path) -> list[float]:
    moments: list[float] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        word = line.partition("#")[0].strip()
        if not word:
            continue
        try:
            moment = float(word)
        except ValueError:
            moment = math.nan
        if not 0 <= moment < math.inf or (moments and moment < moments[-1]):
            before = f" after {moments[-1]:g}" if moments else ""
            raise ValueError(f"{path}, line {number}: {word[:40]!r}{before} is not a time in seconds, ascending from 0")
        moments.append(moment)
        if len(moments) > _MOST:
            raise ValueError(f"{path}: more than {_MOST} moments")
    return moments
