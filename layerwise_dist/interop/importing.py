# SPDX-License-Identifier: Apache-2.0
"""`layerwise import`: another tool's checkpoint as step N of a new lineage, or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerwise_dist.commit.metadata import Inventory
from layerwise_dist.errors import DamageError, DirectoryError, LayerwiseError, NotFoundError, UnsupportedError
from layerwise_dist.interop import deepspeed_files, from_dcp, from_deepspeed, from_torch, from_universal
from layerwise_dist.interop.gathered_state import Found, Imported
from layerwise_dist.interop.one_commit import OneCommit, check_names, root_of
from layerwise_dist.interop.one_shard import OneShard
from layerwise_dist.interop.pickles import check_allowed, load
from layerwise_dist.storage.filenames import STEPS_END
from layerwise_dist.storage.strict_json import loads
from layerwise_dist.tensors.pieces import is_dense

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Wanted:
    """What a user says of a source beside its path, as the options of the command are called."""

    allow_pickle: bool = False
    step: int | None = None
    tag: str | None = None
    source_tag: str | None = None
    optimizer: str | None = None
    names: Sequence[str] | None = None
    buffers: Sequence[str] = ()
    drop: Sequence[str] = ()
    timeout_s: float = 300.0


def kind_of(source: str, tag: str | None = None) -> str:
    """ "dcp", "safetensors", "deepspeed" or "torch". Raises NotFoundError, or UnsupportedError for none of them."""
    if not os.path.lexists(source):
        raise NotFoundError(f"{source}: no such file or directory")
    if os.path.isfile(source):
        return "safetensors" if source.endswith((".safetensors", _INDEX)) else "torch"
    if os.path.isfile(os.path.join(source, ".metadata")):
        return "dcp"
    if deepspeed_files.folder_of(source, tag) is not None:
        return "deepspeed"
    names = os.listdir(source) if os.path.isdir(source) else []
    if _INDEX in names or any(name.endswith(".safetensors") for name in names):
        return "safetensors"
    raise UnsupportedError(
        f"{source}: holds no checkpoint of a kind that an import reads: DCP's .metadata, *.safetensors, or DeepSpeed's "
        "latest and *_optim_states.pt"
    )


# What the members of a file raise that are not what the tool writes there.
_ODD = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def read(source: str, wanted: Wanted) -> tuple[str, Imported]:
    """(kind, what was found). Tensors are read when they are written. Raises LayerwiseError or OSError."""
    kind = kind_of(source, wanted.source_tag)
    try:
        found = _read_kind(kind, source, wanted)
    except (LayerwiseError, OSError):
        raise
    except _ODD as error:
        raise DamageError(f"{source}: it is not what its tool writes: {type(error).__name__}: {error}") from error
    for name in wanted.drop:
        if name not in found.objects:
            raise NotFoundError(f"--drop {name}: {source} has no such object; it has {sorted(found.objects) or 'none'}")
        del found.objects[name]
    if wanted.step is not None:
        found.step = wanted.step
    if not 0 <= found.step < STEPS_END:
        raise UnsupportedError(f"{source}: its step is {found.step}: give --step N")
    return kind, found


def _read_kind(kind: str, source: str, wanted: Wanted) -> Imported:
    allowed, buffers, optimizer = wanted.allow_pickle, wanted.buffers, wanted.optimizer
    if kind == "deepspeed":
        folder = deepspeed_files.folder_of(source, wanted.source_tag)
        assert folder is not None, "kind_of() has looked"
        check_allowed(folder, allowed)
        reader = from_universal if deepspeed_files.is_universal(folder) else from_deepspeed
        return reader.read(folder, allowed=allowed, buffers=buffers, optimizer=optimizer)
    if kind == "dcp":
        return from_dcp.read(source, allowed=allowed, buffers=buffers, optimizer=optimizer, names=wanted.names)
    if kind == "torch":
        value = load(source, allowed=allowed)
        return from_torch.read(source, value, buffers=buffers, optimizer=optimizer, names=wanted.names)
    return _safetensors(source, buffers)


def write(found: Imported, directory: str, wanted: Wanted, advance: Callable[[int], None] = lambda nbytes: None) -> str:
    """Makes it a checkpoint of a directory that holds none, and returns its folder's name. Whole, or not at all.

    `advance` hears of bytes as they are written. Raises DirectoryError, UnsupportedError, OSError.
    """
    root = root_of(directory)
    check_names(found.step, wanted.tag, None)
    slices = found.slices()
    commit = OneCommit(
        root, world_size=1, framework=found.framework, who="layerwise import", step=found.step, tag=wanted.tag,
        check=lambda inventory: _check_empty(inventory, root),
    )  # fmt: skip
    shard: OneShard | None = None
    try:
        shard = OneShard(commit.env, root, commit.attempt, 0, 1, [part for part, _ in slices], wanted.timeout_s)

        def tensors() -> Any:
            for part, each in slices:
                tensor = _read(each, part.name)
                yield tensor, True
                advance(tensor.nbytes)

        shard.write_tensors(tensors())
        report = shard.persist(found.sealed())
        shard = None
        commit.commit([report])
    finally:
        try:
            if shard is not None:
                shard.abort()
        finally:
            commit.close()
    return commit.attempt.folder


def _read(found: Found, name: str) -> torch.Tensor:
    try:
        tensor = found.read().detach()
    except (LayerwiseError, OSError):
        raise
    except _ODD as error:
        raise DamageError(f"{name}: its source is not what its tool writes: {type(error).__name__}: {error}") from error
    if tensor.dtype != found.dtype or tuple(tensor.shape) != found.shape:
        raise DamageError(f"{name}: its source has another one than it said")
    return tensor if is_dense(tensor) and tensor.device.type == "cpu" else tensor.cpu().contiguous().clone()


def _check_empty(found: Inventory, root: str) -> None:
    if not found.empty:
        raise DirectoryError(
            f"{root} holds checkpoints already, and an import neither adds to those nor replaces them: give a new one"
        )


def _safetensors(source: str, buffers: Sequence[str]) -> Imported:
    """One file, an index, or the folder of either: weights alone."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UnsupportedError(
            f"{source}: the package that reads it is not installed: pip install safetensors"
        ) from None
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    index = source if source.endswith(".json") else os.path.join(folder, _INDEX) if os.path.isdir(source) else ""
    expected: dict[str, str] = {}
    if index and os.path.isfile(index):
        with open(index, "rb") as file:
            try:
                tree = loads(file.read(64 << 20))
                expected = dict(tree["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise DamageError(f"{index}: no index of safetensors: {error}") from None
        if not all(isinstance(each, str) and os.path.basename(each) == each for each in expected.values()):
            raise DamageError(f"{index}: it names files outside its folder")
        files = sorted(set(expected.values()))
    else:
        files = [os.path.basename(source)] if not os.path.isdir(source) else sorted(
            name for name in os.listdir(source) if name.endswith(".safetensors")
        )  # fmt: skip
    found = Imported(source)
    for name in files:
        path = os.path.join(folder, name)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if expected and expected.get(key) != name:
                        raise DamageError(f"{path}: {key} is not where {_INDEX} says")
                    tensor = file.get_tensor(key)
                    lazily = Found(tensor.dtype, tuple(tensor.shape), lambda path=path, key=key: _one(path, key))  # type: ignore[misc]
                    found.add_model(key, lazily, buffers)
                    expected.pop(key, None)
        except FileNotFoundError:
            raise DamageError(f"{path} is missing, and {_INDEX} names it") from None
        except SafetensorError as error:
            raise DamageError(f"{path}: {error}") from None
    if expected:
        raise DamageError(f"{index}: {', '.join(sorted(expected)[:4])} are in none of its files")
    if not found.tensors:
        raise UnsupportedError(f"{source}: holds no tensors")
    config = os.path.join(folder, "config.json")
    if os.path.isfile(config):
        with open(config, "rb") as file:
            try:
                said = json.loads(file.read(1 << 20))
            except ValueError:
                said = {}
        if isinstance(said, dict) and said.get("tie_word_embeddings"):
            found.notes.append("tied weights: the model that resumes must tie them itself, as transformers does")
    return found


def _one(path: str, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)
