# SPDX-License-Identifier: Apache-2.0
"""Values of typed JSON that are read one after another, and whose texts are mostly one and the same: those of the ranks
of a job, which differ in the bytes of their random numbers alone.
"""

from __future__ import annotations

import json
from typing import Any

from layerwise_dist.errors import DamageError
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.typed_json_types import TAG


class Alike:
    """Reads as `typed_json.loads` does. Members of an object that have no bytes in the blob are made once for one text,
    and are the same objects in all values that come of it: nobody may change them.
    """

    def __init__(self) -> None:
        self._text: bytes | None = None
        self._made: dict[str, Any] = {}  # all members, in their order
        self._with_bytes = b""  # those that have some, as a text of its own

    def loads(self, text: bytes | memoryview, blob: bytes | memoryview, *, where: str = "") -> Any:
        """Raises DamageError for anything malformed."""
        text = bytes(text)
        if text == self._text:
            return {**self._made, **typed_json.loads(self._with_bytes, blob, where=where)}
        value = typed_json.loads(text, blob, where=where)
        self._text = None
        if type(value) is dict and TAG not in (tree := json.loads(text)):
            with_bytes = {}
            for name, node in tree.items():
                try:
                    typed_json.loads(json.dumps(node).encode(), b"")
                except DamageError:
                    with_bytes[name] = node
            self._text, self._made, self._with_bytes = text, dict(value), json.dumps(with_bytes).encode()
        return value
