# SPDX-License-Identifier: Apache-2.0
"""Values for typed JSON that hypothesis draws. Apart from the others: it takes seconds to import."""

from __future__ import annotations

import math
import struct
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, settings

from layerwise_dist.storage.typed_json_types import DENSE, TORCH_DTYPES

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
