# SPDX-License-Identifier: Apache-2.0
"""The random number generators that a training loop draws from without naming them: one snapshot, one way back.

An `RngState` is a plain dict, fit for `storage.typed_json` (tensors, arrays, tuples, ints, strings; no pickle):

    {"torch": ByteTensor of 5056 bytes, the CPU generator,
     "cuda": {device index: ByteTensor}, only when this process has initialized CUDA, otherwise {},
     "numpy": ("MT19937", uint32[624], pos, has_gauss, cached_gaussian), the legacy global generator; absent without
     numpy, "python": random.getstate()}

Generators that somebody made for himself (`torch.Generator`, `numpy.random.default_rng`) belong to their owner: those
of a loader to `loop.loaders`, any other to `state=`. The generators inside loader workers live in other processes.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch

from layerwise_dist.loop.sealed import RngState
from layerwise_dist.tensors.values import alike

try:
    import numpy
except ImportError:  # torch runs without it, and then nothing can draw from it
    numpy = None  # type: ignore[assignment]

_MT19937_WORDS, _PHILOX_WORDS = 624, 4
_MT19937_BYTES = 625 * 4  # uint32 key[624]; int pos


def take() -> RngState:
    """Snapshot the global generators; nothing in it aliases live memory. 48 µs on a CPU, 34 of them numpy's."""
    state: RngState = {"torch": torch.default_generator.get_state(), "cuda": {}, "python": random.getstate()}
    if torch.cuda.is_initialized():
        state["cuda"] = {index: each.get_state() for index, each in enumerate(torch.cuda.default_generators)}
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


class LateRng:
    """The global generators at a boundary. They are taken when somebody asks, since most boundaries save nothing."""

    __slots__ = ("_over", "_state")

    def __init__(self, state: RngState | None = None) -> None:
        """`state`, if they were taken before."""
        self._state, self._over = state, False

    def state(self) -> RngState:
        """REQUIRES: first asked for before the boundary is over; after it the loop draws."""
        if self._state is None:
            if self._over:
                raise RuntimeError("the random numbers of a boundary, which nobody asked for before it was over")
            self._state = take()
        return self._state

    def over(self) -> None:
        """The loop goes on."""
        self._over = True


