# SPDX-License-Identifier: Apache-2.0
"""JSON that lies in a file, read without trust: what it makes in memory is bounded, and nothing is taken that two
readers could take for two things.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import isfinite
from typing import Any

# What values may take in memory beyond their own characters, in bytes, as `weight` counts it.
WEIGHT_CAP = 192 << 20
# Of CPython's objects, with the place that each has in another.
_ARRAY, _OBJECT, _MEMBER, _QUOTE = 64, 232, 32, 20
_CHUNK = 1 << 20
_STRING = re.compile(rb'"[^"]*"')  # of a text without escapes
# Where a number may be read as infinite, or a string may hold half a character. Rare, since hashes in strings do not
# look so: then all is looked at.
_ODD = re.compile(rb"[:,\[\s-][0-9][0-9.]*[eE]\+?[0-9]{3}|[0-9]{300}|\\u[dD][89a-fA-F]")


def too_heavy(data: bytes | str) -> bool:
    """Whether its `weight` is over the cap. A short text need not be weighed: no character counts for more than an
    object.
    """
    return len(data) * _OBJECT > WEIGHT_CAP and weight(data) > WEIGHT_CAP


def weight(data: bytes | str) -> int:
    """About how many bytes the values of a JSON text take beside its characters; never much less than they do."""
    if isinstance(data, str):
        found = _weigh(data.count("["), data.count("{"), data.count(","), data.count('"'))
        return found if found <= WEIGHT_CAP else weight(data.encode(errors="replace"))
    found = _weight(data)
    return found if found <= WEIGHT_CAP else _weight_outside_strings(data)


def _weight(data: bytes) -> int:
    return _weigh(data.count(b"["), data.count(b"{"), data.count(b","), data.count(b'"'))


def _weight_outside_strings(data: bytes) -> int:
    """Of a text that seems to be too heavy, as one with such characters within its strings may; as far as the cap."""
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    found = at = 0
    step = _CHUNK
    while at < len(data) and found <= WEIGHT_CAP:
        chunk = data[at : at + step]
        bare = _STRING.sub(b"\0\0", chunk)  # which stand for the two quotes of each
        begun = bare.find(b'"')
        whole = at + step >= len(data)
        if begun >= 0 and not whole:  # a string that ends after the chunk is left to the next one
            chunk, bare = chunk[: len(chunk) - (len(bare) - begun)], bare[:begun]
        if not chunk:
            step *= 2
            continue
        found += _weight(bare) + _QUOTE * bare.count(b"\0")
        at += len(chunk)
        step = _CHUNK
    return found


def _weigh(arrays: int, objects: int, members: int, quotes: int) -> int:
    return _ARRAY * arrays + _OBJECT * objects + _MEMBER * members + _QUOTE * quotes


def loads(data: bytes) -> Any:
    """The value of a UTF-8 text. Raises ValueError that says what is wrong, and nothing else: for what is no JSON, a
    name that is twice in an object, a number that is infinite or none, half a character, nesting without end, and for
    what would take far more memory than the text.
    """
    if too_heavy(data):
        found, most = weight(data) >> 20, WEIGHT_CAP >> 20
        raise ValueError(f"its values would take about {found} MB of memory, at most {most} are allowed")
    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=_unrepeated, parse_constant=_no_constant)
        if _ODD.search(data):
            _look_at(tree)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    return tree


def loads_text(text: str) -> Any:
    """As `loads`, of a text that is a string within another one."""
    return loads(text.encode("utf-8", "surrogatepass"))


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise ValueError(f"an object has the same key twice: {name[:100]!r}")
            names.add(name)
    return made


def _no_constant(literal: str) -> Any:
    raise ValueError(f"{literal} is not a JSON value")


def _look_at(tree: Any) -> None:
    left = [tree]
    while left:
        value = left.pop()
        kind = type(value)
        if kind is list:
            left += value
        elif kind is dict:
            left += value.keys()
            left += value.values()
        elif kind is float and not isfinite(value):
            raise ValueError("a number is too large for any float")
        elif kind is str and not _whole(value):
            raise ValueError(f"a string has a lone surrogate: {ascii(value[:100])}")


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def most_of_one(keys: list[Any], of: Callable[[Any], int] = hash) -> int:
    """How many of these keys have one hash: each of them would be compared with all before it."""
    if len(keys) <= COLLIDING:
        return 0
    counts: dict[int, int] = {}
    most = 0
    for key in keys:
        value = of(key)
        counts[value] = found = counts.get(value, 0) + 1
        most = max(most, found)
    return most


COLLIDING = 64
