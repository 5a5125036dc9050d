# SPDX-License-Identifier: Apache-2.0
"""The shared vocabulary of files: which parts of the global tensors a shard holds. Pure data, no torch.

`pieces.py` binds a slice to the live tensor that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Bytes of one element by its code in the safetensors format, version 0.4 and later.
ITEM_BYTES: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# Of what a file holds.
DIMENSIONS = 256
LONGEST_NAME = 4096  # characters of `<kind>/<fqn>`


@dataclass(frozen=True, slots=True)
class Slice:
    """One contiguous part of one global tensor.

    Either a box (`offsets` and `lengths`, one number a dimension, in elements) or a flat range of the global tensor
    in row-major order (`start` and `length`, in elements); the other pair is None.
    `kind` is ``param``, ``buffer`` or the optimizer's name of the state, such as ``exp_avg``.

    A name alone does not make a global tensor: pipeline stages and experts have other tensors under the same names on
    other ranks. `among` are the ranks that hold this one, as `ranks_text` has them: what others wrote under the same
    name is a part of it only if it is among the same ranks. Empty: this rank holds all of it, for itself alone.
    """

    kind: str
    fqn: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    start: int | None = None
    length: int | None = None
    among: str = ""

    @staticmethod
    def whole(kind: str, fqn: str, dtype: str, shape: tuple[int, ...], among: str = "") -> Slice:
        return Slice(kind, fqn, dtype, shape, offsets=(0,) * len(shape), lengths=shape, among=among)

    @property
    def name(self) -> str:
        """The tensor's name in the shard file: ``<kind>/<fqn>``."""
        return f"{self.kind}/{self.fqn}"

    @property
    def cut(self) -> tuple[object, ...]:
        """Which part of its global tensor it is: equal for two slices of one shape that have the same elements."""
        return self.offsets, self.lengths, self.start, self.length

    @property
    def is_flat(self) -> bool:
        return self.start is not None

    @property
    def is_whole(self) -> bool:
        return not self.is_flat and self.lengths == self.global_shape

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part, as the file has it: the box's lengths, or one dimension for a flat range."""
        return (self.length,) if self.is_flat else self.lengths  # type: ignore[return-value]  # one pair is there

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    def place(self) -> str:
        """Where the part lies in its global tensor, for messages."""
        if self.start is not None and self.length is not None:
            return f"elements {self.start} to {self.start + self.length} of shape {list(self.global_shape)}"
        offsets, lengths = self.offsets or (), self.lengths or ()
        return f"offsets {list(offsets)}, lengths {list(lengths)} of shape {list(self.global_shape)}"


def ranks_text(ranks: Iterable[int]) -> str:
    """Several ranks in ascending order: ``0,1``, ``0-7``, ``0-24/8`` (every eighth); empty for one or none."""
    found = sorted(ranks)
    parts, at = [], 0
    while len(found) > 1 and at < len(found):
        end, step = at, found[at + 1] - found[at] if at + 1 < len(found) else 1
        while end + 1 < len(found) and found[end + 1] - found[end] == step:
            end += 1
        if end < at + 2:
            end = at
            parts.append(str(found[at]))
        else:
            parts.append(f"{found[at]}-{found[end]}" + (f"/{step}" if step > 1 else ""))
        at = end + 1
    return ",".join(parts)


def ranks_of(text: str, world_size: int) -> tuple[int, ...]:
    """The ranks of a `ranks_text`. Raises ValueError unless it is one, of ranks below `world_size`."""
    found: list[int] = []
    bad = ValueError(f"{text[:100]!r} is no list of ranks of a world of {world_size}")
    if len(text) > 8 * world_size:  # before it is taken apart
        raise bad
    for part in text.split(",") if text else ():
        run, _, step = part.partition("/")
        begin, _, end = run.partition("-")
        numbers = (begin, end or "0", step or "1")
        if not all(number.isascii() and number.isdecimal() and len(number) < 8 for number in numbers):
            raise bad
        first, last = int(begin), int(end or begin)
        if last >= world_size or (found and first <= found[-1]) or not int(step or 1):
            raise bad
        found += range(first, last + 1, int(step or 1))
    if ranks_text(found) != text:
        raise bad
    return tuple(found)
