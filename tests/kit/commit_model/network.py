# SPDX-License-Identifier: Apache-2.0
"""The messages between the ranks of a job and the coordinator, which lives in rank 0."""

from __future__ import annotations

from collections import deque

from kit.commit_model.world import DELAY, World
from layerwise_dist.commit.transports import Message

Channel = deque[tuple[float, Message]]  # each with when it was sent


class Network:
    """What one rank sends arrives once and in order, at most DELAY seconds late, or the rank hears that it does not."""

    def __init__(self, world: World, *, tells_gone: bool) -> None:
        """`tells_gone`: the coordinator hears of a rank's end, as over TCP and not over MPI."""
        self._world, self._tells_gone = world, tells_gone
        self.up: list[Channel] = [deque() for _ in range(world.world_size)]  # to the coordinator, by sender
        self.down: list[Channel] = [deque() for _ in range(world.world_size)]  # to ranks
        self.cut: dict[int, float] = {}  # rank: when it hears of it
        self._ended = False  # with rank 0

    def post(self, rank: int, message: Message) -> None:
        if rank not in self.cut and not self._ended:
            self.up[rank].append((self._world.now, message))

    def announce(self, message: Message) -> None:
        for rank, channel in enumerate(self.down):
            if rank not in self.cut:
                channel.append((self._world.now, message))

    def say_gone(self, rank: int) -> None:
        """What a transport that knows tells the coordinator, after all that came from that rank."""
        if self._tells_gone and not self._ended and rank:
            self.up[rank].append((self._world.now, {"t": "gone", "rank": rank, "why": "its connection is gone"}))

    def sever(self, rank: int) -> None:
        """The connection ends: a part of what is under way still arrives; the rank hears of it a little later."""
        dice = self._world.dice
        for channel in (self.up[rank], self.down[rank]):
            for _ in range(dice.randrange(len(channel) + 1)):
                channel.pop()
        self.cut.setdefault(rank, self._world.now + dice.uniform(0, DELAY))

    def end(self) -> None:
        """Rank 0 is dead: nobody reads what was sent to it."""
        self._ended = True
        for channel in self.up:
            channel.clear()
        for rank in range(len(self.up)):
            self.sever(rank)

    def sent_up_by(self, rank: int, until: float) -> bool:
        """Whether something that was sent to the coordinator may not be under way for longer than that."""
        return _overdue(self.up[rank], until)

    def sent_down_by(self, rank: int, until: float) -> bool:
        return _overdue(self.down[rank], until)

    def wake(self) -> None:
        """All ranks were stopped: time counts from now on."""
        for rank in range(len(self.up)):
            self.up[rank] = self._as_of_now(self.up[rank])
            self.wake_rank(rank)
        self.cut = {rank: max(when, self._world.now) for rank, when in self.cut.items()}

    def wake_rank(self, rank: int) -> None:
        self.down[rank] = self._as_of_now(self.down[rank])

    def _as_of_now(self, channel: Channel) -> Channel:
        return deque((self._world.now, message) for _, message in channel)


def _overdue(channel: Channel, until: float) -> bool:
    return bool(channel) and channel[0][0] + DELAY <= until
