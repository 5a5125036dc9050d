# SPDX-License-Identifier: Apache-2.0
"""Typed JSON: what goes in comes out, or is refused by name."""

from __future__ import annotations

import collections
import enum
import functools
import inspect
import json
import struct
import sys
import warnings
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kit.typed_values import EXACT, form, round_trip

from layerwise_dist.errors import DamageError, StateError
from layerwise_dist.storage import strict_json
from layerwise_dist.storage.strict_json import COLLIDING
from layerwise_dist.storage.typed_json import dumps, loads, prepare
from layerwise_dist.storage.typed_json_types import DENSE, MAX_DEPTH

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("value", EXACT, ids=lambda v: type(v).__name__)
def test_the_awkward_values_come_back(value):
    assert form(round_trip(value)) == form(value)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_tensors_of_every_dense_dtype_come_back_with_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = torch.arange(64, dtype=torch.uint8).view(DENSE[name])
        for shaped in (tensor, tensor[0], tensor[:0]):
            assert form(round_trip(shaped)) == form(shaped)
        strided = round_trip(tensor[1::2])
        assert all(form(one) == form(tensor[2 * i + 1]) for i, one in enumerate(strided)) and len(strided)


def test_a_plain_dict_is_plain_json_and_contents_are_aligned():
    text, blob = dumps({"a": [1, -0.0, None, "é"], "b": {"c": True}})
    assert (text.decode(), blob) == ('{"a":[1,-0.0,null,"é"],"b":{"c":true}}', b"")
    text, blob = dumps([b"xy", (torch.ones(2),), b""])
    first, nested, empty = json.loads(text)
    assert first == {"!": "bytes", "offset": 0, "bytes": 2}
    assert nested["v"][0] == {"!": "tensor", "dtype": "float32", "shape": [2], "offset": 64, "bytes": 8}
    assert empty == {"!": "bytes", "offset": 0, "bytes": 0}
    assert blob == b"xy" + bytes(62) + struct.pack("<2f", 1, 1)


def test_nothing_aliases_live_memory_or_the_blob():
    live = {"t": torch.zeros(4), "a": np.zeros(4), "b": bytearray(4)}
    text, blob = dumps(live)
    live["t"] += 1
    live["a"] += 1
    live["b"][:] = b"1111"
    assert not any(blob)
    buffer = bytearray(blob)
    back = loads(text, buffer)
    buffer[:] = b"\xff" * len(buffer)
    assert not back["t"].any() and not back["a"].any() and not any(back["b"])
    back["t"] += 1
    back["a"] += 1


def test_parameters_and_gradients_flags_come_back_as_plain_tensors():
    back = round_trip(
        [torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True) * 2, torch.nn.Buffer(torch.ones(1))]
    )
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in back)


class Plain:
    pass


class Stateful:
    def state_dict(self):
        return {}


class Mine(dict):
    pass


class BadRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


Point = collections.namedtuple("Point", "x y")
Color = enum.IntEnum("Color", "RED")


def cyclic():
    loop = [1]
    loop.append({"a": (loop,)})
    return loop


def dtensor():
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        return distribute_tensor(torch.ones(2), distributed.init_device_mesh("cpu", (1,)), [Replicate()])
    finally:
        distributed.destroy_process_group()


def tensor_of_a_vmap():
    """A tensor that has no memory of its own: it stands for a row of another one while a function is mapped."""
    inside = []
    torch.func.vmap(lambda row: (inside.append(row), row)[1])(torch.ones(2, 3))
    return inside[0]


def odd_namespace():
    found = SimpleNamespace()
    vars(found)[1] = 2
    return found


def colliding(count):
    """So many ints with one hash: it is what is left by division by this prime."""
    return [number * (2**61 - 1) for number in range(1, count + 1)]


def nested_lists(depth):
    return functools.reduce(lambda inner, _: [inner], range(depth), 0)


