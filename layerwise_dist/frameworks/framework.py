# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a wrapper (plain module, DDP, FSDP2), and what all wrappers share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from layerwise_dist.errors import StateError, UnsupportedError, named
from layerwise_dist.frameworks.contents import Contents
from layerwise_dist.frameworks.names import CleanNames, check_unique, join
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.frameworks.subclasses import inside, stands_for_others
from layerwise_dist.tensors.pieces import Piece, check_layout, dtype_code
from layerwise_dist.tensors.slices import Slice, ranks_of


@dataclass(frozen=True, slots=True)
class ParamView:
    """One parameter under its clean name; `aliases` are other names of the same (tied) tensor."""

    fqn: str
    layer: str
    param: nn.Parameter
    aliases: tuple[str, ...]


class Framework:
    """A plain module, or one replica that nobody keeps equal: every rank writes all that it holds."""

    name = "plain"
    # Whether every rank writes all that it holds, be it that others hold the same (`replicas: apart`).
    apart = False
    # Whether what an optimizer updates is in memory only during its update.
    swapped = False
    # Whether it keeps parameters in memory of its own, so that none of them can belong to a second model.
    exclusive = False
    # Why parameters cannot come, go or be replaced once the model is wrapped, and what to do; empty if they can.
    fixed = ""
    # Whether each parameter is whole on each rank that has it: then its optimizer state may stand for other tensors.
    whole = True
    # Whether parameters may, if nothing trains them.
    opens = True

    def __init__(self, root: nn.Module, rank: int, world_size: int, prefix: str = "") -> None:
        """`prefix` is the model's name among several, and the first part of every name here; "" of a single one."""
        self.root, self.rank, self.world_size = root, rank, world_size
        self._whole: set[str] = set()  # whose state is not the same on all ranks, by the optimizer's word
        self._unlike: frozenset[str] = frozenset()  # and by what was found
        self._tree = _Tree(root, prefix, self.stand_ins, self.opens)
        self.params = self._in_tree = self._tree.look()

    def follow(self) -> None:
        """Brings parameters, buffers and extra states up to what the module tree has now.

        `params` stays the very same list while nothing in it came, went, or got another name. Raises UnsupportedError
        where the wrapper does not allow for that.
        """
        found = self._tree.look()
        if found is self._in_tree:
            return
        if self.fixed:
            raise UnsupportedError(f"{changes(self._in_tree, found)} after attach(). {self.fixed}")
        self._take_up(found)
        self._in_tree = found

    def _take_up(self, found: list[ParamView]) -> None:
        """These are the parameters from now on."""
        self.params = found

    def stand_ins(self) -> Mapping[int, nn.Parameter]:
        """Of what hangs in the module tree in place of a parameter, by its id, which one that is."""
        return {}

    @property
    def roots(self) -> list[nn.Module]:
        """The modules whose forward is a forward of the training."""
        return [self.root]

    def sharers(self, view: ParamView) -> tuple[int, ...]:
        """The ranks, this one included, that may have written what this rank needs of a parameter and its state: they
        hold it alike, or parts of it. Empty if this rank writes all that it holds.
        """
        return ()

    def alike(self, view: ParamView, kind: str, tensor: torch.Tensor) -> tuple[int, ...]:
        """The ranks, this one included, that hold this very tensor alike, so that one of them writes each part of it
        for all; empty if this rank writes all of it. They are the same for all state of a parameter, or none.
        """
        unlike = tensor is not view.param and (view.fqn in self._whole or view.fqn in self._unlike)
        return () if self.apart or unlike else self._replicas(view, tensor)

    def _replicas(self, view: ParamView, tensor: torch.Tensor) -> tuple[int, ...]:
        """`alike`, by the wrapper's word alone."""
        return ()

    def partners(self) -> set[int]:
        """All ranks that `sharers` and buffers name."""
        named = {self.sharers(view) for view in self.params}
        named |= {ranks_of(part.among, self.world_size) for part, _ in self.buffer_slices()}
        return {rank for ranks in named for rank in ranks}

    def keep_state_whole(self, fqns: Collection[str]) -> None:
        """Optimizer state of these parameters is not the same on all ranks: who has some writes all of it."""
        self._whole.update(fqns)

    def keep_unlike(self, fqns: Collection[str]) -> None:
        """The same, of what was found to be so; what was found before is forgotten."""
        self._unlike = frozenset(fqns)

    def write_apart(self) -> None:
        """From now on every rank writes all that it holds."""
        self.apart = True

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's plain tensor behind `tensor`, sharing its memory."""
        return tensor.detach()

    def in_memory(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """This rank's part of each buffer or tensor of state; cheaper than asking `local` for them."""
        return tensors

    def params_in_memory(self) -> Sequence[torch.Tensor]:
        """The tensors that this rank's parameters lie in, be it several of them in one."""
        if not self.standing:
            return self.in_memory([view.param for view in self.params])
        return [tensor for view in self.params for _, tensor in self.param_parts(view)]

    @property
    def standing(self) -> Sequence[ParamView]:
        """Those of the parameters that stand for other tensors."""
        return self._tree.standing

    def param_parts(self, view: ParamView) -> list[tuple[Slice, torch.Tensor]]:
        """What restore must fill of a parameter: itself, or the tensors that it stands for."""
        if not stands_for_others(view.param):
            return [(self.need(view, "param", view.param), view.param)]
        return [
            (Slice.whole("param", name, dtype_code(tensor.dtype, f"param/{name}"), tuple(tensor.shape)), tensor)
            for name, tensor in inside(view.fqn, view.param)
        ]

    def names(self) -> dict[int, str]:
        """Of each tensor that an optimizer of this model may hold, by its id."""
        return {id(view.param): view.fqn for view in self.params}

    def gradient_ready_params(self) -> list[nn.Parameter]:
        """Parameters whose `register_post_accumulate_grad_hook` costs training nothing but the call."""
        return [view.param for view in self.params if view.param.is_leaf and view.param.requires_grad]

    def forward_modules(self) -> list[nn.Module]:
        """Modules after whose forward the engine may look whether a checkpoint can be judged."""
        return [self.root]

    def need(self, view: ParamView, kind: str, tensor: torch.Tensor) -> Slice:
        """Which slice this rank's tensor is: the parameter's own, or a state tensor's. What restore must fill."""
        return Slice.whole(kind, view.fqn, dtype_code(tensor.dtype, f"{kind}/{view.fqn}"), tuple(tensor.shape))

    def pieces(self, view: ParamView, kind: str, tensor: torch.Tensor, *, lease: bool) -> list[Piece]:
        """The pieces of `tensor` that this rank writes."""
        if stands_for_others(tensor):
            return [Piece(part, inner.detach(), lease) for part, inner in self.param_parts(view)]
        local = self.local(tensor)
        return [Piece(self.need(view, kind, tensor), local, lease, local is not tensor and self.is_wrapped(tensor))]

    def is_wrapped(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a distributed tensor whose local part is what is written."""
        return False

    def state_shape(self, view: ParamView, entry: Slice) -> tuple[int, ...]:
        """Shape of the optimizer's tensor on this rank that `entry` was saved from."""
        return entry.global_shape

    def keeps_state(self, view: ParamView) -> bool:
        """Whether this rank's optimizer has state of a parameter that others have some of."""
        return True

    def cut_buffers(self) -> list[str]:
        """Names of buffers that are cut over ranks, so that this rank holds a part and nothing says which."""
        return []

    def new_state(self, view: ParamView, entry: Slice, dtype: torch.dtype, wrapped: bool) -> torch.Tensor:
        """An uninitialized optimizer state tensor like the one that was saved as `entry`, in the parameter's memory.

        Strides follow the parameter's where the shapes agree, as `zeros_like` makes them.
        """
        param, shape = view.param, self.state_shape(view, entry)
        if shape == tuple(param.shape):
            return torch.empty_like(param, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype, device=param.device if shape else "cpu")

    def with_gradient(self) -> list[str]:
        """The parameters that have one, be it zeros: AdamW decays those, and leaves parameters with None alone."""
        gradients = map(_GRADIENT, self.params)
        return [view.fqn for view, gradient in zip(self.params, gradients, strict=True) if gradient is not None]

    def frees_gradients(self, view: ParamView) -> bool:
        """Whether an update leaves no gradient, and the next one must find none."""
        return False

    def put_gradient(self, view: ParamView, present: bool) -> None:
        """Zeros, or None: the values of a boundary's gradients are never used again."""
        put_gradient(view.param, present)

    def carry(self) -> Any:
        """What the wrapper has learnt since it was made and a resumed job must know too, as typed JSON takes it."""
        return None

    def part_of(self, carried: Any, parts: Parts) -> Any:
        """What of it a restore of `parts` takes up."""
        return carried

    def carry_on(self, carried: Any, step: int, parts: Parts, *, same_world: bool) -> Any:
        """What `take_up` gets of a checkpoint of another cut. `carried` is what the same kind of wrapper had come to at
        that step, in a job of as many ranks if `same_world`; None of another kind.
        """
        return None

    def check_forward(self) -> None:
        """A training forward begins. Raises UnsupportedError where the ranks may not all make the same iterations."""

    def take_up(self, carried: Any) -> None:
        """Brings a new wrapper to where `carry` was asked. All ranks together, before any live tensor is loaded."""

    def detach(self) -> None:
        """Removes whatever hooks the framework has put on the model."""

    def buffers(self) -> list[tuple[str, torch.Tensor]]:
        """Persistent buffers under clean names, each once, as `follow` has found them."""
        return self._tree.buffers

    def buffer_slices(self) -> list[tuple[Slice, torch.Tensor]]:
        """Each of `buffers` as restore must fill it, with this rank's plain tensor."""
        found = []
        for fqn, buffer in self.buffers():
            local, code = self.local(buffer), dtype_code(buffer.dtype, f"buffer/{fqn}")
            found.append((Slice.whole("buffer", fqn, code, tuple(local.shape)), local))
        return found

    def written_buffers(self) -> list[tuple[Slice, torch.Tensor]]:
        """Those of `buffer_slices` that this rank writes."""
        return self.buffer_slices()

    def extra_states(self) -> list[tuple[str, nn.Module]]:
        """Modules that define `get_extra_state()`, as `follow` has found them."""
        return self._tree.extra_states

    def put_extra_states(self, saved: Mapping[str, Any], named: str, after: str) -> None:
        """Raises StateError for a module that does not take its own back, called `named`; `after`: what that leaves."""
        for name, module in self.extra_states():
            if name in saved:
                try:
                    module.set_extra_state(saved[name])
                except Exception as error:  # of the module's own code
                    raise StateError(
                        f"{named}[{name!r}]",
                        f"{type(module).__qualname__} does not accept what the checkpoint holds: "
                        f"{type(error).__name__}: {error}; {after}",
                    ) from error


def put_gradient(param: torch.Tensor, present: bool) -> None:
    """`Framework.put_gradient` of one tensor that has a gradient of its own."""
    if not present:
        param.grad = None
    elif param.grad is None:
        param.grad = torch.zeros_like(param)
    else:
        # Gradients that are views (of DDP's buckets, of FSDP1's flat ones) cannot be detached, and need not be.
        (param.grad.requires_grad_(False) if param.grad.grad_fn is None else param.grad.detach_()).zero_()


_GRADIENT = operator.attrgetter("param.grad")
_DICTS = operator.attrgetter("_modules", "_parameters", "_buffers")
_HIDDEN = operator.attrgetter("_non_persistent_buffers_set")


class _Tree:
    """What hangs in the module tree: looked at in every checkpoint, walked when something came, went or changed.

    `params` and `buffers` are the very same lists while all in them is the same under the same names.
    """

    def __init__(
        self, root: nn.Module, prefix: str, stand_ins: Callable[[], Mapping[int, nn.Parameter]], opens: bool
    ) -> None:
        self._root, self._prefix, self._stand_ins, self._opens = root, prefix, stand_ins, opens
        self._modules: list[nn.Module] = []
        self._held: Contents | None = None
        self._hidden: list[Any] = []
        self.params: list[ParamView] = []
        self.standing: list[ParamView] = []
        self.buffers: list[tuple[str, torch.Tensor]] = []
        self.extra_states: list[tuple[str, nn.Module]] = []

    def look(self) -> list[ParamView]:
        """Brings the lists up to date, and returns `params`."""
        if self._held is None or not self._held.same(self._dicts()) or self._hidden != self._hidden_now():
            self._walk()
        return self.params

    def _dicts(self) -> list[Any]:
        return [*chain.from_iterable(map(_DICTS, self._modules))]

    def _hidden_now(self) -> list[Any]:
        """How many buffers of each module are not persistent, and which."""
        hidden = [*map(_HIDDEN, self._modules)]
        return [[*map(len, hidden)], [*chain.from_iterable(hidden)]]

    def _walk(self) -> None:
        self._held = None
        self._modules = list(self._root.modules())
        clean = CleanNames(self._root, self._prefix)
        params = _views(clean, self._stand_ins(), self._opens)
        names = clean.of_module
        seen: set[int] = set()
        buffers = []
        for module in self._modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                    seen.add(id(buffer))
                    buffers.append((join(names[id(module)], name), buffer))
        for name, buffer in buffers:
            check_layout(f"buffer {name}", buffer)
        check_unique("two buffers", (name for name, _ in buffers))
        if changes(self.params, params):
            self.params = params
            self.standing = [view for view in params if stands_for_others(view.param)]
        if [(name, id(buffer)) for name, buffer in buffers] != [(name, id(buffer)) for name, buffer in self.buffers]:
            self.buffers = buffers
        self.extra_states = [
            (names[id(module)], module)
            for module in self._modules
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]
        check_unique("two modules with get_extra_state()", (name for name, _ in self.extra_states))
        # Last: what could not be listed is not known at the next look either.
        self._held, self._hidden = Contents(self._dicts()), self._hidden_now()


def same_objects(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether both have the very same objects, in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def changes(before: Sequence[ParamView], now: Sequence[ParamView]) -> str:
    """What happened to a model's parameters, in words and by name; empty if nothing did."""
    if [(view.fqn, id(view.param), view.aliases) for view in before] == [
        (view.fqn, id(view.param), view.aliases) for view in now
    ]:
        return ""
    was, there = ({view.fqn: view.param for view in views} for views in (before, now))
    found = {
        "replaced by another Parameter": [fqn for fqn in was if fqn in there and there[fqn] is not was[fqn]],
        "added": [fqn for fqn in there if fqn not in was],
        "removed": [fqn for fqn in was if fqn not in there],
    }
    words = [
        f"{named(names, 3)} {'were' if len(names) > 1 else 'was'} {what}" for what, names in found.items() if names
    ]
    return "; ".join(words) or "the order of the parameters, or which of them are tied, changed"


def _views(names: CleanNames, stand_ins: Mapping[int, nn.Parameter], opens: bool) -> list[ParamView]:
    views = []
    for param, (first, *rest) in names.parameters(stand_ins):
        if opens and stands_for_others(param):
            _check_inside(first, param)
        else:
            check_layout(f"parameter {first}", param)
        views.append(ParamView(first, first.rpartition(".")[0], param, tuple(rest)))
    check_unique("two parameters", (name for view in views for name in (view.fqn, *view.aliases)))
    return views


def _check_inside(fqn: str, param: torch.Tensor) -> None:
    """Raises UnsupportedError unless a parameter that stands for other tensors can be saved as those."""
    if param.requires_grad:
        raise UnsupportedError(
            f"parameter {fqn} is a {type(param).__name__}, which stands for other tensors and has no memory of its "
            "own; such parameters can be saved only if frozen (requires_grad=False), and this one is trained"
        )
    for name, tensor in inside(fqn, param):
        check_layout(f"parameter {name}", tensor)
