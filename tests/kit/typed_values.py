# SPDX-License-Identifier: Apache-2.0
"""Values for typed JSON: drawn ones, awkward ones, and what a training has; and when two are the same."""

from __future__ import annotations

import json
import math
import random
import struct
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.optim import lr_scheduler

from layerwise_dist.storage.typed_json import dumps, loads
from layerwise_dist.storage.typed_json_types import DENSE, TORCH_DTYPES


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


NP_WIDE = ["i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
NP_PLAIN = ["|b1", "|i1", "|u1"] + [o + k for o in "<>" for k in NP_WIDE]
UNITS = ["", "[Y]", "[M]", "[W]", "[D]", "[h]", "[m]", "[s]", "[25s]", "[ms]", "[us]", "[ns]", "[ps]", "[fs]", "[as]"]
NP_DATES = [f"{o}{k}8{u}" for o in "<>" for k in "mM" for u in UNITS]
SHAPES = st.lists(st.integers(0, 3), max_size=3)
DEVICES = ["cpu", "cuda", "cuda:0", "cuda:127", "meta", "xpu:3", "mps", "hpu", "mtia:1", "xla:2", "privateuseone:1"]

texts = st.text(st.characters(), max_size=8) | st.text('a!\x00"\\\ud800\udc00\U0001f600', max_size=4)
floats = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", n.to_bytes(8, "big"))[0]) | st.floats()
ints = st.integers() | st.integers(-(2**70), 2**70) | st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1])


@st.composite
def np_arrays(draw):
    dtype = np.dtype(draw(st.sampled_from([*NP_PLAIN, *NP_DATES, "<U3", ">U2", "|S4", np.longdouble, np.clongdouble])))
    shape = draw(SHAPES)
    count = math.prod(shape) * dtype.itemsize
    if dtype.kind == "U":
        return np.full(shape, draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=3)), dtype)
    made = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), dtype).reshape(shape)
    return made[..., ::-1] if shape and draw(st.booleans()) else made.T


@st.composite
def np_scalars(draw):
    dtype = np.dtype(draw(st.sampled_from(NP_PLAIN + NP_DATES)))
    if dtype.kind == "b":
        return np.bool_(draw(st.booleans()))
    return np.frombuffer(draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)), dtype)[0]


@st.composite
def tensors(draw):
    name, shape = draw(st.sampled_from(sorted(DENSE))), draw(SHAPES)
    count = math.prod(shape) * DENSE[name].itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    return torch.tensor(list(data), dtype=torch.uint8).view(DENSE[name]).reshape(shape)


scalars = st.one_of(
    st.none(), st.booleans(), ints, floats, st.complex_numbers(), texts, st.binary(max_size=70), np_scalars(),
    st.builds(range, ints, ints, ints.filter(bool)), st.sampled_from(sorted(TORCH_DTYPES.values(), key=str)),
    st.sampled_from(DEVICES).map(torch.device), st.lists(st.integers(0, 2**63 - 1), max_size=3).map(torch.Size),
)  # fmt: skip


def is_hashable(v):
    try:
        hash(v)
    except (TypeError, ValueError):  # numpy refuses to hash a timedelta without a unit; slices are hashable from 3.12
        return False
    return True


keys = st.recursive(
    scalars.filter(is_hashable),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
leaves = scalars | st.binary(max_size=9).map(bytearray) | np_arrays() | tensors()
leaves |= st.lists(st.integers(-(2**63), 2**63 - 1), min_size=63, max_size=67)
leaves |= st.lists(floats, min_size=65, max_size=67).map(tuple) | st.sets(keys, max_size=4) | keys


def namespace(held):
    made = Namespace()
    vars(made).update(held)
    return made


def containers(inner):
    few = st.lists(inner, max_size=4)
    mappings = st.dictionaries(keys, inner, max_size=4)
    return st.one_of(
        few, few.map(tuple), st.dictionaries(texts, inner, max_size=4), mappings, mappings.map(OrderedDict),
        mappings.map(Counter),
        st.dictionaries(texts, inner, max_size=4).map(namespace), st.builds(slice, inner, inner, inner),
        st.builds(deque, few, st.none() | st.integers(4,
        9)),
        st.builds(defaultdict, st.sampled_from([None, int, list, dict, float, set, str]), mappings),
    )  # fmt: skip


values = st.recursive(leaves, containers, max_leaves=12)
LIGHT = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck), derandomize=True)

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
