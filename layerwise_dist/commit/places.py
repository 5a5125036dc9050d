# SPDX-License-Identifier: Apache-2.0
"""Finds out which ranks share a directory: one makes a file, and the others look for it."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

from layerwise_dist.commit.messages import Outcome
from layerwise_dist.commit.opening import make_dirs
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.transports.rendezvous import place
from layerwise_dist.commit.votes import rebuild_error, tried
from layerwise_dist.errors import DeadlineError, DirectoryError, LayerwiseError
from layerwise_dist.storage import filenames, mounts
from layerwise_dist.storage.protocols import Env
from layerwise_dist.supervision.patience import within

log = logging.getLogger("layerwise_dist")

_LOOK = "the search for a common directory"
_T = TypeVar("_T")


class _About(TypedDict):
    """What a rank says of itself where there are several directories.

    `keeper`: the lowest rank whose directory it sees; `network`: the kind of file system, if machines share it.
    """

    keeper: Outcome
    host: str
    node: str
    network: str | None


class _Probe:
    """A file under a name that nobody has looked for before, so that no cache of a network file system knows it."""

    def __init__(self, env: Env, root: str, *, file_mode: int, dir_mode: int) -> None:
        self._env, self._root, self._file_mode, self._dir_mode = env, root, file_mode, dir_mode
        self._made: list[str] = []

    def path(self, token: str, rank: int) -> str:
        return os.path.join(self._root, filenames.probe_file(token, rank))

    def make(self, token: str, rank: int) -> None:
        """Raises DirectoryError."""
        try:
            make_dirs(self._env, self._root, self._dir_mode)
            self._env.write_file(self.path(token, rank), b"", self._file_mode)
        except DirectoryError:
            raise
        except OSError as error:
            raise DirectoryError(f"rank {rank} cannot write in {self._root}: {error}") from error
        self._made.append(self.path(token, rank))

    def sees(self, token: str, rank: int) -> bool:
        try:
            self._env.stat(self.path(token, rank))
            return True
        except (FileNotFoundError, NotADirectoryError):
            return False

    def remove(self) -> None:
        for path in self._made:
            try:
                self._env.unlink(path)
            except OSError as error:
                log.warning("%s stays until the next start: %s", path, error)


def find_places(env: Env, root: str, participant: Participant, *, file_mode: int, dir_mode: int) -> list[list[int]]:
    """The ranks of each place, each list in order, rank 0's first. All ranks together; raises DirectoryError on all."""
    rank, world_size = participant.rank, participant.world_size
    if world_size == 1:
        return [[0]]
    probe = _Probe(env, root, file_mode=file_mode, dir_mode=dir_mode)

    def begin(_: list[Any]) -> str:
        token = uuid.uuid4().hex
        _on_disk(participant, lambda: probe.make(token, 0))
        return token

    try:
        token = participant.agree("search for a common directory", None, begin)
        apart = participant.agree(
            "who sees rank 0's directory", tried(participant.disk_s, _LOOK, lambda: probe.sees(token, 0)), _blind
        )
        if not apart:
            return [list(range(world_size))]
        mine = rank in apart
        participant.agree(
            "make the other directories",
            tried(participant.disk_s, _LOOK, lambda: probe.make(token, rank) if mine else None),
            _all_well,
        )
        seen = tried(participant.disk_s, _LOOK, lambda: _lowest(probe, token, apart) if mine else 0)
        network_of = _on_disk(participant, lambda: _network(env, root))
        about: _About = {"keeper": seen, "host": socket.gethostname(), "node": place(), "network": network_of}
        return participant.agree("who shares a directory", about, lambda votes: grouped(votes, root))
    finally:
        try:
            _on_disk(participant, probe.remove)
        except DeadlineError as error:
            log.warning("%s", error)


def _lowest(probe: _Probe, token: str, ranks: list[int]) -> int:
    return next(rank for rank in ranks if probe.sees(token, rank))


def _network(env: Env, root: str) -> str | None:
    try:
        return mounts.network_at(env, root)
    except OSError:
        return None


def _on_disk(participant: Participant, action: Callable[[], _T]) -> _T:
    return within(participant.disk_s, _LOOK, action)


def _all_well(votes: list[Outcome]) -> list[Any]:
    values = []
    for rank, vote in enumerate(votes):
        if "error" in vote:
            error = rebuild_error(vote["error"])
            raise error if isinstance(error, LayerwiseError) else DirectoryError(f"rank {rank}: {error}")
        values.append(vote["value"])
    return values


def _blind(votes: list[Outcome]) -> list[int]:
    return [rank for rank, sees in enumerate(_all_well(votes)) if not sees]


def grouped(votes: list[_About], root: str) -> list[list[int]]:
    """Each node's disk makes one place. Anything else is a directory that is not what was meant: a mount is missing."""
    keepers = _all_well([vote["keeper"] for vote in votes])
    of_node: dict[str, int] = {}
    for rank, vote in enumerate(votes):
        other = of_node.setdefault(vote["node"], rank)
        if keepers[other] != keepers[rank]:
            raise DirectoryError(
                f"rank {other} and rank {rank} are both on {vote['host']}, and {root} is not one directory for "
                f"them: is "
                "`dir` relative, or a mount missing?"
            )
    places: dict[int, list[int]] = {}
    for rank, keeper in enumerate(keepers):
        places.setdefault(keeper, []).append(rank)
    found = [places[keeper] for keeper in sorted(places)]
    for ranks in found:
        hosts = sorted({votes[rank]["host"] for rank in ranks})
        kinds = {votes[rank]["network"] for rank in ranks} - {None}
        if len({votes[rank]["node"] for rank in ranks}) > 1 or kinds:
            others = next(each for each in found if each is not ranks)
            what = f"is on {kinds.pop()}" if kinds else f"is shared by {', '.join(hosts)}"
            raise DirectoryError(
                f"{root} of rank {ranks[0]} {what}, and rank {others[0]} on {votes[others[0]]['host']} sees another "
                "directory there: is a mount missing?"
            )
    log.warning("%s is %d directories, each of some ranks: %s", root, len(found), found if len(found) < 9 else "...")
    return found