REFUSED = [
    (lambda: {"lr_lambdas": [lambda e: 1]}, "['lr_lambdas'][0]", "function is code"),
    (lambda: {"a": (1, [Plain()])}, "['a'][1][0]", "Plain is an object: give its data"),
    (lambda: [Stateful()], "[0]", r"give its state_dict\(\)"),
    (lambda: [torch.Generator()], "[0]", r"give its get_state\(\)"),
    (lambda: {1: int}, "[1]", "is code"),
    (lambda: {"m": Mine()}, "['m']", "a subclass of dict"),
    (lambda: {"p": Point(1, 2)}, "['p']", r"a namedtuple: give a dict"),
    (lambda: [torch.ones(2).max(0)], "[0]", "a namedtuple"),
    (lambda: deque([Color.RED]), "[0]", "an enum member"),
    (lambda: {Color.RED: 1}, " (key <Color.RED: 1>)", "an enum member"),
    (lambda: [{Plain}], "[0] (element <class", "is code"),
    (lambda: {"x": {(1, BadRepr()): 2}}, "['x'] (key <tuple>)[1]", "BadRepr is an object"),
    (lambda: {torch.ones(1): 1}, " (key tensor([1.]))", "found by identity"),
    (lambda: {(0, torch.ones(1))}, " (element (0, tensor([1.])))[1]", "found by identity"),
    (lambda: {"d": defaultdict(lambda: 1)}, "['d']", "factory"),
    (lambda: {"d": defaultdict(tuple)}, "['d']", "factory"),
    (lambda: slice(None, Plain()), "[1]", "Plain"),
    (lambda: {"x": cyclic()}, "['x'][1]['a'][0]", "contains itself"),
    (lambda: nested_lists(MAX_DEPTH + 1), "[0]" * MAX_DEPTH, "more than 100"),
    (lambda: {"t": torch.ones(2, device="meta")}, "['t']", "a meta tensor"),
    (lambda: {"t": torch.eye(2).to_sparse()}, "['t']", "sparse"),
    (lambda: torch.eye(2).to_sparse_csr(), "", "sparse"),
    (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "", "not dense"),
    (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "", "quantized"),
    (lambda: {"w": dtensor()}, "['w']", "a DTensor: give its local tensor"),
    (lambda: torch.ones(2).as_subclass(type("T", (torch.Tensor,), {})), "", "a subclass of Tensor"),
    (lambda: np.array([None]), "", "dtype object"),
    (lambda: np.zeros(2, "i4,f4"), "", "dtype"),
    (lambda: np.ma.array([1, 2]), "", "a subclass of ndarray"),
    (lambda: np.str_("x"), "", "a subclass of str"),
    (lambda: np.zeros(1, "V4")[0], "", "a subclass of generic"),
    (lambda: memoryview(b"x"), "", "memoryview"),
    (tensor_of_a_vmap, "", "this tensor's data cannot be read"),
    (lambda: {"t": torch.empty([1] * 257)}, "['t']", "a tensor of 257 dimensions, of at most 256"),
    (lambda: [odd_namespace()], "[0]", "attributes' names are not strings"),
    (lambda: {"ids": set(colliding(COLLIDING + 1))}, "['ids']", "elements have the same hash, which no reader accepts"),
    (lambda: dict.fromkeys(colliding(COLLIDING + 1)), "", "have the same hash, which no reader accepts"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "path", "message"), REFUSED, ids=[f"{m}-{i}" for i, (_, _, m) in enumerate(REFUSED)])
def test_what_cannot_come_back_is_refused_with_its_path(make, path, message):
    with pytest.raises(StateError, match=message) as caught:
        dumps(make(), path="state['it']")
    assert caught.value.path.startswith("state['it']" + path)
    assert str(caught.value).startswith(caught.value.path + ": ")


def test_a_hundred_containers_deep_is_written_and_read():
    for wrap in (lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: {1: v}, lambda v: deque([v])):
        value = functools.reduce(lambda inner, _, wrap=wrap: wrap(inner), range(MAX_DEPTH), 0)
        assert form(round_trip(value)) == form(value)
    text, blob = dumps(nested_lists(MAX_DEPTH))
    with pytest.raises(DamageError, match="more than 100"):
        loads(b"[" + text + b"]", blob)


def test_what_a_reader_would_not_hold_is_refused_before_it_is_written(monkeypatch):
    monkeypatch.setattr(strict_json, "WEIGHT_CAP", 1 << 12)
    assert round_trip({"a": [1, 2]}) == {"a": [1, 2]}
    with pytest.raises(StateError, match="state: so many lists, dicts and strings that a reader would need about 0 MB"):
        dumps({"a": [[1, "x"]] * 100})


def test_a_value_that_is_too_deep_for_the_stack_that_is_left_is_refused_by_name():
    value = nested_lists(MAX_DEPTH)

    def under(frames):
        return under(frames - 1) if frames else dumps(value, path="state['it']")

    with pytest.raises(StateError, match=r"state\['it'\]"):
        under(sys.getrecursionlimit() - len(inspect.stack()) - MAX_DEPTH // 2)
    assert dumps(value, path="state['it']") == dumps(value)


def test_a_prepared_value_stands_for_itself() -> None:
    order = {"a.weight": ["step", "exp_avg"], 'b"\\': [], "{}": [{"!": 1}, (1, "prepared:"), None]}
    names = ["a", "b"]
    prepared = prepare(order), prepare(names)
    value = {"order": prepared[0], "names": [prepared[1], 1, prepared[1]], "tensor": torch.arange(3)}
    plain = {"order": order, "names": [names, 1, names], "tensor": torch.arange(3)}
    assert dumps(value) == dumps(plain)
    with pytest.raises(ValueError, match="can be prepared"):
        prepare(torch.arange(3))
