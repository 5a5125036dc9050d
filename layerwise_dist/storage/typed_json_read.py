# SPDX-License-Identifier: Apache-2.0
"""The reading half of typed JSON (see typed_json): trusts nothing, and builds only the types of its own table."""

from __future__ import annotations

import re
import struct
import sys
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from layerwise_dist.storage import strict_json
from layerwise_dist.storage.typed_json_types import (
    DENSE,
    FACTORIES,
    MAX_DEPTH,
    NP_DTYPE,
    NP_SCALARS,
    TAG,
    TORCH_DTYPES,
    Problem,
    short,
)
from layerwise_dist.tensors.slices import DIMENSIONS

_HEX_INT = re.compile(r"-?[0-9a-f]+")
_HEX = re.compile(r"[0-9a-f]*")


def _check_keys(keys: list[Any], what: str) -> None:
    """Before a set or a dict is made of them."""
    try:
        most = strict_json.most_of_one(keys)
    except (TypeError, ValueError, OverflowError):
        raise Problem(f"{what} of a kind that cannot be one") from None
    if most > strict_json.COLLIDING:
        raise Problem(f"{most} of {len(keys)} have the same hash; a writer allows {strict_json.COLLIDING}")


def _put(made: Any, key: Any, value: Any) -> None:
    try:
        made[key] = value
    except (TypeError, ValueError, OverflowError):
        raise Problem("its key is of a kind that cannot be a key") from None


def _is_count(v: Any) -> bool:
    return type(v) is int and 0 <= v < 1 << 63


def _expect(good: bool, message: str) -> None:
    if not good:
        raise Problem(message)


