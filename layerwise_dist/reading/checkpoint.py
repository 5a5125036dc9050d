# SPDX-License-Identifier: Apache-2.0
"""`open_checkpoint`: one committed checkpoint to read, whichever ranks wrote it, without a model and without a job.

While it is open it holds its manifest (`CheckpointMetadataManager.hold`), so that the retention of a job that runs in
the same directory passes it by, and leaves its shards and frozen parameters as they are.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from layerwise_dist import _native
from layerwise_dist.commit.holding import LOOKS
from layerwise_dist.commit.metadata import NO_LOCKS, CheckpointMetadataManager
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, DirectoryError, MismatchError, NotFoundError
from layerwise_dist.frameworks.composite import framework_of
from layerwise_dist.frameworks.described import Standing
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.reading.files import HeldFiles
from layerwise_dist.reading.info import TensorInfo
from layerwise_dist.reading.renaming import Rename, renamed, renamer
from layerwise_dist.reading.tensor import LazyTensor
from layerwise_dist.restore.choice import Wish, candidates, tell_passed_by
from layerwise_dist.restore.contents import OF_MODEL
from layerwise_dist.restore.sealed_state import optimizers_of
from layerwise_dist.restore.whole import SavedTensor, Whole, equal
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import FileLock
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.slices import ranks_text

log = logging.getLogger("layerwise_dist")

_LISTED = 4


def open_checkpoint(directory: str | os.PathLike[str], step: int | None = None, tag: str | None = None) -> Checkpoint:
    """Opens a committed checkpoint of a training's directory to read: as `restore()` would choose it, the lineage's
    newest whose shards open, or exactly that of a step, or the newest under a tag.

    The right to read is enough. Until `close()`, the end of a `with`, or the end of the process, the retention of a
    running job passes the checkpoint by. Headers, names and the state are verified here, tensors as they are read.

    Raises NotFoundError, DamageError (nothing that could be meant is sound), DirectoryError (the file system has no
    locks), OSError.
    """
    if step is not None and tag is not None:
        raise ValueError("one of step and tag says which checkpoint is meant, not both")
    root = os.path.abspath(os.path.expanduser(os.fspath(directory)))
    if not os.path.isdir(root):
        raise NotFoundError(f"{root}: {'not a directory' if os.path.lexists(root) else 'no such directory'}")
    manager = CheckpointMetadataManager(_native.PosixEnv(), root)
    wish = Wish(step, tag)
    for _ in range(LOOKS):
        inventory = manager.inventory()
        found = candidates(inventory, wish, root)
        if not found:
            raise NotFoundError(f"{root} holds no committed {wish}")
        try:
            opened = _first(manager, found, wish)
        except _Retired:
            continue
        tell_passed_by(inventory, opened.manifest, wish)
        return opened
    raise NotFoundError(f"{root}: each {wish} that was seen in {LOOKS} looks was removed before it could be held")


def open_attempt(directory: str | os.PathLike[str], attempt: AttemptId) -> Checkpoint:
    """The very checkpoint that another rank has open. Raises as `open_checkpoint`."""
    manager = CheckpointMetadataManager(_native.PosixEnv(), os.path.abspath(os.path.expanduser(os.fspath(directory))))
    try:
        return _first(manager, [manager.read_manifest(attempt)], Wish(attempt.step))
    except (FileNotFoundError, _Retired):
        raise NotFoundError(f"{manager.manifest_path(attempt)} is not on this rank, and rank 0 has it open") from None


class _Retired(Exception):
    """The checkpoint was removed between the look at the directory and now."""


def _first(manager: CheckpointMetadataManager, found: list[Manifest], wish: Wish) -> Checkpoint:
    problems = []
    for manifest in found:
        try:
            hold = manager.hold(manifest.attempt_id)
        except (FileNotFoundError, BlockingIOError):
            raise _Retired from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise DirectoryError(
                    error.errno, "its file system has no locks (flock), so that a job could remove the checkpoint "
                    "while it is read: copy it to another one", manager.root,
                ) from None  # fmt: skip
            raise
        try:
            return Checkpoint(manager, manifest, hold)
        except DamageError as error:
            if wish.certain:
                raise
            log.warning("passed by: %s", error)
            problems.append(str(error))
    raise DamageError(f"no checkpoint in {manager.root} opens: {'; '.join(problems[:_LISTED])}")


class Checkpoint(Mapping[str, LazyTensor]):
    """An open checkpoint: a mapping of tensors by name. Nothing of a tensor is read before it is indexed.

    A name is `<kind>/<fqn>`, as in docs/format.md: ``param/fc.weight``, ``buffer/bn.running_mean``,
    ``exp_avg/fc.weight``. A tied parameter is there once in `names`, and found under each of its names. Where ranks
    hold different tensors under one name, `tensor(name, rank)` gives each; of buffers the mapping gives rank 0's, and
    says so.

    Any thread may read. `open_checkpoint` makes one.

    Attributes:
        models: names of the models, where the job had several by name; each fqn begins with one and a dot. Else empty.
        path: the checkpoint's folder.
        manifest: its commit record.
    """

    def __init__(self, manager: CheckpointMetadataManager, manifest: Manifest, hold: FileLock) -> None:
        """Takes the hold over, also when it raises: DamageError, OSError, MismatchError (shards of other nodes)."""
        self._files = HeldFiles(manager, manifest, hold)
        self.manifest = manifest
        self.models = sorted(framework_of(manifest.framework))
        self.path = os.path.join(manager.root, manifest.attempt_id.folder)
        try:
            self._whole = Whole(manifest, self._files.shards())
        except BaseException:
            self.close()
            raise
        self._differ: dict[str, bool] = {}

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def tag(self) -> str | None:
        """The name that `save()` gave it; None for an automatic checkpoint."""
        return self.manifest.tag

    @property
    def world_size(self) -> int:
        """Ranks of the job that wrote it."""
        return self.manifest.world_size

    @property
    def hashed(self) -> bool:
        """Whether blocks can be verified: false if the job wrote with `hash: false`."""
        return all(
            shard.index.hashed for found in self._whole.tensors.values() for each in found for shard, _ in each.parts
        )

    @cached_property
    def names(self) -> list[str]:
        """Of all tensors, sorted; a tied parameter under its first name only."""
        return sorted(self._whole.tensors)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters, and of their state: each with the name in `names` that it stands for."""
        found = {}
        for name in self.names:
            kind, fqn = name.split("/", 1)
            if kind != "buffer":
                found.update({f"{kind}/{alias}": name for alias in self._tied.get(fqn, ())})
        return {alias: name for alias, name in found.items() if alias not in self._whole.tensors}

    @cached_property
    def _tied(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for state in self._whole.sealed:
            for fqn, aliases in state.get("aliases", {}).items():
                known = found.setdefault(fqn, [])
                known += [alias for alias in aliases if alias not in known]
        return found

    @cached_property
    def standing(self) -> dict[str, Standing]:
        """Parameters that stand for other tensors (quantized ones, say), by fqn; those are `param/<fqn>::<inner>`."""
        return {fqn: each for state in self._whole.sealed for fqn, each in state.get("standing", {}).items()}

    def weights(self, model: str | None = None) -> dict[str, str]:
        """The tensors of a model's `state_dict()`, by its keys: of each the name in this mapping, of a tied parameter
        under each of its keys. A parameter is its `master` where there is one, the fp32 copy that was updated.

        `model` is one of `models`; its keys come without its name. Raises MismatchError where there are several and
        none is named, or none is called so.
        """
        if self.models and model not in self.models:
            what = f"no model {model!r}" if model is not None else "several models"
            raise MismatchError(f"{self.path} has {what}: name one of {', '.join(self.models)}")
        if not self.models and model is not None:
            raise MismatchError(f"{self.path} has one model, which has no name; {model!r} was asked for")
        begin = f"{model}." if model is not None else ""
        found: dict[str, str] = {}
        for kind in ("buffer", "param", "master"):
            for name in self.names:
                if name.startswith(f"{kind}/"):
                    fqn = name.split("/", 1)[1]
                    tied = self._tied.get(fqn, ()) if kind != "buffer" else ()
                    found.update({key.removeprefix(begin): name for key in (fqn, *tied) if key.startswith(begin)})
        return dict(sorted(found.items()))

    @property
    def state_fqns(self) -> set[str]:
        """Parameters with optimizer state, be it tensors or numbers."""
        return {fqn for state in self._whole.sealed for fqn, kinds in state["optimizer"]["order"].items() if kinds}

    def state_kinds(self, fqn: str) -> list[str]:
        """Kinds of a parameter's optimizer state that are tensors, sorted; each is called `<kind>/<fqn>`."""
        return sorted(self._whole.state_kinds.get(fqn, ()))

    def view(self, rename: Rename | None = None, model: str | None = None) -> Checkpoint:
        """The same checkpoint under other names, as `layerwise_dist.load` takes `rename`; open as long as this one.
        With `model`, of one of several models only, whose names come without its own.

        Raises MismatchError for a model that is not there, and where two tensors would have one name.
        """
        if model is not None:
            self.weights(model)  # raises where there is no such one
        made = copy.copy(self)
        for name in ("names", "aliases", "_tied", "standing", "hyperparameters"):
            vars(made).pop(name, None)
        made._whole, made._differ = renamed(self.whole, renamer(rename, model)), {}
        made.models = self.models if model is None else []
        return made

    # -- tensors ------------------------------------------------------------------------------------------------

    def info(self, name: str) -> TensorInfo:
        """Raises KeyError for a name that is not there."""
        name = self.aliases.get(name, name)
        found = self._of(name)
        kind, fqn = name.split("/", 1)
        one = found[0]
        return TensorInfo(
            name, kind, fqn, DTYPES[one.dtype], one.shape, one.nbytes,
            tuple(alias for alias, of in self.aliases.items() if of == name), tuple(each.ranks for each in found),
        )  # fmt: skip

    def tensor(self, name: str, rank: int | None = None) -> LazyTensor:
        """With `rank`, the tensor of this name that a rank of the job held, alone or with others. Raises KeyError."""
        name = self.aliases.get(name, name)
        found = self._of(name)
        if rank is None:
            return LazyTensor(name, found[0], lambda: self._check_alike(name, found))
        for each in found:
            if rank in each.ranks:
                return LazyTensor(name, each, self._check_open)
        raise KeyError(f"rank {rank} of step {self.step} has no {name}")

    def unlike(self, name: str) -> bool:
        """Whether ranks hold different tensors under this name, which it may read. Raises KeyError, DamageError."""
        name = self.aliases.get(name, name)
        found = self._of(name)
        if name not in self._differ:
            self._check_open()
            self._differ[name] = any(not equal(found[0], other) for other in found[1:])
        return self._differ[name]

    get_slice = tensor  # the name that safetensors gives it

    def get_tensor(self, name: str) -> torch.Tensor:
        """All of it. Raises as `LazyTensor`'s indexing."""
        return self[name][...]

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._whole.tensors or name in self.aliases

    def _of(self, name: str) -> list[SavedTensor]:
        found = self._whole.tensors.get(name)
        if found is None:
            raise KeyError(f"step {self.step} in {os.path.dirname(self.path)} has no tensor {name!r}")
        return found

    def _check_alike(self, name: str, found: list[SavedTensor]) -> None:
        self._check_open()
        if len(found) == 1:
            return
        known = name in self._differ
        if not self.unlike(name):
            return
        ranks = ", ".join(ranks_text(each.ranks) or str(each.ranks[0]) for each in found)
        if not name.startswith("buffer/"):
            raise MismatchError(
                f"{name} of step {self.step}: ranks hold different ones (those of {ranks}): choose one with "
                f"tensor({name!r}, rank=...)"
            )
        if not known:
            log.warning("%s of step %d: ranks hold different ones (those of %s); rank 0's is taken",
                        name, self.step, ranks)  # fmt: skip

    # -- what is no tensor --------------------------------------------------------------------------------------

    @property
    def whole(self) -> Whole:
        """All of it, as a restore sees it. REQUIRES: open."""
        self._check_open()
        return self._whole

    def sealed(self, rank: int = 0) -> SealedState:
        """What a rank's boundary sealed besides tensors (docs/format/state.md, "The state extent"). Do not modify."""
        return self._whole.sealed[rank]

    @property
    def state_names(self) -> list[str]:
        """Of the objects that `attach(state=...)` named, and for which `state(name)` has something."""
        return list(self.sealed()["objects"])

    def state(self, name: str, rank: int = 0) -> Any:
        """What an object of `attach(state=...)` was, as its `state_dict()` gave it on a rank. Raises KeyError."""
        found = self.sealed(rank)["objects"]
        if name not in found:
            raise KeyError(f"step {self.step} has no state {name!r}; it has {', '.join(found) or 'none'}")
        return copy.deepcopy(found[name])

    @property
    def client_state(self) -> dict[Any, Any] | None:
        """What rank 0's `save()` was given; None if it was not made by `save()`."""
        return copy.deepcopy(self.sealed()["client_state"])

    @cached_property
    def hyperparameters(self) -> dict[str, list[dict[str, Any]]]:
        """The param groups of each optimizer, by its name among several, "" of the only one: hyper-parameters such as
        `lr`, and `params`, the fqns of the parameters in it on any rank. Empty if there is no optimizer with groups.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for state in self._whole.sealed:
            several = state["optimizer"]
            names = list(several["optimizers"]) if "optimizers" in several else [""]
            for name, described in zip(names, optimizers_of(state), strict=True):
                groups = found.setdefault(name, copy.deepcopy(described["groups"]))
                for mine, theirs in zip(groups, described["groups"], strict=False):
                    known = set(mine["params"])
                    mine["params"] += [fqn for fqn in theirs["params"] if fqn not in known]
        return found

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets retention have the checkpoint. Nothing can be read from now on. Safe to call twice."""
        self._files.end()

    @property
    def closed(self) -> bool:
        return self._files.ended

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"the checkpoint of step {self.step} in {os.path.dirname(self.path)} is closed")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        tag = f", tag {self.tag!r}" if self.tag is not None else ""
        return f"<Checkpoint of step {self.step}{tag}: {len(self)} tensors of {self.world_size} rank(s) in {self.path}>"


def is_of_model(name: str) -> bool:
    """Whether a tensor of this name is a model's and not an optimizer's."""
    return name.split("/", 1)[0] in OF_MODEL
