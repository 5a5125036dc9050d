# SPDX-License-Identifier: Apache-2.0
"""Values for typed JSON: awkward ones, hostile ones, and what a training has; and when two are the same."""

from __future__ import annotations

import json
import math
import random
import struct
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from layerwise_dist.storage.typed_json import dumps, loads


def form(v):
    """A value as nested tuples that are equal exactly if type, value, bits and (but for sets) order are."""
    kind = type(v)
    if kind is float:
        return kind, struct.pack(">d", v)
    if kind is complex:
        return kind, struct.pack(">dd", v.real, v.imag)
    if kind in (list, tuple, torch.Size):
        return kind, tuple(map(form, v))
    if kind is deque:
        return kind, v.maxlen, tuple(map(form, v))
    if kind in (set, frozenset):
        return kind, tuple(sorted(map(form, v), key=repr))
    if kind in (dict, OrderedDict, Counter):
        return kind, tuple((form(k), form(x)) for k, x in v.items())
    if kind in (Namespace, SimpleNamespace):
        return kind, form(vars(v))
    if kind is defaultdict:
        return kind, v.default_factory, tuple((form(k), form(x)) for k, x in v.items())
    if kind in (slice, range):
        return kind, form(v.start), form(v.stop), form(v.step)
    if kind is np.ndarray or isinstance(v, np.generic):
        return kind, v.dtype.str, v.shape, v.tobytes()
    if kind is torch.Tensor:
        dense, size = v.detach().resolve_conj().resolve_neg().contiguous(), v.dtype.itemsize
        memory = torch.empty(0, dtype=torch.uint8).set_(dense.untyped_storage()).numpy()
        begin = dense.storage_offset() * size
        return kind, v.dtype, v.device, tuple(v.shape), memory[begin : begin + v.numel() * size].tobytes()
    return kind, v


def round_trip(v):
    text, blob = dumps(v)
    text.decode()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")).encode() == text
    return loads(text, memoryview(blob))


EXACT = [
    None, True, 0, -1, 2**63, -(2**63) - 1, 10**6000, 0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan,
    struct.unpack(">d", bytes.fromhex("fff4000000000123"))[0], complex(-0.0, math.nan), "", "\ud800\udc00", "\udc00",
    "\x00\u2028é",
    b"", b"\x00" * 65, bytearray(b"a"), [], (), ((),), {}, {"!": 1}, {"!": {"!": "tuple", "v": []}}, {"\ud800": 1},
    {"": 0},
    {1: "a", "1": "b", True + 1: "c", 0.5: 1, None: 2, (1, (b"x", "y")): 3, frozenset({1, frozenset()}): 4,
    range(3): 5},
    {math.nan: 1, -0.0: 2}, {math.nan, 1}, set(), frozenset(), OrderedDict(b=1, a=2), Counter({30: 2, "x": -1}),
    Namespace(), Namespace(lr=0.1, names=("a",), more=SimpleNamespace(x={1: 2})), SimpleNamespace(y=[1.0]),
    defaultdict(None, {1: 2}), defaultdict(list, a=[1]), deque(), deque([1, 2], 2), deque(maxlen=0), slice(None),
    slice(1, (2,), "x"),
    range(0), range(5, -(2**80), -3), list(range(65)), tuple(range(65)), [True] * 65, [1] * 65 + [2**63],
    [1.0] * 65 + [1],
    [math.nan, -0.0] * 40, np.float64(1.5), np.bool_(True), np.datetime64("NaT"), np.datetime64("2026-01-01T00:00",
    "ns"),
    np.longdouble("1.1"), np.array(3, ">i2"), np.zeros((0, 3)), np.array(["añ", ""]), np.array([b"a\0b"]),
    np.asfortranarray(np.eye(3)),
    torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0, 3), torch.Size([]), torch.Size([2, 0]),
    torch.device("cuda", 1),
    torch.float8_e4m3fn, torch.quint8, torch.arange(6).reshape(2, 3).T, torch.tensor([1 + 2j]).conj(),
    torch.tensor([1 + 2j]).conj().imag, torch.ones(1).expand(3), torch.arange(3.0)[1::2],
    torch.zeros(0)[::2], torch.ones(3, 1)[::3].T, np.arange(3.0)[1::2], np.ones((3, 1))[::3].T, np.zeros(0)[::2],
]  # fmt: skip

HOSTILE = [-1, 0, 1, 2, 3, 2**31, 2**62, 2**63, 10**40, 1.5, "", "x", "<f8", "|O8", "float32", None, True, [], {},
[[]], [1, 2], [[1, 2]],
           [{}, {}], [2**62, 2**62], {"!": "bytes", "offset": 0, "bytes": 9}, {"!": "tuple", "v": [1]}, {"!": "set",
           "v": [[]]}]  # fmt: skip


def new_optimizer():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    for p in parameters:
        p.grad = torch.full_like(p, 0.01)
    return torch.optim.SGD([{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.05}], lr=0.1, momentum=0.9)


def rng_state():
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.RandomState(1).get_state(),
        "generator": np.random.default_rng(1).bit_generator.state,
        "python": random.Random(1).getstate(),
    }


def typical_state():
    scheduler = lr_scheduler.MultiStepLR(new_optimizer(), [30, 60, 90])
    return {"scheduler": scheduler.state_dict(), "rng": {k: v for k, v in rng_state().items() if k != "generator"}}
