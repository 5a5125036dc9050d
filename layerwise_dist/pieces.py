"""Slices bound to live tensors: what the frameworks hand to capture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.slices import Slice

# Codes of the safetensors format, version 0.4 and later.
DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: dict[str, torch.dtype] = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice and this process's tensor that holds it.

    `tensor` is a plain tensor, never a DTensor. It has the slice's elements; only where it is not `dense` and the
    slice is a flat range it is the whole tensor, of which `part` takes the range.
    `lease` says that it may be read in place until the next update; otherwise it is copied at the boundary.
    `wrapped` says that the optimizer holds it as a DTensor laid out like its parameter.
    """

    slice: Slice
    tensor: torch.Tensor
    lease: bool
    wrapped: bool = False

    @property
    def dense(self) -> bool:
        """Whether the elements lie in memory as the file wants them: row-major, without gaps."""
        return self.tensor.is_contiguous()

    @property
    def on_host(self) -> bool:
        return self.tensor.device.type == "cpu"

    @property
    def part(self) -> torch.Tensor:
        """A tensor of exactly the slice's elements: `tensor`, or a range of it (a copy if that is not row-major)."""
        tensor = self.tensor.detach()
        if self.slice.is_flat and tensor.numel() != self.slice.numel:
            tensor = tensor.reshape(-1)[self.slice.start : self.slice.start + self.slice.numel]
        return tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The unit of capture: one layer, or several small ones that are updated one after another. One extent of the file.

    `staged` says that it is copied right behind the update; otherwise it is read in place until the next one.
    """

    layers: tuple[str, ...]
    pieces: tuple[Piece, ...]
    staged: bool = False

    @property
    def name(self) -> str:
        """As files and messages have it: the layer's, or the first one's and the last one's."""
        return self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} to {self.layers[-1]}"

    @property
    def nbytes(self) -> int:
        return sum(piece.slice.nbytes for piece in self.pieces)


def dtype_code(dtype: torch.dtype, name: str) -> str:
    """The safetensors code of `dtype`; UnsupportedError (naming the tensor) where the format has none."""
    code = DTYPE_CODES.get(dtype)
    if code is None:
        raise UnsupportedError(
            f"{name} has dtype {dtype}, which a safetensors file cannot hold; "
            f"allowed are {', '.join(str(known).removeprefix('torch.') for known in DTYPE_CODES)}"
        )
    return code
