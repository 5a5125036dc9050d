# SPDX-License-Identifier: Apache-2.0
"""What happens to each layer in one checkpointed step, and when: JSON that Perfetto and chrome://tracing open.

The rows (threads of the trace) are the training thread's phases, gradients, updates, captures, and the writer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from layerwise_dist.capture.lease import Capture
from layerwise_dist.errors import BoundaryError
from layerwise_dist.frameworks.framework import ParamView

_ROWS = ("training", "gradients", "updates", "captures", "writes")


class StepTrace:
    """Notes one step, from its making until its checkpoint is written; then `save` is called once.

    Times are in nanoseconds of `time.monotonic_ns()`. Belongs to the training thread.
    """

    def __init__(self, path: Path, views: Sequence[ParamView]) -> None:
        self.path = path
        self._began = time.monotonic_ns()
        self.gradients: dict[str, int] = {}  # a layer's last gradient
        self.updates: dict[str, tuple[int, int]] = {}
        self.captures: dict[str, int] = {}
        self.writes: dict[str, tuple[int, int]] = {}
        self.phases: list[tuple[str, int, int]] = []
        self._open: dict[str, int] = {}
        self._capture: Capture | None = None
        self._sealed = False
        self._layers_of: dict[str, list[str]] = {}  # of each batch, by its name
        self._hooks = [
            view.param.register_post_accumulate_grad_hook(lambda _, layer=view.layer: self._gradient(layer))
            for view in views
            if view.param.is_leaf and view.param.requires_grad
        ]

    def _gradient(self, layer: str) -> None:
        if not self._sealed:
            self.gradients[layer] = time.monotonic_ns()

    def overwriting(self, layers: Collection[str] | None) -> None:
        if self._sealed:
            return
        now = time.monotonic_ns()
        for layer in ("(all)",) if layers is None else layers:
            self._open.setdefault(layer, now)

    def updated(self, layers: Collection[str]) -> None:
        if self._sealed:
            return
        now = time.monotonic_ns()
        for layer in layers:
            self.updates[layer] = (self._open.pop(layer, now), now)

    def update_done(self) -> None:
        self.updated([layer for layer in self._open if layer == "(all)"])
        self._open.clear()

    def captured(self, capture: Capture, batches: Collection[int]) -> None:
        """These batches of it were taken now."""
        if self._sealed:
            return
        if capture is not self._capture:  # captured again, in other batches
            self._capture = capture
            self.captures.clear()
            self._layers_of.clear()
        for number in batches:
            batch = capture.survey.batches[number]
            self.captures[batch.name] = time.monotonic_ns()
            self._layers_of[batch.name] = [layer or "(root)" for layer in batch.layers]

    def sealed(self) -> None:
        """The step is over; what was captured is its checkpoint."""
        if self._sealed:
            return
        self._sealed = self._capture is not None
        now = time.monotonic_ns()
        self.phases.append(("step", self._began, now))
        if not self._sealed:  # not this step, then
            self._began = now
            self.gradients.clear()
            self.updates.clear()
            self.phases.clear()

    def save_if_complete(self, wait_s: float = 0.0) -> bool:
        """Writes the file once all is on the disk; True if it is written. Waits at most `wait_s` seconds for that."""
        capture = self._capture
        if not self._sealed or capture is None or not capture.write.wait_written(wait_s):
            return False
        survey, times = capture.survey, capture.write.block_times()
        for number, batch in enumerate(survey.batches):
            extent = capture.write.layout.extents[number]
            mine = times[extent.first_block : extent.first_block + extent.blocks]
            if mine:
                self.writes[batch.name] = (min(start for start, _ in mine), max(end for _, end in mine))
        self.path.write_text(json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"}))
        self.detach()
        return True

    def events(self) -> list[dict[str, Any]]:
        """Events of the Trace Event Format: microseconds since the step began."""
        found: list[dict[str, Any]] = [
            {"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": {"name": name}}
            for row, name in enumerate(_ROWS)
        ]

        def add(row: str, name: str, begin: int, end: int | None = None) -> None:
            event = {"pid": 0, "tid": _ROWS.index(row), "name": name or "(root)", "ts": (begin - self._began) / 1e3}
            if name in self._layers_of and row in ("captures", "writes"):
                event["args"] = {"layers": self._layers_of[name]}
            found.append(event | ({"ph": "i", "s": "t"} if end is None else {"ph": "X", "dur": (end - begin) / 1e3}))

        for name, begin, end in self.phases:
            add("training", name, begin, end)
        for layer, at in self.gradients.items():
            # An update in the backward is made by a hook that runs before ours on the same gradient.
            add("gradients", layer, min(at, self.updates.get(layer, (at,))[0]))
        for layer, (begin, end) in self.updates.items():
            add("updates", layer, begin, end)
        for batch, at in self.captures.items():
            add("captures", batch, at)
        for batch, (begin, end) in self.writes.items():
            add("writes", batch, begin, end)
        return found

    def detach(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class Tracing:
    """Which step is traced on this rank. `step` is None nearly always; it is looked at on the way of every layer."""

    def __init__(self) -> None:
        self.step: StepTrace | None = None

    def begin(self, path: str | os.PathLike[str], views: Sequence[ParamView]) -> None:
        """Raises BoundaryError while one is under way."""
        if self.step is not None:
            raise BoundaryError(f"a trace into {self.step.path} is under way: it ends with the next step that is saved")
        self.step = StepTrace(Path(path), views)

    def end_if_complete(self, wait_s: float = 0.0) -> None:
        """Waits at most `wait_s` seconds for what is not written yet."""
        if self.step is not None and self.step.save_if_complete(wait_s):
            self.step = None

    def detach(self) -> None:
        """Removes the hooks of a trace that comes to nothing."""
        if self.step is not None:
            self.step.detach()
