# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 with its optimizer offloaded to NVMe: a unit and its state are in memory only while they are updated.

Here each has a *mirror*, copied right after its update, that is saved in its place and restored into. Mirrors are
files mapped into memory, beside DeepSpeed's own swap files and without names: the kernel may write them out and take
the memory back, so that offloading still saves memory, and nothing of them outlives the process.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.deepspeed.flattening import Zero3
from layerwise_dist.frameworks.private_names import DEEPSPEED, require_of_deepspeed

_MASTER = ""


class Zero3OnNvme(Zero3):
    """`tensor` and `state` give the mirrors of what is swapped; `gather` brings those up to date.

    Units below a MiB are not swapped by DeepSpeed, and have no mirror.
    """

    swapped = True
    attributes = (
        *Zero3.attributes, "optimizer_swapper", "fp16_partitioned_groups_flat_numel",
        *DEEPSPEED["stage 3 on NVMe"],
    )  # fmt: skip

    def __init__(self, wrapper: Any, rank: int) -> None:
        super().__init__(wrapper, rank)
        swapper = wrapper.optimizer_swapper
        require_of_deepspeed(swapper, ("swap_folder", "dtype"))
        self._folder, self._dtype = swapper.swap_folder, swapper.dtype
        numbers = range(len(wrapper.fp16_groups))
        self._swapped = {number for number in numbers if wrapper._swappable_optimizer_subgroup(number)}
        self._mirrors: dict[int, dict[str, torch.Tensor]] = {number: {} for number in self._swapped}
        self._loaded: dict[int, Mapping[str, Any]] = {}
        self._stale = set(self._swapped)

    # -- what is saved ------------------------------------------------------------------------------------------

    def tensor(self, number: int) -> torch.Tensor:
        return self._mirror(number, _MASTER) if number in self._swapped else self.live(number)

    def state(self, number: int) -> Mapping[str, Any]:
        live = super().state(number)
        if number not in self._swapped:
            return live
        return {name: self._mirror(number, name) if _is_swapped(value) else value for name, value in live.items()}

    def new_state(self, number: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
        if number not in self._swapped:
            return super().new_state(number, kind, dtype)
        if dtype != self._dtype:
            raise UnsupportedError(f"{kind} of {dtype} under NVMe offload, which swaps {self._dtype}")
        return self._mirror(number, kind)

    def updated(self, number: int, *, wanted: bool) -> None:
        """The inner optimizer has stepped the unit, which is in memory now; it is copied if that is wanted."""
        if number in self._swapped:
            self._stale.add(number)
            if wanted:
                with suppress(OSError):  # no room for the mirror: `gather` meets it again, where it ends the checkpoint
                    self._copy(number)

    def gather(self) -> None:
        """Reads what changed and was not copied then from its swap files. Not while an update runs."""
        for number in sorted(self._stale):
            self.wrapper._optimizer_states_and_gradient_swap_in(number)
            try:
                self._copy(number)
            finally:
                self.wrapper._release_swap_buffers(number)

    def _copy(self, number: int) -> None:
        with torch.no_grad():
            self._mirror(number, _MASTER).copy_(self.live(number))
            for name, value in super().state(number).items():
                if _is_swapped(value):
                    self._mirror(number, name).copy_(value)
        self._stale.discard(number)

    def _mirror(self, number: int, name: str) -> torch.Tensor:
        mirrors = self._mirrors[number]
        if name not in mirrors:
            numel = int(self.wrapper.fp16_partitioned_groups_flat_numel[number])
            mirrors[name] = _in_a_file(self._folder, numel, self._dtype)
        return mirrors[name]

    # -- restore ------------------------------------------------------------------------------------------------

    def put_state(self, number: int, state: Mapping[str, Any]) -> None:
        if number in self._swapped:
            self._loaded[number] = state
        else:
            super().put_state(number, state)

    def derive(self, number: int) -> None:
        if number not in self._swapped:
            super().derive(number)
            return
        self.wrapper._optimizer_states_and_gradient_swap_in(number)
        with torch.no_grad():
            self.live(number).copy_(self.tensor(number))
            if (loaded := self._loaded.pop(number, None)) is not None:
                live, state = super().state(number), {}
                for name, value in loaded.items():
                    state[name] = value
                    if _is_swapped(value):  # the live tensor, whose memory the swapper knows, or a first one
                        state[name] = live[name].copy_(value) if name in live else value.clone()
                super().put_state(number, state)
        super().derive(number)
        self.wrapper._optimizer_states_and_gradient_swap_out(number)
        if loaded is not None:
            self._stale.discard(number)


def _is_swapped(value: object) -> bool:
    """Whether a state is of the unit's shape; while it is swapped out it is an empty row instead."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _in_a_file(folder: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A row of zeros in a mapped file without a name. Raises OSError where the disk has no room for it."""
    nbytes = numel * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)  # or a full disk would be SIGBUS at the first touch
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=dtype)
