# SPDX-License-Identifier: Apache-2.0
"""Whether ranks that are said to hold the same do hold the same: the net under what a wrapper says.

Before a session's first checkpoint all ranks compare what is there, and hashes of it. From then on each says with each
checkpoint which tensors it takes for shared, and hashes of a hundredth of their bytes (`samples.py`), which the
coordinator holds against each other.

That parameters are equal is the wrapper's word: where they are not, that is an error. Of optimizer state no wrapper
says anything: where it is not the same on all ranks, each of them saves its own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import TypedDict

import torch

from layerwise_dist.capture.survey import Survey
from layerwise_dist.commit.alike import unequal
from layerwise_dist.commit.messages import AlikeGroup, DescribedError
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.votes import describe_error, rebuild_error
from layerwise_dist.engine.samples import Common, Sums, digest, is_param, place_of
from layerwise_dist.errors import LayerwiseError, UnsupportedError
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.tensors.pieces import Piece
from layerwise_dist.tensors.slices import ranks_of, ranks_text

log = logging.getLogger("layerwise_dist")

_LISTED = 3


class _Vote(TypedDict, total=False):
    """What a rank holds alike: a digest by the ranks that hold it, as text; or the error that it met."""

    digests: dict[str, str]
    error: DescribedError


class _Differing(TypedDict):
    """Whether anybody shares anything, and which ranks do not share the same."""

    any: bool
    differing: list[str]


class Replicas:
    """One rank's part. Belongs to the training thread.

    `agreed`: nothing is shared anywhere, or what is was compared, so that a checkpoint may begin.
    """

    def __init__(
        self, framework: Framework, optimizer: OptimizerAdapter, participant: Participant, *, sampled: bool = True
    ) -> None:
        """`sampled`: what was once the same is looked at again."""
        self._sampled = sampled
        self._sums: dict[str, Sums] = {}  # of the last checkpoint's blocks in device memory
        self._framework, self._optimizer, self._participant = framework, optimizer, participant
        self._needed = participant.world_size > 1
        self.agreed = not self._needed
        self._unlike: set[str] = set()
        self._of: weakref.ref[Survey] | None = None  # which holds memory, and must not live on for this
        self._common: dict[str, Common] = {}
        self._known: dict[str, set[str]] = {}  # names that were compared, by the ranks that hold them alike

    # -- all ranks together -------------------------------------------------------------------------------------

    def meet(self) -> None:
        """In `attach()`: whether anything is shared on any rank, and whether all have the parameters that they are said
        to share. Raises UnsupportedError.
        """
        if self._needed:
            self._needed, _ = self._compare("look for replicas", contents=False)
            self.agreed = not self._needed

    def agree(self) -> bool:
        """Before a checkpoint is begun, at the same place on all ranks, unless it is `agreed`: everything is compared.

        State that is not the same on all that should share it is written whole by each rank that has it. Whether there
        is such state, so that the layout is another one. Raises UnsupportedError for parameters that differ.
        """
        if self.agreed:
            return False
        self._keep_unlike(set())
        _, unlike = self._compare("compare replicas", contents=True)
        self._keep_unlike(unlike)
        self.agreed = True
        return bool(unlike)

    def forget(self) -> bool:
        """After a restore, which may have brought other state: compare again. Whether the layout is another one."""
        self.agreed = not self._needed
        was = bool(self._unlike)
        self._keep_unlike(set())
        return was

    def _compare(self, what: str, *, contents: bool) -> tuple[bool, set[str]]:
        """Whether anybody shares anything, and names of parameters whose state is not the same on all ranks that should
        share it. In general that takes a few bytes a rank: only where something differs, everything is listed. Without
        `contents`, only parameters are looked at, and not what is in them.
        """
        rows: dict[str, list[list[str]]] = {}
        vote: _Vote = {}
        try:
            for ranks, each in self._look(state=contents).items():
                hashes = each.hashes() if contents else [""] * len(each.pieces)
                rows[ranks] = [[*place_of(p.slice), hash] for p, hash in zip(each.pieces, hashes, strict=True)]
            if contents:
                self._known = {ranks: {name for name, *_ in found} for ranks, found in rows.items()}
            vote = {"digests": {ranks: digest(map(" ".join, found)) for ranks, found in rows.items()}}
        except (LayerwiseError, OSError) as error:
            vote = {"error": describe_error(error)}
        found: _Differing = self._participant.agree(what, vote, _differing)
        if not found["differing"]:
            return found["any"], set()
        listed = {ranks: rows[ranks] for ranks in found["differing"] if ranks in rows}
        unlike = self._participant.agree(what, listed, lambda votes: judge(found["differing"], votes))
        return True, set(unlike)

    # -- with each checkpoint -----------------------------------------------------------------------------------

    def report(self, attempt: AttemptId, found: Survey) -> None:
        """At the boundary of an attempt, before it is said to be staged: what this rank takes for shared."""
        if not self._needed:
            return
        new: dict[str, list[str]] = {}
        if self._of is None or self._of() is not found:
            self._sums.clear()
            self._of, self._common = weakref.ref(found), self._look(state=True)
            new = {ranks: each.new(self._known.setdefault(ranks, set())) for ranks, each in self._common.items()}
        groups = [self._said(attempt, ranks, each, new.get(ranks, [])) for ranks, each in self._common.items()]
        if groups:
            self._participant.post(
                {"t": "alike", "rank": self._participant.rank, "world_size": self._participant.world_size,
                 "seq": attempt.seq, "attempt": attempt.text, "step": attempt.step, "groups": groups}
            )  # fmt: skip

    def _said(self, attempt: AttemptId, ranks: str, held: Common, new: list[str]) -> AlikeGroup:
        """What the last checkpoint has of device memory goes with it: the host does not wait for this one's."""
        all_ranks = ranks_of(ranks, self._participant.world_size)
        said: AlikeGroup = {
            "ranks": ranks, "count": len(all_ranks), "listing": held.listing, "new": new, "samples": [],
        }  # fmt: skip
        if self._sampled:
            first = all_ranks[0] == self._participant.rank
            if (sums := self._sums.pop(ranks, None)) is not None:
                said["samples"].append(sums.said(name=first))
            said["samples"].append(held.sample(attempt, name=first))
            if (sums := held.sums(attempt)) is not None:
                self._sums[ranks] = sums
        return said

    def heed(self) -> bool:
        """What the coordinator found to be unlike is written whole from now on. Whether there was anything."""
        told = self._participant.take_unlike() if self._needed else set()
        if not told:
            return False
        views = [view for view in self._framework.params if ranks_text(self._framework.sharers(view)) in told]
        self._keep_unlike(self._unlike | {view.fqn for view in views})
        return True

    # -- inside -------------------------------------------------------------------------------------------------

    def _keep_unlike(self, fqns: set[str]) -> None:
        self._unlike, self._of, self._common = fqns, None, {}  # which hold what may be replaced now
        self._sums.clear()
        self._framework.keep_unlike(fqns)

    def _look(self, *, state: bool) -> dict[str, Common]:
        """By the ranks that hold it alike, as text; with the optimizers' `state` or without."""
        framework = self._framework
        found: dict[str, list[Piece]] = {}
        states = self._optimizer.states(framework.params) if state else [{}] * len(framework.params)
        for view, values in zip(framework.params, states, strict=True):
            for kind, tensor in (("param", view.param), *sorted(values.items(), key=lambda item: str(item[0]))):
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    if ranks := framework.alike(view, kind, tensor):
                        piece = Piece(framework.need(view, kind, tensor), framework.local(tensor), False)
                        found.setdefault(ranks_text(ranks), []).append(piece)
        return {ranks: Common(pieces) for ranks, pieces in found.items()}


