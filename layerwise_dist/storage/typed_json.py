# SPDX-License-Identifier: Apache-2.0
"""Typed JSON: a Python value as readable JSON text and one blob of bytes, and back with every type intact.

`state=` of a training job holds what plain JSON loses: int keys, tuples, Counters, sets, bytes, inf and nan, numpy
scalars, tensors. Here each comes back with the type and the value that it had. There is no pickle in it: a reader
builds only the types listed below and imports nothing that the file names.

The text
    UTF-8 JSON (RFC 8259; no NaN or Infinity literals, no repeated keys). A value is written plainly if plain JSON keeps
    it, and otherwise as an object whose key ``"!"`` is the tag. *Hex* is lower-case hexadecimal, *[...]* is an array of
    values in this same encoding, and *content* stands for the two keys ``"offset": n, "bytes": n``.

    ====================  =============================================================================================
    None, bool            ``null``, ``true``, ``false``
    int                   a number if -2**63 <= it < 2**63, else ``{"!":"int","v":hex with a minus sign if negative}``
    float                 a number (shortest decimal that reads back exactly, -0.0 too);
                          inf and nan: ``{"!":"float","v":hex of the 8 IEEE bytes, big-endian}``, so nan keeps its bits
    complex               ``{"!":"complex","v":hex of the 16 bytes, real part first}``
    str                   a string; one with lone surrogates: ``{"!":"str","v":hex of its UTF-8 with surrogatepass}``
    bytes, bytearray      ``{"!":"bytes",content}``, ``{"!":"bytearray",content}``
    list                  an array; ``tuple``, ``set``, ``frozenset``: ``{"!":"tuple","v":[...]}`` and so on
    list, tuple of more   ``{"!":"vector","of":"list" or "tuple","dtype":"<i8" or "<f8",content}``, if all are ints that
    than 64 numbers       fit int64 or all are floats
    dict                  an object, in insertion order, if every key is a str without lone surrogates and none is
                          ``"!"``; else ``{"!":"dict","v":[[key, value], ...]}``
    OrderedDict, Counter  ``{"!":"OrderedDict","v":[[key, value], ...]}``, ``{"!":"Counter","v":[[key, value], ...]}``
    argparse.Namespace,   ``{"!":"Namespace","v":[[name, value], ...]}``, ``{"!":"SimpleNamespace",...}``
    SimpleNamespace
    defaultdict           ``{"!":"defaultdict","of":f,"v":[[key, value], ...]}``; f, the factory, is null, "int",
                          "float", "str", "list", "dict" or "set"
    deque                 ``{"!":"deque","max":null or int,"v":[...]}``
    slice, range          ``{"!":"slice","v":[start, stop, step]}``, ``{"!":"range","v":[start, stop, step]}``
    numpy scalar          ``{"!":"np","dtype":d,"v":hex of its bytes}``; d is numpy's type string, such as ``"<M8[ns]"``
    numpy array           ``{"!":"array","dtype":d,"shape":[int, ...],content}``, elements in C order
    torch.Tensor          ``{"!":"tensor","dtype":"bfloat16","shape":[int, ...],content}``, elements in C order
    torch.dtype           ``{"!":"dtype","v":"bfloat16"}``
    torch.device          ``{"!":"device","type":"cuda","index":null or 0 to 127}``
    torch.Size            ``{"!":"Size","v":[int, ...]}``
    ====================  =============================================================================================

The blob
    Contents in the order in which the text names them, each at the next offset that is a multiple of 64 (zeros in
    between), little-endian unless a numpy type string says otherwise. It ends with the last content. Content of no
    bytes has offset 0.

What does not come back
    A tensor's device (it returns on the CPU), requires_grad, strides, and being a Parameter or a Buffer; an array's
    strides, read-only flag and dtype metadata; aliasing (what is referenced twice is written and returned twice); a
    set's order. numpy's platform aliases (``longlong``) return as the fixed-width type that they are (``int64``).

Refused with a StateError that names the place, such as ``state['scheduler']['lr_lambdas'][0]``
    Functions and objects of any other class; subclasses of the types above (namedtuples, enum members, DTensors, masked
    arrays, numpy strings), since they would come back as something else; arrays of objects or records; meta, sparse,
    quantized and nested tensors; tensors as keys; cycles; more than 100 containers inside each other.

A reader checks every tag, field, size, offset, type string and depth before use, and the sum of all contents against
the blob. What its values take beside their own characters is bounded (`strict_json.weight`), and of the keys of a dict
or the elements of a set no more than 64 have one hash, so that none is made to be compared without end. A value that
is beyond either is refused when it is written, too. Anything wrong is a DamageError.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from layerwise_dist.errors import DamageError, StateError
from layerwise_dist.storage import strict_json
from layerwise_dist.storage.typed_json_read import Reader
from layerwise_dist.storage.typed_json_types import Prepared, Problem
from layerwise_dist.storage.typed_json_write import Writer

_TOO_DEEP = "the Python call stack is too small for the nesting here; call from a shallower place"


def dumps(value: Any, *, path: str = "state") -> tuple[bytes, bytes]:
    """Writes a value as (UTF-8 JSON text, blob); a snapshot that aliases no live memory. `path` names it in errors.

    Raises StateError, which names the place, for anything that could not come back as it was.
    """
    writer = Writer()
    text = writer.finish(_tree(writer, value, path)).encode()
    if strict_json.too_heavy(text):
        raise StateError(
            path,
            "so many lists, dicts and strings that a reader would need about "
            f"{strict_json.weight(text) >> 20} MB of memory beside what "
            f"is in them, at most {strict_json.WEIGHT_CAP >> 20} are allowed: keep them in arrays, tensors or bytes",
        )
    return text, b"".join(writer.parts)


def prepare(value: Any, *, path: str = "state") -> Prepared:
    """Stands for the value in what `dumps` is given, and is not looked at again there: for names that never change.

    Raises StateError as `dumps` does, and ValueError for a value that needs a blob.
    """
    writer = Writer()
    tree = _tree(writer, value, path)
    if writer.parts:
        raise ValueError(f"{path} has bytes, tensors or long vectors: only what is all text can be prepared")
    return Prepared(writer.finish(tree))


def _tree(writer: Writer, value: Any, path: str) -> Any:
    try:
        return writer.value(value)
    except Problem as problem:
        raise StateError(problem.path(path), problem.message) from None
    except RecursionError:
        raise StateError(path, _TOO_DEEP) from None


def loads(text: bytes | memoryview, blob: bytes | memoryview, *, where: str = "") -> Any:
    """Reads what `dumps` wrote; the result shares no memory with `blob`. `where` names the file in errors.

    Raises DamageError for anything malformed.
    """
    prefix = f"{where}: " if where else ""
    reader = Reader(np.frombuffer(blob, np.uint8))
    try:
        try:
            tree = strict_json.loads(bytes(text))
        except ValueError as error:
            raise DamageError(f"{prefix}the state's text is not JSON: {error}") from None
        value = reader.value(tree, 0)
    except Problem as problem:
        raise DamageError(f"{prefix}{problem.path('state')}: {problem.message}") from None
    except RecursionError:
        raise DamageError(f"{prefix}the state's text is nested without end, or {_TOO_DEEP}") from None
    if reader.end != reader.blob.size:
        raise DamageError(f"{prefix}the state's text describes {reader.end} bytes, its blob has {reader.blob.size}")
    return value
