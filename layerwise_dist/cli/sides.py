# SPDX-License-Identifier: Apache-2.0
"""The two sides of `layerwise diff`: a checkpoint, or another tool's file of weights. Imports torch."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.errors import DamageError, NotFoundError, UnsupportedError
from layerwise_dist.interop import importing
from layerwise_dist.interop.gathered_state import Found
from layerwise_dist.reading.checkpoint import Checkpoint, is_of_model
from layerwise_dist.reading.differing import Readable, single
from layerwise_dist.tensors.pieces import DTYPE_CODES
from layerwise_dist.tensors.slices import ITEM_BYTES

# Under which a training script's file has the model's tensors, if not all of it are such.
_ORDER = ("buffer", "param", "master")  # of one name the last counts
_MODELS = ("model", "state_dict", "module", "model_state_dict")


@dataclass(frozen=True)
class Side:
    """`tensors`: of a checkpoint of this package all, by `<kind>/<fqn>`; None of another tool's, which may say
    otherwise what is a buffer. `weights`: by the keys of the model's `state_dict()`. `state`: the optimizer's, by
    `<kind>/<fqn>`.
    """

    title: str
    tensors: Mapping[str, Readable] | None
    weights: Mapping[str, Readable]
    state: Mapping[str, Readable]


def open_side(path: str, step: int | None, tag: str | None, allow_pickle: bool, stack: ExitStack) -> Side:
    """Raises WrongUsage for what is neither a checkpoint nor a file of weights, UnsupportedError, DamageError or
    OSError.
    """
    where = os.path.expanduser(path)
    if os.path.isdir(where) or not os.path.exists(where):
        try:
            catalogue = Catalogue(path)
        except WrongUsage:
            kind = _kind_of(where, tag)
            if kind is None:
                raise
            return _of_another_tool(path, where, kind, step, tag, allow_pickle)
        return _checkpoint(catalogue, step, tag, stack)
    if step is not None or tag is not None:
        raise WrongUsage(f"{path} is a file, and has no step or tag to choose")
    if not os.path.isfile(where):
        raise WrongUsage(f"{path}: neither a directory nor a file")
    return _safetensors(path, where, stack) if where.endswith(".safetensors") else _saved_by_torch(path, where)


def _checkpoint(catalogue: Catalogue, step: int | None, tag: str | None, stack: ExitStack) -> Side:
    manifest, hold = catalogue.take(step, tag)
    opened = stack.enter_context(Checkpoint(catalogue.manager, manifest, hold))
    weights = {key: opened[name] for key, name in opened.weights().items()} if not opened.models else {}
    for model in opened.models:
        weights |= {f"{model}.{key}": opened[name] for key, name in opened.weights(model).items()}
    tensors = dict(single(opened))
    state = {name: tensor for name, tensor in tensors.items() if not is_of_model(name)}
    return Side(f"step {manifest.step} in {catalogue.root}", tensors, weights, state)


def _kind_of(where: str, tag: str | None) -> str | None:
    try:
        return importing.kind_of(where, tag)
    except (UnsupportedError, NotFoundError):
        return None


def _of_another_tool(
    path: str, where: str, kind: str, step: int | None, tag: str | None, allow_pickle: bool
) -> Side:  # fmt: skip
    """What an import would make of a folder of DCP's, DeepSpeed's or Hugging Face's."""
    if step is not None:
        raise WrongUsage(f"{path} is not a directory of this package, and has no step to choose")
    if kind != "safetensors" and not allow_pickle:
        raise WrongUsage(
            f"{path} holds pickles: --allow-pickle reads them with an unpickler that runs nothing and accepts only "
            "tensors, plain values and a fixed list of other names"
        )
    _, found = importing.read(where, importing.Wanted(allow_pickle=allow_pickle, source_tag=tag))
    state: dict[str, Readable] = {}
    weights: dict[str, Readable] = {}
    of_kind: dict[str, dict[str, Readable]] = {kind: {} for kind in _ORDER}
    for name, each in found.tensors.items():
        kind_of_it, fqn = name.split("/", 1)
        whole = _Whole(name, each)
        if kind_of_it in of_kind:
            of_kind[kind_of_it] |= dict.fromkeys([fqn, *found.aliases.get(fqn, ())], whole)
        else:
            state[name] = whole
    for kind_of_it in _ORDER:
        weights |= of_kind[kind_of_it]
    return Side(f"{path} ({kind})", None, weights, state)


