# SPDX-License-Identifier: Apache-2.0
"""Keeps memory alive while it is read in place, whatever happens to the tensors.

To keep a tensor is not enough, nor its storage: `resize_`, `share_memory_` and a way through a queue of
`torch.multiprocessing` give other memory to the same storage, and free what was in it. A storage owns its memory as a
c10::DataPtr: three words, for address, deleter and context. A `MemoryHold` of the native core puts a deleter of its own
into the second, which frees nothing before the last hold ends. Nothing else of the storage changes.

Torch has no call for that. Where those words are in a storage is found out and tried once in each process. If they are
not where they should be, or the memory is of a kind that torch itself tells by its deleter (shared memory), it cannot
be held; then it is copied, not read in place.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from layerwise_dist import _native
from layerwise_dist.errors import LayerwiseError

log = logging.getLogger("layerwise_dist")

_WORD = ctypes.sizeof(ctypes.c_size_t)
_LOOKED_AT = 8  # words of a storage; it has more
_DELETER, _CONTEXT = 1, 2  # words after the address


class MemoryGone(LayerwiseError):
    """A tensor has no memory any more, or moved to other memory while it was being read. Ends this attempt."""


def check_present(name: str, tensor: torch.Tensor) -> None:
    """Raises MemoryGone if the storage of a plain strided tensor does not reach as far as its elements: torch itself
    would read beyond it.
    """
    if not tensor.numel():
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    there = tensor.untyped_storage().nbytes()
    if there < needed:
        raise MemoryGone(
            f"{name} has {there} bytes of memory and needs {needed}: its storage was made smaller (resize_) or freed; "
            "give it its memory and contents back before the iteration ends"
        )


class Holder:
    """Holds memory of this process. Use `holder()`."""

    def __init__(self) -> None:
        self.place = _find_place()
        self._deleters: set[int] = {_native.MemoryHold.deleter}
        if self.place is not None:
            # What allocates, what is made from a buffer of Python or numpy, and a part of another storage.
            self._deleters.update(self.deleter_of(each) for each in (_allocated(), _buffered(), _sliced()))
        self._pinned_known = False

    def can_hold(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a plain tensor in host memory can be held."""
        storage = tensor.untyped_storage()
        if not storage.nbytes() or not tensor.numel():
            return True  # there is nothing to hold
        if self.place is None:
            return False
        deleter = self.deleter_of(storage)
        if deleter not in self._deleters and not self._pinned_known and torch.cuda.is_initialized():
            self._pinned_known = True
            pinned = torch.empty(64, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._deleters.add(self.deleter_of(pinned.untyped_storage()))
        return deleter in self._deleters

    def hold(self, tensors: Sequence[torch.Tensor]) -> tuple[list[int], Any]:
        """Addresses of tensors that can be held, and what keeps all their memory. Raises MemoryGone."""
        owners: dict[int, int] = {}
        addresses = []
        for tensor in tensors:
            storage, address = tensor.untyped_storage(), tensor.data_ptr()
            addresses.append(address)
            begin, nbytes = storage.data_ptr(), storage.nbytes()
            if not nbytes or not tensor.numel():
                continue
            if not begin <= address < begin + nbytes or owners.setdefault(storage._cdata, begin) != begin:
                raise _moved(tensor)
        place = self.place or 0
        try:
            return addresses, _native.MemoryHold([(owner + place * _WORD, begin) for owner, begin in owners.items()])
        except RuntimeError as error:
            raise MemoryGone(f"{error}; no other thread may change the model while a step ends") from error

    def deleter_of(self, storage: torch.UntypedStorage) -> int:
        """The address of what frees the memory of a storage. REQUIRES: `place` is known."""
        assert self.place is not None
        return ctypes.c_size_t.from_address(storage._cdata + (self.place + _DELETER) * _WORD).value


@functools.cache
def holder() -> Holder:
    return Holder()


def _moved(tensor: torch.Tensor) -> MemoryGone:
    return MemoryGone(f"a tensor of shape {list(tensor.shape)} moved to other memory while it was being read")


def _words(storage: torch.UntypedStorage) -> list[int]:
    return list((ctypes.c_size_t * _LOOKED_AT).from_address(storage._cdata))


def _allocated(nbytes: int = 64) -> torch.UntypedStorage:
    return torch.UntypedStorage(nbytes, device="cpu")


def _buffered() -> torch.UntypedStorage:
    return torch.frombuffer(bytearray(64), dtype=torch.uint8).untyped_storage()


def _sliced() -> torch.UntypedStorage:
    return _allocated()[16:48]


def _find_place() -> int | None:
    """The word of a storage at which its DataPtr begins; None if it does not look, or act, as it should."""
    made = [_allocated(), _allocated(4096), _buffered(), _sliced()]
    places = [
        place
        for place in range(_LOOKED_AT - _CONTEXT)
        if all(_words(storage)[place] == storage.data_ptr() for storage in made)
    ]
    if len(places) == 1 and _is_data_ptr(places[0], made) and _try_out(places[0]):
        return places[0]
    log.warning(
        "torch %s manages tensor memory in an unknown way: tensors are copied at each boundary, not read in place, "
        "and checkpoints stall training for longer",
        torch.__version__,
    )
    return None


def _is_data_ptr(place: int, made: Sequence[torch.UntypedStorage]) -> bool:
    """Whether a deleter and a context lie after the address: of an allocator's memory the context is the address."""
    first, second, *others = ([_words(storage)[place + i] for i in (0, _DELETER, _CONTEXT)] for storage in made)
    return (
        first[_DELETER] == second[_DELETER]
        and all(words[_CONTEXT] == words[0] for words in (first, second))
        and all(words[_CONTEXT] not in (0, words[0]) for words in others)
        and all(_is_code(words[_DELETER]) for words in (first, *others))
    )


def _is_code(address: int) -> bool:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, rights = line.split(maxsplit=2)[:2]
            begin, end = (int(each, 16) for each in span.split("-"))
            if begin <= address < end:
                return "x" in rights
    return False


def _try_out(place: int) -> bool:
    """Whether memory that a storage lets go of stays while it is held, and a storage that was held can let go."""
    storage = _allocated(4096)
    plain, begin, content = _words(storage)[place + _DELETER], storage.data_ptr(), bytes(range(256)) * 16
    ctypes.memmove(begin, content, len(content))
    hold = _native.MemoryHold([(storage._cdata + place * _WORD, begin)])
    held = _words(storage)[place + _DELETER] == _native.MemoryHold.deleter
    orphans = _native.MemoryHold.orphans
    storage.resize_(2 * len(content))
    kept = _native.MemoryHold.orphans == orphans + 1 and storage.data_ptr() != begin
    kept = kept and ctypes.string_at(begin, len(content)) == content
    moved = ctypes.string_at(storage.data_ptr(), len(content)) == content
    del hold
    freed = _native.MemoryHold.orphans == orphans and _words(storage)[place + _DELETER] == plain
    return held and kept and moved and freed
