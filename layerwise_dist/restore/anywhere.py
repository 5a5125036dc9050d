# SPDX-License-Identifier: Apache-2.0
"""Fits a checkpoint to a job with another cut: another number of ranks, another wrapper, other groups.

What this rank would have saved is looked for by name in what all ranks of the checkpoint wrote, and each element is
read from whichever shard has it. As with the same cut, everything is checked before the first byte of a live tensor is
touched, and nothing is loaded with `load_state_dict`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from layerwise_dist.errors import DamageError, MismatchError
from layerwise_dist.frameworks.adams import Translation
from layerwise_dist.frameworks.framework import Framework, ParamView
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.frameworks.subclasses import unlike, unmakable
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore import casts
from layerwise_dist.restore.contents import OF_MODEL
from layerwise_dist.restore.contradictions import contradictions
from layerwise_dist.restore.filling import Read
from layerwise_dist.restore.loader import LoadPlan, at_most, listing
from layerwise_dist.restore.regrouping import regroup, translations, under_names, uneven
from layerwise_dist.restore.source import Source, SourceTensor
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.slices import Slice

# A parameter and its master are made of one another: by rounding, or by widening.
_MADE_OF = {"param": "master", "master": "param"}


@dataclass
class Fit:
    """What one rank has found. `problems` is what does not fit, in words. `unknown` are names in the checkpoint that
    this rank has no place for: a problem if no rank has. `taken` is what is rank 0's though the checkpoint's ranks
    differ.
    """

    loading: LoadPlan
    problems: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    taken: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # what wrappers had come to, and has no place here
    names: list[str] = field(default_factory=list)  # of what is read: `<kind>/<fqn>` here
    unfit: dict[str, str] = field(default_factory=dict)  # what is passed by for its shape or dtype, by name: in words


class Fitting:
    """One rank's plan, in the making."""

    def __init__(
        self, framework: Framework, optimizer: OptimizerAdapter, whole: Source, sealed: SealedState, where: str, *,
        partly: bool, parts: Parts, cast: str | None, pass_unfit: bool = False,
    ) -> None:  # fmt: skip
        """`sealed` is what this rank takes up of all that is not said of tensors (`ranks.for_rank`). With `pass_unfit`,
        and `partly`, a tensor of another shape is as one that the checkpoint has not.
        """
        self._pass_unfit = pass_unfit
        self._framework, self._optimizer, self._whole, self._where = framework, optimizer, whole, where
        self._lax, self._parts, self._cast = partly or not parts.strict, parts, cast
        self._fit = Fit(LoadPlan(sealed))
        self._names = self._fit.names
        self._used: set[str] = set()
        self._missing: list[str] = []
        self._problems: list[str] = []
        self._lossy: Counter[tuple[str, str, str]] = Counter()
        self._translations: dict[str, Translation] = {}  # of what an equal optimizer of another class has kept
        self._rename: dict[str, str] = {}  # of parameters here, their names in the checkpoint
        self._parts_of: dict[tuple[str, int], list[tuple[Slice, torch.Tensor]]] = {}  # of parameters here
        self._tied = {
            alias: name
            for state in whole.sealed
            for name, aliases in state.get("aliases", {}).items()
            for alias in aliases
        }

    def fit(self) -> Fit:
        """Raises UnsupportedError for a model that has become what cannot be saved; DamageError; OSError."""
        framework, fit = self._framework, self._fit
        framework.follow()
        takes_optimizer = self._parts.takes_optimizer
        try:
            self._whole.refuse_unlike(lambda kind: kind != "buffer" and (takes_optimizer or kind in OF_MODEL))
        except MismatchError as error:
            self._problems.append(str(error))
        for view in framework.params:
            self._param(view)
        for part, tensor in framework.buffer_slices():
            self._buffer(part, tensor)
        self._problems += [
            f"buffer/{fqn} is cut over ranks here, but a checkpoint does not say how buffers were cut"
            for fqn in framework.cut_buffers()
        ]
        loading = fit.loading
        if takes_optimizer:
            self._optimizer_state()
        if self._lax:
            loading.lacking, self._missing = self._missing, []
        self._problems = at_most(self._problems) + listing("missing from the checkpoint", self._missing)
        if self._lossy and self._cast != "target":
            self._problems += [
                f"{count} tensors of kind {kind} are {was} in the checkpoint and {now} here, which cannot hold all "
                'their values: restore(cast="target") rounds them'
                for (kind, was, now), count in sorted(self._lossy.items())
            ]
        self._problems += at_most(unlike(framework.standing, loading.sealed.get("standing", {})))
        self._problems += at_most(contradictions(self._names, loading.reads))
        fit.problems = self._problems
        present = {name for state in self._whole.sealed for name in state["gradients"]}
        gradients = [
            view.fqn
            for view in framework.params
            if self._rename.get(view.fqn) in present and not framework.frees_gradients(view)
        ]
        loading.sealed = {**loading.sealed, "gradients": gradients}
        if self._parts.strict or self._pass_unfit:
            fit.unknown = {name for name in self._whole.tensors if name not in self._used}
            if not takes_optimizer:
                fit.unknown = {name for name in fit.unknown if name.split("/", 1)[0] in OF_MODEL}
        return fit

    # -- the model ----------------------------------------------------------------------------------------------

    def _param(self, view: ParamView) -> None:
        for part, tensor in self._own_parts(view):
            names = [part.fqn, *(view.aliases if part.fqn == view.fqn else ())]
            name = self._find(part.kind, [*names, *(self._tied[name] for name in names if name in self._tied)])
            if name is None:
                self._missing.append(part.name)
                continue
            if self._passed_by(part, name):
                self._used.update(self._states_of(name))
                continue
            if part.fqn == view.fqn and name in self._used:
                self._problems.append(f"{part.name}: in the checkpoint it is the same parameter as {name}")
                continue
            self._rename.setdefault(view.fqn, name.split("/", 1)[1] if part.fqn == view.fqn else view.fqn)
            self._want(part, tensor, name, made=part.kind != name.split("/", 1)[0])

    def _own_parts(self, view: ParamView) -> list[tuple[Slice, torch.Tensor]]:
        """As `Framework.param_parts`, which is asked once for each parameter."""
        key = view.fqn, id(view.param)
        if key not in self._parts_of:
            self._parts_of[key] = self._framework.param_parts(view)
        return self._parts_of[key]

    def _unfit(self, wanted: Slice, name: str) -> str | None:
        """Why a tensor of the checkpoint cannot be what is wanted, in words."""
        saved = self._whole.tensors[name]
        if saved.shape == wanted.global_shape and casts.possible(saved.dtype, wanted.dtype):
            return None
        return (
            f"{wanted.name}: the checkpoint has {saved.dtype}{list(saved.shape)}, "
            f"the model {wanted.dtype}{list(wanted.global_shape)}"
        )

    def _passed_by(self, wanted: Slice, name: str) -> bool:
        """Whether it is as one that the checkpoint has not, since that has it in another shape."""
        unfit = self._unfit(wanted, name) if self._pass_unfit else None
        if unfit is None:
            return False
        self._fit.unfit[wanted.name] = unfit
        self._used.add(name)
        self._missing.append(wanted.name)
        return True

    def _states_of(self, name: str) -> list[str]:
        fqn = name.split("/", 1)[1]
        return [f"{kind}/{fqn}" for kind in self._whole.state_kinds.get(fqn, ())]

    def _find(self, kind: str, fqns: Sequence[str]) -> str | None:
        kinds = [kind, *([_MADE_OF[kind]] if kind in _MADE_OF else [])]
        return next((f"{k}/{fqn}" for fqn in fqns for k in kinds if f"{k}/{fqn}" in self._whole.tensors), None)

    def _buffer(self, part: Slice, tensor: torch.Tensor) -> None:
        if part.name not in self._whole.tensors:
            self._missing.append(part.name)
            return
        if self._passed_by(part, part.name):
            return
        # Rank 0 looks for all: it is the one that tells.
        if self._framework.rank == 0 and self._whole.differs(part.name):
            self._fit.taken.append(part.name)
        self._want(part, tensor, part.name)

    def _want(self, wanted: Slice, tensor: torch.Tensor, name: str, *, made: bool = False) -> None:
        """`made` says that what is wanted is made of another kind, as the framework would make it."""
        self._used.add(name)
        saved = self._whole.tensors[name]
        if (unfit := self._unfit(wanted, name)) is not None:
            self._problems.append(unfit)
            return
        if not (casts.exact(saved.dtype, wanted.dtype) or (made and wanted.kind == "param")):
            self._lossy[wanted.kind, saved.dtype, wanted.dtype] += 1
        self._fit.loading.reads.append(
            Read(self._framework.local(tensor), self._whole.spans(name, wanted), DTYPES[saved.dtype])
        )
        self._names.append(wanted.name)

    # -- the optimizer ------------------------------------------------------------------------------------------

    def _optimizer_state(self) -> None:
        framework, optimizer, loading = self._framework, self._optimizer, self._fit.loading
        idle = [view.fqn for view in framework.params if not view.param.requires_grad]
        lacking = {view.fqn for view in framework.params if view.fqn not in self._rename} if self._lax else set()
        views = [view for view in optimizer.state_views if framework.keeps_state(view)]
        held = {view.fqn for view in views}
        everything: list[Mapping[str, Any]] = [state["optimizer"] for state in self._whole.sealed]
        if self._pass_unfit:  # of what this model has not
            here = {name: name for name in self._rename.values()}
            everything = [under_names(each, here.get) for each in everything]
        live = optimizer.describe()
        found, problems = regroup(everything, live, self._rename, held=held, idle=idle, lacking=lacking)
        self._problems += problems
        loading.sealed = {**loading.sealed, "optimizer": found}
        for view in optimizer.views:  # whoever keeps the state of these
            name = self._rename.get(view.fqn)
            self._used.update(f"{kind}/{name}" for kind in self._whole.state_kinds.get(name or "", ()))
        if problems:
            return
        self._translations = translations(everything[0], live)
        self._translate_steps(views, found["scalars"])
        for view in views:
            self._state_of(view)
        self._problems += uneven(optimizer.joined(), found, lambda fqn: loading.states.get(fqn, ()))
        if not self._problems:
            self._problems += optimizer.check(found, lacking)
            self._problems += at_most(unmakable(found["scalars"], found["order"]))

    def _translate_steps(self, views: Sequence[ParamView], scalars: dict[str, dict[str, Any]]) -> None:
        """Counted in a tensor in the checkpoint and in a number here, or the other way round."""
        counted: dict[str, torch.Tensor] = {}
        reads = []
        for view in views:
            translation, name = self._translations.get(view.fqn), f"step/{self._rename.get(view.fqn)}"
            if translation is None:
                continue
            if translation.into_torch:
                step = scalars.get(view.fqn, {}).pop("step", None)
                if step is not None:
                    self._give_step(view, step)
            elif name in self._whole.tensors:
                saved = self._whole.tensors[name]
                if saved.shape != () or not casts.is_float(saved.dtype):
                    self._problems.append(f"{name}: {saved.dtype}{list(saved.shape)} is not a step count of torch's")
                    continue
                counted[view.fqn] = torch.empty((), dtype=DTYPES[saved.dtype], device="cpu")
                wanted = Slice.whole("step", view.fqn, saved.dtype, ())
                reads.append((counted[view.fqn], self._whole.spans(name, wanted)))
        self._whole.fill(reads)
        for fqn, memory in counted.items():
            value = float(memory.item())
            if value.is_integer():
                scalars.setdefault(fqn, {})["step"] = int(value)
            else:
                self._problems.append(
                    f"step of {fqn} is {value} in the checkpoint, and the optimizer here counts in ints"
                )

    def _give_step(self, view: ParamView, step: object) -> None:
        code = "F64" if torch.get_default_dtype() == torch.float64 else "F32"  # as torch makes it
        counts = isinstance(step, int) and 0 <= step < 1 << 53
        value = torch.tensor(step if counts else 0, dtype=DTYPES[code], device="cpu")
        if not counts or value.item() != step:
            self._problems.append(f"step of {view.fqn} is {step!r} in the checkpoint, which no {code} holds")
            return
        tensor = self._optimizer.place(view, Slice.whole("step", view.fqn, code, ()), False)
        given = self._fit.loading.given
        if any(each is tensor and other.item() != step for each, other in given):
            self._problems.append(
                f"{view.fqn} is one tensor with others to the optimizer here, and in the checkpoint it has another "
                "step than these: put it into a group of its own"
            )
        self._fit.loading.states.setdefault(view.fqn, {})["step"] = tensor
        given.append((tensor, value))

    def _state_of(self, view: ParamView) -> None:
        name = self._rename.get(view.fqn)
        if name is None:
            return
        sealed: Any = self._fit.loading.sealed["optimizer"]
        tensors, placed = self._whole.state_kinds.get(name, ()), self._fit.loading.states.get(view.fqn, ())
        numbers = sealed["scalars"].get(view.fqn, ())
        for kind in sealed["order"].get(view.fqn, ()):
            if not (kind in tensors or kind in numbers or kind in placed):
                raise DamageError(f"{self._where}: {kind}/{name} existed at the boundary, but no shard has it")
        param = self._own_parts(view)
        whole_param = param[0][0] if len(param) == 1 else None
        for kind in tensors:
            if kind == "step" and view.fqn in self._translations:
                continue
            first = self._whole.tensors[f"{kind}/{name}"]
            wanted = self._state_slice(view, kind, first, whole_param, name)
            if wanted is None:
                continue
            wrapped = first.shape != () and self._framework.is_wrapped(view.param)
            tensor = self._optimizer.place(view, wanted, wrapped)
            self._fit.loading.states.setdefault(view.fqn, {})[kind] = tensor
            self._want(replace(self._framework.need(view, kind, tensor), among=""), tensor, f"{kind}/{name}")

    def _state_slice(
        self, view: ParamView, kind: str, saved: SourceTensor, param: Slice | None, name: str
    ) -> Slice | None:
        """What this rank needs of a tensor of state: of one of the parameter's shape what it has of the parameter."""
        if param is None or saved.shape != param.global_shape or (saved.shape == () and not self._per_element(kind)):
            if saved.shape == () or self._framework.whole:
                return Slice.whole(kind, view.fqn, saved.dtype, saved.shape)
            self._problems.append(
                f"{kind}/{view.fqn} of shape {list(saved.shape)} is not of its parameter's shape, and this job cuts "
                "its parameters: which part of it belongs to which rank is not known"
            )
            return None
        source = self._find("param", [name])
        same = source is not None and self._whole.tensors[source].dtype == param.dtype
        # A torch optimizer keeps its state in the parameter's dtype, DeepSpeed in the master's.
        translation = self._translations.get(view.fqn)
        same = same and not (
            translation and translation.into_torch
        )  # its DeepSpeed original may keep fp32 state of bf16
        dtype = saved.dtype if same or not casts.is_float(saved.dtype) else param.dtype
        return replace(param, kind=kind, fqn=view.fqn, dtype=dtype, among="")

    def _per_element(self, kind: str) -> bool:
        """Of a parameter without dimensions: whether state of this kind has an element for each of a parameter's."""
        for name in self._rename.values():
            found = self._whole.tensors.get(f"{kind}/{name}")
            source = self._find("param", [name])
            if found and source and self._whole.tensors[source].shape != ():
                return found.shape == self._whole.tensors[source].shape
        return kind != "step"
