# SPDX-License-Identifier: Apache-2.0
"""What every rank of a checkpoint sealed, from the rank that read it to all others: each value once that is the same on
many of them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.storage import strict_json, typed_json
from layerwise_dist.tensors.values import alike

_KEPT = 4  # different values of one member that a further one is compared with
_LENGTH = struct.Struct("<Q")


def pack(sections: Iterable[bytes]) -> bytes:
    """Several texts in one. `unpack` has them again."""
    return b"".join(part for section in sections for part in (_LENGTH.pack(len(section)), section))


def unpack(data: bytes) -> list[memoryview]:
    """Raises ValueError for what `pack` did not make."""
    found, place, whole = [], 0, memoryview(data)
    while place < len(data):
        if place + _LENGTH.size > len(data):
            raise ValueError(f"it ends at {len(data)}, within a length")
        (size,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        if size > len(data) - place:
            raise ValueError(f"a section of {size} bytes at {place}, of {len(data)} in all")
        found.append(whole[place : place + size])
        place += size
    return found


class States:
    """Sealed states by rank. Equal members are one object, so that many states take little more than one."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._recent: dict[tuple[str, ...], list[int]] = {}  # of each member, by its path
        self._of: dict[int, list[tuple[tuple[str, ...], int]]] = {}

    def add(self, rank: int, sealed: SealedState) -> None:
        self._of[rank] = [(path, self._number(path, value)) for path, value in _members(sealed)]

    def _number(self, path: tuple[str, ...], value: Any) -> int:
        recent = self._recent.setdefault(path, [])
        for number in recent:
            if alike(self._values[number], value):
                return number
        self._values.append(value)
        recent.insert(0, len(self._values) - 1)
        del recent[_KEPT:]
        return len(self._values) - 1

    def sealed(self) -> dict[int, SealedState]:
        """By rank, as `decode` has them."""
        values = self._values
        return {rank: _joined((path, values[at]) for path, at in members) for rank, members in self._of.items()}

    def encode(self) -> bytes:
        paths = list(dict.fromkeys(path for members in self._of.values() for path, _ in members))
        number = {path: at for at, path in enumerate(paths)}
        of = [[rank, [[number[path], value] for path, value in members]] for rank, members in self._of.items()]
        parts = [json.dumps([paths, of]).encode()]
        for value in self._values:
            parts += typed_json.dumps([value])
        return pack(parts)


def decode(message: bytes) -> dict[int, SealedState]:
    """Of `States.encode()`, by rank. Raises ValueError or DamageError for what is none."""
    index, *rest = unpack(message)
    paths, of = strict_json.loads(bytes(index))
    values = [typed_json.loads(rest[at], rest[at + 1])[0] for at in range(0, len(rest), 2)]
    return {rank: _joined((paths[path], values[value]) for path, value in members) for rank, members in of}


def _joined(members: Iterable[tuple[Sequence[str], Any]]) -> SealedState:
    """Of members by their paths."""
    state: dict[str, Any] = {}
    for (first, *second), value in members:
        if second:
            state.setdefault(first, {})[second[0]] = value
        else:
            state[first] = value
    return cast(SealedState, state)


def _members(sealed: SealedState) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Members of members by themselves: of what is not the same on all ranks, most is."""
    for name, value in cast(Mapping[str, Any], sealed).items():
        if type(value) is dict and value and all(type(key) is str for key in value):
            yield from (((name, key), each) for key, each in value.items())
        else:
            yield (name,), value
