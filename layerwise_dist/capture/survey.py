# SPDX-License-Identifier: Apache-2.0
"""Finds what to capture now: every tensor of model and optimizer that this rank writes, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

from layerwise_dist.capture.glance import Glance, glance_at, has_address
from layerwise_dist.capture.held import check_present, holder
from layerwise_dist.errors import ConfigError, StateError, UnsupportedError
from layerwise_dist.frameworks.framework import Framework, ParamView
from layerwise_dist.frameworks.names import check_unique
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.overlaps import overlaps
from layerwise_dist.frameworks.subclasses import describe_param, is_description, stands_for_others
from layerwise_dist.scheduler import LayerSize
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.shard_layout import PACK_BELOW, Source
from layerwise_dist.tensors.pieces import Batch, Piece, check_layout

# Extent of everything that is copied at the boundary. No module's name can clash: it has no layer's place in the tree.
BOUNDARY_LAYER = "(boundary)"
# Frozen parameters of fewer bytes on a rank are copied at every boundary: that costs less than the folder, the file and
# three flushes of a base, and the checkpoints of a model with a few frozen scalars stay complete in themselves.
LEAST_BASE_BYTES = 1 << 20
# What stands before the first slash in names of the file that are not the optimizer's.
_OTHER_KINDS = ("param", "master", "buffer", "state", ".pad")


Arrange = Callable[[Sequence[LayerSize]], list[list[str]]]


def _one_by_one(layers: Sequence[LayerSize]) -> list[list[str]]:
    return [[layer.name] for layer in layers]


@dataclass(frozen=True)
class Survey:
    """`batches` are captured from the update on, by lease or by staging; `copied` pieces are copied at the boundary;
    `frozen` ones, which no update changes, are written once and referred to (`capture/frozen.py`). `frozen_params` are
    the parameters that these are of: a DTensor's version counter rises, and not that of its local part.

    `key` changes exactly when the shard needs a new layout: a tensor came, went, moved, or changed its shape or dtype.
    `order` names each parameter's state in the optimizer's order, `scalars` (fqn, name, the state's dict) what of it is
    no tensor. `extra_states` are the modules with `get_extra_state()`, `standing` describes by fqn the parameters that
    stand for other tensors. `addresses` are those of the pieces of all batches; where one of them moves, there is
    another survey. `held` keeps the memory of the leased and the frozen ones alive, whatever becomes of the tensors.
    The lists run over all pieces of all batches: computed once, used at every checkpoint.
    """

    batches: tuple[Batch, ...]
    copied: tuple[Piece, ...]
    frozen: tuple[Piece, ...]
    frozen_params: tuple[torch.Tensor, ...]
    order: dict[str, list[str]]
    scalars: tuple[tuple[str, str, Mapping[str, Any]], ...]
    extra_states: list[tuple[str, torch.nn.Module]]
    standing: Mapping[str, Any]
    key: tuple[Any, ...]
    addresses: list[int]
    held: Any

    @cached_property
    def pieces(self) -> list[Piece]:
        return [piece for batch in self.batches for piece in batch.pieces]

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        return [piece.tensor for piece in self.pieces]

    @cached_property
    def batch_of(self) -> list[int]:
        """Of each piece, the number of its batch."""
        return [number for number, batch in enumerate(self.batches) for _ in batch.pieces]

    @cached_property
    def pieces_of(self) -> list[range]:
        """Of each batch, the numbers of its pieces."""
        ends = [0, *accumulate(len(batch.pieces) for batch in self.batches)]
        return [range(begin, end) for begin, end in pairwise(ends)]

    @cached_property
    def _batch_of_layer(self) -> dict[str, int]:
        return {layer: number for number, batch in enumerate(self.batches) for layer in batch.layers}

    def batches_with(self, layers: Iterable[str]) -> set[int]:
        """Numbers of the batches that any of these layers is in."""
        of = self._batch_of_layer
        return {of[layer] for layer in layers if layer in of}

    @cached_property
    def leased(self) -> list[bool]:
        """Of each piece, whether it is read in place."""
        return [not batch.staged for batch in self.batches for _ in batch.pieces]

    @cached_property
    def gathered(self) -> list[int]:
        """Numbers of the extents that are written out of one buffer: staged batches, and what the boundary copies."""
        return [number for number, batch in enumerate(self.batches) if batch.staged] + [len(self.batches)]

    @cached_property
    def nbytes(self) -> int:
        """Of one shard; frozen pieces are in none."""
        return sum(piece.slice.nbytes for piece in [*self.pieces, *self.copied])

    @cached_property
    def staged_bytes(self) -> int:
        return sum(batch.nbytes for batch in self.batches if batch.staged)

    def sources(self, memory_align: int) -> list[tuple[str, list[Source]]]:
        """What the shard's layout is made of: the batches, then the extent of what is copied at the boundary."""
        batches = [
            (
                batch.name,
                [
                    Source(p.slice, 0 if batch.staged else p.tensor.data_ptr() % memory_align, p.wrapped)
                    for p in batch.pieces
                ],
            )
            for batch in self.batches
        ]
        return [*batches, (BOUNDARY_LAYER, [Source(piece.slice, 0, piece.wrapped) for piece in self.copied])]

    def live_scalars(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state that is no tensor, as it is now, by parameter and name."""
        found: dict[str, dict[str, Any]] = {}
        for fqn, name, state in self.scalars:
            found.setdefault(fqn, {})[name] = state[name]
        return found


class Surveyor:
    """Looks at the live tensors of one rank at every checkpoint; makes a new `Survey` only when one of them moved."""

    def __init__(
        self, framework: Framework, optimizer: OptimizerAdapter, capture: str = "auto",
        arrange: Arrange = _one_by_one, *, bases: bool = True,
    ) -> None:  # fmt: skip
        """`capture` is the configuration's: "auto" (lease host memory, stage device memory), "lease" or "stage".

        `arrange` puts layers into batches. Without `bases` frozen parameters are copied at each boundary, as buffers
        are.
        """
        self._bases = bases
        self._framework, self._optimizer, self._capture, self._arrange = framework, optimizer, capture, arrange
        self._last: tuple[Glance, Survey] | None = None
        self._frozen: frozenset[int] = frozenset()

    def forget(self) -> None:
        """The next look makes a new survey: `arrange` has changed."""
        self._last = None

    def gather(self) -> None:
        """Before a capture of all: what is not in memory comes there. Raises LayerwiseError or OSError."""
        self._optimizer.gather()

    def look(self, copying: frozenset[str] = frozenset(), *, sealing: bool = False) -> Survey:
        """`copying` holds names (`<kind>/<fqn>`) that the audit found unsafe to lease. With `sealing`, what was frozen
        at the last look still is: what an optimizer has been given since its last update is changed by its next one.

        Raises UnsupportedError.
        """
        last = self._last[0] if self._last is not None else None
        glance = glance_at(self._framework, self._optimizer, copying, last)
        frozen = self._may_be_frozen(glance) if sealing else self._still_frozen()
        if self._last is None or frozen is not self._frozen or glance is not self._last[0]:
            self._last = None  # if this fails, `arrange` may have been asked for other layers than its
            self._last = glance, self._survey(copying, glance.held.states, frozen if sealing else None)
        return self._last[1]

    def known(self, copying: frozenset[str]) -> Survey | None:
        """What the last look found, if that is still what is wanted; nothing is compared with what there is now. It
        keeps the memory that it names.
        """
        wanted = self._last is not None and self._last[0].copying == copying and self._still_frozen() is self._frozen
        return self._last[1] if wanted and self._last is not None else None

    def _still_frozen(self) -> frozenset[int] | None:
        """The parameters that were frozen at the last look, by id; None if one of them is no more."""
        if self._frozen and not self._frozen.isdisjoint(id(view.param) for view in self._optimizer.trained):
            return None
        return self._frozen

    def _may_be_frozen(self, glance: Glance) -> frozenset[int]:
        """Those, and what has come since and no optimizer has been given."""
        if self._last is None or glance.params is self._last[0].params:
            return self._frozen
        known = {id(view.param) for view in (*self._last[0].params, *self._optimizer.trained)}
        return self._frozen.union(id(view.param) for view in glance.params if id(view.param) not in known)

    def _survey(
        self, copying: frozenset[str], states: list[Mapping[str, Any]], frozen_ids: frozenset[int] | None
    ) -> Survey:
        """`frozen_ids`: which parameters may be frozen; None: this is the moment to find out."""
        shared = self._shared(states)
        frozen = self._frozen_pieces(copying, frozen_ids, shared)
        self._frozen = frozenset(id(view.param) for view, _ in frozen)
        layers: dict[str, list[Piece]] = {}
        copied: list[Piece] = []
        order: dict[str, list[str]] = {}
        scalars: list[tuple[str, str, Mapping[str, Any]]] = []
        updated = {id(view.param) for view in self._optimizer.views}

        def add(view: ParamView, kind: str, tensor: torch.Tensor, may_lease: bool) -> None:
            may_lease = may_lease and (kind, view.fqn) not in shared
            for piece in self._framework.pieces(view, kind, tensor, lease=may_lease):
                if piece.lease and self._in_layer(piece, copying):
                    layers.setdefault(view.layer, []).append(piece)
                else:
                    copied.append(piece)

        for view, state in zip(self._framework.params, states, strict=True):
            if id(view.param) not in self._frozen:
                add(view, "param", view.param, id(view.param) in updated)
            if state:
                order[view.fqn] = list(state)
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    self._check_name(name)
                    check_layout(f"{self._optimizer.kind}'s state {name} of {view.fqn}", value)
                    add(view, name, value, True)
                else:
                    if is_description(name, value):
                        self._check_description(f"{self._optimizer.kind}'s state {name[:-2]} of {view.fqn}", value)
                    scalars.append((view.fqn, name, state))
        standing = {view.fqn: describe_param(view.param) for view in self._framework.standing}
        for fqn, description in standing.items():
            self._check_description(f"parameter {fqn}", description)
        buffers = [fqn for fqn, _ in self._framework.buffers()]
        check_unique("a parameter and a buffer", [view.fqn for view in self._framework.params] + buffers)
        copied += [Piece(part, local, lease=False) for part, local in self._framework.written_buffers()]
        made = self._batches(layers)
        addresses, held = self._hold_memory(made, [piece for _, piece in frozen])
        placed = [(piece.slice, number, batch.staged) for number, batch in enumerate(made) for piece in batch.pieces]
        key = tuple(
            (part, number, 0 if staged else address)
            for (part, number, staged), address in zip(placed, addresses, strict=True)
        ) + tuple(piece.slice for piece in copied)
        for piece in copied:
            check_present(piece.slice.name, piece.tensor)
        # Small tensors first and together, as in a batch.
        frozen.sort(key=lambda found: found[1].slice.nbytes >= PACK_BELOW)
        return Survey(
            made, tuple(copied), tuple(piece for _, piece in frozen), tuple(view.param for view, _ in frozen),
            order, tuple(scalars), self._framework.extra_states(), standing, key, addresses, held,
        )  # fmt: skip

    def _shared(self, states: list[Mapping[str, Any]]) -> set[tuple[str, str]]:
        """Kind and name of parameters and state that share memory with each other or with a buffer, as other objects.

        A change through one of those raises the version counter of that one only, so none can be read in place: all are
        copied at the boundary, when each holds what the others do.
        """
        held: list[tuple[str, str, torch.Tensor]] = []
        for view, state in zip(self._framework.params, states, strict=True):
            params: list[torch.Tensor] = [view.param]
            if stands_for_others(view.param):
                params = [tensor for _, tensor in self._framework.param_parts(view)]
            held += [("param", view.fqn, param) for param in params]
            held += [(name, view.fqn, value) for name, value in state.items() if has_address(value)]
        held += [("buffer", fqn, buffer) for fqn, buffer in self._framework.buffers()]
        objects = list({id(tensor): tensor for _, _, tensor in held}.values())
        pairs = overlaps([self._framework.local(tensor) for tensor in objects])
        found = {id(objects[place]) for pair in pairs for place in pair}
        return {(kind, fqn) for kind, fqn, tensor in held if id(tensor) in found}

    def _frozen_pieces(
        self, copying: frozenset[str], ids: frozenset[int] | None, shared: Collection[tuple[str, str]]
    ) -> list[tuple[ParamView, Piece]]:
        """What this rank writes of parameters that no optimizer updates, if it is enough for a base."""
        if ids is None:
            ids = frozenset(id(view.param) for view in self._framework.params).difference(
                id(view.param) for view in self._optimizer.trained
            )
        found: list[tuple[ParamView, Piece]] = []
        for view in self._framework.params:
            if id(view.param) not in ids or ("param", view.fqn) in shared:
                continue
            pieces = self._framework.pieces(view, "param", view.param, lease=False)
            fit = all(self._stays(p) and p.slice.name not in copying for p in pieces)
            if fit:
                found += [(view, piece) for piece in pieces if piece.slice.numel]
        enough = sum(piece.slice.nbytes for _, piece in found) >= LEAST_BASE_BYTES
        return found if enough and self._bases else []

    def _in_layer(self, piece: Piece, copying: frozenset[str]) -> bool:
        if not piece.on_host and self._capture == "lease":
            raise ConfigError(
                f"capture = 'lease': {piece.slice.name} is on {piece.tensor.device}, and only host memory can be read "
                "in place; use 'auto' or 'stage'"
            )
        in_place = piece.on_host and self._capture != "stage"
        return piece.slice.name not in copying and (self._stays(piece) if in_place else _is_plain(piece))

    def _stays(self, piece: Piece) -> bool:
        """Whether the file has it as its memory is, and that can be held while it is read after the boundary."""
        return _is_plain(piece) and (not piece.on_host or holder().can_hold(piece.tensor))

    def _hold_memory(self, batches: Iterable[Batch], frozen: Iterable[Piece]) -> tuple[list[int], Any]:
        """Addresses of all pieces of these batches, and what holds the memory of those that are leased or frozen."""
        pieces = [(piece, batch.staged) for batch in batches for piece in batch.pieces]
        for piece in (*(piece for piece, _ in pieces), *frozen):
            check_present(piece.slice.name, piece.tensor)
        behind = [piece.tensor for piece in frozen if piece.on_host]
        leased, held = holder().hold([*(piece.tensor for piece, staged in pieces if not staged), *behind])
        address = iter(leased)
        return [piece.tensor.data_ptr() if staged else next(address) for piece, staged in pieces], held

    def _batches(self, layers: Mapping[str, list[Piece]]) -> tuple[Batch, ...]:
        staged = {
            name: self._capture == "stage" or not all(piece.on_host for piece in pieces)
            for name, pieces in layers.items()
        }
        sizes = [
            LayerSize(name, sum(piece.slice.nbytes for piece in pieces), staged[name])
            for name, pieces in layers.items()
        ]
        made = []
        for names in self._arrange(sizes):
            # Small tensors first and together: they pass through one bounce block and do not break up the large ones.
            pieces = sorted((p for name in names for p in layers[name]), key=lambda p: p.slice.nbytes >= PACK_BELOW)
            made.append(Batch(tuple(names), tuple(pieces), staged[names[0]]))
        return tuple(made)

    def _check_description(self, name: str, description: Mapping[str, Any]) -> None:
        """Of a tensor that stands for others: whether typed JSON takes all that it needs beside those."""
        try:
            typed_json.dumps(description, path="it")
        except StateError as error:
            raise UnsupportedError(
                f"{name} is a {description['class']}, and its __tensor_flatten__ returns what cannot be written: "
                f"{error}"
            ) from error

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or not name or "/" in name or name in _OTHER_KINDS:
            raise UnsupportedError(
                f"{self._optimizer.kind} keeps state under {name!r}, which cannot name a tensor in the file"
            )


def _is_plain(piece: Piece) -> bool:
    return piece.dense and not piece.tensor.is_inference()
