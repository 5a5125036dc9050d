# SPDX-License-Identifier: Apache-2.0
"""JSON that is plain: the typed values that it is read as give the same text again, byte for byte.

So nothing that two readers could take for two things (a name twice, a number such as 1e3 or -0, an escape where none is
needed, a member more) is ever looked at.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from layerwise_dist.storage import strict_json
from layerwise_dist.tensors.slices import DIMENSIONS

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Counts = Annotated[tuple[Count, ...], Meta(max_length=DIMENSIONS)]

encode = msgspec.json.Encoder().encode

T = TypeVar("T")


class NotPlain(ValueError):
    """What is to be read by the check in `header`."""


def exactly(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """The values of a plain text. Raises NotPlain."""
    if strict_json.too_heavy(data):
        raise NotPlain
    try:
        found = decoder.decode(data)
        again = encode(found)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise NotPlain from None
    if again != data:
        raise NotPlain
    return found
