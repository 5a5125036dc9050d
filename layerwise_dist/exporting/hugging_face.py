# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's layout: safetensors files, an index if there are several, and what a model's folder has beside them.

The format is https://github.com/huggingface/safetensors; its own package writes a file from memory that holds all of
it, so that files are written here, a part of a tensor at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from layerwise_dist import _native
from layerwise_dist.errors import UnsupportedError
from layerwise_dist.exporting.contents import Contents, Weight
from layerwise_dist.exporting.output import flush, not_what_was_written
from layerwise_dist.tensors.pieces import dtype_code

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a model's folder has beside weights: configuration, tokenizer, processor.
_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")
_WEIGHTS = (".index.json",)
_SMALL_BYTES = 256 << 20


def write(
    folder: Path, contents: Contents, *, max_shard_bytes: int, like: Path | None, advance: Callable[[int], None]
) -> None:
    """`like` is a folder whose configuration and tokenizer are copied. Verified: each file is read back.

    A tied weight is written once, under the key that the architecture does not tie to another one, as far as `like`
    tells and transformers is installed; else under its first.
    """
    if sys.byteorder != "little":
        raise UnsupportedError("safetensors files are little-endian, and this machine is not")
    ties = _tied_keys(like)
    weights = [_under_the_right_key(weight, ties) for weight in contents.weights]
    weights.sort(key=lambda weight: weight.key)
    files = _divided(weights, max_shard_bytes)
    places: dict[str, str] = {}
    for number, part in enumerate(files):
        name = ONE if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, part, advance)
        places |= {weight.key: name for weight in part}
    if len(files) > 1:
        total = sum(weight.nbytes for weight in weights)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if like is not None:
        _copy_small(like, folder)


def _divided(weights: list[Weight], most: int) -> list[list[Weight]]:
    """In order; a file has more than `most` bytes only if it is one tensor."""
    files: list[list[Weight]] = [[]]
    held = 0
    for weight in weights:
        if files[-1] and held + weight.nbytes > most:
            files.append([])
            held = 0
        files[-1].append(weight)
        held += weight.nbytes
    return files


def _write_file(path: Path, weights: list[Weight], advance: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for weight in weights:
        header[weight.key] = {
            "dtype": dtype_code(weight.dtype, weight.key),
            "shape": weight.tensor.get_shape(),
            "data_offsets": [at, at + weight.nbytes],
        }
        at += weight.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces: list[tuple[str, int, int]] = []
    with open(path, "xb") as file:
        head = len(text).to_bytes(8, "little") + text
        file.write(head)
        pieces.append(("the header", len(head), _native.xxh3_64(head)))
        for weight in weights:
            for chunk in weight.chunks():
                data = memoryview(chunk.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is one
                file.write(data)
                pieces.append((weight.key, len(data), _native.xxh3_64(data)))
                advance(len(data))
    flush(path)
    _read_back(path, pieces)


def _read_back(path: Path, pieces: Sequence[tuple[str, int, int]]) -> None:
    """`pieces`: what each part of the file is, its bytes, and its hash."""
    with open(path, "rb") as file:
        for what, nbytes, written in pieces:
            if _native.xxh3_64(file.read(nbytes)) != written:
                raise not_what_was_written(path, what)
        if file.read(1):
            raise not_what_was_written(path, "its end")


def _copy_small(like: Path, folder: Path) -> None:
    for each in sorted(like.iterdir()):
        if each.suffix in _SMALL and not each.name.endswith(_WEIGHTS) and each.is_file():
            if each.stat().st_size > _SMALL_BYTES:
                raise UnsupportedError(f"{each}: is larger than configurations and tokenizers are")
            shutil.copyfile(each, folder / each.name)


def _under_the_right_key(weight: Weight, ties: Collection[str]) -> Weight:
    keys = (weight.key, *weight.tied)
    key = next((key for key in keys if not any(_names(tie, key) for tie in ties)), weight.key)
    return Weight(key, weight.tensor, weight.dtype, tuple(other for other in keys if other != key))


def _names(tie: str, key: str) -> bool:
    return key == tie or key.endswith(f".{tie}")


def _tied_keys(like: Path | None) -> list[str]:
    """Keys that the architecture of a model's folder ties to others, and leaves out when it saves."""
    config = like / "config.json" if like is not None else None
    if config is None or not config.is_file():
        return []
    try:
        names = json.loads(config.read_text()).get("architectures") or []
    except (ValueError, AttributeError, UnicodeDecodeError):
        raise UnsupportedError(f"{config}: is not a model's configuration") from None
    try:
        import transformers
    except ImportError:
        return []
    kinds = (getattr(transformers, name, None) for name in names if isinstance(name, str))
    return [key for kind in kinds for key in getattr(kind, "_tied_weights_keys", None) or ()]


def size_of(folder: Path) -> dict[str, int]:
    """Bytes of each file, by name."""
    return {name: os.lstat(folder / name).st_size for name in sorted(os.listdir(folder))}
