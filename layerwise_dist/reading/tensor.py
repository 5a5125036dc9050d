# SPDX-License-Identifier: Apache-2.0
"""One global tensor of an open checkpoint: nothing is read before it is indexed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType

import torch

from layerwise_dist.restore.filling import fill
from layerwise_dist.restore.planner import replan
from layerwise_dist.restore.whole import SavedTensor, read_all, surely_equal
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.slices import Slice

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class LazyTensor:
    """As safetensors' `get_slice` gives one, over all shards: ``lazy[2:5, ..., 0]`` reads these elements and no others,
    ``lazy[...]`` all. Every block of a shard that is touched is verified by its hash first.

    Attributes:
        name: `<kind>/<fqn>`.
        shape: of the global tensor.
        dtype: as the file has it.
    """

    def __init__(self, name: str, saved: SavedTensor, check: Callable[[], None]) -> None:
        """`check` comes before each read, and raises where the checkpoint is closed or ranks hold different tensors."""
        self.name, self.shape, self.dtype = name, torch.Size(saved.shape), DTYPES[saved.dtype]
        self._saved, self._check = saved, check

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """The code of the safetensors format: ``F32``, ``BF16``."""
        return self._saved.dtype

    @property
    def numel(self) -> int:
        return self._saved.numel

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return self._saved.nbytes

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.get_dtype()}{self.get_shape()})"

    def __getitem__(self, index: Index) -> torch.Tensor:
        """A new CPU tensor of these elements. Indices are integers, slices with a positive step, and one ``...``.

        Raises IndexError or TypeError for others, DamageError, OSError, ValueError once the checkpoint is closed, and
        MismatchError where ranks hold different tensors under the name.
        """
        begin, end, then = _resolve(index, tuple(self.shape))
        lengths = tuple(stop - start for start, stop in zip(begin, end, strict=True))
        return self.read_box(begin, lengths)[then]

    def read_box(self, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
        """A box of it, one number a dimension, in elements. Raises as indexing."""
        saved = self._saved.slice
        wanted = Slice(saved.kind, saved.fqn, saved.dtype, saved.global_shape, offsets=offsets, lengths=lengths)
        return self._read(wanted, lengths)

    def read_range(self, start: int, length: int) -> torch.Tensor:
        """Elements `start` to `start + length` in row-major order, as one row. Raises as indexing."""
        return self._read(self._saved.range(start, length), (length,))

    def surely_equals(self, other: LazyTensor) -> bool:
        """Whether the hashes of all blocks that have some of them say that both are equal to the bit. False says
        nothing: they may be cut or laid out otherwise, or not be hashed.
        """
        self._check()
        other._check()
        return surely_equal(self._saved, other._saved)

    def _read(self, wanted: Slice, shape: tuple[int, ...]) -> torch.Tensor:
        self._check()
        found = torch.empty(shape, dtype=self.dtype, device="cpu")
        fill([(found, replan(wanted, self._saved.parts))])
        return found


def read_rows(tensors: Sequence[LazyTensor]) -> list[torch.Tensor]:
    """All of each, as one row: many small ones of a shard lie in one block, which is read once. Raises as indexing."""
    for tensor in tensors:
        tensor._check()
    found = read_all([tensor._saved for tensor in tensors])
    return [found[id(tensor._saved)] for tensor in tensors]


def _resolve(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int | slice, ...]]:
    """The box that has what is indexed (begin, end), and what is to be taken of the box."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if parts.count(...) > 1:
        raise IndexError("only one ... in an index")
    given = len(parts) - parts.count(...)
    if given > len(shape):
        raise IndexError(f"{given} indices for a tensor of {len(shape)} dimensions")
    at = parts.index(...) if ... in parts else len(parts)
    parts[at : at + 1] = [slice(None)] * (len(shape) - given)
    begin, end, then = list[int](), list[int](), list[int | slice]()
    for dimension, (part, size) in enumerate(zip(parts, shape, strict=True)):
        if isinstance(part, slice):
            first, last, step = part.indices(size)
            if step < 1:
                raise IndexError(f"dimension {dimension}: steps of {step}; they must be 1 or more")
            begin.append(first)
            end.append(max(first, last))
            then.append(slice(None, None, step))
        elif isinstance(part, int) and not isinstance(part, bool):
            if not -size <= part < size:
                raise IndexError(f"dimension {dimension}: index {part} of {size} elements")
            begin.append(part % size)
            end.append(part % size + 1)
            then.append(0)
        else:
            raise TypeError(f"dimension {dimension}: an index is an integer, a slice or ..., not {part!r}")
    return tuple(begin), tuple(end), tuple(then)