def put(state: RngState) -> None:
    """Set the global generators to `state`, which stays as it is and may be put again.

    A CUDA device of the snapshot that this process does not see is passed over: another device layout draws other
    numbers whatever is set here, and the caller has compared layouts already.
    """
    torch.default_generator.set_state(state["torch"])
    random.setstate(_python_state(state["python"]))
    if numpy is not None and "numpy" in state:
        numpy.random.set_state(state["numpy"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.init()
        for index, each in state["cuda"].items():
            if index < len(torch.cuda.default_generators):
                torch.cuda.default_generators[index].set_state(each)


def derived(state: RngState, step: int, rank: int) -> RngState:
    """Generators of a rank that a checkpoint has not: seeded by those of one that it has, the step and the rank.

    CUDA's stay as the process has made them.
    """
    told = state["torch"].numpy().tobytes()
    found: RngState = {
        "torch": torch.Generator().manual_seed(seed_of(told, "torch", step, rank)).get_state(),
        "cuda": {},
        "python": random.Random(seed_of(told, "python", step, rank)).getstate(),
    }
    if numpy is not None:
        found["numpy"] = numpy.random.RandomState(seed_of(told, "numpy", step, rank) >> 31).get_state()
    return found


def derived_generator(generator: Any, saved: Any, step: int, rank: int) -> Any:
    """The same of a generator of somebody's own: what takes the place of `saved`, the state of one of its kind."""
    told = saved.numpy().tobytes() if isinstance(saved, torch.Tensor) else repr(saved).encode()
    seed = seed_of(told, step, rank)
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device).manual_seed(seed).get_state()
    if isinstance(generator, random.Random):
        return random.Random(seed).getstate()
    if isinstance(generator, numpy.random.RandomState):
        return numpy.random.RandomState(seed >> 31).get_state()
    return type(generator.bit_generator)(seed).state


def seed_of(told: bytes, *salt: int | str) -> int:
    """63 bits, which both decide: the seed of a generator that follows from the state of another one."""
    return int.from_bytes(hashlib.sha256(told + repr(salt).encode()).digest()[:8], "little") >> 1


def problems(state: Mapping[str, Any]) -> dict[str, str]:
    """Of each generator that can't be set to its part of `state`, why. Tried on generators of its own: the global ones
    stay as they are.
    """
    found = {
        "torch": refused(lambda: torch.Generator().set_state(state["torch"])),
        "python": refused(lambda: random.Random(0).setstate(_python_state(state["python"]))),
        "numpy": numpy_refuses(state["numpy"]) if numpy is not None and "numpy" in state else None,
    }
    if any(each.dtype != torch.uint8 or each.dim() != 1 for each in state["cuda"].values()):
        found["cuda"] = "expected bytes"
    return {name: problem for name, problem in found.items() if problem}


def refused(action: Callable[[], Any]) -> str | None:
    """What a library says against a state that is tried on a generator which nobody uses, if anything."""
    try:
        action()
    except Exception as error:  # of three libraries, each with its own
        return f"{type(error).__name__}: {error}"
    return None


def numpy_refuses(state: Any, kind: str | None = None) -> str | None:
    """Why numpy does not take this state, if so: of a legacy generator, or of a bit generator of `kind`.

    It looks for a bit generator under the name that the state has, and does not check all places within their arrays.
    """
    name = state.get("bit_generator") if type(state) is dict else state[0] if type(state) is tuple and state else None
    known = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
    if kind is not None and name == kind and kind not in known:
        return None  # of another package, which alone can try it
    if type(name) is not str or name not in known or kind not in (None, name):
        return f"its bit generator is {ascii(name)[:100]}, expected {kind or ' or '.join(known)}"
    within = state.get("state") if type(state) is dict else {"pos": state[2] if len(state) > 2 else None}
    places = {"pos": _MT19937_WORDS, "buffer_pos": _PHILOX_WORDS}
    for held in (state if type(state) is dict else {}, within if type(within) is dict else {}):
        for place, last in places.items():
            if place in held and not (isinstance(held[place], int) and 0 <= held[place] <= last):
                return f"{place} is not 0 to {last}"
    bits = getattr(numpy.random, name)(0)
    if kind is None:
        return refused(lambda: numpy.random.RandomState(bits).set_state(state))
    return refused(lambda: setattr(bits, "state", state))


def same(one: RngState, other: RngState) -> bool:
    """Would both snapshots give the same numbers from here on? CUDA states count where both have them."""
    if one["python"] != other["python"] or not torch.equal(one["torch"], other["torch"]):
        return False
    if ("numpy" in one) != ("numpy" in other):
        return False
    if "numpy" in one:
        mine, yours = one["numpy"], other["numpy"]
        if isinstance(mine, dict) or isinstance(yours, dict):  # of another bit generator than numpy's first
            if not alike(mine, yours):
                return False
        elif mine[2:] != yours[2:] or not numpy.array_equal(mine[1], yours[1]):
            return False
    return all(
        torch.equal(one["cuda"][index], other["cuda"][index]) for index in one["cuda"].keys() & other["cuda"].keys()
    )


def _python_state(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """`random.setstate` takes tuples only, and storage may hand a sequence of the same values back."""
    version, internal, gauss = state
    return version, tuple(internal), gauss


def glance() -> tuple[Any, ...]:
    """Something cheap (19 µs) to compare by ==: did anything draw from the global generators between two glances?

    It misses one case: a legacy numpy normal that was computed along with the one before it.
    """
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    seen = [each.get_state().numpy().tobytes() for each in (torch.default_generator, *cuda)]
    if numpy is not None:
        bits = numpy.random.get_bit_generator()  # type: ignore[attr-defined]
        if isinstance(bits, numpy.random.MT19937):
            seen.append(ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES))
        else:
            seen.append(repr(bits.state).encode())
    return random.getstate(), *seen
