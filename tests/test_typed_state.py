# SPDX-License-Identifier: Apache-2.0
"""Typed JSON of what a training has: schedulers, scalers and random generators go on bit for bit."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from kit.typed_values import form, new_optimizer, rng_state, round_trip
from torch.optim import lr_scheduler, swa_utils

from layerwise_dist.errors import StateError
from layerwise_dist.storage.typed_json import dumps, loads

pytestmark = pytest.mark.quick


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
    if "anneal_func" in scheduler.state_dict():  # SWALR of torch 2.9
        with pytest.raises(StateError, match=r"\['anneal_func'\]: function is code"):
            dumps({"scheduler": scheduler.state_dict()})
        return
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