def _differing(votes: list[_Vote]) -> _Differing:
    """Rank 0's: the ranks that do not say to share the same."""
    for rank, vote in enumerate(votes):
        if "error" in vote:
            said: DescribedError = {**vote["error"], "message": f"rank {rank}: {vote['error']['message']}"}
            raise rebuild_error(said)
    digests = [vote["digests"] for vote in votes]
    texts = sorted({text for each in digests for text in each})
    differing = [text for text in texts if len({digests[rank].get(text) for rank in ranks_of(text, len(votes))}) > 1]
    return {"any": bool(texts), "differing": differing}


def judge(texts: Sequence[str], votes: Sequence[dict[str, list[list[str]]]]) -> list[str]:
    """Rank 0's: of what each rank of `texts` holds (name, place, hash), the parameters whose state is not the same on
    all of them; for ranks that are known not to hold the same.

    Raises UnsupportedError for parameters that not all have, or have in another order, or that have other values.
    """
    unlike: set[str] = set()
    for text in texts:
        ranks = ranks_of(text, len(votes))
        held = {rank: {(name, place): hash for name, place, hash in votes[rank].get(text, [])} for rank in ranks}
        differing: dict[str, list[str]] = {}  # parameters, by which ranks agree
        for name, place in dict.fromkeys(key for each in held.values() for key in each):
            by_hash: dict[str | None, list[int]] = {}
            for rank in ranks:
                by_hash.setdefault(held[rank].get((name, place)), []).append(rank)
            if len(by_hash) == 1:
                continue
            if not is_param(name):
                unlike.add(name.partition("/")[2])
            elif lacking := by_hash.get(None):
                raise UnsupportedError(
                    f"the wrapper says that ranks {text} hold {name} ({place}) alike, and rank {lacking[0]} has no "
                    "such parameter: what they hold must have the same names and shapes"
                )
            else:
                sides = " and ".join(f"rank {ranks_text(side) or side[0]}" for side in by_hash.values())
                differing.setdefault(sides, []).append(name)
        for sides, names in differing.items():
            raise UnsupportedError(unequal(_listed(names, ", "), sides))
        if not unlike:
            raise UnsupportedError(f"ranks {text} hold the same parameters, but not in the same order")
    if unlike:
        log.warning(
            "ranks that should share it do not have the same optimizer state for %s: each saves its own of these",
            _listed(sorted(unlike), ", "),
        )
    return sorted(unlike)


def _listed(names: Sequence[str], between: str) -> str:
    more = f"{between}{len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return between.join(names[:_LISTED]) + more
