# SPDX-License-Identifier: Apache-2.0
"""How far two tensors differ: in how many elements, by how much, and by how many ULPs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool}


@dataclass(frozen=True, slots=True)
class Difference:
    """Of elements whose bits differ.

    `max_abs`: the largest difference of their values; infinite where one of two is. `max_ulps`: how many values of the
    dtype lie between two at most, plus one; 0 for zeros that differ in their sign; None where the dtype is no floating
    one. `nans`: of these elements, those where at least one is no number; they count in neither.
    """

    elements: int = 0
    max_abs: float | int = 0
    max_ulps: int | None = None
    nans: int = 0

    def __add__(self, other: Difference) -> Difference:
        ulps = [each for each in (self.max_ulps, other.max_ulps) if each is not None]
        return Difference(
            self.elements + other.elements, max(self.max_abs, other.max_abs), max(ulps, default=None),
            self.nans + other.nans,
        )  # fmt: skip


def difference(one: torch.Tensor, other: torch.Tensor) -> Difference:
    """REQUIRES: both of one dtype and one length, in one dimension, contiguous, on the host."""
    dtype = one.dtype
    if dtype.is_complex:
        return _of_complex(one, other)
    ints, others = (each.view(_INTS[dtype.itemsize]).numpy() for each in (one, other))
    differ = np.flatnonzero(ints != others)
    if not differ.size:
        return Difference(max_ulps=0 if dtype.is_floating_point else None)
    left, right = ints[differ], others[differ]
    if not dtype.is_floating_point:
        if dtype in _UNSIGNED:
            left, right = (each.view(f"u{dtype.itemsize}") for each in (left, right))
        return Difference(differ.size, _apart(left, right))
    values, theirs = (torch.from_numpy(each).view(dtype).to(torch.float64).numpy() for each in (left, right))
    numbers = ~(np.isnan(values) | np.isnan(theirs))
    nans = differ.size - int(numbers.sum())
    if nans == differ.size:
        return Difference(nans, 0.0, 0, nans)
    with np.errstate(invalid="ignore", over="ignore"):  # unequal infinities are infinitely far apart
        far = float(np.max(np.abs(values[numbers] - theirs[numbers])))
    return Difference(differ.size, far, _apart(_ordered(left[numbers]), _ordered(right[numbers])), nans)


def _of_complex(one: torch.Tensor, other: torch.Tensor) -> Difference:
    """By their real and imaginary parts; `max_abs` is of one of these."""
    parts, others = (torch.view_as_real(each) for each in (one, other))
    found = difference(parts.reshape(-1), others.reshape(-1))
    ints, theirs = (each.contiguous().view(torch.int32).numpy() for each in (parts, others))
    nans = parts.isnan().any(-1) | others.isnan().any(-1)
    differ = (ints != theirs).any(-1)
    return Difference(
        int(differ.sum()), found.max_abs, found.max_ulps, int((nans.numpy() & differ).sum())
    )  # fmt: skip


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Integers in the order of the floating-point numbers that have these bits, next to each other where those are."""
    wide = bits.astype(np.int64)
    least = int(np.iinfo(bits.dtype).min)
    return np.where(wide < 0, least - wide, wide)


def _apart(left: np.ndarray, right: np.ndarray) -> int:
    """The largest difference, exact: of 64 bits too, whose difference may need all of them and no sign."""
    wide = np.uint64 if left.dtype.kind == "u" else np.int64
    left, right = left.astype(wide), right.astype(wide)
    high, low = np.maximum(left, right), np.minimum(left, right)
    return int(np.max(high.view(np.uint64) - low.view(np.uint64)))


def count_odd(values: torch.Tensor) -> tuple[int, int]:
    """How many elements are NaN, and how many infinite."""
    dtype = values.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0, 0
    if dtype.itemsize == 1:  # torch asks neither of these
        values = values.to(torch.float32)
    return int(values.isnan().sum()), int(values.isinf().sum())