class _Whole:
    """A tensor of another tool's checkpoint that can be read only as a whole: held until its end was."""

    def __init__(self, name: str, found: Found) -> None:
        self._name, self._found = name, found
        self._held: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._found.shape

    def get_dtype(self) -> str:
        return DTYPE_CODES[self._found.dtype]

    def read_range(self, start: int, length: int) -> torch.Tensor:
        if self._held is None:
            try:
                self._held = self._found.read().detach().cpu().contiguous().reshape(-1)
            except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
                raise DamageError(f"{self._name} is not what its tool writes: {error}") from error
        whole = self._held
        if start + length >= math.prod(self.shape):
            self._held = None
        return whole[start : start + length]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A tensor of a file of torch's, mapped."""

    tensor: torch.Tensor
    code: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def get_dtype(self) -> str:
        return self.code

    def read_range(self, start: int, length: int) -> torch.Tensor:
        return self.tensor.detach().reshape(-1)[start : start + length].contiguous()


def _saved_by_torch(path: str, where: str) -> Side:
    """What `torch.save` wrote, without code: `weights_only` refuses all else."""
    try:
        try:
            tree = torch.load(where, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of a format that can't be mapped
            tree = torch.load(where, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        said = str(error).strip().splitlines()
        raise WrongUsage(f"{path}: torch.load takes no tensors from it: {said[0] if said else error!r}") from None
    if isinstance(tree, dict):
        tree = next((tree[name] for name in _MODELS if isinstance(tree.get(name), dict)), tree)
    tensors: dict[str, Readable] = {}
    for name, tensor in _tensors_in(tree, ""):
        code = DTYPE_CODES.get(tensor.dtype)
        if code is None or tensor.layout != torch.strided or tensor.is_quantized:
            raise WrongUsage(f"{path}: {name} is {tensor.dtype}, {tensor.layout}, which is not compared")
        tensors[name] = _Loaded(tensor.detach().resolve_conj().resolve_neg(), code)
    if not tensors:
        raise WrongUsage(f"{path}: holds no tensors")
    return Side(path, None, tensors, {})


def _tensors_in(tree: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name or "(the tensor)", tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors_in(value, f"{name}.{key}" if name else str(key))


@dataclass(frozen=True, slots=True)
class _Row:
    """A tensor of a safetensors file, read by its first dimension."""

    file: Any
    name: str
    code: str
    shape: tuple[int, ...]

    def get_dtype(self) -> str:
        return self.code

    def read_range(self, start: int, length: int) -> torch.Tensor:
        if not self.shape:
            whole: torch.Tensor = self.file.get_tensor(self.name)
            return whole.reshape(-1)[start : start + length]
        row = max(1, math.prod(self.shape[1:]))
        first, last = start // row, -(-(start + length) // row)
        found: torch.Tensor = self.file.get_slice(self.name)[first:last].reshape(-1)
        return found[start - first * row : start - first * row + length].contiguous()


def _safetensors(path: str, where: str, stack: ExitStack) -> Side:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise WrongUsage(f"{path}: reading it takes the package safetensors: pip install safetensors") from None
    try:
        file = stack.enter_context(safe_open(where, framework="pt", device="cpu"))
        tensors: dict[str, Readable] = {}
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            part = file.get_slice(name)
            if part.get_dtype() not in ITEM_BYTES:
                raise WrongUsage(f"{path}: {name} is of dtype {part.get_dtype()}, which is not compared")
            tensors[name] = _Row(file, name, part.get_dtype(), tuple(part.get_shape()))
    except SafetensorError as error:
        raise WrongUsage(f"{path}: is not a safetensors file: {error}") from None
    return Side(path, None, tensors, {})
