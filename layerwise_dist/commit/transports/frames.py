# SPDX-License-Identifier: Apache-2.0
"""What goes over a connection: frames, each a length of four bytes and a JSON array of messages; over the network, and
its MAC.
"""

from __future__ import annotations

import hmac
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from layerwise_dist.commit.transports.proof import MAC_BYTES, Seals

OnFrame = Callable[[int, bytes], None]  # of a connection's key, and the frame's body
OnEnd = Callable[[int, str], None]  # of a connection's key, and why nothing more comes

_LENGTH = struct.Struct("!I")
LENGTH_BYTES = _LENGTH.size
_MOST_IN_FRAME = 256 << 20


def encode(messages: Iterable[Mapping[str, object]]) -> bytes:
    return framed(json.dumps(list(messages), separators=(",", ":")).encode())


def framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Any:
    """A list of messages; all that is known of each is its kind. Raises ValueError for what is no such array."""
    messages = json.loads(body)
    if not isinstance(messages, list):
        raise ValueError(f"a frame that holds a {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("t"), str):
            raise ValueError("an object without a kind")
    return messages


def take_frames(received: bytearray, seals: Seals | None = None) -> Iterator[bytes]:
    """The bodies of the whole frames in it, which are removed from it. With `seals` each is followed by its MAC.

    Raises ValueError for what is no frame, or none that the other end sent next.
    """
    place, after = 0, MAC_BYTES if seals is not None else 0
    try:
        while len(received) - place >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(received, place)
            if size > _MOST_IN_FRAME:
                raise ValueError(f"a frame of {size} bytes")
            begin, end = place + _LENGTH.size, place + _LENGTH.size + size
            if len(received) < end + after:
                break
            with memoryview(received) as whole:
                body, mac = bytes(whole[begin:end]), bytes(whole[end : end + after])
            place = end + after
            if seals is not None and not hmac.compare_digest(mac, seals.next(body)):
                raise ValueError("a frame whose MAC is not that of the other rank")
            yield body
    finally:
        del received[:place]
