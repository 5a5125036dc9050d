# SPDX-License-Identifier: Apache-2.0
"""Version counters of many tensors, and what says where and what their elements are, in a tenth of the time that asking
torch takes.

After a training step nothing of a tensor is in the cache. One that is asked in Python waits for memory some ten times,
one after the other, and a checkpoint asks hundreds of them several times. The native core reads the same words with
many of these waits at once.

Torch has no call for that. Where the words are is found out once in each process, with tensors of known versions and
places, and tried with others. Where they are not as expected torch is asked as ever, which says the same.
"""

from __future__ import annotations

import array
import ctypes
import functools
import logging
import operator
from collections.abc import Sequence
from typing import TypeVar

import torch

from layerwise_dist import _native

log = logging.getLogger("layerwise_dist")

_T = TypeVar("_T")

NO_VERSION = (1 << 64) - 1  # which no counter has: they have 32 bits
_VERSION = operator.attrgetter("_version")
_WORD = ctypes.sizeof(ctypes.c_size_t)
# So much is looked at of torch's own tensor, of a storage, and of what a counter is in; they have that much or more.
_IMPL_BYTES = 160
_STORAGE_BYTES = 64
_COUNTER_BYTES = 24
_REFERENCES = _WORD  # what counts the holders comes after the virtual table
# All that says where a tensor's elements are, its dtype and dispatch keys last, is in so many bytes, or in so many.
_INSIDE = (176, 184)
# Shape and strides of so many dimensions are in the tensor itself; those of more are elsewhere.
INSIDE_DIMS = 5


def versions(tensors: list[torch.Tensor]) -> array.array[int]:
    """The version counter of each. Raises RuntimeError for one that has none (an inference tensor)."""
    words = _words()
    found = words.versions(tensors) if words is not None else None
    if found is None:
        return array.array("Q", map(_VERSION, tensors))
    return array.array("Q", found)


class Insides:
    """What of these tensors says where their elements are, and how they are read, when this was made: address, shape,
    strides, dtype, whether negated or conjugated. Keeps no tensor alive.
    """

    __slots__ = ("_known",)

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        """REQUIRES: all are strided."""
        words = _words() if all(tensor.dim() <= INSIDE_DIMS for tensor in tensors) else None
        self._known = words.insides(tensors) if words is not None else None

    def are_of(self, tensors: list[torch.Tensor]) -> bool:
        """Whether nothing of that is another for these. False says nothing: then torch is to be asked."""
        words = _words()
        return words is not None and self._known is not None and words.have_insides(tensors, self._known)


@functools.cache
def _words() -> _native.TensorWords | None:
    words = _find()
    if words is None:
        log.info("torch %s keeps version counters in an unknown place: it is asked for them, which takes longer",
                 torch.__version__)  # fmt: skip
    return words


def _find() -> _native.TensorWords | None:
    """What reads them; None if the words are not where they should be, or not alone in having these values."""
    with torch.inference_mode(False), torch.no_grad():
        made = [_made(version, first) for version, first in ((3, 5), (7, 11), (13, 2), (40, 29))]
        impls: list[int] = [tensor._cdata for tensor in made]
        storages = [tensor.untyped_storage() for tensor in made]
        impl = _with([*map(id, made)], impls, torch.Tensor.__basicsize__)
        counter = _counter(impls, [*map(_VERSION, made)])
        storage = _with(impls, [each._cdata for each in storages], _IMPL_BYTES)
        # What Python owns: of what torch allocates, the word beside tells the same address.
        storages.append(torch.frombuffer(bytearray(64), dtype=torch.uint8).untyped_storage())
        address = _with([each._cdata for each in storages], [each.data_ptr() for each in storages], _STORAGE_BYTES)
        if impl is None or counter is None or storage is None or address is None:
            return None
        for inside in _INSIDE:
            words = _native.TensorWords(
                torch.Tensor, impl=impl, counter=counter[0], version=counter[1], storage=storage, address=address,
                references=_REFERENCES, inside=inside,
            )  # fmt: skip
            if _try_out(words):
                return words
        return None


