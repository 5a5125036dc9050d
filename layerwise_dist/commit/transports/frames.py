"""What goes over a connection: frames, each a length of four bytes and a JSON array of messages."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable

from layerwise_dist.commit.transports import Message

_LENGTH = struct.Struct("!I")
_MOST_IN_FRAME = 256 << 20


def encode(messages: Iterable[Message]) -> bytes:
    return framed(json.dumps(list(messages), separators=(",", ":")).encode())


def framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> list[Message]:
    return json.loads(body)


def take_frames(received: bytearray) -> list[bytes]:
    """The bodies of the whole frames in it, which are removed from it. Raises ValueError for what is no frame."""
    found, place = [], 0
    while len(received) - place >= _LENGTH.size:
        (size,) = _LENGTH.unpack_from(received, place)
        if size > _MOST_IN_FRAME:
            raise ValueError(f"a frame of {size} bytes")
        if len(received) - place - _LENGTH.size < size:
            break
        found.append(bytes(memoryview(received)[place + _LENGTH.size : place + _LENGTH.size + size]))
        place += _LENGTH.size + size
    if place:
        del received[:place]
    return found
