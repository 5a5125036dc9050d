"""Typed JSON: what goes in comes out, or is refused by name; and no damage does more than raise DamageError."""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import inspect
import json
import math
import random
import struct
import sys
import time
import tracemalloc
import warnings
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.optim import lr_scheduler, swa_utils

from layerwise_dist.errors import DamageError, StateError
from layerwise_dist.storage.typed_json import dumps, loads, prepare
from layerwise_dist.storage.typed_json_types import DENSE, MAX_DEPTH, TORCH_DTYPES

# ----------------------------------------------------------------------------------------------- equal in type and bits


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


# ----------------------------------------------------------------------------------------------------------- strategies

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


@LIGHT
@given(values)
def test_every_supported_value_comes_back_with_its_type_and_bits(value):
    assert form(round_trip(value)) == form(value)


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


# ------------------------------------------------------------------------------------------------------------- refusals


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


# ----------------------------------------------------------------------------------------------- schedulers and scalers


class Warmup:
    """A callable object: torch puts its __dict__ into the scheduler's state."""

    def __init__(self, steps):
        self.steps, self.history = steps, (1, {2: 0.5})

    def __call__(self, epoch):
        return min(1.0, (epoch + 1) / self.steps)


L = lr_scheduler
SCHEDULERS = {
    "LambdaLR": [lambda o: L.LambdaLR(o, lambda e: 0.9**e), lambda o: L.LambdaLR(o, [Warmup(5), Warmup(9)])],
    "MultiplicativeLR": [lambda o: L.MultiplicativeLR(o, lambda e: 0.95), lambda o: L.MultiplicativeLR(o, Warmup(30))],
    "StepLR": [lambda o: L.StepLR(o, 3), lambda o: L.StepLR(o, 7, gamma=0.3)],
    "MultiStepLR": [
        lambda o: L.MultiStepLR(o, [5, 10, 10, 30]),
        lambda o: L.MultiStepLR(o, range(2, 60, 3), gamma=0.9),
    ],
    "ConstantLR": [lambda o: L.ConstantLR(o), lambda o: L.ConstantLR(o, 0.1, 20)],
    "LinearLR": [lambda o: L.LinearLR(o), lambda o: L.LinearLR(o, 0.01, 0.7, 33)],
    "ExponentialLR": [lambda o: L.ExponentialLR(o, 0.93)],
    "PolynomialLR": [lambda o: L.PolynomialLR(o), lambda o: L.PolynomialLR(o, 40, 2.5)],
    "CosineAnnealingLR": [lambda o: L.CosineAnnealingLR(o, 11), lambda o: L.CosineAnnealingLR(o, 100, 1e-4)],
    "CosineAnnealingWarmRestarts": [
        lambda o: L.CosineAnnealingWarmRestarts(o, 7),
        lambda o: L.CosineAnnealingWarmRestarts(o, 4, 2, 1e-5),
    ],
    "OneCycleLR": [
        lambda o: L.OneCycleLR(o, 0.3, total_steps=90),
        lambda o: L.OneCycleLR(o, [0.3, 0.1], epochs=9, steps_per_epoch=10, anneal_strategy="linear", three_phase=True),
    ],
    "CyclicLR": [
        lambda o: L.CyclicLR(o, 1e-3, 0.1, step_size_up=6),
        lambda o: L.CyclicLR(o, [1e-3, 1e-4], 0.1, 4, 9, mode="exp_range", gamma=0.99),
        lambda o: L.CyclicLR(o, 1e-3, 0.1, 5, scale_fn=lambda x: 0.5, cycle_momentum=False),
        lambda o: L.CyclicLR(o, 1e-3, 0.1, 5, scale_fn=Warmup(8), scale_mode="iterations"),
    ],
    "SequentialLR": [
        lambda o: L.SequentialLR(o, [L.ConstantLR(o), L.MultiStepLR(o, [4, 12]), L.StepLR(o, 2)], [3, 20])
    ],
    "ChainedScheduler": [
        lambda o: L.ChainedScheduler([L.LinearLR(o), L.LambdaLR(o, Warmup(40)), L.ExponentialLR(o, 0.9)], o)
    ],
    "ReduceLROnPlateau": [
        lambda o: L.ReduceLROnPlateau(o, patience=2, cooldown=1),
        lambda o: L.ReduceLROnPlateau(o, "max", 0.5, 3, threshold_mode="abs", min_lr=[1e-3, 1e-4]),
    ],
    "SWALR": [
        lambda o: swa_utils.SWALR(o, 0.01),
        lambda o: swa_utils.SWALR(o, [0.01, 0.2], anneal_epochs=25, anneal_strategy="linear"),
    ],
}
CASES = [pytest.param(make, steps, id=f"{name}-{i}-{steps}")
         for name, makes in SCHEDULERS.items() for i, make in enumerate(makes) for steps in (0, 9)]  # fmt: skip


def new_optimizer():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    for p in parameters:
        p.grad = torch.full_like(p, 0.01)
    return torch.optim.SGD([{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.05}], lr=0.1, momentum=0.9)


def advance(optimizer, scheduler, begin, count):
    """Learning rates and momenta of steps begin .. begin + count - 1."""
    rates = []
    for step in range(begin, begin + count):
        optimizer.step()
        if isinstance(scheduler, L.ReduceLROnPlateau):
            scheduler.step(math.sin(step) + 2 / (step + 1))
        else:
            scheduler.step()
        rates.append([(float(g["lr"]).hex(), float(g["momentum"]).hex()) for g in optimizer.param_groups])
    return rates


def test_every_scheduler_of_torch_is_in_the_table():
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, L.LRScheduler) and kind not in (L.LRScheduler, L._LRScheduler)
    }
    assert found == set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "steps"), CASES)
