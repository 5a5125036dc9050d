# SPDX-License-Identifier: Apache-2.0
"""A DistributedSampler that can begin anywhere in an epoch, with any number of ranks.

The order of an epoch is one list of all samples, which seed, epoch and `shuffle` decide, and not the number of ranks.
It is dealt out like cards: of N ranks, rank r gets the places r, r + N, r + 2N, ... So what N ranks have consumed after
equally many samples each is a beginning of the list, and its length, the *position* in samples, says all of it. Whoever
continues there, with M ranks, deals out the rest of the list in the same way. At its end torch's DistributedSampler
pads with samples of the list's beginning until each rank has equally many, or drops what is left over (`drop_last`):
so does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import cast

import torch
from torch.utils.data import DistributedSampler


class ElasticDistributedSampler(DistributedSampler[int]):
    """A `torch.utils.data.DistributedSampler`, with its arguments and, from an epoch's beginning, exactly its indices.

    Give it to a DataLoader that `attach(state=...)` names. A restore then continues at the samples that training has
    consumed on all ranks, not counting what workers had ready: after a change of world size within an epoch no sample
    is repeated or left out, except for the padding, or what is dropped, at the epoch's end. For a loader outside
    `state=`, the script calls `start_at`.

    Batches must come from torch's BatchSampler (made by `batch_size`, or given as `batch_sampler`), or there are none
    (`batch_size=None`): other batch samplers do not show which samples they have consumed.

    `num_samples` and `total_size` are of a whole epoch, as in torch.

    Args and errors: torch's.
    """

    _begin = 0  # of the iteration that was dealt from last, or of the next one
    _dealt = False  # has an iteration from `_begin` been dealt from?

    def start_at(self, position: int) -> None:
        """Makes the next iteration, and only that, begin where all ranks have consumed `position` samples of this
        epoch.

        A later `set_epoch()` with another epoch cancels it. Raises ValueError unless 0 <= position <= len(dataset).
        """
        if not 0 <= position <= self._samples:
            raise ValueError(f"position {position} is not within the epoch: the data set has {self._samples} samples")
        self._begin, self._dealt = position, False

    @property
    def begin(self) -> int:
        """The position, in samples of all ranks, at which the next iteration begins."""
        return 0 if self._dealt else self._begin

    def length_from(self, begin: int) -> int:
        """How many samples each rank gets in an iteration that begins at that position."""
        if begin == 0:
            return self.num_samples
        left = max(self._samples - begin, 0)
        return left // self.num_replicas if self.drop_last else math.ceil(left / self.num_replicas)

    def position(self, begin: int, samples: int) -> int:
        """Where all ranks together are when each has consumed `samples` since `begin`, padding not counted."""
        dealt = min(samples, self.length_from(begin)) * self.num_replicas
        return min(begin + dealt, self._samples)

    def set_epoch(self, epoch: int) -> None:
        """As torch's. Another epoch than that of now begins at its beginning."""
        if epoch != self.epoch:
            self._begin, self._dealt = 0, False
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        begin = self.begin
        return self._deal(begin, super().__iter__() if begin == 0 else iter(self._rest(begin)))

    def __len__(self) -> int:
        """Samples of this rank in the iteration that was dealt from last, until `set_epoch` or `start_at` tell of the
        next one.
        """
        return self.length_from(self._begin)

    def _deal(self, begin: int, indices: Iterator[int]) -> Iterator[int]:
        # At the first index, not at iter(): a loader may make an iterator that it never draws from.
        self._begin, self._dealt = begin, True
        yield from indices

    def _rest(self, begin: int) -> list[int]:
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.seed + self.epoch)
            order = torch.randperm(self._samples, generator=generator, device="cpu").tolist()
        else:
            order = list(range(self._samples))
        rest, total = order[begin:], self.length_from(begin) * self.num_replicas
        if self.drop_last:
            rest = rest[:total]
        elif rest:
            padding = total - len(rest)
            rest += (order * math.ceil(padding / len(order)))[:padding]
        return cast(list[int], rest[self.rank : total : self.num_replicas])

    @property
    def _samples(self) -> int:
        return len(cast(Sized, self.dataset))
