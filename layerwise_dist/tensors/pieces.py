# SPDX-License-Identifier: Apache-2.0
"""Slices bound to live tensors: what the frameworks hand to capture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.tensors.slices import Slice

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
    slice is a flat range it is the whole tensor, and `part` takes the range.
    `lease` says that it may be read in place until the next update; otherwise it is copied at the boundary.
    `wrapped` says that the optimizer holds it as a DTensor laid out like its parameter.
    """

    slice: Slice
    tensor: torch.Tensor
    lease: bool
    wrapped: bool = False

    @property
    def dense(self) -> bool:
        """As `is_dense`, of `tensor`."""
        return is_dense(self.tensor)

    @property
    def on_host(self) -> bool:
        return self.tensor.device.type == "cpu"

    @property
    def part(self) -> torch.Tensor:
        """A tensor of exactly the slice's elements: `tensor`, or a range of it (a copy if that is not row-major)."""
        tensor = self.tensor.detach()
        start = self.slice.start
        if start is not None and tensor.numel() != self.slice.numel:
            tensor = tensor.reshape(-1)[start : start + self.slice.numel]
        return tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The unit of capture: one layer, or several small ones that are updated one after another. One extent of the file.

    `staged` says that it is copied right after the update; otherwise it is read in place until the next one.
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


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is what the file has of it: row-major, without gaps, and no value seen through a
    conjugate or negative bit. Of any other tensor the values are copied, on the way out and on the way in.
    """
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def check_layout(name: str, tensor: torch.Tensor) -> None:
    """Raises UnsupportedError, naming the tensor, where its values cannot be copied out of memory and back in place.

    `tensor` is a model's or an optimizer's, of a DTensor the local part counts.
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # private: not at our import

    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if is_lazy(local):
        raise UnsupportedError(f"{name} has no shape yet: run a forward of the model before attach()")
    if local.is_meta:
        raise UnsupportedError(f"{name} is on the meta device: materialise the model before attach()")
    kind = "nested" if local.is_nested else str(local.layout).removeprefix("torch.")
    problem = way_out = ""
    if kind != "strided":
        problem = f"is a {kind} tensor, which is not an array of elements in memory"
        way_out = "keep its parts (values and indices, say) as tensors of their own"
    elif is_traceable_wrapper_subclass(local):
        problem = f"is a {type(local).__name__}, which has no memory of its own: it stands for other tensors"
        way_out = (
            "keep those; only frozen parameters of a plain module can be such tensors, and an optimizer's state where "
            "ranks have whole parameters (not with FSDP or ZeRO)"
        )
    elif _is_hollow(local):
        problem = f"is a {type(local).__name__}, which has no memory and does not tell what it stands for"
        way_out = "give its class __tensor_flatten__ and __tensor_unflatten__, or keep the tensors inside it"
    elif _overlaps(local):
        strides = f"shape {list(local.shape)}, strides {list(local.stride())}"
        problem = f"has several elements in one place in memory ({strides}), so a checkpoint cannot be filled into it"
        way_out = "give each its own place with .contiguous() or .clone()"
    if problem:
        raise UnsupportedError(f"{name} {problem}: {way_out}; a buffer can also be left out, with persistent=False")


def _is_hollow(tensor: torch.Tensor) -> bool:
    """Whether it is of a subclass that was made without memory."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not tensor.numel():
        return False
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return not tensor.data_ptr()
        except RuntimeError:  # what torch raises where a subclass has turned that into an error
            return True


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as those of `expand()` do; also where the strides alone cannot rule it out."""
    if tensor.is_contiguous():
        return False
    reach = 0  # of the dimensions with smaller strides: how far their last element is from the first
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
