# SPDX-License-Identifier: Apache-2.0
"""A coverage-guided fuzzer for Python code: inputs that reach a new line, or go from one line to another for the first
time, are kept and changed further. It needs nothing but `sys.settrace`; `fuzz.py --atheris` runs the same targets under
atheris instead, where that is installed.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.targets import Target

LONGEST = 1 << 14
SLOW_S = 2.0
TOKENS = [
    b"null", b"true", b"false", b"NaN", b"Infinity", b"1e999", b"-1", b"0", b"1.0", b"18446744073709551616",
    b"9223372036854775807", b"4294967295", b'""', b"[]", b"{}", b'"\\ud800"', b'"\\u0000"', b"\xff", b'"!"', b'"v"',
    b'{"!":"int","v":"f"}', b'{"!":"bytes","offset":0,"bytes":1}', b'{"!":"dict","v":[[1,2]]}', b"[[[[[[",
    b'{"!":"tensor","dtype":"uint8","shape":[0],"offset":0,"bytes":0}', b'"param/x"', b'"step"', b'"shape"',
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1 << 63, (1 << 64) + 1, 1 << 31, 1.5, 1e300, "", "x", "0" * 16, "f" * 32, [], {}, [[]],
    {"!": "int", "v": "f"}, "\ud800", "\x1b[31m", "a/b", [0, 0], [1 << 40],
]  # fmt: skip


class Fuzzer:
    """`corpus` is a folder of inputs, one a file; what is found is added to it if `keep`."""

    def __init__(self, target: Target, corpus: Path, *, seed: int, keep: bool = False) -> None:
        self._target, self._corpus, self._keep = target, corpus, keep
        self.draw = random.Random(seed)
        self.inputs: list[bytes] = []
        self.seen: set[tuple[str, int, int]] = set()
        self.runs = 0
        self.crashes: list[tuple[bytes, str]] = []

    def load(self) -> None:
        """The seeds and the corpus: run, so that what they reach is not new."""
        stored = sorted(self._corpus.iterdir()) if self._corpus.is_dir() else []
        for data in [*self._target.seeds(), *(each.read_bytes() for each in stored)]:
            self.try_input(data, always=True)

    def run(self, seconds: float, runs: int | None = None) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.crashes and (runs is None or self.runs < runs):
            data = self.draw.choice(self.inputs[-30:] if self.draw.random() < 0.3 else self.inputs)
            for _ in range(self.draw.choice([1, 1, 2, 4])):
                data = self.mutated(data)
            self.try_input(data[:LONGEST])

    def try_input(self, data: bytes, *, always: bool = False) -> None:
        self.runs += 1
        found, problem = self._traced(data)
        if problem is not None:
            self.crashes.append((data, problem))
        elif always or not found <= self.seen:
            self.inputs.append(data)
            if self._keep and not always:
                self._corpus.mkdir(parents=True, exist_ok=True)
                (self._corpus / hashlib.sha1(data).hexdigest()[:16]).write_bytes(data)
        self.seen |= found

    def _traced(self, data: bytes) -> tuple[set[tuple[str, int, int]], str | None]:
        """(steps from line to line, what went wrong)"""
        watched, found = self._target.watched, set[tuple[str, int, int]]()
        known: dict[str, bool] = {}

        def lines(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                found.add((frame.f_code.co_filename, last, frame.f_lineno))
                last = frame.f_lineno
            return lines

        def calls(frame: FrameType, event: str, _: Any) -> Any:
            name = frame.f_code.co_filename
            if name not in known:
                known[name] = name.endswith(watched)
            return lines if known[name] else None

        last, began = 0, time.monotonic()
        sys.settrace(calls)
        try:
            self._target.run(data)
        except BaseException:  # noqa: BLE001
            sys.settrace(None)
            return found, traceback.format_exc()
        finally:
            sys.settrace(None)
        took = time.monotonic() - began
        return found, f"took {took:.1f} s" if took > SLOW_S else None

    # -- mutations ------------------------------------------------------------------------------------------------

    def mutated(self, data: bytes) -> bytes:
        draw = self.draw
        if draw.random() < 0.6:
            try:
                tree = json.loads(data)
            except (ValueError, RecursionError):
                pass
            else:
                if isinstance(tree, dict | list):
                    return self._mutated_tree(tree)
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and data:
            at = draw.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        if kind == 1:
            return data[:at] + draw.choice(TOKENS) + data[at:]
        if kind == 2:
            return data[:at] + data[at + draw.randrange(1, 20) :]
        if kind == 3:
            other = draw.choice(self.inputs) if self.inputs else data
            begin = draw.randrange(len(other) + 1)
            return data[:at] + other[begin : begin + draw.randrange(1, 200)] + data[at:]
        if kind == 4:
            end = at + draw.randrange(1, 40)
            return data[:at] + data[at:end] * draw.choice([2, 3, 50]) + data[end:]
        return data[:at] + draw.choice(TOKENS) + data[at + draw.randrange(1, 8) :]

    def _mutated_tree(self, tree: Any) -> bytes:
        """One node is replaced, removed, doubled or taken from another input."""
        draw = self.draw
        nodes: list[tuple[Any, Any]] = []
        left = [tree]
        while left:
            node = left.pop()
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                nodes.append((node, key))
                if isinstance(node[key], dict | list):
                    left.append(node[key])
        if not nodes:
            return json.dumps([draw.choice(VALUES)]).encode()
        node, key = draw.choice(nodes)
        kind = draw.randrange(6)
        if kind == 0:
            node[key] = draw.choice(VALUES)
        elif kind == 1:
            del node[key]
        elif kind == 2 and isinstance(node, list):
            node.insert(key, node[key])
        elif kind == 2:
            node[draw.choice(["more", "!", "x" * 50, "\x1b"])] = node[key]
        elif kind == 3 and type(node[key]) is int:
            node[key] += draw.choice([-1, 1, 4096, -4096, 1 << 32])
        elif kind == 4 and isinstance(node[key], str):
            text = node[key]
            at = draw.randrange(len(text) + 1)
            some = draw.choice(["", "0", "\n", "é", "٣", "f" * 16, text])
            node[key] = text[:at] + some + text[at + draw.randrange(3) :]
        else:
            other, place = draw.choice(nodes)
            node[key] = json.loads(json.dumps(other[place])) if place in range(len(other)) or place in other else None
        # Strings that hold tables in JSON are changed as such now and then.
        if draw.random() < 0.3:
            self._mutate_inner(tree)
        return json.dumps(tree, separators=(",", ":")).encode()

    def _mutate_inner(self, tree: Any) -> None:
        meta = tree.get("__metadata__") if isinstance(tree, dict) else None
        if not isinstance(meta, dict):
            return
        for name in ("slices", "layers"):
            try:
                inner = json.loads(meta.get(name, ""))
            except (ValueError, TypeError, RecursionError):
                continue
            if isinstance(inner, dict | list):
                meta[name] = self._mutated_tree(inner).decode(errors="replace")
