# SPDX-License-Identifier: Apache-2.0
"""Prints the newest checkpoint of a directory with the standard library only, as docs/format.md describes it.

    python examples/read_checkpoint.py DIR

With the `xxhash` package it also checks every hash. A start for a reader in another language. Unlike the package's own
(`layerwise_dist/storage/reader.py`) it stops at any damaged record, and trusts sizes and offsets once hashes are right.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

try:
    from xxhash import xxh3_64_hexdigest as xxh3  # optional: pip install xxhash
except ImportError:
    xxh3 = None


def check(data: Any, expected: str, what: str) -> None:
    if xxh3 and xxh3(data) != expected:
        raise ValueError(f"{what} is damaged")


def record(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        data = file.read()
    tail = re.fullmatch(rb',"checksum":"([0-9a-f]{16})"}\n', data[-32:])
    if not tail:
        raise ValueError(f"{path} is cut")
    check(data[:-32], tail[1].decode(), path)
    return json.loads(data[:-32] + b"}")


def lineage(root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(folder, manifest) of the commits that restore may choose from, newest first."""
    found = {}
    for name in os.listdir(root):
        if re.fullmatch(r"branch_\d{10}\.json", name):
            found[int(name[7:17])] = (None, record(os.path.join(root, name)))
        elif re.fullmatch(r"step_\d{10}-[0-9a-f]{16}", name) and os.path.exists(
            os.path.join(root, name, "manifest.json")
        ):
            found[int(name[-8:], 16)] = (os.path.join(root, name), record(os.path.join(root, name, "manifest.json")))
    newest = max(found, default=None)
    if newest is None:
        return
    folder, here = found[newest]
    spans = [*([{"first": here["branch"], "last": newest}] if folder else []), *here["before"]]
    for seq in sorted(found, reverse=True):
        manifest = found[seq][1]
        mine = manifest["identity"] == here["identity"] and any(s["first"] <= seq <= s["last"] for s in spans)
        ref = {"seq": seq, "attempt": manifest.get("attempt")}
        if found[seq][0] and (mine or ref == here["parent"]):
            yield found[seq]


def shard(path: str, entry: dict[str, Any]) -> tuple[dict[str, tuple[Any, ...]], Any, Any]:
    """Of one file: tensors by name as (dtype, shape, place, bytes), the state's JSON, the state's bytes."""
    with open(path, "rb") as file:
        data = memoryview(file.read())
    base = entry["header_bytes"]
    check(data[:base], entry["header_hash"], f"{path}: header")
    header = json.loads(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    meta = header.pop("__metadata__")
    step, hashes, block = int(meta["block_bytes"]), meta["hashes"], 0
    for _, offset, nbytes in json.loads(meta["layers"]) if meta.get("hash") != "none" else []:
        for at in range(base + offset, base + offset + nbytes, step):
            check(
                data[at : min(at + step, base + offset + nbytes)],
                hashes[16 * block : 16 * block + 16],
                f"{path}: block {block}",
            )
            block += 1
    content = {name: data[base + t["data_offsets"][0] : base + t["data_offsets"][1]] for name, t in header.items()}
    check(data[base + header["state/json"]["data_offsets"][0] :], meta["state_hash"], f"{path}: state")
    state, blob = json.loads(bytes(content.pop("state/json")) or b"null"), content.pop("state/bytes")
    places = json.loads(meta["slices"])
    return (
        {n: (header[n]["dtype"], header[n]["shape"], places.get(n, {}), c) for n, c in content.items() if n[0] != "."},
        state,
        blob,
    )


if __name__ == "__main__":
    folder, manifest = next(lineage(sys.argv[1]))
    print(folder, "step", manifest["step"], "hashes checked" if xxh3 else "hashes not checked")
    for entry in manifest["shards"]:
        tensors, state, blob = shard(os.path.join(folder, entry["file"]), entry)
        if base := entry.get("base"):  # frozen parameters
            tensors |= shard(os.path.join(sys.argv[1], "base", base["attempt"], entry["file"]), base)[0]
        print("rank", entry["rank"], "state objects", list(state["objects"]), len(blob), "bytes of state")
        for name, (dtype, shape, place, content) in tensors.items():
            print("  ", name, dtype, shape, place or "whole", len(content), "bytes")