def _counter(impls: Sequence[int], versions: Sequence[int]) -> tuple[int, int] | None:
    """The offset of what leads to each tensor's counter, and of the version there."""
    pairs = list(zip(impls, versions, strict=True))
    return _only([
        (at, inside)
        for at in range(0, _IMPL_BYTES, _WORD)
        if all(_readable(_word(own + at)) for own in impls)
        for inside in range(0, _COUNTER_BYTES, 4)
        if all(_half(_word(own + at) + inside) == version for own, version in pairs)
    ])  # fmt: skip


def _made(version: int, first: int) -> torch.Tensor:
    """A tensor of that version, whose memory begins at that element of its storage."""
    tensor = torch.zeros(64, device="cpu")[first : first + 3]
    while tensor._version < version:
        tensor.zero_()
    return tensor


def _try_out(words: _native.TensorWords) -> bool:
    """Whether they follow all that gives a tensor another version, another place or other insides, and nothing else."""
    plain, param = torch.zeros(4, device="cpu"), torch.nn.Parameter(torch.ones(2, 3, device="cpu"))
    wide, complex_ = torch.zeros(1, 2, 3, 4, 5, device="cpu"), torch.zeros(4, dtype=torch.complex64, device="cpu")
    tensors: list[torch.Tensor] = [plain, param, plain[1:], param.detach(), torch.tensor(1.0, device="cpu"), wide]
    tensors += [complex_, complex_.imag]
    keeping: list[object] = []
    tried: list[bool] = []

    def same(before: bytes | None) -> bool:
        """Whether the insides are, and all versions are torch's."""
        seen = words.versions(tensors)
        tried.append(seen is not None and [*array.array("Q", seen)] == [*map(_VERSION, tensors)])
        tried.append(before is not None and words.have_insides(tensors, before) == (words.insides(tensors) == before))
        return before is not None and words.have_insides(tensors, before)

    for change in (
        lambda: param.set_(torch.zeros(9, device="cpu").untyped_storage(), 2, (2, 3), (3, 1)),
        lambda: plain.untyped_storage().resize_(1 << 12),
        lambda: setattr(param, "data", torch.zeros(5, 3, device="cpu")[1:3]),
        lambda: setattr(plain, "data", plain.data.view(torch.int32)),
        lambda: setattr(plain, "data", plain.data[:3]),
        lambda: plain.unsqueeze_(0),
        lambda: wide.transpose_(3, 4),
        lambda: wide.as_strided_((1, 2, 3, 5, 4), (120, 60, 20, 1, 4)),
        lambda: setattr(complex_, "data", complex_.data.conj()),
        lambda: setattr(tensors[-1], "data", complex_.data.imag),
    ):
        before = words.insides(tensors)
        with torch.no_grad():
            tensors[2].add_(1.0)
            param.mul_(2)
        keeping += [param.detach(), param.untyped_storage(), plain[1:], wide[0]]
        tried.append(same(before))
        change()
        tried.append(not same(before))
    with torch.inference_mode():
        bare = torch.zeros(1, device="cpu")
    tried.append(words.versions([bare]) is None and words.versions([None]) is None and words.insides([None]) is None)
    return all(tried)


def _with(objects: Sequence[int], values: Sequence[int], nbytes: int) -> int | None:
    """The offset of the one word that has each object's value, within so many bytes."""
    pairs = list(zip(objects, values, strict=True))
    return _only([
        at
        for at in range(0, nbytes - _WORD + 1, _WORD)
        if all(_word(address + at) == value for address, value in pairs)
    ])  # fmt: skip


def _only(found: Sequence[_T]) -> _T | None:
    return found[0] if len(found) == 1 else None


def _word(address: int) -> int:
    return ctypes.c_size_t.from_address(address).value


def _half(address: int) -> int:
    return ctypes.c_uint32.from_address(address).value


def _readable(address: int) -> bool:
    """Whether what looks like a pointer to a counter is one to memory that can be read."""
    if address % _WORD:
        return False
    try:
        _native.hash_memory(address, _COUNTER_BYTES)
    except ValueError:
        return False
    return True
