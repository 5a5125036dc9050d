# SPDX-License-Identifier: Apache-2.0
"""One checkpoint made outside a training loop: the directory is taken, one attempt is written and committed, and the
directory is let go of. The order of flushes is that of a training's commit (docs/format/flushes.md).
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Callable, Sequence

import torch

from layerwise_dist import _native
from layerwise_dist._version import __version__
from layerwise_dist.commit.merging import merge
from layerwise_dist.commit.messages import Durable
from layerwise_dist.commit.metadata import CheckpointMetadataManager, InDoubt, Inventory, Manifest
from layerwise_dist.commit.opening import Place
from layerwise_dist.commit.records import LONGEST_TAG, is_tag
from layerwise_dist.commit.session import Committer
from layerwise_dist.errors import ConfigError, DamageError, DirectoryError
from layerwise_dist.storage.filenames import STEPS_END, AttemptId
from layerwise_dist.storage.odd import oddity
from layerwise_dist.storage.reports import ShardReport

log = logging.getLogger("layerwise_dist")

FILE_MODE, DIR_MODE = 0o600, 0o700
_ALL = 1 << 62  # checkpoints that are kept


def root_of(directory: str | os.PathLike[str]) -> str:
    """The path as all of this package has it. Raises ConfigError for what is no path of a local directory."""
    text = os.fspath(directory)
    if not isinstance(text, str) or not text or "://" in text:
        raise ConfigError(f"{directory!r} is not the path of a directory: give one")
    return os.path.abspath(os.path.expanduser(text))


def check_names(step: int | None, tag: str | None, keep_last: int | None) -> None:
    """Raises ConfigError for what no checkpoint can be called."""
    if step is not None and not (type(step) is int and 0 <= step < STEPS_END):
        raise ConfigError(f"step = {step!r}: expected an integer, 0 to below {STEPS_END}")
    if tag is not None and not (isinstance(tag, str) and is_tag(tag)):
        raise ConfigError(f"tag = {tag!r}: expected 1 to {LONGEST_TAG} printable characters")
    if keep_last is not None and not (type(keep_last) is int and keep_last >= 1):
        raise ConfigError(f"keep_last = {keep_last!r}: expected an integer, 1 or more, or None to keep all")


class OneCommit:
    """The directory is this process's until `close`. `attempt` is what is to be written, by each of the ranks."""

    def __init__(
        self, root: str, *, world_size: int, framework: str, who: str, step: int | None = None, tag: str | None = None,
        keep_last: int | None = None, check: Callable[[Inventory], None] = lambda found: None,
    ) -> None:  # fmt: skip
        """`step` is by default the one after the newest commit's, and 1 where there is none. `check` sees what the
        directory holds, and raises where nothing may be added to that.

        Raises OwnerError, DirectoryError, DamageError or OSError; the directory is let go of then.
        """
        self.env, self.root, self._world_size = _native.PosixEnv(), root, world_size
        self._closed = False
        self._manager = CheckpointMetadataManager(self.env, root, file_mode=FILE_MODE)
        place = Place(
            self.env, root, self._manager, ranks=range(world_size), file_mode=FILE_MODE, dir_mode=DIR_MODE,
            who=f"{who}, pid {os.getpid()} on {socket.gethostname()}",
        )  # fmt: skip
        try:
            plan = merge([place.look()], root, fresh=False)
            found = self._manager.inventory()
            if found.lost is not None:
                raise DamageError(f"where the lineage in {root} continues is unknown: {found.lost}")
            check(found)
            place.settle(plan, {})
            assert place.owner is not None, "look() has taken it"
            info = plan.info([list(range(world_size))])
            newest = found.newest
            head = newest.ref if isinstance(newest, Manifest) else newest.parent if newest is not None else None
            software = {"layerwise_dist": __version__, "torch": torch.__version__, "python": platform.python_version()}
            self._committer = Committer(
                self._manager, place.owner, info, world_size=world_size, framework=framework, software=software,
                keep_last=keep_last or _ALL, keep_every_n_steps=None,
            )  # fmt: skip
            self._committer.follow(head, None)
            lineage = found.lineage()
            if step is None:
                step = lineage[0].step + 1 if lineage else 1
            self.attempt = AttemptId(info.epoch, info.first_seq, step)
            self._committer.boundary_kind = "call"
            if tag is not None:
                self._committer.tag(self.attempt.seq, tag)
            self._retires = keep_last is not None
        except BaseException:
            place.release()
            raise

    def commit(self, reports: Sequence[ShardReport]) -> None:
        """The checkpoint exists when this returns. REQUIRES: a report of each rank, in the order of ranks.

        Raises DirectoryError for a shard that is not to be seen from here; OSError, InDoubt or OwnerError.
        """
        folder = os.path.join(self.root, self.attempt.folder)
        for report in reports:
            path = os.path.join(folder, report.file)
            try:
                found = self.env.stat(path)
            except OSError as error:
                if not isinstance(error, FileNotFoundError) and oddity(error, path) is None:
                    raise
                found = None
            if found != ("file", report.nbytes):
                raise DirectoryError(
                    f"rank {report.rank} wrote {path} ({report.nbytes} bytes), and rank 0 sees "
                    f"{'nothing there' if found is None else f'a {found[0]} of {found[1]} bytes'}: all ranks must "
                    "write into one directory, on a file system that they share"
                )
        self._committer.commit(self.attempt.seq, self.attempt.step, [self._durable(report) for report in reports])
        if self._retires:
            self._retire()

    def _durable(self, report: ShardReport) -> Durable:
        return {
            "t": "durable", "rank": report.rank, "world_size": self._world_size, "seq": self.attempt.seq,
            "attempt": self.attempt.text, "step": self.attempt.step, "file": report.file, "nbytes": report.nbytes,
            "header_bytes": report.header_bytes, "header_hash": f"{report.header_hash:016x}", "base": None,
        }  # fmt: skip

    def _retire(self) -> None:
        """What is committed stays so, whatever becomes of older ones."""
        withdrawn: list[AttemptId] = []
        try:
            self._committer.retire(withdrawn.append)
            for attempt in withdrawn:
                self._committer.collect_old(attempt)
        except (OSError, InDoubt) as error:
            log.warning("%s: older checkpoints stay until the next save: %s", self.root, error)

    def close(self) -> None:
        """Others may have the directory. Raises nothing; idempotent."""
        if not self._closed:
            self._closed = True
            self._committer.close()