def test_a_scheduler_goes_on_bit_for_bit(make, steps):
    optimizer = new_optimizer()
    scheduler = make(optimizer)
    advance(optimizer, scheduler, 0, steps)
    text, blob = dumps({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    expected = advance(optimizer, scheduler, steps, 50)

    optimizer = new_optimizer()
    scheduler = make(optimizer)
    state = loads(text, blob)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert advance(optimizer, scheduler, steps, 50) == expected
    assert steps or len(set(map(str, expected))) > 1


def test_functions_inside_a_schedulers_state_are_refused_with_their_path():
    """torch leaves a plain function out of the state, but puts the __dict__ of a callable object in."""
    shaped = Warmup(5)
    shaped.shape = math.sqrt
    scheduler = L.LambdaLR(new_optimizer(), [lambda e: 1.0, shaped])
    with pytest.raises(StateError) as caught:
        dumps({"scheduler": scheduler.state_dict()})
    assert caught.value.path == "state['scheduler']['lr_lambdas'][1]['shape']"


@pytest.mark.filterwarnings("ignore")
def test_through_plain_json_a_multistep_rate_never_drops():
    optimizer = new_optimizer()
    state = L.MultiStepLR(optimizer, [5, 10]).state_dict()

    def last_rate(loaded):
        optimizer = new_optimizer()
        scheduler = L.MultiStepLR(optimizer, [5, 10])
        scheduler.load_state_dict(loaded)
        advance(optimizer, scheduler, 0, 20)
        return optimizer.param_groups[0]["lr"]

    assert last_rate(json.loads(json.dumps(state))) == 0.1
    assert last_rate(round_trip(state)) == pytest.approx(0.001)
    assert type(round_trip(state)["milestones"]) is Counter


def test_a_plateau_that_has_seen_nothing_keeps_its_infinity():
    state = L.ReduceLROnPlateau(new_optimizer()).state_dict()
    assert state["best"] == math.inf
    assert form(round_trip(state)) == form(state)


def test_a_grad_scaler_goes_on():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    optimizer = new_optimizer()
    for bad in (False, False, False, True, False):
        for group in optimizer.param_groups:
            group["params"][0].grad = scaler.scale(torch.full_like(group["params"][0], math.inf if bad else 1.0))
        scaler.step(optimizer)
        scaler.update()
    state = scaler.state_dict()
    fresh = torch.amp.GradScaler("cpu")
    fresh.load_state_dict(round_trip(state))
    assert form(fresh.state_dict()) == form(state)
    assert state["scale"] == 2.0**10 and state["_growth_tracker"] == 1


def rng_state():
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.RandomState(1).get_state(),
        "generator": np.random.default_rng(1).bit_generator.state,
        "python": random.Random(1).getstate(),
    }


def test_random_generators_go_on():
    back = round_trip(rng_state())
    assert form(back) == form(rng_state())
    python, numpy, generator, torch_one = (
        random.Random(),
        np.random.RandomState(),
        np.random.default_rng(),
        torch.Generator(),
    )
    python.setstate(back["python"])
    numpy.set_state(back["numpy"])
    generator.bit_generator.state = back["generator"]
    torch_one.set_state(back["torch"])
    assert python.random() == random.Random(1).random()
    assert numpy.rand() == np.random.RandomState(1).rand()
    assert generator.random() == np.random.default_rng(1).random()


def typical_state():
    scheduler = L.MultiStepLR(new_optimizer(), [30, 60, 90])
    return {"scheduler": scheduler.state_dict(), "rng": {k: v for k, v in rng_state().items() if k != "generator"}}


# -------------------------------------------------------------------------------------------------------- hostile input


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
]  # fmt: skip


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


HOSTILE = [-1, 0, 1, 2, 3, 2**31, 2**62, 2**63, 10**40, 1.5, "", "x", "<f8", "|O8", "float32", None, True, [], {},
[[]], [1, 2], [[1, 2]],
           [{}, {}], [2**62, 2**62], {"!": "bytes", "offset": 0, "bytes": 9}, {"!": "tuple", "v": [1]}, {"!": "set",
           "v": [[]]}]  # fmt: skip


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


@settings(LIGHT, max_examples=150)
@given(st.recursive(
    st.sampled_from(HOSTILE) | ints.filter(lambda n: abs(n) < 10**4000) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["!", "v", "of", "max", "type", "index", "dtype", "shape", "offset", "bytes", "a"]),
        inner | st.sampled_from(["tuple", "set", "dict", "array", "tensor", "vector", "deque", "slice", "np",
        "device"]), max_size=5),
    max_leaves=20), st.binary(max_size=80))  # fmt: skip
def test_any_json_is_damage_or_a_value(tree, blob):
    with contextlib.suppress(DamageError):
        loads(json.dumps(tree).encode(), blob)


def test_reading_imports_nothing(varied):
    text, blob = varied
    loads(text, blob)
    before = set(sys.modules)
    loads(text, blob)
    for attack in ATTACKS:
        with pytest.raises(DamageError):
            loads(*attack)
    assert set(sys.modules) == before


def test_a_prepared_value_stands_for_itself() -> None:
    order = {"a.weight": ["step", "exp_avg"], 'b"\\': [], "{}": [{"!": 1}, (1, "prepared:"), None]}
    names = ["a", "b"]
    prepared = prepare(order), prepare(names)
    value = {"order": prepared[0], "names": [prepared[1], 1, prepared[1]], "tensor": torch.arange(3)}
    plain = {"order": order, "names": [names, 1, names], "tensor": torch.arange(3)}
    assert dumps(value) == dumps(plain)
    with pytest.raises(ValueError, match="can be prepared"):
        prepare(torch.arange(3))
