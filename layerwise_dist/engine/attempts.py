# SPDX-License-Identifier: Apache-2.0
"""Begins a capture for a step that is due: a number, room, a layout, a file, and the memory it needs."""

from __future__ import annotations

import logging
from typing import Any

from layerwise_dist.capture.audit import Audit, Look, Rotation
from layerwise_dist.capture.lease import Capture
from layerwise_dist.capture.pages import HugePages
from layerwise_dist.capture.room import least_pool_bytes, pool_bytes
from layerwise_dist.capture.stage import Stage, StageError
from layerwise_dist.capture.survey import Survey, Surveyor
from layerwise_dist.commit.participant import Participant
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.errors import ConfigError, LayerwiseError, UnsupportedError
from layerwise_dist.scheduler import LayerwiseCheckpointScheduler
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.gathered import Laid
from layerwise_dist.storage.protocols import Leftover, ShardWrite, ShardWriterAdapter

log = logging.getLogger("layerwise_dist")


class Attempts:
    """Opens attempts on one rank, one after the other. Belongs to the training thread.

    `newest` is the last one's number, whether it was opened or not, and `before` that of the one before it. `ended`:
    one failed as all that come would.
    """

    newest: AttemptId | None = None
    before: AttemptId | None = None
    ended = False

    def __init__(
        self, config: LayerwiseConfig, rank: int, surveyor: Surveyor, scheduler: LayerwiseCheckpointScheduler,
        adapter: ShardWriterAdapter, participant: Participant, *, epoch: int, first_seq: int,
    ) -> None:  # fmt: skip
        self._config, self._rank, self._surveyor, self._scheduler = config, rank, surveyor, scheduler
        self._adapter, self._participant = adapter, participant
        self._epoch, self._seq = epoch, first_seq
        self._copying: frozenset[str] = frozenset()
        self._layout: tuple[tuple[Any, ...], Laid] | None = None
        self._stage: Stage | None = None
        self._last: Survey | None = None
        self._steady = False  # whether the last attempt, at its opening and at its boundary, found what it expected
        self._audits = Rotation(always=config.audit == "always")
        self._stuck = False  # rank 0 was waited for in vain, and there was no room since
        self._pages = HugePages(wanted=config.writer.huge_pages == "auto" and adapter.direct)

    @property
    def audit_s(self) -> float:
        """Seconds for which audits have held the training thread."""
        return self._audits.spent.seconds

    def take_seq(self) -> int:
        """A number in the order of commits for a record that is no attempt."""
        self._seq += 1
        return self._seq - 1

    def look(self, *, sealing: bool = False) -> Survey:
        """What there is now; `sealing`: at the boundary of a capture that is open.

        Raises UnsupportedError, ConfigError.
        """
        found = self._surveyor.look(self._copying, sealing=sealing)
        if sealing:
            self._steady &= found is self._last
        return found

    def copy(self, names: set[str]) -> None:
        """These tensors are no base's, though no optimizer updates them: they are copied at the boundary now."""
        if names:
            self._copying |= names
            log.info(
                "rank %d: %s changed at two checkpoints in a row: copied at the boundary from now on, each time",
                self._rank, ", ".join(sorted(names)),
            )  # fmt: skip

    def steady(self) -> Survey | None:
        """What there is, if all of it is where the last attempt found it: a capture can begin before the update is
        over.
        """
        try:
            return self._last if self._last is not None and (self._known() or self.look()) is self._last else None
        except LayerwiseError:
            return None  # after the update it is met again, where it fails the attempt

    def fail(self, attempt: AttemptId, error: LayerwiseError | OSError, write: Leftover | None) -> None:
        """This rank gives an attempt up. What no later one can do either ends checkpoints for all ranks, which raise it
        at an agreed boundary; a job of one rank raises it here.

        Raises ConfigError or UnsupportedError.
        """
        final = isinstance(error, ConfigError | UnsupportedError)
        self.ended |= final
        self._participant.failed(attempt, str(error), write, final=final)
        if isinstance(error, ConfigError) or (final and self._participant.world_size == 1):
            raise error

    def learn(self, names: set[str], until: str) -> None:
        """These tensors were changed unseen: from now on they are copied at the boundary."""
        if names:
            self._copying |= names
            log.warning(
                "rank %d: %s changed between its boundary or update and %s without raising its version counter "
                "(through .data or numpy, say): copied at the boundary from now on, not read in place",
                self._rank, ", ".join(sorted(names)), until,
            )  # fmt: skip

    def open(self, step: int, found: Survey | None = None, *, patience_s: float | None = None) -> Capture | None:
        """A capture, of `found` if it is known what there is, with nothing taken yet. None if there is none of
        this step: rank 0, which drops it for all, then knows why, and training continues. It waits for room at most
        `patience_s` seconds, by default as `when_full` says.

        Raises as `fail`; the other ranks stop at an agreed boundary.
        """
        attempt = AttemptId(self._epoch, self.take_seq(), step)
        self.before, self.newest = self.newest, attempt
        if not self._admitted(attempt, patience_s):
            return None
        self._participant.began(attempt)
        write: ShardWrite | None = None
        updated = found is None
        try:
            if found is None:
                self._surveyor.gather()
                found = self._expected()
            else:
                self._steady = found is self._last  # `steady` has found it there
            audit = self._audits.next(found)
            look = audit.look(found) if updated else None  # hashed by another thread while the rest is made ready
            laid = self._lay_out(found)
            if attempt.seq >= filenames.NUMBERS_END or step >= filenames.STEPS_END:
                raise UnsupportedError(
                    f"step {step}, attempt {attempt.seq} of this directory: steps are below {filenames.STEPS_END}, "
                    f"attempts below {filenames.NUMBERS_END}; continue in a new directory"
                )
            write = self._adapter.begin(attempt, laid.shard, laid.plan)
            self._pages.opened(t for t, leased in zip(found.tensors, found.leased, strict=True) if leased)
            return self._capture(step, found, laid, write, audit, look)
        except (LayerwiseError, OSError) as error:
            self.fail(attempt, error, write or self._adapter.unbegun(attempt))
            return None

    def again(self, capture: Capture) -> Capture:
        """The attempt of `capture`, which is open, with what there is now: something came, went or moved since then.

        Nothing of it is taken yet. Raises LayerwiseError or OSError.
        """
        capture.leave()
        self._surveyor.gather()
        found = self.look(sealing=True)
        laid = self._lay_out(found)
        capture.write.begin_again(laid)
        return self._capture(capture.step, found, laid, capture.write, self._audits.again(found))

    def close_pages(self) -> None:
        """Ends what still changes pages; at once, since the model is let go of."""
        self._pages.close()

    def close(self, timeout_s: float) -> bool:
        """Whether it could be done in time. REQUIRES: nothing is staged any more."""
        self._last = None  # with it, the memory that it holds
        return self._stage is None or self._stage.close(timeout_s)

    # -- inside -------------------------------------------------------------------------------------------------

    def _expected(self) -> Survey:
        """What there is, for a capture to begin with; it may be what there was at the last boundary.

        Raises UnsupportedError, ConfigError.
        """
        if known := self._known():
            return known
        found = self.look()
        self._steady = found is self._last
        return found

    def _known(self) -> Survey | None:
        """What the last attempt captured, if it lay in its place both at its opening and at its boundary. A capture
        begins with that unseen: its boundary looks, and does again what was elsewhere.
        """
        return self._surveyor.known(self._copying) if self._steady else None

    def _capture(
        self, step: int, found: Survey, laid: Laid, write: ShardWrite, audit: Audit, look: Look | None = None
    ) -> Capture:
        self._last = found
        assert self._stage is not None, "`_lay_out` has opened it"
        capture = Capture(
            step, found, write, audit, self._stage, laid.gathered, look=look,
            timeout_s=self._config.fence_timeout_s, verdict_wanted=self._participant.verdict_wanted,
        )  # fmt: skip
        self._scheduler.begin()
        return capture

    def _admitted(self, attempt: AttemptId, patience_s: float | None) -> bool:
        """Whether there is room for one more attempt in flight; if not, rank 0 knows by now.

        Each rank waits or skips by what it has heard itself. If they differ, rank 0 drops the attempt on all.
        """
        config, limit = self._config, self._config.max_in_flight
        if patience_s is not None:
            disk_s = decision_s = patience_s
        elif config.when_full == "wait":
            disk_s, decision_s = config.fence_timeout_s, config.commit.timeout_s
        else:
            disk_s = decision_s = 0.0
        if self._stuck:
            decision_s = 0.0  # a rank 0 that is stuck holds training up once, not at every step
        vain = self._participant.wait_room(limit, disk_s=disk_s, decision_s=decision_s)
        if vain is None:
            self._stuck = False
            return True
        full = f"{limit} checkpoint{'s are' if limit > 1 else ' is'} in flight (max_in_flight)"
        undecided = f"{full}; rank 0 has not decided on step(s) {self._participant.undecided_steps}"
        if config.when_full == "skip":
            self._participant.skipped(attempt, f"{full}, and when_full is 'skip'")
        elif vain == "disk":
            self._participant.failed(attempt, f"{full} and the disk finishes none", None)
        elif self._stuck:
            self._participant.skipped(attempt, undecided)
        else:
            self._participant.failed(attempt, f"{undecided}, and was waited for {decision_s:g} s", None)
        self._stuck |= vain == "rank 0" and decision_s > 0
        return False

    def _lay_out(self, found: Survey) -> Laid:
        if self._layout is None or (self._layout[0] is not found.key and self._layout[0] != found.key):
            laid = self._adapter.lay_out(found.sources(self._adapter.memory_align), found.gathered)
            self._fit_pool(found, laid)
            self._layout = found.key, laid
            self._pages.laid_out()
        return self._layout[1]

    def _fit_pool(self, found: Survey, laid: Laid) -> None:
        """Opens the pool; and a larger one if a layer outgrew it, by the state of an optimizer that came later."""
        nbytes = pool_bytes(
            self._config.pool_mb, self._adapter.bounce_bytes, found, laid.gathered,
            max_in_flight=self._config.max_in_flight, pooled=self._adapter.pooled,
        )  # fmt: skip
        if self._stage is not None and (buffers := self._adapter.buffers) is not None:
            least = least_pool_bytes(self._adapter.bounce_bytes, found, laid.gathered, pooled=self._adapter.pooled)
            if least <= buffers.capacity:
                return
            if not self._stage.close(self._config.fence_timeout_s):
                raise StageError(
                    "copies into a pool that is now too small were still being made after fence_timeout_s = "
                    f"{self._config.fence_timeout_s:g} s"
                )
        self._adapter.allocate_staging_buffer(size_mb=nbytes / 2**20)
        log.info(
            "rank %d: a pool of %.1f MiB for a state of %.1f MiB (%.1f MiB staged; pool_mb = %s)",
            self._rank, nbytes / 2**20, found.nbytes / 2**20, found.staged_bytes / 2**20, self._config.pool_mb,
        )  # fmt: skip
        assert self._adapter.buffers is not None
        self._stage = Stage(self._adapter.buffers, pinned=any(tensor.is_cuda for tensor in found.tensors))
