# SPDX-License-Identifier: Apache-2.0
"""Reads `torch.save` files, which are pickles, without running anything that they name.

torch's own restricted unpickler (`weights_only=True`) makes tensors and plain containers. It refuses every file of
DeepSpeed's optimizers, since those hold objects of its classes. Here each of a fixed list of names stands for an inert
object instead, which keeps what was said of it and does nothing: DeepSpeed need not even be installed. Any other name
in a file is an error, and the file is not used.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from layerwise_dist.errors import DamageError, UnsupportedError

# What the files of DeepSpeed and of trainers hold beside tensors.
NAMES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScalerBase",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.utils.tensor_fragment.tensor_fragment",
    "deepspeed.runtime.zero.partition_parameters.ZeroParamStatus",
    "deepspeed.runtime.zero.partition_parameters.ZeroParamType",
    "argparse.Namespace",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)


# What torch raises for a file that it does not take.
_REFUSED = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)


class Inert:
    """What stands for an object of a class of the list: what it was made of, and what was said of it."""

    kind: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = object.__new__(cls)
        made.args, made.state = (*args, *kwargs.values()), None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """A member of the object, if it has one of that name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def _stand_in(name: str) -> type[Inert]:
    return type(name.rpartition(".")[2], (Inert,), {"kind": name})


_STAND_INS = [(_stand_in(name), name) for name in NAMES]


@contextmanager
def _only_these() -> Iterator[None]:
    """torch's unpickler takes our stand-ins, and nothing that others have allowed it."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(list(_STAND_INS))
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def load(path: str, *, allowed: bool) -> Any:
    """What `torch.save` wrote, on the CPU; tensors stay in the file until they are read.

    `allowed`: the user has said that pickles may be read. Raises UnsupportedError where not, or for a file that names
    something else than is on the list; DamageError for what is no such file; OSError.
    """
    check_allowed(path, allowed)
    with open(path, "rb"):
        pass  # what cannot be opened is an OSError that says so
    with _only_these():
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except _REFUSED as error:
            raise _explained(path, error) from None


def loads(data: bytes, where: str) -> Any:
    """The same of bytes that were read from somewhere within a file. REQUIRES: pickles are allowed."""
    with _only_these():
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except _REFUSED as error:
            raise _explained(where, error) from None


def check_allowed(path: str, allowed: bool) -> None:
    if not allowed:
        raise UnsupportedError(
            f"{path} is a pickle: with --allow-pickle it is read by an unpickler that runs nothing and takes only "
            f"tensors, plain values and {len(NAMES)} names of DeepSpeed's and numpy's, which it makes nothing of"
        )


def _explained(path: str, error: Exception) -> UnsupportedError | DamageError:
    said = " ".join(str(error).split())
    if "GLOBAL" in said or "Unsupported" in said:
        name = said.partition("GLOBAL ")[2].split(" ")[0] or said[:200]
        return UnsupportedError(
            f"{path}: it holds {name}, which is not on the list of names that an import takes; nothing of it was used"
        )
    return DamageError(f"{path}: not a file of torch.save, or damaged: {said[:300]}")


class _OfMetadata(pickle.Unpickler):
    """DCP's `.metadata`: plain records of torch's, and no other name."""

    TAKEN: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name in self.TAKEN.get(module, ()) or (module == "torch" and isinstance(_dtype(name), torch.dtype)):
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib":
            return _PATH
        raise UnsupportedError(f"it holds {module}.{name}, which is not on the list of names that an import takes")

    def persistent_load(self, pid: Any) -> Any:
        raise UnsupportedError("it refers to something outside itself")


_PATH = _stand_in("pathlib.Path")


def _dtype(name: str) -> Any:
    return getattr(torch, name, None) if name.isidentifier() and not name.startswith("_") else None


def load_metadata(path: str, *, allowed: bool) -> Any:
    """DCP's `.metadata`. Raises as `load`."""
    check_allowed(path, allowed)
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > 1 << 30:
            raise UnsupportedError(f"{path}: is larger than 1 GiB")
        try:
            return _OfMetadata(file).load()
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}; nothing of it was used") from None
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
            raise DamageError(f"{path}: not the metadata of a DCP checkpoint, or damaged: {error}") from None
