# SPDX-License-Identifier: Apache-2.0
"""Byte counts and times as text, and back. Units are decimal, as disks are sold (1 kB is 1000 bytes), unless said."""

from __future__ import annotations

import re

_FACTOR = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\Z", re.IGNORECASE)
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)?\Z")


def size(nbytes: float, *, binary: bool = False) -> str:
    """Three digits: ``120 MB``; with `binary`, ``512 KiB``."""
    base, units = (1024, ("B", "KiB", "MiB", "GiB", "TiB")) if binary else (1000, ("B", "kB", "MB", "GB", "TB"))
    for unit in units:
        if nbytes < base or unit == units[-1]:
            return f"{nbytes:.0f} {unit}" if nbytes >= 100 or unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= base
    raise AssertionError("unreachable")


def parse_count(text: str) -> int:
    """``7B``, ``98M``, ``1000``: of things, where B is a billion. Raises ValueError."""
    text = text.strip()
    return parse_number(text[:-1] + "G" if text[-1:] in "Bb" and text[-2:-1].isdigit() else text)


def parse_number(text: str) -> int:
    """``1.2G``, ``98M``, ``512MiB``, ``1000``. Raises ValueError."""
    match = _NUMBER.match(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a number such as 1.2G, 512M or 100MiB")
    factor = _FACTOR[match[2].lower()]
    if match[3]:
        factor = 1024 ** list(_FACTOR).index(match[2].lower())
    return round(float(match[1]) * factor)


def parse_seconds(text: str) -> float:
    """``3``, ``250ms``, ``90min``, ``3h``, ``2d`` in seconds. Raises ValueError, for 0 too."""
    match = _DURATION.match(text.strip())
    value = float(match[1]) * _SECONDS[match[2] or ""] if match is not None else 0.0
    if not value > 0:
        raise ValueError(f"{text!r} is not a time above 0 such as 3, 250ms, 90min, 3h or 2d")
    return value
