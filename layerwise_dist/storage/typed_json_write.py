# SPDX-License-Identifier: Apache-2.0
"""The writing half of typed JSON (see typed_json): a value as a tree that plain JSON can hold, and its contents."""

from __future__ import annotations

import enum
import itertools
import json
import math
import struct
import uuid
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from layerwise_dist.storage.strict_json import COLLIDING, most_of_one
from layerwise_dist.storage.typed_json_types import (
    DENSE,
    FACTORIES,
    MAX_DEPTH,
    NP_DTYPE,
    NP_SCALARS,
    TAG,
    Prepared,
    Problem,
    short,
)
from layerwise_dist.tensors.slices import DIMENSIONS

ALIGN = 64
VECTOR_ABOVE = 64  # elements; shorter ones stay readable in the text

ALLOWED = (
    "None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, OrderedDict, Counter, "
    "defaultdict, deque, slice, range, argparse.Namespace, SimpleNamespace, numpy scalars and arrays, torch tensors, "
    "torch.dtype, torch.device, torch.Size"
)


# Made anew by each process, so that no string of a user's state can be it.
_PLACE = f"prepared:{uuid.uuid4().hex}"


class Writer:
    def __init__(self) -> None:
        self.parts: list[Any] = []  # bytes or views of live memory: joined, and so copied, before dumps returns
        self.size = 0
        self.open: set[int] = set()  # the containers around the present value, by id
        self.in_key = 0
        self.prepared: list[str] = []

    def place(self, text: str) -> str:
        """What stands in the tree for a prepared text, until `finish`."""
        self.prepared.append(text)
        return _PLACE

    def finish(self, tree: Any) -> str:
        text = json.dumps(tree, ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
        if not self.prepared:
            return text
        pieces = text.split(f'"{_PLACE}"')
        return "".join(itertools.chain(*zip(pieces, self.prepared, strict=False), pieces[-1:]))

    def value(self, v: Any) -> Any:
        kind = type(v)
        write = _WRITERS.get(kind)
        if write is None:
            raise Problem(_why_refused(v))
        if kind not in _CONTAINERS:
            return write(self, v)
        here = id(v)
        if here in self.open:
            raise Problem(f"a {kind.__name__} that contains itself cannot be written")
        if len(self.open) >= MAX_DEPTH:
            raise Problem(f"more than {MAX_DEPTH} containers inside each other")
        self.open.add(here)
        node = write(self, v)
        self.open.remove(here)
        return node

    def items(self, values: Iterable[Any]) -> list[Any]:
        out: list[Any] = []
        try:
            for v in values:
                stays = _STAYS.get(type(v))
                out.append(v if stays is not None and stays(v) else self.value(v))
        except Problem as problem:
            problem.steps.append(f"[{len(out)}]")
            raise
        return out

    def key(self, k: Any, role: str) -> Any:
        """An element of a set or a key of a dict: it must still be found, by value, after it was read."""
        self.in_key += 1
        try:
            node = self.value(k)
        except Problem as problem:
            problem.steps.append(f" ({role} {short(k)})")
            raise
        self.in_key -= 1
        return node

    def fields(self, d: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        k = ""
        try:
            for k, v in d.items():
                stays = _STAYS.get(type(v))  # param groups by the hundred are made of these
                out[k] = v if stays is not None and stays(v) else self.value(v)
        except Problem as problem:
            problem.steps.append(f"[{short(k)}]")
            raise
        return out

    def pairs(self, d: dict[Any, Any]) -> list[list[Any]]:
        _check_hashes(d, "keys")
        out: list[list[Any]] = []
        for k, v in d.items():
            key = self.key(k, "key")
            try:
                out.append([key, self.value(v)])
            except Problem as problem:
                problem.steps.append(f"[{short(k)}]")
                raise
        return out

    def content(self, data: Any, count: int) -> dict[str, int]:
        if not count:
            return {"offset": 0, "bytes": 0}
        gap = -self.size % ALIGN
        if gap:
            self.parts.append(bytes(gap))
        offset = self.size + gap
        self.parts.append(data)
        self.size = offset + count
        return {"offset": offset, "bytes": count}


def is_utf8(v: str) -> bool:
    if v.isascii():
        return True
    try:
        v.encode()
    except UnicodeEncodeError:
        return False
    return True


def are_utf8(strings: Collection[str]) -> bool:
    return all(map(str.isascii, strings)) or all(map(is_utf8, strings))


def _write_int(w: Writer, v: int) -> Any:
    return v if -(1 << 63) <= v < 1 << 63 else {TAG: "int", "v": format(v, "x")}


def _write_float(w: Writer, v: float) -> Any:
    return v if math.isfinite(v) else {TAG: "float", "v": struct.pack(">d", v).hex()}


def _write_str(w: Writer, v: str) -> Any:
    return v if is_utf8(v) else {TAG: "str", "v": v.encode("utf-8", "surrogatepass").hex()}


def _write_bytes(w: Writer, v: bytes | bytearray) -> Any:
    return {TAG: type(v).__name__, **w.content(bytes(v), len(v))}


def _write_sequence(w: Writer, v: list[Any] | tuple[Any, ...]) -> Any:
    kinds = set(map(type, v))
    if kinds == {str} and type(v) is list and are_utf8(v):
        return list(v)  # names, by the hundred in every checkpoint
    if len(v) > VECTOR_ABOVE:
        code, dtype = ("q", "<i8") if kinds == {int} else ("d", "<f8") if kinds == {float} else ("", "")
        if code:
            try:
                data = struct.pack(f"<{len(v)}{code}", *v)  # in a third of the time that numpy takes
            except struct.error:  # an int that is too large
                pass
            else:
                return {TAG: "vector", "of": type(v).__name__, "dtype": dtype, **w.content(data, len(data))}
    out = w.items(v)
    return out if type(v) is list else {TAG: "tuple", "v": out}


def _write_set(w: Writer, v: set[Any] | frozenset[Any]) -> Any:
    _check_hashes(v, "elements")
    return {TAG: type(v).__name__, "v": [w.key(k, "element") for k in v]}


def _check_hashes(keys: Collection[Any], what: str) -> None:
    if len(keys) > COLLIDING and (most := most_of_one(list(keys))) > COLLIDING:
        raise Problem(
            f"{most} of {len(keys)} {what} have the same hash, which no reader accepts: at most {COLLIDING} may"
        )


def _write_dict(w: Writer, v: dict[Any, Any]) -> Any:
    if {str}.issuperset(map(type, v)) and TAG not in v and are_utf8(v):
        return w.fields(v)
    return {TAG: "dict", "v": w.pairs(v)}


def _write_namespace(w: Writer, v: Namespace | SimpleNamespace) -> Any:
    held = vars(v)
    if not all(type(name) is str for name in held):
        raise Problem("a namespace whose attributes' names are not strings cannot be written")
    return {TAG: type(v).__name__, "v": w.pairs(held)}


def _write_mapping(w: Writer, v: OrderedDict[Any, Any] | Counter[Any]) -> Any:
    return {TAG: type(v).__name__, "v": w.pairs(v)}


def _write_defaultdict(w: Writer, v: defaultdict[Any, Any]) -> Any:
    made = v.default_factory
    name = getattr(made, "__name__", None)
    if made is not None and (type(name) is not str or FACTORIES.get(name) is not made):
        raise Problem(f"a defaultdict with factory {short(made)}; it can be None, int, float, str, list, dict or set")
    return {TAG: "defaultdict", "of": name, "v": w.pairs(v)}


def _write_deque(w: Writer, v: deque[Any]) -> Any:
    return {TAG: "deque", "max": v.maxlen, "v": w.items(v)}


def _write_slice(w: Writer, v: slice | range) -> Any:
    return {TAG: type(v).__name__, "v": w.items((v.start, v.stop, v.step))}


def _write_np_scalar(w: Writer, v: np.generic) -> Any:
    return {TAG: "np", "dtype": v.dtype.str, "v": v.tobytes().hex()}


def _write_array(w: Writer, v: np.ndarray) -> Any:
    dtype = v.dtype.str
    if not v.dtype.itemsize or not NP_DTYPE.fullmatch(dtype) or np.dtype(dtype) != v.dtype:
        raise Problem(f"a numpy array of dtype {v.dtype}; it can hold numbers, bools, dates, fixed-width str or bytes")
    held = np.ascontiguousarray(v)
    if held.dtype.str != dtype:  # numpy makes of some dtypes another when it copies
        raise Problem(f"a numpy array of dtype {dtype} that is not contiguous: give a copy of it as {held.dtype.str}")
    data = held.reshape(-1).view(np.uint8)
    return {TAG: "array", "dtype": dtype, "shape": list(v.shape), **w.content(data, data.size)}


# torch copies these for every dtype of that size; some of those, such as int4, it cannot copy by their own name
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _write_tensor(w: Writer, v: torch.Tensor) -> Any:
    if w.in_key:
        raise Problem(
            "a tensor as a key or set element is found by identity, which a file cannot keep: use its value or a name"
        )
    if v.dim() > DIMENSIONS:
        raise Problem(f"a tensor of {v.dim()} dimensions, of at most {DIMENSIONS} that a reader takes")
    dtype = str(v.dtype).removeprefix("torch.")
    if v.device.type == "meta":
        raise Problem("a meta tensor has no data to write")
    if v.is_quantized or dtype not in DENSE:
        raise Problem(f"a quantized tensor ({v.dtype}): give its int_repr(), scales and zero points")
    if v.layout != torch.strided or v.is_nested:
        kind = "nested" if v.is_nested else str(v.layout)
        raise Problem(f"a {kind} tensor, which is not dense: give its values and indices, or to_dense()")
    try:
        resolved = v.detach().resolve_conj().resolve_neg()
        flat = resolved.view(_SAME_SIZE.get(v.dtype.itemsize, v.dtype)).cpu().contiguous().reshape(-1)
        if flat.stride(0) != 1:  # one element of a strided view: contiguous, yet no view of another dtype
            flat = flat.clone(memory_format=torch.contiguous_format)
        data = flat.view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise Problem(f"this tensor's data cannot be read: {error}") from None
    return {TAG: "tensor", "dtype": dtype, "shape": list(v.shape), **w.content(data, data.size)}


def _write_size(w: Writer, v: torch.Size) -> Any:
    if not {int}.issuperset(map(type, v)):
        raise Problem("a symbolic torch.Size: give its numbers")
    return {TAG: "Size", "v": list(v)}


_WRITERS: dict[type, Callable[[Writer, Any], Any]] = {
    type(None): lambda w, v: v, bool: lambda w, v: v, int: _write_int, float: _write_float, str: _write_str,
    complex: lambda w, v: {TAG: "complex", "v": struct.pack(">dd", v.real, v.imag).hex()},
    bytes: _write_bytes, bytearray: _write_bytes,
    list: _write_sequence, tuple: _write_sequence, set: _write_set, frozenset: _write_set,
    dict: _write_dict, OrderedDict: _write_mapping, Counter: _write_mapping, defaultdict: _write_defaultdict,
    Namespace: _write_namespace, SimpleNamespace: _write_namespace,
    deque: _write_deque, slice: _write_slice, range: _write_slice,
    **dict.fromkeys(NP_SCALARS, _write_np_scalar), np.ndarray: _write_array,
    torch.Tensor: _write_tensor, torch.nn.Parameter: _write_tensor, torch.Size: _write_size,
    torch.dtype: lambda w, v: {TAG: "dtype", "v": str(v).removeprefix("torch.")},
    torch.device: lambda w, v: {TAG: "device", "type": v.type, "index": v.index},
    Prepared: lambda w, v: w.place(v.text),
}  # fmt: skip
# Of what type and when a value is its own tree.
_STAYS: dict[type, Callable[[Any], bool]] = {
    type(None): lambda v: True, bool: lambda v: True, float: math.isfinite, str: str.isascii,
}  # fmt: skip
_CONTAINERS = {
    list, tuple, set, frozenset, dict, OrderedDict, Counter, defaultdict, deque, slice, Namespace, SimpleNamespace,
}  # fmt: skip


def _why_refused(v: Any) -> str:
    kind = type(v)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    base = next((t for t in kind.__mro__ if t in _WRITERS or t is np.generic), None)
    if isinstance(v, enum.Enum):
        hint = "is an enum member: give its value or name"
    elif any(t.__name__ == "DTensor" for t in kind.__mro__):
        hint = "is a DTensor: give its local tensor, from to_local()"
    elif base is tuple and (hasattr(kind, "_fields") or hasattr(kind, "n_fields")):
        hint = "is a namedtuple: give a dict, such as _asdict()"
    elif base is not None:
        hint = f"is a subclass of {base.__name__} and would come back as something else: convert it to a plain type"
    elif callable(getattr(kind, "state_dict", None)):
        hint = "is an object: give its state_dict()"
    elif callable(getattr(kind, "get_state", None)):
        hint = "is an object: give its get_state()"
    elif callable(v):
        hint = "is code, and only data is written: build it again in the script and leave it out of the state"
    else:
        hint = "is an object: give its data"
    return f"{name} {hint}. Allowed: {ALLOWED}"
