# SPDX-License-Identifier: Apache-2.0
"""Typed JSON that is damaged, or made to do harm: no more than DamageError comes of it."""

from __future__ import annotations

import functools
import json
import random
import sys
import time
import tracemalloc
from collections import Counter

import pytest
from kit.typed_values import EXACT, HOSTILE, typical_state

from layerwise_dist.errors import DamageError
from layerwise_dist.storage.typed_json import dumps, loads


def content(**fields):
    return json.dumps(fields).encode()


ATTACKS = [
    (b"", b""), (b"\xff", b""), (b"[1", b""), (b"1 2", b""), (b"NaN", b""), (b"-Infinity", b""), (b'{"a":1,"a":2}',
    b""),
    (b"[" * 100_000 + b"]" * 100_000, b""), (b'{"a":' * 100_000, b""), (b"1" * 5000, b""), (b"null", b"x"),
    (content(**{"!": "os.system", "v": "x"}), b""), (content(**{"!": None}), b""), (content(**{"!": ["tuple"]}), b""),
    (content(**{"!": "tuple"}), b""), (content(**{"!": "tuple", "v": [], "w": 1}), b""), (content(**{"!": "tuple",
    "v": {}}), b""),
    (content(**{"!": "bytes", "offset": 0, "bytes": 5}), b"1234"), (content(**{"!": "bytes", "offset": -1,
    "bytes": 1}), b"1"),
    (content(**{"!": "bytes", "offset": 2**62, "bytes": 1}), b"1"), (content(**{"!": "bytes", "offset": 0,
    "bytes": True}), b"1"),
    (content(**{"!": "bytes", "offset": 0, "bytes": 1.0}), b"1"), (content(**{"!": "bytes", "offset": 0,
    "bytes": 10**40}), b"1"),
    (content(**{"!": "tuple", "v": [{"!": "bytes", "offset": 0, "bytes": 4}] * 2}), b"1234"),
    *((content(**{"!": "tensor", "dtype": d, "shape": s, "offset": 0, "bytes": 8}), bytes(8)) for d, s in [
        ("float32", [3]), ("float32", [2**62, 2**62]), ("float32", [-2]), ("float32", [2, 1.0]), ("float32", 2),
        ("float32", None),
        ("float33", [2]), ("Tensor", [2]), ("quint8", [8]), (None, [2]), ("__class__", [2]), ("float32", [10**30, 0])]),
    *((content(**{"!": "array", "dtype": d, "shape": s, "offset": 0, "bytes": 8}), bytes(8)) for d, s in [
        ("<f4", [3]), ("<f5", [8]), ("|O8", [1]), ("O", [1]), ("<i4,<i4", [1]), ("|V8", [1]), ("<M8[xx]", [1]),
        ("<U0", [8]), ("f4", [2]), ("<i1", [8]),
        ("<f4", [1] * 70 + [2]), ("<U9999999999", [1]), ("<M8[999999999as]x", [1]), (8, [1]), ("<i8\n", [1])]),
    (content(**{"!": "array", "dtype": "<f4", "shape": [0, 2**62, 2**62], "offset": 0, "bytes": 0}), b""),
    (content(**{"!": "array", "dtype": "<U0", "shape": [0], "offset": 0, "bytes": 0}), b""),
    (content(**{"!": "bytes", "offset": 0, "bytes": 1}), b"12"),
    (content(**{"!": "vector", "of": "list", "dtype": "<i8", "offset": 0, "bytes": 7}), bytes(7)),
    (content(**{"!": "vector", "of": "set", "dtype": "<i8", "offset": 0, "bytes": 8}), bytes(8)),
    (content(**{"!": "vector", "of": "list", "dtype": "|O8", "offset": 0, "bytes": 8}), bytes(8)),
    (content(**{"!": "np", "dtype": "<f8", "v": "00"}), b""), (content(**{"!": "np", "dtype": "<U1",
    "v": "00000000"}), b""),
    (content(**{"!": "np", "dtype": "|O8", "v": "0" * 16}), b""), (content(**{"!": "float", "v": "7ff"}), b""),
    (content(**{"!": "float", "v": "7FF0000000000000"}), b""), (content(**{"!": "int", "v": "1_0"}), b""),
    (content(**{"!": "int", "v": 5}), b""), (content(**{"!": "str", "v": "ff"}), b""), (content(**{"!": "str",
    "v": "4"}), b""),
    (content(**{"!": "set", "v": [[]]}), b""), (content(**{"!": "set", "v": [1, True]}), b""),
    (content(**{"!": "dict", "v": [[{}, 1]]}), b""), (content(**{"!": "dict", "v": [[1, 1], [1, 2]]}), b""),
    (content(**{"!": "dict", "v": [[1]]}), b""), (content(**{"!": "dict", "v": [5]}), b""),
    (content(**{"!": "Counter", "v": None}), b""), (content(**{"!": "Namespace", "v": [[1, 2]]}), b""),
    (content(**{"!": "SimpleNamespace", "v": {"a": 1}}), b""),
    (content(**{"!": "defaultdict", "of": "eval", "v": []}), b""), (content(**{"!": "defaultdict", "of": [],
    "v": []}), b""),
    (content(**{"!": "deque", "max": -1, "v": []}), b""), (content(**{"!": "deque", "max": 1, "v": [1, 2]}), b""),
    (content(**{"!": "deque", "max": 2**70, "v": []}), b""), (content(**{"!": "slice", "v": [1, 2]}), b""),
    (content(**{"!": "range", "v": [1, 2, 0]}), b""), (content(**{"!": "range", "v": [1, 2.5, 1]}), b""),
    (content(**{"!": "dtype", "v": "nn"}), b""), (content(**{"!": "dtype", "v": []}), b""),
    (content(**{"!": "device", "type": "cpu:0", "index": None}), b""), (content(**{"!": "device", "type": "disk",
    "index": 0}), b""),
    (content(**{"!": "device", "type": "cuda", "index": 128}), b""), (content(**{"!": "Size", "v": [2**63]}), b""),
    (content(**{"!": "Size", "v": ["1"]}), b""),
    (b"[1e999]", b""), (b'["\\ud800"]', b""),
    *((content(**{"!": tag, "v": v}), b"") for tag, v in [
        ("set", [{"!": "int", "v": f"{n * (2**61 - 1):x}"} for n in range(1, 66)]),  # of one hash
        ("dict", [[{"!": "int", "v": f"{n * (2**61 - 1):x}"}, 0] for n in range(1, 66)]),
        ("set", [[n] for n in range(65)]), ("dict", [[[n], 0] for n in range(65)]),
        ("set", [{"!": "tensor", "dtype": "float32", "shape": [0], "offset": 0, "bytes": 0}]),
        ("dict", [[1, {"!": "nothing"}]])]),
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("text", "blob"), ATTACKS, ids=range(len(ATTACKS)))
def test_an_attack_is_a_damage_error(text, blob):
    with pytest.raises(DamageError, match=r"^rank 3: "):
        loads(text, blob, where="rank 3")


