# SPDX-License-Identifier: Apache-2.0
"""Which dtypes hold all values of another, by safetensors code."""

from __future__ import annotations

# Bits of the exponent and of the fraction.
_FLOATS = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7), "F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}


def is_float(code: str) -> bool:
    return code in _FLOATS


def exact(source: str, target: str) -> bool:
    """Whether the target holds every value of the source."""
    if source == target:
        return True
    if source not in _FLOATS or target not in _FLOATS:
        return False
    return all(wide >= narrow for wide, narrow in zip(_FLOATS[target], _FLOATS[source], strict=True))


def possible(source: str, target: str) -> bool:
    """Whether one can be made of the other at all, be it by rounding."""
    return source == target or (source in _FLOATS and target in _FLOATS)
