# SPDX-License-Identifier: Apache-2.0
"""Whether ranks that are said to hold the same do hold the same: the net under what a wrapper says.

Before a session's first checkpoint all ranks compare what is there, and hashes of it. From then on each says with each
checkpoint which tensors it takes for shared, and hashes of a few of them in turn; the coordinator commits nothing for
which these differ.

That parameters are equal is the wrapper's word: where they are not, that is an error. Of optimizer state no wrapper
says anything: where it is not the same on all ranks, each of them saves its own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypedDict, TypeVar

import torch

from layerwise_dist import _native
from layerwise_dist.capture.audit import ROUND, WINDOW_BYTES
from layerwise_dist.capture.survey import Survey
from layerwise_dist.commit.alike import unequal
from layerwise_dist.commit.messages import AlikeGroup, DescribedError
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.votes import describe_error, rebuild_error
from layerwise_dist.errors import LayerwiseError, UnsupportedError
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.tensors.pieces import Piece, is_dense
from layerwise_dist.tensors.slices import Slice, ranks_of, ranks_text

log = logging.getLogger("layerwise_dist")

MOST_WINDOWS = 4  # of at most WINDOW_BYTES each, that a checkpoint's sample hashes
_CHUNK_BYTES = 64 << 20  # of device memory that are on the host at once
_LISTED = 3
_W = TypeVar("_W")


@dataclass(frozen=True, slots=True)
class _Window:
    """Bytes `begin` to `end` of piece number `piece`."""

    piece: int
    begin: int
    end: int


class Common:
    """What this rank holds alike with the same other ranks, in an order that is the same on all of them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)
        self.listing = _digest(" ".join(_place(piece.slice)) for piece in self.pieces)
        windows = [
            _Window(number, begin, min(begin + WINDOW_BYTES, piece.slice.nbytes))
            for number, piece in enumerate(self.pieces)
            for begin in range(0, piece.slice.nbytes, WINDOW_BYTES)
            if piece.dense
        ]
        self._on_host = [window for window in windows if self.pieces[window.piece].on_host]
        self._elsewhere = [window for window in windows if not self.pieces[window.piece].on_host]

    def hashes(self) -> list[str]:
        """Of each piece, all of it."""
        return [_hash(piece.tensor, 0, piece.slice.nbytes) for piece in self.pieces]

    def new(self, known: set[str]) -> list[str]:
        """What is not among these names, and a hash of it: all of it, since nobody has compared it yet. Empty if there
        is nothing. `known` has it from then on.
        """
        pieces = [piece for piece in self.pieces if piece.slice.name not in known]
        known.update(piece.slice.name for piece in pieces)
        if not pieces:
            return []
        hashes = [_hash(piece.tensor, 0, piece.slice.nbytes) for piece in pieces]
        return [_digest(piece.slice.name for piece in pieces), _digest(hashes)]

    def sample(self, turn: int) -> tuple[str, str, str]:
        """Of the turn's windows: a hash of those of parameters, one of those of state, and which parameters these are
        of, in words. Host memory comes round in a hundred turns, if it is no more than so many windows; device memory,
        for which the host has to wait, is looked at in every hundredth.
        """
        chosen = in_turn(self._on_host, turn)
        if turn % ROUND == ROUND - 1:
            chosen += in_turn(self._elsewhere, turn // ROUND)
        params: dict[str, list[str]] = {}
        state: list[str] = []
        for window in chosen:
            piece = self.pieces[window.piece]
            name = piece.slice.name
            hashes = params.setdefault(name, []) if _is_param(name) else state
            hashes.append(_hash(piece.tensor, window.begin, window.end))
        return _digest(chain(*params.values())), _digest(state), _listed(list(params), " or ")


def in_turn(windows: Sequence[_W], turn: int) -> list[_W]:
    """A hundredth of them, at least one and at most `MOST_WINDOWS`; the next ones in the next turn."""
    count = min(MOST_WINDOWS, -(-len(windows) // ROUND))
    return [windows[(turn * count + number) % len(windows)] for number in range(count)]


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

    def __init__(self, framework: Framework, optimizer: OptimizerAdapter, participant: Participant) -> None:
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
                rows[ranks] = [[*_place(p.slice), hash] for p, hash in zip(each.pieces, hashes, strict=True)]
            if contents:
                self._known = {ranks: {name for name, *_ in found} for ranks, found in rows.items()}
            vote = {"digests": {ranks: _digest(map(" ".join, found)) for ranks, found in rows.items()}}
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
            self._of, self._common = weakref.ref(found), self._look(state=True)
            new = {ranks: each.new(self._known.setdefault(ranks, set())) for ranks, each in self._common.items()}
        groups: list[AlikeGroup] = [
            (ranks, each.listing, *each.sample(attempt.seq), new.get(ranks, [])) for ranks, each in self._common.items()
        ]
        if groups:
            self._participant.post(
                {"t": "alike", "rank": self._participant.rank, "world_size": self._participant.world_size,
                 "seq": attempt.seq, "attempt": attempt.text, "step": attempt.step, "groups": groups}
            )  # fmt: skip

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
        self._unlike, self._of = fqns, None
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
            if not _is_param(name):
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


def _place(part: Slice) -> tuple[str, str]:
    where = f"{part.start}+{part.length}" if part.is_flat else f"{part.offsets}+{part.lengths}"
    return part.name, f"{part.dtype} {part.global_shape} {where}"


def _is_param(name: str) -> bool:
    return name.startswith(("param/", "master/"))


def _hash(tensor: torch.Tensor, begin: int, end: int) -> str:
    """Of these bytes, wherever they lie; a tensor that is not row-major is hashed as if it were."""
    data = None
    if tensor.device.type != "cpu" or not is_dense(tensor):
        data = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    hashes = []
    for at in range(begin, end, _CHUNK_BYTES):
        stop = min(end, at + _CHUNK_BYTES)
        if data is None:
            hashed = _native.hash_memory(tensor.data_ptr() + at, stop - at)
        else:
            copy = data[at:stop].cpu()
            hashed = _native.hash_memory(copy.data_ptr(), stop - at)
        hashes.append(f"{hashed:016x}")
    return _digest(hashes)


def _digest(texts: Iterable[str]) -> str:
    return f"{_native.xxh3_64(chr(10).join(texts).encode()):016x}"


def _listed(names: Sequence[str], between: str) -> str:
    more = f"{between}{len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return between.join(names[:_LISTED]) + more