class Reader:
    def __init__(self, blob: np.ndarray) -> None:
        self.blob = blob
        self.left = blob.size  # contents may overlap, but not to fill more memory than the file has
        self.in_key = 0
        self.end = 0

    def value(self, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind is list:
            return self.items(node, self.inside(depth))
        if kind is not dict:
            return node
        tag = node.get(TAG)
        if tag is None and TAG not in node:
            return self.fields(node, self.inside(depth))
        known = _READERS.get(tag) if type(tag) is str else None
        if known is None:
            raise Problem(f"the tag {short(tag)} is not known")
        fields, read = known
        if node.keys() != fields:
            raise Problem(f"a {tag} has the fields {sorted(fields)}, here are {short(sorted(node))}")
        return read(self, node, depth)

    @staticmethod
    def inside(depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise Problem(f"more than {MAX_DEPTH} containers inside each other")
        return depth + 1

    def items(self, nodes: Any, depth: int) -> list[Any]:
        if type(nodes) is not list:
            raise Problem(f"an array is expected, here is {short(nodes)}")
        out: list[Any] = []
        try:
            for place, node in enumerate(nodes):
                out.append(self.value(node, depth))
                nodes[place] = None  # what was read need not stay beside what was made of it
        except Problem as problem:
            problem.steps.append(f"[{len(out)}]")
            raise
        return out

    def fields(self, nodes: dict[str, Any], depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        k = ""
        try:
            for k, node in nodes.items():
                out[k] = self.value(node, depth)
                nodes[k] = None
        except Problem as problem:
            problem.steps.append(f"[{short(k)}]")
            raise
        return out

    def pairs(self, node: dict[str, Any], made: Any, depth: int) -> Any:
        depth, v = self.inside(depth), node["v"]
        _expect(type(v) is list and all(type(p) is list and len(p) == 2 for p in v), "an array of pairs is expected")
        key: Any = None
        keys: list[Any] = []
        values: list[Any] = []
        try:
            for place, (k, x) in enumerate(v):
                key = k
                key = self.key(k, depth)
                keys.append(key)
                values.append(self.value(x, depth))
                v[place] = None
        except Problem as problem:
            problem.steps.append(f"[{short(key)}]")
            raise
        _check_keys(keys, "a key")
        for key, value in zip(keys, values, strict=True):
            _put(made, key, value)
        _expect(len(made) == len(v), "the same key twice")
        return made

    def key(self, node: Any, depth: int) -> Any:
        """An element of a set or a key of a dict."""
        self.in_key += 1
        made = self.value(node, depth)
        self.in_key -= 1
        return made

    def content(self, node: dict[str, Any]) -> np.ndarray:
        offset, count, size = node["offset"], node["bytes"], self.blob.size
        if not (_is_count(offset) and _is_count(count) and offset + count <= size):
            raise Problem(f"{short(count)} bytes at {short(offset)} are not inside the blob of {size}")
        if count > self.left:
            raise Problem(f"the contents together are larger than the blob of {size} bytes")
        self.left -= count
        self.end = max(self.end, offset + count)
        return self.blob[offset : offset + count]

    def shaped(self, node: dict[str, Any], item_bytes: int) -> tuple[list[int], np.ndarray]:
        shape, data = node["shape"], self.content(node)
        if not (type(shape) is list and len(shape) <= DIMENSIONS and all(map(_is_count, shape))):
            raise Problem(f"{short(shape)} is not a shape of at most {DIMENSIONS} dimensions")
        if (0 if 0 in shape else _product(shape, data.size)) * item_bytes != data.size:
            raise Problem(f"the shape {short(shape)} of {short(node['dtype'])} does not have {data.size} bytes")
        return shape, data


def _product(shape: list[int], limit: int) -> int:
    """The product, or any number above `limit` as soon as it is passed: damaged shapes make no giant integers."""
    total = 1
    for n in shape:
        total *= n
        if total > limit:
            break
    return total


def _hex(v: Any, count: int | None = None) -> bytes:
    if not (type(v) is str and _HEX.fullmatch(v) is not None and len(v) % 2 == 0):
        raise Problem(f"{short(v)} is not hexadecimal")
    if not (count is None or len(v) == 2 * count):
        raise Problem(f"{short(v)} does not have {count} bytes")
    return bytes.fromhex(v)


def _read_int(r: Reader, node: dict[str, Any], depth: int) -> int:
    v = node["v"]
    if not (type(v) is str and _HEX_INT.fullmatch(v) is not None):
        raise Problem(f"{short(v)} is not a hexadecimal int")
    return int(v, 16)


def _read_str(r: Reader, node: dict[str, Any], depth: int) -> str:
    try:
        return _hex(node["v"]).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise Problem(f"not a string: {error}") from None


def _read_vector(r: Reader, node: dict[str, Any], depth: int) -> Any:
    r.inside(depth)
    of, dtype, data = node["of"], node["dtype"], r.content(node)
    if of not in ("list", "tuple") or dtype not in ("<i8", "<f8") or data.size % 8:
        what = f"a {short(of)} of {short(dtype)} in {data.size} bytes"
        raise Problem(f"a vector is a list or tuple of <i8 or <f8, here is {what}")
    numbers = np.frombuffer(data.tobytes(), dtype).tolist()
    return numbers if of == "list" else tuple(numbers)


def _read_set(r: Reader, node: dict[str, Any], depth: int) -> Any:
    r.in_key += 1
    elements = r.items(node["v"], r.inside(depth))
    r.in_key -= 1
    _check_keys(elements, "an element")
    try:
        made = (set if node[TAG] == "set" else frozenset)(elements)
    except (TypeError, ValueError, OverflowError):
        raise Problem("an element that cannot be in a set") from None
    _expect(len(made) == len(elements), "the same element twice")
    return made


def _read_defaultdict(r: Reader, node: dict[str, Any], depth: int) -> Any:
    of = node["of"]
    if not ((of is None or type(of) is str) and of in FACTORIES):
        raise Problem(f"the factory {short(of)} is not known")
    return r.pairs(node, defaultdict(FACTORIES[of]), depth)


def _read_deque(r: Reader, node: dict[str, Any], depth: int) -> Any:
    values, most = r.items(node["v"], r.inside(depth)), node["max"]
    good = most is None or (_is_count(most) and len(values) <= most <= sys.maxsize)
    if not good:
        raise Problem(f"the most that this deque of {len(values)} can hold is {short(most)}")
    return deque(values, most)


def _read_slice(r: Reader, node: dict[str, Any], depth: int) -> slice:
    v = r.items(node["v"], r.inside(depth))
    _expect(len(v) == 3, "a slice has start, stop and step")
    return slice(*v)


def _read_range(r: Reader, node: dict[str, Any], depth: int) -> range:
    v = r.items(node["v"], depth)
    _expect(len(v) == 3 and all(type(n) is int for n in v) and v[2] != 0, "a range has three ints, the last not 0")
    return range(*v)


def _np_dtype(name: Any) -> np.dtype:
    if not (type(name) is str and NP_DTYPE.fullmatch(name) is not None):
        raise Problem(f"the numpy dtype {short(name)} is not known")
    try:
        dtype: np.dtype[Any] = np.dtype(name)
    except (TypeError, ValueError, OverflowError):
        raise Problem(f"the numpy dtype {short(name)} is not known here") from None
    if not (dtype.str == name and dtype.itemsize > 0):
        raise Problem(f"the numpy dtype {short(name)} is not known")
    return dtype


def _read_np(r: Reader, node: dict[str, Any], depth: int) -> Any:
    dtype = _np_dtype(node["dtype"])
    if dtype.type not in NP_SCALARS:
        raise Problem(f"a numpy scalar cannot be of dtype {dtype}")
    return np.frombuffer(_hex(node["v"], dtype.itemsize), dtype)[0]


def _read_array(r: Reader, node: dict[str, Any], depth: int) -> np.ndarray:
    dtype = _np_dtype(node["dtype"])
    shape, data = r.shaped(node, dtype.itemsize)
    try:  # not by empty(), which makes of some dtypes another
        return np.frombuffer(bytearray(data), dtype).reshape(shape) if data.size else np.empty(shape, dtype)
    except ValueError as error:
        raise Problem(f"the shape {short(shape)}: {error}") from None


def _read_tensor(r: Reader, node: dict[str, Any], depth: int) -> torch.Tensor:
    if r.in_key:
        raise Problem("a tensor cannot be a key or in a set: it would be found by identity")
    name = node["dtype"]
    if not (type(name) is str and name in DENSE):
        raise Problem(f"the tensor dtype {short(name)} is not known")
    shape, data = r.shaped(node, DENSE[name].itemsize)
    made = torch.empty(data.size, dtype=torch.uint8, device="cpu")
    made.numpy()[:] = data
    try:
        return made.view(DENSE[name]).reshape(shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise Problem(f"the shape {short(shape)}: {error}") from None


def _read_dtype(r: Reader, node: dict[str, Any], depth: int) -> torch.dtype:
    name = node["v"]
    if not (type(name) is str and name in TORCH_DTYPES):
        raise Problem(f"the torch.dtype {short(name)} is not known")
    return TORCH_DTYPES[name]


def _read_device(r: Reader, node: dict[str, Any], depth: int) -> torch.device:
    kind, index = node["type"], node["index"]
    if not (type(kind) is str and kind.isascii() and kind.isidentifier()):
        raise Problem(f"the device {short(kind)} is not known")
    if not (index is None or (_is_count(index) and index < 128)):
        raise Problem(f"the device index {short(index)} is not 0 to 127")
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)
    except (RuntimeError, ValueError):
        raise Problem(f"the device {short(kind)} is not known here") from None


def _read_size(r: Reader, node: dict[str, Any], depth: int) -> torch.Size:
    v = node["v"]
    _expect(type(v) is list and all(type(n) is int and -(1 << 63) <= n < 1 << 63 for n in v), "a torch.Size holds ints")
    return torch.Size(v)


def _read_namespace(r: Reader, node: dict[str, Any], depth: int) -> Namespace | SimpleNamespace:
    held = r.pairs(node, {}, depth)
    _expect(all(type(name) is str for name in held), "a namespace's names are strings")
    made = Namespace() if node[TAG] == "Namespace" else SimpleNamespace()
    vars(made).update(held)
    return made


def _reader(fields: str, read: Callable[[Reader, dict[str, Any], int], Any]) -> tuple[set[str], Any]:
    return {TAG, *fields.split()}, read


_READERS: dict[str, tuple[set[str], Callable[[Reader, dict[str, Any], int], Any]]] = {
    "int": _reader("v", _read_int),
    "float": _reader("v", lambda r, node, depth: struct.unpack(">d", _hex(node["v"], 8))[0]),
    "complex": _reader("v", lambda r, node, depth: complex(*struct.unpack(">dd", _hex(node["v"], 16)))),
    "str": _reader("v", _read_str),
    "bytes": _reader("offset bytes", lambda r, node, depth: r.content(node).tobytes()),
    "bytearray": _reader("offset bytes", lambda r, node, depth: bytearray(r.content(node).tobytes())),
    "tuple": _reader("v", lambda r, node, depth: tuple(r.items(node["v"], r.inside(depth)))),
    "set": _reader("v", _read_set),
    "frozenset": _reader("v", _read_set),
    "vector": _reader("of dtype offset bytes", _read_vector),
    "dict": _reader("v", lambda r, node, depth: r.pairs(node, {}, depth)),
    "OrderedDict": _reader("v", lambda r, node, depth: r.pairs(node, OrderedDict(), depth)),
    "Counter": _reader("v", lambda r, node, depth: r.pairs(node, Counter(), depth)),
    "Namespace": _reader("v", _read_namespace),
    "SimpleNamespace": _reader("v", _read_namespace),
    "defaultdict": _reader("of v", _read_defaultdict),
    "deque": _reader("max v", _read_deque),
    "slice": _reader("v", _read_slice),
    "range": _reader("v", _read_range),
    "np": _reader("dtype v", _read_np),
    "array": _reader("dtype shape offset bytes", _read_array),
    "tensor": _reader("dtype shape offset bytes", _read_tensor),
    "dtype": _reader("v", _read_dtype),
    "device": _reader("type index", _read_device),
    "Size": _reader("v", _read_size),
}
