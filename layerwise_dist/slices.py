"""The shared vocabulary of files: which part of which global tensor a shard holds. Pure data, no torch.

`pieces.py` binds a slice to the live tensor that holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Bytes of one element by its code in the safetensors format, version 0.4 and later.
ITEM_BYTES: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slice:
    """One contiguous part of one global tensor.

    Either a box (`offsets` and `lengths`, one number a dimension, in elements) or a flat range of the global tensor
    in row-major order (`start` and `length`, in elements); the other pair is None.
    `kind` is ``param``, ``buffer`` or the optimizer's name of the state, such as ``exp_avg``.
    """

    kind: str
    fqn: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    start: int | None = None
    length: int | None = None

    @staticmethod
    def whole(kind: str, fqn: str, dtype: str, shape: tuple[int, ...]) -> Slice:
        return Slice(kind, fqn, dtype, shape, offsets=(0,) * len(shape), lengths=shape)

    @property
    def name(self) -> str:
        """The tensor's name in the shard file: ``<kind>/<fqn>``."""
        return f"{self.kind}/{self.fqn}"

    @property
    def is_flat(self) -> bool:
        return self.start is not None

    @property
    def is_whole(self) -> bool:
        return not self.is_flat and self.lengths == self.global_shape

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part, as the file has it: the box's lengths, or one dimension for a flat range."""
        return (self.length,) if self.is_flat else self.lengths  # type: ignore[return-value]

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    def place(self) -> str:
        """Where the part lies in its global tensor, for messages."""
        if self.is_flat:
            return f"elements {self.start} to {self.start + self.length} of shape {list(self.global_shape)}"
        return f"offsets {list(self.offsets)}, lengths {list(self.lengths)} of shape {list(self.global_shape)}"