def varied_state():
    """One of everything, and nothing long: damage should hit every kind."""
    small = [v for v in EXACT if not isinstance(v, dict) and len(dumps(v)[0]) < 300 and len(dumps(v)[1]) < 300]
    return {**typical_state(), "maps": [v for v in EXACT if isinstance(v, dict)], "rest": small}


def survives(text, blob, limit):
    """Loads damaged input: a value or DamageError, in time and memory that its size explains."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    begin = time.monotonic()
    try:
        loads(text, blob)
        good = True
    except DamageError as error:
        assert str(error) and len(str(error)) < 20_000
        good = False
    assert time.monotonic() - begin < 5
    assert tracemalloc.get_traced_memory()[1] - before < limit
    return good


@pytest.fixture(scope="module")
def varied():
    return dumps(varied_state())


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_flipped_and_cut_bytes_are_damage_or_a_value(varied, traced):
    draw = random.Random(7)
    text, blob = varied
    limit = 20 * (len(text) + len(blob))
    outcomes = Counter()
    for _ in range(1200):
        t, b = bytearray(text), bytearray(blob)
        target = draw.choice([t, t, t, b])
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.randrange(len(target))
            action = draw.randrange(5)
            if action == 0:
                target[at] ^= 1 << draw.randrange(8)
            elif action == 1:
                target[at] = draw.choice(b'0123456789"[]{},:-!ae')
            elif action == 2:
                del target[at : at + draw.randrange(1, 9)]
            elif action == 3:
                target[at:at] = draw.choice([b"9", b"-", b"0" * 30, b"[]", b'"!"', b"\\ud800"])
            else:
                del target[max(at, 1) :]
        outcomes[survives(bytes(t), bytes(b), limit)] += 1
    assert outcomes[False] > 500 and outcomes[True] > 50


def places(node, path=()):
    """Where every value of a JSON tree is: the keys that lead to it."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        if isinstance(child, (dict, list)):
            yield from places(child, (*path, key))


def test_well_formed_json_with_wrong_values_is_damage_or_a_value(varied, traced):
    draw = random.Random(11)
    text, blob = varied
    limit = 20 * (len(text) + len(blob))
    everywhere = list(places(json.loads(text)))
    outcomes = Counter()
    for _ in range(700):
        tree = json.loads(text)
        *path, key = draw.choice(everywhere)
        node = functools.reduce(lambda inner, step: inner[step], path, tree)
        if draw.random() < 0.2 and isinstance(node, dict):
            del node[key]
        elif draw.random() < 0.2 and key == "!":
            node[key] = draw.choice(
                ["int", "tuple", "set", "dict", "vector", "array", "tensor", "np", "bytes", "range", "Size"]
            )
        else:
            node[key] = draw.choice(HOSTILE)
        outcomes[survives(json.dumps(tree).encode(), blob, limit)] += 1
    assert outcomes[False] > 200 and outcomes[True] > 50


def test_reading_imports_nothing(varied):
    text, blob = varied
    loads(text, blob)
    before = set(sys.modules)
    loads(text, blob)
    for attack in ATTACKS:
        with pytest.raises(DamageError):
            loads(*attack)
    assert set(sys.modules) == before
